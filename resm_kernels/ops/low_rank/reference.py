"""W_0 + lambda * L R^T in plain torch, a panel of rows at a time."""

from __future__ import annotations

import torch

from resm_kernels.ops.dtypes import chunks, compute_dtype

PANEL = 1 << 22
"""Elements of the product that are in memory at once."""


def add_low_rank(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return `base + scale * left @ right.T` rounded once to `out_dtype`.

    Parameters
    ----------
    base : Tensor, m x n
        Any float dtype.
    left, right : Tensor, m x K and n x K
        Any float dtypes; the product is accumulated in `compute_dtype(base)`. K may be 0.
    scale : float
        The merge coefficient lambda.
    out_dtype : torch.dtype
        Dtype of the result; the only rounding beyond the accumulation happens here.

    Notes
    -----
    Peak temporary: one panel of rows, `PANEL` elements or one row. The panel height depends on
    the shape alone, so equal inputs give equal bytes.
    """
    rows, columns = base.shape
    dtype = compute_dtype((base,))
    left, right = left.to(dtype), right.to(dtype)
    out = torch.empty(rows, columns, dtype=out_dtype, device=base.device)
    for panel in chunks(rows, max(1, PANEL // max(columns, 1))):
        out[panel] = torch.addmm(base[panel].to(dtype), left[panel], right.T, alpha=scale)
    return out
