"""An audit hook that notes what no hostile file may cause: writes elsewhere, sockets, processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod", "os.chown", "os.utime")
PAIRS = ("os.rename", "os.link", "os.symlink")
NEVER = (
    "socket.",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pty.spawn",
    "urllib.Request",
)
"""Beginnings of the events that are noted wherever they happen."""


class Guard:
    """Notes in `found` every forbidden event of this process, for good: a hook cannot be undone.

    Parameters
    ----------
    writable : iterable of path
        Where files may be made and changed: those paths and what lies below.
    data : path, optional
        Nothing below it may be run as Python code.
    """

    def __init__(self, writable: Iterable[Path], data: Path | None = None) -> None:
        self.writable = tuple(os.path.realpath(path) for path in writable)
        self.data = data and os.path.realpath(data)
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & WRITES
            if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
                self._check(event, path)
        elif event in CHANGES:
            self._check(event, arguments[0], arguments[-1])
        elif event in PAIRS:
            if event != "os.symlink":
                self._check(event, arguments[0])
            self._check(event, arguments[1])
        elif event == "exec" and self.data is not None:
            name = getattr(arguments[0], "co_filename", "")
            if os.path.realpath(name).startswith(self.data):
                self.found.append(f"{event} {name}")
        elif event.startswith(NEVER) and event != "socket.gethostname":
            self.found.append(f"{event} {arguments!r}"[:200])

    def _check(self, event: str, path: object, folder: object = -1) -> None:
        if isinstance(path, int):
            return  # a descriptor: its opening was heard
        name = os.fsdecode(path)  # type: ignore[arg-type]
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        place = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        inside = any(place == root or place.startswith(root + os.sep) for root in self.writable)
        if not inside and place != os.devnull:
            self.found.append(f"{event} {place}")
