"""Masks in plain torch, chunk by chunk, and magnitude thresholds from histograms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype
from resm_kernels.ops.mask.mask import BLOCK, FRACTION, Mask

DIGIT = 16
"""Bits of a magnitude's pattern that one pass of `trim` settles."""
LANES = 8
"""Random numbers per counter of Philox4x64: four words of 64 bits."""


def masked_delta(
    base: torch.Tensor,
    expert: torch.Tensor,
    mask: Mask | None = None,
    *,
    weight: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The masked and weighted delta; see `ops.mask`. Temporaries are a few chunks."""
    out = torch.empty(
        base.shape, dtype=out_dtype or compute_dtype((base, expert)), device=base.device
    )
    target = out.view(-1)
    for piece, delta in _deltas(base, expert):
        target[piece] = apply_mask(delta, mask or Mask(), piece.start, weight)
    return out


def split_delta(
    base: torch.Tensor, expert: torch.Tensor, mask: Mask | None = None, *, weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the sum of two bf16 tensors; see `ops.mask`."""
    high, low = (
        torch.empty(base.shape, dtype=torch.bfloat16, device=base.device) for _ in range(2)
    )
    for piece, delta in _deltas(base, expert):
        kept = apply_mask(delta, mask or Mask(), piece.start, weight)
        high.view(-1)[piece] = kept
        low.view(-1)[piece] = kept.sub_(high.view(-1)[piece])
    return high, low


def apply_mask(delta: torch.Tensor, mask: Mask, start: int, weight: float) -> torch.Tensor:
    """Mask and weight in place the piece of a flat delta that begins at `start`."""
    trimmed = mask.threshold > 0.0 or mask.cut is not None
    capped = mask.ceiling < math.inf
    if mask.floor >= 0.0 or trimmed or capped:
        magnitude = delta.abs()
        if trimmed:
            gone = magnitude < mask.threshold
            if mask.cut is not None and mask.cut < start + delta.numel():
                first = max(mask.cut - start, 0)
                gone[first:] |= magnitude[first:] == mask.threshold
            delta.masked_fill_(gone, 0.0)
        if capped:
            gone = magnitude > mask.ceiling
            if mask.ceiling_cut > start:
                last = mask.ceiling_cut - start
                gone[:last] |= magnitude[:last] == mask.ceiling
            delta.masked_fill_(gone, 0.0)
        if mask.floor >= 0.0:
            delta.masked_fill_(magnitude <= mask.floor, 0.0)
    if mask.clip <= torch.finfo(delta.dtype).max:
        delta.clamp_(-mask.clip, mask.clip)
    if mask.density < 1.0:
        numbers = random_numbers(mask.key, start, delta.numel())
        dropped = torch.from_numpy(numbers > mask.keep - 1)
        delta.masked_fill_(dropped.to(delta.device), 0.0)
    factor = mask.factor(weight)
    return delta.mul_(factor) if factor != 1.0 else delta


def random_numbers(key: int, start: int, count: int) -> NDArray[np.uint32]:
    """The random 32-bit numbers of `count` entries from flat index `start` on.

    Entry i takes number i % 8 of NumPy's Philox4x64 at counter i // 8.
    """
    first = start // LANES
    stop = -(-(start + count) // LANES)
    halves = np.array([key & (2**64 - 1), key >> 64], dtype=np.uint64)
    words = np.random.Philox(counter=first, key=halves).random_raw((stop - first) * LANES // 2)
    return words.astype("<u8", copy=False).view("<u4")[start - first * LANES :][:count]


def _deltas(
    base: torch.Tensor,
    expert: torch.Tensor,
    dtype: torch.dtype | None = None,
    multiple: int = 1,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The delta in `compute_dtype`, a reused chunk of a multiple of so many entries at a time."""
    dtype = dtype or compute_dtype((base, expert))
    base, expert = base.reshape(-1), expert.reshape(-1)
    size = -(-chunk_on(base.device.type) // multiple) * multiple
    buffers = [
        torch.empty(min(base.numel(), size), dtype=dtype, device=base.device) for _ in range(2)
    ]
    for piece in chunks(base.numel(), size):
        delta, origin = (buffer[: piece.stop - piece.start] for buffer in buffers)
        yield piece, delta.copy_(expert[piece]).sub_(origin.copy_(base[piece]))


def masked_norms(
    base: torch.Tensor, experts: Sequence[torch.Tensor], masks: Sequence[Mask]
) -> list[tuple[float, float]]:
    """Sums of magnitudes before and after masking; see `ops.mask`."""
    dtype = compute_dtype((base, *experts))
    return [_norms(base, expert, mask, dtype) for expert, mask in zip(experts, masks, strict=True)]


def _norms(
    base: torch.Tensor, expert: torch.Tensor, mask: Mask, dtype: torch.dtype
) -> tuple[float, float]:
    mask = replace(mask, rescale=1.0)
    before, after = [], []
    for piece, delta in _deltas(base, expert, dtype, BLOCK):
        before += _block_sums(delta)
        if mask != Mask(rescale=1.0):
            after += _block_sums(apply_mask(delta, mask, piece.start, 1.0))
    total = math.fsum(before)
    return total, math.fsum(after) if after else total


def _block_sums(delta: torch.Tensor) -> list[float]:
    """sum |D| of every `BLOCK` entries: exact sums of magnitudes cut off at `FRACTION` bits."""
    a = torch.nn.functional.pad(delta.abs(), (0, -delta.numel() % BLOCK)).view(-1, BLOCK)
    largest = (126, 127) if a.dtype == torch.float32 else (980, 981)
    exponent = (torch.frexp(a.amax(-1)).exponent - 1).clamp(-largest[1], largest[0])
    # 2**(FRACTION - exponent) from its bits, exact on every device.
    unit = ((FRACTION - exponent.long() + 1023) << 52).view(torch.float64)
    wide = a.double().mul_(unit[:, None]).floor_()
    return wide.sum(-1).div_(unit).tolist()


def trim(
    base: torch.Tensor, experts: Sequence[torch.Tensor], kept: Sequence[int]
) -> list[tuple[float, int]]:
    """Threshold and cut that keep so many of the largest magnitudes; see `ops.mask`.

    Notes
    -----
    Radix selection on bit patterns, 16 bits a pass: float32 deltas are read twice, and a third
    time up to the cut where several entries have the threshold's magnitude.
    """
    dtype = compute_dtype((base, *experts))  # as what combines the experts takes every delta
    return [
        _leading(base, expert, number, dtype) for expert, number in zip(experts, kept, strict=True)
    ]


def _leading(
    base: torch.Tensor, expert: torch.Tensor, kept: int, dtype: torch.dtype
) -> tuple[float, int]:
    count = base.numel()
    if kept == 0:
        return math.inf, 0
    if kept == count:
        return 0.0, count
    pattern = torch.int64 if dtype == torch.float64 else torch.int32
    prefix, need, ties = 0, kept, count
    for shift in range(8 * pattern.itemsize - DIGIT, -1, -DIGIT):
        histogram = np.zeros(1 << DIGIT, dtype=np.int64)
        for _, delta in _deltas(base, expert, dtype):
            bits = delta.abs_().view(pattern)
            if ties < count:  # else all entries share the prefix
                bits = bits[bits >> (shift + DIGIT) == prefix]
            digits = ((bits >> shift) & ((1 << DIGIT) - 1)).cpu().numpy()
            histogram += np.bincount(digits, minlength=1 << DIGIT)
        above = histogram[::-1].cumsum()
        place = int(np.searchsorted(above, need))
        digit = len(histogram) - 1 - place
        prefix, ties = prefix << DIGIT | digit, int(histogram[digit])
        need -= int(above[place]) - ties
    threshold = float(torch.tensor(prefix, dtype=pattern).view(dtype))
    if math.isnan(threshold):
        raise ValueError("a delta holds NaN, expected numbers")
    return threshold, count if need == ties else _cut(base, expert, threshold, need, dtype)


def _cut(
    base: torch.Tensor, expert: torch.Tensor, threshold: float, need: int, dtype: torch.dtype
) -> int:
    """One past the flat index of the `need`-th entry of this magnitude."""
    for piece, delta in _deltas(base, expert, dtype):
        places = (delta.abs_() == threshold).nonzero()
        if places.numel() >= need:
            return int(piece.start + places[need - 1] + 1)
        need -= places.numel()
    raise AssertionError("fewer entries of the threshold's magnitude than were counted")
