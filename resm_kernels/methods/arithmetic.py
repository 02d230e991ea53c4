"""Linear combinations: weight averaging, task arithmetic, and the mean of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resm_kernels.errors import UsageError
from resm_kernels.methods.base import Merged, Method, never_declines, option
from resm_kernels.methods.inputs import Inputs
from resm_kernels.ops.consensus import weighted_deltas, weighted_sum
from resm_kernels.ops.dtypes import planned_chunk


@dataclass(frozen=True)
class LinearOptions:
    """Options of `linear`."""

    normalize: bool = option(True, "divide by the sum of the weights")


@dataclass(frozen=True)
class TaskArithmeticOptions:
    """Options of `task_arithmetic`."""

    lambda_: float = option(1.0, "merge coefficient that multiplies the combined delta")
    normalize: bool = option(False, "divide the combined delta by the sum of the weights")


def chunk_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: object, device: str
) -> int:
    """Bytes of temporaries of a chunked element-wise pass."""
    return 4 * planned_chunk(shape, device) * itemsize


def _validate_linear(weights: Sequence[float], options: LinearOptions) -> None:
    if options.normalize and abs(sum(weights)) < 1e-8:
        raise UsageError(
            "linear: the weights sum to zero and cannot be normalised",
            got=f"weights {list(weights)}",
            fix="change the weights, or set normalize: false",
        )


def _linear(
    inputs: Inputs,
    weights: Sequence[float],
    options: LinearOptions,
    out_dtype: torch.dtype,
) -> Merged:
    tensor = weighted_sum(inputs.whole(), weights, out_dtype=out_dtype, normalize=options.normalize)
    return Merged(tensor, "linear", weights=tuple(weights))


def _task_arithmetic(
    inputs: Inputs,
    weights: Sequence[float],
    options: TaskArithmeticOptions,
    out_dtype: torch.dtype,
) -> Merged:
    tensor = weighted_deltas(
        inputs.base,
        inputs.whole(),
        weights,
        scale=options.lambda_,
        divisor=divisor_of(weights, options.normalize),
        out_dtype=out_dtype,
    )
    return Merged(tensor, "task_arithmetic", weights=tuple(weights))


def divisor_of(weights: Sequence[float], normalize: bool) -> float:
    """The sum of the weights, 1 where that vanishes or nothing is normalised."""
    total = sum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def mean_of_deltas(
    inputs: Inputs,
    weights: Sequence[float],
    scale: float,
    out_dtype: torch.dtype,
) -> Merged:
    """W_0 + lambda * mean_t w_t (W_t - W_0): what the spectral methods do with other weights."""
    tensor = weighted_deltas(
        inputs.base,
        inputs.whole(),
        weights,
        scale=scale,
        divisor=float(len(weights)),
        out_dtype=out_dtype,
    )
    return Merged(tensor, "mean", weights=tuple(weights))


LINEAR = Method(
    name="linear",
    summary="weighted average of the experts",
    formula="sum_t w_t W_t / sum_t w_t",
    source="Model soups, arXiv 2203.05482",
    options=LinearOptions,
    merge=_linear,
    workspace=chunk_workspace,
    declines=never_declines,
    uses_base=False,
    validate=_validate_linear,
    keeps_base=lambda weights, options: options.normalize,
)

TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    summary="the base plus a weighted sum of deltas",
    formula="W_0 + lambda * sum_t w_t (W_t - W_0)",
    source="Task arithmetic, arXiv 2212.04089",
    options=TaskArithmeticOptions,
    merge=_task_arithmetic,
    workspace=chunk_workspace,
    declines=never_declines,
)
