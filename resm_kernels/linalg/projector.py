"""The leading eigenspace of a positive semi-definite matrix by Cholesky and products alone.

For devices on which products are two orders of magnitude faster than eigen-decompositions; on a
CPU it is slower than `eigen`.
"""

from __future__ import annotations

import torch

from resm_kernels.linalg.express import orthonormalise

AIM = 1.10
"""The projector aims at this multiple of the rank: the cut itself is made exactly afterwards."""
ENOUGH, TOO_MUCH = 1.02, 1.5
"""Traces of the projector, over the rank, between which it is accepted."""
ATTEMPTS = 6
RESOLUTION = 1e-3
"""Relative distance from the shift below which the sign of an eigenvalue is left undecided."""
OVERSAMPLING = 16
SMALLEST = 1e-13
"""Least shift over the largest eigenvalue: the shifted matrix still has a Cholesky factor."""
BREAKDOWN = 1e-12
PROBES, STEPS = 8, 80
"""Lanczos runs and their length, for the first guess of the shift."""
GUESSING = 8 * 4 * PROBES * STEPS**2
"""Bytes that the guess holds: tridiagonal matrices, and their eigenvectors."""


def leading_eigenspace(matrix: torch.Tensor, count: int) -> torch.Tensor | None:
    """Orthonormal eigenvectors of the `count` largest eigenvalues.

    Parameters
    ----------
    matrix : Tensor, n x n, float64
        Symmetric positive semi-definite, not zero.
    count : int
        1 to n.

    Returns
    -------
    Tensor, n x count, float64, descending eigenvalues; or None
        None where no shift gave a projector whose trace is between `ENOUGH` and `TOO_MUCH` times
        the count: a repeated eigenvalue near the cut, or fewer non-zero eigenvalues than asked
        for. The caller then takes another route.

    Notes
    -----
    X = sign((G + mu I)^-1 (G - mu I)) with mu a little below the eigenvalue at the cut: the
    Moebius map takes out the dynamic range (one Cholesky), Polar Express finds the sign,
    P = (I + X) / 2, in float32, projects on the eigenvalues above mu. An orthonormal basis Q of
    P Omega holds the wanted space; the eigenvectors of Q^T G Q, a third or so of the size, cut it
    exactly.
    Ours; the parts are Nakatsukasa and Freund, SIAM Review 58(3), and arXiv 2505.16932.
    """
    n = matrix.shape[0]
    wanted = min(n, round(AIM * count))
    shift = _quantile(matrix, wanted)
    low, high = 0.0, float("inf")
    for _ in range(ATTEMPTS):
        shifted = matrix.clone()
        shifted.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed):
            return None
        mapped = torch.cholesky_inverse(factor, out=shifted).mul_(-2.0 * shift)
        mapped.diagonal().add_(1.0)
        sign = orthonormalise(mapped.to(torch.float32), RESOLUTION).to(matrix.dtype)
        trace = (n + float(sign.diagonal().sum())) / 2
        if ENOUGH * count <= trace <= TOO_MUCH * count or (trace >= count and wanted == n):
            sign.diagonal().add_(1.0)  # twice the projector
            return _cut(matrix, sign, trace, count)
        if trace < wanted:
            high = shift
        else:
            low = shift
        shift = (low * high) ** 0.5 if low and high < float("inf") else shift * (trace / wanted)
    return None


def _cut(matrix: torch.Tensor, projector: torch.Tensor, trace: float, count: int) -> torch.Tensor:
    n = matrix.shape[0]
    columns = min(n, round(trace) + OVERSAMPLING)
    basis, _ = torch.linalg.qr(projector @ _gaussian(n, columns, matrix))
    _, vectors = torch.linalg.eigh(basis.T @ (matrix @ basis))
    leading: torch.Tensor = basis @ vectors[:, columns - count :].flip(1)
    return leading


def _quantile(matrix: torch.Tensor, rank: int) -> float:
    """About the `rank`-th largest eigenvalue, from a stochastic Lanczos density of states."""
    n = matrix.shape[0]
    steps = min(STEPS, n)
    vector = torch.nn.functional.normalize(_gaussian(n, PROBES, matrix), dim=0)
    before, beta = torch.zeros_like(vector), vector.new_zeros(PROBES)
    diagonal, off = [], []
    for _ in range(steps):
        following = matrix @ vector - beta * before
        alpha = (following * vector).sum(dim=0)
        following -= alpha * vector
        beta = following.norm(dim=0)
        # A run that has seen a whole invariant space ends: its remaining nodes get no weight.
        beta = torch.where(beta > BREAKDOWN * alpha.abs(), beta, 0.0)
        diagonal.append(alpha)
        off.append(beta)
        before, vector = vector, torch.where(beta > 0.0, following / beta, 0.0)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
    if steps > 1:
        beside = torch.stack(off[:-1], dim=1)
        tridiagonal += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal.cpu())  # small; a GPU's cumsum varies
    weights = vectors[:, 0, :].square().flatten() / PROBES
    nodes, order = nodes.flatten().sort(descending=True)
    above = weights[order].cumsum(0)
    place = int((above < rank / n).sum().clamp(max=nodes.numel() - 1))
    return max(float(nodes[place]), float(nodes[0]) * SMALLEST)


def _gaussian(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """The same numbers in every run on one kind of device."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=like.device)
