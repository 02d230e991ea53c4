"""Masks in Triton, and magnitude thresholds by radix selection on bit patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from resm_kernels.ops.elementwise import (
    SUMMED,
    before,
    block_of,
    expert_of,
    launch,
    load,
    unit_of,
)
from resm_kernels.ops.launch import addresses, flat_inputs, table
from resm_kernels.ops.mask.mask import BLOCK, FRACTION, Mask

DIGITS = ((31, 23), (23, 15), (15, 7), (7, 0))
"""Bits [low, high) of |D|'s pattern that one pass of `trim` settles, the exponent first."""
BINS = 256
FLOATS, INTS = tl.constexpr(6), tl.constexpr(5)
"""Columns of the tables of masks."""
FRACTION_UNIT, FRACTION_BITS = tl.constexpr(2.0**FRACTION), tl.constexpr(FRACTION)


@triton.jit
def kept_at_random(first, keep_below, key0, key1, BLOCK: tl.constexpr):
    """Whether each entry from `first` on survives: its random number <= `keep_below`.

    Entry i takes 32-bit number i % 8 of Philox4x64-10 at counter i // 8 + 1, as NumPy counts.
    """
    c0 = (first // 8 + 1 + tl.arange(0, BLOCK // 8)).to(tl.uint64)  # [BLOCK // 8]
    c1, c2, c3 = c0 * 0, c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2E7470EE14C6C93), c0 * 0xD2E7470EE14C6C93
        high1, low1 = tl.umulhi(c2, 0xCA5A826395121157), c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B97F4A7C15
        key1 += 0xBB67AE8584CAA73B
    low = tl.interleave(
        tl.interleave(c0.to(tl.uint32), c2.to(tl.uint32)),
        tl.interleave(c1.to(tl.uint32), c3.to(tl.uint32)),
    )  # [BLOCK // 2], the lower halves of words 0 to 3
    high = tl.interleave(
        tl.interleave((c0 >> 32).to(tl.uint32), (c2 >> 32).to(tl.uint32)),
        tl.interleave((c1 >> 32).to(tl.uint32), (c3 >> 32).to(tl.uint32)),
    )
    return tl.interleave(low, high) <= keep_below


@triton.jit
def masked(delta, first, lanes, floats_ptr, ints_ptr, DROP: tl.constexpr, BLOCK: tl.constexpr):
    """The masked and weighted delta of the block that begins at entry `first`."""
    # By what goes, not by what stays: NaN is kept, and found in the result. A branch for the block
    # costs less than a comparison for every entry.
    a = tl.abs(delta)
    floor, threshold = tl.load(floats_ptr), tl.load(floats_ptr + 1)
    clip, ceiling = tl.load(floats_ptr + 2), tl.load(floats_ptr + 5)
    cut = before(tl.load(ints_ptr), first, BLOCK)
    kept = delta
    if cut < BLOCK:
        kept = tl.where(a <= threshold, 0.0, delta)
        if cut > 0:
            kept = tl.where((a == threshold) & (lanes < cut), delta, kept)
    elif threshold > 0.0:
        kept = tl.where(a < threshold, 0.0, kept)
    if floor >= 0.0:
        kept = tl.where(a <= floor, 0.0, kept)
    if ceiling < float("inf"):
        last = before(tl.load(ints_ptr + 4), first, BLOCK)
        kept = tl.where((a > ceiling) | ((a == ceiling) & (lanes < last)), 0.0, kept)
    if clip < float("inf"):
        kept = tl.where(kept > clip, clip, tl.where(kept < -clip, -clip, kept))
    if DROP:
        keep_below = tl.load(ints_ptr + 1).to(tl.uint32)
        key0 = tl.load(ints_ptr + 2).to(tl.uint64, bitcast=True)
        key1 = tl.load(ints_ptr + 3).to(tl.uint64, bitcast=True)
        kept = tl.where(kept_at_random(first, keep_below, key0, key1, BLOCK), kept, 0.0)
    return kept * tl.load(floats_ptr + 3)


@triton.jit(do_not_specialize=["count"])
def _mask_kernel(
    base_ptr,
    expert_ptr,
    out_ptr,
    low_ptr,
    floats_ptr,
    ints_ptr,
    count: tl.int64,
    DROP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    expert = load(expert_ptr + first, lanes, inside)
    kept = masked(expert - base, first, lanes, floats_ptr, ints_ptr, DROP, BLOCK)
    out = kept.to(out_ptr.dtype.element_ty)
    if SPLIT:
        low = (kept - out.to(tl.float32)).to(tl.bfloat16)
        tl.store(low_ptr + first + lanes, low, mask=inside)
    tl.store(out_ptr + first + lanes, out, mask=inside)


@triton.jit
def _magnitudes(delta):
    """The sum of a block's magnitudes, cut off at so many bits below the largest: no rounding."""
    a = tl.abs(delta)
    bits, inverse = unit_of(tl.max(a))
    units = tl.sum((a * inverse * FRACTION_UNIT).to(tl.int64)).to(tl.float64)
    # 2**(exponent - FRACTION) from its bits: the unit of subnormal numbers is no normal float32.
    scale = ((bits >> 23).to(tl.int64) - 127 - FRACTION_BITS + 1023) << 52
    return units * scale.to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["count", "experts"])
