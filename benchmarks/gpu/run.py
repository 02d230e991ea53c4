"""GPU tests, every kernel and every factorisation, in one process tree and one budget.

    python -m benchmarks.gpu.run --out DIR [--device cpu --quick] [--budget SECONDS]

Writes `DIR/gpu.json` before and after every case, and what the tests print to `DIR/gpu_tests.log`.
Exit code 1 if a test, a kernel or the accuracy contract failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import factorisations, kernels
from benchmarks.gpu.suite import Suite

TESTS = ("tests/test_gpu.py", "tests/test_gpu_kernels.py")
TESTS_SECONDS, KERNELS_SECONDS, BUDGET = 150.0, 120.0, 500.0
"""For the tests and for the kernels, which get what the tests leave, and for everything."""
ROOT = Path(__file__).parents[2]


def run_tests(suite: Suite, seconds: float) -> None:
    """The GPU tests in a process of their own; what fails in them stops nothing."""
    log = suite.folder / "gpu_tests.log"
    with suite.case("tests", "pytest") as row, open(log, "w") as file:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"]
        try:
            done = subprocess.run(
                [*command, *TESTS], cwd=ROOT, stdout=file, stderr=file, timeout=seconds
            )
            code = str(done.returncode)
        except subprocess.TimeoutExpired:
            code = f"none within {seconds:.0f} s"
        lines = log.read_text().splitlines()
        row |= {"failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}
        row |= {"note": next((line for line in reversed(lines) if line.strip()), "")}
        if code != "0":
            row |= {"status": "fail", "note": f"exit code {code}; {row['note']}"}


def print_tests(suite: Suite) -> None:
    for row in suite.rows:
        if row["part"] in ("tests", "suite"):
            print(
                row["name"], row["status"], row.get("note", ""), *row.get("failed", ()), sep="\n "
            )


def failed(suite: Suite) -> bool:
    """Whether anything that has to hold did not."""
    parts = ("tests", "suite", "roofs", "kernels", "correctness")
    return any(row["part"] in parts and row["status"] in ("fail", "error") for row in suite.rows)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try the suite out")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--only", choices=("kernels", "factorisations"))
    parser.add_argument("--skip-tests", action="store_true")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick tries the suite out")
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel imports triton
    torch.set_float32_matmul_precision("highest")
    given.out.mkdir(parents=True, exist_ok=True)
    suite, quick = Suite(given.out, torch.device(given.device)), given.quick

    def left() -> float:
        return max(given.budget - suite.elapsed, 0.0)

    def for_kernels() -> float:
        if given.only:
            return left()
        tests = 0.0 if given.skip_tests else TESTS_SECONDS
        return min(tests + KERNELS_SECONDS - suite.elapsed, left())

    parts: list[tuple[str, Callable[[], None]]] = []
    if not given.skip_tests:
        parts.append(("tests", lambda: run_tests(suite, min(TESTS_SECONDS, left()))))
    if given.only != "factorisations":
        parts.append(("kernels", lambda: kernels.measure(suite, for_kernels(), quick)))
    if given.only != "kernels":
        parts.append(("factorisations", lambda: factorisations.measure(suite, left(), quick)))
    try:
        for name, run in parts:
            try:
                run()
            except Exception:
                traceback.print_exc()
                with suite.case("suite", name) as row, contextlib.ExitStack():
                    row |= {"status": "error", "note": traceback.format_exc().splitlines()[-1]}
    finally:
        suite.save()
        for show in (kernels.print_table, factorisations.print_table):
            with contextlib.suppress(Exception):
                show(suite.rows)
        print_tests(suite)
    return int(failed(suite))


if __name__ == "__main__":
    raise SystemExit(main())
