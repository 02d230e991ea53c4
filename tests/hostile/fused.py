"""Fused weights and stacks of experts under configs that lie: whole, or split as they truly are."""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.hostile.cases import Arrange, Case, Site, good
from tests.hostile.files import write_model

STACK = "model.layers.0.mlp.experts.gate_up_proj"
QKV = "model.layers.0.self_attn.qkv_proj.weight"
DBRX = "transformer.blocks.0.ffn.experts.mlp.w1"
PLAIN = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_local_experts": 3,
    "intermediate_size": 4,
}
SIZES = (0, -1, 2**63, 10**12, 10**30, 1.5, "8", None, True, [8], {"a": 8})


def models(config: object, shapes: dict[str, tuple[int, ...]] | None = None) -> Arrange:
    """Three models that hold fused weights, all with this config."""

    def arrange(site: Site) -> None:
        found = shapes or {STACK: (3, 8, 8), QKV: (16, 8), DBRX: (12, 8)}
        for seed, folder in enumerate(site.models):
            generator = torch.Generator().manual_seed(seed)
            made = {n: torch.randn(shape, generator=generator) for n, shape in found.items()}
            write_model(folder, made)
            (folder / "config.json").write_text(json.dumps(config))

    return arrange


def lies(key: str, value: object) -> Arrange:
    return models({**PLAIN, key: value})


def dbrx(**config: Any) -> Arrange:
    return models({"model_type": "dbrx", "ffn_config": config})


def stacks(count: int, experts: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i}.mlp.experts.down_proj": (experts, 1, 1) for i in range(count)}


WIDE = {f"k{i}": 0 for i in range(300_000)}

FUSED: list[Case] = [
    good("sizes that fit", models(PLAIN)),
    *(good(f"{key} is {value!r}", lies(key, value)) for key in PLAIN for value in SIZES),
    good("a text_config that is a list", models({**PLAIN, "text_config": [1]})),
    good("a text_config of other sizes", models({**PLAIN, "text_config": {"head_dim": 10**12}})),
    good("text_configs inside one another",
        models({"thinker_config": {"text_config": {"text_config": PLAIN}}})),
    good("a model_type that is a number", lies("model_type", 7)),
    good("dbrx of 10**12 experts", dbrx(moe_num_experts=10**12, ffn_hidden_size=1)),
    good("dbrx of 8193 experts", dbrx(moe_num_experts=8193, ffn_hidden_size=1)),
    good("dbrx of 12 experts of no rows", dbrx(moe_num_experts=12, ffn_hidden_size=0)),
    good("8193 experts", models({"num_experts": 8193}, stacks(1, 8193))),
    good("a list of counts", models({**PLAIN, "num_experts": [3, 10**12, "x", [3]]})),
    good("a list of a million counts, 200 stacks",
        models({"num_experts": [9] * 1_000_000}, stacks(200, 2)), megabytes=128),
    good("a text_config of 300,000 keys, 500 stacks",
        models({"text_config": WIDE, "num_experts": 9}, stacks(500, 2)), megabytes=384),
]  # fmt: skip
