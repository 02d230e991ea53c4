"""Merges from disk to disk at full size, against the plan, the disk and the published route.

One decoder layer of an 8B model, whole, and one weight of each shape of a 70B layer; three experts
whose changes are a power law on a flat tail, made on the device. A method is timed only where it
agrees with the CPU. What a whole model would take is extrapolated, and says from what.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import safe_open

import resm_kernels
from benchmarks.giants import EXPERTS, Giant, llama, write_family
from benchmarks.gpu.factorisations import RATES, Shape
from benchmarks.gpu.suite import Row, Suite, TooLong, Unavailable, Wrong
from benchmarks.spectral import fusion_bench_merge
from resm_kernels.checkpoint.files import PIECE
from resm_kernels.checkpoint.writer import Slot
from resm_kernels.engine.flow import READERS_TO_DEVICES
from resm_kernels.engine.result import MergeReport
from resm_kernels.linalg import Solver, SolverOptions, Work
from resm_kernels.linalg.solver import FULL_RANK_TOLERANCE
from resm_kernels.methods import find_method
from tests.oracle import textbook

PARTS = {"set up": 0.3, "end to end": 0.58, "published": 0.66, "workers": 0.81, "larger": 1.0}
"""Share of the budget by whose end a part has to be done; time left over goes to the next."""
METHODS = ("ties", "tsvm", "resm")
TIMED = "tsvm"
"""The method whose workers are varied, and which the published route is."""
WORKERS = (1, 2, 3)
LAYER, SMALL, LARGE = ("model.layers.*",), ("*.[qkv]_proj.*",), ("*_proj.*",)
"""Patterns: a whole layer; what is cheap to factor, and goes first; all that is written."""
TABLE, NORM, CHECKED = "model.embed_tokens.weight", "*.input_layernorm.*", "*.k_proj.*"
DISAGREEMENT = 2 * FULL_RANK_TOLERANCE
"""Most that a float32 merge may differ from the CPU's, over the merged change: the error that the
CPU's route allows each of two polar factors. TIES has to be the same to the bit."""
THREADS = 8
"""Of the CPU's merge beside a GPU's."""
BYTES_PER_SECOND = 1e9
"""Of a disk, before it is measured."""
READ_BYTES, WRITE_BYTES = 1 << 30, 1 << 28
"""The most that is read, and what is written, to measure the disk."""
CHANGE, DIRECTIONS, DECAY, TAIL = 2e-3, 256, -0.8, 0.5
"""Root mean square of a change beside weights of 0.02; directions of its power law and their
exponent; share of its energy in the flat tail."""


Route = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Float32 deltas of one weight to the merged one."""


@dataclass(frozen=True)
class Model:
    """A model of which one layer, or a part of it, is merged.

    Attributes
    ----------
    layers, hidden, inner, heads, vocabulary : int
        Of the whole model.
    rows : int
        Rows of a vocabulary table that are written; 0 for none.
    left_out : tuple of str
        Patterns of what is not written: weights of the same shape, or its transpose.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    rows: int
    left_out: tuple[str, ...] = ()

    @property
    def layer(self) -> Mapping[str, Shape]:
        """The matrices of one layer."""
        return {n: (s[0], s[1]) for n, s in self._one.shapes.items() if fnmatchcase(n, "*_proj.*")}

    @property
    def written(self) -> Giant:
        """What is on disk."""
        gone = (*self.left_out, "lm_head.*", "model.norm.*", *(() if self.rows else (TABLE,)))
        kept = {
            name: shape
            for name, shape in self._one.shapes.items()
            if not any(fnmatchcase(name, pattern) for pattern in gone)
        }
        return Giant(kept, self._one.config)

    @property
    def _one(self) -> Giant:
        return llama(1, self.hidden, self.inner, self.heads, 8, self.rows)

    def bytes_of(self, shapes: Iterable[Sequence[int]]) -> int:
        """Read and written for bfloat16 tensors of these shapes."""
        return 2 * (EXPERTS + 2) * sum(map(math.prod, shapes))


