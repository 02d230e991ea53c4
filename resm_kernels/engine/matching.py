"""Which tensor of which checkpoint goes with which; every misfit is found before any work."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from resm_kernels.checkpoint.layout import Checkpoint, TensorInfo, WeightFile
from resm_kernels.checkpoint.lora import Adapter, LoraPair, keeps_tied, read_factors
from resm_kernels.checkpoint.reader import HOST, Place, read_tensor, same_data
from resm_kernels.checkpoint.tokens import tables_of_config, vocabulary_tables
from resm_kernels.checkpoint.vocabulary import Alignment
from resm_kernels.engine.options import EngineOptions
from resm_kernels.errors import PlanError
from resm_kernels.linalg import FactoredDelta

Key = tuple[str, str]
"""What tells inputs apart: the file, and the tensor in it."""
Value = torch.Tensor | FactoredDelta
"""An input as it is read."""


@dataclass(frozen=True)
class Source:
    """One input tensor and the file it lies in."""

    file: WeightFile
    info: TensorInfo

    @property
    def key(self) -> Key:
        """What tells it from other inputs."""
        return str(self.info.file), self.info.name

    @property
    def where(self) -> str:
        """The file and the tensor, for messages."""
        return f"{self.info.file}: tensor {self.info.name!r}"

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.info.nbytes

    @property
    def wide(self) -> bool:
        """Whether it holds float64."""
        return self.info.dtype.name == "F64"

    def read(self, place: Place = HOST) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return read_tensor(self.file, self.info, place)


@dataclass(frozen=True)
class FactorSource:
    """The change that an adapter makes to one weight, as its two factors."""

    adapter: Adapter
    pair: LoraPair

    @property
    def key(self) -> Key:
        """What tells it from other inputs."""
        return str(self.pair.a.file), self.pair.a.name

    @property
    def where(self) -> str:
        """The file and the tensors, for messages."""
        return f"{self.pair.a.file}: tensors {self.pair.a.name!r} and {self.pair.b.name!r}"

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.pair.a.nbytes + self.pair.b.nbytes

    @property
    def wide(self) -> bool:
        """Whether it holds float64."""
        return "F64" in (self.pair.a.dtype.name, self.pair.b.dtype.name)

    def read(self, place: Place = HOST) -> FactoredDelta:
        """The factors, in memory of their own."""
        return FactoredDelta(*read_factors(self.adapter, self.pair, place))


Decision = tuple[str | None, tuple[Source | FactorSource, ...]]
"""Why a tensor of the base is copied, or what of the experts is merged with it."""


class Matching:
    """Matches tensors across checkpoints; every misfit is collected and reported together.

    Parameters
    ----------
    alignment : Alignment or None
        How vocabulary tables are brought together, where they are not alike as they stand.

    Attributes
    ----------
    tables : frozenset of str
        The base's tensors that the alignment changes.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Checkpoint | Adapter],
        options: EngineOptions,
        alignment: Alignment | None = None,
    ) -> None:
        self.base = base
        self.experts = experts
        self.options = options
        self.alignment = alignment
        self.tables = frozenset(vocabulary_tables(base) if alignment is not None else ())
        self.left_out: dict[str, str] = {}
        whole = [base, *(expert for expert in experts if isinstance(expert, Checkpoint))]
        self._ties = {id(c): self._tied_groups(c) for c in whole}
        self._misfits: list[str] = []

    def canonical(self, name: str) -> str:
        """The name under which a tied tensor's parameters are looked up, so that it stays tied."""
        tied = self._ties[id(self.base)].get(name)
        if tied is None:
            return name
        return min([name, *(other for other in tied if other in self.base.tensors)])

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """The canonical names of all tensors."""
        return frozenset(map(self.canonical, self.decisions))

    def source(self, checkpoint: Checkpoint, name: str) -> Source:
        """An input tensor with its file."""
        return Source(checkpoint.home[name], checkpoint.tensors[name])

    @functools.cached_property
    def decisions(self) -> dict[str, Decision]:
        """For every output tensor: why it is copied, or the experts' tensors to merge."""
        decisions = {name: self._decide_one(name, info) for name, info in self.base.tensors.items()}
        for expert in self.experts:
            if isinstance(expert, Checkpoint):
                self._judge_extra(expert)
        if not self.base.tensors:
            self._misfits.append(f"{self.base.reference}: the base holds no tensors")
        if self._misfits:
            shown = self._misfits[:20]
            if len(self._misfits) > len(shown):
                shown.append(f"and {len(self._misfits) - len(shown)} more")
            raise PlanError(
                "\n".join(["the inputs do not fit together:", *(f"  - {m}" for m in shown)])
            )
        return decisions

    def _decide_one(self, name: str, info: TensorInfo) -> Decision:
        if info.dtype.opaque:
            self._misfits.append(
                f"{name}: {info.dtype.name} weights of {self.base.reference} cannot be merged; "
                "dequantise them first"
            )
            return None, ()
        if not info.dtype.mergeable:
            return f"{info.dtype.name} tensor of the base", ()
        sources: list[Source | FactorSource] = []
        absent = []
        for expert in self.experts:
            source = self.find(expert, name)
            if source is None:
                absent.append(expert.reference)
                continue
            if isinstance(expert, Adapter):
                self._check_unaligned(expert, source, name)
            elif isinstance(source, Source):
                self._check_alike(expert, source, info)
            self._check_still_tied(expert, name)
            sources.append(source)
        if not absent:
            return None, tuple(sources)
        if name in self.tables:
            self._misfits.append(
                f"{name}: missing from {', '.join(absent)}; a vocabulary table that "
                "tokenizer_source changes must be in every model"
            )
        elif not self.options.allow_missing:
            self._misfits.append(
                f"{name}: missing from {', '.join(absent)} (--allow-missing copies the base's)"
            )
        return f"missing from {', '.join(absent)}", ()

    def find(self, expert: Checkpoint | Adapter, name: str) -> Source | FactorSource | None:
        """What an expert makes of a tensor of the base, by its name or one it is tied to.

        What an adapter leaves alone is the base's own source.
        """
        if isinstance(expert, Checkpoint):
            if name in expert.tensors:
                return self.source(expert, name)
            tied = (self._ties[id(c)].get(name, ()) for c in (expert, self.base))
            found = next((c for c in itertools.chain(*tied) if c in expert.tensors), None)
            return None if found is None else self.source(expert, found)
        for candidate in (name, *self._ties[id(self.base)].get(name, ())):
            if candidate in expert.pairs:
                return FactorSource(expert, expert.pairs[candidate])
            if candidate in expert.full:
                return Source(expert.files[0], expert.full[candidate])
        return self.source(self.base, name)

    def _check_unaligned(self, adapter: Adapter, source: Source | FactorSource, name: str) -> None:
        if name in self.tables and source.key != self.source(self.base, name).key:
            self._misfits.append(
                f"{name}: changed by the adapter {adapter.reference}, and tokenizer_source changes "
                "its rows: merge the adapter into its base and name that folder"
            )

    def _check_alike(self, expert: Checkpoint, source: Source, info: TensorInfo) -> None:
        first = 1 if info.name in self.tables else 0  # rows are aligned
        ranks = len(source.info.shape), len(info.shape)
        if source.info.shape[first:] != info.shape[first:] or ranks[0] != ranks[1]:
            self._misfits.append(
                f"{info.name}: shape {list(source.info.shape)} in {expert.reference}, "
                f"{list(info.shape)} in the base"
            )
        elif not source.info.dtype.mergeable:
            self._misfits.append(
                f"{info.name}: {source.info.dtype.name} in {expert.reference}, "
                f"{info.dtype.name} in the base"
            )

    def _check_still_tied(self, expert: Checkpoint | Adapter, name: str) -> None:
        """Tensors that the base ties must not have come apart in an expert."""
        key = self.canonical(name)
        if key == name:
            return
        if isinstance(expert, Adapter):
            tied = keeps_tied(expert, self.base, key, name)
        else:
            both = {key, name} <= expert.tensors.keys()
            tied = not both or name in self._ties[id(expert)].get(key, ())
        if not tied:
            self._misfits.append(
                f"{name}: tied to {key} in the base, but not in {expert.reference}: untie the base "
                "(store both, tie_word_embeddings: false), or leave that expert out"
            )

    def extra(self, expert: Checkpoint) -> Iterator[tuple[str, str | None]]:
        """Every tensor that the base lacks, and one of the base's that it is tied to, or None."""
        for name in expert.tensors:
            if name not in self.base.tensors:
                ties = (self._ties[id(c)].get(name, ()) for c in (expert, self.base))
                tied = (other for other in itertools.chain(*ties) if other in self.base.tensors)
                yield name, next(tied, None)

    def _judge_extra(self, expert: Checkpoint) -> None:
        for name, tied in self.extra(expert):
            if tied:
                self.left_out[f"{expert.reference}: {name}"] = f"tied to {tied}"
            elif self.options.allow_extra:
                self.left_out[f"{expert.reference}: {name}"] = "not in the base"
            else:
                self._misfits.append(
                    f"{name}: in {expert.reference}, not in the base (--allow-extra leaves it out)"
                )

    def _tied_groups(self, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
        """Every tied name with the others of its group."""
        groups: dict[str, tuple[str, ...]] = {}
        for alias, kept in (*checkpoint.aliases.items(), *self._equal_tables(checkpoint)):
            members = {alias, kept, *groups.get(alias, ()), *groups.get(kept, ())}
            groups.update({name: tuple(sorted(members - {name})) for name in members})
        return groups

    def _equal_tables(self, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
        """Vocabulary tables stored twice under a config that ties them: read and compared."""
        if checkpoint.config.get("tie_word_embeddings") is not True:
            return
        tables = [self.source(checkpoint, t.name) for t in tables_of_config(checkpoint)]
        for one, other in itertools.combinations(tables, 2):
            alike = (one.info.shape, one.info.dtype) == (other.info.shape, other.info.dtype)
            if alike and same_data((one.file, one.info), (other.file, other.info)):
                yield one.info.name, other.info.name
