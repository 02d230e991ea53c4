"""Merging one weight that was read, for one output after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from resm_kernels.checkpoint.vocabulary import align_tables
from resm_kernels.engine.matching import FactorSource, Key, Value
from resm_kernels.engine.measures import measure, spectrum_points
from resm_kernels.engine.plan import MergePlan, PlannedTensor, Step
from resm_kernels.engine.result import Measures
from resm_kernels.errors import NonFiniteError
from resm_kernels.linalg import FactoredDelta
from resm_kernels.methods import Inputs, Merged, merge_weight
from resm_kernels.ops.dtypes import is_finite

LOG = logging.getLogger(__name__)


class Loaded:
    """The tensors of one step, and what was found out about them.

    Parameters
    ----------
    values : mapping
        What was read, by source.
    outputs : int
        How many outputs they are merged for.

    Attributes
    ----------
    sparing : bool
        Merge in less memory where a method can.
    """

    def __init__(self, values: Mapping[Key, Value], outputs: int) -> None:
        self._values = dict(values)
        self._shared = outputs > 1
        self.sparing = False
        self._bad: dict[tuple[Key, ...], torch.Tensor | None] = {}
        self._aligned: dict[tuple[Key, ...], list[Value]] = {}
        self._inputs: dict[tuple[bool, tuple[Key, ...]], Inputs] = {}

    def forget(self) -> None:
        """Let go of all but what was read."""
        self._inputs.clear()
        self._aligned.clear()
        self._bad.clear()

    def values(self, plan: MergePlan, tensor: PlannedTensor) -> dict[Key, Value]:
        """The tensor's sources, in order; rows of vocabulary tables as the output has them."""
        keys = _keys(tensor)
        if plan.alignment is None or not tensor.aligned:
            return {key: self._values[key] for key in keys}
        if keys not in self._aligned:
            tables = [self._values[key] for key in keys]
            whole = [table for table in tables if isinstance(table, torch.Tensor)]
            self._aligned[keys] = [*align_tables(whole, plan.alignment)]
        return dict(zip(keys, self._aligned[keys], strict=True))

    def bad(self, tensor: PlannedTensor, key: Key, value: Value) -> torch.Tensor | None:
        """Where a value is NaN or Inf, None where nowhere; for factors, among both entries."""
        known = (key, *_keys(tensor)) if tensor.aligned else (key,)
        if known not in self._bad:
            if isinstance(value, FactoredDelta):
                value = torch.cat((value.left.flatten(), value.right.flatten()))
            self._bad[known] = None if is_finite(value) else ~torch.isfinite(value)
        return self._bad[known]

    def inputs(
        self, tensor: PlannedTensor, values: Mapping[Key, Value], mask: torch.Tensor | None
    ) -> Inputs:
        """The weight, zero where the mask is.

        The same object for outputs that merge the same tensors, so that they share findings.
        """
        keys = _keys(tensor)
        if not tensor.reads_base:
            keys = (keys[0], *keys)
        known = tensor.base_counts, keys  # the base's own NaN and Inf are masked only if it counts
        if known not in self._inputs:
            placed = {key: _masked(values[key], mask) for key in keys}
            base, *experts = (placed[key] for key in keys)
            assert isinstance(base, torch.Tensor)
            self._inputs[known] = Inputs(
                tensor.key, base, experts, shared=self._shared, sparing=self.sparing
            )
        return self._inputs[known]


def _masked(value: Value, mask: torch.Tensor | None) -> Value:
    if mask is None or isinstance(value, FactoredDelta):
        return value
    return value.masked_fill(mask, 0.0)


def _keys(tensor: PlannedTensor) -> tuple[Key, ...]:
    return tuple(source.key for source in tensor.sources)


def merge_planned(
    plan: MergePlan, tensor: PlannedTensor, loaded: Loaded
) -> tuple[Merged, Measures | None]:
    """Merge one planned tensor; the result lies where its sources do.

    Merges by spectral methods are measured: beside factoring, another reading costs nothing.
    """
    values = loaded.values(plan, tensor)
    base = values.get(tensor.base.key)
    if not tensor.base.info.dtype.mergeable:
        assert isinstance(base, torch.Tensor)
        return Merged(base, "copy"), None
    out_dtype = tensor.slot.dtype.torch
    mask, notes = _screen(plan, tensor, loaded, values)
    inputs = loaded.inputs(tensor, values, mask)
    measures = None
    if tensor.rule == "copy":
        merged = Merged(inputs.base.to(out_dtype), "copy")
    else:
        merged = merge_weight(
            tensor.method, inputs, tensor.weights, tensor.options, out_dtype, tensor.split
        )
        if tensor.method.by_matrix:
            points = spectrum_points(len(plan.tensors), len(inputs.experts))
            measures = measure(inputs, merged, points)
    result = merged.tensor
    if not is_finite(result):
        notes += _overflow(plan, tensor, result)
    if mask is not None:
        assert isinstance(base, torch.Tensor)
        result[mask] = base[mask].to(out_dtype)
    notes = [*tensor.notes, *merged.notes, *notes]
    return replace(merged, tensor=result, notes=tuple(notes), spectra=()), measures


def _screen(
    plan: MergePlan, tensor: PlannedTensor, loaded: Loaded, values: Mapping[Key, Value]
) -> tuple[torch.Tensor | None, list[str]]:
    """Find NaN and Inf in the inputs; the mask of positions where the base's value stays."""
    mask: torch.Tensor | None = None
    notes = []
    for source in Step((tensor,)).sources:
        if source.key == tensor.base.key and not tensor.base_counts:
            continue
        bad = loaded.bad(tensor, source.key, values[source.key])
        if bad is None:
            continue
        count = int(bad.count_nonzero())  # a sum would widen the mask to int64
        if isinstance(source, FactorSource):
            raise NonFiniteError(
                f"{source.where}: {count} of {bad.numel()} values are NaN or Inf",
                fix="leave that adapter out: every value of a factor reaches a whole row",
            )
        if plan.options.nonfinite == "error":
            raise NonFiniteError(
                f"{source.where}: {count} of {bad.numel()} values are NaN or Inf",
                fix="repair the checkpoint, or keep the base's values there with --nonfinite warn",
            )
        mask = bad if mask is None else mask | bad
        notes.append(f"{source.info.file.name}: {count} values are NaN or Inf; the base's stay")
        LOG.warning(
            "%s: %d values are NaN or Inf; the base's values stay there", source.where, count
        )
    return mask, notes


def _overflow(plan: MergePlan, tensor: PlannedTensor, result: torch.Tensor) -> list[str]:
    """Finite inputs whose merge does not fit the output dtype: an error, or a note."""
    count, dtype = int((~torch.isfinite(result)).count_nonzero()), tensor.slot.dtype.name
    if plan.options.nonfinite == "error":
        raise NonFiniteError(
            f"tensor {tensor.name!r}: {count} merged values do not fit {dtype}",
            fix="choose another out_dtype (bfloat16, float32), or a smaller lambda",
        )
    LOG.warning("tensor %r: %d merged values do not fit %s", tensor.name, count, dtype)
    return [f"{count} merged values overflow {dtype}"]
