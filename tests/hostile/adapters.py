"""LoRA adapters as experts: malformed, forged, of another base, or more than plain LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.hostile.cases import CUT, L0, Arrange, Case, Site, bad, full, good, recipe, sparse
from tests.hostile.files import entry, safetensors, write_adapter, write_model

FOLDER = "adapter"
SETTINGS = f"{FOLDER}/adapter_config.json"
FILE = f"{FOLDER}/adapter_model.safetensors"
PLAIN = "base_model.model.layers.0"
CANNOT = "this adapter cannot be merged"
MORE = "more than plain LoRA"
UNREADABLE = "cannot be read"
SYMBOLS = ("a+b", "x+y+z", "+", "++", "+in/adapter", "in/base+", "in/base + ", "in/adapter+in/base")


def pair(module: str = PLAIN, rank: int = 2, rows: int = 8, columns: int = 8) -> dict[str, Any]:
    """The factors of one linear layer."""
    return {
        f"{module}.lora_A.weight": full(0.5, rank, columns),
        f"{module}.lora_B.weight": full(0.25, rows, rank),
    }


def adapter(tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Arrange:
    """The first expert is an adapter with these tensors and changes of its config."""

    def arrange(site: Site) -> list[str]:
        write_adapter(site.root / "in" / FOLDER, pair() if tensors is None else tensors, config)
        return with_expert(site, f"in/{FOLDER}")

    return arrange


def with_expert(site: Site, *models: object) -> list[str]:
    """The command that merges these models into the base."""
    experts = [str(word) for model in models for word in ("--expert", model)]
    return ["merge", "--base", str(site.base), *experts, str(site.out)]


def written(name: str, content: bytes) -> Arrange:
    """A healthy adapter, one file of which has another content."""

    def arrange(site: Site) -> Any:
        argv = adapter()(site)
        (site.root / "in" / FOLDER / name).write_bytes(content)
        return argv

    return arrange


def config(content: str) -> Arrange:
    return written("adapter_config.json", content.encode())


def header(tensors: Mapping[str, Any], size: int) -> Arrange:
    return written("adapter_model.safetensors", safetensors(tensors, bytes(size)))


def replaced(name: str, make: Callable[[Path], None]) -> Arrange:
    """A healthy adapter, one file of which is gone or something else."""

    def arrange(site: Site) -> Any:
        argv = adapter()(site)
        path = site.root / "in" / FOLDER / name
        path.unlink()
        make(path)
        return argv

    return arrange


def linked(name: str, target: str) -> Arrange:
    return replaced(name, lambda path: path.symlink_to(target))


def named(text: str) -> Arrange:
    """An expert by a text, beside a healthy adapter."""

    def arrange(site: Site) -> list[str]:
        adapter()(site)
        return with_expert(site, text)

    return arrange


def as_base(site: Site) -> list[str]:
    adapter()(site)
    return ["merge", "--base", f"in/{FOLDER}", "--expert", "in/expert-a", str(site.out)]


def beside_a_model(site: Site) -> None:
    """Adapter files in the folder of a whole model: the whole model counts."""
    write_adapter(site.a, pair(), {"r": 10**9})


def blob(site: Site) -> Any:
    """As the Hub's cache lays files out."""
    argv = adapter()(site)
    for path in (site.root / "in" / FOLDER).iterdir():
        path.rename(site.root / path.name)
        path.symlink_to(f"../../{path.name}")
    return argv


def tall(site: Site) -> Any:
    """The base has a weight of a gigabyte that is a hole, as has the adapter's A."""
    base = {"w.weight": entry(dtype="BF16", shape=[1 << 20, 512], data_offsets=[0, 1 << 30])}
    start = safetensors(base, b"")
    sparse(site.base / "model.safetensors", len(start) + (1 << 30), start)
    write_adapter(site.root / "in" / FOLDER, pair("base_model.model.w", rows=7, columns=512))
    return with_expert(site, f"in/{FOLDER}")


HUGE = {
    f"{PLAIN}.lora_A.weight": entry(shape=[10**9, 8], data_offsets=[0, 32 * 10**9]),
    f"{PLAIN}.lora_B.weight": entry(shape=[8, 10**9], data_offsets=[32 * 10**9, 64 * 10**9]),
}


