"""Several LoRA adapters into one of a chosen rank, for PEFT: never larger than their factors.

The counterpart of PEFT's `add_weighted_adapter(combination_type="svd")`, which forms every delta
and takes the SVD of an m x n matrix. Here each weight is merged in the core space of its factors:
QR of the factors, an SVD of a matrix whose sides are the sum of the ranks. Neither PEFT nor
safetensors is needed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from resm_kernels.checkpoint.dtypes import BY_TORCH, OUT_DTYPES, DType
from resm_kernels.checkpoint.files import canonical_json
from resm_kernels.checkpoint.hub import ADAPTER_WEIGHTS, ModelReference, locate
from resm_kernels.checkpoint.journal import OutputFolder, absolute, check_output
from resm_kernels.checkpoint.layout import TensorInfo
from resm_kernels.checkpoint.lora import (
    PREFIX,
    Adapter,
    adapter_folder,
    read_adapter,
    read_factors,
)
from resm_kernels.checkpoint.reader import ADAPTER_CONFIG, read_tensor
from resm_kernels.checkpoint.writer import ShardFile, lay_out_shards
from resm_kernels.errors import CheckpointError, NonFiniteError, UsageError
from resm_kernels.linalg import FactoredDelta, Solver, SolverOptions, Subspace, leading_subspaces
from resm_kernels.methods import find_method
from resm_kernels.methods.arithmetic import TaskArithmeticOptions, divisor_of
from resm_kernels.methods.spectral import ResmOptions, TruncatingOptions, choose
from resm_kernels.ops.delta_stats import DeltaStats
from resm_kernels.ops.dtypes import chunks

__all__ = ["AdapterMerge", "MergedModule", "merge_adapters"]

METHODS = ("tsvm", "resm", "task_arithmetic")
PANEL = 1 << 20
"""Entries of a delta that are formed at once, for the outlier statistics of `resm` alone."""
KEPT_KEYS = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "revision", "task_type")
"""What the merged config takes from the first adapter."""


@dataclass(frozen=True)
class MergedModule:
    """What became of one module.

    Attributes
    ----------
    shape : tuple of int
        m, n of its delta as PEFT's layer has it: out x in, vocabulary x width for embeddings.
    rule : str
        The method, or `mean` where the method leaves a weight to the mean of deltas.
    rank : int
        Triplets kept, at most the rank asked for; the rest of the factors is zero.
    truncation_error : float
        ||M - M_rank||_F / ||M||_F of the merged delta M, from its singular values.
    adapters : int
        How many of the adapters change this module; the others count as a zero delta.
    """

    shape: tuple[int, int]
    rule: str
    rank: int
    truncation_error: float
    adapters: int


@dataclass(frozen=True)
class AdapterMerge:
    """The report of a merge: what was written, and every module by its name."""

    output: Path
    method: str
    rank: int
    modules: Mapping[str, MergedModule]
    notes: tuple[str, ...]


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    rank: int,
    method: Literal["tsvm", "resm", "task_arithmetic"] = "tsvm",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, object] | None = None,
    out_dtype: str | None = None,
) -> AdapterMerge:
    """Merge LoRA adapters of one base into one adapter of a chosen rank.

    Parameters
    ----------
    adapters : sequence of path
        PEFT folders or Hub ids; ranks and scales may differ.
    output : path
        A folder that does not exist yet. Built beside it and renamed when complete.
    rank : int
        Rank of the merged adapter, at most the largest that a module can have; its scale is 1.
    method : str
        `tsvm`, `resm` or `task_arithmetic`.
    weights : sequence of float, optional
        One per adapter; 1 by default.
    parameters : mapping, optional
        The method's parameters by the names that recipes use (`lambda`, `sigma`, ...);
        `mask_noise` needs dense deltas and is refused.
    out_dtype : str, optional
        `float32`, `bfloat16`, ...; by default the widest of the adapters'.

    Returns
    -------
    AdapterMerge

    Raises
    ------
    UsageError
        Arguments that cannot be meant.
    CheckpointError
        An adapter that cannot be read, that replaces whole tensors (`modules_to_save`, trained
        biases: their deltas need the base, merge onto it instead), or that does not fit the first.
    NonFiniteError
        NaN or Inf in a factor, or a merged factor outside the output dtype.
    OutputError
        The output exists, or cannot be written.

    Notes
    -----
    float64 throughout, unless `solver` asks for less. With `tsvm` and `resm`, p = min(m, n) and
    T = len(adapters) as for whole checkpoints, also where an adapter has no delta. The merged
    delta U S V^T, truncated, is split evenly: B = U sqrt(S), A = sqrt(S) V^T. Deterministic.
    """
    if isinstance(adapters, str | os.PathLike):
        raise UsageError(f"adapters: got {adapters!r}", expected="a list of paths")
    merge = _Merge(rank, method, weights, parameters or {}, len(adapters))
    opened = [_open(adapter) for adapter in adapters]
    modules, copies = _match(opened)
    largest = max(min(shape) for shape, _ in modules.values())
    if rank > largest:
        raise UsageError(f"rank: got {rank}", expected=f"at most {largest}, the largest possible")
    target = absolute(Path(output))
    check_output(target, [adapter.folder for adapter in opened], resume=False)

    dtype = _out_dtype(opened, out_dtype)
    tensors: dict[str, tuple[DType, tuple[int, ...]]] = {}
    for name, (shape, embedding) in modules.items():
        a, b = _factor_names(name, embedding)
        rows, columns = reversed(shape) if embedding else shape
        tensors |= {a: (dtype, (rank, columns)), b: (dtype, (rows, rank))}
    tensors |= {name: (info.dtype, info.shape) for name, (_, info) in copies.items()}
    (shard,) = lay_out_shards([(n, d, s) for n, (d, s) in tensors.items()], 1 << 62)
    layout = replace(shard, name=ADAPTER_WEIGHTS[0])
    slots = {slot.name: slot for slot in layout.slots}

    identity = canonical_json([merge.identity, [adapter.digest for adapter in opened]])
    folder = OutputFolder(target, hashlib.sha256(identity).hexdigest())
    file: ShardFile | None = None
    try:
        file = ShardFile(folder.path, layout)
        done: dict[str, MergedModule] = {}
        for name, (shape, embedding) in modules.items():
            deltas = [_delta(adapter, name) for adapter in opened]
            left, right, done[name] = merge.module(name, shape, deltas)
            factors = (left.T, right) if embedding else (right.T, left)
            for tensor, factor in zip(_factor_names(name, embedding), factors, strict=True):
                file.write(slots[tensor], _cast(factor, dtype, tensor))
        for tensor, (owner, info) in copies.items():
            file.write(slots[tensor], read_tensor(owner.files[0], info))
        file.finish()
        config = _config(opened[0], rank, list(modules))
        folder.finish({ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()})
    except BaseException:
        folder.discard_if_empty()
        raise
    finally:
        if file is not None:
            file.close()
        folder.close()
    return AdapterMerge(target, method, rank, done, _notes(opened))


class _Merge:
    """One merge's checked arguments, and what they make of a weight."""

    def __init__(
        self,
        rank: int,
        method: str,
        weights: Sequence[float] | None,
        parameters: Mapping[str, object],
        count: int,
    ) -> None:
        if count == 0:
            raise UsageError("no adapters to merge", fix="pass at least one")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"rank: got {rank!r}", expected="a whole number above 0")
        if method not in METHODS:
            raise UsageError(
                f"method {method!r} does not merge adapters",
                expected=f"one of {', '.join(METHODS)}",
            )
        self.method = find_method(method)
        self.options = self.method.make_options(parameters, count)
        given = [1.0] * count if weights is None else list(weights)
        numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in given)
        if len(given) != count or not numbers:
            raise UsageError(f"weights: got {weights}", expected=f"{count} numbers")
        self.weights = [float(w) for w in given]
        self.method.validate(self.weights, self.options)
        if isinstance(self.options, ResmOptions) and self.options.mask_noise:
            raise UsageError(
                "mask_noise needs dense deltas, adapters are merged as factors",
                fix="leave it out, or merge the adapters onto their base",
            )
        self.rank = rank
        self.identity = [method, rank, self.weights, repr(self.options)]

    def module(
        self, name: str, shape: tuple[int, int], deltas: Sequence[FactoredDelta | None]
    ) -> tuple[torch.Tensor, torch.Tensor, MergedModule]:
        """The merged delta of one weight as float64 factors of the chosen rank, m x r and n x r."""
        full = [_nothing(shape) if delta is None else delta for delta in deltas]
        rule = self.method.name
        if self.method.declines(name, shape, len(full), self.options):
            rule = "mean"
            merged = _weighted_sum(
                full, [self.options.lambda_ * w / len(full) for w in self.weights]
            )
        elif isinstance(self.options, TaskArithmeticOptions):
            divisor = divisor_of(self.weights, self.options.normalize)
            merged = _weighted_sum(full, [self.options.lambda_ * w / divisor for w in self.weights])
        else:
            merged = self._spectral(shape, full)
        found = leading_subspaces(merged, min(shape))
        kept = min(self.rank, found.rank)
        root = found.values[:kept].sqrt()
        left, right = (
            torch.nn.functional.pad(side[:, :kept] * root, (0, self.rank - kept))
            for side in (found.left, found.right)
        )
        error = _norm(found.values[kept:]) / (_norm(found.values) or 1.0)
        changed = sum(delta is not None for delta in deltas)
        return left, right, MergedModule(shape, rule, kept, error, changed)

    def _spectral(self, shape: tuple[int, int], deltas: Sequence[FactoredDelta]) -> FactoredDelta:
        options: TruncatingOptions = self.options
        limit = min(shape) // len(deltas)
        weights, ranks, energy = self.weights, [limit] * len(deltas), None
        if isinstance(options, ResmOptions):
            given = {"sigma": options.sigma, "noise_floor": options.noise_floor}
            stats = [factored_stats(delta, **given) for delta in deltas]
            chosen = choose(stats, min(shape), weights, options)
            weights, ranks, energy = chosen.weights, [chosen.rank] * len(deltas), chosen.energy
        solver = Solver(SolverOptions(mode="exact" if options.solver == "auto" else options.solver))
        makers = [functools.partial(_same, delta) for delta in deltas]
        subspaces: list[Subspace] = solver.subspaces(makers, ranks, energy=energy)
        merge = solver.combine(subspaces, weights)
        return FactoredDelta(merge.left * options.lambda_, merge.right)


