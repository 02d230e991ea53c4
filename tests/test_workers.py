"""How many workers, who waits for memory, and what is kept of when they were busy."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import resm_kernels
from resm_kernels import api
from resm_kernels.checkpoint.files import BLOCK
from resm_kernels.cli import main
from resm_kernels.engine import flow, matching, planning
from resm_kernels.engine.lanes import STAGING
from resm_kernels.engine.ledger import Account, Bid, Ledger
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.plan import (
    CUBLAS_SPACE,
    host_memory,
    plan_steps,
    predicted_device_peak,
    predicted_peak,
    workspace_of,
)
from resm_kernels.engine.timeline import Timeline
from resm_kernels.engine.workers import choose_workers
from resm_kernels.errors import PlanError, UsageError
from resm_kernels.linalg import dispatch
from tests.adapters import write_adapter
from tests.checkpoints import fine_tuned, make_state, save, save_family

MATRICES = [(100, 1.0)] * 8


@pytest.mark.parametrize(
    ("slots", "weights", "budget", "expected"),
    [
        (4, MATRICES, 10_000, 4),
        (4, MATRICES, 399, 3),
        (4, MATRICES, 99, 1),
        (4, MATRICES[:3], 10_000, 3),
        (0, MATRICES, 10_000, 1),
        (4, [], 10_000, 1),
        (4, [(0, 0.0)], 10_000, 1),
        # A table that alone fills the budget, with little work, slows nothing else.
        (4, [*MATRICES, (1000, 0.5)], 1000, 4),
        # Where the work lies in what the budget holds twice, two.
        (4, [*MATRICES, (500, 20.0)], 1000, 2),
    ],
)
def test_one_worker_per_slot_or_as_many_as_memory_holds(
    slots: int, weights: list[tuple[int, float]], budget: int, expected: int
) -> None:
    assert choose_workers(slots, weights, budget) == expected
    assert choose_workers(slots, weights[::-1], budget) == expected


def test_the_plan_chooses_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = save_family(tmp_path)
    monkeypatch.setattr(planning, "usable_cores", lambda: 6)
    made = resm_kernels.plan(base, experts)
    assert (made.workers, made.options.threads) == (6, 1)
    assert resm_kernels.plan(base, experts, threads=2).workers == 3
    assert resm_kernels.plan(base, experts, threads=8).workers == 1
    assert resm_kernels.plan(base, experts, threads=2, workers=5).workers == 5
    heavy = max(tensor.memory for tensor in made.tensors)
    few = resm_kernels.plan(base, experts, memory_budget=2 * heavy)
    assert few.workers == 2
    assert few.peak_memory <= 2 * heavy + BLOCK
    assert len({made.plan_id, few.plan_id}) == 1
    with pytest.raises(PlanError, match="needs more memory than allowed"):
        resm_kernels.plan(base, experts, workers=2, memory_budget=heavy - 1)


@pytest.mark.parametrize("nonfinite", ["error", "warn"])
def test_a_tensor_needs_on_the_cpu_what_was_planned_there(tmp_path: Path, nonfinite: Any) -> None:
    """Batches of equal matrices included: what a device does not hold comes back."""
    shapes = {"mlp.experts.gate_up_proj": (8, 32, 48), "up_proj.weight": (48, 32), "norm": (32,)}
    state = make_state(shapes=shapes)
    base = save(tmp_path / "base", state, config={"model_type": "mixtral", "num_local_experts": 8})
    experts = [save(tmp_path / f"e{i}", fine_tuned(state, i)) for i in (1, 2)]
    made = resm_kernels.plan(base, experts, nonfinite=nonfinite)
    assert any(tensor.split for tensor in made.tensors)
    assert [workspace_of(t, "cpu") for t in made.tensors] == [t.workspace for t in made.tensors]


def test_a_factorisation_costs_more_than_a_mean_and_factors_cost_less(tmp_path: Path) -> None:
    state = make_state(shapes={"layers.0.up_proj.weight": (96, 64), "lm_head.weight": (96, 64)})
    base, expert = save(tmp_path / "base", state), save(tmp_path / "e", fine_tuned(state, 1))
    pair = {"A": make_state(1, shapes={"x": (2, 64)}), "B": make_state(2, shapes={"x": (96, 2)})}
    prefix = "base_model.model.layers.0.up_proj"
    tensors = {f"{prefix}.lora_{f}.weight": t["x"].float() for f, t in pair.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, {"r": 2, "lora_alpha": 2})
    dense = {t.name: t.cost for t in resm_kernels.plan(base, [expert, expert]).tensors}
    factors = {t.name: t.cost for t in resm_kernels.plan(base, [adapter, adapter]).tensors}
    simple = {t.name: t.cost for t in resm_kernels.plan(base, [expert, expert], "ties").tensors}
    matrix, head = "layers.0.up_proj.weight", "lm_head.weight"
    assert dense[matrix] > factors[matrix] > simple[matrix]
    assert dense[head] == simple[head] == simple[matrix]


def test_devices_are_planned_with_a_memory_of_their_own(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    made = resm_kernels.plan(base, experts, workers=2)
    there = dataclasses.replace(made, device_memory=1 << 40)
    steps = plan_steps([made])
    assert predicted_device_peak(steps, made) == made.peak_device_memory == 0
    assert predicted_device_peak(steps, there) == host_memory(steps, made)
    assert predicted_peak(steps, there) == STAGING + BLOCK
    several = dataclasses.replace(there, devices=there.devices * 3)
    assert there.peak_device_memory <= several.peak_device_memory
    assert several.peak_memory == 3 * STAGING + BLOCK
    small = dataclasses.replace(there, device_memory=there.peak_device_memory // 2)
    assert small.peak_device_memory <= small.device_memory
    assert {"peak_device_memory_bytes", "device_memory_bytes"} <= there.to_dict().keys()


@pytest.mark.parametrize(
    ("name", "stack", "kept"),
    [
        ("torch", 1, 0),
        ("syevdx", 1, 24 * 64 * 64),
        ("syevd", 1, 24 * 64 * 64),
        ("syev_batched", 4, 24 * 64 * 64 * 4 * 2),
    ],
)
def test_the_workspace_that_solvers_keep_is_planned(
    name: str, stack: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every thread: one for a worker and one for each of its experts."""
    shape = (stack, 96, 64) if stack > 1 else (96, 64)
    state = make_state(shapes={"layers.0.mlp.experts.down_proj": shape, "norm.weight": (8,)})
    base = save(tmp_path / "base", state, config={"num_experts": stack})
    experts = [save(tmp_path / f"e{t}", fine_tuned(state, t + 1)) for t in range(2)]
    monkeypatch.setattr(dispatch, "backend", lambda problem, device: name)
    made = resm_kernels.plan(base, experts, "tsvm", workers=2)
    there = dataclasses.replace(made, device_memory=1 << 40)
    gpu = dataclasses.replace(there, devices=(torch.device("cuda"),))
    libraries = 2 * (1 + 2) * (CUBLAS_SPACE + kept)
    assert gpu.peak_device_memory == there.peak_device_memory + libraries
    simple = resm_kernels.plan(base, experts, "ties", workers=2)
    simple = dataclasses.replace(simple, device_memory=1 << 40, devices=gpu.devices)
    moved = dataclasses.replace(simple, devices=there.devices).peak_device_memory
    assert simple.peak_device_memory == moved + 2 * (1 + 2) * CUBLAS_SPACE


