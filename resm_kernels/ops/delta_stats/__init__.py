"""Outlier scoring: the moments, outlier mass and sparsity of a delta."""

from resm_kernels.ops.delta_stats.reference import DeltaStats, delta_stats

__all__ = ["DeltaStats", "delta_stats"]
