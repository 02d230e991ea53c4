"""LoRA adapters: PEFT folders, read strictly and matched to the base that they change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from resm_kernels.checkpoint.files import canonical_json
from resm_kernels.checkpoint.hub import ADAPTER_WEIGHTS, ModelReference, locate
from resm_kernels.checkpoint.layout import (
    Checkpoint,
    TensorInfo,
    WeightFile,
    files_digest,
    read_json,
)
from resm_kernels.checkpoint.patterns import Matcher, PatternError
from resm_kernels.checkpoint.reader import (
    ADAPTER_CONFIG,
    HOST,
    Place,
    is_adapter,
    open_checkpoint,
    read_header,
    read_tensor,
    same_data,
)
from resm_kernels.checkpoint.tokens import is_table, tables_of_config, text_configs
from resm_kernels.errors import CheckpointError

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
DEFAULT_RANK = DEFAULT_ALPHA = 8
"""PEFT's own, where the config is silent."""
LARGEST_ALPHA = 1e30
MAX_PREFIX = 4
"""Most leading words by which the names of an adapter and of its base may differ."""
MAX_RULES = 16
"""Most such differences that are tried."""
SHOWN = 20
"""Most misfits that an error lists."""

VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token rows",
    "lora_bias": "a bias on lora_B",
}
"""Keys of PEFT's LoraConfig that make it more than scale * B A, and what they mean."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights, beside booleans, that leave the base as it is."""
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
"""Keys that are read here, or that change nothing about the trained weights."""
FOREIGN_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_diag": "KaSA",
    "trainable_tokens_delta": "trained token rows",
    "lora_B.bias": "a bias on lora_B",
}
FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
"""Name ending -> which factor, and whether of an embedding."""


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one weight's delta.

    Attributes
    ----------
    module : str
        The module as the adapter names it.
    a, b : TensorInfo
        A is rank x in, B is out x rank.
    scale : float
        lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA.
    transposed : bool
        The weight is stored in x out: embeddings, and `Conv1D` as GPT-2 has it.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """Columns of either factor."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """m, n of the delta in the weight's stored orientation."""
        out, columns = self.b.shape[0], self.a.shape[1]
        return (columns, out) if self.transposed else (out, columns)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes
    ----------
    reference : str
        What the user called it.
    folder : Path
        Where it lies.
    files : tuple of WeightFile
        The one file that holds its tensors.
    config : mapping
        adapter_config.json.
    pairs : mapping
        Tensor name to `LoraPair`. The names are the base's once matched to one, else the
        adapter's own, without PEFT's prefix.
    full : mapping
        Tensor name to a whole replacement of that tensor: `modules_to_save` and trained biases.
    copies : mapping
        Tensor name to PEFT's copy of a weight that it did not train; gone once compared.
    notes : tuple of str
        What was decided while matching, in words.
    """

    reference: str
    folder: Path
    files: tuple[WeightFile, ...]
    config: Mapping[str, Any]
    pairs: Mapping[str, LoraPair]
    full: Mapping[str, TensorInfo]
    copies: Mapping[str, TensorInfo] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over the file's header and stamp and the config: the input's identity."""
        parts = files_digest(self.files).encode() + canonical_json(self.config)
        return hashlib.sha256(parts).hexdigest()

    @property
    def base_model(self) -> str | None:
        """The base that the adapter says it was trained on; folders get renamed, so only that."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) else None


def open_model(reference: ModelReference, base: Checkpoint) -> Checkpoint | Adapter:
    """Open an expert: a whole model, an adapter folder, or `base+adapter`.

    Raises
    ------
    CheckpointError
        As `open_checkpoint` and `open_adapter`; where `base+adapter` names another base.
    """
    named = reference.with_adapter
    if named is None:
        folder = adapter_folder(locate(reference))
        try:
            adapter = is_adapter(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
        return open_adapter(reference, folder, base) if adapter else open_checkpoint(reference)
    if not named[0].same_as(ModelReference(base.reference)):
        raise CheckpointError(
            f"{reference}: no such path, and as base+adapter it has another base than the merge",
            got=str(named[0]),
            expected=base.reference,
            fix="merge the adapter into its base and name that folder; "
            "or name the adapter alone, where the two are one model",
        )
    return open_adapter(reference, adapter_folder(locate(named[1], adapter=True)), base)


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter that is named by its folder or by its file of weights."""
    return path.parent if path.name in ADAPTER_WEIGHTS else path


