"""Strict reading of safetensors headers: what the format allows is read, the rest is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import resm_kernels
from resm_kernels.checkpoint import reader
from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.files import open_regular
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import MAX_HEADER, read_safetensors_header
from resm_kernels.checkpoint.reader import open_checkpoint, read_tensor
from resm_kernels.checkpoint.writer import lay_out_shards
from resm_kernels.errors import CheckpointError
from tests.checkpoints import save
from tests.hostile.mutate import mutations, odd


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("length", [17, MAX_HEADER + 1, (1 << 64) - 1])
def test_header_lengths_past_the_file_allocate_nothing(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match="does not fit in the file"):
        read_safetensors_header(path)


def test_tables_that_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that a config ties are read while planning."""
    table = torch.zeros(8, 4)
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    config = {"vocab_size": 8, "tie_word_embeddings": True}
    base, expert = (save(tmp_path / name, tensors, config=config) for name in ("base", "expert"))

    def failing(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(reader, "open_regular", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*Input/output error"):
        resm_kernels.plan(base, [expert])


def test_files_are_read_through_a_buffer(tmp_path: Path) -> None:
    """A raw file may return fewer bytes than asked (NFS, FUSE): a header would look cut short."""
    path = write(tmp_path / "x.safetensors", {})
    with open_regular(path) as file:
        assert isinstance(file, io.BufferedReader)


@pytest.mark.parametrize("size", range(8))
def test_files_shorter_than_a_length_are_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="does not fit in the file"):
        read_safetensors_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_safetensors_writes_it(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    raw = torch.randint(0, 2, (2, 3 * dtype.size), dtype=torch.uint8)
    state = {"x": raw.view(dtype.torch).reshape(2, 3), "empty": raw.view(dtype.torch)[:0]}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(ModelReference(str(tmp_path)))
    for tensor, value in state.items():
        info = checkpoint.tensors[tensor]
        read = read_tensor(checkpoint.files[0], info)
        assert read.dtype == dtype.torch
        assert read.shape == value.shape
        assert torch.equal(read.view(torch.uint8), value.contiguous().view(torch.uint8))


VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.T,
    "columns": lambda x: x[:, 1:3],
    "rows": lambda x: x[2:],
    "every other": lambda x: x[::2, ::2],
    "one": lambda x: x[3, 1],
    "none": lambda x: x[:0],
    "expanded": lambda x: x[:, :1].expand(6, 9),
    "flat": lambda x: x.reshape(-1),
}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_view_is_read_as_torch_saves_it(name: str, tmp_path: Path) -> None:
    """Read without torch's unpickler, and with the same bytes."""
    dtype = DTYPES[name]
    raw = torch.randint(0, 2, (6, 5 * dtype.size), dtype=torch.uint8).view(dtype.torch)
    state = {view: make(raw) for view, make in VIEWS.items()}
    if dtype.mergeable:
        state["parameter"] = torch.nn.Parameter(raw)
        state["marked"] = torch.nn.Parameter(raw)
        state["marked"].tensor_parallel = {"rank": [0, 1]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(ModelReference(str(tmp_path)))
    (file,) = checkpoint.files
    assert list(checkpoint.tensors) == list(state)
    for view, value in state.items():
        read = read_tensor(file, checkpoint.tensors[view])
        assert (read.dtype, read.shape) == (dtype.torch, value.shape)
        assert read.is_contiguous()
        assert bytes(read.flatten().view(torch.uint8).numpy()) == bytes(
            value.detach().flatten().view(torch.uint8).numpy()
        )


def test_a_bin_above_four_gigabytes_has_wide_offsets(tmp_path: Path) -> None:
    """A zip64 directory whose entries lie where 32 bits do not reach, without their bytes."""
    torch.save({"w": torch.ones(2)}, tmp_path / "small.bin")
    raw = (tmp_path / "small.bin").read_bytes()
    directory, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x06\x06")
    gap = 5 << 30
    entries, position = b"", directory
    while position < end:
        names, extra, comment = struct.unpack_from("<28xHHH", raw, position)
        (start,) = struct.unpack_from("<42xI", raw, position)
        stop = position + 46 + names + extra + comment
        wide = struct.pack("<HHQ", 1, 8, start + gap)
        changed = bytearray(raw[position : position + 46])
        changed[30:32] = len(wide).to_bytes(2, "little")
        changed[42:46] = b"\xff" * 4
        entries += changed + raw[position + 46 : position + 46 + names] + wide
        position = stop
    record = bytearray(raw[end : end + 56])
    record[40:56] = struct.pack("<QQ", len(entries), gap + directory)
    locator = raw[end + 56 : end + 64] + struct.pack("<QI", gap + directory + len(entries), 1)
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        file.seek(gap)
        file.write(raw[:directory] + entries + record + locator + raw[-22:])
    (tmp_path / "small.bin").unlink()
    checkpoint = open_checkpoint(ModelReference(str(tmp_path)))
    (shard,) = checkpoint.files
    assert checkpoint.tensors["w"].start > gap
    assert read_tensor(shard, checkpoint.tensors["w"]).tolist() == [1.0, 1.0]


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A healthy header, its entries in any order, and the bytes of data it speaks of."""
    header: dict[str, Any] = {}
    end = 0
    names = draw(st.lists(st.text(max_size=4), max_size=5, unique=True))
    for name in names:
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + math.prod(shape) * dtype.size
        header[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [start, end]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
    return dict(draw(st.permutations(list(header.items())))), end


ODD = odd("F32", "BF16", "F4", "shape", [0], [0, 4], [2**62, 4], [[1]])


@given(headers())
def test_any_healthy_header_is_read(case: tuple[dict[str, Any], int]) -> None:
    header, size = case
    with tempfile.TemporaryDirectory() as folder:
        found = read_safetensors_header(write(Path(folder) / "x.safetensors", header, bytes(size)))
    header.pop("__metadata__", None)
    assert found.tensors.keys() == header.keys()
    for name, entry in header.items():
        assert list(found.tensors[name].shape) == entry["shape"]


@settings(max_examples=400)
@given(st.data(), headers(), st.integers(1, 3), st.sampled_from([0, 0, 0, 1, -1, 8]))
def test_a_mutated_header_is_refused_or_accounts_for_every_byte(
    data: st.DataObject, case: tuple[dict[str, Any], int], changes: int, longer: int
) -> None:
    """What is accepted lies in the file, in order, without gap or overlap: also by the library."""
    header, size = case
    for _ in range(changes):
        data.draw(mutations(header, ODD, ("dtype", "x", "", "__metadata__")))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x.safetensors", header, bytes(max(size + longer, 0)))
        try:
            found = read_safetensors_header(path)
        except CheckpointError:
            return
        raw = path.read_bytes()
        if "F8" not in str(header) and "C64" not in str(header):
            assert {name for name, _ in safetensors.deserialize(raw)} == found.tensors.keys()
    assert sum(t.nbytes for t in found.tensors.values()) == len(raw) - 8 - int.from_bytes(
        raw[:8], "little"
    )
    for tensor in found.tensors.values():
        assert tensor.stop - tensor.start == tensor.nbytes
        assert tensor.stop <= len(raw)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_safetensors_header(path)


@given(
    st.lists(
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 400),
)
def test_shards_hold_every_tensor_once_and_aligned(
    tensors: list[tuple[str, list[int]]], shard_size: int
) -> None:
    wanted = [(f"t{i}", DTYPES[d], tuple(shape)) for i, (d, shape) in enumerate(tensors)]
    layouts = lay_out_shards(wanted, shard_size)
    slots = [slot for layout in layouts for slot in layout.slots]
    assert sorted((s.name, s.dtype, s.shape) for s in slots) == sorted(wanted)
    for layout in layouts:
        end = len(layout.header)
        for slot in layout.slots:
            assert slot.start == end
            assert slot.start % slot.dtype.size == 0
            end = slot.stop
        data = end - len(layout.header)
        assert data <= shard_size or sum(s.stop > s.start for s in layout.slots) == 1
