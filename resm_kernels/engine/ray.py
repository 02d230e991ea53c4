"""The same plan on a Ray cluster: workers merge whole shards, the driver keeps the journal.

Inputs and output lie on a file system that all machines share. A worker is an actor that holds a
`Run` of its own and is fed shards whenever it has begun all that it was given; it writes and
verifies them as a local merge does. The driver journals what is durable, gives the shards of a
lost worker to others, and finishes the output. Since every attempt writes a file of its own, a
worker that was given up and still writes harms nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resm_kernels import __version__
from resm_kernels.engine.flow import STAGES, Part, Progress, step_of
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.plan import MergePlan, Step
from resm_kernels.engine.remote import TURN, Job, Turn, Worker
from resm_kernels.engine.result import Usage
from resm_kernels.engine.target import Target
from resm_kernels.engine.timeline import Timeline
from resm_kernels.errors import MissingDependencyError, PlanError, ResmError, UsageError
from resm_kernels.recipe import Recipe

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise MissingDependencyError(
        "the Ray executor needs Ray", fix="pip install 'resm-kernels[ray]'"
    ) from error

LOG = logging.getLogger(__name__)

ATTEMPTS = 3
"""How many workers a shard may lose before the merge gives up."""
LOOK = 5.0
"""Seconds between two looks at which machines there are."""
PATIENCE = 30.0
"""Seconds without a worker before that is said."""
MAX_REASON = 500
"""Most characters of what Ray says of a failure."""


@dataclass(frozen=True)
class Share:
    """What each worker asks of Ray, and how many fit each machine.

    Attributes
    ----------
    cpus, gpus : int
        Of one worker.
    fitting : mapping
        Workers by the id of the machine.
    """

    cpus: int
    gpus: int
    fitting: Mapping[str, int]

    @property
    def workers(self) -> int:
        """Workers that fit the whole cluster."""
        return sum(self.fitting.values())


def share_machines(machines: Mapping[str, tuple[int, int]], device: str, cpus: int | None) -> Share:
    """Divide machines among workers: a pure function.

    Parameters
    ----------
    machines : mapping
        CPUs and GPUs by the id of the machine.
    device : str
        `cpu`: a worker per machine. `cuda`: one per GPU, with its share of the CPUs. `all`: one
        per machine, with all its GPUs. `auto`: `cuda` where there are GPUs.
    cpus : int or None
        CPUs of each worker in place of these; the smallest machine's decide where they differ.

    Raises
    ------
    UsageError
        For a device by number: Ray chooses which.
    ResmError
        Where no machine has room for one worker.
    """
    if device not in ("cpu", "cuda", "all", "auto"):
        raise UsageError(
            f"device: got {device!r} on a Ray cluster", expected="cpu, cuda (one GPU), all or auto"
        )
    most = max((gpus for _, gpus in machines.values()), default=0)
    if device == "auto":
        device = "cuda" if most else "cpu"
    useful = {
        name: (cores, gpus)
        for name, (cores, gpus) in machines.items()
        if cores and (gpus or device == "cpu")
    }
    listed = ", ".join(f"{cores} CPUs and {gpus} GPUs" for cores, gpus in machines.values())
    lacking = ResmError(
        "no machine of the Ray cluster has room for a worker",
        got=listed or "no machines",
        expected=f"{cpus or 1} CPUs" + (" and a GPU" if device != "cpu" else ""),
        fix="add machines (`ray start`), ask for fewer --ray-cpus, or use --device cpu",
    )
    if not useful:
        raise lacking
    gpus = {"cpu": 0, "cuda": 1}.get(device, min(count for _, count in useful.values()))
    if cpus is None:
        shares = (cores * gpus // count if gpus else cores for cores, count in useful.values())
        cpus = max(1, min(shares))
    fitting = {
        name: min(cores // cpus, count // gpus if gpus else cores)
        for name, (cores, count) in useful.items()
    }
    if not any(fitting.values()):
        raise lacking
    return Share(cpus, gpus, {name: count for name, count in fitting.items() if count})


class RayWorker(Worker):
    """A worker that knows where it is."""

    def where(self) -> tuple[str, str]:
        """The machine's id in the cluster, and its name."""
        return ray.get_runtime_context().get_node_id(), socket.gethostname()


