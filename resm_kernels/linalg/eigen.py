"""Leading eigenpairs of a symmetric positive semi-definite matrix, and the Gram matrix itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from resm_kernels.linalg import dispatch
from resm_kernels.linalg.cusolver import SolverError
from resm_kernels.linalg.lapack import Tridiagonal
from resm_kernels.linalg.projector import leading_eigenspace
from resm_kernels.linalg.tridiagonal import twisted_vectors

PARTIAL_SIZE = 256
"""Smallest order at which a partial eigen-decomposition on the CPU beats a full one."""
PARTIAL_SHARE = 0.5
"""Largest share of the eigenvectors for which it does."""
ORTHOGONALITY = 1e-8
"""Largest overlap of two computed eigenvectors, and residual over sigma sigma_1, that passes."""
FAINTEST = 1e-10
"""Eigenvalues below this share of the largest need no smaller residual: they are not kept."""
ROWS = 512
"""Rows that a Gram product converts to float64 at a time."""
STRIPES = 8
"""Column stripes of a symmetric product: 9/16 of the full product's work."""


@dataclass(frozen=True)
class Eigenpairs:
    """The leading r eigenvectors of an n x n matrix and at least their eigenvalues, descending.

    Attributes
    ----------
    values : Tensor, r to n, float64
    vectors : Tensor, n x r, float64
    backend : str
        `partial` (sytrd, sterf, twisted factorisation), `full` (syevd), `syevdx` (cuSOLVER's
        leading part of the spectrum) or `projector`.
    fallback : str or None
        Why the route asked for was left, where it was.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    backend: str
    fallback: str | None = None


def gram(matrix: torch.Tensor) -> torch.Tensor:
    """matrix^T matrix in float64, n x n, from an m x n matrix of any float dtype.

    Every product of two float32 numbers is exact in float64; the sums round at eps64. Peak
    temporary: `ROWS` x n in float64 beside the result.
    """
    rows, n = matrix.shape
    result = torch.zeros(n, n, dtype=torch.float64, device=matrix.device)
    cuts = [n * i // STRIPES for i in range(STRIPES + 1)]
    stripes = [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
    for start in range(0, rows, ROWS):
        piece = matrix[start : start + ROWS].to(torch.float64)
        for a, b in stripes:
            result[a:b, a:].addmm_(piece[:, a:b].T, piece[:, a:])
    for a, b in stripes:
        result[b:, a:b] = result[a:b, b:].T
    return result


def leading_eigenpairs(
    matrix: torch.Tensor, count: int, *, floor: float = 0.0, by_projector: bool = False
) -> Eigenpairs:
    """Return the `count` leading eigenvectors, with all eigenvalues or as many.

    Parameters
    ----------
    matrix : Tensor, n x n, float64
        Symmetric; overwritten.
    count : int
        0 to n.
    floor : float
        Eigenvalues at or below this share of the largest need no vectors: fewer than `count` may
        come back.
    by_projector : bool
        Find the space with matrix products alone (`projector.leading_eigenspace`).

    Notes
    -----
    On the CPU a small share of the vectors is found without the others: the matrix is reduced to
    tridiagonal form, its eigenvectors come from twisted factorisations and are transformed back.
    Vectors of eigenvalues closer than 1e-8 ||G|| may overlap; then, and wherever the residual is
    not small, the full decomposition runs instead.
    """
    if by_projector and count and bool(matrix.any()):
        space = leading_eigenspace(matrix, count)
        if space is None:
            reason = "projector: no shift separates the rank"
            found = leading_eigenpairs(matrix, count, floor=floor)
            return replace(found, fallback=dispatch.joined(reason, found.fallback))
        values_of = (space * (matrix @ space)).sum(dim=0)
        return Eigenpairs(values_of, space, "projector")
    if not is_partial(matrix.shape[0], count, matrix.device.type):
        try:
            leading = dispatch.leading_eigh(matrix, count)
        except SolverError as error:
            return _full(matrix, count, f"syevdx: {error.got}")
        if leading is None:
            return _full(matrix, count)
        return Eigenpairs(leading.values.flip(0), leading.vectors.flip(1), "syevdx")
    diagonal = matrix.diagonal().clone()
    reduced = Tridiagonal(matrix.numpy())
    values = reduced.eigenvalues()[::-1]
    if floor > 0.0:
        count = min(count, int((values > floor * values[0]).sum()))
    wanted = np.ascontiguousarray(values[:count])
    vectors = twisted_vectors(reduced.diagonal, reduced.off_diagonal, wanted)
    if not _are_eigenvectors(reduced, wanted, vectors):
        matrix.diagonal().copy_(diagonal)  # the lower triangle is as it was: syevd reads that one
        reason = "partial: eigenvalues too close for twisted factorisations"
        return _full(matrix, count, reason)
    rows = np.ascontiguousarray(vectors.T)
    reduced.back_transform(rows)
    return Eigenpairs(torch.from_numpy(values.copy()), torch.from_numpy(rows).T, "partial")


def is_partial(n: int, count: int, device: str) -> bool:
    """Whether `count` of n eigenvectors are found without the others."""
    return device == "cpu" and n >= PARTIAL_SIZE and count <= PARTIAL_SHARE * n


def _full(matrix: torch.Tensor, count: int, reason: str | None = None) -> Eigenpairs:
    values, vectors, failed = dispatch.eigh(matrix)
    leading = vectors[:, matrix.shape[0] - count :].flip(1)
    return Eigenpairs(values.flip(0), leading, "full", dispatch.joined(reason, failed))


def _are_eigenvectors(
    reduced: Tridiagonal, values: npt.NDArray[np.float64], vectors: npt.NDArray[np.float64]
) -> bool:
    """Whether T Z = Z Lambda and Z^T Z = I hold to `ORTHOGONALITY`; false for NaN."""
    product = vectors * (reduced.diagonal[:, None] - values)
    off = reduced.off_diagonal[:, None]
    product[:-1] += off * vectors[1:]
    product[1:] += off * vectors[:-1]
    norm = float(np.abs(reduced.diagonal).max())
    # A residual turns the singular vector delta v / sigma by residual / (sigma sigma_1).
    allowed = ORTHOGONALITY * np.sqrt(np.clip(values / (norm or 1.0), FAINTEST, None)) * norm
    small = bool((np.abs(product, out=product).max(axis=0, initial=0.0) <= allowed).all())
    basis = torch.from_numpy(vectors)
    overlap = basis.T @ basis
    overlap.diagonal().sub_(1.0)
    return small and bool((overlap.abs_() <= ORTHOGONALITY).all())
