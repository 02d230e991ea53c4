"""The typed recipe, and the YAML dialect that merging users already write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from resm_kernels.checkpoint.dtypes import OUT_DTYPES
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.errors import RecipeError, UsageError
from resm_kernels.methods import METHODS, Method, Option

MAX_BYTES = 1 << 20
MAX_NODES = 50_000
MAX_DIGITS = 1000
"""Longest whole number: `1:59:59...` takes quadratic time, and Python prints no 5000 digits."""

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "lambda",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "overrides",
    "outputs",
)
MODEL_KEYS = ("model", "parameters")
OVERRIDE_KEYS = ("filter", "merge_method", "parameters")
OUTPUT_KEYS = ("name", "merge_method", "parameters", "lambda", "overrides")
OUTPUT_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,99}(?<!\.partial)", re.ASCII | re.IGNORECASE
)
"""A folder of its own: `NAME.partial` is where NAME is built."""
MAX_OUTPUTS = 256
"""Each holds some descriptors while it is written."""
NOT_YET = {
    "slices": "layer slicing is not supported; list whole models under 'models'",
    "modules": "per-module recipes are not supported; list whole models under 'models'",
    "tokenizer": "use tokenizer_source: base, union or a model",
    "chat_template": "the base's chat template is kept",
    "name": "the output folder is named on the command line",
}
WEIGHT = Option("weight", float, 1.0, "multiplies this expert's share of the merge", per_model=True)

Scalar = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class Gradient:
    """Values spread evenly over the layers, first to last."""

    values: tuple[Scalar, ...]

    def at(self, position: float) -> Scalar:
        """The value at a position in [0, 1]: numbers interpolate, everything else steps."""
        scaled = position * (len(self.values) - 1)
        low = int(scaled)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values):
            return self.values[low]
        high = min(low + 1, len(self.values) - 1)
        share = scaled - low
        return (1.0 - share) * self.values[low] + share * self.values[high]  # type: ignore[operator]


@dataclass(frozen=True)
class Filtered:
    """Alternatives in order; the first whose filter is part of the tensor's name counts."""

    cases: tuple[tuple[str | None, Scalar | Gradient], ...]


Setting = Scalar | Gradient | Filtered


def resolve(setting: Setting, tensor: str, position: float) -> Scalar | None:
    """The value of a setting for one tensor; None where no filter matches.

    Parameters
    ----------
    tensor : str
        Tensor name, for filters: a filter matches as a substring, `*` and none match all.
    position : float
        Where the tensor's layer lies between the first (0) and the last (1); tensors outside
        the layers have 0.
    """
    if isinstance(setting, Filtered):
        for pattern, value in setting.cases:
            if pattern is None or holds(tensor, pattern):
                return value.at(position) if isinstance(value, Gradient) else value
        return None
    return setting.at(position) if isinstance(setting, Gradient) else setting


def holds(tensor: str, pattern: str) -> bool:
    """Whether a filter matches a tensor's name: as a part of it, and `*` always."""
    return pattern == "*" or pattern in tensor


