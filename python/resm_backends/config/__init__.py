"""Hydra configs for FusionBench."""
