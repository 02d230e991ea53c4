"""Drops by rank in plain torch, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from resm_kernels.ops.dtypes import chunk_on, chunks, compute_dtype
from resm_kernels.ops.mask.mask import WORD
from resm_kernels.ops.mask.reference import random_numbers


def rank_drop(
    base: torch.Tensor, expert: torch.Tensor, *, density: float, epsilon: float, key: int
) -> torch.Tensor:
    """The expert with entries dropped; see `ops.rank_drop`."""
    dtype = torch.promote_types(base.dtype, expert.dtype)
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    flat_base, flat_expert = base.reshape(-1), expert.reshape(-1)
    for piece, limits in limits_by_rank(base, expert, density, epsilon):
        numbers = random_numbers(key, piece.start, limits.numel())
        kept = torch.from_numpy(numbers <= limits.cpu().numpy().view(np.uint32)).to(base.device)
        out.view(-1)[piece] = torch.where(kept, flat_expert[piece], flat_base[piece])
    return out


def limits_by_rank(
    base: torch.Tensor, expert: torch.Tensor, density: float, epsilon: float
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows at a time: where they lie, and the largest random number that keeps each entry.

    uint32 numbers in an int32 tensor.
    """
    columns = base.shape[-1] if base.dim() else 1
    dtype = compute_dtype((base, expert))
    lowest, highest = (round((density + end * epsilon) * WORD) for end in (-1, 1))
    places = torch.arange(columns, device=base.device)
    span = highest - lowest if columns > 1 else 0
    lowest = lowest if columns > 1 else round(density * WORD)
    rising = lowest + (places * span + columns // 2) // max(columns - 1, 1)
    by_rank = (rising.clamp_min(1) - 1).int()
    flat_base, flat_expert = base.reshape(-1), expert.reshape(-1)
    rows = max(1, chunk_on(base.device.type) // max(columns, 1))
    for piece in chunks(base.numel(), max(1, rows * columns)):
        a = flat_expert[piece].to(dtype, copy=True).sub_(flat_base[piece]).abs_().view(-1, columns)
        order = _order(a, places)
        limits = torch.empty_like(order, dtype=torch.int32)
        yield piece, limits.scatter_(-1, order, by_rank.expand_as(order)).view(-1)


def _order(magnitudes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A stable argsort of every row.

    On a CPU float32 magnitudes sort as integers with their places in the low half: all differ, so
    that NumPy's vectorised sort, which is not stable, does; a tenth of the time of torch's.
    """
    if magnitudes.device.type != "cpu" or magnitudes.dtype != torch.float32:
        return magnitudes.sort(dim=-1, stable=True).indices
    keys = magnitudes.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(places)
    keys.numpy().sort(axis=-1)
    return keys.bitwise_and_(2**32 - 1)
