"""Singular-vector merging: TSV-M, RESM, Iso-C and Iso-CTS."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from resm_kernels.linalg import (
    Batching,
    FactoredDelta,
    Solver,
    SolverOptions,
    SpectralMerge,
    SubspaceBatch,
    Work,
    equalise,
    equalising_work,
    leading_subspaces,
    leading_subspaces_batch,
    spectral_merge_batch,
    subspace_overlap,
)
from resm_kernels.linalg.subspace import (
    Delta,
    extreme_exponent,
    rank_tolerance,
    times_power_of_two,
)
from resm_kernels.methods.base import Merged, Method, matches, option
from resm_kernels.methods.inputs import Inputs
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats
from resm_kernels.ops.low_rank import PANEL, add_low_rank
from resm_kernels.ops.mask import Mask

EXCLUDE = (
    "*embed*", "*lm_head*", "*wte*", "*wpe*", "*norm*", "shared.weight", "*bias", "*A_log",
)  # fmt: skip
"""Tables, norms, biases of experts, state-space rates: matrices in shape, but not linear maps."""
BLAS_BUFFERS = 24 << 20
"""Bytes that BLAS and LAPACK libraries keep per thread to pack their operands."""
SLACK = 1.1
"""What malloc keeps of freed blocks, over the live bytes."""


@dataclass(frozen=True)
class SpectralOptions:
    """Options that every spectral method has."""

    lambda_: float = option(1.0, "merge coefficient that multiplies the merged delta")
    exclude: tuple[str, ...] = option(
        EXCLUDE, "name patterns of 2-D weights that get the mean of deltas; [] for none"
    )
    split: bool = option(
        True, "merge the matrices of fused weights (qkv, gate_up) and expert stacks one by one"
    )


@dataclass(frozen=True)
class TruncatingOptions(SpectralOptions):
    """Options of the methods that truncate every delta."""

    solver: Literal["auto", "exact", "fast", "textbook"] = option(
        "auto",
        "auto: within the accuracy contract; exact: float64; fast: to 1e-2, gains on a GPU; "
        "textbook: float32 SVDs as published",
    )


OptionsT = TypeVar("OptionsT", bound=TruncatingOptions)


@dataclass(frozen=True)
class IsoCtsOptions(TruncatingOptions):
    """Options of `iso_cts`."""

    common_space: float = option(
        0.8, "share of min(m, n) directions taken from the summed delta", low=0, high=1
    )


@dataclass(frozen=True)
class ResmOptions(TruncatingOptions):
    """Options of `resm`; docs/quality.md has the measurement behind the defaults."""

    outlier_score: Literal["share", "mass", "count"] = option(
        "share", "share: outlier mass over all mass; mass: outlier mass; count: outlier entries"
    )
    sigma: float = option(3.0, "an outlier is this many standard deviations above the mean", low=0)
    outlier_power: float = option(
        0.0, "beta in w_t ~ o_t^beta; 0 turns outlier weighting off, 0.5 helped three experts"
    )
    noise_floor: float = option(0.1, "eta: entries at or below eta * rms count as sparse", low=0)
    mask_noise: bool = option(False, "set entries below the noise floor to zero before factoring")
    rank: Literal["energy", "sparsity", "fixed"] = option(
        "energy", "how the rank is chosen, never above min(m, n) / T"
    )
    rank_energy: float = option(0.9, "rank: energy keeps this share of ||D_t||_F^2", low=0, high=1)
    rank_sparsity: float = option(
        1.0, "rank: sparsity has gamma in p/T * (1 - gamma * s)", low=0, high=1
    )
    rank_fraction: float = option(1.0, "rank: fixed keeps this share of p/T", low=0, high=1)


def spectral_declines(
    name: str, shape: Sequence[int], experts: int, options: SpectralOptions
) -> str | None:
    """Why a weight gets the mean of deltas instead of a spectral merge, or None."""
    if len(shape) != 2:
        return f"{len(shape)}-D"
    if pattern := matches(name, options.exclude):
        return f"excluded by {pattern}"
    if min(shape) < experts:
        return f"shorter side {min(shape)} < {experts} experts"
    return None


def spectral_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: TruncatingOptions, device: str
) -> int:
    """Bytes that TSV-M and RESM hold at their peak, beyond inputs and output.

    Factoring and whitening as the solver plans them, or rebuilding: the factors, the low-rank
    pair and the panels of the product. A step up to another route may hold more.
    """
    ranks = [min(shape) // experts] * experts
    plan = _solver(options, itemsize).plan(shape, ranks, itemsize=itemsize, device=device)
    rebuilding = 8 * sum(shape) * sum(ranks) + 2 * plan.pair + _panels(shape, itemsize)
    return int(SLACK * max(plan.workspace, rebuilding)) + BLAS_BUFFERS


def _solver(options: TruncatingOptions, itemsize: int) -> Solver:
    return Solver(SolverOptions(mode=options.solver)).for_itemsize(itemsize)


def equalising_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: SpectralOptions, device: str
) -> int:
    """Bytes that Iso-C holds at its peak: the summed delta and its polar factor in float64."""
    rows, columns = shape
    p = min(rows, columns)
    factors = 8 * (rows + columns) * p
    factoring = 8 * rows * columns + max(8 * 5 * p * p, factors)
    rebuilding = 8 * rows * columns + factors + factors * itemsize // 8 + _panels(shape, itemsize)
    return int(SLACK * max(factoring, rebuilding)) + BLAS_BUFFERS


def common_space_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: IsoCtsOptions, device: str
) -> int:
    """Bytes that Iso-CTS holds at its peak: Iso-C's, and the bases of all experts."""
    held = 2 * 8 * sum(shape) * min(shape) + 8 * shape[0] * shape[1]
    return equalising_workspace(shape, experts, itemsize, options, device) + held


