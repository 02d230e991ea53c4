"""`python -m tests.fuzz [TARGET] --seconds 60 --work DIR`: one target under atheris, or each.

`DIR/seeds` is made from the corpus, `DIR/corpus` grows, findings land in `DIR/found`.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["resm_kernels"], enable_loader_override=False):
    from tests.fuzz.seeds import write_seeds
    from tests.fuzz.targets import TARGETS, replay
from tests.hostile.guard import Guard

RSS_MB = 1024
"""Torch alone takes 260 MB; more than the rest is a memory bomb."""
SECONDS_EACH = 10


def fuzz(name: str, seconds: int, work: Path) -> None:
    """Fuzz a target until the time is over or something is found; does not return."""
    logging.disable()
    folders = [work / "corpus" / name, work / "seeds" / name]
    folders[0].mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp()) / "x"
    guard = Guard([folder])

    def one(data: bytes) -> None:
        replay(TARGETS[name], data, folder)
        assert guard.found == [], guard.found

    flags = {
        "max_total_time": seconds,
        "timeout": SECONDS_EACH,
        "rss_limit_mb": RSS_MB,
        "max_len": 8192,
        "print_final_stats": 1,
        "artifact_prefix": f"{work / 'found' / name}-",
    }
    argv = [sys.argv[0], *(f"-{flag}={value}" for flag, value in flags.items()), *map(str, folders)]
    atheris.Setup(argv, one)
    atheris.Fuzz()


def fuzz_each(seconds: int, work: Path) -> int:
    """Fuzz every target in a process of its own; the number of those that found something."""
    failed = 0
    for name in TARGETS:
        command = [sys.executable, "-m", "tests.fuzz", name]
        log = work / f"{name}.log"
        with open(log, "w") as file:
            options = ["--seconds", str(seconds), "--work", str(work)]
            status = subprocess.run([*command, *options], stdout=file, stderr=file).returncode
        text = log.read_text(errors="replace")
        runs = re.findall(r"number_of_executed_units: (\d+)", text) or ["0"]
        coverage = re.findall(r"cov: (\d+)", text) or ["0"]
        failed += status != 0
        told = f"see {log}" if status else "nothing found"
        print(f"{name:10} {int(runs[-1]):,} runs, cov {coverage[-1]}: {told}", flush=True)
    return failed


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=TARGETS, nargs="?")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    (options.work / "found").mkdir(parents=True, exist_ok=True)
    if not (options.work / "seeds").exists():
        write_seeds(options.work / "seeds")
    if options.target is None:
        sys.exit(fuzz_each(options.seconds, options.work))
    fuzz(options.target, options.seconds, options.work)


main()
