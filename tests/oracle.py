"""The methods in NumPy and float64, and the float32 textbook; no code shared with the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Matrix = npt.NDArray[np.floating]


def rank_of(values: Matrix, longest: int) -> int:
    """Singular values that float32 data can tell from zero (the package's documented rule)."""
    if values.size == 0 or values[0] == 0:
        return 0
    return int((values > np.sqrt(longest) * np.finfo(np.float32).eps * values[0]).sum())


def polar(panel: Matrix) -> Matrix:
    """Polar factor on the range: null directions, below 1e-6 of the largest, stay zero."""
    if panel.shape[1] == 0:
        return panel
    u, s, vt = np.linalg.svd(panel, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept] @ vt[kept]


def clamped(deltas: Sequence[Matrix], rank: int) -> list[int]:
    """The rank of every expert, at most its numerical rank."""
    values = [np.linalg.svd(delta.astype(np.float64), compute_uv=False) for delta in deltas]
    return [min(rank, rank_of(s, max(deltas[0].shape))) for s in values]


def tsvm(
    deltas: Sequence[Matrix], ranks: Sequence[int], weights: Sequence[float] | None = None
) -> Matrix:
    """polar(U) diag(w S) polar(V)^T by singular value decompositions, ranks clamped."""
    us, ss, vs = [], [], []
    for t, delta in enumerate(deltas):
        u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        r = min(ranks[t], rank_of(s, max(delta.shape)))
        us.append(u[:, :r])
        ss.append(s[:r] * (1.0 if weights is None else weights[t]))
        vs.append(vt[:r].T)
    left, right = np.concatenate(us, axis=1), np.concatenate(vs, axis=1)
    return (polar(left) * np.concatenate(ss)) @ polar(right).T


def textbook(deltas: Sequence[torch.Tensor], ranks: Sequence[int]) -> torch.Tensor:
    """TSV-M as published, five float32 SVDs: one to truncate each delta, two to orthogonalise.

    In torch, since NumPy computes float32 SVDs in float64. Ranks must be numerical ranks at most.
    """
    us, ss, vs = [], [], []
    for t, delta in enumerate(deltas):
        u, s, vt = torch.linalg.svd(delta.float(), full_matrices=False)
        us.append(u[:, : ranks[t]])
        ss.append(s[: ranks[t]])
        vs.append(vt[: ranks[t]])
    left, _, left_t = torch.linalg.svd(torch.cat(us, 1), full_matrices=False)
    right, _, right_t = torch.linalg.svd(torch.cat(vs, 0), full_matrices=False)
    return (left @ left_t) * torch.cat(ss) @ (right @ right_t)


def iso_c(deltas: Sequence[Matrix]) -> Matrix:
    """mean(sigma) * polar(sum of deltas), on the range."""
    total = np.sum([delta.astype(np.float64) for delta in deltas], axis=0)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    r = rank_of(s, max(total.shape))
    return s.mean() * (u[:, :r] @ vt[:r])


def iso_cts(deltas: Sequence[torch.Tensor], common_space: float = 0.8) -> torch.Tensor:
    """Iso-CTS by SVDs, as published, in the deltas' dtype; null directions of a delta left out."""
    p, longest = min(deltas[0].shape), max(deltas[0].shape)
    own = min(round((p - int(p * common_space)) / len(deltas)), p // len(deltas))
    common = p - own * len(deltas)

    def leading(matrix: torch.Tensor, count: int, floor: float) -> tuple[torch.Tensor, ...]:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        kept = min(count, int((s > floor).sum()))
        return u[:, :kept], s[:kept], vt[:kept]

    def floor_of(matrix: torch.Tensor) -> float:
        largest = float(torch.linalg.matrix_norm(matrix, 2))
        return longest**0.5 * torch.finfo(torch.float32).eps * largest

    total = torch.stack(list(deltas)).sum(0)
    spaces = [leading(total, common, floor_of(total))]
    u = spaces[0][0]
    spaces += [leading(delta - u @ (u.T @ delta), own, floor_of(delta)) for delta in deltas]
    us, ss, vts = (torch.cat([space[i] for space in spaces], (1, 0, 0)[i]) for i in range(3))
    left, _, left_t = torch.linalg.svd(us, full_matrices=False)
    right, _, right_t = torch.linalg.svd(vts, full_matrices=False)
    return ss.sum() / p * (left @ left_t) @ (right @ right_t)


def error(merged: Matrix, reference: Matrix) -> float:
    """Relative error in the Frobenius norm; absolute where the reference is zero."""
    scale = np.linalg.norm(reference)
    return float(np.linalg.norm(merged - reference) / (scale if scale > 0 else 1.0))


def spectrum(kind: str, p: int) -> Matrix:
    """Singular values of the named shape, descending from 1."""
    i = np.arange(p)
    return {
        "power": (i + 1.0) ** -0.8,
        "exponential": np.exp(-6.0 * i / p),
        "steep": np.exp(-40.0 * i / p),
        "flat": np.ones(p),
    }[kind]


def make_delta(kind: str, m: int, n: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A float32 delta: Gaussian `noise`, exact rank-4 `lora`, or a named spectrum.

    The `bf16` kinds are the difference of two weights stored in bfloat16, as checkpoints have
    them: of a rank-16 change (`lora16-bf16`) or of Gaussian noise (`noise-bf16`).
    """
    p = min(m, n)
    if kind.endswith("bf16"):
        base = torch.from_numpy(0.02 * rng.standard_normal((m, n))).bfloat16()
        if kind == "noise-bf16":
            change = 1e-3 * rng.standard_normal((m, n))
        else:
            change = 5e-4 * rng.standard_normal((m, 16)) @ rng.standard_normal((16, n))
        expert = (base.double() + torch.from_numpy(change)).bfloat16()
        return (expert.float() - base.float()).numpy()
    if kind == "noise":
        return rng.standard_normal((m, n)).astype(np.float32)
    if kind == "lora":
        r = min(4, p)
        factors = rng.standard_normal((m, r)) @ rng.standard_normal((r, n))
        return factors.astype(np.float32)
    u, _ = np.linalg.qr(rng.standard_normal((m, p)))
    v, _ = np.linalg.qr(rng.standard_normal((n, p)))
    return ((u * spectrum(kind, p)) @ v.T).astype(np.float32)
