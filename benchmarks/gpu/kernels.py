"""Every kernel against the roofs of the card, plain torch and `torch.compile`.

A result is compared with its reference first; one that disagrees is not timed. Times are of
whole operations, between CUDA events, after the L2 cache was overwritten; `kernel_ms` is what
the Triton kernels in them take.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.suite import Row, Suite, TooLong, Unavailable, Wrong, first_line
from resm_kernels.ops.consensus import reference as consensus_reference
from resm_kernels.ops.delta_stats import DeltaStats
from resm_kernels.ops.delta_stats import reference as stats_reference
from resm_kernels.ops.dtypes import full_float32
from resm_kernels.ops.mask import Mask
from resm_kernels.ops.mask import reference as mask_reference

Shape = tuple[int, int]
Tensors = list[torch.Tensor]
MAIN: Shape = (4096, 14336)
"""The shape at which everything is measured, `torch.compile` too."""
SQUARE: Shape = (4096, 4096)
LARGE: Shape = (28672, 8192)
ODD: Shape = (4097, 1235)
QUICK = {MAIN: (48, 96), SQUARE: (64, 64), LARGE: (96, 64), ODD: (37, 61)}
EXPERTS = 3
WEIGHTS = (0.3, -0.5, 1.25)
SCALES = (0.5, 0.8, 1.0, 1.2)
STATS_ERROR = 24 * 2.0**-24
UNITS = {"tf32x3": 2.0**-19, "ieee": 2.0**-24, "tf32": 2.0**-9}
"""Documented relative errors of the sums of `delta_stats`, and of a product of `low_rank`."""
ROWS = 128
"""Rows at either end of a reconstruction that are compared with float64."""
REPEATS, SECONDS = 50, 0.25
"""Timed runs of one operation at most, and seconds they may take."""
FLUSH = 1 << 31
"""Bytes written between runs: far more than a cache, and long enough to hide the next launch."""
BANDWIDTH_GOAL, MATMUL_GOAL, TORCH_GOAL = 0.85, 0.7, 3.0
"""The goals: shares of the copy and matmul rates, and how often as fast as plain torch."""
ROOF = {"tf32x3": ("tf32", 3.0), "tf32": ("tf32", 1.0), "ieee": ("ieee", 1.0)}
"""The matmul rate that bounds a precision, and by how many of its products."""


@dataclass
class Case:
    """One operation on one shape.

    `check` gets the result of `ours` and raises Wrong; `plain` says the same in plain torch, of
    the tensors `given`. `work` is bytes moved, or floating-point operations where `roof` is not
    the copy.
    """

    name: str
    shape: Shape
    ours: Callable[[], Any]
    check: Callable[[Any], None]
    plain: Callable[..., Any]
    given: tuple[Any, ...]
    work: float
    roof: str = "copy"
    products: float = 1.0
    labels: Row = field(default_factory=dict)
    compiled: bool = False


def measure(suite: Suite, seconds: float, quick: bool) -> None:
    """Roofs, every kernel, and then the same by torch.compile, in so many seconds."""
    suite.allot(seconds, {"roofs": 0.25, "kernels": 1.0})
    with contextlib.ExitStack() as stack:
        if suite.device.type == "cpu":
            stack.enter_context(interpreted())
        roofs = measure_roofs(suite, 256 if quick else 8192)
        rows: list[tuple[Row, Callable[[], Case]]] = []
        for make, labels in cases(suite.device, quick):
            with suite.case("kernels", **labels) as row:
                if suite.left(row) < 1.0:
                    raise TooLong("no time left to kernels")
                case = make()
                measure_case(suite, row, case, roofs)
                if case.compiled:
                    rows.append((row, make))
            torch.cuda.empty_cache()
        for row, make in rows[:1] if quick else rows:
            measure_compiled(suite, row, make(), "eager" if quick else "inductor")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels in Triton's interpreter, which rounds as a GPU does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("without a GPU kernels need TRITON_INTERPRET=1")
    from triton.runtime.interpreter import InterpreterBuilder

    from tests.interpreter import round_off

    before = InterpreterBuilder.create_fp_trunc
    InterpreterBuilder.create_fp_trunc = round_off
    yield
    InterpreterBuilder.create_fp_trunc = before


def measure_roofs(suite: Suite, n: int) -> dict[str, float]:
    """Bytes per second of a copy and operations per second of matmuls, as torch does them."""
    rates: dict[str, float] = {}
    device = suite.device
    for dtype in (torch.bfloat16, torch.float32):
        with suite.case("roofs", "copy", dtype=str(dtype)[6:]) as row:
            source = torch.ones(16 * n * n, device=device).view(dtype)
            target = torch.empty_like(source)
            p50 = record_times(suite, row, lambda a=source, b=target: b.copy_(a))
            row["gbps"] = 2 * source.nbytes / p50 / 1e9
            rates["copy"] = max(rates.get("copy", 0.0), 1e9 * row["gbps"])
        source = target = torch.empty(0)
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("ieee", torch.float32, "ieee"),
    ):
        with suite.case("roofs", "matmul", dtype=name) as row, matmul_precision(precision):
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            p50 = record_times(suite, row, functools.partial(torch.mm, a, b))
            row["tflops"] = 2 * n**3 / p50 / 1e12
            rates[name] = 1e12 * row["tflops"]
    return rates


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """The precision of torch's own float32 matmuls on a GPU."""
    with full_float32:
        if precision == "tf32":
            settings: Any = torch.backends.cuda.matmul
            if hasattr(settings, "fp32_precision"):
                settings.fp32_precision = "tf32"
            else:
                torch.set_float32_matmul_precision("high")
        yield


