"""`python -m tests.fuzz TARGET --seconds 60 --work DIR`: one target under atheris.

`DIR/seeds/TARGET` is read, `DIR/corpus/TARGET` grows, findings land in `DIR/found/TARGET-*`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["resm_kernels"], enable_loader_override=False):
    from tests.fuzz.seeds import write_seeds
    from tests.fuzz.targets import TARGETS, replay
from tests.hostile.guard import Guard

RSS_MB = 1024
"""Torch alone takes 400 MB; a finding of the memory bomb kind takes more than the rest."""
SECONDS_EACH = 10


def main() -> None:
    """Fuzz until the time is over or something is found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    logging.disable()
    seeds, corpus, found = (options.work / name for name in ("seeds", "corpus", "found"))
    if not seeds.exists():
        write_seeds(seeds)
    (corpus / options.target).mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp()) / "x"
    guard = Guard([folder])
    target = TARGETS[options.target]

    def one(data: bytes) -> None:
        replay(target, data, folder)
        assert guard.found == [], guard.found

    flags = {
        "max_total_time": options.seconds,
        "timeout": SECONDS_EACH,
        "rss_limit_mb": RSS_MB,
        "max_len": 8192,
        "print_final_stats": 1,
        "artifact_prefix": f"{found / options.target}-",
    }
    folders = [corpus / options.target, seeds / options.target]
    argv = [sys.argv[0], *(f"-{flag}={value}" for flag, value in flags.items()), *map(str, folders)]
    atheris.Setup(argv, one)
    atheris.Fuzz()


main()
