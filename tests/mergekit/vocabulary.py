"""The checkpoints with differing vocabularies that mergekit's recorded tables were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN = 8
TABLE = "model.embed_tokens.weight"
MERGES = {"ab": ("a", "b"), "cd": ("c", "d"), "abcd": ("ab", "cd"), "ef": ("e", "f")}
MERGES["gh"] = ("g", "h")
SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = tuple("abcdefgh")
MODELS: Mapping[str, tuple[tuple[str, ...], Mapping[str, bool], int]] = {
    "base": ((*SPECIAL, *LETTERS, "ab", "cd", "abcd", "ef"), {}, 16),
    "a": (
        (*SPECIAL, *LETTERS, "ab", "cd", "abcd", "ef"),
        {"<|im_start|>": True, "<|im_end|>": True},
        17,
    ),
    "b": (
        (*SPECIAL, "gh", "ef", "abcd", "cd", "ab", *reversed(LETTERS)),
        {"<|im_end|>": True, "<x>": False},
        24,
    ),
    "c": ((*SPECIAL, *LETTERS, "cd", "ab"), {"<c>": True}, 14),
}
"""Words in the order of ids, added tokens and whether they are special, rows of the table."""

WEIGHTS = {"base": 0.2, "a": 0.5, "b": 0.3, "c": 0.9}


def _recipe(method: str, models: Sequence[str], source: str, base: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "parameters": {"weight": WEIGHTS[m]}} for m in models],
        "tokenizer_source": source,
    }
    return content if base is None else {**content, "base_model": base}


RECIPES = {
    **{f"linear_{s}": _recipe("linear", tuple(MODELS), s, "base") for s in ("union", "base", "c")},
    "linear_no_base": _recipe("linear", ("a", "b", "c"), "b", None),
    **{
        f"task_arithmetic_{s}": _recipe("task_arithmetic", ("a", "b", "c"), s, "base")
        for s in ("union", "base", "b")
    },
}


def tokenizer_json(words: Sequence[str], added: Mapping[str, bool]) -> dict[str, Any]:
    """A BPE tokenizer whose words have their places in the list as ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    entries = [(w, words.index(w), True) for w in SPECIAL if w in words]
    entries += [(w, len(words) + i, special) for i, (w, special) in enumerate(added.items())]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": word, **flags, "normalized": not special, "special": special}
            for word, number, special in entries
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [list(pair) for word, pair in MERGES.items() if word in words],
        },
    }


def write_tokenizer(folder: Path, words: Sequence[str], added: Mapping[str, bool]) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(words, added)))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_inputs(folder: Path) -> None:
    """Write base, a, b and c as bfloat16 checkpoints; the same bytes on every machine."""
    for m, (model, (words, added, rows)) in enumerate(MODELS.items()):
        layer, square = "model.layers.0", (HIDDEN, HIDDEN)
        shapes: dict[str, tuple[int, ...]] = {
            TABLE: (rows, HIDDEN),
            **{f"{layer}.self_attn.{p}_proj.weight": square for p in "qkvo"},
            **{f"{layer}.mlp.{p}_proj.weight": square for p in ("gate", "up", "down")},
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (rows, HIDDEN),
        }
        state = {}
        for i, (name, shape) in enumerate(shapes.items()):
            values = np.random.default_rng(100 * m + i).integers(-1000, 1000, shape)
            state[name] = torch.from_numpy(values.astype(np.float32) / 3e3).to(torch.bfloat16)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": rows,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        (folder / model).mkdir()
        save_file(state, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder / model, words, added)
