"""Which matrices a tensor holds: every entry once, and the same maps as the models' own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2FN

from resm_kernels.methods import matrices
from resm_kernels.methods.matrices import Split, matrix_shapes, split_declines, split_rule

Taps = dict[str, torch.Tensor]


def cases(kv: int, per_kv: int, hd: int, ff: int, experts: int) -> list[tuple[Any, ...]]:
    """Name, shape, config and label of one tensor at least of every rule."""
    heads = kv * per_kv
    hidden = heads * hd + 4  # not a product of the heads: nothing may be read off it
    qkv, gqa, fused, both = "q, k, v", heads + 2 * kv, 3 * heads * hd, 2 * ff
    base = {"num_attention_heads": heads, "head_dim": hd, "hidden_size": hidden}
    gqa_base = {**base, "num_key_value_heads": kv}
    moe = {**base, "moe_intermediate_size": ff, "num_experts": experts}
    if both == hidden:
        moe["hidden_size"] = hidden = hidden + 4
    stacked, each = f"{experts} experts x gate, up", f"{experts} experts"
    latent = {**base, "kv_lora_rank": ff, "qk_rope_head_dim": hd, "qk_nope_head_dim": hd + 1}
    latent["v_head_dim"] = hd + 2
    delta = {"linear_num_key_heads": kv, "linear_num_value_heads": heads, **base}
    delta |= {"linear_key_head_dim": hd, "linear_value_head_dim": hd + 1, "model_type": "qwen3_5"}
    ssm = {"hidden_size": hidden, "expand": 2, "state_size": hd, "n_groups": kv, "num_heads": heads}
    small = {"hidden_size": hidden, "mamba_expand": 2, "mamba_d_state": hd, "mamba_dt_rank": kv}
    dbrx_ffn = {"moe_num_experts": experts, "ffn_hidden_size": ff}
    return [
        ("h.0.attn.c_attn.weight", (hidden, fused), {**base, "model_type": "gpt2"}, qkv),
        ("h.0.crossattention.c_attn.weight", (hidden, 2 * heads * hd),
         {**base, "model_type": "gpt2"}, "k, v"),
        ("h.0.attn.c_attn.weight", (fused, hidden), {**base, "model_type": "qwen"}, qkv),
        ("h.0.attn.c_attn.weight", ((heads + 2) * hd, hidden),
         {**base, "model_type": "gpt_bigcode", "multi_query": True}, qkv),
        ("h.0.attn.c_attn.weight", (fused, hidden),
         {**base, "model_type": "gpt_bigcode", "multi_query": False}, qkv),
        ("l.0.attention.query_key_value.weight", (fused, hidden),
         {**base, "model_type": "gpt_neox"}, qkv),
        ("h.0.self_attention.query_key_value.weight", (gqa * hd, hidden),
         {**gqa_base, "model_type": "falcon", "new_decoder_architecture": True}, qkv),
        ("h.0.self_attention.query_key_value.weight", (gqa * hd, hidden),
         {**base, "n_head_kv": kv, "model_type": "RefinedWeb"}, qkv),
        ("h.0.self_attention.query_key_value.weight", ((heads + 2) * hd, hidden),
         {**base, "model_type": "RefinedWebModel", "multi_query": True}, qkv),
        ("l.0.self_attn.query_key_value.weight", (gqa * hd, hidden),
         {**gqa_base, "model_type": "phi3small"}, qkv),
        ("l.0.self_attention.query_key_value.weight", (gqa * hd, hidden),
         {**base, "model_type": "chatglm", "multi_query_attention": True,
          "multi_query_group_num": kv}, qkv),
        ("l.0.attention.query_key_value.weight", (fused, hidden),
         {**base, "model_type": "chatglm"}, qkv),
        ("h.0.attn.qkv_proj.weight", (fused * 4, hidden),
         {**base, "head_dim": 4 * hd, "model_type": "codegen"}, "q, v, k"),
        ("l.0.self_attn.qkv_proj.weight", (fused, hidden), {**base, "model_type": "minimax"}, qkv),
        ("l.0.self_attn.qkv_proj.weight", (gqa * hd, hidden), gqa_base, qkv),
        ("l.0.self_attn.qkv_proj.base_layer.weight", (gqa * hd, hidden), gqa_base, qkv),
        ("l.0.attention.wqkv.weight", (gqa * hd, hidden),
         {**gqa_base, "model_type": "internlm2"}, qkv),
        ("visual.blocks.0.attn.qkv.weight", (3 * hidden, hidden), {}, qkv),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (3 * hidden, hidden), {}, qkv),
        ("l.0.self_attention.kv_proj.weight", (2 * kv * hd, hidden),
         {**gqa_base, "kv_channels": hd, "model_type": "jetmoe"}, "k, v"),
        ("l.0.self_attn.q_proj.weight", (2 * heads * hd, hidden),
         {**base, "model_type": "qwen3_next"}, "q, gate"),
        ("l.0.self_attn.kv_a_proj_with_mqa.weight", (ff + hd, hidden), latent, "latent, k_rope"),
        ("l.0.self_attn.kv_b_proj.weight", (heads * (2 * hd + 3), ff), latent, "k, v"),
        ("l.0.mlp.experts.gate_up_proj", (experts, hidden, both),
         {**moe, "model_type": "gpt_oss"}, stacked),
        ("l.0.feed_forward.experts.gate_up_proj", (experts, hidden, both),
         {"text_config": {**moe, "model_type": "llama4_text"}}, stacked),
        ("l.0.mlp.experts.fc1.weight", (experts, hidden, both),
         {"text_config": {**moe, "model_type": "aria_text"}}, stacked),
        ("l.0.mlp.experts.gate_up_proj", (experts, hidden, both),
         {"text_config": {**moe, "model_type": "qwen3_vl_moe_text"}}, stacked),
        ("l.0.mlp.experts.gate_up_proj", (experts, both, hidden),
         {"text_config": {**moe, "model_type": "qwen3_vl_moe_text"}}, stacked),
        ("l.0.mlp.experts.gate_up_proj", (experts, both, hidden), moe, stacked),
        ("l.0.mlp.experts.down_proj", (experts, hidden, ff), moe, each),
        ("l.0.mlp.gate_up_proj.weight", (both, hidden),
         {**base, "intermediate_size": ff}, "gate, up"),
        ("l.0.mlp.up_proj.weight", (both, hidden),
         {**base, "ff_intermediate_size": ff, "model_type": "phi3small"}, "gate, up"),
        ("l.0.mlp.dense_h_to_4h.weight", (both, hidden),
         {**base, "ffn_hidden_size": ff, "model_type": "chatglm"}, "gate, up"),
        ("l.0.shared_mlp.input_linear.weight", (both, hidden),
         {**base, "shared_intermediate_size": ff}, "gate, up"),
        ("l.0.block_sparse_moe.input_linear.weight", (experts, both, hidden), moe, stacked),
        ("b.0.ffn.experts.mlp.w2", (experts * ff, hidden),
         {"model_type": "dbrx", "ffn_config": dbrx_ffn}, each),
        ("l.0.mixer.in_proj.weight", (4 * hidden, hidden), {**ssm, "model_type": "mamba"}, "x, z"),
        ("l.0.mamba.in_proj.weight", (4 * hidden, hidden), {**small, "model_type": "zamba"},
         "x, z"),
        ("l.0.mixer.in_proj.weight", (4 * hidden + 2 * kv * hd + heads, hidden),
         {**ssm, "model_type": "mamba2"}, "z, x, B, C, dt"),
        ("l.0.mamba.x_proj.weight", (kv + 2 * hd, hidden), {**small, "model_type": "jamba"},
         "dt, B, C"),
        ("l.0.conv.in_proj.weight", (3 * hidden, hidden), {**moe, "model_type": "lfm2"},
         "B, C, x"),
        ("l.0.linear_attn.in_proj_qkvz.weight", (2 * kv * hd + 2 * heads * (hd + 1), hidden),
         delta, "q, k, v, z"),
        ("l.0.linear_attn.in_proj_qkv.weight", (2 * kv * hd + heads * (hd + 1), hidden),
         delta, qkv),
        ("l.0.linear_attn.in_proj_ba.weight", (2 * heads, hidden), delta, "b, a"),
    ]  # fmt: skip


def covers_once(split: Split, shape: tuple[int, ...]) -> None:
    counts = torch.zeros(shape)
    tensor = torch.arange(counts.numel()).reshape(shape)
    rebuilt = torch.full(shape, -1)
    for part in split.parts:
        matrix = part.of(tensor)
        assert matrix.shape == part.shape
        part.put(counts, part.of(counts) + 1)
        part.put(rebuilt, matrix)
    assert bool((counts == 1).all())
    assert torch.equal(rebuilt, tensor)
    batches = matrix_shapes(split, shape)
    assert sorted(i for indices in batches.values() for i in indices) == list(
        range(len(split.parts))
    )
    assert all(split.parts[i].shape == key for key, indices in batches.items() for i in indices)


SIZES = st.tuples(*[st.integers(1, 5)] * 3, st.integers(1, 9), st.integers(2, 5))


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES)
def test_every_rule_covers_each_entry_once(sizes: tuple[int, int, int, int, int]) -> None:
    for name, shape, config, label in cases(*sizes):
        split = split_rule(name, shape, config)
        assert split is not None, (name, split_declines(name, shape, config))
        assert split.label == label, name
        assert split.note is None, name
        assert split_declines(name, shape, config) is None
        covers_once(split, shape)


def test_parts_are_views_unless_heads_are_interleaved() -> None:
    copied = set()
    for name, shape, config, _ in cases(2, 2, 8, 12, 4):
        split, tensor = split_rule(name, shape, config), torch.zeros(shape)
        assert split is not None
        start = tensor.untyped_storage().data_ptr()
        if any(part.of(tensor).untyped_storage().data_ptr() != start for part in split.parts):
            copied.add(name.split(".")[-2])
    interleaved = {"c_attn", "query_key_value", "qkv_proj", "wqkv", "q_proj", "kv_b_proj"}
    assert copied == interleaved | {"in_proj_qkvz", "in_proj_ba"}


def test_the_cases_reach_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    applies = matrices._applies

    def spy(rule: Any, module: str, model: str) -> bool:
        found = applies(rule, module, model)
        if found:
            used.update({(rule, module)})
        return found

    monkeypatch.setattr(matrices, "_applies", spy)
    for name, shape, config, _ in cases(2, 2, 8, 12, 4):
        split_rule(name, shape, config)
    reached = {rule for rule, _ in used}
    assert [r.names for r in matrices.RULES if r not in reached] == [
        ("query_key_value", "c_attn")  # the rule that declines unknown model types
    ]


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, axis=st.integers(0, 2), more=st.sampled_from([1, 2, 7]))
def test_sizes_that_do_not_add_up_are_not_split(
    sizes: tuple[int, int, int, int, int], axis: int, more: int
) -> None:
    """A longer fused axis is refused with a reason, or found to be a plain stack with a note."""
    for name, shape, config, label in cases(*sizes):
        if len(shape) == 2 and "qkv.weight" not in name:
            fused = 1 if (name.endswith("c_attn.weight") and "gpt2" in str(config)) else 0
            wrong = list(shape)
            wrong[fused] += more
            if label == "gate, up" or "in_proj_weight" in name:
                wrong[fused] = shape[fused] + 1
            assert split_rule(name, wrong, config) is None, (name, wrong)
            assert str(wrong[fused]) in (split_declines(name, wrong, config) or ""), name
        elif "gate, up" in label:
            wrong = [n + (1 + more) * (i == axis) for i, n in enumerate(shape)]
            split = split_rule(name, wrong, config)
            if axis == 0:
                assert split is None
            else:
                assert split is not None
                assert split.label == f"{shape[0]} experts"
                assert split.note


# The layouts against the code of transformers: a part is zeroed, and only what it feeds is zero.


class Splits(TorchFunctionMode):
    """Keeps what the model itself cuts the output of a module into."""

    def __init__(self, names: tuple[str, ...], taps: Taps) -> None:
        super().__init__()
        self.names, self.taps, self.armed = names, taps, False

    def arm(self, *_: Any) -> None:
        self.armed = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cuts = ("split", "chunk", "unbind")
        if self.armed and getattr(func, "__name__", "") in cuts and len(out) == len(self.names):
            self.taps.update(zip(self.names, out, strict=True))
            self.armed = False
        return out


def probe(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    module.probed = {"q": query, "k": key, "v": value}
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("probe", probe)


def build(model_type: str, cls: str = "AutoModel", seed: int = 0, **sizes: Any) -> Any:
    """A tiny random model with no biases, so that a zero weight means a zero output."""
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    config._attn_implementation = sizes.get("attn", "eager")
    torch.manual_seed(seed)
    model = getattr(transformers, cls).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


def on_disk(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    return config


def forward(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(1, 7)[None], use_cache=True)


def attention_taps(*names: str) -> Callable[[Any, Any], Taps]:
    def run(model: Any, parent: Any) -> Taps:
        forward(model)
        return {name: parent.probed[name].clone() for name in names}

    return run


def cached(model: Any, parent: Any) -> Taps:
    layer = forward(model).past_key_values.layers[0]
    return {"k": layer.keys.clone(), "v": layer.values.clone()}


def convolved(*names: str) -> Callable[[Any, Any], Taps]:
    """What a Mamba layer keeps of its convolution's input: x, then B and C (2 groups of 8)."""

    def run(model: Any, parent: Any) -> Taps:
        out = forward(model)
        cache = out.cache_params if hasattr(out, "cache_params") else out.past_key_values
        state = cache.layers[0].conv_states
        state = state[0] if isinstance(state, dict) else state
        if len(names) == 1:
            return {names[0]: state.clone()}
        states = 2 * 8
        cut = state.clone().split([state.shape[1] - 2 * states, states, states], dim=1)
        return dict(zip(names, cut, strict=True))

    return run


