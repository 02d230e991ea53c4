"""Statistics of |W_t - W_0| in plain torch: two chunked passes, no delta in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype, scratch


@dataclass(frozen=True)
class DeltaStats:
    """Statistics of A = |W_t - W_0| over all entries of one weight.

    `threshold` is mu + sigma * sd of A; an entry above it is an outlier. `floor` is
    noise_floor * rms; an entry at or below it is sparse. Sums are float64.
    """

    count: int
    abs_sum: float
    square_sum: float
    threshold: float
    outlier_mass: float
    outlier_count: int
    floor: float
    sparse_count: int

    @property
    def outlier_share(self) -> float:
        """Share of the absolute mass that lies in outliers, in [0, 1]; 0 for a zero delta."""
        return self.outlier_mass / self.abs_sum if self.abs_sum > 0 else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of entries at or below the noise floor, in [0, 1]."""
        return self.sparse_count / self.count if self.count else 0.0


def delta_stats(
    base: torch.Tensor, expert: torch.Tensor, *, sigma: float = 3.0, noise_floor: float = 0.0
) -> DeltaStats:
    """Score one expert's delta against its base.

    Parameters
    ----------
    base, expert : Tensor
        The same shape, any float dtypes; strided views are accepted.
    sigma : float
        Outlier threshold in standard deviations of A above its mean.
    noise_floor : float
        Sparse threshold as a fraction of the root mean square of the delta.

    Notes
    -----
    Reads both inputs twice and writes nothing; temporaries are three chunks. Differences are
    taken in `compute_dtype`, sums in float64 over a fixed chunk order, so the result does not
    depend on the machine's core count when torch runs one thread. Source: design section 2.
    """
    dtype = compute_dtype((base, expert))
    base, expert = base.reshape(-1), expert.reshape(-1)
    count = base.numel()
    buffers = [scratch(count, base, dtype), scratch(count, base, dtype)]
    wide_buffer = scratch(count, base, torch.float64)

    def magnitude(piece: slice) -> torch.Tensor:
        a, origin = (buffer[: piece.stop - piece.start] for buffer in buffers)
        return a.copy_(expert[piece]).sub_(origin.copy_(base[piece])).abs_()

    abs_sum = square_sum = 0.0
    for piece in chunks(count, chunk_on(base.device.type)):
        a = magnitude(piece)
        wide = wide_buffer[: a.numel()].copy_(a)
        abs_sum += float(wide.sum())
        square_sum += float(wide.square_().sum())

    mean = abs_sum / count if count else 0.0
    mean_square = square_sum / count if count else 0.0
    largest = torch.finfo(dtype).max
    spread = math.sqrt(max(mean_square - mean * mean, 0.0))
    threshold = min(mean + sigma * spread, largest)
    floor = min(noise_floor * math.sqrt(mean_square), largest)

    outlier_mass, outlier_count, sparse_count = 0.0, 0, 0
    for piece in chunks(count, chunk_on(base.device.type)):
        a = magnitude(piece)
        sparse_count += int((a <= floor).count_nonzero())
        outliers = torch.nn.functional.threshold(a, threshold, 0.0, inplace=True)
        outlier_count += int(outliers.count_nonzero())
        outlier_mass += float(wide_buffer[: a.numel()].copy_(outliers).sum())
    return DeltaStats(
        count=count,
        abs_sum=abs_sum,
        square_sum=square_sum,
        threshold=threshold,
        outlier_mass=outlier_mass,
        outlier_count=outlier_count,
        floor=floor,
        sparse_count=sparse_count,
    )
