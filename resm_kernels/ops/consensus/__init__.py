"""Combination of experts entry by entry."""

from resm_kernels.ops.consensus.reference import weighted_deltas, weighted_sum

__all__ = ["weighted_deltas", "weighted_sum"]