def split_by_model(*names: str) -> Callable[[Any, Any], Taps]:
    def run(model: Any, parent: Any) -> Taps:
        taps: Taps = {}
        mode = Splits(names, taps)
        handle = parent.fused.register_forward_hook(mode.arm)
        with mode:
            forward(model)
        handle.remove()
        return {name: tap.clone() for name, tap in taps.items()}

    return run


def method_taps(method: str) -> Callable[[Any, Any], Taps]:
    """What the attention's own splitting method returns."""

    def run(model: Any, parent: Any) -> Taps:
        found: list[Any] = []
        original = getattr(type(parent), method)

        def spy(*args: Any) -> Any:
            found.append(original(parent, *args))
            return found[-1]

        setattr(parent, method, spy)
        forward(model)
        delattr(parent, method)
        return dict(zip(("q", "k", "v"), (t.clone() for t in found[0]), strict=True))

    return run


def gate_tap(model: Any, parent: Any) -> Taps:
    """The input of the activation, and only of it, is the gate."""
    taps: Taps = {}
    acts = tuple({type(ACT2FN[name]) for name in ("silu", "gelu")})
    act = next(m for m in parent.modules() if isinstance(m, acts))
    handle = act.register_forward_pre_hook(lambda _, args: taps.update(gate=args[0].clone()))
    forward(model)
    handle.remove()
    return taps


