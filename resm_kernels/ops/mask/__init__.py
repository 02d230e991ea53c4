"""Masking: the delta of one expert with part of it taken out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.dtypes import check_alike
from resm_kernels.ops.launch import on_kernels
from resm_kernels.ops.mask import reference
from resm_kernels.ops.mask.mask import Mask, drop_key

__all__ = ["Mask", "drop_key", "masked_delta", "split_delta", "trim"]


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
    2306.01708); random drop, DARE (arXiv 2311.03099); noise floor, design section 2.
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


def trim(
    base: torch.Tensor, experts: Sequence[torch.Tensor], density: float
) -> list[tuple[float, int]]:
    """The `threshold` and `cut` of a `Mask` that keeps the largest entries of every delta.

    Parameters
    ----------
    base, experts : Tensor
        One shape and device, any float dtypes.
    density : float
        int(density * n) of the n entries of each delta are kept, in [0, 1]; of equal magnitudes
        those that come first.

    Returns
    -------
    list of (float, int)
        Per expert; exact order statistics, found by counting bit patterns, without a sort.
        ValueError where the threshold would be NaN.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density {density}, expected 0 <= density <= 1")
    check_alike((base, *experts))
    if on_kernels((base, *experts)):
        from resm_kernels.ops.mask import kernel

        return kernel.trim(base, experts, density)
    return reference.trim(base, experts, density)
