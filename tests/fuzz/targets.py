"""Fuzz targets: what reads files that strangers wrote, one function of bytes each.

A target writes its bytes where a user would have them and reads them as a merge does. Anything
but a value or one of our own errors is a finding; so is a broken promise about what was accepted.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from resm_kernels.checkpoint.companions import companion_files
from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.files import canonical_json, seal
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.journal import JOURNAL, MANIFEST, REPORT, OutputFolder
from resm_kernels.checkpoint.layout import Checkpoint, parse_json
from resm_kernels.checkpoint.lora import Adapter, open_model, read_factors
from resm_kernels.checkpoint.manifest import verify_folder
from resm_kernels.checkpoint.reader import open_checkpoint, read_tensor
from resm_kernels.checkpoint.tokens import read_vocabulary
from resm_kernels.checkpoint.vocabulary import align, align_tables, differences, output_files
from resm_kernels.checkpoint.writer import lay_out_shards
from resm_kernels.engine.options import EngineOptions
from resm_kernels.engine.planning import make_plan
from resm_kernels.engine.result import TensorResult
from resm_kernels.errors import ResmError
from resm_kernels.recipe import build_recipe, build_recipes, parse_yaml
from tests.hostile.files import safetensors, torch_zip

Target = Callable[[bytes, Path], None]

MOST = 4096
"""Bytes of data that a generated file may claim and get."""
LONGEST = 20_000
"""Characters of the longest message."""


def weights(data: bytes, folder: Path) -> None:
    """A whole safetensors file, opened and read tensor by tensor."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    checkpoint = open_checkpoint(ModelReference(str(path)))
    (file,) = checkpoint.files
    header = int.from_bytes(data[:8], "little")
    assert sum(t.nbytes for t in file.tensors.values()) == len(data) - 8 - header
    for info in file.tensors.values():
        assert tuple(read_tensor(file, info).shape) == info.shape


def header(data: bytes, folder: Path) -> None:
    """A header, with its true length before it and as much data as it speaks of."""
    weights(_with_data(data), folder)


