"""LoRA adapters merged into one: ours against PEFT's `add_weighted_adapter`, one layer at a time.

    python -m benchmarks.adapters    # about four minutes on one core

Writes `benchmarks/results/adapters.csv`. Three adapters of rank 16 become one of rank 16 by
weighted task arithmetic, which both compute; the error is against a float64 SVD of the dense sum.
Ours is timed from files to a durable file, PEFT's in memory: what it reads and writes is left out.
Nothing is written where an error passes `AGREE`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.record import Row, write
from resm_backends.peft import merge_adapters
from resm_kernels.checkpoint.lora import read_adapter, read_factors

SHAPES = {(1024, 1024): 5, (2816, 1024): 3, (2048, 2048): 3, (5632, 2048): 1}
"""Shape (out x in) -> runs."""
RANK, EXPERTS = 16, 3
WEIGHTS = [0.7, 0.5, -0.3]
AGREE = 1e-4


class Layer(torch.nn.Module):
    """One linear layer, so that nothing else is timed."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.m = torch.nn.Linear(columns, rows, bias=False)


def make_adapters(folder: Path, shape: tuple[int, int]) -> list[Path]:
    """Random adapters, written by PEFT."""
    paths = []
    for t in range(EXPERTS):
        torch.manual_seed(t)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=["m"], init_lora_weights=False
        )
        get_peft_model(Layer(*shape), config).save_pretrained(folder / str(t))
        paths.append(folder / str(t))
    return paths


def timed(run: Callable[[int], object], runs: int) -> float:
    """Median seconds; the run gets its number."""
    seconds = []
    for i in range(runs):
        start = time.perf_counter()
        run(i)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def rows_of(shape: tuple[int, int], runs: int, folder: Path) -> list[Row]:
    """Ours and PEFT's two ways on one layer."""
    paths = make_adapters(folder, shape)
    opened = [read_adapter(path) for path in paths]
    factors = [read_factors(a, a.pairs["m.weight"]) for a in opened]
    dense = sum(
        w * (left.double() @ right.double().T)
        for w, (left, right) in zip(WEIGHTS, factors, strict=True)
    )
    assert isinstance(dense, torch.Tensor)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    reference = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    rows: list[Row] = []

    def record(what: str, seconds: float, merged: torch.Tensor) -> None:
        error = float(torch.linalg.norm(merged - reference) / torch.linalg.norm(reference))
        if error > AGREE:
            raise SystemExit(f"{what}, {shape}: error {error:.1e}, no figures are written")
        size = f"{shape[0]}x{shape[1]}"
        row: Row = {"shape": size, "rank": RANK, "adapters": EXPERTS, "what": what, "runs": runs}
        rows.append(row | {"seconds": round(seconds, 4), "error": error})
        print(rows[-1], flush=True)

    def ours(i: int) -> None:
        merge_adapters(
            paths, folder / f"out{i}", rank=RANK, method="task_arithmetic", weights=WEIGHTS
        )

    ours(-1)
    seconds = timed(ours, runs)
    merged = read_adapter(folder / "out0")
    left, right = read_factors(merged, merged.pairs["m.weight"])
    record("resm_backends.peft, files to file", seconds, left.double() @ right.double().T)

    model = PeftModel.from_pretrained(Layer(*shape), str(paths[0]), adapter_name="a0")
    names = [f"a{t}" for t in range(EXPERTS)]
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(str(path), adapter_name=name)
    layer = model.base_model.model.m
    for full in (True, False):

        def theirs(i: int, full: bool = full) -> None:
            model.add_weighted_adapter(
                names,
                WEIGHTS,
                f"mix{full}{i}",
                combination_type="svd",
                svd_rank=RANK,
                svd_full_matrices=full,
            )

        seconds = timed(theirs, runs)
        name = f"mix{full}0"
        b, a = (f[name].weight.detach().double() for f in (layer.lora_B, layer.lora_A))
        what = "PEFT svd" if full else "PEFT svd, full_matrices=False"
        record(what, seconds, (b @ a) * layer.scaling[name])
    for row in rows:
        row["times_ours"] = round(row["seconds"] / rows[0]["seconds"], 1)
    return rows


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for shape, runs in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(shape, runs, Path(folder))
    write("adapters", rows, 1)


if __name__ == "__main__":
    main()
