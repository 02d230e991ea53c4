"""Rows that are on disk before and after every case, inside a budget of time."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


class TooLong(Exception):
    """A case that would not fit the time left to its part."""


class Unavailable(Exception):
    """A piece that this torch, or this device, does not have."""


class Wrong(Exception):
    """A result outside its contract."""


class Suite:
    """Keeps rows on disk while it measures them, inside a budget.

    A row's `status` is ok, fail (outside the contract), error, skipped, unavailable or running.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.rows = folder, device, list[Row]()
        self._start, self._ends = time.perf_counter(), dict[str, float]()
        self.about, self.pace = describe(device), dict[str, float]()

    @property
    def elapsed(self) -> float:
        """Seconds since the suite began."""
        return time.perf_counter() - self._start

    def allot(self, seconds: float, parts: dict[str, float]) -> None:
        """From now on, a part has until this share of so many seconds is over."""
        self._ends |= {part: self.elapsed + share * seconds for part, share in parts.items()}

    def left(self, row: Row) -> float:
        """Seconds left to a row's part."""
        return self._ends[row["part"]] - self.elapsed

    @contextlib.contextmanager
    def case(self, part: str, name: str, **labels: object) -> Iterator[Row]:
        """One row, whatever happens to the code that fills it."""
        row: Row = {"part": part, "name": name, **labels, "status": "running"}
        self.rows.append(row)
        self.save()
        try:
            yield row
            row["status"] = "ok" if row["status"] == "running" else row["status"]
        except TooLong as error:
            row |= {"status": "skipped", "note": str(error)}
        except Wrong as error:
            row |= {"status": "fail", "note": str(error)}
        except (Unavailable, NotImplementedError) as error:  # torch raises the second itself
            row |= {"status": "unavailable", "note": f"not available ({error}".split(". ")[0] + ")"}
        except Exception as error:
            row |= {"status": "error", "note": first_line(error)}
        self.save()

    def once(self, run: Callable[..., Any], *given: Any) -> tuple[float, Any]:
        """Seconds of one run by the device's clock, and its result."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            result = run(*given)
            return time.perf_counter() - start, result
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        result = run(*given)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000, result

    def reload(self) -> None:
        """Take the rows on disk for one's own: those of an earlier process."""
        self.rows = json.loads((self.folder / "gpu.json").read_text())["rows"]

    def save(self) -> None:
        """Write everything so far; the file is whole at any time."""
        file = self.folder / "gpu.json"
        content = {**self.about, "seconds": self.elapsed, "rows": self.rows}
        beside = file.with_suffix(".partial")
        beside.write_text(json.dumps(content, indent=1))
        beside.replace(file)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def describe(device: torch.device) -> Row:
    """The machine, the versions and the commit."""
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "numpy", "scipy", "threadpoolctl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine: Row = {"system": platform.platform(), "cores": os.cpu_count()}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine |= {"gpu": found.name, "gpu_bytes": found.total_memory}
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    except OSError:
        commit = None
    return {"machine": machine, "versions": versions, "commit": commit}


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Error in the Frobenius norm."""
    return float((found - reference).norm() / reference.norm())