def _with_data(data: bytes) -> bytes:
    try:
        content = json.loads(data)
        ends = [entry["data_offsets"][1] for name, entry in content.items() if name[:2] != "__"]
        size = max([0, *ends])
        return safetensors(data, bytes(size if size <= MOST else 0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return safetensors(data)


def index(data: bytes, folder: Path) -> None:
    """An index over two healthy shards."""
    for shard in ("a", "b"):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        content = {f"{shard}.weight": entry}
        (folder / f"{shard}.safetensors").write_bytes(safetensors(content, bytes(8)))
    (folder / "model.safetensors.index.json").write_bytes(data)
    found = open_checkpoint(ModelReference(str(folder)))
    assert {file.path.parent for file in found.files} == {folder}


def config(data: bytes, folder: Path) -> None:
    """A config of the base, planned with and rewritten for another dtype."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    content = safetensors({"embed.weight": entry}, bytes(16))
    for model in ("base", "expert"):
        (folder / model).mkdir()
        (folder / model / "model.safetensors").write_bytes(content)
    (folder / "base" / "config.json").write_bytes(data)
    models = [{"model": str(folder / "expert")}]
    recipe = {"merge_method": "linear", "base_model": str(folder / "base"), "models": models}
    plan = make_plan(build_recipe(recipe, "fuzz"), EngineOptions())
    for dtype in (None, "bfloat16"):
        files = companion_files(plan.base, dtype)
        written = files.get("config.json", b"{}")
        assert parse_json(written, folder).keys() >= plan.base.config.keys()


def recipe(data: bytes, folder: Path) -> None:
    """The recipe of every output, resolved for a tensor and written out again."""
    recipes = build_recipes(parse_yaml(data, "fuzz"), "fuzz")
    assert len({name.casefold() for name in recipes}) == len(recipes)
    for name, found in recipes.items():
        assert not name or (folder / name).parent == folder
        for tensor in ("model.layers.0.weight", "a"):
            found.options(tensor, 0.5)
            found.weights(tensor, 0.5)
        assert build_recipe(found.to_dict(), "again") == found
        for expert in found.models:
            assert expert.exists() or expert.repo is None or "/" in expert.text


def archive(data: bytes, folder: Path) -> None:
    """A whole `.bin` file, opened and read tensor by tensor."""
    path = folder / "pytorch_model.bin"
    path.write_bytes(data)
    checkpoint = open_checkpoint(ModelReference(str(path)))
    (file,) = checkpoint.files
    for info in file.tensors.values():
        if info.nbytes <= MOST:
            assert tuple(read_tensor(file, info).shape) == info.shape


def pickled(data: bytes, folder: Path) -> None:
    """The pickle inside a `.bin` file, after two bytes that say how long two storages are."""
    sizes = [*data[:2], 0, 0]
    archive(torch_zip(data[2:], {"0": bytes(4 * sizes[0]), "1": bytes(4 * sizes[1])}), folder)


def journal(data: bytes, folder: Path) -> None:
    """A journal after its first line, beside the one shard of its plan."""
    (layout,) = lay_out_shards([("w", DTYPES["F32"], (2,))], 1 << 20)
    partial = folder / "out.partial"
    partial.mkdir()
    (partial / layout.name).write_bytes(layout.header + bytes(8))
    lines = [canonical_json({"plan_id": "p"}) + b"\n"]
    for line in data.splitlines(keepends=True):
        try:
            lines.append(canonical_json(json.loads(line)) + b"\n")
        except (ValueError, RecursionError):
            lines.append(line)
    (partial / JOURNAL).write_bytes(b"".join(lines))
    output = OutputFolder(folder / "out", "p")
    try:
        output.verify_kept([layout])
        for entry in output.kept.values():
            for content in entry["results"].values():
                TensorResult.from_dict(content).facts()
    finally:
        output.close()


def manifest(data: bytes, folder: Path) -> None:
    """A manifest, sealed where it can be, of a folder with one file."""
    (folder / "w").write_bytes(bytes(8))
    (folder / REPORT).write_bytes(seal({}))
    try:
        content = json.loads(data)
        data = seal(content) if isinstance(content, dict) else data
    except (ValueError, RecursionError):
        pass
    (folder / MANIFEST).write_bytes(data)
    verify_folder(folder)


def adapter(data: bytes, folder: Path) -> None:
    """An adapter on a small base: its config is the first line, the rest is its header."""
    shapes = {"h.0.q": [4, 6], "h.1.q": [6, 4], "s": [4, 4], "lm_head": [8, 4], "n": [4]}
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        tensors[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    (folder / "base" / "model.safetensors").write_bytes(safetensors(tensors, bytes(end)))
    (folder / "base" / "config.json").write_text('{"vocab_size": 8}')
    config, _, rest = data.partition(b"\n")
    (folder / "adapter" / "adapter_config.json").write_bytes(config)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(_with_data(rest))
    base = open_checkpoint(ModelReference(str(folder / "base")))
    found = open_model(ModelReference(str(folder / "adapter")), base)
    assert isinstance(found, Adapter)
    infos = [i for pair in found.pairs.values() for i in (pair.a, pair.b)]
    kept = {info.name for info in (*infos, *found.full.values())}
    copies = ("base_layer", "original_module", "modules_to_save")
    assert all(any(c in name for c in copies) for name in found.files[0].tensors.keys() - kept)
    for name, pair in found.pairs.items():
        left, right = read_factors(found, pair)
        assert (left.shape[0], right.shape[0]) == base.tensors[name].shape
        assert left.shape[1] == right.shape[1] == pair.rank
    assert all(info.shape == base.tensors[name].shape for name, info in found.full.items())


def vocabulary(data: bytes, folder: Path) -> None:
    """An expert's tokenizer: its settings are the first line, the rest is its tokenizer.json."""
    settings, _, rest = data.partition(b"\n")
    tokens = {"base": b'{"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}', "expert": rest}
    for name, rows in (("base", 4), ("expert", 5)):
        _table(folder / name, rows)
        (folder / name / "tokenizer.json").write_bytes(tokens[name])
    if settings:
        (folder / "expert" / "tokenizer_config.json").write_bytes(settings)
    base, expert = (open_checkpoint(ModelReference(str(folder / name))) for name in tokens)
    differences(base, [expert])
    sources: tuple[Literal["base", "union"] | Checkpoint, ...] = ("base", "union", expert)
    for number, source in enumerate(sources):
        found = align(source, base, [expert])
        assert sorted(set(found.out_ids.values())) == sorted(found.out_ids.values())
        for checkpoint, index in zip((base, expert), found.indices, strict=True):
            known = read_vocabulary(checkpoint)
            assert len(index) == found.rows
            assert all(index[i] == known.row(text) for text, i in found.out_ids.items())
        tables = align_tables([torch.ones(4, 1), torch.ones(5, 1)], found)
        assert [table.shape for table in tables] == [(found.rows, 1)] * 2
        again = folder / f"again-{number}"
        _table(again, found.rows)
        for name, content in output_files(companion_files(base, None), found).items():
            (again / name).write_bytes(content)
        written = read_vocabulary(open_checkpoint(ModelReference(str(again))))
        assert {t: written.ids[t] for t in found.out_ids} == found.out_ids


def _table(folder: Path, rows: int) -> None:
    """A model that is a vocabulary table."""
    folder.mkdir()
    entry = {"dtype": "F32", "shape": [rows, 1], "data_offsets": [0, 4 * rows]}
    content = safetensors({"embed_tokens.weight": entry}, bytes(4 * rows))
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(f'{{"vocab_size": {rows}}}')


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        weights, header, index, config, recipe, archive, pickled, journal, manifest, adapter,
        vocabulary,
    )
}  # fmt: skip


def replay(target: Target, data: bytes, folder: Path) -> str | None:
    """Run a target once in a fresh folder; the message of our own error, all else is a finding."""
    folder.mkdir()
    message = None
    try:
        target(data, folder)
    except ResmError as error:
        message = str(error)
    finally:
        shutil.rmtree(folder)
    assert message is None or len(message) < LONGEST, "an endless message"
    return message
