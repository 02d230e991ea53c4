"""Which backend factors what on a GPU: a pure function of a table that is kept as data.

`crossover.json` holds a table for every card that was measured (`make gpu` proposes one) and one
for all cards, which asks for nothing that published timings do not support.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal, get_args

from resm_kernels.errors import ResmError

SCHEMA = 1
Operation = Literal["eigh", "leading", "svd"]
BACKENDS: dict[Operation, tuple[str, ...]] = {
    "eigh": ("torch", "loop", "syev_batched", "syevd"),
    "leading": ("torch", "syevdx"),
    "svd": ("torch", "gesvdp"),
}
"""What each operation can run on; `loop` is torch for one matrix after another."""
QUANTITIES = ("batch", "n", "aspect", "share")
DTYPES = ("float32", "float64")
Version = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """What is to be factored.

    Attributes
    ----------
    operation : str
        `eigh`: all eigenpairs; `leading`: those of the `count` largest eigenvalues; `svd`: the
        thin decomposition.
    shape : m, n
        Of one matrix.
    dtype : str
        `float32` or `float64`.
    batch : int
        Matrices.
    count : int, optional
        Eigenvectors wanted; all by default.
    """

    operation: Operation
    shape: tuple[int, int]
    dtype: str
    batch: int = 1
    count: int | None = None

    def quantity(self, name: str) -> float:
        """One of `QUANTITIES`: n is the shorter side, aspect the longer over it."""
        n = max(1, min(self.shape))
        if name == "batch":
            return self.batch
        if name == "n":
            return n
        if name == "aspect":
            return max(self.shape) / n
        return 1.0 if self.count is None else self.count / n


@dataclass(frozen=True)
class Rule:
    """A backend for the problems whose quantities lie in these ranges, both ends included.

    Attributes
    ----------
    dtype : str or None
        None for any.
    torch : lowest and highest version
        The second is left out of the range; None for no bound.
    """

    operation: Operation
    backend: str
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    dtype: str | None = None
    torch: tuple[Version | None, Version | None] = (None, None)

    def holds(self, problem: Problem, torch_version: Version) -> bool:
        """Whether it speaks of this problem under this torch."""
        low, high = self.torch
        return (
            self.operation == problem.operation
            and self.dtype in (None, problem.dtype)
            and (low is None or torch_version >= low)
            and (high is None or torch_version < high)
            and all(_inside(problem.quantity(q), *ends) for q, ends in self.ranges.items())
        )


@dataclass(frozen=True)
class Table:
    """The rules for one card, first match first; `card` None for all cards."""

    card: str | None
    measured: bool
    source: str
    rules: tuple[Rule, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None


def choose(table: Table, problem: Problem, usable: Collection[str], torch_version: str) -> str:
    """The backend for a problem: that of the first rule that holds and is usable, else `torch`.

    Parameters
    ----------
    usable : collection of str
        Solvers of the cuSOLVER extension that can be called here; torch always can.
    torch_version : str
        `torch.__version__`.
    """
    version = _version(torch_version)
    for rule in table.rules:
        if rule.backend in ("torch", "loop", *usable) and rule.holds(problem, version):
            return rule.backend
    return "torch"


def table_for(tables: Collection[Table], card: str) -> Table:
    """The card's own rules before those for all cards."""
    named = {table.card: table for table in tables}
    general = named[None]
    if card not in named:
        return general
    return replace(named[card], rules=(*named[card].rules, *general.rules))


@functools.cache
def committed_tables() -> tuple[Table, ...]:
    """The tables of this installation."""
    return parse_tables(committed_text(), "resm_kernels/linalg/crossover.json")


def committed_text() -> str:
    """The file that holds them."""
    file = resources.files("resm_kernels.linalg") / "crossover.json"
    return file.read_text(encoding="utf-8")


