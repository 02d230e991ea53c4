"""Who carries out a run: this process, or others on its behalf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from resm_kernels.checkpoint.reader import check_stamp
from resm_kernels.engine.flow import Part, Progress, Run, Sink
from resm_kernels.engine.memory import MemoryWatch
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.plan import MergePlan, Step, predicted_device_peak, predicted_peak
from resm_kernels.engine.planning import make_plans
from resm_kernels.engine.result import Usage
from resm_kernels.engine.target import Target
from resm_kernels.errors import ResmError, UsageError
from resm_kernels.recipe import Recipe


@runtime_checkable
class Executor(Protocol):
    """Plans merges and carries them out."""

    def make_plans(self, recipes: Sequence[Recipe], options: EngineOptions) -> list[MergePlan]:
        """Plan the merges of several recipes for the same models, for where they will run."""

    def run(
        self,
        targets: Sequence[Target],
        steps: Sequence[Step],
        pending: Sequence[Sequence[Part]],
        progress: Progress | None,
    ) -> Usage:
        """Merge and write what is pending of the steps; targets journal every shard."""


class LocalExecutor:
    """This process, on all its cores or devices."""

    def make_plans(self, recipes: Sequence[Recipe], options: EngineOptions) -> list[MergePlan]:
        """As `planning.make_plans`."""
        return make_plans(recipes, options)

    def run(
        self,
        targets: Sequence[Target],
        steps: Sequence[Step],
        pending: Sequence[Sequence[Part]],
        progress: Progress | None,
    ) -> Usage:
        """One pass over the inputs for all targets."""
        run = Run(targets[0].plan, steps, targets, progress)
        run.feed(pending)
        run.close()
        return watched(run, steps)


def find_executor(executor: str | Executor) -> Executor:
    """An executor by its name, `local` or `ray`, or as it is.

    Raises
    ------
    MissingDependencyError
        For `ray` where Ray is not installed.
    """
    if executor == "local":
        return LocalExecutor()
    if executor == "ray":
        from resm_kernels.engine.ray import RayExecutor

        return RayExecutor()
    if isinstance(executor, type) or not isinstance(executor, Executor):
        raise UsageError(f"executor: got {executor!r}", expected="local, ray or a RayExecutor")
    return executor


def lacking_parts(sinks: Sequence[Sink], steps: Sequence[Step]) -> list[list[Part]]:
    """The tensors that outputs lack of each step, where there are any."""
    found = (
        [
            (sink, tensor)
            for sink, tensor in zip(sinks, step.tensors, strict=True)
            if sink.lacks(tensor)
        ]
        for step in steps
    )
    return [parts for parts in found if parts]


def watched(run: Run, steps: Sequence[Step]) -> Usage:
    """Carry out a run, its memory watched and its inputs the same at the end.

    Raises
    ------
    ResmError
        The first thing that went wrong.
    """
    predicted = predicted_peak(steps, run.plan)
    try:
        watch = MemoryWatch(limit=predicted)
    except RuntimeError as error:
        raise ResmError(f"the merge cannot start: {error}") from error
    try:
        run.run()
    finally:
        held = watch.stop()
    for sink in run.sinks:
        _check_inputs_unchanged(sink.plan)
    return Usage(
        stage_seconds=run.stage_seconds,
        timeline=run.timeline.to_dict(),
        peak_memory=held,
        predicted_memory=predicted,
        peak_device_memory=run.peak_device_memory,
        predicted_device_memory=predicted_device_peak(steps, run.plan),
    )


def _check_inputs_unchanged(plan: MergePlan) -> None:
    for checkpoint in (plan.base, *plan.experts):
        for file in checkpoint.files:
            try:
                check_stamp(file, file.path.stat())
            except OSError as error:
                raise ResmError(f"{file.path}: vanished during the merge") from error
