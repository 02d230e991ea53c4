"""Vocabularies that differ: real tokenizers, aligned tables, files that transformers loads."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import resm_kernels
from resm_kernels.checkpoint import vocabulary as module
from resm_kernels.checkpoint.companions import companion_files
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.checkpoint.reader import open_checkpoint
from resm_kernels.checkpoint.tokens import read_vocabulary, vocabulary_rows, vocabulary_tables
from resm_kernels.checkpoint.vocabulary import (
    Alignment,
    align,
    align_tables,
    differences,
    output_files,
)
from resm_kernels.errors import CheckpointError, PlanError, ResmError
from tests.checkpoints import save
from tests.mergekit.vocabulary import (
    LETTERS,
    MODELS,
    RECIPES,
    SPECIAL,
    TABLE,
    WEIGHTS,
    tokenizer_json,
    write_inputs,
    write_tokenizer,
)

RECORDED = Path(__file__).parent / "mergekit" / "vocabulary.safetensors"
TEXT = "the quick brown fox jumps over the lazy dog while an économie of words remains"
WORDS = (*SPECIAL, *LETTERS, "ab", "cd", "abcd")
HEAD = "lm_head.weight"


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelReference(str(folder)))


def save_weights(folder: Path, rows: int, seed: int = 0, **config: Any) -> Path:
    """An embedding and a head whose rows are told apart by their values."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(rows, 4, generator=generator) for name in (TABLE, HEAD)}
    return save(folder, state, config={"model_type": "llama", "vocab_size": rows, **config})


def save_words(
    folder: Path,
    words: Sequence[str] = WORDS,
    added: Mapping[str, bool] | None = None,
    rows: int | None = None,
    **config: Any,
) -> Checkpoint:
    """A model with a hand-made BPE tokenizer."""
    count = len(words) + len(added or {})
    save_weights(folder, count if rows is None else rows, seed=len(folder.name), **config)
    write_tokenizer(folder, words, added or {})
    return opened(folder)


def save_trained(folder: Path, kind: str, added: Sequence[AddedToken] = (), pad: int = 0) -> Path:
    """A model with a tokenizer trained on a few words and saved by transformers."""
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"
        )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(list(added))
    save_weights(folder, len(fast) + pad, seed=len(folder.name))
    fast.save_pretrained(folder)
    return folder


def table(checkpoint: Checkpoint, name: str = TABLE) -> torch.Tensor:
    return load_file(checkpoint.folder / "model.safetensors")[name]


def aligned(alignment: Alignment, *checkpoints: Checkpoint) -> list[torch.Tensor]:
    return align_tables([table(c) for c in checkpoints], alignment)


def written(folder: Path, base: Checkpoint, alignment: Alignment) -> dict[str, bytes]:
    """Write the output's small files, as the engine will."""
    files = output_files(companion_files(base, None), alignment)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


START = AddedToken("<|im_start|>", special=True, normalized=False)
END = AddedToken("<|im_end|>", special=True, normalized=False)
TOOL = AddedToken("<tool>", special=False, normalized=False)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_tokens_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    folder = save_trained(tmp_path / "model", kind, [START, TOOL], pad=7)
    found = read_vocabulary(opened(folder))
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found.ids == library.get_vocab()
    assert list(found.ids.values()) == list(range(len(found.ids)))
    assert found.rows == len(found.ids) + 7
    assert found.next_id == len(found.ids)
    assert found.added["<|im_start|>"]["special"]
    assert not found.added["<tool>"]["special"]


