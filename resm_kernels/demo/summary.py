"""What the demo prints at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def print_summary(results: Mapping[str, Any], root: Path, console: Console) -> None:
    """Print scores, generations and what to try next."""
    count = results["prompts_per_skill"]["test"]
    table = Table(
        title=f"exact match in %, {count} held-out prompts per skill",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("model", no_wrap=True)
    for heading in ("lambda", *results["skills"], "mean", "worst", "norm."):
        table.add_column(heading, justify="right")
    models = results["models"]
    for row, following in zip(models, (*models[1:], None), strict=True):
        shares = (*row["exact_match"].values(), row["mean"], row["worst"], row["normalised"])
        table.add_row(
            row["name"],
            "" if row["lambda"] is None else f"{row['lambda']:g}",
            *("-" if share is None else f"{100 * share:.1f}" for share in shares),
            end_section=following is not None and _kind(following) != _kind(row),
        )
    console.print(table)
    lines = [
        "norm.: mean over skills of the score divided by the score of that skill's expert.",
        "lambda: the best of several on validation prompts, which are not the test prompts.",
        "One seed of a small model: the order of close methods changes with the seed.",
        "",
        "merged-resm, loaded with transformers:",
    ]
    for row in results["generations"]:
        verdict = "right" if row["generated"] == row["answer"] else f"wrong: {row['answer']}"
        lines.append(f"  {row['prompt']} {row['generated']}   ({verdict})")
    lines += ["", f"Next: resm verify {root / 'merged-resm'}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["name"]).partition("-")[0]
