"""The plan of a merge, from headers alone: what becomes of every tensor, and at what cost."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import itertools
import logging
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from resm_kernels import __version__
from resm_kernels.checkpoint.dtypes import DTYPES, OUT_DTYPES, DType
from resm_kernels.checkpoint.files import canonical_json
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import Checkpoint, TensorInfo
from resm_kernels.checkpoint.lora import Adapter, open_model
from resm_kernels.checkpoint.manifest import PART, Part
from resm_kernels.checkpoint.reader import open_checkpoint
from resm_kernels.checkpoint.vocabulary import Alignment, align, differences
from resm_kernels.checkpoint.writer import ShardLayout, Slot, lay_out_shards
from resm_kernels.engine.lanes import PREFETCH, STAGING
from resm_kernels.engine.matching import FactorSource, Matching, Source
from resm_kernels.engine.memory import available_memory
from resm_kernels.engine.options import EngineOptions, usable_cores
from resm_kernels.engine.workers import choose_workers
from resm_kernels.errors import PlanError, UsageError
from resm_kernels.linalg import dispatch
from resm_kernels.methods import Method, Split, split_of
from resm_kernels.methods.arithmetic import chunk_workspace
from resm_kernels.methods.matrices import matrix_shapes
from resm_kernels.ops.dtypes import planned_chunk
from resm_kernels.ops.launch import architecture, triton_version
from resm_kernels.recipe import Recipe, holds, layer_positions

LOG = logging.getLogger(__name__)

NUMERICS = 5
"""Raised whenever the same plan would give other bytes."""
GPU_WORKERS = 2
"""Weights merged at once on a GPU: one's eigen-decomposition, bound by latency, runs beside the
other's products. Not yet measured."""
GPU_SHARE = 0.85
"""Share of a device's free memory that is used by default; libraries keep some for themselves."""
CUBLAS_SPACE = 32 << 20
"""Bytes that cuBLAS keeps for each stream of a Hopper card; less on older ones."""
BYTE_COST = 40.0
"""Operations in whose time a core moves one byte of an element-wise merge."""
MAX_NEAR = 5000
"""Most names that a pattern is compared with letter by letter."""
MAX_IDLE = 20
"""Most patterns for which names near them are looked for."""
MARGIN = 64 << 20
"""Disk bytes kept free beside the shards, for the small files."""


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one tensor.

    Attributes
    ----------
    rule : str
        The method's name, `mean` (of deltas) or `copy` (from the base).
    reason : str or None
        Why the rule is not the method.
    method : Method
        The recipe's method for this tensor.
    split : Split or None
        The matrices in it that are merged one by one.
    notes : tuple of str
        What was decided about it, in words.
    slot : Slot
        Its place in the output shard `shard`.
    base, experts : Source, tuple of Source or FactorSource
        Its inputs; no experts for a copy. An expert whose adapter leaves the weight alone has the
        base's own source.
    reads_base, base_counts : bool
        Whether the base is read, and whether its values enter the result (`linear` reads it
        only to fill in for values that are not finite).
    aligned : bool
        Whether its rows are brought into the order of the output's vocabulary.
    masked : bool
        Whether NaN and Inf may be masked, in copies of its inputs.
    key : str
        The name under which its parameters were looked up; tied tensors share one.
    weights, options
        The user's weights and the method's options for this tensor.
    workspace : int
        Bytes that merging may hold beyond inputs and output.
    """

    rule: str
    reason: str | None
    method: Method[Any]
    split: Split | None
    notes: tuple[str, ...]
    shard: int
    slot: Slot
    base: Source
    experts: tuple[Source | FactorSource, ...]
    reads_base: bool
    base_counts: bool
    aligned: bool
    masked: bool
    key: str
    weights: tuple[float, ...]
    options: Any
    workspace: int

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.slot.name

    @property
    def sources(self) -> tuple[Source | FactorSource, ...]:
        """What goes into it, in order."""
        return (self.base, *self.experts) if self.reads_base else self.experts

    @property
    def factor_ranks(self) -> list[int] | None:
        """The ranks of the experts' changes where all are known as factors."""
        return factor_ranks(self.base, self.experts)

    @functools.cached_property
    def step(self) -> Step:
        """This tensor merged for one output alone."""
        return Step((self,))

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs."""
        return self.step.read_bytes

    @property
    def write_bytes(self) -> int:
        """Bytes written to the output."""
        return self.slot.stop - self.slot.start

    @property
    def memory(self) -> int:
        """Most bytes this tensor needs at once."""
        return self.step.memory

    @property
    def cost(self) -> float:
        """Predicted work, in operations of a factorisation."""
        moved = BYTE_COST * (self.read_bytes + self.write_bytes)
        if self.reason is not None or not self.method.by_matrix or not self.experts:
            return moved
        ranks = [s.pair.rank if isinstance(s, FactorSource) else math.inf for s in self.experts]
        shapes = [part.shape for part in self.split.parts] if self.split else [self.slot.shape]
        return moved + sum(
            8.0 * math.prod(shape) * min(*shape, rank) for shape in shapes for rank in ranks
        )


@dataclass(frozen=True)
class Step:
    """One weight as every output needs it, read once.

    Attributes
    ----------
    tensors : tuple of PlannedTensor
        One per output.
    """

    tensors: tuple[PlannedTensor, ...]

    @functools.cached_property
    def sources(self) -> tuple[Source | FactorSource, ...]:
        """What is read, each once."""
        return tuple({s.key: s for tensor in self.tensors for s in tensor.sources}.values())

    @functools.cached_property
    def read_bytes(self) -> int:
        """Bytes read from the inputs."""
        return sum(source.nbytes for source in self.sources)

    @functools.cached_property
    def held_bytes(self) -> int:
        """Bytes held from reading to writing."""
        return self.read_bytes + sum(tensor.write_bytes for tensor in self.tensors)

    @property
    def workspace(self) -> int:
        """Most bytes beside them; several outputs keep the last factorisation for each other."""
        largest = max(tensor.workspace for tensor in self.tensors)
        first = self.tensors[0].slot
        if len(self.tensors) == 1 or len(first.shape) < 2:
            return largest
        *stack, rows, columns = first.shape
        kept = 16 * math.prod(stack) * (rows + columns) * min(rows, columns)
        by_matrix = any(tensor.method.by_matrix for tensor in self.tensors)
        return largest + kept * by_matrix

    @property
    def memory(self) -> int:
        """Most bytes that this step needs at once."""
        return self.held_bytes + self.workspace

    @property
    def cost(self) -> float:
        """Predicted work; outputs share factorisations, hence that of the dearest."""
        return max(tensor.cost for tensor in self.tensors)

    @functools.cached_property
    def on_host(self) -> Step:
        """The step as it is on the CPU, where its workspace is another."""
        return Step(
            tuple(
                dataclasses.replace(tensor, workspace=workspace_of(tensor, "cpu"))
                for tensor in self.tensors
            )
        )

    def stays_on_host(self, plan: MergePlan) -> bool:
        """Whether the CPU has it beside devices: a copy, or more than a device's memory."""
        copied = not any(tensor.experts for tensor in self.tensors)
        return plan.has_devices and (copied or self.memory > plan.device_memory)


