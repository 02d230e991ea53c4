"""`--only`: a part of a merge has the whole's bytes, and never passes for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import resm_kernels
from resm_kernels.checkpoint.files import seal, unseal
from resm_kernels.checkpoint.journal import MANIFEST, REPORT
from resm_kernels.cli import main
from resm_kernels.engine import target
from resm_kernels.errors import PlanError, UsageError, VerificationError
from tests.checkpoints import contents, fine_tuned, make_state, save, save_family
from tests.test_merge import load

LAYER = "model.layers.1.*"
NAMES = {
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.mlp.up_proj.weight",
}


@pytest.mark.parametrize("method", ["resm", "dare_ties", "linear"])
def test_a_part_has_the_bytes_of_the_whole(method: str, tmp_path: Path) -> None:
    """Gradients, which look at all layers, and random drops, which look at names, included."""
    base, experts = save_family(tmp_path, shards=2)
    lambdas = {} if method == "linear" else {"lambda": [0.5, 1.5]}
    resm_kernels.merge(base, experts, tmp_path / "whole", method, parameters=lambdas)
    report = resm_kernels.merge(
        base, experts, tmp_path / "part", method, parameters=lambdas, only=[LAYER, "*norm*"]
    )
    whole, part = load(tmp_path / "whole"), load(tmp_path / "part")
    assert part.keys() == report.tensors.keys() == NAMES | {"model.norm.weight"}
    assert all(torch.equal(whole[name], part[name]) for name in part)
    assert report.part == {"only": [LAYER, "*norm*"], "tensors": 4, "of": 9}


def test_a_part_never_looks_like_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = save_family(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    words = ["merge", "--base", str(base), "--expert", str(experts[0]), "--only", LAYER]
    out = tmp_path / "part"
    assert main([*words, str(out), "--shard-size", "100B", "--quiet"]) == 0
    assert "of 9 tensors: no whole model" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names - {path.name for path in out.glob("part-*-of-00003.safetensors")} == {
        "part.safetensors.index.json", "README.md", "resm_manifest.json", "resm_report.json",
        "resm_report.html",
    }  # fmt: skip
    index = json.loads((out / "part.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == NAMES
    assert "**No whole model**: 3 of 9 tensors" in (out / "README.md").read_text()
    assert "library_name" not in (out / "README.md").read_text()
    assert "part of a resm merge" in (out / "resm_report.html").read_text()
    assert unseal(out / MANIFEST)["part"] == {"only": [LAYER], "tensors": 3, "of": 9}
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(out)

    assert main(["verify", str(out)]) == 0
    assert "part of a merge (3 of 9 tensors)" in capsys.readouterr().out
    assert resm_kernels.verify(out).part_of == 9
    assert main(["report", str(out)]) == 0


@pytest.mark.parametrize("part", [None, 3, [], {}, {"of": float("inf")}, {"of": "9"}, {"of": -1}])
def test_a_manifest_that_lies_about_its_part(part: object, tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    resm_kernels.merge(base, experts, tmp_path / "part", only=[LAYER])
    manifest = tmp_path / "part" / MANIFEST
    manifest.write_bytes(seal({**unseal(manifest), "part": part}))
    assert main(["verify", str(tmp_path / "part")]) == 1
    with pytest.raises(VerificationError, match="sealed, but not a manifest"):
        resm_kernels.verify(tmp_path / "part")


@pytest.mark.parametrize("role", ["base", "expert"])
def test_a_part_is_refused_as_an_input(role: str, tmp_path: Path) -> None:
    """Also where it holds every tensor, and by the file alone."""
    base, experts = save_family(tmp_path)
    resm_kernels.merge(base, experts, tmp_path / "part", only=["*"])
    part = tmp_path / "part" / "part.safetensors"
    for model in (part.parent, part):
        given = (model, experts) if role == "base" else (base, [experts[0], model])
        with pytest.raises(PlanError, match="part of a merge, made with --only"):
            resm_kernels.merge(*given, tmp_path / "out", allow_missing=True)


def test_a_pattern_that_matches_nothing_names_near_ones(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    only = [LAYER, "q_proj", "model.nrom.weight", "[", "zzz"]
    with pytest.raises(UsageError) as caught:
        resm_kernels.plan(base, experts, only=only)
    lines = str(caught.value).splitlines()
    assert LAYER not in str(caught.value)
    assert "  - 'q_proj' ('*q_proj*' matches 4)" in lines
    assert "  - 'model.nrom.weight' (did you mean 'model.norm.weight'?)" in lines
    assert "  - '['" in lines
    assert "  - 'zzz'" in lines
    with pytest.raises(UsageError) as caught:
        resm_kernels.plan(base, experts, only=[f"zzz{i}" for i in range(1000)])
    assert "  - 'zzz19'\n  - and 980 more patterns\n" in str(caught.value)


@pytest.mark.parametrize("only", [[""], [3], ["*"] * 1001])
def test_what_is_no_pattern_is_refused(only: list[str], tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    with pytest.raises(UsageError, match="only: got"):
        resm_kernels.plan(base, experts, only=only)


def test_the_plan_id_knows_the_patterns(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    plans = [resm_kernels.plan(base, experts, only=only) for only in ((), "*", LAYER, [LAYER])]
    ids = [plan.plan_id for plan in plans]
    assert len(set(ids)) == 3
    assert ids[2] == ids[3]
    assert plans[2].peak_memory <= plans[0].peak_memory
    assert plans[2].to_dict()["part"] == {"only": [LAYER], "tensors": 3, "of": 9}
    assert plans[0].to_dict()["part"] is None


def test_a_part_resumes_and_not_as_another_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_family(tmp_path)
    given = {"only": [LAYER], "shard_size": "100B"}
    resm_kernels.merge(base, experts, tmp_path / "straight", **given)

    def stop(*arguments: object, **named: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, "build_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            resm_kernels.merge(base, experts, tmp_path / "out", **given)
    for other in ({"shard_size": "100B"}, {**given, "only": ["*"]}):
        with pytest.raises(Exception, match="another plan"):
            resm_kernels.merge(base, experts, tmp_path / "out", resume=True, **other)
    report = resm_kernels.merge(base, experts, tmp_path / "out", resume=True, **given)
    assert report.kept_shards == 3
    straight, resumed = contents(tmp_path / "straight"), contents(tmp_path / "out")
    assert straight.keys() == resumed.keys()
    assert {n for n in straight if straight[n] != resumed[n]} <= {REPORT, "resm_report.html"}


def test_a_misfit_outside_the_part_is_still_one(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    expert = fine_tuned(state, 1)
    expert["model.norm.weight"] = torch.zeros(17, dtype=torch.bfloat16)
    with pytest.raises(PlanError, match=r"model\.norm\.weight: shape"):
        resm_kernels.plan(base, [save(tmp_path / "e", expert)], only=[LAYER])


def test_a_sweep_of_parts(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    reports = resm_kernels.sweep(
        base, experts, tmp_path / "out", lambdas=[0.5, 1.0], only=["*.1.mlp.*"]
    )
    for name, report in reports.items():
        assert load(tmp_path / "out" / name).keys() == report.tensors.keys()
        assert report.part == {"only": ["*.1.mlp.*"], "tensors": 1, "of": 9}
