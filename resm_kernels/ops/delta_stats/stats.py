"""What is known of one delta's magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DeltaStats:
    """Statistics of A = |W_t - W_0| over all entries of one weight.

    `threshold` is mu + sigma * sd of A; an entry above it is an outlier. `floor` is
    noise_floor * rms; an entry at or below it is sparse. Sums are float64.
    """

    count: int
    abs_sum: float
    square_sum: float
    largest: float
    zero_count: int
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


def from_rows(count: int, rows: Iterable[Sequence[float]]) -> list[DeltaStats]:
    """The statistics of all experts from a row of numbers each, in the order named here."""
    return [
        DeltaStats(
            count=count,
            abs_sum=abs_sum,
            square_sum=square_sum,
            largest=largest,
            zero_count=int(zeros),
            threshold=threshold,
            outlier_mass=mass,
            outlier_count=int(outliers),
            floor=floor,
            sparse_count=int(sparse),
        )
        for abs_sum, square_sum, largest, zeros, threshold, floor, mass, outliers, sparse in rows
    ]
