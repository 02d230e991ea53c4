"""What element-wise Triton kernels share: a block per program, experts by table."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Entries per program: one 16-byte load per thread and input of bf16; half as many of fp32."""
SUMMED = 4096
"""The same where a program's result is a sum; it fixes the summation tree on every card."""
WARPS = 8
EXACT = {"enable_fp_fusion": False}
"""Compile option: a product and a sum round twice, as in plain torch, so the bytes are the same."""
EVEN = 16
"""A count of whole groups of this many entries lets masked loads be 16 bytes wide."""
AHEAD = tl.constexpr(4)
"""Experts whose blocks are read before the first of them is used."""
LARGEST_UNIT = tl.constexpr(253 << 23)
"""Bits of 2**126, the largest power of two whose inverse is a normal float32."""


@triton.jit
def block_of(count, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """This program's first entry (int64), its lanes, and which of them lie inside the tensor."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    left = before(count, first, BLOCK)
    if EVEN:
        left = left // 16 * 16
    lanes = tl.arange(0, BLOCK)  # [BLOCK]
    return first, lanes, lanes < left


@triton.jit
def before(place, first, BLOCK: tl.constexpr):
    """How many of the lanes from entry `first` on lie before `place`: int32, in [0, BLOCK]."""
    return tl.minimum(tl.maximum(place - first, 0), BLOCK).to(tl.int32)


@triton.jit
def load(ptr, lanes, inside):
    """A block in float32, zero outside the tensor."""
    return tl.load(ptr + lanes, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def expert_of(expert_table, t, base_ptr):
    """The pointer to expert t: 16-byte aligned, of the base's dtype."""
    address = tl.load(expert_table + t)
    return tl.multiple_of(address.to(tl.pointer_type(base_ptr.dtype.element_ty)), 16)


@triton.jit
def expert_block(expert_table, t, experts, base_ptr, first, lanes, inside):
    """A block of expert t in its own dtype, zero outside the tensor and past the last expert."""
    ptr = expert_of(expert_table, tl.minimum(t, experts - 1), base_ptr)
    return tl.load(ptr + first + lanes, mask=inside & (t < experts), other=0.0)


@triton.jit
def blocks_ahead(expert_table, t, experts, base_ptr, first, lanes, inside):
    """The blocks of experts t to t + AHEAD - 1, under way at the same time."""
    return (
        expert_block(expert_table, t, experts, base_ptr, first, lanes, inside),
        expert_block(expert_table, t + 1, experts, base_ptr, first, lanes, inside),
        expert_block(expert_table, t + 2, experts, base_ptr, first, lanes, inside),
        expert_block(expert_table, t + 3, experts, base_ptr, first, lanes, inside),
    )


@triton.jit
def unit_of(largest):
    """Bits of the largest power of two in a magnitude, and the inverse of that power."""
    bits = tl.minimum(largest.to(tl.int32, bitcast=True) & 0x7F800000, LARGEST_UNIT)
    return bits, ((254 << 23) - bits).to(tl.float32, bitcast=True)


def launch(
    kernel: Any,
    count: int,
    first: torch.Tensor,
    *others: object,
    block: int | None = None,
    **constants: object,
) -> None:
    """Run an element-wise kernel over `count` entries, on the device of its first argument.

    An uneven count takes a pointer per entry, hence half the entries per program as well.
    """
    even = count % EVEN == 0
    block = block or (BLOCK if even and first.element_size() == 2 else BLOCK // 2)
    constants |= {"EVEN": even, "BLOCK": block, "num_warps": WARPS, **EXACT}
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[(triton.cdiv(count, block),)](first, *others, **constants)
