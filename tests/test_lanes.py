"""Devices' lanes: the same bytes from any of them, in bounded memory, whatever runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import resm_kernels
from resm_kernels import api
from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.files import unseal
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.reader import open_checkpoint, read_tensor
from resm_kernels.engine import devices, flow, lanes, matching, planning
from resm_kernels.engine.lanes import CudaLane, StagedLane
from resm_kernels.engine.plan import plan_steps
from resm_kernels.engine.result import MergeReport
from resm_kernels.errors import CheckpointError, PlanError, UsageError
from resm_kernels.linalg import cusolver, dispatch, solver
from resm_kernels.methods import out_of_memory as ran_out
from tests.checkpoints import contents, fine_tuned, make_state, save, save_family
from tests.faults import threads
from tests.hostile.files import write_adapter
from tests.lanes import PIECE, PosingLane, merge_on, out_of_memory

SHAPES = {
    "embed_tokens.weight": (50, 64),
    **{f"layers.{i}.up_proj.weight": (96, 64) for i in range(6)},
    "norm.weight": (64,),
    "scale": (),
    "none.weight": (0, 4),
    "conv.weight": (4, 3, 5),
}
WINDOW = 1 + lanes.PREFETCH
MATRIX = "layers.2.up_proj.weight"
REPORTS = ("resm_report.json", "resm_report.html")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Floats and integers, one expert as a strided `.bin`."""
    folder = tmp_path_factory.mktemp("family")
    state = make_state(shapes=SHAPES) | {"steps": torch.arange(700)}
    experts = [save(folder / f"e{t}", fine_tuned(state, t + 1), shards=1 + t) for t in range(2)]
    last = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in fine_tuned(state, 3).items()}
    experts.append(folder / "e2")
    experts[-1].mkdir()
    torch.save(last, experts[-1] / "pytorch_model.bin")
    (experts[-1] / "config.json").write_text("{}")
    return save(folder / "base", state, shards=2), experts


def model_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in REPORTS}


