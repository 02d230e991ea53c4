"""What a merge did to the deltas of one weight: norms, retention, overlap, spectra."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from resm_kernels.engine.result import Measures
from resm_kernels.linalg import FactoredDelta
from resm_kernels.methods import Inputs, Merged
from resm_kernels.ops.dtypes import chunk_on, chunks
from resm_kernels.ops.gram import gram

POINTS = 64
"""Most values kept of one spectrum."""
ALL_POINTS = 2_000_000
"""Most values kept of all spectra of a merge: 30 MB of JSON."""


def spectrum_points(tensors: int, experts: int) -> int:
    """How many values of every spectrum a report of so many tensors keeps."""
    return max(2, min(POINTS, ALL_POINTS // max(1, tensors * (experts + 1))))


def measure(inputs: Inputs, merged: Merged, points: int) -> Measures | None:
    """Measure a merged weight as it will be stored; None where a number leaves float64's range.

    Parameters
    ----------
    inputs : Inputs
        What was merged.
    merged : Merged
        On the device of the inputs.
    points : int
        Values to keep of every spectrum.

    Notes
    -----
    One reading of base, experts and result, in float64: memory-bound, where factoring is not.
    """
    products = delta_products(inputs.base, [merged.tensor, *inputs.experts]).cpu()
    norm = float(gram([inputs.base], columns=inputs.base.numel())[0, 0, 0])
    if not (bool(torch.isfinite(products).all()) and math.isfinite(norm)):
        return None
    squares = products.diagonal().tolist()
    across = products[0, 1:].tolist()
    count = len(inputs.experts)
    at = spectrum_positions(max((len(s) for s in merged.spectra), default=0), points)
    return Measures(
        base_norm=rounded(math.sqrt(norm)),
        merged_norm=rounded(math.sqrt(squares[0])),
        delta_norms=tuple(rounded(math.sqrt(square)) for square in squares[1:]),
        retentions=tuple(
            rounded(product / square) if square else None
            for product, square in zip(across, squares[1:], strict=True)
        ),
        cosines=tuple(
            rounded(cosine(products, t, u))
            for t in range(1, count + 1)
            for u in range(t + 1, count + 1)
        ),
        interference=None if merged.interference is None else rounded(merged.interference),
        overlaps=tuple(map(rounded, merged.overlaps)),
        spectrum_at=at,
        spectra=tuple(
            tuple(map(rounded, values[[i - 1 for i in at if i <= len(values)]].tolist()))
            for values in merged.spectra
        ),
    )


def delta_products(
    base: torch.Tensor, weights: Iterable[torch.Tensor | FactoredDelta]
) -> torch.Tensor:
    """The inner products of the changes of several weights to one base.

    Parameters
    ----------
    weights : iterable of Tensor or FactoredDelta
        Whole weights of the base's shape and device, or changes as factors.

    Returns
    -------
    Tensor, k x k, float64
        Changes that are given as factors are formed a few rows at a time.
    """
    weights = list(weights)
    whole = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if len(whole) == len(weights):
        return gram(whole, base=base, columns=base.numel())[0]
    total = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=base.device)
    rows, columns = base.shape
    for part in chunks(rows, max(1, chunk_on(base.device.type) // max(1, columns))):
        origin = base[part].double()
        pieces = [
            weight[part]
            if isinstance(weight, torch.Tensor)
            else torch.addmm(origin, weight.left[part].double(), weight.right.double().T)
            for weight in weights
        ]
        total += gram(pieces, base=origin, columns=origin.numel())[0]
    return total


def cosine(products: torch.Tensor, t: int, u: int) -> float:
    """The cosine between two changes; 0 where one of them is zero."""
    norms = math.sqrt(float(products[t, t])) * math.sqrt(float(products[u, u]))
    return max(-1.0, min(1.0, float(products[t, u]) / norms)) if norms else 0.0


def spectrum_positions(count: int, points: int) -> tuple[int, ...]:
    """Places in a spectrum of `count` values to keep, from 1, log-spaced, both ends included."""
    if count <= points:
        return tuple(range(1, count + 1))
    steps = (round(count ** (i / (points - 1))) for i in range(points))
    return tuple(dict.fromkeys(steps))


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
