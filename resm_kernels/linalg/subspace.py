"""Leading singular subspaces of one delta, dense or given as factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from resm_kernels.linalg import dispatch
from resm_kernels.linalg.eigen import ROWS, gram, leading_eigenpairs

SAFE_EXPONENT = 200
"""Powers of two whose fourth powers, summed, neither overflow nor vanish in float64."""
GRAM_RANGE = 1e-8
"""Smallest eigenvalue ratio that is read from a float64 Gram matrix; below it, an SVD."""


@dataclass(frozen=True)
class FactoredDelta:
    """A delta given as the product left @ right.T, as a LoRA adapter gives it; never formed.

    Attributes
    ----------
    left, right : Tensor, m x k and n x k
        Any float dtypes; for LoRA, scaling * B and A^T.
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """m, n."""
        return self.left.shape[0], self.right.shape[0]


Delta = torch.Tensor | FactoredDelta
SubspaceBackend = Literal["gram", "projector", "svd", "textbook"]


@dataclass(frozen=True)
class Subspace:
    """The leading r singular triplets of an m x n matrix.

    Float64; float32 from the textbook.

    Attributes
    ----------
    left, right : Tensor, m x r and n x r
        Orthonormal columns.
    values : Tensor, r
        Singular values, descending.
    numerical_rank : int
        Rank of the matrix by `numerical_rank`, as far as it was looked for; r never passes it.
    backend : str
        `gram-full`, `gram-partial`, `gram-syevdx`, `gram-projector` or `gram-batched` (how the
        eigenvectors of the Gram matrix were found), `svd`, `textbook` or `factored`.
    fallback : str or None
        Why the route asked for was left, where it was.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    numerical_rank: int
    backend: str
    fallback: str | None = None

    @property
    def rank(self) -> int:
        """Number of triplets kept."""
        return int(self.values.numel())

    def transposed(self) -> Subspace:
        """The triplets of the transposed matrix."""
        return replace(self, left=self.right, right=self.left)


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
    return int((values > rank_tolerance(longest) * values[0]).sum())


def rank_tolerance(longest: int) -> float:
    """The share of sigma_1 that a singular value must pass, for max(m, n) = `longest`."""
    return math.sqrt(longest) * torch.finfo(torch.float32).eps


def leading_subspaces(
    delta: Delta,
    rank: int,
    *,
    energy: float | None = None,
    backend: SubspaceBackend = "gram",
) -> Subspace:
    """Return the leading singular triplets of a delta.

    Parameters
    ----------
    delta : Tensor, m x n, or FactoredDelta
        Finite, any float dtype.
    rank : int
        The most triplets to keep; clamped to the numerical rank.
    energy : float, optional
        Keep the fewest triplets whose squares sum to this share of ||delta||_F^2 (at least one),
        never more than `rank`.
    backend : str
        `gram`, `projector` (the same, by matrix products alone), `svd` in float64, or
        `textbook`: an SVD in float32. Factors are always merged in their core.

    Returns
    -------
    Subspace
        A zero matrix, or `rank` 0, gives r = 0.

    Raises
    ------
    torch.linalg.LinAlgError
        The delta is not finite, or a factorisation did not converge.

    Notes
    -----
    Eigenvectors V of the float64 Gram matrix on the shorter side, then U = delta V / sigma.
    Subspaces err by about eps64 * sigma_1 / (sigma_r * gap), which beats a float32 SVD whenever
    sigma_r > 1e-9 sigma_1. Where the kept eigenvalues span more than `GRAM_RANGE` a float64 SVD
    is taken instead. Factors need a QR each and an SVD of their k x k core.
    """
    if isinstance(delta, FactoredDelta):
        return _of_factors(delta, rank, energy)
    if delta.shape[1] > delta.shape[0]:
        return leading_subspaces(delta.T, rank, energy=energy, backend=backend).transposed()
    exponent = extreme_exponent(delta)
    if exponent:
        scaled = times_power_of_two(delta, -exponent)
        found = leading_subspaces(scaled, rank, energy=energy, backend=backend)
        return replace(found, values=times_power_of_two(found.values, exponent))
    if backend in ("svd", "textbook"):
        return _by_svd(delta, rank, energy, backend)

    rows, columns = delta.shape
    rank = min(rank, columns)
    matrix = gram(delta)
    total = float(matrix.diagonal().sum())
    _expect_finite(math.isfinite(total))
    floor = rank_tolerance(rows) ** 2
    pairs = leading_eigenpairs(matrix, rank, floor=floor, by_projector=backend == "projector")
    squares = pairs.values.clamp(min=0.0)
    known = numerical_rank(squares.sqrt(), rows)
    kept = _kept(squares, total, min(pairs.vectors.shape[1], known), energy)
    if kept and float(squares[kept - 1]) < GRAM_RANGE * float(squares[0]):
        reason = "gram: the kept eigenvalues span more than float64 holds"
        found = _by_svd(delta, rank, energy, "svd")
        return replace(found, fallback=dispatch.joined(reason, pairs.fallback, found.fallback))
    values = squares[:kept].sqrt()
    right = pairs.vectors[:, :kept]
    left = torch.empty(rows, kept, dtype=torch.float64, device=delta.device)
    for start in range(0, rows, ROWS):
        piece = slice(start, start + ROWS)
        torch.mm(delta[piece].to(torch.float64), right, out=left[piece])
    left.div_(values)
    return Subspace(left, values, right, known, f"gram-{pairs.backend}", pairs.fallback)


def _by_svd(
    delta: torch.Tensor, rank: int, energy: float | None, backend: SubspaceBackend
) -> Subspace:
    _expect_finite(bool(delta.isfinite().all()))
    if backend == "textbook":
        left, values, right = torch.linalg.svd(delta.to(torch.float32), full_matrices=False)
        failed = None
    else:
        left, values, right, failed = dispatch.svd(delta.to(torch.float64))
    known = numerical_rank(values, max(delta.shape))
    squares = values.square()
    kept = _kept(squares, float(squares.sum()), min(rank, known), energy)
    return Subspace(
        left=left[:, :kept].contiguous(),
        values=values[:kept],
        right=right[:kept].T.contiguous(),
        numerical_rank=known,
        backend=backend,
        fallback=failed,
    )


def _of_factors(delta: FactoredDelta, rank: int, energy: float | None) -> Subspace:
    left, left_core = torch.linalg.qr(delta.left.to(torch.float64))
    right, right_core = torch.linalg.qr(delta.right.to(torch.float64))
    core_left, values, core_right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    known = numerical_rank(values, max(delta.shape))
    squares = values.square()
    kept = _kept(squares, float(squares.sum()), min(rank, known), energy)
    return Subspace(
        left=left @ core_left[:, :kept],
        values=values[:kept],
        right=right @ core_right[:kept].T,
        numerical_rank=known,
        backend="factored",
    )


def _expect_finite(holds: bool) -> None:
    """LAPACK may take a matrix with NaN without a word, and its rank then looks like 0."""
    if not holds:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "the delta is not finite: the difference of two weights passes its dtype's range"
        )


def extreme_exponent(matrix: torch.Tensor) -> int:
    """The power of two to take out so that squares stay inside float64's range; mostly 0.

    Only float64 inputs of extreme size need it; a power of two changes no digit.
    """
    if matrix.dtype != torch.float64 or matrix.numel() == 0:
        return 0
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high))
    exponent = math.frexp(largest)[1]
    return exponent if largest and abs(exponent) > SAFE_EXPONENT else 0


def times_power_of_two(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """tensor * 2^exponent in two factors, since one of them can pass float64's range."""
    if exponent == 0:
        return tensor
    half = exponent // 2
    return tensor * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def _kept(squares: torch.Tensor, total: float, limit: int, energy: float | None) -> int:
    if energy is None or limit <= 1:
        return limit
    # On the host: a GPU's running sum over several blocks rounds by chance.
    share = squares[:limit].cpu().cumsum(0) / total
    return min(limit, int((share < energy).sum()) + 1)
