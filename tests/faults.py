"""A file layer that fails on purpose, processes that die on purpose, and what must hold then."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import resm_kernels
from resm_kernels.checkpoint import files
from resm_kernels.checkpoint.journal import JOURNAL, partial_folder
from resm_kernels.engine import flow
from resm_kernels.errors import OutputError, ResmError
from tests.checkpoints import contents, fine_tuned, make_state, save

WRITES = ("mkdir", "posix_fallocate", "pwrite", "write", "ftruncate", "fsync", "rename", "unlink")
"""What changes a disk on the way from nothing to a finished folder."""
READS = ("open", "stat", "fstat", "listdir", "scandir", "preadv", "pread", "read", "close")
REPORTS = ("resm_report.json", "resm_report.html")

Act = Callable[[int, str, Callable[..., Any], tuple[Any, ...]], Any]
"""Answers in a call's place; gets its number, its name, the call and its arguments."""


@contextmanager
def file_layer(act: Act, names: tuple[str, ...] = WRITES) -> Iterator[None]:
    """Hand every such call of this process to `act`, numbered from 1."""
    count = 0
    lock = threading.Lock()

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                number = count
            return act(number, name, functools.partial(call, **options), arguments)

        return wrapped

    class Raw(io.FileIO):
        def readinto(self, buffer: Any, /) -> Any:
            return wrap("read", super().readinto)(memoryview(buffer))

        def readall(self) -> bytes:
            pieces, piece = [], bytearray(1 << 16)
            while count := self.readinto(piece):
                pieces.append(bytes(piece[:count]))
            return b"".join(pieces)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            if name != "read":
                patch.setattr(os, name, wrap(name, getattr(os, name)))
        if "read" in names:
            opened = lambda descriptor, mode: io.BufferedReader(Raw(descriptor, mode))  # noqa: E731
            patch.setattr(files, "open", opened, raising=False)
        yield


