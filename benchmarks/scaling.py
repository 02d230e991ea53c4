"""Cost as work grows: planning over tensors, memory over parameters, time over bytes.

    python -m benchmarks.scaling            # under ten minutes on two quiet cores
    python -m benchmarks.scaling --small    # a fifth of it, to try; keeps no figures

Writes `scaling_planning` and `scaling_merging` in `benchmarks/results`, and `docs/scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.giants import EXPERTS, mixture, write_family
from benchmarks.record import ROOT, Row, write
from tests import test_scale

TENSORS = (1_000, 2_500, 5_000, 10_000, 20_000, 40_000)
LAYERS = (4, 9, 19, 39, 78)
"""25 M to 400 M parameters at this width."""
WIDTH, FEED_FORWARD, VOCABULARY = 640, 1792, 2000
METHODS = ("resm", "ties", "linear")

PLAN = """
import json, sys, time, resm_kernels
folder = sys.argv[1]
models = f"{folder}/base", [f"{folder}/expert{t}" for t in (1, 2, 3)]
resm_kernels.plan(*models, "linear", only=["model.norm.weight"])  # imports, compiled patterns
found = []
for method in ("resm", "linear"):
    start = time.perf_counter(), time.process_time()
    made = resm_kernels.plan(*models, method)
    found += [time.perf_counter() - start[0], time.process_time() - start[1]]
start = time.perf_counter(), time.process_time()
from resm_kernels.api import execute
execute(made, f"{folder}/out", no_report=True)
found += [time.perf_counter() - start[0], time.process_time() - start[1]]
print(json.dumps([len(made.tensors), *found]))
"""
MERGE = """
import json, sys, resm_kernels
folder, method = sys.argv[1:]
experts = [f"{folder}/e{t}" for t in range(3)]
parameters = {"density": 0.5} if method == "ties" else None
report = resm_kernels.merge(
    f"{folder}/base", experts, f"{folder}/{method}", method, parameters=parameters, workers=2)
moved = report.read_bytes + report.written_bytes
print(json.dumps([moved, report.seconds, report.peak_memory, report.predicted_memory]))
"""


def child(code: str, *arguments: str) -> list[float]:
    """The numbers that a process of its own prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: list[float] = json.loads(done.stdout)
    return found


def measure_planning(counts: tuple[int, ...]) -> list[Row]:
    """Milliseconds a tensor: planning by two methods, and merging tensors of 64 entries."""
    rows: list[Row] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_family(Path(folder), mixture(1, (count - 12) // 3, 8, 8, 64))
            tensors, *each = child(PLAN, folder)
        names = ("plan_resm", "plan_linear", "merge_linear")
        keys = [f"{name}_{clock}_ms" for name in names for clock in ("wall", "cpu")]
        each = [round(1e3 * value / tensors, 4) for value in each]
        rows.append({"tensors": int(tensors), **dict(zip(keys, each, strict=True))})
        print(*rows[-1].values(), sep=" | ", flush=True)
    return rows


def measure_merging(sizes: tuple[int, ...]) -> list[Row]:
    """Seconds and peak memory of merges of more and more layers."""
    rows: list[Row] = []
    for layers in sizes:
        with tempfile.TemporaryDirectory() as folder:
            base, _ = test_scale.write_family(Path(folder), layers, WIDTH, FEED_FORWARD, VOCABULARY)
            parameters = sum(file.stat().st_size for file in base.glob("*.safetensors")) // 2
            for method in METHODS:
                moved, seconds, peak, planned = child(MERGE, folder, method)
                rows.append(
                    {
                        "method": method,
                        "parameters": parameters,
                        "moved_MB": round(moved / 1e6, 1),
                        "seconds": round(seconds, 2),
                        "GB_per_s": round(moved / seconds / 1e9, 3),
                        "peak_MB": round(peak / 1e6, 1),
                        "planned_MB": round(planned / 1e6, 1),
                    }
                )
                print(*rows[-1].values(), sep=" | ", flush=True)
    return rows


def draw(planning: list[Row], merging: list[Row], path: Path) -> None:
    """Three panels, readable in grey."""
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    tensors = [row["tensors"] for row in planning]
    for key, label, style in (
        ("plan_resm_cpu_ms", "planning, RESM", {"color": "#1f5fa8", "marker": "o"}),
        ("plan_linear_cpu_ms", "planning, linear", {"color": "#1f5fa8", "linestyle": ":"}),
        ("merge_linear_cpu_ms", "merging 64 entries", {"color": "#b9b9b9", "marker": "s"}),
    ):
        left.plot(tensors, [row[key] for row in planning], label=label, **style)
    left.set_xscale("log")
    left.set_xlabel("tensors")
    left.set_ylabel("processor time per tensor, ms")
    left.set_title(f"Overhead, T = {EXPERTS}")
    styles = zip(METHODS, ("#1f5fa8", "#7a7a7a", "#b9b9b9"), ("o", "^", "s"), strict=True)
    for method, color, marker in styles:
        mine = [row for row in merging if row["method"] == method]
        millions = [row["parameters"] / 1e6 for row in mine]
        shown = {"label": method, "color": color, "marker": marker}
        middle.plot(millions, [row["peak_MB"] for row in mine], **shown)
        if method != "resm":
            moved = [row["moved_MB"] / 1e3 for row in mine]
            right.plot(moved, [row["seconds"] for row in mine], **shown)
    middle.set_xlabel("parameters, millions (same width, more layers)")
    middle.set_ylabel("MB")
    middle.set_title("Peak memory, two workers")
    right.set_xlabel("GB read and written")
    right.set_ylabel("seconds")
    right.set_title("Time of element-wise methods")
    for panel in (left, middle, right):
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write the figures down, draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="two of the sizes, nothing kept")
    options = parser.parse_args()
    few = slice(0, 2) if options.small else slice(None)
    planning, merging = measure_planning(TENSORS[few]), measure_merging(LAYERS[few])
    if not options.small:
        write("scaling_planning", planning, 1)
        write("scaling_merging", merging, 1)
        draw(planning, merging, ROOT / "docs" / "scaling.png")


if __name__ == "__main__":
    main()