def test_gpu_memory_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU it changes nothing, so that one script fits every machine."""
    base, experts = save_family(tmp_path, experts=1)
    words = ["merge", "--base", str(base), "--expert", str(experts[0]), str(tmp_path / "out")]
    assert main([*words, "--dry-run", "--json", "--gpu-memory", "60GB", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["device_memory_bytes"] == 0
    assert main([*words, "--gpu-memory", "much"]) == 2
    with pytest.raises(UsageError, match="gpu_memory: got 0"):
        EngineOptions(gpu_memory=0)


# The ledger


def test_the_ledger_admits_while_there_is_room_and_one_in_any_case() -> None:
    ledger, account = Ledger(), Account(budget=100, window=3)
    bids = [Bid(account, amount, 1.0) for amount in (150, 60, 40, 1)]
    assert ledger.acquire([bids[0]]) == 0
    assert not account.fits(bids[3])
    ledger.release(bids[0])
    assert ledger.acquire([bids[1]]) == ledger.acquire([bids[2]]) == 0
    assert not account.fits(bids[3])
    ledger.release(bids[1])
    assert ledger.acquire([bids[3]]) == 0
    assert (account.used(), account.most, account.inside, account.load) == (41, 150, 2, 2.0)
    ledger.narrow(account, 2)
    assert not account.fits(bids[3])


def test_only_what_is_merged_holds_a_workspace() -> None:
    ledger, account = Ledger(), Account(budget=100, window=9, workers=2)
    bids = [Bid(account, 10, 1.0, workspace) for workspace in (20, 5, 30, 5, 30)]
    for bid in bids[:4]:
        assert ledger.acquire([bid]) == 0
    assert (account.used(), account.most) == (90, 90)
    assert account.fits(Bid(account, 10, 1.0, 20))
    assert not account.fits(Bid(account, 10, 1.0, 21))
    assert not account.fits(bids[4])
    ledger.release(bids[2])
    assert account.used() == 55
    assert ledger.acquire([bids[4]]) == 0


def test_work_goes_where_least_is_waiting() -> None:
    ledger = Ledger()
    first, second = Account(100, 9), Account(100, 9)
    taken = [
        ledger.acquire([Bid(first, 1, cost), Bid(second, 1, cost)])
        for cost in (5, 1, 1, 1, 1, 3, 1)
    ]
    assert taken == [0, 1, 1, 1, 1, 1, 0]
    assert ledger.acquire([Bid(first, 100, 1.0), Bid(second, 1, 1.0)]) == 1


def test_whoever_waits_is_woken_by_room_and_by_the_end() -> None:
    ledger, account = Ledger(), Account(100, 1)
    bid = Bid(account, 1, 1.0)
    found: list[int | None] = []

    def waiting() -> threading.Thread:
        thread = threading.Thread(target=lambda: found.append(ledger.acquire([bid])))
        thread.start()
        return thread

    assert ledger.acquire([bid]) == 0
    thread = waiting()
    ledger.release(bid)
    thread.join(10)
    assert found == [0]
    thread = waiting()
    ledger.close()
    thread.join(10)
    assert found == [0, None]


@pytest.mark.parametrize("method", ["linear", "tsvm"])
def test_nothing_outlives_its_place_in_the_ledger(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither inputs nor results, and without a search for cycles."""
    base, experts = save_family(tmp_path)
    made = resm_kernels.plan(base, experts, method, workers=2)
    held: dict[str, list[Any]] = {tensor.name: [] for tensor in made.tensors}
    read, merge, release = matching.read_tensor, flow.merge_planned, Ledger.release
    most: list[int] = []

    def reading(file: Any, info: Any, *place: Any) -> Any:
        tensor = read(file, info, *place)
        held[info.name].append(weakref.ref(tensor))
        return tensor

    def merging(plan: Any, tensor: Any, loaded: Any) -> Any:
        merged, measures = merge(plan, tensor, loaded)
        held[tensor.name].append(weakref.ref(merged.tensor))
        return merged, measures

    def releasing(ledger: Ledger, bid: Bid) -> None:
        alive = sum(any(one() is not None for one in known) for known in held.values())
        most.append(alive - bid.account.inside + 1)
        release(ledger, bid)

    monkeypatch.setattr(matching, "read_tensor", reading)
    monkeypatch.setattr(flow, "merge_planned", merging)
    monkeypatch.setattr(Ledger, "release", releasing)
    gc.disable()
    try:
        api.execute(made, tmp_path / "out")
    finally:
        gc.enable()
    assert len(most) == len(made.tensors)
    assert max(most) <= 0


