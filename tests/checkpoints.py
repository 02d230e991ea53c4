"""Small checkpoints for tests, made from seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.self_attn.q_proj.bias": (16,),
    "model.layers.1.mlp.up_proj.weight": (24, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
"""Biases that the architecture does not name included."""


def make_state(
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> State:
    """Random weights."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def fine_tuned(base: State, seed: int, scale: float = 0.05) -> State:
    """A base with Gaussian changes."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            changed[name] = (tensor.double() + scale * noise).to(tensor.dtype)
        else:
            changed[name] = tensor.clone()
    return changed


def save(folder: Path, state: State, shards: int = 1, config: object = None) -> Path:
    """Write a checkpoint as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            part = names[i::shards]
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: state[n] for n in part}, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    content = {"model_type": "llama", "dtype": "bfloat16"} if config is None else config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def save_family(folder: Path, experts: int = 3, shards: int = 1) -> tuple[Path, list[Path]]:
    """A base and its experts on disk."""
    base = make_state()
    paths = [
        save(folder / f"expert{t}", fine_tuned(base, t + 1), shards=1 + t % 3)
        for t in range(experts)
    ]
    return save(folder / "base", base, shards), paths


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to compare outputs or prove inputs untouched."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
