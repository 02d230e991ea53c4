"""Which tensor of which checkpoint goes with which; every misfit is found before any work."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from resm_kernels.checkpoint.layout import Checkpoint, TensorInfo, WeightFile
from resm_kernels.checkpoint.reader import read_tensor, same_data
from resm_kernels.engine.options import EngineOptions
from resm_kernels.errors import PlanError
from resm_kernels.methods import matches

TABLES = ("*embed*", "*lm_head*", "*wte*", "*shared.weight", "*output.weight")
"""Names of input and output embeddings, which a config may tie."""


Key = tuple[str, str]
"""What tells inputs apart: the file, and the tensor in it."""


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
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.info.nbytes

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return read_tensor(self.file, self.info)


class Matching:
    """Matches tensors across checkpoints; every misfit is collected and reported together."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[Checkpoint], options: EngineOptions
    ) -> None:
        self.base = base
        self.experts = experts
        self.options = options
        self.left_out: dict[str, str] = {}
        self._home = {
            id(c): {name: f for f in c.files for name in f.tensors} for c in (base, *experts)
        }
        self._ties = {id(c): self._tied_groups(c) for c in (base, *experts)}
        self._misfits: list[str] = []

    def canonical(self, name: str) -> str:
        """The name under which a tied tensor's parameters are looked up, so that it stays tied."""
        tied = self._ties[id(self.base)].get(name, ())
        return min([name, *(other for other in tied if other in self.base.tensors)])

    def source(self, checkpoint: Checkpoint, name: str) -> Source:
        """An input tensor with its file."""
        return Source(self._home[id(checkpoint)][name], checkpoint.tensors[name])

    @functools.cached_property
    def decisions(self) -> dict[str, tuple[str | None, tuple[Source, ...]]]:
        """For every output tensor: why it is copied, or the experts' tensors to merge."""
        decisions = {name: self._decide_one(name, info) for name, info in self.base.tensors.items()}
        for expert in self.experts:
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

    def _decide_one(self, name: str, info: TensorInfo) -> tuple[str | None, tuple[Source, ...]]:
        if info.dtype.opaque:
            self._misfits.append(
                f"{name}: {info.dtype.name} weights of {self.base.reference} cannot be merged; "
                "dequantise them first"
            )
            return None, ()
        if not info.dtype.mergeable:
            return f"{info.dtype.name} tensor of the base", ()
        sources, absent = [], []
        for expert in self.experts:
            source = self._find(expert, name)
            if source is None:
                absent.append(expert.reference)
                continue
            if source.info.shape != info.shape:
                self._misfits.append(
                    f"{name}: shape {list(source.info.shape)} in {expert.reference}, "
                    f"{list(info.shape)} in the base"
                )
            elif not source.info.dtype.mergeable:
                self._misfits.append(
                    f"{name}: {source.info.dtype.name} in {expert.reference}, "
                    f"{info.dtype.name} in the base"
                )
            sources.append(source)
            self._check_still_tied(expert, name)
        if not absent:
            return None, tuple(sources)
        if not self.options.allow_missing:
            self._misfits.append(
                f"{name}: missing from {', '.join(absent)} (--allow-missing copies the base's)"
            )
        return f"missing from {', '.join(absent)}", ()

    def _find(self, checkpoint: Checkpoint, name: str) -> Source | None:
        """A tensor by its name, or by one it is tied to, here or in the base."""
        tied = (self._ties[id(c)].get(name, ()) for c in (checkpoint, self.base))
        for candidate in (name, *itertools.chain(*tied)):
            if candidate in checkpoint.tensors:
                return self.source(checkpoint, candidate)
        return None

    def _check_still_tied(self, expert: Checkpoint, name: str) -> None:
        """Tensors that the base ties must not have come apart in an expert."""
        key = self.canonical(name)
        if key == name or not {key, name} <= expert.tensors.keys():
            return
        if name not in self._ties[id(expert)].get(key, ()):
            self._misfits.append(
                f"{name}: tied to {key} in the base, but not in {expert.reference}: untie the base "
                "(store both, tie_word_embeddings: false), or leave that expert out"
            )

    def _judge_extra(self, expert: Checkpoint) -> None:
        for name in expert.tensors:
            if name in self.base.tensors:
                continue
            ties = (self._ties[id(c)].get(name, ()) for c in (expert, self.base))
            tied = [other for other in itertools.chain(*ties) if other in self.base.tensors]
            if tied:
                self.left_out[f"{expert.reference}: {name}"] = f"tied to {tied[0]}"
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
        config = checkpoint.config
        if config.get("tie_word_embeddings") is not True:
            return
        text = config.get("text_config")
        sizes = [config.get("vocab_size"), text.get("vocab_size") if isinstance(text, dict) else 0]
        tables = [
            self.source(checkpoint, t.name)
            for t in checkpoint.tensors.values()
            if len(t.shape) == 2 and t.shape[0] in sizes and matches(t.name, TABLES)
        ]
        for one, other in itertools.combinations(tables, 2):
            alike = (one.info.shape, one.info.dtype) == (other.info.shape, other.info.dtype)
            if alike and same_data((one.file, one.info), (other.file, other.info)):
                yield one.info.name, other.info.name
