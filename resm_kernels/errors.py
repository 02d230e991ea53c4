"""Exception types: every user's mistake is one `ResmError` that says how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_TEXT = 4000
"""Most characters of one part of a message."""


class ResmError(Exception):
    """Base of every error this package raises on purpose.

    Parameters
    ----------
    what : str
        What went wrong, naming the file and the tensor where there is one.
    got, expected, fix : str, optional
        What was found, what would have been right, and what the user can do.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.fix = fix
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:  # errors come from other processes too
        return _again, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        lines = [_cut(self.what)]
        for label, text in (("got", self.got), ("expected", self.expected), ("fix", self.fix)):
            if text is not None:
                lines.append(f"  {label}: {_cut(text)}")
        return "\n".join(lines)


def _again(kind: type[ResmError], args: tuple[Any, ...], state: dict[str, Any]) -> ResmError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def printable(text: str) -> str:
    """A text in which names from files cannot command a terminal or a browser."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _cut(text: str, most: int = MAX_TEXT) -> str:
    """Names of 100 MB are legal in a checkpoint, and nobody reads them."""
    if len(text) <= most:
        return text
    start, end = text[: most * 3 // 4], text[-most // 4 :]
    return f"{start} ...({len(text) - most:,} characters)... {end}"


class UsageError(ResmError):
    """An argument or option that cannot be meant: exit code 2."""

    exit_code = 2


class RecipeError(UsageError):
    """One or more mistakes in a recipe, all reported together."""

    def __init__(self, source: str, mistakes: Sequence[str]) -> None:
        self.source = source
        self.mistakes = tuple(mistakes)
        count = len(self.mistakes)
        head = f"{source}: {count} mistake{'s' if count != 1 else ''} in the recipe"
        super().__init__("\n".join([head, *(f"  - {_cut(m, 500)}" for m in self.mistakes)]))


class CheckpointError(ResmError):
    """A checkpoint that cannot be found, read or trusted."""


class PlanError(ResmError):
    """Inputs that do not fit together, or a merge that does not fit this machine."""


class OutputError(ResmError):
    """An output folder that cannot be written, resumed or replaced."""


class NonFiniteError(ResmError):
    """NaN or Inf in an input, or produced by the cast to the output dtype."""


class NumericsError(ResmError):
    """A factorisation that did not meet its certificate on any backend."""


class VerificationError(ResmError):
    """A finished output that no longer matches its manifest."""


class MissingDependencyError(ResmError):
    """An optional package that the asked-for feature needs."""
