"""Drops by rank in Triton, after torch's sort has ranked the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resm_kernels.ops.elementwise import block_of, launch, load
from resm_kernels.ops.launch import flat_inputs, table
from resm_kernels.ops.mask.kernel import kept_at_random, words
from resm_kernels.ops.rank_drop.reference import limits_by_rank


@triton.jit(do_not_specialize=["count"])
def _rank_drop_kernel(
    base_ptr,
    expert_ptr,
    limits_ptr,
    out_ptr,
    key_ptr,
    count: tl.int64,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The expert where an entry's random number is at most its limit, the base elsewhere."""
    first, lanes, inside = block_of(count, EVEN, BLOCK)
    base = load(base_ptr + first, lanes, inside)  # [BLOCK]
    expert = load(expert_ptr + first, lanes, inside)
    limits = tl.load(limits_ptr + first + lanes, mask=inside, other=0)
    key0 = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    key1 = tl.load(key_ptr + 1).to(tl.uint64, bitcast=True)
    kept = kept_at_random(first, limits.to(tl.uint32, bitcast=True), key0, key1, BLOCK)
    chosen = tl.where(kept, expert, base).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + lanes, chosen, mask=inside)


def rank_drop(
    base: torch.Tensor, expert: torch.Tensor, *, density: float, epsilon: float, key: int
) -> torch.Tensor:
    """The expert with entries dropped, 4 bytes of limits an entry; see `ops.rank_drop`."""
    flat_base, flat_expert = flat_inputs((base, expert))
    count, device = flat_base.numel(), flat_base.device
    limits = torch.empty(count, dtype=torch.int32, device=device)
    shaped = flat_base.view(base.shape), flat_expert.view(base.shape)
    for piece, part in limits_by_rank(*shaped, density, epsilon):
        limits[piece] = part
    out = torch.empty(base.shape, dtype=flat_base.dtype, device=device)
    key_words = table(words(key), torch.int64, device)
    launch(_rank_drop_kernel, count, flat_base, flat_expert, limits, out, key_words, count)
    return out
