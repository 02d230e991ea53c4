"""One weight of the base and of every expert, and what has been found out about it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from resm_kernels.linalg.subspace import Delta, FactoredDelta
from resm_kernels.methods.matrices import Part
from resm_kernels.ops.dtypes import compute_dtype
from resm_kernels.ops.mask import Mask, masked_delta

Found = TypeVar("Found")


class Inputs:
    """One weight of the base and of every expert.

    Parameters
    ----------
    name : str
        The weight's name: for patterns, and part of the key of random drops.
    base : Tensor
        Any float dtype, finite.
    experts : sequence of Tensor or FactoredDelta
        Whole weights of the base's shape and device, or changes to the base as low-rank factors
        (LoRA), which stay factored for the methods that can use them so.
    shared : bool
        Several outputs will be merged from these inputs: the findings about every part are kept.
    sparing : bool
        Memory ran out before: a GPU factors the experts one after another, to the same bytes.
        Batches of equal matrices stay, since smaller ones round differently.
    """

    def __init__(
        self,
        name: str,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor | FactoredDelta],
        *,
        shared: bool = False,
        sparing: bool = False,
    ) -> None:
        self.name = name
        self.base = base
        self.experts = tuple(experts)
        self.shared = shared
        self.sparing = sparing
        self._found: dict[str, tuple[Hashable, Any]] = {}
        self._parts: dict[Part, Inputs] = {}

    def once(self, what: str, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returns, kept until asked for with another key: outputs share it."""
        if what not in self._found or self._found[what][0] != key:
            self._found.pop(what, None)  # the old result goes before the new one is made
            self._found[what] = (key, find())
        found: Found = self._found[what][1]
        return found

    def part(self, part: Part) -> Inputs:
        """One of the matrices that the weight holds."""
        if part in self._parts:
            return self._parts[part]
        base = part.of(self.base)
        experts: list[torch.Tensor | FactoredDelta] = []
        for t, expert in enumerate(self.experts):
            if expert is self.base:
                experts.append(base)
            elif isinstance(expert, FactoredDelta):
                factors = part.factors(expert.left, expert.right)
                experts.append(FactoredDelta(*factors) if factors else part.of(self.expert(t)))
            else:
                experts.append(part.of(expert))
        found = Inputs(self.name, base, experts, shared=self.shared, sparing=self.sparing)
        if self.shared:
            self._parts[part] = found
        return found

    def rank(self, t: int) -> int | None:
        """The most directions that expert t changes, None where only its entries tell."""
        expert = self.experts[t]
        if isinstance(expert, FactoredDelta):
            return expert.left.shape[1]
        return 0 if expert is self.base else None

    @property
    def factored(self) -> bool:
        """Whether any expert is given as factors."""
        return any(isinstance(expert, FactoredDelta) for expert in self.experts)

    @property
    def dense(self) -> bool:
        """Whether every expert is a whole weight of its own."""
        return all(e is not self.base and isinstance(e, torch.Tensor) for e in self.experts)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Base, whole experts and factors."""
        factors = [
            f for e in self.experts if isinstance(e, FactoredDelta) for f in (e.left, e.right)
        ]
        whole = [e for e in self.experts if isinstance(e, torch.Tensor)]
        return (self.base, *whole, *factors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return compute_dtype(self.tensors)

    def expert(self, t: int) -> torch.Tensor:
        """Expert t as a whole weight; W_0 + left @ right.T in the compute dtype for factors."""
        expert = self.experts[t]
        if isinstance(expert, torch.Tensor):
            return expert
        left, right = expert.left.to(self.dtype), expert.right.to(self.dtype)
        return self.base.to(self.dtype, copy=True).addmm_(left, right.T)

    def whole(self) -> tuple[torch.Tensor, ...]:
        """Every expert as a whole weight."""
        return self.once("whole", None, lambda: tuple(map(self.expert, range(len(self.experts)))))

    def delta(self, t: int, mask: Mask | None = None) -> Delta:
        """The change of expert t, masked; factors stay factors where there is no mask.

        An expert that is the base itself, as an adapter leaves it, has factors of rank 0.
        """
        expert = self.experts[t]
        if expert is self.base:
            return FactoredDelta(*(self.base.new_zeros(n, 0) for n in self.base.shape))
        if isinstance(expert, FactoredDelta) and mask is None:
            return expert
        return masked_delta(self.base, self.expert(t), mask)
