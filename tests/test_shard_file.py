"""A shard is checked while it is written: in any order, and nothing false gets its name."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from resm_kernels.checkpoint import writer
from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.writer import ShardFile, ShardLayout, Slot, lay_out_shards
from resm_kernels.errors import OutputError
from tests.faults import Scene, fault, file_layer, resume, small_scene
from tests.lossy import cut_power, record

BLOCK, CHECK = 16, 40


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that a shard of some hundred bytes has many."""
    monkeypatch.setattr(writer, "BLOCK", BLOCK)
    monkeypatch.setattr(writer, "CHECK", CHECK)


def shard_of(*sizes: int) -> tuple[ShardLayout, dict[str, torch.Tensor]]:
    """A shard of byte tensors."""
    tensors = {
        f"t{i}": torch.randint(1, 256, (n,), dtype=torch.uint8, generator=torch.manual_seed(i))
        for i, n in enumerate(sizes)
    }
    named = [(name, DTYPES["U8"], tuple(tensor.shape)) for name, tensor in tensors.items()]
    (layout,) = lay_out_shards(named, 1 << 30)
    return layout, tensors


def whole(layout: ShardLayout, tensors: dict[str, torch.Tensor]) -> bytes:
    """What the file must hold."""
    return layout.header + b"".join(tensors[s.name].numpy().tobytes() for s in layout.slots)


def blocks(tensor: torch.Tensor, size: int = 24) -> Iterator[memoryview]:
    """A tensor as a lane hands it out, in pieces that are no multiple of ours."""
    data = tensor.numpy().data
    return (data[i : i + size] for i in range(0, len(data), size))


