"""The polar factor of panels of orthonormal columns: the nearest orthonormal matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from resm_kernels.linalg import dispatch
from resm_kernels.linalg.express import orthonormalise

NULL = 1e-6
"""Singular values at or below this share of the largest are null: float32 data do not fix them."""
PANEL_RANGE = 1e-9
"""Smallest eigenvalue ratio that is read from a float64 Gram matrix; below it, an SVD."""
SMALL = 256
"""Panels of up to this many columns are whitened in float64: it costs nothing there."""
WEAK = 0.35
"""Singular values below this share of the largest have their couplings corrected: float32
eigenvectors mix them."""
WEAKEST = 0.03
"""Singular values below this share of the largest have their columns computed in float64."""
UNSAFE = 2e-5
"""Smallest singular value that the mixed-precision route takes on."""
COUPLING = 1e-3
"""Largest length of a weak column's cosines with the others: its square is what stays wrong."""
EXPRESS_RANGE = 1e-4
"""Smallest singular value, over the largest, that the products-only route brings to 1."""
ORTHONORMAL = 1e-6
"""Largest entry of |X^T X - I| with which it passes."""

PolarBackend = Literal["mixed", "express", "fp64", "textbook"]


@dataclass(frozen=True)
class PolarFactor:
    """polar(U) = basis @ mixing, the m x K polar factor of an m x K panel.

    Attributes
    ----------
    basis : Tensor, m x k
        U times its right singular vectors; k is K less the null directions.
    mixing : Tensor, k x K
        Takes the basis to the factor.
    null_directions : int
        Dimensions of the panel's null space; there the factor is zero, where a textbook SVD
        would return an arbitrary direction.
    backend : str
        `polar-mixed`, `polar-express`, `polar-fp64`, `polar-svd` or `polar-textbook`.
    fallback : str or None
        Why the route asked for was left, where it was.
    """

    basis: torch.Tensor
    mixing: torch.Tensor
    null_directions: int
    backend: str
    fallback: str | None = None


def polar_factor(
    panels: Sequence[torch.Tensor],
    *,
    tolerance: float = math.inf,
    backend: PolarBackend = "mixed",
) -> PolarFactor:
    """Whiten the concatenation of panels.

    Parameters
    ----------
    panels : sequence of Tensor, m x r_t
        Each with orthonormal columns; K = sum r_t may be 0, or pass m.
    tolerance : float
        The relative error that mixed precision may have by its own estimate; past it the panels
        are whitened in float64.
    backend : str
        `mixed`, `express` (matrix products alone, in float64), `fp64`, or `textbook`: an SVD in
        float32, null directions included. The first two give way to `fp64` where their own
        checks fail, and up to `SMALL` columns.

    Returns
    -------
    PolarFactor
        float32 from the mixed and textbook routes, float64 from the others.

    Notes
    -----
    polar(U) = U (U^T U)^(-1/2). Forming the Gram matrix squares the condition number: with
    sigma_min ~ 1/n at full rank float32 would leave errors of 1e-2. In float64 the factor errs
    by about eps64 / sigma_min^2. The mixed route takes the eigenvectors E of U^T U in float32
    and then looks at U E itself: its columns are nearly orthogonal, their small couplings are
    measured to float32 accuracy *relative to the columns*, and corrected to first order; the
    weakest columns are computed and separated in float64. What is left errs as rounding U to
    float32 would (docs/numerics.md). Directions with singular values below `NULL` times the
    largest are dropped (equal experts make K / 2 of them).
    """
    if backend == "textbook":
        return _textbook(torch.cat(list(panels), dim=1))
    reason = None
    if backend != "fp64" and sum(panel.shape[1] for panel in panels) > SMALL:
        try:
            return _express(panels) if backend == "express" else _mixed(panels, tolerance)
        except _Declined as declined:
            reason = f"{backend} polar factor: {declined}"
    factor = _double(torch.cat(list(panels), dim=1).to(torch.float64))
    return replace(factor, fallback=dispatch.joined(reason, factor.fallback))


class _Declined(Exception):
    """A route measured that it is not good enough here."""


def _mixed(panels: Sequence[torch.Tensor], tolerance: float) -> PolarFactor:
    panel = torch.cat([p.to(torch.float32) for p in panels], dim=1)
    values, vectors, failed = dispatch.eigh(_cross_gram(panel, panels))
    sigma = values.clamp_(min=0.0).sqrt_()
    weak, weakest = (int((sigma < share * sigma[-1]).sum()) for share in (WEAK, WEAKEST))
    if weakest > panel.shape[1] // 4:
        raise _Declined(
            f"{weakest} of {panel.shape[1]} singular values below {WEAKEST} of the largest"
        )
    error = _estimated_error(sigma, weakest)
    if error > tolerance:
        raise _Declined(f"estimated error {error:.1e} above {tolerance:.1e}")
    basis = panel @ vectors
    del panel
    if weakest:
        _separate_weakest(basis, vectors, sigma, panels, weakest)
    mixing = vectors.T.contiguous()
    del vectors
    if not weak:
        return PolarFactor(basis, mixing.div_(sigma[:, None]), 0, "polar-mixed", failed)

    products = basis[:, :weak].T @ basis  # [weak, K]
    sigma[:weak] = products.diagonal().sqrt()
    smallest = float(sigma.min())
    if not smallest > UNSAFE:
        raise _Declined(f"smallest singular value {smallest:.1e}")
    cosines = products.div_(sigma[:weak, None]).div_(sigma)
    cosines.diagonal().zero_()
    coupling = float(cosines.square().sum(dim=1).max().sqrt())
    if not coupling <= COUPLING:
        raise _Declined(f"weak columns coupled to the others by {coupling:.1e}")
    correction = cosines.div_(sigma[:weak, None] + sigma)
    weak_rows = correction @ mixing
    strong_rows = correction[:, weak:].T @ mixing[:weak]
    mixing.div_(sigma[:, None])
    mixing[:weak] -= weak_rows
    mixing[weak:] -= strong_rows
    return PolarFactor(basis, mixing, 0, "polar-mixed", failed)


