"""Combination of experts entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.consensus import reference
from resm_kernels.ops.consensus.reference import Election
from resm_kernels.ops.dtypes import check_alike
from resm_kernels.ops.launch import on_kernels
from resm_kernels.ops.mask import Mask

__all__ = ["Election", "elected_deltas", "weighted_deltas", "weighted_sum"]


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    normalize: bool = False,
) -> torch.Tensor:
    """sum_t w_t W_t, divided by sum_t w_t where `normalize`.

    Parameters
    ----------
    tensors : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    weights : sequence of float
        One per tensor.
    out_dtype : torch.dtype
        Dtype of the result.

    Notes
    -----
    T fused multiply-adds in `compute_dtype`, in the order given; the quotient and the result are
    rounded once each. The same bytes on a GPU and on a CPU with fused multiply-adds. Every tensor
    is read once. Source: Model soups, arXiv 2203.05482.
    """
    check_alike((*tensors[:1], *tensors))
    if on_kernels(tensors, out_dtype):
        from resm_kernels.ops.consensus import kernel

        return kernel.weighted_sum(tensors, weights, out_dtype=out_dtype, normalize=normalize)
    return reference.weighted_sum(tensors, weights, out_dtype=out_dtype, normalize=normalize)


def weighted_deltas(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype,
    divisor: float = 1.0,
    masks: Sequence[Mask] | None = None,
) -> torch.Tensor:
    """W_0 + scale * sum_t w_t D_t / divisor, where D_t = W_t - W_0, masked where `masks` says so.

    Parameters
    ----------
    base, experts : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    weights : sequence of float
        One per expert.
    scale, divisor : float
        The merge coefficient, and what the sum is divided by before.
    out_dtype : torch.dtype
        Dtype of the result.
    masks : sequence of Mask, optional
        One per expert.

    Notes
    -----
    Every difference, product and sum is rounded once in `compute_dtype`, in the order given, and
    the result once to `out_dtype`: the same bytes on CPU and GPU. Base and experts are read once,
    no delta is written. Source: task arithmetic, arXiv 2212.04089; with masks DARE, arXiv
    2311.03099.
    """
    check_alike((base, *experts))
    if on_kernels((base, *experts), out_dtype):
        from resm_kernels.ops.consensus import kernel

        combine = kernel.weighted_deltas
    else:
        combine = reference.weighted_deltas
    return combine(
        base, experts, weights, scale=scale, out_dtype=out_dtype, divisor=divisor, masks=masks
    )


def elected_deltas(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    elect: Election,
    mean: bool,
    scale: float,
    out_dtype: torch.dtype,
    masks: Sequence[Mask] | None = None,
) -> torch.Tensor:
    """W_0 + scale * what the deltas of the elected sign add up to, entry by entry.

    Parameters
    ----------
    base, experts, weights, scale, out_dtype, masks
        As for `weighted_deltas`; x_t = w_t D_t is the masked and weighted delta.
    elect : "sum" or "count"
        The elected sign is that of sum_t x_t, or of sum_t sign(x_t); positive where that is 0.
    mean : bool
        Divide the sum of the x_t of that sign by the sum of their w_t, unless that is below 1e-8.

    Notes
    -----
    Rounding and bytes as for `weighted_deltas`; base and experts are read once, no delta is
    written. Source: TIES-Merging, arXiv 2306.01708.
    """
    if elect not in ("sum", "count"):
        raise ValueError(f"elect {elect!r}, expected 'sum' or 'count'")
    check_alike((base, *experts))
    if on_kernels((base, *experts), out_dtype):
        from resm_kernels.ops.consensus import kernel

        elected = kernel.elected_deltas
    else:
        elected = reference.elected_deltas
    return elected(
        base,
        experts,
        weights,
        elect=elect,
        mean=mean,
        scale=scale,
        out_dtype=out_dtype,
        masks=masks,
    )