SIZES = [(33, 90, 0, 17, 64), (0, 0, 0, 0), (500,), (1,), (0, 70, 70, 0), (64, 0, 16, 0)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("late", [False, True])
def test_any_order_of_arrival(sizes: tuple[int, ...], late: bool, tmp_path: Path) -> None:
    """Checked as soon as it is due, or all at the end."""
    layout, tensors = shard_of(*sizes)
    expected = whole(layout, tensors)
    for turn, order in enumerate(itertools.permutations(layout.slots)):
        asked: list[bool] = []

        def check(shard: ShardFile, asked: list[bool] = asked) -> None:
            asked.append(shard.check())

        folder = tmp_path / str(turn)
        folder.mkdir()
        shard = ShardFile(folder, layout, None if late else check)
        for slot in order:
            assert not any(asked)
            shard.write_pieces(slot, blocks(tensors[slot.name]))
        assert asked == ([] if late else [*[False] * (len(asked) - 1), True])
        assert shard.finish() == hashlib.sha256(expected).hexdigest()
        assert (folder / layout.name).read_bytes() == expected
        assert [path.name for path in folder.iterdir()] == [layout.name]
        assert shard.digests == {
            n: hashlib.sha256(t.numpy()).hexdigest() for n, t in tensors.items()
        }


def test_a_huge_tensor_is_checked_while_it_is_written(tmp_path: Path) -> None:
    layout, tensors = shard_of(1000)
    seen = []

    def check(shard: ShardFile) -> None:
        seen.append(os.pread(shard._descriptor, 2000, 0))
        shard.check()

    shard = ShardFile(tmp_path, layout, check)
    shard.write(layout.slots[0], tensors["t0"])
    assert len(seen) > 1000 // (CHECK + BLOCK)
    assert seen[0].endswith(bytes(900))
    shard.finish()


def test_what_lies_behind_a_gap_waits(tmp_path: Path) -> None:
    layout, tensors = shard_of(100, 400)
    asked: list[int] = []
    shard = ShardFile(tmp_path, layout, lambda shard: asked.append(len(shard.digests)))
    shard.write(layout.slots[1], tensors["t1"])
    before = len(asked)
    assert not shard.check()
    with pytest.raises(OutputError, match=re.escape("1 tensors are missing: ['t0']")):
        shard.finish()
    assert not (tmp_path / layout.name).exists()
    shard.write(layout.slots[0], tensors["t0"])
    assert len(asked) > before
    assert shard.check()
    shard.finish()


@pytest.mark.parametrize("sizes", [(33, 90, 0, 17, 64), (300,)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_a_byte_that_changes_before_it_is_read_back_is_named(
    sizes: tuple[int, ...], reverse: bool, cut: bool, tmp_path: Path
) -> None:
    """Every byte, as soon as it was written and before the next check."""
    layout, tensors = shard_of(*sizes)
    path = tmp_path / f"{layout.name}.tmp"
    for place in range(layout.size):
        owner = next((s.name for s in layout.slots if s.start <= place < s.stop), None)
        waiting: list[ShardFile] = []
        shard = ShardFile(tmp_path, layout, waiting.append)
        left = [place]

        def passed(
            start: int, stop: int, left: list[int] = left, waiting: list[ShardFile] = waiting
        ) -> None:
            """So far it is written: damage it, then check what is due."""
            if left and start <= left[0] < stop:
                damaged = bytearray(path.read_bytes())
                damaged[left[0]] ^= 1
                path.write_bytes(damaged[: left[0]] if cut else damaged)
                left.clear()
            while waiting:
                waiting.pop().check()

        def pieces(slot: Slot, passed: Callable[[int, int], None] = passed) -> Iterator[memoryview]:
            reached = slot.start
            for piece in blocks(tensors[slot.name]):
                yield piece
                reached += len(piece)
                passed(slot.start, reached)

        def arrive(shard: ShardFile = shard, passed: Callable[[int, int], None] = passed) -> None:
            passed(0, len(layout.header))
            for slot in layout.slots[::-1] if reverse else layout.slots:
                shard.write_pieces(slot, pieces(slot))
            shard.finish()

        name = f"tensor {owner!r}" if owner else "the header"
        with pytest.raises(OutputError, match=re.escape(f"{layout.name}: {name} read back")):
            arrive()
        assert not left
        shard.close()
        assert not (tmp_path / layout.name).exists()


def test_threads_that_write_and_one_that_checks(tmp_path: Path) -> None:
    dice = random.Random(0)
    layout, tensors = shard_of(*(dice.randrange(200) for _ in range(120)))
    order = sorted(layout.slots, key=lambda slot: slot.start + dice.randrange(1000))
    busy = threading.Lock()

    class Watched(ShardFile):
        def _read_back(self, stop: int) -> None:
            assert busy.acquire(blocking=False), "two at a time"
            super()._read_back(stop)
            busy.release()

    def write(slot: Slot) -> None:
        time.sleep(2e-3)
        shard.write_pieces(slot, blocks(tensors[slot.name]))

    with ThreadPoolExecutor(4) as writers, ThreadPoolExecutor(3) as checkers:
        checks: list[Future[bool]] = []
        due = lambda shard: checks.append(checkers.submit(ShardFile.check, shard))  # noqa: E731
        shard = Watched(tmp_path, layout, due)
        list(writers.map(write, order))
        while not checks[-1].result(10):
            pass
    assert [check.result() for check in checks] == [*[False] * (len(checks) - 1), True]
    assert len(checks) > 2
    assert shard.finish() == hashlib.sha256(whole(layout, tensors)).hexdigest()


# Through a whole merge


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return small_scene(tmp_path / "scene")


def test_a_merge_syncs_between_the_last_write_and_the_name(scene: Scene, tmp_path: Path) -> None:
    calls: dict[int, list[str]] = {}
    shards, syncs = [], 0

    def note(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal syncs
        if name in ("pwrite", "fsync"):
            calls.setdefault(os.fstat(arguments[0]).st_ino, []).append(name)
        elif str(arguments[1]).endswith(".safetensors"):
            inode = os.stat(arguments[0]).st_ino
            assert calls[inode][-1] == "fsync"
            syncs += calls.pop(inode).count("fsync")
            shards.append(arguments[1])
        return call(*arguments)

    with file_layer(note, ("pwrite", "fsync", "rename")):
        report = scene.merge(tmp_path / "out")
    scene.assert_whole(tmp_path / "out")
    assert len(shards) == 3 < syncs
    assert report.stage_seconds["finish"] > 0


def test_faults_and_power_cuts_between_the_pieces(scene: Scene, tmp_path: Path) -> None:
    for step in range(31, 400, 23):
        if fault(scene, tmp_path / f"out{step}", "EIO", step) is None:
            break
    assert step > 100
    disk = record(scene, tmp_path / "first")
    dice = random.Random(0)
    for events in range(0, len(disk.log), 7):
        cut_power(scene, disk, events, tmp_path / f"cut{events}", dice)


def test_a_lying_disk_ends_the_merge_before_it_is_all_written(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwrite

    def lying(descriptor: int, data: memoryview, offset: int) -> int:
        return original(descriptor, bytes(len(data)) if offset > 180 else data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lying)
        with pytest.raises(OutputError, match="read back differs from what was written"):
            scene.merge(tmp_path / "out")
    resume(scene, tmp_path / "out")
