"""Merge methods: the mathematics of one weight, a file per family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from resm_kernels.errors import NumericsError, UsageError
from resm_kernels.methods.arithmetic import LINEAR, TASK_ARITHMETIC, mean_of_deltas
from resm_kernels.methods.averaging import MODEL_STOCK, PASSTHROUGH, SLERP
from resm_kernels.methods.base import Merged, Method, Option, matches
from resm_kernels.methods.inputs import Inputs
from resm_kernels.methods.sparsifying import SPARSIFYING
from resm_kernels.methods.spectral import ISO_C, ISO_CTS, RESM, TSVM
from resm_kernels.ops.dtypes import full_float32
from resm_kernels.ops.launch import on_kernels

__all__ = [
    "METHODS",
    "Inputs",
    "Merged",
    "Method",
    "Option",
    "find_method",
    "matches",
    "merge_weight",
]

METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        LINEAR,
        SLERP,
        MODEL_STOCK,
        PASSTHROUGH,
        TASK_ARITHMETIC,
        *SPARSIFYING,
        TSVM,
        ISO_C,
        ISO_CTS,
        RESM,
    )
}


def find_method(name: str) -> Method[Any]:
    """Return a method by name; UsageError names the nearest one."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    raise UsageError(
        f"unknown merge method {name!r}",
        expected=f"one of {', '.join(METHODS)}",
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


def merge_weight(
    method: Method[Any],
    inputs: Inputs,
    weights: Sequence[float],
    options: Any,
    out_dtype: torch.dtype,
) -> Merged:
    """Merge one weight by a method, or by the mean of deltas where the method declines it.

    Parameters
    ----------
    inputs : Inputs
        Base and experts, finite; only `exclude` patterns and random drops look at the name.
    weights : sequence of float
        One per expert; 1 is neutral.
    options
        An instance of `method.options`.
    out_dtype : torch.dtype
        Dtype of the result.

    Raises
    ------
    UsageError
        Where the method does not merge this number of experts.
    NumericsError
        Where memory runs out, or a factorisation does not converge.
    """
    base = inputs.base
    declined = method.declines(inputs.name, base.shape, len(weights), options) is not None
    where = f"tensor {inputs.name!r} {list(base.shape)}"
    fewest, most = method.experts
    if not fewest <= len(weights) <= (most or len(weights)):
        raise UsageError(
            f"{where}: {method.name} does not merge this number of models",
            got=f"{len(weights)} beside the base" if method.uses_base else str(len(weights)),
            expected=str(fewest) if most == fewest else f"at least {fewest}",
        )
    try:
        if declined:
            merged = mean_of_deltas(inputs, weights, options.lambda_, out_dtype)
        else:
            with full_float32:
                merged = method.merge(inputs, weights, options, out_dtype)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise NumericsError(f"{where}: the factorisation did not converge: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error).lower():
            raise NumericsError(
                f"{where}: {base.device} is out of memory",
                fix="fewer workers, or a smaller memory budget",
            ) from error
        raise
    if not base.is_cuda:
        return merged
    if on_kernels(inputs.tensors, out_dtype):
        return replace(merged, backends=(*merged.backends, "triton"))
    return replace(merged, notes=(*merged.notes, "plain torch: no Triton kernels here"))
