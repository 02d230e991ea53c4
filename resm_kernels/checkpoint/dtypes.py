"""The dtypes of the safetensors format and their torch counterparts."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DType:
    """One dtype that a header may name.

    `mergeable` marks the floats a merge can average; everything else is copied from the base,
    or refused where `opaque` (numbers that mean nothing without scales stored elsewhere).
    """

    name: str
    torch: torch.dtype
    mergeable: bool = False
    opaque: bool = False

    @property
    def size(self) -> int:
        """Bytes per element."""
        return self.torch.itemsize


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("F64", torch.float64, mergeable=True),
        DType("F32", torch.float32, mergeable=True),
        DType("F16", torch.float16, mergeable=True),
        DType("BF16", torch.bfloat16, mergeable=True),
        DType("F8_E4M3", torch.float8_e4m3fn, opaque=True),
        DType("F8_E5M2", torch.float8_e5m2, opaque=True),
        DType("I64", torch.int64),
        DType("I32", torch.int32),
        DType("I16", torch.int16),
        DType("I8", torch.int8),
        DType("U64", torch.uint64),
        DType("U32", torch.uint32),
        DType("U16", torch.uint16),
        DType("U8", torch.uint8),
        DType("BOOL", torch.bool),
        DType("C64", torch.complex64, opaque=True),
    )
}
BY_TORCH = {dtype.torch: dtype for dtype in DTYPES.values()}

OUT_DTYPES = {
    "float64": DTYPES["F64"],
    "float32": DTYPES["F32"],
    "float16": DTYPES["F16"],
    "bfloat16": DTYPES["BF16"],
}
"""Names that recipes and config.json use."""
