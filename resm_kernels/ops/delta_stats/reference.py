"""Statistics of |W_t - W_0| in plain torch: two chunked passes, no delta in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from resm_kernels.ops.delta_stats.stats import DeltaStats, from_rows
from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype, scratch


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
    Reads base and experts twice and writes nothing; temporaries are four chunks, one of them
    float64. Sums run in float64 over a fixed chunk order, so the result does not depend on the
    machine's core count when torch runs one thread.
    """
    dtype = compute_dtype((base, *experts))
    base, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    count, size = base.numel(), chunk_on(base.device.type)
    buffers = [scratch(count, base, dtype) for _ in range(3)]
    wide_buffer = scratch(count, base, torch.float64)

    def magnitudes() -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        for place, piece in enumerate(chunks(count, size)):
            origin, a, part = (buffer[: piece.stop - piece.start] for buffer in buffers)
            origin.copy_(base[piece])
            for t, expert in enumerate(flat):
                a.copy_(expert[piece]).sub_(origin).abs_()
                yield place, t, a, part, wide_buffer[: len(a)]

    blocks = torch.empty(4, len(flat), -(-count // size), dtype=torch.float64, device=base.device)
    totals, squares, maxima, changed = blocks
    for place, t, a, part, wide in magnitudes():
        total = wide.copy_(a).sum()
        wide.sub_(total / len(wide))
        totals[t, place], squares[t, place] = total, torch.dot(wide, wide)
        maxima[t, place], changed[t, place] = a.amax(), _nonzero(a, part)

    mean, variance = _combine(count, size, totals, squares)
    limits = _thresholds(mean, variance, sigma, noise_floor, dtype)
    mass, outliers, dense = torch.zeros(3, len(flat), dtype=torch.float64, device=base.device)
    numbers = limits.tolist()
    for _, t, a, part, wide in magnitudes():
        threshold, floor = numbers[t]
        # In place, the lower limit first: what it leaves is all that the higher one needs.
        if floor <= threshold:
            dense[t] += _nonzero(_cut(a, floor), part)
        outliers[t] += _nonzero(_cut(a, threshold), part)
        mass[t] += wide.copy_(a).sum()
        if floor > threshold:
            dense[t] += _nonzero(_cut(a, floor), part)
    largest = maxima.amax(-1) if count else mass
    sums = (count * mean, count * (variance + mean * mean), largest, count - changed.sum(-1))
    rows = torch.stack((*sums, *limits.unbind(-1), mass, outliers, count - dense), dim=-1)
    return from_rows(count, rows.tolist())


def _combine(
    count: int, block: int, totals: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of A from its blocks: float64 [T, blocks] -> two of [T].

    `totals` are the blocks' sums, `squares` their sums of squares about their own means: nothing
    cancels where A is nearly constant. All blocks but the last have `block` entries.
    """
    entries = torch.full_like(totals[0], block)
    entries[-1:] = count - (len(entries) - 1) * block
    mean = totals.sum(-1) / max(count, 1)
    between = entries * (totals / entries - mean[:, None]).square()
    return mean, (squares + between).sum(-1).clamp_min(0.0) / max(count, 1)


def _thresholds(
    mean: torch.Tensor,
    variance: torch.Tensor,
    sigma: float,
    noise_floor: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Outlier threshold and noise floor of A: float64 [T] -> [T, 2], inside `dtype`'s range.

    mean + sigma * sd, and noise_floor * rms.
    """
    rms = (variance + mean * mean).sqrt()
    limits = torch.stack((mean + sigma * variance.sqrt(), noise_floor * rms), dim=-1)
    return limits.nan_to_num(nan=math.inf).clamp_max(torch.finfo(dtype).max)


def _cut(magnitudes: torch.Tensor, limit: float) -> torch.Tensor:
    """What is at or below the limit becomes zero, in place."""
    return torch.nn.functional.threshold(magnitudes, limit, 0.0, inplace=True)


def _nonzero(magnitudes: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Their number: a sum of signs is exact in a chunk, and three times as fast as a count."""
    return torch.sign(magnitudes, out=part).sum()
