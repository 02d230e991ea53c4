"""How fast this machine reads, merges and writes: measured on request, kept in the user's cache."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resm_kernels import __version__
from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.files import seal, unseal, write_file, writing
from resm_kernels.checkpoint.layout import read_safetensors_header
from resm_kernels.checkpoint.reader import read_tensor
from resm_kernels.checkpoint.writer import ShardFile, lay_out_shards
from resm_kernels.engine.options import EngineOptions, usable_cores
from resm_kernels.engine.pipeline import run_plan
from resm_kernels.engine.planning import make_plan
from resm_kernels.errors import VerificationError
from resm_kernels.linalg import Work, measured_rates
from resm_kernels.methods import METHODS, Inputs, Method, merge_weight
from resm_kernels.ops.dtypes import is_finite
from resm_kernels.recipe import build_recipe

MOST_CORES = 8
"""Most cores that are kept busy while measuring."""
DISK_BYTES = 256 << 20
SIDE = 1024
"""Side of the matrices that are factored."""
ENTRIES = 1 << 22
"""Entries of the weight that element-wise methods merge."""
EXPERTS = 3
LEAST, MOST = 1e-40, 1e40
"""Rates and paces beyond these are none, and would overflow."""
DAY = "%Y-%m-%d"
FEW, MANY = 100, 400
"""Tensors of the merges that have nothing but overhead."""


@dataclass(frozen=True)
class Pace:
    """Seconds per byte of a stage: on the clock of the wall, and of the processor."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Rates:
    """What was measured, with `cores` cores busy and one BLAS thread on each.

    Attributes
    ----------
    read : Pace
        Reading what is not in the page cache.
    write, finish : Pace
        Writing and hashing a shard; syncing, reading back and comparing it.
    work : Work
        Operations per second of one worker, by kind.
    entries : mapping
        Entries of experts per second of one worker, by element-wise method.
    tensor_seconds : float
        What every tensor takes beside all that.
    cores : int
    machine : str
        Processor and versions: rates of another one are not used.
    day : str
        When they were measured.
    """

    read: Pace
    write: Pace
    finish: Pace
    work: Work
    entries: Mapping[str, float]
    tensor_seconds: float
    cores: int
    machine: str
    day: str

    def to_dict(self) -> dict[str, Any]:
        """The rates as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Rates:
        """Read what `to_dict` and a round through JSON made of rates.

        Raises
        ------
        ValueError
            Where they are not rates.
        """
        try:
            values = dict(content)
            numbers = {**values["entries"], **values["work"], "": values["tensor_seconds"]}
            for stage in ("read", "write", "finish"):
                numbers |= {f"{stage} {name}": value for name, value in values[stage].items()}
                values[stage] = Pace(**values[stage])
            sane = all(isinstance(n, float) and LEAST <= n <= MOST for n in numbers.values())
            cores = type(values["cores"]) is int and 1 <= values["cores"] <= MOST
            if not (sane and cores and {*ELEMENT_WISE} <= {*values["entries"]}):
                raise ValueError("not the rates of a machine")
            time.strptime(values["day"], DAY)
            values["work"] = Work(**values["work"])
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not the rates of a machine: {error}") from error


ELEMENT_WISE = tuple(name for name, method in METHODS.items() if method.work is None)


def rates_file() -> Path:
    """Where the rates of this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "resm-kernels" / "rates.json"


