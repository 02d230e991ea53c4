"""Lanes: the way of a weight to a device and back; the CPU is the lane without a way.

A lane with a way reads files into a ring of host buffers (pinned, where that makes copies
asynchronous), copies them to the device on a stream of its own, merges there on one stream per
worker, and hands the result out through two more buffers. Without CUDA the same code runs on plain
memory and no streams.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from resm_kernels.checkpoint.files import PIECE
from resm_kernels.checkpoint.reader import HOST, Fill, Place
from resm_kernels.checkpoint.writer import tensor_bytes
from resm_kernels.engine.ledger import Account
from resm_kernels.engine.matching import Value
from resm_kernels.linalg import cusolver
from resm_kernels.ops.dtypes import chunks

LOG = logging.getLogger(__name__)

BUFFERS_IN, BUFFERS_OUT = 6, 2
"""Host buffers of a lane: one that fills and one that drains per reader, and two for results."""
STAGING = (BUFFERS_IN + BUFFERS_OUT) * PIECE
"""Host bytes of a lane's buffers."""
PREFETCH = 2
"""Weights read ahead of the workers."""

Mark = Any
"""A moment in a device's work that can be waited for; None where nothing is asynchronous."""


class Lane:
    """Merging where files are read to, on the CPU.

    Parameters
    ----------
    name : str
        For threads and messages.
    device : torch.device
    workers : int
        Weights merged at the same time.
    budget : int
        Most bytes of tensors at once.
    """

    staged = False
    """Whether there is a way, so that a weight may fail to fit."""

    def __init__(self, name: str, device: torch.device, workers: int, budget: int) -> None:
        self.name = name
        self.device = device
        self.workers = workers
        self.account = Account(budget, workers + PREFETCH, workers)
        self._limit = workers
        self._busy = 0
        self._change = threading.Condition()

    @property
    def place(self) -> Place:
        """Where tensors are read to."""
        return HOST

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around reads into `place`."""
        yield

    @contextlib.contextmanager
    def computing(self, ready: Mark, values: Iterable[Value]) -> Iterator[None]:
        """Around the merging of values that were read before the mark `ready`."""
        yield

    def mark(self) -> Mark:
        """The moment when all work is done that this context has begun."""
        return None

    def pieces(self, result: torch.Tensor, done: Mark) -> Iterator[memoryview]:
        """The bytes of a result that is there at the mark `done`, on the host, in order.

        A piece is valid until the next one is asked for. One thread at a time.
        """
        yield tensor_bytes(result)

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        """Around one attempt to merge; tells how many may go on at the same time."""
        with self._change:
            self._change.wait_for(lambda: self._busy < self._limit)
            self._busy += 1
            limit = self._limit
        try:
            yield limit
        finally:
            with self._change:
                self._busy -= 1
                self._change.notify_all()

    def narrow(self, limit: int) -> int:
        """Half of `limit` workers at the same time from now on, or fewer, and how many."""
        with self._change:
            self._limit = min(self._limit, max(1, limit // 2))
            return self._limit

    def trim(self) -> None:
        """Give back what an allocator only keeps."""

    def close(self) -> None:
        """Give back what is kept between weights; the run is over."""

    @property
    def peak(self) -> int:
        """Most bytes held on the device so far, measured."""
        return 0


class StagedLane(Lane):
    """A lane with a way: for a device, or in tests for the CPU in a device's place.

    Parameters
    ----------
    piece : int
        Bytes per buffer.
    """

    staged = True

    def __init__(
        self, name: str, device: torch.device, workers: int, budget: int, piece: int = PIECE
    ) -> None:
        super().__init__(name, device, workers, budget)
        self._piece = piece
        self._in: queue.SimpleQueue[tuple[torch.Tensor, Mark]] = queue.SimpleQueue()
        for _ in range(BUFFERS_IN):
            self._in.put((self._buffer(), None))
        self._out = [self._buffer() for _ in range(BUFFERS_OUT)]

    @property
    def place(self) -> Place:
        """The device's memory, through the ring."""
        return self

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def fill(self, data: torch.Tensor, fill: Fill) -> None:
        """Piece by piece: while one is copied to the device, the next is read."""
        for part in chunks(data.numel(), self._piece):
            buffer, copied = self._in.get()
            try:
                self._wait(copied)
                view = buffer[: part.stop - part.start]
                fill(view.numpy().data, part.start)
                data[part].copy_(view, non_blocking=True)
                copied = self.mark()
            finally:
                self._in.put((buffer, copied))

    def pieces(self, result: torch.Tensor, done: Mark) -> Iterator[memoryview]:
        """As in `Lane`: while one piece is written, the next is copied from the device."""

        def copied(i: int) -> tuple[torch.Tensor, Mark]:
            with self._leaving(done):
                view = self._out[i % BUFFERS_OUT][: parts[i].stop - parts[i].start]
                view.copy_(flat[parts[i]], non_blocking=True)
                return view, self.mark()

        with self._leaving(done):
            flat = result.contiguous().reshape(-1).view(torch.uint8)
        parts = [*chunks(flat.numel(), self._piece)]
        ahead = copied(0) if parts else None
        for i in range(1, len(parts) + 1):
            assert ahead is not None
            view, there = ahead
            ahead = copied(i) if i < len(parts) else None
            self._wait(there)
            yield view.numpy().data

    @property
    def peak(self) -> int:
        """What was admitted at most: nobody else measures a memory that is not one."""
        return self.account.most

    def _buffer(self) -> torch.Tensor:
        return torch.empty(self._piece, dtype=torch.uint8)

    def _wait(self, mark: Mark) -> None:
        """Wait on the host."""

    @contextlib.contextmanager
    def _leaving(self, done: Mark) -> Iterator[None]:
        """Around copies of a result that is there at the mark."""
        yield


