"""Merging one weight that was read, for one output after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from resm_kernels.engine.matching import Key
from resm_kernels.engine.plan import MergePlan, PlannedTensor
from resm_kernels.errors import NonFiniteError
from resm_kernels.methods import Inputs, Merged, merge_weight
from resm_kernels.ops.dtypes import is_finite

LOG = logging.getLogger(__name__)


class Loaded:
    """The tensors of one step, and what was found out about them.

    Attributes
    ----------
    values : mapping
        What was read, by source.
    bad : mapping
        For floats by source: where they are NaN or Inf; None where nowhere.
    """

    def __init__(self, values: Mapping[Key, torch.Tensor], device: torch.device) -> None:
        self.values = dict(values)
        self.bad = {
            key: None if is_finite(value) else ~torch.isfinite(value)
            for key, value in self.values.items()
            if value.is_floating_point()
        }
        self._device = device
        self._inputs: dict[tuple[Key, ...], Inputs] = {}

    def inputs(self, tensor: PlannedTensor, mask: torch.Tensor | None) -> Inputs:
        """The weight on the device, zero where the mask is.

        The same object for outputs that merge the same tensors, so that they share findings.
        """
        sources = tensor.sources if tensor.reads_base else (tensor.experts[0], *tensor.experts)
        keys = tuple(source.key for source in sources)
        if keys not in self._inputs or mask is not None:
            values = [self.values[key] for key in keys]
            if mask is not None:
                values = [value.masked_fill(mask, 0.0) for value in values]
            base, *experts = [value.to(self._device) for value in values]
            self._inputs[keys] = Inputs(tensor.key, base, experts)
        return self._inputs[keys]


def merge_planned(plan: MergePlan, tensor: PlannedTensor, loaded: Loaded) -> Merged:
    """Merge one planned tensor; the result lies on the CPU."""
    if not tensor.base.info.dtype.mergeable:
        return Merged(loaded.values[tensor.base.key], "copy")
    out_dtype = tensor.slot.dtype.torch
    mask, notes = _screen(plan, tensor, loaded)
    inputs = loaded.inputs(tensor, mask)
    if tensor.rule == "copy":
        merged = Merged(inputs.base.to(out_dtype), "copy")
    else:
        merged = merge_weight(tensor.method, inputs, tensor.weights, tensor.options, out_dtype)
    result = merged.tensor.cpu()
    if not is_finite(result):
        notes += _overflow(plan, tensor, result)
    if mask is not None:
        result[mask] = loaded.values[tensor.base.key][mask].to(out_dtype)
    return replace(merged, tensor=result, notes=(*merged.notes, *notes))


def _screen(
    plan: MergePlan, tensor: PlannedTensor, loaded: Loaded
) -> tuple[torch.Tensor | None, list[str]]:
    """Find NaN and Inf in the inputs; the mask of positions where the base's value stays."""
    mask: torch.Tensor | None = None
    notes = []
    for source in tensor.sources:
        bad = loaded.bad[source.key]
        if bad is None or (source is tensor.base and not tensor.base_counts):
            continue
        count = int(bad.sum())
        where = f"{source.info.file}: tensor {source.info.name!r}"
        if plan.options.nonfinite == "error":
            raise NonFiniteError(
                f"{where}: {count} of {bad.numel()} values are NaN or Inf",
                fix="repair the checkpoint, or keep the base's values there with --nonfinite warn",
            )
        mask = bad if mask is None else mask | bad
        notes.append(f"{source.info.file.name}: {count} values are NaN or Inf; the base's stay")
        LOG.warning("%s: %d values are NaN or Inf; the base's values stay there", where, count)
    return mask, notes


def _overflow(plan: MergePlan, tensor: PlannedTensor, result: torch.Tensor) -> list[str]:
    """Finite inputs whose merge does not fit the output dtype: an error, or a note."""
    count, dtype = int((~torch.isfinite(result)).sum()), tensor.slot.dtype.name
    if plan.options.nonfinite == "error":
        raise NonFiniteError(
            f"tensor {tensor.name!r}: {count} merged values do not fit {dtype}",
            fix="choose another out_dtype (bfloat16, float32), or a smaller lambda",
        )
    LOG.warning("tensor %r: %d merged values do not fit %s", tensor.name, count, dtype)
    return [f"{count} merged values overflow {dtype}"]
