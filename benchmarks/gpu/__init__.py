"""The GPU suite: tests, kernels against the card's roofs, factorisations and whole models."""