MODELS = (
    Model("Llama-3-8B", 32, 4096, 14336, 32, 128256, 16032),
    Model("Llama-3-70B", 80, 8192, 28672, 64, 128256, 0, ("*.o_proj.*", "*.up_proj.*",
                                                         "*.gate_proj.*")),
)  # fmt: skip
QUICK = (
    Model("tiny", 2, 128, 160, 16, 400, 100),
    Model("small", 3, 192, 256, 16, 400, 0, ("*.o_proj.*", "*.up_proj.*", "*.gate_proj.*")),
)


@dataclass
class Place:
    """A model's files, and what was measured about merging them.

    Attributes
    ----------
    read, write : float
        Bytes per second of the disk.
    start : float
        Seconds of a merge of one norm.
    agreed : set of str
        Methods that agree with the CPU.
    table_rate : float or None
        Bytes read and written per second of a merge of a vocabulary table, past its start.
    """

    model: Model
    folder: Path
    models: Sequence[Path]
    read: float = BYTES_PER_SECOND
    write: float = BYTES_PER_SECOND
    start: float = 0.0
    agreed: frozenset[str] = frozenset()
    table_rate: float | None = None

    @property
    def files(self) -> list[Path]:
        """All inputs' data."""
        return [file for model in self.models for file in sorted(model.glob("*.safetensors"))]


def measure(suite: Suite, seconds: float, quick: bool) -> None:
    """Everything from disk to disk, in so many seconds."""
    suite.allot(seconds, PARTS)
    model, larger = QUICK if quick else MODELS
    with tempfile.TemporaryDirectory() as name:
        place = prepare(suite, "set up", model, Path(name))
        if place is None:
            return
        measure_disk(suite, place)
        check_methods(suite, place)
        measure_start(suite, place)
        merge_case(suite, "end to end", place, TIMED, SMALL)
        rows = {m: merge_case(suite, "end to end", place, m, LAYER) for m in METHODS}
        time_published(suite, model, rows[TIMED])
        time_workers(suite, place, rows[TIMED])
        shutil.rmtree(place.folder)
        other = prepare(suite, "larger", larger, Path(name))
        if other is not None:
            measured = dataclasses.replace(
                place, model=other.model, folder=other.folder, models=other.models
            )
            for method, only in (("ties", LARGE), ("resm", SMALL), ("tsvm", SMALL),
                                 ("resm", LARGE), ("tsvm", LARGE)):  # fmt: skip
                merge_case(suite, "larger", measured, method, only)


# Before anything is timed


def prepare(suite: Suite, part: str, model: Model, folder: Path) -> Place | None:
    """Write a base and experts; None where that cannot be."""
    size = 2 * (EXPERTS + 1) * sum(map(math.prod, model.written.shapes.values()))
    with suite.case(part, "inputs", model=model.name, bytes=size) as row:
        expect_time(suite, row, size / BYTES_PER_SECOND, "inputs")
        if (free := shutil.disk_usage(folder).free) < 2 * size:
            raise Unavailable(f"{free / 1e9:.0f} GB free on {folder.anchor}")
        start = time.perf_counter()

        def make(slot: Slot, which: int) -> torch.Tensor:
            return values(slot.name, slot.shape, which, suite.device).cpu()

        models = write_family(folder / model.name, model.written, ("*",), make)
        place = Place(model, folder / model.name, models)
        cool(place.files)
        finish_time(suite, row, time.perf_counter() - start, "inputs")
        row["gbps"] = size / row["seconds"] / 1e9
        empty_cache(suite)
        return place
    return None


