"""W_0 + lambda * (L s) R^T in Triton: the m x n product is never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from resm_kernels.ops.launch import ALIGNMENT, addresses, architecture, table
from resm_kernels.ops.low_rank.reference import Precision

DEPTH = 32
"""Columns of L and R per step; their count is padded with zeros to a multiple of it."""
GROUP = 8
"""Tiles of rows that share their columns of R in cache."""


@triton.jit(do_not_specialize=["rows", "columns", "depth", "base_stride", "outputs"])
def _low_rank_kernel(
    base_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    out_table,
    scale_ptr,
    rows: tl.int32,
    columns: tl.int32,
    depth: tl.int32,
    base_stride: tl.int64,
    outputs: tl.int32,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth = depth // BLOCK_K * BLOCK_K
    if EVEN:
        columns = columns // 16 * 16
        base_stride = base_stride // 16 * 16
    across = tl.cdiv(columns, BLOCK_N)
    group, place = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP, GROUP)
    m = (group * GROUP + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = (place // height) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)

    # Rows past the end repeat others: they are computed and not stored.
    left = left_ptr + (m % rows).to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_M, BLOCK_K]
    right = right_ptr + (n % columns).to(tl.int64)[None, :] * depth + k[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, depth, BLOCK_K):
        product = tl.dot(tl.load(left), tl.load(right), product, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K

    inside = (m < rows)[:, None] & (n < columns)[None, :]
    base = base_ptr + m.to(tl.int64)[:, None] * base_stride + n[None, :]  # [BLOCK_M, BLOCK_N]
    origin = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    target = m.to(tl.int64)[:, None] * columns + n[None, :]
    for i in range(outputs):
        out = tl.load(out_table + i).to(tl.pointer_type(out_ptr.dtype.element_ty))
        merged = origin + tl.load(scale_ptr + i) * product
        out = tl.multiple_of(out, 16) + target
        tl.store(out, merged.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tile:
    """How the product is cut: rows and columns of a tile, warps, and stages of prefetching."""

    rows: int
    columns: int
    warps: int
    stages: int


SMALL = Tile(64, 64, 4, 3)
UNEVEN = Tile(64, 64, 8, 3)
"""Entry by entry, the base and the outputs take a pointer each."""
FULL = 128
"""Tiles of 128 x 128 that keep the processors of a large GPU busy; fewer are cut smaller."""
WIDE = "sm_90"
"""Its tensor cores read operands from shared memory: registers are free for a larger tile."""


def tile(
    rows: int, columns: int, out: torch.dtype, precision: Precision, arch: str, *, even: bool
) -> Tile:
    """The tile for a shape, output dtype, precision and architecture; none spills registers.

    `even`: rows of the base and of the outputs begin at 16-byte boundaries.
    """
    few = triton.cdiv(rows, 128) * triton.cdiv(columns, 128) < FULL
    if not (even or arch == WIDE):
        return UNEVEN
    if few:
        return SMALL
    if arch.startswith("gfx"):
        return Tile(128, 128, 8, 2)
    wide = arch == WIDE and even and precision != "ieee" and out != torch.float32
    return Tile(128, 128 if wide else 64, 8, 3)


def supported(precision: Precision, arch: str) -> Precision:
    """The precision itself, or `ieee` where the matrix cores multiply float32 as it is."""
    return "ieee" if arch.startswith("gfx") else precision


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
    """W_0 + scale * (L s) R^T for every scale; see `ops.low_rank`.

    Notes
    -----
    2 m n K operations; the base is read and every output written once. Factors whose inner size
    is no multiple of 32, or that are scaled by `values`, are copied once. Products accumulate in
    float32 over K in steps of 32, so the bytes depend on shape, precision and architecture alone.
    """
    rows, columns = base.shape
    arch = architecture(base.device)
    precision = supported(precision, arch)
    if base.stride(1) != 1 or base.data_ptr() % ALIGNMENT:
        base = base.clone(memory_format=torch.contiguous_format)
    even = columns % 16 == 0 and base.stride(0) % 16 == 0
    cut = tile(rows, columns, out_dtype, precision, arch, even=even)
    left, right = _factor(left, values), _factor(right, None)
    outs = [torch.empty(rows, columns, dtype=out_dtype, device=base.device) for _ in scales]
    tiles = triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns)
    with torch.cuda.device_of(base):  # Triton launches on the current device
        _low_rank_kernel[(tiles,)](
            *(base, left, right, outs[0], addresses(outs)),
            table(scales, torch.float32, base.device),
            *(rows, columns, left.shape[1], base.stride(0), len(outs)),
            PRECISION=precision,
            EVEN=even,
            GROUP=GROUP,
            BLOCK_M=cut.rows,
            BLOCK_N=cut.columns,
            BLOCK_K=DEPTH,
            num_warps=cut.warps,
            num_stages=cut.stages,
            enable_fp_fusion=True,
        )
    return outs


def _factor(factor: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
    """A factor as the kernel reads it: float32 rows of whole steps, padded with zeros."""
    depth = factor.shape[1]
    padded = triton.cdiv(depth, DEPTH) * DEPTH
    if (
        values is None
        and padded == depth
        and factor.dtype == torch.float32
        and factor.is_contiguous()
        and factor.data_ptr() % ALIGNMENT == 0
    ):
        return factor
    copy = factor.new_empty(factor.shape[0], padded, dtype=torch.float32)
    copy[:, depth:] = 0.0
    copy[:, :depth] = factor if values is None else factor * values
    return copy
