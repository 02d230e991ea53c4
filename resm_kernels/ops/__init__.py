"""Element-wise and reconstruction kernels; a folder per op, `reference.py` in plain torch."""
