"""The solver: which route factors a weight, what it costs, and the merge by that route."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import torch

from resm_kernels.errors import PlanError, UsageError
from resm_kernels.linalg import dispatch
from resm_kernels.linalg.crossover import Problem
from resm_kernels.linalg.eigen import gram, is_partial, leading_eigenpairs
from resm_kernels.linalg.polar import SMALL, PolarBackend
from resm_kernels.linalg.projector import GUESSING
from resm_kernels.linalg.spectral import SpectralMerge, spectral_merge
from resm_kernels.linalg.subspace import Delta, Subspace, SubspaceBackend, leading_subspaces

Mode = Literal["auto", "exact", "fast", "textbook"]
CPU = torch.device("cpu")

BATCHED_SIDE, BATCHED_ENTRIES = 128, 24576
"""Shorter side and entries up to which a batch beats one matrix after another on a CPU: 2.9 times
at 32 x 32, 1.6 at 64 x 64, 1.17 at 128 x 128, 1.12 at 128 x 192; it loses at 256 x 128."""
BATCH, CACHED_ENTRIES = 16, 1 << 17
"""The most matrices of a batch on a CPU, and of its entries per expert: more gain nothing, and
from there on lose what the caches hold."""
GPU_ENTRIES, GPU_MATRICES = 1 << 24, 1 << 14
"""The most entries of a batch on a GPU, all experts together (about 0.6 GB at its peak), and the
most matrices: cuSOLVER's XsyevBatched, which torch calls too, has refused batches of 40,000."""
CONTRACT_SHARE = 0.75
"""Up to this share of min(m, n) / T per expert the merged delta errs by at most 1e-5."""
CONTRACT_TOLERANCE = 5e-6
"""Estimated error of one polar factor that keeps the merge inside the contract."""
FULL_RANK_TOLERANCE = 3e-5
"""The same at full rank, where the float32 textbook errs by 1e-5 and more."""


@dataclass(frozen=True)
class SolverOptions:
    """How factorisations are done.

    Attributes
    ----------
    mode : str
        `auto` keeps the accuracy contract by the cheapest route whose own checks hold;
        `exact` stays in float64 (error about 3e-7); `fast` may err by 1e-2 and gains on a GPU;
        `textbook` is five float32 SVDs, as published, for comparison.
    subspace, polar : str
        A backend of `leading_subspaces` and of `polar_factor`, or `auto`: as the mode says.
    workspace : int, optional
        The most bytes a merge may be planned to hold beside its inputs; a plan past it is an
        error. A route that steps up to float64 or to an SVD can hold about twice its plan.
    """

    mode: Mode = "auto"
    subspace: SubspaceBackend | Literal["auto"] = "auto"
    polar: PolarBackend | Literal["auto"] = "auto"
    workspace: int | None = None


@dataclass(frozen=True)
class Route:
    """The backends that a merge starts with; its result says which it ended with."""

    subspace: SubspaceBackend
    polar: PolarBackend


