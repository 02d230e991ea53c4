"""A dry run's predicted time against the merge itself, at 100 M parameters.

    python -m benchmarks.forecast [--layers 12]

Measures the machine anew first. Every merge is a process of its own, and its inputs are dropped
from the page cache before it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.disk import RESM
from benchmarks.record import ROOT, Row, write
from tests.test_scale import HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, write_family

METHODS = ("resm", "tsvm", "iso_c", "ties", "dare_linear", "task_arithmetic", "linear")
STAGES = ("read", "compute", "write", "finish")


def resm(cache: Path, *arguments: str | Path) -> Row:
    """What a command prints as JSON, with a cache folder of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [*RESM, *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    found: Row = json.loads(done.stdout)
    return found


def drop_cache(folder: Path) -> None:
    """Have the weights below a folder read from the disk next time."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(folder: Path, layers: int) -> list[Row]:
    """Predicted and measured seconds of every method."""
    sizes = (layers, HIDDEN, INTERMEDIATE, VOCABULARY)
    base, experts = write_family(folder, *sizes)
    resm(folder, "doctor", "--measure", "--folder", folder)
    rows: list[Row] = []
    for method in METHODS:
        given = ["--base", base, *(part for e in experts for part in ("--expert", e))]
        given += ["--method", method, "--quiet", "--no-report"]
        if method in ("ties", "dare_linear"):
            given += ["--param", "density=0.5"]
        out = folder / "out"
        expected = resm(folder, "merge", *given, out, "--dry-run")["predicted_seconds"]
        drop_cache(folder)
        report = resm(folder, "merge", *given, out)
        shutil.rmtree(out)
        row: Row = {
            "method": method,
            "predicted_s": round(expected["wall"], 2),
            "measured_s": round(report["seconds"], 2),
            "predicted_over_measured": round(expected["wall"] / report["seconds"], 2),
        }
        for stage in STAGES:
            row[f"{stage}_predicted_s"] = round(expected[stage], 2)
            row[f"{stage}_measured_s"] = round(report["stage_seconds"][stage], 2)
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)
    return rows


def main() -> None:
    """Compare and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), options.layers)
    if options.layers == LAYERS:
        write("forecast", rows, 1)


if __name__ == "__main__":
    main()
