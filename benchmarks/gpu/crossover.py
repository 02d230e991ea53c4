"""cuSOLVER's solvers against torch's on a grid, and the crossover table that follows.

Errors are backward errors in float64: of the rebuilt matrix and of the orthogonality of its
factors. A solver of ours may err twice as much as torch's default in the same dtype, and by the
rounding of a sum over the longer side more.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks.gpu.suite import Row, Suite, TooLong, Unavailable
from resm_kernels.linalg import cusolver, polar_factor
from resm_kernels.linalg.crossover import (
    BACKENDS,
    SCHEMA,
    committed_text,
    parse_tables,
)

PARTS = {"eigh": 0.35, "leading": 0.45, "svd": 0.85, "polar": 0.93, "low rank": 1.0}
"""Share of the budget by whose end an operation has to be done."""
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_SIZES = (8, 16)
BATCHES = {"eigh": (1, 8, 64, 512), "svd": (1, 64, 512)}
"""Matrices of a case; the other operations are not batched."""
DTYPES = {"eigh": ("float64", "float32"), "svd": ("float32", "float64"), "low rank": ("float32",)}
"""Float64 alone for the others."""
TALL = {"svd": (1, 4), "polar": (1, 4)}
"""Rows over columns; square for the others."""
SHARES = {"leading": 3, "low rank": 16}
"""One of so many vectors is wanted: what three experts keep, and what a sketch is made for."""
FALL = {torch.float64: -6, torch.float32: -3}
"""Powers of ten over which the columns of matrices for SVDs fall."""
ENTRIES = 1 << 28
"""The most entries of a case: 2 GiB in float64."""
LONGEST, ALLOWANCE, REPEATS = (3.0, 1.0), 0.2, 3
"""Seconds that a run of a single matrix and of a batch may be expected to take; seconds for all
repeats, and how many there are."""
WORTH = 1.1
"""How much faster than torch a solver of ours has to be to be proposed."""
EXPERTS = 3

Found = tuple[torch.Tensor, ...]
Run = Callable[[torch.Tensor, int], Found]
"""B x m x n matrices and the vectors wanted -> (values, vectors), (left, values, right) or
(polar factor,)."""


def eigen(found: Any) -> Found:
    return found.values, found.vectors


def triplets(found: Any) -> Found:
    return found.left, found.values, found.right


def looped(matrices: torch.Tensor, _: int) -> Found:
    values, vectors = zip(*(torch.linalg.eigh(matrix) for matrix in matrices), strict=True)
    return torch.stack(values), torch.stack(vectors)


def leading(matrices: torch.Tensor, count: int) -> Found:
    values, vectors = torch.linalg.eigh(matrices[0])
    return values[-count:], vectors[:, -count:]


def svd_by(driver: str | None) -> Run:
    def run(matrices: torch.Tensor, count: int) -> Found:
        left, values, right = torch.linalg.svd(matrices, full_matrices=False, driver=driver)
        return left[..., :count], values[..., :count], right.mT[..., :count]

    return run


def polar_by(backend: Any) -> Run:
    def run(matrices: torch.Tensor, _: int) -> Found:
        panels = matrices[0].tensor_split(EXPERTS, dim=1)
        found = polar_factor(panels, backend=backend)
        return (found.basis @ found.mixing,)

    return run


RUNS: dict[str, dict[str, Run]] = {
    "eigh": {
        "torch": lambda a, _: tuple(torch.linalg.eigh(a)),
        "loop": looped,
        "syev_batched": lambda a, _: eigen(cusolver.syev_batched(a)),
        "syevd": lambda a, _: eigen(cusolver.syevd(a[0])),
    },
    "leading": {
        "torch": leading,
        "syevdx": lambda a, count: eigen(cusolver.syevdx(a[0], count)),
    },
    "svd": {
        "torch": svd_by(None),
        "torch gesvd": svd_by("gesvd"),
        "torch gesvdj": svd_by("gesvdj"),
        "torch gesvda": svd_by("gesvda"),
        "gesvdj_batched": lambda a, _: triplets(cusolver.gesvdj_batched(a)),
        "gesvda_batched": lambda a, _: triplets(cusolver.gesvda_batched(a)),
        "gesvdp": lambda a, _: triplets(cusolver.gesvdp(a[0])[0]),
    },
    "polar": {
        "torch": polar_by("fp64"),
        "express": polar_by("express"),
        "polar": lambda a, _: (cusolver.polar(a[0]).factor,),
    },
    "low rank": {
        "torch": svd_by(None),
        "svd_lowrank": lambda a, count: tuple(torch.svd_lowrank(a, count)),
        "gesvdr": lambda a, count: triplets(cusolver.gesvdr(a[0], count)),
    },
}
"""Every way to do an operation, torch's default first. Names of `cusolver.SOLVERS` are ours."""
SINGLE, BATCHED = {"syevd", "gesvdp"}, {"loop", "syev_batched", "gesvdj_batched"}


