"""Masking: the delta of one expert with its noise taken out."""

from resm_kernels.ops.mask.reference import masked_delta

__all__ = ["masked_delta"]
