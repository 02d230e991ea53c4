"""Bytes changed and files cut short in an output, and whether they are found by name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import resm_kernels
from resm_kernels.checkpoint.files import unseal
from resm_kernels.checkpoint.journal import MANIFEST
from resm_kernels.errors import OutputError, VerificationError
from tests.faults import Scene, kill_at_call

Damage = Callable[[bytes], bytes]


def flip(place: int, mask: int) -> Damage:
    """Change one byte."""

    def change(data: bytes) -> bytes:
        return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]

    return change


def at_random(folder: Path, count: int, dice: random.Random) -> Iterator[tuple[Path, int, Damage]]:
    """Flips and truncations of files in a folder, larger files more often: file, place, damage."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for path in dice.choices(files, [size**0.5 for size in sizes], k=count):
        place = dice.randrange(path.stat().st_size)
        if dice.random() < 0.5:
            yield path, place, flip(place, dice.randrange(1, 256))
        else:
            yield path, place, lambda data, place=place: data[:place]  # type: ignore[misc]


class Watched:
    """A finished output, whose files are damaged one at a time and mended again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = unseal(folder / MANIFEST)["tensors"]

    def assert_found(self, path: Path, place: int, damage: Damage) -> None:
        """`verify` names the file, and just the tensors whose bytes are no longer theirs."""
        original = path.read_bytes()
        damaged = damage(original)
        path.write_bytes(damaged)
        try:
            with pytest.raises(VerificationError) as caught:
                resm_kernels.verify(self.folder)
        finally:
            path.write_bytes(original)
        expected = set()
        for name, entry in self._tensors.items():
            start, stop = entry["range"]
            if path.name == entry["file"] and start <= place < stop:
                expected.add(name)
            if path.name == entry["file"] and len(damaged) < stop:
                expected.add(name)
        message = str(caught.value)
        assert str(path) in message
        named = {
            name
            for name in self._tensors
            if re.search(re.escape(f"{path}: tensor {name!r} differs"), message)
        }
        assert named == expected
        assert message.count(" differs") == len(expected) or not expected


def kept_shards_damaged(scene: Scene, output: Path, count: int, dice: random.Random) -> int:
    """Damage the kept shards of an interrupted merge so often; `resume` refuses each by name."""
    assert kill_at_call(scene, output, 30, after=True)
    partial = output.with_name(output.name + ".partial")
    shards = sorted(partial.glob("*.safetensors"))
    for _ in range(count):
        path = dice.choice(shards)
        original = path.read_bytes()
        place = dice.randrange(len(original))
        cut = dice.random() < 0.3
        path.write_bytes(original[:place] if cut else flip(place, dice.randrange(1, 256))(original))
        with pytest.raises(OutputError, match=re.escape(f"{path}: changed after it was finished")):
            scene.merge(output, resume=True)
        path.write_bytes(original)
    scene.merge(output, resume=True)
    scene.assert_whole(output)
    return count
