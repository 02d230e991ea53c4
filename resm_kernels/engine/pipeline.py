"""The pipeline: read, merge, write and finish, overlapped by threads under one memory ledger."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from resm_kernels import __version__
from resm_kernels.checkpoint.companions import companion_files
from resm_kernels.checkpoint.files import seal, unseal
from resm_kernels.checkpoint.journal import (
    JOURNAL,
    MANIFEST,
    REPORT,
    OutputFolder,
    absolute,
    check_output,
)
from resm_kernels.checkpoint.manifest import build_manifest, index_file, verify_folder
from resm_kernels.checkpoint.reader import check_stamp, read_tensor
from resm_kernels.checkpoint.writer import ShardFile
from resm_kernels.engine.memory import MemoryWatch
from resm_kernels.engine.plan import PREFETCH, MergePlan, PlannedTensor, check_disk
from resm_kernels.engine.result import MergeReport, TensorResult
from resm_kernels.errors import NonFiniteError, OutputError, ResmError, VerificationError
from resm_kernels.methods import METHODS, Inputs, Merged, merge_weight
from resm_kernels.ops.dtypes import is_finite

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


def run_plan(
    plan: MergePlan,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    extra_files: Callable[[MergeReport], Mapping[str, bytes]] | None = None,
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

    Raises
    ------
    ResmError
        One clear error; `OUTPUT.partial` stays if it holds finished shards, for `resume`.
    """
    output = absolute(output)
    check_output(output, plan.input_folders, resume=resume)
    check_disk(plan, output, kept=[layout.name for layout in plan.layouts] if resume else ())
    started = time.perf_counter()
    report = _empty_report(plan, output)
    folder = OutputFolder(output, plan.plan_id)
    try:
        check_output(output, plan.input_folders, resume=True)  # again, now that nobody else may
        if folder.finished and (earlier := _complete_report(folder)) is not None:
            folder.finish({})
            LOG.info("%s was complete but for its name", output)
            return earlier
        folder.verify_kept(plan.layouts)
        check_disk(plan, output, kept=folder.kept)
        companions = companion_files(plan.base, plan.recipe.out_dtype)
        try:
            watch = MemoryWatch(limit=plan.peak_memory)
        except RuntimeError as error:
            raise ResmError(f"the merge cannot start: {error}") from error
        try:
            _Run(plan, folder, report, progress).run()
        finally:
            report.peak_memory = watch.stop()
        _check_inputs_unchanged(plan)
        report.seconds = time.perf_counter() - started
        files = dict(companions)
        files.update(index_file(plan.layouts))
        files.update(extra_files(report) if extra_files else {})
        sealed = seal(report.to_dict())
        files[MANIFEST] = build_manifest(
            plan_id=plan.plan_id,
            recipe=plan.recipe.to_dict(),
            inputs=[(c.reference, c.digest) for c in (plan.base, *plan.experts)],
            layouts=plan.layouts,
            shards=folder.kept,
            facts={name: result.facts() for name, result in report.tensors.items()},
            files=files,
        )
        folder.finish({REPORT: sealed, **files})
        return report
    except BaseException:
        if not folder.discard_if_empty():
            LOG.warning(
                "%d finished shards stay in %s: resume to go on", len(folder.kept), folder.path
            )
        raise
    finally:
        folder.close()


