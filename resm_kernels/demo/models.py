"""The demo's model, a Llama of about 0.7 million parameters, and its word tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from resm_kernels.demo.tasks import END, PAD, Example

IGNORED = -100
CONTEXT = 64


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model; the feed-forward is twice as wide as the hidden state."""

    hidden: int
    layers: int
    heads: int


def new_tokenizer(vocabulary: Sequence[str]) -> Any:
    """A tokenizer that makes one token of each word in the vocabulary."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    untyped: Any = PreTrainedTokenizerFast
    return untyped(tokenizer_object=words, pad_token=PAD, eos_token=END)


def new_model(size: ModelSize, vocabulary: Sequence[str], seed: int) -> Any:
    """A fresh model in float32; torch's global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=CONTEXT,
        # 1/sqrt(hidden): with the usual 0.02 so narrow a model takes twice as many steps
        initializer_range=size.hidden**-0.5,
        bos_token_id=None,
        eos_token_id=vocabulary.index(END),
        pad_token_id=vocabulary.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 16
    return model


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint with configs and tokenizer; the model itself becomes bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path) -> tuple[Any, Any]:
    """A checkpoint on disk as (model in float32, tokenizer), through the Auto classes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, [examples, longest]; only answers and the end token have labels.

    Padding is on the right, where causal attention keeps it from every other token.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    texts = [f"{example.prompt} {example.answer} {END}" for example in examples]
    rows = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad(rows, batch_first=True, padding_value=IGNORED)
    for row, prompt in enumerate(prompts):
        labels[row, : len(prompt)] = IGNORED
    return ids, labels


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every small file, within a `with` block."""
    untyped: Any = logging
    shown = untyped.is_progress_bar_enabled()
    untyped.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            untyped.enable_progress_bar()


@contextmanager
def one_thread() -> Iterator[None]:
    """Pin torch within a `with` block: such small products gain nothing from a second thread.

    On a busy machine they lose: two threads took 130 s where one took 43.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
