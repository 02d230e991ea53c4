"""What a checkpoint holds, read from headers alone and believed only after checking."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint.dtypes import DTYPES, DType
from resm_kernels.checkpoint.files import open_regular
from resm_kernels.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest safetensors header that the format allows, in bytes."""
MAX_JSON = 64 << 20
"""Longest index or config file that is read, in bytes."""
MAX_VALUES = 2_000_000
"""Most values in a header, index or config: a quarter of a million tensors in one header."""
MAX_DEPTH = 64
"""Most levels of a header, index or config."""
MAX_RANK = 32
"""Most dimensions a tensor may have."""
LIMIT = 1 << 63
"""Sizes and offsets stay below this."""
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class FileStamp:
    """What must not change between planning a merge and finishing it."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Take the stamp from an `os.stat_result`."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, stop) of its file.

    `strides` (in elements) is None where the data are row-major, as they always are in
    safetensors.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class WeightFile:
    """One shard: its tensors, the digest of its header and its stamp."""

    path: Path
    format: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header_digest: str
    stamp: FileStamp


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: every tensor by name, in file order, and its config.

    Attributes
    ----------
    reference : str
        What the user called it.
    folder : Path
        Where it lies.
    files : tuple of WeightFile
        Shards in name order.
    tensors : mapping
        Name to `TensorInfo`, in the order of files and of offsets in them.
    config : mapping
        config.json, empty where there is none.
    aliases : mapping
        Tied names to the name whose data they share.
    single_file : bool
        Whether the user named a weight file and not a folder.
    """

    reference: str
    folder: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    single_file: bool = False

    @functools.cached_property
    def home(self) -> dict[str, WeightFile]:
        """The file of every tensor."""
        return {name: file for file in self.files for name in file.tensors}

    @property
    def digest(self) -> str:
        """SHA-256 over the header digests and stamps of all files: the inputs' identity."""
        return files_digest(self.files)


