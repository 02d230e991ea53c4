"""Masking: the delta of one expert with part of it taken out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.dtypes import check_alike
from resm_kernels.ops.launch import on_kernels
from resm_kernels.ops.mask import reference
from resm_kernels.ops.mask.mask import Mask, drop_key

__all__ = ["Mask", "drop_key", "masked_delta", "masked_norms", "split_delta", "trim"]


def masked_delta(
    base: torch.Tensor,
    expert: torch.Tensor,
    mask: Mask | None = None,
    *,
    weight: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The masked and weighted delta of one expert.

    Parameters
    ----------
    base, expert : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    mask : Mask, optional
        What is kept; everything by default.
    weight : float
        Multiplies what is kept.
    out_dtype : torch.dtype, optional
        `compute_dtype` by default, in which the unmasked delta of bf16 or fp16 inputs is exact
        up to range.

    Returns
    -------
    Tensor
        New and contiguous. Every step is rounded once in `compute_dtype`, then to `out_dtype`:
        the same bytes on CPU and GPU, whatever the block or chunk.

    Notes
    -----
    Reads both inputs and writes the output once. Source: magnitude trim, TIES (arXiv
    2306.01708); band below a ceiling, Breadcrumbs (arXiv 2312.06795); random drop, DARE (arXiv
    2311.03099); noise floor, design section 2.
    """
    check_alike((base, expert))
    if on_kernels((base, expert), out_dtype or torch.float32):
        from resm_kernels.ops.mask import kernel

        return kernel.masked_delta(base, expert, mask, weight=weight, out_dtype=out_dtype)
    return reference.masked_delta(base, expert, mask, weight=weight, out_dtype=out_dtype)


def split_delta(
    base: torch.Tensor, expert: torch.Tensor, mask: Mask | None = None, *, weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked and weighted delta as a sum of two bf16 tensors, for products on tensor cores.

    Parameters as for `masked_delta`. The high part is the delta rounded to bf16, the low part
    the rest rounded to bf16: their sum errs by at most 2**-17 of an entry (between 1e-35 and
    bf16's largest number), and not at all for the unweighted delta of bf16 inputs where it has 16
    significant bits.
    """
    check_alike((base, expert))
    if on_kernels((base, expert)):
        from resm_kernels.ops.mask import kernel

        return kernel.split_delta(base, expert, mask, weight=weight)
    return reference.split_delta(base, expert, mask, weight=weight)


def masked_norms(
    base: torch.Tensor, experts: Sequence[torch.Tensor], masks: Sequence[Mask]
) -> list[tuple[float, float]]:
    """sum |D_t| of every expert, and the same of what its mask keeps, before it is rescaled.

    Parameters
    ----------
    base, experts : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    masks : sequence of Mask
        One per expert; `rescale` plays no part.

    Returns
    -------
    list of (float, float)
        Relative error at most 2**-27 (typically 2**-36): in every block of 4096 entries, numbered
        through the flat tensor, magnitudes are cut off at 2**-39 of the largest's power of two
        and summed without rounding; the sum over blocks is rounded once. The same numbers on CPU
        and GPU, whatever the chunk.
    """
    check_alike((base, *experts))
    if on_kernels((base, *experts)):
        from resm_kernels.ops.mask import kernel

        return kernel.masked_norms(base, experts, masks)
    return reference.masked_norms(base, experts, masks)


def trim(
    base: torch.Tensor, experts: Sequence[torch.Tensor], kept: Sequence[int]
) -> list[tuple[float, int]]:
    """The `threshold` and `cut` of a `Mask` that keeps the largest entries of every delta.

    Parameters
    ----------
    base, experts : Tensor
        One shape and device, any float dtypes.
    kept : sequence of int
        How many of the n entries of each delta are kept, in [0, n]; of equal magnitudes those
        that come first.

    Returns
    -------
    list of (float, int)
        Per expert; exact order statistics, found by counting bit patterns, without a sort. As
        `ceiling` and `ceiling_cut` they take out the same entries. ValueError where the threshold
        would be NaN.
    """
    check_alike((base, *experts))
    if not all(0 <= number <= base.numel() for number in kept):
        raise ValueError(f"kept {list(kept)}, expected numbers from 0 to {base.numel()}")
    if on_kernels((base, *experts)):
        from resm_kernels.ops.mask import kernel

        return kernel.trim(base, experts, kept)
    return reference.trim(base, experts, kept)
