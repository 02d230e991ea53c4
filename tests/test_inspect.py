"""`resm inspect`: statistics with known answers, and what it says when something looks wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import resm_kernels
from resm_kernels.cli import main
from resm_kernels.engine.inspection import Inspection
from tests.adapters import write_adapter
from tests.checkpoints import fine_tuned, make_state, save, save_family

UP = "model.layers.0.mlp.up_proj.weight"


def tensor(found: Inspection, name: str = UP):  # type: ignore[no-untyped-def]
    (one,) = [t for t in found.tensors if t.name == name]
    return one


def said(found: Inspection) -> str:
    return "\n".join(f"{f.severity}: {f.what} | {f.advice}" for f in found.findings)


def test_sound_experts_get_numbers_and_no_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = save_family(tmp_path)
    found = resm_kernels.inspect(base, experts)
    assert found.findings == ()
    state, tuned = make_state(), [fine_tuned(make_state(), t + 1) for t in range(3)]
    for name, weight in state.items():
        deltas = [one[name].double() - weight.double() for one in tuned]
        one = tensor(found, name)
        for change, delta in zip(one.changes, deltas, strict=True):
            assert change.relative == pytest.approx(
                float(delta.norm() / weight.double().norm()), rel=1e-3
            )
            share = float((delta != 0).double().mean())
            assert change.changed_share == pytest.approx(share, abs=1e-4)
            assert change.rank is None
        cosine = float((deltas[0] * deltas[1]).sum() / deltas[0].norm() / deltas[1].norm())
        assert one.cosines[0] == pytest.approx(cosine, rel=1e-3, abs=1e-4)
    words = ["inspect", str(base), *(w for e in experts for w in ("--expert", str(e)))]
    assert main(words) == 0
    assert "Nothing looks wrong" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 9


def test_an_expert_of_another_base(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, experts=1)
    stranger = save(tmp_path / "stranger", make_state(seed=99))
    found = resm_kernels.inspect(base, [experts[0], stranger])
    assert tensor(found).changes[1].relative == pytest.approx(math.sqrt(2), abs=0.2)
    (finding,) = found.findings
    assert finding.severity == "error"
    assert "stranger: not fine-tuned from this base" in finding.what


def test_another_architecture(tmp_path: Path) -> None:
    base, _ = save_family(tmp_path, experts=1)
    other = save(tmp_path / "other", {f"h.{i}.w": torch.ones(4, 4) for i in range(9)})
    text = said(resm_kernels.inspect(base, [other]))
    assert "only 0 of 9 tensors of the base fit it" in text
    assert "9 tensors are missing" in text
    assert "9 tensors are not in the base" in text


def test_an_unchanged_expert_a_doubled_one_and_a_frozen_layer(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    tuned = fine_tuned(state, 1)
    frozen = {n: state[n] if ".layers.1." in n else t for n, t in fine_tuned(state, 2).items()}
    experts = [
        save(tmp_path / name, content)
        for name, content in (("a", tuned), ("copy", tuned), ("same", state), ("half", frozen))
    ]
    found = resm_kernels.inspect(base, experts)
    text = said(found)
    assert f"error: {experts[2]}: equal to the base" in text
    assert f"error: {experts[0]} and {experts[1]} are the same model" in text
    assert f"{experts[3]}: 1 of 2 layers as in the base (model.layers.1)" in text
    assert len(found.findings) == 3
    assert [f.severity for f in found.findings] == ["error", "error", "note"]


def test_nearly_the_same_change(tmp_path: Path) -> None:
    state = make_state(dtype=torch.float32)
    base = save(tmp_path / "base", state)
    one = fine_tuned(state, 1)
    twice = {n: t + (t - state[n]) for n, t in one.items()}
    found = resm_kernels.inspect(
        base, [save(tmp_path / "one", one), save(tmp_path / "twice", twice)]
    )
    assert "in nearly the same way (median cosine 1.00)" in said(found)


def test_nan_shapes_dtypes_and_missing_tensors_are_named(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    bad = {n: t.float() for n, t in fine_tuned(state, 1).items()}
    bad[UP][0, 0] = math.nan
    bad["lm_head.weight"] = torch.zeros(44, 16)
    del bad["model.norm.weight"]
    found = resm_kernels.inspect(base, [save(tmp_path / "bad", bad)])
    text = said(found)
    assert tensor(found).changes == (None,)
    assert f"NaN or Inf in 1 tensors ({UP})" in text
    assert "1 tensors are missing (model.norm.weight)" in text
    assert "1 tensors do not fit (lm_head.weight (F32 [44, 16] instead of BF16 [40, 16]))" in text
    assert "stored as F32 instead of BF16" in text


def test_nan_in_the_base(tmp_path: Path) -> None:
    state = make_state()
    _, experts = save_family(tmp_path, experts=1)
    state[UP][0, 0] = math.nan
    found = resm_kernels.inspect(save(tmp_path / "holed", state), experts)
    assert f"NaN or Inf in {UP}" in said(found)


def test_a_difference_past_float32_has_no_rank(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {UP: torch.full((8, 8), 3e38)})
    expert = save(tmp_path / "expert", {UP: torch.full((8, 8), -3e38)})
    (tensor,) = resm_kernels.inspect(base, [expert], rank=True).tensors
    assert tensor.changes[0] is not None
    assert tensor.changes[0].rank is None


def test_other_vocabularies(tmp_path: Path) -> None:
    state = make_state()
    config = {"model_type": "llama", "vocab_size": 40}
    base = save(tmp_path / "base", state, config=config)
    more = fine_tuned(state, 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more[name] = torch.cat([more[name], more[name][:4]])
    expert = save(tmp_path / "more", more, config={**config, "vocab_size": 44})
    text = said(resm_kernels.inspect(base, [expert]))
    assert "44 rows, base 40" in text
    assert "tokenizer_source: union" in text


@pytest.mark.parametrize("rank", [False, True])
def test_adapters_are_experts(rank: bool, tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    generator = torch.Generator().manual_seed(3)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    pair = {
        f"{prefix}.lora_A.weight": 0.01 * torch.randn(2, 16, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(24, 2, generator=generator),
    }
    adapter = write_adapter(tmp_path / "adapter", pair)
    whole = save(tmp_path / "whole", fine_tuned(state, 5))
    found = resm_kernels.inspect(base, [adapter, whole], rank=rank)
    a, b = pair.values()
    size = float((2.0 * (b.double() @ a.double())).norm() / state[UP].double().norm())
    change = tensor(found).changes[0]
    assert change.relative == pytest.approx(size, rel=1e-3)
    assert change.rank == (2 if rank else None)
    untouched = tensor(found, "model.layers.1.mlp.up_proj.weight").changes[0]
    assert untouched.changed_share == 0.0
    (finding,) = found.findings
    assert "1 of 2 layers as in the base (model.layers.1)" in finding.what


def test_ranks_and_overlap_are_known(tmp_path: Path) -> None:
    state = make_state(dtype=torch.float64)
    base = save(tmp_path / "base", state)
    experts = []
    for t in range(2):
        delta = torch.zeros(24, 16, dtype=torch.float64)
        delta[range(5 * t, 5 * t + 5), range(5 * t, 5 * t + 5)] = 0.1
        experts.append(save(tmp_path / f"e{t}", {**state, UP: state[UP] + delta}))
    one = tensor(resm_kernels.inspect(base, experts, rank=True))
    assert [change.rank for change in one.changes] == [5, 5]
    assert one.overlaps == pytest.approx((0.0,), abs=1e-12)
    assert one.interference == pytest.approx(0.0, abs=1e-6)
    embedding = tensor(resm_kernels.inspect(base, experts, rank=True), "model.embed_tokens.weight")
    assert embedding.changes[0].rank is None


def test_the_page(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, experts=2)
    page = tmp_path / "page.html"
    words = ["inspect", str(base), "--expert", str(experts[0]), "--expert", str(experts[1])]
    assert main([*words, "--rank", "--html", str(page)]) == 0
    text = page.read_text()
    assert "2 experts of base" in text
    assert "Nothing looks wrong" in text
    for title in ("Numerical rank", "Outlier share", "Overlap of leading subspaces"):
        assert f"<h3>{title}</h3>" in text


def test_no_experts_and_unreadable_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = save_family(tmp_path, experts=1)
    assert main(["inspect", str(base), "--expert", str(tmp_path / "none")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(resm_kernels.errors.UsageError, match="no experts"):
        resm_kernels.inspect(base, [])
