"""Planning: what becomes of every tensor, from headers and configs alone."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch

from resm_kernels import __version__
from resm_kernels.checkpoint.dtypes import OUT_DTYPES, DType
from resm_kernels.checkpoint.files import canonical_json
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import Checkpoint, TensorInfo
from resm_kernels.checkpoint.lora import Adapter, open_model
from resm_kernels.checkpoint.manifest import PART, Part
from resm_kernels.checkpoint.reader import open_checkpoint
from resm_kernels.checkpoint.vocabulary import Alignment, align, differences
from resm_kernels.checkpoint.writer import Slot, lay_out_shards
from resm_kernels.engine.devices import device_memory, find_devices
from resm_kernels.engine.matching import Matching
from resm_kernels.engine.memory import BUDGET_SHARE, available_memory
from resm_kernels.engine.options import EngineOptions, usable_cores
from resm_kernels.engine.plan import MergePlan, PlannedTensor, Step, plan_steps
from resm_kernels.engine.workers import choose_workers
from resm_kernels.engine.workspace import Needs, Weight
from resm_kernels.errors import PlanError, UsageError
from resm_kernels.linalg import dispatch
from resm_kernels.methods import Method, Split, split_of
from resm_kernels.ops.launch import architecture, triton_version
from resm_kernels.recipe import Recipe, holds, layer_positions

LOG = logging.getLogger(__name__)

NUMERICS = 6
"""Raised whenever the same plan would give other bytes."""
GPU_WORKERS = 2
"""Weights merged at once on a GPU: one's eigen-decomposition, bound by latency, runs beside the
other's products. Not yet measured."""
MAX_BRIEF = 64
"""Most characters of a part of the identity that is kept as it is."""
MAX_NEAR = 5000
"""Most names that a pattern is compared with letter by letter."""
MAX_IDLE = 20
"""Most patterns for which names near them are looked for."""


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
    """Plan the merges of several recipes that differ in their outputs alone; as `make_plan`."""
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
    devices = find_devices(options.device)
    budget = options.memory_budget or max(int(BUDGET_SHARE * available_memory()), 1)
    base = _whole(open_checkpoint(recipes[0].base))
    opened: dict[str, Checkpoint | Adapter] = {}
    matchings: dict[tuple[str, ...], Matching] = {}
    plans: list[MergePlan] = []
    used: list[Matching] = []
    for recipe in recipes:
        for expert in recipe.experts:
            if expert.model.text not in opened:
                opened[expert.model.text] = _whole(open_model(expert.model, base))
        names = tuple(expert.model.text for expert in recipe.experts)
        if names not in matchings:  # methods that average the base too have it among the experts
            experts = [opened[name] for name in names]
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
    out_dtype = OUT_DTYPES[recipe.out_dtype] if recipe.out_dtype else None

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
        identity={name: _brief(value) for name, value in identity.items()},
        devices=devices,
        workers=options.workers or 1,
        memory_budget=budget,
        device_memory=device_memory(devices, options),
        part=part,
    )


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value).decode()
    return text if len(text) <= MAX_BRIEF else hashlib.sha256(text.encode()).hexdigest()


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
        self._needs = Needs(device)

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
        merged = None if reason else method
        weight = Weight(slot.shape, (own, *sources), merged, settings, split, aligned, self._masked)
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
            workspace=self._needs.workspace(weight),
            work=self._needs.work(weight),
        )

    def _options(self, method: Method[Any], tensor: str) -> Any:
        values = self._recipe.values(tensor, self._positions[tensor])
        known = method.name, repr(values)  # not the values: -0.0 is 0.0 among keys
        if known not in self._settings:
            self._settings[known] = method.make_options(values, len(self._recipe.experts))
        return self._settings[known]