def plan_steps(plans: Sequence[MergePlan]) -> tuple[Step, ...]:
    """The steps that carry out several plans of the same inputs, layouts and options at once.

    Raises
    ------
    PlanError
        Where one weight, for all outputs, or the buffers of the devices need more memory than the
        budget.
    """
    if len(plans) == 1:
        steps = tuple(tensor.step for tensor in plans[0].tensors)
    else:
        steps = tuple(map(Step, zip(*(plan.tensors for plan in plans), strict=True)))
    budget = plans[0].memory_budget - plans[0].staging
    if budget <= 0:
        raise PlanError(
            f"the buffers of {len(plans[0].devices)} devices need more memory than allowed",
            got=f"{plans[0].staging:,} bytes",
            expected=f"less than {plans[0].memory_budget:,} bytes",
            fix="raise --memory-budget, or name fewer devices",
        )
    on_host = [step for step, _ in _on_host(steps, plans[0])]
    if not on_host:
        return steps
    largest = max(on_host, key=lambda step: step.memory)
    if largest.memory > budget:
        slot = largest.tensors[0].slot
        many = f" for {len(plans)} outputs" if len(plans) > 1 else ""
        raise PlanError(
            f"tensor {slot.name!r} {list(slot.shape)}{many} needs more memory than allowed",
            got=f"{largest.memory:,} bytes, of which {largest.workspace:,} to factor it",
            expected=f"at most {budget:,} bytes",
            fix="raise --memory-budget, or merge on a machine with more memory"
            + (", or fewer outputs at a time" if many else ""),
        )
    return steps