def test_a_file_is_refused_exactly_where_the_library_numbers_otherwise(tmp_path: Path) -> None:
    """Random small files: whatever is accepted has the library's ids, and its next one."""
    draw = random.Random(0)
    folder = save_weights(tmp_path / "model", 4)
    checkpoint = opened(folder)
    accepted = refused = 0
    for _ in range(300):
        size = draw.randint(1, 4)
        gaps = draw.random() < 0.2
        ids = draw.sample(range(8), size) if gaps else draw.sample(range(size), size)
        vocab = {chr(97 + i): number for i, number in enumerate(ids)}
        added, next_id = [], size
        for text in draw.sample(["a", "b", "<x>", "<y>", "<z>"], draw.randint(0, 4)):
            number = vocab.get(text, next_id) if draw.random() < 0.9 else draw.randint(0, 9)
            next_id = max(next_id, number + 1)
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            special = draw.random() < 0.5
            added.append({"id": number, "content": text, **flags, "special": special})
        content = tokenizer_json([], {})
        content["added_tokens"] = added
        content["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        library = Tokenizer.from_str(json.dumps(content))
        try:
            found = read_vocabulary(checkpoint)
        except CheckpointError:
            says = {**vocab, **{entry["content"]: entry["id"] for entry in added}}
            assert library.get_vocab() != says or max(ids) >= size
            refused += 1
            continue
        assert found.ids == library.get_vocab()
        if found.next_id is not None:
            library.add_tokens(["<new>"])
            assert library.token_to_id("<new>") == found.next_id
        accepted += 1
    assert accepted > 100
    assert refused > 30


def test_equal_vocabularies_change_nothing_padding_included(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=24)
    expert = save_words(tmp_path / "expert", rows=24)
    for source in ("base", "union", expert):
        alignment = align(source, base, [expert])
        assert alignment.changes_nothing
        assert alignment.rows == 24
        tables = [table(base), table(expert)]
        found = align_tables(tables, alignment)
        assert all(f is t for f, t in zip(found, tables, strict=True))
        companions = companion_files(base, None)
        assert output_files(companions, alignment) == companions
    assert differences(base, [expert]) == []


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_permuted_expert_comes_back_in_the_base_s_order(source: Any, tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=20)
    order = [*SPECIAL, *reversed(WORDS[3:])]
    expert = save_words(tmp_path / "expert", order, rows=18)
    alignment = align(source, base, [expert])
    old_base, old = table(base), table(expert)
    new_base, new = aligned(alignment, base, expert)
    assert new_base is not old_base
    assert torch.equal(new_base, old_base)
    for number, word in enumerate(WORDS):
        assert torch.equal(new[number], old[order.index(word)])
    # 14 words: rows 14 to 17 are padding in both, 18 and 19 only in the base.
    assert torch.equal(new[14:18], old[14:18])
    assert torch.equal(new[18:], old_base[18:])


def test_a_union_appends_what_the_base_lacks_in_a_fixed_order(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=16)
    a = save_words(tmp_path / "a", added={"<z>": True, "<y>": True})
    b = save_words(tmp_path / "bb", (*WORDS, "ef"), {"<y>": False, "<x>": False}, rows=32)
    alignment = align("union", base, [a, b])
    # Ordinary tokens before added ones, a before b; the base's two rows of padding are used.
    assert list(alignment.out_ids)[14:] == ["ef", "<z>", "<y>", "<x>"]
    assert list(alignment.out_ids.values()) == list(range(18))
    assert alignment.rows == 18
    assert alignment.new_tokens[2].flags["special"]
    t0, ta, tb = aligned(alignment, base, a, b)
    ra, rb = table(a), table(b)
    assert torch.equal(t0[14], rb[14])
    assert torch.equal(ta[14], rb[14])
    assert torch.equal(t0[15], ra[14])
    assert torch.equal(tb[15], ra[14])
    mean = ((ra[15].double() + rb[15].double()) / 2).float()
    assert torch.allclose(t0[16], mean, rtol=1e-7, atol=0)
    assert torch.equal(ta[16], ra[15])
    assert torch.equal(tb[16], rb[15])
    assert torch.equal(ta[17], rb[16])
    assert torch.equal(t0[:14], table(base)[:14])
    assert "ef" in alignment.notes[0]
    assert align("union", base, [b, a]).digest != alignment.digest
    assert align("union", base, [a, b]).digest == alignment.digest


def test_a_token_that_is_ordinary_in_one_expert_and_added_in_another(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=20)
    a = save_words(tmp_path / "a", (*WORDS, "gh", "ef"))
    b = save_words(tmp_path / "bb", added={"gh": True})
    path = b.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1] = {"id": 14, "content": "gh", "special": True}
    path.write_text(json.dumps(content))
    alignment = align("union", base, [a, b])
    ef, gh = alignment.new_tokens
    assert (ef.text, ef.id, ef.flags["special"], ef.flags["normalized"]) == ("ef", 14, False, True)
    assert (gh.text, gh.id, gh.flags["special"], gh.flags["normalized"]) == ("gh", 15, True, False)
    # The base's padding stays, also where an expert has a token under that number.
    assert alignment.rows == 20
    t0, ta, tb = aligned(alignment, base, a, b)
    assert all(torch.equal(t[16:], table(base)[16:]) for t in (t0, ta, tb))
    t0, ta, tb = aligned(align("base", base, [a, b]), base, a, b)
    assert all(torch.equal(t[14:], table(base)[14:]) for t in (t0, ta, tb))