def spectral_batch(
    shape: Sequence[int],
    matrices: int,
    experts: int,
    itemsize: int,
    options: TruncatingOptions,
    device: str,
) -> Batching:
    """How many of the equal matrices of a tensor TSV-M and RESM factor at once."""
    solver = _solver(options, itemsize)
    found = solver.batch(shape, matrices, experts, itemsize=itemsize, device=device)
    return replace(found, workspace=int(SLACK * found.workspace))


def factored_workspace(
    shape: Sequence[int], ranks: Sequence[int], itemsize: int, options: SpectralOptions
) -> int | None:
    """Bytes that a merge in the core of its factors holds at its peak; RESM's statistics make one
    expert whole at a time, and its masks all of them."""
    whole = 0
    if isinstance(options, ResmOptions):
        if options.mask_noise:
            return None
        whole = itemsize * shape[0] * shape[1]
    factors = 6 * 8 * sum(shape) * sum(ranks)
    return int(SLACK * (factors + whole + _panels(shape, itemsize))) + BLAS_BUFFERS


def truncating_work(
    shape: Sequence[int],
    experts: int,
    ranks: Sequence[int] | None,
    itemsize: int,
    options: TruncatingOptions,
    device: str,
) -> Work:
    """Operations of TSV-M and RESM; RESM's ranks are known only after its statistics."""
    most = min(shape) // experts
    if isinstance(options, ResmOptions) and options.rank == "fixed":
        most = max(1, round(most * options.rank_fraction))
    masked = isinstance(options, ResmOptions) and options.mask_noise
    if ranks is None or masked:
        return _solver(options, itemsize).work(shape, [most] * experts, device=device)
    return _solver(options, itemsize).work(
        shape, [min(rank, most) for rank in ranks], device=device, factored=True
    )


def iso_c_work(
    shape: Sequence[int],
    experts: int,
    ranks: Sequence[int] | None,
    itemsize: int,
    options: SpectralOptions,
    device: str,
) -> Work:
    """Operations of Iso-C."""
    return equalising_work(shape, None if ranks is None else min(sum(ranks), min(shape)))


def iso_cts_work(
    shape: Sequence[int],
    experts: int,
    ranks: Sequence[int] | None,
    itemsize: int,
    options: IsoCtsOptions,
    device: str,
) -> Work:
    """Operations of Iso-CTS: the common subspace, each expert's own, and their polar factors."""
    own, common = own_and_common(min(shape), experts, options.common_space)
    outside = Work(gemm_fp64=4.0 * experts * shape[0] * shape[1] * common)
    solver = _solver(options, itemsize)
    return outside + solver.work(shape, [common, *[own] * experts], device=device)


