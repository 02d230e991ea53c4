"""Many small weights of one shape at once: expert stacks, heads, narrow projections."""

from __future__ import annotations

import torch

from resm_kernels.linalg.polar import NULL, PANEL_RANGE
from resm_kernels.linalg.subspace import GRAM_RANGE, rank_tolerance


def merge_batch(
    deltas: torch.Tensor, rank: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge B weights of T experts each as TSV-M does, every step one batched call.

    Parameters
    ----------
    deltas : Tensor, B x T x m x n
        Finite, any float dtype.
    rank : int
        The most triplets to keep per expert; each delta is clamped to its own numerical rank.
    weights : Tensor, B x T
        Multiply each expert's singular values.

    Returns
    -------
    left, right : Tensor, B x m x K and B x n x K, float64
        K = T * rank; columns past the ranks are zero. M_b = left_b @ right_b.T.
    doubtful : Tensor, B, bool
        Weights whose spectrum spans more than a float64 Gram matrix holds: merge these singly.

    Notes
    -----
    The mathematics and accuracy of `exact`: float64 throughout, about 3e-7.
    """
    count, experts, rows, columns = deltas.shape
    if columns > rows:
        right, left, doubtful = merge_batch(deltas.mT, rank, weights)
        return left, right, doubtful
    rank = min(rank, columns)
    wide, weights = deltas.to(torch.float64), weights.to(deltas.device, torch.float64)
    exponents = torch.frexp(wide.abs().amax(dim=(1, 2, 3))).exponent
    wide = _times_powers_of_two(wide, -exponents)  # squares stay inside float64's range
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)
    squares = squares[..., columns - rank :].flip(-1).clamp(min=0.0)  # [B, T, rank]
    vectors = vectors[..., columns - rank :].flip(-1)
    values = squares.sqrt()
    largest = values[..., :1]
    kept = values > rank_tolerance(rows) * largest
    doubtful = (kept & (squares < GRAM_RANGE * largest.square())).flatten(1).any(dim=1)
    inverse = torch.where(kept, values.reciprocal(), 0.0)
    left_bases = (wide @ vectors) * inverse[..., None, :]
    right_bases = vectors * kept[..., None, :]

    scale = (values * weights[..., None]).reshape(count, experts * rank)
    left, left_doubtful = _polar_factors(_side_by_side(left_bases))
    right, right_doubtful = _polar_factors(_side_by_side(right_bases))
    left = _times_powers_of_two(left * scale[:, None, :], exponents)
    return left, right, doubtful | left_doubtful | right_doubtful


def _times_powers_of_two(stack: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Every item times its own power of two, in two factors that float64 holds."""
    half = exponents // 2
    for power in (half, exponents - half):
        stack = stack * torch.exp2(power.to(stack.dtype)).view(-1, *[1] * (stack.ndim - 1))
    return stack


def _side_by_side(bases: torch.Tensor) -> torch.Tensor:
    """B x T x m x r panels as B x m x (T r)."""
    count, experts, rows, rank = bases.shape
    return bases.permute(0, 2, 1, 3).reshape(count, rows, experts * rank)


def _polar_factors(panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """polar(U) on the range of every panel, and which panels are too ill-conditioned for it."""
    values, vectors = torch.linalg.eigh(panels.mT @ panels)
    largest = values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    in_range = values > NULL * NULL * largest
    doubtful = (in_range & (values < PANEL_RANGE * largest)).any(dim=1)
    scale = torch.where(in_range, values, 1.0).rsqrt() * in_range
    return panels @ ((vectors * scale[:, None, :]) @ vectors.mT), doubtful
