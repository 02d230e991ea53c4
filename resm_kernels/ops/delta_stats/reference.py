"""Statistics of |W_t - W_0| in plain torch: two chunked passes, no delta in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from resm_kernels.ops.delta_stats.stats import DeltaStats, combine, gather, thresholds
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
    Reads base and experts twice and writes nothing; temporaries are three chunks. Sums run in
    float64 over a fixed chunk order, so the result does not depend on the machine's core count
    when torch runs one thread.
    """
    dtype = compute_dtype((base, *experts))
    base, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    count = base.numel()
    buffers = [scratch(count, base, dtype) for _ in range(2)]
    wide_buffer = scratch(count, base, torch.float64)

    size = chunk_on(base.device.type)

    def magnitudes() -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        for place, piece in enumerate(chunks(count, size)):
            origin, a = (buffer[: piece.stop - piece.start] for buffer in buffers)
            origin.copy_(base[piece])
            for t, expert in enumerate(flat):
                yield place, t, a.copy_(expert[piece]).sub_(origin).abs_(), wide_buffer[: len(a)]

    blocks = torch.empty(4, len(flat), -(-count // size), dtype=torch.float64, device=base.device)
    for place, t, a, wide in magnitudes():
        total = wide.copy_(a).sum()
        wide.sub_(total / len(wide))
        found = (total, torch.dot(wide, wide), a.amax(), a.count_nonzero())
        for moment, value in zip(blocks, found, strict=True):
            moment[t, place] = value

    totals, squares, maxima, nonzero = blocks
    mean, variance = combine(count, size, totals, squares)
    limits = thresholds(mean, variance, sigma, noise_floor, dtype)
    mass, outliers, sparse = torch.zeros(3, len(flat), dtype=torch.float64, device=base.device)
    numbers = limits.tolist()
    for _, t, a, wide in magnitudes():
        threshold, floor = numbers[t]
        sparse[t] += (a <= floor).count_nonzero()
        above = torch.nn.functional.threshold(a, threshold, 0.0, inplace=True)
        outliers[t] += above.count_nonzero()
        mass[t] += wide.copy_(above).sum()
    largest = maxima.amax(-1) if count else mass
    zeros = count - nonzero.sum(-1)
    return gather(count, mean, variance, limits, largest, zeros, mass, outliers, sparse)
