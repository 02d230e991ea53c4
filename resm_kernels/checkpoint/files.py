"""Durable files: everything an output folder is made of passes through here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from resm_kernels.errors import OutputError, VerificationError

PIECE = 16 << 20
"""Bytes asked of the file system at once."""
BLOCK = 2 << 20
"""Bytes written or read and hashed at once, while a cache holds them; no page is larger."""
SEAL = "sha256"
MAX_SEALED = 256 << 20
"""Longest manifest, report or journal that is read: far above a line for each tensor."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into one OutputError that names the file."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}",
            fix="free space (or raise the limit) there, then resume" if full else None,
        ) from error


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; OSError where it is a folder, a pipe or a device.

    Buffered, since only then does `read(n)` go on until it has n bytes or the file ends.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "Not a regular file"
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, kind, str(path))
        return open(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def create(path: Path, flags: int = 0) -> int:
    """Open a new file for writing; its mode follows the umask."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write every byte at an offset, however many calls it takes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + PIECE], offset + done)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file through a temporary name: complete on disk, or not there."""
    temporary = path.parent / f"{path.name}.tmp"
    with writing(path):
        descriptor = create(temporary, os.O_TRUNC)
        try:
            try:
                write_all(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RangeHash:
    """SHA-256 of a stream and of ascending, disjoint byte ranges of it.

    Attributes
    ----------
    position : int
        Bytes of the stream so far.
    parts : list of str
        Digests of the ranges that lie wholly before it.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.position = 0
        self.parts: list[str] = []
        self._ranges = ranges
        self._whole, self._part = hashlib.sha256(), hashlib.sha256()

    def update(self, block: memoryview) -> None:
        """Take in the next bytes."""
        start = self.position
        self.position += len(block)
        self._whole.update(block)
        while len(self.parts) < len(self._ranges):
            first, stop = self._ranges[len(self.parts)]
            self._part.update(block[max(first - start, 0) : max(stop - start, 0)])
            if self.position < stop:
                return
            self._close()

    def end(self) -> str:
        """End the ranges that the stream did not reach; the digest of the whole stream."""
        while len(self.parts) < len(self._ranges):
            self._close()
        return self._whole.hexdigest()

    def _close(self) -> None:
        self.parts.append(self._part.hexdigest())
        self._part = hashlib.sha256()


def hash_ranges(path: Path, ranges: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
    """SHA-256 of a whole file and of ascending, disjoint byte ranges of it, in one reading."""
    found = RangeHash(ranges)
    buffer = memoryview(bytearray(BLOCK))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.end(), found.parts


def canonical_json(value: object) -> bytes:
    """One byte string per value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def seal(content: dict[str, Any]) -> bytes:
    """Serialise an object with a digest of itself inside, so that any changed byte shows."""
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    return _pretty({**content, SEAL: digest})


def unseal(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file; VerificationError where a single byte differs."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_SEALED:
                raise VerificationError(
                    f"{path}: too long", got=f"{size:,} bytes", expected=f"at most {MAX_SEALED:,}"
                )
            raw = file.read(MAX_SEALED)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}") from error
    damaged = VerificationError(f"{path}: damaged: it does not match its own digest")
    try:
        content = json.loads(raw)
        if not isinstance(content, dict) or SEAL not in content or _pretty(content) != raw:
            raise damaged
        digest = content.pop(SEAL)
        if digest != hashlib.sha256(canonical_json(content)).hexdigest():
            raise damaged
    except (ValueError, RecursionError) as error:
        raise damaged from error
    return content


def seal_text(text: str) -> bytes:
    """An HTML text with a last line that holds the digest of all before it."""
    body = text.encode(errors="backslashreplace").rstrip(b"\n") + b"\n"
    return body + f"<!-- {SEAL} {hashlib.sha256(body).hexdigest()} -->\n".encode()


def check_sealed_text(path: Path) -> None:
    """VerificationError where a text that `seal_text` made is missing or changed."""
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_SEALED + 1)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}") from error
    body = raw[: raw.rfind(b"<!--")]
    if len(raw) > MAX_SEALED or raw != seal_text(body.decode(errors="replace")):
        raise VerificationError(f"{path}: damaged: it does not match its own digest")


def _pretty(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
