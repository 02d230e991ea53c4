"""`tokenizer_source` from recipe to output: the recorded tables of mergekit, files that load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import resm_kernels
from resm_kernels.errors import CheckpointError, NonFiniteError, PlanError
from tests.adapters import write_adapter
from tests.mergekit.vocabulary import MODELS, RECIPES, TABLE, write_inputs

RECORDED = Path(__file__).parent / "mergekit" / "vocabulary.safetensors"
HEAD = "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(folder: str | Path, name: str = TABLE) -> torch.Tensor:
    return load_file(Path(folder) / "model.safetensors")[name]


def write_recipe(recipe: dict[str, Any], **changes: Any) -> str:
    Path("recipe.yml").write_text(yaml.safe_dump({**recipe, **changes}))
    return "recipe.yml"


@pytest.mark.parametrize("name", RECIPES)
def test_the_engine_writes_mergekit_s_tables(name: str, models: Path) -> None:
    """To the bit but for means of experts, which we round to the dtype of their table."""
    report = resm_kernels.merge(recipe=write_recipe(RECIPES[name]), output="out")
    with safe_open(RECORDED, "pt") as file:
        theirs, facts = file.get_tensor(name), json.loads(file.metadata()[name])
    ours = merged("out")
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == len(ours)
    assert report.tensors[TABLE].shape == tuple(ours.shape) == tuple(merged("out", HEAD).shape)
    steps = (ours[: len(theirs)].view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    assert int((steps.amax(1) > 0).sum()) <= 2
    tokenizer = PreTrainedTokenizerFast.from_pretrained("out")
    assert tokenizer.get_vocab() == facts["ids"]
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.get_input_embeddings().num_embeddings == len(ours)
    resm_kernels.verify("out")


@pytest.mark.parametrize("method", ["resm", "tsvm", "linear"])
def test_a_model_named_as_the_source_or_union_by_any_method(method: str, models: Path) -> None:
    for source, rows in (("union", 20), ("b", 24), ("base", 16)):
        recipe = {
            "merge_method": method,
            "base_model": "base",
            "models": [{"model": m, "parameters": {"weight": 1}} for m in "abc"],
            "tokenizer_source": source,
        }
        resm_kernels.merge(recipe=write_recipe(recipe), output=f"out-{source}")
        assert len(merged(f"out-{source}")) == rows
        assert merged(f"out-{source}", QUERY).equal(merged("out-union", QUERY))


def test_without_a_source_differing_vocabularies_are_refused_together(models: Path) -> None:
    with pytest.raises(PlanError) as caught:
        resm_kernels.merge("base", ["a", "b"], "out", "tsvm")
    text = str(caught.value)
    assert "a: 17 rows, base 16: 2 tokens more" in text
    assert "b: 24 rows, base 16" in text
    assert text.count("tokenizer_source: union or base") == 2


def test_the_same_length_in_another_order_is_refused(models: Path) -> None:
    """The dangerous case: every shape fits, every row is another token's."""
    shutil.copytree("base", "moved")
    content = json.loads(Path("moved/tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    Path("moved/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="2 tokens in other rows"):
        resm_kernels.merge("base", ["moved"], "out", "tsvm")
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "tokenizer_source": "base"}
    recipe["models"] = [{"model": "moved"}]
    resm_kernels.merge(recipe=write_recipe(recipe), output="out")
    rows = merged("moved")
    rows[[words["a"], words["b"]]] = rows[[words["b"], words["a"]]]
    assert merged("out").equal(rows)


def test_a_sweep_with_and_without_the_base_among_the_models(models: Path) -> None:
    """Each output has its own models, and with them its own rows to fill."""
    recipe = {**RECIPES["linear_union"], "outputs": [{"name": "linear"}]}
    recipe["outputs"].append({"name": "tsvm", "merge_method": "tsvm"})
    resm_kernels.sweep(recipe=write_recipe(recipe), output="out")
    for method in ("linear", "tsvm"):
        alone = {**RECIPES["linear_union"], "merge_method": method}
        resm_kernels.merge(recipe=write_recipe(alone), output=method)
        assert Path(f"out/{method}/model.safetensors").read_bytes() == (
            Path(f"{method}/model.safetensors").read_bytes()
        )


def test_adapters_beside_models_of_another_vocabulary(models: Path) -> None:
    state = {
        f"base_model.model.{QUERY.removesuffix('.weight')}.lora_A.weight": torch.ones(2, 8),
        f"base_model.model.{QUERY.removesuffix('.weight')}.lora_B.weight": torch.ones(8, 2),
    }
    write_adapter(Path("adapter"), state)
    recipe = {**RECIPES["task_arithmetic_union"]}
    recipe["models"] = [{"model": "adapter"}, {"model": "a"}]
    resm_kernels.merge(recipe=write_recipe(recipe), output="out")
    assert len(merged("out")) == 17
    table = TABLE.removesuffix(".weight")
    state |= {
        f"base_model.model.{table}.lora_embedding_A": torch.ones(2, 16),
        f"base_model.model.{table}.lora_embedding_B": torch.ones(8, 2),
    }
    write_adapter(Path("adapter"), state)
    with pytest.raises(PlanError, match="changed by the adapter"):
        resm_kernels.merge(recipe=write_recipe(recipe), output="other")


@pytest.mark.parametrize("nonfinite", ["error", "warn"])
def test_nan_in_an_aligned_table(nonfinite: Any, models: Path) -> None:
    state = load_file("a/model.safetensors")
    state[TABLE][3, 2] = float("nan")
    save_file(state, "a/model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(RECIPES["task_arithmetic_union"])
    if nonfinite == "error":
        with pytest.raises(NonFiniteError, match=r"a/model.*1 of \d+ values"):
            resm_kernels.merge(recipe=recipe, output="out", nonfinite=nonfinite)
        return
    resm_kernels.merge(recipe=recipe, output="out", nonfinite=nonfinite)
    assert merged("out").isfinite().all()
    assert merged("out")[3, 2] == merged("base")[3, 2]


def test_a_table_missing_from_a_model_cannot_be_aligned(models: Path) -> None:
    state = load_file("a/model.safetensors")
    del state[HEAD]
    save_file(state, "a/model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(RECIPES["task_arithmetic_union"])
    with pytest.raises(PlanError, match=r"lm_head.weight: missing from a; a vocabulary table"):
        resm_kernels.merge(recipe=recipe, output="out", allow_missing=True)


def test_a_source_that_is_no_model(models: Path) -> None:
    recipe = write_recipe(RECIPES["task_arithmetic_union"], tokenizer_source="nothing")
    with pytest.raises(CheckpointError, match="nothing: no such file"):
        resm_kernels.merge(recipe=recipe, output="out")
    assert set(MODELS) == {"base", "a", "b", "c"}