def measure_case(suite: Suite, row: Row, case: Case, roofs: dict[str, float]) -> None:
    """Correctness, our time, our kernels' time, plain torch's time."""
    start = time.perf_counter()
    case.check(case.ours())
    row["first_seconds"] = time.perf_counter() - start
    p50 = record_times(suite, row, case.ours)
    if suite.device.type == "cuda":
        row |= watch_kernels(suite, case.ours)
    flops = case.roof != "copy"
    unit, size = ("tflops", 1e12) if flops else ("gbps", 1e9)
    row |= {unit: case.work / p50 / size}
    roof = roofs.get(case.roof, math.nan) / case.products
    row["roof_share"] = case.work / p50 / roof
    if "kernel_ms" in row:
        row["kernel_roof_share"] = case.work / (row["kernel_ms"] / 1e3) / roof
    with matmul_precision(case.labels.get("precision", "ieee")):
        theirs: Row = {}
        row["torch_ratio"] = record_times(suite, theirs, case.plain, *case.given) / p50
    row["torch_ms"] = theirs["p50_ms"]
    goal = MATMUL_GOAL if flops else BANDWIDTH_GOAL
    row["goal"] = row["roof_share"] >= goal and (flops or row["torch_ratio"] >= TORCH_GOAL)


def record_times(suite: Suite, row: Row, run: Callable[..., Any], *given: Any) -> float:
    """p20, p50 and p80 of some runs with a cold cache, in milliseconds; p50 in seconds."""
    times = times_of(suite, run, *given)
    low, middle, high = (times[int(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8))
    row |= {"p20_ms": 1e3 * low, "p50_ms": 1e3 * middle, "p80_ms": 1e3 * high, "runs": len(times)}
    return middle


def times_of(suite: Suite, run: Callable[..., Any], *given: Any) -> list[float]:
    """Sorted seconds of runs, each after the cache was overwritten."""
    if suite.device.type == "cpu":
        return sorted(suite.once(run, *given)[0] for _ in range(3))
    flush = torch.empty(FLUSH, dtype=torch.int8, device=suite.device)
    run(*given)
    times, start = list[float](), time.perf_counter()
    while len(times) < REPEATS and (len(times) < 5 or time.perf_counter() - start < SECONDS):
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run(*given)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return sorted(times)


def watch_kernels(suite: Suite, run: Callable[[], Any]) -> Row:
    """Milliseconds in Triton kernels, the median of some runs, and what they occupy."""
    from triton.runtime.jit import KernelInterface

    flush = torch.empty(FLUSH, dtype=torch.int8, device=suite.device)
    launches: list[tuple[Any, torch.cuda.Event, torch.cuda.Event]] = []
    original = KernelInterface.__getitem__

    def watched(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            kernel = original(self, grid)(*args, **options)
            last.record()
            launches.append((kernel, first, last))
            return kernel

        return launch

    totals = []
    KernelInterface.__getitem__ = watched
    try:
        for _ in range(5):
            launches.clear()
            flush.zero_()
            run()
            torch.cuda.synchronize()
            totals.append(sum(first.elapsed_time(last) for _, first, last in launches))
    finally:
        KernelInterface.__getitem__ = original
    if not launches:
        raise Wrong("no Triton kernel ran")
    used = {}
    for kernel, _, _ in launches:
        with contextlib.suppress(AttributeError):
            shared = kernel.metadata.shared
            name = kernel.metadata.name.strip("_").removesuffix("_kernel")
            used[name] = {
                "registers": kernel.n_regs,
                "spills": kernel.n_spills,
                "shared_bytes": shared,
            }
    return {"kernel_ms": statistics.median(totals), "launches": len(launches), "kernels": used}


def measure_compiled(suite: Suite, row: Row, case: Case, backend: str) -> None:
    """Add what torch.compile makes of the plain expression; its compilation is not timed."""
    seen = [r["compile_seconds"] for r in suite.rows if "compile_seconds" in r]
    left = suite.left(row)
    if left < 1.5 * max(seen, default=10.0):
        row["compile_status"] = f"unavailable: {max(left, 0):.0f} s left"
        return
    row["compile_status"] = "running"
    suite.save()
    try:
        torch._dynamo.reset()
        compiled = torch.compile(case.plain, dynamic=False, backend=backend)
        start = time.perf_counter()
        with at_most(left), matmul_precision(case.labels.get("precision", "ieee")):
            compiled(*case.given)
            row["compile_seconds"] = time.perf_counter() - start
            theirs: Row = {}
            p50 = record_times(suite, theirs, compiled, *case.given)
        row |= {"compile_ms": theirs["p50_ms"], "compile_ratio": 1e3 * p50 / row["p50_ms"]}
        row["compile_status"] = "ok"
    except Exception as error:
        row["compile_status"] = f"unavailable: {first_line(error)}"
    suite.save()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer; what it is doing in C is waited for."""

    def stop(*given: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def cases(device: torch.device, quick: bool) -> Iterator[tuple[Callable[[], Case], Row]]:
    """What makes each case, and the labels of its row; nothing is allocated before."""
    bf16, fp32 = torch.bfloat16, torch.float32
    plans: list[tuple[Shape, torch.dtype, Sequence[str]]] = [
        (MAIN, bf16, tuple(ELEMENTWISE)),
        (SQUARE, bf16, ("delta_stats", "masked_delta", "masked_delta drop", "weighted_sum",
                        "weighted_deltas", "weighted_deltas drop", "elected_deltas")),
        (LARGE, bf16, ("delta_stats", "masked_delta", "trim", "weighted_deltas",
                       "elected_deltas trim")),
        (SQUARE, fp32, ("delta_stats", "masked_delta", "weighted_deltas", "elected_deltas")),
        (ODD, bf16, ("delta_stats", "masked_delta", "weighted_deltas", "elected_deltas")),
    ]  # fmt: skip
    for nominal, dtype, names in plans[::4] if quick else plans:
        shape = QUICK[nominal] if quick else nominal
        for name in names:
            labels = {"name": name, "shape": shape, "dtype": str(dtype)[6:]}
            build = functools.partial(ELEMENTWISE[name], name, shape, dtype, device)
            yield functools.partial(elementwise_case, build, nominal == MAIN), labels
    products: list[tuple[Shape, str, int, int, bool]] = [
        *((SQUARE, precision, share, 1, share == 1) for precision in ROOF for share in (1, 2)),
        (SQUARE, "tf32x3", 1, len(SCALES), False),
        (MAIN, "tf32x3", 1, 1, False),
        (LARGE, "tf32x3", 1, 1, False),
        (LARGE, "tf32", 1, 1, False),
        (ODD, "tf32x3", 1, 1, False),
    ]
    for nominal, precision, share, scales, compiled in products[::3] if quick else products:
        shape = QUICK[nominal] if quick else nominal
        p = min(shape)
        depth = p // EXPERTS * EXPERTS if share == 1 else p // 2
        labels = {"name": "low_rank", "shape": shape, "dtype": "bfloat16", "rank": depth}
        labels |= {"precision": precision, "scales": scales}
        yield functools.partial(product_case, labels, device, compiled), labels


def elementwise_case(build: Callable[[], Case], compiled: bool) -> Case:
    case = build()
    case.compiled = compiled
    return case


def family(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, Tensors]:
    """A base and experts whose deltas are noise."""
    generator = torch.Generator(device).manual_seed(0)
    gaussian = functools.partial(torch.randn, shape, generator=generator, device=device)
    base = 0.02 * gaussian()
    experts = [(base + 1e-3 * gaussian()).to(dtype) for _ in range(EXPERTS)]
    return base.to(dtype), experts


def expect_bytes(expected: Any, found: Any) -> None:
    """Equal bytes, of one tensor or of several."""
    if isinstance(expected, torch.Tensor):
        expected, found = (expected,), (found,)
    for theirs, ours in zip(expected, found, strict=True):
        integers = {2: torch.int16, 4: torch.int32}[theirs.itemsize]
        unequal = int((ours.view(integers) != theirs.view(integers)).sum())
        if unequal or ours.dtype != theirs.dtype:
            raise Wrong(f"{unequal} of {theirs.numel()} entries differ from the reference")


def stats_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    from resm_kernels.ops.delta_stats import kernel

    base, experts = family(shape, dtype, device)
    options = {"sigma": 3.0, "noise_floor": 0.1}

    def check(found: list[DeltaStats]) -> None:
        expected = stats_reference.delta_stats(base, experts, **options)
        for ours, theirs, expert in zip(found, expected, experts, strict=True):
            for key in ("abs_sum", "square_sum", "threshold", "floor"):
                off = abs(getattr(ours, key) / getattr(theirs, key) - 1)
                if not off <= STATS_ERROR:
                    raise Wrong(f"{key} errs by {off:.1e}")
            if (ours.largest, ours.zero_count) != (theirs.largest, theirs.zero_count):
                raise Wrong("the largest magnitude or the number of zeros differs")
            a = (expert.float() - base.float()).abs_()
            for key, limit in (("outlier_count", theirs.threshold), ("sparse_count", theirs.floor)):
                near = int(((a - limit).abs_() <= 4 * STATS_ERROR * limit).sum())
                if abs(getattr(ours, key) - getattr(theirs, key)) > near:
                    raise Wrong(f"{key}: {getattr(ours, key)}, expected {getattr(theirs, key)}")

    return Case(
        name,
        shape,
        lambda: kernel.delta_stats(base, experts, **options),
        check,
        plain_stats,
        (base, experts),
        2 * (EXPERTS + 1) * base.nbytes,
    )


def plain_stats(base: torch.Tensor, experts: Tensors) -> torch.Tensor:
    rows = []
    for expert in experts:
        a = (expert.float() - base).abs_()
        mean, squares, largest = a.mean(), a.square().mean(), a.amax()
        threshold = mean + 3.0 * (squares - mean * mean).clamp_min(0.0).sqrt()
        above, sparse = a > threshold, a <= 0.1 * squares.sqrt()
        mass = torch.where(above, a, 0.0).sum()
        counts = (above.sum(), sparse.sum(), (a == 0.0).sum())
        rows.append(torch.stack((mean, squares, largest, threshold, mass, *counts)))
    return torch.stack(rows).cpu()


PLAIN = Mask()
TRIM = Mask(floor=2e-4, threshold=1e-3, clip=3e-3)
DROP = Mask(density=0.5, key=0x9E3779B97F4A7C15_F39CC0605CEDC834)


def plain_masked(value: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The mask in place; the drop with torch's random numbers."""
    if mask is TRIM:
        a = value.abs()
        value.masked_fill_((a <= mask.floor) | (a < mask.threshold), 0.0)
        value.clamp_(-mask.clip, mask.clip)
    return functional.dropout(value, 1.0 - mask.density) if mask is DROP else value


def mask_case(
    mask: Mask, is_split: bool, name: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Case:
    from resm_kernels.ops.mask import kernel

    base, (expert, *_) = family(shape, dtype, device)
    run, reference = (
        (kernel.split_delta, mask_reference.split_delta)
        if is_split
        else (kernel.masked_delta, mask_reference.masked_delta)
    )

    def plain(base: torch.Tensor, expert: torch.Tensor) -> Any:
        kept = plain_masked(expert.float() - base, mask)
        if not is_split:
            return kept
        high = kept.bfloat16()
        return high, kept.sub_(high).bfloat16()

    return Case(
        name,
        shape,
        lambda: run(base, expert, mask),
        lambda found: expect_bytes(reference(base, expert, mask), found),
        plain,
        (base, expert),
        2 * base.nbytes + 4 * base.numel(),
    )


def trim_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    from resm_kernels.ops.mask import kernel

    base, experts = family(shape, dtype, device)
    kept = int(0.2 * base.numel())

    def check(found: list[tuple[float, int]]) -> None:
        for expert, (threshold, cut) in zip(experts, found, strict=True):
            a = (expert.float() - base.float()).abs_().view(-1)
            count = int((a > threshold).sum()) + int((a[:cut] == threshold).sum())
            if count != kept or (cut < a.numel() and float(a[cut - 1]) != threshold):
                raise Wrong(f"{count} entries are kept, expected {kept}")

    def plain(base: torch.Tensor, experts: Tensors) -> torch.Tensor:
        # Not kthvalue, which selects in a single block.
        magnitudes = ((expert.float() - base).abs_().view(-1) for expert in experts)
        return torch.stack([a.topk(kept, sorted=False).values.amin() for a in magnitudes]).cpu()

    return Case(
        name,
        shape,
        lambda: kernel.trim(base, experts, [kept] * len(experts)),
        check,
        plain,
        (base, experts),
        # The passes that every input takes; those of an expert with ties come on top.
        len(kernel.DIGITS) * (EXPERTS + 1) * base.nbytes,
    )


def norms_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    from resm_kernels.ops.mask import kernel

    base, experts = family(shape, dtype, device)
    masks = [TRIM] * EXPERTS

    def check(found: list[tuple[float, float]]) -> None:
        if found != mask_reference.masked_norms(base, experts, masks):
            raise Wrong("sums of magnitudes differ from the reference's")

    def plain(base: torch.Tensor, experts: Tensors) -> torch.Tensor:
        rows = []
        for expert in experts:
            value = expert.float() - base
            whole = value.abs().sum()
            rows.append(torch.stack((whole, plain_masked(value, TRIM).abs().sum())))
        return torch.stack(rows).cpu()

    return Case(
        name,
        shape,
        lambda: kernel.masked_norms(base, experts, masks),
        check,
        plain,
        (base, experts),
        (EXPERTS + 1) * base.nbytes,
    )


def sum_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    from resm_kernels.ops.consensus import kernel

    _, experts = family(shape, dtype, device)

    def check(found: torch.Tensor) -> None:
        expected = consensus_reference.weighted_sum(experts, WEIGHTS, out_dtype=dtype)
        ulp = torch.finfo(dtype).eps * expected.float().abs()
        off = (found.float() - expected.float()).abs_()
        if bool((off > ulp + 2.0**-22).any()):
            raise Wrong(f"errs by {float(off.max()):.1e}")

    def plain(experts: Tensors) -> torch.Tensor:
        total = experts[0].float() * WEIGHTS[0]
        for expert, weight in zip(experts[1:], WEIGHTS[1:], strict=True):
            total.add_(expert, alpha=weight)
        return total.to(dtype)

    return Case(
        name,
        shape,
        lambda: kernel.weighted_sum(experts, WEIGHTS, out_dtype=dtype),
        check,
        plain,
        (experts,),
        (EXPERTS + 1) * experts[0].nbytes,
    )


def deltas_case(
    mask: Mask, name: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Case:
    from resm_kernels.ops.consensus import kernel

    base, experts = family(shape, dtype, device)
    masks = None if mask is PLAIN else [mask] * EXPERTS
    options: dict[str, Any] = {"scale": 0.8, "out_dtype": dtype, "masks": masks}

    def plain(base: torch.Tensor, experts: Tensors) -> torch.Tensor:
        total = torch.zeros_like(base, dtype=torch.float32)
        for expert, weight in zip(experts, WEIGHTS, strict=True):
            total.add_(plain_masked(expert.float() - base, mask), alpha=weight)
        return torch.add(base, total, alpha=0.8).to(dtype)

    return Case(
        name,
        shape,
        lambda: kernel.weighted_deltas(base, experts, WEIGHTS, **options),
        lambda found: expect_bytes(
            consensus_reference.weighted_deltas(base, experts, WEIGHTS, **options), found
        ),
        plain,
        (base, experts),
        (EXPERTS + 2) * base.nbytes,
    )


def elected_case(
    mask: Mask, name: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Case:
    from resm_kernels.ops.consensus import kernel

    base, experts = family(shape, dtype, device)
    masks = None if mask is PLAIN else [mask] * EXPERTS
    options: dict[str, Any] = {"elect": "sum", "mean": True, "scale": 0.8}
    options |= {"out_dtype": dtype, "masks": masks}

    def plain(base: torch.Tensor, experts: Tensors) -> torch.Tensor:
        deltas = [
            plain_masked(expert.float() - base, mask).mul_(weight)
            for expert, weight in zip(experts, WEIGHTS, strict=True)
        ]
        rising = functools.reduce(torch.add, deltas) >= 0.0
        total, divisor = (torch.zeros_like(deltas[0]) for _ in range(2))
        for delta, weight in zip(deltas, WEIGHTS, strict=True):
            agrees = torch.where(rising, delta > 0.0, delta < 0.0)
            total.add_(torch.where(agrees, delta, 0.0))
            divisor.add_(agrees, alpha=weight)
        total.div_(divisor.masked_fill_(divisor.abs() < 1e-8, 1.0))
        return torch.add(base, total, alpha=0.8).to(dtype)

    return Case(
        name,
        shape,
        lambda: kernel.elected_deltas(base, experts, WEIGHTS, **options),
        lambda found: expect_bytes(
            consensus_reference.elected_deltas(base, experts, WEIGHTS, **options), found
        ),
        plain,
        (base, experts),
        (EXPERTS + 2) * base.nbytes,
    )


ELEMENTWISE: dict[str, Callable[..., Case]] = {
    "delta_stats": stats_case,
    "masked_delta": functools.partial(mask_case, PLAIN, False),
    "masked_delta trim": functools.partial(mask_case, TRIM, False),
    "masked_delta drop": functools.partial(mask_case, DROP, False),
    "split_delta": functools.partial(mask_case, PLAIN, True),
    "trim": trim_case,
    "masked_norms": norms_case,
    "weighted_sum": sum_case,
    "weighted_deltas": functools.partial(deltas_case, PLAIN),
    "weighted_deltas trim": functools.partial(deltas_case, TRIM),
    "weighted_deltas drop": functools.partial(deltas_case, DROP),
    "elected_deltas": functools.partial(elected_case, PLAIN),
    "elected_deltas trim": functools.partial(elected_case, TRIM),
    "elected_deltas drop": functools.partial(elected_case, DROP),
}


def product_case(labels: Row, device: torch.device, compiled: bool) -> Case:
    from resm_kernels.ops.low_rank import kernel

    (rows, columns), depth, precision = labels["shape"], labels["rank"], labels["precision"]
    generator = torch.Generator(device).manual_seed(0)
    gaussian = functools.partial(torch.randn, generator=generator, device=device)
    base = gaussian(rows, columns).bfloat16()
    left, right = gaussian(rows, depth) / depth, gaussian(columns, depth)
    scales = SCALES[: labels["scales"]]

    def check(found: Tensors) -> None:
        for place in (slice(0, ROWS), slice(max(0, rows - ROWS), rows)):
            product = left[place].double() @ right.double().T
            terms = (left[place].abs() @ right.abs().T).double()
            for ours, scale in zip(found, scales, strict=True):
                expected = base[place].double() + scale * product
                bound = scale * terms * (UNITS[precision] + depth * 2.0**-23)
                off = (ours[place].double() - expected).abs_()
                if not bool((off <= bound + 2.0**-8 * expected.abs()).all()):
                    raise Wrong(f"errs by {float((off / bound).max()):.1f} times its bound")

    def plain(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Tensors:
        product = left @ right.T
        return [torch.add(base, product, alpha=scale).to(base.dtype) for scale in scales]

    roof, products = ROOF[precision]
    return Case(
        "low_rank",
        (rows, columns),
        lambda: kernel.add_low_rank(
            base, left, right, scales=scales, out_dtype=base.dtype, precision=precision
        ),
        check,
        plain,
        (base, left, right),
        2.0 * rows * columns * depth,
        roof,
        products,
        {"precision": "tf32" if precision == "tf32" else "ieee"},
        compiled,
    )


def print_table(rows: Sequence[Row]) -> None:
    """Roofs, then a line per kernel and shape."""
    for row in rows:
        if row["part"] == "roofs" and row["status"] == "ok":
            rate = f"{row['gbps']:.0f} GB/s" if "gbps" in row else f"{row['tflops']:.1f} TFLOP/s"
            print(f"roof {row['name']} {row['dtype']}: {rate}")
    columns = ("ms", "GB|TF/s", "% roof", "% kernel", "x torch", "x comp", "regs", "spills", "goal")
    print(f"{'':48}", *(f"{column:>8}" for column in columns))
    for row in rows:
        if row["part"] != "kernels":
            continue
        used = row.get("kernels", {}).values()
        cells = [
            number(row.get("p50_ms")),
            number(row.get("gbps", row.get("tflops"))),
            number(row.get("roof_share"), 100),
            number(row.get("kernel_roof_share"), 100),
            number(row.get("torch_ratio")),
            number(row.get("compile_ratio")),
            number(max((u["registers"] for u in used), default=None)),
            number(max((u["spills"] for u in used), default=None)),
            {True: "met", False: "missed", None: ""}[row.get("goal")],
        ]
        shape = "x".join(map(str, row["shape"]))
        extra = f" {row['precision']} r={row['rank']} n={row['scales']}" if "rank" in row else ""
        name = f"{row['name']}{extra} {shape} {row['dtype'].replace('bfloat', 'bf')}"
        cells.append("" if row["status"] == "ok" else f"{row['status']}: {row.get('note', '')}")
        print(f"{name:48}", *(f"{cell:>8}" for cell in cells))


def number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else format(factor * value, ".3g")
