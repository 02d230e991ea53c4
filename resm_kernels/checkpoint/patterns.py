"""Regular expressions from files: matched in bounded time, where `re` can take for ever."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, field

MAX_PATTERN = 1000
"""Longest pattern, in characters."""
MAX_NESTING = 20
"""Most groups inside one another."""
MAX_STEPS = 5_000_000
"""Most steps that a matcher takes in its life: some seconds."""

PARSING = 20
"""Steps that reading one character of a pattern counts for."""


class PatternError(ValueError):
    """A pattern that is no regular expression, is outside the subset, or takes too long."""


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True)
class _Character:
    accepts: re.Pattern[str]


@dataclass(frozen=True)
class _Anchor:
    at_end: bool


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    branches: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    part: _Node
    low: int
    high: int | None


_Node = _Text | _Character | _Anchor | _Sequence | _Choice | _Repeat
_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_COUNTS = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
_PLAIN = re.compile(r"[\w.-]*")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^]\\])*\]")


class _Parser:
    """Recursive descent over the subset of Python's syntax that describes regular languages."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def parse(self) -> _Node:
        if len(self.pattern) > MAX_PATTERN:
            raise PatternError(f"longer than {MAX_PATTERN} characters")
        node = self._choice(0)
        if self.at < len(self.pattern):
            raise PatternError(f"unbalanced parenthesis at {self.at}")
        return node

    def _peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _choice(self, depth: int) -> _Node:
        if depth > MAX_NESTING:
            raise PatternError(f"more than {MAX_NESTING} groups inside one another")
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            part = self._repeated(self._atom(depth))
            last = parts[-1] if parts else None
            if isinstance(part, _Text) and isinstance(last, _Text):
                parts[-1] = _Text(last.text + part.text)
            else:
                parts.append(part)
        return _Sequence(tuple(parts))

    def _atom(self, depth: int) -> _Node:
        start, mark = self.at, self._peek()
        self.at += 1
        if mark == "(":
            if self.pattern.startswith("?:", self.at):
                self.at += 2
            elif self._peek() == "?":
                raise PatternError(
                    f"the group {self.pattern[start : start + 4]!r} is not supported"
                )
            inside = self._choice(depth + 1)
            if self._peek() != ")":
                raise PatternError(f"missing ) for the group at {start}")
            self.at += 1
            return inside
        if mark in ("^", "$"):
            return _Anchor(mark == "$")
        if mark in _QUANTIFIERS or self._counts(start):
            raise PatternError(f"nothing to repeat at {start}")
        if mark == "[":
            found = _CLASS.match(self.pattern, start)
            if found is None:
                raise PatternError(f"unterminated character set at {start}")
            self.at = found.end()
            return self._character(found[0])
        if mark == "\\":
            letter = self._peek()
            self.at += 1
            if letter and letter in "dDwWsS":
                return self._character(mark + letter)
            if not letter or letter.isalnum():
                raise PatternError(f"the escape {mark + letter!r} is not supported")
            return _Text(letter)
        return self._character(".") if mark == "." else _Text(mark)

    def _character(self, text: str) -> _Character:
        if text[0] == "[" and any(pair in text[1:] for pair in ("[", "--", "&&", "~~", "||")):
            raise PatternError(f"the character set {text!r} is not supported")
        try:
            return _Character(re.compile(text))
        except re.error as error:
            raise PatternError(str(error)) from error

    def _repeated(self, atom: _Node) -> _Node:
        mark, counts = self._peek(), self._counts(self.at)
        low, high = _QUANTIFIERS.get(mark, (1, 1))
        if mark in _QUANTIFIERS:
            self.at += 1
        elif counts:
            if max(len(counts[1]), len(counts[3])) > 6:
                raise PatternError(f"too many repeats at {self.at}")
            self.at = counts.end()
            low = int(counts[1] or 0)
            high = low if not counts[2] else int(counts[3]) if counts[3] else None
            if high is not None and high < low:
                raise PatternError("a repeat whose minimum passes its maximum")
        else:
            return atom
        if isinstance(atom, _Anchor):
            raise PatternError("a repeated anchor is not supported")
        if self._peek() == "?":
            self.at += 1
        if self._peek() in _QUANTIFIERS or self._counts(self.at):
            raise PatternError(f"a repeat of a repeat at {self.at}")
        return _Repeat(atom, low, high)

    def _counts(self, at: int) -> re.Match[str] | None:
        found = _COUNTS.match(self.pattern, at)
        return found if found and (found[1] or found[2]) else None


@dataclass
class Matcher:
    r"""Matches dotted names against patterns as PEFT does: `re.match(r"(.*\.)?(PATTERN)$", name)`.

    A set of positions is carried through the pattern, so no pattern takes more than a polynomial
    time, and `MAX_STEPS` bounds all that one matcher does. Supported are text, `.`, sets, `\d`
    and its kin, groups, alternatives, repeats, `^` and `$`; the rest (look-around, references,
    flags) raises `PatternError`.
    """

    steps: int = 0
    _parsed: dict[str, _Node | None] = field(default_factory=dict)
    _name: str | None = None
    _starts: Set[int] = frozenset()

    def matches(self, pattern: str, name: str) -> bool:
        """Whether a dotted name, or what follows one of its dots, matches the pattern."""
        if pattern not in self._parsed:
            self._count(PARSING * len(pattern))
            plain = len(pattern) <= MAX_PATTERN and _PLAIN.fullmatch(pattern)
            self._parsed[pattern] = None if plain else _Parser(pattern).parse()
        if name is not self._name:
            self._count(1 + len(name))
            if "\n" in name:
                raise PatternError("a name of several lines")
            self._name = name
            self._starts = {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
        node = self._parsed[pattern]
        if node is None:
            return self._matches_plain(pattern, name)
        return len(name) in self._ends(node, name, self._starts)

    def _matches_plain(self, pattern: str, name: str) -> bool:
        """Words and dots, as EVA writes hundreds of: a match has the pattern's length."""
        start = len(name) - len(pattern)
        self._count(1)
        if start < 0 or (start and name[start - 1] != "."):
            return False
        self._count(len(pattern) // 8)
        return all(p in (".", n) for p, n in zip(pattern, name[start:], strict=True))

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise PatternError("takes too long to match")

    def _ends(self, node: _Node, name: str, starts: Set[int]) -> Set[int]:
        """Where a match of the node can end that begins at one of the starts."""
        self._count(1 + len(starts))
        if not starts:
            return starts
        if isinstance(node, _Text):
            return {i + len(node.text) for i in starts if name.startswith(node.text, i)}
        if isinstance(node, _Character):
            return {i + 1 for i in starts if i < len(name) and node.accepts.match(name, i)}
        if isinstance(node, _Anchor):
            return starts & {len(name) if node.at_end else 0}
        if isinstance(node, _Sequence):
            for part in node.parts:
                starts = self._ends(part, name, starts)
            return starts
        if isinstance(node, _Choice):
            return set().union(*(self._ends(branch, name, starts) for branch in node.branches))
        for _ in range(node.low):
            starts = self._ends(node.part, name, starts)
            if not starts:
                return starts
        found, fresh, count = set(starts), starts, node.low
        while fresh and (node.high is None or count < node.high):
            fresh = self._ends(node.part, name, fresh) - found
            found |= fresh
            count += 1
        return found
