"""Self-contained HTML pages: escaping, numbers, tables, heat maps, and the document around them.

A heat map is a table of coloured cells and a spectrum one polyline, so that no plotting library is
needed: a page of an 8 B model has 250 kB, where plotly alone has 4.8 MB. Nothing is fetched, and a
policy in the page forbids it; script and style are admitted by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import fmean
from typing import Any, Literal

from resm_kernels import __version__
from resm_kernels.errors import printable

MAX_TEXT = 160
"""Longest name that is shown."""
MAX_ROWS, MAX_COLUMNS = 160, 256
"""Largest heat map: kinds of weights by layers."""
MAX_EDGES = 20_000
"""Most ends of intervals in one line of a timeline."""
FINE = 48
"""From so many layers on, cells carry a colour and no number."""
LEVELS = 10
REACH = 8.0
"""Largest ratio with a colour of its own."""


def plain(value: object, most: int = MAX_TEXT) -> str:
    """A text with nothing in it that a terminal or a browser would obey, cut to a length."""
    text = str(value)
    return printable(text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-most // 4 :]}")


def esc(value: object, most: int = MAX_TEXT) -> str:
    """A text for any place in HTML: element or quoted attribute."""
    return html.escape(plain(value, most))


def number(value: object) -> float | None:
    """A finite number, or None for whatever else a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def mean(values: Iterable[object]) -> float | None:
    """The mean of those that are numbers."""
    found = [n for value in values if (n := number(value)) is not None]
    return fmean(found) if found else None


def tiny(value: float) -> str:
    """At most four characters, for a cell."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.00995 or size >= 9999.5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size < 0.995:
        return f"{value:.2f}".replace("0.", ".", 1)
    return f"{value:.1f}" if size < 9.95 else f"{value:.0f}"


def digits(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time for people."""
    if value < 60:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A table; heads are texts, cells are HTML, all columns but the first `texts` stand right."""
    top = "".join(f"<th>{esc(head)}" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows)
    return (
        f'<div class=scroll><table class="list n{texts}"><thead><tr>{top}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Large numbers with their names."""
    cells = (f"<div class=card><b>{esc(n)}</b><span>{esc(what)}</span></div>" for n, what in facts)
    return f"<div class=tiles>{''.join(cells)}</div>"


def card(title: str, content: str) -> str:
    """A box with a heading."""
    return f"<div class=card><h3>{esc(title)}</h3>{content}</div>"


def bar(share: float) -> str:
    """A bar as long as a share of its column."""
    width = f"{100 * max(0.0, min(1.0, share)):.1f}"
    return (
        f'<svg class=bar viewBox="0 0 100 10" preserveAspectRatio=none aria-hidden=true>'
        f'<rect width="{width}" height=10></rect></svg>'
    )


def timeline(edges: Sequence[object], total: float) -> tuple[str, float]:
    """A line of `total` seconds with busy intervals, and their sum.

    Parameters
    ----------
    edges : sequence
        Start, stop, start, stop ... in seconds; pauses too short to be seen are bridged.
    """
    known = [number(edge) for edge in itertools.islice(edges, MAX_EDGES)]
    drawn: list[list[int]] = []
    busy = 0.0
    for start, stop in zip(known[::2], known[1::2], strict=False):
        if start is None or stop is None or not 0 <= start <= stop <= total:
            continue
        busy += stop - start
        left, right = (round(1000 * edge / total) for edge in (start, stop)) if total else (0, 0)
        if drawn and left <= drawn[-1][1] + 1:
            drawn[-1][1] = max(right, drawn[-1][1])
        else:
            drawn.append([left, max(right, left + 1)])
    path = "".join(f"M{left} 5H{right}" for left, right in drawn)
    return (
        '<svg class="bar track" viewBox="0 0 1000 10" preserveAspectRatio=none aria-hidden=true>'
        f'<path d="{path}"></path></svg>',
        busy,
    )


Place = tuple[str, int | None]
"""Kind of weight and layer; None outside of layers."""


