"""Adapters as experts: the merge of the models that PEFT would write, without writing them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import resm_kernels
from resm_kernels.errors import CheckpointError, NonFiniteError, PlanError
from resm_kernels.linalg import Solver
from tests.adapters import gpt2, llama, open_both, read_state, rebuilt, train, write_adapter
from tests.checkpoints import fine_tuned, save

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = ["resm", "tsvm", "iso_c", "iso_cts", "task_arithmetic", "linear"]
Family = tuple[Path, list[Path], list[Path]]


def model(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def family(folder: Path, make=llama, **options: object) -> Family:
    """A base, two adapters on it, and the whole models that they stand for, in float64."""
    adapters, wholes = [], []
    base = folder / "base"
    for t in range(2):
        found, adapter, _ = train(make(), folder / f"made{t}", t + 1, **options)
        if not t:
            found.rename(base)
        adapter.rename(folder / f"adapter{t}")
        adapters.append(folder / f"adapter{t}")
        wholes.append(save(folder / f"whole{t}", as_whole(base, adapters[-1])))
    return base, adapters, wholes


def as_whole(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The base plus an adapter's deltas, in float64, by the definition of LoRA."""
    state = {name: tensor.double() for name, tensor in model(base).items()}
    opened = open_both(base, adapter)
    state.update({name: tensor for name, (tensor, _) in rebuilt(*opened).items()})
    return state


@pytest.mark.parametrize("method", METHODS)
def test_adapters_merge_as_the_models_they_stand_for(method: str, tmp_path: Path) -> None:
    base, adapters, wholes = family(
        tmp_path, target_modules=["q_proj", "up_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    parameters = {"lambda": 0.7}
    report = resm_kernels.merge(
        base, adapters, tmp_path / "out", method, parameters=parameters, out_dtype="float64"
    )
    resm_kernels.merge(
        base, wholes, tmp_path / "expected", method, parameters=parameters, out_dtype="float64"
    )
    start, found, expected = (model(tmp_path / n) for n in ("base", "out", "expected"))
    changed = 0
    for name, tensor in expected.items():
        delta = tensor - start[name].double()
        error = torch.linalg.vector_norm(found[name] - tensor)
        rounding = 2.0**-23 * torch.linalg.vector_norm(tensor)
        assert error <= 1e-5 * torch.linalg.vector_norm(delta) + rounding, name
        changed += bool(delta.any())
    assert changed >= 6
    rules = {result.rule for result in report.tensors.values()}
    assert rules == {method, "copy"} | ({"mean"} if method in METHODS[:4] else set())


@pytest.mark.parametrize(
    ("method", "parameters", "weights"),
    [("linear", {"normalize": False}, [0.3]), ("passthrough", {"scale": 2.0}, None)],
)
def test_methods_that_scale_the_base_scale_what_an_adapter_leaves_alone(
    method: str, parameters: dict[str, object], weights: list[float] | None, tmp_path: Path
) -> None:
    base, adapters, wholes = family(tmp_path, target_modules=["q_proj"])
    for name, expert in (("out", adapters[0]), ("expected", wholes[0])):
        resm_kernels.merge(
            base, [expert], tmp_path / name, method, parameters=parameters, weights=weights
        )
    found, expected = model(tmp_path / "out"), model(tmp_path / "expected")
    assert all(torch.allclose(found[n], expected[n], rtol=1e-5, atol=1e-6) for n in expected)


def test_factors_stay_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters, _ = family(tmp_path, target_modules=["q_proj", "down_proj"])
    report = resm_kernels.merge(base, adapters, tmp_path / "out", "tsvm")
    merged = [r for r in report.tensors.values() if r.rule == "tsvm"]
    assert len(merged) == 4
    assert all(r.backends[0] == "factored" and not r.notes for r in merged)
    assert all(r.rule == "copy" for r in report.tensors.values() if r.rule != "tsvm")
    assert report.read_bytes < 2 * sum(f.stat().st_size for f in base.glob("*.safetensors"))


def test_whole_models_and_adapters_mix(tmp_path: Path) -> None:
    base, adapters, wholes = family(tmp_path, target_modules=["q_proj", "up_proj"])
    other = save(tmp_path / "other", fine_tuned(model(base), 7))
    for name, experts in (("out", [adapters[0], other]), ("expected", [wholes[0], other])):
        resm_kernels.merge(base, experts, tmp_path / name, "resm", out_dtype="float64")
    start, found, expected = (model(tmp_path / n) for n in ("base", "out", "expected"))
    for name, tensor in expected.items():
        delta = torch.linalg.vector_norm(tensor - start[name].double())
        error = torch.linalg.vector_norm(found[name] - tensor)
        assert error <= 1e-5 * delta + 2.0**-23 * torch.linalg.vector_norm(tensor), name


def test_conv1d_and_stored_orientation(tmp_path: Path) -> None:
    base, adapters, wholes = family(tmp_path, gpt2, target_modules=["c_attn", "c_proj", "c_fc"])
    for name, experts in (("out", adapters), ("expected", wholes)):
        resm_kernels.merge(base, experts, tmp_path / name, "tsvm", out_dtype="float64")
    found, expected = model(tmp_path / "out"), model(tmp_path / "expected")
    # One ulp of float32 beside: the whole weights go through a batch, the factors do not.
    assert all(torch.allclose(found[n], expected[n], rtol=2**-22, atol=1e-6) for n in expected)


def test_tied_tables_stored_twice_stay_tied(tmp_path: Path) -> None:
    state = {
        "model.embed_tokens.weight": torch.randn(40, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    config = {"vocab_size": 40, "tie_word_embeddings": True}
    base = save(tmp_path / "base", state, config=config)
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, 40),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(8, 2),
        },
    )
    resm_kernels.merge(base, [adapter], tmp_path / "out", "tsvm")
    merged = model(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], state["lm_head.weight"])


