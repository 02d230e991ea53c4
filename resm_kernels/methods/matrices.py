"""Which matrices a stored tensor holds: fused projections and stacks of experts.

Singular vectors belong to one linear map, but a checkpoint may store several in one tensor: query,
key and value, gate and up, all experts of a layer. The rules tell them apart by the tensor's name,
its shape and the model's config; a size that the config does not confirm splits nothing.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch

MAX_PARTS = 8192
"""Matrices in one tensor; more are a forged header."""
MAX_SIZE = 1 << 40
"""Sizes that a config may state."""

MAX_LAYERS = 2048
"""Longest list of a count for each layer."""

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "attn_config.kv_n_heads",
    "multi_query_group_num",
)  # fmt: skip
HEAD_DIM = ("head_dim", "kv_channels")
HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
FEED_FORWARD = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "shared_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp",
    "ffn_hidden_size", "expert_ffn_hidden_size", "ff_intermediate_size",
)  # fmt: skip
EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "ffn_config.moe_num_experts",
)  # fmt: skip
TEXT = ("thinker_config", "text_config", "llm_config", "language_config")
VISION = frozenset({"visual", "vision", "vision_model", "vision_tower", "vision_encoder"})
NOT_STACKED = ("bias", "conv", "norm", "embed")
"""Name parts of 3-D tensors that are no stack of matrices, whatever their leading axis."""


@dataclass(frozen=True)
class Part:
    """One matrix inside a tensor.

    Attributes
    ----------
    name : str
        What it is: "q", "expert 3", "expert 3 gate".
    shape : tuple of int
        Its rows and columns, known without data.
    view : tuple of int
        The tensor's shape with the fused axes opened.
    ranges : tuple of (start, stop)
        What it takes of every axis of `view`.
    """

    name: str
    shape: tuple[int, int]
    view: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix, m x n: a view of a contiguous tensor, or a copy where strides forbid it."""
        return tensor.reshape(self.view)[self._index].reshape(self.shape)

    def put(self, out: torch.Tensor, matrix: torch.Tensor) -> None:
        """Write the matrix to its place in a contiguous tensor `out`; dtypes may differ."""
        place = out.view(self.view)[self._index]
        place.copy_(matrix.reshape(place.shape))

    def factors(
        self, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of this part of left @ right.T; None where it mixes rows and columns."""
        sizes = [stop - start for start, stop in self.ranges]
        for axis in range(1, len(self.view)):
            whole = math.prod(self.view[:axis]), math.prod(self.view[axis:])
            mine = math.prod(sizes[:axis]), math.prod(sizes[axis:])
            if whole == (len(left), len(right)) and mine == self.shape:
                index = self._index
                rows = left.reshape(*self.view[:axis], -1)[index[:axis]]
                columns = right.reshape(*self.view[axis:], -1)[index[axis:]]
                return rows.reshape(mine[0], -1), columns.reshape(mine[1], -1)
        return None

    @property
    def _index(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.ranges)


@dataclass(frozen=True)
class Split:
    """The matrices that one tensor holds; together they cover each entry exactly once.

    Attributes
    ----------
    label : str
        For reports: "q, k, v", "64 experts", "64 experts x gate, up".
    parts : tuple of Part
    note : str or None
        Why the experts of a stack are not split further, where their name says they are fused.
    """

    label: str
    parts: tuple[Part, ...]
    note: str | None = None


def split_rule(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> Split | None:
    """The matrices that a tensor holds, or None where it is one matrix or none.

    Parameters
    ----------
    name, shape
        The tensor's name in the checkpoint and its shape.
    config : mapping
        The model's config.json, of any content: what has a wrong type counts as missing.

    Returns
    -------
    Split or None
        None for biases, vectors, convolutions, plain matrices, and where the config does not
        confirm the layout; `split_declines` tells the last case from the others.

    Notes
    -----
    Layouts are those of the models' published code; where a name alone does not say it
    (`query_key_value`, `c_attn`), only known model types are split. `qkv_proj`, `Wqkv` and
    `gate_up_proj` of other model types are taken as contiguous. A wrong guess would still
    merge true sub-matrices of the tensor, only not those of the model's own maps.
    """
    try:
        return _decide(name, shape, config)
    except _Misfit:
        return None


def split_declines(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> str | None:
    """Why a tensor that looks fused is not split, or None where it does not look so, or is."""
    try:
        _decide(name, shape, config)
    except _Misfit as misfit:
        return str(misfit)
    return None


def matrix_shapes(
    split: Split | None, shape: Sequence[int]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """The shapes of a tensor's matrices, each with the indices of its parts: batches.

    Without a split a 2-D tensor is its own only matrix, and any other tensor holds none.
    """
    if split is None:
        return {(shape[0], shape[1]): (0,)} if len(shape) == 2 else {}
    found: dict[tuple[int, int], list[int]] = {}
    for index, part in enumerate(split.parts):
        found.setdefault(part.shape, []).append(index)
    return {key: tuple(indices) for key, indices in found.items()}


class _Misfit(Exception):
    """The config does not confirm a layout; the message says why."""


@dataclass(frozen=True)
class _Blocks:
    """An axis of length groups * sum(sizes): every group holds one block of each named part."""

    names: Sequence[str]
    sizes: Sequence[int]
    groups: int = 1
    label: str = ""


class _Sizes:
    """The sizes that a config states for one tensor."""

    def __init__(self, name: str, config: object) -> None:
        scope: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
        sections = ("vision_config",) if VISION.intersection(name.split(".")) else TEXT
        for section in sections:
            inner = scope.get(section)
            if isinstance(inner, Mapping):
                scope = ChainMap(inner, scope)  # type: ignore[arg-type]
        self._scope = scope
        model = scope.get("model_type")
        self.model = model.lower().removesuffix("_text") if isinstance(model, str) else ""

    def _get(self, key: str) -> object:
        value: object = self._scope
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        return value

    def find(self, keys: Sequence[str]) -> int | None:
        return next((v for v in map(self._get, keys) if _is_size(v)), None)

    def size(self, *keys: str) -> int:
        found = self.find(keys)
        if found is None:
            raise _Misfit(f"the config has no {keys[0]}")
        return found

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        return value if isinstance(value, bool) else default

    @property
    def heads(self) -> int:
        return self.size(*HEADS)

    @property
    def kv_heads(self) -> int:
        if self._get("attn_config.attn_type") == "multiquery_attention":
            return 1
        return self.find(KV_HEADS) or self.heads

    @property
    def hidden(self) -> int:
        return self.size(*HIDDEN)

    @property
    def head_dim(self) -> int:
        return self.find(HEAD_DIM) or _share(self.hidden, self.heads, "hidden_size", "heads")

    @property
    def gated(self) -> set[int]:
        """Lengths that gate and up have together in this model."""
        widths = [self.find((key,)) for key in FEED_FORWARD]
        shared = self.find(("n_shared_experts", "moe_num_shared_experts"))
        if shared:
            widths += [shared * width for width in widths if width]
        return {2 * width for width in widths if width}

    @property
    def expert_counts(self) -> set[int]:
        values = [self._get(key) for key in EXPERTS]
        lists = [v for v in values if isinstance(v, list) and len(v) <= MAX_LAYERS]
        values += [item for found in lists for item in found]
        return {value for value in values if _is_size(value)}


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= MAX_SIZE


def _share(total: int, count: int, of: str, among: str) -> int:
    if total % count:
        raise _Misfit(f"{of} {total} does not divide by {count} {among}")
    return total // count


QKV = ("q", "k", "v")


def _sections(c: _Sizes, length: int, width: int) -> _Blocks:
    """All queries, all keys, all values."""
    return _Blocks(QKV, [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)])


def _grouped(c: _Sizes, kv_heads: int) -> _Blocks:
    """Every key-value head after the query heads that use it."""
    queries = _share(c.heads, kv_heads, "head count", "key-value heads")
    return _Blocks(QKV, [n * c.head_dim for n in (queries, 1, 1)], kv_heads)


def _per_head(c: _Sizes, length: int, width: int) -> _Blocks:
    return _grouped(c, c.heads)


def _per_kv_head(c: _Sizes, length: int, width: int) -> _Blocks:
    return _grouped(c, c.kv_heads)


def _multi_query(c: _Sizes, length: int, width: int) -> _Blocks:
    """One key-value head for all queries, or one each."""
    return _grouped(c, 1 if c.flag("multi_query", True) else c.heads)


def _falcon(c: _Sizes, length: int, width: int) -> _Blocks:
    if c.model == "refinedweb" or c.flag("new_decoder_architecture", False):
        return _grouped(c, c.kv_heads)
    return _multi_query(c, length, width)


def _chatglm(c: _Sizes, length: int, width: int) -> _Blocks:
    if c.flag("multi_query_attention", False):
        return _sections(c, length, width)
    return _per_head(c, length, width)


def _codegen(c: _Sizes, length: int, width: int) -> _Blocks:
    """Four tensor-parallel shards of query, value, key."""
    return _Blocks(("q", "v", "k"), [_share(c.heads * c.head_dim, 4, "width", "shards")] * 3, 4)


def _square_thirds(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(QKV, [width] * 3)


def _cross_attention(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("k", "v"), [c.heads * c.head_dim] * 2)


def _jetmoe_kv(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("k", "v"), [c.kv_heads * c.head_dim] * 2)


def _gated_query(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("q", "gate"), [c.head_dim] * 2, c.heads)


def _latent(c: _Sizes, length: int, width: int) -> _Blocks:
    """The compressed keys and values, and the key part that all heads rotate."""
    return _Blocks(("latent", "k_rope"), [c.size("kv_lora_rank"), c.size("qk_rope_head_dim")])


def _from_latent(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("k", "v"), [c.size("qk_nope_head_dim"), c.size("v_head_dim")], c.heads)


def _gate_up(c: _Sizes, length: int, width: int) -> _Blocks:
    if length not in c.gated:
        known = ", ".join(map(str, sorted(c.gated))) or "none"
        raise _Misfit(f"{length} is not twice a feed-forward size of the config ({known})")
    return _Blocks(("gate", "up"), [length // 2] * 2)


def _gate_up_pairs(c: _Sizes, length: int, width: int) -> _Blocks:
    """Gate and up in turn."""
    _gate_up(c, length, width)
    return _Blocks(("gate", "up"), (1, 1), length // 2)


def _dbrx_experts(c: _Sizes, length: int, width: int) -> _Blocks:
    count = c.size("ffn_config.moe_num_experts", "moe_num_experts")
    rows = c.size("ffn_config.ffn_hidden_size", "ffn_hidden_size")
    _bound(count)
    return _Blocks([f"expert {i}" for i in range(count)], [rows] * count, label=f"{count} experts")


def _mamba_width(c: _Sizes) -> int:
    return c.size("mamba_expand", "expand") * c.hidden


def _mamba(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("x", "z"), [_mamba_width(c)] * 2)


def _mamba_pairs(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("x", "z"), (1, 1), _mamba_width(c))


def _mamba_selection(c: _Sizes, length: int, width: int) -> _Blocks:
    state = c.size("mamba_d_state", "state_size")
    return _Blocks(("dt", "B", "C"), [c.size("mamba_dt_rank", "time_step_rank"), state, state])


def _mamba2(c: _Sizes, length: int, width: int) -> _Blocks:
    heads = c.size("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    state = c.size("mamba_d_state", "ssm_state_size", "state_size")
    state *= c.size("mamba_n_groups", "mamba_ngroups", "n_groups")
    head_dim = c.find(("mamba_head_dim",))
    inner = c.find(("mamba_d_ssm",)) or (heads * head_dim if head_dim else _mamba_width(c))
    return _Blocks(("z", "x", "B", "C", "dt"), [inner, inner, state, state, heads])


def _short_convolution(c: _Sizes, length: int, width: int) -> _Blocks:
    return _Blocks(("B", "C", "x"), [c.hidden] * 3)


def _delta_net(c: _Sizes) -> tuple[int, int, int, int]:
    """Key heads, their width, value heads per key head, their width."""
    keys = c.size("linear_num_key_heads")
    shared = _share(c.size("linear_num_value_heads"), keys, "value head count", "key heads")
    return keys, c.size("linear_key_head_dim"), shared, c.size("linear_value_head_dim")


def _delta_net_qkvz(c: _Sizes, length: int, width: int) -> _Blocks:
    keys, key_dim, shared, value_dim = _delta_net(c)
    sizes = [key_dim, key_dim, shared * value_dim, shared * value_dim]
    return _Blocks((*QKV, "z"), sizes, keys)


def _delta_net_qkv(c: _Sizes, length: int, width: int) -> _Blocks:
    keys, key_dim, shared, value_dim = _delta_net(c)
    return _Blocks(QKV, [keys * key_dim, keys * key_dim, keys * shared * value_dim])


def _delta_net_ba(c: _Sizes, length: int, width: int) -> _Blocks:
    keys, _, shared, _ = _delta_net(c)
    return _Blocks(("b", "a"), [shared, shared], keys)


def _unknown(c: _Sizes, length: int, width: int) -> _Blocks:
    raise _Misfit(f"the layout of model type {c.model[:40]!r} is not known")


@dataclass(frozen=True)
class _Rule:
    """A layout of tensors whose names end so, in these model types (none named: in all).

    `axis` is the fused one: 0 rows, 1 columns. A stack of experts may be stored either way and
    the sizes tell; `axis` decides where they cannot, and None where it may be either.
    """

    names: tuple[str, ...]
    models: tuple[str, ...]
    layout: Callable[[_Sizes, int, int], _Blocks]
    axis: int | None = 0


GPT2 = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
PER_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
QWEN_GATED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
MAMBA2 = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
RULES = (
    _Rule(("crossattention.c_attn",), GPT2, _cross_attention, axis=1),
    _Rule(("c_attn",), GPT2, _sections, axis=1),
    _Rule(("c_attn",), ("qwen",), _sections),
    _Rule(("c_attn",), ("gpt_bigcode",), _multi_query),
    _Rule(("query_key_value",), PER_HEAD, _per_head),
    _Rule(("query_key_value",), ("falcon", "refinedweb", "refinedwebmodel"), _falcon),
    _Rule(("query_key_value",), ("phi3small",), _per_kv_head),
    _Rule(("query_key_value",), ("chatglm",), _chatglm),
    _Rule(("query_key_value", "c_attn"), (), _unknown),
    _Rule(("qkv_proj",), ("codegen",), _codegen),
    _Rule(("qkv_proj",), ("minimax", "minimax_text_01"), _per_head),
    _Rule(("qkv_proj", "Wqkv", "W_pack"), (), _sections),
    _Rule(("wqkv",), ("internlm2",), _per_kv_head),
    _Rule(("attn.qkv", "self_attn.qkv", "in_proj_weight"), (), _square_thirds),
    _Rule(("self_attention.kv_proj",), ("jetmoe",), _jetmoe_kv),
    _Rule(("self_attn.q_proj",), QWEN_GATED, _gated_query),
    _Rule(("kv_a_proj_with_mqa",), (), _latent),
    _Rule(("kv_b_proj",), (), _from_latent),
    _Rule(("gate_up_proj",), ("gpt_oss",), _gate_up_pairs, axis=1),
    _Rule(("gate_up_proj",), ("llama4", "openai_privacy_filter"), _gate_up, axis=1),
    _Rule(("gate_up_proj", "experts.fc1"), ("aria",), _gate_up, axis=1),
    _Rule(("gate_up_proj",), ("qwen3_vl_moe",), _gate_up, axis=None),
    _Rule(("up_proj",), ("phi3small",), _gate_up_pairs),
    _Rule(("gate_up_proj", "mlp.Wi"), (), _gate_up),
    _Rule(("mlp.input_linear", "shared_mlp.input_linear"), (), _gate_up),
    _Rule(("block_sparse_moe.input_linear",), (), _gate_up),
    _Rule(("dense_h_to_4h",), ("chatglm",), _gate_up),
    _Rule(("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"), ("dbrx",), _dbrx_experts),
    _Rule(("in_proj",), ("mamba", "falcon_mamba", "jamba"), _mamba),
    _Rule(("in_proj",), ("zamba",), _mamba_pairs),
    _Rule(("in_proj",), MAMBA2, _mamba2),
    _Rule(("x_proj",), ("mamba", "falcon_mamba", "jamba"), _mamba_selection),
    _Rule(("conv.in_proj",), ("lfm2", "lfm2_moe", "lfm2_vl"), _short_convolution),
    _Rule(("in_proj_qkvz",), QWEN_GATED, _delta_net_qkvz),
    _Rule(("in_proj_qkv",), QWEN_GATED, _delta_net_qkv),
    _Rule(("in_proj_ba",), QWEN_GATED, _delta_net_ba),
)
LAST_PARTS = {name.rpartition(".")[2] for rule in RULES for name in rule.names}
RULES_BY_LAST = {
    last: tuple(r for r in RULES if last in (name.rpartition(".")[2] for name in r.names))
    for last in LAST_PARTS
}
"""The rules that a name with such a last part can match: most names match none."""


def _decide(name: str, shape: Sequence[int], config: object) -> Split | None:
    if len(shape) not in (2, 3) or min(shape) < 1 or name.endswith("bias"):
        return None
    module = name.removesuffix(".weight").removesuffix(".base_layer")
    short = module.rpartition(".")[2]
    rules = RULES_BY_LAST.get(short, ())
    if len(shape) == 2 and not rules:
        return None
    sizes = _Sizes(name, config)
    rule = next((r for r in rules if _applies(r, module, sizes.model)), None)
    try:
        if len(shape) == 2:
            if rule is None:
                return None
            axis = rule.axis or 0
            return _split(_fit(rule, sizes, shape, axis), axis, shape)
        if shape[0] not in sizes.expert_counts or any(word in name for word in NOT_STACKED):
            return None
        _bound(shape[0])
        if rule is None:
            return _stack(shape)
        try:
            axis = _stacked_axis(rule, sizes, shape[1:])
            split = _split(_fit(rule, sizes, shape[1:], axis), axis, shape[1:], stacked=shape[0])
        except _Misfit as misfit:
            return _stack(shape, note=f"{short}: {misfit}")
        return split
    except _Misfit as misfit:
        raise _Misfit(f"{short}: {misfit}") from None


def _applies(rule: _Rule, module: str, model: str) -> bool:
    if rule.models and model not in rule.models:
        return False
    return any(module == name or module.endswith(f".{name}") for name in rule.names)


def _bound(count: int) -> None:
    if count > MAX_PARTS:
        raise _Misfit(f"more than {MAX_PARTS} matrices in one tensor")


def _fit(rule: _Rule, sizes: _Sizes, matrix: Sequence[int], axis: int) -> _Blocks:
    length = matrix[axis]
    blocks = rule.layout(sizes, length, matrix[1 - axis])
    total = blocks.groups * sum(blocks.sizes)
    if total != length:
        side = "columns" if axis else "rows"
        raise _Misfit(f"{length} {side}, but the config's sizes add up to {total}")
    return blocks


def _stacked_axis(rule: _Rule, sizes: _Sizes, matrix: Sequence[int]) -> int:
    fitting = []
    for axis in (0, 1):
        if matrix[1 - axis] == sizes.hidden:
            try:
                _fit(rule, sizes, matrix, axis)
            except _Misfit:
                continue
            fitting.append(axis)
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise _Misfit(f"neither axis of {list(matrix)} fits the config's sizes")
    if rule.axis is None:
        raise _Misfit(f"both axes of {list(matrix)} fit the config's sizes")
    return rule.axis


def _split(blocks: _Blocks, axis: int, matrix: Sequence[int], stacked: int = 0) -> Split:
    _bound(len(blocks.names) * max(stacked, 1))
    whole = ((0, matrix[1 - axis]),)
    opened = (blocks.groups, sum(blocks.sizes))
    view = (*matrix[:axis], *opened, *matrix[axis + 1 :])
    parts, start = [], 0
    for name, size in zip(blocks.names, blocks.sizes, strict=True):
        taken = ((0, blocks.groups), (start, start + size))
        ranges = (*whole, *taken) if axis else (*taken, *whole)
        length = blocks.groups * size
        shape = (matrix[0], length) if axis else (length, matrix[1])
        parts.append(Part(name, shape, view, ranges))
        start += size
    label = blocks.label or ", ".join(blocks.names)
    if not stacked:
        return Split(label, tuple(parts))
    return Split(
        f"{stacked} experts x {label}",
        tuple(
            Part(f"expert {i} {p.name}", p.shape, (stacked, *view), ((i, i + 1), *p.ranges))
            for i in range(stacked)
            for p in parts
        ),
    )


def _stack(shape: Sequence[int], note: str | None = None) -> Split:
    count, rows, columns = shape
    whole = ((0, rows), (0, columns))
    return Split(
        f"{count} experts",
        tuple(
            Part(f"expert {i}", (rows, columns), (count, rows, columns), ((i, i + 1), *whole))
            for i in range(count)
        ),
        note,
    )
