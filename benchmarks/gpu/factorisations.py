"""Factorisations on a GPU: the accuracy contract first, then times, memory and whole models."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.suite import Row, Suite, TooLong, Unavailable, relative
from resm_kernels.linalg import Solver, SolverOptions, SpectralMerge
from resm_kernels.linalg.eigen import gram
from resm_kernels.linalg.express import orthonormalise
from resm_kernels.linalg.projector import leading_eigenspace
from resm_kernels.linalg.solver import CONTRACT_SHARE, Work
from resm_kernels.methods import Inputs, Merged, find_method, merge_weight

Shape = tuple[int, int]
EXPERTS = 3
SPECTRA = ("power", "exponential", "noise", "lora16-bf16", "noise-bf16")
LIMITS = {"exact": 1e-5, "auto": 1e-5, "fast": 1e-2}
"""The accuracy contract; at full rank `auto` may have twice the textbook's error, if it is more."""
RETENTION = 1e-2
"""How far `fast` may be from exact in <M, D_t> / ||D_t||^2, relative."""
LONG, ALLOWANCE = 10.0, 20.0
"""Seconds past which a first run is the measurement, and for all repeats of one case."""
PARTS = {"correctness": 0.3, "pieces": 0.5, "merges": 0.8, "layers": 1.0}
"""Share of the budget by whose end a part has to be done; time left over goes to the next."""
RATES = {"cuda": Work(4e13, 3e13, 1e12, 4e11, 6e11, 5e11, 3e11), "cpu": Work(*[2e10] * 7)}
"""Operations per second for the first guess of a case's time; later ones go by earlier cases."""
CHECKED = {(1024, 1024): "power", (2816, 1024): "noise", (1024, 2816): "lora16-bf16"}
"""Shapes of part 1, and the spectrum on which float64 itself is checked against SVDs there."""
QUICK_CHECKED = {(320, 320): "power", (192, 96): "noise", (96, 192): "lora16-bf16"}
SIZES = (1024, 4096, 8192)
NEARLY = 0.9995
"""Singular values this near 1 need the last two steps of Polar Express only."""
MERGES = ((1024, 8192), (4096, 4096), (8192, 8192), (28672, 8192))
TEXTBOOK = 4096 * 4096
"""Entries of the largest merge that the textbook gets too."""
MODELS = {"Llama-3-8B": (32, 4096, 1024, 14336), "Llama-3-70B": (80, 8192, 1024, 28672)}
"""Layers, width, width of keys and values, width of the MLP."""


def timed(
    suite: Suite, row: Row, work: Work, run: Callable[..., Any], *given: Any, repeats: int = 3
) -> Any:
    """Record the median of some runs after a first one, and the first one's peak memory.

    One run is expected to take its work at `RATES`, corrected by what the last case of the
    same mode, or piece, took over that; TooLong where no such time is left.
    """
    key = row.get("mode") or f"{row['name']} {row.get('dtype')}"
    nominal = work.seconds(RATES[suite.device.type])
    expected, left = nominal * suite.pace.get(key, 1.0), suite.left(row)
    if expected > left:
        raise TooLong(f"about {expected:.1f} s, but {max(left, 0):.1f} s left to {row['part']}")
    before = 0
    if cuda := suite.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first, result = suite.once(run, *given)
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    times, room = list[float](), min(ALLOWANCE, suite.left(row))
    while first <= LONG and len(times) < repeats and sum(times) + first < room:
        times.append(suite.once(run, *given)[0])
    row |= {"seconds": statistics.median(times or [first]), "repeats": max(1, len(times))}
    suite.pace[key] = row["seconds"] / nominal
    compare_with_textbook(suite.rows)
    return result


def compare_with_textbook(rows: Sequence[Row]) -> None:
    """`ratio`: the textbook's time over a row's own."""
    timed_rows = (row for row in rows if row["part"] in PARTS and "seconds" in row)
    known = {(row["name"], row.get("shape"), row.get("mode")): row for row in timed_rows}
    for (name, shape, _), row in known.items():
        if textbook := known.get((name, shape, "textbook")):
            row["ratio"] = textbook["seconds"] / row["seconds"]