def open_adapter(reference: ModelReference, folder: Path, base: Checkpoint) -> Adapter:
    """Read an adapter's config and header and match them to a base; see `Adapter`."""
    return match_adapter(read_adapter(folder, reference.text), base)


def read_adapter(folder: Path, reference: str | None = None) -> Adapter:
    """Read a PEFT folder: adapter_config.json and adapter_model.safetensors, or .bin.

    Only tensors stored twice are read. Source of every rule: PEFT 0.21, `tuners/lora` and
    `utils/save_and_load.py`.

    Raises
    ------
    CheckpointError
        Where something is missing or malformed; where the adapter is more than scale * B A and
        whole replaced tensors (`VARIANTS`, an initialisation that changes the base, convolutions,
        config keys of an unknown meaning).
    """
    text = reference or str(folder)
    try:
        config = _read_config(folder / ADAPTER_CONFIG)
        paths = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()]
        if not paths:
            raise CheckpointError(
                f"{folder}: an adapter without weights", expected=" or ".join(ADAPTER_WEIGHTS)
            )
        file = read_header(paths[0])
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    problems: list[str] = []
    factors: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    copies: dict[str, TensorInfo] = {}
    for name, info in file.tensors.items():
        short = name.removeprefix(PREFIX)
        foreign = next((why for part, why in FOREIGN_TENSORS.items() if part in short), None)
        ending = next((ending for ending in FACTORS if short.endswith(ending)), None)
        if foreign:
            problems.append(f"tensor {name!r}: {foreign} cannot be merged")
        elif not info.dtype.mergeable:
            problems.append(f"tensor {name!r}: {info.dtype.name} cannot be merged")
        elif ending:
            which, embedding = FACTORS[ending]
            both = factors.setdefault((short.removesuffix(ending), embedding), {})
            if both.setdefault(which, info) is not info:
                problems.append(f"tensor {name!r}: stands there twice as {short!r}")
        elif ".lora_" in short:
            problems.append(f"tensor {name!r}: not a part that plain LoRA has")
        else:
            plain = short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            plain = plain.replace(".original_module.", ".")
            copy = short.endswith(".base_layer.weight") or ".original_module." in short
            home = copies if copy else full
            if plain in home and not _equal((file, info), (file, home[plain])):
                problems.append(f"tensor {name!r}: another value for {home[plain].name!r}")
            home[plain] = info
    scale_of = _scales(config, folder / ADAPTER_CONFIG)
    pairs: dict[str, LoraPair] = {}
    for (module, embedding), found in factors.items():
        try:
            if f"{module}.weight" in pairs:
                raise ValueError("both of a linear layer and of an embedding")
            a, b = _both(found)
            scale = scale_of(module, a.shape[0])
        except ValueError as error:
            problems.append(f"module {module!r}: {error}")
            continue
        pairs[f"{module}.weight"] = LoraPair(module, a, b, scale, transposed=embedding)
    if not problems and not pairs and not full:
        problems.append("it holds no tensors")
    if problems:
        raise _refusal(f"{file.path}: this adapter cannot be merged", problems)
    return Adapter(text, folder, (file,), config, pairs, full, copies)


