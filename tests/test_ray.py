"""A merge on a Ray cluster: the bytes of a local one, whoever dies on the way."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import resm_kernels
from resm_kernels import api
from resm_kernels.checkpoint.journal import JOURNAL, OutputFolder
from resm_kernels.checkpoint.manifest import verify_folder
from resm_kernels.checkpoint.writer import ShardFile
from resm_kernels.cli import main
from resm_kernels.engine.executor import LocalExecutor, lacking_parts
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.plan import plan_steps
from resm_kernels.engine.remote import Finished, Job, Turn, Worker
from resm_kernels.errors import (
    CheckpointError,
    NonFiniteError,
    OutputError,
    PlanError,
    RecipeError,
    ResmError,
    UsageError,
)
from tests.adapters import llama, train
from tests.checkpoints import contents, fine_tuned, make_state, save
from tests.mergekit.vocabulary import RECIPES, write_inputs

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from resm_kernels.engine import ray as driver  # noqa: E402
from resm_kernels.engine.ray import RayExecutor, Share, share_machines  # noqa: E402

SHARDS = 16
WIDTH, SIZE = 448, "500KB"
"""So that every matrix of the family has a shard of its own."""

Family = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("inputs")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (WIDTH, WIDTH) for i in range(SHARDS)}
    state = make_state(shapes=shapes)
    experts = [save(folder / f"e{t}", fine_tuned(state, t + 1, 0.01)) for t in range(3)]
    return save(folder / "base", state), experts


@pytest.fixture(scope="module")
def local(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a local merge makes of the family."""
    output = tmp_path_factory.mktemp("local") / "out"
    resm_kernels.merge(*family, output, shard_size=SIZE)
    return model_files(output)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines of one core, with this process connected to them."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def model_files(folder: Path) -> dict[str, bytes]:
    return {n: b for n, b in contents(folder).items() if not n.startswith("resm_report.")}


def workers() -> list[psutil.Process]:
    """The processes of workers that machines of this test started, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def when_journalled(output: Path, shards: int, act: Callable[[], object]) -> threading.Thread:
    """Act once as many shards are in the journal."""
    journal = output.with_name(output.name + ".partial") / JOURNAL

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if journal.exists() and len(journal.read_bytes().splitlines()) > shards:
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


class Bytes:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, count: int, tensor: str) -> None:
        self.done += count

    def stop(self) -> None:
        pass


def test_the_bytes_are_those_of_a_local_merge(
    cluster: Cluster, family: Family, local: dict[str, bytes], tmp_path: Path
) -> None:
    output, progress = tmp_path / "out", Bytes()
    report = resm_kernels.merge(*family, output, shard_size=SIZE, executor="ray", progress=progress)
    assert model_files(output) == local
    assert progress.done == progress.total > 0
    assert report.cluster is not None
    assert [worker["lost"] for worker in report.cluster["workers"]] == [False, False]
    assert sum(worker["shards"] for worker in report.cluster["workers"]) == SHARDS
    assert all(worker["shards"] for worker in report.cluster["workers"])
    assert {track.split(" ")[0] for track in report.timeline} == {
        "read", "compute", "write", "finish",
    }  # fmt: skip
    assert report.written_bytes == WIDTH * WIDTH * 2 * SHARDS
    assert report.peak_memory > 0
    assert json.loads((output / "resm_report.json").read_text())["cluster"] == report.cluster
    assert "workers of a Ray cluster" in (output / "resm_report.html").read_text()
    end = time.monotonic() + 30
    while workers() and time.monotonic() < end:
        time.sleep(0.05)
    assert not workers()


def test_a_killed_worker_costs_its_shards_alone(
    cluster: Cluster,
    family: Family,
    local: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed while it merges: others do its shards, and nothing shows but the report."""
    output, progress = tmp_path / "out", Bytes()
    killer = when_journalled(output, 3, lambda: workers()[0].kill())
    report = resm_kernels.merge(*family, output, shard_size=SIZE, executor="ray", progress=progress)
    killer.join()
    assert model_files(output) == local
    assert verify_folder(output).unlisted == ()
    assert report.cluster is not None
    assert [worker["lost"] for worker in report.cluster["workers"]].count(True) == 1
    assert progress.done == progress.total
    assert "is lost" in caplog.text
    assert "workers lost: others merged" in (output / "resm_report.html").read_text()


