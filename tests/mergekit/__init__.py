"""Outputs of mergekit 0.1.5 on small checkpoints and weights, recorded by `record.py`."""
