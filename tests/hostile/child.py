"""One case of the corpus in a process of its own: watched, measured and limited."""

from __future__ import annotations

import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants

from resm_kernels import api  # noqa: F401  loaded before the fork: each case pays for itself
from resm_kernels.cli import main
from resm_kernels.report import progress, tables  # noqa: F401
from tests.hostile.guard import Guard

CEILING = 4 << 30
"""Address space that a case may take; more, and it fails here and not the machine."""


class Answer(NamedTuple):
    """What the command did, and what that took: peak memory above the start, CPU seconds."""

    status: int
    megabytes: float
    seconds: float
    forbidden: list[str]


def run(root: Path, argv: list[str], log: Path, answer: Connection) -> None:
    """Run the command in `root`, where it may write `work/merged` and its partial folder only."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(root)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + CEILING, size + CEILING))
    guard = Guard([root / "work" / "merged", root / "work" / "merged.partial"], root / "in")
    before, start = _peak(), time.process_time()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
    seconds = time.process_time() - start
    sys.stdout.flush()
    sys.stderr.flush()
    answer.send(Answer(status, (_peak() - before) / 1024, seconds, guard.found))


def run_with_closed_hub(root: Path, argv: list[str], log: Path, answer: Connection) -> None:
    """As `run`, with a Hub that is asked once."""
    constants.ENDPOINT = "http://127.0.0.1:1"
    constants.HF_HUB_CACHE = str(log)
    sys.addaudithook(_interrupt_connections)
    run(root, argv, log, answer)


def _interrupt_connections(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect":
        raise KeyboardInterrupt  # or the Hub's client would try again and again


def _peak() -> int:
    """Most resident kilobytes of this process so far; a new process begins with what it shares."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
