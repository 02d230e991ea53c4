"""The corpus: malformed and strange checkpoints and recipes, each with what must come of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.hostile.files import (
    Bomb,
    entry,
    safetensors,
    torch_bytes,
    torch_zip,
    weights,
    write_model,
)

A = "expert-a/model.safetensors"
BIN = "expert-a/pytorch_model.bin"
NO_TORCH = "not a torch file of the zip format"
INDEX = "expert-a/model.safetensors.index.json"
RECIPE = "merge_method: resm\nbase_model: {base}\nmodels:\n- model: {a}\n- model: {b}\n"


class Site:
    """A base and two experts that merge into `work/merged`, until a case damages something."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = [root / "in" / name for name in ("base", "expert-a", "expert-b")]
        self.base, self.a, self.b = self.models
        self.out = root / "work" / "merged"
        self.partial = root / "work" / "merged.partial"
        self.out.parent.mkdir(parents=True)
        for seed, folder in enumerate(self.models):
            write_model(folder, weights(seed))

    def argv(self, *options: object, out: object = None) -> list[str]:
        """The command that merges the site's models."""
        models = ["--base", self.base, "--expert", self.a, "--expert", self.b]
        return [str(a) for a in ("merge", *models, *options, self.out if out is None else out)]


Arrange = Callable[[Any], Sequence[object] | None]


@dataclass(frozen=True)
class Case:
    """Damage, the command (None is the site's own merge), and the answer it must get.

    `megabytes` above the interpreter's own and `seconds` of CPU bound what answering may take.
    """

    name: str
    arrange: Arrange
    words: tuple[str, ...]
    code: int
    options: tuple[str, ...]
    megabytes: int = 64
    seconds: float = 10.0

    def command(self, site: Site) -> list[str]:
        """Do the damage and return the command line."""
        argv = self.arrange(site)
        return site.argv(*self.options) if argv is None else [str(a) for a in argv]


def bad(
    name: str,
    arrange: Arrange,
    *words: str,
    code: int = 1,
    options: Iterable[str] = (),
    megabytes: int = 64,
) -> Case:
    """A row of a table."""
    return Case(name, arrange, words, code, tuple(options), megabytes)


def good(name: str, arrange: Arrange, *options: str, megabytes: int = 64) -> Case:
    """A row for input that is strange, legal, and merges."""
    return Case(name, arrange, (), 0, options, megabytes)


def nothing(site: Site) -> None:
    """Leave the site as it is: the options are what is wrong."""


# Damage to expert-a's files


def raw(make: Callable[[bytes], bytes]) -> Arrange:
    def arrange(site: Site) -> None:
        path = site.a / "model.safetensors"
        path.write_bytes(make(path.read_bytes()))

    return arrange


def header(content: object, data: bytes = b"", length: int | None = None) -> Arrange:
    return raw(lambda _: safetensors(content, data, length))


def one(**changes: object) -> Arrange:
    return header({"w": entry(**changes)}, bytes(16))


def two(first: list[int], second: list[int], data: int) -> Arrange:
    content = {"a": entry(data_offsets=first), "b": entry(data_offsets=second)}
    return header(content, bytes(data))


def everywhere(name: str, content: bytes) -> Arrange:
    """The same weight file in all three models, so that they fit together."""

    def arrange(site: Site) -> None:
        for folder in site.models:
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(content)

    return arrange


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def sparse_file(place: str, size: int, start: bytes = b"") -> Arrange:
    def arrange(site: Site) -> None:
        sparse(site.root / "in" / place, size, start)

    return arrange


def special(place: str, make: Callable[[Path], None], drop: str | None = None) -> Arrange:
    """Something that is not a regular file under a name in the input folder."""

    def arrange(site: Site) -> None:
        path = site.root / "in" / place
        (site.root / "in" / (drop or place)).unlink(missing_ok=True)
        make(path)

    return arrange


def text(place: str, content: str) -> Arrange:
    def arrange(site: Site) -> None:
        (site.root / "in" / place).write_text(content)

    return arrange


def index(content: object, **shards: Sequence[str]) -> Arrange:
    """An index (text or JSON value) over shards that hold the named tensors of expert-a."""

    def arrange(site: Site) -> None:
        (site.a / "model.safetensors").unlink()
        for stem, names in shards.items():
            write_model(site.a, {n: t for n, t in weights(1).items() if n in names})
            (site.a / "model.safetensors").rename(site.a / f"{stem}.safetensors")
        written = content if isinstance(content, str) else json.dumps(content)
        (site.a / "model.safetensors.index.json").write_text(written)

    return arrange


def maps(**shards: str) -> dict[str, object]:
    """A weight_map from `one=names`: tensor names by shard."""
    return {"weight_map": {n: f"{s}.safetensors" for s, ns in shards.items() for n in ns.split()}}


def binary(content: bytes | Callable[[Site], bytes]) -> Arrange:
    def arrange(site: Site) -> None:
        (site.a / "model.safetensors").unlink()
        made = content if isinstance(content, bytes) else content(site)
        (site.a / "pytorch_model.bin").write_bytes(made)

    return arrange