class CudaLane(StagedLane):
    """A CUDA device: pinned buffers, a stream in, a stream out, and a stream per worker.

    Library handles are torch's, one per thread; each stream keeps a cuBLAS workspace.
    """

    _pins = True

    def __init__(self, name: str, device: torch.device, workers: int, budget: int) -> None:
        super().__init__(name, device, workers, budget)
        self._stream_in, self._stream_out = self._stream(), self._stream()
        self._own = threading.local()
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _buffer(self) -> torch.Tensor:
        if self._pins:
            try:
                return torch.empty(self._piece, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                LOG.warning("%s: host memory cannot be pinned: %s", self.name, error)
                self._pins = False
        return super()._buffer()

    @contextlib.contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        # The run's own threads: left on another device, torch would make a context there.
        torch.cuda.set_device(self.device)
        with torch.cuda.stream(stream):
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """As in `Lane`."""
        with self._on(self._stream_in):
            yield

    @contextlib.contextmanager
    def computing(self, ready: Mark, values: Iterable[Value]) -> Iterator[None]:
        """As in `Lane`."""
        if not hasattr(self._own, "stream"):
            self._own.stream = self._stream()
        stream = self._own.stream
        stream.wait_event(ready)
        for value in values:
            held = (value,) if isinstance(value, torch.Tensor) else (value.left, value.right)
            for tensor in held:
                tensor.record_stream(stream)
        with self._on(stream):
            yield

    def mark(self) -> Mark:
        """An event of the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _wait(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    @contextlib.contextmanager
    def _leaving(self, done: Mark) -> Iterator[None]:
        self._stream_out.wait_event(done)
        with self._on(self._stream_out):
            yield

    def trim(self) -> None:
        """Give back the workspace of idle solvers and the caching allocator's free blocks."""
        cusolver.release()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """As in `Lane`: the threads of experts, and their solvers, outlive a run."""
        cusolver.release()

    @property
    def peak(self) -> int:
        """The caching allocator's figure."""
        return int(torch.cuda.max_memory_allocated(self.device) - self._before)
