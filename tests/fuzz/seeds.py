"""Where fuzzing starts: the small files of the corpus, and what fuzzing has found so far."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.writer import lay_out_shards
from tests.hostile.cases import RECIPE, Site
from tests.hostile.corpus import CORPUS
from tests.hostile.files import entry, safetensors, torch_bytes, weights

MOST = 8192
"""Longest seed: mutations of more bytes find less."""
FILES = {
    "weights": "in/*/*.safetensors",
    "index": "in/*/*.index.json",
    "config": "in/*/config.json",
    "archive": "in/*/*.bin",
    "recipe": "recipe.yml",
}


def write_seeds(work: Path) -> None:
    """Write the seeds of all targets, a folder each, below `work`."""
    for target, data in (*_from_corpus(work / "corpus"), *_by_hand()):
        if len(data) <= MOST:
            path = work / target / hashlib.sha256(data).hexdigest()[:16]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _from_corpus(folder: Path) -> Iterator[tuple[str, bytes]]:
    for area, cases in CORPUS.items():
        for number, case in enumerate(cases):
            if case.megabytes > 64:
                continue
            site = Site(folder / f"{area}-{number}")
            case.command(site)
            for target, pattern in FILES.items():
                for path in site.root.glob(pattern):
                    if not path.is_symlink() and path.is_file() and path.stat().st_size <= MOST:
                        yield from _with_parts(target, path.read_bytes())


def _with_parts(target: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file, and what lies inside it behind a length or a checksum."""
    yield target, data
    if target == "weights":
        yield "header", data[8 : 8 + int.from_bytes(data[:8], "little")]
    elif target == "archive" and data[:2] == b"PK":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                sizes = {i.filename.partition("/")[2]: i.file_size // 4 for i in archive.infolist()}
                lengths = bytes(min(sizes.get(f"data/{key}", 0), 255) for key in (0, 1))
                programs = [name for name in archive.namelist() if name.endswith("data.pkl")]
                yield from (("pickled", lengths + archive.read(name)) for name in programs)
        except (zipfile.BadZipFile, ValueError):
            return


def _by_hand() -> Iterator[tuple[str, bytes]]:
    full = {
        "a": entry(),
        "b": entry(dtype="BF16", shape=[0], data_offsets=[16, 16]),
        "__metadata__": {"format": "pt", "tied": "a"},
    }
    yield "weights", safetensors(full, bytes(16))
    yield "header", json.dumps(full).encode()
    shards = {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}
    yield "index", json.dumps({"metadata": {"total_size": 16}, "weight_map": shards}).encode()
    config = {
        "model_type": "llama",
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
        "vocab_size": 2,
        "text_config": {"vocab_size": 2, "dtype": "float32"},
        "auto_map": {"AutoModel": "m.M"},
        "quantization_config": {},
    }
    yield "config", json.dumps(config).encode()
    recipe = RECIPE.format(base="b", a="x", b="y")
    recipe += "parameters: {sigma: [1, 2], rank: fixed, exclude: ['*x*'], mask_noise: true}\n"
    recipe += "lambda: [{filter: mlp, value: 0.5}]\n"
    yield "recipe", recipe.encode()
    parameter = torch.nn.Parameter(torch.ones(2, 2).T)
    kept = torch.nn.Linear(2, 2).state_dict()
    wide = {"u": torch.ones(2, dtype=torch.uint16), "s": weights(0)["layers.0.weight"][1:3, ::2]}
    for state in ({"p": parameter}, kept, wide):
        yield from _with_parts("archive", torch_bytes(state))

    outputs = "[{name: a, lambda: 0.5}, {name: b-1, merge_method: ties, parameters: {density: 1}}]"
    overrides = "[{filter: mlp, merge_method: tsvm, parameters: {lambda: [0, 1]}}]"
    yield "recipe", f"{recipe}overrides: {overrides}\noutputs: {outputs}\n".encode()
    yield from (("adapter", data) for data in adapters())
    yield from (("vocabulary", data) for data in tokenizers())

    (layout,) = lay_out_shards([("w", DTYPES["F32"], (2,))], 1 << 20)
    digest = hashlib.sha256(bytes(8)).hexdigest()
    result = {"name": "w", "rule": "copy", "reason": None, "shape": [2], "weights": [1.0]}
    line = {
        "shard": layout.name,
        "sha256": hashlib.sha256(layout.header + bytes(8)).hexdigest(),
        "digests": {"w": digest},
        "results": {"w": result},
    }
    changes = ({}, {"shard": []}, {"digests": 3}, {"digests": {"w": 1}}, {"results": {"w": 3}})
    for change in changes:  # the last four were found by fuzzing
        yield "journal", json.dumps({**line, **change}).encode() + b"\n"
    tensor = {"file": "w", "range": [0, 8], "sha256": digest}
    listed = {"w": {"size": 8, "sha256": digest}}
    manifest = {"format": 1, "plan_id": "p", "files": listed, "tensors": {"t": tensor}}
    outside = {"../x": {"size": 8}}
    for change in ({}, {"files": outside}, {"tensors": []}, {"files": {"w": {"size": "8"}}}):
        yield "manifest", json.dumps({**manifest, **change}).encode()


def tokenizers() -> Iterator[bytes]:
    """Settings over tokens: more, fewer, moved and added ones, with and without gaps."""
    flags = {"special": True, "lstrip": False, "normalized": False}
    entry = {"id": 3, "content": "<d>", **flags}
    decoder = {"added_tokens_decoder": {"3": {**entry, "id": None}, "0": {"content": "a"}}}
    for words, added in (
        ({"a": 0, "b": 1, "c": 2}, [entry]),
        ({"b": 0, "a": 1, "\u00e9": 2, "d": 3}, [{"id": 4, "content": "e"}]),
        ({"a": 0, "x": 7}, []),
        ({"y": 5, "x": 7}, []),  # found by fuzzing
        ([["a", -1.5], ["b", 0]], []),
        ({"a": 0, "b": 0}, []),
    ):
        tokens = {"model": {"type": "BPE", "vocab": words}, "added_tokens": added}
        for settings in ("", json.dumps(decoder), '{"model_max_length": 5}'):
            yield f"{settings}\n{json.dumps(tokens)}".encode()


def adapters() -> Iterator[bytes]:
    """Configs over the same factors: two of a linear layer, a table, a bias."""
    shapes = {
        "model.h.0.q.lora_A.weight": [2, 6],
        "model.h.0.q.lora_B.weight": [4, 2],
        "model.h.1.q.lora_A.weight": [2, 6],
        "model.h.1.q.lora_B.weight": [4, 2],
        "model.wte.lora_embedding_A": [2, 8],
        "model.wte.lora_embedding_B": [4, 2],
        "model.n.weight": [4],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        offsets = [start, end]
        header[f"base_model.{name}"] = entry(dtype="F32", shape=shape, data_offsets=offsets)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.5, "use_rslora": True}
    for change in (
        {},
        {"rank_pattern": {r"^h\.[0-9]+\..*": 2}, "alpha_pattern": {"(h.1|s).q$": 3, "wte": 1}},
        {"alpha_pattern": {"((a*)*|q{2,}?)+": 1}},
        {"use_dora": True},
        {"r": 3},
    ):
        yield json.dumps({**plain, **change}).encode() + b"\n" + json.dumps(header).encode()