def tensor_bin(tensor: torch.Tensor) -> Arrange:
    return binary(torch_bytes({**weights(1), "layers.0.weight": tensor}))


BOMB = Bomb(Path("code-ran"))
"""Whatever unpickles it leaves that folder where it runs."""


def no_weights(site: Site) -> None:
    (site.a / "model.safetensors").unlink()


def adapter(site: Site) -> None:
    """As PEFT writes it."""
    write_model(site.a, {"base_model.model.layers.0.lora_A.weight": torch.ones(2, 8)})
    (site.a / "model.safetensors").rename(site.a / "adapter_model.safetensors")
    (site.a / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')


def several_files(site: Site) -> None:
    (site.a / "model.safetensors").rename(site.a / "one.safetensors")
    shutil.copy(site.a / "one.safetensors", site.a / "two.safetensors")


def model_argument(model: str) -> Arrange:
    return lambda site: ["merge", "--base", site.base, "--expert", model, site.out]


L0, L1, NORM = "layers.0.weight", "layers.1.weight", "norm.weight"
ODD_NAME = safetensors('{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))
NO_DATA = entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])
REPEATED = "{" + "".join(f'"k{i}":0,' for i in range(200_000)) + '"z":0,"z":0}'
ENTRY_KEYS = "tensor 'w': must have exactly dtype, shape and data_offsets"
SIZES = "tensor 'w': the shape must be a list of sizes"
DISAGREE = "tensor 'w': shape and data disagree"

FILES = [
    bad("empty", raw(lambda _: b""), A, "header does not fit", "a file of 0 bytes"),
    bad("a Git LFS pointer", raw(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), A,
        "git lfs pull"),
    bad("a web page", raw(lambda _: b"<!doctype html><html></html>"), A, "got: a web page"),
    bad("five bytes", raw(lambda _: b"abcde"), A, "header does not fit", "a file of 5 bytes"),
    bad("truncated", raw(lambda good: good[:-1]), A, "data do not end with the file"),
    bad("trailing bytes", raw(lambda good: good + b"x"), A, "data do not end with the file"),
    bad("header past the end", header("{}", length=99), A, "a header of 99 bytes in a file of 10"),
    bad("header of 2**64-1", header("{}", length=2**64 - 1), A, f"header of {2**64 - 1} bytes"),
    bad("header over 100 MB", sparse_file(A, 200 << 20, (150_000_000).to_bytes(8, "little")),
        A, "a header of 150000000 bytes", "at most 100000000 bytes"),
    bad("not JSON", header("{not json}"), A, "invalid JSON"),
    bad("not an object", header("[1]"), A, "the header is not a JSON object"),
    bad("no UTF-8", header(b'{"\xff": 1}'), A, "invalid JSON", "utf-8"),
    bad("NaN in JSON", header('{"w": NaN}'), A, "NaN is not JSON"),
    bad("number of 5000 digits", header('{"w": ' + "9" * 5000 + "}"), A, "invalid JSON"),
    bad("repeated key", header('{"w": 1, "w": 1}'), A, "the key 'w' stands twice"),
    bad("repeated inner key", header('{"w": {"shape": [], "shape": []}}'), A, "'shape' stands"),
    bad("repeated after 200,000", header(REPEATED), A, "the key 'z' stands twice"),
    bad("deep", header('{"w":' + "[" * 100_000 + "]" * 100_000 + "}"), A, "nested too deeply"),
    bad("deep entry", header('{"w":' + "[" * 62 + "]" * 62 + "}"), A, ENTRY_KEYS),
    bad("deeper entry", header('{"w":' + "[" * 300 + "]" * 300 + "}"), A, "nested too deeply"),
    bad("missing key", one(dtype=None), A, ENTRY_KEYS),
    bad("extra key", one(stride=[2, 1]), A, ENTRY_KEYS, "stride"),
    bad("entry is a list", header({"w": ["F32", [2, 2], [0, 16]]}, bytes(16)), A, ENTRY_KEYS),
    bad("unknown dtype", one(dtype="F12"), A, "tensor 'w': unknown dtype", "F12"),
    bad("dtype is a list", one(dtype=["F32"]), A, "tensor 'w': unknown dtype"),
    bad("too few bytes", one(data_offsets=[0, 8]), A, DISAGREE, "8 bytes", "16 for F32 [2, 2]"),
    bad("shape too large", one(shape=[2, 3]), A, DISAGREE, "16 bytes", "24 for F32 [2, 3]"),
    bad("shape wraps to zero", header({"w": entry(shape=[2**62, 4], data_offsets=[0, 0])}),
        A, "tensor 'w': ", str([2**62, 4])),
    bad("shape of 2**64", one(shape=[2**64, 1]), A, SIZES, str(2**64)),
    bad("negative shape", one(shape=[-2, -2]), A, SIZES, "[-2, -2]"),
    bad("booleans as sizes", one(shape=[True, 4]), A, SIZES, "True"),
    bad("floats as sizes", one(shape=[2.0, 2]), A, SIZES, "2.0"),
    bad("shape is a number", one(shape=4), A, SIZES),
    bad("33 dimensions", one(shape=[1] * 32 + [4]), A, SIZES),
    bad("overflowing and empty", everywhere("model.safetensors", safetensors({"w": NO_DATA})),
        "base/model.safetensors", "tensor 'w'"),
    bad("offsets reversed", one(data_offsets=[16, 0]), A, "tensor 'w': data_offsets must be"),
    bad("offsets negative", one(data_offsets=[-16, 0]), A, "tensor 'w': data_offsets must be"),
    bad("three offsets", one(data_offsets=[0, 8, 16]), A, "tensor 'w': data_offsets must be"),
    bad("boolean offset", one(data_offsets=[False, 16]), A, "tensor 'w': data_offsets must be"),
    bad("overlap", two([0, 16], [8, 24], 24), A, "tensor 'b' overlaps", "from byte 16"),
    bad("the same data twice", two([0, 16], [0, 16], 16), A, "overlaps the tensor before it"),
    bad("hole", two([0, 16], [24, 40], 40), A, "tensor 'b' leaves a hole", "from byte 24"),
    bad("hole at the start", one(data_offsets=[8, 24]), A, "tensor 'w' leaves a hole"),
    bad("data past the end", header({"w": entry()}, bytes(8)), A, "data do not end with the file"),
    bad("metadata of numbers", header({"__metadata__": {"a": 1}}), A, "__metadata__ must map"),
    bad("metadata is a list", header({"__metadata__": ["a"]}), A, "__metadata__ must map"),
    bad("name is no text", everywhere("model.safetensors", ODD_NAME), "base/model.safetensors"),
    bad("name with escapes", header({"\x1b]0;owned\x07": entry()}, bytes(16)),
        "owned", "expert-a", "not in the base"),
    bad("directory", special(A, Path.mkdir), A, "Is a directory"),
    bad("FIFO", special(A, os.mkfifo), A, "a regular file"),
    bad("FIFO as index", special(INDEX, os.mkfifo, drop=A), INDEX, "a regular file"),
    bad("FIFO as config", special("expert-a/config.json", os.mkfifo),
        "expert-a/config.json", "a regular file"),
    bad("config is a directory", special("expert-a/config.json", Path.mkdir),
        "expert-a/config.json", "Is a directory"),
    bad("config is no JSON", text("expert-a/config.json", "{"), "a/config.json", "invalid JSON"),
    bad("config is a list", text("expert-a/config.json", "[]"), "a/config.json", "not a JSON obj"),
    bad("quantised", text("expert-a/config.json", '{"quantization_config": {"bits": 4}}'),
        "expert-a", "quantised weights cannot be merged", "dequantise"),
    bad("tokenizer of 300 MB", sparse_file("base/tokenizer.json", 300 << 20),
        "base/tokenizer.json", "too large"),
    bad("no weights", no_weights, "expert-a: no weights", "model.safetensors"),
    bad("half a LoRA adapter", adapter, "expert-a",
        "this adapter cannot be merged", "lora_B is missing"),
    bad("several files", several_files, "expert-a: 2 safetensors files and no index"),
    bad("no such folder", model_argument("./no/x"), "./no/x: no such file or folder"),
    bad("a LoRA by plus", model_argument("some/model+some/lora"), "some/lora",
        "it has another base"),
    bad("an unknown user's home", model_argument("~no_such_user/model"), "~no_such_user/model"),
    bad("a name of 300 letters", model_argument("in/" + "x" * 300), "in/xxx"),
]  # fmt: skip