class Grid:
    """Where tensors stand in a heat map: kinds of weights by layers.

    The layer is the first number in a dotted name; weights that differ in later numbers alone (the
    experts of a mixture) share a cell.

    Attributes
    ----------
    rows : list of str
        Kinds of weights, matrices first.
    matrix : dict
        Whether a kind has at least two axes.
    columns : list of int or None
        Layers; None holds what is outside of layers.
    cells : dict
        The names of each (row, column) that is drawn, in reading order.
    hidden : int
        Tensors that the largest map has no place for.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        places = {name: _place(name) for name in sorted(shapes)}
        stacks = {stack for stack, layer, _ in places.values() if layer is not None}
        labels: dict[str, bool] = {}
        found: dict[Place, list[str]] = {}
        for name, (stack, layer, rest) in places.items():
            label = f"{stack}.{rest}" if stack and (layer is None or len(stacks) > 1) else rest
            labels[label] = labels.get(label, False) or len(shapes[name]) > 1
            found.setdefault((label, layer), []).append(name)
        self.matrix = labels
        self.rows = sorted(labels, key=lambda label: (not labels[label], _order(label)))[:MAX_ROWS]
        layers = sorted({layer for _, layer in found if layer is not None})[:MAX_COLUMNS]
        outside = any(layer is None for _, layer in found)
        self.columns: list[int | None] = [*([None] if outside else []), *layers]
        self.cells = {
            (row, column): found[row, column]
            for row in self.rows
            for column in self.columns
            if (row, column) in found
        }
        self.hidden = len(shapes) - sum(map(len, self.cells.values()))
        self._index = {place: k for k, place in enumerate(self.cells)}

    def title(self, place: Place) -> str:
        """What a cell holds: the tensor, or how many of which kind."""
        names, (row, column) = self.cells[place], place
        if len(names) == 1:
            return plain(names[0])
        where = "outside layers" if column is None else f"layer {column}"
        return plain(f"{row} of {where}: means of {len(names)} weights")

    def heat_map(self, values: Mapping[str, float], scale: Scale, caption: str) -> str:
        """One map, what is outside of layers in a line below it; empty where there are no values.

        Vectors are left to the tables.
        """
        means = {
            (row, column): fmean(known)
            for (row, column), names in self.cells.items()
            if self.matrix[row] and (known := [values[name] for name in names if name in values])
        }
        if not means:
            return ""
        drawn = [f"<figure><figcaption>{esc(caption)}</figcaption>"] if caption else ["<figure>"]
        layers = [column for column in self.columns if column is not None]
        rows = list(dict.fromkeys(row for row, column in means if column is not None))
        if rows:
            fine = len(layers) > FINE
            head = "".join(
                f"<th colspan=8>{layer}" if fine else f"<th>{layer}"
                for layer in (layers[::8] if fine else layers)
            )
            body = "".join(
                f'<tr><th title="{esc(row)}">{esc(row, 60)}</th>'
                + "".join(self._cell(row, layer, means, scale) for layer in layers)
                for row in rows
            )
            drawn.append(_scrolled(f"heat{' fine' * fine}", head, body))
        apart = [row for row, column in means if column is None]
        if apart:
            body = "".join(f"<th>{esc(r, 60)}{self._cell(r, None, means, scale)}" for r in apart)
            drawn.append(_scrolled("heat apart", "", f"<tr>{body}"))
        return "".join([*drawn, "</figure>"])

    def _cell(
        self, row: str, column: int | None, means: Mapping[Place, float], scale: Scale
    ) -> str:
        value = means.get((row, column))
        if value is None:
            return "<td>"
        return f"<td class={scale.kind(value)} data-k={self._index[row, column]}>{tiny(value)}"


def _scrolled(kind: str, head: str, body: str) -> str:
    top = f"<thead><tr><th>{head}</thead>" if head else ""
    return f'<div class=scroll><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _place(name: str) -> tuple[str, int | None, str]:
    """The stack of layers, the layer in it, and the kind of weight."""
    parts = name.removesuffix(".weight").split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isascii() and part.isdecimal() and len(part) <= 9:
            rest = ["*" if p.isdecimal() else p for p in parts[i + 1 :]]
            return ".".join(parts[:i]), int(part), ".".join(rest)
    return ".".join(parts[:-1]), None, parts[-1]


ORDER = ("embed", "q_proj", "k_proj", "v_proj", "qkv", "o_proj", "gate", "up", "down", "lm_head")


def _order(label: str) -> tuple[int, str]:
    """Along the way of the data, as far as names tell."""
    last = label.rsplit(".", 1)[-1]
    return next((i for i, part in enumerate(ORDER) if part in last), len(ORDER)), label


@dataclass(frozen=True)
class Scale:
    """Colours for a range of values: linear from low to high, or logarithmic on both sides of 1."""

    low: float
    high: float
    ratio: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, ratio: bool = False) -> Scale:
        """The scale of all values that are drawn with it; ratios past `REACH` have its colour."""
        found = [*values] or [0.0]
        if not ratio:
            return cls(min(found), max(found))
        reach = max(max(v, 1 / v) if v > 0 else REACH for v in found)
        reach = min(max(reach, 1.0), REACH)
        return cls(1 / reach, reach, ratio=True)

    def kind(self, value: float) -> str:
        """The class of a cell."""
        width = self.high - self.low
        # Values that agree to a millionth are one colour.
        if width <= 1e-6 * max(abs(self.low), abs(self.high)):
            return f"{self._letter}{LEVELS // 2}"
        value = max(self.low, min(self.high, value))
        share = (value - self.low) / width
        if self.ratio:
            share = (1 + math.log(value) / math.log(self.high)) / 2
        return f"{self._letter}{round(LEVELS * share)}"

    @property
    def _letter(self) -> str:
        return "d" if self.ratio else "s"

    @property
    def legend(self) -> str:
        """The colours with their ends."""
        steps = "".join(f"<i class={self._letter}{i}></i>" for i in range(LEVELS + 1))
        return f"<div class=legend>{digits(self.low)}<span>{steps}</span>{digits(self.high)}</div>"


def metric(
    grid: Grid,
    title: str,
    explained: str,
    maps: Mapping[str, Mapping[str, float]],
    *,
    ratio: bool = False,
) -> str:
    """Heat maps of one number, by caption, in one scale; equal ones are drawn once."""
    values = [value for one in maps.values() for value in one.values()]
    if not values:
        return ""
    scale = Scale.of(values, ratio=ratio)
    contents = [*maps.values()]
    if len(contents) > 1 and all(one == contents[0] for one in contents):
        maps = {"the same for all": contents[0]}
    drawn = "".join(grid.heat_map(one, scale, caption) for caption, one in maps.items())
    return (
        f"<section class='card metric'><header><h3>{esc(title)}</h3><p>{esc(explained, 400)}</p>"
        f"{scale.legend}</header><div class=maps>{drawn}</div></section>"
    )


@dataclass(frozen=True)
class Detail:
    """What is shown of one cell when it is chosen.

    Attributes
    ----------
    title, subtitle : str
    rows : sequence of sequences of str
        Texts for each model, as the page's heads name them.
    facts : sequence of (label, text)
    at, spectra
        Places of singular values, from 1, and the values at them, per model.
    """

    title: str
    subtitle: str
    rows: Sequence[Sequence[str]]
    facts: Sequence[tuple[str, str]]
    at: Sequence[int] = ()
    spectra: Sequence[Sequence[float]] = ()

    def to_dict(self, texts: dict[str, int]) -> dict[str, Any]:
        """As the script reads it: texts by their number, spectra as steps of 200 log10."""

        def text(value: str) -> int:
            return texts.setdefault(value, len(texts))

        content: dict[str, Any] = {
            "t": self.title,
            "s": text(self.subtitle),
            "r": ["|".join(row) for row in self.rows],
            "f": [[text(label), text(value)] for label, value in self.facts if value],
        }
        largest = max((value for one in self.spectra for value in one), default=0.0)
        if largest > 0.0:
            content["m"] = largest
            content["x"] = text(" ".join(map(str, self.at)))
            logs = [
                [round(200 * math.log10(max(v / largest, 1e-12))) for v in one]
                for one in self.spectra
            ]
            content["y"] = [[b - a for a, b in itertools.pairwise([0, *one])] for one in logs]
        return content


def document(
    title: str,
    over: str,
    body: str,
    *,
    heads: Sequence[str] = (),
    names: Sequence[str] = (),
    details: Sequence[Detail] = (),
    first: int = 0,
) -> str:
    """A whole page around its sections.

    Parameters
    ----------
    heads, names
        Heads of the rows of details, and the models they are of.
    details : sequence of Detail
        By the numbers of the heat maps' cells.
    first : int
        The one shown when the page opens.
    """
    room = resources.files("resm_kernels.report")
    style, script = ((room / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    texts: dict[str, int] = {}
    data = {
        "head": list(heads),
        "names": list(names),
        "cells": [detail.to_dict(texts) for detail in details],
        "texts": list(texts),
        "first": first,
    }
    # In a script element only these letters could end it.
    text = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{esc(title)}</title>\n<style>{style}</style></head>\n<body><main>\n"
        f"<div class=over>{esc(over)}</div><h1>{esc(title)}</h1>\n{body}\n"
        f"<footer>Made by resm-kernels {__version__}; nothing is loaded from elsewhere. "
        "What the numbers mean: docs/report.md.</footer></main>\n"
        f'<script type="application/json" id="data">{text}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


Severity = Literal["error", "warning", "note", "good"]


def flag(severity: Severity, head: str, text: str) -> str:
    """A finding."""
    return (
        f"<div class='card flag {severity}'><b>{esc(head, 400)}</b><p>{esc(text, 1000)}</p></div>"
    )


def some(names: Sequence[str], most: int, width: int) -> str:
    """The first names, cut to a width, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(plain(name, width) for name in names[:most]) + more
