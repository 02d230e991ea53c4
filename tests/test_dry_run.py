"""Dry runs: what they print, and the time that they predict from rates measured before."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import resm_kernels
from benchmarks.giants import GIANTS, mixture, write_family
from resm_kernels.api import plan_sweep
from resm_kernels.checkpoint.files import seal
from resm_kernels.cli import main
from resm_kernels.engine import rates as module
from resm_kernels.engine.forecast import forecast
from resm_kernels.engine.plan import MergePlan
from resm_kernels.engine.rates import (
    ELEMENT_WISE,
    Pace,
    Rates,
    load_rates,
    machine,
    measure_rates,
    rates_file,
    save_rates,
)
from resm_kernels.errors import OutputError, PlanError
from resm_kernels.linalg import Work
from resm_kernels.report.tables import machine_facts
from tests.adapters import write_adapter
from tests.checkpoints import SHAPES, fine_tuned, make_state, save, save_family

Family = tuple[Path, list[Path]]
MATRIX = "model.layers.0.self_attn.q_proj.weight"
BYTES = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up(**changes: Any) -> Rates:
    """Rates at which everything but what is changed takes next to no time."""
    quick = Pace(1e-18, 1e-18)
    rates = Rates(
        read=quick,
        write=quick,
        finish=quick,
        work=Work(*[1e30] * len(dataclasses.fields(Work))),
        entries=dict.fromkeys(ELEMENT_WISE, 1e30),
        tensor_seconds=1e-18,
        cores=2,
        machine=machine(),
        day="2026-01-01",
    )
    return dataclasses.replace(rates, **changes)


def planned(family: Family, method: str = "linear", **named: Any) -> MergePlan:
    return resm_kernels.plan(*family, method, **{"workers": 2, **named})


SLOW = Pace(1.0, 1e-18)
HUNGRY = Pace(1e-18, 1.0)


@pytest.mark.parametrize(
    ("changes", "wall"),
    [
        # linear reads 3 experts with 2 threads, after the first tensor of 3 x 40 x 16 x 2 bytes
        ({"read": SLOW}, 3 * BYTES / 2 + 3840),
        ({"write": SLOW}, "written"),
        ({"finish": SLOW}, "written, and the only shard once more"),
        ({"read": HUNGRY}, 3 * BYTES / 2),
        ({"write": HUNGRY}, "half"),
        ({"entries": dict.fromkeys(ELEMENT_WISE, 1.0)}, 3 * BYTES / 2 / 2),
        ({"tensor_seconds": 5.0}, 5.0 * 9),
    ],
)
def test_the_busiest_part_decides(changes: dict[str, Any], wall: Any, tmp_path: Path) -> None:
    plan = planned(save_family(tmp_path))
    written = plan.write_bytes
    if isinstance(wall, str):
        wall = {"half": written / 2, "written": written}.get(wall, 2 * written)
    found = forecast([plan], made_up(**changes))
    assert found is not None
    assert found.wall == pytest.approx(wall, rel=1e-6)


def test_factoring_takes_its_operations_over_their_rates(tmp_path: Path) -> None:
    """Only what the method merges: excluded and 1-D tensors pass over their entries."""
    plan = planned(save_family(tmp_path), "tsvm")
    factored = [tensor for tensor in plan.tensors if tensor.rule == "tsvm"]
    assert len(factored) == 4
    assert all(t.work == Work() for t in plan.tensors if t not in factored)
    rates = Work(1e3, 2e3, 3e3, 4e3, 5e3, 6e3, 7e3)
    found = forecast([plan], made_up(work=rates))
    assert found is not None
    assert found.compute == pytest.approx(sum(t.work.seconds(rates) for t in factored))
    assert found.wall == pytest.approx(found.compute / 2)
    one = forecast([planned(save_family(tmp_path / "b"), "tsvm", workers=1)], made_up(work=rates))
    assert one is not None
    assert one.wall == pytest.approx(found.compute)


def work(folder: Path, method: str, **parameters: Any) -> float:
    """Operations of all kinds for one 512 x 512 weight of three experts."""
    shapes = {MATRIX: (512, 512)}
    if not folder.exists():
        base = make_state(shapes=shapes)
        for name, state in {"base": base, "a": fine_tuned(base, 1)}.items():
            save(folder / name, state)
    models = folder / "base", [folder / "a"] * 3
    (tensor,) = resm_kernels.plan(*models, method, parameters=parameters).tensors
    return sum(dataclasses.astuple(tensor.work))


def test_methods_differ_in_their_operations(tmp_path: Path) -> None:
    amounts = {m: work(tmp_path / "m", m) for m in ("tsvm", "resm", "iso_c", "iso_cts", "ties")}
    assert amounts["tsvm"] == amounts["resm"]
    assert 0.0 == amounts["ties"] < amounts["iso_c"] < amounts["iso_cts"] < 2 * amounts["tsvm"]
    fixed = work(tmp_path / "m", "resm", rank="fixed", rank_fraction=0.5)
    assert 0.4 < fixed / amounts["resm"] < 0.9
    assert work(tmp_path / "m", "tsvm", solver="textbook") > 2 * amounts["tsvm"]
    assert work(tmp_path / "m", "resm", exclude=["*"]) == 0.0


@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c"])
def test_adapters_are_merged_in_their_core(method: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", make_state(shapes={MATRIX: (512, 512)}))
    module = f"base_model.model.{MATRIX.removesuffix('.weight')}"
    pair = {f"{module}.lora_A.weight": (2, 512), f"{module}.lora_B.weight": (512, 2)}
    factors = {name: torch.zeros(shape) for name, shape in pair.items()}
    adapters = [write_adapter(tmp_path / f"a{t}", factors) for t in range(3)]
    (tensor,) = resm_kernels.plan(base, adapters, method).tensors
    dense = work(tmp_path / "m", method)
    assert 0 < sum(dataclasses.astuple(tensor.work)) < 0.2 * dense


def test_a_fused_weight_is_the_sum_of_its_matrices(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 4}
    stack = {"model.layers.0.mlp.experts.down_proj": (4, 64, 48)}
    alone = {f"model.layers.0.mlp.experts.{i}.down_proj.weight": (64, 48) for i in range(4)}
    amounts = []
    for name, shapes in (("stack", stack), ("alone", alone)):
        base = make_state(shapes=shapes)
        folders = [save(tmp_path / name / str(t), base, config=config) for t in range(3)]
        tensors = resm_kernels.plan(folders[0], folders[1:], "tsvm").tensors
        total = Work()
        for tensor in tensors:
            total += tensor.work
        amounts.append(total)
    assert amounts[0] == amounts[1] != Work()


def test_a_sweep_shares_reading_and_factoring(tmp_path: Path) -> None:
    family = save_family(tmp_path)
    plans = [*plan_sweep(*family, "tsvm", lambdas=[0.5, 1.0, 1.5], workers=1).values()]
    rates = made_up(work=Work(*[1e3] * 7), read=SLOW)
    one, three = forecast(plans[:1], rates), forecast(plans, rates)
    assert one is not None
    assert three is not None
    assert three.read == one.read == 4 * BYTES
    assert three.compute == pytest.approx(one.compute)
    other = [*plan_sweep(*family, ["tsvm", "iso_c"], workers=1).values()]
    both, alone = forecast(other, rates), forecast(other[1:], rates)
    assert both is not None
    assert alone is not None
    assert both.compute == pytest.approx(one.compute + alone.compute)


def test_another_device_is_not_predicted(tmp_path: Path) -> None:
    devices = tuple(torch.device("cuda", i) for i in range(2))
    plan = dataclasses.replace(planned(save_family(tmp_path)), devices=devices)
    assert forecast([plan], made_up()) is None
    facts = machine_facts([plan], (1, 2), made_up())
    assert facts["time"] == "unknown on cuda:0, cuda:1: only the CPU's rates are measured"


def test_rates_are_kept(cache: Path) -> None:
    assert load_rates() is None
    rates = made_up()
    assert save_rates(rates) == rates_file() == cache / "resm-kernels" / "rates.json"
    assert load_rates() == rates


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.pop("read"),
        lambda c: c.update(read={"wall": 1.0}),
        lambda c: c.update(read=[1.0, 2.0]),
        lambda c: c["write"].update(wall="fast"),
        lambda c: c["write"].update(cpu=0.0),
        lambda c: c["work"].update(gemm_fp64=-1.0),
        lambda c: c["work"].update(gemm_fp16=1.0),
        lambda c: c["entries"].pop("ties"),
        lambda c: c["entries"].update(ties=None),
        lambda c: c.update(cores=0),
        lambda c: c.update(cores="2"),
        lambda c: c.update(cores=1.5),
        lambda c: c.update(cores=10**400),
        lambda c: c["write"].update(wall=5e-324),
        lambda c: c["entries"].update(ties=1e-300),
        lambda c: c["work"].update(gemm_fp64=1e300),
        lambda c: c.update(day="\x1b]0;owned\x07"),
        lambda c: c.update(day=["2026-01-01"]),
        lambda c: c.update(tensor_seconds=True),
        lambda c: c.update(machine="another one"),
        lambda c: c.update(more=1),
    ],
)
def test_what_is_no_rates_of_this_machine_is_none(change: Change) -> None:
    content = copy.deepcopy(made_up().to_dict())
    change(content)
    save_rates(made_up())
    rates_file().write_bytes(seal(content))
    assert load_rates() is None


def test_damaged_rates_are_none() -> None:
    raw = save_rates(made_up()).read_bytes()
    rates_file().write_bytes(raw.replace(b"2026-01-01", b"2026-01-02"))
    assert load_rates() is None


def test_a_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"DISK_BYTES": 1 << 16, "SIDE": 64, "ENTRIES": 1 << 12, "FEW": 2, "MANY": 4}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    (tmp_path / "disk").mkdir()
    rates = measure_rates(tmp_path / "disk")
    assert torch.get_num_threads() == threads
    assert not any((tmp_path / "disk").iterdir())
    assert rates.machine == machine()
    assert Rates.from_dict(json.loads(json.dumps(rates.to_dict()))) == rates
    with pytest.raises(OutputError, match="none: cannot be written"):
        measure_rates(tmp_path / "none")


def command(family: Family, output: Path, *more: str) -> list[str]:
    base, experts = family
    given = [part for expert in experts for part in ("--expert", str(expert))]
    return ["merge", "--base", str(base), *given, str(output), "--dry-run", *more]


def test_what_a_dry_run_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = save_family(tmp_path)
    words = command(family, tmp_path / "out")
    assert main(words) == 0
    assert "time         unknown: `resm doctor --measure`" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_seconds"] is None

    save_rates(made_up(tensor_seconds=20.0))
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "time about 3 min (at rates of 2026-01-01) busy read " in shown
    assert "disk 67.1 MB needed, " in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_seconds"]["wall"] == pytest.approx(180.0)
    assert found["predicted_seconds"].keys() == {"read", "compute", "write", "finish", "wall"}
    assert found["disk_bytes"] == found["write_bytes"] + (64 << 20)
    sweep = ["sweep", *words[1:], "--lambda", "0.5,1"]
    assert main([*sweep, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both.keys() - {"outputs"} < found.keys()
    assert both["predicted_seconds"]["wall"] == pytest.approx(360.0)
    assert both["write_bytes"] == 2 * found["write_bytes"] == both["disk_bytes"] - (64 << 20)
    assert both["read_bytes"] == found["read_bytes"]
    assert main(sweep) == 0
    assert "time about 6 min" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor"]) == 0
    assert "2026-01-01" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_is_refused_after_the_plan(
    form: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(command(save_family(tmp_path), tmp_path / "out", *form)) == 1
    out, err = capsys.readouterr()
    assert "not enough disk space" in err
    if form:
        assert json.loads(out)["free_disk_bytes"] == 1000
    else:
        assert "67.1 MB needed, 1 kB free" in " ".join(out.split())


def test_a_full_disk_is_no_reason_not_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted merge wrote is what fills it."""
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(command(save_family(tmp_path), tmp_path / "out", "--resume")) == 0


