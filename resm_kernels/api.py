"""The Python API: what scripts and other tools build on."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from resm_kernels.checkpoint.dtypes import OUT_DTYPES
from resm_kernels.checkpoint.files import seal_text, unseal, write_file
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.journal import PAGE, REPORT
from resm_kernels.checkpoint.manifest import Verification, verify_folder
from resm_kernels.engine.comparison import Comparison, compare_checkpoints
from resm_kernels.engine.executor import Executor, find_executor
from resm_kernels.engine.flow import Progress
from resm_kernels.engine.inspection import Inspection, inspect_experts
from resm_kernels.engine.options import EngineOptions, parse_size
from resm_kernels.engine.pipeline import run_plan, run_plans
from resm_kernels.engine.plan import MergePlan
from resm_kernels.engine.result import MergeReport
from resm_kernels.errors import NonFiniteError, UsageError, VerificationError
from resm_kernels.methods import Inputs, find_method, merge_weight, split_of
from resm_kernels.methods.base import LARGEST
from resm_kernels.ops.dtypes import is_finite
from resm_kernels.recipe import (
    Recipe,
    build_recipe,
    build_recipes,
    layer_positions,
    read_recipe,
    sweep_outputs,
)
from resm_kernels.report.card import model_card
from resm_kernels.report.html import merge_page

Model = str | os.PathLike[str]
StateDict = Mapping[str, Any]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def merge(
    base: Model | None = None,
    experts: Sequence[Model] | None = None,
    output: Model | None = None,
    method: str = "resm",
    *,
    recipe: Model | Recipe | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    threads: int = 1,
    memory_budget: int | str | None = None,
    gpu_memory: int | str | None = None,
    shard_size: int | str = "5GB",
    nonfinite: Literal["error", "warn"] = "error",
    allow_missing: bool = False,
    allow_extra: bool = False,
    only: Sequence[str] = (),
    resume: bool = False,
    no_report: bool = False,
    progress: Progress | None = None,
    executor: str | Executor = "local",
) -> MergeReport:
    """Merge checkpoints on disk into a new checkpoint, tensor by tensor.

    Parameters
    ----------
    base, experts : path or Hub id (`org/name[@revision]`)
        Safetensors (single or sharded) or `.bin` checkpoints of one architecture; experts also
        LoRA adapters in PEFT's format.
    output : path
        A folder that does not exist yet. It appears when the merge is complete.
    method : str
        A name that `resm methods` lists.
    recipe : path or Recipe, optional
        Instead of `base`, `experts`, `method`, `weights`, `parameters` and `out_dtype`.
    weights : sequence of float, optional
        One per expert; 1 each by default.
    parameters : mapping, optional
        The method's parameters by the names that `resm methods` lists; values as in a recipe:
        scalars, layer gradients, or lists of `{"filter": ..., "value": ...}`.
    out_dtype : str, optional
        `bfloat16`, `float16`, `float32` or `float64`; by default every tensor keeps the base's.
    device, workers, threads, memory_budget, gpu_memory, shard_size, nonfinite, allow_missing, \