@pytest.fixture(scope="module")
def whole(
    family: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the CPU makes of the family."""
    output = tmp_path_factory.mktemp("whole") / "out"
    resm_kernels.merge(*family, output, shard_size="40KB")
    return model_files(output)


def one_lane(**options: Any) -> list[PosingLane]:
    return [PosingLane("posing:0", **options)]


@pytest.mark.parametrize("method", ["resm", "tsvm", "iso_c", "ties", "linear", "dare_linear"])
def test_any_number_of_devices_gives_the_bytes_of_the_cpu(
    method: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    resm_kernels.merge(*family, tmp_path / "cpu", method, shard_size="40KB")
    expected = model_files(tmp_path / "cpu")
    for count, workers in ((1, 1), (1, 3), (3, 2)):
        posing = [PosingLane(f"posing:{i}", workers=workers) for i in range(count)]
        output = tmp_path / f"{count}-{workers}"
        report = merge_on(posing, *family, output, method, shard_size="40KB")
        assert model_files(output) == expected
        assert all(lane.attempts for lane in posing)
        assert not report.all_notes
        assert set(report.peak_device_memory) == {lane.name for lane in posing}
        resm_kernels.verify(output)
    assert not threads()


def test_a_part_of_a_merge_has_its_bytes_on_devices(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    resm_kernels.merge(*family, tmp_path / "cpu", "tsvm", only=["layers.2.*", "norm.*"])
    report = merge_on(one_lane(), *family, tmp_path / "out", "tsvm", only=["layers.2.*", "norm.*"])
    assert model_files(tmp_path / "out") == model_files(tmp_path / "cpu")
    assert not (tmp_path / "out" / "config.json").exists()
    assert report.part is not None
    assert report.part["tensors"] == 2


def test_adapters_and_broken_values_reach_devices(tmp_path: Path) -> None:
    """Factors, vocabulary order and masks: what has been read is worked on where it lies."""
    state = make_state(shapes={"a.weight": (24, 16), "b.weight": (16, 24)})
    state["b.weight"][3, 5] = torch.nan
    base = save(tmp_path / "base", state)
    pairs = {"a": {"A": torch.randn(4, 16), "B": torch.randn(24, 4)}}
    tensors = {
        f"base_model.model.{m}.lora_{f}.weight": t for m, p in pairs.items() for f, t in p.items()
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, {"r": 4, "lora_alpha": 8})
    experts = [adapter, save(tmp_path / "e", fine_tuned(state, 1))]
    for method in ("tsvm", "ties"):
        resm_kernels.merge(base, experts, tmp_path / method, method, nonfinite="warn")
        output = tmp_path / f"{method}-lane"
        merge_on(one_lane(), base, experts, output, method, nonfinite="warn")
        assert model_files(output) == model_files(tmp_path / method)


def test_devices_share_work_while_inputs_are_read_in_order(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first device is done with nothing until the other has merged all the rest."""
    order: list[str] = []
    original = matching.read_tensor
    one_reader = threading.Lock()

    def noted(file: Any, info: Any, place: Any) -> torch.Tensor:
        with one_reader:
            order.append(info.name)
        return original(file, info, place)

    monkeypatch.setattr(matching, "read_tensor", noted)
    monkeypatch.setattr(flow, "READERS_TO_DEVICES", 1)
    rest = threading.Event()
    slow = PosingLane("posing:0", workers=1, act=lambda lane: rest.wait(20) and None)
    fast = PosingLane("posing:1", workers=1)
    fast._act = lambda lane: rest.set() if fast.attempts == len(SHAPES) - WINDOW else None
    posing = [slow, fast]
    made = resm_kernels.plan(*family)
    merge_on(posing, *family, tmp_path / "out")
    assert list(dict.fromkeys(order)) == [tensor.name for tensor in made.tensors]
    assert rest.is_set()
    assert slow.attempts == WINDOW
    assert fast.attempts == len(SHAPES) - WINDOW


def test_memory_of_a_device_is_bounded_and_what_it_cannot_hold_stays_on_the_host(
    family: tuple[Path, list[Path]], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    steps = plan_steps([resm_kernels.plan(*family)])
    matrix = next(step for step in steps if step.tensors[0].name == MATRIX)
    for budget, expected in ((2 * matrix.memory, 11), (matrix.memory - 1, 5)):
        lane = PosingLane("posing:0", workers=4, budget=budget)
        output = tmp_path / str(budget)
        report = merge_on([lane], *family, output, device_memory=budget, shard_size="40KB")
        assert model_files(output) == whole
        assert lane.attempts == expected
        left = {name for name in SHAPES if name.startswith("layers")} if expected == 5 else set()
        note = "needs more memory than a device has: merged on the CPU"
        assert report.all_notes == dict.fromkeys(left, (note,))
        assert 0 < report.peak_device_memory["posing:0"] <= budget
        assert 0 < report.predicted_device_memory <= budget


def test_what_neither_a_device_nor_the_host_can_hold_is_refused(
    family: tuple[Path, list[Path]],
) -> None:
    made = resm_kernels.plan(*family)
    matrix = next(tensor for tensor in made.tensors if tensor.name == MATRIX)
    budget = lanes.STAGING + matrix.memory - 1
    small = dataclasses.replace(made, device_memory=1, memory_budget=budget)
    with pytest.raises(PlanError, match=r"layers.*needs more memory than allowed"):
        plan_steps([small])
    plan_steps([dataclasses.replace(small, device_memory=matrix.memory)])
    plan_steps([dataclasses.replace(small, memory_budget=budget + 1)])
    with pytest.raises(PlanError, match="the buffers of 1 devices need more memory than allowed"):
        plan_steps([dataclasses.replace(small, memory_budget=lanes.STAGING)])


Fails = Callable[[PosingLane, Any], bool]


def merge_short(
    family: tuple[Path, list[Path]],
    output: Path,
    lane: PosingLane,
    fails: Callable[[Any, Any], bool],
    **options: Any,
) -> MergeReport:
    """Merge on a lane that runs out of memory wherever `fails(tensor, loaded)` on it."""
    original = flow.merge_planned
    turn = threading.Lock()

    def short(made: Any, tensor: Any, loaded: Any) -> Any:
        on_lane = threading.current_thread().name.startswith(f"resm-compute {lane.name}")
        with turn:
            failing = on_lane and fails(tensor, loaded)
        return out_of_memory() if failing else original(made, tensor, loaded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "merge_planned", short)
        return merge_on([lane], *family, output, shard_size="40KB", **options)


def test_experts_are_factored_one_by_one_when_memory_runs_out(
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    whole: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lane = PosingLane("posing:0")
    with caplog.at_level(logging.WARNING):
        report = merge_short(
            family,
            tmp_path / "out",
            lane,
            lambda t, loaded: t.name == MATRIX and not loaded.sparing,
        )
    note = "posing:0 ran out of memory: experts factored one by one"
    assert report.all_notes == {MATRIX: (note,)}
    assert f"tensor {MATRIX!r}: {note}" in caplog.text
    assert model_files(tmp_path / "out") == whole
    assert lane.trims == 1
    stored = unseal(tmp_path / "out" / "resm_report.json")["tensors"][MATRIX]
    assert stored["memory_notes"] == [note]


def test_fewer_workers_go_on_when_memory_runs_out(
    family: tuple[Path, list[Path]], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Until a matrix has the device for itself."""
    lane = PosingLane("posing:0", workers=4)
    alone = []

    def crowded(tensor: Any, loaded: Any) -> bool:
        if tensor.name != MATRIX:
            return False
        alone.append(lane.together == 1 and lane._limit == 1)
        return not alone[-1]

    report = merge_short(family, tmp_path / "out", lane, crowded)
    assert report.all_notes == {
        MATRIX: tuple(
            f"posing:0 ran out of memory: {what}"
            for what in (
                "experts factored one by one",
                "2 of its workers from here",
                "1 of its workers from here",
            )
        )
    }
    assert alone == [False, False, False, True]
    assert lane.account.window == 1 + lanes.PREFETCH
    assert model_files(tmp_path / "out") == whole


@pytest.mark.parametrize("fails", [{MATRIX}, {*SHAPES}])
@pytest.mark.parametrize("where", ["read", "merge"])
def test_what_a_device_cannot_hold_at_all_is_merged_on_the_cpu(
    where: str,
    fails: set[str],
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lane = PosingLane("posing:0")
    done: list[int] = []
    progress = SimpleNamespace(
        start=done.append, advance=lambda count, name: done.append(-count), stop=lambda: None
    )
    monkeypatch.setattr(
        api, "execute", lambda *given, **options: EXECUTE(*given, progress=progress, **options)
    )
    if where == "read":
        original = matching.read_tensor

        def short(file: Any, info: Any, place: Any) -> torch.Tensor:
            return (
                out_of_memory()
                if info.name in fails and place is lane
                else original(file, info, place)
            )

        monkeypatch.setattr(matching, "read_tensor", short)
        report = merge_on([lane], *family, tmp_path / "out", shard_size="40KB")
    else:
        report = merge_short(family, tmp_path / "out", lane, lambda t, loaded: t.name in fails)
    assert set(report.all_notes) == fails
    assert all(notes[-1].endswith("merged on the CPU") for notes in report.all_notes.values())
    assert model_files(tmp_path / "out") == whole
    assert lane.trims >= len(fails)
    assert sum(done) == 0
    assert lane.account.used() == lane.account.inside == 0


EXECUTE = api.execute


def test_of_several_outputs_only_those_left_are_merged_on_the_cpu(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resm_kernels.sweep(*family, tmp_path / "cpu", "tsvm", lambdas=[0.5, 1.0, 2.0])
    lane = PosingLane("posing:0", workers=1)
    original, merged = flow.merge_planned, list[tuple[str, float, bool]]()

    def short(made: Any, tensor: Any, loaded: Any) -> Any:
        there = "posing" in threading.current_thread().name
        if there and tensor.name == MATRIX and tensor.options.lambda_ == 1.0:
            out_of_memory()
        merged.append((tensor.name, tensor.options.lambda_, there))
        return original(made, tensor, loaded)

    monkeypatch.setattr(flow, "merge_planned", short)
    monkeypatch.setattr(flow, "device_lanes", lambda made: [lane])
    made = api.plan_sweep(*family, "tsvm", lambdas=[0.5, 1.0, 2.0])
    made = {name: dataclasses.replace(one, device_memory=1 << 40) for name, one in made.items()}
    reports = api.execute_sweep(made, tmp_path / "out")
    assert [m for m in merged if m[0] == MATRIX] == [
        (MATRIX, 0.5, True), (MATRIX, 1.0, False), (MATRIX, 2.0, False),
    ]  # fmt: skip
    for name, report in reports.items():
        assert model_files(tmp_path / "out" / name) == model_files(tmp_path / "cpu" / name)
        assert bool(report.all_notes) == (name != "lambda-0.5")


@pytest.mark.parametrize("failure", [ValueError("x"), RuntimeError("other"), KeyboardInterrupt()])
def test_other_failures_end_the_merge(
    failure: BaseException,
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the CPU resumes what devices began."""
    original, left = flow.merge_planned, 7

    def failing(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise failure
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(flow, "merge_planned", failing)
        posing = [PosingLane(f"posing:{i}") for i in range(2)]
        with pytest.raises(type(failure)):
            merge_on(posing, *family, tmp_path / "out", shard_size="8KB")
    assert not threads()
    resm_kernels.merge(*family, tmp_path / "whole", shard_size="8KB")
    resm_kernels.merge(*family, tmp_path / "out", shard_size="8KB", resume=True)
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


def test_what_counts_as_running_out_of_memory() -> None:
    cause = RuntimeError("CUSOLVER_STATUS_ALLOC_FAILED")
    outer = ValueError("outer")
    outer.__cause__ = cause
    found = [MemoryError(), torch.OutOfMemoryError("x"), cause, outer]
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "cusolverDnCreate: CUSOLVER_STATUS_NOT_INITIALIZED",
    ):
        found.append(RuntimeError(text))
    assert all(map(ran_out, found))
    others = [
        "illegal address",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasDgemm(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd(handle)`",
        "cusolverDnCreate: CUSOLVER_STATUS_ARCH_MISMATCH",
    ]
    assert not any(map(ran_out, [None, ValueError("alloc"), *map(RuntimeError, others)]))


# Reading and writing through buffers


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_and_goes_in_pieces(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name].torch
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (37, 11 * dtype.itemsize), dtype=torch.uint8, generator=generator)
    base = save(tmp_path / "base", {"x": raw.view(dtype)})
    checkpoint = open_checkpoint(ModelReference(str(base)))
    for piece in (1, 7, PIECE, 1 << 20):
        lane = StagedLane("posing:0", torch.device("cpu"), 1, 1 << 30, piece)
        found = read_tensor(checkpoint.files[0], checkpoint.tensors["x"], lane)
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), raw)
        pieces = [bytes(part) for part in lane.pieces(found, None)]
        assert b"".join(pieces) == raw.numpy().tobytes()
        assert max(map(len, pieces)) <= piece
        across = [bytes(part) for part in lane.pieces(found.T, None)]
        assert b"".join(across) == found.T.contiguous().view(torch.uint8).numpy().tobytes()


def test_buffers_survive_a_failing_read(tmp_path: Path) -> None:
    base, _ = save_family(tmp_path, experts=0)
    lane = PosingLane("posing:0")
    checkpoint = open_checkpoint(ModelReference(str(base)))
    name = "model.embed_tokens.weight"
    (base / "model.safetensors").write_bytes(b"")
    for _ in range(2 * lanes.BUFFERS_IN):
        with pytest.raises(CheckpointError, match="changed after the merge was planned"):
            read_tensor(checkpoint.files[0], checkpoint.tensors[name], lane)

    def broken(view: memoryview, start: int) -> None:
        raise CheckpointError("broken")

    for _ in range(2 * lanes.BUFFERS_IN):
        with pytest.raises(CheckpointError, match="broken"):
            lane.fill(torch.empty(10, dtype=torch.uint8), broken)


# The names of devices


def with_devices(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(kinds))
    monkeypatch.setattr(dispatch, "card", lambda device: kinds[device.index])
    monkeypatch.setattr(planning, "architecture", lambda device: "sm_90")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cpu", ["cpu"]),
        ("auto", ["cuda:0"]),
        ("cuda", ["cuda:0"]),
        ("cuda:1", ["cuda:1"]),
        ("all", ["cuda:0", "cuda:1"]),
        ("cuda:1, cuda:0", ["cuda:1", "cuda:0"]),
    ],
)
def test_names_of_devices(name: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, "H100", "H100")
    assert [str(device) for device in devices.find_devices(name)] == found


@pytest.mark.parametrize(
    ("name", "kinds", "error"),
    [
        ("all", (), "no CUDA devices"),
        ("cuda:0,cuda:2", ("H100", "H100"), "cuda:2 is not there"),
        ("cuda:0,cuda:0", ("H100",), "each once"),
        ("cuda,cuda:0", ("H100",), "each once"),
        ("cpu,cuda:0", ("H100",), "each once"),
        ("cuda:0,", ("H100",), "device: got ''"),
        ("cuda:0;cuda:1", ("H100", "H100"), "device: got 'cuda:0;cuda:1'"),
        ("all", ("H100", "A100"), "not of one kind"),
        ("mps", (), "device: got 'mps'"),
    ],
)
def test_devices_that_cannot_be_meant(
    name: str, kinds: tuple[str, ...], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, *kinds)
    with pytest.raises(UsageError, match=error):
        devices.find_devices(name)


def test_a_device_that_cannot_be_used_is_one_error(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("CUDA error: device is busy")

    with_devices(monkeypatch, "H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(PlanError, match="cuda:0 cannot be used: CUDA error: device is busy"):
        resm_kernels.plan(*family, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    made = resm_kernels.plan(*family, device="cuda", memory_budget="8GB")
    assert (made.device_memory, made.workers) == (850_000_000, 2)
    assert resm_kernels.plan(*family, device="cuda", gpu_memory="1GB").device_memory == 10**9
    monkeypatch.setattr(flow, "CudaLane", broken)
    with pytest.raises(PlanError, match="cuda:0 cannot be used: CUDA error: device is busy"):
        api.execute(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The CUDA lane, with streams that only keep a record


class Stream:
    """A stream that knows which events it waited for."""

    def __init__(self, device: object = None) -> None:
        self.waited: list[Event] = []
        self.cuda_stream = id(self)

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def wait_stream(self, other: Stream) -> None:
        """Their order is not looked at."""


class Event:
    """An event that knows where it was recorded."""

    def record(self) -> None:
        self.stream = CURRENT.stream

    def synchronize(self) -> None:
        self.waited = True


CURRENT = threading.local()


@contextlib.contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    before, CURRENT.stream = getattr(CURRENT, "stream", None), chosen
    yield
    CURRENT.stream = before


def test_the_cuda_lane_orders_its_streams(
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reads on one, merges on one per worker after what was read, results on one after those."""
    used: dict[str, set[Any]] = {"empty": set(), "merge": set(), "copied out": set(), "set": set()}
    freed: list[str] = []
    monkeypatch.setattr(cusolver, "release", lambda: freed.append(threading.current_thread().name))
    for name, fake in {
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 1100,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "set_device": lambda device: used["set"].add((threading.get_ident(), device)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    kept: list[tuple[torch.Tensor, Stream]] = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, s: kept.append((tensor, s)), raising=False
    )
    original, empty = flow.merge_planned, CudaLane.empty
    leaving = CudaLane._leaving

    def merging(made: Any, tensor: Any, loaded: Any) -> Any:
        if "cuda" in threading.current_thread().name:
            used["merge"].add(CURRENT.stream)
            (ready,) = CURRENT.stream.waited[-1:]
            assert ready.stream is lane._stream_in
            if tensor.name == MATRIX and not loaded.sparing:
                out_of_memory()
        return original(made, tensor, loaded)

    def allocating(self: CudaLane, nbytes: int) -> torch.Tensor:
        used["empty"].add(CURRENT.stream)
        return empty(self, nbytes)

    @contextlib.contextmanager
    def outward(self: CudaLane, done: Event) -> Iterator[None]:
        with leaving(self, done):
            used["copied out"].add(CURRENT.stream)
            assert done.stream in used["merge"]
            assert CURRENT.stream.waited[-1] is done
            yield

    monkeypatch.setattr(flow, "merge_planned", merging)
    monkeypatch.setattr(CudaLane, "empty", allocating)
    monkeypatch.setattr(CudaLane, "_leaving", outward)
    lane = CudaLane("cuda:0", torch.device("cpu"), 2, 1 << 40)
    report = merge_on([lane], *family, tmp_path / "out", shard_size="40KB")  # type: ignore[list-item]
    assert model_files(tmp_path / "out") == whole
    assert used["empty"] == {lane._stream_in}
    assert used["copied out"] == {lane._stream_out}
    assert 1 <= len(used["merge"]) <= 2
    assert not used["merge"] & {lane._stream_in, lane._stream_out}
    assert {s for _, s in kept} == used["merge"]
    assert report.peak_device_memory == {"cuda:0": 1000}
    assert list(report.all_notes) == [MATRIX]
    # Only the run's own threads are moved to the device; workspace goes when memory runs out, and
    # at the end.
    assert {device for _, device in used["set"]} == {lane.device}
    assert threading.get_ident() not in {thread for thread, _ in used["set"]}
    assert "compute" in freed[0]
    assert freed[1:] == [threading.current_thread().name]


@pytest.fixture
def fake_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, fake in {
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device: CURRENT.stream,
        "set_device": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    solver._lanes.cache_clear()
    yield
    solver._lanes.cache_clear()


@pytest.mark.usefixtures("fake_streams")
def test_each_expert_has_a_thread_and_a_stream_that_stay_with_the_worker() -> None:
    met: list[tuple[int, Stream]] = []
    both = threading.Barrier(2, timeout=30)

    def factor(make: Callable[[], Any], rank: int) -> Any:
        both.wait()
        met.append((threading.get_ident(), CURRENT.stream))
        return SimpleNamespace(left=make(), values=make(), right=make())

    given = [lambda: torch.ones(2)] * 2, [1, 1], torch.device("cpu")
    workers = [Stream(), Stream()]
    for worker in (*workers, workers[0]):
        with stream(worker):
            solver._on_streams(factor, *given)
    first, second, again = ({*met[i : i + 2]} for i in (0, 2, 4))
    assert first == again
    assert len({thread for thread, _ in first | second}) == 4
    assert len({lane for _, lane in first | second}) == 4


@pytest.mark.usefixtures("fake_streams")
def test_an_expert_that_ran_out_of_memory_leaves_none_behind() -> None:
    """Without a search for cycles: the ladder goes on at once, in the memory it gave back."""
    held: list[weakref.ref[torch.Tensor]] = []

    def factor(make: Callable[[], Any], rank: int) -> Any:
        delta = make()
        held.append(weakref.ref(delta))
        out_of_memory()

    gc.disable()
    try:
        with stream(Stream()), pytest.raises(torch.OutOfMemoryError) as caught:
            solver._on_streams(factor, [lambda: torch.ones(2)] * 3, [1] * 3, torch.device("cpu"))
        del caught
        assert len(held) == 3
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