class RayExecutor:
    """Merge on a Ray cluster.

    Parameters
    ----------
    address : str
        Of the cluster: `auto` is the one in RAY_ADDRESS or on this machine, `local` starts one
        here. A connection that the process has already is used as it is.
    cpus : int, optional
        CPUs of each worker; by default a whole machine's, or on GPUs its share for every GPU.

    Raises
    ------
    MissingDependencyError
        Where Ray is not installed.
    ResmError
        Where there is no cluster, or no room on it.
    """

    def __init__(self, address: str = "auto", cpus: int | None = None) -> None:
        if cpus is not None and (not isinstance(cpus, int) or not 1 <= cpus <= 4096):
            raise UsageError(f"ray cpus: got {cpus!r}, expected a whole number from 1 to 4096")
        self._address = address
        self._cpus = cpus

    def make_plans(self, recipes: Sequence[Recipe], options: EngineOptions) -> list[MergePlan]:
        """As `planning.make_plans`, on a machine of the cluster."""
        self._connect()
        try:
            share = self.share(options)
            actor = _hire(share)
            try:
                call = actor.where.remote()
                if not ray.wait([call], timeout=PATIENCE)[0]:
                    LOG.warning("%s", _no_room(share))
                machine, name = _result(call)
                neighbours = share.fitting.get(machine, 1)
                plans, said = _result(actor.make_plans.remote(tuple(recipes), options, neighbours))
            finally:
                ray.kill(actor)
        except RayError as error:
            raise ResmError("planning on the Ray cluster failed", got=_reason(error)) from error
        _check_versions(plans)
        LOG.debug("planned on %s", name)
        for level, text in said:
            LOG.log(level, "%s", text)
        return list(plans)

    def run(
        self,
        targets: Sequence[Target],
        steps: Sequence[Step],
        pending: Sequence[Sequence[Part]],
        progress: Progress | None,
    ) -> Usage:
        """Merge what is pending on all machines, until all of it is journalled."""
        self._connect()
        try:
            return _Driver(self, targets, pending, progress).run()
        except RayError as error:
            raise ResmError(
                "the Ray cluster failed", got=_reason(error), fix="mend it, then --resume"
            ) from error

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = self._address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or "auto"
        try:
            if address == "local":
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            elif address != "auto":  # Ray itself waits for minutes
                _knock(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, OSError, ValueError, RuntimeError) as error:
            raise ResmError(
                f"no Ray cluster at {address!r}",
                got=_reason(error),
                expected="HOST:PORT of its head, seen from a machine of the cluster",
                fix="start one with `ray start --head`, or name it by --ray-address; where a token "
                "protects it, set RAY_AUTH_MODE=token",
            ) from error

    def share(self, options: EngineOptions) -> Share:
        """What the machines of the cluster have room for now."""
        found = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        resources = {node["NodeID"]: node["Resources"] for node in found}
        machines = {
            name: (int(has.get("CPU", 0)), int(has.get("GPU", 0)))
            for name, has in resources.items()
        }
        return share_machines(machines, options.device, self._cpus)


@dataclass
class _Member:
    """A worker as the driver sees it.

    Attributes
    ----------
    call : ObjectRef
        What it was asked last.
    state : str
        `hired`, `starting` or `merging`, and `lost`.
    origin : float
        When its timeline began, in seconds of the driver's.
    told : int
        Bytes of progress on shards that it has not finished.
    holds : dict
        The shards that it has, with the outputs that it has not finished of each.
    finished : int
        How many it finished.
    """

    actor: Any
    call: Any
    name: str
    state: str = "hired"
    origin: float = 0.0
    told: int = 0
    holds: dict[int, set[int]] = field(default_factory=dict)
    finished: int = 0