def files_digest(files: Iterable[WeightFile]) -> str:
    """SHA-256 over the header digests and stamps of files."""
    parts = [f"{f.path.name} {f.header_digest} {f.stamp.size} {f.stamp.mtime_ns}" for f in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_safetensors_header(path: Path) -> WeightFile:
    """Read and check the header of a safetensors file.

    Raises
    ------
    CheckpointError
        On anything that the format forbids: a header past the file's end or 100 MB, invalid or
        repeated JSON keys, unknown dtypes, shapes that do not match their bytes, data that
        overlap, leave holes or do not end with the file.
    """
    try:
        with open_regular(path) as file:
            stamp = FileStamp.of(os.fstat(file.fileno()))
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, stamp.size - 8):
                raise _bad(
                    path,
                    "the header does not fit in the file",
                    got=_in_place_of_header(prefix, stamp.size),
                    expected=f"at most {MAX_HEADER} bytes, inside the file",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) != length:
        raise _bad(path, "the file ends inside its header", got=f"{len(raw)} of {length} bytes")
    if not raw.startswith(b"{"):
        raise _bad(path, "the header is not a JSON object", got=repr(raw[:16]))

    header = parse_json(raw, path)
    if not isinstance(header, dict):
        raise _bad(path, "the header is not a JSON object", got=type(header).__name__)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ must map strings to strings")
    data_start = 8 + length
    tensors = [_tensor_info(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            problem = "overlaps the tensor before it" if tensor.start < end else "leaves a hole"
            raise _bad(
                path,
                f"tensor {tensor.name!r} {problem}",
                got=f"data from byte {tensor.start - data_start}",
                expected=f"from byte {end - data_start}",
            )
        end = tensor.stop
    if end != stamp.size:
        raise _bad(
            path,
            "the data do not end with the file",
            got=f"a file of {stamp.size} bytes",
            expected=f"{end}, as the header says",
        )
    return WeightFile(
        path=path,
        format="safetensors",
        tensors={tensor.name: tensor for tensor in tensors},
        metadata=metadata,
        header_digest=hashlib.sha256(raw).hexdigest(),
        stamp=stamp,
    )


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    def fail(problem: str, got: object) -> CheckpointError:
        return _bad(path, f"tensor {name!r}: {problem}", got=repr(got)[:200])

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("must have exactly dtype, shape and data_offsets", entry)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise fail(f"unknown dtype; this package reads {', '.join(DTYPES)}", entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not is_shape(shape):
        raise fail("the shape must be a list of sizes whose product is below 2**63", shape)
    two = isinstance(offsets, list) and len(offsets) == 2 and are_sizes(offsets)
    if not two or offsets[0] > offsets[1]:
        raise fail("data_offsets must be [start, stop]", offsets)
    nbytes = math.prod(shape) * dtype.size
    if offsets[1] - offsets[0] != nbytes:
        raise _bad(
            path,
            f"tensor {name!r}: shape and data disagree",
            got=f"{offsets[1] - offsets[0]} bytes",
            expected=f"{nbytes} for {dtype.name} {shape}",
        )
    start, stop = (data_start + offset for offset in offsets)
    return TensorInfo(name, dtype, tuple(shape), path, start, stop)


def are_sizes(values: Iterable[object]) -> bool:
    """Whether these are whole numbers that an offset can be."""
    return all(type(v) is int and 0 <= v < LIMIT for v in values)


def is_shape(values: Sequence[Any]) -> bool:
    """Whether a tensor can have these sizes: strides stay below 63 bits, also beside a zero."""
    few = len(values) <= MAX_RANK and are_sizes(values)
    return few and math.prod([size or 1 for size in values]) < LIMIT


def read_json(path: Path, most: int = MAX_VALUES) -> Any:
    """Read a JSON file strictly: no repeated keys, no NaN, bounded size, depth and values."""
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_JSON:
        raise _bad(path, "too long for a JSON file", expected=f"at most {MAX_JSON} bytes")
    return parse_json(raw, path, most)


def parse_json(raw: bytes, path: Path, most: int = MAX_VALUES) -> Any:
    """Parse JSON strictly; CheckpointError names the file."""
    # Each value follows a comma or a bracket; counted first, since each takes up to 250 bytes.
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > most:
        raise _bad(path, f"invalid JSON: more than {most:,} values")

    escaped = b"\\u" in raw

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice!r} stands twice")
        if escaped:  # a lone surrogate is no text: UnicodeEncodeError is a ValueError
            "".join(result).encode()
        return result

    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    def finite(word: str) -> float:
        if math.isinf(number := float(word)):
            raise ValueError(f"{word} is no float64")
        return number

    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite
        )
    except RecursionError as error:
        raise _bad(path, "invalid JSON: nested too deeply") from error
    except ValueError as error:
        raise _bad(path, f"invalid JSON: {error}") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = list(itertools.chain.from_iterable(map(_children, level)))
        if not level:
            return value
    raise _bad(path, "invalid JSON: nested too deeply", expected=f"at most {MAX_DEPTH} levels")


def _children(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_index(path: Path) -> dict[str, list[str]]:
    """Read a `*.index.json` and return the tensor names of every shard it lists."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(path, "no weight_map", expected='{"weight_map": {tensor: shard, ...}}')
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..")
        if not plain or len(shard) > 255 or any(c in shard for c in "/\\\0"):
            raise _bad(
                path,
                f"tensor {name!r}: the shard name leaves the folder",
                got=repr(shard)[:200],
                expected="a plain file name",
            )
        shards.setdefault(shard, []).append(name)
    return dict(sorted(shards.items()))


def check_index(path: Path, listed: Mapping[str, list[str]], files: list[WeightFile]) -> None:
    """Compare an index with the shards' own headers; every difference is an error."""
    home: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in home:
                raise _bad(
                    path,
                    f"tensor {name!r} lies in two shards",
                    got=f"{home[name].name} and {file.path.name}",
                )
            home[name] = file.path
        promised = set(listed[file.path.name])
        if absent := sorted(promised - file.tensors.keys()):
            raise _bad(
                path,
                f"{file.path.name} lacks {len(absent)} of the tensors that the index lists there",
                got=_some(absent),
            )
        if unlisted := sorted(file.tensors.keys() - promised):
            raise _bad(
                path,
                f"{file.path.name} holds {len(unlisted)} tensors that the index does not list",
                got=_some(unlisted),
            )


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _in_place_of_header(prefix: bytes, size: int) -> str:
    """What a file of that size begins with; failed downloads leave pointers and web pages."""
    if prefix == b"version ":
        return "a Git LFS pointer: `git lfs pull` fetches the file"
    if prefix.lstrip().startswith((b"<!", b"<htm", b"<HTM")):
        return "a web page"
    if len(prefix) < 8:
        return f"a file of {size} bytes"
    return f"a header of {int.from_bytes(prefix, 'little')} bytes in a file of {size}"


def _bad(
    path: Path, what: str, *, got: str | None = None, expected: str | None = None
) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}",
        got=got,
        expected=expected,
        fix="the file is damaged or not what its name says: fetch or write it again",
    )