def _separate_weakest(
    basis: torch.Tensor,
    vectors: torch.Tensor,
    sigma: torch.Tensor,
    panels: Sequence[torch.Tensor],
    weakest: int,
) -> None:
    """Recompute the leading `weakest` columns of U E in float64, orthogonal to the others.

    Float32 eigenvectors mix columns by about 1e-7 / (lambda_i - lambda_j), which is much beside
    a column of norm 1e-4. One step of rotation between the weakest columns and the others takes
    the mixing out, of U E and of E.
    """
    weak_vectors = vectors[:, :weakest].to(torch.float64)
    found = torch.zeros_like(basis[:, :weakest], dtype=torch.float64)
    for rows, panel in _rows_of(panels):
        found.addmm_(panel.to(torch.float64), weak_vectors[rows])
    strong, strong_vectors = basis[:, weakest:], vectors[:, weakest:]
    angles = strong.T @ found.to(torch.float32)
    # Between columns of about one length the angle is not defined; what is left of their coupling
    # is small beside both and falls to the first-order correction.
    lengths = sigma[weakest:, None].square()
    angles /= torch.maximum(lengths - sigma[:weakest].square(), lengths / 2)
    weak_columns, weak_before = found.to(torch.float32), weak_vectors.to(torch.float32)
    found -= strong @ angles
    weak_vectors -= strong_vectors @ angles
    strong.addmm_(weak_columns, angles.T)
    strong_vectors.addmm_(weak_before, angles.T)
    _, rotation = torch.linalg.eigh(found.T @ found)
    basis[:, :weakest] = found @ rotation
    vectors[:, :weakest] = weak_vectors @ rotation


def _express(panels: Sequence[torch.Tensor]) -> PolarFactor:
    columns = sum(panel.shape[1] for panel in panels)
    if columns > panels[0].shape[0]:
        raise _Declined("more columns than rows")
    # Panels of orthonormal columns have singular values of at most the root of their number.
    largest = math.sqrt(len(panels)) * (1 + 1e-5)
    doubles = (panel.to(torch.float64) for panel in panels)
    # What goes in has no name here, so that the first step frees it.
    basis = orthonormalise(torch.cat([*doubles], dim=1).div_(largest), EXPRESS_RANGE)
    eye = torch.eye(columns, dtype=basis.dtype, device=basis.device)
    defect = float((basis.T @ basis - eye).abs().max())
    if not defect <= ORTHONORMAL:
        raise _Declined(f"columns orthonormal to {defect:.1e} only")
    return PolarFactor(basis, eye, 0, "polar-express")


def _textbook(panel: torch.Tensor) -> PolarFactor:
    left, _, right = torch.linalg.svd(panel.to(torch.float32), full_matrices=False)
    return PolarFactor(left, right, 0, "polar-textbook")


def _cross_gram(panel: torch.Tensor, panels: Sequence[torch.Tensor]) -> torch.Tensor:
    """U^T U for panels that are orthonormal by themselves: only the blocks between them."""
    product = torch.eye(panel.shape[1], dtype=panel.dtype, device=panel.device)
    for rows, _ in _rows_of(panels):
        rest = slice(rows.stop, None)
        block = panel[:, rows].T @ panel[:, rest]
        product[rows, rest] = block
        product[rest, rows] = block.T
    return product


def _rows_of(panels: Sequence[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    start = 0
    for panel in panels:
        yield slice(start, start + panel.shape[1]), panel
        start += panel.shape[1]


def _estimated_error(sigma: torch.Tensor, weakest: int) -> float:
    """What the mixed route's float32 arithmetic leaves of error, relative, for K >> 1.

    A perturbation e of the entries of U E, inside its range, moves its polar factor by
    e / (sigma_i + sigma_j); e grows with the largest value, and the weakest columns carry none of
    their own. The constant makes it the error measured for three independent experts.
    """
    strong = sigma[weakest:]
    gains = (strong[:, None] + strong).reciprocal_().square_().mean()
    scale = torch.finfo(torch.float32).eps * math.sqrt(sigma.numel()) * sigma[-1] / math.sqrt(3)
    return float(scale * gains.sqrt())


def _double(panel: torch.Tensor) -> PolarFactor:
    values, vectors, failed = dispatch.eigh(panel.T @ panel)
    if values.numel() == 0:
        return PolarFactor(panel, vectors, 0, "polar-fp64")
    sigma, backend, largest = values.clamp(min=0.0).sqrt_(), "polar-fp64", float(values[-1])
    doubtful = (values < PANEL_RANGE * largest) & (values > NULL * NULL * largest)
    if bool(doubtful.any()):
        _, sigma, rows, by_torch = dispatch.svd(panel)
        vectors, backend = rows.T, "polar-svd"
        span = "fp64 polar factor: singular values span more than a Gram matrix holds"
        failed = dispatch.joined(failed, span, by_torch)
    in_range = sigma > NULL * sigma.max()
    sigma, vectors = sigma[in_range], vectors[:, in_range]
    dropped = panel.shape[1] - sigma.numel()
    return PolarFactor(panel @ (vectors / sigma), vectors.T, dropped, backend, failed)
