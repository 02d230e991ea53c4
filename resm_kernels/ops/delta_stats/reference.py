"""Statistics of |W_t - W_0| in plain torch: two chunked passes, no delta in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from resm_kernels.ops.delta_stats.stats import DeltaStats, thresholds
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

    def magnitudes() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for piece in chunks(count, chunk_on(base.device.type)):
            origin, a = (buffer[: piece.stop - piece.start] for buffer in buffers)
            origin.copy_(base[piece])
            for t, expert in enumerate(flat):
                yield t, a.copy_(expert[piece]).sub_(origin).abs_(), wide_buffer[: a.numel()]

    sums = torch.zeros(4, len(flat), dtype=torch.float64, device=base.device)
    abs_sums, square_sums, outlier_mass, largest = sums
    counts = torch.zeros(3, len(flat), dtype=torch.int64, device=base.device)
    nonzero, outliers, sparse = counts
    for t, a, wide in magnitudes():
        wide.copy_(a)
        abs_sums[t] += wide.sum()
        square_sums[t] += torch.dot(wide, wide)
        nonzero[t] += a.count_nonzero()
        largest[t] = torch.maximum(largest[t], a.amax())

    mean = abs_sums / max(count, 1)
    variance = (square_sums / max(count, 1) - mean * mean).clamp_min_(0.0)
    limits = thresholds(mean, variance, sigma, noise_floor, dtype).tolist()
    for t, a, wide in magnitudes():
        threshold, floor = limits[t]
        sparse[t] += (a <= floor).count_nonzero()
        above = torch.nn.functional.threshold(a, threshold, 0.0, inplace=True)
        outliers[t] += above.count_nonzero()
        outlier_mass[t] += wide.copy_(above).sum()
    return [
        DeltaStats(
            count=count,
            abs_sum=abs_sum,
            square_sum=square_sum,
            largest=most,
            zero_count=count - changed,
            threshold=threshold,
            outlier_mass=mass,
            outlier_count=outlier,
            floor=floor,
            sparse_count=noise,
        )
        for (abs_sum, square_sum, mass, most), (changed, outlier, noise), (threshold, floor) in zip(
            sums.T.tolist(), counts.T.tolist(), limits, strict=True
        )
    ]
