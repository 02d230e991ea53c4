"""What merging a tensor takes: bytes beside its inputs and its output, and operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resm_kernels.engine.matching import FactorSource, Source
from resm_kernels.linalg import Work
from resm_kernels.methods import Method, Split
from resm_kernels.methods.arithmetic import chunk_workspace
from resm_kernels.methods.matrices import matrix_shapes
from resm_kernels.ops.dtypes import planned_chunk


@dataclass(frozen=True)
class Weight:
    """A tensor as its merging is planned.

    Attributes
    ----------
    sources : sequence
        The base's and the experts'.
    method : Method or None
        None where they are averaged or copied.
    split : Split or None
        The matrices in it that are merged one by one.
    aligned, masked : bool
        Whether its rows are reordered, and whether copies without NaN and Inf may be made.
    """

    shape: tuple[int, ...]
    sources: Sequence[Source | FactorSource]
    method: Method[Any] | None
    settings: Any
    split: Split | None
    aligned: bool
    masked: bool

    @functools.cached_property
    def experts(self) -> int:
        """How many are merged; 0 for a copy."""
        return len(self.sources) - 1

    @functools.cached_property
    def itemsize(self) -> int:
        """Bytes per entry of a delta."""
        return 8 if any(source.wide for source in self.sources) else 4

    @functools.cached_property
    def ranks(self) -> list[int] | None:
        """The ranks of all changes, 0 for the base itself; None where one is no product of
        factors."""
        base, *experts = self.sources
        ranks = [
            expert.pair.rank if isinstance(expert, FactorSource) else 0
            for expert in experts
            if isinstance(expert, FactorSource) or expert.key == base.key
        ]
        return ranks if len(ranks) == len(experts) else None


class Needs:
    """What merging takes on a device type; what many tensors share is worked out once."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._known: dict[tuple[object, ...], int] = {}
        self._works: dict[tuple[object, ...], Work] = {}
        self._none = Work()

    def workspace(self, weight: Weight) -> int:
        """Bytes that merging a weight may hold beyond its inputs and its output."""
        shape, method, settings = weight.shape, weight.method, weight.settings
        experts, itemsize, size = weight.experts, weight.itemsize, math.prod(weight.shape)
        if not experts:
            return chunk_workspace(shape, 0, 8, settings, self._device)
        shapes = matrix_shapes(weight.split, shape) if weight.split else {shape: (0,)}
        in_core = None
        if method is not None and weight.ranks is not None:
            in_core = method.factored_workspace(shape, weight.ranks, itemsize, settings)
        if in_core is not None:
            workspace = in_core
        elif method is None:
            workspace = chunk_workspace(shape, experts, 8, settings, self._device)
        else:
            workspace = max(
                self._of_matrices(method, part, len(equal), experts, itemsize, settings)
                for part, equal in shapes.items()
            )
        if self._device != "cpu" and method is not None and method.by_matrix:
            measuring = 8 * (experts + 2) * planned_chunk(shape, self._device)
            workspace = max(workspace, measuring)
        if weight.split:  # parts that are not views of their tensors
            workspace += (experts + 2) * itemsize * max(map(math.prod, shapes))
        whole = 0
        if in_core is None:
            whole = sum(isinstance(source, FactorSource) for source in weight.sources)
        if method is not None and method.by_matrix:
            whole = min(whole, 1)  # for its statistics
        workspace += (whole + (experts + 1) * weight.aligned) * itemsize * size
        if weight.masked:  # copies without NaN and Inf, and where they were
            workspace += sum(source.nbytes for source in weight.sources) + (experts + 3) * size
        return workspace

    def work(self, weight: Weight) -> Work:
        """Operations of merging a weight on the CPU, at the highest rank."""
        method, settings, experts = weight.method, weight.settings, weight.experts
        if method is None or method.work is None or not experts:
            return self._none
        ranks, itemsize = weight.ranks, weight.itemsize
        shapes = [part.shape for part in weight.split.parts] if weight.split else [weight.shape]
        known = method.name, *shapes, experts, ranks and tuple(ranks), itemsize, settings
        if known not in self._works:
            each = {
                one: method.work(one, experts, ranks, itemsize, settings, "cpu")
                for one in {*shapes}
            }
            self._works[known] = sum((each[one] for one in shapes), self._none)
        return self._works[known]

    def _of_matrices(
        self,
        method: Method[Any],
        shape: tuple[int, ...],
        count: int,
        experts: int,
        itemsize: int,
        settings: Any,
    ) -> int:
        known = method.name, shape, count, experts, itemsize, settings
        if known not in self._known:
            given = experts, itemsize, settings, self._device
            batch = method.batch(shape, count, *given)
            self._known[known] = method.workspace(shape, *given) + batch.workspace
        return self._known[known]