def _both(found: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    if len(found) < 2:
        raise ValueError(f"lora_{'B' if 'A' in found else 'A'} is missing")
    a, b = found["A"], found["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ValueError(f"A {list(a.shape)} and B {list(b.shape)}: only matrices can be merged")
    if a.shape[0] != b.shape[1] or not a.nbytes or not b.nbytes:
        raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} do not fit together")
    return a, b


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, once nothing in it says that the adapter is more than plain LoRA."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: not a LoRA adapter",
            got=f"peft_type {config.get('peft_type')!r}"[:200],
            expected="peft_type 'LORA'",
            fix=MERGE_IT,
        )
    problems = [f"{key}: {why}" for key, why in VARIANTS.items() if _is_set(config.get(key))]
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in (None, *PLAIN_STARTS):
        problems.append(
            f"init_lora_weights: {str(start)[:80]!r} is not known to leave the base's weights alone"
        )
    # Every variant so far came with a key of its own that is empty or false where it is unused.
    problems += [
        f"{key[:80]}: a key of an unknown meaning; if it changes no weight, take it out of the file"
        for key, value in config.items()
        if key not in HARMLESS and key not in VARIANTS and _is_set(value)
    ]
    if problems:
        raise _refusal(f"{path}: more than plain LoRA", problems)
    return config


def _is_set(value: object) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


