"""LoRA adapters as PEFT writes them, and as nobody should."""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from resm_kernels.checkpoint import hub
from resm_kernels.checkpoint.hub import ModelReference, locate
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.checkpoint.lora import VARIANTS, open_model, read_adapter, read_factors
from resm_kernels.checkpoint.patterns import Matcher, PatternError
from resm_kernels.checkpoint.reader import open_checkpoint
from resm_kernels.errors import CheckpointError
from tests.adapters import gpt2, llama, open_both, read_state, rebuilt, train, write_adapter
from tests.checkpoints import make_state, save
from tests.fuzz import seeds
from tests.fuzz.targets import adapter as fuzz_adapter
from tests.fuzz.targets import replay
from tests.hostile.mutate import mutations, odd

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q_proj", "k_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (llama, {"target_modules": LINEAR}),
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.(up|down)_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3, r".*\.mlp\..*": 11, "up_proj": 5},
        },
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "output": (llama, {"target_modules": ["lm_head", "v_proj"]}),
    "whole modules": (
        llama,
        {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "all biases": (
        lambda: llama(attention_bias=True),
        {"target_modules": ["q_proj"], "bias": "all"},
    ),
    "their biases": (
        lambda: llama(attention_bias=True),
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all"}),
    "Conv1D and a table": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "tied output": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
    "rank above the width": (llama, {"target_modules": ["k_proj"], "r": 20}),
    "another start": (llama, {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_weights_are_those_that_peft_merges_to(case: str, kind: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    base_folder, folder, merged = train(make(), tmp_path, **options)
    if kind == "bin":
        torch.save(read_state(folder), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    base, adapter = open_both(base_folder, folder)
    assert adapter.pairs
    for name, (tensor, bound) in rebuilt(base, adapter).items():
        assert ((tensor - merged[name].double()).abs() <= bound).all(), name


def test_another_prefix_is_found(tmp_path: Path) -> None:
    """GPT-2's own checkpoint says `h.0`; an adapter on a bare model says `layers.0`."""
    base, folder, _ = train(gpt2(), tmp_path / "a", target_modules=["c_attn", "wte"])
    state = {n.removeprefix("transformer."): t for n, t in read_model(base).items()}
    shutil.rmtree(base)
    save(base, state, config={"vocab_size": 40})
    assert {n.split(".")[0] for n in open_both(base, folder)[1].pairs} == {"h", "wte"}

    base, folder, _ = train(llama(), tmp_path / "b", target_modules=["q_proj"])
    bare = {n.replace("model.model.", "model."): t for n, t in read_state(folder).items()}
    save_file(bare, folder / "adapter_model.safetensors")
    names = set(open_both(base, folder)[1].pairs)
    assert names == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_two_towers_with_the_same_names_are_ambiguous(tmp_path: Path) -> None:
    state = {f"{tower}.layers.0.q.weight": torch.zeros(4, 6) for tower in ("text", "vision")}
    base = save(tmp_path / "base", state)
    folder = write_adapter(tmp_path / "adapter", pair("layers.0.q", 4, 6))
    with pytest.raises(CheckpointError, match="more than one way"):
        open_both(base, folder)


def pair(module: str, out: int, columns: int, rank: int = 2) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": torch.ones(rank, columns),
        f"{name}.lora_B.weight": torch.ones(out, rank),
    }


def test_a_tied_target_takes_the_stored_name(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    base, folder, _ = train(model, tmp_path, target_modules=["q_proj", "lm_head"])
    adapter = open_both(base, folder)[1]
    assert "model.embed_tokens.weight" in adapter.pairs
    assert adapter.notes == ("lm_head.weight: tied to model.embed_tokens.weight in the base",)


@pytest.mark.parametrize("aliased", [True, False])
def test_a_tied_table_is_replaced_under_all_its_names_or_none(
    aliased: bool, tmp_path: Path
) -> None:
    """PEFT would untie a base of which only one name is replaced."""
    head, table, new = "lm_head.weight", "model.embed_tokens.weight", torch.randn(10, 4)
    config = {} if aliased else {"vocab_size": 10, "tie_word_embeddings": True}
    base = save(tmp_path / "base", {table: torch.zeros(10, 4)}, config=config)
    if aliased:
        torch.save(dict.fromkeys((table, head), torch.zeros(10, 4)), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    for names in ([head], [table]):
        folder = write_adapter(tmp_path / "one", {f"base_model.model.{n}": new for n in names})
        with pytest.raises(
            CheckpointError, match=rf"{names[0]}: replaced(.|\n)*fix: untie the base"
        ):
            open_both(base, folder)
    both = {f"base_model.model.{n}": new + int(n == head) for n in (head, table)}
    with pytest.raises(CheckpointError, match=r"another value(.|\n)*fix: untie the base"):
        open_both(base, write_adapter(tmp_path / "two", both))
    both = {f"base_model.model.{n}": new.clone() for n in (head, table)}
    assert len(open_both(base, write_adapter(tmp_path / "both", both))[1].full) == 1
    same = write_adapter(tmp_path / "same", {f"base_model.model.{head}": torch.zeros(10, 4)})
    assert len(open_both(base, same)[1].full) == 1


def test_an_alias_takes_the_stored_name(tmp_path: Path) -> None:
    table = torch.randn(10, 4)
    base = tmp_path / "base"
    base.mkdir()
    torch.save({"head.weight": table, "table.weight": table}, base / "pytorch_model.bin")
    for name in ("head", "table"):
        folder = write_adapter(tmp_path / name, pair(name, 10, 4))
        assert set(open_both(base, folder)[1].pairs) == {"head.weight"}
    both = write_adapter(tmp_path / "both", {**pair("head", 10, 4), **pair("table", 10, 4)})
    with pytest.raises(CheckpointError, match="head changes the same tensor head"):
        open_both(base, both)


def test_tables_that_peft_stores_several_times(tmp_path: Path) -> None:
    """With `save_embedding_layers` the trained table is there twice, and the old one beside it."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    peft = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        peft.get_input_embeddings().weight.add_(1.0)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert sum("embed_tokens" in name for name in read_state(tmp_path / "adapter")) == 3
    base, adapter = open_both(tmp_path / "base", tmp_path / "adapter")
    assert set(adapter.full) == {"model.embed_tokens.weight", "lm_head.weight"}
    merged = peft.merge_and_unload().state_dict()
    for name in adapter.full:
        assert torch.equal(rebuilt(base, adapter)[name][0].float(), merged[name])


def test_a_copy_of_the_base_must_be_one(tmp_path: Path) -> None:
    base, folder, _ = train(llama(), tmp_path, target_modules=["embed_tokens"])
    state = read_state(folder)
    copy = next(name for name in state if "base_layer" in name)
    for change in (lambda t: t.bfloat16(), lambda t: t):
        save_file({**state, copy: change(state[copy])}, folder / "adapter_model.safetensors")
        assert not open_both(base, folder)[1].copies
    save_file({**state, copy: state[copy] + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="copy of this weight is not the base's"):
        open_both(base, folder)


def test_a_square_weight_lies_as_the_bases_others(tmp_path: Path) -> None:
    """PEFT's flag is that of the last layer it wrapped: after `lm_head` it says false."""
    base, folder, merged = train(gpt2(), tmp_path, target_modules=["c_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    for flag in (True, False):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": flag}))
        opened, adapter = open_both(base, folder)
        for name, (tensor, bound) in rebuilt(opened, adapter).items():
            assert ((tensor - merged[name].double()).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_float64_and_widen_the_rest(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"m.weight": torch.zeros(4, 6)})
    tensors = {n: t.to(dtype) for n, t in pair("m", 4, 6).items()}
    _, adapter = open_both(base, write_adapter(tmp_path / "a", tensors, {"lora_alpha": 0.7}))
    left, right = read_factors(adapter, adapter.pairs["m.weight"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (left.dtype, right.dtype) == (wide, wide)
    assert left.shape == (4, 2)
    assert right.shape == (6, 2)
    assert torch.equal(left, torch.full((4, 2), 0.35, dtype=wide))


def test_the_digest_sees_the_config(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", pair("m", 4, 6))
    first = read_adapter(folder)
    assert read_adapter(folder).digest == first.digest
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "base_model_name_or_path": "org/name"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    second = read_adapter(folder)
    assert second.digest != first.digest
    assert (first.base_model, second.base_model) == (None, "org/name")


# References


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/base+org/adapter", ("org/base", "org/adapter")),
        ("org/base@v1+org/adapter@v2", ("org/base@v1", "org/adapter@v2")),
        ("org/base + org/adapter", ("org/base", "org/adapter")),
        ("org/base", None),
        ("+org/adapter", None),
        ("org/base+", None),
        ("a+b+c", None),
    ],
)
def test_base_plus_adapter(text: str, parts: tuple[str, str] | None) -> None:
    found = ModelReference(text).with_adapter
    assert (found and tuple(str(part) for part in found)) == parts


def test_a_path_with_a_plus_stays_a_path(tmp_path: Path) -> None:
    plus = tmp_path / "a+b"
    assert ModelReference(str(plus)).with_adapter is not None
    plus.mkdir()
    assert ModelReference(str(plus)).with_adapter is None
    found = ModelReference(f"{plus}+org/adapter").with_adapter
    assert found == (ModelReference(str(plus)), ModelReference("org/adapter"))


def test_every_way_to_name_an_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"m.weight": torch.zeros(4, 6)})
    folder = write_adapter(tmp_path / "adapter", pair("m", 4, 6))
    opened = open_checkpoint(ModelReference(str(base)))
    for text in (folder, folder / "adapter_model.safetensors", f"{base}+{folder}"):
        found = open_model(ModelReference(str(text)), opened)
        assert not isinstance(found, Checkpoint)
        assert set(found.pairs) == {"m.weight"}
    assert isinstance(open_model(ModelReference(str(base)), opened), Checkpoint)
    shutil.copytree(base, tmp_path / "other")
    with pytest.raises(CheckpointError, match="has another base"):
        open_model(ModelReference(f"{tmp_path / 'other'}+{folder}"), opened)
    with pytest.raises(CheckpointError, match="a LoRA adapter, not a whole model"):
        open_checkpoint(ModelReference(str(folder)))
    with pytest.raises(CheckpointError, match="cannot stand here"):
        open_checkpoint(ModelReference(f"{base}+{folder}"))


def test_a_whole_model_beside_an_adapter_is_the_model(tmp_path: Path) -> None:
    base = save(tmp_path / "both", {"m.weight": torch.zeros(4, 6)})
    write_adapter(base, pair("m", 4, 6))
    opened = open_checkpoint(ModelReference(str(base)))
    assert isinstance(open_model(ModelReference(str(base)), opened), Checkpoint)
    assert not isinstance(open_model(ModelReference(f"{base}+{base}"), opened), Checkpoint)


@pytest.mark.parametrize(
    ("files", "adapter", "fetched"),
    [
        (["adapter_model.safetensors"], False, "adapter_model.safetensors"),
        (["adapter_model.bin"], False, "adapter_model.bin"),
        (["adapter_model.safetensors", "pytorch_model.bin"], False, "pytorch_model.bin"),
        (["adapter_model.safetensors", "model.safetensors"], False, "model.safetensors"),
        (["adapter_model.safetensors", "model.safetensors"], True, "adapter_model.safetensors"),
    ],
)
def test_what_is_fetched_from_the_hub(
    files: list[str],
    adapter: bool,
    fetched: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for the Hub: it copies what the patterns choose, as the real one does."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def download(repo: str, *, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> str:
        chosen = filter_repo_objects(
            [*files, "adapter_config.json"],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        for name in chosen:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = locate(ModelReference("org/name"), adapter=adapter)
    weights = {p.name for p in folder.iterdir()} - {"adapter_config.json"}
    assert weights == {fetched}
    for name in files:  # as a cache holds what was fetched before
        (tmp_path / name).touch()
    (tmp_path / fetched).unlink()
    locate(ModelReference("org/name"), adapter=adapter)
    assert (tmp_path / fetched).exists()
    assert hub.ADAPTER_WEIGHTS[0] in files or fetched == "adapter_model.bin"


# Refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{key: ({key: {"x": 1}}, key) for key in VARIANTS},
    "another type": ({"peft_type": "LOHA"}, "LOHA"),
    "no type": ({"peft_type": None}, "peft_type"),
    **{
        start: ({"init_lora_weights": start}, start)
        for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new")
    },
    "a start that is a list": ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
    "an unknown key": ({"use_magic": True}, "use_magic"),
    "rank 0": ({"r": 0}, "r is 0"),
    "a negative rank": ({"rank_pattern": {"m": -1}}, "rank_pattern"),
    "a huge rank": ({"r": 10**30}, "rank 2"),
    "another rank": ({"r": 3}, "rank 2, adapter_config.json says 3"),
    "another rank by pattern": ({"rank_pattern": {"m": 8}}, "says 8"),
    "a list for a rank": ({"r": [2]}, "r is [2]"),
    "a truth for a rank": ({"r": True}, "r is True"),
    "a text for alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "a huge alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "a list of patterns": ({"alpha_pattern": ["m"]}, "alpha_pattern"),
    "a pattern to a list": ({"alpha_pattern": {"m": [1]}}, "alpha_pattern"),
    "a number for a flag": ({"use_rslora": 1}, "use_rslora"),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, "missing )"),
    "look-around": ({"rank_pattern": {"(?=m)m": 2}}, "not supported"),
    "a back reference": ({"alpha_pattern": {r"(m)\1": 2}}, "escape"),
    "a long pattern": ({"alpha_pattern": {"m" * 2000 + "?": 2}}, "longer than"),
    "deep groups": ({"alpha_pattern": {"(" * 400 + ")" * 400: 2}}, "inside one another"),
    "many repeats": ({"alpha_pattern": {"((x{0,9999}){9999}){9999}": 2}}, "too long"),
    "far too many repeats": ({"alpha_pattern": {"x{9999999}": 2}}, "too many"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(case: str, tmp_path: Path) -> None:
    config, word = REFUSED[case]
    folder = write_adapter(tmp_path / "a", pair("m", 4, 6), config)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    assert word in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "merge the adapter into its base" in str(caught.value)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"peft_type": "LORA", "lora_alpha": NaN}', '{"r": 1e999}', '{"r": 1, "r": 2}'],
)
def test_configs_that_are_no_json(content: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", pair("m", 4, 6))
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(str(folder / "adapter_config.json"))):
        read_adapter(folder)


def one(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{name}": torch.ones(shape, dtype=dtype)}


def without(tensors: dict[str, torch.Tensor], word: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if word not in name}


BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no B": (without(pair("m", 4, 6), "lora_B"), "lora_B is missing"),
    "no A": (without(pair("m", 4, 6), "lora_A"), "lora_A is missing"),
    "two ranks": (pair("m", 4, 6) | one("m.lora_B.weight", 4, 3), "do not fit together"),
    "no rank": (pair("m", 4, 6, rank=0), "do not fit together"),
    "no rows": (pair("m", 0, 6), "do not fit together"),
    "a convolution": (pair("m", 4, 6) | one("m.lora_A.weight", 2, 6, 3, 3), "only matrices"),
    "a vector": (pair("m", 4, 6) | one("m.lora_A.weight", 2), "only matrices"),
    "DoRA": (pair("m", 4, 6) | one("m.lora_magnitude_vector", 4), "DoRA"),
    "a bias of B": (pair("m", 4, 6) | one("m.lora_B.bias", 4), "bias on lora_B"),
    "KaSA": (pair("m", 4, 6) | one("m.lora_diag", 2), "KaSA"),
    "token rows": (one("m.token_adapter.trainable_tokens_delta", 2, 6), "token rows"),
    "a new part": (pair("m", 4, 6) | one("m.lora_C.weight", 2, 2), "plain LoRA"),
    "integers": (pair("m", 4, 6) | one("m.lora_A.weight", 2, 6, dtype=torch.int8), "I8"),
    "two kinds": (
        pair("m", 4, 6) | one("m.lora_embedding_A", 2, 6) | one("m.lora_embedding_B", 4, 2),
        "both of a linear layer and of an embedding",
    ),
    "nothing": ({}, "no tensors"),
    "the same twice": (pair("m", 4, 6) | {"m.lora_A.weight": torch.ones(2, 6)}, "twice"),
    "two values": (
        one("m.weight", 4, 6) | {"base_model.model.m.modules_to_save.weight": torch.zeros(4, 6)},
        "another value",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_refused(case: str, tmp_path: Path) -> None:
    tensors, word = BAD_TENSORS[case]
    with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
        read_adapter(write_adapter(tmp_path / "a", tensors))
    assert "adapter_model.safetensors" in str(caught.value)


MISFITS: dict[str, tuple[dict[str, torch.Tensor], list[str]]] = {
    "unknown names": (
        pair("model.layers.7.q", 4, 6) | pair("model.layers.8.q", 4, 6),
        ["model.layers.7.q.weight: not in the base", "model.layers.8.q.weight: not in the base"],
    ),
    "another shape": (pair("lm_head", 41, 16), ["do not fit the base's [40, 16]"]),
    "another embedding": (
        one("model.embed_tokens.lora_embedding_A", 2, 16)
        | one("model.embed_tokens.lora_embedding_B", 40, 2),
        ["do not fit the base's [40, 16]"],
    ),
    "a resized table": (one("lm_head.weight", 41, 16), ["shape [41, 16], [40, 16] in the base"]),
    "a vector": (pair("model.norm", 16, 16), ["do not fit the base's [16]"]),
    "both ways": (
        pair("lm_head", 40, 16) | one("lm_head.weight", 40, 16),
        ["both replaced and changed by LoRA"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_adapters_that_do_not_fit_the_base(case: str, tmp_path: Path) -> None:
    tensors, lines = MISFITS[case]
    base = save(tmp_path / "base", make_state())
    with pytest.raises(CheckpointError) as caught:
        open_both(base, write_adapter(tmp_path / "a", tensors))
    assert [line for line in lines if line not in str(caught.value)] == []


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"m.weight": torch.zeros(4, 6, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="I8 weights of the base"):
        open_both(base, write_adapter(tmp_path / "a", pair("m", 4, 6)))


def test_files_that_are_damaged_or_strange(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", pair("m", 4, 6))
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    for cut in (0, 7, 40, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            read_adapter(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="an adapter without weights"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        read_adapter(folder)
    path.mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_adapter(folder)
    path.rmdir()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="Not a regular file"):
        read_adapter(folder)


def test_many_misfits_are_counted_not_listed(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(300):
        tensors |= without(pair(f"layers.{i}.q", 4, 6), "lora_B")
    with pytest.raises(CheckpointError, match="and 280 more"):
        read_adapter(write_adapter(tmp_path / "a", tensors))


SEEDS = [data.split(b"\n") for data in seeds.adapters()]
ODD = odd("LORA", "lora", [1, 2], {"m": 3}, "F16", "I8", 1.5, float(2**70))
KEYS = ("r", "lora_alpha", "rank_pattern", "use_dora", "shape", "h.0.q.lora_A.weight", "new")


@pytest.mark.filterwarnings("error")
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_adapters_open_or_are_refused(data: st.DataObject, tmp_path: Path) -> None:
    """The fuzz target's promises, over configs and headers with a few values gone wrong."""
    config, header = (json.loads(part) for part in data.draw(st.sampled_from(SEEDS)))
    for whole in data.draw(st.lists(st.sampled_from([config, header]), min_size=1, max_size=3)):
        data.draw(mutations(whole, ODD, KEYS))
    replay(
        fuzz_adapter,
        json.dumps(config).encode() + b"\n" + json.dumps(header).encode(),
        tmp_path / "x",
    )


# Patterns


WORDS = ["a", "b", ".", r"\.", "*", "+", "?", "(", ")", "|", "[ab]", "[^a]", r"\d", "0", "{2}"]
WORDS += ["{1,2}", "{,2}", "{,}", "^", "$", "(?:", "*?", "ab", "{", "}", "[0-9.]", "\n"]


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=8), st.text("ab.01", max_size=8))
def test_patterns_match_as_re_does(words: list[str], name: str) -> None:
    """Whatever `re` takes is matched alike, or refused."""
    pattern = "".join(words)
    try:
        found = Matcher().matches(pattern, name)
    except PatternError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "layers.[0-9]+.self_attn.q_proj",
        r"^model\.layers\.(1|2\d)\..*",
        ".*attn.*",
        "a{2}b?",
    ],
)
def test_patterns_that_people_write_are_not_refused(pattern: str) -> None:
    assert isinstance(Matcher().matches(pattern, "model.layers.21.self_attn.q_proj"), bool)


def test_a_module_of_several_lines_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", pair("a\nb", 4, 6), {"alpha_pattern": {"b": 1}})
    with pytest.raises(CheckpointError, match="several lines"):
        read_adapter(folder)


def test_a_pattern_for_every_layer_of_a_large_model(tmp_path: Path) -> None:
    """EVA writes one for each weight: 80 layers of seven."""
    tensors: dict[str, torch.Tensor] = {}
    for i in range(560):
        tensors |= pair(f"model.layers.{i // 7}.mlp.proj{i % 7}", 2, 2, rank=1 + i % 5)
    names = [f"model.layers.{i // 7}.mlp.proj{i % 7}" for i in range(560)]
    config = {
        "rank_pattern": {name: 1 + i % 5 for i, name in enumerate(names)},
        "alpha_pattern": {name: 2 + i for i, name in enumerate(names)},
    }
    found = read_adapter(write_adapter(tmp_path / "a", tensors, config))
    for i, name in enumerate(names):
        assert found.pairs[f"{name}.weight"].scale == (2 + i) / (1 + i % 5)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+b", "(a|a)*b", "a*" * 20 + "b", "(.*.*)*x"])
def test_patterns_that_take_re_for_ever_are_fast(pattern: str) -> None:
    start = time.process_time()
    assert not Matcher().matches(pattern, "a" * 60)
    assert time.process_time() - start < 1
