"""Merge methods: the mathematics of one weight, a file per family."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from statistics import fmean
from typing import Any

import numpy as np
import torch

from resm_kernels.errors import NumericsError, UsageError
from resm_kernels.linalg.cusolver import tells_no_memory
from resm_kernels.methods.arithmetic import LINEAR, TASK_ARITHMETIC, mean_of_deltas
from resm_kernels.methods.averaging import MODEL_STOCK, PASSTHROUGH, SLERP
from resm_kernels.methods.base import Merged, Method, Option, matches
from resm_kernels.methods.inputs import Inputs
from resm_kernels.methods.matrices import Split, matrix_shapes, split_declines, split_rule
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
    "Split",
    "find_method",
    "matches",
    "merge_weight",
    "out_of_memory",
    "split_of",
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


copyreg.pickle(Method, lambda method: (find_method, (method.name,)))  # its functions stay here


def split_of(
    method: Method[Any],
    name: str,
    shape: Sequence[int],
    experts: int,
    options: Any,
    config: Mapping[str, Any],
) -> tuple[Split | None, tuple[str, ...]]:
    """The matrices to merge one by one, None for the whole tensor, and notes about the choice.

    Parameters
    ----------
    config : mapping
        The model's config.json, which knows the sizes of heads and experts.
    """
    if not (method.by_matrix and options.split) or matches(name, options.exclude):
        return None, ()
    split = split_rule(name, shape, config)
    if split is None:
        reason = split_declines(name, shape, config)
        return None, () if reason is None else (f"not split: {reason}",)
    if all(method.declines(name, part.shape, experts, options) for part in split.parts):
        return None, ()
    return split, () if split.note is None else (split.note,)


def merge_weight(
    method: Method[Any],
    inputs: Inputs,
    weights: Sequence[float],
    options: Any,
    out_dtype: torch.dtype,
    split: Split | None = None,
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
    split : Split, optional
        The matrices that the weight holds, to be merged one by one.

    Raises
    ------
    UsageError
        Where the method does not merge this number of experts.
    NumericsError
        Where memory runs out, or a factorisation fails or does not converge.
    """
    base = inputs.base
    where = f"tensor {inputs.name!r} {list(base.shape)}"
    fewest, most = method.experts
    if not fewest <= len(weights) <= (most or len(weights)):
        raise UsageError(
            f"{where}: {method.name} does not merge this number of models",
            got=f"{len(weights)} beside the base" if method.uses_base else str(len(weights)),
            expected=str(fewest) if most == fewest else f"at least {fewest}",
        )
    try:
        with full_float32:
            if split is None:
                merged = _merge_one(method, inputs, weights, options, out_dtype)
            else:
                merged = _merge_parts(method, inputs, weights, options, out_dtype, split)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise NumericsError(f"{where}: the factorisation failed: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
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


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or what caused it, is that memory ran out, the host's or a device's."""
    if error is None or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return error is not None
    if not isinstance(error, RuntimeError):
        return out_of_memory(error.__cause__)
    return tells_no_memory(str(error))


def _merge_one(
    method: Method[Any],
    inputs: Inputs,
    weights: Sequence[float],
    options: Any,
    out_dtype: torch.dtype,
) -> Merged:
    if method.declines(inputs.name, inputs.base.shape, len(weights), options) is not None:
        return mean_of_deltas(inputs, weights, options.lambda_, out_dtype)
    return method.merge(inputs, weights, options, out_dtype)


def _merge_parts(
    method: Method[Any],
    inputs: Inputs,
    weights: Sequence[float],
    options: Any,
    out_dtype: torch.dtype,
    split: Split,
) -> Merged:
    out = torch.empty(inputs.base.shape, dtype=out_dtype, device=inputs.base.device)
    merges: dict[int, Merged] = {}

    def merge_batch(indices: tuple[int, ...]) -> None:
        parts = [inputs.part(split.parts[i]) for i in indices]
        if len(parts) > 1:
            method.prepare(parts, weights, options)
        for i, part in zip(indices, parts, strict=True):
            merged = _merge_one(method, part, weights, options, out_dtype)
            split.parts[i].put(out, merged.tensor)
            merges[i] = replace(merged, tensor=merged.tensor.new_empty(0))

    for indices in _batches(method, inputs, len(weights), options, split):
        merge_batch(indices)
    found = [merges[i] for i in range(len(split.parts))]
    notes: dict[str, list[str]] = {}
    for part_of, merged in zip(split.parts, found, strict=True):
        for note in merged.notes:
            notes.setdefault(note, []).append(part_of.name)
    sparsity = [m.sparsity for m in found if m.sparsity is not None]
    interference = [m.interference for m in found if m.interference is not None]
    overlaps = [m.overlaps for m in found if m.overlaps]
    spectra = [m.spectra for m in found if m.spectra]
    return Merged(
        out,
        method.name,
        ranks=tuple(rank for m in found for rank in m.ranks),
        weights=tuple(weight for m in found for weight in m.weights),
        outlier_scores=tuple(score for m in found for score in m.outlier_scores),
        sparsity=sum(sparsity) / len(sparsity) if sparsity else None,
        backends=tuple(dict.fromkeys(backend for m in found for backend in m.backends)),
        notes=tuple(f"{_some(names)}: {note}" for note, names in notes.items()),
        interference=fmean(interference) if interference else None,
        overlaps=tuple(map(fmean, zip(*overlaps, strict=True))),
        spectra=tuple(torch.cat(s).sort(descending=True)[0] for s in zip(*spectra, strict=True)),
    )


def _batches(
    method: Method[Any], inputs: Inputs, experts: int, options: Any, split: Split
) -> Iterator[tuple[int, ...]]:
    """The indices of the parts, in batches of one shape: a function of the plan alone."""
    for shape, indices in matrix_shapes(split, inputs.base.shape).items():
        size = 1
        if inputs.dense and method.declines(inputs.name, shape, experts, options) is None:
            device, itemsize = inputs.base.device.type, inputs.dtype.itemsize
            size = method.batch(shape, len(indices), experts, itemsize, options, device).size
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
