"""Inner products between tensors, or between their deltas: plain torch, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.ops.dtypes import check_alike, chunk_on, chunks


def gram(
    tensors: Sequence[torch.Tensor], *, base: torch.Tensor | None = None, columns: int
) -> torch.Tensor:
    """The inner products of tensors, or of their differences from a base, row by row.

    Parameters
    ----------
    tensors, base : Tensor
        One shape and device, any float dtypes; strided views are accepted.
    columns : int
        Entries per row; their number for one row.

    Returns
    -------
    Tensor, float64 [R, T, T]
        Differences, products and sums in float64. One row of zeros for empty tensors.

    Notes
    -----
    Every tensor is read once; temporaries are T + 1 float64 chunks.
    """
    first = tensors[0] if base is None else base
    check_alike((first, *tensors))
    count, size, device = first.numel(), chunk_on(first.device.type), first.device
    rows = max(1, count // max(1, columns))
    number = len(tensors)
    out = torch.zeros(rows, number, number, dtype=torch.float64, device=device)
    if not count:
        return out
    flat = [tensor.reshape(rows, columns) for tensor in tensors]
    origin = None if base is None else base.reshape(rows, columns)
    for lines in chunks(rows, max(1, size // columns)):
        for part in chunks(columns, size):
            shape = (lines.stop - lines.start, number, part.stop - part.start)
            stacked = torch.empty(shape, dtype=torch.float64, device=device)
            for t, tensor in enumerate(flat):
                stacked[:, t] = tensor[lines, part]
            if origin is not None:
                stacked.sub_(origin[lines, None, part])
            out[lines].baddbmm_(stacked, stacked.transpose(1, 2))
    return out
