"""Statistics of |W_t - W_0| in Triton: all experts in one launch, no delta in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from resm_kernels.ops.delta_stats.stats import DeltaStats, combine, gather, thresholds
from resm_kernels.ops.elementwise import SUMMED, block_of, expert_of, launch, load
from resm_kernels.ops.launch import addresses, flat_inputs

LARGEST_UNIT = tl.constexpr(253 << 23)
"""Bits of 2**126, the largest power of two whose inverse is a normal float32."""


@triton.jit(do_not_specialize=["count", "experts"])
def _moments_kernel(
    base_ptr,
    expert_table,
    partial_ptr,
    count: tl.int64,
    experts: tl.int32,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block and expert: sum |D|, its squares about the block's mean, max |D|, exact zeros."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    entries = tl.sum(inside.to(tl.int32)).to(tl.float32)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    for t in range(experts):
        expert = load(expert_of(expert_table, t, base_ptr) + first, lanes, inside)
        a = tl.abs(expert - base)
        largest = tl.max(a)
        # Sums are of |D| in units of the block's largest power of two: squares stay in range.
        unit_bits = tl.minimum(largest.to(tl.int32, bitcast=True) & 0x7F800000, LARGEST_UNIT)
        scaled = a * ((254 << 23) - unit_bits).to(tl.float32, bitcast=True)
        unit = unit_bits.to(tl.float32, bitcast=True).to(tl.float64)
        unit = tl.where(unit_bits == 0, 2.0**-127, unit)
        mean = tl.sum(scaled) / entries
        centred = tl.where(inside, scaled - mean, 0.0)
        # What rounding left out of the mean: without it a constant delta would lie above its own.
        rest = tl.sum(centred).to(tl.float64)
        squares = tl.sum(centred * centred).to(tl.float64) - rest * rest / entries
        out = partial_ptr + 4 * t * blocks + block
        tl.store(out, (mean.to(tl.float64) * entries + rest) * unit)
        tl.store(out + blocks, squares * unit * unit)
        tl.store(out + 2 * blocks, largest.to(tl.float64))
        tl.store(out + 3 * blocks, tl.sum(((a == 0.0) & inside).to(tl.int32)).to(tl.float64))


@triton.jit(do_not_specialize=["count", "experts"])
def _outliers_kernel(
    base_ptr,
    expert_table,
    threshold_ptr,
    partial_ptr,
    count: tl.int64,
    experts: tl.int32,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block and expert: mass and number of |D| > threshold, number of |D| <= floor."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    for t in range(experts):
        expert = load(expert_of(expert_table, t, base_ptr) + first, lanes, inside)
        a = tl.abs(expert - base)
        outlier = a > tl.load(threshold_ptr + 3 * t)
        sparse = (a <= tl.load(threshold_ptr + 3 * t + 1)) & inside
        unit = tl.load(threshold_ptr + 3 * t + 2)
        mass = tl.sum(tl.where(outlier, a * unit, 0.0)).to(tl.float64)
        out = partial_ptr + 3 * t * blocks + block
        tl.store(out, mass / unit.to(tl.float64))
        tl.store(out + blocks, tl.sum(outlier.to(tl.int32)).to(tl.float64))
        tl.store(out + 2 * blocks, tl.sum(sparse.to(tl.int32)).to(tl.float64))


def delta_stats(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    *,
    sigma: float = 3.0,
    noise_floor: float = 0.0,
) -> list[DeltaStats]:
    """Score the deltas of all experts against their base; see `ops.delta_stats`.

    Notes
    -----
    Two passes, each reading base and experts once: 2 * (T + 1) * itemsize bytes per entry. What
    lies above a threshold known only afterwards takes a second read in any exact scheme: a
    histogram of the first pass would leave its boundary bin to be read again. Sums are float32
    inside a block, about the block's mean and in units of its largest power of two, and float64
    over blocks: relative error at most 24 * 2**-24 = 1.4e-6 (16 entries a thread, 256 threads).
    No atomics: the same bits on every run. One synchronisation, at the end.
    """
    flat_base, *flat = flat_inputs((base, *experts))
    count, device = flat_base.numel(), flat_base.device
    blocks = triton.cdiv(count, SUMMED)
    table = addresses(flat)
    partial = torch.empty(len(flat), 4, blocks, dtype=torch.float64, device=device)
    launch(_moments_kernel, count, flat_base, table, partial, count, len(flat), block=SUMMED)
    totals, squares, maxima, zeros = partial.unbind(1)
    mean, variance = combine(count, SUMMED, totals, squares)
    largest = maxima.amax(-1)

    limits = thresholds(mean, variance, sigma, noise_floor, torch.float32)
    unit = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-125, 125))
    given = torch.cat((limits, unit[:, None]), dim=-1).float()
    partial = torch.empty(len(flat), 3, blocks, dtype=torch.float64, device=device)
    launch(
        _outliers_kernel, count, flat_base, table, given, partial, count, len(flat), block=SUMMED
    )
    others = (largest, zeros.sum(-1), *partial.sum(-1).unbind(-1))
    return gather(count, mean, variance, limits, *others)
