"""Benchmarks: ratios against a peer in the same process, after the numbers agree."""