def test_one_text_under_two_ids(tmp_path: Path) -> None:
    """Two experts added the same tokens in another order."""
    base = save_words(tmp_path / "base")
    a = save_words(tmp_path / "a", added={"<y>": True, "<z>": True})
    b = save_words(tmp_path / "bb", added={"<z>": True, "<y>": True})
    alignment = align("union", base, [a, b])
    assert alignment.rows == 16
    _, ta, tb = aligned(alignment, base, a, b)
    assert torch.equal(ta, table(a))
    assert torch.equal(tb, table(b)[[*range(14), 15, 14]])
    (found,) = differences(a, [b])
    assert found.moved == ("<z>", "<y>")
    assert found.blocks
    assert str(found) == (
        f"{b.reference}: 16 rows, as the base: 2 tokens in other rows (<z>, <y>); "
        "set tokenizer_source: union or base"
    )


def test_tokens_of_the_base_without_a_row(tmp_path: Path) -> None:
    """A pad token that was added to the tokenizer and never to the table."""
    base = save_words(tmp_path / "base", added={"<pad>": True}, rows=14)
    same = save_words(tmp_path / "same", added={"<pad>": True}, rows=14)
    resized = save_words(tmp_path / "resized", added={"<pad>": True, "<x>": True})
    assert align("union", base, [same]).changes_nothing
    alignment = align("union", base, [same, resized])
    assert alignment.rows == 16
    assert alignment.out_ids["<pad>"] == 14
    assert [t.text for t in alignment.new_tokens] == ["<x>"]
    t0, ts, tr = aligned(alignment, base, same, resized)
    assert torch.equal(t0[14:], table(resized)[14:])
    assert torch.equal(ts[14:], table(resized)[14:])
    assert torch.equal(tr, table(resized))
    other = save_words(tmp_path / "other", added={"<x>": True}, rows=15)
    alone = align("union", base, [other])
    assert alone.rows == 16
    # No model has a row for <pad>, whose id the files keep.
    assert not aligned(alone, base, other)[0][14].any()