allow_extra
        See `EngineOptions`; sizes in bytes or as `"5GB"`.
    only : sequence of str, optional
        Patterns of tensor names, as in `exclude`: merge just these, to the bytes that they have in
        the whole merge. The output is no model: no config, no tokenizer, shards named `part*`.
    resume : bool
        Go on where an interrupted run of the same plan stopped.
    no_report : bool
        Leave out `resm_report.html`.
    progress : Progress, optional
        Told about bytes as they are done, by several threads: an object with `start(total)`,
        `advance(count, tensor)` and `stop()`.
    executor : str or RayExecutor
        `local`, `ray` (the cluster in RAY_ADDRESS or on this machine), or
        `RayExecutor(address, cpus)`; the bytes are the same.

    Returns
    -------
    MergeReport

    Raises
    ------
    ResmError
        One clear error; nothing incomplete is left under the name `output`.

    Notes
    -----
    The merged delta of the spectral methods errs by at most 1e-5 in relative Frobenius norm
    against float64 (measured 4e-7), before the one rounding to the output dtype. The same plan
    gives the same bytes.
    """
    if output is None:
        raise UsageError("merge: no output folder given")
    made = plan(
        base,
        experts,
        method,
        recipe=recipe,
        weights=weights,
        parameters=parameters,
        out_dtype=out_dtype,
        device=device,
        workers=workers,
        threads=threads,
        memory_budget=memory_budget,
        gpu_memory=gpu_memory,
        shard_size=shard_size,
        nonfinite=nonfinite,
        allow_missing=allow_missing,
        allow_extra=allow_extra,
        only=only,
        executor=executor,
    )
    return execute(
        made,
        output,
        resume=resume,
        no_report=no_report,
        progress=progress,
        executor=executor,
    )


def plan(
    base: Model | None = None,
    experts: Sequence[Model] | None = None,
    method: str = "resm",
    *,
    recipe: Model | Recipe | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None = None,
    memory_budget: int | str | None = None,
    shard_size: int | str = "5GB",
    executor: str | Executor = "local",
    **options: Any,
) -> MergePlan:
    """Plan a merge from headers alone; parameters as for `merge`, nothing is written."""
    engine = _engine(memory_budget, shard_size, **options)
    chosen = None if method == "resm" else method
    inline = _Inline(base, experts, weights, parameters, out_dtype, chosen)
    if isinstance(recipe, Recipe):
        inline.leave_to_recipe("merge")
    else:
        recipe = build_recipe(*_content("merge", recipe, inline))
    return find_executor(executor).make_plans([recipe], engine)[0]


def execute(
    made: MergePlan,
    output: Model,
    *,
    resume: bool = False,
    no_report: bool = False,
    progress: Progress | None = None,
    executor: str | Executor = "local",
) -> MergeReport:
    """Carry out a plan; `output` and errors as for `merge`."""
    return run_plan(
        made,
        Path(output),
        resume=resume,
        progress=progress,
        extra_files=_written_files,
        draw=None if no_report else merge_page,
        executor=find_executor(executor),
    )


def sweep(
    base: Model | None = None,
    experts: Sequence[Model] | None = None,
    output: Model | None = None,
    methods: str | Sequence[str] = (),
    *,
    lambdas: Sequence[float] = (),
    recipe: Model | Recipe | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None = None,
    resume: bool = False,
    no_report: bool = False,
    progress: Progress | None = None,
    executor: str | Executor = "local",
    **options: Any,
) -> dict[str, MergeReport]:
    """Merge the same models several times in one pass over them.

    Parameters
    ----------
    output : path
        A folder that does not exist yet; every merge becomes a checkpoint in it, byte for byte
        what `merge` writes.
    methods : str or sequence of str
        One output each; `resm` by default, or the recipe's method.
    lambdas : sequence of float
        One output each, for every method that has a lambda.
    recipe : path or Recipe, optional
        Instead of `base`, `experts`, `weights`, `parameters` and `out_dtype`; it may list its
        `outputs` itself, and then `methods` and `lambdas` stay empty.
    **options
        The engine options of `merge`.

    Returns
    -------
    dict
        The report of every merge by the name of its folder (`lambda-0.5`, `ties-lambda-0.5`).

    Notes
    -----
    Inputs are read once; outputs that differ in lambda alone share their factorisations, and
    those that differ in outlier weighting share the truncated subspaces.
    """
    if output is None:
        raise UsageError("sweep: no output folder given")
    made = plan_sweep(
        base,
        experts,
        methods,
        lambdas=lambdas,
        recipe=recipe,
        weights=weights,
        parameters=parameters,
        out_dtype=out_dtype,
        executor=executor,
        **options,
    )
    return execute_sweep(
        made,
        output,
        resume=resume,
        no_report=no_report,
        progress=progress,
        executor=executor,
    )


def plan_sweep(
    base: Model | None = None,
    experts: Sequence[Model] | None = None,
    methods: str | Sequence[str] = (),
    *,
    lambdas: Sequence[float] = (),
    recipe: Model | Recipe | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None = None,
    executor: str | Executor = "local",
    **options: Any,
) -> dict[str, MergePlan]:
    """Plan a sweep; parameters as for `sweep`, nothing is written."""
    methods = [methods] if isinstance(methods, str) else list(methods)
    lambdas = _numbers(lambdas)
    first = methods[0] if methods and recipe is None else None
    inline = _Inline(base, experts, weights, parameters, out_dtype, first)
    content, source = _content("sweep", recipe, inline)
    if isinstance(content, dict) and (methods or lambdas):
        if "outputs" in content:
            raise UsageError(
                f"sweep: {source} lists its outputs",
                fix="leave methods and lambdas out, or the recipe's outputs",
            )
        content = sweep_outputs(content, methods, lambdas)
    if isinstance(content, dict) and "outputs" not in content:
        raise UsageError(
            "sweep: one output",
            fix="give several lambdas or methods, list outputs in the recipe, or use merge",
        )
    recipes = build_recipes(content, source)
    plans = find_executor(executor).make_plans([*recipes.values()], _engine(**options))
    return dict(zip(recipes, plans, strict=True))


def execute_sweep(
    made: Mapping[str, MergePlan],
    output: Model,
    *,
    resume: bool = False,
    no_report: bool = False,
    progress: Progress | None = None,
    executor: str | Executor = "local",
) -> dict[str, MergeReport]:
    """Carry out the plans of a sweep; `output` and errors as for `sweep`."""
    return run_plans(
        made,
        Path(output),
        resume=resume,
        progress=progress,
        extra_files=_written_files,
        draw=None if no_report else merge_page,
        executor=find_executor(executor),
    )


def _numbers(lambdas: object) -> list[float]:
    found: list[Any] = list(lambdas) if isinstance(lambdas, Iterable) else [lambdas]
    if any(isinstance(x, bool) or not isinstance(x, Real) for x in found):
        raise UsageError(f"sweep: lambdas: got {lambdas!r}", expected="numbers such as [0.5, 0.8]")
    for value in found:
        if not -LARGEST <= value <= LARGEST:
            raise UsageError(f"lambdas: got {value!r:.80}", expected=f"numbers up to {LARGEST:g}")
    return [float(x) for x in found]


def _written_files(report: MergeReport) -> dict[str, bytes]:
    return {"README.md": model_card(report)}


def _engine(
    memory_budget: int | str | None = None,
    shard_size: int | str = "5GB",
    gpu_memory: int | str | None = None,
    only: str | Sequence[str] = (),
    **options: Any,
) -> EngineOptions:
    return EngineOptions(
        only=(only,) if isinstance(only, str) else tuple(only),
        memory_budget=None if memory_budget is None else parse_size(memory_budget),
        gpu_memory=None if gpu_memory is None else parse_size(gpu_memory),
        shard_size=parse_size(shard_size),
        **options,
    )


class _Inline(NamedTuple):
    """What a call says in place of a recipe."""

    base: Model | None
    experts: Sequence[Model] | None
    weights: Sequence[float] | None
    parameters: Mapping[str, Any] | None
    out_dtype: str | None
    method: str | None

    def leave_to_recipe(self, what: str) -> None:
        """Raise where anything stands beside a recipe."""
        if given := [name for name, value in self._asdict().items() if value is not None]:
            raise UsageError(
                f"{what}: {', '.join(given)} beside a recipe",
                fix="write it into the recipe, or leave the recipe out",
            )


def _content(what: str, recipe: Model | Recipe | None, inline: _Inline) -> tuple[Any, str]:
    """Recipe data, not checked yet, and what messages call them."""
    if recipe is not None:
        inline.leave_to_recipe(what)
        if isinstance(recipe, Recipe):
            return recipe.to_dict(), what
        return read_recipe(Path(recipe)), str(recipe)
    base, experts, weights, parameters, out_dtype, method = inline
    if base is None or not experts:
        raise UsageError(f"{what}: give base and experts, or a recipe")
    _check_list(what, experts)
    found = recipe_content(base, experts, method or "resm", weights, parameters, out_dtype)
    return found, what


def _check_list(what: str, experts: object) -> None:
    if isinstance(experts, str | bytes | os.PathLike):
        raise UsageError(f"{what}: experts is one path, {experts!r}", expected="a list of models")


def recipe_content(
    base: Model,
    experts: Sequence[Model],
    method: str,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None = None,
) -> dict[str, Any]:
    """Arguments as the recipe they stand for, in the YAML dialect; not checked yet."""
    if weights is not None and len(weights) != len(experts):
        raise UsageError(
            "merge: one weight per expert",
            got=f"{len(weights)} weights for {len(experts)} experts",
        )
    models: list[dict[str, Any]] = [{"model": os.fspath(expert)} for expert in experts]
    for entry, weight in zip(models, weights or (), strict=False):
        entry["parameters"] = {"weight": weight}
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": os.fspath(base),
        "models": models,
    }
    if parameters:
        content["parameters"] = dict(parameters)
    if out_dtype is not None:
        content["out_dtype"] = out_dtype
    return content


def compare(a: Model, b: Model, base: Model | None = None) -> Comparison:
    """How far two checkpoints lie apart, tensor by tensor.

    Parameters
    ----------
    a, b : path or Hub id
    base : path or Hub id, optional
        Their common base: adds distances against the changes to it, and the changes' cosines.

    Raises
    ------
    CheckpointError
        Where one of them cannot be read.
    """
    one, other = ModelReference(os.fspath(a)), ModelReference(os.fspath(b))
    origin = None if base is None else ModelReference(os.fspath(base))
    return compare_checkpoints(one, other, origin)


def inspect(base: Model, experts: Sequence[Model], *, rank: bool = False) -> Inspection:
    """Look at experts before merging them: what they changed, and what looks wrong.

    Parameters
    ----------
    base, experts : path or Hub id
        As for `merge`; experts may be LoRA adapters.
    rank : bool
        Also factor every matrix, which takes about as long as merging.

    Raises
    ------
    CheckpointError
        Where one of them cannot be read.
    """
    _check_list("inspect", experts)
    models = [ModelReference(os.fspath(expert)) for expert in experts]
    return inspect_experts(ModelReference(os.fspath(base)), models, rank=rank)


def draw_report(path: Model, output: Model | None = None) -> Path:
    """Draw the HTML report of a finished merge anew, from `resm_report.json`.

    Parameters
    ----------
    path : path
        A folder that `merge` made.
    output : path, optional
        The file to write; `resm_report.html` in the folder by default.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    VerificationError
        Where `resm_report.json` is missing, damaged, or not the report of a merge.
    OutputError
        Where the file cannot be written.
    """
    source = Path(path) / REPORT
    report = MergeReport.from_dict(unseal(source))
    try:
        page = merge_page(report)
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise VerificationError(f"{source}: not the report of a merge: {error!r}") from error
    target = Path(path) / PAGE if output is None else Path(output)
    write_file(target, seal_text(page))
    return target


def verify(path: Model) -> Verification:
    """Compare every byte of a merged checkpoint with its manifest.

    Raises
    ------
    VerificationError
        Naming every file and tensor that is missing or differs.
    """
    return verify_folder(Path(path))


@torch.no_grad()
def merge_tensors(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    method: str = "resm",
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: torch.dtype | None = None,
    name: str = "",
    config: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Merge one weight in memory, on the device where it is.

    Parameters
    ----------
    base, experts : Tensor
        One shape, any float dtypes; not changed.
    weights : sequence of float, optional
        One per expert; 1 each by default.
    parameters : mapping, optional
        Scalars by the names that `resm methods` lists.
    out_dtype : torch.dtype, optional
        The base's by default.
    name : str
        The weight's name, for the `exclude` patterns, and part of the key of random drops.
    config : mapping, optional
        The model's config.json, by which fused weights and expert stacks are told apart; without
        it they are merged whole.

    Returns
    -------
    Tensor
        New memory; errors as for `merge`.

    Raises
    ------
    UsageError, NonFiniteError
        Where shapes, dtypes or parameters do not fit, or an input holds NaN or Inf.
    """
    chosen = find_method(method)
    shares = [1.0] * len(experts) if weights is None else [float(w) for w in weights]
    label = f"tensor {name!r}" if name else "merge_tensors"
    if not experts or len(shares) != len(experts):
        raise UsageError(
            f"{label}: one weight per expert, at least one expert",
            got=f"{len(shares)} weights, {len(experts)} experts",
        )
    for i, tensor in enumerate((base, *experts)):
        who = f"{label}: expert {i}" if i else f"{label}: base"
        if tensor.shape != base.shape or tensor.device != base.device:
            raise UsageError(
                f"{who} does not match the base",
                got=f"{list(tensor.shape)} on {tensor.device}",
                expected=f"{list(base.shape)} on {base.device}",
            )
        if tensor.dtype not in FLOATS:
            raise UsageError(f"{who} has dtype {tensor.dtype}", expected="a float of 16 to 64 bits")
        if not is_finite(tensor):
            raise NonFiniteError(f"{who} holds NaN or Inf")
    dtype = base.dtype if out_dtype is None else out_dtype
    if dtype not in FLOATS or not all(map(math.isfinite, shares)):
        raise UsageError(
            f"{label}: weights must be finite and out_dtype a float of 16 to 64 bits",
            got=f"{shares}, {dtype}",
        )
    options = chosen.make_options(parameters or {}, len(experts))
    chosen.validate(shares, options)
    inputs = Inputs(name, base, experts)
    split = split_of(chosen, name, base.shape, len(shares), options, config or {})[0]
    merged = merge_weight(chosen, inputs, shares, options, dtype, split).tensor
    if not is_finite(merged):
        raise NonFiniteError(f"{label}: merged values do not fit {dtype}")
    return merged