def _on_host(steps: Sequence[Step], plan: MergePlan) -> list[tuple[Step, int]]:
    """What the CPU merges, and how many at a time."""
    if not plan.has_devices:
        return [(step, plan.workers) for step in steps]
    return [(step.on_host, 1) for step in steps if step.stays_on_host(plan)]


def predicted_peak(steps: Sequence[Step], plan: MergePlan) -> int:
    """Predicted most bytes of tensors in memory at once, beyond the interpreter itself."""
    on_host = _on_host(steps, plan)
    workers = on_host[0][1] if on_host else 1
    peak = _peak([step for step, _ in on_host], workers)
    return min(peak + plan.staging, plan.memory_budget)


def predicted_device_peak(steps: Sequence[Step], plan: MergePlan) -> int:
    """Predicted most bytes of tensors in one device's memory at once; 0 for the CPU."""
    if not plan.has_devices:
        return 0
    there = [step for step in steps if not step.stays_on_host(plan)]
    streams = plan.workers * (1 + len(plan.experts))
    libraries = streams * CUBLAS_SPACE if plan.device.type == "cuda" else 0
    return min(_peak(there, plan.workers, len(plan.devices)), plan.device_memory) + libraries


def _peak(steps: Sequence[Step], workers: int, devices: int = 1) -> int:
    """Most bytes of the steps that are inside together, the largest of them on one device."""
    window = workers + PREFETCH
    peak = 0
    for start in range(len(steps)):
        inside = steps[start : start + devices * window]
        held = sorted((step.held_bytes for step in inside), reverse=True)[:window]
        busy = sorted((step.workspace for step in inside), reverse=True)[:workers]
        peak = max(peak, sum(held) + sum(busy))
    return peak


