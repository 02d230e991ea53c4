"""Nothing that changed after the merge passes for what was merged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import resm_kernels
from resm_kernels.errors import VerificationError
from tests.damage import Watched, at_random, flip, kept_shards_damaged
from tests.faults import Scene, large_scene, small_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return small_scene(tmp_path_factory.mktemp("scene"))


def test_flipped_bytes_are_found_and_named(scene: Scene) -> None:
    """Some bytes of every file here, every byte in `make torture`."""
    watched = Watched(scene.whole)
    for path in sorted(p for p in scene.whole.rglob("*") if p.is_file()):
        size = path.stat().st_size
        for place in {*range(0, size, 41), size - 1}:
            watched.assert_found(path, place, flip(place, 1 << (place % 8)))
        for place in (0, size - 1):
            watched.assert_found(path, place, lambda data, place=place: data[:place])  # type: ignore[misc]


def test_random_damage_to_a_larger_output_is_found_and_named(tmp_path: Path) -> None:
    """A hundred flips and truncations here, a thousand in `make torture`."""
    scene = large_scene(tmp_path)
    watched = Watched(scene.whole)
    for path, place, damage in at_random(scene.whole, 100, random.Random(1)):
        watched.assert_found(path, place, damage)
    resm_kernels.verify(scene.whole)


def test_missing_files_are_found_and_added_ones_listed(scene: Scene) -> None:
    for path in sorted(p for p in scene.whole.rglob("*") if p.is_file()):
        original = path.read_bytes()
        path.unlink()
        with pytest.raises(VerificationError, match=path.name):
            resm_kernels.verify(scene.whole)
        path.write_bytes(original)
    (scene.whole / "added.txt").write_text("x")
    assert resm_kernels.verify(scene.whole).unlisted == ("added.txt",)
    (scene.whole / "added.txt").unlink()


def test_resume_refuses_damaged_shards(scene: Scene, tmp_path: Path) -> None:
    assert kept_shards_damaged(scene, tmp_path / "out", 30, random.Random(2)) == 30