def values(name: str, shape: Sequence[int], which: int, device: torch.device) -> torch.Tensor:
    """Gaussian weights; experts add a power law of random directions and a flat tail."""

    def gaussian(seed: int, *sizes: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)
        return torch.randn(sizes, generator=generator, device=device)

    tensor = gaussian(0, *shape).mul_(0.02)
    if which:
        tensor.add_(gaussian(which, *shape), alpha=CHANGE * math.sqrt(TAIL))
        if len(shape) == 2:
            m, n = shape
            falling = torch.arange(1, min(m, n, DIRECTIONS) + 1, device=device) ** DECAY
            falling *= CHANGE * math.sqrt(1 - TAIL) / falling.norm()
            left = gaussian(which + EXPERTS, m, len(falling))
            right = gaussian(which + 2 * EXPERTS, n, len(falling))
            tensor.addmm_(left * falling, right.T)
    return tensor.bfloat16()


def cool(files: Iterable[Path]) -> None:
    """Out of the page cache, as far as the system lets go."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty_cache(suite: Suite) -> None:
    if suite.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_disk(suite: Suite, place: Place) -> None:
    """Bytes per second of reading inputs by as many threads as a merge has, and of writing."""
    with suite.case("set up", "disk") as row:
        cool(place.files)
        pieces = [(f, at) for f in place.files for at in range(0, f.stat().st_size, PIECE)]
        pieces = pieces[: READ_BYTES // PIECE]
        shares = [pieces[i::READERS_TO_DEVICES] for i in range(READERS_TO_DEVICES)]
        start = time.perf_counter()
        with ThreadPoolExecutor(READERS_TO_DEVICES) as pool:
            count = sum(pool.map(read_pieces, shares))
        place.read = count / (time.perf_counter() - start)
        block, path = os.urandom(PIECE), place.folder / "written"
        start = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(WRITE_BYTES // PIECE):
                file.write(block)
            os.fsync(file.fileno())
        place.write = WRITE_BYTES / (time.perf_counter() - start)
        path.unlink()
        row |= {"read_gbps": place.read / 1e9, "write_gbps": place.write / 1e9}
        row["note"] = f"{READERS_TO_DEVICES} threads read, one writes and syncs"


def read_pieces(pieces: Iterable[tuple[Path, int]]) -> int:
    """Bytes read from these places."""
    buffer, count = bytearray(PIECE), 0
    for file, start in pieces:
        with open(file, "rb", buffering=0) as opened:
            count += os.preadv(opened.fileno(), [buffer], start)
    return count


def check_methods(suite: Suite, place: Place) -> None:
    """Each method on one weight, here and on the CPU, in float32."""
    for method in METHODS:
        with suite.case("set up", "agrees", method=method) as row:
            # The first of a kind also loads what it needs: no pace for the other kind.
            key = f"agrees {kind_of(method)}"
            expect_time(suite, row, nominal(place, method, [CHECKED], "cpu"), key)
            start = time.perf_counter()
            found = merged(place, method, suite.device.type, 1)
            expected = merged(place, method, "cpu", 1 if suite.device.type == "cpu" else THREADS)
            finish_time(suite, row, time.perf_counter() - start, key)
            (name,) = found.keys()
            with safe_open(next(place.models[0].glob("*.safetensors")), "pt") as file:
                base = file.get_tensor(name).float()
            off = (found[name] - expected[name]).norm() / (expected[name] - base).norm()
            row["error"], row["limit"] = float(off), 0.0 if method == "ties" else DISAGREEMENT
            if not row["error"] <= row["limit"]:
                raise Wrong(f"differs from the CPU by {off:.1e}")
            place.agreed |= {method}


def merged(place: Place, method: str, device: str, threads: int) -> dict[str, torch.Tensor]:
    """One weight, merged in float32."""
    out, found = place.folder / "out", dict[str, torch.Tensor]()
    try:
        resm_kernels.merge(
            place.models[0], place.models[1:], out, method, device=device, only=[CHECKED],
            threads=threads, out_dtype="float32", no_report=True,
        )  # fmt: skip
        for shard in out.glob("*.safetensors"):
            with safe_open(shard, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return found


def measure_start(suite: Suite, place: Place) -> None:
    """What a merge takes before and after its weights, and how fast a vocabulary table goes."""
    with suite.case("set up", "start") as row:
        row["seconds"] = place.start = statistics.median(
            run_merge(suite, place, "linear", [NORM])[0] for _ in range(3)
        )
        row["note"] = "a merge of one norm: plan, buffers, reports, syncs"
    with suite.case("set up", "table", model=place.model.name) as row:
        shape = place.model.written.shapes[TABLE]
        moved = place.model.bytes_of([shape])
        expect_time(suite, row, moved / place.read, "table")
        seconds, report = run_merge(suite, place, TIMED, [TABLE])
        place.table_rate = moved / max(seconds - place.start, 1e-3)
        row |= {"seconds": seconds, "shape": shape, "gbps": place.table_rate / 1e9}
        row["rule"] = next(iter(report.tensors.values())).rule


# Merges


def run_merge(
    suite: Suite, place: Place, method: str, only: Sequence[str], workers: int | None = None
) -> tuple[float, MergeReport]:
    """Seconds from the call to its end, inputs cold, and the report."""
    out = place.folder / "out"
    cool(place.files)
    try:
        start = time.perf_counter()
        report = resm_kernels.merge(
            place.models[0], place.models[1:], out, method, device=suite.device.type,
            workers=workers, only=only,
        )  # fmt: skip
        return time.perf_counter() - start, report
    finally:
        shutil.rmtree(out, ignore_errors=True)
        empty_cache(suite)


def merge_case(
    suite: Suite,
    part: str,
    place: Place,
    method: str,
    only: Sequence[str],
    workers: int | None = None,
) -> Row:
    """One merge: time, pace, stages, memory, and what it says of the whole model."""
    model = place.model
    labels = {"model": model.name, "method": method, "only": " ".join(only)}
    with suite.case(part, f"{model.name} {method}", **labels) as row:
        if method not in place.agreed:
            raise Unavailable(f"{method} does not agree with the CPU, or was not compared")
        guess = nominal(place, method, only, suite.device.type)
        expect_time(suite, row, guess, kind_of(method))
        seconds, report = run_merge(suite, place, method, only, workers)
        finish_time(suite, row, seconds, kind_of(method))
        floor = max(report.read_bytes / place.read, report.written_bytes / place.write)
        row |= {
            "workers": report.workers,
            "weights": len(report.tensors),
            "read_gbps": report.read_bytes / seconds / 1e9,
            "write_gbps": report.written_bytes / seconds / 1e9,
            "disk_floor_seconds": floor,
            "disk_floor_share": floor / seconds,
            "busy": busy_shares(report),
            "stage_seconds": report.stage_seconds,
            "host_peak_bytes": report.peak_memory,
            "host_planned_bytes": report.predicted_memory,
            "device_peak_bytes": max(report.peak_device_memory.values(), default=None),
            "device_planned_bytes": report.predicted_device_memory or None,
            "weight_seconds": {n: round(r.seconds, 4) for n, r in report.tensors.items()},
            "backends": sorted({b for r in report.tensors.values() for b in r.backends}),
            "notes": {n: list(notes) for n, notes in report.all_notes.items()},
        }
        extrapolate(row, place, guess, suite.device.type)
    return row


def busy_shares(report: MergeReport) -> dict[str, float]:
    """The share of the run in which at least one thread of a stage was at work."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for track, edges in report.timeline.items():
        pairs = zip(edges[::2], edges[1::2], strict=True)
        spans.setdefault(track.partition(" ")[0], []).extend(pairs)
    shares = {}
    for stage, found in spans.items():
        total, end = 0.0, 0.0
        for start, stop in sorted(found):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        shares[stage] = round(total / report.seconds, 3)
    return shares


