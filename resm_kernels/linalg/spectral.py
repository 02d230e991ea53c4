"""Merging in the space of singular vectors: polar(U) diag(S) polar(V)^T, never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resm_kernels.linalg.polar import PolarBackend, PolarFactor, polar_factor
from resm_kernels.linalg.subspace import Delta, Subspace, leading_subspaces, times_power_of_two


@dataclass(frozen=True)
class SpectralMerge:
    """A merged delta as the low-rank pair M = left @ right.T.

    Attributes
    ----------
    left, right : Tensor, m x k and n x k
        Both float32 or both float64.
    null_directions : int
        Directions dropped by the polar factors, both sides together.
    backends : tuple of str
        What ran, in order, without repeats.
    fallbacks : tuple of str
        Why a route was left for another, without repeats.
    """

    left: torch.Tensor
    right: torch.Tensor
    null_directions: int
    backends: tuple[str, ...]
    fallbacks: tuple[str, ...] = ()


def spectral_merge(
    subspaces: Sequence[Subspace],
    weights: Sequence[float],
    *,
    tolerance: float = math.inf,
    polar: PolarBackend = "mixed",
) -> SpectralMerge:
    """Combine leading subspaces as TSV-M does.

    Parameters
    ----------
    subspaces : sequence of Subspace
        One per expert, of one m x n; some may have rank 0. Ranks should sum to at most
        min(m, n); past it the polar factors drop the surplus directions.
    weights : sequence of float
        Multiplies each expert's singular values.
    tolerance, polar
        The tolerance and the backend of `polar_factor`.

    Returns
    -------
    SpectralMerge
        M = polar([U_1 .. U_T]) diag(w_t S_t) polar([V_1 .. V_T])^T.

    Notes
    -----
    Source: TSV-M, arXiv 2412.00081, section 4; the polar form of its two orthogonalising SVDs.
    """
    left = polar_factor([s.left for s in subspaces], tolerance=tolerance, backend=polar)
    right = polar_factor([s.right for s in subspaces], tolerance=tolerance, backend=polar)
    scale = torch.cat([s.values * w for s, w in zip(subspaces, weights, strict=True)])
    dtype = torch.promote_types(left.basis.dtype, right.basis.dtype)
    # The size is taken out and goes in half on either side: nothing leaves float32's range.
    exponent = math.frexp(float(scale.abs().max()) if scale.numel() else 0.0)[1]
    core = left.mixing.to(dtype) * times_power_of_two(scale, -exponent).to(dtype)
    core = core @ right.mixing.to(dtype).T
    core.mul_(math.ldexp(1.0, exponent - exponent // 2))
    steps: list[Subspace | PolarFactor] = [*subspaces, left, right]
    return SpectralMerge(
        left=left.basis.to(dtype) @ core,
        right=right.basis.to(dtype).mul_(math.ldexp(1.0, exponent // 2)),
        null_directions=left.null_directions + right.null_directions,
        backends=tuple(dict.fromkeys(step.backend for step in steps)),
        fallbacks=tuple(dict.fromkeys(step.fallback for step in steps if step.fallback)),
    )


def equalise(delta: Delta) -> tuple[SpectralMerge, int]:
    """Replace every non-zero singular value of a matrix by the mean over all of them.

    Parameters
    ----------
    delta : Tensor, m x n, or FactoredDelta
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
        left=subspace.left * mean,
        right=subspace.right,
        null_directions=smaller - subspace.rank,
        backends=(subspace.backend,),
        fallbacks=(subspace.fallback,) if subspace.fallback else (),
    )
    return merge, subspace.rank