@dataclass(frozen=True)
class Expert:
    """One model to merge and its own parameters."""

    model: ModelReference
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Override:
    """Another method, or other parameters, for the tensors that `filter` matches."""

    filter: str
    method: str
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What to merge and how; checked, and the same for the YAML, the command and the API.

    Attributes
    ----------
    method : str
        A name in `METHODS`.
    base : ModelReference
        Gives the architecture, the tokenizer and every tensor that is not merged.
    experts : tuple of Expert
        In the order in which they are merged.
    parameters : mapping
        Global settings by option name, `weight` included.
    out_dtype : str or None
        `float32`, `bfloat16`, ...; None keeps the base's dtype tensor by tensor.
    tokenizer_source : str or None
        Whose vocabulary the output has: `base`, `union`, or a model; None where the models' must
        agree.
    names_base : bool
        Whether the recipe says `base_model`; else the first model gives the layout.
    overrides : tuple of Override
        The first whose filter matches a tensor's name counts for it.
    ignored : tuple of str
        Parameters given that only other methods have, so that recipes stay valid when the method
        changes; they take no part in the merge.
    """

    method: str
    base: ModelReference
    experts: tuple[Expert, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    names_base: bool = True
    overrides: tuple[Override, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The base and the experts."""
        return (self.base, *(expert.model for expert in self.experts))

    def method_for(self, tensor: str) -> Method[Any]:
        """The method that merges one tensor."""
        return METHODS[self._override(tensor).method]

    def weights(self, tensor: str, position: float) -> tuple[float, ...]:
        """The user's weight of every expert for one tensor."""
        return self._of_models(WEIGHT, self._override(tensor), tensor, position)

    def options(self, tensor: str, position: float) -> Any:
        """The options of the tensor's method."""
        values = self.values(tensor, position)
        return self.method_for(tensor).make_options(values, len(self.experts))

    def values(self, tensor: str, position: float) -> dict[str, Any]:
        """The values of the tensor's options by name, as the recipe has them."""
        override = self._override(tensor)
        scopes = (override.parameters, self.parameters)
        return {
            name: self._of_models(spec, override, tensor, position)
            if spec.per_model
            else self._first(scopes, spec, tensor, position)
            for name, spec in METHODS[override.method].specs.items()
        }

    def _override(self, tensor: str) -> Override:
        """The first that matches; one that changes nothing where none does."""
        found = (o for o in self.overrides if holds(tensor, o.filter))
        return next(found, Override("*", self.method))

    def _of_models(
        self, spec: Option, override: Override, tensor: str, position: float
    ) -> tuple[Any, ...]:
        """Per expert: from the tensor's override, the model's own parameters, or the recipe's."""
        return tuple(
            self._first(
                (override.parameters, e.parameters, self.parameters), spec, tensor, position
            )
            for e in self.experts
        )

    @staticmethod
    def _first(
        scopes: Iterable[Mapping[str, Setting]], spec: Option, tensor: str, position: float
    ) -> Any:
        for scope in scopes:
            if spec.name in scope:
                value = resolve(scope[spec.name], tensor, position)
                if value is not None:
                    return value
        return spec.default

    def to_dict(self) -> dict[str, Any]:
        """The recipe in the YAML dialect: what the manifest, the card and the plan id hold."""
        models = []
        for expert in self.experts:
            entry: dict[str, Any] = {"model": str(expert.model)}
            if expert.parameters:
                entry["parameters"] = {k: _plain(v) for k, v in expert.parameters.items()}
            models.append(entry)
        content: dict[str, Any] = {"merge_method": self.method, "models": models}
        if self.names_base:
            content["base_model"] = str(self.base)
        if self.parameters:
            content["parameters"] = {k: _plain(v) for k, v in self.parameters.items()}
        if self.out_dtype is not None:
            content["out_dtype"] = self.out_dtype
        if self.tokenizer_source is not None:
            content["tokenizer_source"] = self.tokenizer_source
        if self.overrides:
            content["overrides"] = [
                {
                    "filter": o.filter,
                    "merge_method": o.method,
                    "parameters": {k: _plain(v) for k, v in o.parameters.items()},
                }
                for o in self.overrides
            ]
        return content


def _plain(setting: Setting) -> Any:
    if isinstance(setting, Filtered):
        return [
            {"value": _plain(value)}
            if pattern is None
            else {"filter": pattern, "value": _plain(value)}
            for pattern, value in setting.cases
        ]
    if isinstance(setting, Gradient):
        return [_plain(value) for value in setting.values]
    return list(setting) if isinstance(setting, tuple) else setting