def _scales(config: Mapping[str, Any], path: Path) -> Callable[[str, int], float]:
    """The function from (module, rank of its A) to its scale, resolved as PEFT does.

    It raises ValueError where the config says another rank.
    """
    mistakes: list[str] = []

    def number(key: str, value: object, whole: bool) -> Any:
        low, kinds = (1, int) if whole else (-LARGEST_ALPHA, (int, float))
        good = isinstance(value, kinds) and not isinstance(value, bool)
        if not good or not low <= value <= LARGEST_ALPHA:  # type: ignore[operator]
            kind = "a whole number above 0" if whole else "a number"
            mistakes.append(f"{key[:80]} is {value!r:.80}, expected {kind}")
        return value

    def patterns(key: str, whole: bool) -> dict[str, Any]:
        found = config.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            mistakes.append(f"{key} is {found!r:.80}, expected an object")
            return {}
        return {name: number(f"{key}[{name!r}]", value, whole) for name, value in found.items()}

    def flag(key: str) -> bool:
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            mistakes.append(f"{key} is {value!r:.80}, expected true or false")
        return value is True

    rank = number("r", config.get("r", DEFAULT_RANK), whole=True)
    alpha = number("lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA), whole=False)
    ranks, alphas = patterns("rank_pattern", True), patterns("alpha_pattern", False)
    root = flag("use_rslora")
    flag("fan_in_fan_out")
    if mistakes:
        raise _refusal(f"{path}: cannot be read", mistakes)
    matcher = Matcher()

    def resolve(found: Mapping[str, Any], module: str, default: Any) -> Any:
        for pattern, value in found.items():
            try:
                if matcher.matches(pattern, module):
                    return value
            except PatternError as error:
                raise ValueError(f"the pattern {pattern!r:.80}: {error}") from error
        return found.get(module, default)

    def scale_of(module: str, stored: int) -> float:
        expected = resolve(ranks, module, rank)
        if stored != expected:
            raise ValueError(f"its factors have rank {stored}, {ADAPTER_CONFIG} says {expected}")
        return float(resolve(alphas, module, alpha)) / (math.sqrt(stored) if root else stored)

    return scale_of


def match_adapter(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Key an adapter by its base's tensor names, once every tensor of it fits.

    Names are taken as they are, or all with one leading path taken off or put on (a GPT-2 base
    says `h.0`, its class `transformer.h.0`); more than one such way is an error. A target that
    the base stores under a tied name takes that name: its change goes to both, as in PEFT's own
    merge; a replacement must be there, with one value, for every one of the tied names.

    Raises
    ------
    CheckpointError
        Listing every target that the base lacks, and every shape or copy that differs.
    """
    problems: list[str] = []
    apart: list[str] = []
    notes: list[str] = []
    pairs: dict[str, LoraPair] = {}
    full: dict[str, TensorInfo] = {}
    targets = dict.fromkeys([*adapter.pairs, *adapter.full, *adapter.copies])
    found = _base_names(adapter, list(targets), base)
    file = adapter.files[0]
    turn_squares = _stores_in_by_out(base, adapter.config)
    for target, name in found.items():
        if name is None:
            problems.append(f"{target}: not in the base")
            continue
        info = base.tensors[name]
        if not name.endswith(target) and not target.endswith(name):
            notes.append(f"{target}: tied to {name} in the base")
        if not info.dtype.mergeable:
            problems.append(f"{name}: {info.dtype.name} weights of the base cannot be merged")
            continue
        if target in adapter.pairs:
            try:
                pair = _oriented(adapter.pairs[target], info, turn_squares)
            except ValueError as error:
                problems.append(f"{target}: {error}")
                continue
            if name in pairs:
                problems.append(f"{target}: {pairs[name].module} changes the same tensor {name}")
            pairs[name] = pair
        for whole in (adapter.full.get(target), adapter.copies.get(target)):
            if whole is not None and whole.shape != info.shape:
                problems.append(
                    f"{target}: shape {list(whole.shape)}, {list(info.shape)} in the base"
                )
        copy = adapter.copies.get(target)
        if copy and copy.shape == info.shape and not _equal((file, copy), (base.home[name], info)):
            problems.append(f"{target}: the adapter's copy of this weight is not the base's")
        if new := adapter.full.get(target):
            if name in full and not _equal((file, new), (file, full[name])):
                apart.append(f"{target}: {full[name].name!r} is another value for {name}")
            full[name] = new
    problems += [f"{name}: both replaced and changed by LoRA" for name in full if name in pairs]
    what = f"{adapter.reference}: does not fit the base {base.reference}"
    if problems:
        raise _refusal(what, problems)
    table = _tied_table(base)
    for name, new in full.items():
        aliases = sum(kept == name for kept in base.aliases.values())
        replaced = [t for t in adapter.full if found[t] == name]
        alone = len(replaced) <= max(aliases, int(name == table))
        if alone and not _equal((file, new), (base.home[name], base.tensors[name])):
            apart.append(f"{replaced[0]}: replaced, and not what the base ties it to")
    if apart:
        raise _refusal(what, apart, UNTIE_IT)
    return replace(adapter, pairs=pairs, full=full, copies={}, notes=(*adapter.notes, *notes))


def keeps_tied(adapter: Adapter, base: Checkpoint, one: str, other: str) -> bool:
    """Whether an adapter leaves two tied tensors of its base equal, if both are stored.

    A LoRA change of one of them goes to both, as in PEFT's own merge.
    """
    new = [adapter.full[name] for name in (one, other) if name in adapter.full]
    if changed := {one, other} & adapter.pairs.keys():
        return len(changed) == 1 and not new
    if not new:
        return True
    file = adapter.files[0]
    if len(new) == 2:
        return _equal((file, new[0]), (file, new[1]))
    return _equal((file, new[0]), (base.home[one], base.tensors[one]))


def _oriented(pair: LoraPair, info: TensorInfo, turn_squares: bool) -> LoraPair:
    """The pair as this base stores the weight; ValueError where the shapes do not fit."""
    turned = replace(pair, transposed=True)
    if info.shape not in (pair.shape, turned.shape):
        raise ValueError(
            f"A {list(pair.a.shape)} and B {list(pair.b.shape)} do not fit the base's "
            f"{list(info.shape)}"
        )
    if pair.transposed or info.shape != turned.shape:
        return pair
    # The flag in the config is that of the last layer PEFT wrapped: shapes say more.
    square = pair.shape == turned.shape
    return turned if turn_squares or not square else pair


def _stores_in_by_out(base: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether square weights are in x out, as the base's others with a bias or the config say."""
    votes = set()
    for name, bias in base.tensors.items():
        weight = base.tensors.get(name.removesuffix("bias") + "weight")
        if name.endswith(".bias") and weight and len(bias.shape) == 1 and len(weight.shape) == 2:
            rows, columns = weight.shape
            if rows != columns and bias.shape[0] in (rows, columns):
                votes.add(bias.shape[0] == columns)
    return votes.pop() if len(votes) == 1 else config.get("fan_in_fan_out") is True


def _equal(first: tuple[WeightFile, TensorInfo], second: tuple[WeightFile, TensorInfo]) -> bool:
    """Whether the first holds the second's values in its own dtype."""
    if first[1].shape != second[1].shape:
        return False
    if first[1].dtype == second[1].dtype:
        return same_data(first, second)
    copy = read_tensor(*first)
    return torch.equal(copy, read_tensor(*second).to(copy.dtype))


def _base_names(
    adapter: Adapter, targets: Sequence[str], base: Checkpoint
) -> dict[str, str | None]:
    """Every target with the base's name for it, by the one rule that finds them all."""

    table = _tied_table(base)

    def stored(name: str) -> str | None:
        name = base.aliases.get(name, name)
        if name in base.tensors:
            return name
        return table if is_table(name) else None

    def apply(rule: tuple[str, str]) -> dict[str, str | None]:
        removed, added = rule
        return {t: stored(added + t.removeprefix(removed)) for t in targets}

    found = apply(("", ""))
    if None not in found.values():
        return found
    tried = [(rule, apply(rule)) for rule in _prefix_rules(targets, base)]
    fitting = [(rule, names) for rule, names in tried if None not in names.values()]
    if len(fitting) > 1:
        ways = [f"{added or 'nothing'!r} for {removed!r}" for (removed, added), _ in fitting]
        raise CheckpointError(
            f"{adapter.reference}: its names fit the base {base.reference} in more than one way",
            got=" or ".join(ways),
            fix=MERGE_IT,
        )
    if fitting:
        return fitting[0][1]
    return min([found, *(names for _, names in tried)], key=lambda n: [*n.values()].count(None))


def _prefix_rules(targets: Sequence[str], base: Checkpoint) -> list[tuple[str, str]]:
    """The (taken off, put on) that find at least one target, a few at most."""
    known = {*base.tensors, *base.aliases}
    wanted = set(targets)
    rules: dict[tuple[str, str], None] = {}
    for removed, rest in _splits(targets):
        if rest in known:
            rules[removed, ""] = None
    for added, rest in _splits(known):
        if rest in wanted:
            rules["", added] = None
    return list(rules)[:MAX_RULES]


def _splits(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        words = name.split(".", MAX_PREFIX)
        for count in range(1, len(words)):
            head = ".".join(words[:count]) + "."
            yield head, name[len(head) :]


def _tied_table(base: Checkpoint) -> str | None:
    """The one vocabulary table of a base whose config does not deny that it ties them."""
    if any(c.get("tie_word_embeddings") is False for c in text_configs(base.config)):
        return None
    tables = tables_of_config(base)
    return tables[0].name if len(tables) == 1 else None


def read_factors(
    adapter: Adapter, pair: LoraPair, place: Place = HOST
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a pair so that the delta of the stored weight is left @ right.T.

    Returns
    -------
    left, right : Tensor, m x r and n x r
        Float64 where a factor is, else float32; the scale is in `left`. NaN and Inf are left to
        the caller.
    """
    a, b = (read_tensor(adapter.files[0], info, place) for info in (pair.a, pair.b))
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    rows, columns = b.to(dtype), a.to(dtype).T
    if pair.transposed:
        rows, columns = columns, rows
    return rows * pair.scale, columns


UNTIE_IT = "untie the base (store both, tie_word_embeddings: false), or leave that adapter out"
MERGE_IT = "merge the adapter into its base model with PEFT and name that folder"


def _refusal(what: str, problems: Sequence[str], fix: str = MERGE_IT) -> CheckpointError:
    shown = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        shown.append(f"and {len(problems) - SHOWN} more")
    return CheckpointError("\n".join([what, *(f"  - {one[:500]}" for one in shown)]), fix=fix)
