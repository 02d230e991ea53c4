"""What is synced before what: from the system calls, and by cutting the power."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from resm_kernels.checkpoint.journal import JOURNAL, MANIFEST
from tests.faults import Scene, small_scene
from tests.lossy import cut_power, record


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return small_scene(tmp_path_factory.mktemp("scene"))


def test_a_power_cut_loses_nothing_that_was_promised(scene: Scene, tmp_path: Path) -> None:
    """After every few changes; after every one, many times, in `make torture`."""
    disk = record(scene, tmp_path / "first")
    dice = random.Random(0)
    complete = [
        cut_power(scene, disk, events, tmp_path / f"cut{events}-{i}", chance)
        for events in (*range(0, len(disk.log), 4), len(disk.log))
        for i, chance in enumerate((None, dice))
    ]
    assert complete[-2:] == [True, True]
    assert not complete[0]


@dataclass(frozen=True)
class Event:
    """One system call: its place in the trace when it began and when it returned."""

    name: str
    text: str
    start: int
    end: int


def traces() -> bool:
    """Whether this machine has strace and lets it trace."""
    strace = shutil.which("strace")
    return (
        bool(strace) and subprocess.run([strace, "-f", "true"], capture_output=True).returncode == 0
    )


def traced(argv: list[str], log: Path) -> list[Event]:
    calls = "trace=mkdir,write,pwrite64,fsync,rename,unlink,unlinkat"
    command = ["strace", "-f", "-y", "-s", "4096", "-e", calls, "-o", str(log), *argv]
    subprocess.run(command, check=True, capture_output=True)
    events: list[Event] = []
    begun: dict[tuple[str, str], tuple[str, int]] = {}
    for line, text in enumerate(log.read_text(errors="replace").splitlines()):
        match = re.match(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)", text)
        if match is None:
            continue
        thread, resumed, name, rest = match.groups()
        if resumed:
            first, start = begun.pop((thread, resumed))
            events.append(Event(resumed, first + rest, start, line))
        elif rest.endswith("<unfinished ...>"):
            begun[thread, name] = rest, line
        else:
            events.append(Event(name, rest, line, line))
    return [event for event in events if re.search(r"= \d+$", event.text)]


@pytest.mark.skipif(not traces(), reason="no strace, or no permission to trace")
def test_everything_is_synced_before_it_is_relied_on(scene: Scene, tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = tmp_path / "out.partial"
    main = "import sys; from resm_kernels.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", main, "merge", "--base", str(scene.base)]
    argv += [word for expert in scene.experts for word in ("--expert", str(expert))]
    argv += ["--shard-size", scene.shard_size, str(output)]
    events = traced(argv, tmp_path / "log")
    scene.assert_whole(output)

    def only(name: str, *words: str) -> Event:
        (event,) = [e for e in events if e.name == name and all(w in e.text for w in words)]
        return event

    def synced(path: Path, after: Event, before: Event | None) -> bool:
        return any(
            e.name == "fsync"
            and f"<{path}>" in e.text
            and e.start > after.end
            and (before is None or e.end < before.start)
            for e in events
        )

    def renamed(path: Path) -> Event:
        return only("rename", f'"{path}.tmp", "{path}"')

    last = only("rename", f'"{partial}", "{output}"')
    manifest = renamed(partial / MANIFEST)
    gone = only("unlink", f'"{partial / JOURNAL}"')
    lines = [e for e in events if e.name == "write" and f"<{partial / JOURNAL}>" in e.text]
    assert synced(tmp_path, only("mkdir", f'"{partial}"'), lines[0])
    assert synced(partial, lines[0], lines[1])
    files = [partial / p.relative_to(output) for p in output.rglob("*") if p.is_file()]
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert len(shards) == len(lines) - 1 == 3
    for path in files:
        rename = renamed(path)
        writes = [e for e in events if e.name == "pwrite64" and f"<{path}.tmp>" in e.text]
        assert synced(Path(f"{path}.tmp"), max(writes, key=lambda e: e.end), rename), path
        if path in shards:
            (line,) = [e for e in lines if r"{\"digests\"" in e.text and path.name in e.text]
            assert synced(partial, rename, line), path
        else:
            assert synced(path.parent, rename, gone if path.name == MANIFEST else manifest), path
    for line, following in zip(lines, [*lines[1:], manifest], strict=True):
        assert synced(partial / JOURNAL, line, following)
    assert synced(partial, gone, last)
    assert synced(tmp_path, last, None)