def choose_route(device: str, options: SolverOptions) -> Route:
    """The route for a device type (`cpu`, `cuda`): a pure function, nothing is timed.

    On a CPU the projector loses to the partial eigen-decomposition (1.2 s against 0.1 s at
    n = 1024, one thread), so `fast` is `auto` there.
    """
    on_gpu = device != "cpu"
    routes = {
        "auto": Route("gram", "express" if on_gpu else "mixed"),
        "exact": Route("gram", "fp64"),
        "fast": Route("projector", "express") if on_gpu else Route("gram", "mixed"),
        "textbook": Route("textbook", "textbook"),
    }
    route = routes[options.mode]
    return Route(
        route.subspace if options.subspace == "auto" else options.subspace,
        route.polar if options.polar == "auto" else options.polar,
    )


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a merge, by what does them."""

    gemm_fp64: float = 0.0
    gemm_fp32: float = 0.0
    partial_eigen: float = 0.0
    eigen_fp64: float = 0.0
    eigen_fp32: float = 0.0
    svd_fp32: float = 0.0
    svd_fp64: float = 0.0

    def __add__(self, other: Work) -> Work:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(one + two for one, two in pairs))

    def seconds(self, rates: Work) -> float:
        """Predicted time at `rates`, in operations per second."""
        pairs = zip(vars(self).values(), vars(rates).values(), strict=True)
        return sum((work / rate for work, rate in pairs if work), 0.0)


@dataclass(frozen=True)
class SolverPlan:
    """What a merge of one weight will take.

    Attributes
    ----------
    route : Route
    workspace : int
        Peak bytes of tensors beside base, experts and output, without fallbacks; a BLAS keeps
        buffers of its own.
    pair : int
        Bytes of the low-rank pair that comes back.
    work : Work
        Without fallbacks.
    """

    route: Route
    workspace: int
    pair: int
    work: Work


@dataclass(frozen=True)
class Batching:
    """How many matrices of one shape are merged at once, and what that holds.

    Attributes
    ----------
    size : int
        1: one after another.
    workspace : int
        Peak bytes of tensors beside base, experts and output; 0 for size 1.
    """

    size: int = 1
    workspace: int = 0


class Solver:
    """Factor and merge the deltas of one weight after another.

    Parameters
    ----------
    options : SolverOptions
    """

    def __init__(self, options: SolverOptions | None = None) -> None:
        self.options = options or SolverOptions()

    def plan(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        *,
        itemsize: int = 4,
        device: str = "cpu",
    ) -> SolverPlan:
        """Predict what merging dense deltas of one shape takes.

        Parameters
        ----------
        shape : m, n
        ranks : sequence of int
            One per expert.
        itemsize : int
            Bytes per entry of a delta.
        device : str
            Device type.
        """
        route = choose_route(device, self.options)
        return SolverPlan(
            route=route,
            workspace=_workspace(shape, ranks, itemsize, route, device),
            pair=_polar_itemsize(route, sum(ranks)) * sum(shape) * sum(ranks),
            work=_work(shape, ranks, route, device),
        )

    def batch(
        self,
        shape: Sequence[int],
        count: int,
        experts: int,
        *,
        itemsize: int = 4,
        device: str = "cpu",
    ) -> Batching:
        """How to merge `count` matrices of one shape: a pure function, nothing is timed.

        On a CPU by the sizes above, on a GPU where the crossover table has a batched
        eigen-decomposition; always in float64. The textbook is left as it is published.
        """
        p, entries = min(shape), math.prod(shape)
        if count < 2 or self.options.mode == "textbook" or not 1 <= experts <= p:
            return Batching()
        if device == "cpu":
            gains = p <= BATCHED_SIDE and entries <= BATCHED_ENTRIES
            most = min(BATCH, CACHED_ENTRIES // entries)
        else:
            problem = Problem("eigh", (p, p), "float64", batch=count * experts)
            gains = dispatch.backend(problem, torch.device(device)) != "loop"
            most = min(GPU_ENTRIES // entries, GPU_MATRICES) // experts
        size = min(count, most) if gains else 1
        if size < 2:
            return Batching()
        rank = p // experts
        panels, products = sum(shape) * rank, 3 * experts * rank**2
        factoring = max(3 * entries, entries + 2 * p * p + panels, 3 * panels + products)
        copies = (2 * experts + 1) * itemsize * entries  # deltas, and inputs that are no views
        one = copies + 8 * experts * factoring
        return Batching(size, size * one)

    def work(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        *,
        device: str = "cpu",
        factored: bool = False,
    ) -> Work:
        """Operations of merging deltas and of adding the low-rank pair to the base.

        As for `plan`; `factored` deltas are given as factors of these ranks.
        """
        found = _work(shape, ranks, choose_route(device, self.options), device, factored)
        return found + Work(gemm_fp32=2.0 * shape[0] * shape[1] * sum(ranks))

    def for_itemsize(self, itemsize: int) -> Solver:
        """The solver for deltas of so many bytes per entry: float64 stays float64.

        The textbook alone is left as it is published.
        """
        if itemsize < 8 or self.options.mode == "textbook":
            return self
        return Solver(dataclasses.replace(self.options, mode="exact"))

    @torch.no_grad()
    def subspaces(
        self,
        deltas: Sequence[Callable[[], Delta]],
        ranks: Sequence[int],
        *,
        energy: float | None = None,
        device: torch.device = CPU,
        at_once: bool = True,
    ) -> list[Subspace]:
        """`leading_subspaces` of every expert by the route of the options.

        Deltas, on `device`, are made when their turn comes: on a CPU one is alive at a time. On a
        GPU every expert has a stream and a host thread: one's eigen-decomposition, bound by
        latency, runs beside the products of the others; without `at_once` they take turns, in
        less memory, to the same bytes.
        """

        route = choose_route(device.type, self.options)

        def factor(make: Callable[[], Delta], rank: int) -> Subspace:
            return leading_subspaces(make(), rank, energy=energy, backend=route.subspace)

        if device.type == "cuda" and at_once and len(deltas) > 1:
            return _on_streams(factor, deltas, ranks, device)
        return [factor(make, rank) for make, rank in zip(deltas, ranks, strict=True)]

    @torch.no_grad()
    def combine(self, subspaces: Sequence[Subspace], weights: Sequence[float]) -> SpectralMerge:
        """`spectral_merge` by the route of the options, inside the accuracy contract."""
        left, right = subspaces[0].left, subspaces[0].right
        route = choose_route(left.device.type, self.options)
        share = sum(s.rank for s in subspaces) / max(1, min(left.shape[0], right.shape[0]))
        tolerance = CONTRACT_TOLERANCE if share <= CONTRACT_SHARE else FULL_RANK_TOLERANCE
        return spectral_merge(subspaces, weights, tolerance=tolerance, polar=route.polar)

    @torch.no_grad()
    def merge(
        self, deltas: Sequence[Delta], ranks: Sequence[int], weights: Sequence[float] | None = None
    ) -> SpectralMerge:
        """Merge deltas, dense or factored, as TSV-M does; float64 deltas always by `exact`.

        Parameters
        ----------
        deltas : sequence of Tensor, m x n, or FactoredDelta
            Finite.
        ranks : sequence of int
            The most triplets to keep of each.
        weights : sequence of float, optional
            Multiply each expert's singular values; 1 by default.

        Raises
        ------
        PlanError
            The plan passes `workspace`.
        """
        if len(deltas) == 0:
            raise UsageError("no deltas to merge", fix="pass at least one")
        first = deltas[0]
        device = first.device if isinstance(first, torch.Tensor) else first.left.device
        sizes = [d.element_size() for d in deltas if isinstance(d, torch.Tensor)]
        itemsize = max(sizes, default=4)
        solver = self.for_itemsize(itemsize)
        if self.options.workspace is not None:
            plan = solver.plan(first.shape, ranks, itemsize=itemsize, device=device.type)
            planned = plan.workspace
            if planned > self.options.workspace:
                raise PlanError(
                    f"factoring a {first.shape[0]} x {first.shape[1]} weight",
                    got=f"{planned:,} bytes of workspace planned",
                    expected=f"at most {self.options.workspace:,} bytes",
                    fix="raise the limit or lower the ranks",
                )
        makers = [functools.partial(_same, delta) for delta in deltas]
        subspaces = solver.subspaces(makers, ranks, device=device)
        return solver.combine(subspaces, [1.0] * len(deltas) if weights is None else weights)


def _same(delta: Delta) -> Delta:
    return delta


def _on_streams(
    factor: Callable[[Callable[[], Delta], int], Subspace],
    deltas: Sequence[Callable[[], Delta]],
    ranks: Sequence[int],
    device: torch.device,
) -> list[Subspace]:
    current = torch.cuda.current_stream(device)

    def work(make: Callable[[], Delta], rank: int, stream: torch.cuda.Stream) -> Subspace:
        torch.cuda.set_device(device)  # a thread of ours, which stays on it
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), torch.no_grad():
                found = factor(make, rank)
        finally:
            current.wait_stream(stream)
        for tensor in (found.left, found.values, found.right):
            if tensor.is_cuda:
                tensor.record_stream(current)
        return found

    lanes = _lanes(device, len(deltas), current.cuda_stream)
    found = [
        thread.submit(work, make, rank, stream)
        for make, rank, (thread, stream) in zip(deltas, ranks, lanes, strict=True)
    ]
    wait(found)
    # Popped, for an error that keeps its own future keeps the memory of its frames.
    return [found.pop(0).result() for _ in deltas]


@functools.cache
def _lanes(
    device: torch.device, count: int, caller: int
) -> tuple[tuple[ThreadPoolExecutor, torch.cuda.Stream], ...]:
    """The same threads, each with its stream, every time for one caller's stream.

    Each thread keeps handles of cuBLAS and cuSOLVER and their workspace. Callers that shared them
    would wait for each other's matrices.
    """
    return tuple(
        (ThreadPoolExecutor(1), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        for _ in range(count)
    )


def measured_rates(n: int = 512) -> Work:
    """Operations per second of every kind of work on the CPU, measured on n x n (about 1 s)."""
    sample = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    matrix = gram(sample)
    shape, third = (n, n), n // 3
    wide, narrow = sample.to(torch.float64), matrix.to(torch.float32)

    def rate(operations: float, run: Callable[[], object]) -> float:
        run()
        start = time.perf_counter()
        run()
        return operations / (time.perf_counter() - start)

    return Work(
        gemm_fp64=rate(2.0 * n**3, lambda: wide @ wide),
        gemm_fp32=rate(2.0 * n**3, lambda: sample @ sample),
        partial_eigen=rate(
            _partial_work(n, third), lambda: leading_eigenpairs(matrix.clone(), third)
        ),
        eigen_fp64=rate(_full_work(n), lambda: torch.linalg.eigh(matrix)),
        eigen_fp32=rate(_full_work(n), lambda: torch.linalg.eigh(narrow)),
        svd_fp32=rate(_svd_work(shape), lambda: torch.linalg.svd(sample, full_matrices=False)),
        svd_fp64=rate(_svd_work(shape), lambda: torch.linalg.svd(wide, full_matrices=False)),
    )


def _partial_work(n: int, count: int) -> float:
    return 4 / 3 * n**3 + 2.0 * n * n * count


def _full_work(n: int) -> float:
    return 4 / 3 * n**3 + 8 / 3 * n**3 + 2.0 * n**3


def _svd_work(shape: Sequence[int]) -> float:
    longer, p = max(shape), min(shape)
    return 4.0 * longer * p * p + 22.0 * p**3


def equalising_work(shape: Sequence[int], rank: int | None = None) -> Work:
    """Operations of `equalise` and of adding its pair; `rank` where the delta has factors."""
    longer, p = max(shape), min(shape)
    if rank is None:
        gemm = 9 / 8 * longer * p * p + 2.0 * longer * p * p
        factoring = Work(gemm_fp64=gemm, eigen_fp64=_full_work(p))
    else:
        gemm = 4.0 * sum(shape) * rank**2
        factoring = Work(gemm_fp64=gemm, svd_fp64=_svd_work((rank, rank)))
    return factoring + Work(gemm_fp32=2.0 * shape[0] * shape[1] * (p if rank is None else rank))


def _work(
    shape: Sequence[int], ranks: Sequence[int], route: Route, device: str, factored: bool = False
) -> Work:
    longer, p = max(shape), min(shape)
    total = sum(ranks)
    parts: dict[str, float] = dict.fromkeys((f.name for f in dataclasses.fields(Work)), 0.0)
    for rank in ranks:
        if factored:
            parts["gemm_fp64"] += 4.0 * sum(shape) * rank**2
            parts["svd_fp64"] += _svd_work((rank, rank))
            continue
        if route.subspace in ("svd", "textbook"):
            parts["svd_fp64" if route.subspace == "svd" else "svd_fp32"] += _svd_work(shape)
            continue
        parts["gemm_fp64"] += 9 / 8 * longer * p * p + 2.0 * longer * p * rank
        if route.subspace == "projector":
            parts["gemm_fp64"] += 2.0 * p**3
            parts["gemm_fp32"] += 10 * 6.0 * p**3
            parts["eigen_fp64"] += _full_work(math.ceil(1.1 * rank))
        elif is_partial(p, rank, device):
            parts["partial_eigen"] += _partial_work(p, rank)
        else:
            parts["eigen_fp64"] += _full_work(p)
    for rows in shape:
        if route.polar == "textbook":
            parts["svd_fp32"] += _svd_work((rows, total))
            parts["gemm_fp32"] += 2.0 * rows * total**2
        elif route.polar == "fp64" or total <= SMALL:
            parts["gemm_fp64"] += 4.0 * rows * total**2
            parts["eigen_fp64"] += _full_work(total)
        elif route.polar == "express":
            parts["gemm_fp64"] += 12 * (4.0 * rows * total**2 + 2.0 * total**3)
        else:
            parts["gemm_fp32"] += 2.7 * rows * total**2 + 0.6 * total**3
            parts["eigen_fp32"] += _full_work(total)
    joining = "gemm_fp64" if _polar_itemsize(route, total) == 8 else "gemm_fp32"
    parts[joining] += 2.0 * total**3 + 2.0 * shape[0] * total**2
    return Work(**parts)


def _polar_itemsize(route: Route, total: int) -> int:
    """Bytes per entry of the polar factors, and of the pair that they make."""
    if route.polar == "textbook":
        return 4
    return 8 if route.polar in ("fp64", "express") or total <= SMALL else 4


def _workspace(
    shape: Sequence[int], ranks: Sequence[int], itemsize: int, route: Route, device: str
) -> int:
    """Bytes beside inputs and output: the largest of factoring, whitening and joining.

    Counted from what is alive at each step; measured in benchmarks/results/workspace.csv.
    """
    m, n = shape
    longer, p, total = max(m, n), min(m, n), sum(ranks)
    item = 4 if route.subspace == "textbook" else 8
    # Matrix, vectors and workspace of a whole decomposition: LAPACK's 2 n^2, or cuSOLVER's.
    whole = 4 if device == "cpu" else 2 + dispatch.WORKSPACE
    held, factoring = 0, 0
    for rank in ranks:
        if route.subspace in ("svd", "textbook"):
            one = item * (2 * m * n + 4 * p * p)
        elif route.subspace == "projector":
            one = 8 * 7 * p * p + GUESSING
        elif is_partial(p, rank, device):
            one = 8 * (p * p + max(5 * p * rank, (longer + 2 * p) * rank))
        else:
            one = 8 * (whole * p * p + longer * rank)
        one += itemsize * m * n
        # On a GPU all experts are factored at once, on streams of their own.
        factoring = factoring + one if device != "cpu" else max(factoring, held + one)
        held += item * (m + n) * rank
    factors = item * (m + n) * total

    item = _polar_itemsize(route, total)
    kept = item * (m * total + total**2)
    copies = 3 if route.polar == "textbook" else 1
    left, right = (
        item * max(copies * rows * total + whole * total**2, 2 * rows * total + 2 * total**2)
        for rows in shape
    )
    joining = kept + item * ((n + m) * total + 2 * total**2)
    return int(max(factoring, factors + max(left, kept + right, joining)))