INDEXES = [
    bad("path traversal", index({"weight_map": {L0: "../expert-b/model.safetensors"}}),
        INDEX, L0, "a plain file name", "../expert-b"),
    bad("absolute path", index({"weight_map": {L0: "/etc/passwd"}}), INDEX, L0, "/etc/passwd"),
    bad("backslashes", index({"weight_map": {L0: "..\\x"}}), INDEX, L0, "a plain file name"),
    bad("dots", index({"weight_map": {L0: ".."}}), INDEX, L0, "a plain file name"),
    bad("shard is a number", index({"weight_map": {L0: 5}}), INDEX, L0, "a plain file name"),
    bad("shard of 5000 letters", index({"weight_map": {L0: "x" * 5000}}), INDEX, "xxxx"),
    bad("missing shard", index(maps(one=f"{L0} {L1}", gone=NORM), one=[L0, L1]),
        INDEX, "1 of 2 shards are missing", "gone.safetensors"),
    bad("listed but not there", index(maps(one=f"{L0} {L1} {NORM} ghost"), one=[L0, L1, NORM]),
        INDEX, "one.safetensors lacks 1", "ghost"),
    bad("there but not listed", index(maps(one=f"{L0} {L1}"), one=[L0, L1, NORM]),
        INDEX, "one.safetensors holds 1", NORM),
    bad("in two shards", index(maps(one=f"{L0} {L1}", two=NORM), one=[L0, L1], two=[L1, NORM]),
        INDEX, f"{L1!r} lies in two shards", "one.safetensors and two.safetensors"),
    bad("listed twice", index(f'{{"weight_map": {{"{L0}": "a", "{L0}": "b"}}}}'),
        INDEX, f"{L0!r} stands twice"),
    bad("no weight_map", index({"metadata": {}}), INDEX, "no weight_map"),
    bad("empty weight_map", index({"weight_map": {}}), INDEX, "no weight_map"),
    bad("weight_map is a list", index({"weight_map": [L0]}), INDEX, "no weight_map"),
    bad("index is no JSON", index("weight_map"), INDEX, "invalid JSON"),
    bad("shard is the index", index({"weight_map": {L0: "model.safetensors.index.json"}}),
        INDEX, NO_TORCH),
]  # fmt: skip

