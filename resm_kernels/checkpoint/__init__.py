"""Checkpoints on disk: strict headers, streaming reads, an output that is whole or absent."""