def test_a_machine_that_joins_is_used(
    cluster: Cluster,
    family: Family,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one shows once the first has finished a shard."""
    output, original = tmp_path / "out", RayExecutor.share
    journal = output.with_name("out.partial") / JOURNAL

    def growing(self: RayExecutor, options: EngineOptions) -> Share:
        found = original(self, options)
        joined = journal.exists() and len(journal.read_bytes().splitlines()) > 1
        count = 2 if joined else 1
        return replace(found, fitting=dict([*found.fitting.items()][:count]))

    give, end = driver._Driver._give, time.monotonic() + 60

    def waiting(self: driver._Driver, member: driver._Member, hungry: bool) -> None:
        """The first one pauses until the second, whose process takes seconds to start, is there."""
        alone = member.finished and len([m for m in self._members if m.state == "merging"]) < 2
        give(self, member, hungry and not (alone and time.monotonic() < end))

    monkeypatch.setattr(driver._Driver, "_give", waiting)
    monkeypatch.setattr(RayExecutor, "share", growing)
    monkeypatch.setattr(driver, "LOOK", 0.1)
    report = resm_kernels.merge(*family, output, shard_size=SIZE, executor="ray")
    assert model_files(output) == local
    assert report.cluster is not None
    assert len(report.cluster["workers"]) == 2


def test_workers_that_always_die_end_the_merge(
    cluster: Cluster, family: Family, local: dict[str, bytes], tmp_path: Path
) -> None:
    """One clear error that names the shard; what was finished stays, and a resume ends it."""
    output, over = tmp_path / "out", threading.Event()

    def kill() -> None:
        while not over.is_set():
            for process in workers():
                process.kill()
            time.sleep(0.02)

    when_journalled(output, 3, kill)
    with pytest.raises(ResmError, match=r"lost 3 workers|workers were lost"):
        resm_kernels.merge(*family, output, shard_size=SIZE, executor="ray")
    over.set()
    assert not output.exists()
    report = resm_kernels.merge(*family, output, shard_size=SIZE, executor="ray", resume=True)
    assert report.kept_shards >= 3
    assert model_files(output) == local


SCRIPT = """
import sys, resm_kernels
base, output, size, *experts = sys.argv[1:]
resm_kernels.merge(base, experts, output, shard_size=size, executor="ray")
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_dead_driver_leaves_what_any_other_can_finish(
    stop: signal.Signals,
    cluster: Cluster,
    family: Family,
    local: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """On the cluster, and, for one that was killed there, on this machine alone."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(family[0]), str(output), SIZE]
    process = subprocess.Popen(
        [*command, *map(str, family[1])],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stderr=subprocess.DEVNULL,
    )
    watcher = when_journalled(output, 3, lambda: process.send_signal(stop))
    assert process.wait(60) != 0
    watcher.join()
    assert not output.exists()
    executor = "local" if stop == signal.SIGKILL else "ray"
    report = resm_kernels.merge(*family, output, shard_size=SIZE, executor=executor, resume=True)
    assert report.kept_shards >= 3
    assert model_files(output) == local


def test_a_sweep_has_the_bytes_of_a_local_one(
    cluster: Cluster, family: Family, tmp_path: Path
) -> None:
    """With one of its shards finished before for one output alone."""
    given: dict[str, Any] = {"lambdas": [0.5, 1.0], "shard_size": "600KB"}
    resm_kernels.sweep(*family, tmp_path / "local", ["tsvm", "ties"], **given)
    resm_kernels.sweep(*family, tmp_path / "out", ["tsvm", "ties"], **given, executor="ray")
    assert model_files(tmp_path / "out").keys() == model_files(tmp_path / "local").keys()
    for name in ("tsvm-lambda-0.5", "tsvm-lambda-1", "ties-lambda-0.5", "ties-lambda-1"):
        found, expected = (model_files(tmp_path / where / name) for where in ("out", "local"))
        assert found == expected


@pytest.mark.filterwarnings("ignore")
def test_whatever_a_recipe_says_travels(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters, `.bin` files, vocabularies, methods by tensor, another dtype, a part."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    recipes = {"union": (RECIPES["task_arithmetic_union"], {})}
    for t in range(2):
        found, adapter, _ = train(llama(), tmp_path / f"made{t}", t + 1)
        found.rename(tmp_path / f"llama{t}")
        adapter.rename(tmp_path / f"adapter{t}")
    whole = load_file(tmp_path / "llama0" / "model.safetensors")
    (tmp_path / "expert").mkdir()
    torch.save(fine_tuned(whole, 5), tmp_path / "expert" / "pytorch_model.bin")
    shutil.copy(tmp_path / "llama0" / "config.json", tmp_path / "expert")
    mixed: dict[str, Any] = {
        "merge_method": "tsvm",
        "base_model": "llama0",
        "models": [{"model": m} for m in ("adapter0", "llama0+adapter1", "expert")],
        "overrides": [{"filter": "mlp", "merge_method": "ties", "parameters": {"density": 0.5}}],
        "out_dtype": "float32",
    }
    recipes["mixed"] = (mixed, {"shard_size": "20KB"})
    recipes["part"] = (mixed, {"only": ["*layers.0.*"]})
    for name, (recipe, options) in recipes.items():
        Path(f"{name}.yml").write_text(yaml.safe_dump(recipe))
        found = {}
        for executor in ("local", "ray"):
            output = tmp_path / f"{name}-{executor}"
            resm_kernels.merge(recipe=f"{name}.yml", output=output, executor=executor, **options)
            found[executor] = model_files(output)
        assert found["ray"] == found["local"], name


def test_errors_are_those_of_a_local_merge(
    cluster: Cluster, family: Family, tmp_path: Path
) -> None:
    base, experts = family
    state = make_state(shapes={"a.up_proj.weight": (16, 16), "b.up_proj.weight": (16, 16)})
    one = save(tmp_path / "base", state)
    bad = {name: tensor.clone() for name, tensor in fine_tuned(state, 1).items()}
    bad["b.up_proj.weight"][3, 4] = float("nan")
    two = save(tmp_path / "bad", bad)
    said = []
    for executor in ("local", "ray"):
        with pytest.raises(NonFiniteError) as caught:
            resm_kernels.merge(one, [two], tmp_path / "out", executor=executor)
        said.append(str(caught.value))
        with pytest.raises(CheckpointError):
            resm_kernels.merge(tmp_path / "nothing", [two], tmp_path / "out", executor=executor)
        assert not list(tmp_path.glob("out*"))
    assert said[0] == said[1]
    with pytest.raises(ResmError, match="no machine of the Ray cluster has room"):
        resm_kernels.merge(base, experts, tmp_path / "out", executor=RayExecutor(cpus=64))
    with pytest.raises(ResmError, match="no machine of the Ray cluster has room"):
        resm_kernels.merge(base, experts, tmp_path / "out", executor="ray", device="cuda")


def test_other_errors_of_workers_are_one_line(cluster: Cluster) -> None:
    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def broken() -> None:
        raise TypeError("a mistake")

    with pytest.raises(ResmError) as caught:
        driver._result(broken.remote())
    assert caught.value.got == "TypeError('a mistake')"


def test_planning_without_room_says_so(
    cluster: Cluster,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    over = ray.remote(threading.Event).options(num_cpus=1)
    holders = [over.remote() for _ in range(2)]
    ray.get([holder.is_set.remote() for holder in holders])
    monkeypatch.setattr(driver, "PATIENCE", 0.5)
    threading.Timer(3, lambda: [ray.kill(holder) for holder in holders]).start()
    made = RayExecutor().make_plans([api.plan(*family).recipe], EngineOptions())
    assert len(made) == 1
    assert "no worker yet: the cluster's machines have not 1 CPUs free" in caplog.text
    monkeypatch.setattr(driver, "__version__", "0.0")
    with pytest.raises(PlanError, match="another version"):
        driver._check_versions(made)


HEADLESS = """
import logging, os, sys, time
import psutil, ray
from ray.cluster_utils import Cluster
import resm_kernels
from resm_kernels.engine import ray as driver
from resm_kernels.errors import ResmError

base, output, size, *experts = sys.argv[1:]
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
driver.PATIENCE, driver.LOOK = 2.0, 0.5
original = driver._Driver._hear

def hear(self, member, turn):
    original(self, member, turn)
    if member.finished and made.head_node.all_processes.get("gcs_server"):
        made.head_node.kill_gcs_server(check_alive=False)
        driver._Driver._listen = lambda self: time.sleep(0.1)  # the rest would be done too soon

driver._Driver._hear = hear
try:
    resm_kernels.merge(base, experts, output, shard_size=size, executor="ray")
except ResmError as error:
    print(error, flush=True)
for process in psutil.Process().children(recursive=True):
    process.kill()
os._exit(0)
"""


def test_a_dead_head_ends_the_merge(
    family: Family, local: dict[str, bytes], tmp_path: Path
) -> None:
    """With a word of ours: Ray itself ends the process, and not soon."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", HEADLESS, str(family[0]), str(output), SIZE]
    done = subprocess.run(
        [*command, *map(str, family[1])],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert "the head of the Ray cluster does not answer" in done.stdout
    report = resm_kernels.merge(*family, output, shard_size=SIZE, resume=True)
    assert report.kept_shards >= 1
    assert model_files(output) == local


def test_warnings_of_workers_are_heard(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(shapes={"a.up_proj.weight": (16, 16)})
    bad = {name: tensor.clone() for name, tensor in fine_tuned(state, 1).items()}
    bad["a.up_proj.weight"][3, 4] = float("inf")
    base, expert = save(tmp_path / "base", state), save(tmp_path / "bad", bad)
    resm_kernels.merge(base, [expert], tmp_path / "out", nonfinite="warn", executor="ray")
    assert "the base's values stay there" in caplog.text


def test_relative_paths_are_the_drivers(
    cluster: Cluster, family: Family, local: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for folder in (family[0], *family[1]):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    report = resm_kernels.merge("base", ["e0", "e1", "e2"], "out", shard_size=SIZE, executor="ray")
    expected = resm_kernels.merge("base", ["e0", "e1", "e2"], "here", shard_size=SIZE)
    assert report.plan_id == expected.plan_id
    shards = {name for name in local if name.endswith(".safetensors")}
    assert {name: model_files(tmp_path / "out")[name] for name in shards} == {
        name: local[name] for name in shards
    }


@pytest.mark.parametrize(
    ("machines", "device", "cpus", "expected"),
    [
        ({"a": (8, 0), "b": (8, 0)}, "cpu", None, (8, 0, {"a": 1, "b": 1})),
        ({"a": (4, 0), "b": (9, 0)}, "cpu", None, (4, 0, {"a": 1, "b": 2})),
        ({"a": (8, 0), "b": (8, 0)}, "cpu", 2, (2, 0, {"a": 4, "b": 4})),
        ({"a": (0, 0), "b": (8, 8)}, "cpu", None, (8, 0, {"b": 1})),
        ({"a": (8, 0), "b": (64, 8)}, "cuda", None, (8, 1, {"b": 8})),
        ({"a": (8, 0), "b": (64, 8)}, "all", None, (64, 8, {"b": 1})),
        ({"a": (16, 4), "b": (64, 8)}, "all", None, (16, 4, {"a": 1, "b": 2})),
        ({"a": (8, 0), "b": (64, 8)}, "auto", None, (8, 1, {"b": 8})),
        ({"a": (8, 0)}, "auto", None, (8, 0, {"a": 1})),
        ({"a": (2, 8)}, "cuda", None, (1, 1, {"a": 2})),
        ({"a": (64, 8)}, "cuda", 16, (16, 1, {"a": 4})),
    ],
)
def test_machines_are_shared(
    machines: Mapping[str, tuple[int, int]],
    device: str,
    cpus: int | None,
    expected: tuple[int, int, dict[str, int]],
) -> None:
    share = share_machines(machines, device, cpus)
    assert (share.cpus, share.gpus, dict(share.fitting)) == expected


@pytest.mark.parametrize(
    ("machines", "device", "cpus"),
    [({}, "cpu", None), ({"a": (0, 0)}, "cpu", None), ({"a": (8, 0)}, "cuda", None),
     ({"a": (8, 0)}, "all", None), ({"a": (8, 0)}, "cpu", 9), ({"a": (8, 8)}, "cuda", 9)],
)  # fmt: skip
def test_machines_without_room_are_told(
    machines: Mapping[str, tuple[int, int]], device: str, cpus: int | None
) -> None:
    with pytest.raises(ResmError, match="has room for a worker") as caught:
        share_machines(machines, device, cpus)
    assert all(str(cores) in str(caught.value) for cores, _ in machines.values())


def test_devices_by_number_are_rays_choice() -> None:
    with pytest.raises(UsageError, match="cuda:1"):
        share_machines({"a": (8, 8)}, "cuda:1", None)


@pytest.fixture
def job(family: Family, tmp_path: Path) -> Iterator[tuple[Job, Path]]:
    """What a driver would send, with a folder that it would have made."""
    made = api.plan(*family, shard_size=SIZE)
    folder = OutputFolder(tmp_path / "out", made.plan_id)
    names = frozenset(layout.name for layout in made.layouts)
    job = Job((made.recipe,), made.options, (made.identity,), (folder.path,), (names,))
    yield job, folder.path
    folder.close()


def merged_by(worker: Worker, shards: list[int]) -> list[Finished]:
    found: list[Finished] = []
    turn = worker.turn(shards, False)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found += turn.finished
        if len(found) == len(shards):
            break
        turn = worker.turn([], False)
    return found


def test_a_worker_merges_what_it_is_given(job: tuple[Job, Path], local: dict[str, bytes]) -> None:
    worker = Worker(os.getcwd(), 1)
    worker.start(job[0], 1)
    assert worker.turn([], True).hungry
    found = merged_by(worker, [5, 2])
    usage = worker.stop()
    assert {shard.index for shard in found} == {2, 5}
    names = sorted(name for name in local if name.endswith(".safetensors"))
    for shard in found:
        assert (job[1] / names[shard.index]).read_bytes() == local[names[shard.index]]
    assert sorted(p.name for p in job[1].iterdir()) == sorted([JOURNAL, names[2], names[5]])
    assert usage.stage_seconds["compute"] > 0


def test_two_workers_on_one_shard_do_not_disturb_each_other(
    job: tuple[Job, Path], local: dict[str, bytes]
) -> None:
    """As when one was given up and still writes; in two containers, names and ids may be equal."""
    first, second = Worker(os.getcwd(), 1), Worker(os.getcwd(), 1)
    first.start(job[0], 1)
    second.start(job[0], 1)
    first.turn([1], False)
    found = merged_by(second, [1])
    name = sorted(name for name in local if name.endswith(".safetensors"))[1]
    assert (job[1] / name).read_bytes() == local[name]
    first.stop()
    second.stop()
    assert (job[1] / name).read_bytes() == local[name]
    assert [shard.index for shard in found] == [1]


def test_a_shard_is_done_when_its_worker_has_all_outputs(tmp_path: Path) -> None:
    """Also where a lost worker finished one of them before: its bytes are told to the end."""
    kept: list[str] = []
    folder = SimpleNamespace(kept=kept, shard_done=lambda name, *_: kept.append(name))
    plan = SimpleNamespace(layouts=[SimpleNamespace(name="one")])
    made = object.__new__(driver._Driver)
    made._targets = [SimpleNamespace(plan=plan, folder=folder)] * 2  # type: ignore[list-item]
    made._progress = progress = Bytes()
    made._left, made._bytes = {0: {0, 1}}, Counter({0: 10})
    member = driver._Member(None, None, "again", holds={0: {0, 1}})
    turn = Turn((Finished(1, 0, "", {}, {}),), 6, "", False, ())
    made._hear(member, turn)
    assert 0 in made._left
    made._hear(member, replace(turn, finished=(Finished(0, 0, "", {}, {}),), count=4))
    assert (kept, made._left, member.holds, member.told) == (["one"], {}, {}, 0)
    assert progress.done == 10
    assert member.finished == 1


def test_a_worker_that_fails_tells_first_what_it_finished(
    job: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the driver can journal it, and warnings are heard."""
    worker = Worker(os.getcwd(), 1)
    worker.start(job[0], 1)
    original = ShardFile.finish

    def failing(self: ShardFile) -> str:
        if self.layout.name == made[1]:
            logging.getLogger("resm_kernels").warning("it went wrong")
            raise ResmError("the second shard cannot be finished")
        return original(self)

    made = sorted(job[0].lacking[0])
    monkeypatch.setattr(ShardFile, "finish", failing)
    worker._run.feed(worker._work.pop(0))
    end = time.monotonic() + 60
    while not worker._finished and time.monotonic() < end:
        time.sleep(0.01)
    worker._run.feed(worker._work.pop(1))
    assert worker._thread is not None
    worker._thread.join(60)
    turn = worker.turn([], True)
    assert [done.index for done in turn.finished] == [0]
    assert "it went wrong" in [text for _, text in turn.said]
    with pytest.raises(ResmError, match="the second shard"):
        worker.turn([], True)


def test_a_worker_that_was_given_up_spares_another_merge(job: tuple[Job, Path]) -> None:
    """Its folder was removed, and a merge of another plan begun under that name."""
    worker = Worker(os.getcwd(), 1)
    worker.start(job[0], 1)
    shutil.rmtree(job[1])
    other = OutputFolder(job[1].with_suffix(""), "another plan")
    try:
        with pytest.raises(OutputError, match="belongs to another merge"):
            merged_by(worker, [1])
        assert [path.name for path in job[1].iterdir()] == [JOURNAL]
        with pytest.raises(OutputError, match="belongs to another merge"):
            Worker(os.getcwd(), 1).start(job[0], 1)
    finally:
        other.close()


def test_a_worker_that_plans_otherwise_is_refused(job: tuple[Job, Path]) -> None:
    identity = {**job[0].identities[0], "torch": "1.0", "arithmetic": "AVX9"}
    with pytest.raises(PlanError, match="plans another merge") as caught:
        Worker(os.getcwd(), 1).start(replace(job[0], identities=(identity,)), 1)
    assert "torch 1.0" in str(caught.value)
    assert "AVX9" in str(caught.value)
    assert "scipy" not in str(caught.value)


def test_a_worker_without_the_output_says_so(job: tuple[Job, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not there on"):
        Worker(os.getcwd(), 1).start(replace(job[0], folders=(tmp_path / "other.partial",)), 1)


def test_a_worker_has_no_more_workers_than_cores(family: Family) -> None:
    made = api.plan(*family)
    (few,), _ = Worker(os.getcwd(), 1).make_plans([made.recipe], made.options, 1)
    (same,), _ = Worker(os.getcwd(), 64).make_plans([made.recipe], made.options, 1)
    assert few.workers == 1
    assert same.workers == made.workers
    assert few.plan_id == same.plan_id == made.plan_id
    (asked,), _ = Worker(os.getcwd(), 1).make_plans(
        [made.recipe], replace(made.options, workers=3), 1
    )
    assert asked.workers == 3
    (half,), _ = Worker(os.getcwd(), 64).make_plans([made.recipe], made.options, 2)
    assert half.memory_budget < 0.75 * made.memory_budget


def test_plans_and_errors_travel(family: Family) -> None:
    made = api.plan(*family, "ties", parameters={"density": 0.3})
    again = pickle.loads(pickle.dumps(made))
    assert again.plan_id == made.plan_id
    assert again.tensors[0].method is made.tensors[0].method
    assert plan_steps([again])[0].memory == plan_steps([made])[0].memory
    assert lacking_parts([], []) == []
    for error in (
        ResmError("what", got="a", expected="b", fix="c"),
        UsageError("what", fix="c"),
        RecipeError("here", ["one", "two"]),
    ):
        found = pickle.loads(pickle.dumps(error))
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_the_command_merges_on_a_cluster(
    cluster: Cluster,
    family: Family,
    local: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ["--base", str(family[0]), *(a for e in family[1] for a in ("--expert", str(e)))]
    command = ["merge", *models, "--shard-size", SIZE, "--executor", "ray", "--ray-cpus", "1"]
    assert main([*command, "--dry-run", str(tmp_path / "out")]) == 0
    assert not list(tmp_path.glob("out*"))
    assert main([*command, str(tmp_path / "out")]) == 0
    assert model_files(tmp_path / "out") == local
    assert "#1: " in capsys.readouterr().out
    assert main(["merge", *models, "--ray-cpus", "1", str(tmp_path / "other")]) == 2
    assert "add --executor ray" in capsys.readouterr().err
    assert main([*command, "--ray-cpus", "0", str(tmp_path / "other")]) == 2


def test_no_cluster_is_a_clear_error(family: Family, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(family[0]), str(tmp_path / "out"), SIZE, "x"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{free.getsockname()[1]}"
        for address in (nowhere, "ray://127.0.0.1:10001", "what?"):
            done = subprocess.run(
                command,
                env=environment | {"RAY_ADDRESS": address},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert f"no Ray cluster at '{address}'" in done.stderr
            assert "--ray-address" in done.stderr


def test_without_ray_the_command_says_what_to_install(family: Family, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['ray'] = None\n{SCRIPT}"
    command = [sys.executable, "-c", code, str(family[0]), str(tmp_path / "out"), SIZE, "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "pip install 'resm-kernels[ray]'" in done.stderr
    assert done.returncode
    for wrong in ("dask", None, LocalExecutor):
        with pytest.raises(UsageError, match=r"expected: local, ray"):
            resm_kernels.merge(*family, tmp_path / "out", executor=wrong)  # type: ignore[arg-type]
    assert isinstance(api.find_executor("local"), LocalExecutor)
    assert torch.get_num_threads() > 0


def test_a_lost_machine_is_survived(
    cluster: Cluster, family: Family, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Last here, since the others need both."""
    output = tmp_path / "out"
    second = next(iter(cluster.worker_nodes))
    when_journalled(output, 3, lambda: cluster.remove_node(second, allow_graceful=False))
    report = resm_kernels.merge(*family, output, shard_size=SIZE, executor="ray")
    assert model_files(output) == local
    assert report.cluster is not None
    assert any(worker["lost"] for worker in report.cluster["workers"])
