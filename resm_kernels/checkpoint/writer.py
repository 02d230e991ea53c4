"""Output shards: laid out before the first byte, written at offsets, verified, then named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resm_kernels.checkpoint.dtypes import DType
from resm_kernels.checkpoint.files import (
    BLOCK,
    RangeHash,
    create,
    sync_folder,
    write_all,
    writing,
)
from resm_kernels.errors import OutputError

METADATA = {"format": "pt"}
CHECK = 64 << 20
"""Bytes of a shard that are worth a sync of their own: on a disk, some hundredths of a second."""


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

    The file grows as `NAME.tmp`. What is complete from its start on can be checked while the rest
    is still written: made durable, read back, and compared with the digests of what was in memory.
    Only a file that was checked whole gets its name.

    Parameters
    ----------
    folder : Path
    layout : ShardLayout
    due : callable, optional
        Called from a writing or the checking thread when `CHECK` bytes can be checked, or the last
        ones, and not again before `check` was called.
    attempt : str
        Where several processes may try: the file grows as `NAMEATTEMPT.tmp`.

    Attributes
    ----------
    digests : dict
        SHA-256 of every tensor written so far.
    """

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        due: Callable[[ShardFile], None] | None = None,
        attempt: str = "",
    ) -> None:
        self.layout = layout
        self.digests: dict[str, str] = {}
        self._due = due
        self._path = folder / layout.name
        self._temporary = folder / f"{layout.name}{attempt}.tmp"
        self._lock = threading.Lock()
        self._first = 0  # slot that is not complete
        self._begun: dict[str, int] = {}  # bytes of such slots, from their start on
        self._announced = False
        self._header = hashlib.sha256(layout.header).hexdigest()
        ranges = [(0, len(layout.header)), *((s.start, s.stop) for s in layout.slots)]
        self._found = RangeHash(ranges)
        self._compared = 0  # of the ranges
        with writing(self._path):
            self._descriptor = create(self._temporary, os.O_TRUNC)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._descriptor, 0, layout.size)
                write_all(self._descriptor, layout.header, 0)
            except OSError:
                os.close(self._descriptor)
                raise

    def write(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Write one tensor at its offset."""
        self.write_pieces(slot, [tensor_bytes(tensor)])

    def write_pieces(self, slot: Slot, pieces: Iterable[memoryview]) -> None:
        """Write one tensor's bytes, piece after piece."""
        whole, done, size = hashlib.sha256(), 0, slot.stop - slot.start
        for piece in pieces:
            for start in range(0, len(piece), BLOCK):
                block = piece[start : start + BLOCK]
                if done + len(block) <= size:
                    with writing(self._path):
                        write_all(self._descriptor, block, slot.start + done)
                    whole.update(block)
                done += len(block)
                if done < size:
                    self._advance(slot, done)
        if done != size:
            raise OutputError(
                f"{self._path}: tensor {slot.name!r} does not fit its place",
                got=f"{done} bytes",
                expected=f"{size}",
            )
        self._advance(slot, done, whole.hexdigest())

    def check(self) -> bool:
        """Sync, read back and compare what is complete and was not; True once that is all.

        By one thread at a time.

        Raises
        ------
        OutputError
            Naming the tensor whose bytes are not what was written.
        """
        with self._lock:
            stop = self._reach()
            if self._first < len(self.layout.slots):
                stop -= stop % BLOCK  # no page that the next write makes dirty again
        if stop > self._found.position:
            with writing(self._path):
                os.fsync(self._descriptor)
                self._read_back(stop)
        self._compare()
        if self._compared > len(self.layout.slots):
            return True
        with self._lock:
            self._announced = False
        self._announce()
        return False

    def finish(self) -> str:
        """Check what is left and name the shard; returns the SHA-256 of the file."""
        if not self.check():
            missing = [slot.name for slot in self.layout.slots if slot.name not in self.digests]
            raise OutputError(f"{self._path}: {len(missing)} tensors are missing: {missing[:3]}")
        with writing(self._path):
            self.close()
            os.rename(self._temporary, self._path)
            sync_folder(self._path.parent)
        return self._found.end()

    def close(self) -> None:
        """Let go of the file; harmless when called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # what counts was synced and read back
                os.close(descriptor)

    def _advance(self, slot: Slot, done: int, digest: str | None = None) -> None:
        """Note how much of a tensor is written, and its digest once it is all."""
        with self._lock:
            self._begun[slot.name] = done
            if digest is not None:
                self.digests[slot.name] = digest
                del self._begun[slot.name]
        self._announce()

    def _announce(self) -> None:
        """Tell that a check is due, once."""
        with self._lock:
            waiting = self._reach() - self._found.position
            whole = self._first == len(self.layout.slots)
            if self._due is None or self._announced or not (whole or waiting >= CHECK):
                return
            self._announced = True
        self._due(self)

    def _reach(self) -> int:
        """Where the first byte may be missing; with the lock held."""
        slots = self.layout.slots
        while self._first < len(slots) and slots[self._first].name in self.digests:
            self._first += 1
        if self._first == len(slots):
            return self.layout.size
        slot = slots[self._first]
        return slot.start + self._begun.get(slot.name, 0)

    def _read_back(self, stop: int) -> None:
        """Hash the file from where that ended on."""
        found, buffer = self._found, memoryview(bytearray(BLOCK))
        if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
            length = stop - found.position
            os.posix_fadvise(self._descriptor, found.position, length, os.POSIX_FADV_DONTNEED)
        while left := stop - found.position:
            count = os.preadv(self._descriptor, [buffer[:left]], found.position)
            if not count:
                self._compare()
                raise self._differs(len(found.parts))
            found.update(buffer[:count])

    def _compare(self) -> None:
        """Compare the ranges that were read back since the last time."""
        slots, parts = self.layout.slots, self._found.parts
        for i in range(self._compared, len(parts)):
            if i and slots[i - 1].name not in self.digests:  # an empty one, still to come
                return
            if parts[i] != (self.digests[slots[i - 1].name] if i else self._header):
                raise self._differs(i)
            self._compared = i + 1

    def _differs(self, i: int) -> OutputError:
        what = f"tensor {self.layout.slots[i - 1].name!r}" if i else "the header"
        return OutputError(
            f"{self._path}: {what} read back differs from what was written: "
            "the disk, its driver or the memory is faulty"
        )


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def weight_map(layouts: Sequence[ShardLayout]) -> Iterator[tuple[str, str]]:
    """(tensor, shard) pairs for the index file."""
    return ((slot.name, layout.name) for layout in layouts for slot in layout.slots)