BAD_TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."
BINS = [
    bad("pickled code", binary(torch_bytes({"w": BOMB})),
        BIN, "pickled objects other than tensors", "never loaded"),
    bad("pickled code, old format", binary(torch_bytes({"w": BOMB}, legacy=True)),
        BIN, NO_TORCH),
    bad("pickled code, plain", binary(pickle.dumps(BOMB)), BIN, NO_TORCH),
    bad("old format", binary(torch_bytes(weights(1), legacy=True)), BIN, NO_TORCH),
    bad("garbage", binary(b"garbage " * 9), BIN, NO_TORCH),
    bad("empty", binary(b""), BIN, NO_TORCH),
    bad("truncated", binary(torch_bytes(weights(1))[:900]), BIN, NO_TORCH),
    bad("pickle without value", binary(torch_zip(b"\x80\x02.")), BIN, "convert it"),
    bad("pickle cut short", binary(torch_zip(b"\x80\x02J\x01")), BIN, "convert it"),
    bad("pickle of a bad storage", binary(torch_zip(b"\x80\x02K\x01Q.")), BIN, "convert it"),
    bad("pickle of a bad tensor", binary(torch_zip(BAD_TENSOR)),
        BIN, "convert it"),
    bad("list", binary(torch_bytes([torch.ones(2)])), BIN, "state dict", "got: list"),
    bad("nested", binary(torch_bytes({"state_dict": weights(1)})), BIN, "not a flat state dict"),
    bad("complex128", tensor_bin(torch.ones(8, 8, dtype=torch.complex128)),
        BIN, f"tensor {L0!r}", "unsupported dtype torch.complex128"),
    bad("sparse", tensor_bin(torch.eye(8).to_sparse()), BIN, L0, "_rebuild_sparse_tensor"),
    bad("meta", tensor_bin(torch.empty(8, 8, device="meta")), BIN, L0, "_rebuild_meta_tensor"),
    bad("expanded to 4 TB", tensor_bin(torch.ones(1).expand(1 << 40)), L0, str([1 << 40])),
    bad("named __metadata__",
        everywhere("pytorch_model.bin", torch_bytes({"__metadata__": torch.ones(2)})),
        "base/pytorch_model.bin", "__metadata__"),
    bad("name is no text", everywhere("pytorch_model.bin", torch_bytes({"\ud800": torch.ones(2)})),
        "base/pytorch_model.bin"),
]  # fmt: skip


# Models that do not fit together


def tensors(model: str = "expert-a", **changes: torch.Tensor | None) -> Arrange:
    """Rewrite a model with tensors changed or dropped (None); `L0`, `L1` and `NORM` by name."""

    def arrange(site: Site) -> None:
        names = {"L0": L0, "L1": L1, "NORM": NORM}
        seed = [folder.name for folder in site.models].index(model)
        new = {**weights(seed), **{names.get(n, n): t for n, t in changes.items()}}
        write_model(
            site.root / "in" / model, {n: t for n, t in new.items() if isinstance(t, torch.Tensor)}
        )

    return arrange


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value)


FP8 = torch.ones(8, 8).to(torch.float8_e4m3fn)
SEVERAL = tensors(L0=full(1, 8, 9), L1=None, extra=full(1, 3))
TO_HALF = ("--out-dtype", "float16")

FITS = [
    bad("missing tensor", tensors(L1=None), L1, "missing from", "expert-a", "--allow-missing"),
    bad("extra tensor", tensors(extra=full(1, 3)), "extra", "expert-a, not in the base"),
    bad("shape", tensors(L0=full(1, 8, 9)), L0, "shape [8, 9]", "expert-a, [8, 8] in the base"),
    bad("three misfits", SEVERAL, L0, "shape [8, 9]", L1, "missing", "extra", "not in"),
    bad("integers", tensors(L0=torch.ones(8, 8, dtype=torch.int64)), L0, "I64 in ", "expert-a"),
    bad("FP8 expert", tensors(L0=FP8), L0, "F8_E4M3 in ", "expert-a"),
    bad("FP8 base", tensors("base", L0=FP8), L0, "F8_E4M3 weights", "in/base", "dequantise"),
    bad("empty base", lambda site: write_model(site.base, {}), "base: the base holds no tensors"),
    bad("NaN in an expert", tensors(L1=full(float("nan"), 8, 8)), A, L1, "64 of 64 values"),
    bad("Inf in the base", tensors("base", NORM=full(float("inf"), 8)),
        "base/model.safetensors", NORM, "8 of 8 values are NaN or Inf"),
    bad("fp16 overflow", tensors(NORM=full(1e6, 8)), NORM, "8 merged values do not fit F16",
        options=TO_HALF),
    bad("fp16 overflow in a copy", tensors("base", extra=full(1e6, 4)), "extra", "do not fit F16",
        options=(*TO_HALF, "--allow-missing")),
    bad("memory", nothing, "layers.", "more memory than allowed", "at most 1,000 bytes",
        "--memory-budget", options=("--memory-budget", "1kB")),
]  # fmt: skip