@dataclass(frozen=True)
class MergePlan:
    """A whole merge, tensor by tensor, before anything is written.

    Attributes
    ----------
    tensors : tuple of PlannedTensor
        In the order in which they are read and merged.
    layouts : tuple of ShardLayout
        The output shards, headers included.
    alignment : Alignment or None
        How vocabulary tables are brought together, where they must be.
    left_out : mapping
        Tensors of experts that do not reach the output, with the reason.
    plan_id : str
        SHA-256 of everything that decides the output's bytes.
    devices : tuple of torch.device
        Where merging happens: the CPU, or CUDA devices of one kind.
    workers : int
        Weights merged at the same time, on each device.
    memory_budget, device_memory : int
        Resolved engine options, in bytes, the second for each device and 0 for the CPU. Like
        `workers` and the number of devices they are no part of the id: the bytes depend on none
        of them, but for weights that no device can hold, which the CPU merges (noted).
    part : Part or None
        Which tensors of the whole merge these are, where `only` chose some.
    """

    recipe: Recipe
    options: EngineOptions
    base: Checkpoint
    experts: tuple[Checkpoint | Adapter, ...]
    tensors: tuple[PlannedTensor, ...]
    layouts: tuple[ShardLayout, ...]
    alignment: Alignment | None
    left_out: Mapping[str, str]
    plan_id: str
    devices: tuple[torch.device, ...]
    workers: int
    memory_budget: int
    device_memory: int
    part: Part | None = None

    @property
    def device(self) -> torch.device:
        """The first device; all are of its kind."""
        return self.devices[0]

    @property
    def has_devices(self) -> bool:
        """Whether there are devices beside the CPU."""
        return self.device_memory > 0

    @property
    def staging(self) -> int:
        """Bytes of the host's buffers for devices."""
        return len(self.devices) * STAGING if self.has_devices else 0

    @property
    def read_bytes(self) -> int:
        """Bytes to read."""
        return sum(t.read_bytes for t in self.tensors)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's shards."""
        return sum(layout.size for layout in self.layouts)

    @property
    def peak_memory(self) -> int:
        """Predicted most bytes of tensors in memory at once, beyond the interpreter itself."""
        return predicted_peak(plan_steps([self]), self)

    @property
    def peak_device_memory(self) -> int:
        """Predicted most bytes of tensors in one device's memory at once; 0 for the CPU."""
        return predicted_device_peak(plan_steps([self]), self)

    @property
    def input_folders(self) -> tuple[Path, ...]:
        """Folders that are inputs as a whole (a model named by its file is no folder)."""
        return tuple(
            c.folder
            for c in (self.base, *self.experts)
            if isinstance(c, Adapter) or not c.single_file
        )

    @property
    def rules(self) -> dict[str, int]:
        """How many tensors each rule has."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.rule] = counts.get(tensor.rule, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for `--dry-run --json`."""
        return {
            "plan_id": self.plan_id,
            "recipe": self.recipe.to_dict(),
            "device": ",".join(map(str, self.devices)),
            "workers": self.workers,
            "threads": self.options.threads,
            "part": self.part and self.part.to_dict(),
            "rules": self.rules,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_memory_bytes": self.peak_memory,
            "memory_budget_bytes": self.memory_budget,
            "peak_device_memory_bytes": self.peak_device_memory,
            "device_memory_bytes": self.device_memory,
            "shards": [{"name": s.name, "bytes": s.size} for s in self.layouts],
            "left_out": dict(self.left_out),
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.slot.shape),
                    "rule": t.rule,
                    "reason": t.reason,
                    "matrices": t.split and t.split.label,
                    "dtype": t.base.info.dtype.name,
                    "out_dtype": t.slot.dtype.name,
                    "shard": self.layouts[t.shard].name,
                    "offset": t.slot.start,
                    "bytes": t.write_bytes,
                    "read_bytes": t.read_bytes,
                    "memory_bytes": t.memory,
                }
                for t in self.tensors
            ],
        }


def make_plan(recipe: Recipe, options: EngineOptions) -> MergePlan:
    """Plan a merge; reads headers and configs, writes nothing.

    Raises
    ------
    CheckpointError
        Where an input cannot be found or trusted.
    PlanError
        Where the inputs do not fit together (every misfit is listed), or one weight needs more
        memory than the budget.
    """
    return make_plans([recipe], options)[0]


