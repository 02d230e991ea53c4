"""One process of a cluster: it plans for itself, merges the shards it is given, and tells.

Knows nothing of what brings its words to the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint.journal import check_partial
from resm_kernels.checkpoint.writer import ShardFile
from resm_kernels.engine.executor import lacking_parts, watched
from resm_kernels.engine.flow import Part, Run
from resm_kernels.engine.memory import BUDGET_SHARE, available_memory
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.plan import MergePlan, PlannedTensor, Step, plan_steps
from resm_kernels.engine.planning import make_plans
from resm_kernels.engine.result import TensorResult, Usage
from resm_kernels.errors import OutputError, PlanError
from resm_kernels.recipe import Recipe

TURN = 0.5
"""Most seconds between two words of a worker."""


@dataclass(frozen=True)
class Job:
    """What a worker is to do, small enough to send: it plans for itself, and must agree.

    Attributes
    ----------
    identities : tuple of mapping
        What the driver's plans depend on, output by output.
    folders : tuple of Path
        Where the shards of each output go.
    lacking : tuple of frozenset of str
        The shards that each output lacks.
    """

    recipes: tuple[Recipe, ...]
    options: EngineOptions
    identities: tuple[Mapping[str, str], ...]
    folders: tuple[Path, ...]
    lacking: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Finished:
    """A shard of one output that is durable under its final name."""

    output: int
    index: int
    sha256: str
    digests: dict[str, str]
    results: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a worker did since its last turn.

    Attributes
    ----------
    count, tensor
        Bytes done, and the tensor of the last of them.
    hungry : bool
        Whether all that it was given is on its way.
    said : tuple of (int, str)
        What it logged, by level.
    """

    finished: tuple[Finished, ...]
    count: int
    tensor: str
    hungry: bool
    said: tuple[tuple[int, str], ...]


class _Heard(logging.Handler):
    """Keeps what is logged until it is asked for."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._said: deque[tuple[int, str]] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append((record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[int, str], ...]:
        """What was logged since."""
        return tuple(self._said.popleft() for _ in range(len(self._said)))


class _Tally:
    """A `Progress` that only counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._tensor = 0, ""

    def start(self, total: int) -> None:
        """The driver knows the total."""

    def advance(self, count: int, tensor: str) -> None:
        """Count bytes."""
        with self._lock:
            self._count += count
            self._tensor = tensor

    def stop(self) -> None:
        """Nothing to take away."""

    def take(self) -> tuple[int, str]:
        """Bytes since, and the last tensor."""
        with self._lock:
            count, self._count = self._count, 0
            return count, self._tensor


class _Sink:
    """One output as a worker has it: a `Sink` whose journal is kept elsewhere."""

    def __init__(self, plan: MergePlan, number: int, job: Job, finished: deque[Finished]) -> None:
        self.plan = plan
        self.shards: dict[int, ShardFile] = {}
        self.results: dict[str, TensorResult] = {}
        self._number = number
        self._folder = job.folders[number]
        self._lacking = job.lacking[number]
        self._finished = finished
        self._numbers = {layout.name: i for i, layout in enumerate(plan.layouts)}
        self._attempt = f".{secrets.token_hex(8)}"

    def lacks(self, tensor: PlannedTensor) -> bool:
        """Whether the tensor's shard was not finished at the start."""
        return self.plan.layouts[tensor.shard].name in self._lacking

    def begin(self, index: int, due: Callable[[ShardFile], None]) -> ShardFile:
        """A file that no other worker writes."""
        check_partial(self._folder, self.plan.plan_id)  # another merge's, if this was given up
        return ShardFile(self._folder, self.plan.layouts[index], due, self._attempt)

    def done(self, shard: ShardFile, sha256: str) -> None:
        """Keep what the journal must say."""
        results = {slot.name: asdict(self.results.pop(slot.name)) for slot in shard.layout.slots}
        index = self._numbers[shard.layout.name]
        self._finished.append(Finished(self._number, index, sha256, shard.digests, results))


