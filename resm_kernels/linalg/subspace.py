"""Leading singular subspaces of one matrix in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

SAFE_EXPONENT = 400
"""Powers of two whose squares, summed, neither overflow nor vanish in float64."""
GRAM_RANGE = 1e-8
"""Smallest eigenvalue ratio that is read from a float64 Gram matrix; below it, an SVD."""


@dataclass(frozen=True)
class Subspace:
    """The leading r singular triplets of an m x n matrix, float64.

    Attributes
    ----------
    left, right : Tensor, m x r and n x r
        Orthonormal columns.
    values : Tensor, r
        Singular values, descending.
    numerical_rank : int
        Rank of the whole matrix by `numerical_rank`; r never passes it.
    backend : str
        `gram-fp64` or `svd-fp64`.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    numerical_rank: int
    backend: str

    @property
    def rank(self) -> int:
        """Number of triplets kept."""
        return int(self.values.numel())


def numerical_rank(values: torch.Tensor, longest: int) -> int:
    """Count the singular values that float32 data of this size can tell from zero.

    A value counts when it passes sqrt(max(m, n)) * eps(float32) * sigma_1: the size of the
    largest singular value that rounding the entries to float32 can add. Directions below it are
    arbitrary (two runs of a textbook SVD return different ones), so no merge keeps them.

    Parameters
    ----------
    values : Tensor
        Singular values, descending.
    longest : int
        max(m, n) of the matrix.
    """
    if values.numel() == 0 or float(values[0]) <= 0.0:
        return 0
    tolerance = math.sqrt(longest) * torch.finfo(torch.float32).eps
    return int((values > tolerance * values[0]).sum())


def leading_subspaces(delta: torch.Tensor, rank: int, *, energy: float | None = None) -> Subspace:
    """Return the leading singular triplets of a matrix.

    Parameters
    ----------
    delta : Tensor, m x n
        Finite, any float dtype.
    rank : int
        The most triplets to keep; clamped to the numerical rank.
    energy : float, optional
        Keep the fewest triplets whose squares sum to this share of ||delta||_F^2 (at least one),
        never more than `rank`.

    Returns
    -------
    Subspace
        A zero matrix, or `rank` 0, gives r = 0.

    Notes
    -----
    Eigenvectors V of the Gram matrix on the shorter side, then U = delta V / sigma. Subspaces
    err by about eps64 * sigma_1 / (sigma_r * gap), which beats a float32 SVD whenever
    sigma_r > 1e-9 sigma_1. Where the kept eigenvalues span more than `GRAM_RANGE` a float64 SVD
    is taken instead and named in `backend`.
    """
    rows, columns = delta.shape
    if columns > rows:
        flipped = leading_subspaces(delta.T, rank, energy=energy)
        return Subspace(
            left=flipped.right,
            values=flipped.values,
            right=flipped.left,
            numerical_rank=flipped.numerical_rank,
            backend=flipped.backend,
        )

    matrix, exponent = _in_range(delta.to(torch.float64))
    if exponent:
        scaled = leading_subspaces(matrix, rank, energy=energy)
        return replace(scaled, values=torch.ldexp(scaled.values, torch.tensor(exponent)))
    eigenvalues, vectors = torch.linalg.eigh(matrix.T @ matrix)
    squares = eigenvalues.flip(0).clamp_(min=0.0)
    known = numerical_rank(squares.sqrt(), rows)
    kept = _kept(squares, min(rank, known), energy)
    if kept and float(squares[kept - 1]) < GRAM_RANGE * float(squares[0]):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        known = numerical_rank(values, rows)
        kept = _kept(values.square(), min(rank, known), energy)
        return Subspace(
            left=left[:, :kept].contiguous(),
            values=values[:kept],
            right=right[:kept].T.contiguous(),
            numerical_rank=known,
            backend="svd-fp64",
        )
    values = squares[:kept].sqrt()
    right = vectors[:, columns - kept :].flip(1).contiguous()
    return Subspace(
        left=(matrix @ right).div_(values),
        values=values,
        right=right,
        numerical_rank=known,
        backend="gram-fp64",
    )


def _in_range(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A matrix whose squares stay inside float64's range, and the power of two taken out.

    Only float64 inputs of extreme size are scaled; a power of two changes no digit.
    """
    low, high = torch.aminmax(matrix) if matrix.numel() else (torch.zeros(()), torch.zeros(()))
    exponent = math.frexp(max(-float(low), float(high)))[1]
    if abs(exponent) <= SAFE_EXPONENT or not bool(matrix.any()):
        return matrix, 0
    return torch.ldexp(matrix, torch.tensor(-exponent)), exponent


def _kept(squares: torch.Tensor, limit: int, energy: float | None) -> int:
    if energy is None or limit <= 1:
        return limit
    share = squares.cumsum(0) / squares.sum()
    return min(limit, int((share < energy).sum()) + 1)