def huge(site: Site) -> Any:
    """Factors of 32 GB each that are a hole, of the rank that the config says."""
    argv = adapter(r=10**9)(site)
    start = safetensors(HUGE)
    sparse(site.root / "in" / FILE, len(start) + 64 * 10**9, start)
    return argv


def many(count: int, **config: Any) -> Arrange:
    """A small base of many layers, each with an adapter of rank 1."""

    def arrange(site: Site) -> Any:
        names = [f"layers.{i}" for i in range(count)]
        write_model(site.base, {f"{name}.weight": full(1.0, 2, 2) for name in names})
        write = {k: t for n in names for k, t in pair(f"base_model.model.{n}", 1, 2, 2).items()}
        write_adapter(site.root / "in" / FOLDER, write, {"r": 1, **config})
        return with_expert(site, f"in/{FOLDER}")

    return arrange


EMBEDDED = {"base_model.model.layers.0.lora_embedding_A": full(1.0, 2, 8)}
BOMB = "((" * 8 + "a*" + ")*)*" * 8 + "layers.0"
PATTERN = "the pattern"
A4 = {
    f"{PLAIN}.lora_A.weight": full(1.0, 2, 8, 1, 1),
    f"{PLAIN}.lora_B.weight": full(1.0, 8, 2, 1, 1),
}


def by_recipe(model: str) -> Arrange:
    return recipe(f"merge_method: resm\nbase_model: in/base\nmodels: [{{model: '{model}'}}]\n")


