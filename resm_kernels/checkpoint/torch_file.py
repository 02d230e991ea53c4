"""Torch's zip format (`.bin`), read without running its pickle: the few words tensors need."""

from __future__ import annotations

import hashlib
import os
import pickletools
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from resm_kernels.checkpoint.dtypes import BY_TORCH
from resm_kernels.checkpoint.files import open_regular
from resm_kernels.checkpoint.layout import (
    FileStamp,
    TensorInfo,
    WeightFile,
    are_sizes,
    is_shape,
)
from resm_kernels.errors import CheckpointError

MAX_PICKLE = 16 << 20
"""Longest pickle or zip directory that is read: 50,000 tensors and more."""
MAX_STEPS = 2_000_000
"""Most instructions of a pickle; a tensor takes about 25."""
END, END_64, LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"

STORAGES = {
    f"torch {word}Storage": dtype
    for word, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}
DTYPES = {str(dtype).replace(".", " ", 1): dtype for dtype in BY_TORCH}
UNTYPED = "torch.storage UntypedStorage"
ORDERED = "collections OrderedDict"
TENSOR_2, TENSOR_3 = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
GLOBALS = {*STORAGES, *DTYPES, UNTYPED, ORDERED, TENSOR_2, TENSOR_3, *PARAMETERS}


class Member(NamedTuple):
    """A stored file of the archive: where its bytes lie."""

    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class TorchTensor:
    """Where a tensor's elements lie in the file, and in which order.

    Attributes
    ----------
    start, stop : int
        Bytes from its first element to the end of its last.
    strides : tuple of int
        In elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    stop: int


class _Damaged(Exception):
    """Not what `torch.save` writes; the text says where."""


class _Foreign(Exception):
    """Something else than tensors is pickled; the text names it."""


class _Global(str):
    """A name that the pickle imports, as `module name`; only compared, never looked up."""


class _Storage(NamedTuple):
    """`size` counts elements, or bytes where there is no dtype; it may be anything."""

    dtype: torch.dtype | None
    key: str
    size: Any


class _View(NamedTuple):
    """A tensor as the pickle has it; its numbers may be anything."""

    dtype: torch.dtype | None
    storage: _Storage
    offset: Any
    shape: Any
    strides: Any


def read_torch_header(path: Path) -> WeightFile:
    """Find a `.bin` file's tensors and where their bytes lie; no tensor data is read.

    Raises
    ------
    CheckpointError
        Where the file is not a flat state dict of dense tensors as `torch.save` writes it.
    """
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


def read_torch_file(file: BinaryIO, size: int, path: Path) -> dict[str, TorchTensor]:
    """Where every tensor of an open `.bin` file lies; no tensor data is read.

    Raises
    ------
    CheckpointError
        Where the file is not a flat state dict of dense tensors as `torch.save` writes it.
    """
    fix = "convert it to safetensors with the library that wrote it"
    try:
        members = _members(file, size)
        folder = next(iter(members)).split("/")[0]
        if strays := [n for n in members if not n.startswith(f"{folder}/")]:
            raise _Damaged(f"{strays[0][:80]!r} lies outside the folder {folder[:80]!r}")
        order = _content(file, members, f"{folder}/byteorder", b"little")
        if order != b"little":
            raise _Damaged(f"byte order {order[:8]!r}")
        state = _run(_content(file, members, f"{folder}/data.pkl"))
    except _Foreign as error:
        raise CheckpointError(
            f"{path}: holds pickled objects other than tensors; they are never loaded",
            got=str(error),
            fix=fix,
        ) from error
    except _Damaged as error:
        raise CheckpointError(
            f"{path}: not a torch file of the zip format (torch 1.6 and newer), or damaged",
            got=str(error),
            fix=fix,
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a flat state dict", got=type(state).__name__, fix=fix)
    tensors = {}
    for name, view in state.items():
        if not isinstance(view, _View):
            raise CheckpointError(
                f"{path}: not a flat state dict",
                got=f"{name!r}: {type(view).__name__}",
                expected="names and dense tensors",
                fix=fix,
            )
        try:
            tensors[name] = _place(view, members.get(f"{folder}/data/{view.storage.key}"))
        except _Damaged as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}", fix=fix) from error
    return tensors


def _read(file: BinaryIO, size: int, offset: int) -> bytes:
    raw = b""
    if offset >= 0:
        file.seek(offset)
        raw = file.read(size)
    if len(raw) != size:
        raise _Damaged(f"{size} bytes at {offset} lie outside the file")
    return raw


def _members(file: BinaryIO, size: int) -> dict[str, Member]:
    """The archive's files by name; compressed, encrypted or repeated ones are refused."""
    end = _read(file, 22, size - 22)
    if not end.startswith(END):
        raise _Damaged("no end of a zip archive")
    count, length, start = struct.unpack("<10xHII2x", end)
    if _read(file, 4, size - 42) == LOCATOR_64:
        disk, where, disks = struct.unpack("<4xIQI", _read(file, 20, size - 42))
        record = _read(file, 56, min(where, size))
        if not record.startswith(END_64) or disk or disks != 1:
            raise _Damaged("no zip64 directory where one is announced")
        count, length, start = struct.unpack("<32xQQQ", record)
    if length > MAX_PICKLE:
        raise _Damaged(f"a zip directory of {length} bytes")
    directory = _read(file, length, min(start, size))
    members: dict[str, Member] = {}
    position = 0
    try:
        for _ in range(count):
            name, member, position = _entry(directory, position)
            if name in members:
                raise _Damaged(f"{name[:80]!r} stands twice in the archive")
            local = _read(file, 30, min(member.start, size))
            names, extra = struct.unpack("<26xHH", local)
            if local[:4] != b"PK\x03\x04":
                raise _Damaged(f"no file {name[:80]!r} where the directory has it")
            member = member._replace(start=member.start + 30 + names + extra)
            if member.start + member.size > start:
                raise _Damaged(f"{name[:80]!r} runs past its end")
            members[name] = member
    except (struct.error, UnicodeDecodeError) as error:
        raise _Damaged(f"a broken zip directory: {error}") from error
    if not members:
        raise _Damaged("an empty archive")
    return members


