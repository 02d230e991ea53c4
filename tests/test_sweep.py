"""Several outputs of one pass: the bytes of separate merges, for the reading of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import resm_kernels
from resm_kernels.checkpoint.manifest import MANIFEST
from resm_kernels.cli import main
from resm_kernels.engine import pipeline
from resm_kernels.errors import OutputError, PlanError, ResmError, UsageError
from resm_kernels.linalg import Solver
from tests.checkpoints import contents, save_family
from tests.test_merge import load

METHODS = ["resm", "tsvm", "iso_c", "iso_cts", "task_arithmetic", "linear"]
LAMBDAS = [0.5, 1.0]


def model_files(folder: Path) -> dict[str, bytes]:
    return {n: b for n, b in contents(folder).items() if not n.startswith("resm_report.")}


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    return save_family(tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_outputs_have_the_bytes_of_separate_merges(
    workers: int, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    out = tmp_path / "out"
    reports = resm_kernels.sweep(
        base, experts, out, METHODS, lambdas=LAMBDAS, workers=workers, shard_size="2KB"
    )
    names = [f"{m}-lambda-{x:g}" for m in METHODS[:-1] for x in LAMBDAS] + ["linear"]
    assert list(reports) == names
    assert {path.name for path in out.iterdir()} == set(names)
    for name in names:
        method, _, value = name.partition("-lambda-")
        parameters = {"lambda": float(value)} if value else None
        alone = tmp_path / "alone"
        resm_kernels.merge(base, experts, alone, method, parameters=parameters, shard_size="2KB")
        assert model_files(out / name) == model_files(alone)
        resm_kernels.verify(out / name)
        shutil.rmtree(alone)


def test_inputs_are_read_and_factored_once(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = family
    one = resm_kernels.merge(base, experts, tmp_path / "one", "tsvm")
    factored = 0
    original = Solver.subspaces

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal factored
        factored += 1
        return original(*arguments, **options)

    monkeypatch.setattr(Solver, "subspaces", counted)
    reports = resm_kernels.sweep(base, experts, tmp_path / "out", "tsvm", lambdas=[0.1, 0.2, 0.3])
    assert factored == one.rules["tsvm"]
    assert {report.read_bytes for report in reports.values()} == {one.read_bytes}


@pytest.mark.parametrize("moment", [1, 4, 9, 17])
def test_a_broken_sweep_resumes(
    moment: int, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = family
    settings: dict[str, Any] = {"lambdas": [0.5, 1.0], "shard_size": "600B"}
    resm_kernels.sweep(base, experts, tmp_path / "whole", "resm", **settings)
    original, left = pipeline.merge_planned, moment

    def breaking(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "merge_planned", breaking)
        with pytest.raises(KeyboardInterrupt):
            resm_kernels.sweep(base, experts, tmp_path / "out", "resm", workers=1, **settings)
    resm_kernels.sweep(base, experts, tmp_path / "out", "resm", resume=True, **settings)
    for name in ("lambda-0.5", "lambda-1"):
        assert model_files(tmp_path / "out" / name) == model_files(tmp_path / "whole" / name)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_finished_outputs_are_kept_and_checked(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = family
    out = tmp_path / "out"
    resm_kernels.sweep(base, experts, out, "tsvm", lambdas=[0.5])
    before = contents(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        resm_kernels.sweep(base, experts, out, "tsvm", lambdas=[0.5, 1.0])
    done = resm_kernels.sweep(base, experts, out, "tsvm", lambdas=[0.5, 1.0], resume=True)
    assert list(done) == ["lambda-0.5", "lambda-1"]
    assert before.items() <= contents(out).items()
    (out / "lambda-0.5" / MANIFEST).write_bytes((out / "lambda-1" / MANIFEST).read_bytes())
    with pytest.raises(ResmError):
        resm_kernels.sweep(base, experts, out, "tsvm", lambdas=[0.5, 1.0], resume=True)
    shutil.rmtree(out / "lambda-0.5")
    shutil.copytree(out / "lambda-1", out / "lambda-0.5")
    with pytest.raises(OutputError, match="holds the merge of another plan"):
        resm_kernels.sweep(base, experts, out, "tsvm", lambdas=[0.5, 1.0], resume=True)


def test_overrides_merge_tensor_by_tensor(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = family
    recipe = tmp_path / "r.yml"
    models = "".join(f"  - model: {expert}\n" for expert in experts)
    recipe.write_text(
        f"merge_method: resm\nbase_model: {base}\nmodels:\n{models}"
        "overrides:\n- {filter: mlp, merge_method: task_arithmetic, parameters: {lambda: 0.3}}\n"
        "- {filter: norm, merge_method: linear}\n"
    )
    report = resm_kernels.merge(recipe=recipe, output=tmp_path / "out")
    assert {n: r.rule for n, r in report.tensors.items() if "mlp" in n or "norm" in n} == {
        "model.layers.0.mlp.up_proj.weight": "task_arithmetic",
        "model.layers.1.mlp.up_proj.weight": "task_arithmetic",
        "model.norm.weight": "linear",
    }
    merged = load(tmp_path / "out")
    for method, name, parameters in (
        ("task_arithmetic", "model.layers.0.mlp.up_proj.weight", {"lambda": 0.3}),
        ("linear", "model.norm.weight", None),
        ("resm", "model.layers.0.self_attn.q_proj.weight", None),
    ):
        alone = resm_kernels.merge_tensors(
            load(base)[name], [load(e)[name] for e in experts], method, parameters=parameters
        )
        assert alone.equal(merged[name])


def test_the_command(
    family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = family
    given = ["--base", str(base), *(a for e in experts for a in ("--expert", str(e)))]
    out = str(tmp_path / "out")
    assert main(["sweep", *given, "--lambda", "0.5,1", "--dry-run", "--json", out]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["lambda-0.5", "lambda-1"]
    assert not (tmp_path / "out").exists()
    assert main(["sweep", *given, "--lambda", "0.5,1", "--method", "tsvm,linear", out]) == 0
    assert "linear" in capsys.readouterr().out
    assert main(["verify", f"{out}/tsvm-lambda-1"]) == 0
    for mistake, said in (
        (["--lambda", "a"], "got 'a'"),
        ([], "one output"),
        (["--lambda", "1", "--method", "tvsm"], "did you mean 'tsvm'"),
    ):
        assert main(["sweep", *given, *mistake, str(tmp_path / "other")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_refusals(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = family
    with pytest.raises(PlanError, match="for 3 outputs needs more memory"):
        resm_kernels.sweep(
            base, experts, tmp_path / "o", "tsvm", lambdas=[1, 2, 3], memory_budget=1000
        )
    with pytest.raises(UsageError, match="no output folder"):
        resm_kernels.sweep(base, experts, lambdas=[1, 2])
    with pytest.raises(OutputError, match="lies in the input folder"):
        resm_kernels.sweep(base, experts, base / "out", lambdas=[1, 2])
    assert not (base / "out").exists()
    assert not (tmp_path / "o").exists()
