"""Weighted sums of tensors and of deltas in plain torch, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype, scratch


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    normalize: bool = False,
) -> torch.Tensor:
    """Return sum_t w_t W_t, divided by sum_t w_t where `normalize`, rounded once to `out_dtype`.

    Tensors share one shape; sums run in `compute_dtype` in the order given.
    """
    dtype = compute_dtype(tensors)
    flat = [tensor.reshape(-1) for tensor in tensors]
    divisor = float(torch.tensor(weights, dtype=dtype).sum())
    out = torch.empty(tensors[0].shape, dtype=out_dtype, device=tensors[0].device)
    target = out.view(-1)
    total_buffer, value_buffer = (scratch(target.numel(), out, dtype) for _ in range(2))
    for piece in chunks(target.numel(), chunk_on(out.device.type)):
        count = piece.stop - piece.start
        total, value = total_buffer[:count].zero_(), value_buffer[:count]
        for tensor, weight in zip(flat, weights, strict=True):
            total.add_(value.copy_(tensor[piece]), alpha=weight)
        if normalize:
            total.div_(divisor)
        target[piece] = total
    return out


def weighted_deltas(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype,
    divisor: float = 1.0,
) -> torch.Tensor:
    """Return W_0 + scale * sum_t w_t (W_t - W_0) / divisor, rounded once to `out_dtype`.

    Tensors share one shape; differences and sums run in `compute_dtype` in the order given,
    temporaries are three chunks.
    """
    dtype = compute_dtype((base, *experts))
    flat_base = base.reshape(-1)
    flat = [expert.reshape(-1) for expert in experts]
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    target = out.view(-1)
    buffers = [scratch(target.numel(), out, dtype) for _ in range(3)]
    for piece in chunks(target.numel(), chunk_on(out.device.type)):
        origin, total, value = (buffer[: piece.stop - piece.start] for buffer in buffers)
        origin.copy_(flat_base[piece])
        total.zero_()
        for expert, weight in zip(flat, weights, strict=True):
            total.add_(value.copy_(expert[piece]).sub_(origin).mul_(weight))
        if divisor != 1.0:
            total.div_(divisor)
        if scale != 1.0:
            total.mul_(scale)
        target[piece] = total.add_(origin)
    return out