def _entry(directory: bytes, position: int) -> tuple[str, Member, int]:
    """One entry of the directory, its start still that of the local header, and the next."""
    mark, flags, method, crc, packed, size, names, extra, comment, start = struct.unpack_from(
        "<4s4xHH4xIIIHHH8xI", directory, position
    )
    position += 46
    name = directory[position : position + names].decode()
    fields = directory[position + names : position + names + extra]
    if mark != b"PK\x01\x02" or method or flags & 1:
        raise _Damaged(f"{name[:80]!r} is compressed, encrypted or no zip entry")
    wide = list(_wide_values(fields))
    sizes = [wide.pop(0) if v == 0xFFFFFFFF and wide else v for v in (size, packed, start)]
    if sizes[0] != sizes[1]:
        raise _Damaged(f"{name[:80]!r} has two sizes")
    return name, Member(sizes[2], sizes[0], crc), position + names + extra + comment


def _wide_values(fields: bytes) -> Iterator[int]:
    """The 64-bit values in the extra field of an entry that needs them."""
    position = 0
    while position + 4 <= len(fields):
        kind, length = struct.unpack_from("<HH", fields, position)
        if kind == 1:
            for at in range(position + 4, min(position + 4 + length, len(fields)) - 7, 8):
                yield struct.unpack_from("<Q", fields, at)[0]
        position += 4 + length


def _content(
    file: BinaryIO, members: dict[str, Member], name: str, default: bytes | None = None
) -> bytes:
    member = members.get(name)
    if member is None:
        if default is None:
            raise _Damaged(f"no {name.split('/')[-1]} in the archive")
        return default
    if member.size > MAX_PICKLE:
        raise _Damaged(f"{name[:80]!r} is longer than {MAX_PICKLE} bytes")
    raw = _read(file, member.size, member.start)
    if zlib.crc32(raw) != member.crc:
        raise _Damaged(f"{name[:80]!r} does not match its checksum")
    return raw


