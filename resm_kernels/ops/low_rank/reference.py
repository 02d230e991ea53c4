"""W_0 + lambda * (L s) R^T in plain torch, a panel of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from resm_kernels.ops.dtypes import chunks, compute_dtype

PANEL = 1 << 22
"""Elements of the product that are in memory at once."""
Precision = Literal["tf32x3", "ieee", "tf32"]


def add_low_rank(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scales: Sequence[float],
    out_dtype: torch.dtype,
    values: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """W_0 + scale * (L s) R^T for every scale; see `ops.low_rank`.

    Notes
    -----
    Peak temporary: three panels of rows (product, base and sum), `PANEL` elements or one row each,
    and the factors in `compute_dtype`. The panel's height depends on the shape alone, so equal
    inputs give equal bytes.
    """
    rows, columns = base.shape
    dtype = compute_dtype((base,))
    left, right = left.to(dtype), right.to(dtype)
    outs = [torch.empty(rows, columns, dtype=out_dtype, device=base.device) for _ in scales]
    for panel in chunks(rows, max(1, PANEL // max(columns, 1))):
        part = left[panel] if values is None else left[panel] * values.to(dtype)
        product = part @ right.T
        for out, scale in zip(outs, scales, strict=True):
            out[panel] = torch.add(base[panel], product, alpha=scale)
    return outs