def extrapolate(row: Row, place: Place, guess: float, device: str) -> None:
    """Seconds of the whole model: more than its parts, which wait for each other at their ends."""
    model = place.model
    layer = list(model.layer.values())
    ratio = nominal_of(place, row["method"], layer, device) / guess
    row["layer_seconds"] = max(0.0, row["seconds"] - place.start) * ratio
    tables = [(model.vocabulary, model.hidden)] * 2
    moved = model.bytes_of([*layer * model.layers, *tables])
    row["model_floor_seconds"] = (
        moved / (EXPERTS + 2) * max((EXPERTS + 1) / place.read, 1 / place.write)
    )
    if place.table_rate is None:
        return
    table_seconds = model.bytes_of(tables) / place.table_rate
    row["model_seconds"] = place.start + model.layers * row["layer_seconds"] + table_seconds
    scaled = f" x {ratio:.2f} by operations or bytes, to a whole layer" if ratio != 1 else ""
    row["assumes"] = (
        f"start {place.start:.2f} s + {model.layers} layers x (seconds - start){scaled} + 2 tables "
        f"of {model.vocabulary} x {model.hidden} at {place.table_rate / 1e9:.2f} GB/s read and "
        "written; norms are nothing; every layer pays for the finish of a shard, and no layer "
        "overlaps the next"
    )


