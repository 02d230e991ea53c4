"""`resm`, `tsvm`, `iso_c` and `iso_cts` as merge methods of an unpatched mergekit, 0.1.4 or 0.1.5.

`register()` adds them to mergekit's registry; `resm-mergekit-yaml` is `mergekit-yaml` with them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

import torch
import yaml

from resm_kernels.api import merge_tensors
from resm_kernels.errors import (
    MissingDependencyError,
    RecipeError,
    ResmError,
    UsageError,
    printable,
)
from resm_kernels.methods import METHODS, Method, Option
from resm_kernels.recipe import WEIGHT

METHOD_NAMES = ("resm", "tsvm", "iso_c", "iso_cts")
"""Methods of ours that mergekit lacks; `linear` and `task_arithmetic` are its own."""
UNAVAILABLE = ("split",)
"""Options that need the model's config, which mergekit does not hand to a method."""
OLDEST = (0, 1, 4)
COMMAND = "resm-mergekit-yaml"
INTERRUPTED = 130
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A parameter as mergekit carries it: one scalar per tensor.

    mergekit spreads any list over the layers, and 0.1.4 knows numbers only. So a list of name
    patterns is a switch that filters turn on and off, and a choice `rank: energy` can also be
    written as the switch `rank.energy: true`.

    Attributes
    ----------
    name : str
        As written in mergekit's YAML.
    method : str
        Name of the method, for messages.
    option : Option
        Our parameter that it stands for.
    choice : str or None
        The one choice that this switch stands for.
    """

    name: str
    method: str
    option: Option
    choice: str | None = None

    @property
    def default(self) -> Any:
        """The option's default, or None where None means that nothing was chosen."""
        return None if self.option.kind in (str, tuple) else self.option.default

    def check(self, value: object) -> Any:
        """Return the value in its own type; UsageError names the parameter."""
        switch = self.choice is not None or self.option.kind in (bool, tuple)
        try:
            if value is None and self.default is None:
                return None
            if not switch:
                return self.option.check(value)
            # 0.1.4 turns true and false into 1.0 and 0.0.
            if isinstance(value, bool | int | float) and value in (0, 1):
                return bool(value)
            raise ValueError(f"got {value!r}, expected true or false")
        except ValueError as error:
            fix = None
            if self.option.kind is tuple:
                fix = f"{self.name}: [{{filter: part of a name, value: true}}, {{value: false}}]"
            raise UsageError(f"parameter {self.name} of {self.method}: {error}", fix=fix) from None


@functools.cache
def settings(method: str) -> tuple[Setting, ...]:
    """The parameters of one of our methods in mergekit's terms, `weight` (per model) left out."""
    found = []
    for option in METHODS[method].specs.values():
        if option.name in UNAVAILABLE:
            continue
        found.append(Setting(option.name, method, option))
        found += [Setting(f"{option.name}.{c}", method, option, c) for c in option.choices]
    return tuple(found)


def weight_setting(method: str) -> Setting:
    """The per-model parameter."""
    return Setting(WEIGHT.name, method, WEIGHT)


