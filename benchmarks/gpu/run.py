"""GPU tests, every kernel and every factorisation, each in a process, in one budget.

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
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import factorisations, kernels
from benchmarks.gpu.suite import Suite

TESTS = ("tests/test_gpu.py", "tests/test_gpu_kernels.py")
TESTS_SECONDS, KERNELS_SECONDS, BUDGET, GRACE = 150.0, 120.0, 490.0, 20.0
"""For the tests, for the kernels, which get what the tests leave, for everything; and how much
longer a process may take than it was given."""
ROOT = Path(__file__).parents[2]


def run_tests(suite: Suite, seconds: float) -> None:
    """The GPU tests in a process of their own; what fails in them stops nothing."""
    log = suite.folder / "gpu_tests.log"
    with suite.case("tests", "pytest") as row, open(log, "w") as file:
        command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *TESTS]
        command += ["--durations=10", "-o", "faulthandler_timeout=60"]
        given = os.environ | {"PYTHONUNBUFFERED": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=given, stdout=file, stderr=file, timeout=seconds
            )
            code = str(done.returncode)
        except subprocess.TimeoutExpired:
            code = f"none within {seconds:.0f} s"
        lines = log.read_text().splitlines()
        row |= {"failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}
        row |= {"note": next((line for line in reversed(lines) if line.strip()), "")}
        if code != "0":
            row |= {"status": "fail", "note": f"exit code {code}; {row['note']}"}


def part_command(part: str, given: argparse.Namespace, seconds: float) -> list[str]:
    """One part in a process of its own: a fault of the device ends no other part."""
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--only", part, "--append"]
    command += ["--out", str(given.out.resolve()), "--device", given.device]
    return [*command, "--budget", str(seconds), *(["--quick"] if given.quick else [])]


def run_part(suite: Suite, part: str, given: argparse.Namespace, seconds: float) -> None:
    """Run a part, and take over the rows that it left on disk."""
    suite.save()
    try:
        command = part_command(part, given, seconds)
        code = str(subprocess.run(command, cwd=ROOT, timeout=seconds + GRACE).returncode)
    except subprocess.TimeoutExpired:
        code = f"none within {seconds + GRACE:.0f} s"
    suite.reload()
    for row in suite.rows:
        if row["status"] == "running":
            row |= {"status": "error", "note": "the process ended here"}
    if code not in ("0", "1"):
        with suite.case("suite", part) as row:
            row |= {"status": "error", "note": f"exit code {code}"}


def print_tests(suite: Suite) -> None:
    for row in suite.rows:
        if row["part"] in ("tests", "suite"):
            print(f"{row['name']}: {row['status']}, {row.get('note', '').strip('= ')}")
            print(*row.get("failed", ()), sep="\n", end="")


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
    parser.add_argument("--append", action="store_true", help="one part, to the rows in DIR")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick tries the suite out")
    given.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(given.out, torch.device(given.device))
    if given.append:
        suite.reload()
        measure(suite, given)
        return int(failed(suite))
    try:
        if not given.skip_tests:
            run_tests(suite, min(TESTS_SECONDS, given.budget))
        tests = 0.0 if given.skip_tests else TESTS_SECONDS
        for part in (given.only,) if given.only else ("kernels", "factorisations"):
            seconds = given.budget - suite.elapsed
            if part == "kernels" and not given.only:
                seconds = min(seconds, tests + KERNELS_SECONDS - suite.elapsed)
            run_part(suite, part, given, max(seconds, 0.0))
    finally:
        suite.save()
        for show in (kernels.print_table, factorisations.print_table):
            with contextlib.suppress(Exception):
                show(suite.rows)
        print_tests(suite)
    return int(failed(suite))


def measure(suite: Suite, given: argparse.Namespace) -> None:
    """One part, in this process."""
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel imports triton
    torch.set_float32_matmul_precision("highest")
    part = {"kernels": kernels, "factorisations": factorisations}[given.only]
    try:
        part.measure(suite, given.budget - suite.elapsed, given.quick)
    except Exception as error:
        traceback.print_exc()
        with suite.case("suite", given.only):
            raise error


if __name__ == "__main__":
    raise SystemExit(main())
