"""What a merge method is: typed options, the rule for which weights it treats, and its mathematics.

A method sees ONE weight (base and experts of one shape) on whatever device it lies; it opens no
file and knows no checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, Literal, TypeVar

import torch

from resm_kernels.errors import UsageError
from resm_kernels.linalg import Batching, Work
from resm_kernels.methods.inputs import Inputs

LARGEST = 1e30
"""Largest magnitude of a number in a recipe: far beyond use, inside float32."""
Value = bool | int | float | str | tuple[str, ...]
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Option:
    """One parameter of a method, as users write it in a recipe."""

    name: str
    kind: type
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    per_model: bool = False

    def check(self, value: object) -> Value:
        """Return the value in its own type, or raise ValueError saying what is allowed."""
        if self.kind is tuple:
            items = (value,) if isinstance(value, str) else value
            if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
                return tuple(items)
            raise ValueError(f"got {value!r}, expected a list of name patterns")
        if self.kind is str:
            if value in self.choices:
                return str(value)
            raise ValueError(f"got {value!r}, expected one of {', '.join(self.choices)}")
        if self.kind is bool:
            # mergekit writes true and false as 1.0 and 0.0 into the recipes it saves.
            if isinstance(value, bool | int | float) and value in (0, 1):
                return bool(value)
            raise ValueError(f"got {value!r}, expected true or false")
        number = self._check_number(value)
        if self.kind is int and number != int(number):
            raise ValueError(f"got {value!r}, expected a whole number")
        return int(number) if self.kind is int else number

    def _check_number(self, value: object) -> float:
        try:
            number = float(value) if isinstance(value, int | float | str) else None
        except (ValueError, OverflowError):
            number = None
        if number is None or isinstance(value, bool):
            raise ValueError(f"got {value!r}, expected a number")
        low = -LARGEST if self.low is None else self.low
        high = LARGEST if self.high is None else self.high
        if not low <= number <= high:
            bounds = [f">= {low:g}"] * (number < low or self.low is not None)
            bounds += [f"<= {high:g}"] * (number > high or self.high is not None)
            raise ValueError(f"got {value!r}, expected a number {' and '.join(bounds)}".rstrip())
        return number


def option(
    default: Value, help: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """Declare an option as a dataclass field; its name and type come from the annotation."""
    return field(
        default=default, metadata={"help": help, "low": low, "high": high, "per_model": False}
    )


def model_option(
    default: float, help: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """Declare an option with a number for every expert, a `tuple[float, ...]` field."""
    return field(
        default=default, metadata={"help": help, "low": low, "high": high, "per_model": True}
    )


def option_specs(options: type[Any]) -> dict[str, Option]:
    """The options of a method by the name that users write (`lambda_` is written `lambda`)."""
    hints = typing.get_type_hints(options)
    specs = {}
    for f in dataclasses.fields(options):
        hint = hints[f.name]
        literal = typing.get_origin(hint) is Literal
        kind = str if literal else tuple if typing.get_origin(hint) is tuple else hint
        if f.metadata["per_model"]:
            kind = float
        choices = typing.get_args(hint) if literal else ()
        name = f.name.rstrip("_")
        default: Any = f.default
        specs[name] = Option(name, kind, default, choices=choices, **f.metadata)
    return specs


@dataclass(frozen=True)
class Merged:
    """One merged weight and what was done to get it.

    Attributes
    ----------
    tensor : Tensor
        The base's shape, the asked-for dtype.
    rule : str
        The method that ran: the one asked for, or `mean` where it does not treat this weight.
    ranks, weights, outlier_scores : tuple
        Per expert, matrix by matrix where the weight holds several; empty where they have no
        meaning.
    sparsity : float or None
        Mean share of entries at or below the noise floor.
    backends : tuple of str
        Factorisation backends that ran.
    notes : tuple of str
        Every clamp and fallback, in words.
    interference : float or None
    overlaps : tuple of float
        As in `Overlap`, where subspaces were merged; means over several matrices.
    spectra : tuple of Tensor
        Per expert the kept singular values, descending, of all matrices together.
    """

    tensor: torch.Tensor
    rule: str
    ranks: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    outlier_scores: tuple[float, ...] = ()
    sparsity: float | None = None
    backends: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    interference: float | None = None
    overlaps: tuple[float, ...] = ()
    spectra: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Method(Generic[OptionsT]):
    """A merge method: pure functions over one weight.

    Attributes
    ----------
    name, summary, formula, source : str
        For people.
    options : dataclass type
        Fields declared with `option`.
    merge : callable
        (inputs, weights, options, out_dtype) -> Merged.
    declines : callable
        (name, shape, experts, options) -> the reason why a weight gets the mean of deltas
        instead, or None.
    workspace : callable
        (shape, experts, itemsize of the compute dtype, options, device type) -> bytes that
        `merge` may hold beyond its inputs and its output.
    factored_workspace : callable
        (shape, ranks, itemsize, options) -> the same where every expert is given as factors of
        these ranks; None where `workspace` holds.
    batch : callable
        (shape, matrices, experts, itemsize, options, device type) -> Batching: how many of the
        equal matrices of one tensor `prepare` takes at once, and what it holds beside `workspace`.
    prepare : callable
        (matrices, weights, options) -> None: finds out together what `merge` needs of each.
    work : callable or None
        (shape, experts, ranks, itemsize, options, device type) -> the operations of `merge`, at
        most; `ranks` where every expert is given as factors, else None. None for methods that pass
        over the entries: their time goes with bytes.
    uses_base : bool
        Whether the base's values enter the result.
    validate : callable
        (weights, options) -> None, or UsageError where they cannot go together; called while
        planning.
    keeps_base : callable
        (weights, options) -> whether experts that equal the base give the base.
    experts : tuple
        Fewest and most experts (None: any number).
    by_matrix : bool
        Whether it merges linear maps, so that a tensor which holds several is split.
    """

    name: str
    summary: str
    formula: str
    source: str
    options: type[OptionsT]
    merge: Callable[[Inputs, Sequence[float], OptionsT, torch.dtype], Merged]
    workspace: Callable[[Sequence[int], int, int, OptionsT, str], int]
    declines: Callable[[str, Sequence[int], int, OptionsT], str | None]
    batch: Callable[[Sequence[int], int, int, int, OptionsT, str], Batching] = (
        lambda shape, matrices, experts, itemsize, options, device: Batching()
    )
    prepare: Callable[[Sequence[Inputs], Sequence[float], OptionsT], None] = (
        lambda matrices, weights, options: None
    )
    work: Callable[[Sequence[int], int, Sequence[int] | None, int, OptionsT, str], Work] | None = (
        None
    )
    uses_base: bool = True
    validate: Callable[[Sequence[float], OptionsT], None] = lambda weights, options: None
    factored_workspace: Callable[[Sequence[int], Sequence[int], int, OptionsT], int | None] = (
        lambda shape, ranks, itemsize, options: None
    )
    keeps_base: Callable[[Sequence[float], OptionsT], bool] = lambda weights, options: True
    experts: tuple[int, int | None] = (1, None)
    by_matrix: bool = False

    @functools.cached_property
    def specs(self) -> dict[str, Option]:
        """Options by the name that users write."""
        return option_specs(self.options)

    def make_options(self, values: Mapping[str, object], experts: int) -> OptionsT:
        """Build checked options from user-written names; UsageError names every mistake.

        An option per model takes a number for all, or a list of one for each of the `experts`.
        """
        specs, mistakes = self.specs, []
        checked: dict[str, Value | tuple[Value, ...]] = {
            name: (spec.default,) * experts for name, spec in specs.items() if spec.per_model
        }
        for name, value in values.items():
            if name not in specs:
                mistakes.append(f"{name}: unknown; {self.name} has {', '.join(specs) or 'none'}")
                continue
            try:
                if not specs[name].per_model:
                    checked[name] = specs[name].check(value)
                    continue
                each = list(value) if isinstance(value, list | tuple) else [value] * experts
                if len(each) != experts:
                    raise ValueError(f"got {len(each)} values for {experts} experts")
                checked[name] = tuple(specs[name].check(one) for one in each)
            except ValueError as error:
                mistakes.append(f"{name}: {error}")
        if mistakes:
            raise UsageError(f"parameters of {self.name}: " + "; ".join(mistakes))
        return self.options(
            **{f"{n}_" if keyword.iskeyword(n) else n: value for n, value in checked.items()}
        )


def never_declines(name: str, shape: Sequence[int], experts: int, options: object) -> None:
    """For methods that treat every weight alike."""
    return None


def matches(name: str, patterns: Sequence[str]) -> str | None:
    """The first shell-style pattern that a tensor name matches, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
