"""Polar factors by matrix products alone: the best quintic of every step (Polar Express)."""

from __future__ import annotations

import functools

import numpy as np
import torch

SAFETY = 1.02
"""Every step after the first is made for an interval wider by this: rounding may leave it."""
POLISH = 1e-3
"""Once all singular values are this near 1, the Newton-Schulz quintic finishes, cubically."""
NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)

Quintic = tuple[float, float, float]


def best_quintic(lower: float, upper: float) -> tuple[Quintic, float]:
    """The odd quintic a x + b x^3 + c x^5 nearest to 1 on [lower, upper], and its largest error.

    Notes
    -----
    Remez exchange: the error takes its extreme value with alternating signs at four points, the
    two ends and the two roots of the derivative between them.
    """
    points = np.linspace(lower, upper, 4)
    a = b = c = error = 0.0
    for _ in range(100):
        powers = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = np.linalg.solve(powers, np.ones(4)).tolist()
        root = np.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sqrt(np.clip([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)], 0, None))
        moved = np.array([lower, *sorted(np.clip(inner, lower, upper)), upper])
        if np.allclose(moved, points, rtol=1e-12, atol=0):
            break
        points = moved
    return (a, b, c), abs(error)


@functools.cache
def schedule(lower: float) -> tuple[Quintic, ...]:
    """The steps that take singular values in [lower, 1] to 1, to float64 accuracy at the end.

    Parameters
    ----------
    lower : float
        In (0, 1). Values below it end between 0 and 1.

    Notes
    -----
    Amsel et al., "The Polar Express", arXiv 2505.16932: the composition of greedily best
    polynomials is the best composition.
    """
    steps: list[Quintic] = []
    low, high = lower, 1.0
    while 1.0 - low > POLISH or high - 1.0 > POLISH:
        (a, b, c), error = best_quintic(low, high * SAFETY if len(steps) else high)
        steps.append((a, b, c))
        low, high = 1.0 - error, 1.0 + error
    return (*steps, NEWTON_SCHULZ, NEWTON_SCHULZ)


def orthonormalise(matrix: torch.Tensor, lower: float) -> torch.Tensor:
    """The polar factor of a matrix with singular values in [lower, 1].

    Parameters
    ----------
    matrix : Tensor, m x k, m >= k, float32 or float64
        For a symmetric matrix the result is its sign.
    lower : float
        Smaller singular values than this are not brought to 1 all the way.

    Returns
    -------
    Tensor, m x k
        The dtype of the input, in whose precision every step is computed: plain tf32 or bf16 in
        the first steps leaves errors of 2.5e-3 or NaN that later steps do not repair.
    """
    for a, b, c in schedule(lower):
        square = matrix.T @ matrix
        inner = torch.addmm(square, square, square, beta=b, alpha=c)
        matrix = torch.addmm(matrix, matrix, inner, beta=a)
    return matrix