def _norms_kernel(
    base_ptr,
    expert_table,
    partial_ptr,
    floats_ptr,
    ints_ptr,
    count: tl.int64,
    experts: tl.int32,
    DROP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block and expert: sum |D| before and after the mask."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    for t in range(experts):
        delta = load(expert_of(expert_table, t, base_ptr) + first, lanes, inside) - base
        floats, ints = floats_ptr + FLOATS * t, ints_ptr + INTS * t
        out = partial_ptr + 2 * t * blocks + block
        tl.store(out, _magnitudes(delta))
        kept = masked(delta, first, lanes, floats, ints, DROP, BLOCK)
        tl.store(out + blocks, _magnitudes(kept))


@triton.jit(do_not_specialize=["count", "experts", "high", "low"])
def _digits_kernel(
    base_ptr,
    expert_table,
    prefix_ptr,
    histogram_ptr,
    count: tl.int64,
    experts: tl.int32,
    high: tl.int32,
    low: tl.int32,
    BINS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count bits [low, high) of |D| over the entries whose higher bits are the prefix's."""
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    bins = tl.arange(0, BINS)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    for t in range(experts):
        expert = load(expert_of(expert_table, t, base_ptr) + first, lanes, inside)
        bits = tl.abs(expert - base).to(tl.int32, bitcast=True)
        chosen = inside & ((bits >> high) == (tl.load(prefix_ptr + t) >> high))
        digits = (bits >> low) & ((1 << (high - low)) - 1)
        counts = tl.histogram(digits, BINS, mask=chosen)  # [BINS]
        # Sums of integers do not depend on their order.
        tl.atomic_add(histogram_ptr + t * BINS + bins, counts.to(tl.int64), mask=counts > 0)


@triton.jit(do_not_specialize=["count"])
def _ties_kernel(
    base_ptr,
    expert_ptr,
    threshold_ptr,
    ties_ptr,
    count: tl.int64,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block, the number of entries of magnitude exactly the threshold."""
    block = tl.program_id(0)
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    expert = load(expert_ptr + first, lanes, inside)
    tied = (tl.abs(expert - base) == tl.load(threshold_ptr)) & inside
    tl.store(ties_ptr + block, tl.sum(tied.to(tl.int32)))


def mask_tables(
    masks: Sequence[Mask], weights: Sequence[float], count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks as the kernels read them: float32 [T, 6] and int64 [T, 5]."""
    floats = [
        (mask.floor, mask.threshold, mask.clip, mask.factor(weight), weight, mask.ceiling)
        for mask, weight in zip(masks, weights, strict=True)
    ]
    ints = [
        (
            count if mask.cut is None else mask.cut,
            mask.keep - 1,
            *words(mask.key),
            mask.ceiling_cut,
        )
        for mask in masks
    ]
    return table(floats, torch.float32, device), table(ints, torch.int64, device)


def words(key: int) -> tuple[int, int]:
    """The low and the high word of a key as signed 64-bit numbers."""
    low, high = key & (2**64 - 1), key >> 64
    return low - (low >> 63 << 64), high - (high >> 63 << 64)


def masked_delta(
    base: torch.Tensor,
    expert: torch.Tensor,
    mask: Mask | None = None,
    *,
    weight: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The masked and weighted delta, one read and one write; see `ops.mask`."""
    out = torch.empty(base.shape, dtype=out_dtype or torch.float32, device=base.device)
    _launch_mask(base, expert, mask or Mask(), weight, out, None)
    return out


def split_delta(
    base: torch.Tensor, expert: torch.Tensor, mask: Mask | None = None, *, weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the sum of two bf16 tensors; see `ops.mask`."""
    high, low = (
        torch.empty(base.shape, dtype=torch.bfloat16, device=base.device) for _ in range(2)
    )
    _launch_mask(base, expert, mask or Mask(), weight, high, low)
    return high, low


def _launch_mask(
    base: torch.Tensor,
    expert: torch.Tensor,
    mask: Mask,
    weight: float,
    out: torch.Tensor,
    low: torch.Tensor | None,
) -> None:
    flat_base, flat_expert = flat_inputs((base, expert))
    count = flat_base.numel()
    launch(
        _mask_kernel,
        count,
        flat_base,
        flat_expert,
        out,
        out if low is None else low,
        *mask_tables((mask,), (weight,), count, base.device),
        count,
        DROP=mask.density < 1.0,
        SPLIT=low is not None,
    )


def masked_norms(
    base: torch.Tensor, experts: Sequence[torch.Tensor], masks: Sequence[Mask]
) -> list[tuple[float, float]]:
    """Sums of magnitudes before and after masking; see `ops.mask`.

    Notes
    -----
    One read of base and experts. Magnitudes are added as integers, in units of their block's
    largest power of two, and blocks by `math.fsum`: no order of summation shows.
    """
    flat_base, *flat = flat_inputs((base, *experts))
    count, device = flat_base.numel(), flat_base.device
    blocks = triton.cdiv(count, BLOCK)
    partial = torch.empty(len(flat), 2, blocks, dtype=torch.float64, device=device)
    plain = [replace(mask, rescale=1.0) for mask in masks]
    launch(
        _norms_kernel,
        count,
        flat_base,
        *(addresses(flat), partial, *mask_tables(plain, [1.0] * len(flat), count, device)),
        *(count, len(flat)),
        block=BLOCK,
        DROP=any(mask.density < 1.0 for mask in masks),
    )
    return [(math.fsum(all_), math.fsum(kept)) for all_, kept in partial.tolist()]


def trim(
    base: torch.Tensor, experts: Sequence[torch.Tensor], kept: Sequence[int]
) -> list[tuple[float, int]]:
    """Threshold and cut that keep so many of the largest magnitudes; see `ops.mask`.

    Notes
    -----
    Radix selection, 8 bits a pass: four reads of base and experts, each shared by all experts,
    and one more of an expert whose threshold several entries have. Histograms are summed by
    integer atomics, so their order does not matter. Two synchronisations.
    """
    count = base.numel()
    found = [(0.0, count) if number else (math.inf, 0) for number in kept]
    counted = [t for t, number in enumerate(kept) if 0 < number < count]
    if counted:
        chosen = _count_out(base, [experts[t] for t in counted], [kept[t] for t in counted])
        for t, pair in zip(counted, chosen, strict=True):
            found[t] = pair
    return found


def _count_out(
    base: torch.Tensor, experts: Sequence[torch.Tensor], kept: Sequence[int]
) -> list[tuple[float, int]]:
    flat_base, *flat = flat_inputs((base, *experts))
    count, device = flat_base.numel(), flat_base.device
    experts_table = addresses(flat)
    prefix = torch.zeros(len(flat), dtype=torch.int32, device=device)
    need = table(kept, torch.int64, device)[:, None]
    ties = torch.empty_like(need)
    for high, low in DIGITS:
        histogram = torch.zeros(len(flat), BINS, dtype=torch.int64, device=device)
        given = (flat_base, experts_table, prefix, histogram, count, len(flat), high, low)
        launch(_digits_kernel, count, *given, BINS=BINS, block=SUMMED)
        falling = histogram.flip(-1)
        above = falling.cumsum(-1)
        place = (above < need).sum(-1, keepdim=True)
        ties = falling.gather(-1, place)
        need = need - above.gather(-1, place) + ties
        prefix |= (BINS - 1 - place[:, 0]).int() << low
    thresholds = prefix.view(torch.float32)
    found = torch.cat((thresholds[:, None].double(), need.double(), ties.double()), -1).tolist()
    if any(math.isnan(threshold) for threshold, _, _ in found):
        raise ValueError("a delta holds NaN, expected numbers")
    return [
        (threshold, count)
        if needed == tied
        else (threshold, _cut(flat_base, expert, thresholds[t].clone(), int(needed)))
        for t, (expert, (threshold, needed, tied)) in enumerate(zip(flat, found, strict=True))
    ]


def _cut(base: torch.Tensor, expert: torch.Tensor, threshold: torch.Tensor, need: int) -> int:
    """One past the flat index of the `need`-th entry of this magnitude."""
    count = base.numel()
    ties = torch.empty(triton.cdiv(count, SUMMED), dtype=torch.int32, device=base.device)
    launch(_ties_kernel, count, base, expert, threshold, ties, count, block=SUMMED)
    upto = ties.cumsum(0)
    block = int((upto < need).sum())
    piece = slice(block * SUMMED, min((block + 1) * SUMMED, count))
    tied = (expert[piece].float() - base[piece].float()).abs() == threshold
    place = need - int(upto[block] - ties[block]) - 1
    return piece.start + int(tied.nonzero()[place]) + 1
