"""What experts changed in their base, before they are merged, and what looks wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch

from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.checkpoint.lora import Adapter, open_model
from resm_kernels.checkpoint.reader import open_checkpoint
from resm_kernels.checkpoint.vocabulary import differences
from resm_kernels.engine.matching import FactorSource, Matching, Source, Value
from resm_kernels.engine.measures import cosine, delta_products, rounded
from resm_kernels.engine.options import EngineOptions
from resm_kernels.errors import UsageError
from resm_kernels.linalg import FactoredDelta, Subspace, leading_subspaces, subspace_overlap
from resm_kernels.methods import Inputs, matches
from resm_kernels.methods.spectral import EXCLUDE
from resm_kernels.ops.delta_stats import delta_stats
from resm_kernels.ops.dtypes import is_finite
from resm_kernels.ops.gram import gram

SIGMA, NOISE_FLOOR = 3.0, 0.1
"""What counts as an outlier and as noise: RESM's defaults."""
STRANGER = 0.5
"""Median ||D|| / ||W|| past which an expert is not of this base; independent models have 1.4."""
ALIKE = 0.95
"""Cosine between the changes of two experts past which they are nearly one model."""
SHOWN = 5

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Change:
    """What one expert changed in one tensor.

    Attributes
    ----------
    changed_share : float
        Share of entries that differ from the base's.
    relative : float or None
        ||D||_F / ||W_0||_F; None where W_0 is zero.
    outlier_share, sparsity : float
        As RESM scores them, at 3 standard deviations and a noise floor of 0.1 rms.
    rank : int or None
        Numerical rank of D, where it was factored.
    """

    changed_share: float
    relative: float | None
    outlier_share: float
    sparsity: float
    rank: int | None = None


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor of the base and what every expert makes of it.

    Attributes
    ----------
    changes : tuple of Change or None
        Per expert; None where it has no such tensor, or not finite numbers.
    cosines, overlaps : tuple of float or None
        For every pair of experts, the changes' cosine, and the overlap of their leading
        subspaces where they were factored.
    interference : float or None
        As in `linalg.Overlap`, where factored.
    """

    name: str
    shape: tuple[int, ...]
    changes: tuple[Change | None, ...]
    cosines: tuple[float | None, ...] = ()
    overlaps: tuple[float, ...] = ()
    interference: float | None = None


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong, and what to do about it."""

    severity: Severity
    what: str
    advice: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_experts` found.

    Attributes
    ----------
    tensors : tuple of InspectedTensor
        The base's float tensors, in file order.
    findings : tuple of Finding
        The worst first; empty where nothing looks wrong.
    """

    base: str
    experts: tuple[str, ...]
    tensors: tuple[InspectedTensor, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def inspect_experts(
    base: ModelReference, experts: Sequence[ModelReference], *, rank: bool = False
) -> Inspection:
    """Look at experts before merging them: one tensor in memory at a time.

    Parameters
    ----------
    rank : bool
        Also factor every matrix, which takes about as long as merging: numerical ranks and the
        overlap of leading subspaces.

    Raises
    ------
    CheckpointError
        Where a model cannot be read, or an adapter is of another architecture.
    """
    if not experts:
        raise UsageError("inspect: no experts given")
    return _Inspector(base, experts, rank).run()


class _Inspector:
    def __init__(self, base: ModelReference, experts: Sequence[ModelReference], rank: bool) -> None:
        self.base = open_checkpoint(base)
        self.experts = [open_model(expert, self.base) for expert in experts]
        self.rank = rank
        self.pairs = list(itertools.combinations(range(len(experts)), 2))
        self.equal = dict.fromkeys(self.pairs, True)
        self.misfits: list[list[str]] = [[] for _ in experts]
        self.absent: list[list[str]] = [[] for _ in experts]
        self.nonfinite: list[list[str]] = [[] for _ in experts]
        self.base_nonfinite: list[str] = []
        self.dtypes: list[set[str]] = [set() for _ in experts]
        self.matching = Matching(self.base, self.experts, EngineOptions())

    def run(self) -> Inspection:
        mergeable = [n for n, info in self.base.tensors.items() if info.dtype.mergeable]
        tensors = tuple(self._look(name) for name in mergeable)
        order = ("error", "warning", "note")
        findings = sorted(self._findings(tensors), key=lambda f: order.index(f.severity))
        names = tuple(expert.reference for expert in self.experts)
        return Inspection(self.base.reference, names, tensors, tuple(findings))

    def _source(self, t: int, name: str) -> Source | FactorSource | None:
        """Where an expert has a tensor; None where it lacks it or has another shape."""
        info, found = self.base.tensors[name], self.matching.find(self.experts[t], name)
        if found is None:
            self.absent[t].append(name)
        if not isinstance(found, Source) or isinstance(self.experts[t], Adapter):
            return found
        stored = found.info
        if stored.shape != info.shape or not stored.dtype.mergeable:
            self.misfits[t].append(
                f"{name} ({stored.dtype.name} {list(stored.shape)} instead of "
                f"{info.dtype.name} {list(info.shape)})"
            )
            return None
        if stored.dtype != info.dtype:
            self.dtypes[t].add(f"{stored.dtype.name} instead of {info.dtype.name}")
        return found

    def _look(self, name: str) -> InspectedTensor:
        info = self.base.tensors[name]
        base = self.matching.source(self.base, name).read()
        sources = [self._source(t, name) for t in range(len(self.experts))]
        given: dict[int, Value] = {}
        if not is_finite(base):
            self.base_nonfinite.append(name)
            sources = [None] * len(sources)
        for t, source in enumerate(sources):
            if source is None:
                continue
            value = source.read()
            parts = [value] if isinstance(value, torch.Tensor) else [value.left, value.right]
            if all(map(is_finite, parts)):
                given[t] = value
            else:
                self.nonfinite[t].append(name)
        for pair in self.pairs:
            self.equal[pair] = self.equal[pair] and self._alike(pair, given)
        known = list(given)
        if not known:
            nothing = (None,) * len(sources)
            return InspectedTensor(name, info.shape, nothing, (None,) * len(self.pairs))
        inputs = Inputs(name, base, [given[t] for t in known])
        products = delta_products(base, inputs.experts)
        norm = math.sqrt(float(gram([base], columns=base.numel())[0, 0, 0]))
        subspaces = self._subspaces(name, inputs) if self.rank else []
        changes: list[Change | None] = [None] * len(sources)
        for i, t in enumerate(known):
            (stats,) = delta_stats(base, [inputs.expert(i)], sigma=SIGMA, noise_floor=NOISE_FLOOR)
            size = math.sqrt(float(products[i, i]))
            changes[t] = Change(
                changed_share=rounded(1 - stats.zero_count / stats.count) if stats.count else 0.0,
                relative=rounded(size / norm) if norm else None,
                outlier_share=rounded(stats.outlier_share),
                sparsity=rounded(stats.sparsity),
                rank=subspaces[i].numerical_rank if subspaces else None,
            )
        place = {t: i for i, t in enumerate(known)}
        overlap = subspace_overlap(subspaces) if len(subspaces) == len(sources) > 1 else None
        return InspectedTensor(
            name,
            info.shape,
            tuple(changes),
            cosines=tuple(
                rounded(cosine(products, place[t], place[u])) if {t, u} <= place.keys() else None
                for t, u in self.pairs
            ),
            overlaps=tuple(map(rounded, overlap.pairs)) if overlap else (),
            interference=rounded(overlap.interference) if overlap else None,
        )

    def _alike(self, pair: tuple[int, int], given: dict[int, Value]) -> bool:
        if not {*pair} <= given.keys():
            return False
        one, other = (given[t] for t in pair)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return torch.equal(one, other)
        if isinstance(one, FactoredDelta) and isinstance(other, FactoredDelta):
            return torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
        return False

    def _subspaces(self, name: str, inputs: Inputs) -> list[Subspace]:
        shape = inputs.base.shape
        if len(shape) != 2 or matches(name, EXCLUDE) or not min(shape):
            return []
        try:
            return [
                leading_subspaces(inputs.delta(t), min(shape)) for t in range(len(inputs.experts))
            ]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return []  # a difference past float32's range has no rank

    def _findings(self, tensors: Sequence[InspectedTensor]) -> list[Finding]:
        found: list[Finding] = []

        def say(severity: Severity, what: str, advice: str) -> None:
            found.append(Finding(severity, what, advice))

        if not tensors:
            say("error", f"{self.base.reference}: no float tensors", "Name the base model.")
        if self.base_nonfinite:
            say(
                "error",
                f"{self.base.reference}: NaN or Inf in {_some(self.base_nonfinite)}",
                "Repair or fetch the base anew: nothing can be measured against these tensors.",
            )
        for t, expert in enumerate(self.experts):
            self._judge(t, expert, tensors, say)
        for i, (t, u) in enumerate(self.pairs):
            names = f"{self.experts[t].reference} and {self.experts[u].reference}"
            known = [c for x in tensors if (c := x.cosines[i]) is not None and len(x.shape) > 1]
            if self.equal[t, u] and known:
                say("error", f"{names} are the same model", "Leave one of them out.")
            elif known and median(known) > ALIKE:
                say(
                    "warning",
                    f"{names} changed the base in nearly the same way "
                    f"(median cosine {median(known):.2f})",
                    "Leave one out, or halve their weights: their common change counts twice.",
                )
        whole = [expert for expert in self.experts if isinstance(expert, Checkpoint)]
        for difference in differences(self.base, whole):
            say(
                "warning" if difference.blocks else "note",
                f"vocabulary: {difference}",
                "Merge with tokenizer_source: union (keeps every token) or base."
                if difference.blocks
                else "Nothing to do: rows with the same number are merged.",
            )
        return found

    def _judge(
        self,
        t: int,
        expert: Checkpoint | Adapter,
        tensors: Sequence[InspectedTensor],
        say: Callable[[Severity, str, str], None],
    ) -> None:
        name = expert.reference
        changes = {x.name: c for x in tensors if (c := x.changes[t]) is not None}
        wide = {x.name for x in tensors if len(x.shape) > 1}
        sizes = [c.relative for n, c in changes.items() if n in wide and c.relative is not None]
        typical = median(sizes) if sizes else 0.0
        if not changes or len(changes) < len(tensors) / 2:
            say(
                "error",
                f"{name}: only {len(changes)} of {len(tensors)} tensors of the base fit it",
                "Name the base that it was fine-tuned from: this is another architecture.",
            )
        elif typical > STRANGER:
            say(
                "error",
                f"{name}: not fine-tuned from this base (half of its matrices changed by "
                f"{typical:.0%} of the base's norm or more; unrelated models differ by 141 %)",
                "Name the base that it was fine-tuned from, or leave it out.",
            )
        unchanged = [n for n, change in changes.items() if change.changed_share == 0.0]
        if changes and len(unchanged) == len(changes):
            say(
                "error",
                f"{name}: equal to the base",
                "Leave it out: it would only dilute the others. Was the right checkpoint named?",
            )
        elif frozen := [layer for layer, changed in _layers(changes).items() if not changed]:
            many = f"{len(frozen)} of {len(_layers(changes))} layers"
            say(
                "note",
                f"{name}: {many} as in the base ({_some(frozen)})",
                "Expected where layers were frozen or an adapter leaves them alone.",
            )
        if self.absent[t]:
            say(
                "warning",
                f"{name}: {len(self.absent[t])} tensors are missing ({_some(self.absent[t])})",
                "Merge with --allow-missing to copy the base's.",
            )
        if self.misfits[t]:
            say(
                "error",
                f"{name}: {len(self.misfits[t])} tensors do not fit ({_some(self.misfits[t])})",
                "Merge models of one architecture; for vocabulary tables set tokenizer_source.",
            )
        extra = []
        if isinstance(expert, Checkpoint):
            extra = [found for found, tied in self.matching.extra(expert) if tied is None]
        if extra:
            say(
                "warning",
                f"{name}: {len(extra)} tensors are not in the base ({_some(extra)})",
                "Merge with --allow-extra to leave them out.",
            )
        if self.nonfinite[t]:
            say(
                "error",
                f"{name}: NaN or Inf in {len(self.nonfinite[t])} tensors "
                f"({_some(self.nonfinite[t])})",
                "Repair the checkpoint, or merge with --nonfinite warn.",
            )
        if self.dtypes[t]:
            say(
                "note",
                f"{name}: stored as {', '.join(sorted(self.dtypes[t]))}",
                "Fine as it is; a change smaller than the base's rounding may be noise.",
            )


def _layers(changes: dict[str, Change]) -> dict[str, bool]:
    """Whether any entry of a layer changed; the layer is the first number in a dotted name."""
    layers: dict[str, bool] = {}
    for name, change in changes.items():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        if numbers:
            layer = ".".join(parts[: numbers[0] + 1])
            layers[layer] = layers.get(layer, False) or change.changed_share > 0.0
    return layers


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