def test_small_tensors_that_overtake_a_large_one_are_planned(tmp_path: Path) -> None:
    """The window's largest need not be neighbours; far ones do not meet."""
    shapes = {"a": (4000,), **{f"b{i}": (2,) for i in range(7)}, "c": (500,)}
    shapes |= {f"d{i}": (2,) for i in range(20)} | {"e": (4000,)}
    state = make_state(shapes=shapes)
    models = save(tmp_path / "base", state), [save(tmp_path / "e", fine_tuned(state, 1))]
    made = resm_kernels.plan(*models, "linear", workers=1)
    held = {tensor.name: tensor.step.held_bytes for tensor in made.tensors}
    peak = held["a"] + held["c"] + held["d0"] + max(t.workspace for t in made.tensors)
    assert host_memory(plan_steps([made]), made) == peak
    assert made.peak_memory == peak + BLOCK
    assert flow.host_lane(made, plan_steps([made])).account.budget == peak


# The timeline


def test_a_timeline_keeps_intervals_apart_and_joins_what_touches() -> None:
    line = Timeline(origin=10.0)
    for start, stop in ((10.0, 11.0), (11.0001, 12.0), (13.0, 14.0)):
        line.add("read 0", start, stop)
    line.add("compute 1", 10.5, 13.5)
    assert line.to_dict() == {"compute 1": [0.5, 3.5], "read 0": [0.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize("count", [10, 1000, 20_000])
def test_a_timeline_is_bounded_and_keeps_its_ends(count: int) -> None:
    line = Timeline(origin=0.0, limit=50)
    for i in range(count):
        for track in ("a", "b"):
            line.add(track, i, i + 0.5 + 0.4 * (i % 2))
    found = line.to_dict()
    assert sum(map(len, found.values())) <= 2 * max(50, 2 * min(count, 25))
    for edges in found.values():
        assert edges == sorted(edges)
        assert (edges[0], edges[-1]) == (0.0, count - 0.1)


def test_the_report_of_a_merge_has_its_timeline(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    report = resm_kernels.merge(base, experts, tmp_path / "out", workers=2)
    assert {name.split()[0] for name in report.timeline} == set(report.stage_seconds)
    assert {"write 0", "finish 0"} <= set(report.timeline)
    for edges in report.timeline.values():
        assert edges == sorted(edges)
        assert 0 <= edges[0] <= edges[-1] <= report.seconds + 0.001
    for stage, busy in report.stage_seconds.items():
        drawn = sum(
            sum(edges[1::2]) - sum(edges[::2])
            for name, edges in report.timeline.items()
            if name.startswith(stage)
        )
        assert busy <= drawn + 0.01
    stored = json.loads((tmp_path / "out" / "resm_report.json").read_text())
    assert stored["timeline"] == report.timeline
