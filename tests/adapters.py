"""Adapters for tests: made by PEFT on tiny models, or written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.checkpoint.lora import Adapter, open_model, read_factors
from resm_kernels.checkpoint.reader import open_checkpoint, read_tensor
from tests.hostile.files import write_adapter as write_adapter


def llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers, fewer key-value heads than heads, untied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def gpt2() -> GPT2LMHeadModel:
    """Weights stored in x out, tied embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def train(
    model: Any, folder: Path, seed: int = 1, **options: Any
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Save the base and a random adapter on it; also what PEFT merges them to."""
    model.save_pretrained(folder / "base")
    config = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    peft = get_peft_model(model, LoraConfig(**{**config, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    peft.save_pretrained(folder / "adapter")
    merged = peft.merge_and_unload().state_dict()
    return folder / "base", folder / "adapter", {n: t.clone() for n, t in merged.items()}


def open_both(base: Path, adapter: Path) -> tuple[Checkpoint, Adapter]:
    """The base and the adapter matched to it."""
    opened = open_checkpoint(ModelReference(str(base)))
    found = open_model(ModelReference(str(adapter)), opened)
    assert isinstance(found, Adapter)
    return opened, found


def rebuilt(base: Checkpoint, adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every base tensor with the adapter applied in float64, and its rounding bound in float32."""
    eps = torch.finfo(torch.float32).eps
    files = {name: file for file in base.files for name in file.tensors}
    result = {}
    for name, info in base.tensors.items():
        tensor = read_tensor(files[name], info).double()
        bound = torch.zeros_like(tensor)
        if name in adapter.full:
            tensor = read_tensor(adapter.files[0], adapter.full[name]).double()
        elif name in adapter.pairs:
            left, right = (f.double() for f in read_factors(adapter, adapter.pairs[name]))
            bound = eps * (left.shape[1] + 3) * (left.abs() @ right.abs().T + tensor.abs())
            tensor = tensor + left @ right.T
        result[name] = tensor, bound
    return result


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder."""
    return load_file(folder / "adapter_model.safetensors")