def own_and_common(p: int, experts: int, share: float) -> tuple[int, int]:
    """Directions that Iso-CTS takes from each expert, and from the sum; all together p."""
    own = min(round((p - int(p * share)) / experts), p // experts)
    return own, p - own * experts


def _panels(shape: Sequence[int], itemsize: int) -> int:
    return 3 * itemsize * min(PANEL, shape[0] * shape[1])


@dataclass(frozen=True)
class _Truncation:
    """What is kept of every delta of one matrix, by what it is weighted, what is masked before."""

    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    energy: float | None = None
    masks: tuple[Mask, ...] | None = None

    @property
    def factors(self) -> tuple[Hashable, ...]:
        """What the subspaces depend on."""
        return (self.ranks, self.energy, self.masks)


def _tsvm_truncation(
    inputs: Inputs, weights: Sequence[float], options: TruncatingOptions
) -> _Truncation:
    limit = min(inputs.base.shape) // len(weights)
    return _Truncation(_known_ranks(inputs, limit), tuple(weights))


def _tsvm(
    inputs: Inputs, weights: Sequence[float], options: TruncatingOptions, out_dtype: torch.dtype
) -> Merged:
    kept = _tsvm_truncation(inputs, weights, options)
    return _merge_subspaces(inputs, kept, options, out_dtype, rule="tsvm")


def _resm_choice(
    inputs: Inputs, weights: Sequence[float], options: ResmOptions
) -> tuple[ResmChoice, _Truncation]:
    stats = _stats(inputs, options.sigma, options.noise_floor)
    chosen = choose(stats, min(inputs.base.shape), weights, options)
    masks = tuple(Mask(floor=s.floor) for s in stats) if options.mask_noise else None
    ranks = _known_ranks(inputs, chosen.rank)
    return chosen, _Truncation(ranks, tuple(chosen.weights), chosen.energy, masks)


def _resm_truncation(inputs: Inputs, weights: Sequence[float], options: ResmOptions) -> _Truncation:
    return _resm_choice(inputs, weights, options)[1]


def _resm(
    inputs: Inputs, weights: Sequence[float], options: ResmOptions, out_dtype: torch.dtype
) -> Merged:
    chosen, kept = _resm_choice(inputs, weights, options)
    merged = _merge_subspaces(inputs, kept, options, out_dtype, rule="resm")
    return replace(merged, outlier_scores=chosen.scores, sparsity=chosen.sparsity)


def _known_ranks(inputs: Inputs, limit: int) -> tuple[int, ...]:
    """`limit`, or less for the experts that are known to change fewer directions."""
    known = map(inputs.rank, range(len(inputs.experts)))
    return tuple(limit if rank is None else min(limit, rank) for rank in known)


@dataclass(frozen=True)
class ResmChoice:
    """What RESM makes of the statistics of one weight's deltas.

    Attributes
    ----------
    scores : tuple of float
        Outlier scores, per expert.
    weights : list of float
        Outlier weights times the user's.
    sparsity : float
        Mean over the experts.
    rank : int
        The most triplets to keep per expert.
    energy : float or None
        The share of ||D_t||_F^2 that ends before it.
    """

    scores: tuple[float, ...]
    weights: list[float]
    sparsity: float
    rank: int
    energy: float | None


def choose(
    stats: Sequence[DeltaStats], p: int, weights: Sequence[float], options: ResmOptions
) -> ResmChoice:
    """RESM's weights and rank for a weight whose shorter side is p."""
    limit = p // len(stats)
    scores = tuple(_outlier_score(s, options.outlier_score) for s in stats)
    factors = outlier_weighting(scores, options.outlier_power, [s.abs_sum > 0.0 for s in stats])
    sparsity = sum(s.sparsity for s in stats) / len(stats)
    rank = limit
    if options.rank == "sparsity":
        rank = sparse_rank(p, len(stats), sparsity, options.rank_sparsity)
    elif options.rank == "fixed":
        rank = max(1, round(limit * options.rank_fraction))
    return ResmChoice(
        scores,
        [factor * user for factor, user in zip(factors, weights, strict=True)],
        sparsity,
        rank,
        options.rank_energy if options.rank == "energy" else None,
    )


def _stats(inputs: Inputs, sigma: float, noise_floor: float) -> list[DeltaStats]:
    def find() -> list[DeltaStats]:
        score = functools.partial(delta_stats, inputs.base, sigma=sigma, noise_floor=noise_floor)
        if not inputs.factored:
            return score(inputs.whole())
        return [score([inputs.expert(t)])[0] for t in range(len(inputs.experts))]

    return inputs.once("stats", (sigma, noise_floor), find)


def _iso_c(
    inputs: Inputs, weights: Sequence[float], options: SpectralOptions, out_dtype: torch.dtype
) -> Merged:
    merge, rank = inputs.once(
        "equalised", tuple(weights), lambda: equalise(_weighted_total(inputs, weights))
    )
    return _rebuild(inputs, merge, [rank], weights, options, out_dtype, "iso_c")


def _weighted_total(inputs: Inputs, weights: Sequence[float]) -> Delta:
    """sum_t w_t D_t: factors side by side where all are factors, else a float64 matrix."""
    known = range(len(weights))
    if all(inputs.rank(t) is not None for t in known):
        factors = [f for f in map(inputs.delta, known) if isinstance(f, FactoredDelta)]
        left = [f.left.double() * weight for f, weight in zip(factors, weights, strict=True)]
        right = [f.right.double() for f in factors]
        return FactoredDelta(torch.cat(left, 1), torch.cat(right, 1))
    total = torch.zeros(inputs.base.shape, dtype=torch.float64, device=inputs.base.device)
    for t, weight in enumerate(weights):
        delta = inputs.delta(t)
        if isinstance(delta, FactoredDelta):
            total.addmm_(delta.left.double(), delta.right.double().T, alpha=weight)
        else:
            total.add_(delta, alpha=weight)
    return total


def _iso_cts(
    inputs: Inputs, weights: Sequence[float], options: IsoCtsOptions, out_dtype: torch.dtype
) -> Merged:
    p, count = min(inputs.base.shape), len(weights)
    own, common = own_and_common(p, count, options.common_space)

    def find() -> tuple[SpectralMerge, list[int]]:
        shared = leading_subspaces(_weighted_total(inputs, weights), common)
        spaces = [shared]
        for t, weight in enumerate(weights):
            delta = inputs.delta(t)
            space = leading_subspaces(_outside(delta, shared.left), own if weight else 0)
            # What rounding left of a delta inside the common space is no direction of its own.
            floor = rank_tolerance(max(inputs.base.shape)) * _norm(delta) / math.sqrt(p)
            kept = int((space.values > floor).sum())
            spaces.append(
                replace(
                    space,
                    left=space.left[:, :kept],
                    values=space.values[:kept] * abs(weight),
                    right=space.right[:, :kept],
                )
            )
        mean = float(torch.cat([space.values for space in spaces]).sum()) / p
        level = [replace(space, values=torch.full_like(space.values, mean)) for space in spaces]
        solver = _solver(options, inputs.dtype.itemsize)
        signs = [1.0, *(math.copysign(1.0, weight) for weight in weights)]
        return solver.combine(level, signs), [space.rank for space in spaces]

    key = (options.common_space, options.solver, tuple(weights))
    merge, ranks = inputs.once("common and own", key, find)
    return _rebuild(inputs, merge, ranks, weights, options, out_dtype, "iso_cts")


def _norm(delta: Delta) -> float:
    """Frobenius norm."""
    if isinstance(delta, FactoredDelta):
        left, right = delta.left.double(), delta.right.double()
        return math.sqrt(max(0.0, float(((left.T @ left) * (right.T @ right)).sum())))
    exponent = extreme_exponent(delta)
    scaled = times_power_of_two(delta, -exponent)
    return math.ldexp(float(torch.linalg.vector_norm(scaled, dtype=torch.float64)), exponent)


def _outside(delta: Delta, left: torch.Tensor) -> Delta:
    """The part of a delta whose columns are orthogonal to those of `left`, in float64."""
    if isinstance(delta, FactoredDelta):
        wide = delta.left.double()
        return FactoredDelta(wide - left @ (left.T @ wide), delta.right)
    wide = delta.double()
    return wide - left @ (left.T @ wide)


def outlier_weighting(
    scores: Sequence[float], power: float, changed: Sequence[bool] | None = None
) -> list[float]:
    """w_t = T * o_t^beta / sum_j o_j^beta: weights that sum to T.

    All 1 where every score is 0, or `power` is 0. Experts that did not change this weight
    (`changed` is false) have weight 1 and no part in T and the sum, so that a frozen layer of one
    expert does not scale the others. With a negative power experts without outliers take the
    limit of the formula: they share the whole weight.
    """
    active = [s for i, s in enumerate(scores) if changed is None or changed[i]]
    if power == 0.0 or not active or max(active) == 0.0:
        return [1.0] * len(scores)
    if power < 0.0 and min(active) == 0.0:
        powered = [float(score == 0.0) for score in scores]
    else:
        unit = max(active) if power > 0.0 else min(active)
        powered = [(score / unit) ** power if score else 0.0 for score in scores]
    total = sum(p for i, p in enumerate(powered) if changed is None or changed[i])
    return [
        len(active) * p / total if changed is None or changed[i] else 1.0
        for i, p in enumerate(powered)
    ]


def sparse_rank(p: int, experts: int, sparsity: float, gamma: float) -> int:
    """clamp(round(p/T * (1 - gamma * s)), 1, floor(p/T)); floor(p/T) where gamma is 0."""
    return max(1, min(p // experts, round(p / experts * (1.0 - gamma * sparsity))))


def _outlier_score(stats: DeltaStats, kind: str) -> float:
    if kind == "mass":
        return stats.outlier_mass
    if kind == "count":
        return float(stats.outlier_count)
    return stats.outlier_share


def _prepare(
    truncate: Callable[[Inputs, Sequence[float], OptionsT], _Truncation],
    matrices: Sequence[Inputs],
    weights: Sequence[float],
    options: OptionsT,
) -> None:
    """Factor and combine matrices of one shape in batched calls; `merge` finds the results.

    All of them even where some are known, so that the bytes do not depend on what ran before.
    """
    kept = [truncate(inputs, weights, options) for inputs in matrices]
    keys = [(options.solver, k.factors) for k in kept]

    def delta(inputs: Inputs, t: int, masks: tuple[Mask, ...] | None) -> torch.Tensor:
        found = inputs.delta(t, None if masks is None else masks[t])
        assert isinstance(found, torch.Tensor)
        return found

    def factor() -> SubspaceBatch:
        deltas = torch.stack(
            [
                delta(inputs, t, k.masks)
                for inputs, k in zip(matrices, kept, strict=True)
                for t in range(len(weights))
            ]
        )
        ranks = torch.tensor([k.ranks for k in kept])
        stacked = deltas.view(len(matrices), len(weights), *deltas.shape[1:])
        return leading_subspaces_batch(stacked, ranks, energy=kept[0].energy)

    def combine() -> list[SpectralMerge | None]:
        each = torch.tensor([k.weights for k in kept], dtype=torch.float64)
        return spectral_merge_batch(batch, each)

    batch = matrices[0].once("batch", tuple(keys), factor)
    every = tuple((key, k.weights) for key, k in zip(keys, kept, strict=True))
    merges = matrices[0].once("batch merge", every, combine)
    for b, (inputs, merge) in enumerate(zip(matrices, merges, strict=True)):
        if merge is not None:
            inputs.once("subspaces", keys[b], functools.partial(batch.subspaces, b))
            inputs.once("merge", every[b], functools.partial(_same, merge))


def _same(merge: SpectralMerge) -> SpectralMerge:
    return merge


def _merge_subspaces(
    inputs: Inputs,
    kept: _Truncation,
    options: TruncatingOptions,
    out_dtype: torch.dtype,
    *,
    rule: str,
) -> Merged:
    solver = _solver(options, inputs.dtype.itemsize)
    ranks, weights, masks = kept.ranks, kept.weights, kept.masks
    deltas = [
        functools.partial(inputs.delta, t, None if masks is None else masks[t])
        for t in range(len(ranks))
    ]
    key = (options.solver, kept.factors)
    subspaces = inputs.once(
        "subspaces",
        key,
        lambda: solver.subspaces(
            deltas,
            ranks,
            energy=kept.energy,
            device=inputs.base.device,
            at_once=not inputs.sparing,
        ),
    )
    merge = inputs.once("merge", (key, weights), lambda: solver.combine(subspaces, weights))
    notes = [
        f"expert {t + 1}: rank clamped from {ranks[t]} to its numerical rank {s.rank}"
        for t, s in enumerate(subspaces)
        if s.numerical_rank < ranks[t]
    ]
    merged = _rebuild(inputs, merge, [s.rank for s in subspaces], weights, options, out_dtype, rule)
    overlap = subspace_overlap(subspaces, weights)
    return replace(
        merged,
        notes=(*notes, *merged.notes),
        interference=overlap.interference,
        overlaps=overlap.pairs,
        spectra=tuple(s.values for s in subspaces),
    )


def _rebuild(
    inputs: Inputs,
    merge: SpectralMerge,
    ranks: Sequence[int],
    weights: Sequence[float],
    options: SpectralOptions,
    out_dtype: torch.dtype,
    rule: str,
) -> Merged:
    (tensor,) = add_low_rank(
        inputs.base, merge.left, merge.right, scales=[options.lambda_], out_dtype=out_dtype
    )
    null = f"{merge.null_directions} null directions left at zero"
    return Merged(
        tensor,
        rule,
        ranks=tuple(ranks),
        weights=tuple(weights),
        backends=merge.backends,
        notes=(*merge.fallbacks, *([null] if merge.null_directions else [])),
    )


TSVM = Method(
    name="tsvm",
    summary="task singular vectors: truncate every delta, orthogonalise across experts",
    formula="W_0 + lambda * polar(U) diag(S_t) polar(V)^T, leading floor(p/T) triplets each",
    source="TSV-M, arXiv 2412.00081",
    options=TruncatingOptions,
    merge=_tsvm,
    workspace=spectral_workspace,
    batch=spectral_batch,
    prepare=functools.partial(_prepare, _tsvm_truncation),
    declines=spectral_declines,
    by_matrix=True,
    factored_workspace=factored_workspace,
    work=truncating_work,
)

RESM = Method(
    name="resm",
    summary="TSV-M with ranks chosen by energy or sparsity, and outlier weighting",
    formula="W_0 + lambda * polar(U) diag(w_t S_t) polar(V)^T, rank p/T at most, "
    "w_t ~ outlier_t^beta",
    source="our reconstruction of RESM, arXiv 2502.06876",
    options=ResmOptions,
    merge=_resm,
    workspace=spectral_workspace,
    batch=spectral_batch,
    prepare=functools.partial(_prepare, _resm_truncation),
    declines=spectral_declines,
    by_matrix=True,
    factored_workspace=factored_workspace,
    work=truncating_work,
)

ISO_C = Method(
    name="iso_c",
    summary="isotropic merging: the summed delta with all singular values made equal",
    formula="W_0 + lambda * mean(sigma) * polar(sum_t w_t D_t)",
    source="Iso-C, arXiv 2502.04959",
    options=SpectralOptions,
    merge=_iso_c,
    workspace=equalising_workspace,
    declines=spectral_declines,
    by_matrix=True,
    factored_workspace=factored_workspace,
    work=iso_c_work,
)

ISO_CTS = Method(
    name="iso_cts",
    summary="Iso-C with directions of each expert beside those of the summed delta",
    formula="W_0 + lambda * mean(sigma) * polar([U, U_1 .. U_T]) polar([V, V_1 .. V_T])^T, "
    "U_t S_t V_t^T from (I - U U^T) D_t",
    source="Iso-CTS, arXiv 2502.04959",
    options=IsoCtsOptions,
    merge=_iso_cts,
    workspace=common_space_workspace,
    declines=spectral_declines,
    by_matrix=True,
    factored_workspace=factored_workspace,
    work=iso_cts_work,
)
