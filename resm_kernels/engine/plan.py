"""The plan of a merge as data: what becomes of every tensor, in which steps, at what cost."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resm_kernels.checkpoint.files import BLOCK
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.checkpoint.lora import Adapter
from resm_kernels.checkpoint.manifest import Part
from resm_kernels.checkpoint.vocabulary import Alignment
from resm_kernels.checkpoint.writer import ShardLayout, Slot
from resm_kernels.engine.lanes import PREFETCH, STAGING
from resm_kernels.engine.matching import FactorSource, Source
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.workspace import Needs, Weight
from resm_kernels.errors import PlanError
from resm_kernels.linalg import Work, dispatch
from resm_kernels.linalg.crossover import Problem
from resm_kernels.methods import Method, Split
from resm_kernels.methods.matrices import matrix_shapes
from resm_kernels.recipe import Recipe

CUBLAS_SPACE = 32 << 20
"""Bytes that cuBLAS keeps for each stream of a Hopper card; less on older ones."""
NOMINAL_WORK = Work(4e10, 8e10, 2e10, 3e10, 5e10, 7e10, 5e10)
"""Operations per second of a core, by kind (measured once, on an EPYC): plans share work out by
them, so that they do not depend on the machine."""
NOMINAL_ENTRIES: Mapping[str, float] = {"task_arithmetic": 5e8}
"""Entries of experts per second of a core, likewise."""
OVERTAKING = 4
"""Windows of tensors that may pass while a large one is merged, all that a worker gets done."""
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
    work : Work
        Floating-point operations of merging it on the CPU; none for element-wise methods.
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
    work: Work

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.slot.name

    @property
    def sources(self) -> tuple[Source | FactorSource, ...]:
        """What goes into it, in order."""
        return (self.base, *self.experts) if self.reads_base else self.experts

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
        """Predicted seconds of a core, at nominal rates."""
        return self.step.cost


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

    @functools.cached_property
    def cost(self) -> float:
        """Predicted seconds of a core, at nominal rates."""
        return self.seconds(NOMINAL_WORK, NOMINAL_ENTRIES)

    def seconds(self, work: Work, entries: Mapping[str, float]) -> float:
        """Predicted seconds of a worker, for all outputs.

        Parameters
        ----------
        work : Work
            Operations per second of each kind; outputs that need the same ones share them.
        entries : mapping
            Entries of experts per second by method, those of `task_arithmetic` for any other:
            spectral methods make passes too.
        """
        passes = sum(
            math.prod(tensor.slot.shape)
            * max(1, len(tensor.experts))
            / entries.get(tensor.rule, entries["task_arithmetic"])
            for tensor in self.tensors
        )
        return passes + sum(each.seconds(work) for each in {tensor.work for tensor in self.tensors})

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


def host_memory(steps: Sequence[Step], plan: MergePlan) -> int:
    """Most bytes of tensors that the CPU's ledger lets into memory at once."""
    on_host = _on_host(steps, plan)
    workers = on_host[0][1] if on_host else 1
    peak = _peak([step for step, _ in on_host], workers)
    return min(peak, plan.memory_budget - plan.staging)


def predicted_peak(steps: Sequence[Step], plan: MergePlan) -> int:
    """Predicted most bytes in memory at once, beyond the interpreter itself."""
    return host_memory(steps, plan) + plan.staging + BLOCK


def predicted_device_peak(steps: Sequence[Step], plan: MergePlan) -> int:
    """Predicted most bytes of tensors in one device's memory at once; 0 for the CPU."""
    if not plan.has_devices:
        return 0
    there = [step for step in steps if not step.stays_on_host(plan)]
    libraries = 0
    if plan.device.type == "cuda":
        streams = plan.workers * (1 + len(plan.experts))
        libraries = streams * (CUBLAS_SPACE + _solver_space(there, plan.device))
    return min(_peak(there, plan.workers, len(plan.devices)), plan.device_memory) + libraries


def _solver_space(steps: Sequence[Step], device: torch.device) -> int:
    """Most bytes that a thread's solver of ours keeps between weights."""
    matrices = {
        (tensor.method.name, shape, len(equal), len(tensor.experts), tensor.options): tensor.method
        for step in steps
        for tensor in step.tensors
        if tensor.reason is None and tensor.method.by_matrix and tensor.experts
        for shape, equal in matrix_shapes(tensor.split, tensor.slot.shape).items()
    }
    problems: set[Problem] = set()
    for (_, shape, count, experts, options), method in matrices.items():
        side = (min(shape), min(shape))
        size = method.batch(shape, count, experts, 4, options, device.type).size
        if size > 1:
            problems.add(Problem("eigh", side, "float64", size * experts))
        else:
            problems.add(Problem("eigh", side, "float64"))
            problems.add(Problem("leading", side, "float64", count=max(1, side[0] // experts)))
    return max((dispatch.kept_space(problem, device) for problem in problems), default=0)


def _peak(steps: Sequence[Step], workers: int, devices: int = 1) -> int:
    """Most bytes of the steps that are inside together, the largest of them on one device.

    They need not be neighbours: small ones overtake a large one, up to `OVERTAKING` windows.
    """
    window = workers + PREFETCH
    held, busy = [s.held_bytes for s in steps], [s.workspace for s in steps]
    reach = OVERTAKING * devices * window
    return max(
        (
            sum(sorted(held[i : i + reach])[-window:]) + sum(sorted(busy[i : i + reach])[-workers:])
            for i in range(max(1, len(steps) - reach + 1))
        ),
        default=0,
    )


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
    identity : mapping
        What that is, by name; large things as their digest.
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
    identity: Mapping[str, str]
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
        """Predicted most bytes in memory at once, beyond the interpreter itself."""
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
        return dict(Counter(tensor.rule for tensor in self.tensors))

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


def workspace_of(tensor: PlannedTensor, device: str) -> int:
    """Bytes beyond inputs and output that merging a planned tensor may hold on a device type."""
    sources, method = (tensor.base, *tensor.experts), None if tensor.reason else tensor.method
    given = tensor.options, tensor.split, tensor.aligned, tensor.masked
    return Needs(device).workspace(Weight(tensor.slot.shape, sources, method, *given))


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
