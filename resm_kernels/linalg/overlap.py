"""How much the leading singular subspaces of several matrices overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resm_kernels.linalg.subspace import Subspace, times_power_of_two

LEADING = 64
"""Leading directions of each matrix that are compared: 1 % of a merge's work at most."""


@dataclass(frozen=True)
class Overlap:
    """How much subspaces overlap.

    Attributes
    ----------
    interference : float
        ||(U^T U - I) S (V^T V - I)||_1 over what it is for random directions of the same
        singular values: 0 where the subspaces are orthogonal, about 1 where they share no more
        than chance, and more where experts changed the same directions.
    pairs : tuple of float
        For every pair t < u the mean squared cosine of the principal angles between the two
        subspaces, left and right sides in geometric mean: 0 orthogonal, 1 equal.
    """

    interference: float
    pairs: tuple[float, ...]


def subspace_overlap(
    subspaces: Sequence[Subspace],
    weights: Sequence[float] | None = None,
    *,
    leading: int = LEADING,
) -> Overlap:
    """Compare the leading directions of several matrices.

    Parameters
    ----------
    subspaces : sequence of Subspace
        Of one m x n; some may have rank 0.
    weights : sequence of float, optional
        Multiply the singular values; their signs do not count.
    leading : int
        The most directions of each.

    Notes
    -----
    U = [U_1 .. U_T] and V hold the leading columns, S their weighted singular values. The measure
    is TSV-M's singular task interference (arXiv 2412.00081). Chance grows with the number of
    directions and falls with the size of the matrix, so that only its multiple compares across
    layers: cosines of random directions have variance 1 / m and 1 / n, and so an entry of the
    product between experts a and b has mean size sqrt(2 / (pi m n) sum_c ||S_c||^2) over all
    other experts c (ours). Pairs overlap by about q / min(m, n) by chance.
    """
    kept = [min(s.rank, leading) for s in subspaces]
    scales = [
        s.values[:count].double() * abs(weight)
        for s, count, weight in zip(subspaces, kept, weights or [1.0] * len(kept), strict=True)
    ]
    left, right = (
        _products([side[:, :count] for side, count in zip(sides, kept, strict=True)])
        for sides in ([s.left for s in subspaces], [s.right for s in subspaces])
    )
    # The size cancels: it is taken out first, so that no square leaves float64's range.
    on_host = [scale.cpu() for scale in scales]
    size = max((float(scale.max()) for scale in on_host if scale.numel()), default=0.0)
    exponent = math.frexp(size)[1]
    squares = [float(times_power_of_two(scale, -exponent).square().sum()) for scale in on_host]
    rows, columns = subspaces[0].left.shape[0], subspaces[0].right.shape[0]
    chance = sum(
        kept[a] * kept[b] * math.sqrt(sum(sq for c, sq in enumerate(squares) if c not in (a, b)))
        for a, b in itertools.product(range(len(kept)), repeat=2)
    ) * math.sqrt(2 / (math.pi * max(1, rows * columns)))
    scale = times_power_of_two(torch.cat(scales), -exponent)
    interference = float(((left * scale) @ right).abs().sum()) / chance if chance else 0.0
    ends = list(itertools.accumulate(kept, initial=0))
    blocks = [slice(*ends[t : t + 2]) for t in range(len(kept))]
    pairs = []
    for one, other in itertools.combinations(range(len(kept)), 2):
        shorter = min(kept[one], kept[other])
        shared = [float(g[blocks[one], blocks[other]].square().sum()) for g in (left, right)]
        pairs.append(math.sqrt(shared[0] * shared[1]) / shorter if shorter else 0.0)
    return Overlap(interference, tuple(pairs))


def _products(panels: Sequence[torch.Tensor]) -> torch.Tensor:
    """U^T U - I in float64."""
    panel = torch.cat([p.double() for p in panels], dim=1)
    products = panel.T @ panel
    products.diagonal().sub_(1.0)
    return products
