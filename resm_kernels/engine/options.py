"""How a merge is carried out, apart from what is merged."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from resm_kernels.errors import UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{prefix}I": 1 << (10 * i) for i, prefix in enumerate("KMGT", start=1)}
MAX_PATTERNS = 1000


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine; none changes the mathematics.

    Attributes
    ----------
    device : str
        `cpu`, `cuda`, `cuda:1`, `cuda:0,cuda:1`, `all` CUDA devices, or `auto`: a CUDA device where
        there is one. The CPU is the default while nothing has been measured on a GPU.
    workers : int or None
        Weights merged at the same time, on each device; None is one per core on a CPU and two on a
        GPU, fewer where memory holds fewer.
    threads : int
        BLAS threads per worker. Part of the plan: sums round differently with another count.
    memory_budget : int or None
        Most bytes of tensors in memory at once; None is 60 % of what is available.
    gpu_memory : int or None
        The same on each GPU; None is 85 % of what is free.
    shard_size : int
        Most bytes of tensors per output shard.
    nonfinite : str
        `error` stops at a NaN or Inf; `warn` keeps the base's value there and says so.
    allow_missing : bool
        Copy a tensor from the base where an expert lacks it.
    allow_extra : bool
        Leave out, by name, tensors that the base lacks.
    only : tuple of str
        Merge just the tensors whose whole name one of these shell-style patterns matches, as
        `exclude` does. The output then is a part of the merge and no model.
    """

    device: str = "cpu"
    workers: int | None = None
    threads: int = 1
    memory_budget: int | None = None
    gpu_memory: int | None = None
    shard_size: int = 5 * 10**9
    nonfinite: Literal["error", "warn"] = "error"
    allow_missing: bool = False
    allow_extra: bool = False
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, most in (
            ("workers", 1024),
            ("threads", 256),
            ("memory_budget", 1 << 62),
            ("gpu_memory", 1 << 62),
            ("shard_size", 1 << 62),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
                raise UsageError(f"{name}: got {value!r}, expected a whole number from 1 to {most}")
        if len(self.only) > MAX_PATTERNS or not all(isinstance(p, str) and p for p in self.only):
            raise UsageError(
                f"only: got {self.only!r:.200}",
                expected=f"up to {MAX_PATTERNS} patterns of tensor names, such as *.layers.40.*",
            )
        if self.nonfinite not in ("error", "warn"):
            raise UsageError(f"nonfinite: got {self.nonfinite!r}, expected error or warn")


def parse_size(text: str | int) -> int:
    """Bytes from `5GB`, `512MiB`, `2.5G` or a plain number; UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    size = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else 0.0
    if not 1 <= size < 1 << 62:
        raise UsageError(f"got size {text!r}", expected="a number of bytes such as 5GB or 512MiB")
    return int(size)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
