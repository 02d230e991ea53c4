"""The checkpoints and recipes that mergekit's recorded outputs were made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 16, 32, 3, 48
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

RECIPES = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": 0.3}},
            {"model": "c", "parameters": {"weight": 0.9}},
        ],
    },
    "linear_sum": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.7}},
            {"model": "b", "parameters": {"weight": [0.1, 0.6]}},
        ],
        "parameters": {"normalize": False},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": 0.3}},
            {"model": "c", "parameters": {"weight": 0.9}},
        ],
        "parameters": {"lambda": 0.8},
    },
    "task_arithmetic_settings": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {
                "model": "a",
                "parameters": {
                    "weight": [
                        {"filter": "self_attn", "value": [0.0, 0.4, 1.0]},
                        {"filter": "mlp", "value": 0.25},
                        {"value": 0.75},
                    ]
                },
            },
            {"model": "b", "parameters": {"weight": [1.0, 0.2]}},
            {"model": "base"},
        ],
        "parameters": {"normalize": True},
    },
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the tiny Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{prefix}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            found[f"{prefix}.mlp.{name}.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        found[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def write_inputs(folder: Path) -> None:
    """Write base, a, b and c as bfloat16 checkpoints; the same bytes on every machine."""
    weights = {
        name: np.random.default_rng(i).integers(-1000, 1000, shape).astype(np.float32) / 2e4
        for i, (name, shape) in enumerate(shapes().items())
    }
    for m, model in enumerate(("base", "a", "b", "c")):
        state = {}
        for i, (name, weight) in enumerate(weights.items()):
            noise = np.random.default_rng(1000 * m + i).integers(-1000, 1000, weight.shape)
            change = noise.astype(np.float32) / 2e5 if m else np.float32(0)
            state[name] = torch.from_numpy(weight + change).to(torch.bfloat16)
        (folder / model).mkdir()
        save_file(state, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(CONFIG))