class Worker:
    """One process of the cluster: plans, merges the shards it is given, says how far it is."""

    def __init__(self, folder: str, cores: int) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)  # where relative paths begin
        self._cores = cores
        self._heard = _Heard()
        package = logging.getLogger(__name__.partition(".")[0])
        package.setLevel(logging.INFO)
        package.addHandler(self._heard)
        self._tally = _Tally()
        self._finished: deque[Finished] = deque()
        self._work: dict[int, list[list[Part]]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._usage: Usage | None = None

    def make_plans(
        self, recipes: Sequence[Recipe], options: EngineOptions, neighbours: int
    ) -> tuple[list[MergePlan], tuple[tuple[int, str], ...]]:
        """Plans for a worker with this one's cores, and what was logged.

        `neighbours` are the workers that share the machine's memory, this one among them.
        """
        budget = options.memory_budget or int(BUDGET_SHARE * available_memory()) // neighbours
        plans = make_plans(recipes, replace(options, memory_budget=max(1, budget)))
        chosen = plans[0].workers
        if options.workers is None and not plans[0].has_devices:
            chosen = min(chosen, max(1, self._cores // options.threads))
        plans = [replace(plan, options=options, workers=chosen) for plan in plans]
        return plans, self._heard.take()

    def start(self, job: Job, neighbours: int) -> None:
        """Plan, and begin to wait for shards.

        Raises
        ------
        PlanError
            Where the plan here is not the driver's.
        OutputError
            Where the output is not there.
        """
        plans, _ = self.make_plans(job.recipes, job.options, neighbours)
        here = socket.gethostname()
        for plan, identity, folder in zip(plans, job.identities, job.folders, strict=True):
            _check_identity(here, identity, plan.identity)
            if not folder.is_dir():
                raise OutputError(
                    f"{folder}: not there on {here}",
                    fix="choose an output on a file system that all machines share",
                )
            check_partial(folder, plan.plan_id)
        sinks = [_Sink(plan, i, job, self._finished) for i, plan in enumerate(plans)]
        steps = plan_steps(plans)
        for parts in lacking_parts(sinks, steps):
            self._work.setdefault(parts[0][1].shard, []).append(parts)
        self._run = Run(plans[0], steps, sinks, self._tally)
        self._thread = threading.Thread(
            target=self._carry_out, args=(steps,), name="resm-run", daemon=True
        )
        self._thread.start()

    def _carry_out(self, steps: Sequence[Step]) -> None:
        try:
            self._usage = watched(self._run, steps)
        except BaseException as error:
            self._error = error

    def turn(self, shards: Sequence[int], more: bool) -> Turn:
        """Take on shards; returns when there is something to say, after `TURN` s at most.

        `more`: whether hunger is worth saying.
        """
        for index in shards:
            self._run.feed(self._work.pop(index))
        end = time.monotonic() + TURN
        while not (self._error or self._finished or (more and self._run.hungry)):
            if time.monotonic() > end:
                break
            time.sleep(0.005)
        error = self._error
        finished = tuple(self._finished.popleft() for _ in range(len(self._finished)))
        said = self._heard.take()
        if error is not None and not (finished or said):  # these are told before it
            raise error
        return Turn(finished, *self._tally.take(), self._run.hungry, said)

    def stop(self) -> Usage:
        """End the run; what it took."""
        self._run.close()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._usage is not None
        return self._usage


def _check_identity(here: str, there: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise where a worker's plan would give other bytes than the driver's."""
    differing = [name for name in there if there[name] != found.get(name)]
    if not differing:
        return
    raise PlanError(
        f"{here} plans another merge than the machine that planned first",
        got=", ".join(f"{name} {found.get(name)}" for name in differing),
        expected=", ".join(f"{name} {there[name]}" for name in differing),
        fix="use machines of one kind, with the same packages and the same shared file system",
    )
