"""The posing devices mind what a GPU minds, and our work on them minds it too (`make posing`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import resm_kernels
from benchmarks.gpu import kernels, run
from benchmarks.gpu.suite import Suite
from resm_kernels import cli
from resm_kernels.engine.lanes import StagedLane
from resm_kernels.linalg import Solver, SolverOptions, cusolver
from resm_kernels.methods import METHODS
from tests.checkpoints import fine_tuned, make_state, save
from tests.hostile.files import write_adapter
from tests.posing import NAME, Posing, check_kernel
from tests.posing.machine import GRAIN, TOTAL, machine
from tests.test_merge import load


@contextlib.contextmanager
def raced(expected: str) -> Iterator[None]:
    """What is done inside is a race, and known as one."""
    yield
    assert any(expected in race for race in machine.races), machine.races
    machine.races.clear()


def here(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda")


def elsewhere() -> Any:
    return torch.cuda.stream(torch.cuda.Stream())


def test_tensors_are_where_they_were_asked_for() -> None:
    x = here(3, 4)
    assert isinstance(x, Posing)
    assert (x.is_cuda, x.device, x.mT.device) == (True, *[torch.device("cuda:0")] * 2)
    assert type(x.cpu()) is torch.Tensor
    with torch.cuda.device(1):
        assert torch.zeros(2, device="cuda").device == torch.device("cuda:1")
    assert torch.arange(5, device="cuda").tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.eye(3).to("cuda:1").cpu(), torch.eye(3))
    assert x[[0, 2]].tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: here(3) + torch.ones(3),
        lambda: here(3) + torch.ones(3, device="cuda:1"),
        lambda: torch.addmm(here(3, 3), here(3, 3), torch.ones(3, 3)),
        lambda: torch.cat([here(3), torch.ones(3)]),
        lambda: here(3).numpy(),
        lambda: torch.ones(3).mul_(here(3)),
        lambda: torch.tensor(1.0).add_(here(1)[0]),
        lambda: torch.sum(here(3), 0, out=torch.tensor(1.0)),
        lambda: torch.ones(3)[here(2).long()],
        lambda: here(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    ],
)
def test_operands_in_different_places_are_refused(mixed: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"same device|convert cuda"):
        mixed()


@pytest.mark.parametrize(
    "varied",
    [
        lambda x, i: x.cumsum(0),
        lambda x, i: x.scatter_add_(0, i, x.clone()),
        lambda x, i: x.index_add(0, i, x),
        lambda x, i: x.index_put_((i,), x.clone(), accumulate=True),
        lambda x, i: x.kthvalue(2),
    ],
)
def test_results_that_vary_from_run_to_run_are_refused(varied: Callable[..., object]) -> None:
    with pytest.raises(AssertionError, match="varies from run to run"):
        varied(here(4), torch.zeros(4, dtype=torch.long, device="cuda"))


def test_integers_and_lines_side_by_side_may_be_summed_along() -> None:
    assert here(3).int().cumsum(0).tolist() == [1, 2, 3]
    assert here(2, 3).cumsum(-1).tolist() == [[1.0, 2.0, 3.0]] * 2


def test_numbers_and_indices_of_the_host_are_taken() -> None:
    x = here(3)
    assert (x * torch.tensor(2.0)).tolist() == [2.0] * 3
    assert x[torch.tensor([0, 1])].tolist() == [1.0, 1.0]


def test_fresh_memory_holds_nothing_of_use() -> None:
    for fresh in (torch.empty(5, device="cuda"), torch.empty_like(here(5)), here(2).new_empty(5)):
        assert fresh.isnan().all()


def test_memory_is_counted_and_ends() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = here(1000)
    view = x[10:]
    del x
    assert torch.cuda.memory_allocated() - before == 4096 == 8 * GRAIN
    del view
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 4096
    torch.cuda.set_per_process_memory_fraction((before + 4096) / TOTAL)
    try:
        here(1000)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            here(1025)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("work", ["read", "overwrite", "overwrite what is read"])
def test_streams_that_race_are_found(work: str, ordered: bool) -> None:
    x, first = here(4), torch.cuda.current_stream()
    torch.cuda.synchronize()
    x.add_(1) if work != "overwrite what is read" else x + 1
    with elsewhere(), contextlib.nullcontext() if ordered else raced("waited for nothing"):
        if ordered:
            torch.cuda.current_stream().wait_stream(first)
        y = x + 1 if work == "read" else x.zero_()
        torch.cuda.synchronize()
    del x, y


def test_events_order_streams_and_the_host() -> None:
    x = here(4)
    done = torch.cuda.Event()
    done.record()
    with elsewhere():
        torch.cuda.current_stream().wait_event(done)
        y = x + 1
        assert y.sum().item() == 8.0  # the host waits here, so all may go on from it
    z = y + 1
    torch.cuda.synchronize()
    del x, y, z


def test_the_event_has_to_be_later_than_the_work() -> None:
    done = torch.cuda.Event()
    done.record()
    x = here(4)
    with raced("reads what"), elsewhere():
        torch.cuda.current_stream().wait_event(done)
        y = x + 1
        torch.cuda.synchronize()
    del x, y


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_is_free_too_early_is_found(recorded: bool) -> None:
    x, first = here(4), torch.cuda.current_stream()
    with elsewhere(), contextlib.nullcontext() if recorded else raced("is free while"):
        second = torch.cuda.current_stream()
        second.wait_stream(first)
        y = x + 1
        if recorded:
            x.record_stream(second)
        del x
        torch.cuda.synchronize()
    del y


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("waits", [False, True])
def test_the_host_waits_before_it_touches_a_pinned_buffer(way: str, waits: bool) -> None:
    buffer = torch.empty(8, pin_memory=True)
    x = here(8)
    with contextlib.nullcontext() if waits else raced("still copies"):
        (x if way == "in" else buffer).copy_(buffer if way == "in" else x, non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        buffer.numpy()[:] = 2.0


def test_a_copy_that_blocks_needs_no_wait() -> None:
    buffer = torch.empty(8, pin_memory=True)
    buffer.numpy()[:] = 2.0
    x = buffer.to("cuda")
    buffer.numpy()[:] = 3.0
    assert x.tolist() == [2.0] * 8
    plain = torch.full((8,), 4.0)
    x.copy_(plain, non_blocking=True)  # from memory that is not pinned it is staged first
    plain.numpy()[:] = 5.0
    assert x.tolist() == [4.0] * 8


def test_kernels_run_on_the_current_device_on_what_is_there() -> None:
    from resm_kernels.ops.mask.kernel import masked_delta

    base = torch.zeros(10, device="cuda:1")
    found = masked_delta(base, base + 1, None, weight=2.0, out_dtype=torch.float32)
    assert found.tolist() == [2.0] * 10
    with pytest.raises(RuntimeError, match="on device 0 is given cuda:1"):
        check_kernel([base])
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        check_kernel([torch.ones(3)])


def test_kernels_race_like_all_else() -> None:
    from resm_kernels.ops.consensus import weighted_sum

    experts = [here(10), here(10)]
    with raced("reads what"), elsewhere():  # experts reach the kernel as a table of addresses
        found = weighted_sum(experts, (1.0, 2.0), out_dtype=torch.float32)
        torch.cuda.synchronize()
    assert found.tolist() == [3.0] * 10
    del found


# The project's own work on posing devices


@pytest.mark.parametrize("mode", ["auto", "exact", "fast", "textbook"])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(96, 320), (320, 1100), (900, 260), (400, 400)])
def test_factoring_keeps_to_its_planned_memory(
    shape: tuple[int, int], share: float, mode: Any
) -> None:
    """Live tensors beside the deltas, which the plan counts: no library takes any here."""
    ranks = [int(share * (min(shape) // 3))] * 3
    before = torch.cuda.memory_allocated()
    deltas = [torch.randn(shape).to("cuda") for _ in range(3)]
    solver = Solver(SolverOptions(mode=mode))
    torch.cuda.reset_peak_memory_stats()
    merged = solver.merge(deltas, ranks)
    assert merged.left.is_cuda
    planned = solver.plan(shape, ranks, device="cuda").workspace
    held = torch.cuda.max_memory_allocated() - before
    assert 0.1 * planned < held <= planned


WEIGHTS = {
    "wide": ((160, 500), torch.bfloat16),
    "float64": ((150, 200), torch.float64),
    "long": ((70_000,), torch.bfloat16),
    "experts": ((6, 96, 160), torch.bfloat16),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_merges_keep_to_their_planned_memory_and_near_the_cpu(
    method: str, kind: str, tmp_path: Path
) -> None:
    shape, dtype = WEIGHTS[kind]
    name = "layers.0.mlp.experts.down_proj" + (".weight" if kind != "experts" else "")
    state = make_state(shapes={name: shape}, dtype=dtype)
    base = save(tmp_path / "base", state)
    count = METHODS[method].experts[1] or 3
    experts = [save(tmp_path / f"e{t}", fine_tuned(state, t + 1)) for t in range(count)]
    given: dict[str, Any] = {"workers": 1, "parameters": {}}
    if "density" in METHODS[method].specs:
        given["parameters"] = {"density": 0.5}
    (planned,) = resm_kernels.plan(base, experts, method, device="cuda", **given).tensors
    report = resm_kernels.merge(base, experts, tmp_path / "out", method, device="cuda", **given)
    assert report.peak_device_memory["cuda:0"] <= planned.memory + 8 * GRAIN
    resm_kernels.merge(base, experts, tmp_path / "cpu", method, **given)
    found, expected = (load(tmp_path / folder)[name].double() for folder in ("out", "cpu"))
    change = (expected - state[name].double()).norm()
    assert (found - expected).norm() <= (1e-5 if dtype == torch.float64 else 3e-2) * change


def test_what_models_bring_is_merged_on_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters, NaN, integers, several outputs, a part: as on the CPU, and the same on two."""
    monkeypatch.setattr(StagedLane.__init__, "__defaults__", (1000,))  # bytes of a piece
    state = make_state(shapes={"a.weight": (48, 32), "b.weight": (32, 48), "norm": (48,)})
    state["b.weight"][3, 5] = torch.nan
    state["steps"] = torch.arange(7)
    base = save(tmp_path / "base", state)
    pairs = {"lora_A": torch.randn(4, 32), "lora_B": torch.randn(48, 4)}
    factors = {f"base_model.model.a.{name}.weight": x for name, x in pairs.items()}
    adapter = write_adapter(tmp_path / "adapter", factors, {"r": 4, "lora_alpha": 8})
    experts = [adapter, save(tmp_path / "e", fine_tuned(state, 1))]
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for device in ("cpu", "cuda", "cuda:0,cuda:1"):
        given: dict[str, Any] = {"device": device, "nonfinite": "warn"}
        for method in ("resm", "tsvm", "ties", "iso_c"):
            folder = tmp_path / f"{device}-{method}"
            resm_kernels.merge(base, experts, folder, method, **given)
            outputs[f"{device}-{method}"] = load(folder)
        folder = tmp_path / f"{device}-sweep"
        resm_kernels.sweep(base, experts, folder, "tsvm", lambdas=[0.5, 1.0], **given)
        resm_kernels.merge(base, experts, tmp_path / f"{device}-part", only=["a.*"], **given)
        outputs[f"{device}-part"] = load(tmp_path / f"{device}-part")
    for kind in ("resm", "tsvm", "ties", "iso_c", "part"):
        one, two, cpu = (outputs[f"{d}-{kind}"] for d in ("cuda", "cuda:0,cuda:1", "cpu"))
        for name in cpu:
            assert torch.equal(one[name], two[name]) or one[name].isnan().any()
            far = (one[name].double() - cpu[name].double()).nan_to_num().norm()
            change = (cpu[name].double() - state[name].double()).nan_to_num().norm()
            assert far <= 3e-2 * change


