"""The dtype in which a weight is merged, and the pieces in which it is walked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from resm_kernels.held import Held

CHUNK = 1 << 16
"""Elements per piece: a few float32 pieces of this size stay in a core's L2 cache."""
DEVICE_CHUNK = 1 << 24
"""The same on a GPU, where every piece costs launches and every total a synchronisation."""


def compute_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Float64 where any input is float64, float32 otherwise (exact for bf16 and fp16 inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


full_float32 = Held(
    torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, lambda: "highest"
)
"""While held, float32 products are float32, whatever the process asked torch for."""


def chunk_of(tensor: torch.Tensor) -> int:
    """Elements per piece on the tensor's device."""
    return CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover `range(count)` in order, `size` elements each but the last."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def scratch(count: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised buffer for one piece, taken once per call instead of once per piece."""
    return torch.empty(min(count, chunk_of(like)), dtype=dtype, device=like.device)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite: one reduction, which NaN and Inf both pass through.

    A sum that overflows although every value is finite is told apart by a second look.
    """
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