class _Driver:
    """Hands shards to workers until every target has all of its own."""

    def __init__(
        self,
        executor: RayExecutor,
        targets: Sequence[Target],
        pending: Sequence[Sequence[Part]],
        progress: Progress | None,
    ) -> None:
        plans = [target.plan for target in targets]
        self._executor = executor
        self._targets = targets
        self._progress = progress
        self._options = plans[0].options
        self._bytes: Counter[int] = Counter()
        self._left: dict[int, set[int]] = {}
        for parts in pending:
            shard = parts[0][1].shard
            self._bytes[shard] += step_of(parts).held_bytes
            self._left[shard] = {i for i, t in enumerate(targets) if t.lacks(parts[0][1])}
        self._queue = deque(self._left)
        self._job = ray.put(
            Job(
                recipes=tuple(plan.recipe for plan in plans),
                options=self._options,
                identities=tuple(plan.identity for plan in plans),
                folders=tuple(target.folder.path for target in targets),
                lacking=tuple(frozenset(s.name for s in target.lacking) for target in targets),
            )
        )
        self._share = executor.share(self._options)
        self._members: list[_Member] = []
        self._lost: list[_Member] = []
        self._attempts: Counter[int] = Counter()
        self._fruitless = 0
        self._numbers = itertools.count(1)
        self._started = time.perf_counter()
        self._looked = -LOOK
        self._patient = True
        self._head = ray.get_runtime_context().gcs_address
        self._silent = 0.0

    def run(self) -> Usage:
        """Merge until nothing is left; what all workers took."""
        try:
            while self._left:
                self._look()
                self._listen()
            return self._usage()
        finally:
            for member in self._members:
                ray.kill(member.actor)
            calls = [member.call for member in self._members]
            ray.wait(calls, num_returns=len(calls), timeout=LOOK)  # until Ray has ended them

    def _look(self) -> None:
        """Now and then, hire as many workers as there is room and work for."""
        age = time.perf_counter() - self._started
        if age - self._looked < LOOK:
            return
        self._looked = age
        if not _answers(self._head):  # Ray would wait in silence, then end this process
            self._silent = self._silent or age
            if age - self._silent > PATIENCE:
                raise ResmError(
                    f"the head of the Ray cluster does not answer: {self._head}",
                    fix="start the cluster again, then --resume",
                )
            return
        self._silent = 0.0
        self._share = self._executor.share(self._options)
        for _ in range(len(self._members), min(self._share.workers, len(self._left))):
            actor = _hire(self._share)
            name = f"#{next(self._numbers)}"
            self._members.append(_Member(actor, actor.where.remote(), name))
        if self._patient and age > PATIENCE and all(m.state == "hired" for m in self._members):
            self._patient = False
            LOG.warning("%s", _no_room(self._share))

    def _listen(self) -> None:
        """Wait for the next word of a worker, and answer it."""
        if not self._members:  # the head is silent: there is nobody to wait for
            time.sleep(TURN)
        calls = {member.call: member for member in self._members}
        ray.wait([*calls], num_returns=1, timeout=LOOK)
        for call in ray.wait([*calls], num_returns=len(calls), timeout=0)[0]:
            member = calls[call]
            try:
                self._answer(member, _result(call))
            except RayError as error:
                self._lose(member, error)

    def _answer(self, member: _Member, word: Any) -> None:
        actor = member.actor
        if member.state == "hired":
            machine, host = word
            member.name = f"{host} {member.name}"
            member.state = "starting"
            member.call = actor.start.remote(self._job, self._share.fitting.get(machine, 1))
        elif member.state == "starting":
            member.state = "merging"
            member.origin = time.perf_counter() - self._started
            self._give(member, hungry=True)
        else:
            self._hear(member, word)
            self._give(member, word.hungry)

    def _hear(self, member: _Member, turn: Turn) -> None:
        for level, text in turn.said:
            LOG.log(level, "%s: %s", member.name, text)
        member.told += turn.count
        if self._progress and turn.count:
            self._progress.advance(turn.count, turn.tensor)
        for done in turn.finished:
            target = self._targets[done.output]
            name = target.plan.layouts[done.index].name
            if name not in target.folder.kept:  # a lost worker may have finished this one of many
                target.folder.shard_done(name, done.sha256, done.digests, done.results)
            unfinished = member.holds[done.index]
            unfinished.remove(done.output)
            if not unfinished:
                del self._left[done.index], member.holds[done.index]
                member.told -= self._bytes[done.index]
                member.finished += 1
                self._fruitless = 0

    def _give(self, member: _Member, hungry: bool) -> None:
        """Ask a worker for its next turn, with a shard where it wants one."""
        given = [self._queue.popleft()] if hungry and self._queue else []
        member.holds.update((shard, set(self._left[shard])) for shard in given)
        member.call = member.actor.turn.remote(given, bool(self._queue))

    def _lose(self, member: _Member, error: RayError) -> None:
        """Take back the shards of a worker that is no more."""
        reason = _reason(error)
        LOG.warning("worker %s is lost: %s", member.name, reason)
        with contextlib.suppress(RayError):
            ray.kill(member.actor)
        self._members.remove(member)
        self._lost.append(member)
        member.state = "lost"
        self._attempts.update(member.holds.keys())
        self._queue.extendleft(reversed([*member.holds]))
        if self._progress and member.told:
            self._progress.advance(-member.told, "")
        self._fruitless += 1
        worst = max(member.holds, key=self._attempts.__getitem__, default=None)
        if worst is not None and self._attempts[worst] >= ATTEMPTS:
            raise ResmError(
                f"shard {self._targets[0].plan.layouts[worst].name}: lost {ATTEMPTS} workers",
                got=reason,
                fix="see Ray's logs; a smaller --memory-budget helps where memory ran out; then "
                "--resume",
            )
        if self._fruitless >= ATTEMPTS * self._share.workers:
            raise ResmError(
                f"{self._fruitless} workers were lost, and none finished a shard",
                got=reason,
                fix="see Ray's logs; are resm-kernels and its packages installed on every machine?",
            )
        self._looked = -LOOK

    def _usage(self) -> Usage:
        """What the workers took that are there at the end."""
        merging = [member for member in self._members if member.state == "merging"]
        for member in merging:
            member.call = member.actor.stop.remote()
        found: list[tuple[_Member, Usage]] = []
        for member in merging:
            try:
                found.append((member, _result(member.call)))
            except RayError as error:
                LOG.warning("worker %s is lost, its work is not: %s", member.name, _reason(error))
        usages = [usage for _, usage in found]
        timeline = Timeline(0.0)
        for member, usage in found:
            for stage, intervals in _by_stage(usage.timeline).items():
                for start, stop in intervals:
                    timeline.add(
                        f"{stage} {member.name}", start + member.origin, stop + member.origin
                    )
        return Usage(
            stage_seconds={s: sum(u.stage_seconds[s] for u in usages) for s in STAGES},
            timeline=timeline.to_dict(),
            peak_memory=max((usage.peak_memory for usage in usages), default=0),
            predicted_memory=max((usage.predicted_memory for usage in usages), default=0),
            peak_device_memory={
                f"{device} of {member.name}": peak
                for member, usage in found
                for device, peak in usage.peak_device_memory.items()
            },
            predicted_device_memory=max((u.predicted_device_memory for u in usages), default=0),
            cluster={
                "workers": [
                    {"name": m.name, "shards": m.finished, "lost": m.state == "lost"}
                    for m in (*self._members, *self._lost)
                    if m.state != "hired"
                ],
                "cpus": self._share.cpus,
                "gpus": self._share.gpus,
            },
        )