def test_tied_tables_stored_twice_must_not_come_apart(tmp_path: Path) -> None:
    embed, head = "model.embed_tokens", "lm_head"
    table, new = torch.randn(40, 8), torch.randn(40, 8)
    state = {f"{embed}.weight": table, f"{head}.weight": table.clone()}
    base = save(tmp_path / "base", state, config={"vocab_size": 40, "tie_word_embeddings": True})
    lora = {
        embed: {"lora_embedding_A": torch.randn(2, 40), "lora_embedding_B": torch.randn(8, 2)},
        head: {"lora_A.weight": torch.randn(2, 8), "lora_B.weight": torch.randn(40, 2)},
    }
    replaced = {name: {"weight": new} for name in (embed, head)}
    for t, (changes, fits) in enumerate(
        (
            ({head: replaced[head]}, False),
            ({embed: replaced[embed]}, False),
            ({embed: replaced[embed], head: {"weight": new + 1}}, False),
            ({embed: lora[embed], head: replaced[head]}, False),
            (lora, False),
            ({embed: replaced[embed], head: {"weight": new.clone()}}, True),
            ({head: {"weight": table.clone()}}, True),
            ({head: lora[head]}, True),
        )
    ):
        tensors = {
            f"base_model.model.{module}.{part}": tensor
            for module, parts in changes.items()
            for part, tensor in parts.items()
        }
        adapter, out = write_adapter(tmp_path / f"a{t}", tensors), tmp_path / f"out{t}"
        if not fits:
            with pytest.raises(PlanError, match=r"tied to lm_head\.weight in the base, but not in"):
                resm_kernels.merge(base, [adapter], out, "task_arithmetic")
            continue
        resm_kernels.merge(base, [adapter], out, "task_arithmetic")
        merged = model(out)
        assert torch.equal(merged[f"{embed}.weight"], merged[f"{head}.weight"])


