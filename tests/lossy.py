"""A disk that loses power: what was synced stays, of the rest anything may."""

from __future__ import annotations

import json
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import WRITES, Scene, file_layer, resume

Dice = random.Random | None
"""None: of what was not synced nothing stays."""


class Recorder:
    """Every change below a folder in order: a file's bytes, a folder's names, a sync of either."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = root.stat().st_ino
        self.folders = {self.top}
        self.log: list[tuple[str, int, Any]] = []
        self._lock = threading.Lock()

    def __call__(
        self, number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        with self._lock:
            if not isinstance(arguments[0], int):
                path = Path(arguments[0])
                if not path.is_relative_to(self.root):
                    return call(*arguments)
                there = path.exists()
                result = call(*arguments)
                self._named(name, path, there, arguments)
                return result
            result = call(*arguments)
            inode = os.fstat(arguments[0]).st_ino
            if name == "fsync":
                self.log.append(("sync", inode, None))
            else:
                self._changed(inode, arguments[0])
            return result

    def _named(self, name: str, path: Path, there: bool, arguments: tuple[Any, ...]) -> None:
        folder = path.parent.stat().st_ino
        if name == "rename":
            target = Path(arguments[1])
            changes = {path.name: None, target.name: target.stat().st_ino}
            assert target.parent == path.parent
        elif name == "unlink":
            changes = {path.name: None}
        elif there:
            return
        else:
            changes = {path.name: path.stat().st_ino}
        if name == "mkdir":
            self.folders.add(path.stat().st_ino)
        elif name == "open":
            self.log.append(("data", path.stat().st_ino, b""))
        self.log.append(("names", folder, changes))

    def _changed(self, inode: int, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        self.log.append(("data", inode, os.pread(descriptor, size, 0)))

    def promised(self, events: int) -> int:
        """Tensors of the shards whose journal lines were synced by then."""
        data: dict[int, bytes] = {}
        count = 0
        for kind, inode, content in self.log[:events]:
            if kind == "data":
                data[inode] = content
            elif data.get(inode, b"").startswith(b'{"plan_id"'):
                lines = data[inode].splitlines()[1:]
                count = sum(len(json.loads(line)["digests"]) for line in lines)
        return count

    def after_power_cut(self, events: int, target: Path, dice: Dice) -> None:
        """Make what a cut after so many events may leave."""
        data: dict[int, bytes] = {}
        safe: dict[int, bytes] = {}
        names: dict[int, dict[str, int | None]] = defaultdict(dict)
        pending: dict[int, list[dict[str, int | None]]] = defaultdict(list)
        for kind, inode, content in self.log[:events]:
            if kind == "data":
                data[inode] = content
            elif kind == "names":
                pending[inode].append(content)
            elif inode in self.folders:
                for changes in pending.pop(inode, ()):
                    names[inode].update(changes)
            else:
                safe[inode] = data[inode]

        def make(inode: int, path: Path) -> None:
            path.mkdir()
            entries = dict(names[inode])
            for changes in pending[inode]:
                if dice and dice.random() < 0.5:
                    entries.update(changes)
            for name, entry in entries.items():
                if entry in self.folders:
                    make(entry, path / name)
                elif entry is not None:
                    content = safe.get(entry, b"")
                    if dice and dice.random() < 0.6:
                        torn = dice.randint(0, len(data[entry]))
                        content = data[entry][:torn] + content[torn:]
                    (path / name).write_bytes(content)

        make(self.top, target)


def record(scene: Scene, root: Path) -> Recorder:
    """Merge to `root/out` and note what reached the disk."""
    root.mkdir()
    recorder = Recorder(root)
    with file_layer(recorder, ("open", *WRITES)):
        scene.merge(root / "out")
    scene.assert_whole(root / "out")
    return recorder


def cut_power(scene: Scene, disk: Recorder, events: int, root: Path, dice: Dice) -> bool:
    """Cut the power after so many changes and finish the merge; whether it was complete.

    No shard is merged again whose journal line was synced.
    """
    disk.after_power_cut(events, root, dice)
    complete = (root / "out").exists()
    if complete:
        scene.assert_whole(root / "out")
    else:
        kept, _ = resume(scene, root / "out")
        assert kept >= disk.promised(events)
    return complete
