"""Opening checkpoints and streaming their tensors."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from resm_kernels.checkpoint.dtypes import BY_TORCH
from resm_kernels.checkpoint.files import PIECE, open_regular
from resm_kernels.checkpoint.hub import ModelReference, locate
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
from resm_kernels.checkpoint.torchfile import TorchTensor, read_torch_file
from resm_kernels.errors import CheckpointError


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
        files = [_read_file(folder / name) for name in listed]
        check_index(entry, listed, files)
    else:
        files = [_read_file(entry)]

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
    singles = sorted(set(folder.glob("*.safetensors")) - set(folder.glob("adapter_model*")))
    indexes = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    for name in ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}"):
        if (folder / name).exists():
            return folder / name
    for found in (indexes, singles):
        if len(found) == 1:
            return found[0]
    for name in ("pytorch_model.bin", f"pytorch_model.bin{INDEX_SUFFIX}"):
        if (folder / name).exists():
            return folder / name
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: a LoRA adapter; adapters as experts are not supported yet",
            fix="merge the adapter into its base model and name that folder",
        )
    if singles:
        raise CheckpointError(
            f"{folder}: {len(singles)} safetensors files and no index",
            expected="model.safetensors, or shards with model.safetensors.index.json",
        )
    raise CheckpointError(
        f"{folder}: no weights",
        expected="model.safetensors, pytorch_model.bin, or shards with their index",
    )


def _read_file(path: Path) -> WeightFile:
    if path.suffix == ".safetensors":
        return read_safetensors_header(path)
    return _read_torch_file(path)


def _read_torch_file(path: Path) -> WeightFile:
    with open_regular(path) as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        found = read_torch_file(file, stamp.size, path)
    tensors, lines = {}, []
    for name, tensor in found.items():
        dtype = BY_TORCH.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{path}: tensor {name!r}: unsupported dtype {tensor.dtype}")
        if name == "__metadata__" or not _is_text(name):
            raise CheckpointError(f"{path}: tensor {name!r}: not a name that safetensors can hold")
        strides = None if _row_major(tensor) else tensor.strides
        info = TensorInfo(name, dtype, tensor.shape, path, tensor.start, tensor.stop, strides)
        tensors[name] = info
        lines.append(f"{name} {dtype.name} {info.shape} {strides} {info.start}")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return WeightFile(path, "torch", tensors, {}, digest, stamp)


def _row_major(tensor: TorchTensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step and tensor.stop > tensor.start:
            return False
        step *= size
    return True


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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


class TensorReader:
    """Reads whole tensors; safe to call from several threads.

    Every read opens the file anew and compares its stamp with the plan's, so that a file that
    was replaced or truncated during a merge is an error, never a wrong result.
    """

    def read(self, file: WeightFile, info: TensorInfo) -> torch.Tensor:
        """Return a tensor in memory of its own, in its stored dtype and shape."""
        size = info.stop - info.start
        data = torch.empty(size, dtype=torch.uint8)
        view = data.numpy().data
        where = f"{info.file}: tensor {info.name!r}"
        try:
            with open_regular(info.file) as opened:
                descriptor = opened.fileno()
                check_stamp(file, os.fstat(descriptor))
                done = 0
                while done < size:
                    count = os.preadv(descriptor, [view[done : done + PIECE]], info.start + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{where}: the file ended early",
                            got=f"{done} of {size} bytes",
                            fix="the file was truncated during the merge: restore it, then resume",
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
        flat = data.view(info.dtype.torch)
        if info.strides is None:
            return flat.reshape(info.shape)
        return flat.as_strided(info.shape, info.strides).clone(
            memory_format=torch.contiguous_format
        )


def same_data(first: tuple[WeightFile, TensorInfo], second: tuple[WeightFile, TensorInfo]) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes, read piece by piece."""
    if first[1].strides or second[1].strides:
        return bool(torch.equal(*(TensorReader().read(*one) for one in (first, second))))
    with open_regular(first[1].file) as a, open_regular(second[1].file) as b:
        a.seek(first[1].start)
        b.seek(second[1].start)
        left = first[1].nbytes
        while left:
            size = min(PIECE, left)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def check_stamp(file: WeightFile, status: os.stat_result) -> None:
    """Raise where a file is no longer the one that was planned with."""
    if FileStamp.of(status) != file.stamp:
        raise CheckpointError(
            f"{file.path}: the file changed after the merge was planned",
            fix="restore the file, or start the merge anew",
        )
