"""Opening checkpoints and streaming their tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from resm_kernels.checkpoint.files import PIECE, open_regular
from resm_kernels.checkpoint.hub import ADAPTER_WEIGHTS, NAME_ITS_BASE, ModelReference, locate
from resm_kernels.checkpoint.layout import (
    INDEX_SUFFIX,
    Checkpoint,
    FileStamp,
    TensorInfo,
    WeightFile,
    check_index,
    read_index,
    read_json,
    read_safetensors_header,
)
from resm_kernels.checkpoint.torch_file import read_torch_header
from resm_kernels.errors import CheckpointError
from resm_kernels.ops.dtypes import chunks

ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)
"""Names that whole models have."""

Fill = Callable[[memoryview, int], None]
"""Fills memory with what comes from this byte of the data on."""


class Place(Protocol):
    """Where tensors are read to."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes, aligned for every dtype."""

    def fill(self, data: torch.Tensor, fill: Fill) -> None:
        """Have every byte of `data` filled, in as many calls as it takes."""


class HostMemory:
    """Plain memory, which files are read straight into."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def fill(self, data: torch.Tensor, fill: Fill) -> None:
        """One call for all."""
        fill(data.numpy().data, 0)


HOST = HostMemory()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model beside it."""
    names = (ADAPTER_CONFIG, *MODEL_FILES)
    adapter, *whole = ((folder / name).exists() for name in names)
    return adapter and not any(whole)


def open_checkpoint(reference: ModelReference) -> Checkpoint:
    """Find a model's weight files and read every header; no tensor data is read.

    The order of choice in a folder: `model.safetensors`, `model.safetensors.index.json`, the
    only other safetensors file or index, `pytorch_model.bin`, `pytorch_model.bin.index.json`.

    Raises
    ------
    CheckpointError
        Where nothing is found, or a file is not what the format or the index says.
    """
    folder = locate(reference)
    try:
        single_file = not folder.is_dir()
        entry = folder if single_file else _entry_file(folder)
        return _open(reference, entry, single_file)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error


def _open(reference: ModelReference, entry: Path, single_file: bool) -> Checkpoint:
    folder = entry.parent
    if entry.name.endswith(INDEX_SUFFIX):
        listed = read_index(entry)
        if absent := [name for name in listed if not (folder / name).exists()]:
            raise CheckpointError(
                f"{entry}: {len(absent)} of {len(listed)} shards are missing",
                got=f"no {', '.join(absent[:3])}",
                fix="fetch the missing shards",
            )
        files = [read_header(folder / name) for name in listed]
        check_index(entry, listed, files)
    else:
        files = [read_header(entry)]

    config_path = folder / "config.json"
    config = read_json(config_path) if config_path.exists() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path}: not a JSON object")
    tensors = {name: info for file in files for name, info in file.tensors.items()}
    aliases = {
        alias: kept for file in files for alias, kept in _aliases(file).items() if kept in tensors
    }
    return Checkpoint(reference.text, folder, tuple(files), tensors, config, aliases, single_file)


def _entry_file(folder: Path) -> Path:
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder}: a LoRA adapter, not a whole model",
            fix=NAME_ITS_BASE,
        )
    singles = sorted(
        set(folder.glob("*.safetensors")) - {folder / name for name in ADAPTER_WEIGHTS}
    )
    indexes = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    for name in MODEL_FILES[:2]:
        if (folder / name).exists():
            return folder / name
    for found in (indexes, singles):
        if len(found) == 1:
            return found[0]
    for name in MODEL_FILES[2:]:
        if (folder / name).exists():
            return folder / name
    if singles:
        raise CheckpointError(
            f"{folder}: {len(singles)} safetensors files and no index",
            expected="model.safetensors, or shards with model.safetensors.index.json",
        )
    raise CheckpointError(
        f"{folder}: no weights",
        expected="model.safetensors, pytorch_model.bin, or shards with their index",
    )