def _error(code: int) -> Act:
    def fail(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "close":
            call(*arguments)
        raise OSError(code, os.strerror(code))

    return fail


def _short(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Half of what was asked, and at least a byte."""
    if name == "preadv":
        descriptor, (view,), offset = arguments
        return call(descriptor, [view[: (len(view) + 1) // 2]], offset)
    if name == "read":
        return call(arguments[0][: (len(arguments[0]) + 1) // 2])
    descriptor, data, *offset = arguments
    return call(descriptor, data[: (len(data) + 1) // 2], *offset)


def _ended(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return b"" if name == "pread" else 0


FAULTS: Mapping[str, tuple[Act, tuple[str, ...]]] = {
    "EIO": (_error(errno.EIO), WRITES + READS),
    "ENOSPC": (_error(errno.ENOSPC), ("open", *WRITES)),
    "EINTR": (_error(errno.EINTR), WRITES + READS),
    "short write": (_short, ("pwrite", "write")),
    "short read": (_short, ("preadv", "read")),
    "end of file": (_ended, ("preadv", "pread", "read")),
}
"""What goes wrong, and in which calls it can."""


@dataclass(frozen=True)
class Scene:
    """A family of checkpoints, how it is merged, and what an uninterrupted merge gives."""

    base: Path
    experts: tuple[Path, ...]
    whole: Path
    shard_size: str

    def merge(self, output: Path, *, resume: bool = False) -> resm_kernels.MergeReport:
        """Merge to a folder."""
        return resm_kernels.merge(
            self.base,
            self.experts,
            output,
            shard_size=self.shard_size,
            resume=resume,
            workers=2,
        )

    @property
    def inputs(self) -> dict[str, bytes]:
        """Every byte of every input."""
        return contents(self.base.parent)

    def assert_whole(self, output: Path) -> None:
        """The output verifies and equals the uninterrupted one, but for the report's times."""
        resm_kernels.verify(output)
        one, two = contents(output), contents(self.whole)
        for name in REPORTS:
            del one[name], two[name]
        assert one == two
        assert not partial_folder(output).exists()


def make_scene(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], shard_size: str, experts: int = 2
) -> Scene:
    """A base in shards with a template in a subfolder, experts of which the last is a `.bin`."""
    inputs = folder / "inputs"
    state = make_state(shapes=shapes)
    base = save(inputs / "base", state, shards=2)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    paths = [save(inputs / f"e{t}", fine_tuned(state, t + 1)) for t in range(experts)]
    (paths[-1] / "model.safetensors").unlink()
    torch.save(fine_tuned(state, experts), paths[-1] / "pytorch_model.bin")
    scene = Scene(base, tuple(paths), folder / "whole", shard_size)
    scene.merge(scene.whole)
    return scene


def small_scene(folder: Path) -> Scene:
    """Four tensors in three shards."""
    shapes = {"a.weight": (6, 4), "b.weight": (6, 4), "c.weight": (4, 6), "norm.weight": (4,)}
    return make_scene(folder, shapes, "60B")


def large_scene(folder: Path) -> Scene:
    """Forty matrices in ten shards: about a second of work."""
    shapes = {f"layers.{i}.weight": (96, 128) for i in range(40)}
    return make_scene(folder, shapes, "100KB", experts=3)


def threads() -> list[str]:
    """Threads of merges that have not ended."""
    return [t.name for t in threading.enumerate() if t.name.startswith("resm-")]


def resume(scene: Scene, output: Path) -> tuple[int, int]:
    """Finish what an interrupted merge left, and prove that nothing finished was done again.

    Returns the numbers of tensors that were kept and that were merged.
    """
    journal = partial_folder(output) / JOURNAL
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    kept = {name for line in lines for name in json.loads(line)["digests"]}
    merged = []
    original = flow.merge_planned

    def counted(plan: Any, tensor: Any, inputs: Any) -> Any:
        merged.append(tensor.name)
        return original(plan, tensor, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "merge_planned", counted)
        report = scene.merge(output, resume=True)
    scene.assert_whole(output)
    assert kept.isdisjoint(merged)
    complete = not merged and not kept
    assert complete or sorted([*kept, *merged]) == sorted(report.tensors)
    return len(report.tensors) - len(merged), len(merged)


def fault(scene: Scene, output: Path, kind: str, step: int) -> str | None:
    """Merge with one fault in the call of that number; None where there is no such call.

    Afterwards the output is absent or complete, and `resume` finishes it.
    """
    act, names = FAULTS[kind]
    fired = False

    def once(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal fired
        if number == step:
            fired = True
            return act(number, name, call, arguments)
        return call(*arguments)

    before = scene.inputs, psutil.Process().num_fds()
    message = ""
    with file_layer(once, names):
        try:
            scene.merge(output)
        except ResmError as error:
            message = str(error)
    assert (scene.inputs, psutil.Process().num_fds()) == before
    assert not threads()
    if output.exists():
        scene.assert_whole(output)
    else:
        assert message
        resume(scene, output)
    return message if fired else None


def in_child(work: Callable[..., None], *arguments: object, after: float = 60) -> int | None:
    """Exit status of work in a forked process, killed after so many seconds; -9 for a kill."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(after)
    if process.exitcode is None:
        process.kill()
        process.join()
        assert after < 60, "the child hangs"
    return process.exitcode


def _merge_and_die(scene: Scene, output: Path, step: int, after: bool) -> None:
    def deadly(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if number != step:
            return call(*arguments)
        with contextlib.suppress(OSError):
            if after:
                call(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    with file_layer(deadly):
        scene.merge(output, resume=partial_folder(output).exists())
    os._exit(0)


def kill_at_call(scene: Scene, output: Path, step: int, *, after: bool) -> bool:
    """Kill a merge, as `kill -9` does, before or after its call of that number; whether it died.

    Afterwards the output is absent or complete.
    """
    return _judge(scene, output, in_child(_merge_and_die, scene, output, step, after))


def kill_at_time(scene: Scene, output: Path, seconds: float) -> bool:
    """Kill a merge after a time; whether it died. Afterwards the output is absent or complete."""
    return _judge(scene, output, in_child(_merge_and_die, scene, output, 0, False, after=seconds))


def _judge(scene: Scene, output: Path, status: int | None) -> bool:
    assert status in (0, -signal.SIGKILL)
    if output.exists():
        scene.assert_whole(output)
    return status != 0


def _race(scene: Scene, output: Path, gate: Any) -> None:
    gate.wait()
    try:
        scene.merge(output)
    except OutputError:
        os._exit(3)
    os._exit(0)


def race(scene: Scene, output: Path, racers: int) -> None:
    """Start merges to one output at the same moment: one wins, the others get one clear error."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(racers)
    processes = [context.Process(target=_race, args=(scene, output, gate)) for _ in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(p.exitcode if p.exitcode is not None else -1 for p in processes) == [
        0,
        *[3] * (racers - 1),
    ]
    scene.assert_whole(output)
