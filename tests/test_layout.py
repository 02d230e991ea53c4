"""Strict reading of safetensors headers: what the format allows is read, the rest is refused."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.files import open_regular
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import MAX_HEADER, read_safetensors_header
from resm_kernels.checkpoint.reader import TensorReader, open_checkpoint
from resm_kernels.checkpoint.writer import lay_out_shards
from resm_kernels.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "unknown dtype": ({"a": entry("F31")}, bytes(8), "unknown dtype"),
    "dtype not text": ({"a": entry([])}, bytes(8), "unknown dtype"),
    "negative size": ({"a": entry(shape=[-2])}, bytes(8), "list of sizes"),
    "boolean size": ({"a": entry(shape=[True, 2])}, bytes(8), "list of sizes"),
    "fractional size": ({"a": entry(shape=[2.0])}, bytes(8), "list of sizes"),
    "shape not a list": ({"a": entry(shape=2)}, bytes(8), "list of sizes"),
    "size past 63 bits": ({"a": entry(shape=[1 << 64])}, bytes(8), "list of sizes"),
    "product overflows": ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8), "product is below"),
    "too many dimensions": ({"a": entry(shape=[1] * 33)}, bytes(8), "list of sizes"),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, bytes(8), "start, stop"),
    "offsets past the end": ({"a": entry(offsets=[0, 8])}, bytes(4), "do not end with the file"),
    "one offset": ({"a": entry(offsets=[0])}, bytes(8), "start, stop"),
    "bytes left over": ({"a": entry()}, bytes(9), "do not end with the file"),
    "hole": ({"a": entry(offsets=[4, 12])}, bytes(12), "leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlaps"),
    "same place twice": ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
    "shape and bytes": ({"a": entry(shape=[3])}, bytes(8), "shape and data disagree"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "exactly dtype"),
    "extra field": ({"a": entry(x=1)}, bytes(8), "exactly dtype"),
    "entry not an object": ({"a": 3}, b"", "exactly dtype"),
    "metadata not text": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata not an object": ({"__metadata__": []}, b"", "__metadata__"),
    "not an object": (b"[1]", b"", "not a JSON object"),
    "not JSON": (b"{nope", b"", "invalid JSON"),
    "NaN": (b'{"a": NaN}', b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "invalid JSON"),
    "repeated key": (b'{"a": 1, "a": 1}', b"", "'a' stands twice"),
    "repeated field": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "stands twice"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested too deeply"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "invalid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case: str, tmp_path: Path) -> None:
    header, data, expected = HOSTILE[case]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [17, MAX_HEADER + 1, (1 << 64) - 1])
def test_header_lengths_past_the_file_allocate_nothing(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match="does not fit in the file"):
        read_safetensors_header(path)


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
        read = TensorReader().read(checkpoint.files[0], info)
        assert read.dtype == dtype.torch
        assert read.shape == value.shape
        assert torch.equal(read.view(torch.uint8), value.contiguous().view(torch.uint8))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(list(DTYPES)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=16,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.text(max_size=6), JSON), st.binary(max_size=64))
def test_any_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    """What is accepted accounts for every byte of the file."""
    path = write(tmp_path / "x.safetensors", header, data)
    try:
        found = read_safetensors_header(path)
    except CheckpointError:
        return
    assert sum(t.nbytes for t in found.tensors.values()) == len(data)


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
