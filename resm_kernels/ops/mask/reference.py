"""Masks in plain torch, chunk by chunk, and magnitude thresholds from histograms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype, scratch
from resm_kernels.ops.mask.mask import Mask

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
    if mask.floor >= 0.0 or trimmed:
        magnitude = delta.abs()
        if trimmed:
            gone = magnitude < mask.threshold
            if mask.cut is not None and mask.cut < start + delta.numel():
                first = max(mask.cut - start, 0)
                gone[first:] |= magnitude[first:] == mask.threshold
            delta.masked_fill_(gone, 0.0)
        if mask.floor >= 0.0:
            delta.masked_fill_(magnitude <= mask.floor, 0.0)
    if mask.clip <= torch.finfo(delta.dtype).max:
        delta.clamp_(-mask.clip, mask.clip)
    if mask.density < 1.0:
        delta.masked_fill_(_dropped(mask, start, delta.numel()).to(delta.device), 0.0)
    factor = mask.factor(weight)
    return delta.mul_(factor) if factor != 1.0 else delta


def _dropped(mask: Mask, start: int, count: int) -> torch.Tensor:
    """Whether each of `count` entries from flat index `start` on is dropped, on the CPU.

    Entry i takes 32-bit number i % 8 of NumPy's Philox4x64 at counter i // 8.
    """
    first = start // LANES
    stop = -(-(start + count) // LANES)
    key = np.array([mask.key & (2**64 - 1), mask.key >> 64], dtype=np.uint64)
    words = np.random.Philox(counter=first, key=key).random_raw((stop - first) * LANES // 2)
    numbers = words.astype("<u8", copy=False).view("<u4")[start - first * LANES :][:count]
    return torch.from_numpy(numbers > mask.keep - 1)


def _deltas(base: torch.Tensor, expert: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The delta in `compute_dtype`, a reused chunk at a time."""
    dtype = compute_dtype((base, expert))
    base, expert = base.reshape(-1), expert.reshape(-1)
    buffers = [scratch(base.numel(), base, dtype) for _ in range(2)]
    for piece in chunks(base.numel(), chunk_on(base.device.type)):
        delta, origin = (buffer[: piece.stop - piece.start] for buffer in buffers)
        yield piece, delta.copy_(expert[piece]).sub_(origin.copy_(base[piece]))


def trim(
    base: torch.Tensor, experts: Sequence[torch.Tensor], density: float
) -> list[tuple[float, int]]:
    """Threshold and cut that keep the int(density * n) largest magnitudes; see `ops.mask`.

    Notes
    -----
    Radix selection on bit patterns, 16 bits a pass: float32 deltas are read twice, and a third
    time up to the cut where several entries have the threshold's magnitude.
    """
    count = base.numel()
    kept = int(density * count)
    return [_leading(base, expert, kept, count) for expert in experts]


def _leading(base: torch.Tensor, expert: torch.Tensor, kept: int, count: int) -> tuple[float, int]:
    if kept == 0:
        return math.inf, 0
    if kept == count:
        return 0.0, count
    dtype = compute_dtype((base, expert))
    pattern = torch.int64 if dtype == torch.float64 else torch.int32
    prefix, need, ties = 0, kept, count
    for shift in range(8 * pattern.itemsize - DIGIT, -1, -DIGIT):
        histogram = np.zeros(1 << DIGIT, dtype=np.int64)
        for _, delta in _deltas(base, expert):
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
    return threshold, count if need == ties else _cut(base, expert, threshold, need)


def _cut(base: torch.Tensor, expert: torch.Tensor, threshold: float, need: int) -> int:
    """One past the flat index of the `need`-th entry of this magnitude."""
    for piece, delta in _deltas(base, expert):
        places = (delta.abs_() == threshold).nonzero()
        if places.numel() >= need:
            return int(piece.start + places[need - 1] + 1)
        need -= places.numel()
    raise AssertionError("fewer entries of the threshold's magnitude than were counted")