def factored_stats(delta: FactoredDelta, *, sigma: float, noise_floor: float) -> DeltaStats:
    """`ops.delta_stats` of a factored delta, formed in float64 a panel of rows at a time.

    Twice 2 m n r operations; no more than `PANEL` entries are alive at once.
    """
    (m, n), count = delta.shape, math.prod(delta.shape)
    left, right = delta.left.double(), delta.right.double()

    def panels() -> Iterator[torch.Tensor]:
        for rows in chunks(m, max(1, PANEL // max(n, 1))):
            yield (left[rows] @ right.T).abs_()

    total = squares = largest = 0.0
    zeros = 0
    for panel in panels():
        total += float(panel.sum())
        squares += float(panel.square().sum())
        largest = max(largest, float(panel.max()))
        zeros += int((panel == 0).sum())
    mean = total / max(count, 1)
    spread = math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
    threshold, floor = mean + sigma * spread, noise_floor * math.sqrt(squares / max(count, 1))
    mass, outliers, sparse = 0.0, 0, 0
    for panel in panels():
        above = panel > threshold
        mass += float(panel[above].sum())
        outliers += int(above.sum())
        sparse += int((panel <= floor).sum())
    return DeltaStats(
        count, total, squares, largest, zeros, threshold, mass, outliers, floor, sparse
    )


def _open(adapter: str | os.PathLike[str]) -> Adapter:
    path = locate(ModelReference(os.fspath(adapter)), adapter=True)
    found = read_adapter(adapter_folder(path), os.fspath(adapter))
    if found.full:
        raise CheckpointError(
            f"{adapter}: replaces {len(found.full)} tensors (modules_to_save, trained biases)",
            got=", ".join(list(found.full)[:3]),
            expected="nothing but LoRA factors: the change of a whole tensor needs the base",
            fix="merge the adapters onto their base instead, with them as experts",
        )
    return found


def _match(
    adapters: Sequence[Adapter],
) -> tuple[dict[str, tuple[tuple[int, int], bool]], dict[str, tuple[Adapter, TensorInfo]]]:
    """Every changed weight with its shape and whether it is an embedding; every copy, once."""
    modules: dict[str, tuple[tuple[int, int], bool]] = {}
    copies: dict[str, tuple[Adapter, TensorInfo]] = {}
    problems = []
    for adapter in adapters:
        for name, pair in adapter.pairs.items():
            first = modules.setdefault(name, (pair.shape, pair.transposed))
            if first != (pair.shape, pair.transposed):
                problems.append(
                    f"{name}: {pair.shape} in {adapter.reference}, {first[0]} before it"
                )
        for info in adapter.copies.values():
            owner, other = copies.setdefault(info.name, (adapter, info))
            pairs = [read_tensor(a.files[0], i) for a, i in ((adapter, info), (owner, other))]
            if not torch.equal(*pairs):
                problems.append(f"{info.name}: {adapter.reference} has another copy of this weight")
    if problems:
        raise CheckpointError(
            "\n".join(["the adapters do not fit together:", *(f"  - {p}" for p in problems[:20])]),
            fix="merge adapters of one base only",
        )
    return modules, copies


def _delta(adapter: Adapter, name: str) -> FactoredDelta | None:
    pair = adapter.pairs.get(name)
    if pair is None:
        return None
    factors = read_factors(adapter, pair)
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise NonFiniteError(
            f"{adapter.files[0].path}: module {pair.module!r}: NaN or Inf in its factors"
        )
    return FactoredDelta(*(factor.double() for factor in factors))


def _nothing(shape: tuple[int, int]) -> FactoredDelta:
    return FactoredDelta(*(torch.zeros(size, 0, dtype=torch.float64) for size in shape))


def _same(delta: FactoredDelta) -> FactoredDelta:
    return delta


def _weighted_sum(deltas: Sequence[FactoredDelta], weights: Sequence[float]) -> FactoredDelta:
    left = torch.cat([d.left * w for d, w in zip(deltas, weights, strict=True)], dim=1)
    return FactoredDelta(left, torch.cat([d.right for d in deltas], dim=1))


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) if values.numel() else 0.0


def _factor_names(name: str, embedding: bool) -> tuple[str, str]:
    """The names of A and B in the file."""
    module = PREFIX + name.removesuffix(".weight")
    if embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _cast(factor: torch.Tensor, dtype: DType, name: str) -> torch.Tensor:
    cast = factor.to(dtype.torch)
    if not bool(torch.isfinite(cast).all()):
        raise NonFiniteError(f"tensor {name!r}: outside the range of {dtype.name}")
    return cast


def _out_dtype(adapters: Sequence[Adapter], name: str | None) -> DType:
    if name is not None:
        if name not in OUT_DTYPES:
            raise UsageError(f"out_dtype: got {name!r}", expected=f"one of {', '.join(OUT_DTYPES)}")
        return OUT_DTYPES[name]
    infos = [i for a in adapters for pair in a.pairs.values() for i in (pair.a, pair.b)]
    widest = functools.reduce(torch.promote_types, (info.dtype.torch for info in infos))
    return BY_TORCH[widest]


def _config(first: Adapter, rank: int, names: Sequence[str]) -> dict[str, Any]:
    taken = {key: first.config[key] for key in KEPT_KEYS if key in first.config}
    modules = [name.removesuffix(".weight") for name in names]
    return {
        **taken,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": modules,
    }


def _notes(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    bases = sorted({a.base_model for a in adapters if a.base_model})
    return (f"the adapters name different bases: {', '.join(bases)}",) if len(bases) > 1 else ()
