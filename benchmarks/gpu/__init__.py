"""The GPU suite: tests, kernels against the roofs, factorisations, merges from disk to disk."""