def read_recipe(path: Path) -> Any:
    """The data of a recipe file, not checked yet."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: the recipe cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(str(path), [f"longer than {MAX_BYTES} bytes"])
    return parse_yaml(raw, str(path))


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Plain data from YAML: no tags, aliases, merge keys or repeated keys."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise RecipeError(source, ["nested too deeply"]) from error
    except Exception as error:  # PyYAML's constructors raise nearly anything on a wrong tag
        raise RecipeError(source, [f"not valid YAML: {' '.join(str(error).split())}"]) from error


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no tags that build objects, no repeated keys, no aliases that multiply."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed in a recipe")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: more than {MAX_DIGITS} digits")
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError("merge keys (<<) are not allowed in a recipe")
            if isinstance(key, str) and key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} stands twice")
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def build_recipes(content: object, source: str) -> dict[str, Recipe]:
    """Check recipe data and build the recipe of every output it lists, by the output's name.

    A recipe without `outputs` has one, named "".
    """
    if not isinstance(content, dict) or "outputs" not in content:
        return {"": build_recipe(content, source)}
    shared = {key: value for key, value in content.items() if key != "outputs"}
    entries = content["outputs"]
    if not isinstance(entries, list) or not entries:
        raise RecipeError(source, ["outputs: expected a list of {name: ..., lambda: ...}"])
    if len(entries) > MAX_OUTPUTS:
        raise RecipeError(source, [f"outputs: {len(entries)} outputs, at most {MAX_OUTPUTS}"])
    mistakes = _Mistakes()
    recipes: dict[str, Recipe] = {}
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        where = f"outputs[{i}]"
        if not isinstance(entry, dict):
            mistakes.add(where, f"got {entry!r}, expected {{name: ..., lambda: ...}}")
            continue
        mistakes.unknown_keys(entry, OUTPUT_KEYS, where)
        name = entry.get("name")
        if not isinstance(name, str) or not OUTPUT_NAME.fullmatch(name):
            mistakes.add(f"{where}.name", f"got {name!r}, expected a folder's name, such as mild")
        elif name.casefold() in seen:
            mistakes.add(f"{where}.name", f"{name!r} stands twice")
        else:
            seen.add(name.casefold())
            try:
                recipes[name] = build_recipe(_of_output(shared, entry), source)
            except RecipeError as error:
                mistakes.found += [f"{where}: {mistake}" for mistake in error.mistakes]
    if mistakes.found:
        raise RecipeError(source, list(dict.fromkeys(mistakes.found)))
    return recipes


def sweep_outputs(
    content: Mapping[str, Any], methods: Sequence[str], lambdas: Sequence[float]
) -> dict[str, Any]:
    """Recipe data with an output for every method and every lambda, named after them.

    A method without a lambda has one output.
    """
    entries: list[dict[str, Any]] = []
    names: Sequence[object] = methods or [content.get("merge_method")]
    for name in names:
        entry = {"merge_method": name}
        label = [str(name)] if len(methods) > 1 else []
        method = METHODS.get(name) if isinstance(name, str) else None
        if not lambdas or (method is not None and "lambda" not in method.specs):
            entries.append({**entry, "name": name})
            continue
        entries += [
            {**entry, "lambda": value, "name": "-".join([*label, f"lambda-{_short(value)}"])}
            for value in lambdas
        ]
    return {**content, "outputs": entries}


def _short(value: float) -> str:
    """Six digits of a number where they are all it has, else the fewest that are."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _of_output(shared: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of one output: what it says comes before what all outputs share."""
    content = {**shared, **{key: value for key, value in entry.items() if key in OUTPUT_KEYS[1:]}}
    given = [one.get("parameters") for one in (shared, entry)]
    if wrong := [one for one in given if one is not None and not isinstance(one, dict)]:
        return {**content, "parameters": wrong[0]}
    common, own = (dict(one or {}) for one in given)
    if "lambda" in own and "lambda" not in entry:
        content.pop("lambda", None)
    if "lambda" in entry:
        common.pop("lambda", None)
    content["parameters"] = {**common, **own}
    return content


def build_recipe(content: object, source: str) -> Recipe:
    """Check recipe data (as YAML or a caller gives them) and build the typed recipe."""
    mistakes = _Mistakes()
    if not isinstance(content, dict):
        raise RecipeError(source, [f"expected a mapping with {', '.join(TOP_KEYS[:3])}"])
    mistakes.unknown_keys(content, TOP_KEYS, "")
    if "outputs" in content:
        mistakes.add("outputs", "several outputs: use `resm sweep`, or resm_kernels.sweep")

    method = _method(content.get("merge_method"), "merge_method", mistakes)
    overrides = _overrides(content.get("overrides"), method, mistakes)
    used = [*([] if method is None else [method.name]), *(o.method for o in overrides)]
    methods = [METHODS[name] for name in dict.fromkeys(used)]
    named = content.get("base_model")
    base = None if named is None else _reference(named, "base_model", mistakes)
    elsewhere = "models" not in content and not content.keys().isdisjoint(("slices", "modules"))
    experts = [] if elsewhere else _experts(content.get("models"), methods, mistakes)
    parameters = _parameters(content.get("parameters"), methods, "parameters", mistakes)
    if "lambda" in content:
        if "lambda" in parameters:
            mistakes.add("lambda", "stands at the top and under parameters: keep one")
        else:
            parameters.update(_parameters({"lambda": content["lambda"]}, methods, "", mistakes))
    tokenizer_source = content.get("tokenizer_source")
    if tokenizer_source is not None:
        expected = "base, union or a model"
        tokenizer_source = _text(tokenizer_source, "tokenizer_source", expected, mistakes)
    out_dtype = None
    for key in ("dtype", "out_dtype"):
        value = content.get(key)
        if value is not None and value not in tuple(OUT_DTYPES):
            known = ", ".join(OUT_DTYPES)
            mistakes.add(
                key, f"got {value!r}, expected one of {known}{_nearest(value, OUT_DTYPES)}"
            )
        out_dtype = value if value is not None else out_dtype

    if method is not None and named is None:
        changing = next((m for m in methods if m.uses_base), None)
        if changing is not None:
            mistakes.add("base_model", f"missing; {changing.name} merges changes against a base")
        elif experts:
            base = experts[0].model
    if method is not None and base is not None and experts:
        experts = _without_base(base, experts, methods, parameters, mistakes)
    if mistakes.found or method is None or base is None:
        raise RecipeError(source, mistakes.found)
    return Recipe(
        method.name,
        base,
        tuple(experts),
        parameters,
        out_dtype,
        tokenizer_source,
        named is not None,
        overrides,
        tuple(mistakes.ignored),
    )


