"""The dtype in which a weight is merged, and the pieces in which it is walked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

CHUNK = 1 << 18
"""Elements per piece on the CPU: a few fp32 pieces of this size stay in the L2 cache."""


def compute_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Float64 where any input is float64, float32 otherwise (exact for bf16 and fp16 inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover `range(count)` in order, `size` elements each but the last."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
