"""Bad input at the command line: one clear message, the right exit status, nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from resm_kernels.checkpoint.files import canonical_json, seal
from resm_kernels.cli import main
from resm_kernels.engine import pipeline
from resm_kernels.engine.plan import MergePlan
from resm_kernels.report.progress import BarProgress
from tests.hostile.files import (
    CONFIG,
    Bomb,
    entry,
    safetensors,
    snapshot,
    torch_bytes,
    torch_zip,
    weights,
    write_model,
)

pytestmark = pytest.mark.timeout(20)

A = "expert-a/model.safetensors"
BIN = "expert-a/pytorch_model.bin"
NO_TORCH = "not a torch file of the zip format"
INDEX = "expert-a/model.safetensors.index.json"
SHARDED = ("--shard-size", "300")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RECIPE = "merge_method: resm\nbase_model: {base}\nmodels:\n- model: {a}\n- model: {b}\n"


class Site:
    """A base and two experts that merge into `work/merged`, until a case damages something."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.models = [root / "in" / name for name in ("base", "expert-a", "expert-b")]
        self.base, self.a, self.b = self.models
        self.out = root / "work" / "merged"
        self.partial = root / "work" / "merged.partial"
        self.out.parent.mkdir()
        for seed, folder in enumerate(self.models):
            write_model(folder, weights(seed))

    def argv(self, *options: object, out: object = None) -> list[str]:
        """The command that merges the site's models."""
        models = ["--base", self.base, "--expert", self.a, "--expert", self.b]
        return [str(a) for a in ("merge", *models, *options, self.out if out is None else out)]

    def leave_unfinished(self) -> None:
        """Interrupt a merge after its last shard: `merged.partial` holds two finished shards."""
        with self.monkeypatch.context() as patch:
            patch.setattr(pipeline, "_check_inputs_unchanged", _interrupt)
            assert status(self.argv(*SHARDED)) == 130
        assert {p.name for p in self.partial.iterdir()} == {*SHARDS, "resm_journal.jsonl"}


Arrange = Callable[[Site], Sequence[object] | None]


@dataclass(frozen=True)
class Case:
    """Damage, the command (None is the site's own merge), and the answer it must get."""

    name: str
    arrange: Arrange
    words: tuple[str, ...]
    code: int
    options: tuple[str, ...]

    def command(self, site: Site) -> list[str]:
        """Do the damage and return the command line."""
        argv = self.arrange(site)
        return site.argv(*self.options) if argv is None else [str(a) for a in argv]


def bad(
    name: str, arrange: Arrange, *words: str, code: int = 1, options: Iterable[str] = ()
) -> Case:
    """A row of a table."""
    return Case(name, arrange, words, code, tuple(options))


