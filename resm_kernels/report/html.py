"""The HTML report of a merge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import yaml

from resm_kernels.engine.result import Measures, MergeReport, TensorResult
from resm_kernels.methods import METHODS
from resm_kernels.report.page import (
    Detail,
    Grid,
    bar,
    card,
    digits,
    document,
    esc,
    mean,
    metric,
    number,
    plain,
    seconds,
    some,
    table,
    tiles,
    timeline,
)
from resm_kernels.report.tables import size

MAX_NOTES = 60
MAX_RECIPE = 20_000
SLOWEST = 5
MAX_THREADS = 64
POINTS = 18
"""Most values drawn of one spectrum."""
TRUNCATING = ("resm", "tsvm")
HEADS = (
    "expert", "weight", "outlier score", "rank", "‖D‖", "‖D‖ / ‖W₀‖", "‖M‖ / ‖D‖", "retention"
)  # fmt: skip


def merge_page(report: MergeReport) -> str:
    """Draw a report; the same report gives the same text.

    Parameters
    ----------
    report : MergeReport
        Of this or an earlier version: what it does not hold is left out.

    Returns
    -------
    str
        HTML that loads nothing; every text of the report is escaped.
    """
    experts = expert_names([entry["model"] for entry in report.recipe["models"]])
    results = {name: report.tensors[name] for name in sorted(report.tensors)}
    grid = Grid({name: result.shape for name, result in results.items()})
    details = [
        _detail(grid.title(place), [results[name] for name in names], experts)
        for place, names in grid.cells.items()
    ]
    count = len(experts)
    title = f"{report.method} merge of {count} model{'s' if count != 1 else ''}"
    title = f"part of a {title}" if report.part else title
    sections = [
        f"<div class=mono>{esc(report.output)}</div>",
        _summary(report),
        "<h2>What was merged</h2>",
        _inputs(report),
        _notes(report),
        "<h2>Time</h2>",
        _times(report),
        "<h2>Layer by layer</h2>",
        _maps(grid, results, experts),
        "<div class=card id=detail></div>",
        "<noscript><p class=soft>With JavaScript, a chosen cell shows its weight's numbers and "
        "spectrum here.</p></noscript>",
        _all_weights(grid, results, count),
    ]
    return document(
        title,
        f"merge report · plan {plain(report.plan_id)[:12]}",
        "\n".join(sections),
        heads=HEADS,
        names=experts,
        details=details,
        first=_first(grid, results),
    )


def expert_names(models: Sequence[object]) -> list[str]:
    """Short names that tell models apart: number and last part of the path."""
    lasts = [str(model).rstrip("/").rsplit("/", 1)[-1] for model in models]
    return [plain(f"{t}. {last}", 48) for t, last in enumerate(lasts, start=1)]


def _summary(report: MergeReport) -> str:
    moved = report.read_bytes + report.written_bytes
    rate = moved / report.seconds if report.seconds else 0.0
    notes = sum(map(len, report.all_notes.values()))
    facts = [
        (f"{len(report.tensors):,}", "tensors"),
        (seconds(report.seconds), f"on {report.device}, {_workers(report)}"),
        (f"{size(int(rate))}/s", "read and written"),
        (size(report.written_bytes), f"written, {size(report.read_bytes)} read"),
        (size(report.peak_memory), f"peak memory, {size(report.predicted_memory)} planned"),
        (f"{notes:,}", "clamps, fallbacks, warnings"),
    ]
    if report.part:
        facts.append((str(report.part["of"]), "tensors in the whole merge: this is a part"))
    planned = size(report.predicted_device_memory)
    facts += [
        (size(peak), f"peak on {name}, {planned} planned")
        for name, peak in itertools.islice(report.peak_device_memory.items(), MAX_THREADS)
    ]
    if report.cluster and (lost := sum(one["lost"] for one in report.cluster["workers"])):
        facts.append((f"{lost}", "workers lost: others merged their shards"))
    if report.kept_shards:
        facts.append((f"{report.kept_shards:,}", "shards kept from an earlier run"))
    return tiles(facts)


def _workers(report: MergeReport) -> str:
    if report.cluster:
        return f"{len(report.cluster['workers'])} workers of a Ray cluster"
    return f"{report.workers} worker{'s' * (report.workers != 1)}"


def _inputs(report: MergeReport) -> str:
    recipe = report.recipe
    models = [entry["model"] for entry in recipe["models"]]
    settings = [entry.get("parameters") or {} for entry in recipe["models"]]
    weights = [entry.get("weight", 1) for entry in settings]
    digests = [entry.get("digest", "") for entry in report.inputs] or [""] * (len(models) + 1)
    base = recipe.get("base_model", models[0])
    rows = [
        (role, f"<code>{esc(model)}</code>", _short_digest(digest), esc(weight, 60))
        for role, model, weight, digest in zip(
            ["base", *map(str, range(1, len(models) + 1))],
            [base, *models],
            ["", *weights],
            digests,
            strict=True,
        )
    ]
    listed = table(["", "model", "SHA-256 of headers and stamps", "weight"], rows, 3)
    method = METHODS.get(report.method)
    about = ""
    if method is not None:
        about = (
            f"<p>{esc(method.summary, 400)}</p><p><code>{esc(method.formula, 400)}</code></p>"
            f"<p class=soft>{esc(method.source, 400)}</p>"
        )
    rules = ", ".join(f"{count:,} {rule}" for rule, count in sorted(report.rules.items()))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    text = yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True)
    made = f"<p class=soft>{esc(versions, 400)}</p>"
    return (
        "<div class=pair>"
        + card("Inputs", listed + f"<p class=soft>Tensors: {esc(rules, 400)}</p>" + made)
        + card(
            f"Recipe: {plain(report.method)}",
            about
            + f"<details open><summary>parameters</summary><pre>{esc(text, MAX_RECIPE)}</pre>"
            + "</details>",
        )
        + "</div>"
    )


def _short_digest(digest: object) -> str:
    return f'<code title="{esc(digest)}">{esc(str(digest)[:12])}</code>' if digest else "-"


def _notes(report: MergeReport) -> str:
    """Notes that differ in their tensor alone stand together."""
    groups: dict[str, list[str]] = {}
    for name, notes in sorted(report.all_notes.items()):
        for note in notes:
            groups.setdefault(note, []).append(name)
    rows = [
        (esc(note, 500), f"<code>{esc(some(names, 3, 80), 400)}</code>", str(len(names)))
        for note, names in itertools.islice(groups.items(), MAX_NOTES)
    ]
    rows += [
        (f"left out: {esc(reason, 300)}", f"<code>{esc(name, 300)}</code>", "1")
        for name, reason in itertools.islice(sorted(report.left_out.items()), MAX_NOTES)
    ]
    hidden = max(0, len(groups) - MAX_NOTES) + max(0, len(report.left_out) - MAX_NOTES)
    if not rows:
        return "<p class=soft>No fallbacks, clamps or warnings.</p>"
    more = f"<p class=soft>and {hidden:,} more: see resm_report.json</p>" if hidden else ""
    listed = table(["what happened", "where", "tensors"], rows, 2)
    return card("Fallbacks, clamps and warnings", listed + more)


def _times(report: MergeReport) -> str:
    moved = {"read": report.read_bytes, "write": report.written_bytes}
    longest = max(report.stage_seconds.values(), default=0.0)
    rows = []
    for stage, busy in report.stage_seconds.items():
        rate = f"{moved[stage] / busy / 1e9:.3g}" if stage in moved and busy else "-"
        rows.append((esc(stage), seconds(busy), rate, bar(busy / longest if longest else 0.0)))
    order = {"read": 0, "compute": 1, "write": 2, "finish": 3}
    rows.sort(key=lambda row: order.get(row[0], 4))
    stages = table(["stage", "busy", "GB/s", ""], rows, 1)
    why = "<p class=soft>Stages overlap: busy time is summed over their threads.</p>"
    slowest = sorted(report.tensors.values(), key=lambda r: (-r.seconds, r.name))[:SLOWEST]
    most = slowest[0].seconds if slowest else 0.0
    each = table(
        ["weight", "compute", ""],
        [
            (f"<code>{esc(r.name, 70)}</code>", seconds(r.seconds), bar(r.seconds / (most or 1.0)))
            for r in slowest
        ],
        1,
    )
    pair = f"<div class=pair>{card('Stages', stages + why)}{card('Slowest weights', each)}</div>"
    return pair + _timeline(report, order)


def _timeline(report: MergeReport, order: Mapping[str, int]) -> str:
    """When each thread was busy, in the order of the stages."""
    end = max(
        (edge for edges in report.timeline.values() for one in edges[-1:] if (edge := number(one))),
        default=0.0,
    )
    if not end:
        return ""
    names = sorted(report.timeline, key=lambda name: (order.get(name.split(" ")[0], 4), name))
    rows = []
    for name in names[:MAX_THREADS]:
        line, busy = timeline(report.timeline[name], end)
        rows.append((esc(name, 60), f"{100 * busy / end:.0f} %", line))
    listed = table(["thread", "busy", f"when, in {seconds(end)}"], rows, 1)
    return card("When threads were busy", listed)


Value = Callable[[TensorResult, int], "float | None"]


def _each(results: Mapping[str, TensorResult], value: Value, t: int = 0) -> dict[str, float]:
    return {name: v for name, r in results.items() if (v := number(value(r, t))) is not None}


def _maps(grid: Grid, results: Mapping[str, TensorResult], experts: Sequence[str]) -> str:
    count = len(experts)

    def by_expert(value: Value) -> dict[str, dict[str, float]]:
        return {name: _each(results, value, t) for t, name in enumerate(experts)}

    def once(value: Value) -> dict[str, dict[str, float]]:
        return {"": _each(results, value)}

    drawn = [
        metric(
            grid,
            "Retention",
            "How much of each expert's change is in the merged weight: <M, D> / ‖D‖². "
            "1 keeps it whole, 0 loses it.",
            by_expert(lambda r, t: _at(r.measures, "retentions", t)),
        ),
        metric(
            grid,
            "Norm of the merged change",
            "‖M‖ / ‖D‖ against each expert's own change; 1 is as large.",
            by_expert(_ratio),
            ratio=True,
        ),
        metric(
            grid,
            "Interference between experts",
            "TSV-M's singular task interference of the leading 64 directions of each expert, as a "
            "multiple of chance; 0 where their subspaces are orthogonal.",
            once(lambda r, t: r.measures.interference if r.measures else None),
            ratio=True,
        ),
        metric(
            grid,
            "Outlier weight",
            "How strongly each expert counts, from the share of its change that lies in outliers; "
            "1 is neutral.",
            by_expert(lambda r, t: mean(r.weights[t::count]) if r.outlier_scores else None),
            ratio=True,
        ),
        metric(
            grid,
            "Rank kept",
            "Singular directions kept of each expert.",
            by_expert(lambda r, t: _rank(r, t, count)),
        ),
        metric(
            grid,
            "Sparsity",
            "Share of entries at or below the noise floor, mean over experts.",
            once(lambda r, t: r.sparsity),
        ),
        metric(
            grid,
            "Size of each expert's change",
            "‖D‖ / ‖W₀‖ against the base's weight.",
            by_expert(_relative),
        ),
    ]
    if not any(drawn):
        drawn = [
            "<p class=soft>This merge was not measured: only spectral methods are, since "
            "elsewhere it would cost as much as the merge.</p>"
        ]
    if grid.hidden:
        drawn.append(f"<p class=soft>{grid.hidden:,} tensors have no place in these maps.</p>")
    return "\n".join(drawn)


def _at(measures: Measures | None, what: str, t: int) -> float | None:
    values = getattr(measures, what) if measures is not None else ()
    return number(values[t]) if t < len(values) else None


def _ratio(result: TensorResult, t: int) -> float | None:
    norm = _at(result.measures, "delta_norms", t)
    return result.measures.merged_norm / norm if result.measures and norm else None


def _relative(result: TensorResult, t: int) -> float | None:
    norm = _at(result.measures, "delta_norms", t)
    base = number(result.measures.base_norm) if result.measures else None
    return norm / base if norm is not None and base else None


def _rank(result: TensorResult, t: int, count: int) -> float | None:
    return mean(result.ranks[t::count]) if result.rule in TRUNCATING else None


def _detail(title: str, group: Sequence[TensorResult], experts: Sequence[str]) -> Detail:
    count, one = len(experts), group[0]
    each = range(count)

    def row(t: int) -> tuple[str, ...]:
        values: tuple[Callable[[TensorResult], object], ...] = (
            lambda r: mean(r.weights[t::count]),
            lambda r: mean(r.outlier_scores[t::count]),
            lambda r: _rank(r, t, count),
            lambda r: _at(r.measures, "delta_norms", t),
            lambda r: _relative(r, t),
            lambda r: _ratio(r, t),
            lambda r: _at(r.measures, "retentions", t),
        )
        return tuple(digits(mean(map(value, group))) for value in values)

    rows = [row(t) for t in each]
    pairs = [f"{t + 1}-{u + 1}" for t, u in itertools.combinations(each, 2)][:15]

    def by_pair(what: str) -> str:
        known = [mean(_at(r.measures, what, i) for r in group) for i in range(len(pairs))]
        texts = [f"{p}: {digits(v)}" for p, v in zip(pairs, known, strict=True) if v is not None]
        return ", ".join(texts)

    def fact(value: Callable[[TensorResult], object]) -> str:
        found = mean(map(value, group))
        return "" if found is None else digits(found)

    facts = [
        ("sparsity", fact(lambda r: r.sparsity)),
        ("interference", fact(lambda r: r.measures.interference if r.measures else None)),
        ("overlap of subspaces", by_pair("overlaps")),
        ("cosine of changes", by_pair("cosines")),
        ("factored by", plain(", ".join(one.backends))),
        ("compute", seconds(sum(r.seconds for r in group))),
        *(("note", plain(note)) for note in one.notes[:3]),
    ]
    what = [one.rule, " x ".join(map(str, one.shape)), one.matrices or "", one.reason or ""]
    measures = one.measures if len(group) == 1 else None
    at, spectra = _thinned(measures) if measures else ((), ())
    return Detail(title, plain(" · ".join(filter(None, what))), rows, facts, at, spectra)


def _thinned(measures: Measures) -> tuple[list[int], list[list[float]]]:
    """At most `POINTS` values of every spectrum, both ends included."""
    places = measures.spectrum_at
    last = len(places) - 1
    kept = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)}) if last > 0 else [0]
    spectra = [[s[i] for i in kept if i < len(s)] for s in measures.spectra]
    return [places[i] for i in kept if i <= last], spectra


def _first(grid: Grid, results: Mapping[str, TensorResult]) -> int:
    """The cell to open with: where experts interfere most."""
    found = [
        mean(m.interference for name in names if (m := results[name].measures)) or 0.0
        for names in grid.cells.values()
    ]
    return found.index(max(found)) if found else 0


def _all_weights(grid: Grid, results: Mapping[str, TensorResult], count: int) -> str:
    rows = [_line(grid.title(p), [results[n] for n in names]) for p, names in grid.cells.items()]
    heads = [
        "weight", "rule", "shape", "interference", "‖M‖ / mean ‖D‖", "lowest retention", "compute"
    ]  # fmt: skip
    listed = table(heads, rows, 3)
    return (
        f"<h2>All weights</h2><details class=card><summary>{len(rows):,} rows</summary>"
        f"{listed}</details>"
    )


def _line(title: str, group: Sequence[TensorResult]) -> tuple[str, ...]:
    one = group[0]
    measured = [r.measures for r in group if r.measures is not None]
    ratios = [m.merged_norm / norm for m in measured if (norm := mean(m.delta_norms))]
    retained = [n for m in measured for r in m.retentions if (n := number(r)) is not None]
    return (
        esc(title),
        esc(one.rule),
        esc(" x ".join(map(str, one.shape)), 60),
        digits(mean(m.interference for m in measured)),
        digits(mean(ratios)),
        digits(min(retained, default=None)),
        seconds(sum(r.seconds for r in group)),
    )