def make_plans(recipes: Sequence[Recipe], options: EngineOptions) -> list[MergePlan]:
    """Plan the merges of several recipes for the same models; as `make_plan`."""
    with _uncollected():
        return _make_plans(recipes, options)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the search for cycles: planning makes none, and the search took 40 % of its time."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def _make_plans(recipes: Sequence[Recipe], options: EngineOptions) -> list[MergePlan]:
    bases: dict[str, Checkpoint] = {}
    opened: dict[tuple[str, str], Checkpoint | Adapter] = {}
    matchings: dict[tuple[str, ...], Matching] = {}
    devices = find_devices(options.device)
    budget = options.memory_budget or max(int(0.6 * available_memory()), 1)
    plans: list[MergePlan] = []
    used: list[Matching] = []
    for recipe in recipes:
        base_name = recipe.base.text
        if base_name not in bases:
            bases[base_name] = _whole(open_checkpoint(recipe.base))
        base = bases[base_name]
        keys = [(base_name, expert.model.text) for expert in recipe.experts]
        for key, expert in zip(keys, recipe.experts, strict=True):
            if key not in opened:
                opened[key] = _whole(open_model(expert.model, base))
        names = (base_name, *(name for _, name in keys), str(recipe.tokenizer_source))
        if names not in matchings:
            experts = [opened[key] for key in keys]
            alignment = _alignment(recipe, base, experts)
            matchings[names] = Matching(base, experts, options, alignment)
        used.append(matchings[names])
        plans.append(_plan(recipe, used[-1], options, devices, budget))
    steps = plan_steps(plans)
    workers = options.workers or _workers(steps, plans[0])
    plans = [dataclasses.replace(plan, workers=workers) for plan in plans]
    found = [f"{ignored}; ignored" for recipe in recipes for ignored in recipe.ignored]
    for plan, matching in zip(plans, used, strict=True):
        found += [
            f"overrides: {override.filter!r} is part of no tensor's name (tied ones go by one name)"
            for override in plan.recipe.overrides
            if not any(holds(key, override.filter) for key in matching.keys)
        ]
    for message in dict.fromkeys(found):
        LOG.warning("recipe: %s", message)
    return plans


def _workers(steps: Sequence[Step], plan: MergePlan) -> int:
    if not plan.has_devices:
        weights = [(step.memory, step.cost) for step in steps]
        slots = usable_cores() // plan.options.threads
        return choose_workers(slots, weights, plan.memory_budget)
    weights = [(step.memory, step.cost) for step in steps if not step.stays_on_host(plan)]
    return choose_workers(GPU_WORKERS, weights, plan.device_memory)


Opened = TypeVar("Opened", Checkpoint, Checkpoint | Adapter)


def _whole(opened: Opened) -> Opened:
    """The model, unless its weights are quantised or it is a part of a merge."""
    if isinstance(opened, Checkpoint) and any(PART in file.metadata for file in opened.files):
        raise PlanError(
            f"{opened.reference}: part of a merge, made with --only",
            expected="a whole model",
            fix="merge again without --only",
        )
    if opened.config.get("quantization_config"):
        raise PlanError(
            f"{opened.reference}: quantised weights cannot be merged",
            fix="merge the checkpoint it was made from, or dequantise it first",
        )
    return opened


def _alignment(
    recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint | Adapter]
) -> Alignment | None:
    """How the vocabularies are brought together; None where every table stays as it is."""
    source = recipe.tokenizer_source
    whole = [expert if isinstance(expert, Checkpoint) else base for expert in experts]
    if source is None:
        found = differences(base, [expert for expert in whole if expert is not base])
        for difference in found:
            if not difference.blocks:
                LOG.warning("%s", difference)
        if any(difference.blocks for difference in found):
            misfits = [f"  - {difference}" for difference in found if difference.blocks]
            raise PlanError("\n".join(["the vocabularies do not fit together:", *misfits]))
        return None
    owner: Literal["base", "union"] | Checkpoint
    if source in ("base", "union"):
        owner = "base" if source == "base" else "union"
    else:
        reference = ModelReference(source)
        named = {model: (base, *whole)[i] for i, model in enumerate(recipe.models)}
        same = [model for known, model in named.items() if known.same_as(reference)]
        owner = same[0] if same else open_checkpoint(reference)
    alignment = align(owner, base, whole, prefer_base=recipe.names_base)
    for note in alignment.notes:
        LOG.info("%s", note)
    return None if alignment.changes_nothing else alignment


