"""Train, merge and score everything: `python -m benchmarks.quality [--smoke] [--out DIR]`.

Under two hours on two cores. What is trained stays in the work folder; an interrupted run goes on
from there. Ends with `quality.csv` (a row per model and skill), its conditions, and what
`benchmarks.quality.plot` makes of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.quality.models import (
    Family,
    Scale,
    expert_name,
    joint_name,
    train_base,
    train_expert,
    train_joint,
)
from benchmarks.quality.plot import report
from benchmarks.quality.scoring import Case, kept_rows, score_and_keep
from benchmarks.quality.tasks import SKILLS
from benchmarks.record import RESULTS, ROOT, write
from resm_kernels.demo.models import ModelSize

THREE = (("full", 3), ("lora", 3))
FULL = Scale(
    sizes={"5M": ModelSize(256, 8, 8), "1M": ModelSize(128, 6, 4)},
    sets={"5M": THREE, "1M": (*THREE, ("full", 2), ("full", 5))},
    seeds=(0, 1, 2), batch=64, base_steps=300, expert_steps=100, validation=64, test=256,
)  # fmt: skip
SMOKE = Scale(
    sizes={"tiny": ModelSize(32, 2, 2)}, sets={"tiny": (("full", 2), ("lora", 3))},
    seeds=(0,), batch=16, base_steps=30, expert_steps=10, validation=8, test=16,
)  # fmt: skip

Job = tuple[Callable[..., Any], tuple[Any, ...]]


def cases(scale: Scale) -> list[Case]:
    """Every set of experts that is merged, dearest first."""
    return [
        Case(Family(size, seed), tuning, count)
        for size in scale.sizes
        for tuning, count in scale.sets[size]
        for seed in scale.seeds
    ]


def trainings(wanted: Iterable[Case], work: Path, scale: Scale) -> Iterable[list[Job]]:
    """What is still to be trained, in two rounds: bases, then what starts from them."""
    bases: dict[Path, Job] = {}
    tuned: dict[Path, Job] = {}
    for case in wanted:
        folder, common = case.family.folder(work), (work, case.family, scale)
        bases[folder / "base"] = (train_base, common)
        name = joint_name(case.count, case.tuning)
        tuned[folder / name] = (train_joint, (*common, case.tuning, case.count))
        for i, skill in enumerate(SKILLS[: case.count]):
            name = expert_name(skill, case.tuning)
            tuned[folder / name] = (train_expert, (*common, case.tuning, i))
    for found in (bases, tuned):
        yield [job for folder, job in found.items() if not folder.exists()]


def carry_out(jobs: list[Job], pool: ProcessPoolExecutor, started: float) -> None:
    """Run jobs side by side; the first failure ends the run."""
    pending = {pool.submit(run, *arguments): (run, arguments) for run, arguments in jobs}
    for done in as_completed(pending):
        done.result()
        run, (_, *what) = pending[done]
        shown = " ".join(str(part) for part in what if not isinstance(part, Scale))
        print(f"{time.perf_counter() - started:7.0f} s  {run.__name__} {shown}", flush=True)


def main() -> None:
    """Parse the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where CSV files go")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where pictures go")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models lie here")
    parser.add_argument("--smoke", action="store_true", help="a toy size: scores mean nothing")
    arguments = parser.parse_args()
    scale = SMOKE if arguments.smoke else FULL
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    wanted, started = cases(scale), time.perf_counter()
    workers = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for jobs in trainings(wanted, arguments.work, scale):
            carry_out(jobs, pool, started)
        jobs = [(score_and_keep, (arguments.work, case, scale)) for case in wanted]
        carry_out(jobs, pool, started)
    rows = [row for case in wanted for row in kept_rows(arguments.work, case)]
    for row in rows:
        del row["settings"]
    write("quality", rows, workers, arguments.out)
    report(arguments.out, arguments.docs)


if __name__ == "__main__":
    main()
