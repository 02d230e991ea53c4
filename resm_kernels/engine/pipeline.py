"""The pipeline: a run around its flow, from the first check to the last rename."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from resm_kernels.checkpoint.files import sync_folder, unseal, writing
from resm_kernels.checkpoint.journal import MANIFEST, REPORT, absolute, check_output
from resm_kernels.checkpoint.manifest import verify_folder
from resm_kernels.engine.executor import Executor, LocalExecutor, lacking_parts
from resm_kernels.engine.flow import Progress, step_of
from resm_kernels.engine.plan import MergePlan, check_disk, plan_steps
from resm_kernels.engine.result import MergeReport
from resm_kernels.engine.target import Companions, Draw, ExtraFiles, Target
from resm_kernels.errors import OutputError, UsageError

LOG = logging.getLogger(__name__)

LOCAL = LocalExecutor()


def run_plan(
    plan: MergePlan,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    extra_files: ExtraFiles | None = None,
    draw: Draw | None = None,
    executor: Executor = LOCAL,
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
    executor : Executor, optional
        Who reads, merges and writes.

    Raises
    ------
    ResmError
        One clear error; `OUTPUT.partial` stays if it holds finished shards, for `resume`.
    """
    output = absolute(output)
    check_output(output, plan.input_folders, resume=resume)
    check_disk([] if resume else plan.layouts, output)
    (report,) = _run_together([(plan, output)], progress, extra_files, draw, executor)
    return report


def run_plans(
    plans: Mapping[str, MergePlan],
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    extra_files: ExtraFiles | None = None,
    draw: Draw | None = None,
    executor: Executor = LOCAL,
) -> dict[str, MergeReport]:
    """Carry out several plans of the same inputs in one pass over them.

    Parameters
    ----------
    plans : mapping
        By the name of their folder in `output`; each is built, finished and resumed as by
        `run_plan`, to the same bytes.
    output, resume, progress, extra_files, draw, executor
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
        jobs = [(plan, output / name) for name, plan in pending]
        found = _run_together(jobs, progress, extra_files, draw, executor)
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


def _run_together(
    jobs: Sequence[tuple[MergePlan, Path]],
    progress: Progress | None,
    extra_files: ExtraFiles | None,
    draw: Draw | None,
    executor: Executor,
) -> list[MergeReport]:
    if progress is not None and not isinstance(progress, Progress):
        raise UsageError(
            f"progress: got {progress!r:.80}", expected="an object with start, advance and stop"
        )
    started = time.perf_counter()
    targets: list[Target] = []
    try:
        for plan, output in jobs:
            targets.append(Target(plan, output))
        shared: Companions = {}
        for target in targets:
            target.prepare(shared)
        open_targets = [target for target in targets if not target.complete]
        if open_targets:
            lacking = [shard for target in open_targets for shard in target.lacking]
            check_disk(lacking, open_targets[0].folder.output)
            _run(open_targets, executor, progress)
            for target in open_targets:
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


def _run(targets: Sequence[Target], executor: Executor, progress: Progress | None) -> None:
    """Merge what targets lack, and put what it took into their reports."""
    kept = [len(target.folder.kept) for target in targets]
    steps = plan_steps([target.plan for target in targets])
    pending = lacking_parts(targets, steps)
    if progress:
        progress.start(sum(step_of(parts).held_bytes for parts in pending))
    try:
        usage = executor.run(targets, steps, pending, progress)
    finally:
        if progress:
            progress.stop()
    for target, count in zip(targets, kept, strict=True):
        target.collect()
        target.report.kept_shards = count
        target.report.read_bytes = sum(step_of(parts).read_bytes for parts in pending)
        target.report.written_bytes = sum(
            tensor.write_bytes for parts in pending for sink, tensor in parts if sink is target
        )
        for name, value in vars(usage).items():
            setattr(target.report, name, value)