def test_planning_stays_below_a_millisecond_a_tensor(tmp_path: Path) -> None:
    """Processor time, base and three experts opened and matched; ten times as many, no dearer."""
    costs = []
    for count in (400, 4000):
        models = write_family(tmp_path / str(count), mixture(1, count // 3, 8, 8, 64))
        resm_kernels.plan(models[0], models[1:], only="model.norm.weight")
        start = time.process_time()
        made = resm_kernels.plan(models[0], models[1:])
        costs.append((time.process_time() - start) / len(made.tensors))
        assert abs(len(made.tensors) - count) < 20
    assert max(costs) < 1e-3
    assert costs[1] < 2 * costs[0]


def test_giants_have_their_true_sizes() -> None:
    sizes = {
        name: sum(torch.Size(shape).numel() for shape in make().shapes.values())
        for name, make in GIANTS.items()
    }
    assert sizes["llama-3-70b"] == 70_553_706_496
    assert sizes["llama-3.1-405b"] == 405_853_388_800
    assert len(GIANTS["moe-1000"]().shapes) > 40_000


def test_a_giant_is_planned_from_holes(tmp_path: Path) -> None:
    models = write_family(tmp_path / "giant", GIANTS["llama-3-70b"]())
    stored = sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*.safetensors"))
    plan = resm_kernels.plan(models[0], models[1:], memory_budget="1TB")
    assert (len(plan.tensors), len(plan.layouts)) == (723, 30)
    assert plan.read_bytes == 4 * 2 * 70_553_706_496 > 1e5 * stored
    with pytest.raises(PlanError, match="needs more memory than allowed"):
        resm_kernels.plan(models[0], models[1:], memory_budget="1GB")
