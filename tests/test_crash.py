"""Nothing incomplete looks complete: killed processes, resumed merges, damaged outputs."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import resm_kernels
from resm_kernels.checkpoint import journal, writer
from resm_kernels.checkpoint.journal import JOURNAL, OutputFolder
from resm_kernels.checkpoint.layout import read_safetensors_header
from resm_kernels.cli import main
from resm_kernels.engine import comparison, flow, matching, target
from resm_kernels.errors import OutputError, ResmError
from tests.checkpoints import contents, save_family
from tests.faults import Scene, kill_at_call, resume, small_scene, threads

SHARDS = "700B"
REPORTS = ("resm_report.json", "resm_report.html")


def same_but_report(a: Path, b: Path) -> bool:
    one, two = contents(a), contents(b)
    for name in REPORTS:
        one.pop(name), two.pop(name)
    return one == two


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return small_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Path]:
    """A base, its experts, and what an uninterrupted merge makes of them."""
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder)
    resm_kernels.merge(base, experts, folder / "whole", shard_size=SHARDS)
    return base, experts, folder / "whole"


def test_killed_anywhere_a_merge_resumes_to_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    """Twenty calls here; every call, and times at random, in `make torture`."""
    points = [(step, after) for step in range(1, 58) for after in (False, True)]
    kept, merged = 0, 0
    for step, after in sorted(random.Random(0).sample(points, 20)):
        output = tmp_path / f"out{step}{after}"
        assert kill_at_call(scene, output, step, after=after)
        if not output.exists():
            done = resume(scene, output)
            kept, merged = kept + done[0], merged + done[1]
    assert kept > 0
    assert merged > 0


def test_killed_again_and_again_a_merge_ends(scene: Scene, tmp_path: Path) -> None:
    """Every resumed run dies a call later than the one before it."""
    for step in itertools.count(1):
        kill_at_call(scene, tmp_path / "out", step, after=True)
        if (tmp_path / "out").exists():
            break
    assert step > 10
    scene.assert_whole(tmp_path / "out")


def break_off_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a merge fail once that many shards are journalled."""
    original = OutputFolder.shard_done

    def failing(self: OutputFolder, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        if len(self.kept) == shards:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "shard_done", failing)


def interrupted(
    family: tuple[Path, list[Path], Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    base, experts, _ = family
    with monkeypatch.context() as patch:
        break_off_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            resm_kernels.merge(base, experts, output, shard_size=SHARDS)
    partial = output.with_name(output.name + ".partial")
    assert partial.exists()
    assert not output.exists()
    return partial


def test_resume_does_only_the_unfinished_work(
    family: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, whole = family
    partial = interrupted(family, tmp_path / "out", monkeypatch)
    kept = {path.name for path in partial.glob("*.safetensors")}
    plan = resm_kernels.plan(base, experts, shard_size=SHARDS)
    report = resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS, resume=True)
    assert report.kept_shards == len(kept) >= 2
    done = {slot.name for layout in plan.layouts if layout.name in kept for slot in layout.slots}
    left = [t for t in plan.tensors if t.name not in done]
    assert report.read_bytes == sum(t.read_bytes for t in left) < plan.read_bytes
    assert report.tensors.keys() == {t.name for t in plan.tensors}
    assert same_but_report(tmp_path / "out", whole)


def test_resume_refuses_a_kept_shard_that_changed(
    family: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, whole = family
    partial = interrupted(family, tmp_path / "out", monkeypatch)
    shard = sorted(partial.glob("*.safetensors"))[0]
    last = list(read_safetensors_header(shard).tensors)[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(OutputError, match=r"changed after it was finished") as caught:
        resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS, resume=True)
    assert str(shard) in str(caught.value)
    assert f"other bytes in {last}\n" in str(caught.value)
    shard.unlink()
    report = resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS, resume=True)
    assert report.kept_shards == 1
    assert same_but_report(tmp_path / "out", whole)


def test_resume_refuses_another_plan(
    family: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, _ = family
    interrupted(family, tmp_path / "out", monkeypatch)
    for change in ({"method": "tsvm"}, {"shard_size": "800B"}, {"threads": 2}):
        options = {"shard_size": SHARDS, **change}
        with pytest.raises(OutputError, match="another plan"):
            resm_kernels.merge(base, experts, tmp_path / "out", resume=True, **options)
    touched = experts[0] / "model.safetensors"
    before = touched.stat()
    os.utime(touched)
    with pytest.raises(OutputError, match="another plan"):
        resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS, resume=True)
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OutputError, match="an unfinished merge lies there"):
        resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS)


