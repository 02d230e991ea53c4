"""The pipeline: read, merge, write and finish, overlapped by threads under one memory ledger."""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from resm_kernels import __version__
from resm_kernels.checkpoint.companions import companion_files
from resm_kernels.checkpoint.files import seal, seal_text, sync_folder, unseal, writing
from resm_kernels.checkpoint.journal import (
    JOURNAL,
    MANIFEST,
    PAGE,
    REPORT,
    OutputFolder,
    absolute,
    check_output,
)
from resm_kernels.checkpoint.manifest import build_manifest, index_file, verify_folder
from resm_kernels.checkpoint.reader import check_stamp
from resm_kernels.checkpoint.vocabulary import output_files
from resm_kernels.checkpoint.writer import ShardFile, ShardLayout
from resm_kernels.engine.matching import Key
from resm_kernels.engine.memory import MemoryWatch
from resm_kernels.engine.merging import Loaded, merge_planned
from resm_kernels.engine.plan import (
    PREFETCH,
    MergePlan,
    PlannedTensor,
    Step,
    check_disk,
    plan_steps,
    predicted_peak,
)
from resm_kernels.engine.result import MergeReport, TensorResult
from resm_kernels.errors import OutputError, ResmError, VerificationError
from resm_kernels.linalg import FactoredDelta

LOG = logging.getLogger(__name__)


class Progress(Protocol):
    """What the pipeline tells about its advance; called from several threads."""

    def start(self, total: int) -> None:
        """`total` bytes will be read and written."""

    def advance(self, count: int, tensor: str) -> None:
        """`count` more bytes are done, of this tensor."""

    def stop(self) -> None:
        """The merge ended, well or not."""


class Ledger:
    """Admits tensors while their memory fits; one account from reading to writing."""

    def __init__(self, budget: int, window: int) -> None:
        self._budget = budget
        self._window = window
        self._used = 0
        self._inside = 0
        self._closed = False
        self._change = threading.Condition()

    def acquire(self, amount: int) -> bool:
        """Wait until `amount` bytes fit; False once the ledger is closed."""
        with self._change:
            while not self._closed and (
                self._inside >= self._window
                or (self._inside and self._used + amount > self._budget)
            ):
                self._change.wait()
            if not self._closed:
                self._used += amount
                self._inside += 1
            return not self._closed

    def release(self, amount: int) -> None:
        """Give back what `acquire` took."""
        with self._change:
            self._used -= amount
            self._inside -= 1
            self._change.notify_all()

    def close(self) -> None:
        """Admit nothing more and wake everyone who waits."""
        with self._change:
            self._closed = True
            self._change.notify_all()


ExtraFiles = Callable[[MergeReport], Mapping[str, bytes]]
Companions = dict[tuple[str | None, int, int], dict[str, bytes]]
Draw = Callable[[MergeReport], str]


def run_plan(
    plan: MergePlan,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    extra_files: ExtraFiles | None = None,
    draw: Draw | None = None,
) -> MergeReport:
    """Carry out a plan: afterwards `output` is complete, or it does not exist.

    Parameters
    ----------
    output : Path
        Must not exist, or be empty. Built in `OUTPUT.partial` and renamed at the end.
    resume : bool
        Keep the shards that an interrupted run of the same plan finished.
    extra_files : callable, optional
        Further small files of the output, from the finished report; must not depend on time.
    draw : callable, optional
        The HTML report, from the finished report; where it fails, the merge does not.

    Raises
    ------
    ResmError
        One clear error; `OUTPUT.partial` stays if it holds finished shards, for `resume`.
    """
    output = absolute(output)
    check_output(output, plan.input_folders, resume=resume)
    check_disk([] if resume else plan.layouts, output)
    (report,) = _run_together([(plan, output)], progress, extra_files, draw)
    return report


def run_plans(
    plans: Mapping[str, MergePlan],
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    extra_files: ExtraFiles | None = None,
    draw: Draw | None = None,
) -> dict[str, MergeReport]:
    """Carry out several plans of the same inputs in one pass over them.

    Parameters
    ----------
    plans : mapping
        By the name of their folder in `output`; each is built, finished and resumed as by
        `run_plan`, to the same bytes.
    output, resume, progress, extra_files, draw
        As for `run_plan`; finished folders in `output` are checked and kept when resuming.
    """
    output = absolute(output)
    folders = [folder for plan in plans.values() for folder in plan.input_folders]
    check_output(output, folders, resume=True, several=resume)
    reports: dict[str, MergeReport] = {}
    pending: list[tuple[str, MergePlan]] = []
    for name, plan in plans.items():
        earlier = _finished(plan, output / name) if resume else None
        if earlier is None:
            pending.append((name, plan))
        else:
            reports[name] = earlier
    check_disk([] if resume else [s for _, plan in pending for s in plan.layouts], output)
    with writing(output):
        output.mkdir(exist_ok=True)
        sync_folder(output.parent)
    try:
        for name, plan in pending:
            check_output(output / name, plan.input_folders, resume=resume)
        found = _run_together(
            [(plan, output / name) for name, plan in pending], progress, extra_files, draw
        )
    except BaseException:
        with contextlib.suppress(OSError):
            output.rmdir()
        raise
    reports.update((name, report) for (name, _), report in zip(pending, found, strict=True))
    return {name: reports[name] for name in plans}