class _Run:
    """One execution of a plan; threads come and go with `run`."""

    def __init__(
        self, plan: MergePlan, folder: OutputFolder, report: MergeReport, progress: Progress | None
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.report = report
        self.progress = progress
        self.ledger = Ledger(plan.memory_budget, plan.workers + PREFETCH)
        self.shards: dict[int, ShardFile] = {}
        self.results: dict[str, TensorResult] = {}
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
        kept = self.folder.kept
        pending = [t for t in self.plan.tensors if self._shard_name(t) not in kept]
        self.report.kept_shards = len(kept)
        threads = torch.get_num_threads()
        if self.progress:
            self.progress.start(sum(t.held_bytes for t in pending))
        try:
            for tensor in pending:
                if not self.ledger.acquire(tensor.memory):
                    break
                self._submit("read", self._read, tensor)
        except BaseException as error:
            self._fail(error)
        finally:
            self._join()
            torch.set_num_threads(threads)
            for shard in self.shards.values():
                shard.close()
            if self.progress:
                self.progress.stop()
        if self.error is not None:
            raise self.error
        self._collect(pending)

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

    def _submit(
        self, stage: str, work: Callable[..., None], tensor: PlannedTensor, *rest: object
    ) -> None:
        def guarded() -> None:
            start = time.perf_counter()
            try:
                if self.error is None:
                    work(tensor, *rest)
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

    def _read(self, tensor: PlannedTensor) -> None:
        inputs = [read_tensor(source.file, source.info) for source in tensor.sources]
        if self.progress:
            self.progress.advance(tensor.read_bytes, tensor.name)
        self._submit("compute", self._compute, tensor, inputs)

    def _compute(self, tensor: PlannedTensor, inputs: list[torch.Tensor]) -> None:
        start = time.perf_counter()
        torch.set_num_threads(self.plan.options.threads)
        merged = merge_planned(self.plan, tensor, inputs)
        inputs.clear()
        self.results[tensor.name] = TensorResult(
            name=tensor.name,
            rule=merged.rule,
            reason=tensor.reason,
            shape=tensor.slot.shape,
            ranks=merged.ranks,
            weights=merged.weights,
            outlier_scores=merged.outlier_scores,
            sparsity=merged.sparsity,
            backends=merged.backends,
            notes=merged.notes,
            seconds=time.perf_counter() - start,
        )
        self._submit("write", self._write, tensor, merged.tensor)

    def _write(self, tensor: PlannedTensor, merged: torch.Tensor) -> None:
        shard = self.shards.get(tensor.shard)
        if shard is None:
            layout = self.plan.layouts[tensor.shard]
            shard = self.shards[tensor.shard] = ShardFile(self.folder.path, layout)
        complete = shard.write(tensor.slot, merged)
        self.ledger.release(tensor.memory)
        if self.progress:
            self.progress.advance(tensor.write_bytes, tensor.name)
        if complete:
            self._submit("finish", self._finish, tensor, shard)

    def _finish(self, tensor: PlannedTensor, shard: ShardFile) -> None:
        digest = shard.finish()
        del self.shards[tensor.shard]
        results = {slot.name: asdict(self.results[slot.name]) for slot in shard.layout.slots}
        self.folder.shard_done(shard.layout.name, digest, shard.digests, results)

    def _collect(self, pending: Sequence[PlannedTensor]) -> None:
        report = self.report
        for shard, entry in self.folder.kept.items():
            for name, content in entry["results"].items():
                if name not in self.results:
                    self.results[name] = self._kept_result(shard, content)
        report.tensors = {t.name: self.results[t.name] for t in self.plan.tensors}
        report.stage_seconds = {stage: round(busy, 6) for stage, busy in self._busy.items()}
        report.read_bytes = sum(t.read_bytes for t in pending)
        report.written_bytes = sum(t.write_bytes for t in pending)

    def _kept_result(self, shard: str, content: Mapping[str, Any]) -> TensorResult:
        try:
            return TensorResult.from_dict(content)
        except VerificationError as error:
            raise OutputError(
                f"{self.folder.path / JOURNAL}: shard {shard!r}: {error}",
                fix=f"remove {self.folder.path / shard} to have it merged again, then resume",
            ) from error

    def _shard_name(self, tensor: PlannedTensor) -> str:
        return self.plan.layouts[tensor.shard].name


def merge_planned(plan: MergePlan, tensor: PlannedTensor, inputs: list[torch.Tensor]) -> Merged:
    """Merge one planned tensor from its `sources`; the result lies on the CPU."""
    out_dtype = tensor.slot.dtype.torch
    if not tensor.base.info.dtype.mergeable:
        return Merged(inputs[0], "copy")
    mask, notes = _screen(plan, tensor, inputs)
    kept = None
    if mask is not None:
        kept = inputs[0][mask].to(out_dtype)
        for value in inputs:
            value.masked_fill_(mask, 0.0)
    if tensor.rule == "copy":
        merged = Merged(inputs[0].to(out_dtype), "copy")
    else:
        base, *experts = [value.to(plan.device) for value in inputs]
        merged = merge_weight(
            METHODS[plan.recipe.method],
            Inputs(tensor.key, base, experts if tensor.reads_base else [base, *experts]),
            tensor.weights,
            tensor.options,
            out_dtype,
        )
    result = merged.tensor.cpu()
    if not is_finite(result):
        notes += _overflow(plan, tensor, result)
    if kept is not None:
        result[mask] = kept
    return replace(merged, tensor=result, notes=(*merged.notes, *notes))


def _screen(
    plan: MergePlan, tensor: PlannedTensor, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, list[str]]:
    """Find NaN and Inf in the inputs; the mask of positions where the base's value stays."""
    mask: torch.Tensor | None = None
    notes = []
    for source, value in zip(tensor.sources, inputs, strict=True):
        if is_finite(value) or (source is tensor.base and not tensor.base_counts):
            continue
        bad = ~torch.isfinite(value)
        count = int(bad.sum())
        where = f"{source.info.file}: tensor {source.info.name!r}"
        if plan.options.nonfinite == "error":
            raise NonFiniteError(
                f"{where}: {count} of {value.numel()} values are NaN or Inf",
                fix="repair the checkpoint, or keep the base's values there with --nonfinite warn",
            )
        mask = bad if mask is None else mask | bad
        notes.append(f"{source.info.file.name}: {count} values are NaN or Inf; the base's stay")
        LOG.warning("%s: %d values are NaN or Inf; the base's values stay there", where, count)
    return mask, notes


def _overflow(plan: MergePlan, tensor: PlannedTensor, result: torch.Tensor) -> list[str]:
    """Finite inputs whose merge does not fit the output dtype: an error, or a note."""
    count, dtype = int((~torch.isfinite(result)).sum()), tensor.slot.dtype.name
    if plan.options.nonfinite == "error":
        raise NonFiniteError(
            f"tensor {tensor.name!r}: {count} merged values do not fit {dtype}",
            fix="choose another out_dtype (bfloat16, float32), or a smaller lambda",
        )
    LOG.warning("tensor %r: %d merged values do not fit %s", tensor.name, count, dtype)
    return [f"{count} merged values overflow {dtype}"]


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
        predicted_memory=plan.peak_memory,
    )
