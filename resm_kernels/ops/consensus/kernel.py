"""Combinations of tensors and of deltas in Triton: one pass over all experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from resm_kernels.ops.consensus.reference import NO_WEIGHT, Election
from resm_kernels.ops.elementwise import AHEAD, block_of, blocks_ahead, launch, load
from resm_kernels.ops.launch import addresses, flat_inputs
from resm_kernels.ops.mask.kernel import FLOATS, INTS, mask_tables, masked
from resm_kernels.ops.mask.mask import Mask

MOST_REGISTERS: dict[str, int] = {} if torch.version.hip else {"maxnreg": 128}
"""Room for two programs on a processor; told nothing, ptxas spills a word to fit one more."""


@triton.jit(do_not_specialize=["count", "experts"])
def _sum_kernel(
    base_ptr,
    expert_table,
    out_ptr,
    floats_ptr,
    ints_ptr,
    count: tl.int64,
    experts: tl.int32,
    scale: tl.float32,
    divisor: tl.float32,
    DELTAS: tl.constexpr,
    MASKED: tl.constexpr,
    DROP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W_0 + scale * sum_t w_t (W_t - W_0) / divisor; without DELTAS, W_0 counts as zero."""
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = tl.zeros([BLOCK], tl.float32)
    if DELTAS:
        base = load(base_ptr + first, lanes, inside)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, experts, AHEAD):
        ahead = blocks_ahead(expert_table, start, experts, base_ptr, first, lanes, inside)
        for i in tl.static_range(AHEAD):
            t = start + i
            if t < experts:
                value = ahead[i].to(tl.float32) - base  # [BLOCK]
                floats = floats_ptr + FLOATS * t
                if MASKED:
                    total += masked(value, first, lanes, floats, ints_ptr + INTS * t, DROP, BLOCK)
                elif DELTAS:
                    total += value * tl.load(floats + 4)
                else:
                    total = tl.fma(value, tl.load(floats + 4), total)
    total = tl.div_rn(total, divisor)
    if DELTAS:
        total = total * scale + base
    tl.store(out_ptr + first + lanes, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "experts", "mean"])
def _elect_kernel(
    base_ptr,
    expert_table,
    out_ptr,
    floats_ptr,
    ints_ptr,
    count: tl.int64,
    experts: tl.int32,
    mean: tl.int32,
    scale: tl.float32,
    no_weight: tl.float32,
    BY_COUNT: tl.constexpr,
    MASKED: tl.constexpr,
    DROP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W_0 + scale * the sum or weighted mean of the deltas whose sign wins the vote."""
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    vote = tl.zeros([BLOCK], tl.float32)
    rising = tl.zeros([BLOCK], tl.float32)
    falling = tl.zeros([BLOCK], tl.float32)
    rising_weight = tl.zeros([BLOCK], tl.float32)
    falling_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, experts, AHEAD):
        ahead = blocks_ahead(expert_table, start, experts, base_ptr, first, lanes, inside)
        for i in tl.static_range(AHEAD):
            t = start + i
            if t < experts:
                delta = ahead[i].to(tl.float32) - base
                floats = floats_ptr + FLOATS * t
                weight = tl.load(floats + 4)
                if MASKED:
                    delta = masked(delta, first, lanes, floats, ints_ptr + INTS * t, DROP, BLOCK)
                else:
                    delta = delta * weight
                if BY_COUNT:
                    vote += tl.where(delta > 0.0, 1.0, tl.where(delta < 0.0, -1.0, 0.0))
                else:
                    vote += delta
                # Not tl.maximum and tl.minimum, which pass over NaN.
                rising += tl.where(delta < 0.0, 0.0, delta)
                falling += tl.where(delta > 0.0, 0.0, delta)
                if mean != 0:
                    rising_weight += tl.where(delta > 0.0, weight, 0.0)
                    falling_weight += tl.where(delta < 0.0, weight, 0.0)
    total = tl.where(vote >= 0.0, rising, falling)
    divisor = tl.where(vote >= 0.0, rising_weight, falling_weight)
    divisor = tl.where((mean != 0) & (tl.abs(divisor) >= no_weight), divisor, 1.0)
    total = tl.div_rn(total, divisor) * scale + base
    tl.store(out_ptr + first + lanes, total.to(out_ptr.dtype.element_ty), mask=inside)


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    normalize: bool = False,
) -> torch.Tensor:
    """sum_t w_t W_t, divided by sum_t w_t where `normalize`; see `ops.consensus`."""
    divisor = (
        float(torch.tensor(weights, dtype=torch.float32, device="cpu").sum()) if normalize else 1.0
    )
    return _combine(
        _sum_kernel,
        *(tensors[0], tensors, weights, None, out_dtype),
        scalars=(1.0, divisor),
        DELTAS=False,
    )


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
    """W_0 + scale * sum_t w_t D_t / divisor; see `ops.consensus`."""
    return _combine(
        _sum_kernel,
        *(base, experts, weights, masks, out_dtype),
        scalars=(scale, divisor),
        DELTAS=True,
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
    """W_0 + scale * the deltas of the elected sign; see `ops.consensus`."""
    return _combine(
        _elect_kernel,
        *(base, experts, weights, masks, out_dtype),
        scalars=(int(mean), scale, NO_WEIGHT),
        BY_COUNT=elect == "count",
    )


def _combine(
    kernel: object,
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    masks: Sequence[Mask] | None,
    out_dtype: torch.dtype,
    *,
    scalars: tuple[float, ...],
    **constants: bool,
) -> torch.Tensor:
    """Launch a kernel that reads every expert and writes one tensor of the base's shape."""
    flat_base, *flat = flat_inputs((base, *experts))
    count = flat_base.numel()
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    tables = mask_tables(masks or [Mask()] * len(flat), weights, count, base.device)
    launch(
        kernel,
        count,
        flat_base,
        *(addresses(flat), out, *tables, count, len(flat), *scalars),
        MASKED=masks is not None,
        DROP=masks is not None and any(mask.density < 1.0 for mask in masks),
        **MOST_REGISTERS,
        **constants,
    )
    return out
