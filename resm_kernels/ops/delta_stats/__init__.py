"""Outlier scoring: the moments, outlier mass and sparsity of deltas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.delta_stats import reference
from resm_kernels.ops.delta_stats.stats import DeltaStats
from resm_kernels.ops.dtypes import check_alike
from resm_kernels.ops.launch import on_kernels

__all__ = ["DeltaStats", "delta_stats"]


def delta_stats(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    *,
    sigma: float = 3.0,
    noise_floor: float = 0.0,
) -> list[DeltaStats]:
    """Score the deltas W_t - W_0 of all experts against their base.

    Parameters
    ----------
    base, experts : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    sigma : float
        Outlier threshold in standard deviations of A = |W_t - W_0| above its mean.
    noise_floor : float
        Sparse threshold as a fraction of the root mean square of the delta.

    Returns
    -------
    list of DeltaStats
        One per expert.

    Notes
    -----
    Every input is read twice; no delta is written; strided inputs are copied. Differences are
    taken in `compute_dtype` (exact for bf16 inputs up to range), final sums are float64;
    deterministic. Source: design section 2, ours.
    """
    check_alike((base, *experts))
    if not (sigma >= 0.0 and noise_floor >= 0.0):
        raise ValueError(f"sigma {sigma}, noise_floor {noise_floor}, expected both >= 0")
    if on_kernels((base, *experts)):
        from resm_kernels.ops.delta_stats import kernel

        return kernel.delta_stats(base, experts, sigma=sigma, noise_floor=noise_floor)
    return reference.delta_stats(base, experts, sigma=sigma, noise_floor=noise_floor)
