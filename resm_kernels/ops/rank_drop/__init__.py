"""Random drop whose probability depends on an entry's rank inside its row."""

from __future__ import annotations

import torch

from resm_kernels.ops.dtypes import check_alike
from resm_kernels.ops.launch import on_kernels
from resm_kernels.ops.rank_drop import reference

__all__ = ["rank_drop"]


def rank_drop(
    base: torch.Tensor, expert: torch.Tensor, *, density: float, epsilon: float, key: int
) -> torch.Tensor:
    """The expert with entries dropped, that is, set to those of the base.

    Parameters
    ----------
    base, expert : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    density, epsilon : float
        Along the last axis (tensors of one dimension are one row) the smallest |D| is kept with
        probability density - epsilon, the largest with density + epsilon, those between by their
        rank; of equal magnitudes the first has the lower rank. A row of one entry keeps it with
        probability `density`. Both ends lie in (0, 1), epsilon >= 0.
    key : int
        128 bits that fix the random drop (`drop_key`).

    Returns
    -------
    Tensor
        New and contiguous, in the wider dtype of base and expert: its delta is D or exactly 0, and
        nothing is rescaled. The same bytes on CPU and GPU. ValueError where the probabilities lie
        outside their range.

    Notes
    -----
    Probabilities are rounded to multiples of 2**-32. Ranks take a sort, rows at a time: int64 keys
    and their order, 16 bytes an entry. Source: MagPrune, DELLA (arXiv 2406.11617).
    """
    check_alike((base, expert))
    if not (0.0 < density - epsilon <= density + epsilon < 1.0):
        raise ValueError(f"density {density}, epsilon {epsilon}, expected both ends in (0, 1)")
    if on_kernels((base, expert)):
        from resm_kernels.ops.rank_drop import kernel

        return kernel.rank_drop(base, expert, density=density, epsilon=epsilon, key=key)
    return reference.rank_drop(base, expert, density=density, epsilon=epsilon, key=key)
