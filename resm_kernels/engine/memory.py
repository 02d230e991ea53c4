"""How much memory there is, how much a merge holds, and giving back what malloc only keeps."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import psutil

BUDGET_SHARE = 0.6
"""Share of the available memory that a merge plans to use by default."""


def available_memory() -> int:
    """Bytes that can be taken without swapping, the cgroup's limit included."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(available, 0)


def anonymous_memory() -> int:
    """Resident bytes of this process that are not mapped files."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def return_free_memory() -> None:
    """Have the C library return freed blocks to the system; glibc keeps them otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class MemoryWatch:
    """Samples this process's resident anonymous memory while a merge runs.

    Whenever it comes near `limit` bytes above the start, freed blocks are returned to the system:
    blocks below 32 MB stay with glibc's per-thread arenas otherwise, and grow with the number of
    tensors (measured: 323 MB held where 193 MB were live).
    """

    def __init__(self, limit: int, interval: float = 0.01) -> None:
        self._limit = limit
        self._interval = interval
        self._done = threading.Event()
        self._start = anonymous_memory()
        self._peak = self._start
        self._thread = threading.Thread(target=self._watch, name="resm-memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            held = anonymous_memory()
            self._peak = max(self._peak, held)
            if held - self._start > 0.9 * self._limit:
                return_free_memory()

    def stop(self) -> int:
        """Most bytes above the level at the start."""
        self._done.set()
        self._thread.join()
        self._peak = max(self._peak, anonymous_memory())
        return_free_memory()
        return self._peak - self._start