# Recipes


def recipe(content: str | bytes) -> Arrange:
    def arrange(site: Site) -> list[object]:
        path = site.root / "recipe.yml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            places = {"{base}": "in/base", "{a}": "in/expert-a", "{b}": "in/expert-b"}
            written = content
            for word, place in places.items():
                written = written.replace(word, place)
            path.write_text(written)
        return ["merge", path, site.out]

    return arrange


def plus(line: str) -> Arrange:
    return recipe(f"{RECIPE}{line}\n")


def mistake(name: str, arrange: Arrange, *words: str) -> Case:
    return bad(name, arrange, "recipe.yml", *words, code=2)


LAUGHS = "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a, *a, *a]\n" for i in range(50))
NO_MAPPING = "expected a mapping with merge_method, base_model, models"

RECIPES = [
    mistake("empty", recipe(""), NO_MAPPING),
    mistake("only a comment", recipe("# nothing"), NO_MAPPING),
    mistake("list", recipe("- a\n- b\n"), NO_MAPPING),
    mistake("unknown key", plus("lamda: 1"), "lamda: unknown key", "did you mean 'lambda'?"),
    mistake("key is a number", plus("7: 1"), "7: unknown key"),
    mistake("unknown method", recipe(RECIPE.replace("resm", "tsvn")), "merge_method: got 'tsvn'",
            "did you mean 'tsvm'?"),
    mistake("no method", recipe(RECIPE.split("\n", 1)[1]), "merge_method: missing"),
    mistake("method is a list", recipe(RECIPE.replace("resm", "[resm]")), "got ['resm']"),
    mistake("unknown parameter", plus("parameters: {sigm: 3}"), "parameters.sigm: unknown key",
            "did you mean 'sigma'?"),
    mistake("not a number", plus("parameters: {sigma: wide}"), "parameters.sigma: got 'wide'",
            "expected a number"),
    mistake("not a bool", plus("parameters: {mask_noise: 3}"), "mask_noise: got 3", "true or"),
    mistake("not a choice", plus("parameters: {rank: best}"), "rank: got 'best'", "sparsity"),
    mistake("not a mapping", plus("parameters: 3"), "parameters: got 3, expected a mapping"),
    mistake("too small", plus("parameters: {sigma: -1}"), "sigma: got -1", "a number >= 0"),
    mistake("too large", plus("parameters: {rank_sparsity: 1.5}"), "got 1.5", ">= 0 and <= 1"),
    mistake("infinite", plus("lambda: .inf"), "lambda: got inf", "expected a number"),
    mistake("400 digits", plus(f"lambda: 1{'0' * 400}"), "lambda: got 1000", "expected a number"),
    mistake("two mistakes", plus("lamda: 1\ndtype: int8"), "2 mistakes", "lamda:", "dtype: got"),
    mistake("repeated key", plus("merge_method: tsvm"), "line 6: 'merge_method' stands twice"),
    mistake("repeated inner key", plus("parameters: {sigma: 1, sigma: 2}"), "'sigma' stands twice"),
    mistake("Python object", plus("lambda: !!python/object/apply:os.mkdir [code-ran]"),
            "python/object/apply:os.mkdir", "line 6"),
    mistake("Python name", plus("lambda: !!python/name:os.mkdir"), "python/name:os.mkdir"),
    mistake("tag without its value", plus("lambda: !!bool maybe"), "not valid YAML"),
    mistake("tag with nothing", plus("lambda: !!int ''"), "not valid YAML"),
    mistake("tag on nonsense", plus("lambda: !!timestamp soon"), "not valid YAML"),
    mistake("impossible date", plus("lambda: 2020-99-99"), "not valid YAML"),
    mistake("alias bomb", recipe(LAUGHS), "anchors and aliases are not allowed"),
    mistake("alias of itself", plus("parameters: &p {x: *p}"), "aliases are not allowed"),
    mistake("merge key", plus("<<: {lambda: 1}"), "merge keys (<<) are not allowed"),
    mistake("deep list", recipe("[" * 100_000), "nested too deeply"),
    mistake("deep mapping", recipe("{a: " * 50_000), "nested too deeply"),
    mistake("over 1 MB", recipe(b"#" * (1 << 20) + b"\n"), "longer than 1048576 bytes"),
    mistake("no text", recipe(b"\xff\xfe\xff"), "not valid YAML"),
    mistake("NUL", recipe(RECIPE + "\0"), "not valid YAML", "special characters"),
    mistake("open bracket", plus("lambda: ["), "not valid YAML"),
    mistake("two documents", plus("---\nlambda: 1"), "expected a single document"),
    mistake("slices", plus("slices: []"), "slices: layer slicing is not supported"),
    mistake("no base", recipe(RECIPE.replace("base_model: {base}\n", "")), "base_model: missing",
            "resm merges changes against a base"),
    mistake("base is a number", recipe(RECIPE.replace("{base}", "7")), "base_model: got 7"),
    mistake("no models", recipe("merge_method: resm\nbase_model: {base}\nmodels: []\n"),
            "models: expected a list"),
    mistake("models is a mapping", recipe("merge_method: resm\nmodels: {model: y}\n"),
            "models: expected a list"),
    mistake("model is a text", plus("- some/model"), "models[2]: got 'some/model'"),
    mistake("only the base", recipe("merge_method: resm\nbase_model: x\nmodels: [{model: x}]\n"),
            "models: no model besides the base"),
    mistake("unknown model key", plus("- {model: x, wieght: 2}"), "models[2].wieght: unknown key"),
    mistake("weight is a text", plus("- {model: x, parameters: {weight: heavy}}"),
            "models[2].parameters.weight: got 'heavy'", "expected a number"),
    mistake("bad dtype", plus("dtype: floaty32"), "got 'floaty32'", "did you mean 'float32'?"),
    mistake("dtype is a list", plus("dtype: [float32]"), "dtype: got ['float32']"),
    mistake("out_dtype is a mapping", plus("out_dtype: {a: b}"), "out_dtype: got {'a': 'b'}"),
    mistake("lambda twice", plus("lambda: 1\nparameters: {lambda: 2}"), "lambda: stands at the top",
            "keep one"),
    mistake("outputs of a merge", plus("outputs: [{name: a}]"), "outputs: several outputs"),
    mistake("an override without a filter", plus("overrides: [{merge_method: tsvm}]"),
            "overrides[0].filter: got None"),
    mistake("filter without value", plus("parameters: {sigma: [{filter: mlp}]}"),
            "parameters.sigma[0]: no value"),
    mistake("empty gradient", plus("parameters: {sigma: []}"), "sigma: got an empty list"),
    mistake("tokenizer_source", plus("tokenizer_source: [union]"),
            "expected base, union or a model"),
]  # fmt: skip