def test_rows_that_a_model_lacks(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base")
    fewer = save_words(tmp_path / "fewer", WORDS[:12])
    more = save_words(tmp_path / "more", added={"<x>": True})
    alignment = align("base", base, [fewer, more])
    assert alignment.rows == 14
    t0, tf, tm = aligned(alignment, base, fewer, more)
    assert torch.equal(tf, torch.cat([table(fewer)[:12], t0[12:]]))
    assert torch.equal(tm, table(more)[:14])
    donor = save_words(tmp_path / "donor", (*SPECIAL, "gh"))
    alignment = align(donor, base, [fewer, more])
    assert alignment.rows == 4
    assert all(not t[3].any() for t in aligned(alignment, base, fewer, more))
    mean_first = align("base", base, [fewer, more], prefer_base=False)
    tables = aligned(mean_first, base, fewer, more)
    assert torch.equal(tables[1][12:], table(more)[12:14])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_mean_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_words(tmp_path / "base")
    experts = [save_words(tmp_path / f"e{i}", added={"<x>": True}) for i in range(3)]
    experts.append(save_words(tmp_path / "without"))
    alignment = align("union", base, experts)
    tables = [table(c).to(dtype) for c in (base, *experts)]
    found = align_tables(tables, alignment)
    assert {t.dtype for t in found} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean = sum(t[14].to(wide) for t in tables[1:4]) / 3
    assert torch.equal(found[0][14], mean.to(dtype))
    assert torch.equal(found[4][14], mean.to(dtype))


def test_many_missing_rows_biases_and_odd_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_words(tmp_path / "base")
    fewer = save_words(tmp_path / "fewer", WORDS[:5])
    alignment = align("base", base, [fewer])
    whole = aligned(alignment, base, fewer)
    monkeypatch.setattr(module, "PIECE", 64)
    assert all(map(torch.equal, aligned(alignment, base, fewer), whole))
    bias = align_tables([torch.arange(14.0), -torch.arange(5.0)], alignment)
    assert bias[1].tolist() == [*(-float(i) for i in range(5)), *map(float, range(5, 14))]
    narrow = align_tables([torch.zeros(14, 3).T.contiguous().T, torch.ones(5, 3)], alignment)
    assert narrow[1].sum() == 15
    empty = align_tables([torch.zeros(14, 0), torch.zeros(5, 0)], alignment)
    assert [t.shape for t in empty] == [(14, 0), (14, 0)]
    for wrong in ([torch.zeros(14, 3)], [torch.zeros(14, 3), torch.zeros(5, 2)]):
        with pytest.raises(PlanError, match="do not fit together"):
            align_tables(wrong, alignment)
    with pytest.raises(PlanError, match="too short"):
        align_tables([torch.zeros(13, 3), torch.zeros(5, 3)], alignment)


def legacy(folder: Path) -> None:
    """As transformers 4 wrote it: the added tokens stand in tokenizer_config.json too."""
    content = json.loads((folder / "tokenizer.json").read_text())
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"] = {
        str(entry.pop("id")): entry for entry in content["added_tokens"]
    }
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("decoder", [False, True])
def test_transformers_loads_the_union(kind: str, decoder: bool, tmp_path: Path) -> None:
    folders = {
        "base": save_trained(tmp_path / "base", kind, pad=1),
        "a": save_trained(tmp_path / "a", kind, [START, END]),
        "b": save_trained(tmp_path / "b", kind, [TOOL, END], pad=64),
    }
    if decoder:
        for folder in folders.values():
            legacy(folder)
    base, a, b = map(opened, folders.values())
    alignment = align("union", base, [a, b])
    written(tmp_path / "merged", base, alignment)
    before = AutoTokenizer.from_pretrained(folders["base"])
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_vocab() == alignment.out_ids
    assert merged(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    text = "the<|im_start|>fox<|im_end|>dog<tool>"
    ids = merged(text)["input_ids"]
    for token in ("<|im_start|>", "<|im_end|>", "<tool>"):
        assert ids.count(alignment.out_ids[token]) == 1
    assert merged.decode(ids, skip_special_tokens=True).replace(" ", "") == "thefoxdog<tool>"
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == alignment.rows == len(before) + 3
    # What is written is itself consistent.
    save_weights(tmp_path / "merged", alignment.rows)
    assert read_vocabulary(opened(tmp_path / "merged")).ids == alignment.out_ids


def test_transformers_runs_the_merged_model(tmp_path: Path) -> None:
    """One expert, task arithmetic: under the base's ids, the merged model is the expert."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    base = save_trained(tmp_path / "base", "bpe", pad=3)
    expert = save_trained(tmp_path / "expert", "bpe", [START, END], pad=40)
    for seed, folder in enumerate((base, expert)):
        torch.manual_seed(seed)
        rows = vocabulary_rows(opened(folder))
        config = LlamaConfig(vocab_size=rows, num_attention_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    one, other = opened(base), opened(expert)
    alignment = align("union", one, [other])
    written(tmp_path / "merged", one, alignment)
    old, new = (load_file(c.folder / "model.safetensors") for c in (one, other))
    merged = {}
    for name in vocabulary_tables(one):
        zero, change = align_tables([old.pop(name), new.pop(name)], alignment)
        merged[name] = resm_kernels.merge_tensors(zero, [change], "task_arithmetic")
    assert merged.keys() == {TABLE, HEAD}
    save_file({**merged, **new}, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    ours, theirs = (
        (AutoTokenizer.from_pretrained(f), LlamaForCausalLM.from_pretrained(f))
        for f in (tmp_path / "merged", expert)
    )
    logits = []
    for tokenizer, model in (ours, theirs):
        ids = tokenizer("the<|im_start|>fox<|im_end|>", return_tensors="pt")["input_ids"]
        known = sorted(alignment.out_ids, key=alignment.out_ids.__getitem__)
        columns = [tokenizer.convert_tokens_to_ids(t) for t in known]
        with torch.no_grad():
            logits.append(model(ids).logits[..., columns])
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_of_vocab_json_and_merges(tmp_path: Path) -> None:
    def save_gpt2(name: str, added: Sequence[str]) -> Checkpoint:
        source = save_trained(tmp_path / f"{name}-source", "bpe")
        content = json.loads((source / "tokenizer.json").read_text())["model"]
        vocab = content["vocab"]
        folder = save_weights(tmp_path / name, len(vocab) + len(added), model_type="gpt2")
        (folder / "vocab.json").write_text(json.dumps(vocab))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in content["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}
        settings |= {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        extra = {text: len(vocab) + i for i, text in reversed(list(enumerate(added)))}
        if extra:
            (folder / "added_tokens.json").write_text(json.dumps(extra))
        return opened(folder)

    base, expert = save_gpt2("base", ()), save_gpt2("expert", ("<x>", "<y>"))
    alignment = align("union", base, [expert])
    assert [t.text for t in alignment.new_tokens] == ["<x>", "<y>"]
    files = written(tmp_path / "merged", base, alignment)
    assert json.loads(files["added_tokens.json"]) == {
        "<x>": alignment.rows - 2,
        "<y>": alignment.rows - 1,
    }
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_vocab() == alignment.out_ids
    assert merged("fox<y>")["input_ids"][-1] == alignment.out_ids["<y>"]


def test_an_ordinary_token_that_an_expert_made_special(tmp_path: Path) -> None:
    """The base has the text at the same id; the output's tokenizer treats it as the expert's."""
    base = save_words(tmp_path / "base", (*WORDS, "<|x|>"))
    expert = save_words(tmp_path / "expert", added={"<|x|>": True})
    alignment = align("union", base, [expert])
    assert alignment.changes_nothing
    written(tmp_path / "merged", base, alignment)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a<|x|>b")["input_ids"] == [3, 14, 4]
    assert tokenizer.decode([3, 14, 4], skip_special_tokens=True).replace(" ", "") == "ab"


def test_another_model_s_vocabulary_brings_its_files(tmp_path: Path) -> None:
    nested = {"vocab_size": 14, "bos_token_id": 1, "eos_token_id": 13}
    ids = {"eos_token_id": [2, 13], "bos_token_id": 1, "pad_token_id": 13, "image_token_id": None}
    base = save_words(tmp_path / "base", text_config=nested, **ids)
    (base.folder / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 3}')
    (base.folder / "tokenizer.model").write_bytes(b"old")
    (base.folder / "preprocessor_config.json").write_text("{}")
    words = ("<s>", "</s>", "<unk>", *LETTERS)
    donor = save_words(
        tmp_path / "donor",
        words,
        {"<pad>": True},
        rows=16,
        pad_token_id=11,
        eos_token_id=9,
        text_config="none",
    )
    (donor.folder / "chat_template.jinja").write_text("{{ messages }}")
    alignment = align(donor, base, [save_words(tmp_path / "expert")])
    assert alignment.rows == 16
    files = written(tmp_path / "merged", base, alignment)
    assert set(files) == {
        "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert files["tokenizer.json"] == (donor.folder / "tokenizer.json").read_bytes()
    config = json.loads(files["config.json"])
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 16
    assert config["text_config"]["bos_token_id"] == config["bos_token_id"] == 0
    assert config["eos_token_id"] == [1]
    assert config["pad_token_id"] == 11
    assert config["image_token_id"] is None
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 1, "top_k": 3}
    assert config["text_config"]["eos_token_id"] == 9
    own = align(base, base, [donor])
    assert own.donor is None
    assert own.rows == 14


def test_the_tokenizer_must_not_change_after_planning(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base")
    alignment = align("union", base, [save_words(tmp_path / "a", added={"<x>": True})])
    write_tokenizer(base.folder, WORDS, {"<other>": True})
    with pytest.raises(CheckpointError, match="changed after the merge was planned"):
        output_files(companion_files(base, None), alignment)


def test_which_tensors_are_vocabulary_tables(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": (40, 8),
        "lm_head.weight": (40, 8),
        "lm_head.bias": (40,),
        "transformer.wte.weight": (40, 8),
        "encoder.embed_positions.weight": (12, 8),
        "visual.patch_embed.weight": (40, 3, 2, 2),
        "model.embed_norm.weight": (40,),
        "model.layers.0.mlp.up_proj.weight": (40, 8),
    }
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tables = {*list(shapes)[:4]}
    for config in ({"vocab_size": 40}, {"text_config": {"vocab_size": 40}}, {}, {"vocab_size": 9}):
        checkpoint = opened(save(tmp_path / "model", state, config=config))
        assert vocabulary_rows(checkpoint) == 40
        assert set(vocabulary_tables(checkpoint)) == tables
    none = opened(save(tmp_path / "none", {"layer.weight": torch.zeros(3, 3)}))
    assert vocabulary_rows(none) is None
    assert vocabulary_tables(none) == ()
    with pytest.raises(CheckpointError, match="no vocabulary table"):
        read_vocabulary(none)
    assert differences(none, [none]) == []


def test_what_is_not_brought_into_order_is_said(tmp_path: Path) -> None:
    base, other = save_words(tmp_path / "base"), save_words(tmp_path / "o", added={"<x>": True})
    state = {TABLE: torch.zeros(14, 4), "router.token_bias": torch.zeros(14)}
    save(base.folder, state, config={"vocab_size": 14})
    (note,) = align("union", opened(base.folder), [other]).notes
    assert note.endswith("left as they are: router.token_bias")
    save(base.folder, state, config={"vocab_size": 14, "vocab_size_per_layer_input": 14})
    with pytest.raises(PlanError, match="vocabulary of their own"):
        align("union", opened(base.folder), [other])


def test_another_chat_template_is_no_difference_and_costs_no_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expert = save_words(tmp_path / "base"), save_words(tmp_path / "expert")
    path = expert.folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))
    monkeypatch.setattr(module, "read_vocabulary", None)
    assert differences(base, [expert]) == []


def test_differences_are_one_sentence_each(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=20)
    chat = {f"<|{i}|>": True for i in range(1, 9)}
    longer = save_words(tmp_path / "longer", added=chat)
    padded = save_words(tmp_path / "padded", added={"<x>": True}, rows=20)
    fewer = save_words(tmp_path / "fewer", WORDS[:13], rows=20)
    bare = opened(save_weights(tmp_path / "bare", 20))
    short = opened(save_weights(tmp_path / "short", 19))
    found = differences(base, [longer, padded, fewer, bare, short])
    assert [d.blocks for d in found] == [True, False, False, True]
    assert str(found[0]) == (
        f"{longer.reference}: 22 rows, base 20: 8 tokens more (<|1|>, <|2|>, <|3|>, ...); "
        "set tokenizer_source: union or base"
    )
    assert str(found[1]) == f"{padded.reference}: 20 rows, as the base: 1 token more (<x>)"
    assert str(found[2]) == f"{fewer.reference}: 20 rows, as the base: 1 token fewer (abcd)"
    assert found[3].rows == 19
    (padded.folder / "tokenizer.json").write_text("{")
    (unread,) = differences(base, [padded])
    assert not unread.blocks
    assert "tokens not compared" in str(unread)


def test_a_model_without_tokenizer_files(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=16)
    bare = opened(save_weights(tmp_path / "bare", 16))
    chat = save_words(tmp_path / "chat", added={"<x>": True})
    alignment = align("union", base, [bare, chat])
    assert torch.equal(alignment.indices[0], alignment.indices[1])
    assert "taken to be the base's" in alignment.notes[0]
    short = opened(save_weights(tmp_path / "short", 15))
    for base_, experts in ((base, [short]), (bare, [chat])):
        with pytest.raises(CheckpointError, match="no tokenizer whose tokens can be aligned"):
            align("union", base_, experts)
    (short.folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(CheckpointError) as caught:
        align("union", base, [short])
    assert "tokenizer.model" in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def hostile() -> dict[str, tuple[str, bytes]]:
    """A file's name and content for everything that must be refused."""

    def tokenizer(**changes: Any) -> tuple[str, bytes]:
        content = tokenizer_json(WORDS, {"<x>": True})
        content["added_tokens"][-1].update(changes.pop("token", {}))
        if "model" in changes:
            content["added_tokens"] = []
            content["model"].update(changes.pop("model"))
        return "tokenizer.json", json.dumps({**content, **changes}).encode()

    def settings(decoder: object) -> tuple[str, bytes]:
        return "tokenizer_config.json", json.dumps({"added_tokens_decoder": decoder}).encode()

    pairs = [["a", 0.0], ["b", -1.0]]
    return {
        "not JSON": ("tokenizer.json", b"\x80\x04pickle"),
        "empty": ("tokenizer.json", b""),
        "cut off": ("tokenizer.json", tokenizer()[1][:-20]),
        "a list": ("tokenizer.json", b"[]"),
        "nested": ("tokenizer.json", b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "nested a bit": ("tokenizer.json", b'{"model": ' + b"[" * 80 + b"]" * 80 + b"}"),
        "many values": ("tokenizer.json", b'{"model": [' + b"[]," * 2_000_001 + b"[]]}"),
        "no model": ("tokenizer.json", b"{}"),
        "vocabulary is text": tokenizer(model={"vocab": "abc"}),
        "huge id": tokenizer(model={"vocab": {"a": 10**30}}),
        "id of 5000 digits": (
            "tokenizer.json",
            b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}",
        ),
        "id above the bound": tokenizer(model={"vocab": {"a": 1 << 24}}),
        "negative id": tokenizer(model={"vocab": {"a": -1}}),
        "id is true": tokenizer(model={"vocab": {"a": True}}),
        "id is a float": tokenizer(model={"vocab": {"a": 1.0}}),
        "empty token without an id": tokenizer(model={"vocab": {"": None}}),
        "two tokens of one id": tokenizer(model={"vocab": {"a": 0, "b": 0}}),
        "key twice": ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "a": 1}}}'),
        "lone surrogate": ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 0}}}'),
        "surrogate in a list": tokenizer(model={"vocab": [["\ud800", 0.0]]}),
        "unigram twice": tokenizer(model={"vocab": [*pairs, pairs[0]]}),
        "unigram of words": tokenizer(model={"vocab": ["a", "b"]}),
        "unigram of numbers": tokenizer(model={"vocab": [[1, 2.0]]}),
        "unigram of nothing": tokenizer(model={"vocab": [[]]}),
        "added id negative": tokenizer(token={"id": -1}),
        "added id huge": tokenizer(token={"id": 1 << 63}),
        "added id absent": tokenizer(token={"id": None}),
        "added id far away": tokenizer(token={"id": 1000}),
        "added id of another": tokenizer(token={"id": 5}),
        "added text absent": tokenizer(token={"content": None}),
        "added text empty": tokenizer(token={"content": ""}),
        "added text a surrogate": tokenizer(token={"content": "\ud800"}),
        "added flag a word": tokenizer(token={"special": "yes"}),
        "added tokens a word": tokenizer(added_tokens="abc"),
        "added tokens of words": tokenizer(added_tokens=["abc"]),
        "added tokens after gaps": tokenizer(
            model={"vocab": {"<unk>": 0, "b": 9}}, added_tokens=[{"id": 2, "content": "<x>"}]
        ),
        "decoder a list": settings([1]),
        "decoder of words": settings({"14": "<x>"}),
        "decoder with odd keys": settings({"-1": {"content": "<y>"}}),
        "decoder with long keys": settings({"1" * 5000: {"content": "<y>"}}),
        "decoder says otherwise": settings({"20": {"content": "<y>"}}),
        "decoder contradicts": settings({"3": {"content": "</s>"}}),
        "decoder not an object": ("tokenizer_config.json", b"3"),
        "added_tokens.json": ("added_tokens.json", b'{"<y>": "14"}'),
    }


