"""What Triton launches share: which tensors they take, and the tables they read."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
from collections.abc import Iterable, Sequence

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels read and write; float64 stays with plain torch."""
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
"""Names under which torch's builds bring triton."""
OLDEST = (8, 0)
"""First compute capability with bf16 and TF32."""
OLDEST_TRITON = (3, 4)
"""First version that compiles every kernel: with torch 2.8 comes 3.4."""
ALIGNMENT = 16
"""Bytes to which inputs are aligned, so that loads are 16 bytes wide."""


def on_kernels(tensors: Iterable[torch.Tensor], *dtypes: torch.dtype) -> bool:
    """Whether Triton kernels run on these tensors, and write these dtypes."""
    tensors = tuple(tensors)
    return (
        all(tensor.is_cuda and tensor.numel() for tensor in tensors)
        and all(dtype in DTYPES for dtype in (*dtypes, *(tensor.dtype for tensor in tensors)))
        and has_triton()
        and torch.cuda.get_device_capability(tensors[0].device) >= OLDEST
    )


@functools.cache
def triton_version() -> str | None:
    """The version of the triton that is installed, or None."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


@functools.cache
def has_triton() -> bool:
    """Whether a triton is installed that compiles the kernels."""
    numbers = re.match(r"(\d+)\.(\d+)", triton_version() or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST_TRITON


def architecture(device: torch.device) -> str:
    """The name that compilers give a device's architecture: sm_90, gfx942; sm_80 for a CPU."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def flat_inputs(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as the element-wise kernels read them: flat, aligned and of one dtype.

    Strided and unaligned tensors, and those narrower than the widest dtype, are copied.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    flat = []
    for tensor in tensors:
        given = tensor.to(dtype).reshape(-1)
        aligned = given.is_contiguous() and given.data_ptr() % ALIGNMENT == 0
        flat.append(given if aligned else given.clone(memory_format=torch.contiguous_format))
    return flat


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The addresses of tensors as an int64 table on their device; the tensors must outlive it."""
    return table([tensor.data_ptr() for tensor in tensors], torch.int64, tensors[0].device)


def table(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A few numbers for a kernel, copied to the device without waiting for it."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