# Bombs: small or legal files that unpack to gigabytes, or to hours


def zipped(*members: tuple[str, bytes], packed: bool = False) -> bytes:
    """A `.bin` of any members."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def bombed_zip() -> bytes:
    return zipped(("archive/data.pkl", bytes(256 << 20)), ("archive/version", b"3\n"), packed=True)


def pickled(program: bytes) -> Arrange:
    return binary(lambda site: torch_zip(program))


def later(make: Callable[[], bytes]) -> Arrange:
    """A header that is made when the case runs, for the ones of many megabytes."""
    return raw(lambda _: safetensors(make()))


def index_of(value: bytes, count: int) -> Arrange:
    def arrange(site: Site) -> None:
        path = site.a / "model.safetensors"
        path.unlink()
        index = path.with_name("model.safetensors.index.json")
        index.write_bytes(b'{"weight_map":[' + value * count + b"0]}")

    return arrange


def two_disks() -> bytes:
    """As found by fuzzing: Python's zipfile raised its own error at this."""
    whole = bytearray(torch_bytes(weights(1)))
    locator = whole.rindex(b"PK\x06\x07")
    whole[locator + 4] = 1
    whole[locator + 16] = 2
    return bytes(whole)


def claims(offset: int, value: int, size: int = 4) -> bytes:
    """A `.bin` whose end record says something else at an offset."""
    whole = bytearray(zipped(("archive/data.pkl", b"\x80\x02}."), ("archive/version", b"3\n")))
    end = len(whole) - 22 + offset
    whole[end : end + size] = value.to_bytes(size, "little")
    return bytes(whole)


MOST = 100_000_000
WIDE = "\U0001f600".encode()
CUT = "characters)..."
VALUES = "more than 2,000,000 values"
CALL = b"ctorch._utils\n_rebuild_tensor_v2\n"
HASHES = b"\x80\x02}K\x01q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."
VIEW = (
    b"\x80\x02}X\x01\x00\x00\x00w" + CALL + b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ%sK\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
)


def view(offset: bytes) -> Arrange:
    """Two floats of a storage of 16 bytes, from any offset."""
    return binary(torch_zip(VIEW % offset, {"0": bytes(16)}))