def _run(program: bytes) -> Any:
    """The value that a pickle of protocol 2 describes; its globals are words, never objects."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    try:
        argument: Any
        for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            word = opcode.name
            if step > MAX_STEPS:
                raise _Damaged(f"more than {MAX_STEPS} pickle instructions")
            if word == "PROTO":
                if argument != 2:
                    raise _Damaged(f"pickle protocol {argument}")
            elif word in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
                stack.append(argument)
            elif word in CONSTANTS:
                stack.append(CONSTANTS[word]())
            elif word in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif word in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif word == "MARK":
                marks.append(len(stack))
            elif word == "TUPLE":
                stack.append(tuple(above_mark()))
            elif word in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(word[-1])
                if len(stack) < count:
                    raise IndexError("too few values for a tuple")
                stack[-count:] = [tuple(stack[-count:])]
            elif word == "GLOBAL":
                if argument not in GLOBALS:
                    after = f", after {stack[-1]!r}" if stack and type(stack[-1]) is str else ""
                    raise _Foreign(argument[:200] + after)
                stack.append(_Global(argument))
            elif word == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif word == "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            elif word == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            elif word == "SETITEMS":
                items = above_mark()
                _set(stack[-1], items)
            elif word == "APPEND":
                value = stack.pop()
                _list(stack[-1]).append(value)
            elif word == "APPENDS":
                values = above_mark()
                _list(stack[-1]).extend(values)
            elif word == "BUILD":
                stack.pop()  # attributes, such as a state dict's _metadata
                if not isinstance(stack[-1], dict | _View):
                    raise _Damaged("attributes of something that has none")
            elif word == "STOP":
                if len(stack) != 1:
                    raise _Damaged(f"a pickle that leaves {len(stack)} values")
                return stack[0]
            else:
                raise _Foreign(f"the pickle instruction {word}")
    except (IndexError, KeyError) as error:
        raise _Damaged(f"a broken pickle: {error}") from error
    except ValueError as error:
        raise _Damaged(f"a broken pickle: {str(error)[:200]}") from error
    raise _Damaged("a pickle without an end")


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
}


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _Damaged("an append to something that is no list")
    return value


def _set(target: object, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise _Damaged("items of something that is no mapping")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):  # a hash of nested tuples would never end
            raise _Damaged(f"a key that is no text but {type(key).__name__}")
        target[key] = value


def _storage(value: object) -> _Storage:
    if isinstance(value, tuple) and len(value) == 5:
        tag, kind, key, _, size = value
        known = isinstance(kind, _Global) and (kind == UNTYPED or kind in STORAGES)
        if tag == "storage" and known and isinstance(key, str):
            return _Storage(STORAGES.get(kind), key, size)
    raise _Damaged("a storage of an unknown kind")


def _call(function: object, arguments: object) -> Any:
    """What the few known functions return, worked out without them."""
    if isinstance(function, _Global) and isinstance(arguments, tuple):
        if function == ORDERED and not arguments:
            return {}
        if function in PARAMETERS and arguments and isinstance(arguments[0], _View):
            return arguments[0]
        if function == TENSOR_2 and len(arguments) == 6 and isinstance(arguments[0], _Storage):
            return _View(arguments[0].dtype, *arguments[:4])
        if function == TENSOR_3 and len(arguments) == 7 and isinstance(arguments[0], _Storage):
            dtype = arguments[6]
            return _View(DTYPES.get(dtype) if isinstance(dtype, _Global) else None, *arguments[:4])
    raise _Damaged("a call that torch.save does not write")


def _place(view: _View, member: Member | None) -> TorchTensor:
    """The bytes of a view, once its numbers are known to be numbers and to lie in its storage."""
    dtype, storage, offset, shape, strides = view
    if dtype is None or member is None:
        raise _Damaged("no dtype, or no data in the archive")
    unit = storage.dtype.itemsize if storage.dtype else 1
    if not are_sizes((storage.size,)) or storage.size * unit != member.size:
        raise _Damaged(f"its storage has {member.size} bytes, not what the pickle says")
    if not isinstance(shape, tuple) or not is_shape(shape):
        raise _Damaged("the shape must be sizes whose product is below 2**63")
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        raise _Damaged("one stride for each size is needed")
    if not are_sizes((*strides, offset)):
        raise _Damaged("strides and offset must be sizes")
    start = stop = member.start
    if 0 not in shape:
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        start += offset * dtype.itemsize
        stop += (last + 1) * dtype.itemsize
    if stop > member.start + member.size:
        raise _Damaged(f"{stop - member.start} bytes in a storage of {member.size}")
    return TorchTensor(dtype, shape, strides, start, stop)
