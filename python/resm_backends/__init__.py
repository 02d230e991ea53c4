"""Adapters that let other model merging tools use resm-kernels."""
