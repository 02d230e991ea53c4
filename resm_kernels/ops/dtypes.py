"""The dtype in which a weight is merged, and the pieces in which it is walked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from resm_kernels.held import Held

CHUNK = 1 << 16
"""Elements per piece: a few float32 pieces of this size stay in a core's L2 cache."""
DEVICE_CHUNK = 1 << 22
"""The same on a GPU: in its L2 cache, and long enough to hide the launches."""


def compute_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Float64 where any input is float64, float32 otherwise (exact for bf16 and fp16 inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


_CUDA: Any = torch.backends.cuda.matmul
_CPU: Any = getattr(torch.backends.mkldnn, "matmul", None)
_PER_LIBRARY = hasattr(_CUDA, "fp32_precision") and hasattr(_CPU, "fp32_precision")
"""Torch 2.9 and later have a setting per library, and refuse the old one once these were used."""


def _precisions() -> tuple[str, ...]:
    if _PER_LIBRARY:
        return _CUDA.fp32_precision, _CPU.fp32_precision
    return (torch.get_float32_matmul_precision(),)


def _set_precisions(precisions: tuple[str, ...]) -> None:
    if _PER_LIBRARY:
        _CUDA.fp32_precision, _CPU.fp32_precision = precisions
    else:
        torch.set_float32_matmul_precision(*precisions)


full_float32 = Held(
    _precisions, _set_precisions, lambda: ("ieee", "ieee") if _PER_LIBRARY else ("highest",)
)
"""While held, float32 products are float32, whatever the process asked torch for."""


def check_alike(tensors: Sequence[torch.Tensor]) -> None:
    """ValueError unless there is a tensor beside the first, and all have its shape and device."""
    if len(tensors) < 2:
        raise ValueError("no experts, expected at least one")
    for tensor in tensors[1:]:
        if (tensor.shape, tensor.device) != (tensors[0].shape, tensors[0].device):
            got = f"{tuple(tensor.shape)} on {tensor.device}"
            expected = f"{tuple(tensors[0].shape)} on {tensors[0].device}"
            raise ValueError(f"a tensor of shape {got}, expected {expected}")


def chunk_on(device: str) -> int:
    """Elements per piece on a device of this type."""
    return CHUNK if device == "cpu" else DEVICE_CHUNK


def planned_chunk(shape: Sequence[int], device: str) -> int:
    """Elements of the largest piece of a tensor, at least those of a CPU's, for planning memory."""
    return max(CHUNK, min(chunk_on(device), math.prod(shape)))


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover `range(count)` in order, `size` elements each but the last."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def scratch(count: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised buffer for one piece, taken once per call instead of once per piece."""
    return torch.empty(min(count, chunk_on(like.device.type)), dtype=dtype, device=like.device)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite: one reduction, which NaN and Inf both pass through.

    A sum that overflows although every value is finite is told apart by a second look.
    """
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
