"""HTML pages and terminal tables of `resm compare` and `resm inspect`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from resm_kernels.engine.comparison import Comparison, Distance, by_module
from resm_kernels.engine.inspection import Change, InspectedTensor, Inspection
from resm_kernels.report.html import expert_names
from resm_kernels.report.page import (
    Detail,
    Grid,
    digits,
    document,
    esc,
    flag,
    mean,
    metric,
    number,
    plain,
    some,
    table,
    tiles,
)

SHOWN = 20
MAX_LISTED = 2000
COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
ADVICE = "Nothing looks wrong: these experts can be merged."


def comparison_page(found: Comparison) -> str:
    """Draw a comparison."""
    by_name = {d.name: d for d in found.tensors}
    grid = Grid({d.name: d.shape for d in found.tensors})
    differing = [d for d in found.tensors if d.equal_share < 1.0]
    farthest = found.tensors[0] if found.tensors else None
    worst = farthest.name if farthest else ""
    maps = [
        metric(
            grid,
            "Relative distance",
            "‖A - B‖ / ‖A‖ of every weight.",
            {"": _numbers(by_name, lambda d: d.relative)},
        ),
        metric(
            grid,
            "Distance against the change",
            "‖A - B‖ / ‖A - W₀‖: 1 is as far as A is from the base.",
            {"": _numbers(by_name, lambda d: d.of_deltas)},
        ),
        metric(
            grid,
            "Cosine of the changes",
            "Between A - W₀ and B - W₀; 1 is the same direction.",
            {"": _numbers(by_name, lambda d: d.cosine)},
        ),
        metric(
            grid,
            "Equal entries",
            "Share of entries with the same value in A and B.",
            {"": _numbers(by_name, lambda d: d.equal_share)},
        ),
    ]
    details = [
        Detail(
            grid.title(place),
            "",
            (),
            [
                (label, digits(mean(value(by_name[name]) for name in names)))
                for label, value in DISTANCES.items()
            ],
        )
        for place, names in grid.cells.items()
    ]
    modules = table(
        ["kind of weight", "weights", "mean distance", "largest"],
        [(esc(n), str(count), digits(m), digits(top)) for n, count, m, top in _modules(found)],
        1,
    )
    rows = [
        (esc(d.name), esc(" / ".join(dict.fromkeys(d.dtypes))), *map(digits, _row(d)))
        for d in found.tensors[:MAX_LISTED]
    ]
    each = table(["weight", "dtype", *DISTANCES], rows, 2)
    base = f", base {plain(found.base)}" if found.base else ""
    sections = [
        f"<p class=mono>A: {esc(found.a)}<br>B: {esc(found.b)}{esc(base)}</p>",
        tiles(
            [
                ("equal" if found.equal else "not equal", "every tensor, shape, dtype, value"),
                (f"{len(found.tensors):,}", "tensors compared"),
                (f"{len(differing):,}", "differ"),
                (digits(farthest.relative if farthest else None), "largest relative distance"),
            ]
        ),
        *(flag("warning", head, text) for head, text in _misfits(found)),
        "<h2>By kind of weight</h2>",
        f"<div class=card>{modules}</div>",
        "<h2>Layer by layer</h2>",
        *maps,
        "<div class=card id=detail></div>",
        "<h2>All weights, farthest first</h2>",
        f"<details class=card><summary>{len(rows):,} rows</summary>{each}</details>",
    ]
    return document(
        f"{expert_names([found.a])[0][3:]} against {expert_names([found.b])[0][3:]}",
        "comparison",
        "\n".join(sections),
        details=details,
        first=next((k for k, names in enumerate(grid.cells.values()) if worst in names), 0),
    )


DISTANCES: Mapping[str, Callable[[Distance], float | None]] = {
    "‖A-B‖ / ‖A‖": lambda d: d.relative,
    "largest |A-B|": lambda d: d.largest,
    "equal entries": lambda d: d.equal_share,
    "‖A-B‖ / ‖A-W₀‖": lambda d: d.of_deltas,
    "cosine": lambda d: d.cosine,
}
SHORT = ("‖A-B‖/‖A‖", "largest", "equal", "/‖A-W₀‖", "cosine")
"""The same for 80 columns."""


def _row(distance: Distance) -> list[float | None]:
    return [value(distance) for value in DISTANCES.values()]


def _numbers(
    found: Mapping[str, Distance], value: Callable[[Distance], float | None]
) -> dict[str, float]:
    return {name: n for name, d in found.items() if (n := number(value(d))) is not None}


def _modules(found: Comparison) -> list[tuple[str, int, float, float]]:
    return list(itertools.islice(by_module(found), MAX_LISTED))


def _misfits(found: Comparison) -> list[tuple[str, str]]:
    shapes = [f"{n}: {list(a)} and {list(b)}" for n, (a, b) in found.shapes.items()]
    groups = {
        "only in A": found.only_a,
        "only in B": found.only_b,
        "of another shape": shapes,
        "not in the base": found.not_in_base,
    }
    return [
        (f"{len(names):,} tensors {what}", plain(some(names, 8, 90), 800))
        for what, names in groups.items()
        if names
    ]


def comparison_table(found: Comparison) -> RenderableType:
    """A comparison for the terminal: modules, then the farthest tensors."""
    if found.equal:
        return Text(f"equal: {len(found.tensors):,} tensors, every value the same")
    modules = _columns("by kind of weight", ["weights", "count", "mean ‖A-B‖/‖A‖", "largest"])
    kinds = _modules(found)
    for name, count, middle, top in kinds[:SHOWN]:
        modules.add_row(Text(plain(name)), str(count), digits(middle), digits(top))
    columns = SHORT if found.base else SHORT[:3]
    each = _columns("farthest first", ["weight", *columns])
    for distance in found.tensors[:SHOWN]:
        values = _row(distance)[: len(columns)]
        each.add_row(Text(plain(distance.name)), *map(digits, values))
    hidden = len(found.tensors) - SHOWN
    more = [Text(f"and {hidden:,} more: see --json or --html")] if hidden > 0 else []
    lines = [Text(f"{head}: {text}", style="yellow") for head, text in _misfits(found)]
    return Group(modules, each, *more, *lines)


def _columns(title: str, heads: Sequence[str]) -> Table:
    """A table whose first column is text."""
    made = Table(title=Text(title, style="bold"), title_justify="left", box=None)
    made.add_column(heads[0], overflow="fold", min_width=16)
    for head in heads[1:]:
        made.add_column(head, justify="right", overflow="fold")
    return made


HEADS = ("expert", "changed", "‖D‖ / ‖W₀‖", "outlier share", "sparsity", "rank")


def inspection_page(found: Inspection) -> str:
    """Draw an inspection."""
    names = expert_names(found.experts)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    grid = Grid({tensor.name: tensor.shape for tensor in found.tensors})

    def maps(value: Callable[[Change], object]) -> dict[str, dict[str, float]]:
        return {
            name: {
                tensor.name: n
                for tensor in found.tensors
                if (change := tensor.changes[t]) and (n := number(value(change))) is not None
            }
            for t, name in enumerate(names)
        }

    def pairs(what: str) -> dict[str, dict[str, float]]:
        return {
            f"{t + 1} and {u + 1}": {
                tensor.name: n
                for tensor in found.tensors
                if i < len(values := getattr(tensor, what)) and (n := number(values[i])) is not None
            }
            for i, (t, u) in enumerate(itertools.combinations(range(len(names)), 2))
        }

    interference = {x.name: x.interference for x in found.tensors if x.interference is not None}
    drawn = [
        metric(
            grid,
            "Size of each expert's change",
            "‖D‖ / ‖W₀‖ against the base's weight; unrelated models have 1.4.",
            maps(lambda c: c.relative),
        ),
        metric(
            grid,
            "Changed entries",
            "Share of entries that differ from the base's.",
            maps(lambda c: c.changed_share),
        ),
        metric(
            grid,
            "Outlier share",
            "Share of the change's absolute mass above mean + 3 standard deviations.",
            maps(lambda c: c.outlier_share),
        ),
        metric(
            grid,
            "Sparsity",
            "Share of entries at or below 0.1 rms of the change.",
            maps(lambda c: c.sparsity),
        ),
        metric(grid, "Numerical rank", "Of each expert's change.", maps(lambda c: c.rank)),
        metric(
            grid,
            "Cosine of changes",
            "Between two experts: 1 the same direction, 0 independent, below 0 in conflict.",
            pairs("cosines"),
        ),
        metric(
            grid,
            "Overlap of leading subspaces",
            "Mean squared cosine of the angles between the leading 64 directions of two experts.",
            pairs("overlaps"),
        ),
        metric(
            grid,
            "Interference between experts",
            "TSV-M's singular task interference as a multiple of chance.",
            {"": interference},
            ratio=True,
        ),
    ]
    details = [
        _detail(grid.title(place), [by_name[name] for name in group], len(names))
        for place, group in grid.cells.items()
    ]
    flags = [flag(f.severity, f.what, f.advice) for f in found.findings]
    listed = "".join(f"<br>{esc(f'{t}. {e}')}" for t, e in enumerate(found.experts, start=1))
    worst = sum(finding.severity == "error" for finding in found.findings)
    summary = [
        (f"{len(found.tensors):,}", "float tensors of the base"),
        (f"{len(names)}", "experts"),
        (f"{worst:,}", "errors"),
        (f"{len(found.findings) - worst:,}", "warnings and notes"),
    ]
    sections = [
        f"<p class=mono>base: {esc(found.base)}{listed}</p>",
        tiles(summary),
        "<h2>Findings</h2>",
        *(flags or [flag("good", ADVICE, "")]),
        "<h2>Layer by layer</h2>",
        *drawn,
        "<div class=card id=detail></div>",
    ]
    many = f"{len(names)} experts" if len(names) > 1 else "1 expert"
    title = f"{many} of {expert_names([found.base])[0][3:]}"
    return document(
        title, "before merging", "\n".join(sections), heads=HEADS, names=names, details=details
    )


def _detail(title: str, group: Sequence[InspectedTensor], count: int) -> Detail:
    def over(t: int, value: Callable[[Change], object]) -> str:
        return digits(mean(value(c) for tensor in group if (c := tensor.changes[t]) is not None))

    rows = [[over(t, value) for value in CHANGES.values()] for t in range(count)]
    pairs = [f"{t + 1}-{u + 1}" for t, u in itertools.combinations(range(count), 2)]

    def by_pair(values: Sequence[float | None]) -> str:
        found = zip(pairs, values, strict=False)
        return ", ".join(f"{p}: {digits(v)}" for p, v in found if v is not None)

    one = group[0]
    facts = [
        ("cosine of changes", by_pair(one.cosines) if len(group) == 1 else ""),
        ("overlap of subspaces", by_pair(one.overlaps) if len(group) == 1 else ""),
    ]
    return Detail(title, " x ".join(map(str, one.shape)), rows, facts)


CHANGES: Mapping[str, Callable[[Change], float | None]] = {
    "changed": lambda c: c.changed_share,
    "‖D‖ / ‖W₀‖": lambda c: c.relative,
    "outlier share": lambda c: c.outlier_share,
    "sparsity": lambda c: c.sparsity,
    "rank": lambda c: c.rank,
}


def inspection_table(found: Inspection) -> RenderableType:
    """An inspection for the terminal: a line for each expert, then what looks wrong."""
    heads = ["expert", "tensors", "unchanged", "mean ‖D‖/‖W₀‖", "mean outlier share"]
    listed = _columns(f"base {plain(found.base)}", heads)
    for t, expert in enumerate(found.experts):
        changes = [c for x in found.tensors if (c := x.changes[t]) is not None]
        listed.add_row(
            Text(plain(expert)),
            f"{len(changes):,}",
            f"{sum(c.changed_share == 0.0 for c in changes):,}",
            digits(mean(c.relative for c in changes)),
            digits(mean(c.outlier_share for c in changes)),
        )
    pairs = _columns("between experts", ["pair", "mean cosine", "mean overlap"])
    for i, (t, u) in enumerate(itertools.combinations(range(len(found.experts)), 2)):
        cosines = mean(x.cosines[i] for x in found.tensors if i < len(x.cosines))
        overlaps = mean(x.overlaps[i] for x in found.tensors if i < len(x.overlaps))
        pairs.add_row(f"{t + 1} and {u + 1}", digits(cosines), digits(overlaps))
    lines = [
        Text.assemble(
            (f"{f.severity}: {plain(f.what, 600)}", COLOURS[f.severity]), f"\n  {f.advice}"
        )
        for f in found.findings
    ]
    between = [pairs] if len(found.experts) > 1 else []
    return Group(listed, *between, *(lines or [Text(ADVICE, style="green")]))