def nominal(place: Place, method: str, only: Sequence[str], device: str) -> float:
    """Seconds of merging what the patterns match, at guessed rates and the disk's."""
    shapes = [
        shape
        for name, shape in place.model.written.shapes.items()
        if any(fnmatchcase(name, pattern) for pattern in only)
    ]
    return nominal_of(place, method, shapes, device)


def nominal_of(place: Place, method: str, shapes: Iterable[Sequence[int]], device: str) -> float:
    found, work = find_method(method), Work()
    matrices = [tuple(shape) for shape in shapes if len(shape) == 2]
    if found.work is not None:
        options = found.make_options({}, EXPERTS)
        for shape in matrices:
            work += found.work(shape, EXPERTS, None, 4, options, device)
    return max(work.seconds(RATES[device]), place.model.bytes_of(matrices) / place.read)


def kind_of(method: str) -> str:
    """What shares a pace: what the guess is off by is about the same for all spectral methods."""
    return "element-wise" if find_method(method).work is None else "spectral"


def expect_time(suite: Suite, row: Row, guess: float, key: str) -> None:
    """TooLong where a case is not expected to fit: its guess times what the last one was off by."""
    row["guess"] = guess
    row["predicted_seconds"] = guess * suite.pace.get(key, 1.0)
    left = suite.left(row)
    if row["predicted_seconds"] > left:
        raise TooLong(
            f"about {row['predicted_seconds']:.1f} s, but {max(left, 0):.1f} s left to "
            f"{row['part']}"
        )


def finish_time(suite: Suite, row: Row, seconds: float, key: str) -> None:
    row["seconds"] = seconds
    suite.pace[key] = seconds / row["guess"]


def time_workers(suite: Suite, place: Place, default: Row) -> None:
    """One layer with other numbers of workers than the default."""
    found = {default["workers"]: default} if "workers" in default else dict[int, Row]()
    for workers in WORKERS:
        if workers not in found:
            row = merge_case(suite, "workers", place, TIMED, LAYER, workers)
            row["workers"] = workers
            found[workers] = row
    with suite.case("workers", "best", method=TIMED) as row:
        times = {w: r["seconds"] for w, r in found.items() if "seconds" in r}
        if len(times) < 2:
            raise TooLong("fewer than two numbers of workers were measured")
        row |= {"times": times, "workers": min(times, key=times.__getitem__)}


# What is published


