"""How well stages overlap: workers against BLAS threads, and a run against its busiest stage alone.

    python -m benchmarks.overlap workers
    python -m benchmarks.overlap stages
    python -m benchmarks.overlap cluster

Every run is a process of its own. `stages` times a whole merge and then each of its stages alone,
with the same threads and all that it needs in memory. What the pipeline costs is wall seconds over
the slowest of these, or over what all of them take of the processor on every core, where that is
more: no order of the work is faster. `cluster` times the same merge, ten shards of it, by two
threads of one process and by two workers of a Ray cluster that is already there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, Row, write
from benchmarks.spectral import CHECKPOINT

CASES = (
    ("resm", 512, 16), ("resm", 1024, 6), ("resm", 2048, 2), ("tsvm", 512, 16), ("tsvm", 1024, 6),
    ("tsvm", 2048, 2), ("ties", 2048, 8), ("linear", 2048, 8),
)  # fmt: skip
"""Method, width and number of square matrices."""
SETTINGS = ((1, 1), (2, 1), (1, 2))
"""Workers and BLAS threads of each."""


def workers(repeats: int) -> None:
    """One worker, two workers of one thread, one worker of two."""
    from tests.checkpoints import fine_tuned, make_state, save

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        for method, width, count in CASES:
            shutil.rmtree(inputs, ignore_errors=True)
            shapes = {f"layers.{i}.up_proj.weight": (width, width) for i in range(count)}
            state = {name: one.mul_(0.02) for name, one in make_state(shapes=shapes).items()}
            save(inputs / "base", state)
            for t in range(3):
                save(inputs / f"e{t}", fine_tuned(state, t + 1, 0.001))
            found: dict[tuple[int, int], list[float]] = {setting: [] for setting in SETTINGS}
            for _ in range(repeats):
                for setting in SETTINGS:
                    found[setting].append(_child("one", method, *setting, inputs)["wall_s"])
            row: Row = {"method": method, "shape": f"{count} x {width}x{width}"}
            row |= {f"{w}x{t}_s": round(min(times), 2) for (w, t), times in found.items()}
            best = {setting: min(times) for setting, times in found.items()}
            row["threads_over_workers"] = round(best[1, 2] / best[2, 1], 2)
            rows.append(row)
            print(*row.values(), flush=True)
    write("workers", rows, 2)


def stages(repeats: int) -> None:
    """A 100 M-parameter merge and each of its stages alone."""
    from tests.test_scale import write_family

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), *CHECKPOINT)
        for method in ("resm", "tsvm", "ties", "linear"):
            runs = [_child("stages", method, 2, 1, Path(folder)) for _ in range(repeats)]
            row: Row = {"method": method, "workers": 2, "threads": 1}
            row |= {key: round(statistics.median(r[key] for r in runs), 2) for key in runs[0]}
            ratios = [r["wall_s"] / max(v for k, v in r.items() if "alone" in k) for r in runs]
            row["wall_over_busiest"] = round(statistics.median(ratios), 3)
            ratios = [
                r["wall_s"] / max(v for k, v in r.items() if "alone" in k or k == "processor_s")
                for r in runs
            ]
            row["wall_over_bound"] = round(statistics.median(ratios), 3)
            rows.append(row)
            print(*row.items(), flush=True)
    write("overlap", rows, 2)


def cluster(repeats: int) -> None:
    """A 100 M-parameter merge here and by workers of a Ray cluster on the same cores."""
    from tests.test_scale import write_family

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), *CHECKPOINT)
        for method in ("resm", "tsvm", "ties"):
            runs = [_child("cluster", method, 2, 1, Path(folder)) for _ in range(repeats)]
            row: Row = {"method": method}
            row |= {key: round(statistics.median(r[key] for r in runs), 2) for key in runs[0]}
            row["ray_over_local"] = round(
                statistics.median(r["ray_s"] / r["local_s"] for r in runs), 2
            )
            rows.append(row)
            print(*row.items(), flush=True)
    write("cluster", rows, 2)


def _child(what: str, method: str, workers: int, threads: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.overlap", "child", what, method]
    command += [str(workers), str(threads), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(what: str, method: str, workers: int, threads: int, folder: Path) -> None:
    """One run, and its stages alone where asked; prints seconds as JSON."""
    import resm_kernels
    from resm_kernels import api
    from resm_kernels.engine.options import usable_cores

    experts, out = [folder / f"e{t}" for t in range(3)], folder / "out"
    if what == "cluster":
        print(json.dumps(_on_cluster(folder / "base", experts, out, method)))
        return
    made = resm_kernels.plan(folder / "base", experts, method, workers=workers, threads=threads)
    report = api.execute(made, out)
    shutil.rmtree(out)
    found = {"wall_s": report.seconds}
    if what == "stages":
        found |= {f"{stage}_busy_s": busy for stage, busy in report.stage_seconds.items()}
        before = time.process_time()
        found |= {f"{stage}_alone_s": took for stage, took in _alone(made, out).items()}
        found["processor_s"] = (time.process_time() - before) / usable_cores()
        found["peak_MB"], found["planned_MB"] = (
            size / 1e6 for size in (report.peak_memory, report.predicted_memory)
        )
    print(json.dumps(found))


def _on_cluster(base: Path, experts: list[Path], out: Path, method: str) -> dict[str, float]:
    """Seconds of whole calls of `merge`, planning and the start of workers included."""
    import ray

    import resm_kernels

    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
    found: dict[str, float] = {}
    ray_executor = resm_kernels.RayExecutor(cpus=1)
    for name, executor in (("local", "local"), ("ray", ray_executor)):
        start = time.perf_counter()
        report = resm_kernels.merge(
            base, experts, out, method, shard_size="20MB", executor=executor
        )
        found[f"{name}_s"] = time.perf_counter() - start
        found[f"{name}_compute_s"] = report.stage_seconds["compute"]
        shutil.rmtree(out)
    first = min(edges[0] for edges in report.timeline.values())
    return found | {"ray_first_read_s": first}


def _alone(made: Any, out: Path) -> dict[str, float]:
    """Seconds of each stage by itself."""
    from resm_kernels.checkpoint.writer import ShardFile
    from resm_kernels.engine.flow import READERS
    from resm_kernels.engine.merging import Loaded, merge_planned
    from resm_kernels.engine.plan import plan_steps

    steps = plan_steps([made])
    took: dict[str, float] = {}

    def timed(stage: str, threads: int, work: Callable[[Any], Any], given: Iterable[Any]) -> Any:
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, given))
        took[stage] = time.perf_counter() - start
        return results

    def merge(pair: tuple[Any, Any]) -> torch.Tensor:
        torch.set_num_threads(made.options.threads)
        step, values = pair
        return merge_planned(made, step.tensors[0], Loaded(values, 1))[0].tensor

    read = timed("read", READERS, lambda step: {s.key: s.read() for s in step.sources}, steps)
    merged = timed("compute", made.workers, merge, zip(steps, read, strict=True))
    out.mkdir()
    shards = [ShardFile(out, layout) for layout in made.layouts]
    pairs = [(step.tensors[0], one) for step, one in zip(steps, merged, strict=True)]
    timed("write", 1, lambda pair: shards[pair[0].shard].write(pair[0].slot, pair[1]), pairs)
    timed("finish", 1, ShardFile.finish, shards)
    shutil.rmtree(out)
    return took


def main() -> None:
    """Measure what was asked for and keep the figures."""
    if sys.argv[1:2] == ["child"]:
        what, method, workers_text, threads_text, folder = sys.argv[2:]
        child(what, method, int(workers_text), int(threads_text), Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("workers", "stages", "cluster"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    {"workers": workers, "stages": stages, "cluster": cluster}[options.what](options.repeats)


if __name__ == "__main__":
    main()