def time_merge(
    suite: Suite, row: Row, deltas: Sequence[torch.Tensor], rank: int, repeats: int = 3
) -> SpectralMerge:
    """Time one merge in its row's mode, beside what the solver planned."""
    solver, ranks = Solver(SolverOptions(mode=row["mode"])), [rank] * EXPERTS
    plan = solver.plan(deltas[0].shape, ranks, device=suite.device.type)
    row["planned_bytes"] = plan.workspace
    merge: SpectralMerge = timed(
        suite, row, plan.work, solver.merge, deltas, ranks, repeats=repeats
    )
    row |= {"backends": merge.backends, "fallbacks": merge.fallbacks}
    return merge


def make_deltas(kind: str, shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Float32 deltas: a named spectrum, Gaussian noise, or differences of bf16 weights."""
    (m, n), p = shape, min(shape)
    generator = torch.Generator(device).manual_seed(0)
    gaussian = functools.partial(torch.randn, generator=generator, device=device)

    def delta() -> torch.Tensor:
        if kind == "noise":
            return gaussian(m, n)
        if kind.endswith("bf16"):
            base, lora = (0.02 * gaussian(m, n)).bfloat16(), kind == "lora16-bf16"
            change = 5e-4 * gaussian(m, 16) @ gaussian(16, n) if lora else 1e-3 * gaussian(m, n)
            return change.add_(base).bfloat16().float().sub_(base)
        i = torch.arange(p, dtype=torch.float64, device=device)
        values = (i + 1) ** -0.8 if kind == "power" else torch.exp(-6 * i / p)
        u, v = (torch.linalg.qr(gaussian(side, p).double())[0] for side in shape)
        return ((u * values) @ v.T).float()

    return [delta() for _ in range(EXPERTS)]


def formed(merge: SpectralMerge) -> torch.Tensor:
    return merge.left.double() @ merge.right.double().T


def svd_reference(deltas: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """TSV-M by float64 SVDs on the CPU: no code and no device shared with what it checks."""
    svd = functools.partial(torch.linalg.svd, full_matrices=False)
    us, ss, vts = zip(*(svd(d.cpu().double()) for d in deltas), strict=True)
    left, _, left_t = svd(torch.cat([u[:, :rank] for u in us], dim=1))
    right, _, right_t = svd(torch.cat([vt[:rank] for vt in vts]))
    return (left @ left_t * torch.cat([s[:rank] for s in ss])) @ (right @ right_t)


def check_correctness(suite: Suite, shapes: dict[Shape, str]) -> None:
    """Every mode against exact at full and half rank, and exact against SVDs, once a shape."""
    for (shape, validated), kind in itertools.product(shapes.items(), SPECTRA):
        deltas = make_deltas(kind, shape, suite.device)
        for rank in (min(shape) // EXPERTS, min(shape) // (2 * EXPERTS)):
            name, limits, exact = f"{kind} r={rank}", dict(LIMITS), None
            for mode in ("exact", "textbook", "auto", "fast"):
                with suite.case("correctness", name, shape=shape, mode=mode) as row:
                    found = reference = formed(time_merge(suite, row, deltas, rank, repeats=0))
                    if mode == "exact":
                        exact = found
                        if kind != validated:
                            continue
                        reference = svd_reference(deltas, rank).to(suite.device)
                    elif exact is None:
                        raise TooLong("no float64 merge to compare with")
                    else:
                        reference = exact
                    judge(row, found, reference, deltas, limits)
                    if mode == "textbook" and EXPERTS * rank > CONTRACT_SHARE * min(shape):
                        limits["auto"] = max(LIMITS["auto"], 2 * row["error"])


def judge(
    row: Row,
    found: torch.Tensor,
    reference: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    limits: dict[str, float],
) -> None:
    """Hold a merge to the accuracy contract; the textbook has no limit."""
    kept = [(float((x * d).sum()) for x in (found, reference)) for d in deltas]
    row["retention"] = max(abs(ours / theirs - 1) for ours, theirs in kept)
    row["error"], row["limit"] = relative(found, reference), limits.get(row["mode"])
    wrong = row["limit"] is not None and not row["error"] <= row["limit"]
    if wrong or (row["mode"] == "fast" and not row["retention"] <= RETENTION):
        row["status"] = "fail"


def time_pieces(suite: Suite, sizes: Sequence[int]) -> None:
    """What the routes are made of, and what they could be made of."""
    for n in sizes:
        time_pieces_of(suite, n)


def time_pieces_of(suite: Suite, n: int) -> None:
    delta, cube = make_deltas("noise-bf16", (n, n), suite.device)[0], float(n) ** 3
    square, unit = delta.double().T @ delta.double(), torch.linalg.qr(delta)[0]
    wide_unit = unit.double()
    wide, narrow = Work(eigen_fp64=6 * cube), Work(eigen_fp32=6 * cube)
    steps, wide_steps = Work(gemm_fp32=12 * cube), Work(gemm_fp64=12 * cube)
    double, split = Work(gemm_fp64=1.25 * cube), Work(gemm_fp32=4 * cube)
    svd = Work(svd_fp32=26 * cube)
    pieces: list[tuple[str, str, Work, Callable[[], Any], torch.Tensor | None]] = [
        ("eigh", "float64", wide, lambda: torch.linalg.eigh(square), square),
        ("eigh", "float32", narrow, functools.partial(torch.linalg.eigh, square.float()), square),
        ("svd", "float32", svd, lambda: svd_by(None, delta), delta),
        ("svd gesvd", "float32", svd, lambda: svd_by("gesvd", delta), delta),
        ("svd gesvda", "float32", svd, lambda: svd_by("gesvda", delta), delta),
        ("gram", "float64", double, lambda: gram(delta), square),
        ("split gram", "bfloat16", split, lambda: split_gram(delta), square),
        ("2 express steps", "float32", steps, lambda: orthonormalise(unit, NEARLY), unit),
        ("2 express steps", "float64", wide_steps, lambda: orthonormalise(wide_unit, NEARLY), unit),
        ("projector", "float32", narrow, lambda: leading_eigenspace(square, n // EXPERTS), None),
    ]
    for name, dtype, work, run, expected in pieces:
        with suite.case("pieces", name, shape=(n, n), dtype=dtype) as row:
            found = timed(suite, row, work, run)
            if products := work.gemm_fp32 + work.gemm_fp64:
                row["gflops"] = products / row["seconds"] / 1e9
            if found is None:
                raise RuntimeError("no shift separates the rank")
            if expected is not None:
                row["error"] = relative(rebuilt(found), expected)


def svd_by(driver: str | None, matrix: torch.Tensor) -> Any:
    if driver and matrix.device.type == "cpu":
        raise Unavailable("cuda only")
    return torch.linalg.svd(matrix, full_matrices=False, driver=driver)


def split_gram(delta: torch.Tensor) -> torch.Tensor:
    """delta^T delta of two bf16 parts, summed in float32, without the product of the low parts."""
    hi = delta.bfloat16()
    lo = (delta - hi).bfloat16()
    cross = torch.mm(hi.T, lo, out_dtype=torch.float32)
    return torch.mm(hi.T, hi, out_dtype=torch.float32).add_(cross).add_(cross.T)


def rebuilt(found: Any) -> torch.Tensor:
    """The matrix that eigh or svd factored, in float64; a matrix stays as it is."""
    if isinstance(found, torch.Tensor):
        return found
    parts = [part.double() for part in found]
    left, values, right = parts if len(parts) == 3 else (parts[1], parts[0], parts[1].T)
    return (left * values) @ right


def time_merges(suite: Suite, shapes: Sequence[Shape]) -> None:
    """Every mode at full rank: time, memory against the plan, and error against exact."""
    for shape in shapes:
        deltas, merges = make_deltas("noise-bf16", shape, suite.device), dict[str, SpectralMerge]()
        rows: dict[str, Row] = {}
        for mode in ("textbook", "fast", "auto", "exact"):
            with suite.case("merges", "merge", shape=shape, mode=mode) as rows[mode]:
                if mode == "textbook" and shape[0] * shape[1] > TEXTBOOK:
                    raise TooLong("too large for the textbook")
                merges[mode] = time_merge(suite, rows[mode], deltas, min(shape) // EXPERTS)
                if mode == "exact":
                    reference = formed(merges.pop(mode))
                    for earlier, merge in merges.items():
                        rows[earlier]["error"] = relative(formed(merge), reference)


def time_models(suite: Suite, models: dict[str, tuple[int, int, int, int]]) -> None:
    """One decoder layer, every shape once, and what that makes of the whole model."""
    for (name, sizes), mode in itertools.product(models.items(), ("fast", "auto")):
        layers, width, narrow, inner = sizes
        counts = {(width, width): 2, (narrow, width): 2, (inner, width): 2, (width, inner): 1}
        rows = [time_weight(suite, name, shape, mode) for shape in counts]
        with suite.case("layers", f"{name} layer", mode=mode) as row:
            if not all("seconds" in r for r in rows):
                raise TooLong("not every shape was measured")
            row["seconds"] = sum(counts[r["shape"]] * r["seconds"] for r in rows)
            row["model_seconds"] = layers * row["seconds"]
            row["note"] = f"{layers} layers: {row['model_seconds']:.1f} s"


def time_weight(suite: Suite, name: str, shape: Shape, mode: Any) -> Row:
    """Delta, factors and rebuilt weight: TSV-M at full rank, bf16 in and out."""
    method, ranks = find_method("tsvm"), [min(shape) // EXPERTS] * EXPERTS
    options, dtype = method.make_options({"solver": mode}, EXPERTS), torch.bfloat16
    plan = Solver(SolverOptions(mode=mode)).plan(shape, ranks, device=suite.device.type)
    with suite.case("layers", name, shape=shape, mode=mode) as row:
        generator = torch.Generator(suite.device).manual_seed(0)
        gaussian = functools.partial(torch.randn, shape, generator=generator, device=suite.device)
        base = (0.02 * gaussian()).to(dtype)
        experts = [(base + 1e-3 * gaussian()).to(dtype) for _ in range(EXPERTS)]

        def merge() -> Merged:  # fresh inputs, since they keep what was found out about them
            inputs = Inputs("weight", base, experts)
            return merge_weight(method, inputs, [1.0] * EXPERTS, options, dtype)

        merged = timed(suite, row, plan.work, merge, repeats=1)
        row |= {"backends": merged.backends, "notes": merged.notes}
    return row


def print_table(rows: Sequence[Row]) -> None:
    """Correctness by mode; then every other case, and every one that is not ok."""
    rows = [row for row in rows if row["part"] in PARTS]
    checked = [row for row in rows if row["part"] == "correctness"]
    for mode in dict.fromkeys(row["mode"] for row in checked):
        ours = [row for row in checked if row["mode"] == mode]
        ok, known = (sum(r["status"] == "ok" for r in ours), [r for r in ours if "error" in r])
        error, kept = (max((r[k] for r in known), default=0.0) for k in ("error", "retention"))
        print(f"{mode:9} {ok} of {len(ours)} ok, {len(known)} compared:", end=" ")
        print(f"error <= {error:.1e}, retention within {kept:.1e}")
    columns = ("seconds", "gflops", "error", "ratio", "peak_bytes", "planned_bytes")
    print(f"{'':46}", *(f"{c.replace('_bytes', ' GB'):>10}" for c in columns))
    for row in rows:
        if row["part"] != "correctness" or row["status"] != "ok":
            figures = [row.get(c, "") for c in columns]
            figures[4:] = [b if b == "" else b / 1e9 for b in figures[4:]]
            shape = "x".join(map(str, row.get("shape", ())))
            cells = (f"{f if f == '' else format(f, '.3g'):>10}" for f in figures)
            print(
                f"{row['name']:23} {shape:11} {row.get('mode') or row.get('dtype', ''):10}", end=""
            )
            print(*cells, row["status"], row.get("note") or "; ".join(row.get("fallbacks", ())))


def measure(suite: Suite, seconds: float, quick: bool) -> None:
    """Everything about factorisations, in so many seconds."""
    suite.allot(seconds, PARTS)
    check_correctness(suite, QUICK_CHECKED if quick else CHECKED)
    time_pieces(suite, (128,) if quick else SIZES)
    time_merges(suite, ((96, 320), (192, 192)) if quick else MERGES)
    time_models(suite, {"tiny": (2, 96, 32, 160)} if quick else MODELS)