def test_base_plus_adapter_as_mergekit_users_write_it(tmp_path: Path) -> None:
    base, adapters, _ = family(tmp_path, target_modules=["q_proj"])
    resm_kernels.merge(base, [f"{base}+{a}" for a in adapters], tmp_path / "plus", "tsvm")
    resm_kernels.merge(base, adapters, tmp_path / "alone", "tsvm")
    assert (tmp_path / "plus" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(CheckpointError, match="another base"):
        resm_kernels.merge(base, [f"{adapters[0]}+{adapters[1]}"], tmp_path / "o", "tsvm")


@pytest.mark.parametrize("nonfinite", ["error", "warn"])
def test_nan_in_a_factor_is_refused_by_name(nonfinite: str, tmp_path: Path) -> None:
    base, adapters, _ = family(tmp_path, target_modules=["q_proj"])
    state = read_state(adapters[1])
    name = next(n for n in state if "layers.1" in n and "lora_B" in n)
    state[name][0, 0] = math.nan
    save_file(state, adapters[1] / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=r"adapter1.*layers\.1.*1 of \d+ values"):
        resm_kernels.merge(base, adapters, tmp_path / "out", "tsvm", nonfinite=nonfinite)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_during_the_merge_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters, _ = family(tmp_path, target_modules=["q_proj"])
    original = Solver.subspaces

    def tampering(*arguments: object, **options: object) -> object:
        state = read_state(adapters[0])
        save_file({n: t + 1 for n, t in state.items()}, adapters[0] / "adapter_model.safetensors")
        return original(*arguments, **options)

    monkeypatch.setattr(Solver, "subspaces", tampering)
    with pytest.raises(CheckpointError, match="changed after the merge was planned"):
        resm_kernels.merge(base, adapters, tmp_path / "out", "tsvm")


@pytest.mark.parametrize("method", METHODS)
def test_adapters_on_different_modules(method: str, tmp_path: Path) -> None:
    """What one adapter leaves alone is a delta of rank 0, never factored as a matrix of zeros."""
    base, first, _ = train(llama(), tmp_path / "a", 1, target_modules=["q_proj", "up_proj"])
    _, second, _ = train(llama(), tmp_path / "b", 2, target_modules=["q_proj", "down_proj"])
    adapters = [first, second]
    wholes = [save(tmp_path / f"w{t}", as_whole(base, a)) for t, a in enumerate(adapters)]
    given = {"method": method, "out_dtype": "float64"}
    report = resm_kernels.merge(base, adapters, tmp_path / "out", **given)
    resm_kernels.merge(base, wholes, tmp_path / "expected", **given)
    start, found, expected = (model(p) for p in (base, tmp_path / "out", tmp_path / "expected"))
    for name, tensor in expected.items():
        delta = torch.linalg.vector_norm(tensor - start[name].double())
        error = torch.linalg.vector_norm(found[name] - tensor)
        assert error <= 1e-5 * delta + 2.0**-23 * torch.linalg.vector_norm(tensor), name
    if method in METHODS[:4]:
        result = report.tensors["model.layers.0.mlp.up_proj.weight"]
        assert result.backends[0] == "factored"
        assert not any("clamped" in note for note in result.notes)


def test_a_merge_in_the_core_is_planned_with_the_memory_of_factors(tmp_path: Path) -> None:
    """Refusals for memory must not come from the workspace of matrices that are never factored."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (4096, 2048)
    base = save(tmp_path / "base", {name: torch.zeros(shape, dtype=torch.bfloat16)})
    module = f"base_model.model.{name.removesuffix('.weight')}"
    state = {f"{module}.lora_A.weight": torch.ones(2, shape[1])}
    state |= {f"{module}.lora_B.weight": torch.ones(shape[0], 2)}
    adapters = [write_adapter(tmp_path / f"a{t}", state) for t in range(2)]
    whole = save(tmp_path / "whole", {name: torch.ones(shape, dtype=torch.bfloat16)})
    for method, share in (("tsvm", 0.7), ("iso_c", 0.7), ("resm", 0.8)):
        core = resm_kernels.plan(base, adapters, method).tensors[0].workspace
        dense = resm_kernels.plan(base, [adapters[0], whole], method).tensors[0].workspace
        assert core < share * dense, (method, core, dense)