def _without_base(
    base: ModelReference,
    experts: list[Expert],
    methods: Sequence[Method[Any]],
    parameters: Mapping[str, Setting],
    mistakes: _Mistakes,
) -> list[Expert]:
    """The models to merge: the base is none of them where changes against it are merged."""
    method = methods[0]
    listed = any(expert.model.same_as(base) for expert in experts)
    if any(m.uses_base for m in methods):
        if listed and (other := next((m for m in methods if not m.uses_base), None)):
            mistakes.add(
                "models",
                f"the base is listed, which {other.name} would average and other methods would "
                "not: leave it out",
            )
        experts = [expert for expert in experts if not expert.model.same_as(base)]
        if not experts:
            mistakes.add("models", "no model besides the base")
    elif not listed and "weight" in parameters:
        mistakes.add(
            "base_model",
            f"{method.name} with one weight for all: list the base under models to average "
            "it too, or give every model its own weight",
        )
    for m in methods if experts else ():
        fewest, most = m.experts
        if not fewest <= len(experts) <= (most or len(experts)):
            expected = f"{fewest}" if most == fewest else f"at least {fewest}"
            beside = " besides the base" if m.uses_base else ""
            mistakes.add("models", f"{len(experts)} models{beside}; {m.name} merges {expected}")
    return experts