def test_a_torn_last_journal_line_is_work_not_done(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", "plan")
    folder.shard_done("a", "0" * 64, {}, {})
    folder.shard_done("b", "1" * 64, {}, {})
    folder.close()
    path = folder.path / JOURNAL
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:-cut])
        again = OutputFolder(tmp_path / "out", "plan")
        lines = whole[:-cut].count(b"\n")
        assert len(again.kept) == max(lines - 1, 0)
        again.shard_done("c", "2" * 64, {}, {})
        again.close()
        third = OutputFolder(tmp_path / "out", "plan")
        assert list(third.kept)[-1] == "c"
        third.close()


def test_two_merges_cannot_share_an_output(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path / "out", "plan")
    with pytest.raises(OutputError, match="another merge is writing there"):
        OutputFolder(tmp_path / "out", "plan")
    first.close()
    OutputFolder(tmp_path / "out", "plan").close()


STAGES = {
    "read": (matching, "read_tensor"),
    "compute": (flow, "merge_planned"),
    "write": (writer.ShardFile, "write_pieces"),
    "check": (writer.ShardFile, "check"),
    "finish": (writer.ShardFile, "finish"),
    "journal": (OutputFolder, "shard_done"),
    "companions": (target, "companion_files"),
    "manifest": (target, "build_manifest"),
    "rename": (journal.os, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("failure", [MemoryError("x"), OSError(5, "Input/output error")])
def test_a_failure_in_any_stage_ends_the_merge_at_once(
    stage: str,
    failure: Exception,
    family: tuple[Path, list[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, experts, whole = family

    def fail(*arguments: object, **options: object) -> None:
        raise failure

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        with pytest.raises((type(failure), ResmError)):
            resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "out").exists()
    assert not threads()
    resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS, resume=True)
    assert same_but_report(tmp_path / "out", whole)


def test_memory_that_runs_out_is_one_error(
    family: tuple[Path, list[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Torch has no type of its own for it on the CPU."""
    base, experts, _ = family
    words = ["merge", "--base", str(base), "--expert", str(experts[0]), str(tmp_path / "out")]
    for module, command in (
        (flow, [*words, "--method", "task_arithmetic"]),
        (comparison, ["compare", str(base), str(experts[0])]),
    ):
        name = "merge_planned" if module is flow else "_distance"
        monkeypatch.setattr(module, name, lambda *_: torch.empty(1 << 55, dtype=torch.uint8))
        assert main(command) == 1
        assert "memory" in capsys.readouterr().err
    with pytest.raises(ResmError, match="memory ran out"):
        resm_kernels.merge(base, experts, tmp_path / "out")


def test_a_disk_that_returns_other_bytes_is_caught_before_the_shard_has_a_name(
    family: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, _ = family
    original = os.pwrite

    def lying(descriptor: int, data: memoryview, offset: int) -> int:
        if offset > 600:
            data = memoryview(bytes(len(data)))
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", lying)
    with pytest.raises(OutputError, match="read back differs from what was written"):
        resm_kernels.merge(base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _merge_slowly(base: Path, experts: list[Path], output: Path) -> None:
    """Merge with a slow worker; an interrupt must wait for it and then leave no thread behind."""
    original = flow.merge_planned

    def slow(*arguments: object) -> object:
        time.sleep(0.5)
        return original(*arguments)  # type: ignore[arg-type]

    flow.merge_planned = slow  # type: ignore[assignment]
    try:
        resm_kernels.merge(base, experts, output, workers=2)
    except KeyboardInterrupt:
        os._exit(1 if threads() else 42)


@pytest.mark.parametrize("delay", [0.2, 2.2, 2.6])
def test_an_interrupt_waits_for_the_workers_and_cleans_up(
    delay: float, family: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """Nine tensors, two workers, half a second each: the last delays fall into the draining."""
    base, experts, _ = family
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_merge_slowly, args=(base, experts, tmp_path / "out"))
    process.start()
    time.sleep(delay)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(30)
    assert process.exitcode in (42, 0)
    if not (tmp_path / "out").exists():
        assert process.exitcode == 42
        partial = tmp_path / "out.partial"
        assert not partial.exists() or list(partial.glob("*.safetensors"))
        resm_kernels.merge(base, experts, tmp_path / "out", resume=True)
    resm_kernels.verify(tmp_path / "out")


def _merge_interrupted(base: Path, experts: list[Path], output: Path, queued: bool) -> None:
    original, left = ThreadPoolExecutor.submit, 4

    def interrupted(self: ThreadPoolExecutor, *given: Any) -> Any:
        nonlocal left
        left -= threading.current_thread() is threading.main_thread()
        if left == 0:
            left = -1
            if queued:
                original(self, *given)
            raise KeyboardInterrupt
        return original(self, *given)

    ThreadPoolExecutor.submit = interrupted  # type: ignore[method-assign]
    try:
        resm_kernels.merge(base, experts, output)
    except KeyboardInterrupt:
        os._exit(42 if not threads() else 1)


@pytest.mark.parametrize("queued", [False, True])
def test_an_interrupt_while_work_is_handed_over_is_no_hang(
    queued: bool, family: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, experts, _ = family
    context = multiprocessing.get_context("fork")
    given = (base, experts, tmp_path / "out", queued)
    process = context.Process(target=_merge_interrupted, args=given)
    process.start()
    process.join(20)
    if process.is_alive():
        process.kill()
        pytest.fail("still waiting")
    assert process.exitcode == 42
    assert not list(tmp_path.iterdir())


def test_threads_that_cannot_start_are_an_error_not_a_hang(
    family: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, _ = family
    original = threading.Thread.start
    for stage in ("resm-memory", "resm-read", "resm-compute", "resm-write", "resm-finish"):

        def start(self: threading.Thread, stage: str = stage) -> None:
            if self.name.startswith(stage):
                raise RuntimeError("can't start new thread")
            original(self)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(ResmError, match="can't start new thread"):
                resm_kernels.merge(base, experts, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["create", "sync_folder", "canonical_json"])
def test_a_merge_that_cannot_begin_leaves_no_folder(
    call: str,
    family: tuple[Path, list[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, experts, _ = family
    original = getattr(journal, call)

    def failing(given: Any, *more: Any) -> Any:
        if isinstance(given, Path) and "out.partial" not in str(given):
            return original(given, *more)  # the parent's sync
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, call, failing)
        with pytest.raises(OutputError, match="No space left"):
            resm_kernels.merge(base, experts, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    resm_kernels.merge(base, experts, tmp_path / "out")


def test_a_folder_that_is_no_unfinished_merge_is_left_alone(
    family: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, experts, _ = family
    thesis = tmp_path / "out.partial" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years")
    with pytest.raises(OutputError, match="not an unfinished merge"):
        resm_kernels.merge(base, experts, tmp_path / "out", resume=True)
    assert thesis.read_text() == "years"


@pytest.mark.parametrize("damaged", [None, "README.md", "config.json"])
def test_a_folder_that_only_lacks_its_name_is_finished(
    damaged: str | None,
    family: tuple[Path, list[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, experts, whole = family
    original = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "out":
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS)
    if damaged:
        (tmp_path / "out.partial" / damaged).write_text("torn")
    report = resm_kernels.merge(base, experts, tmp_path / "out", shard_size=SHARDS, resume=True)
    assert len(report.tensors) == 9
    assert same_but_report(tmp_path / "out", whole)
