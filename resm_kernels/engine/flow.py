"""The flow of weights through a run: read, merge, write and finish, overlapped by threads."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch

from resm_kernels.checkpoint.writer import ShardFile
from resm_kernels.engine.lanes import PREFETCH, CudaLane, Lane, Mark, StagedLane
from resm_kernels.engine.ledger import Bid, Ledger
from resm_kernels.engine.matching import Key, Value
from resm_kernels.engine.merging import Loaded, merge_planned
from resm_kernels.engine.plan import MergePlan, PlannedTensor, Step, host_memory
from resm_kernels.engine.result import Measures, TensorResult
from resm_kernels.engine.timeline import Timeline
from resm_kernels.errors import PlanError, ResmError
from resm_kernels.methods import Merged, out_of_memory

LOG = logging.getLogger(__name__)

READERS, READERS_TO_DEVICES = 2, 4
"""Threads that read, without and with devices to feed."""
STAGES = ("read", "compute", "write", "finish")


@runtime_checkable
class Progress(Protocol):
    """What the pipeline tells about its advance; called from several threads."""

    def start(self, total: int) -> None:
        """`total` bytes will be read and written."""

    def advance(self, count: int, tensor: str) -> None:
        """`count` more bytes are done, of this tensor."""

    def stop(self) -> None:
        """The merge ended, well or not."""


class Sink(Protocol):
    """Where the merged tensors of one output go."""

    plan: MergePlan
    shards: dict[int, ShardFile]
    """Shards that are being written."""
    results: dict[str, TensorResult]

    def lacks(self, tensor: PlannedTensor) -> bool:
        """Whether the tensor is still to be merged."""

    def begin(self, index: int, due: Callable[[ShardFile], None]) -> ShardFile:
        """The file of a shard, for its first tensor."""

    def done(self, shard: ShardFile, sha256: str) -> None:
        """A shard is durable under its final name."""


Part = tuple[Sink, PlannedTensor]
"""One tensor of one output."""


def step_of(parts: Sequence[Part]) -> Step:
    """What is read and held for the tensors that outputs lack of one weight."""
    return parts[0][1].step if len(parts) == 1 else Step(tuple(tensor for _, tensor in parts))


class _Task:
    """One step on its way: the outputs that need it, where it goes, and what it holds there."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        again: bool = False,
        counted: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.parts = list(parts)
        self.step = step_of(parts)
        self.again = again
        """Whether it comes back from a device that it did not fit."""
        self.counted = counted
        """Whether its reading was told as progress."""
        self.notes = list(notes)
        self.bid: Bid | None = None
        self.holders = 1
        """Who still needs its memory: whoever merges it, and every result on its way."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.parts[0][1].name


class Run:
    """One pass over the inputs for all outputs; threads come and go with `run`.

    Attributes
    ----------
    timeline : Timeline
        When each thread was busy.
    lanes : tuple of Lane
        The CPU first, then the devices.
    """

    def __init__(
        self,
        plan: MergePlan,
        steps: Sequence[Step],
        sinks: Sequence[Sink],
        progress: Progress | None,
    ) -> None:
        self.plan = plan
        self.sinks = sinks
        self.progress = progress
        self.ledger = Ledger()
        self.timeline = Timeline(time.perf_counter())
        self.error: BaseException | None = None
        self._host = host_lane(plan, steps)
        self._devices = device_lanes(plan)
        self.lanes: tuple[Lane, ...] = (self._host, *self._devices)
        self._change = threading.Condition()
        self._running: set[threading.Lock] = set()
        self._queue: deque[_Task] = deque()
        self._again: deque[_Task] = deque()
        self._closed = False
        self._busy = dict.fromkeys(STAGES, 0.0)
        readers = READERS_TO_DEVICES if self._devices else READERS
        self._pools = {
            "read": ThreadPoolExecutor(readers, "resm-read"),
            "write": ThreadPoolExecutor(1, "resm-write"),
            "finish": ThreadPoolExecutor(1, "resm-finish"),
            **{
                f"compute {lane.name}": ThreadPoolExecutor(
                    lane.workers, f"resm-compute {lane.name}" if self._devices else "resm-compute"
                )
                for lane in self.lanes
            },
        }

    def feed(self, work: Iterable[Sequence[Part]]) -> None:
        """Queue steps, each as the tensors that outputs lack of it; also while it runs."""
        tasks = [_Task(parts) for parts in work]
        with self._change:
            self._queue.extend(tasks)
            self._change.notify_all()

    def close(self) -> None:
        """Nothing more will be fed: `run` returns when all is done."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    @property
    def hungry(self) -> bool:
        """Whether everything that was fed is on its way."""
        with self._change:
            return not (self._queue or self._closed)

    def run(self) -> None:
        """Push what was fed through the stages, in order, until the feed is closed."""
        threads = torch.get_num_threads()
        try:
            while (entering := self._next()) is not None and self._admit(entering):
                pass
        except BaseException as error:
            self._fail(error)
        finally:
            self._join()
            torch.set_num_threads(threads)
            for sink in self.sinks:
                for shard in sink.shards.values():
                    shard.close()
        if isinstance(self.error, RuntimeError) and out_of_memory(self.error):
            raise ResmError(
                "memory ran out",
                got=str(self.error).partition("\n")[0],
                fix="free memory, or set a smaller --memory-budget; then --resume",
            ) from self.error
        if self.error is not None:
            raise self.error

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Busy time of every stage so far, over all its threads."""
        return {stage: round(busy, 6) for stage, busy in self._busy.items()}

    @property
    def peak_device_memory(self) -> dict[str, int]:
        """Most bytes of tensors on each device so far."""
        return {lane.name: lane.peak for lane in self._devices}

    def _next(self) -> _Task | None:
        """What comes next: what did not fit a device, then the queue; None at the end."""
        with self._change:
            self._change.wait_for(
                lambda: (
                    self._again or self._queue or self.error or (self._closed and not self._running)
                )
            )
            waiting = self._again or self._queue
            return waiting.popleft() if waiting and self.error is None else None

    def _admit(self, task: _Task) -> bool:
        """Wait for room on some lane, and have the task read there; False once it is over."""
        lanes: Sequence[Lane] = self._devices
        if task.again or not lanes or task.step.stays_on_host(self.plan):
            lanes = (self._host,)
            if self._devices:
                if not task.again and any(tensor.experts for tensor in task.step.tensors):
                    self._note(task, "needs more memory than a device has: merged on the CPU")
                task.step = task.step.on_host
        step = task.step
        bids = [Bid(lane.account, step.held_bytes, step.cost, step.workspace) for lane in lanes]
        taken = self.ledger.acquire(bids)
        if taken is None:
            return False
        task.bid = bids[taken]
        self._submit("read", self._read, task, lanes[taken])
        return True

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
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        for lane in self.lanes:
            lane.close()

    def _submit(self, pool: str, work: Callable[..., None], *given: object) -> None:
        stage = pool.partition(" ")[0]
        once = threading.Lock()  # stands for the work: a closure that named itself would be a cycle

        def guarded() -> None:
            if not once.acquire(blocking=False):
                return
            start = time.perf_counter()
            try:
                if self.error is None:
                    work(*given)
            except BaseException as error:
                self._fail(error)
            finally:
                stop = time.perf_counter()
                track = threading.current_thread().name.removeprefix("resm-").replace("_", " ")
                self.timeline.add(track, start, stop)
                self._ended(once, stage, stop - start)

        try:
            with self._change:
                self._running.add(once)
            self._pools[pool].submit(guarded)
        except RuntimeError as error:
            self._fail(ResmError(f"the merge cannot go on: {error}", fix="fewer --workers"))
            guarded()
        except BaseException as error:  # Ctrl-C, before or after the pool took it
            self._fail(error)
            guarded()

    def _ended(self, work: threading.Lock, stage: str, seconds: float) -> None:
        with self._change:
            self._busy[stage] += seconds
            self._running.discard(work)
            self._change.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Remember the first error and let nothing more in."""
        with self._change:
            if self.error is None:
                self.error = error
            self._change.notify_all()
        self.ledger.close()

    def _drop(self, task: _Task) -> None:
        """One holder less; the last one gives the memory back."""
        with self._change:
            task.holders -= 1
            over = not task.holders
        if over and task.bid is not None:
            self.ledger.release(task.bid)

    def _read(self, task: _Task, lane: Lane) -> None:
        inputs: dict[Key, Value] | None = None
        ready: Mark = None
        try:
            with lane.reading():
                inputs = {source.key: source.read(lane.place) for source in task.step.sources}
                ready = lane.mark()
        except Exception as error:
            if not (lane.staged and out_of_memory(error)):
                raise
        if inputs is None:
            lane.trim()
            self._to_host(task, lane, task.parts)
            return
        if self.progress and not task.counted:
            self.progress.advance(task.step.read_bytes, task.name)
        task.counted = True
        self._submit(f"compute {lane.name}", self._compute, task, lane, inputs, ready)

    def _compute(self, task: _Task, lane: Lane, inputs: dict[Key, Value], ready: Mark) -> None:
        torch.set_num_threads(self.plan.options.threads)
        with lane.computing(ready, inputs.values()):
            loaded = Loaded(inputs, len(task.parts))
            inputs.clear()
            for i, (sink, tensor) in enumerate(task.parts):
                start = time.perf_counter()
                found = self._merge(task, lane, sink, tensor, loaded)
                if found is None:
                    del loaded
                    lane.trim()
                    self._to_host(task, lane, task.parts[i:])
                    return
                merged, measures = found
                sink.results[tensor.name] = TensorResult(
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
                    memory_notes=tuple(task.notes),
                )
                with self._change:
                    task.holders += 1
                given = (task, lane, sink, tensor, [merged.tensor], lane.mark())
                self._submit("write", self._write, *given)
        del loaded, found, merged  # before another tensor takes their place
        self._drop(task)

    def _merge(
        self, task: _Task, lane: Lane, sink: Sink, tensor: PlannedTensor, loaded: Loaded
    ) -> tuple[Merged, Measures | None] | None:
        """Merge on a lane; None where its memory does not hold that, whatever is given up."""
        while True:
            with lane.turn() as limit:
                try:
                    return merge_planned(sink.plan, tensor, loaded)
                except Exception as error:
                    if not (lane.staged and out_of_memory(error)):
                        raise
            loaded.forget()
            lane.trim()
            if not loaded.sparing and tensor.method.by_matrix and len(tensor.experts) > 1:
                loaded.sparing = True
                self._note(task, f"{lane.name} ran out of memory: experts factored one by one")
            elif limit > 1:
                most = lane.narrow(limit)
                self.ledger.narrow(lane.account, most + PREFETCH)
                self._note(task, f"{lane.name} ran out of memory: {most} of its workers from here")
            else:
                return None

    def _to_host(self, task: _Task, lane: Lane, parts: Sequence[Part]) -> None:
        """Give up a task's place on a lane: what is left of it is read again and merged there."""
        self._note(task, f"{lane.name} ran out of memory: merged on the CPU")
        with self._change:
            self._again.append(_Task(parts, again=True, counted=task.counted, notes=task.notes))
            self._change.notify_all()
        self._drop(task)

    def _note(self, task: _Task, text: str) -> None:
        task.notes.append(text)
        LOG.warning("tensor %r: %s", task.name, text)

    def _write(
        self,
        task: _Task,
        lane: Lane,
        sink: Sink,
        tensor: PlannedTensor,
        result: list[torch.Tensor],
        done: Mark,
    ) -> None:
        shard = sink.shards.get(tensor.shard)
        if shard is None:
            due = functools.partial(self._submit, "finish", self._finish, sink, tensor.shard)
            shard = sink.shards[tensor.shard] = sink.begin(tensor.shard, due)
        shard.write_pieces(tensor.slot, lane.pieces(result.pop(), done))
        self._drop(task)
        if self.progress:
            self.progress.advance(tensor.write_bytes, tensor.name)

    def _finish(self, sink: Sink, index: int, shard: ShardFile) -> None:
        if not shard.check():
            return
        digest = shard.finish()
        del sink.shards[index]
        sink.done(shard, digest)


def host_lane(plan: MergePlan, steps: Sequence[Step]) -> Lane:
    """The CPU: for everything, or beside devices for copies and what does not fit them."""
    workers = 1 if plan.has_devices else plan.workers
    return Lane("cpu", torch.device("cpu"), workers, host_memory(steps, plan))


def device_lanes(plan: MergePlan) -> list[StagedLane]:
    """A lane per device of the plan; none for the CPU.

    Raises
    ------
    PlanError
        Where a device cannot be used.
    """
    lanes: list[StagedLane] = []
    for device in plan.devices if plan.has_devices else ():
        try:
            lanes.append(CudaLane(str(device), device, plan.workers, plan.device_memory))
        except RuntimeError as error:
            raise PlanError(f"{device} cannot be used: {error}", fix="use --device cpu") from error
    return lanes
