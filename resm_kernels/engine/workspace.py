"""What merging a tensor takes: bytes beside its inputs and its output, and operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from resm_kernels.engine.matching import FactorSource, Source
from resm_kernels.linalg import Work
from resm_kernels.methods import Method, Split
from resm_kernels.methods.arithmetic import chunk_workspace
from resm_kernels.methods.matrices import matrix_shapes
from resm_kernels.ops.dtypes import planned_chunk


def factor_ranks(
    base: Source | FactorSource, experts: Sequence[Source | FactorSource]
) -> list[int] | None:
    """The ranks of all changes, 0 for the base itself; None where one is no product of factors."""
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

    def workspace(
        self,
        shape: tuple[int, ...],
        sources: Sequence[Source | FactorSource],
        *,
        method: Method[Any] | None,
        settings: Any,
        split: Split | None,
        aligned: bool,
        masked: bool,
    ) -> int:
        """Bytes that merging one tensor may hold beyond its inputs and its output.

        `sources` are the base's and the experts'; without a method they are averaged or copied.
        """
        experts, size = len(sources) - 1, math.prod(shape)
        if not experts:
            return chunk_workspace(shape, 0, 8, settings, self._device)
        itemsize = 8 if any(source.wide for source in sources) else 4
        shapes = matrix_shapes(split, shape) if split else {shape: (0,)}
        ranks = factor_ranks(sources[0], sources[1:])
        in_core = None
        if method is not None and ranks is not None:
            in_core = method.factored_workspace(shape, ranks, itemsize, settings)
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
        if split:  # parts that are not views of their tensors
            workspace += (experts + 2) * itemsize * max(map(math.prod, shapes))
        whole = 0 if in_core is not None else sum(isinstance(s, FactorSource) for s in sources)
        if method is not None and method.by_matrix:
            whole = min(whole, 1)  # for its statistics
        workspace += (whole + (experts + 1) * aligned) * itemsize * size
        if masked:  # copies without NaN and Inf, and where they were
            workspace += sum(source.nbytes for source in sources) + (experts + 3) * size
        return workspace

    def work(
        self,
        shape: tuple[int, ...],
        sources: Sequence[Source | FactorSource],
        *,
        method: Method[Any] | None,
        settings: Any,
        split: Split | None,
    ) -> Work:
        """Operations of merging one tensor on the CPU, at the highest rank; as for `workspace`."""
        experts = len(sources) - 1
        if method is None or method.work is None or not experts:
            return self._none
        ranks = factor_ranks(sources[0], sources[1:])
        itemsize = 8 if any(source.wide for source in sources) else 4
        shapes = [part.shape for part in split.parts] if split else [shape]
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
