"""The extension built, then GPU tests, kernels, factorisations, merges and solvers, each in a
process, in one budget.

    python -m benchmarks.gpu.run --out DIR [--device cpu --quick] [--budget SECONDS]

Writes to DIR: `gpu.json` before and after every case, what tests and compute-sanitizer print
(`gpu_tests.log`, `sanitizer.log`), and the crossover table that the rows propose
(`crossover.json`). Exit code 1 if a test, a kernel, the accuracy contract or the sanitizer failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.gpu.suite import Suite, TooLong, Unavailable, Wrong
from resm_kernels.linalg import cusolver

TESTS = ("tests/test_gpu.py", "tests/test_gpu_kernels.py")
TESTS_SECONDS, BUDGET, GRACE = 150.0, 500.0, 20.0
"""For the tests, for everything, and how much longer a process may take than it was given."""
PARTS = ("kernels", "factorisations", "merges", "crossover")
"""Modules, imported in the process of the part: one that cannot be is a row."""
MOST = {"kernels": 110.0, "factorisations": 70.0}
"""Seconds for a part at most: what the tests and these leave goes to the merges."""
KEPT = {"kernels": 240.0, "factorisations": 170.0, "merges": 100.0, "crossover": 40.0}
"""Seconds that a part leaves to those after it: 70 and more to the merges, 60 to the solvers, 40 to
compute-sanitizer."""
SANITIZER_SECONDS = 40.0
HAS_TO = ("extension", "tests", "suite", "roofs", "kernels", "correctness", "sanitizer", "set up",
          "end to end", "workers", "larger")  # fmt: skip
"""Parts of rows in which nothing may fail."""
FOUND = 9
"""compute-sanitizer's exit code where it found an error."""
ROOT = Path(__file__).parents[2]


def module(part: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu.{part}")


def share_of(part: str, left: float) -> float:
    """Seconds for a part when so many are left to it and all after it."""
    return max(0.0, min(left - KEPT[part], MOST.get(part, left)))


def build_extension(suite: Suite, seconds: float) -> None:
    """Build the cuSOLVER extension beside its sources, for this Python; up to date it stays."""
    with suite.case("extension", "build") as row:
        if importlib.util.find_spec("pybind11") is None:
            raise Unavailable("no pybind11")
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        built = ROOT / "resm_kernels" / f"_cusolver{sysconfig.get_config_var('EXT_SUFFIX')}"
        changed = max(file.stat().st_mtime for file in (ROOT / "csrc").iterdir())
        if not built.is_file() or built.stat().st_mtime < changed:
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise RuntimeError(next(iter(said), f"exit code {done.returncode}"))
        row["note"] = "built, or up to date"
    importlib.invalidate_caches()


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
    command, limit = part_command(part, given, seconds), seconds + GRACE
    with tempfile.TemporaryDirectory() as folder:  # gone also where the process is killed
        where = os.environ | {"TMPDIR": folder}
        try:
            code = str(subprocess.run(command, cwd=ROOT, env=where, timeout=limit).returncode)
        except subprocess.TimeoutExpired:
            code = f"none within {limit:.0f} s"
    suite.reload()
    for row in suite.rows:
        if row["status"] == "running":
            row |= {"status": "error", "note": "the process ended here"}
    if code not in ("0", "1"):
        with suite.case("suite", part) as row:
            row |= {"status": "error", "note": f"exit code {code}"}


def run_sanitizer(suite: Suite, given: argparse.Namespace, seconds: float) -> None:
    """A small run of every solver of the extension under compute-sanitizer, where it is there."""
    log = suite.folder / "sanitizer.log"
    with suite.case("sanitizer", "memcheck") as row, open(log, "w") as file:
        if all(cusolver.available().values()):
            raise Unavailable("no solver of the cuSOLVER extension")
        tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
        if tool is None:
            raise Unavailable("no compute-sanitizer")
        if seconds < SANITIZER_SECONDS / 2:
            raise TooLong(f"{seconds:.0f} s left")
        with tempfile.TemporaryDirectory() as folder:
            command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
            command += [
                sys.executable,
                "-m",
                "benchmarks.gpu.run",
                "--only",
                "crossover",
                "--quick",
            ]
            command += ["--append", "--out", folder, "--device", given.device]
            Suite(Path(folder), suite.device).save()
            try:
                done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=seconds)
            except subprocess.TimeoutExpired:
                raise TooLong(f"not done within {seconds:.0f} s") from None
        row["note"] = next((x for x in reversed(log.read_text().splitlines()) if x.strip()), "")
        if done.returncode == FOUND:
            raise Wrong(row["note"])
        if done.returncode:
            raise Unavailable(f"exit code {done.returncode}: {row['note']}")


def print_tests(suite: Suite) -> None:
    for row in suite.rows:
        if row["part"] in ("extension", "tests", "suite", "sanitizer"):
            print(f"{row['name']}: {row['status']}, {row.get('note', '').strip('= ')}")
            print(*row.get("failed", ()), sep="\n", end="")


def failed(suite: Suite) -> bool:
    """Whether anything that has to hold did not."""
    return any(row["part"] in HAS_TO and row["status"] in ("fail", "error") for row in suite.rows)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try the suite out")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--only", choices=PARTS)
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
        if not given.only and given.device == "cuda":
            build_extension(suite, given.budget)
        if not given.skip_tests:
            run_tests(suite, min(TESTS_SECONDS, given.budget))
        for part in (given.only,) if given.only else PARTS:
            left = given.budget - suite.elapsed
            run_part(suite, part, given, max(left, 0.0) if given.only else share_of(part, left))
        if not given.only:
            run_sanitizer(suite, given, given.budget - suite.elapsed)
    finally:
        suite.save()
        for part in PARTS:
            with contextlib.suppress(Exception):
                module(part).print_table(suite.rows)
        print_tests(suite)
    return int(failed(suite))


def measure(suite: Suite, given: argparse.Namespace) -> None:
    """One part, in this process."""
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel imports triton
    torch.set_float32_matmul_precision("highest")
    try:
        module(given.only).measure(suite, given.budget - suite.elapsed, given.quick)
    except Exception as error:
        traceback.print_exc()
        with suite.case("suite", given.only):
            raise error


if __name__ == "__main__":
    raise SystemExit(main())