BOMBS = [
    bad("header of 100 MB, lists", later(lambda: b'{"a":[' + b"[]," * (MOST // 3 - 9) + b"0]}"),
        A, VALUES, megabytes=256),
    bad("header of 100 MB, one name", later(lambda: b'{"' + b"a" * (MOST - 10) + b'":1}'),
        A, "tensor 'aaa", CUT, "exactly dtype", megabytes=512),
    bad("header of 100 MB, wide text", later(lambda: b'{"' + WIDE * 24_900_000 + b'":1}'),
        A, CUT, "exactly dtype", megabytes=512),
    bad("header of 100 MB, spaces", later(lambda: b"{" + b" " * (MOST - 9)), A, "invalid JSON",
        megabytes=512),
    bad("header of as many lists as may be", later(lambda: b'{"a":[' + b"[]," * 666_000 + b"0]}"),
        A, "tensor 'a': must have exactly dtype", megabytes=256),
    bad("header of as many keys as may be",
        later(lambda: b"{" + b",".join(b'"%x":0' % i for i in range(1_999_000)) + b"}"),
        A, "tensor '0': must have exactly dtype", megabytes=640),
    bad("index of 60 MB", index_of(b"[],", 20_000_000), INDEX, VALUES, megabytes=128),
    bad("index over 64 MB", special(INDEX, lambda path: sparse(path, 65 << 20), drop=A),
        INDEX, "too long for a JSON file", megabytes=128),
    bad("deep index", index('{"weight_map":' * 1000), INDEX, "nested too deeply"),
    bad("deep config", text("base/config.json", '{"a":' * 500 + "1" + "}" * 500),
        "base/config.json", "nested too deeply", options=("--out-dtype", "bfloat16")),
    bad("config with 1e999", text("base/config.json", '{"a": 1e999}'),
        "base/config.json", "1e999 is no float64", options=("--out-dtype", "bfloat16")),
    bad("config of 5000 digits", text("base/config.json", '{"a": ' + "9" * 5000 + "}"),
        "base/config.json", "invalid JSON"),
    bad("zip bomb", binary(lambda site: bombed_zip()),
        BIN, NO_TORCH, "compressed"),
    bad("bytearray of 2 GB", pickled(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."),
        BIN, "builtins bytearray", "never loaded"),
    bad("storage of 2 GB", pickled(b"\x80\x02ctorch\nFloatStorage\nJ\x00\x00\x00\x7f\x85R."),
        BIN, NO_TORCH, "a call that torch.save does not write"),
    bad("hash of 2**60 tuples", pickled(HASHES), BIN, NO_TORCH, "a key that is no text but tuple"),
    bad("pickle of two million steps", pickled(b"\x80\x02" + b"N" * 2_000_001),
        BIN, NO_TORCH, "more than 2000000 pickle instructions"),
    bad("pickle over 16 MB", pickled(bytes(17 << 20)), BIN, NO_TORCH, "is longer than"),
    bad("zip of two disks", binary(two_disks()), BIN, NO_TORCH),
    bad("zip directory of 4 GB", binary(claims(12, 2**32 - 1)),
        BIN, NO_TORCH, "zip directory of 4294967295 bytes"),
    bad("zip directory past the end", binary(claims(16, 2**32 - 1)),
        BIN, NO_TORCH, "outside the file"),
    bad("zip of 65535 files", binary(claims(10, 65535, 2)), BIN, NO_TORCH),
    bad("zip without files", binary(claims(10, 0, 2)), BIN, NO_TORCH, "an empty archive"),
    bad("one name twice in a zip",
        binary(zipped(("a/one", b"1"), ("a/two", b"2")).replace(b"two", b"one")),
        BIN, NO_TORCH, "'a/one' stands twice"),
    bad("pickle with a wrong checksum",
        binary(torch_bytes(weights(1)).replace(b"layers.0.weight", b"layers.2.weight")),
        BIN, NO_TORCH, "does not match its checksum"),
    bad("big-endian", binary(torch_bytes(weights(1)).replace(b"little", b"biggie")), BIN, NO_TORCH),
    bad("view past its storage", view(b"K\x03"), BIN, "tensor 'w'", "20 bytes in a storage of 16"),
    bad("view before its storage", view(b"J\xff\xff\xff\xff"), BIN, "tensor 'w'", "must be sizes"),
    bad("storage longer than the pickle says", binary(torch_zip(VIEW % b"K\x00", {"0": bytes(20)})),
        BIN, "tensor 'w'", "its storage has 20 bytes"),
    bad("two folders in a zip", binary(zipped(("a/data.pkl", b"\x80\x02}."), ("b/x", b""))),
        BIN, NO_TORCH, "'b/x' lies outside the folder 'a'"),
    bad("view at a text", view(b"X\x01\x00\x00\x001"), BIN, "tensor 'w'", "must be sizes"),
    mistake("whole number to base 60", plus("lambda: 1" + ":59" * 340_000), "1000 digits"),
    mistake("base of 8000 hex digits", recipe(RECIPE.replace("{base}", "0x" + "f" * 8000)),
            "line 2: more than 1000 digits"),
    mistake("100,000 values", plus("parameters: {sigma: [" + "1," * 100_000 + "]}"),
            "more than 50000 values"),
    mistake("24,000 mistakes", plus("".join(f"k{i}: 1\n" for i in range(24_000))),
            "24000 mistakes", "k0: unknown key", CUT),
    mistake("a value of 1 MB", plus("lambda: " + "a" * 1_000_000), "lambda: got 'aaa", CUT),
    mistake("50,000 tag handles", recipe("%TAG ! tag:x,2000:\n" * 50_000), "duplicate tag handle"),
]  # fmt: skip


# Links


def linked(place: str, target: str, drop: str | None = None) -> Arrange:
    """A symbolic link in the input folder; what it names is relative to its own folder."""
    return special(place, lambda path: path.symlink_to(target), drop)


def shard_linked(target: str) -> Arrange:
    """An index whose one shard is a link."""

    def arrange(site: Site) -> None:
        index(maps(one=f"{L0} {L1} {NORM}"), one=[L0, L1, NORM])(site)
        (site.root / "outside").write_text("precious")
        shard = site.a / "one.safetensors"
        shard.rename(site.root / "real.safetensors")
        shard.symlink_to(target)

    return arrange


LINKS = [
    bad("weights linked to text", linked(A, "../base/config.json"), A, "header does not fit"),
    bad("weights linked to themselves", linked(A, "model.safetensors"), "expert-a"),
    bad("weights linked to nothing", linked(A, "gone"), "expert-a"),
    bad("weights linked to a device", linked(A, "/dev/zero"), A, "Not a regular file"),
    bad("shard linked outside", shard_linked("../../outside"),
        "expert-a/one.safetensors", "header does not fit"),
    bad("shard linked to itself", shard_linked("one.safetensors"), INDEX, "missing"),
    bad("shard linked to memory", shard_linked("/proc/self/mem"), "expert-a/one.safetensors"),
    bad("config linked to a device", linked("expert-a/config.json", "/dev/zero"),
        "expert-a/config.json", "Not a regular file"),
    bad("tokenizer linked to a device", linked("base/tokenizer.json", "/dev/zero"),
        "base/tokenizer.json", "Not a regular file"),
    bad("tokenizer linked to nothing", linked("base/tokenizer.json", "gone"),
        "base/tokenizer.json", "No such file"),
]  # fmt: skip


# Strange, legal, merged


def all_hold(**extra: torch.Tensor) -> Arrange:
    """The same further tensors in all three models."""

    def arrange(site: Site) -> None:
        for seed, folder in enumerate(site.models):
            write_model(folder, {**weights(seed), **extra})

    return arrange


def as_bin(site: Site) -> None:
    """Transposed, sliced, expanded, tied and empty tensors as torch saves them."""
    for seed, folder in enumerate(site.models):
        (folder / "model.safetensors").unlink()
        w = weights(seed)
        state = {
            L0: w[L0].T,
            L1: torch.nn.Parameter(w[L1]),
            NORM: w[NORM],
            "slice": w[L0][1:3, 2:5],
            "row": w[NORM].expand(3, 8),
            "tied": w[NORM],
            "empty": w[L0][:0],
            "scalar": torch.tensor(1.5),
        }
        (folder / "pytorch_model.bin").write_bytes(torch_bytes(state))


def odd_header(site: Site) -> None:
    """Keys in any order, spaces, escapes, data at odd bytes, a name that is a path."""
    entries = (
        b'{ "\\u0077" : {"shape":[2],"data_offsets":[1,9],"dtype":"F32"},\n'
        b'"../../x\\u0000":{"data_offsets":[0,1],"dtype":"U8","shape":[1]} ,'
        b'"__metadata__":{"a":"\\ud83d\\ude00"},'
        b'"":{"dtype":"BF16","shape":[],"data_offsets":[9,11]}}   '
    )
    for folder in site.models:
        (folder / "model.safetensors").write_bytes(safetensors(entries, bytes(11)))


def linked_blobs(site: Site) -> None:
    """As the Hub's cache lays files out."""
    for folder in site.models:
        path = folder / "model.safetensors"
        blob = site.root / f"blob-{folder.name}"
        path.rename(blob)
        path.symlink_to(f"../../{blob.name}")


def equal(site: Site) -> None:
    for folder in site.models:
        write_model(folder, weights(0))


def no_configs(site: Site) -> None:
    for folder in site.models:
        (folder / "config.json").unlink()


def with_code(site: Site) -> None:
    """Python files beside the weights, and a config that asks for them and for others."""
    (site.a / "extra.py").write_text("raise SystemExit")
    (site.base / "modeling.py").write_text("import os; os.mkdir('code-ran')")
    names = {"AutoModel": "modeling.Model", "AutoConfig": "elsewhere/code--modeling.Config"}
    config = {"auto_map": names, "_name_or_path": "elsewhere/model", "trust_remote_code": True}
    (site.base / "config.json").write_text(json.dumps(config))
    (site.base / "tokenizer_config.json").write_text(json.dumps(config))


STRANGE = [
    good("zero-size tensors", all_hold(a=full(0, 0), b=full(0, 0, 5), c=full(0, 3, 0, 2))),
    good("scalars", all_hold(a=torch.tensor(2.0), b=torch.tensor(7), c=torch.tensor(True))),
    good("32 dimensions", all_hold(a=full(1, *[1] * 32))),
    good("subnormals", all_hold(a=full(1e-45, 8, 8), b=full(5.9e-8, 4).to(torch.float16))),
    good("largest floats", all_hold(a=full(3.4e38, 4), b=full(65504, 4).to(torch.float16))),
    good("negative zeros", all_hold(a=full(-0.0, 8, 8))),
    good("equal models", equal),
    good("NaN, told to go on", tensors(L1=full(float("nan"), 8, 8)), "--nonfinite", "warn"),
    good("Inf, told to go on", tensors("base", NORM=full(float("inf"), 8)), "--nonfinite", "warn"),
    good("odd header", odd_header),
    good("views in a .bin", as_bin),
    good("linked blobs", linked_blobs),
    good("no config", no_configs),
    good("empty config", text("base/config.json", "{}"), "--out-dtype", "bfloat16"),
    good("Python files", with_code),
]  # fmt: skip