def _finished(plan: MergePlan, folder: Path) -> MergeReport | None:
    """The report of an output that an earlier run of the same plan finished."""
    if not (folder / MANIFEST).is_file():
        return None
    found = verify_folder(folder)
    if found.plan_id != plan.plan_id:
        raise OutputError(
            f"{folder}: holds the merge of another plan",
            got=f"plan {found.plan_id[:12]}",
            expected=f"plan {plan.plan_id[:12]}",
            fix="choose another output, or move that folder away",
        )
    return MergeReport.from_dict(unseal(folder / REPORT))


class _Target:
    """One output of a run: its plan, its folder and what is known of its tensors."""

    def __init__(self, plan: MergePlan, output: Path) -> None:
        self.plan = plan
        self.report = _empty_report(plan, output)
        self.folder = OutputFolder(output, plan.plan_id)
        self.shards: dict[int, ShardFile] = {}
        self.results: dict[str, TensorResult] = {}
        self.companions: dict[str, bytes] = {}
        self.complete = False

    def prepare(self, shared: Companions) -> None:
        """Judge what an earlier run left, now that nobody else may write there.

        `shared` has the companion files of the targets before: a tokenizer takes many megabytes.
        """
        check_output(self.folder.output, self.plan.input_folders, resume=True)
        if self.folder.finished and (earlier := _complete_report(self.folder)) is not None:
            self.folder.finish({})
            LOG.info("%s was complete but for its name", self.folder.output)
            self.report, self.complete = earlier, True
            return
        self.folder.verify_kept(self.plan.layouts)
        if self.plan.part is not None:  # no model, and nothing that makes it look like one
            return
        base, alignment = self.plan.base, self.plan.alignment
        key = (self.plan.recipe.out_dtype, id(base), id(alignment))
        if key not in shared:
            files = companion_files(base, self.plan.recipe.out_dtype)
            shared[key] = output_files(files, alignment) if alignment else files
        self.companions = shared[key]

    @property
    def lacking(self) -> list[ShardLayout]:
        """The shards that are not finished yet."""
        return [layout for layout in self.plan.layouts if layout.name not in self.folder.kept]

    def lacks(self, tensor: PlannedTensor) -> bool:
        """Whether the tensor's shard is not finished yet."""
        return self.plan.layouts[tensor.shard].name not in self.folder.kept

    def collect(self) -> None:
        """Take over the results of kept shards, and put all in order."""
        for shard, entry in self.folder.kept.items():
            for name, content in entry["results"].items():
                if name not in self.results:
                    self.results[name] = self._kept_result(shard, content)
        self.report.tensors = {t.name: self.results[t.name] for t in self.plan.tensors}

    def _kept_result(self, shard: str, content: Mapping[str, Any]) -> TensorResult:
        try:
            return TensorResult.from_dict(content)
        except VerificationError as error:
            raise OutputError(
                f"{self.folder.path / JOURNAL}: shard {shard!r}: {error}",
                fix=f"remove {self.folder.path / shard} to have it merged again, then resume",
            ) from error

    def finish(self, extra_files: ExtraFiles | None, draw: Draw | None) -> None:
        """Write the small files and give the folder its name."""
        plan, report = self.plan, self.report
        files = dict(self.companions)
        files.update(index_file(plan.layouts, "part" if plan.part else "model"))
        files.update(extra_files(report) if extra_files else {})
        page = _drawn(report, draw)
        report.drawn = bool(page)
        timed = {REPORT: seal(report.to_dict()), **page}
        files[MANIFEST] = build_manifest(
            plan_id=plan.plan_id,
            recipe=plan.recipe.to_dict(),
            inputs=[(c.reference, c.digest) for c in (plan.base, *plan.experts)],
            layouts=plan.layouts,
            shards=self.folder.kept,
            facts={name: result.facts() for name, result in report.tensors.items()},
            files=files,
            part=plan.part,
        )
        self.folder.finish({**timed, **files})
        self.complete = True


