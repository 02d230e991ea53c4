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
    "ties": {
        "merge_method": "ties",
        "base_model": "fine-base",
        "models": [
            {"model": "fine-a", "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": "fine-b", "parameters": {"weight": 0.3, "density": [0.2, 0.9]}},
            {"model": "fine-c", "parameters": {"weight": 0.9, "density": 0.0001}},
        ],
        "parameters": {"lambda": 0.8, "int8_mask": True},
    },
    "ties_rescaled": {
        "merge_method": "ties",
        "base_model": "fine-base",
        "models": [
            {"model": "fine-a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "fine-b", "parameters": {"weight": -0.4, "density": 0.7}},
            {"model": "fine-c", "parameters": {"weight": 0.0, "density": 1.0}},
        ],
        "parameters": {"normalize": False, "rescale": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "fine-base",
        "models": [
            {"model": "fine-a", "parameters": {"weight": 0.5, "density": 0.6}},
            {"model": "fine-b", "parameters": {"weight": [0.1, 0.9], "density": 0.3, "gamma": 0.1}},
            {"model": "fine-c", "parameters": {"weight": -0.2, "density": 0.9, "gamma": 0.3}},
        ],
    },
    "breadcrumbs_rescaled": {
        "merge_method": "breadcrumbs",
        "base_model": "fine-base",
        "models": [
            {"model": "fine-a", "parameters": {"weight": 0.5, "density": 0.6}},
            {"model": "fine-b", "parameters": {"weight": 0.7, "density": 1.0}},
        ],
        "parameters": {"normalize": True, "rescale": True, "gamma": 0.05},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "fine-base",
        "models": [
            {"model": "fine-a", "parameters": {"weight": 0.5, "density": 0.6}},
            {"model": "fine-b", "parameters": {"weight": 0.4, "density": 0.5, "gamma": 0.0}},
            {
                "model": "fine-c",
                "parameters": {"weight": 0.7, "gamma": [{"filter": "mlp", "value": 0.2}]},
            },
        ],
        "parameters": {"density": [0.3, 0.8], "lambda": 1.5},
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "fine-base",
        "models": [{"model": "fine-a"}, {"model": "fine-b"}, {"model": "fine-c"}],
    },
    "model_stock_filter_wise": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"filter_wise": True},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "far"}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0.0, 0.5, 0.3]},
                {"filter": "mlp", "value": [1.0, 0.1]},
                {"value": 0.5},
            ]
        },
    },
    "slerp_near": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"t": 0.3},
    },
    "passthrough": {
        "merge_method": "passthrough",
        "models": [
            {
                "model": "a",
                "parameters": {
                    "scale": [
                        {"filter": "o_proj", "value": 0.0},
                        {"filter": "mlp", "value": [-0.5, 1.5]},
                        {"value": 1.0},
                    ]
                },
            }
        ],
    },
    "passthrough_plain": {"merge_method": "passthrough", "models": [{"model": "b"}]},
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
    """Write the checkpoints; the same bytes on every machine.

    base, a, b and c are bfloat16; `fine-` ones float32, where no two changes of a tensor are of
    one magnitude (mergekit's sorts are not stable); far is another bfloat16 model.
    """
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
        _write(folder / model, state)
    for m, model in enumerate(("fine-base", "fine-a", "fine-b", "fine-c")):
        state = {}
        for i, (name, weight) in enumerate(weights.items()):
            dice = np.random.default_rng(5000 * m + i)
            size = dice.permutation(weight.size).reshape(weight.shape) + np.float32(1)
            signed = np.where(dice.integers(0, 2, weight.shape), size, -size)
            change = (signed * (1e-2 / weight.size) if m else 0 * size).astype(np.float32)
            state[name] = torch.from_numpy(weight + change)
        _write(folder / model, state)
    far = {
        name: np.random.default_rng(9000 + i).integers(-1000, 1000, shape).astype(np.float32) / 2e4
        for i, (name, shape) in enumerate(shapes().items())
    }
    _write(folder / "far", {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in far.items()})


def _write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