def rows(**tables: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrise a test over the rows of some tables."""
    found = [pytest.param(c, id=f"{area}: {c.name}") for area, t in tables.items() for c in t]
    return pytest.mark.parametrize("case", found)


def status(argv: Sequence[object]) -> int | str | None:
    """Exit status of the command, run in this process."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def assert_message(err: str, words: Sequence[str]) -> None:
    """The message says all of it, to a person and not to a terminal."""
    assert [word for word in words if word not in err] == [], err
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert "\x07" not in err


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Its path holds no word of the test's name, which a message must not be matched by."""
    root = tmp_path_factory.mktemp("site")
    monkeypatch.chdir(root)
    return Site(root, monkeypatch)


def _interrupt(plan: MergePlan) -> None:
    raise KeyboardInterrupt


# Damage to expert-a's files


def nothing(site: Site) -> None:
    """Leave the site as it is: the options are what is wrong."""


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


def sparse_file(place: str, size: int, start: bytes = b"") -> Arrange:
    def arrange(site: Site) -> None:
        path = site.root / "in" / place
        path.write_bytes(start)
        os.truncate(path, size)

    return arrange


def special(place: str, make: Callable[[Path], None], drop: str | None = None) -> Arrange:
    """Something that is not a regular file under a name in the input folder."""

    def arrange(site: Site) -> None:
        path = site.root / "in" / place
        (site.root / "in" / (drop or place)).unlink()
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


def nested(site: Site) -> bytes:
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    return torch_bytes({**weights(1), L0: ragged})


def bomb(site: Site) -> Bomb:
    return Bomb(site.root / "code-ran")


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
    bad("deep entry", header('{"w":' + "[" * 300 + "]" * 300 + "}"), A, ENTRY_KEYS),
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
    bad("LoRA adapter", adapter, "expert-a", "LoRA adapter", "merge the adapter into its base"),
    bad("several files", several_files, "expert-a: 2 safetensors files and no index"),
    bad("no such folder", model_argument("./no/x"), "./no/x: no such file or folder"),
    bad("a LoRA by plus", model_argument("some/model+some/lora"), "some/lora", "LoRA adapters"),
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
    bad("pickled code", binary(lambda site: torch_bytes({"w": bomb(site)})),
        BIN, "pickled objects other than tensors", "never loaded"),
    bad("pickled code, old format", binary(lambda s: torch_bytes({"w": bomb(s)}, legacy=True)),
        BIN, NO_TORCH),
    bad("pickled code, plain", binary(lambda site: pickle.dumps(bomb(site))), BIN, NO_TORCH),
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
    bad("sparse", tensor_bin(torch.eye(8).to_sparse()), BIN, L0, "not dense"),
    bad("meta", tensor_bin(torch.empty(8, 8, device="meta")), BIN, L0, "not dense"),
    bad("nested tensor", binary(nested), BIN, L0),
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
            places = {"{base}": site.base, "{a}": site.a, "{b}": site.b}
            written = content
            for word, place in places.items():
                written = written.replace(word, str(place))
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
    mistake("lambda of linear", recipe(RECIPE.replace("resm", "linear") + "lambda: 1\n"),
            "lambda: linear has no such parameter"),
    mistake("filter without value", plus("parameters: {sigma: [{filter: mlp}]}"),
            "parameters.sigma[0]: no value"),
    mistake("empty gradient", plus("parameters: {sigma: []}"), "sigma: got an empty list"),
    mistake("tokenizer_source", plus("tokenizer_source: union"), "only 'base' is supported"),
]  # fmt: skip


# Commands


def command(*argv: str) -> Arrange:
    return lambda site: argv


def wrong(name: str, options: str, *words: str) -> Case:
    """A good merge with wrong options, which hold no spaces."""
    return bad(name, nothing, *words, code=2, options=options.split())


def no_cuda(site: Site) -> None:
    site.monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def recipe_and_base(site: Site) -> list[object]:
    argv = recipe(RECIPE)(site) or ()
    return [*argv, "--base", site.base, "--param", "sigma=1"]