def parse_tables(text: str, where: str) -> tuple[Table, ...]:
    """Read the tables; one ResmError lists every mistake.

    Parameters
    ----------
    where : str
        The file's name, for the message.
    """
    mistakes: list[str] = []
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(where, [f"no JSON: {error}"]) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise _malformed(where, [f"schema is not {SCHEMA}"])
    found = content.get("tables")
    tables = [
        _table(entry, f"tables[{i}]", mistakes)
        for i, entry in enumerate(found if isinstance(found, list) else [])
    ]
    cards = [table.card for table in tables]
    mistakes += [f"{cards.count(c)} tables for {c}" for c in set(cards) if cards.count(c) > 1]
    if None not in cards:
        mistakes.append("no table for all cards (card: null)")
    if mistakes:
        raise _malformed(where, mistakes)
    return tuple(tables)


def _table(entry: Any, where: str, mistakes: list[str]) -> Table:
    entry = _typed(entry, dict, where, mistakes) or {}
    if entry.get("card") is not None:
        _typed(entry["card"], str, f"{where}.card", mistakes)
    _typed(entry.get("measured"), bool, f"{where}.measured", mistakes)
    _typed(entry.get("source"), str, f"{where}.source", mistakes)
    rules = _typed(entry.get("rules"), list, f"{where}.rules", mistakes) or []
    versions = _typed(entry.get("versions", {}), dict, f"{where}.versions", mistakes) or {}
    card = entry.get("card")
    return Table(
        card=card if isinstance(card, str) else None,
        measured=entry.get("measured") is True,
        source=str(entry.get("source")),
        rules=tuple(_rule(r, f"{where}.rules[{i}]", mistakes) for i, r in enumerate(rules)),
        versions={str(k): str(v) for k, v in versions.items()},
        commit=entry.get("commit"),
    )


def _rule(entry: Any, where: str, mistakes: list[str]) -> Rule:
    entry = _typed(entry, dict, where, mistakes) or {}
    operation, backend = entry.get("operation"), entry.get("backend")
    if operation not in get_args(Operation):
        mistakes.append(f"{where}.operation is {operation!r}, not one of {', '.join(BACKENDS)}")
    elif backend not in BACKENDS[operation]:
        known = ", ".join(BACKENDS[operation])
        mistakes.append(f"{where}.backend is {backend!r}, not one of {known}")
    if entry.get("dtype") not in (None, *DTYPES):
        mistakes.append(f"{where}.dtype is {entry['dtype']!r}, not one of {', '.join(DTYPES)}")
    for key in sorted(set(entry) - {"operation", "backend", "dtype", "torch", *QUANTITIES}):
        mistakes.append(f"{where}.{key} is unknown")
    ranges = {q: _range(entry[q], f"{where}.{q}", mistakes) for q in QUANTITIES if q in entry}
    versions = entry.get("torch", [None, None])
    bounds: tuple[Version | None, Version | None] = (None, None)
    if _is_pair(versions, str):
        low, high = (None if v is None else _version(v) for v in versions)
        bounds = (low, high)
    else:
        mistakes.append(f"{where}.torch is {versions!r}, not two versions or nulls")
    return Rule(operation, backend, ranges, entry.get("dtype"), bounds)


def _range(value: Any, where: str, mistakes: list[str]) -> tuple[float | None, float | None]:
    if _is_pair(value, int, float):
        low, high = value
        if low is None or high is None or low <= high:
            return low, high
    mistakes.append(f"{where} is {value!r}, not two numbers or nulls in order")
    return None, None


def _is_pair(value: Any, *types: type) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(end is None or type(end) in types for end in value)
    )


def _typed(value: Any, kind: type, where: str, mistakes: list[str]) -> Any:
    if isinstance(value, kind):
        return value
    mistakes.append(f"{where} is {value!r:.60}, not a {kind.__name__}")
    return None


def _inside(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _version(text: str) -> Version:
    """2.12.0+cu130 as (2, 12, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def _malformed(where: str, mistakes: Collection[str]) -> ResmError:
    return ResmError(
        f"{where} is no crossover table",
        got="; ".join(mistakes),
        fix="install resm-kernels again, or correct the file (docs/decisions/0001-cusolver.md)",
    )
