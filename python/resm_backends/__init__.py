"""Adapters that let other merging tools use resm-kernels; each needs its tool installed."""
