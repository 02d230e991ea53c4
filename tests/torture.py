"""The long version of the crash tests: `make torture`. Prints what it did."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from pathlib import Path

import pytest

import resm_kernels
from tests.damage import Watched, at_random, flip, kept_shards_damaged
from tests.faults import (
    FAULTS,
    Scene,
    fault,
    kill_at_call,
    kill_at_time,
    large_scene,
    race,
    resume,
    small_scene,
)
from tests.lossy import cut_power, record

RANDOM_KILLS = 150
POWER_CUTS = 9
DAMAGES = 1000
RACES = 100


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return small_scene(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return large_scene(tmp_path_factory.mktemp("large"))


@pytest.mark.timeout(1200)
def test_killed_around_every_call(small: Scene, tmp_path: Path) -> None:
    points = complete = kept = merged = 0
    for step in itertools.count(1):
        output = tmp_path / "out"
        died = [False, False]
        for after in (False, True):
            died[after] = kill_at_call(small, output, step, after=after)
            if output.exists():
                complete += died[after]
            else:
                done = resume(small, output)
                kept, merged = kept + done[0], merged + done[1]
            shutil.rmtree(output)
        points += sum(died)
        if not any(died):
            break
    print(
        f"\nkilled before and after each of {step - 1} calls: {points} points, {complete} left a "
        f"complete output; the others' resumes kept {kept} tensors and merged {merged}"
    )
    assert points >= 100


@pytest.mark.timeout(1800)
def test_killed_at_random_times(large: Scene, tmp_path: Path) -> None:
    start = time.perf_counter()
    assert not kill_at_time(large, tmp_path / "first", 60)
    whole = time.perf_counter() - start
    dice = random.Random(6)
    points = runs = kept = merged = 0
    while points < RANDOM_KILLS:
        output = tmp_path / f"out{runs}"
        runs += 1
        while not output.exists() and kill_at_time(large, output, dice.uniform(0.05, whole)):
            points += 1
            if dice.random() < 0.5:
                break
        if not output.exists():
            done = resume(large, output)
            kept, merged = kept + done[0], merged + done[1]
        large.assert_whole(output)
        shutil.rmtree(output)
    print(
        f"\nkilled at {points} random times in {runs} merges of {whole:.2f} s, resumes included; "
        f"last resumes kept {kept} tensors and merged {merged}"
    )


@pytest.mark.timeout(1200)
def test_power_cut_after_every_change(small: Scene, tmp_path: Path) -> None:
    disk = record(small, tmp_path / "first")
    dice = random.Random(7)
    cuts = complete = 0
    for events in range(len(disk.log) + 1):
        for chance in (None, *[dice] * POWER_CUTS):
            complete += cut_power(small, disk, events, tmp_path / "cut", chance)
            shutil.rmtree(tmp_path / "cut")
            cuts += 1
    print(
        f"\npower cut after each of {len(disk.log)} changes, {POWER_CUTS + 1} states each: "
        f"{cuts} cuts, {complete} left a complete output, the others were resumed to it"
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_every_call(kind: str, small: Scene, tmp_path: Path) -> None:
    errors = 0
    for step in itertools.count(1):
        message = fault(small, tmp_path / "out", kind, step)
        shutil.rmtree(tmp_path / "out")
        if message is None:
            break
        errors += bool(message)
    print(f"\n{kind}: in each of {step - 1} calls; {errors} merges ended with one clear error")
    assert step > 12


@pytest.mark.timeout(1200)
def test_races(small: Scene, tmp_path: Path) -> None:
    for _ in range(RACES):
        race(small, tmp_path / "out", 3)
        shutil.rmtree(tmp_path / "out")
    print(f"\n{RACES} races of three merges for one output: one winner each, two clear errors")


@pytest.mark.timeout(1200)
def test_every_byte_of_a_small_output_flipped(small: Scene) -> None:
    watched = Watched(small.whole)
    dice = random.Random(8)
    flips = 0
    for path in sorted(p for p in small.whole.rglob("*") if p.is_file()):
        # The page is ten times the rest, and one digest covers it all.
        for place in range(0, path.stat().st_size, 16 if path.suffix == ".html" else 1):
            watched.assert_found(path, place, flip(place, dice.randrange(1, 256)))
            flips += 1
    resm_kernels.verify(small.whole)
    print(f"\nflipped {flips} bytes, of the page every 16th: all found, file and tensor named")


@pytest.mark.timeout(1200)
def test_random_damage_to_a_larger_output(large: Scene) -> None:
    watched = Watched(large.whole)
    size = resm_kernels.verify(large.whole).total_bytes
    flips = cuts = 0
    for path, place, damage in at_random(large.whole, 2 * DAMAGES, random.Random(9)):
        watched.assert_found(path, place, damage)
        if len(damage(path.read_bytes())) == path.stat().st_size:
            flips += 1
        else:
            cuts += 1
    resm_kernels.verify(large.whole)
    print(f"\n{flips} flips and {cuts} truncations of an output of {size} bytes: all found")


@pytest.mark.timeout(1200)
def test_damage_to_kept_shards(small: Scene, tmp_path: Path) -> None:
    damages = kept_shards_damaged(small, tmp_path / "out", DAMAGES, random.Random(10))
    print(f"\n{damages} flips and truncations of kept shards: resume refused each by name")