def merge_state_dicts(
    base: StateDict,
    experts: Sequence[StateDict],
    method: str = "resm",
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge state dicts in memory; parameters as for `merge`, `config` as for `merge_tensors`.

    Every name of the base must be in every expert and the other way round; what is not a float
    tensor (integers, extra state) is copied from the base. The inputs are not changed; the result
    shares no memory with them. Names that share memory in every state dict share it in the result.
    """
    content = recipe_content(
        "base",
        [f"expert {i + 1}" for i in range(len(experts))],
        method,
        weights,
        parameters,
        out_dtype,
    )
    recipe = build_recipe(content, "merge_state_dicts")
    for i, expert in enumerate(experts):
        differing = sorted(base.keys() ^ expert.keys())
        if differing:
            raise UsageError(
                f"expert {i + 1} and the base hold different tensors",
                got=", ".join(differing[:5]) + (" ..." if len(differing) > 5 else ""),
            )
    positions = layer_positions(base)
    merged: dict[str, Any] = {}
    first: dict[object, str] = {}
    for name, tensor in base.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            merged[name] = copy.deepcopy(tensor)
            continue
        together = tuple(_memory(state[name]) for state in (base, *experts))
        if tensor.numel() and first.setdefault(together, name) != name:
            merged[name] = merged[first[together]]
            continue
        options = recipe.options(name, positions[name])
        merged[name] = merge_tensors(
            tensor,
            [expert[name] for expert in experts],
            recipe.method_for(name).name,
            weights=recipe.weights(name, positions[name]),
            parameters={k.rstrip("_"): v for k, v in vars(options).items()},
            out_dtype=OUT_DTYPES[recipe.out_dtype].torch if recipe.out_dtype else None,
            name=name,
            config=config,
        )
    return merged


def _memory(value: Any) -> object:
    """What tells memory apart: tensors of one key are the same tensor."""
    if not isinstance(value, torch.Tensor):
        return id(value)
    return value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