def _knock(address: str) -> None:
    """Connect to a head, and leave; OSError or ValueError where none answers."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK).close()


def _answers(address: str) -> bool:
    try:
        _knock(address)
    except OSError:
        return False
    return True


def _hire(share: Share) -> Any:
    """An actor that asks for a worker's share of a machine."""
    wanted = {"num_cpus": share.cpus, "num_gpus": share.gpus, "scheduling_strategy": "SPREAD"}
    return ray.remote(RayWorker).options(max_restarts=0, **wanted).remote(os.getcwd(), share.cpus)


def _no_room(share: Share) -> str:
    asked = f"{share.cpus} CPUs" + f" and {share.gpus} GPUs" * (share.gpus > 0)
    return f"no worker yet: the cluster's machines have not {asked} free"


def _check_versions(plans: Sequence[MergePlan]) -> None:
    """Raise where the plans are of another version than the one that would finish them."""
    for found in {plan.identity["version"] for plan in plans} - {__version__}:
        raise PlanError(
            "the cluster has another version of resm-kernels than this machine",
            got=found,
            expected=__version__,
            fix="install the same version on every machine",
        )


def _result(call: Any) -> Any:
    """A worker's answer, or the error that it raised itself."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, ResmError):
            raise error.cause from None
        LOG.debug("%s", error)
        raise ResmError("a worker of the Ray cluster failed", got=repr(error.cause)) from error


def _reason(error: BaseException) -> str:
    """What Ray says of a failure, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


def _by_stage(timeline: Mapping[str, list[float]]) -> dict[str, list[tuple[float, float]]]:
    """When any thread of each stage was busy."""
    found: dict[str, list[tuple[float, float]]] = {}
    for track, edges in timeline.items():
        pairs = zip(edges[::2], edges[1::2], strict=True)
        found.setdefault(track.partition(" ")[0], []).extend(pairs)
    return {stage: _joined(intervals) for stage, intervals in found.items()}


def _joined(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found