COMMANDS = [
    bad("nothing", command(), "usage: resm", "COMMAND", code=2),
    bad("unknown command", command("mrge"), "invalid choice: 'mrge'", code=2),
    bad("merge of nothing", command("merge"), "RECIPE.yml OUT", "no output folder", code=2),
    bad("three paths", command("merge", "a", "b", "c"), "RECIPE.yml OUT", "a b c", code=2),
    bad("no base", command("merge", "--expert", "x", "out"), "--base, --expert and OUT", code=2),
    bad("no expert", command("merge", "--base", "x", "out"), "--base, --expert and OUT", code=2),
    bad("recipe and --base", recipe_and_base, "--base, --param beside a recipe", code=2),
    bad("missing recipe", command("merge", "none.yml", "out"), "none.yml", "No such file", code=2),
    bad("recipe is a folder", command("merge", "in", "out"), "in: ", "Is a directory", code=2),
    bad("no CUDA", no_cuda, "cuda is not there", "0 CUDA devices", "--device cpu",
        code=2, options=("--device", "cuda")),
    wrong("unknown device", "--device tpu", "device: got 'tpu'", "auto, cpu, cuda or cuda:N"),
    wrong("negative device", "--device cuda:-1", "device: got 'cuda:-1'"),
    wrong("unknown option", "--lambada 1", "unrecognized arguments: --lambada"),
    wrong("unknown method", "--method resn", "merge_method: got 'resn'", "did you mean 'resm'?"),
    wrong("one weight for two", "--weight 1", "one weight per expert", "1 weights for 2 experts"),
    wrong("weight is a text", "--weight heavy", "--weight", "invalid float value: 'heavy'"),
    wrong("weight is NaN", "--weight nan --weight 1", "models[0].parameters.weight: got nan"),
    wrong("lambda is infinite", "--lambda inf", "lambda: got inf", "expected a number"),
    wrong("param without value", "--param sigma", "--param: got 'sigma'", "NAME=VALUE"),
    wrong("unknown param", "--param sigm=3", "sigm: unknown key", "did you mean 'sigma'?"),
    wrong("param is no YAML", "--param sigma=[", "--param sigma: not a value: '['"),
    wrong("param out of range", "--param sigma=-1", "parameters.sigma: got -1", ">= 0"),
    wrong("param of 400 digits", f"--param sigma=1{'0' * 400}", "sigma: got 1000", "a number"),
    wrong("param of 5000 digits", f"--param sigma=1{'0' * 5000}", "--param sigma"),
    wrong("param impossible date", "--param sigma=2020-99-99", "--param sigma", "2020-99-99"),
    wrong("param deep", f"--param sigma={'[' * 3000}", "--param sigma"),
    bad("param with a tag", nothing, "--param sigma", code=2,
        options=("--param", "sigma=!!bool maybe")),
    bad("param with code", nothing, "--param sigma: not a value", "object/apply:os.mkdir", code=2,
        options=("--param", "sigma=!!python/object/apply:os.mkdir [code-ran]")),
    wrong("out-dtype", "--out-dtype int8", "out_dtype: got 'int8'", "bfloat16"),
    wrong("memory budget", "--memory-budget lots", "got size 'lots'", "5GB or 512MiB"),
    wrong("negative budget", "--memory-budget=-1GB", "got size '-1GB'"),
    wrong("endless budget", f"--memory-budget {'9' * 400}", "got size '999"),
    wrong("shard size 0", "--shard-size 0", "got size '0'"),
    wrong("no workers", "--workers 0", "workers: got 0", "whole number"),
    wrong("no threads", "--threads 0", "threads: got 0", "whole number"),
    wrong("threads is a text", "--threads many", "--threads", "invalid int value: 'many'"),
    wrong("a hundred billion threads", "--threads 99999999999", "threads: got 99999999999"),
    wrong("nonfinite", "--nonfinite maybe", "--nonfinite", "invalid choice: 'maybe'"),
]  # fmt: skip


# Outputs


def output(place: str, make: Callable[[Path], object] | None = None, *options: str) -> Arrange:
    """Merge to a place in the site, where something may already be."""

    def arrange(site: Site) -> list[str]:
        path = site.root / place
        if make is not None:
            make(path)
        return site.argv(*options, out=path)

    return arrange


def occupied(path: Path) -> None:
    path.mkdir()
    (path / "keep.txt").write_text("precious")


def link_to_expert(path: Path) -> None:
    path.parent.symlink_to(path.parents[1] / "in" / "expert-a")


def file_as_parent(path: Path) -> None:
    path.parent.touch()


def read_only_parent(site: Site) -> None:
    parent = site.out.parent
    parent.chmod(0o555)
    if os.geteuid() == 0:  # whom modes do not stop: ask as somebody else would be answered
        allowed = os.access
        site.monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != parent and allowed(path, mode)
        )


