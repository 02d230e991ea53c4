"""Several outputs of one pass: the bytes of separate merges, for the reading of one."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import resm_kernels
from resm_kernels.api import plan_sweep
from resm_kernels.checkpoint.manifest import MANIFEST
from resm_kernels.cli import main
from resm_kernels.engine import flow
from resm_kernels.engine.plan import MARGIN
from resm_kernels.engine.target import Target
from resm_kernels.errors import OutputError, PlanError, RecipeError, ResmError, UsageError
from resm_kernels.linalg import Solver
from resm_kernels.recipe import build_recipe, build_recipes, parse_yaml, read_recipe
from tests.checkpoints import contents, make_state, save, save_family
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


def test_nan_in_the_base_stays_with_the_outputs_that_it_enters(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    name, state = "model.layers.0.mlp.up_proj.weight", load(base)
    state[name][0, 0] = math.nan
    save(base, state)
    resm_kernels.sweep(base, experts, tmp_path / "out", ["tsvm", "linear"], nonfinite="warn")
    for method in ("tsvm", "linear"):
        resm_kernels.merge(base, experts, tmp_path / method, method, nonfinite="warn")
        alone, swept = (
            load(folder)[name] for folder in (tmp_path / method, tmp_path / "out" / method)
        )
        assert swept.view(torch.int16).equal(alone.view(torch.int16))


def test_memory_of_masked_inputs_is_planned(tmp_path: Path) -> None:
    state = make_state(shapes={"model.layers.0.q.weight": (3072, 4096)})
    bad = {name: tensor.index_fill(0, torch.tensor(0), math.nan) for name, tensor in state.items()}
    base, expert = save(tmp_path / "base", bad), save(tmp_path / "expert", state)
    reports = resm_kernels.sweep(
        base, [expert], tmp_path / "out", "task_arithmetic", lambdas=[1, 2], nonfinite="warn"
    )
    assert all(report.peak_memory <= report.predicted_memory for report in reports.values())


@pytest.mark.parametrize("moment", [1, 4, 9, 17])
def test_a_broken_sweep_resumes(
    moment: int, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = family
    settings: dict[str, Any] = {"lambdas": [0.5, 1.0], "shard_size": "600B"}
    resm_kernels.sweep(base, experts, tmp_path / "whole", "resm", **settings)
    original, left = flow.merge_planned, moment

    def breaking(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(flow, "merge_planned", breaking)
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


def test_overrides_that_match_everything_or_nothing(
    family: tuple[Path, list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, experts = family
    content = {
        "merge_method": "tsvm",
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
        "overrides": [
            {"filter": "mpl", "merge_method": "linear"},
            {"filter": "*", "merge_method": "task_arithmetic"},
        ],
    }
    with caplog.at_level(logging.WARNING):
        made = resm_kernels.plan(recipe=build_recipe(content, "r"))
    assert set(made.rules) == {"task_arithmetic"}
    assert [r.getMessage() for r in caplog.records] == [
        "recipe: overrides: 'mpl' is part of no tensor's name (tied ones go by one name)"
    ]


def test_the_command(
    family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = family
    given = ["--base", str(base), *(a for e in experts for a in ("--expert", str(e)))]
    out = str(tmp_path / "out")
    assert main(["sweep", *given, "--lambda", "0.5,1", "--dry-run", "--json", out]) == 0
    assert list(json.loads(capsys.readouterr().out)["outputs"]) == ["lambda-0.5", "lambda-1"]
    assert main(["sweep", *given, "--lambda", "0.5,1", "--dry-run", out]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("lambda-0.5 ", "lambda-1 ", "together     2 outputs"))
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


@pytest.mark.parametrize("as_file", [True, False])
def test_lambdas_come_before_the_recipe_s_own(
    as_file: bool, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    path = tmp_path / "r.yml"
    models = "".join(f"  - model: {expert}\n" for expert in experts)
    path.write_text(f"merge_method: tsvm\nbase_model: {base}\nmodels:\n{models}")
    path.write_text(path.read_text() + "parameters: {lambda: 0.5}\n")
    recipe = path if as_file else build_recipe(read_recipe(path), str(path))
    made = plan_sweep(recipe=recipe, lambdas=[0.1234567, 0.1234568, 1])
    assert {name: plan.recipe.parameters["lambda"] for name, plan in made.items()} == {
        "lambda-0.1234567": 0.1234567,
        "lambda-0.1234568": 0.1234568,
        "lambda-1": 1.0,
    }


@pytest.mark.parametrize("lambdas", ["0.5", ["0.5"], [True], [None], torch.tensor([0.5])])
def test_lambdas_are_numbers(lambdas: Any, family: tuple[Path, list[Path]]) -> None:
    with pytest.raises(UsageError, match="expected: numbers"):
        plan_sweep(*family, "tsvm", lambdas=lambdas)
    one = plan_sweep(*family, "tsvm", lambdas=np.float32(0.5))  # type: ignore[arg-type]
    assert list(one) == ["lambda-0.5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: tsvm\noutputs: [{name: a}, {name: a.Partial}]", "got 'a.Partial'"),
        (
            "merge_method: tsvm\nparameters: 5\noutputs: [{name: a, parameters: {lambda: 1}}]",
            "got 5",
        ),
        (
            "merge_method: tsvm\noutputs: [{name: a, lambda: 3, parameters: {lambda: 2}}]",
            "lambda: stands at the top and under parameters",
        ),
    ],
)
def test_outputs_that_cannot_be(text: str, said: str) -> None:
    text += "\nbase_model: b\nmodels: [{model: a}, {model: c}]\n"
    with pytest.raises(RecipeError, match=re.escape(said)):
        build_recipes(parse_yaml(text, "recipe"), "recipe")


def test_a_sweep_of_a_recipe_without_a_method(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text("base_model: b\nmodels: [{model: a}]\n")
    with pytest.raises(RecipeError, match="merge_method: missing"):
        plan_sweep(recipe=recipe, lambdas=[1, 2])


def test_a_finished_output_is_not_called_unfinished(
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = Target.finish

    def breaking(target: Any, *arguments: Any) -> None:
        if target.folder.output.name == "lambda-1":
            raise KeyboardInterrupt
        original(target, *arguments)

    monkeypatch.setattr(Target, "finish", breaking)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        resm_kernels.sweep(*family, tmp_path / "out", "tsvm", lambdas=[0.5, 1.0])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"lambda-0.5", "lambda-1.partial"}
    (message,) = [r.getMessage() for r in caplog.records if "resume to go on" in r.getMessage()]
    assert "lambda-1.partial" in message


def test_a_dry_run_refuses_no_more_than_the_sweep(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    (tmp_path / "out.partial").mkdir()
    words = ["sweep", "--base", str(base), "--lambda", "0.5,1", str(tmp_path / "out")]
    words += [word for expert in experts for word in ("--expert", str(expert))]
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0


@pytest.mark.parametrize("resume", [True, False])
def test_all_outputs_must_fit_the_disk(
    resume: bool, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = resm_kernels.plan(*family, "tsvm").write_bytes
    free = SimpleNamespace(free=MARGIN + 2 * size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(PlanError, match="not enough disk space"):
        resm_kernels.sweep(*family, tmp_path / "o", "tsvm", lambdas=[0.5, 1.0], resume=resume)
    assert not (tmp_path / "o").exists()


def test_refusals(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = family
    with pytest.raises(PlanError, match="for 3 outputs needs more memory"):
        resm_kernels.sweep(
            base, experts, tmp_path / "o", "tsvm", lambdas=[1, 2, 3], memory_budget=1000
        )
    with pytest.raises(UsageError, match="no output folder"):
        resm_kernels.sweep(base, experts, lambdas=[1, 2])
    for call in (
        lambda: resm_kernels.sweep(base, str(experts[0]), tmp_path / "o", lambdas=[1, 2]),
        lambda: resm_kernels.inspect(base, str(experts[0])),
    ):
        with pytest.raises(UsageError, match=r"^(sweep|inspect): experts is one path"):
            call()
    with pytest.raises(OutputError, match="lies in the input folder"):
        resm_kernels.sweep(base, experts, base / "out", lambdas=[1, 2])
    assert not (base / "out").exists()
    assert not (tmp_path / "o").exists()
