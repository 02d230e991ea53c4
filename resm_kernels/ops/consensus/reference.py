"""Combinations of tensors and of deltas in plain torch, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype, scratch
from resm_kernels.ops.mask.mask import Mask
from resm_kernels.ops.mask.reference import apply_mask

Election = Literal["sum", "count"]


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    normalize: bool = False,
) -> torch.Tensor:
    """sum_t w_t W_t, divided by sum_t w_t where `normalize`; see `ops.consensus`."""
    dtype = compute_dtype(tensors)
    flat = [tensor.reshape(-1) for tensor in tensors]
    divisor = torch.tensor(weights, dtype=dtype, device="cpu").sum().to(tensors[0].device)
    out = torch.empty(tensors[0].shape, dtype=out_dtype, device=tensors[0].device)
    target = out.view(-1)
    buffers = [scratch(target.numel(), out, dtype) for _ in range(2)]
    for piece in chunks(target.numel(), chunk_on(out.device.type)):
        total, value = (buffer[: piece.stop - piece.start] for buffer in buffers)
        total.zero_()
        for tensor, weight in zip(flat, weights, strict=True):
            total.add_(value.copy_(tensor[piece]), alpha=weight)
        target[piece] = total.div_(divisor) if normalize else total
    return out


def weighted_deltas(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype,
    divisor: float = 1.0,
    masks: Sequence[Mask] | None = None,
) -> torch.Tensor:
    """W_0 + scale * sum_t w_t D_t / divisor; see `ops.consensus`."""
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    buffer = scratch(base.numel(), base, compute_dtype((base, *experts)))
    for piece, origin, deltas in _deltas(base, experts, weights, masks):
        total = buffer[: origin.numel()].zero_()
        for delta in deltas:
            total.add_(delta)
        if divisor != 1.0:
            total.div_(total.new_full((), divisor))  # a number's reciprocal would multiply, on CUDA
        out.view(-1)[piece] = total.mul_(scale).add_(origin)
    return out


def elected_deltas(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    elect: Election,
    mean: bool,
    scale: float,
    out_dtype: torch.dtype,
    masks: Sequence[Mask] | None = None,
) -> torch.Tensor:
    """W_0 + scale * the deltas of the elected sign; see `ops.consensus`."""
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    dtype = compute_dtype((base, *experts))
    buffers = [scratch(base.numel(), base, dtype) for _ in range(6)]
    for piece, origin, deltas in _deltas(base, experts, weights, masks):
        vote, rising, falling, rising_weight, falling_weight, part = (
            buffer[: origin.numel()].zero_() for buffer in buffers
        )
        for delta, weight in zip(deltas, weights, strict=True):
            vote.add_(delta if elect == "sum" else torch.sign(delta, out=part))
            rising.add_(torch.clamp(delta, min=0.0, out=part))
            falling.add_(torch.clamp(delta, max=0.0, out=part))
            if mean:
                rising_weight.add_(torch.gt(delta, 0.0, out=part).mul_(weight))
                falling_weight.add_(torch.lt(delta, 0.0, out=part).mul_(weight))
        positive = vote >= 0.0
        total = torch.where(positive, rising, falling)
        if mean:
            divisor = torch.where(positive, rising_weight, falling_weight)
            total.div_(divisor.masked_fill_(divisor.abs() < NO_WEIGHT, 1.0))
        out.view(-1)[piece] = total.mul_(scale).add_(origin)
    return out


NO_WEIGHT = 1e-8
"""A disjoint mean whose weights sum to less stays a sum."""


def _deltas(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    masks: Sequence[Mask] | None,
) -> Iterator[tuple[slice, torch.Tensor, Iterator[torch.Tensor]]]:
    """Chunk by chunk: where it lies, the base, and the masked and weighted deltas one by one."""
    dtype = compute_dtype((base, *experts))
    flat_base, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    masks = masks or [Mask()] * len(flat)
    buffers = [scratch(base.numel(), base, dtype) for _ in range(2)]
    for piece in chunks(base.numel(), chunk_on(base.device.type)):
        origin, value = (buffer[: piece.stop - piece.start] for buffer in buffers)
        origin.copy_(flat_base[piece])

        def deltas(
            piece: slice = piece, origin: torch.Tensor = origin, value: torch.Tensor = value
        ) -> Iterator[torch.Tensor]:
            for expert, mask, weight in zip(flat, masks, weights, strict=True):
                value.copy_(expert[piece]).sub_(origin)
                yield apply_mask(value, mask, piece.start, weight)

        yield piece, origin, deltas()
