"""Merging in the space of singular vectors: polar(U) diag(S) polar(V)^T, never formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resm_kernels.linalg.polar import polar_factor
from resm_kernels.linalg.subspace import Subspace, leading_subspaces


@dataclass(frozen=True)
class SpectralMerge:
    """A merged delta as the low-rank pair M = left @ right.T.

    Attributes
    ----------
    left, right : Tensor, m x K and n x K
        Float64.
    null_directions : int
        Directions dropped by the polar factors, both sides together.
    backends : tuple of str
        What ran, in order, without repeats.
    """

    left: torch.Tensor
    right: torch.Tensor
    null_directions: int
    backends: tuple[str, ...]


def spectral_merge(subspaces: Sequence[Subspace], weights: Sequence[float]) -> SpectralMerge:
    """Combine leading subspaces as TSV-M does.

    Parameters
    ----------
    subspaces : sequence of Subspace
        One per expert, of one m x n; some may have rank 0. Ranks should sum to at most
        min(m, n); past it the polar factors drop the surplus directions.
    weights : sequence of float
        Multiplies each expert's singular values.

    Returns
    -------
    SpectralMerge
        M = polar([U_1 .. U_T]) diag(w_t S_t) polar([V_1 .. V_T])^T with error below 1e-6
        relative to a float64 SVD at the same ranks.

    Notes
    -----
    Source: TSV-M, arXiv 2412.00081, section 4; the polar form of its two orthogonalising SVDs.
    """
    left = torch.cat([s.left for s in subspaces], dim=1)
    right = torch.cat([s.right for s in subspaces], dim=1)
    scale = torch.cat([s.values * w for s, w in zip(subspaces, weights, strict=True)])
    polar_left, polar_right = polar_factor(left), polar_factor(right)
    backends = [s.backend for s in subspaces] + [polar_left.backend, polar_right.backend]
    return SpectralMerge(
        left=left @ (polar_left.whitener * scale),
        right=right @ polar_right.whitener,
        null_directions=polar_left.null_directions + polar_right.null_directions,
        backends=tuple(dict.fromkeys(backends)),
    )


def equalise(delta: torch.Tensor) -> tuple[SpectralMerge, int]:
    """Replace every non-zero singular value of a matrix by the mean over all of them.

    Parameters
    ----------
    delta : Tensor, m x n
        Finite, any float dtype.

    Returns
    -------
    merge : SpectralMerge
        polar(delta) * mean(sigma) as a low-rank pair; the mean is over min(m, n) values.
    rank : int
        Numerical rank of `delta`. Null directions stay zero, where the published code returns
        arbitrary ones.

    Notes
    -----
    Source: Iso-C, arXiv 2502.04959, equation 6.
    """
    smaller = min(delta.shape)
    subspace = leading_subspaces(delta, smaller)
    mean = float(subspace.values.sum()) / smaller if smaller else 0.0
    merge = SpectralMerge(
        left=subspace.left.mul_(mean),
        right=subspace.right,
        null_directions=smaller - subspace.rank,
        backends=(subspace.backend,),
    )
    return merge, subspace.rank