def applies(name: str, batch: int, shape: tuple[int, int]) -> bool:
    """Whether a contender takes these matrices at all."""
    if name == "gesvdj_batched" and max(shape) > cusolver.JACOBI_SIZE:
        return False
    return name not in (SINGLE if batch > 1 else BATCHED)


def make(
    operation: str, batch: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Gram matrices of noise, noise with falling columns, orthonormal panels, or few directions.

    A merge asks for SVDs only where a Gram matrix would lose the small singular values.
    """
    (m, n), generator = shape, torch.Generator(device).manual_seed(0)

    def gaussian(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    if operation == "polar":
        widths = [len(w) for w in torch.arange(n).tensor_split(EXPERTS)]
        return torch.cat([torch.linalg.qr(gaussian(m, w))[0] for w in widths], dim=1)[None]
    if operation == "low rank":
        inner = max(1, n // SHARES[operation])
        return gaussian(1, m, inner) @ gaussian(inner, n) + gaussian(1, m, n) / math.sqrt(n)
    noise = gaussian(batch, m, n)
    if operation == "svd":
        return noise * torch.logspace(0, FALL[dtype], n, dtype=dtype, device=device)
    return noise.mT @ noise / m


def backward_error(matrices: torch.Tensor, found: Found) -> float:
    """The largest of residuals and of departures from orthogonality, relative, in float64."""
    a, parts = matrices.double(), [part.double() for part in found]
    if len(parts) == 3:
        left, values, right = parts
        pairs = [
            (a @ right, left * values[..., None, :]),
            (a.mT @ left, right * values[..., None, :]),
        ]
        bases = [left, right]
    elif len(parts) == 2:
        values, vectors = parts
        pairs, bases = [(a @ vectors, vectors * values[..., None, :])], [vectors]
    else:
        (factor,) = parts
        core = factor.mT @ a
        pairs, bases = [(a, factor @ core), (core, core.mT)], [factor]
    size = a.norm(dim=(-2, -1))
    errors = [((x - y).norm(dim=(-2, -1)) / size).max() for x, y in pairs]
    for basis in bases:
        defect = basis.mT @ basis
        defect.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        errors.append(defect.norm(dim=(-2, -1)).max() / math.sqrt(basis.shape[-1]))
    return float(torch.stack(errors).max())


def pace_key(row: Row) -> str:
    aspect = row["shape"][0] // row["shape"][1]
    return f"{row['part']} {row['name']} {row['dtype']} {row['batch']} {aspect}"


def check_time(suite: Suite, row: Row) -> None:
    """TooLong where a case does not fit.

    It is expected to take what the next smaller size of its kind took, times the ratio of the
    sizes to the third power: an upper bound, since small ones are bound by latency.
    """
    expected = suite.pace.get(pace_key(row), 0.0) * row["shape"][1] ** 3
    left = min(LONGEST[row["batch"] > 1], suite.left(row))
    if expected > left or left <= 0:
        raise TooLong(f"about {expected:.1f} s, but {max(left, 0):.1f} s allowed")


def timed(suite: Suite, row: Row, run: Run, matrices: torch.Tensor, count: int) -> Found:
    """The median of some runs after a first one, which also loads kernels."""
    first, found = suite.once(run, matrices, count)
    times = list[float]()
    while first <= LONGEST[0] and len(times) < REPEATS and sum(times) < ALLOWANCE:
        times.append(suite.once(run, matrices, count)[0])
    row["seconds"] = statistics.median(times or [first])
    suite.pace[pace_key(row)] = row["seconds"] / row["shape"][1] ** 3
    return found


def measure_case(
    suite: Suite, operation: str, batch: int, shape: tuple[int, int], dtype: str
) -> None:
    """Every contender on one batch of matrices."""
    count = max(1, min(shape) // SHARES.get(operation, 1))
    baseline: float | None = None
    matrices: torch.Tensor | None = None
    labels = {"batch": batch, "shape": shape, "dtype": dtype, "count": count}
    for name, run in RUNS[operation].items():
        if not applies(name, batch, shape):
            continue
        with suite.case(operation, name, **labels) as row:
            if name in cusolver.SOLVERS and (reason := cusolver.available()[name]):
                raise Unavailable(reason)
            if name.startswith("torch g") and suite.device.type != "cuda":
                raise Unavailable("cuda only")
            check_time(suite, row)
            if matrices is None:
                matrices = make(operation, batch, shape, getattr(torch, dtype), suite.device)
            if name in cusolver.SOLVERS:
                cusolver.release()
            found = timed(suite, row, run, matrices, count)
            if name in cusolver.SOLVERS:
                row["workspace_bytes"] = cusolver.workspace()
            row["error"] = backward_error(matrices, found)
            if name == "torch":
                baseline = row["error"]
            elif name in cusolver.SOLVERS and operation != "low rank" and baseline is not None:
                rounding = max(shape) * torch.finfo(matrices.dtype).eps
                row["limit"] = 2 * baseline + rounding
                row["status"] = "ok" if row["error"] <= row["limit"] else "fail"


def cases(sizes: Sequence[int], batches: dict[str, tuple[int, ...]]) -> Iterable[tuple[Any, ...]]:
    """Operation, batch, shape and dtype, small sizes first within each kind."""
    for operation in PARTS:
        kinds = itertools.product(
            DTYPES.get(operation, ("float64",)),
            batches.get(operation, (1,)),
            TALL.get(operation, (1,)),
        )
        for (dtype, batch, tall), n in itertools.product(kinds, sizes):
            if batch * tall * n * n <= ENTRIES:
                yield operation, batch, (tall * n, n), dtype


def propose(rows: Iterable[Row], about: Row) -> dict[str, Any]:
    """The table of a card from the rows that were measured on it.

    In every cell of the grid the fastest that is correct, ours only where it beats torch by
    `WORTH`. A cell speaks for the sizes down to the next smaller one and the batches up to the
    next larger one; equal neighbours are joined. Bound to the torch it was compared with. Torch
    needs no rule, but for batches of `eigh`, which it may do by a loop.
    """
    cells: dict[tuple[str, str, float], dict[tuple[int, int], dict[str, float]]] = {}
    for row in rows:
        if (
            row["part"] in BACKENDS
            and row["name"] in BACKENDS[row["part"]]
            and row["status"] == "ok"
        ):
            m, n = row["shape"]
            cell = cells.setdefault((row["part"], row["dtype"], m / n), {})
            cell.setdefault((row["batch"], n), {})[row["name"]] = row["seconds"]
    rules: list[dict[str, Any]] = []
    for (operation, dtype, aspect), grid in cells.items():
        ranges: dict[str, list[float | None]] = {"aspect": [1, 2] if aspect == 1 else [2, None]}
        if operation == "leading":
            ranges["share"] = [0, round(1 / SHARES[operation] + 0.01, 2)]
        batches = sorted({batch for batch, _ in grid})
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            sizes = sorted(n for b, n in grid if b == batch)
            found = [(n, fastest(grid[batch, n])) for n in sizes]
            low = 1
            for backend, run in itertools.groupby(found, key=lambda pair: pair[1]):
                high = [n for n, _ in run][-1]
                last = 1 if batch == 1 else None if following is None else following - 1
                rule = {"operation": operation, "backend": backend, "dtype": dtype}
                rule |= {"batch": [batch, last], "n": [low, high], **ranges}
                if backend != "torch" or (operation, batch > 1) == ("eigh", True):
                    rules.append(rule | {"torch": torch_bounds(about["versions"]["torch"])})
                low = high + 1
    return {
        "card": about["machine"].get("gpu", "no GPU"),
        "measured": True,
        "source": "make gpu",
        "versions": about["versions"] | cusolver.libraries(),
        "commit": about["commit"],
        "rules": rules,
    }


def fastest(seconds: dict[str, float]) -> str:
    """The backend of one cell."""
    theirs = {name: s for name, s in seconds.items() if name not in cusolver.SOLVERS}
    ours = {name: s * WORTH for name, s in seconds.items() if name in cusolver.SOLVERS}
    return min(theirs | ours, key=(theirs | ours).__getitem__) if theirs else "torch"


def torch_bounds(version: str) -> list[str]:
    """The releases of one minor version."""
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    return [f"{major}.{minor}", f"{major}.{minor + 1}"]


def with_table(text: str, table: dict[str, Any]) -> str:
    """The committed file with one card's table put in or replaced, a rule a line."""
    content = json.loads(text)
    kept = [t for t in content["tables"] if t["card"] != table["card"]]
    lines = []
    for one in [*kept, table]:
        head = json.dumps({k: v for k, v in one.items() if k != "rules"})[1:-1]
        rules = ",\n".join(f"      {json.dumps(rule)}" for rule in one["rules"])
        lines.append(f'    {{{head},\n     "rules": [\n{rules}]}}')
    return f'{{"schema": {SCHEMA}, "tables": [\n' + ",\n".join(lines) + "]}\n"


def print_table(rows: Sequence[Row]) -> None:
    """Milliseconds of every contender, a line for every batch of matrices."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    missing: dict[str, str] = {}
    for row in rows:
        if row["part"] not in PARTS:
            continue
        key = (row["part"], row["dtype"], row["batch"], "x".join(map(str, row["shape"])))
        shown = {"ok": "", "fail": f" WRONG {row.get('error', 0):.0e}", "error": " ERROR"}
        if row["status"] in shown:
            took = f"{1e3 * row['seconds']:.3g}" if "seconds" in row else "-"
            lines.setdefault(key, []).append(f"{row['name']} {took}{shown[row['status']]}")
        elif row["status"] == "unavailable":
            missing[row["name"]] = row["note"]
    for key, cells in lines.items():
        print(f"{key[0]:9} {key[1]:8} {key[2]:4} x {key[3]:11}", "  ".join(cells), "ms")
    for name, note in missing.items():
        print(f"{name}: {note}")


def measure(suite: Suite, seconds: float, quick: bool) -> None:
    """The grid in so many seconds, and `crossover.json` with the table that it gives."""
    suite.allot(seconds, PARTS)
    sizes = QUICK_SIZES if quick else SIZES
    batches = {name: (1, 3) if quick else found for name, found in BATCHES.items()}
    try:
        for case in cases(sizes, batches):
            measure_case(suite, *case)
    finally:
        text = with_table(committed_text(), propose(suite.rows, suite.about))
        parse_tables(text, "the proposed table")
        (suite.folder / "crossover.json").write_text(text)
