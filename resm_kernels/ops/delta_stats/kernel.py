"""Statistics of |W_t - W_0| in Triton: all experts in one launch, no delta in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from resm_kernels.ops.delta_stats.stats import DeltaStats, from_rows
from resm_kernels.ops.elementwise import (
    EXACT,
    SUMMED,
    WARPS,
    block_of,
    expert_of,
    launch,
    load,
    unit_of,
)
from resm_kernels.ops.launch import addresses, flat_inputs

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
LANES = 1024
"""Blocks whose moments one step sums."""


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
        unit_bits, inverse = unit_of(largest)
        scaled = a * inverse
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


@triton.jit(do_not_specialize=["count", "blocks"])
def _limits_kernel(
    partial_ptr,
    limits_ptr,
    found_ptr,
    count: tl.int64,
    blocks: tl.int32,
    sigma: tl.float64,
    noise_floor: tl.float64,
    SUMMED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Per expert, from the moments of its blocks: sums, thresholds, and the inverse unit of |D|."""
    t = tl.program_id(0)
    totals = partial_ptr + 4 * t * blocks
    squares, maxima, zeros = totals + blocks, totals + 2 * blocks, totals + 3 * blocks
    lanes = tl.arange(0, LANES)  # [LANES]
    total = tl.zeros([LANES], tl.float64)
    largest = tl.zeros([LANES], tl.float64)
    zero = tl.zeros([LANES], tl.float64)
    for start in range(0, blocks, LANES):
        there = start + lanes < blocks
        total += tl.load(totals + start + lanes, mask=there, other=0.0)
        largest = tl.maximum(largest, tl.load(maxima + start + lanes, mask=there, other=0.0))
        zero += tl.load(zeros + start + lanes, mask=there, other=0.0)
    mean = tl.sum(total) / count
    spread = tl.zeros([LANES], tl.float64)
    for start in range(0, blocks, LANES):
        there = start + lanes < blocks
        left = count - (start + lanes).to(tl.int64) * SUMMED
        entries = tl.minimum(tl.maximum(left, 1), SUMMED).to(tl.float64)
        apart = tl.load(totals + start + lanes, mask=there, other=0.0) / entries - mean
        within = tl.load(squares + start + lanes, mask=there, other=0.0)
        spread += tl.where(there, within + entries * apart * apart, 0.0)
    variance = tl.maximum(tl.sum(spread), 0.0) / count
    power = variance + mean * mean
    threshold = mean + sigma * tl.sqrt(variance)
    floor = noise_floor * tl.sqrt(power)
    # Also where they are NaN: comparisons with the largest number find nothing.
    threshold = tl.where(threshold < LARGEST, threshold, LARGEST)
    floor = tl.where(floor < LARGEST, floor, LARGEST)
    most = tl.max(largest)
    _, inverse = unit_of(most.to(tl.float32))
    tl.store(limits_ptr + 3 * t, threshold.to(tl.float32))
    tl.store(limits_ptr + 3 * t + 1, floor.to(tl.float32))
    tl.store(limits_ptr + 3 * t + 2, inverse)
    found = found_ptr + 9 * t
    tl.store(found, tl.sum(total))
    tl.store(found + 1, count * power)
    tl.store(found + 2, most)
    tl.store(found + 3, tl.sum(zero))
    tl.store(found + 4, threshold)
    tl.store(found + 5, floor)


@triton.jit(do_not_specialize=["count", "experts"])
def _outliers_kernel(
    base_ptr,
    expert_table,
    limits_ptr,
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
        outlier = a > tl.load(limits_ptr + 3 * t)
        sparse = (a <= tl.load(limits_ptr + 3 * t + 1)) & inside
        inverse = tl.load(limits_ptr + 3 * t + 2)
        mass = tl.sum(tl.where(outlier, a * inverse, 0.0)).to(tl.float64)
        out = partial_ptr + 3 * t * blocks + block
        tl.store(out, mass / inverse.to(tl.float64))
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
    limits = torch.empty(len(flat), 3, dtype=torch.float32, device=device)
    found = torch.empty(len(flat), 9, dtype=torch.float64, device=device)
    with torch.cuda.device_of(flat_base):
        _limits_kernel[(len(flat),)](
            *(partial, limits, found, count, blocks, sigma, noise_floor),
            **{"SUMMED": SUMMED, "LANES": LANES, "num_warps": WARPS, **EXACT},
        )
    partial = torch.empty(len(flat), 3, blocks, dtype=torch.float64, device=device)
    launch(
        _outliers_kernel,
        count,
        flat_base,
        *(table, limits, partial, count, len(flat)),
        block=SUMMED,
    )
    found[:, 6:] = partial.sum(-1)
    return from_rows(count, found.tolist())
