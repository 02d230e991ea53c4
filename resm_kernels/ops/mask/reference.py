"""The masked delta in plain torch."""

from __future__ import annotations

import torch

from resm_kernels.ops.dtypes import compute_dtype


def masked_delta(
    base: torch.Tensor, expert: torch.Tensor, *, floor: float | None = None
) -> torch.Tensor:
    """W_t - W_0, with entries of magnitude at or below `floor` set to zero.

    Parameters
    ----------
    base, expert : Tensor
        The same shape, any float dtypes.
    floor : float, optional
        Absolute noise floor; None keeps every entry.

    Returns
    -------
    Tensor
        A new contiguous tensor in `compute_dtype`: exact for bf16 and fp16 inputs up to range.
    """
    dtype = compute_dtype((base, expert))
    delta = expert.to(dtype, copy=True, memory_format=torch.contiguous_format)
    delta.sub_(base)
    if floor is not None:
        delta.masked_fill_(delta.abs() <= floor, 0.0)
    return delta
