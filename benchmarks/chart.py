"""The README's chart: accuracy against float64, and memory against model size.

    make chart      # about three minutes on two cores

Writes `accuracy` and `memory` in `benchmarks/results`, and `docs/chart.png`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.record import ROOT, write
from resm_kernels.api import merge_tensors
from tests import oracle
from tests.test_scale import MEASURE, write_family

SHAPE, EXPERTS = (1024, 768), 3
KINDS = ("noise", "power", "exponential", "steep")
LAYERS, WIDTH, INTERMEDIATE, VOCABULARY = (4, 8, 16, 32), 512, 1408, 2000


def measure_accuracy() -> list[dict[str, object]]:
    """Relative error of the merged delta, TSV-M at full rank, ours and the float32 textbook."""
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        rng = np.random.default_rng(0)
        deltas = [oracle.make_delta(kind, *SHAPE, rng) for _ in range(EXPERTS)]
        ranks = oracle.clamped(deltas, min(SHAPE) // EXPERTS)
        reference = oracle.tsvm(deltas, ranks)
        experts = [torch.from_numpy(delta) for delta in deltas]
        textbook = oracle.textbook(experts, ranks).numpy()
        ours = merge_tensors(torch.zeros(SHAPE), experts, "tsvm").numpy()
        rows.append(
            {
                "spectrum": kind,
                "shape": "x".join(map(str, SHAPE)),
                "experts": EXPERTS,
                "rank": ranks[0],
                "textbook_fp32": oracle.error(textbook, reference),
                "resm_kernels": oracle.error(ours, reference),
            }
        )
    return rows


def measure_memory() -> list[dict[str, object]]:
    """Peak resident memory of a RESM merge, beside the bytes of everything it reads."""
    rows: list[dict[str, object]] = []
    for layers in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            base, _ = write_family(Path(folder), layers, WIDTH, INTERMEDIATE, VOCABULARY)
            size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
            command = [sys.executable, "-c", MEASURE, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak, predicted = json.loads(done.stdout)
        rows.append(
            {
                "layers": layers,
                "parameters": size // 2,
                "input_bytes": 4 * size,
                "peak_bytes": peak,
                "predicted_bytes": predicted,
            }
        )
    return rows


def draw(accuracy: list[dict[str, object]], memory: list[dict[str, object]]) -> None:
    """Two panels, readable in grey."""
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    places = np.arange(len(accuracy))
    for offset, key, label, color in (
        (-0.2, "textbook_fp32", "textbook, float32 SVDs", "#b9b9b9"),
        (0.2, "resm_kernels", "resm-kernels", "#1f5fa8"),
    ):
        values = [float(str(row[key])) for row in accuracy]
        left.bar(places + offset, values, 0.38, label=label, color=color)
    left.set_yscale("log")
    left.set_ylim(1e-8, 10)
    left.set_xticks(places, [str(row["spectrum"]) for row in accuracy])
    left.set_xlabel("spectrum of the deltas")
    left.set_ylabel("error of the merged delta")
    left.set_title(f"TSV-M against float64, {accuracy[0]['shape']}, T = {EXPERTS}, rank p/T")
    left.legend(frameon=False, loc="upper left")
    millions = [int(str(row["parameters"])) / 1e6 for row in memory]
    for key, label, style in (
        ("input_bytes", "all four checkpoints in memory", {"color": "#b9b9b9", "marker": "s"}),
        ("predicted_bytes", "planned", {"color": "#1f5fa8", "linestyle": ":"}),
        ("peak_bytes", "resm-kernels, measured", {"color": "#1f5fa8", "marker": "o"}),
    ):
        right.plot(millions, [int(str(row[key])) / 1e6 for row in memory], label=label, **style)
    right.set_xlabel("parameters, millions (same width, more layers)")
    right.set_ylabel("MB")
    right.set_ylim(bottom=0)
    right.set_title("Peak memory of a RESM merge, T = 3, two workers")
    right.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "chart.png", dpi=120)


def main() -> None:
    """Measure, write the figures down, draw them."""
    torch.set_num_threads(1)
    (ROOT / "docs").mkdir(exist_ok=True)
    accuracy, memory = measure_accuracy(), measure_memory()
    write("accuracy", accuracy, 1)
    write("memory", memory, 1)
    draw(accuracy, memory)


if __name__ == "__main__":
    main()
