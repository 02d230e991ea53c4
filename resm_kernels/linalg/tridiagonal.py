"""Eigenvectors of a symmetric tridiagonal matrix for known eigenvalues, all of them at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
NEGLIGIBLE = 1e-20
"""Off-diagonal elements below this share of the largest element decouple T: they are raised to it,
far below eps, so that no pivot becomes 0 / 0."""


def twisted_vectors(diagonal: Matrix, off_diagonal: Matrix, eigenvalues: Matrix) -> Matrix:
    """Return one unit eigenvector of T per eigenvalue, by twisted factorisation.

    Parameters
    ----------
    diagonal, off_diagonal : ndarray, n and n - 1, float64
        T.
    eigenvalues : ndarray, r
        Eigenvalues of T, accurate to about eps * ||T||.

    Returns
    -------
    ndarray, n x r, float64
        Not orthogonalised: two vectors overlap by about eps * ||T|| / (distance of their
        eigenvalues). Eigenvalues nearer than that give parallel vectors, or NaN: the caller
        checks (`leading_eigenpairs` does).

    Notes
    -----
    T - lambda I is factored from the top (L D L^T) and from the bottom (U D U^T); both meet in
    the row k where the pivot is smallest, and the vector follows from z_k = 1 in both
    directions (Dhillon and Parlett, "Multiple representations to compute orthogonal
    eigenvectors of symmetric tridiagonal matrices", section 2). O(n r) work in n steps, each
    over all r eigenvalues; LAPACK's stemr takes about three times as long.
    """
    norm = max(float(np.abs(diagonal).max()), float(np.abs(off_diagonal).max(initial=0.0)))
    vectors = _twisted(diagonal, off_diagonal, eigenvalues, norm)
    lost = ~np.isfinite(vectors).all(axis=0)
    if lost.any():  # a pivot was zero exactly: an eigenvalue within its own error has none
        moved = eigenvalues[lost] + 4 * np.finfo(np.float64).eps * norm
        vectors[:, lost] = _twisted(diagonal, off_diagonal, moved, norm)
    return vectors


def _twisted(diagonal: Matrix, off_diagonal: Matrix, eigenvalues: Matrix, norm: float) -> Matrix:
    n, count = diagonal.size, eigenvalues.size
    floor = NEGLIGIBLE * norm
    off = np.where(np.abs(off_diagonal) < floor, floor, off_diagonal)
    squares, term = off**2, np.empty(count)
    shifted = diagonal[:, None] - eigenvalues
    top, bottom = shifted.copy(), shifted.copy()
    with np.errstate(all="ignore"):
        for i in range(1, n):
            np.divide(squares[i - 1], top[i - 1], out=term)
            np.subtract(top[i], term, out=top[i])
        for i in range(n - 2, -1, -1):
            np.divide(squares[i], bottom[i + 1], out=term)
            np.subtract(bottom[i], term, out=bottom[i])
        shifted -= top
        shifted -= bottom
        twist = np.abs(shifted, out=shifted).argmin(axis=0)

        np.divide(-off[:, None], bottom[1:], out=bottom[1:])
        np.divide(-off[:, None], top[:-1], out=top[:-1])
        vectors = _swept(bottom[1:], twist, term)
        vectors += _swept(top[-2::-1], n - 1 - twist, term)[::-1]
        vectors[twist, np.arange(count)] = 1.0
        vectors /= np.sqrt(np.einsum("ij,ij->j", vectors, vectors))
    return vectors


def _swept(ratios: Matrix, start: npt.NDArray[np.intp], term: Matrix) -> Matrix:
    """z_start = 1 and z_{i+1} = ratio_i z_i from there on; zero before."""
    vectors = np.zeros((ratios.shape[0] + 1, start.size))
    vectors[start, np.arange(start.size)] = 1.0
    for i, ratio in enumerate(ratios):
        np.multiply(ratio, vectors[i], out=term)
        vectors[i + 1] += term
    return vectors