def full_disk(site: Site) -> None:
    site.monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def disk_fills_up(site: Site) -> None:
    def pwrite(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    site.monkeypatch.setattr(os, "pwrite", pwrite)


def no_more_threads(site: Site) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("resm-compute"):
            raise RuntimeError("can't start new thread")
        start(thread)

    site.monkeypatch.setattr(threading.Thread, "start", refuse)


def output_is_here(site: Site) -> list[str]:
    empty = site.out.parent / "empty"
    empty.mkdir()
    site.monkeypatch.chdir(empty)
    return site.argv(out=".")


def unfinished(*options: str, damage: Callable[[Path], object] | None = None) -> Arrange:
    """A command after an interrupted merge, whose second shard (holding norm) may be damaged."""

    def arrange(site: Site) -> list[str]:
        site.leave_unfinished()
        if damage is not None:
            damage(site.partial / SHARDS[1])
        return site.argv(*SHARDED, *options)

    return arrange


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign_partial(site: Site) -> None:
    """Somebody's own folder under the working name, and a merge that will fail."""
    occupied(site.partial)
    tensors(L0=full(float("nan"), 8, 8))(site)


def expert_is_partial(site: Site) -> list[object]:
    shutil.copytree(site.a, site.partial)
    return ["merge", "--base", site.base, "--expert", site.partial, "--resume", site.out]


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


RESUME = "--resume"
OUTPUTS = [
    bad("not empty", output("work/merged", occupied), "work/merged: exists and is not empty"),
    bad("not empty, with --resume", output("work/merged", occupied, RESUME), "is not empty"),
    bad("not empty, dry run", output("work/merged", occupied, "--dry-run"), "is not empty"),
    bad("a file", output("work/merged", Path.touch), "work/merged: exists and is not a folder"),
    bad("a link to itself", output("work/merged", lambda p: p.symlink_to(p)), "work/merged"),
    bad("in an input", output("in/expert-a/merged"), "lies in the input folder", "in/expert-a"),
    bad("an input", output("in/expert-b"), "lies in the input folder", "in/expert-b"),
    bad("in an input by a link", output("link/merged", link_to_expert), "in the input folder"),
    bad("around the inputs", output("in"), "in: exists and is not empty"),
    bad("the root", output("/"), "got /\n", "a folder with a name", code=2),
    bad("no parent", output("work/none/merged"), "work/none: no such folder"),
    bad("parent is a file", output("work/file/merged", file_as_parent), "file: no such folder"),
    bad("parent is read-only", read_only_parent, "work: no permission", "write"),
    bad("the current folder", output_is_here, "work/empty: ", "the current folder"),
    bad("300 letters", output("work/" + "x" * 300), "work/xxx", "too long"),
    bad("250 letters", output("work/" + "x" * 250), "work/xxx", "too long"),
    bad("disk is full", full_disk, "work: not enough disk space", "1,000 bytes free"),
    bad("disk fills up", disk_fills_up, "model.safetensors", "No space left", "free space"),
    bad("no more threads", no_more_threads, "resm: ", "thread"),
    bad("stale partial", unfinished(), "merged.partial: an unfinished merge", "--resume"),
    bad("partial is a file", output("work/merged", lambda p: Path(f"{p}.partial").touch(), RESUME),
        "merged.partial", "Not a directory"),
    bad("partial is foreign", foreign_partial, "merged.partial: ", "keep.txt", options=[RESUME]),
    bad("partial is an input", expert_is_partial, "lies in the input folder", "merged.partial"),
    bad("resumed by another recipe", unfinished(RESUME, "--method", "tsvm"),
        "merged.partial", "has another plan", "resume with the recipe it was started with"),
    bad("kept shard changed", unfinished(RESUME, damage=flip_last),
        f"{SHARDS[1]}: changed after it was finished", NORM),
    bad("kept shard is a folder", unfinished(RESUME, damage=replaced_by(Path.mkdir)), SHARDS[1]),
    bad("kept shard is a FIFO", unfinished(RESUME, damage=replaced_by(os.mkfifo)), SHARDS[1]),
]  # fmt: skip


# Verification


def verify(damage: Callable[[Path], object]) -> Arrange:
    """`resm verify` of a finished merge after damage to its folder."""

    def arrange(site: Site) -> list[object]:
        assert status(site.argv()) == 0
        damage(site.out)
        return ["verify", site.out]

    return arrange


def at(name: str, damage: Callable[[Path], object]) -> Arrange:
    return verify(lambda folder: damage(folder / name))


def manifest(**changes: object) -> Arrange:
    """A manifest that is sealed well and says something else; None drops a key."""

    def damage(folder: Path) -> None:
        path = folder / "resm_manifest.json"
        content = {**json.loads(path.read_text()), **changes}
        del content["sha256"]
        path.write_bytes(seal({k: v for k, v in content.items() if v is not None}))

    return verify(damage)


def in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


W, MANIFEST, REPORT = "model.safetensors", "resm_manifest.json", "resm_report.json"
CONFIG_FILE = {"size": len(CONFIG), "sha256": hashlib.sha256(CONFIG.encode()).hexdigest()}
BASE_CONFIG = "in/base/config.json"
BAD_RANGE = {"w": {"file": W, "range": [-5, "x"], "sha256": "0"}}

VERIFICATIONS = [
    bad("no manifest", command("verify", "in/base"), f"in/base: no {MANIFEST}", "resm merge"),
    bad("no folder", command("verify", "nowhere"), f"nowhere: no {MANIFEST}"),
    bad("a file", command("verify", f"in/{A}"), f"in/{A}: no {MANIFEST}"),
    bad("300 letters", command("verify", "x" * 300), "xxxx"),
    bad("one bit of a tensor", at(W, flip_last), f"merged/{W}: tensor {NORM!r} differs"),
    bad("header", at(W, in_header), f"merged/{W}: its header differs"),
    bad("truncated", at(W, lambda p: os.truncate(p, 700)), f"{W}: 700 bytes", NORM),
    bad("longer", at(W, lambda p: os.truncate(p, 9000)), f"{W}: 9000 bytes instead of"),
    bad("gone", at(W, Path.unlink), f"merged/{W}: No such file"),
    bad("FIFO", at(W, replaced_by(os.mkfifo)), f"merged/{W}"),
    bad("folder", at(W, replaced_by(Path.mkdir)), f"merged/{W}"),
    bad("config", at("config.json", lambda p: p.write_text(CONFIG.upper())),
        "config.json: its content"),
    bad("report gone", at(REPORT, Path.unlink), f"{REPORT}: cannot be read"),
    bad("report changed", at(REPORT, lambda p: p.write_text(p.read_text() + " ")),
        f"{REPORT}: damaged"),
    bad("report FIFO", at(REPORT, replaced_by(os.mkfifo)), REPORT),
    bad("manifest changed", at(MANIFEST, lambda p: p.write_text(p.read_text().replace(NORM, L1))),
        f"{MANIFEST}: damaged"),
    bad("manifest empty", at(MANIFEST, lambda p: p.write_text("")), f"{MANIFEST}: damaged"),
    bad("manifest deep", at(MANIFEST, lambda p: p.write_text("[" * 10**5)),
        f"{MANIFEST}: damaged"),
    bad("manifest no text", at(MANIFEST, lambda p: p.write_text('{"sha256": "\\ud800"}')),
        f"{MANIFEST}: damaged"),
    bad("manifest of the future", manifest(format=99), MANIFEST, "format 99 is unknown"),
    bad("manifest without tensors", manifest(tensors=None), MANIFEST),
    bad("manifest of a list", manifest(files=[]), MANIFEST),
    bad("manifest with bad ranges", manifest(tensors=BAD_RANGE), MANIFEST),
    bad("manifest looks outside", manifest(files={f"../../{BASE_CONFIG}": CONFIG_FILE}, tensors={}),
        MANIFEST, f"../../{BASE_CONFIG}", "outside"),
]  # fmt: skip


@rows(
    file=FILES,
    index=INDEXES,
    bin=BINS,
    fit=FITS,
    recipe=RECIPES,
    command=COMMANDS,
    output=OUTPUTS,
    verify=VERIFICATIONS,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused(case: Case, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    argv = case.command(site)
    before = snapshot(site.root)
    capfd.readouterr()
    found = status(argv)
    out, err = capfd.readouterr()
    assert found == case.code, err
    assert out == ""
    assert_message(err, case.words)
    assert snapshot(site.root) == before


# Input that may merge or be refused, as long as the result is whole or nothing


def options(*words: str) -> Arrange:
    return lambda site: site.argv(*words)


def journal(change: Callable[[list[bytes]], Iterable[bytes]]) -> Arrange:
    """Resume an interrupted merge after its journal was changed line by line."""

    def arrange(site: Site) -> list[str]:
        site.leave_unfinished()
        path = site.partial / "resm_journal.jsonl"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
        return site.argv(*SHARDED, RESUME)

    return arrange


def base_not_utf8(site: Site) -> None:
    path = os.fsdecode(os.fsencode(site.base) + b"\xff")
    os.rename(site.base, path)
    site.base = Path(path)


def output_not_utf8(site: Site) -> None:
    site.out = site.root / os.fsdecode(b"work/\xff")


def journal_is_fifo(site: Site) -> list[str]:
    site.leave_unfinished()
    replaced_by(os.mkfifo)(site.partial / "resm_journal.jsonl")
    return site.argv(*SHARDED, RESUME)


def without_results(lines: list[bytes]) -> list[bytes]:
    shard = {**json.loads(lines[1]), "results": {}}
    return [lines[0], canonical_json(shard) + b"\n"]


EITHER = [
    bad("outlier_power -1e5", options("--param", "outlier_power=-1e5")),
    bad("outlier_power 1e308", options("--param", "outlier_power=1e308")),
    bad("sigma 1e308", options("--param", "sigma=1e308")),
    bad("noise_floor 1e308", options("--param", "noise_floor=1e308")),
    bad("lambda 1e308", options("--lambda", "1e308", "--workers", "1")),
    bad("lambda -1e308", options("--lambda=-1e308", "--workers", "1")),
    bad("weights 1e308", options("--weight", "1e308", "--weight", "1e308")),
    bad("weights that cancel", options("--weight", "1", "--weight=-1", "--method", "linear")),
    bad("no rank", options("--param", "rank=fixed", "--param", "rank_fraction=0")),
    bad("a million workers", options("--workers", "1000000")),
    bad("base is not UTF-8", base_not_utf8),
    bad("output is not UTF-8", output_not_utf8),
    bad("config with half a character", text("base/config.json", '{"a": "\\ud800"}'),
        options=("--out-dtype", "float32")),
    bad("tags of rich in a name", everywhere(W, safetensors({"a[/b]": entry()}, bytes(16)))),
    bad("journal is a list", journal(lambda lines: [b"[1]\n"])),
    bad("journal is no text", journal(lambda lines: [b"\xff\n"])),
    bad("journal is a FIFO", journal_is_fifo),
    bad("journal is deep", journal(lambda lines: [b"[" * 100_000, b"\n"])),
    bad("journal with surrogates", journal(lambda lines: [b'{"plan_id":"\\ud800"}\n'])),
    bad("journal cut short", journal(lambda lines: [*lines[:-1], lines[-1][:50]])),
    bad("journal of unknown shards", journal(lambda lines: [lines[0], b'{"shard":"x"}\n'])),
    bad("journal without a shard", journal(lambda lines: [lines[0], b"{}\n"])),
    bad("journal without results", journal(without_results)),
]  # fmt: skip


@rows(either=EITHER)
def test_all_or_nothing(case: Case, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    argv = case.command(site)
    before = snapshot(site.root / "in")
    capfd.readouterr()
    found = status(argv)
    out, err = capfd.readouterr()
    assert snapshot(site.root / "in") == before
    if found == 0:
        assert status(["verify", site.out]) == 0
        assert not site.partial.exists()
        return
    assert found in (1, 2)
    assert out == ""
    assert_message(err, ["resm: "])
    assert not site.out.exists()


def test_the_site_merges(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Without damage there is nothing to refuse; otherwise the tables would prove nothing."""
    before = snapshot(site.root / "in")
    assert status(site.argv()) == 0
    assert status(["verify", site.out]) == 0
    assert snapshot(site.root / "in") == before
    argv = recipe(RECIPE)(site) or ()
    assert status([*argv[:-1], site.root / "by-recipe"]) == 0
    merged = [(folder / W).read_bytes() for folder in (site.out, site.root / "by-recipe")]
    assert merged[0] == merged[1]
    site.out = site.root / "resumed"
    site.partial = site.root / "resumed.partial"
    assert status(unfinished(RESUME)(site) or ()) == 0


def test_the_bomb_is_live(site: Site) -> None:
    """What the `.bin` cases hold does run code in a loader that lets it."""
    binary(lambda site: torch_bytes({"w": bomb(site)}))(site)
    torch.load(site.a / "pytorch_model.bin", weights_only=False)
    assert (site.root / "code-ran").is_dir()


def test_brackets_in_a_tensor_name() -> None:
    """A name is shown on the progress bar as it is, tags of rich or not."""
    screen = io.StringIO()
    progress = BarProgress(Console(file=screen, force_terminal=True, width=120))
    progress.start(2)
    progress.advance(1, "layers[/0].weight")
    progress.stop()
    assert "layers[/0].weight" in screen.getvalue()


def test_brackets_in_a_pattern(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """`[/0]` is a shell pattern, not a tag of the table that shows it."""
    argv = site.argv("--dry-run", "--param", "exclude=['*[/.]0.weight']")
    assert status(argv) == 0
    assert "excluded by *[/.]0.weight" in capfd.readouterr().out


def test_input_changed_during_the_merge(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """What was read may be a mixture: never finished, finished shards kept."""
    check = pipeline._check_inputs_unchanged

    def change(plan: MergePlan) -> None:
        flip_last(site.a / W)
        check(plan)

    site.monkeypatch.setattr(pipeline, "_check_inputs_unchanged", change)
    assert status(site.argv(*SHARDED)) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert_message(err, [A, "the file changed after the merge was planned"])
    assert not site.out.exists()
    assert {p.name for p in site.partial.iterdir()} == {*SHARDS, "resm_journal.jsonl"}


# The real command, in a process of its own


def large(site: Site) -> None:
    for folder in site.models:
        write_model(folder, {L0: torch.randn(256, 256)})


PROCESSES = [
    bad("no arguments", command(), "usage: resm", code=2),
    bad("truncated file", raw(lambda good: good[:-1]), A, "data do not end with the file"),
    bad("Hub id, offline", model_argument("nobody/nothing-here"),
        "nobody/nothing-here", "the Hub is out of reach"),
    bad("file size limit", large, f"merged.partial/{W}", "File too large", "raise the limit"),
]  # fmt: skip


@pytest.mark.timeout(120)
@rows(process=PROCESSES)
def test_process(case: Case, site: Site, tmp_path: Path) -> None:
    """None of them has a network, nor may it write a file above 128 blocks (64 or 128 kB)."""
    argv = case.command(site)
    before = snapshot(site.root)
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    script = Path(sys.executable).with_name("resm")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 128; exec "$@"', "sh", script, *argv],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **settings},
    )
    assert done.returncode == case.code, done.stderr
    assert done.stdout == ""
    assert_message(done.stderr, case.words)
    assert snapshot(site.root) == before
