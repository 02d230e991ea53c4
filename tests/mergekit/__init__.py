"""Outputs of mergekit 0.1.5 on small checkpoints, recorded by `record.py`."""