def machine() -> str:
    """What rates depend on: processor, cores, versions of this package and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    versions = f"resm-kernels {__version__}, torch {torch.__version__}"
    return f"{processor}, {usable_cores()} cores, {versions}"


def load_rates() -> Rates | None:
    """The rates kept for this machine; None where there are none, or those of another one."""
    try:
        rates = Rates.from_dict(unseal(rates_file()))
    except (VerificationError, ValueError):
        return None
    return rates if rates.machine == machine() else None


def save_rates(rates: Rates) -> Path:
    """Keep rates for `load_rates`; OutputError where the cache cannot be written."""
    path = rates_file()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, seal(rates.to_dict()))
    return path


def measure_rates(folder: Path) -> Rates:
    """Measure this machine, on the disk of `folder`; about ten seconds, 256 MiB for the while.

    Raises
    ------
    OutputError
        Where the folder cannot be written.
    """
    with writing(folder), tempfile.TemporaryDirectory(prefix=".resm-measure-", dir=folder) as name:
        read, write, finish = _disk(Path(name))
        few, many = (_seconds_of_small(Path(name) / str(n), n) for n in (FEW, MANY))
    threads = torch.get_num_threads()
    cores = min(usable_cores(), MOST_CORES)
    try:
        with ThreadPoolExecutor(cores) as pool:
            works = [*pool.map(_factoring, range(cores))]
            passes = [*pool.map(_passing, range(cores))]
    finally:
        torch.set_num_threads(threads)
    return Rates(
        read=read,
        write=write,
        finish=finish,
        work=Work(*map(_mean, zip(*map(dataclasses.astuple, works), strict=True))),
        entries={name: _mean([found[name] for found in passes]) for name in ELEMENT_WISE},
        tensor_seconds=max(many - few, 1e-3) / (MANY - FEW),
        cores=usable_cores(),
        machine=machine(),
        day=time.strftime(DAY),
    )


def _mean(rates: Sequence[float]) -> float:
    """Of rates: over their inverses."""
    return len(rates) / math.fsum(1.0 / rate for rate in rates)


def _factoring(_: int) -> Work:
    torch.set_num_threads(1)
    return measured_rates(SIDE)


def _passing(_: int) -> dict[str, float]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(EXPERTS + 1, ENTRIES, generator=generator).mul_(0.02).bfloat16()
    base, *experts = sizes.view(EXPERTS + 1, -1, SIDE)
    return {name: _entries(METHODS[name], base, experts) for name in ELEMENT_WISE}


def _entries(method: Method[Any], base: torch.Tensor, experts: list[torch.Tensor]) -> float:
    """Entries of experts per second, the search for NaN and Inf included."""
    given = experts[: method.experts[1] or len(experts)]
    halved = {"density": 0.5} if "density" in method.specs else {}
    options = method.make_options(halved, len(given))

    def run() -> None:
        for tensor in (base, *given):
            is_finite(tensor)
        inputs = Inputs("w", base, given)
        is_finite(merge_weight(method, inputs, [1.0] * len(given), options, base.dtype).tensor)

    return len(given) * base.numel() / _timed(run)[0]


def _timed(run: Callable[[], object], times: int = 2) -> tuple[float, float]:
    """The least of several times: seconds of the wall and of this thread's processor."""
    found = []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.thread_time()
        run()
        found.append((time.perf_counter() - wall, time.thread_time() - cpu))
    return min(found)


def _disk(folder: Path) -> tuple[Pace, Pace, Pace]:
    """The paces of reading, writing and finishing one shard."""
    data = torch.randint(256, (DISK_BYTES,), dtype=torch.uint8)
    (layout,) = lay_out_shards([("w", DTYPES["U8"], (DISK_BYTES,))], DISK_BYTES)
    (slot,) = layout.slots
    shard = ShardFile(folder, layout)
    try:
        write = _timed(lambda: shard.write(slot, data), times=1)
        finish = _timed(shard.finish, times=1)
    finally:
        shard.close()
    file = read_safetensors_header(folder / layout.name)
    with open(file.path, "rb") as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read = _timed(lambda: read_tensor(file, file.tensors["w"]), times=1)
    each = [Pace(wall / DISK_BYTES, cpu / DISK_BYTES) for wall, cpu in (read, write, finish)]
    return each[0], each[1], each[2]


def _seconds_of_small(folder: Path, count: int) -> float:
    """Seconds of merging so many tensors of a few entries."""
    tensors = [(f"layers.{i}.weight", DTYPES["BF16"], (8,)) for i in range(count)]
    (layout,) = lay_out_shards(tensors, DISK_BYTES)
    for model in ("base", "expert"):
        (folder / model).mkdir(parents=True)
        zeros = bytes(layout.size - len(layout.header))
        (folder / model / layout.name).write_bytes(layout.header + zeros)
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "expert")}],
    }
    plan = make_plan(build_recipe(content, "measure"), EngineOptions())
    start = time.perf_counter()
    run_plan(plan, folder / "merged")
    return time.perf_counter() - start