def _plan(
    recipe: Recipe,
    matching: Matching,
    options: EngineOptions,
    devices: tuple[torch.device, ...],
    budget: int,
) -> MergePlan:
    device = devices[0]
    base, decisions = matching.base, matching.decisions
    out_dtype = DTYPES[OUT_DTYPES[recipe.out_dtype]] if recipe.out_dtype else None

    def written(info: TensorInfo) -> DType:
        return out_dtype if out_dtype is not None and info.dtype.mergeable else info.dtype

    def shape(info: TensorInfo) -> tuple[int, ...]:
        if matching.alignment is None or info.name not in matching.tables:
            return info.shape
        return (matching.alignment.rows, *info.shape[1:])

    chosen = _chosen(decisions, options.only)
    part = Part(options.only, len(chosen), len(decisions)) if options.only else None
    metadata = {a: k for a, k in base.aliases.items() if a not in base.tensors and k in chosen}
    layouts = lay_out_shards(
        [(n, written(base.tensors[n]), shape(base.tensors[n])) for n in chosen],
        options.shard_size,
        metadata if part is None else {**metadata, PART: f"{part.tensors} of {part.of} tensors"},
        stem="model" if part is None else "part",
    )
    planner = _Planner(recipe, matching, options, device.type)
    tensors = tuple(
        planner.plan(shard, slot) for shard, layout in enumerate(layouts) for slot in layout.slots
    )
    identity = {
        "numerics": NUMERICS,
        "version": __version__,
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "scipy": importlib.metadata.version("scipy"),
        "device": device.type,
        "triton": triton_version() if device.type == "cuda" else None,
        "solvers": dispatch.identity(device),
        "threads": options.threads,
        "recipe": recipe.to_dict(),
        "arithmetic": torch.backends.cpu.get_cpu_capability()
        if device.type == "cpu"
        else architecture(device),
        "config": base.config,
        "inputs": [checkpoint.digest for checkpoint in (base, *matching.experts)],
        "shards": [hashlib.sha256(layout.header).hexdigest() for layout in layouts],
        "vocabulary": None if matching.alignment is None else matching.alignment.digest,
        "missing": sorted(n for n, (reason, s) in decisions.items() if reason and not s),
    }
    if part is not None:
        identity["part"] = part.to_dict()
    return MergePlan(
        recipe=recipe,
        options=options,
        base=base,
        experts=tuple(matching.experts),
        tensors=tensors,
        layouts=tuple(layouts),
        alignment=matching.alignment,
        left_out=matching.left_out,
        plan_id=hashlib.sha256(canonical_json(identity)).hexdigest(),
        devices=devices,
        workers=options.workers or 1,
        memory_budget=budget,
        device_memory=_device_memory(devices, options),
        part=part,
    )


def _chosen(names: Collection[str], only: Sequence[str]) -> dict[str, None]:
    """The names that one of the patterns matches, in order; all where there is no pattern.

    Raises
    ------
    UsageError
        Naming patterns that match nothing, and names near them.
    """
    if not only:
        return dict.fromkeys(names)
    found = {pattern: {n for n in names if fnmatchcase(n, pattern)} for pattern in only}
    if idle := [pattern for pattern, some in found.items() if not some]:
        listed = [_near(pattern, names) for pattern in idle[:MAX_IDLE]]
        if len(idle) > MAX_IDLE:
            listed.append(f"  - and {len(idle) - MAX_IDLE} more patterns")
        raise UsageError(
            "\n".join(["--only: no tensor of the base has such a name:", *listed]),
            expected="shell-style patterns of whole names, such as 'model.layers.40.*'",
        )
    chosen = set().union(*found.values())
    return {name: None for name in names if name in chosen}


def _near(pattern: str, names: Collection[str]) -> str:
    """A pattern that matches nothing, and what may have been meant."""
    inside = f"*{pattern.strip('*')}*"
    count = sum(fnmatchcase(name, inside) for name in names)
    near = get_close_matches(pattern, itertools.islice(names, MAX_NEAR), n=1)
    if count:
        return f"  - {pattern!r} ({inside!r} matches {count})"
    return f"  - {pattern!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def factor_ranks(
    base: Source | FactorSource, experts: Sequence[Source | FactorSource]
) -> list[int] | None:
    """The ranks of all changes, 0 for the base itself; None where one is no product of factors."""
    ranks = [
        expert.pair.rank if isinstance(expert, FactorSource) else 0
        for expert in experts
        if isinstance(expert, FactorSource) or expert.key == base.key
    ]
    return ranks if len(ranks) == len(experts) else None


