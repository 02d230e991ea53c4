"""The polar factor: the nearest matrix with orthonormal columns, on the range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NULL = 1e-6
"""Singular values at or below this share of the largest are null: float32 data do not fix them."""

PANEL_RANGE = 1e-9
"""Smallest eigenvalue ratio that is read from a float64 Gram matrix; below it, an SVD."""


@dataclass(frozen=True)
class PolarFactor:
    """The polar factor of an m x K panel as the product `panel @ whitener`.

    Attributes
    ----------
    whitener : Tensor, K x K, float64
        Symmetric inverse square root of panel^T panel on its range.
    null_directions : int
        Dimensions of the panel's null space; there the factor is zero, where a textbook SVD
        would return an arbitrary direction.
    backend : str
        `gram-fp64` or `svd-fp64`.
    """

    whitener: torch.Tensor
    null_directions: int
    backend: str


def polar_factor(panel: torch.Tensor) -> PolarFactor:
    """Whiten a panel so that `panel @ whitener` is its polar factor.

    Parameters
    ----------
    panel : Tensor, m x K, float64
        Any K, also K = 0; need not have full rank.

    Notes
    -----
    polar(U) = U (U^T U)^(-1/2). Forming the Gram matrix squares the condition number: with
    sigma_min ~ 1/n at full rank the factor errs by about eps64 * n^2. Directions with singular
    values below `NULL` times the largest are dropped (equal experts make K / 2 of them).
    """
    eigenvalues, vectors = torch.linalg.eigh(panel.T @ panel)
    if eigenvalues.numel() == 0:
        return PolarFactor(vectors, 0, "gram-fp64")
    values = eigenvalues.clamp(min=0.0).sqrt_()
    backend = "gram-fp64"
    largest = float(eigenvalues[-1])
    doubtful = (eigenvalues < PANEL_RANGE * largest) & (eigenvalues > NULL * NULL * largest)
    if bool(doubtful.any()):
        _, values, rows = torch.linalg.svd(panel, full_matrices=False)
        vectors, backend = rows.T, "svd-fp64"
    in_range = values > NULL * values.max()
    basis = vectors[:, in_range]
    whitener = (basis / values[in_range]) @ basis.T
    return PolarFactor(whitener, int((~in_range).sum()), backend)
