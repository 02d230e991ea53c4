"""Lanes on the CPU that pose as devices, and run the code that devices run."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import resm_kernels
from resm_kernels import api
from resm_kernels.engine import flow
from resm_kernels.engine.lanes import StagedLane
from resm_kernels.engine.result import MergeReport

PIECE = 1000
"""Bytes per buffer: no multiple of a row, so that every weight comes and goes in pieces."""
PLENTY = 1 << 40

Act = Callable[["PosingLane"], None]
"""Told before every attempt to merge."""


class PosingLane(StagedLane):
    """The CPU in a device's place."""

    def __init__(
        self, name: str, workers: int = 2, budget: int = PLENTY, act: Act | None = None
    ) -> None:
        super().__init__(name, torch.device("cpu"), workers, budget, PIECE)
        self._act = act or (lambda lane: None)
        self._count = threading.Lock()
        self.attempts = self.trims = self.together = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        with super().turn() as limit:
            with self._count:
                self.attempts += 1
                self.together += 1
            try:
                self._act(self)
                yield limit
            finally:
                with self._count:
                    self.together -= 1

    def trim(self) -> None:
        self.trims += 1


def out_of_memory(*given: Any) -> Any:
    """What CUDA's allocator raises."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def merge_on(
    lanes: Sequence[PosingLane],
    base: Path,
    experts: Sequence[Path],
    output: Path,
    method: str = "resm",
    *,
    device_memory: int = PLENTY,
    resume: bool = False,
    **options: Any,
) -> MergeReport:
    """Merge on lanes that pose as the devices of the plan."""
    made = resm_kernels.plan(base, experts, method, **options)
    made = dataclasses.replace(made, device_memory=device_memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "device_lanes", lambda plan: [*lanes])
        return api.execute(made, output, resume=resume)