class _Planner:
    """Plans one tensor after another; what many of them share is worked out once."""

    def __init__(
        self, recipe: Recipe, matching: Matching, options: EngineOptions, device: str
    ) -> None:
        self._recipe = recipe
        self._matching = matching
        self._masked = options.nonfinite == "warn"
        self._on_base = any(isinstance(expert, Adapter) for expert in matching.experts)
        self._positions = layer_positions(matching.decisions)
        self._settings: dict[tuple[str, str], Any] = {}
        self._workspaces = _Workspaces(device)

    def plan(self, shard: int, slot: Slot) -> PlannedTensor:
        """What becomes of the tensor in a slot."""
        recipe, matching = self._recipe, self._matching
        reason, sources = matching.decisions[slot.name]
        own = matching.source(matching.base, slot.name)
        key = matching.canonical(slot.name)
        method = recipe.method_for(key)
        settings = self._options(method, key)
        weights = recipe.weights(key, self._positions[key])
        aligned = slot.name in matching.tables
        unchanged = not aligned and all(source.key == own.key for source in sources)
        if sources and unchanged and method.keeps_base(weights, settings):
            reason, sources = "changed by no adapter", ()
        split: Split | None = None
        notes: tuple[str, ...] = ()
        if sources:
            method.validate(weights, settings)
            given = (key, slot.shape, len(sources), settings)
            split, notes = split_of(method, *given, matching.base.config)
            reason = None if split else method.declines(*given)
        base_counts = method.uses_base or self._on_base or not sources
        return PlannedTensor(
            rule="copy" if not sources else method.name if reason is None else "mean",
            reason=reason,
            method=method,
            shard=shard,
            split=split,
            notes=notes,
            slot=slot,
            base=own,
            experts=sources,
            reads_base=base_counts or aligned or self._masked,
            base_counts=base_counts,
            aligned=aligned,
            masked=self._masked,
            key=key,
            weights=weights,
            options=settings,
            workspace=self._workspaces.of(
                slot.shape,
                (own, *sources),
                method=None if reason else method,
                settings=settings,
                split=split,
                aligned=aligned,
                masked=self._masked,
            ),
        )

    def _options(self, method: Method[Any], tensor: str) -> Any:
        values = self._recipe.values(tensor, self._positions[tensor])
        known = method.name, repr(values)  # not the values: -0.0 is 0.0 among keys
        if known not in self._settings:
            self._settings[known] = method.make_options(values, len(self._recipe.experts))
        return self._settings[known]


