"""How far two checkpoints lie apart, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import TensorInfo
from resm_kernels.checkpoint.reader import open_checkpoint, read_tensor
from resm_kernels.ops.dtypes import chunks
from resm_kernels.ops.gram import gram

PIECE = 1 << 20
"""Entries compared at a time."""


@dataclass(frozen=True)
class Distance:
    """How far one tensor of A and of B lie apart.

    Attributes
    ----------
    dtypes : tuple of str
        In A and in B.
    relative : float or None
        ||A - B||_F / ||A||_F over entries that are finite in both; inf where A alone is zero.
        None for packed or scaled numbers, which are compared bit by bit.
    largest : float or None
        Largest |A - B|.
    equal_share : float
        Share of entries that are equal; NaN equals NaN.
    nonfinite : int
        Entries that are NaN or Inf in either.
    of_deltas, cosine : float or None
        ||A - B||_F / ||A - W||_F and the cosine between A - W and B - W, with a base W.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    relative: float | None
    largest: float | None
    equal_share: float
    nonfinite: int = 0
    of_deltas: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare_checkpoints` found.

    Attributes
    ----------
    equal : bool
        The same tensors, shapes, dtypes and values on both sides.
    tensors : tuple of Distance
        The farthest first.
    only_a, only_b : tuple of str
        Tensors of one side.
    shapes : dict
        Tensors whose shapes differ, with both.
    not_in_base : tuple of str
        Compared, but without a counterpart of that shape in the base.
    """

    a: str
    b: str
    base: str | None
    equal: bool
    tensors: tuple[Distance, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    not_in_base: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON, which has no infinite numbers: None in their place."""
        found = asdict(self)
        for distance in found["tensors"]:
            for name, value in distance.items():
                if isinstance(value, float) and not math.isfinite(value):
                    distance[name] = None
        return found


def compare_checkpoints(
    a: ModelReference, b: ModelReference, base: ModelReference | None = None
) -> Comparison:
    """Compare two checkpoints of any shards and formats, one tensor at a time.

    Raises
    ------
    CheckpointError
        Where one cannot be read.
    """
    one, other = open_checkpoint(a), open_checkpoint(b)
    origin = None if base is None else open_checkpoint(base)
    found, shapes, lacking = [], {}, []
    models = [one, other, *([origin] if origin is not None else [])]
    for name, info in one.tensors.items():
        if name not in other.tensors:
            continue
        against = other.tensors[name]
        if info.shape != against.shape:
            shapes[name] = (info.shape, against.shape)
            continue
        start = origin.tensors.get(name) if origin is not None else None
        if start is not None and (start.shape != info.shape or not start.dtype.mergeable):
            start = None
        if origin is not None and start is None:
            lacking.append(name)
        infos = [info, against, *([start] if start is not None else [])]
        tensors = [read_tensor(c.home[name], i) for c, i in zip(models, infos, strict=False)]
        found.append(_distance(infos, tensors))
    only_a = tuple(sorted(one.tensors.keys() - other.tensors.keys()))
    only_b = tuple(sorted(other.tensors.keys() - one.tensors.keys()))
    alike = all(d.equal_share == 1.0 and d.dtypes[0] == d.dtypes[1] for d in found)
    return Comparison(
        a=one.reference,
        b=other.reference,
        base=None if origin is None else origin.reference,
        equal=alike and not (only_a or only_b or shapes),
        tensors=tuple(sorted(found, key=_farthest)),
        only_a=only_a,
        only_b=only_b,
        shapes=shapes,
        not_in_base=tuple(lacking),
    )


def _farthest(distance: Distance) -> tuple[float, float, str]:
    relative = -1.0 if distance.relative is None else distance.relative
    return -relative, distance.equal_share, distance.name


def _distance(infos: list[TensorInfo], tensors: list[torch.Tensor]) -> Distance:
    name, shape = infos[0].name, infos[0].shape
    dtypes = (infos[0].dtype.name, infos[1].dtype.name)
    a, b, *origin = (tensor.flatten() for tensor in tensors)
    if any(info.dtype.opaque for info in infos[:2]):
        same = dtypes[0] == dtypes[1]
        equal = _equal_bytes(a, b) if same else 0
        share = equal / a.numel() if a.numel() else float(same)
        return Distance(name, shape, dtypes, None, None, share)
    sums = torch.zeros(2, dtype=torch.float64)
    largest, equal, nonfinite = 0.0, 0, 0
    products = torch.zeros(2, 2, dtype=torch.float64)
    for part in chunks(a.numel(), PIECE):
        pieces = [tensor[part] for tensor in (a, b, *origin)]
        equal += int(_same(pieces[0], pieces[1]).sum())
        wide = [piece.double() for piece in pieces]
        finite = torch.stack([piece.isfinite() for piece in wide]).all(0)
        nonfinite += int((~(wide[0].isfinite() & wide[1].isfinite())).sum())
        wide = [piece.where(finite, 0.0) for piece in wide]
        difference = wide[0] - wide[1]
        sums += torch.stack([difference.square().sum(), wide[0].square().sum()])
        largest = max(largest, float(difference.abs().max()))
        if origin:
            products += gram(wide[:2], base=wide[2], columns=len(difference))[0]
    apart, norm = (math.sqrt(value) for value in sums.tolist())
    delta, delta_b = (math.sqrt(value) for value in products.diagonal().tolist())
    return Distance(
        name,
        shape,
        dtypes,
        relative=apart / norm if norm else (math.inf if apart else 0.0),
        largest=largest,
        equal_share=equal / a.numel() if a.numel() else 1.0,
        nonfinite=nonfinite,
        of_deltas=apart / delta if origin and delta else None,
        cosine=float(products[0, 1]) / (delta * delta_b) if delta and delta_b else None,
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == b.dtype and not a.dtype.is_floating_point:
        if a.dtype in (torch.uint16, torch.uint32, torch.uint64):
            signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
            return a.view(signed) == b.view(signed)
        return a == b
    wide = a.double(), b.double()
    return (wide[0] == wide[1]) | (wide[0].isnan() & wide[1].isnan())


def _equal_bytes(a: torch.Tensor, b: torch.Tensor) -> int:
    pairs = (t.view(torch.uint8).view(t.numel(), -1) for t in (a, b))
    one, other = pairs
    return int((one == other).all(dim=1).sum())


def by_module(comparison: Comparison) -> Iterator[tuple[str, int, float, float]]:
    """Kind of weight, how many, and their mean and largest relative distance."""
    groups: dict[str, list[float]] = {}
    for distance in comparison.tensors:
        if distance.relative is not None:
            parts = ["*" if p.isdecimal() else p for p in distance.name.split(".")]
            groups.setdefault(".".join(parts), []).append(distance.relative)
    for name, values in sorted(groups.items(), key=lambda item: (-max(item[1]), item[0])):
        yield name, len(values), sum(values) / len(values), max(values)