def parameters_of(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values by mergekit's names as parameters for `merge_tensors`."""
    chosen: dict[str, Any] = {}
    for setting in settings(method):
        value = values[setting.name]
        if setting.choice is not None:
            value = setting.choice if value else None
        elif setting.option.kind is tuple and value is not None:
            value = ["*"] if value else []
        if value is None:
            continue
        name = setting.option.name
        if chosen.setdefault(name, value) != value:
            raise UsageError(
                f"parameter {name} of {method}: {chosen[name]} and {value} at once",
                fix=f"keep one of {name}: {value} and the switches {name}.*",
            )
    return chosen


def merge_group(
    method: str,
    name: str,
    base: torch.Tensor,
    experts: Mapping[Any, torch.Tensor],
    weights: Mapping[Any, float],
    values: Mapping[str, Any],
) -> torch.Tensor:
    """Merge one tensor; arithmetic in float32, rounded once to the base's dtype.

    Parameters
    ----------
    experts, weights : mapping
        By model, in the recipe's order.
    values : mapping
        Checked values by mergekit's names.

    Raises
    ------
    ResmError
        As `merge_tensors`; the message names the models.
    """
    try:
        return merge_tensors(
            base,
            list(experts.values()),
            method,
            weights=[weights[model] for model in experts],
            parameters=parameters_of(method, values),
            name=name,
        )
    except ResmError as error:
        models = "; ".join(f"expert {i} is {model}" for i, model in enumerate(experts, start=1))
        error.what = f"{error.what} ({models})"
        raise


def pretty_name(method: Method[Any]) -> str:
    """What mergekit's model card calls the method."""
    return f"resm-kernels {method.name}, {method.source.partition(', arXiv')[0]}"


def reference_url(method: Method[Any]) -> str | None:
    """The paper that mergekit's model card links."""
    found = re.search(r"arXiv (\d{4}\.\d{5})", method.source)
    return f"https://arxiv.org/abs/{found[1]}" if found else None


def register() -> dict[str, str]:
    """Add our methods to mergekit's registry; a second call changes nothing.

    Returns
    -------
    dict
        Our name -> the name in mergekit: the same, or `resm_kernels.<name>` where mergekit (a
        fork, or a plugin) already has a method of that name, which is left as it is.

    Raises
    ------
    MissingDependencyError
        mergekit is absent, or neither of the two method interfaces is found in it.
    """
    methods, version = _load()
    if hasattr(methods, "GroupMergeMethod"):
        known = {method.spec.name: method for method in methods.registered_methods()}
        make, add = _group_method, methods.register
    elif hasattr(methods, "REGISTERED_MERGE_METHODS"):
        known = methods.REGISTERED_MERGE_METHODS
        make = _graph_method

        def add(method: Any) -> None:
            known[method.name()] = method
    else:
        raise _unsupported(version)
    names = {}
    for name in METHOD_NAMES:
        free = next(
            n
            for n in (name, f"resm_kernels.{name}")
            if n not in known or hasattr(known[n], "resm_kernels_method")
        )
        if free not in known:
            add(make(METHODS[name], free))
        if free != name:
            LOG.warning("mergekit %s has a method %s of its own; ours is %s", version, name, free)
        names[name] = free
    return names


def _load() -> tuple[Any, str]:
    try:
        version = importlib.metadata.version("mergekit")
        methods = importlib.import_module("mergekit.merge_methods")
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        raise MissingDependencyError(
            "mergekit cannot be imported", got=str(error), fix="pip install 'mergekit>=0.1.4'"
        ) from error
    if tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < OLDEST:
        raise _unsupported(version)
    return methods, version


def _unsupported(version: str) -> MissingDependencyError:
    return MissingDependencyError(
        "this mergekit has no method interface that we know",
        got=version,
        expected="0.1.4 or 0.1.5",
        fix="pip install mergekit==0.1.5",
    )


def _group_method(method: Method[Any], name: str) -> Any:
    """A method for mergekit 0.1.5, which hands over groups of borrowed tensors."""
    from mergekit.merge_methods import base as api
    from pydantic import PlainValidator

    def spec_of(setting: Setting, scope: Any) -> Any:
        # Ours is no ValueError: pydantic lets it through, with the parameter's name.
        value_type = Annotated[Any, PlainValidator(setting.check)]
        return api.ParameterSpec(
            setting.name, value_type, scope, setting.default, setting.option.help
        )

    weight = weight_setting(method.name)
    shared = [spec_of(setting, api.ParameterScope.SHARED) for setting in settings(method.name)]

    class ResmKernelsMethod(api.GroupMergeMethod):  # type: ignore[misc]
        resm_kernels_method = method.name
        spec = api.MergeMethodSpec(
            name=name,
            parameters=(*shared, spec_of(weight, api.ParameterScope.NON_BASE)),
            contract=api.InputContract(base=api.BasePolicy.REQUIRED, min_non_base=1),
            pretty_name=pretty_name(method),
            reference_url=reference_url(method),
            optional_tensor_policy=api.OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        )

        def merge_group(self, group: Any, /, **parameters: Any) -> torch.Tensor:
            weights = parameters.pop(WEIGHT.name)
            return merge_group(
                method.name,
                group.metadata.name or "",
                group.base.tensor,
                {entry.id: entry.tensor for entry in group.non_base},
                weights,
                parameters,
            )

    return ResmKernelsMethod()


def _graph_method(method: Method[Any], name: str) -> Any:
    """A method for mergekit 0.1.4, which asks for a task of its graph per tensor."""
    from mergekit.architecture import WeightInfo
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.graph import Task
    from mergekit.merge_methods.base import ConfigParameterDef, MergeMethod

    weight = weight_setting(method.name)

    class ResmKernelsTask(Task[torch.Tensor]):  # type: ignore[misc]
        tensors: Task
        base_model: ModelReference
        output_weight: WeightInfo
        values: ImmutableMap[str, Any]
        weights: ImmutableMap[ModelReference, float]

        def arguments(self) -> dict[str, Any]:
            return {"tensors": self.tensors}

        def group_label(self) -> str | None:
            return self.tensors.group_label()  # type: ignore[no-any-return]

        def uses_accelerator(self) -> bool:
            return True

        def execute(self, tensors: Mapping[Any, torch.Tensor]) -> torch.Tensor:
            base = tensors.get(self.base_model)
            if base is None:
                raise UsageError(
                    f"tensor {self.output_weight.name!r}: not in the base model {self.base_model}"
                )
            experts = {m: tensors[m] for m in self.weights if tensors.get(m) is not None}
            if not experts or not base.is_floating_point():
                return base
            return merge_group(
                method.name, self.output_weight.name, base, experts, self.weights, self.values
            )

    class ResmKernelsMethod(MergeMethod):  # type: ignore[misc]
        resm_kernels_method = method.name

        def name(self) -> str:
            return name

        def pretty_name(self) -> str | None:
            return pretty_name(method)

        def reference_url(self) -> str | None:
            return reference_url(method)

        def parameters(self) -> list[Any]:
            return [
                ConfigParameterDef(name=s.name, default_value=s.default)
                for s in settings(method.name)
            ]

        def tensor_parameters(self) -> list[Any]:
            return [ConfigParameterDef(name=WEIGHT.name, default_value=WEIGHT.default)]

        def make_task(
            self,
            *,
            output_weight: Any,
            tensors: Any,
            parameters: Any,
            tensor_parameters: Any,
            base_model: Any,
        ) -> Any:
            # mergekit's own maps of tensors may come in any order; this one is the recipe's.
            experts = [model for model in tensor_parameters if model != base_model]
            if base_model is None or not experts:
                raise UsageError(f"{name}: base_model and at least one more model are needed")
            weights = {m: weight.check(tensor_parameters[m][WEIGHT.name]) for m in experts}
            values = {s.name: s.check(parameters[s.name]) for s in settings(method.name)}
            return ResmKernelsTask(
                tensors=tensors,
                base_model=base_model,
                output_weight=output_weight,
                values=ImmutableMap(values),
                weights=ImmutableMap(weights),
            )

    return ResmKernelsMethod()


def check_recipe(path: str, names: Mapping[str, str]) -> None:
    """Refuse what mergekit would pass over in silence; recipes of other methods are not looked at.

    Parameters
    ----------
    path : str
        mergekit's configuration file.
    names : mapping
        As `register` returns it.

    Raises
    ------
    RecipeError
        Every unknown key, unknown parameter and value that does not fit.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(path, [" ".join(str(error).split())]) from error
    ours = {theirs: name for name, theirs in names.items()}
    method = content.get("merge_method") if isinstance(content, dict) else None
    if not isinstance(method, str) or method not in ours:
        return
    config = importlib.import_module("mergekit.config")
    shared = {s.name: s for s in (*settings(ours[method]), weight_setting(ours[method]))}
    keys = list(config.MergeConfiguration.model_fields)
    mistakes = []
    for key in content.keys() - set(keys):
        moved = ", write it under parameters" if key in shared else nearest(key, keys)
        mistakes.append(f"{key}: mergekit has no such key{moved}")
    for where, parameters, per_model in scopes(content):
        known = {WEIGHT.name: shared[WEIGHT.name]} if per_model else shared
        for name, value in parameters.items():
            if name not in known:
                hint = ", write it under the global parameters" if name in shared else None
                hint = hint or nearest(name, list(known))
                mistakes.append(f"{where}.{name}: {method} has no such parameter here{hint}")
                continue
            found = list(scalars(value))
            if not found:
                mistakes.append(f"{where}.{name}: no value, so mergekit would take the default")
            for scalar in found:
                try:
                    known[name].check(scalar)
                except UsageError as error:
                    mistakes.append(f"{where}: {error.what}{f'; {error.fix}' if error.fix else ''}")
                    continue
                if isinstance(scalar, str) and known[name].option.choices and numbers_only(config):
                    mistakes.append(
                        f"{where}.{name}: this mergekit carries numbers only, write "
                        f"{name}.{scalar}: true"
                    )
    if mistakes:
        raise RecipeError(path, sorted(mistakes))


def numbers_only(config: Any) -> bool:
    """Whether this mergekit (0.1.4) refuses text as a parameter."""
    return not hasattr(config, "ScalarParameter")


def nearest(word: object, known: Sequence[str]) -> str:
    """A hint at the nearest known word."""
    near = get_close_matches(str(word), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def scopes(node: Any, where: str = "") -> Iterator[tuple[str, dict[Any, Any], bool]]:
    """Every `parameters` mapping of a configuration: its place, itself, whether of one model."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get("parameters"), dict):
        yield f"{where}parameters", node["parameters"], "model" in node
    for key in ("modules", "models", "slices", "sources"):
        children = node.get(key)
        if isinstance(children, dict):
            places = [(f"{where}{key}.{name}.", child) for name, child in children.items()]
        elif isinstance(children, list):
            places = [(f"{where}{key}[{i}].", child) for i, child in enumerate(children)]
        else:
            continue
        for place, child in places:
            yield from scopes(child, place)


def scalars(value: Any) -> Iterator[Any]:
    """The values in a scalar, a gradient, or filtered cases of either."""
    if isinstance(value, dict):
        value = value.get("value")
        yield from value if isinstance(value, list) else (value,)
    elif isinstance(value, list):
        for item in value:
            yield from scalars(item)
    elif value is not None:
        yield value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mergekit-yaml` with our methods; 1 when the work failed, 2 when it was asked wrongly."""
    try:
        names = register()
        click = importlib.import_module("click")
        command = importlib.import_module("mergekit.scripts.run_yaml").main
        try:
            words = sys.argv[1:] if arguments is None else list(arguments)
            with command.make_context(COMMAND, words) as context:
                check_recipe(context.params["config_file"], names)
                command.invoke(context)
        except click.ClickException as error:
            error.show()
            return int(error.exit_code)
        except click.exceptions.Exit as done:
            return int(done.exit_code)
    except ResmError as error:
        print(f"{COMMAND}: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
