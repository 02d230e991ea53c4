"""Output shards: laid out before the first byte, written at offsets, verified, then named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resm_kernels.checkpoint.dtypes import DType
from resm_kernels.checkpoint.files import (
    create,
    hash_ranges,
    sync_folder,
    write_all,
    writing,
)
from resm_kernels.errors import OutputError

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Slot:
    """Where one output tensor goes: bytes [start, stop) of its shard."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardLayout:
    """One output shard: its final name, its header and the place of every tensor."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.slots[-1].stop if self.slots else len(self.header)


def lay_out_shards(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    shard_size: int,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> list[ShardLayout]:
    """Split tensors, in order, into shards of at most `shard_size` data bytes each.

    A larger tensor gets a shard of its own. Inside a shard wider dtypes come first, so that
    every tensor is aligned; otherwise the order is kept. One shard is named
    `model.safetensors`, several `model-00001-of-0000N.safetensors`, with another `stem` in place
    of `model` where it is given. `metadata` joins the headers' own.
    """
    groups: list[list[tuple[str, DType, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = math.prod(tensor[2]) * tensor[1].size
        if groups[-1] and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    count = len(groups)
    names = [f"{stem}.safetensors"]
    if count > 1:
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    notes = {**METADATA, **(metadata or {})}
    return [_lay_out_shard(name, group, notes) for name, group in zip(names, groups, strict=True)]


def _lay_out_shard(
    name: str,
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> ShardLayout:
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].size)
    header: dict[str, object] = {"__metadata__": metadata}
    slots, offset = [], 0
    for tensor, dtype, shape in ordered:
        stop = offset + math.prod(shape) * dtype.size
        header[tensor] = {"dtype": dtype.name, "shape": shape, "data_offsets": [offset, stop]}
        slots.append((tensor, dtype, shape, offset, stop))
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    start = len(raw)
    return ShardLayout(
        name, raw, tuple(Slot(n, d, s, start + a, start + b) for n, d, s, a, b in slots)
    )


class ShardFile:
    """One shard on its way to disk; tensors may arrive in any order, from any thread.

    The file grows as `NAME.tmp`, with `attempt` before the dot where several processes may try;
    `finish` makes it durable, reads it back, compares every tensor with the digest of what was in
    memory, and only then gives it its name.
    """

    def __init__(self, folder: Path, layout: ShardLayout, attempt: str = "") -> None:
        self.layout = layout
        self.digests: dict[str, str] = {}
        self._path = folder / layout.name
        self._temporary = folder / f"{layout.name}{attempt}.tmp"
        self._lock = threading.Lock()
        with writing(self._path):
            self._descriptor = create(self._temporary, os.O_TRUNC)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._descriptor, 0, layout.size)
                write_all(self._descriptor, layout.header, 0)
            except OSError:
                os.close(self._descriptor)
                raise

    def write(self, slot: Slot, tensor: torch.Tensor) -> bool:
        """Write one tensor at its offset; True when it was the last one missing."""
        return self.write_pieces(slot, [tensor_bytes(tensor)])

    def write_pieces(self, slot: Slot, pieces: Iterable[memoryview]) -> bool:
        """Write one tensor's bytes, piece after piece; True when it was the last one missing."""
        whole, done, size = hashlib.sha256(), 0, slot.stop - slot.start
        for piece in pieces:
            if done + len(piece) <= size:
                with writing(self._path):
                    write_all(self._descriptor, piece, slot.start + done)
                whole.update(piece)
            done += len(piece)
        if done != size:
            raise OutputError(
                f"{self._path}: tensor {slot.name!r} does not fit its place",
                got=f"{done} bytes",
                expected=f"{size}",
            )
        with self._lock:
            self.digests[slot.name] = whole.hexdigest()
            return len(self.digests) == len(self.layout.slots)

    def finish(self) -> str:
        """Make the shard durable, verify it, name it; returns the SHA-256 of the file."""
        with writing(self._path):
            os.fsync(self._descriptor)
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self.close()
            digest, parts = hash_ranges(
                self._temporary, [(s.start, s.stop) for s in self.layout.slots]
            )
            for slot, part in zip(self.layout.slots, parts, strict=True):
                if part != self.digests[slot.name]:
                    raise OutputError(
                        f"{self._path}: tensor {slot.name!r} read back differs from what was "
                        "written: the disk, its driver or the memory is faulty"
                    )
            os.rename(self._temporary, self._path)
            sync_folder(self._path.parent)
        return digest

    def close(self) -> None:
        """Let go of the file; harmless when called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # what counts was synced, and is read back
                os.close(descriptor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def weight_map(layouts: Sequence[ShardLayout]) -> Iterator[tuple[str, str]]:
    """(tensor, shard) pairs for the index file."""
    return ((slot.name, layout.name) for layout in layouts for slot in layout.slots)