def time_published(suite: Suite, model: Model, ours: Row) -> None:
    """Five float32 SVDs on the device, a weight of each shape, deltas given; and FusionBench."""
    counts: dict[Shape, int] = {}
    mine: dict[Shape, list[float]] = {}
    for name, shape in model.layer.items():
        counts[shape] = counts.get(shape, 0) + 1
        if name in ours.get("weight_seconds", {}):
            mine.setdefault(shape, []).append(ours["weight_seconds"][name])
    plans = {s: published_seconds(s, suite.device.type) for s in counts}
    peers: dict[str, Route] = {"published": published}
    with suite.case("published", "fusion-bench") as row:
        if (peer := fusion_bench_merge()) is None:
            raise Unavailable("fusion_bench is not installed")
        peers["fusion-bench"] = peer
    taken: dict[str, dict[Shape, float]] = {name: {} for name in peers}
    for shape in sorted(counts, key=lambda s: plans[s]):
        for name, run in peers.items():
            with suite.case("published", name, model=model.name, shape=shape) as row:
                expect_time(suite, row, plans[shape], "published")
                seconds = time_route(suite, row, run, make_deltas(shape, suite.device))
                finish_time(suite, row, seconds, "published")
                taken[name][shape] = seconds
                if shape in mine:
                    row["ours_seconds"] = statistics.median(mine[shape])
                    row["ratio"] = seconds / row["ours_seconds"]
            empty_cache(suite)
    for name, found in taken.items():
        with suite.case("published", f"{name}, layer", model=model.name) as row:
            if not found:
                raise Unavailable("no weight of it was measured")
            largest = max(found, key=plans.__getitem__)
            missing = [shape for shape in counts if shape not in found]
            scaled = {s: found[largest] * plans[s] / plans[largest] for s in missing}
            row["seconds"] = sum(count * (found | scaled)[s] for s, count in counts.items())
            row["assumes"] = (
                "one weight at a time, deltas on the device, nothing read or written; ours: a "
                "worker's seconds in the merge above, the others' beside it"
            )
            if missing:
                row["assumes"] += f"; by operations from {largest}: {missing}"
            if "weight_seconds" in ours:
                row["ours_seconds"] = sum(ours["weight_seconds"][n] for n in model.layer)
                row["ratio"] = row["seconds"] / row["ours_seconds"]


def time_route(suite: Suite, row: Row, run: Route, deltas: Sequence[torch.Tensor]) -> float:
    """Of a second run where there is time: the first one loads kernels too."""
    seconds, _ = suite.once(run, deltas)
    return min(seconds, suite.once(run, deltas)[0]) if 4 * seconds < suite.left(row) else seconds


def published_seconds(shape: Shape, device: str) -> float:
    """A guess, by operations."""
    ranks = [min(shape) // EXPERTS] * EXPERTS
    plan = Solver(SolverOptions(mode="textbook")).plan(shape, ranks, device=device)
    return plan.work.seconds(RATES[device])


def published(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    return textbook(deltas, [min(deltas[0].shape) // EXPERTS] * EXPERTS)


def make_deltas(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """The changes of a weight of this shape, in float32."""
    base, *experts = (values("weight", shape, t, device) for t in range(EXPERTS + 1))
    return [expert.float() - base.float() for expert in experts]


def print_table(rows: Sequence[Row]) -> None:
    """A line for every case."""
    rows = [row for row in rows if row["part"] in PARTS]
    if not rows:
        return
    columns = ("s", "read GB/s", "% floor", "host GB", "planned", "dev. GB", "planned", "model h")
    print(f"{'':44}", *(f"{column:>9}" for column in columns))
    for row in rows:
        gigabytes = [
            value and value / 1e9
            for key in ("host_peak", "host_planned", "device_peak", "device_planned")
            for value in [row.get(f"{key}_bytes")]
        ]
        share = row.get("disk_floor_share")
        hours = row["model_seconds"] / 3600 if "model_seconds" in row else None
        figures = [row.get("seconds"), row.get("read_gbps", row.get("gbps")),
                   share and 100 * share, *gigabytes, hours]  # fmt: skip
        cells = ("" if f is None else format(f, ".3g") for f in figures)
        shape = "x".join(map(str, row.get("shape", ())))
        what = [row["part"], row["name"], shape, row.get("only", "")]
        if row["name"] == "agrees":
            what.append(row["method"])
        name = " ".join(filter(None, what))
        print(f"{name[:44]:44}", *(f"{cell:>9}" for cell in cells), end=" ")
        said = [f"{w} workers" for w in [row.get("workers")] if w]
        said += [f"{row['ratio']:.1f} x ours"] if "ratio" in row else []
        said += [f"{k} {v:.0%}" for k, v in row.get("busy", {}).items()]
        said += [] if row["status"] == "ok" else [f"{row['status']}: {row.get('note', '')}"]
        print(", ".join(said))