class _Mistakes:
    """Collects what is wrong, so that one run reports all of it."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.ignored: list[str] = []

    def add(self, where: str, problem: str) -> None:
        self.found.append(f"{where}: {problem}" if where else problem)

    def unknown_keys(self, content: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
        for key in content:
            if key in known:
                continue
            prefix = f"{where}." if where else ""
            if not where and key in NOT_YET:
                self.add(f"{prefix}{key}", NOT_YET[key])
            else:
                expected = ", ".join(known)
                self.add(
                    f"{prefix}{key}", f"unknown key; expected {expected}{_nearest(key, known)}"
                )


def _nearest(word: object, known: Iterable[str]) -> str:
    near = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _method(name: object, where: str, mistakes: _Mistakes) -> Method[Any] | None:
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    got = "missing" if name is None else f"got {name!r}"
    mistakes.add(where, f"{got}; expected one of {', '.join(METHODS)}{_nearest(name, METHODS)}")
    return None


def _overrides(
    value: object, main: Method[Any] | None, mistakes: _Mistakes
) -> tuple[Override, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        mistakes.add("overrides", "expected a list of {filter: ..., merge_method: ...}")
        return ()
    overrides = []
    for i, entry in enumerate(value):
        where = f"overrides[{i}]"
        if not isinstance(entry, dict):
            mistakes.add(where, f"got {entry!r}, expected {{filter: ..., merge_method: ...}}")
            continue
        mistakes.unknown_keys(entry, OVERRIDE_KEYS, where)
        pattern = entry.get("filter")
        if not isinstance(pattern, str) or not pattern:
            mistakes.add(f"{where}.filter", f"got {pattern!r}, expected part of a tensor name")
        method = main
        if "merge_method" in entry:
            method = _method(entry["merge_method"], f"{where}.merge_method", mistakes)
        if method is None:
            continue
        settings = _parameters(entry.get("parameters"), [method], f"{where}.parameters", mistakes)
        overrides.append(Override(str(pattern), method.name, settings))
    return tuple(overrides)


def _reference(value: object, where: str, mistakes: _Mistakes) -> ModelReference | None:
    text = _text(value, where, "a path or a Hub id org/name[@revision]", mistakes)
    return None if text is None else ModelReference(text)


def _text(value: object, where: str, expected: str, mistakes: _Mistakes) -> str | None:
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return value.strip()
    mistakes.add(where, f"got {value!r}, expected {expected}")
    return None


def _experts(value: object, methods: Sequence[Method[Any]], mistakes: _Mistakes) -> list[Expert]:
    if not isinstance(value, list) or not value:
        mistakes.add("models", "expected a list of {model: ..., parameters: {weight: ...}}")
        return []
    experts = []
    for i, entry in enumerate(value):
        where = f"models[{i}]"
        if not isinstance(entry, dict):
            mistakes.add(where, f"got {entry!r}, expected {{model: ...}}")
            continue
        mistakes.unknown_keys(entry, MODEL_KEYS, where)
        model = _reference(entry.get("model"), f"{where}.model", mistakes)
        where = f"{where}.parameters"
        settings = _parameters(entry.get("parameters"), methods, where, mistakes, per_model=True)
        if model is not None:
            experts.append(Expert(model, settings))
    return experts


def _parameters(
    value: object,
    methods: Sequence[Method[Any]],
    where: str,
    mistakes: _Mistakes,
    *,
    per_model: bool = False,
) -> dict[str, Setting]:
    """The settings that some of `methods` has; one that only other methods have is ignored."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        mistakes.add(where, f"got {value!r}, expected a mapping")
        return {}
    if not methods:
        return {}
    known, elsewhere = (_known(which, per_model) for which in (methods, METHODS.values()))
    prefix = f"{where}." if where else ""
    names = ", ".join(dict.fromkeys(method.name for method in methods))
    settings = {}
    for name, setting in value.items():
        if name in known:
            settings[name] = _setting(setting, known[name], f"{prefix}{name}", mistakes)
        elif name in elsewhere:
            mistakes.ignored.append(f"{prefix}{name}: {names} has no such parameter")
        else:
            mistakes.unknown_keys({name: setting}, list(known), where)
    return settings


def _known(methods: Iterable[Method[Any]], per_model: bool) -> dict[str, Option]:
    known = {WEIGHT.name: WEIGHT}
    for method in methods:
        for name, spec in method.specs.items():
            if spec.per_model or not per_model:
                known.setdefault(name, spec)
    return known


def _setting(value: object, spec: Option, where: str, mistakes: _Mistakes) -> Setting:
    """A scalar, a layer gradient, or filtered cases of either."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        cases = []
        for i, case in enumerate(value):
            place = f"{where}[{i}]"
            mistakes.unknown_keys(case, ("filter", "value"), place)
            pattern = case.get("filter")
            if pattern is not None and not isinstance(pattern, str):
                mistakes.add(f"{place}.filter", f"got {pattern!r}, expected part of a tensor name")
                pattern = None
            if "value" not in case:
                mistakes.add(place, "no value")
            else:
                cases.append(
                    (pattern, _scalar_or_gradient(case["value"], spec, f"{place}.value", mistakes))
                )
        return Filtered(tuple(cases))
    return _scalar_or_gradient(value, spec, where, mistakes)


def _scalar_or_gradient(
    value: object, spec: Option, where: str, mistakes: _Mistakes
) -> Scalar | Gradient:
    try:
        if isinstance(value, list) and spec.kind is not tuple:
            if not value:
                raise ValueError("got an empty list, expected values from first to last layer")
            return Gradient(tuple(spec.check(v) for v in value))
        return spec.check(value)
    except ValueError as error:
        mistakes.add(where, str(error))
        return spec.default


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where every tensor's layer lies, 0 for the first and 1 for the last.

    The layer is the first number in a tensor's dotted name, counted separately for every text
    before it (an encoder and a decoder have layers of their own). Tensors outside layers get 0,
    the layer of a one-layer stack 1.
    """
    found = {name: _layer(name) for name in names}
    last: dict[str, int] = {}
    for stack, layer in filter(None, found.values()):
        last[stack] = max(layer, last.get(stack, 0))
    return {
        name: 0.0 if place is None else place[1] / last[place[0]] if last[place[0]] else 1.0
        for name, place in found.items()
    }


def _layer(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and len(part) <= 9:
            return ".".join(parts[:i]), int(part)
    return None