def _drawn(report: MergeReport, draw: Draw | None) -> dict[str, bytes]:
    """The HTML report, sealed; nothing where it cannot be drawn."""
    if draw is None:
        return {}
    try:
        return {PAGE: seal_text(draw(report))}
    except Exception as error:  # a merge is not lost for its picture
        LOG.warning("%s was not drawn: %r", PAGE, error)
        return {}


def _run_together(
    jobs: Sequence[tuple[MergePlan, Path]],
    progress: Progress | None,
    extra_files: ExtraFiles | None,
    draw: Draw | None,
) -> list[MergeReport]:
    started = time.perf_counter()
    targets: list[_Target] = []
    try:
        for plan, output in jobs:
            targets.append(_Target(plan, output))
        shared: Companions = {}
        for target in targets:
            target.prepare(shared)
        open_targets = [target for target in targets if not target.complete]
        if open_targets:
            lacking = [shard for target in open_targets for shard in target.lacking]
            check_disk(lacking, open_targets[0].folder.output)
            steps = plan_steps([target.plan for target in open_targets])
            peak = predicted_peak(steps, open_targets[0].plan)
            try:
                watch = MemoryWatch(limit=peak)
            except RuntimeError as error:
                raise ResmError(f"the merge cannot start: {error}") from error
            held = 0
            try:
                _Run(open_targets, steps, progress).run()
            finally:
                held = watch.stop()
            for target in open_targets:
                _check_inputs_unchanged(target.plan)
                target.report.peak_memory, target.report.predicted_memory = held, peak
                target.report.seconds = time.perf_counter() - started
                target.finish(extra_files, draw)
        return [target.report for target in targets]
    except BaseException:
        for target in targets:
            if not target.complete and not target.folder.discard_if_empty():
                LOG.warning(
                    "%d finished shards stay in %s: resume to go on",
                    len(target.folder.kept),
                    target.folder.path,
                )
        raise
    finally:
        for target in targets:
            target.folder.close()


class _Task:
    """One step on its way: the targets that need it, and how many are still to be written."""

    def __init__(self, step: Step, targets: Sequence[_Target]) -> None:
        self.parts = [
            (target, tensor)
            for target, tensor in zip(targets, step.tensors, strict=True)
            if target.lacks(tensor)
        ]
        self.step = Step(tuple(tensor for _, tensor in self.parts))
        self.left = len(self.parts)

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.parts[0][1].name


