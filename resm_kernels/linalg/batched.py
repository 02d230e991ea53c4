"""Many small weights of one shape at once: expert stacks, heads, narrow projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resm_kernels.linalg import dispatch
from resm_kernels.linalg.polar import NULL, PANEL_RANGE
from resm_kernels.linalg.spectral import SpectralMerge
from resm_kernels.linalg.subspace import GRAM_RANGE, Subspace, rank_tolerance


@dataclass(frozen=True)
class SubspaceBatch:
    """The leading singular triplets of T deltas of each of B weights, float64.

    Attributes
    ----------
    left, values, right : Tensor, B x T x m x r, B x T x r and B x T x n x r
        Zero past a delta's own rank.
    ranks, numerical_ranks : list of B lists of T int
        Triplets kept, and the rank of each delta by `numerical_rank`.
    doubtful : list of B bool
        Weights to be merged singly: a delta is not finite, or its spectrum spans more than a
        float64 Gram matrix holds.
    fallback : str or None
        Why a solver of ours was left for torch's, where it was, for all of them.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    ranks: list[list[int]]
    numerical_ranks: list[list[int]]
    doubtful: list[bool]
    fallback: str | None = None

    def subspaces(self, b: int) -> list[Subspace]:
        """Those of one weight, views of the batch."""
        return [
            Subspace(
                self.left[b, t, :, :rank],
                self.values[b, t, :rank],
                self.right[b, t, :, :rank],
                known,
                "gram-batched",
                self.fallback,
            )
            for t, (rank, known) in enumerate(
                zip(self.ranks[b], self.numerical_ranks[b], strict=True)
            )
        ]


def leading_subspaces_batch(
    deltas: torch.Tensor, ranks: torch.Tensor, *, energy: float | None = None
) -> SubspaceBatch:
    """`leading_subspaces` of B x T deltas by Gram matrices, every step one batched call.

    Parameters
    ----------
    deltas : Tensor, B x T x m x n
        Finite, any float dtype.
    ranks : Tensor, B x T, int64, on the CPU
        The most triplets to keep of each.
    energy : float, optional
        As in `leading_subspaces`.

    Notes
    -----
    The mathematics and accuracy of `exact`, in other orders of summation: the bytes differ from
    those of one delta at a time.
    """
    rows, columns = deltas.shape[-2:]
    if columns > rows:
        found = leading_subspaces_batch(deltas.mT, ranks, energy=energy)
        return SubspaceBatch(
            found.right, found.values, found.left,
            found.ranks, found.numerical_ranks, found.doubtful, found.fallback,
        )  # fmt: skip
    most = min(columns, int(ranks.max()))
    wide = deltas.to(torch.float64)
    exponents = torch.frexp(wide.abs().amax(dim=(-2, -1), keepdim=True)).exponent
    wide = _times_powers_of_two(wide, -exponents)  # squares stay inside float64's range
    squares, vectors, failed = dispatch.eigh(wide.mT @ wide)
    squares, vectors = squares.flip(-1).clamp(min=0.0), vectors[..., columns - most :].flip(-1)
    values = squares.sqrt()
    known = (values > rank_tolerance(rows) * values[..., :1]).sum(-1)
    kept = torch.minimum(known, ranks.clamp(max=most).to(known.device))
    if energy is not None:
        share = squares[..., :most].cumsum(-1) / squares.sum(-1, keepdim=True)
        kept = torch.minimum(kept, (share < energy).sum(-1) + 1)
    inside = torch.arange(most, device=kept.device) < kept[..., None]  # [B, T, most]
    values = values[..., :most] * inside
    vectors *= inside[..., None, :]
    left = (wide @ vectors) * torch.where(inside, values, 1.0).reciprocal()[..., None, :]
    faint = inside & (squares[..., :most] < GRAM_RANGE * squares[..., :1])
    doubtful = faint.any(-1) | ~squares.isfinite().all(-1)  # [B, T]
    return SubspaceBatch(
        left=left,
        values=_times_powers_of_two(values, exponents[..., 0]),
        right=vectors,
        ranks=kept.tolist(),
        numerical_ranks=known.tolist(),
        doubtful=doubtful.any(-1).tolist(),
        fallback=failed,
    )


def spectral_merge_batch(batch: SubspaceBatch, weights: torch.Tensor) -> list[SpectralMerge | None]:
    """`spectral_merge` of every weight in float64; None where it has to be merged singly.

    Parameters
    ----------
    weights : Tensor, B x T, float64
        Multiply each delta's singular values.
    """
    scale = (batch.values * weights.to(batch.values.device)[..., None]).flatten(1)
    left, left_range, left_doubtful, left_failed = _polar_factors(_side_by_side(batch.left))
    right, right_range, right_doubtful, right_failed = _polar_factors(_side_by_side(batch.right))
    failed = [why for why in (batch.fallback, left_failed, right_failed) if why]
    # As in `spectral_merge`, the size goes in half on either side.
    halves = torch.frexp(scale.abs().amax(dim=1)).exponent // 2
    left *= _times_powers_of_two(scale, -halves[:, None])[:, None, :]
    right = _times_powers_of_two(right, halves[:, None, None])
    doubtful = (left_doubtful | right_doubtful).tolist()
    in_range = (left_range + right_range).tolist()
    return [
        None
        if batch.doubtful[b] or doubtful[b]
        else SpectralMerge(
            left[b],
            right[b],
            2 * sum(batch.ranks[b]) - in_range[b],
            ("gram-batched", "polar-batched"),
            tuple(dict.fromkeys(failed)),
        )
        for b in range(len(doubtful))
    ]


def _times_powers_of_two(stack: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Every item times its own power of two, in two factors that float64 holds."""
    half = exponents // 2
    for power in (half, exponents - half):  # from bits: a GPU's exp2 may err in the last place
        stack = stack * ((power.long() + 1023) << 52).view(torch.float64)
    return stack


def _side_by_side(bases: torch.Tensor) -> torch.Tensor:
    """B x T x m x r panels as B x m x (T r)."""
    count, experts, rows, rank = bases.shape
    return bases.permute(0, 2, 1, 3).reshape(count, rows, experts * rank)


def _polar_factors(
    panels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str | None]:
    """polar(U) on the range of every panel, the range's dimension, whether it is doubtful, and why
    a solver of ours was left."""
    values, vectors, failed = dispatch.eigh(panels.mT @ panels)
    largest = values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    in_range = values > NULL * NULL * largest
    doubtful = (in_range & (values < PANEL_RANGE * largest)).any(dim=1)
    scale = torch.where(in_range, values, 1.0).rsqrt() * in_range
    factor = panels @ ((vectors * scale[:, None, :]) @ vectors.mT)
    return factor, in_range.sum(dim=1), doubtful, failed
