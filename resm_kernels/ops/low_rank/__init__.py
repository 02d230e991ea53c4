"""Reconstruction: a base plus a scaled product of two thin factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.launch import on_kernels
from resm_kernels.ops.low_rank import reference
from resm_kernels.ops.low_rank.reference import PANEL, Precision

__all__ = ["PANEL", "Precision", "add_low_rank"]


def add_low_rank(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scales: Sequence[float],
    out_dtype: torch.dtype,
    values: torch.Tensor | None = None,
    precision: Precision = "tf32x3",
) -> list[torch.Tensor]:
    """W_0 + scale * (L s) R^T for every scale, each rounded once to `out_dtype`.

    Parameters
    ----------
    base : Tensor, m x n
        Any float dtype; strided views are accepted.
    left, right : Tensor, m x K and n x K
        Any float dtypes; the product is accumulated in `compute_dtype(base)`. K may be 0.
    scales : sequence of float
        Merge coefficients lambda: the product is formed once for all of them.
    out_dtype : torch.dtype
        Dtype of the results.
    values : Tensor of K, optional
        s; ones by default.
    precision : "tf32x3", "ieee" or "tf32"
        Of the products on a GPU: three TF32 products of split operands (relative error of a
        product below 2**-19), float32 (2**-24), or one TF32 product (2**-9: tensor cores cut
        operands off, they do not round them).

    Returns
    -------
    list of Tensor
        One m x n tensor per scale; a result does not depend on the other scales.

    Notes
    -----
    On a GPU the product is never in memory; on a CPU a panel of it is. Error of the product:
    |L| |R|^T times the precision's, plus K roundings of the accumulation.
    """
    (rows, columns), inner = base.shape, left.shape[-1]
    expected = {"left": (rows, inner), "right": (columns, inner), "values": (inner,)}
    for name, factor in {"left": left, "right": right, "values": values}.items():
        if factor is not None and (factor.shape, factor.device) != (expected[name], base.device):
            got = f"{tuple(factor.shape)} on {factor.device}"
            raise ValueError(f"{name} of shape {got}, expected {expected[name]} on {base.device}")
    if scales and left.numel() and on_kernels((base,), out_dtype):
        from resm_kernels.ops.low_rank import kernel

        return kernel.add_low_rank(
            base,
            left,
            right,
            scales=scales,
            out_dtype=out_dtype,
            values=values,
            precision=precision,
        )
    return reference.add_low_rank(
        base, left, right, scales=scales, out_dtype=out_dtype, values=values
    )