class _Run:
    """One pass over the inputs for all targets; threads come and go with `run`."""

    def __init__(
        self, targets: Sequence[_Target], steps: Sequence[Step], progress: Progress | None
    ) -> None:
        plan = targets[0].plan
        self.plan = plan
        self.targets = targets
        self.steps = steps
        self.progress = progress
        self.ledger = Ledger(plan.memory_budget, plan.workers + PREFETCH)
        self.error: BaseException | None = None
        self._change = threading.Condition()
        self._running: set[Callable[[], None]] = set()
        self._busy = dict.fromkeys(("read", "compute", "write", "finish"), 0.0)
        self._stages = {
            "read": ThreadPoolExecutor(2, "resm-read"),
            "compute": ThreadPoolExecutor(plan.workers, "resm-compute"),
            "write": ThreadPoolExecutor(1, "resm-write"),
            "finish": ThreadPoolExecutor(1, "resm-finish"),
        }

    def run(self) -> None:
        """Push every unfinished tensor through the stages, in plan order."""
        kept = [len(target.folder.kept) for target in self.targets]
        pending = [task for step in self.steps if (task := _Task(step, self.targets)).parts]
        threads = torch.get_num_threads()
        if self.progress:
            self.progress.start(sum(task.step.held_bytes for task in pending))
        try:
            for task in pending:
                if not self.ledger.acquire(task.step.memory):
                    break
                self._submit("read", self._read, task)
        except BaseException as error:
            self._fail(error)
        finally:
            self._join()
            torch.set_num_threads(threads)
            for target in self.targets:
                for shard in target.shards.values():
                    shard.close()
            if self.progress:
                self.progress.stop()
        if self.error is not None:
            raise self.error
        read_bytes = sum(task.step.read_bytes for task in pending)
        for target, count in zip(self.targets, kept, strict=True):
            target.collect()
            target.report.kept_shards = count
            target.report.stage_seconds = {s: round(busy, 6) for s, busy in self._busy.items()}
            target.report.read_bytes = read_bytes
            target.report.written_bytes = sum(
                tensor.write_bytes
                for task in pending
                for owner, tensor in task.parts
                if owner is target
            )

    def _join(self) -> None:
        """Wait until nothing runs; an interrupt ends the work, never the waiting.

        Counted here, since a `Thread.join` that Ctrl-C interrupts takes the thread for ended
        (seen on CPython 3.11).
        """
        while True:
            try:
                with self._change:
                    self._change.wait_for(lambda: not self._running)
                break
            except BaseException as error:
                self._fail(error)
        for stage in self._stages.values():
            stage.shutdown(wait=True)

    def _submit(self, stage: str, work: Callable[..., None], *given: object) -> None:
        def guarded() -> None:
            start = time.perf_counter()
            try:
                if self.error is None:
                    work(*given)
            except BaseException as error:
                self._fail(error)
            finally:
                self._ended(guarded, stage, time.perf_counter() - start)

        with self._change:
            self._running.add(guarded)
        try:
            self._stages[stage].submit(guarded)
        except RuntimeError as error:
            self._fail(ResmError(f"the merge cannot go on: {error}", fix="fewer --workers"))
            self._ended(guarded, stage, 0.0)

    def _ended(self, task: Callable[[], None], stage: str, seconds: float) -> None:
        with self._change:
            self._busy[stage] += seconds
            self._running.discard(task)
            self._change.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Remember the first error and let nothing more in."""
        with self._change:
            if self.error is None:
                self.error = error
        self.ledger.close()

    def _read(self, task: _Task) -> None:
        inputs = {source.key: source.read() for source in task.step.sources}
        if self.progress:
            self.progress.advance(task.step.read_bytes, task.name)
        self._submit("compute", self._compute, task, inputs)

    def _compute(self, task: _Task, inputs: dict[Key, torch.Tensor | FactoredDelta]) -> None:
        torch.set_num_threads(self.plan.options.threads)
        loaded = Loaded(inputs, self.plan.device, len(task.parts))
        inputs.clear()
        for target, tensor in task.parts:
            start = time.perf_counter()
            merged, measures = merge_planned(target.plan, tensor, loaded)
            target.results[tensor.name] = TensorResult(
                name=tensor.name,
                rule=merged.rule,
                reason=tensor.reason,
                shape=tensor.slot.shape,
                matrices=tensor.split.label if tensor.split else None,
                ranks=merged.ranks,
                weights=merged.weights,
                outlier_scores=merged.outlier_scores,
                sparsity=merged.sparsity,
                backends=merged.backends,
                notes=merged.notes,
                seconds=time.perf_counter() - start,
                measures=measures,
            )
            self._submit("write", self._write, task, target, tensor, merged.tensor)

    def _write(
        self, task: _Task, target: _Target, tensor: PlannedTensor, merged: torch.Tensor
    ) -> None:
        shard = target.shards.get(tensor.shard)
        if shard is None:
            layout = target.plan.layouts[tensor.shard]
            shard = target.shards[tensor.shard] = ShardFile(target.folder.path, layout)
        complete = shard.write(tensor.slot, merged)
        task.left -= 1  # one thread writes
        if not task.left:
            self.ledger.release(task.step.memory)
        if self.progress:
            self.progress.advance(tensor.write_bytes, tensor.name)
        if complete:
            self._submit("finish", self._finish, target, tensor.shard, shard)

    def _finish(self, target: _Target, index: int, shard: ShardFile) -> None:
        digest = shard.finish()
        del target.shards[index]
        results = {slot.name: asdict(target.results[slot.name]) for slot in shard.layout.slots}
        target.folder.shard_done(shard.layout.name, digest, shard.digests, results)


def _check_inputs_unchanged(plan: MergePlan) -> None:
    for checkpoint in (plan.base, *plan.experts):
        for file in checkpoint.files:
            try:
                check_stamp(file, file.path.stat())
            except OSError as error:
                raise ResmError(f"{file.path}: vanished during the merge") from error


def _complete_report(folder: OutputFolder) -> MergeReport | None:
    """The report of a folder that only lacked its name; None where it was damaged since."""
    try:
        verify_folder(folder.path)
        return MergeReport.from_dict(unseal(folder.path / REPORT))
    except VerificationError as error:
        LOG.warning("%s; its shards are checked one by one", error)
        return None


def _empty_report(plan: MergePlan, output: Path) -> MergeReport:
    return MergeReport(
        output=str(output),
        plan_id=plan.plan_id,
        method=plan.recipe.method,
        recipe=plan.recipe.to_dict(),
        device=str(plan.device),
        workers=plan.workers,
        threads=plan.options.threads,
        versions={
            "resm-kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        left_out=dict(plan.left_out),
        part=None if plan.part is None else plan.part.to_dict(),
        inputs=[{"model": c.reference, "digest": c.digest} for c in (plan.base, *plan.experts)],
    )
