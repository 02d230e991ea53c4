"""Singular-vector merging: TSV-M, RESM and Iso-C."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from resm_kernels.linalg import Solver, SolverOptions, SpectralMerge, equalise
from resm_kernels.methods.base import Merged, Method, matches, option
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats
from resm_kernels.ops.dtypes import compute_dtype
from resm_kernels.ops.low_rank import PANEL, add_low_rank
from resm_kernels.ops.mask import Mask, masked_delta

EXCLUDE = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "*norm*", "shared.weight")
"""Vocabulary and position tables, and norms: matrices in shape, but not linear maps."""
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


@dataclass(frozen=True)
class TruncatingOptions(SpectralOptions):
    """Options of the methods that truncate every delta."""

    solver: Literal["auto", "exact", "fast", "textbook"] = option(
        "auto",
        "auto: within the accuracy contract; exact: float64; fast: to 1e-2, gains on a GPU; "
        "textbook: float32 SVDs as published",
    )


@dataclass(frozen=True)
class ResmOptions(TruncatingOptions):
    """Options of `resm`; the defaults of beta, sigma, eta and gamma await the quality benchmark."""

    outlier_score: Literal["share", "mass", "count"] = option(
        "share", "share: outlier mass over all mass; mass: outlier mass; count: outlier entries"
    )
    sigma: float = option(3.0, "an outlier is this many standard deviations above the mean", low=0)
    outlier_power: float = option(1.0, "beta in w_t ~ o_t^beta; 0 turns outlier weighting off")
    noise_floor: float = option(0.1, "eta: entries at or below eta * rms count as sparse", low=0)
    mask_noise: bool = option(False, "set entries below the noise floor to zero before factoring")
    rank: Literal["sparsity", "energy", "fixed"] = option(
        "sparsity", "how the rank is chosen, never above min(m, n) / T"
    )
    rank_sparsity: float = option(
        1.0, "gamma in rank = p/T * (1 - gamma * s); 0 turns rank selection off", low=0, high=1
    )
    rank_energy: float = option(0.95, "rank: energy keeps this share of ||D_t||_F^2", low=0, high=1)
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


def _panels(shape: Sequence[int], itemsize: int) -> int:
    return 3 * itemsize * min(PANEL, shape[0] * shape[1])


def _tsvm(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    options: TruncatingOptions,
    out_dtype: torch.dtype,
) -> Merged:
    limit = min(base.shape) // len(experts)
    return _merge_subspaces(
        base, experts, weights, [limit] * len(experts), options, out_dtype, rule="tsvm"
    )


def _resm(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    options: ResmOptions,
    out_dtype: torch.dtype,
) -> Merged:
    count = len(experts)
    limit = min(base.shape) // count
    stats = delta_stats(base, experts, sigma=options.sigma, noise_floor=options.noise_floor)
    scores = [_outlier_score(s, options.outlier_score) for s in stats]
    changed = [s.abs_sum > 0.0 for s in stats]
    outlier_weights = outlier_weighting(scores, options.outlier_power, changed)
    sparsity = sum(s.sparsity for s in stats) / count
    rank = limit
    if options.rank == "sparsity":
        rank = sparse_rank(min(base.shape), count, sparsity, options.rank_sparsity)
    elif options.rank == "fixed":
        rank = max(1, round(limit * options.rank_fraction))
    merged = _merge_subspaces(
        base,
        experts,
        [weight * user for weight, user in zip(outlier_weights, weights, strict=True)],
        [rank] * count,
        options,
        out_dtype,
        rule="resm",
        energy=options.rank_energy if options.rank == "energy" else None,
        masks=[Mask(floor=s.floor) for s in stats] if options.mask_noise else None,
    )
    return replace(merged, outlier_scores=tuple(scores), sparsity=sparsity)


def _iso_c(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    options: SpectralOptions,
    out_dtype: torch.dtype,
) -> Merged:
    total = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    for expert, weight in zip(experts, weights, strict=True):
        total.add_(masked_delta(base, expert), alpha=weight)
    merge, rank = equalise(total)
    (tensor,) = add_low_rank(
        base, merge.left, merge.right, scales=[options.lambda_], out_dtype=out_dtype
    )
    return Merged(
        tensor,
        "iso_c",
        ranks=(rank,),
        weights=tuple(weights),
        backends=merge.backends,
        notes=(*merge.fallbacks, *_null_note(merge)),
    )


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


def _merge_subspaces(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    ranks: Sequence[int],
    options: TruncatingOptions,
    out_dtype: torch.dtype,
    *,
    rule: str,
    energy: float | None = None,
    masks: Sequence[Mask] | None = None,
) -> Merged:
    solver = _solver(options, compute_dtype((base, *experts)).itemsize)
    deltas = [
        functools.partial(masked_delta, base, expert, None if masks is None else masks[t])
        for t, expert in enumerate(experts)
    ]
    subspaces = solver.subspaces(deltas, ranks, energy=energy, device=base.device)
    merge = solver.combine(subspaces, weights)
    notes = [
        f"expert {t + 1}: rank clamped from {ranks[t]} to its numerical rank {s.rank}"
        for t, s in enumerate(subspaces)
        if s.numerical_rank < ranks[t]
    ]
    (tensor,) = add_low_rank(
        base, merge.left, merge.right, scales=[options.lambda_], out_dtype=out_dtype
    )
    return Merged(
        tensor,
        rule,
        ranks=tuple(s.rank for s in subspaces),
        weights=tuple(weights),
        backends=merge.backends,
        notes=(*notes, *merge.fallbacks, *_null_note(merge)),
    )


def _null_note(merge: SpectralMerge) -> tuple[str, ...]:
    if not merge.null_directions:
        return ()
    return (f"{merge.null_directions} null directions left at zero",)


TSVM = Method(
    name="tsvm",
    summary="task singular vectors: truncate every delta, orthogonalise across experts",
    formula="W_0 + lambda * polar(U) diag(S_t) polar(V)^T, leading floor(p/T) triplets each",
    source="TSV-M, arXiv 2412.00081",
    options=TruncatingOptions,
    merge=_tsvm,
    workspace=spectral_workspace,
    declines=spectral_declines,
)

RESM = Method(
    name="resm",
    summary="TSV-M with outlier weighting and sparsity-aware rank selection",
    formula="W_0 + lambda * polar(U) diag(w_t S_t) polar(V)^T, w_t ~ outlier_t^beta, "
    "rank p/T * (1 - gamma s)",
    source="our reconstruction of RESM, arXiv 2502.06876",
    options=ResmOptions,
    merge=_resm,
    workspace=spectral_workspace,
    declines=spectral_declines,
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
)
