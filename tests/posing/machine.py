"""The posing devices' memory and streams, and whether work on them is ordered.

Work is done when it is asked for, so nothing here is asynchronous; what is kept is what a device
would be told. Every stream counts its operations, and has a clock: the last operation of every
stream that is done before its next one, by the events it waited for. An access to memory that is
not ordered after the accesses it depends on is a race, whichever came first this time. The host has
one clock for all its threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

TOTAL = 2 << 30
"""Bytes of memory of a device."""
GRAIN = 512
"""Bytes to which the caching allocator rounds."""
Clock = dict["Stream", int]


class Stream:
    """What `torch.cuda.Stream` is, as far as this project uses it."""

    _handles = itertools.count(0x1000)

    def __init__(self, device: torch.device | int | str | None = None, handle: int | None = None):
        self.device = torch.device("cuda", machine.index(device))
        self.cuda_stream = next(self._handles) if handle is None else handle
        self.count = 0
        self.clock: Clock = {}

    def __repr__(self) -> str:
        return f"<stream {self.cuda_stream:#x} of {self.device}>"

    def wait_event(self, event: Event) -> None:
        with machine.change:
            merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        with machine.change:
            merge(self.clock, other.now)

    def synchronize(self) -> None:
        with machine.change:
            merge(machine.host, self.now)

    @property
    def now(self) -> Clock:
        """All that is done once this stream is."""
        return {**self.clock, self: self.count}


class Event:
    """What `torch.cuda.Event` is."""

    def __init__(self, enable_timing: bool = False, **given: Any) -> None:
        self.clock: Clock = {}
        self.time: float | None = None
        self._timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        with machine.change:
            self.clock = (stream or machine.current_stream()).now
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        with machine.change:
            merge(machine.host, self.clock)

    def elapsed_time(self, end: Event) -> float:
        assert self._timed
        assert end._timed
        assert self.time is not None
        assert end.time is not None
        return 1e3 * (end.time - self.time)


def merge(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


@dataclass(eq=False)
class Block:
    """One allocation, on a device or pinned on the host, and who used it."""

    device: int | None
    nbytes: int
    stream: Stream | None
    """Whose later allocations may take its place; None for the host's."""
    writer: tuple[Stream, int] | None = None
    readers: Clock = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)
    unwritten: bool = True

    def __del__(self) -> None:
        machine.free(self)


class Machine:
    """All devices.

    Attributes
    ----------
    races : list of str
        What was found so far.
    """

    def __init__(self) -> None:
        self.change = threading.RLock()
        self.host: Clock = {}
        self.races: list[str] = []
        self.tell: Callable[[int], object] = lambda device: None
        """Who else has to know a thread's device."""
        self._guard: ctypes.CDLL | None = None
        self._own = threading.local()
        self._default: dict[int, Stream] = {}
        self._streams: set[Stream] = set()  # those that did anything
        self._tables: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self.pinned: dict[int, Block] = {}

    def start(self, guard: ctypes.CDLL) -> None:
        self._guard = guard
        self.count = int(guard.posing_count())
        self.allocated, self.peak = [0] * self.count, [0] * self.count
        self.limit = [TOTAL] * self.count

    # Devices and streams

    @property
    def current(self) -> int:
        """The thread's device."""
        assert self._guard is not None
        return int(self._guard.posing_device())

    def set_current(self, device: int) -> None:
        assert self._guard is not None
        assert 0 <= device < self.count
        self._guard.posing_set_device(device)
        self.tell(device)

    def index(self, device: torch.device | int | str | None) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        device = torch.device(device)
        assert device.type == "cuda", device
        return self.current if device.index is None else device.index

    def default_stream(self, device: Any = None) -> Stream:
        i = self.index(device)
        with self.change:
            if i not in self._default:
                self._default[i] = Stream(i, 0)
            return self._default[i]

    def current_stream(self, device: Any = None) -> Stream:
        chosen = getattr(self._own, "streams", {})
        return chosen.get(self.index(device)) or self.default_stream(device)

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        device = self.index(stream.device)
        before, streams = self.current, getattr(self._own, "streams", {})
        self.set_current(device)
        self._own.streams = {**streams, device: stream}
        try:
            yield
        finally:
            self._own.streams = streams
            self.set_current(before)

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.current
        self.set_current(self.index(device))
        try:
            yield
        finally:
            self.set_current(before)

    def synchronize(self, device: Any = None) -> None:
        """The host waits for all streams that did anything."""
        with self.change:
            for stream in self._streams:
                if stream.device.index == self.index(device):
                    merge(self.host, stream.now)

    # Memory

    def allocate(self, device: int, nbytes: int, start: int) -> Block:
        nbytes = -(-nbytes // GRAIN) * GRAIN
        with self.change:
            if self.allocated[device] + nbytes > self.limit[device]:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {nbytes} bytes. GPU {device} has "
                    f"{self.limit[device]} bytes, of which {self.allocated[device]} are taken."
                )
            self.allocated[device] += nbytes
            self.peak[device] = max(self.peak[device], self.allocated[device])
            block = Block(device, nbytes, self.current_stream(device))
            if start:
                self._tables[start] = block
            return block

    def free(self, block: Block) -> None:
        """Its memory may be another tensor's: all streams must be done with it, or be known."""
        with self.change:
            if block.device is None:
                return
            self.allocated[block.device] -= block.nbytes
            assert block.stream is not None
            ordered = {**self.host}
            merge(ordered, block.stream.now)
            for stream in block.recorded:
                merge(ordered, stream.now)
            users = dict(block.readers)
            if block.writer is not None:
                merge(users, dict([block.writer]))
            for stream, count in users.items():
                if ordered.get(stream, 0) < count:
                    self._race(
                        f"memory of {block.stream} is free while {stream} still uses it: no "
                        "record_stream, and nothing waited"
                    )

    def at(self, address: int) -> Block | None:
        """The allocation that starts there."""
        return self._tables.get(address)

    # Accesses

    def access(
        self, device: int, reads: Iterable[Block], writes: Iterable[Block], *, waits: bool = False
    ) -> None:
        """One operation on the current stream of a device; the host may wait for its end."""
        with self.change:
            stream = self.current_stream(device)
            self._streams.add(stream)
            stream.count += 1
            merge(stream.clock, self.host)
            known = {**stream.clock, stream: stream.count}
            for block in reads:
                self._after(known, stream, block.writer, "reads what", "writes")
                block.readers[stream] = stream.count
            for block in writes:
                self._after(known, stream, block.writer, "writes what", "writes")
                for reader in block.readers.items():
                    self._after(known, stream, reader, "writes what", "reads")
                block.writer, block.readers = (stream, stream.count), {}
                block.unwritten = False
            if waits:
                merge(self.host, stream.now)

    def host_access(self, block: Block) -> None:
        """The host reads or writes pinned memory."""
        with self.change:
            for user in (*block.readers.items(), *([block.writer] if block.writer else [])):
                if self.host.get(user[0], 0) < user[1]:
                    self._race(f"the host touches a pinned buffer that {user[0]} still copies")

    def _after(
        self, known: Clock, stream: Stream, other: tuple[Stream, int] | None, does: str, did: str
    ) -> None:
        if other is not None and known.get(other[0], 0) < other[1]:
            self._race(f"{stream} {does} {other[0]} {did}, and waited for nothing")

    def _race(self, what: str) -> None:
        frames = [
            f"{frame.filename}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if "/resm_kernels/" in frame.filename or "/test_" in frame.filename
        ]
        self.races.append("\n  ".join([what, *frames[-8:]]))


machine = Machine()