@pytest.mark.parametrize("part", run.PARTS)
def test_the_gpu_suite_runs_as_on_a_card(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FLUSH", 1 << 16)
    suite = Suite(tmp_path, torch.device("cuda"))
    run.module(part).measure(suite, 400.0, True)
    run.module(part).print_table(suite.rows)
    rows = [row for row in suite.rows if row["part"] != "published"]
    assert {row["status"] for row in rows} == {"ok"}
    assert [row for row in rows if row["part"] in ("kernels", "layers", "end to end", "eigh")]


def test_the_doctor_knows_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count(NAME) >= 2
    assert "not yet measured on this card" in shown


def test_solvers_run_where_their_matrices_are() -> None:
    matrix = torch.eye(5, device="cuda:1") * 3
    with torch.cuda.device(1):
        assert cusolver.syevd(matrix).values.tolist() == pytest.approx([3.0] * 5)
    assert cusolver.syevdx(matrix, 2).values.device == torch.device("cuda:1")


def test_a_kernel_that_adds_into_memory_writes_it() -> None:
    @triton.jit
    def add_one(x: Any) -> None:
        tl.store(x, tl.load(x) + 1)

    counter = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with elsewhere():
        add_one[(1,)](counter)
    with raced("reads what"):
        counter + 1
        torch.cuda.synchronize()
    assert counter.item() == 1.0
