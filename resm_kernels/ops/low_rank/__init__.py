"""Reconstruction: a base plus a scaled product of two thin factors."""

from resm_kernels.ops.low_rank.reference import PANEL, add_low_rank

__all__ = ["PANEL", "add_low_rank"]
