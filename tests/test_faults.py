"""Every call that touches a file may fail: one clear error, nothing lost, resumable."""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resm_kernels.engine import flow, pipeline
from resm_kernels.errors import OutputError, ResmError
from tests.faults import (
    FAULTS,
    READS,
    WRITES,
    Scene,
    fault,
    file_layer,
    in_child,
    make_scene,
    race,
    resume,
    small_scene,
    threads,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return small_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_any_call_is_one_error_and_loses_nothing(
    kind: str, scene: Scene, tmp_path: Path
) -> None:
    """In some calls here, in every one in `make torture`."""
    places = {"EIO": 11, "EINTR": 19, "ENOSPC": 5}.get(kind, 4)
    steps = itertools.takewhile(
        lambda step: fault(scene, tmp_path / f"out{step}", kind, step) is not None,
        itertools.count(1, places),
    )
    assert len(list(steps)) * places > 12


def test_the_layer_sees_every_kind_of_call(scene: Scene, tmp_path: Path) -> None:
    seen = set()

    def note(number: int, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        seen.add(name)
        return call(*arguments)

    with file_layer(note, WRITES + READS):
        scene.merge(tmp_path / "out")
    assert {*WRITES, "open", "fstat", "preadv", "read", "close"} <= seen


def test_a_storm_of_signals_changes_nothing(scene: Scene, tmp_path: Path) -> None:
    """System calls end early or with EINTR, thousands of times."""
    hits = 0

    def count(number: int, frame: object) -> None:
        nonlocal hits
        hits += 1

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        scene.merge(tmp_path / "out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    scene.assert_whole(tmp_path / "out")
    assert hits > 10


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    os.replace(other, path)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("damage", [truncated, Path.unlink, replaced, overwritten, grown])
@pytest.mark.parametrize("expert", [0, 1])
def test_an_input_that_changes_between_two_tensors(
    expert: int,
    damage: Callable[[Path], None],
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever it happens: one error that names it, and a resume once it is back."""
    (path,) = (p for p in scene.experts[expert].iterdir() if p.name != "config.json")
    shutil.copy2(path, tmp_path / "saved")
    original = flow.merge_planned
    countdown = 0

    def damaging(plan: Any, tensor: Any, inputs: Any) -> Any:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            damage(path)
        return original(plan, tensor, inputs)

    for moment in range(1, 5):
        countdown = moment
        output = tmp_path / f"out{moment}"
        with monkeypatch.context() as patch:
            patch.setattr(flow, "merge_planned", damaging)
            with pytest.raises(ResmError, match=re.escape(str(path))):
                scene.merge(output)
        assert not output.exists()
        assert not threads()
        shutil.copy2(tmp_path / "saved", path)
        resume(scene, output)


def test_of_merges_racing_for_one_output_one_wins(scene: Scene, tmp_path: Path) -> None:
    for turn in range(6):
        race(scene, tmp_path / f"out{turn}", 3)


def test_a_merge_that_comes_too_late_leaves_the_winner_s_output(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner ends between the loser's look at the output and its lock."""
    output = tmp_path / "out"
    check = pipeline.check_disk

    def overtaken(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(pipeline, "check_disk", check)
        scene.merge(output)

    monkeypatch.setattr(pipeline, "check_disk", overtaken)
    with pytest.raises(OutputError, match="exists and is not empty"):
        scene.merge(output)
    scene.assert_whole(output)


def test_systems_without_fallocate(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    scene.merge(tmp_path / "out")
    scene.assert_whole(tmp_path / "out")


def _merge_limited(scene: Scene, output: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))
    try:
        scene.merge(output)
    except OutputError as error:
        os._exit(42 if "File too large" in str(error) and "resume" in str(error) else 1)


def test_a_file_size_limit_is_an_error_and_resumable(tmp_path: Path) -> None:
    shapes = {f"norm{i}.weight": (8,) for i in range(3)} | {"large.weight": (100, 100)}
    scene = make_scene(tmp_path / "scene", shapes, "60B")
    assert in_child(_merge_limited, scene, tmp_path / "out") == 42
    kept, merged = resume(scene, tmp_path / "out")
    assert kept >= 1
    assert merged >= 1


ON_A_SMALL_DISK = """
import os, sys, threading
from pathlib import Path
from resm_kernels.engine import flow
from resm_kernels.errors import OutputError
from tests.faults import large_scene, resume

disk = Path(sys.argv[1])
scene = large_scene(Path(sys.argv[2]))
original, done, turn = flow.merge_planned, [], threading.Lock()

def filling(plan, tensor, inputs):
    with turn:  # nobody merges on while the disk fills
        done.append(tensor)
        if len(done) == 20:
            with open(disk / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    os.truncate(disk / "filler", max(file.tell() - 65536, 0))
    return original(plan, tensor, inputs)

flow.merge_planned = filling
try:
    scene.merge(disk / "out")
except OutputError as error:
    print(error, file=sys.stderr)
    assert "No space left on device" in str(error) and "then resume" in str(error)
else:
    sys.exit("the disk was not full")
assert not (disk / "out").exists() and len(done) >= 20
os.unlink(disk / "filler")
flow.merge_planned = original
kept, merged = resume(scene, disk / "out")
assert kept and merged, (kept, merged)
os.system(f"mount -o remount,ro {disk}")
try:
    scene.merge(disk / "again")
except OutputError as error:
    assert "no permission to write there" in str(error) or "Read-only" in str(error), error
else:
    sys.exit("the disk was not read-only")
"""


def small_disk(folder: Path) -> list[str]:
    """A command that runs what follows it with a disk of 80 MB, seen by nobody else."""
    user = [] if os.geteuid() == 0 else ["-U", "-r"]
    mount = 'mount -t tmpfs -o size=80m none "$0" && exec "$@"'
    return ["unshare", *user, "-m", "sh", "-c", mount, str(folder)]


def mounts() -> bool:
    """Whether this machine has `unshare` and lets it mount."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*small_disk(Path("/mnt")), "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts(), reason="no unshare, or no permission to mount")
def test_a_disk_that_fills_up_and_one_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = [sys.executable, "-c", ON_A_SMALL_DISK, tmp_path / "disk", tmp_path / "scene"]
    done = subprocess.run(
        [*small_disk(tmp_path / "disk"), *script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
