"""Summaries and pictures from `quality.csv`: `python -m benchmarks.quality.plot [--results DIR]`.

Writes `quality_summary.csv`, `quality_methods.csv` and `quality_resm.csv` beside it, `quality.png`
and `quality_resm.png` into `--docs`, and prints the last two tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.quality.tables import TSVM, against, grouped, merges, summary
from benchmarks.record import RESULTS, ROOT, Row, read, write_csv

BLUE, GREY, RED = "#1f5fa8", "#9a9a9a", "#b3261e"
BASELINES = ("joint training", "base")


def draw_methods(rows: Sequence[Row], path: Path) -> None:
    """Mean and worst skill of every method, a panel per setting."""
    panels = grouped(rows, ("size", "tuning", "experts"))
    shown = [r for r in rows if r["group"] == "method" or r["model"] in BASELINES]
    order = sorted(
        {row["model"] for row in shown},
        key=lambda model: fmean(r["mean"] for r in shown if r["model"] == model),
    )
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.7 * columns, (0.9 + 0.2 * len(order)) * lines),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((size, tuning, count), cases) in zip(axes.flat, panels, strict=False):
        for measure, style in (
            ("mean", {"color": BLUE, "marker": "o", "label": "mean of skills"}),
            ("worst", {"color": RED, "marker": "|", "label": "worst skill"}),
        ):
            points = [
                (case[measure], order.index(case["model"])) for case in cases if case in shown
            ]
            axis.scatter(*zip(*points, strict=True), s=26, alpha=0.75, linewidths=1.4, **style)
        axis.axvline(1.0, color=GREY, linewidth=0.8, linestyle=":")
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.set_title(f"{size}, {count} experts, {'LoRA' if tuning == 'lora' else 'all weights'}")
        axis.set_yticks(range(len(order)), order)
    axes[0, 0].legend(frameon=False, loc="lower right", fontsize=8)
    figure.supxlabel("exact match on test prompts over the expert's own (one mark per seed)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_differences(rows: Sequence[Row], path: Path) -> None:
    """What each part of RESM adds to TSV-M, with standard errors."""
    shown = [row for row in rows if row["model"] != TSVM]
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.24 * len(shown)), layout="constrained")
    for offset, measure, color, label in (
        (0.14, "mean", BLUE, "mean of skills"), (-0.14, "worst", RED, "worst skill"),
    ):  # fmt: skip
        places = [len(shown) - 1 - i + offset for i in range(len(shown))]
        axis.errorbar(
            [row[measure] for row in shown], places, xerr=[row[f"{measure}_se"] for row in shown],
            fmt="o", markersize=4, linewidth=1.2, color=color, label=label,
        )  # fmt: skip
    axis.axvline(0.0, color=GREY, linewidth=0.8)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axis.set_yticks(range(len(shown)), [row["model"] for row in reversed(shown)])
    axis.set_xlabel("difference to TSV-M in normalised exact match (bars: standard error)")
    axis.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """Print rows as a table."""
    table = Table(title=title, box=None)
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def report(results: Path, docs: Path) -> None:
    """Make everything that is made from `quality.csv`."""
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    scored = merges(read("quality", results))
    ranking = sorted(against(scored, "task_arithmetic", "method"), key=lambda row: -row["mean"])
    differences = against(scored, TSVM, "ablation")
    write_csv("quality_summary", summary(scored), results)
    write_csv("quality_methods", ranking, results)
    write_csv("quality_resm", differences, results)
    draw_methods(scored, docs / "quality.png")
    draw_differences(differences, docs / "quality_resm.png")
    console = Console(width=160)
    show("methods over all settings, against task arithmetic", ranking, console)
    show("RESM by its parts, against TSV-M", differences, console)


def main() -> None:
    """Parse the arguments and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where quality.csv lies")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where pictures go")
    arguments = parser.parse_args()
    report(arguments.results, arguments.docs)


if __name__ == "__main__":
    main()