TINY = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 32, "n_layer": 1, "n_embd": 32, "n_head": 4, "n_positions": 16}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
GQA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 24}
PROBED = {"attn": "probe"}
SSM = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 32, "state_size": 8}
LATENT = {**TINY, "q_lora_rank": 8, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
LATENT |= {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 6,
    "intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
HYBRID = {**GQA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
HYBRID_2 = {**GQA, "num_hidden_layers": 2}
QWEN_NEXT = {**GQA, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8}
QWEN_NEXT |= {"shared_expert_intermediate_size": 8, "num_experts_per_tok": 2}
QWEN_NEXT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
QWEN_NEXT |= {"linear_key_head_dim": 8, "linear_value_head_dim": 6}
FULL = {"layer_types": ["full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}

DBRX = {"vocab_size": 32, "n_layers": 1, "d_model": 32, "n_heads": 4, "max_seq_len": 16}
DBRX |= {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e3}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "hidden_size": 32}}

MODELS = [
    ("gpt2", {**GPT, **PROBED}, "attn.c_attn", attention_taps("q", "k", "v")),
    ("openai-gpt", GPT, "attn.c_attn", split_by_model("q", "k", "v")),
    ("gpt_bigcode", {**GPT, **PROBED, "multi_query": True}, "attn.c_attn",
     attention_taps("q", "k", "v")),
    ("gpt_bigcode", {**GPT, **PROBED, "multi_query": False}, "attn.c_attn",
     attention_taps("q", "k", "v")),
    ("gpt_neox", {**TINY, **PROBED, "intermediate_size": 24}, "attention.query_key_value",
     attention_taps("q", "k", "v")),
    ("gpt_neox_japanese", TINY, "attention.query_key_value", cached),
    ("bloom", {"vocab_size": 32, "n_layer": 1, "hidden_size": 32, "n_head": 4},
     "query_key_value", method_taps("_reshape")),
    ("persimmon", {**TINY, "intermediate_size": 24, "hidden_act": "silu"}, "query_key_value",
     method_taps("_split_heads")),
    ("falcon", {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2},
     "query_key_value", method_taps("_split_heads")),
    ("falcon", {**TINY, "multi_query": True}, "query_key_value", method_taps("_split_heads")),
    ("falcon", {**TINY, "multi_query": False}, "query_key_value", method_taps("_split_heads")),
    ("phi3", {**GQA, **PROBED}, "qkv_proj", attention_taps("q", "k", "v")),
    ("phi3", GQA, "gate_up_proj", gate_tap),
    ("glm", {**GQA, "head_dim": 8}, "gate_up_proj", gate_tap),
    ("glm4", {**GQA, "head_dim": 8}, "gate_up_proj", gate_tap),
    ("codegen", {**GPT, "n_inner": 24, "rotary_dim": 4}, "qkv_proj", cached),
    ("minimax", {**GQA, **LINEAR, "num_local_experts": 4, "head_dim": 8, "block_size": 8},
     "qkv_proj", split_by_model("q", "k", "v")),
    ("mpt", {"vocab_size": 32, "n_layers": 1, "d_model": 32, "n_heads": 4, "max_seq_len": 16},
     "Wqkv", cached),
    ("dbrx", {**DBRX, **PROBED}, "Wqkv", attention_taps("q", "k", "v")),
    ("modernbert", {**TINY, **PROBED, "intermediate_size": 24}, "Wqkv",
     attention_taps("q", "k", "v")),
    ("modernbert", {**TINY, "intermediate_size": 24}, "Wi", gate_tap),
    ("jetmoe", {**TINY, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 24,
                "num_local_experts": 4, "num_experts_per_tok": 2}, "kv_proj", cached),
    ("granitemoeshared", {**GQA, "shared_intermediate_size": 20, "num_local_experts": 4},
     "shared_mlp.input_linear", gate_tap),
    ("deepseek_v3", LATENT, "kv_b_proj", split_by_model("k", "v")),
    ("deepseek_v2", LATENT, "kv_b_proj", split_by_model("k", "v")),
    ("deepseek_v3", LATENT, "kv_a_proj_with_mqa", split_by_model("latent", "k_rope")),
    ("qwen3_next", {**QWEN_NEXT, **FULL, **PROBED}, "q_proj", attention_taps("q")),
    ("qwen3_next", {**QWEN_NEXT, **LINEAR}, "in_proj_qkvz",
     split_by_model("q", "k", "v", "z")),
    ("qwen3_next", {**QWEN_NEXT, **LINEAR}, "in_proj_ba", split_by_model("b", "a")),
    ("qwen3_5_text", {**QWEN_NEXT, **FULL, **PROBED}, "q_proj", attention_taps("q")),
    ("qwen3_5_text", {**QWEN_NEXT, **LINEAR}, "in_proj_qkv", split_by_model("q", "k", "v")),
    ("mamba", SSM, "in_proj", convolved("x")),
    ("mamba", SSM, "x_proj", split_by_model("dt", "B", "C")),
    ("falcon_mamba", SSM, "in_proj", convolved("x")),
    ("mamba2", {**SSM, "num_heads": 8, "head_dim": 8, "n_groups": 2}, "in_proj",
     convolved("x", "B", "C")),
    ("bamba", {**HYBRID, "attn_layer_indices": [1], "num_hidden_layers": 2}, "in_proj",
     convolved("x", "B", "C")),
    ("falcon_h1", {**HYBRID, "mamba_d_ssm": 64}, "in_proj", convolved("x", "B", "C")),
    ("granitemoehybrid", {**HYBRID, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2,
                          "num_local_experts": 4},
     "in_proj", convolved("x", "B", "C")),
    ("zamba2", {**HYBRID_2, "n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 8,
                "num_mem_blocks": 1, "use_shared_attention_adapter": False,
                "mamba_headdim": 8, "layers_block_type": ["mamba", "hybrid"]},
     "mamba.in_proj", convolved("x", "B", "C")),
    ("nemotron_h", {**HYBRID_2, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
                    "ssm_state_size": 8, "layers_block_type": ["mamba", "attention"]},
     "in_proj", convolved("x", "B", "C")),
    ("zamba", {**HYBRID_2, "n_mamba_heads": 2, "mamba_dt_rank": 4, "num_hidden_layers": 3,
               "layers_block_type": ["mamba", "hybrid", "hybrid"]},
     "mamba.in_proj", convolved("x")),
    ("jamba", {**HYBRID_2, "mamba_dt_rank": 4, "num_experts": 4, "attn_layer_period": 2,
               "attn_layer_offset": 1, "use_mamba_kernels": False}, "in_proj", convolved("x")),
    ("jamba", {**HYBRID_2, "mamba_dt_rank": 4, "num_experts": 4, "attn_layer_period": 2,
               "attn_layer_offset": 1, "use_mamba_kernels": False}, "x_proj",
     split_by_model("dt", "B", "C")),
    ("lfm2", {**HYBRID_2, "layer_types": ["conv", "full_attention"]}, "conv.in_proj",
     split_by_model("B", "C", "x")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "sizes", "module", "taps"), MODELS,
    ids=[f"{m}-{n}-{i}" for i, (m, _, n, _) in enumerate(MODELS)],
)  # fmt: skip
def test_a_part_feeds_what_its_name_says(
    model_type: str, sizes: dict[str, Any], module: str, taps: Callable[[Any, Any], Taps]
) -> None:
    model = build(model_type, **sizes)
    name = next(n for n, _ in model.named_parameters() if n.endswith(f"{module}.weight"))
    parameter = model.get_parameter(name)
    path = name.removesuffix(".weight")
    parent = model.get_submodule(path.rpartition(".")[0])
    object.__setattr__(parent, "fused", model.get_submodule(path))
    split = split_rule(name, parameter.shape, on_disk(model))
    assert split is not None, split_declines(name, parameter.shape, on_disk(model))
    covers_once(split, tuple(parameter.shape))
    before = taps(model, parent)
    assert before
    assert set(before) <= {part.name for part in split.parts}
    assert all(bool(tap.any()) for tap in before.values())
    whole = parameter.detach().clone()
    for part in split.parts:
        with torch.no_grad():
            part.put(parameter, torch.zeros(part.shape))
        for tap, value in taps(model, parent).items():
            if tap == part.name:
                assert not bool(value.any()), f"{part.name} is zero but {tap} is not"
            else:
                torch.testing.assert_close(value, before[tap], msg=f"{part.name} feeds {tap}")
        with torch.no_grad():
            parameter.copy_(whole)


MOE = {**GQA, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 12}
MOE |= {"num_experts_per_tok": 2, "head_dim": 8, "moe_num_experts": 4, "intermediate_size": 12}
STACKS = [
    ("gpt_oss", MOE, "gate_up_proj"),
    ("llama4_text", {**MOE, "intermediate_size_mlp": 24}, "gate_up_proj"),
    ("aria_text", MOE, "gate_up_proj"),
    ("openai_privacy_filter", MOE, "gate_up_proj"),
    ("qwen3_moe", MOE, "gate_up_proj"),
    ("qwen3_vl_moe_text", MOE, "gate_up_proj"),
    ("mixtral", MOE, "gate_up_proj"),
    ("granitemoe", MOE, "gate_up_proj"),
    ("dbrx", DBRX, "mlp.w2"),
    *[(model, MOE, "down_proj") for model in ("gpt_oss", "qwen3_moe", "granitemoe")],
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "sizes", "stack"), STACKS, ids=lambda x: str(x)[:20])
def test_the_matrices_of_a_stack_are_its_experts(
    model_type: str, sizes: dict[str, Any], stack: str
) -> None:
    """Tokens go to one expert each: a part changes its own expert's tokens and no others."""
    model = build(model_type, **sizes)
    name = next(n for n, p in model.named_parameters() if n.endswith(f"experts.{stack}"))
    parameter = model.get_parameter(name)
    experts = model.get_submodule(name.removesuffix(f".{stack}"))
    split = split_rule(name, parameter.shape, on_disk(model))
    assert split is not None
    covers_once(split, tuple(parameter.shape))
    owner = torch.arange(8) // 2
    tokens = torch.randn(8, 32)

    def run() -> torch.Tensor:
        with torch.no_grad():
            if model_type.startswith("llama4"):
                return experts(tokens).reshape(8, 32)
            out = experts(tokens, owner[:, None], torch.ones(8, 1))
            return out.reshape(8, 32)

    before, whole = run(), parameter.detach().clone()
    for expert in range(4):
        mine = owner == expert
        for part in (p for p in split.parts if p.name.split()[1] == str(expert)):
            for factor in (0.0, -1.0):
                with torch.no_grad():
                    part.put(parameter, part.of(whole) * factor)
                out = run()
                torch.testing.assert_close(out[~mine], before[~mine])
                if not part.name.endswith("gate") and model_type not in CLAMPED:
                    torch.testing.assert_close(out[mine], before[mine] * factor)
                elif part.name.endswith("gate") and factor == 0.0:
                    assert not bool(out[mine].any())
                elif part.name.endswith("gate"):
                    assert not torch.allclose(out[mine], -before[mine], rtol=1e-3)
                elif part.name.endswith("up"):
                    assert bool(out[mine].any()), "(up + 1) * gate is not zero where up is"
                with torch.no_grad():
                    parameter.copy_(whole)


CLAMPED = ("gpt_oss", "openai_privacy_filter")


VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
VISION |= {"out_hidden_size": 32, "deepstack_visual_indexes": []}
VISION_MOE = {"text_config": MOE, "vision_config": VISION}


@pytest.mark.parametrize(
    ("model_type", "cls", "sizes", "stored"),
    [
        ("qwen3_vl_moe", "AutoModelForImageTextToText", VISION_MOE, "mlp.experts.gate_up_proj"),
        ("granitemoe", "AutoModelForCausalLM", MOE, "block_sparse_moe.input_linear.weight"),
        ("qwen3_moe", "AutoModelForCausalLM", MOE, None),
    ],
)
def test_the_stored_layout_where_transformers_converts_it(
    tmp_path: Path, model_type: str, cls: str, sizes: dict[str, Any], stored: str | None
) -> None:
    """Files may keep a model's first layout: transposed, renamed, or one tensor per expert."""
    model = build(model_type, cls, **sizes)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    held = next(p for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    if stored is None:
        single = next(n for n in tensors if n.endswith("experts.0.gate_proj.weight"))
        assert torch.equal(tensors[single], held[0, :12])
        assert all(split_rule(n, t.shape, config) is None for n, t in tensors.items())
        assert all(split_declines(n, t.shape, config) is None for n, t in tensors.items())
        return
    name = next(n for n in tensors if n.endswith(stored))
    layouts = [tensors[name]]
    if model_type == "qwen3_vl_moe":  # Qwen's own files are [E, in, out], newly saved ones not
        layouts.append(tensors[name].mT.contiguous())
    for turned, tensor in enumerate(layouts):
        split = split_rule(name, tensor.shape, config)
        assert split is not None
        assert split.label == "4 experts x gate, up"
        halves = [half for expert in held for half in expert.chunk(2)]
        for part, half in zip(split.parts, halves, strict=True):
            assert torch.equal(part.of(tensor), half.mT if turned else half)


def test_open_clip_attention_is_cut_as_torch_cuts_it() -> None:
    attention = torch.nn.MultiheadAttention(12, 3, bias=False)
    weight = attention.in_proj_weight
    split = split_rule("visual.transformer.resblocks.0.attn.in_proj_weight", weight.shape, {})
    assert split is not None
    x = torch.randn(5, 12)
    cut = torch.nn.functional._in_projection_packed(x, x, x, weight)
    for part, expected in zip(split.parts, cut, strict=True):
        torch.testing.assert_close(x @ part.of(weight).mT, expected)


def test_qwen_vision_attention() -> None:
    config = transformers.AutoConfig.for_model(
        "qwen2_vl", vision_config={"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 16}
    )
    module = transformers.models.qwen2_vl.modeling_qwen2_vl.VisionAttention
    config.vision_config._attn_implementation = "probe"
    torch.manual_seed(0)
    attention = module(config.vision_config)
    torch.nn.init.zeros_(attention.qkv.bias)
    weight = attention.qkv.weight
    name = "visual.blocks.0.attn.qkv.weight"
    split = split_rule(name, weight.shape, json.loads(config.to_json_string()))
    assert split is not None
    x = torch.randn(6, 32)
    angles = (torch.ones(6, 8), torch.zeros(6, 8))
    with torch.no_grad():
        attention(x, cu_seqlens=torch.tensor([0, 6]), position_embeddings=angles)
        for part in split.parts:
            seen = attention.probed[part.name][0].transpose(0, 1).reshape(6, 32)
            torch.testing.assert_close(x @ part.of(weight).mT, seen)


# Models whose code transformers 5.23 does not have. Each statement cuts the fused output y
# [tokens, rows] as the published code does, with its own operations.

H, KV, HD, WIDTH, FF = 6, 2, 4, 20, 9
HEADS = {"num_attention_heads": H, "head_dim": HD, "hidden_size": WIDTH}


def three_h_d(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """flash-attn MHA, microsoft/phi-1_5 modeling_mixformer: "... (three h d) -> ... three h d"."""
    return y.unflatten(-1, (3, H, HD)).flatten(-2).unbind(-2)


def query_then_kv(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """microsoft/phi modeling_phi.py with n_head_kv: q first, kv "(two hkv d)"."""
    kv = y[..., H * HD :].unflatten(-1, (2, KV, HD)).flatten(-2)
    return y[..., : H * HD], kv[..., 0, :], kv[..., 1, :]


def kv_n_heads(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """llm-foundry attention.py GroupedQueryAttention: split [d_model, kv * hd, kv * hd]."""
    return y.split([H * HD, KV * HD, KV * HD], dim=-1)


def baichuan(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """baichuan-inc modeling_baichuan.py: unflatten(-1, (3, hidden_size))."""
    proj = y[None].unflatten(-1, (3, H * HD)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    return proj[0][0], proj[1][0], proj[2][0]


def qwen(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Qwen modeling_qwen.py: c_attn(x).split(split_size, dim=2)."""
    return y.split(H * HD, dim=-1)


def internlm2(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """internlm modeling_internlm2.py: "(h gs d) -> h gs d", the last two of gs are k and v."""
    states = y.unflatten(-1, (KV, H // KV + 2, HD))
    return (
        states[..., :-2, :].flatten(-3),
        states[..., -2, :].flatten(-2),
        states[..., -1, :].flatten(-2),
    )


def chatglm2(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """THUDM chatglm2/3, glm-4-9b modeling_chatglm.py: split at the query groups."""
    return y.split([H * HD, KV * HD, KV * HD], dim=-1)


def chatglm1(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """THUDM chatglm-6b modeling_chatglm.py: view [heads, 3 * hd], cut on the last axis."""
    q, k, v = y.unflatten(-1, (H, 3 * HD)).split(HD, dim=-1)
    return q.flatten(-2), k.flatten(-2), v.flatten(-2)


def gelu_pairs(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """microsoft Phi-3-small gegelu: the activated half is [::2], the linear one [1::2]."""
    return y[..., ::2], y[..., 1::2]


def swiglu(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """THUDM chatglm2 modeling_chatglm.py: x = chunk(x, 2); silu(x[0]) * x[1]."""
    return y.chunk(2, dim=-1)


GROUPED = {**HEADS, "num_key_value_heads": KV}
STATEMENTS = [
    ("mixer.Wqkv", {"model_type": "phi-msft", "n_head": H, "n_embd": H * HD}, three_h_d),
    ("mixer.Wqkv", {"model_type": "phi-msft", "n_head": H, "n_head_kv": KV, "n_embd": H * HD},
     query_then_kv),
    ("attn.Wqkv", {"model_type": "mpt", "n_heads": H, "d_model": H * HD,
                   "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": KV}},
     kv_n_heads),
    ("self_attn.W_pack", {**HEADS, "model_type": "baichuan"}, baichuan),
    ("attn.c_attn", {"model_type": "qwen", "num_attention_heads": H, "kv_channels": HD}, qwen),
    ("attention.wqkv", {**GROUPED, "model_type": "internlm2"}, internlm2),
    ("attention.wqkv", {"model_type": "internvl_chat",
                        "llm_config": {**GROUPED, "model_type": "internlm2"}}, internlm2),
    ("self_attn.query_key_value", {**GROUPED, "model_type": "phi3small"}, internlm2),
    ("self_attention.query_key_value",
     {"model_type": "RefinedWeb", "n_head": H, "n_head_kv": KV, "hidden_size": H * HD}, internlm2),
    ("self_attention.query_key_value",
     {**HEADS, "model_type": "chatglm", "multi_query_attention": True, "kv_channels": HD,
      "multi_query_group_num": KV}, chatglm2),
    ("attention.query_key_value", {**HEADS, "model_type": "chatglm"}, chatglm1),
    ("mlp.up_proj", {"model_type": "phi3small", "ff_intermediate_size": FF}, gelu_pairs),
    ("mlp.dense_h_to_4h", {"model_type": "chatglm", "ffn_hidden_size": FF}, swiglu),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "config", "statement"), STATEMENTS, ids=lambda x: getattr(x, "__name__", None)
)
def test_layouts_as_published(
    module: str, config: dict[str, Any], statement: Callable[[torch.Tensor], Any]
) -> None:
    grouped = statement in (query_then_kv, kv_n_heads, internlm2, chatglm2)
    rows = (H + 2 * KV if grouped else 3 * H) * HD
    if statement in (gelu_pairs, swiglu):
        rows = 2 * FF
    weight, x = torch.randn(rows, WIDTH), torch.randn(7, WIDTH)
    split = split_rule(f"layers.0.{module}.weight", weight.shape, config)
    assert split is not None, split_declines(f"{module}.weight", weight.shape, config)
    for part, expected in zip(split.parts, statement(x @ weight.mT), strict=True):
        torch.testing.assert_close(x @ part.of(weight).mT, expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("l.0.self_attn.qkv_proj.bias", (96,)),
        ("l.0.mlp.experts.gate_up_proj_bias", (4, 24)),
        ("l.0.input_layernorm.weight", (32,)),
        ("l.0.mamba.conv1d.weight", (4, 1, 4)),
        ("l.0.experts.norm.weight", (4, 2, 8)),
        ("visual.patch_embed.proj.weight", (32, 3, 2, 14, 14)),
        ("visual.patch_embed.proj.weight", (4, 14, 14)),
        ("l.0.self_attn.q_proj.weight", (32, 32)),
        ("l.0.mlp.experts.0.gate_proj.weight", (12, 32)),
        ("l.0.other.weight", (3, 12, 32)),
        ("l.0.mlp.experts.down_proj", (4, 0, 32)),
        ("scalar", ()),
        ("", (0, 0)),
    ],
)
def test_tensors_that_are_one_matrix_or_none(name: str, shape: tuple[int, ...]) -> None:
    config = {**MOE, "model_type": "qwen3_moe"}
    assert split_rule(name, shape, config) is None
    assert split_declines(name, shape, config) is None
    expected = {shape: (0,)} if len(shape) == 2 else {}
    assert matrix_shapes(None, shape) == expected


def test_reasons() -> None:
    gqa = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    qkv = "l.0.self_attn.qkv_proj.weight"
    assert split_declines(qkv, (63, 32), gqa) == (
        "qkv_proj: 63 rows, but the config's sizes add up to 64"
    )
    assert split_declines(qkv, (64, 32), {}) == "qkv_proj: the config has no num_attention_heads"
    assert split_declines(qkv, (64, 32), {**gqa, "hidden_size": 33}) == (
        "qkv_proj: hidden_size 33 does not divide by 4 heads"
    )
    unknown = split_declines("a.query_key_value.weight", (64, 32), {**gqa, "model_type": "new"})
    assert unknown == "query_key_value: the layout of model type 'new' is not known"


def test_a_square_stack_of_unknown_orientation_is_only_a_stack() -> None:
    config = {**MOE, "hidden_size": 24, "model_type": "qwen3_vl_moe"}
    split = split_rule("l.0.mlp.experts.gate_up_proj", (4, 24, 24), config)
    assert split is not None
    assert split.label == "4 experts"
    assert split.note == "gate_up_proj: both axes of [24, 24] fit the config's sizes"
    known = split_rule("l.0.mlp.experts.gate_up_proj", (4, 24, 24), {**config, "model_type": "x"})
    assert known is not None
    assert {part.shape for part in known.parts} == {(12, 24)}


def test_a_forged_count_of_experts_makes_no_list() -> None:
    huge = 1 << 33
    config = {"num_experts": huge, "model_type": "dbrx", "hidden_size": 1}
    config["ffn_config"] = {"moe_num_experts": huge, "ffn_hidden_size": 1}
    for name, shape in (("experts.w", (huge, 1, 1)), ("experts.mlp.w1", (huge, 1))):
        assert split_rule(name, shape, config) is None
        assert "more than 8192 matrices" in (split_declines(name, shape, config) or "")


def test_equal_shapes_are_one_batch() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    split = split_rule("l.0.self_attn.qkv_proj.weight", (64, 32), config)
    assert matrix_shapes(split, (64, 32)) == {(32, 32): (0,), (16, 32): (1, 2)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
KEYS = (*matrices.HEADS, *matrices.HIDDEN, *matrices.FEED_FORWARD, *matrices.EXPERTS, "model_type")
KEYS = (*KEYS, "attn_config", "ffn_config", "text_config", "vision_config", "expand", "head_dim")


@settings(max_examples=200, deadline=None)
@given(
    case=st.sampled_from(cases(2, 2, 8, 12, 4)),
    forged=st.dictionaries(
        st.sampled_from(KEYS),
        JSON | st.sampled_from([0, -1, 10**400, True, 4.0, "4", [], {"kv_n_heads": -2}]),
        max_size=4,
    ),
    whole=st.none() | JSON,
)
def test_a_hostile_config_raises_nothing(
    case: tuple[Any, ...], forged: dict[str, Any], whole: Any
) -> None:
    name, shape, config, _ = case
    for hostile in ({**config, **forged}, whole):
        split = split_rule(name, shape, hostile)
        if split is None:
            split_declines(name, shape, hostile)
        else:
            covers_once(split, shape)
