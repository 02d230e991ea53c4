"""Figures that are kept: rows as CSV, and beside them what they depend on."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def conditions(threads: int) -> Row:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    found: Row = {"commit": commit, "python": platform.python_version(), "threads": threads}
    found["load"] = round(os.getloadavg()[0], 1)
    found |= {"cpu": models[0] if models else platform.machine(), "cores": len(models)}
    for name in ("torch", "triton", "numpy", "scipy", "fusion-bench", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write(name: str, rows: list[Row], threads: int, folder: Path = RESULTS) -> None:
    """The rows as CSV and their conditions as JSON."""
    write_csv(name, rows, folder)
    (folder / f"{name}.json").write_text(json.dumps(conditions(threads), indent=1) + "\n")


def write_csv(name: str, rows: list[Row], folder: Path = RESULTS) -> None:
    """The rows alone: what is made from a file that has its conditions."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a CSV, all values as text."""
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))
