"""Fused weights and expert stacks: their matrices merge as if they were stored apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import resm_kernels
from resm_kernels import merge_state_dicts, merge_tensors
from resm_kernels.linalg import Solver
from tests.adapters import write_adapter
from tests.checkpoints import fine_tuned, make_state, save

CONFIG: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_local_experts": 3,
}
QKV = "model.layers.0.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"
STACK = "model.layers.0.block_sparse_moe.experts.down_proj"
SHAPES = {QKV: (32, 16), GATE_UP: (48, 16), STACK: (3, 16, 24), "model.norm.weight": (16,)}
PARTS = {
    QKV: [slice(0, 16), slice(16, 24), slice(24, 32)],
    GATE_UP: [slice(0, 24), slice(24, 48)],
    STACK: [0, 1, 2],
}
METHODS = ["resm", "tsvm", "iso_c", "iso_cts"]


def write(folder: Path) -> tuple[Path, list[Path]]:
    base = make_state(shapes=SHAPES)
    paths = [save(folder / f"e{t}", fine_tuned(base, t), config=CONFIG) for t in range(2)]
    return save(folder / "base", base, config=CONFIG), paths


def load(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_parts_merge_as_matrices_of_their_own(method: str, tmp_path: Path) -> None:
    base, experts = write(tmp_path)
    report = resm_kernels.merge(base, experts, tmp_path / "out", method)
    out, start, changed = load(tmp_path / "out"), load(base), [load(e) for e in experts]
    for name, places in PARTS.items():
        for place in places:
            alone = merge_tensors(start[name][place], [e[name][place] for e in changed], method)
            differ = (out[name][place] != alone).float().mean()
            assert differ <= (0.0 if method.startswith("iso") else 0.01), (name, place)
            assert torch.allclose(out[name][place], alone, rtol=2**-7)
    result = report.tensors[QKV]
    assert (result.rule, result.matrices) == (method, "q, k, v")
    assert report.tensors[STACK].matrices == "3 experts"
    assert len(report.tensors[STACK].weights) == 3 * 2
    memory = merge_state_dicts(start, changed, method, config=CONFIG)
    assert all(torch.equal(memory[name], out[name]) for name in out)


def test_split_can_be_turned_off(tmp_path: Path) -> None:
    base, experts = write(tmp_path)
    for name, value in (("on", True), ("off", False)):
        resm_kernels.merge(base, experts, tmp_path / name, "tsvm", parameters={"split": value})
    on, off = load(tmp_path / "on"), load(tmp_path / "off")
    whole = merge_tensors(load(base)[QKV], [load(e)[QKV] for e in experts], "tsvm")
    assert torch.equal(off[QKV], whole)
    assert not torch.equal(on[QKV], off[QKV])
    mean = merge_tensors(load(base)[STACK], [load(e)[STACK] for e in experts], "tsvm")
    assert torch.equal(off[STACK], mean)


def test_what_the_config_does_not_confirm_stays_whole_and_is_noted(tmp_path: Path) -> None:
    base, experts = write(tmp_path)
    config = {**CONFIG, "num_attention_heads": 5, "head_dim": 4}
    (base / "config.json").write_text(json.dumps(config))
    report = resm_kernels.merge(base, experts, tmp_path / "out", "tsvm")
    result = report.tensors[QKV]
    assert result.matrices is None
    assert result.notes[0].startswith("not split: ")


def test_parts_too_small_for_a_spectral_merge_get_the_mean(tmp_path: Path) -> None:
    config = {**CONFIG, "num_key_value_heads": 1, "head_dim": 1}
    shapes = {QKV: (4 + 1 + 1, 16)}
    base = make_state(shapes=shapes)
    paths = [save(tmp_path / f"e{t}", fine_tuned(base, t), config=config) for t in range(2)]
    save(tmp_path / "base", base, config=config)
    report = resm_kernels.merge(tmp_path / "base", paths, tmp_path / "out", "tsvm")
    assert report.tensors[QKV].matrices == "q, k, v"
    out, changed = load(tmp_path / "out")[QKV], [load(p)[QKV] for p in paths]
    for place in (slice(0, 4), slice(4, 5), slice(5, 6)):
        alone = merge_tensors(base[QKV][place], [e[place] for e in changed], "tsvm")
        assert torch.equal(out[place], alone)


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox"])
def test_adapters_on_fused_weights_stay_factored(model_type: str, tmp_path: Path) -> None:
    """Rows of a fused weight are rows of its B, contiguous or head by head."""
    name = QKV if model_type == "phi3" else "gpt_neox.layers.0.attention.query_key_value.weight"
    config = {**CONFIG, "model_type": model_type}
    rows = 32 if model_type == "phi3" else 48
    state = make_state(shapes={name: (rows, 16)}, dtype=torch.float32)
    base = save(tmp_path / "base", state, config=config)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    adapters, wholes = [], []
    for t in range(2):
        generator = torch.Generator().manual_seed(t)
        a, b = (torch.randn(s, generator=generator) for s in ((2, 16), (rows, 2)))
        factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        adapters.append(write_adapter(tmp_path / f"a{t}", factors))
        whole = {name: state[name].double() + 2 * b.double() @ a.double()}
        wholes.append(save(tmp_path / f"w{t}", whole, config=config))
    given: dict[str, Any] = {"method": "tsvm", "out_dtype": "float64"}
    report = resm_kernels.merge(base, adapters, tmp_path / "out", **given)
    resm_kernels.merge(base, wholes, tmp_path / "expected", **given)
    found, expected = load(tmp_path / "out")[name], load(tmp_path / "expected")[name]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert report.tensors[name].matrices == "q, k, v"
    assert report.tensors[name].backends[0] == "factored"


def test_a_sweep_shares_the_findings_of_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = write(tmp_path)
    for value in (0.5, 1.0):
        parameters = {"lambda": value}
        resm_kernels.merge(base, experts, tmp_path / f"{value:g}", "resm", parameters=parameters)
    original, calls = Solver.subspaces, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    monkeypatch.setattr(Solver, "subspaces", counted)
    resm_kernels.sweep(base, experts, tmp_path / "out", lambdas=[0.5, 1.0])
    assert calls == 1  # the queries; other parts have equals and are factored with these
    for value in ("0.5", "1"):
        alone = (tmp_path / value / "model.safetensors").read_bytes()
        assert (tmp_path / "out" / f"lambda-{value}" / "model.safetensors").read_bytes() == alone
