"""Progress on stderr: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG = logging.getLogger(__name__)


class BarProgress:
    """A rich bar with bytes, GB/s and time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("merging"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("merging", total=None, tensor="")

    def start(self, total: int) -> None:
        """Show the bar."""
        self._bar.update(self._task, total=total)
        self._bar.start()

    def advance(self, count: int, tensor: str) -> None:
        """Move on by `count` bytes."""
        self._bar.update(self._task, advance=count, tensor=tensor)

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()


class LogProgress:
    """Plain lines through logging, at most one every `interval` seconds."""

    def __init__(self, interval: float = 10.0) -> None:
        self._interval = interval
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._started = self._said = time.monotonic()

    def start(self, total: int) -> None:
        """Remember the total."""
        self._total = total
        self._started = self._said = time.monotonic()

    def advance(self, count: int, tensor: str) -> None:
        """Count bytes, and say where the merge is when it is time."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._said < self._interval or self._done <= 0:
                return
            self._said = now
            rate = self._done / (now - self._started)
            done, total = self._done / 1e9, self._total / 1e9
        left = (total - done) * 1e9 / rate
        LOG.info(
            "%.2f of %.2f GB, %.3f GB/s, %.0f s left, at %s", done, total, rate / 1e9, left, tensor
        )

    def stop(self) -> None:
        """Nothing to take away."""