class _Workspaces:
    """Bytes that merging holds on a device type; what many tensors share is worked out once."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._known: dict[tuple[object, ...], int] = {}

    def of(
        self,
        shape: tuple[int, ...],
        sources: Sequence[Source | FactorSource],
        *,
        method: Method[Any] | None,
        settings: Any,
        split: Split | None,
        aligned: bool,
        masked: bool,
    ) -> int:
        """Bytes that merging one tensor may hold beyond its inputs and its output.

        `sources` are the base's and the experts'; without a method they are averaged or copied.
        """
        experts, size = len(sources) - 1, math.prod(shape)
        if not experts:
            return chunk_workspace(shape, 0, 8, settings, self._device)
        itemsize = 8 if any(source.wide for source in sources) else 4
        shapes = matrix_shapes(split, shape) if split else {shape: (0,)}
        ranks = factor_ranks(sources[0], sources[1:])
        in_core = None
        if method is not None and ranks is not None:
            in_core = method.factored_workspace(shape, ranks, itemsize, settings)
        if in_core is not None:
            workspace = in_core
        elif method is None:
            workspace = chunk_workspace(shape, experts, 8, settings, self._device)
        else:
            workspace = max(
                self._of_matrices(method, part, len(equal), experts, itemsize, settings)
                for part, equal in shapes.items()
            )
        if self._device != "cpu" and method is not None and method.by_matrix:
            measuring = 8 * (experts + 2) * planned_chunk(shape, self._device)
            workspace = max(workspace, measuring)
        if split:  # parts that are not views of their tensors
            workspace += (experts + 2) * itemsize * max(map(math.prod, shapes))
        whole = 0 if in_core is not None else sum(isinstance(s, FactorSource) for s in sources)
        if method is not None and method.by_matrix:
            whole = min(whole, 1)  # for its statistics
        workspace += (whole + (experts + 1) * aligned) * itemsize * size
        if masked:  # copies without NaN and Inf, and where they were
            workspace += sum(source.nbytes for source in sources) + (experts + 3) * size
        return workspace

    def _of_matrices(
        self,
        method: Method[Any],
        shape: tuple[int, ...],
        count: int,
        experts: int,
        itemsize: int,
        settings: Any,
    ) -> int:
        known = method.name, shape, count, experts, itemsize, settings
        if known not in self._known:
            given = experts, itemsize, settings, self._device
            batch = method.batch(shape, count, *given)
            self._known[known] = method.workspace(shape, *given) + batch.workspace
        return self._known[known]


def workspace_of(tensor: PlannedTensor, device: str) -> int:
    """Bytes beyond inputs and output that merging a planned tensor may hold on a device type."""
    return _Workspaces(device).of(
        tensor.slot.shape,
        (tensor.base, *tensor.experts),
        method=None if tensor.reason else tensor.method,
        settings=tensor.options,
        split=tensor.split,
        aligned=tensor.aligned,
        masked=tensor.masked,
    )


def disk_space(layouts: Iterable[ShardLayout], output: Path) -> tuple[int, int]:
    """Bytes that these shards need on the disk of `output`, and those that are free there."""
    needed = MARGIN + sum(layout.size for layout in layouts)
    return needed, shutil.disk_usage(output.parent).free


def check_disk(layouts: Iterable[ShardLayout], output: Path) -> None:
    """Raise PlanError where these shards would not fit on the disk of `output`."""
    needed, free = disk_space(layouts, output)
    if needed > free:
        raise PlanError(
            f"{output.parent}: not enough disk space for the output",
            got=f"{free:,} bytes free",
            expected=f"{needed:,}",
            fix="free space, or choose another folder",
        )


def find_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that `--device` names: `auto`, `all`, or names with commas between.

    Raises
    ------
    UsageError
        Where one is not there, or they are not of one kind.
    """
    names = name.split(",")
    if name == "auto":
        names = ["cuda" if torch.cuda.is_available() else "cpu"]
    elif name == "all":
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not names:
        raise UsageError("device: got 'all', and there are no CUDA devices", fix="use --device cpu")
    devices = tuple(_device(one.strip()) for one in names)
    if len(set(devices)) < len(devices) or len({device.type for device in devices}) > 1:
        raise UsageError(f"device: got {name!r}", expected="cpu, or CUDA devices, each once")
    kinds = {dispatch.card(device) for device in devices if device.type == "cuda"}
    if len(kinds) > 1:
        raise UsageError(
            f"device: {name} are not of one kind, and would give other bytes",
            got=", ".join(sorted(kinds)),
            fix="name those of one kind",
        )
    return devices


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device: got {name!r}", expected="auto, all, cpu, cuda, cuda:N or cuda:N,cuda:M"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device: {name} is not there",
            got=f"{torch.cuda.device_count()} CUDA devices",
            fix="use --device cpu",
        )
    return torch.device("cuda", device.index or 0)


def _device_memory(devices: Sequence[torch.device], options: EngineOptions) -> int:
    """Bytes that tensors may take on each device: as asked, or most of what is free on all."""
    if devices[0].type == "cpu":
        return 0
    if options.gpu_memory is not None:
        return options.gpu_memory
    try:
        free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    except RuntimeError as error:
        names = ", ".join(map(str, devices))
        raise PlanError(f"{names} cannot be used: {error}", fix="use --device cpu") from error
    return max(1, int(GPU_SHARE * free))
