"""PyTorch's `.bin` files: torch decides what the pickle holds, the bytes are read by offset."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import Unpickler

from resm_kernels.checkpoint.dtypes import BY_TORCH
from resm_kernels.checkpoint.files import open_regular
from resm_kernels.checkpoint.layout import FileStamp, TensorInfo, WeightFile
from resm_kernels.errors import CheckpointError

MAX_RECORD = 16 << 20
"""Longest zip directory or pickle that is read, in bytes."""
LOCAL_HEADER = 30
FIX = "convert it to safetensors with the library that wrote it"


class _BoundedReader(io.BufferedReader):
    """A file for `zipfile`, which reads a whole directory at the length that the file claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_RECORD:
            raise ValueError(f"a zip directory of {size} bytes")
        return super().read(size)


def read_torch_header(path: Path) -> WeightFile:
    """Find a `.bin` file's tensors and where their bytes lie; no tensor data is read.

    The pickle goes through torch's weights-only unpickler over storages without memory, so no
    code runs. The file is never mapped: one that is truncated meanwhile is an error, no SIGBUS.

    Raises
    ------
    CheckpointError
        Where the file is not a flat state dict of dense tensors in torch's zip format.
    """
    with open_regular(path) as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        if not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"{path}: not a torch file of the zip format (torch 1.6 and newer)", fix=FIX
            )
        try:
            records = _find_records(file, stamp.size)
            state, places = _unpickle(file, records)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: holds pickled objects other than tensors; they are never loaded", fix=FIX
            ) from error
        except Exception as error:  # torch's unpickler raises nearly anything on damaged files
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(
                f"{path}: not a readable torch file: {reason}", fix=FIX
            ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a flat state dict", got=type(state).__name__, fix=FIX)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: not a flat state dict",
                got=f"{name!r}: {type(value).__name__}",
                expected="names and dense tensors",
                fix=FIX,
            )
    tensors = {name: _tensor_info(path, name, value, places) for name, value in state.items()}
    lines = [f"{info.name} {info.dtype.name} {info.shape}" for info in tensors.values()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return WeightFile(path, "torch", tensors, {}, digest, stamp)


def _find_records(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Start and length of every record, by its name below the archive's one folder."""
    file.seek(0)
    with zipfile.ZipFile(_BoundedReader(io.FileIO(file.fileno(), closefd=False))) as archive:
        entries = archive.infolist()
    folder = entries[0].filename.partition("/")[0] + "/"
    records: dict[str, tuple[int, int]] = {}
    for entry in entries:
        local = os.pread(file.fileno(), LOCAL_HEADER, entry.header_offset)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = entry.header_offset + LOCAL_HEADER + names
        if not local.startswith(b"PK\3\4") or start + entry.file_size > size:
            raise ValueError(f"record {entry.filename!r} does not lie in the file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"record {entry.filename!r} is compressed or encrypted")
        name = entry.filename.removeprefix(folder)
        if name in records:
            raise ValueError(f"record {entry.filename!r} stands twice")
        records[name] = start, entry.file_size
    return records


def _unpickle(
    file: BinaryIO, records: Mapping[str, tuple[int, int]]
) -> tuple[object, dict[int, tuple[int, int]]]:
    """What the pickle holds, on storages without memory, and the place of each in the file."""

    def content(name: str) -> bytes:
        start, size = records[name]
        if size > MAX_RECORD:
            raise ValueError(f"{name} of {size} bytes")
        return os.pread(file.fileno(), size, start)

    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive")
    if "byteorder" in records and content("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    untyped: Any = torch.UntypedStorage
    typed: Any = torch.storage.TypedStorage
    storages: dict[str, Any] = {}
    places: dict[int, tuple[int, int]] = {}

    def storage(reference: Any) -> Any:
        _, kind, key, _, count = reference
        if key not in storages:
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            place = records[f"data/{key}"]
            if count * dtype.itemsize != place[1]:
                raise ValueError(f"storage {key!r} of {count} {dtype} has {place[1]} bytes")
            empty = untyped(place[1], device="meta")
            places[empty._cdata] = place
            storages[key] = typed(wrap_storage=empty, dtype=dtype, _internal=True)
        return storages[key]

    unpickler: Any = Unpickler(io.BytesIO(content("data.pkl")), encoding="utf-8")
    unpickler.persistent_load = storage
    try:
        return unpickler.load(), places
    except NotImplementedError as error:  # nested and quantised ones need memory
        name = next((item for item in reversed(unpickler.stack) if isinstance(item, str)), "")
        raise ValueError(f"tensor {name!r} is not dense") from error
    finally:  # torch's next load would check what lies there
        torch._utils._sparse_tensors_to_validate.clear()


def _tensor_info(
    path: Path, name: str, value: torch.Tensor, places: Mapping[int, tuple[int, int]]
) -> TensorInfo:
    strided = not value.is_nested and value.layout == torch.strided
    place = places.get(value.untyped_storage()._cdata) if strided else None
    if place is None or value.is_neg() or value.is_conj():
        raise CheckpointError(
            f"{path}: tensor {name!r} is not dense",
            got=f"{value.layout} on {value.device}" if place is None else "a negated view",
            expected="dense tensors in memory",
            fix=FIX,
        )
    dtype = BY_TORCH.get(value.dtype)
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r}: unsupported dtype {value.dtype}")
    if name == "__metadata__" or not _is_text(name):
        raise CheckpointError(f"{path}: tensor {name!r}: not a name that safetensors can hold")
    shape, strides = tuple(value.shape), value.stride()
    start = int(value.storage_offset()) * dtype.size
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    stop = start + (span * dtype.size if math.prod(shape) else 0)
    if not 0 <= start <= stop <= place[1] or min(strides, default=0) < 0:
        raise CheckpointError(
            f"{path}: tensor {name!r} does not lie in its storage",
            got=f"bytes {start} to {stop} of {place[1]}",
            fix=FIX,
        )
    return TensorInfo(
        name,
        dtype,
        shape,
        path,
        place[0] + start,
        place[0] + stop,
        None if value.is_contiguous() else strides,
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