def read_header(path: Path) -> WeightFile:
    """Read a weight file's header by the format that its name says."""
    if path.suffix == ".safetensors":
        return read_safetensors_header(path)
    return read_torch_header(path)


def _aliases(file: WeightFile) -> dict[str, str]:
    """Tied names: those that a `.bin` stores once, those that safetensors' metadata records."""
    if file.format == "safetensors":
        return {a: k for a, k in file.metadata.items() if a not in file.tensors}
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, info in file.tensors.items():
        key = (info.start, info.shape, info.strides, info.dtype)
        if info.nbytes and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def read_tensor(file: WeightFile, info: TensorInfo, place: Place = HOST) -> torch.Tensor:
    """Return a tensor in memory of its own, row-major, in its stored dtype and shape.

    Safe to call from several threads. Every read opens the file anew and compares its stamp with
    the plan's, and nothing is mapped, so that a file that was replaced or truncated during a
    merge is an error, never a wrong result or a SIGBUS.
    """
    data = place.empty(info.nbytes)
    tensor = data.view(info.dtype.torch).reshape(info.shape)
    try:
        with open_regular(info.file) as opened:
            check_stamp(file, os.fstat(opened.fileno()))
            reading = _Reading(opened.fileno(), info, place)
            if info.strides is None:
                reading.fill(data, info.start)
            else:
                reading.gather(tensor, info.start, info.strides)
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r}: cannot be read: {error.strerror}"
        ) from error
    return tensor


class _Reading:
    """One tensor of an open file on its way to its place."""

    def __init__(self, descriptor: int, info: TensorInfo, place: Place) -> None:
        self._descriptor = descriptor
        self._info = info
        self._place = place

    def fill(self, data: torch.Tensor, start: int) -> None:
        """Read bytes [start, start + len(data)) of the file."""
        self._place.fill(data, lambda view, offset: self._read(view, start + offset))

    def _read(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done : done + PIECE]], start + done)
            if count == 0:
                info = self._info
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r}: the file ended early",
                    got=f"{start + done - info.start} of {info.stop - info.start} bytes",
                    fix="the file was truncated during the merge: restore it, then resume",
                )
            done += count

    def gather(self, out: torch.Tensor, start: int, strides: tuple[int, ...]) -> None:
        """Read strided data, halved until the bytes that one part spans are a piece."""
        size = out.element_size()
        reach = [(n - 1) * s for n, s in zip(out.shape, strides, strict=True)]
        span = (1 + sum(reach)) * size if out.numel() else 0
        if span <= PIECE or out.numel() == 1:
            data = self._place.empty(span)
            self.fill(data, start)
            out.copy_(data.view(out.dtype).as_strided(out.shape, strides))
            return
        axis = reach.index(max(reach))
        half = out.shape[axis] // 2
        rest = start + half * strides[axis] * size
        self.gather(out.narrow(axis, 0, half), start, strides)
        self.gather(out.narrow(axis, half, out.shape[axis] - half), rest, strides)


def same_data(first: tuple[WeightFile, TensorInfo], second: tuple[WeightFile, TensorInfo]) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes, read piece by piece."""
    if first[1].strides or second[1].strides:
        return bool(torch.equal(*(read_tensor(*one) for one in (first, second))))
    try:
        with open_regular(first[1].file) as a, open_regular(second[1].file) as b:
            a.seek(first[1].start)
            b.seek(second[1].start)
            pieces = chunks(first[1].nbytes, PIECE)
            return all(a.read(p.stop - p.start) == b.read(p.stop - p.start) for p in pieces)
    except OSError as error:
        raise CheckpointError(f"{first[1].file}: cannot be compared: {error.strerror}") from error


def check_stamp(file: WeightFile, status: os.stat_result) -> None:
    """Raise where a file is no longer the one that was planned with."""
    if FileStamp.of(status) != file.stamp:
        raise CheckpointError(
            f"{file.path}: the file changed after the merge was planned",
            fix="restore the file, or start the merge anew",
        )