@pytest.mark.parametrize("case", hostile())
def test_a_hostile_tokenizer_is_one_clear_error(case: str, tmp_path: Path) -> None:
    name, content = hostile()[case]
    checkpoint = save_words(tmp_path / "model", rows=16)
    (checkpoint.folder / name).write_bytes(content)
    with pytest.raises(ResmError) as caught:
        read_vocabulary(checkpoint)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 6000
    good = save_words(tmp_path / "base", rows=16)
    with pytest.raises(ResmError):
        align("union", good, [checkpoint])
    (difference,) = differences(good, [checkpoint])
    assert not difference.blocks
    assert difference.unread is not None


def test_a_tokenizer_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    checkpoint = save_words(tmp_path / "model")
    with open(checkpoint.folder / "tokenizer.json", "r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="too long"):
        read_vocabulary(checkpoint)
    (checkpoint.folder / "tokenizer.json").unlink()
    (checkpoint.folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_vocabulary(checkpoint)


def test_ids_with_gaps_cannot_be_continued(tmp_path: Path) -> None:
    base = save_words(tmp_path / "base", rows=10)
    content = tokenizer_json(SPECIAL, {})
    content["model"]["vocab"]["a"] = 9
    (base.folder / "tokenizer.json").write_text(json.dumps(content))
    expert = save_words(tmp_path / "expert")
    assert align("base", base, [expert]).rows == 10
    with pytest.raises(PlanError, match="leave gaps"):
        align("union", base, [expert])


@pytest.fixture(scope="module")
def recorded_inputs() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        yield {name: opened(Path(folder) / name) for name in MODELS}


@pytest.mark.parametrize("name", RECIPES)
def test_same_bits_as_mergekit(name: str, recorded_inputs: dict[str, Checkpoint]) -> None:
    """mergekit's table for every token: the same ids, and the same bits from float32 tables.

    mergekit casts to float32 first, so that a mean of experts is never rounded; ours is, to the
    dtype of its table. From bfloat16 tables only those rows differ, by one unit in the last place.
    """
    recipe = RECIPES[name]
    names = [entry["model"] for entry in recipe["models"]]
    base, experts = recipe.get("base_model", names[0]), [recorded_inputs[n] for n in names]
    source: Any = recorded_inputs.get(recipe["tokenizer_source"], recipe["tokenizer_source"])
    if recipe["tokenizer_source"] == "base":
        source = "base"
    alignment = align(source, recorded_inputs[base], experts, prefer_base="base_model" in recipe)
    with safe_open(RECORDED, "pt") as file:
        facts, theirs = json.loads(file.metadata()[name]), file.get_tensor(name)
    assert alignment.out_ids == facts["ids"]
    # Theirs has no padding; ours keeps that of the vocabulary's owner.
    assert len(theirs) == facts["vocab_size"] == len(facts["ids"]) <= alignment.rows
    averaged = {
        number
        for number in facts["ids"].values()
        if sum(int(index[number]) >= 0 for index in alignment.indices[1:]) > 1
        and any(int(index[number]) < 0 for index in alignment.indices)
        and (int(alignment.indices[0][number]) < 0 or not alignment.prefer_base)
    }
    stored = [table(recorded_inputs[base]), *map(table, experts)]
    for tables, exempt in (([t.float() for t in stored], set()), (stored, averaged)):
        first, *others = align_tables(tables, alignment)
        ours = resm_kernels.merge_tensors(
            first,
            others,
            recipe["merge_method"],
            weights=[WEIGHTS[n] for n in names],
            out_dtype=torch.bfloat16,
        )[: len(theirs)]
        steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs().amax(1)
        different = set(steps.nonzero()[:, 0].tolist())
        assert different <= exempt
        assert int(steps.max()) <= 1