ADAPTERS: list[Case] = [
    bad("no weights", replaced("adapter_model.safetensors", lambda path: None),
        FOLDER, "an adapter without weights", "adapter_model.bin"),
    bad("config is no JSON", config("{"), SETTINGS, "invalid JSON"),
    bad("config is a list", config("[]"), SETTINGS, "not a JSON object"),
    bad("config nested 100,000 deep", config("[" * 100_000), SETTINGS, "nested too deeply"),
    bad("no peft_type", config("{}"), SETTINGS, "not a LoRA adapter", "peft_type None"),
    bad("peft_type is a list", adapter(peft_type=["LORA"]), SETTINGS, "peft_type ['LORA']"),
    bad("prompt tuning", adapter(peft_type="PROMPT_TUNING"), SETTINGS, "PROMPT_TUNING"),
    bad("rank 0", adapter(r=0), SETTINGS, UNREADABLE, "r is 0, expected a whole number above 0"),
    bad("rank below 0", adapter(r=-2), SETTINGS, "r is -2"),
    bad("rank 10**9", adapter(r=10**9), FILE, "rank 2, adapter_config.json says 1000000000"),
    bad("factors of rank 10**9", huge, L0, "needs more memory than allowed"),
    bad("rank is a text", adapter(r="2"), SETTINGS, "r is '2'"),
    bad("rank is 2.0", adapter(r=2.0), SETTINGS, "r is 2.0"),
    bad("rank is true", adapter(r=True), SETTINGS, "r is True"),
    bad("rank is nothing", adapter(r=None), SETTINGS, "r is None"),
    bad("rank of 4000 digits", config('{"peft_type": "LORA", "r": 1' + "0" * 4000 + "}"),
        SETTINGS, "r is 1000"),
    bad("rank of 5000 digits", config('{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}"),
        SETTINGS, "invalid JSON"),
    bad("alpha is NaN", config('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'),
        SETTINGS, "NaN is not JSON"),
    bad("alpha is 1e999", config('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}'),
        SETTINGS, "1e999 is no float64"),
    bad("alpha is 1e300", adapter(lora_alpha=1e300), SETTINGS, "lora_alpha is 1e+300"),
    bad("alpha is a list", adapter(lora_alpha=[4]), SETTINGS, "lora_alpha is [4]"),
    bad("alpha is false", adapter(lora_alpha=False), SETTINGS, "lora_alpha is False"),
    bad("a product that overflows", adapter({k: t * 1e30 for k, t in pair().items()}), L0),
    bad("NaN in a factor", adapter({**pair(), f"{PLAIN}.lora_A.weight": full(float("nan"), 2, 8)}),
        FILE, "NaN or Inf"),
    bad("rsLoRA is a text", adapter(use_rslora="no"), SETTINGS, "use_rslora is 'no'"),
    bad("four mistakes", adapter(r=0, lora_alpha="x", use_rslora=1, fan_in_fan_out=[]),
        SETTINGS, "r is 0", "lora_alpha is 'x'", "use_rslora is 1", "fan_in_fan_out is []"),
    bad("unknown key", adapter(frobnicate=3), SETTINGS, MORE, "frobnicate", "unknown meaning"),
    bad("unknown key with escapes", adapter(**{"\x1b[2J": 3}), SETTINGS, MORE, "unknown meaning"),
    bad("key of 5000 letters", adapter(**{"k" * 5000: 3}), SETTINGS, MORE, "kkk"),
    bad("10,000 unknown keys", adapter(**{f"k{i}": 1 for i in range(10_000)}),
        SETTINGS, "k0:", "and 9980 more"),
    bad("DoRA", adapter(use_dora=True), SETTINGS, MORE, "use_dora: DoRA", "with PEFT"),
    bad("DoRA, said by the weights",
        adapter({**pair(), f"{PLAIN}.lora_magnitude_vector": full(1.0, 8)}),
        FILE, CANNOT, "DoRA"),
    bad("PiSSA", adapter(init_lora_weights="pissa"), SETTINGS, MORE, "'pissa'"),
    bad("OLoRA as a list", adapter(init_lora_weights=["olora"]), SETTINGS, MORE, "olora"),
    bad("bias on B", adapter(lora_bias=True), SETTINGS, MORE, "a bias on lora_B"),
    bad("replicated layers", adapter(layer_replication=[[0, 2]]), SETTINGS, "replicated layers"),
    bad("rank_pattern is a list", adapter(rank_pattern=[2]), SETTINGS, "rank_pattern is [2]"),
    bad("rank_pattern to 0", adapter(rank_pattern={"layers.0": 0}), SETTINGS, "['layers.0'] is 0"),
    bad("rank_pattern to another", adapter(rank_pattern={"layers.0": 3}), FILE, "says 3"),
    bad("alpha_pattern to a text", adapter(alpha_pattern={"layers.0": "2"}), SETTINGS, "is '2'"),
    bad("alpha_pattern to 1e300", adapter(alpha_pattern={"x": 1e300}), SETTINGS, "is 1e+300"),
    bad("regex that is none", adapter(alpha_pattern={"(": 2}), FILE, PATTERN, "missing )"),
    bad("regex with references", adapter(rank_pattern={r"(a)\1": 2}), FILE, PATTERN, "escape"),
    bad("regex with look-ahead", adapter(rank_pattern={"(?=a)b": 2}), FILE, PATTERN, "(?=a"),
    bad("regex repeated 10**9 times", adapter(rank_pattern={"a{1000000000}": 2}), FILE, "repeats"),
    bad("regex nested 1000 deep", adapter(rank_pattern={"(" * 490 + ")" * 490: 2}), FILE, "groups"),
    bad("regex of 10,000 letters", adapter(rank_pattern={"(a)" * 3400: 2}), FILE, "longer than"),
    bad("regex of many steps", many(300, rank_pattern={f"(.*a.*)+x{i}": 1 for i in range(3000)}),
        FILE, PATTERN, "takes too long to match", megabytes=96),
    bad("200,000 ranks that are texts", adapter(rank_pattern={f"k{i}": "" for i in range(200_000)}),
        SETTINGS, "rank_pattern['k0'] is ''", "more", megabytes=256),
    bad("A without B", adapter({f"{PLAIN}.lora_A.weight": full(1.0, 2, 8)}), FILE,
        "lora_B is missing"),
    bad("B without A", adapter({f"{PLAIN}.lora_B.weight": full(1.0, 8, 2)}), FILE,
        "lora_A is missing"),
    bad("half a table", adapter(EMBEDDED), FILE, "lora_B is missing"),
    bad("both kinds of one module", adapter({**pair(), **EMBEDDED}), FILE, "layers.0"),
    bad("ranks that differ", adapter({**pair(), f"{PLAIN}.lora_B.weight": full(1.0, 8, 3)}),
        FILE, "do not fit together"),
    bad("4-D factors", adapter(A4), FILE, "only matrices can be merged"),
    bad("empty factors", adapter(pair(rank=0)), FILE, "do not fit together"),
    bad("rows that the base lacks", adapter(pair(rows=9)), FOLDER, L0,
        "do not fit the base's [8, 8]"),
    bad("columns that the base lacks", adapter(pair(columns=9)), FOLDER, L0,
        "do not fit the base's"),
    bad("an adapter of a vector", adapter(pair("base_model.model.norm")), FOLDER, "norm.weight"),
    bad("another shape than a large base", tall, FOLDER, "do not fit the base's"),
    bad("a module the base lacks", adapter({**pair(), **pair("base_model.model.layers.9")}),
        FOLDER, "layers.9.weight: not in the base"),
    bad("a module that is a path", adapter(pair("../../x")), FOLDER, "../../x.weight"),
    bad("a module of 5000 letters", adapter(pair("x" * 5000)), FOLDER, "xxx"),
    bad("one pair twice", adapter({**pair(), **pair("layers.0")}), FILE, "stands there twice"),
    bad("integers", adapter({k: t.to(torch.int32) for k, t in pair().items()}), FILE, "I32"),
    bad("FP8", adapter({k: t.to(torch.float8_e4m3fn) for k, t in pair().items()}), FILE, "F8_E4M3"),
    bad("a part that LoRA lacks", adapter({**pair(), f"{PLAIN}.lora_C.weight": full(1.0, 2)}),
        FILE, "not a part that plain LoRA has"),
    bad("a saved module of another shape",
        adapter({**pair(), "base_model.model.norm.weight": full(1.0, 9)}), FOLDER, "norm.weight"),
    bad("no tensors", adapter({}), FILE, "it holds no tensors"),
    bad("truncated", written("adapter_model.safetensors", safetensors({"w": entry()})),
        FILE, "data do not end with the file"),
    bad("empty", written("adapter_model.safetensors", b""), FILE, "header does not fit"),
    bad("weights that are a folder", replaced("adapter_model.safetensors", Path.mkdir),
        FILE, "Is a directory"),
    bad("weights that are a FIFO", replaced("adapter_model.safetensors", os.mkfifo),
        FILE, "Not a regular file"),
    bad("config that is a FIFO", replaced("adapter_config.json", os.mkfifo),
        SETTINGS, "Not a regular file"),
    bad("config linked to a device", linked("adapter_config.json", "/dev/zero"),
        SETTINGS, "Not a regular file"),
    bad("config linked to text", linked("adapter_config.json", "/etc/passwd"),
        SETTINGS, "invalid JSON"),
    bad("weights linked to memory", linked("adapter_model.safetensors", "/proc/self/mem"), FILE),
    bad("weights linked to nothing", linked("adapter_model.safetensors", "gone"),
        FOLDER, "without weights"),
    bad("config of 65 MB", replaced("adapter_config.json", lambda path: sparse(path, 65 << 20)),
        SETTINGS, "too long for a JSON file", megabytes=128),
    bad("as the base", as_base, FOLDER),
    *(bad(f"named {text!r}", named(text), text.strip()) for text in SYMBOLS),
    bad("on another base", named("in/expert-a+in/adapter"), "another base", "in/expert-a"),
    bad("a whole model by plus", named("in/base+in/expert-a"), "in/expert-a"),
    bad("800,000 plus signs", by_recipe("+" * 800_000), "no such file or folder", CUT),
    bad("400,000 plus signs between letters", by_recipe("a+" * 400_000 + "a"), CUT),
    bad("8000 plus signs", by_recipe("in/base+" * 1000), CUT),
    good("an adapter", adapter()),
    good("alpha below 0", adapter(lora_alpha=-4)),
    good("alpha 1e30", adapter(lora_alpha=1e30, use_rslora=True)),
    good("alpha 0", adapter(lora_alpha=0)),
    good("rank by a regular expression", adapter(r=9, rank_pattern={r"^layers\.[0-9]$": 2})),
    good("regex that would backtrack for ever", adapter(alpha_pattern={BOMB: 2})),
    good("a saved module", adapter({**pair(), "base_model.model.norm.weight": full(1.0, 8)})),
    good("an adapter in linked blobs", blob),
    good("an adapter beside a whole model", beside_a_model),
    good("base+adapter", named("in/base+in/adapter")),
]  # fmt: skip
