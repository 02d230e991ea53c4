"""cuSOLVER's dense solvers on torch tensors: what torch does not bind, or calls in a loop.

Absent without harm: importing this module loads neither CUDA nor the extension, and `available`
says per solver why it cannot be used. Matrices are float32 or float64 on one CUDA device. A
row-major matrix is handed over as the transposed problem, so factors come back as views whose
columns are contiguous, and nothing is transposed in memory. cuSOLVER destroys what it is given:
a solver works on a copy unless `overwrite` lends it the input. Work runs on torch's current stream
of the tensor's device; the host waits once per call, for cuSOLVER's `info`.

Every solver raises `UsageError` (shape, dtype, device, limits of int32),
`MissingDependencyError` (not available: the reason of `available`), `torch.OutOfMemoryError` and
`SolverError`, a `NumericsError` that names the batch entries which hold NaN or Inf or did not
converge. Neither NaN nor a zero matrix reaches cuSOLVER; a zero matrix has zero values and
orthonormal vectors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch

from resm_kernels.errors import MissingDependencyError, NumericsError, UsageError

if TYPE_CHECKING:
    from resm_kernels import _cusolver

SolverName = Literal[
    "gesvdj_batched",
    "gesvda_batched",
    "syev_batched",
    "syevd",
    "syevdx",
    "gesvdp",
    "gesvdr",
    "polar",
]
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)
JACOBI_SIZE = 32
"""Largest side that `gesvdj_batched` takes."""
SHOWN = 20
"""Most batch entries that an error lists."""
SONAMES = {
    "12": ("libcusolver.so.11", "libcudart.so.12"),
    "13": ("libcusolver.so.12", "libcudart.so.13"),
}
"""CUDA's major version -> the libraries of cuSOLVER and of the CUDA runtime."""
KINDS = {torch.float32: "f4", torch.float64: "f8", torch.int32: "i4"}


class SolverError(NumericsError):
    """cuSOLVER failed, or entries of the batch are not finite or did not converge.

    Attributes
    ----------
    entries : dict of int to str
        Batch entry -> what is wrong with it; empty where the call as a whole failed.
    """

    def __init__(self, what: str, *, got: str, fix: str, entries: Mapping[int, str]) -> None:
        super().__init__(what, got=got, fix=fix)
        self.entries = dict(entries)


@dataclass(frozen=True)
class SVD:
    """A = left diag(values) right^T.

    Attributes
    ----------
    left, right : Tensor, (batch x) m x r and (batch x) n x r
        Orthonormal columns, which are contiguous.
    values : Tensor, (batch x) r
        Descending.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Eigen:
    """A vectors = vectors diag(values).

    Attributes
    ----------
    values : Tensor, (batch x) r
        Ascending, as from `torch.linalg.eigh`.
    vectors : Tensor, (batch x) n x r
        Orthonormal columns.
    """

    values: torch.Tensor
    vectors: torch.Tensor


@dataclass(frozen=True)
class Polar:
    """A = factor hermitian where m >= n, A = hermitian factor where m < n.

    Attributes
    ----------
    factor : Tensor, m x n
        Orthonormal columns (m >= n) or rows.
    hermitian : Tensor, p x p with p = min(m, n)
        Positive semi-definite.
    certificate : Tensor, 3, float64, on the device
        ||A - U H||, ||A||_F and 1 / cond_F(A).
    """

    factor: torch.Tensor
    hermitian: torch.Tensor
    certificate: torch.Tensor


Factors = TypeVar("Factors", SVD, Eigen)


def tells_no_memory(text: str) -> bool:
    """Whether an error's text says that memory ran out: libraries and drivers have no type for it.

    Where a handle cannot be made for lack of it, cuBLAS and cuSOLVER may also say NOT_INITIALIZED
    or INTERNAL_ERROR; torch's text names the call.
    """
    text = text.lower()
    if "alloc" in text or "out of memory" in text:
        return True
    failed = "status_not_initialized" in text or "status_internal_error" in text
    return failed and "create" in text


def available() -> dict[SolverName, str | None]:
    """Per solver None where it can be used, else the reason."""
    found = _found()
    if found.library is None:
        return dict.fromkeys(SOLVERS, found.reason)
    missing = found.library.missing()
    return {name: missing[name] or None for name in SOLVERS}


def libraries() -> dict[str, str]:
    """Version and file of cuSOLVER, file of the CUDA runtime; empty where there is none."""
    library = _found().library
    if library is None:
        return {}
    return {
        "cusolver": f"{library.version()} ({library.solver_path()})",
        "cudart": library.runtime_path(),
    }


def gesvdj_batched(matrices: torch.Tensor, *, overwrite: bool = False) -> SVD:
    """Return the SVDs of small matrices, by Jacobi rotations.

    Parameters
    ----------
    matrices : Tensor, B x m x n
        m and n at most `JACOBI_SIZE`.
    overwrite : bool
        The input may be destroyed; spares a copy where its matrices lie densely.

    Returns
    -------
    SVD
        r = min(m, n).

    Notes
    -----
    cusolverDn<t>gesvdjBatched with its default tolerance (machine epsilon) and sweeps (100). torch
    calls it for square batches only, and allocates anew every time.
    """
    task = _Task("gesvdj_batched", matrices, 3, overwrite=overwrite)
    batch, m, n = matrices.shape
    rank = min(m, n)
    left, right = task.columns(m, m), task.columns(n, n)
    values = task.new(batch, rank)
    task.run(left, values, right)
    return SVD(left[..., :rank], task.zeroed(values), right[..., :rank])


def gesvda_batched(
    matrices: torch.Tensor, rank: int | None = None, *, overwrite: bool = False
) -> SVD:
    """Return the leading part of the SVDs of tall or wide matrices, by their Gram matrices.

    Parameters
    ----------
    matrices : Tensor, B x m x n
        The layout that needs no transposition is row-major for m < n and column-major for m >= n.
    rank : int, optional
        Triplets to return, min(m, n) by default.
    overwrite : bool
        The input may be changed; spares a copy where the layout fits.

    Notes
    -----
    cusolverDn<t>gesvdaStridedBatched without residuals. Accurate for singular values far from zero:
    left vectors of small ones are not orthonormal; the manual advises float64. A matrix of lower
    rank than asked for can come back as not converged.
    """
    task = _Task("gesvda_batched", matrices, 3, tall=True, overwrite=overwrite)
    batch, m, n = matrices.shape
    rank = min(m, n) if rank is None else rank
    if not 1 <= rank <= min(m, n):
        raise _usage("gesvda_batched", f"rank = {rank}", f"1 to {min(m, n)}")
    left, right, values = task.columns(m, rank), task.columns(n, rank), task.new(batch, rank)
    task.run(left, values, right, before=(rank,))
    return SVD(left, task.zeroed(values), right)


def syev_batched(matrices: torch.Tensor, *, overwrite: bool = False) -> Eigen:
    """Return all eigenpairs of symmetric matrices in one batched call.

    Parameters
    ----------
    matrices : Tensor, B x n x n
        Symmetric; the lower triangle is read.
    overwrite : bool
        The eigenvectors may take the place of the input.

    Notes
    -----
    cusolverDnXsyevBatched (cuSOLVER 11.7.1, CUDA 12.6 update 2). Batches past int32 are split.
    """
    task = _Task("syev_batched", matrices, 3, symmetric=True, overwrite=overwrite)
    batch, n, _ = matrices.shape
    values = task.new(batch, n)
    task.run(values)
    return Eigen(task.zeroed(values), task.vectors())


def syevd(matrix: torch.Tensor, *, overwrite: bool = False) -> Eigen:
    """Return all eigenpairs of one symmetric matrix, by divide and conquer.

    Parameters
    ----------
    matrix : Tensor, n x n
        Symmetric; the lower triangle is read.
    overwrite : bool
        The eigenvectors may take the place of the input.

    Notes
    -----
    cusolverDnXsyevd, in deterministic mode.
    """
    task = _Task("syevd", matrix, 2, symmetric=True, overwrite=overwrite)
    values = task.new(1, matrix.shape[0])
    task.run(values)
    return Eigen(task.zeroed(values)[0], task.vectors()[0])


def syevdx(matrix: torch.Tensor, count: int, *, overwrite: bool = False) -> Eigen:
    """Return the eigenpairs of the `count` largest eigenvalues of one symmetric matrix.

    Parameters
    ----------
    matrix : Tensor, n x n
        Symmetric; the lower triangle is read.
    count : int
        1 to n.
    overwrite : bool
        The eigenvectors may take the place of the input.

    Returns
    -------
    Eigen
        r = `count`, ascending.

    Notes
    -----
    cusolverDnXsyevdx by index range, in deterministic mode. torch has no partial spectrum.
    """
    task = _Task("syevdx", matrix, 2, symmetric=True, overwrite=overwrite)
    n = matrix.shape[0]
    if not 1 <= count <= n:
        raise _usage("syevdx", f"count = {count}", f"1 to {n}")
    values = task.new(1, n)
    task.run(values, before=(count,))
    return Eigen(task.zeroed(values)[0, :count], task.vectors()[0, :, :count])


def gesvdp(matrix: torch.Tensor, *, overwrite: bool = False) -> tuple[SVD, float]:
    """Return the economy SVD of one matrix through its polar decomposition.

    Parameters
    ----------
    matrix : Tensor, m x n
    overwrite : bool
        The input may be destroyed.

    Returns
    -------
    svd : SVD
        r = min(m, n).
    perturbation : float
        What cuSOLVER added to singular values near zero: their absolute error.

    Notes
    -----
    cusolverDnXgesvdp, in deterministic mode. torch has no binding of it.
    """
    task = _Task("gesvdp", matrix, 2, overwrite=overwrite)
    m, n = matrix.shape
    rank = min(m, n)
    left, right, values = task.columns(m, rank), task.columns(n, rank), task.new(1, rank)
    perturbation = task.run(left, values, right)
    return SVD(left[0], task.zeroed(values)[0], right[0]), perturbation


def gesvdr(
    matrix: torch.Tensor,
    rank: int,
    *,
    oversampling: int | None = None,
    iterations: int = 2,
    overwrite: bool = False,
) -> SVD:
    """Return the approximate leading part of one SVD, by a randomised range finder.

    Parameters
    ----------
    matrix : Tensor, m x n
    rank : int
        Triplets to return; meant for rank << min(m, n).
    oversampling : int, optional
        More directions to sample: 2 rank by default, as the manual advises, as far as there are.
    iterations : int
        Power iterations.
    overwrite : bool
        The input may be destroyed.

    Notes
    -----
    cusolverDnXgesvdr, in deterministic mode. Not accurate where the spectrum has a flat tail, as a
    fine-tuning delta has: errors of 0.4 to 0.6 in relative norm with two iterations.
    """
    task = _Task("gesvdr", matrix, 2, overwrite=overwrite)
    m, n = matrix.shape
    most = min(m, n)
    extra = max(0, min(2 * rank, most - rank)) if oversampling is None else oversampling
    if rank < 1 or extra < 0 or iterations < 0 or rank + extra > most:
        got = f"rank = {rank}, oversampling = {extra}, iterations = {iterations}"
        raise _usage("gesvdr", got, f"rank >= 1 and rank + oversampling <= {most}, none negative")
    left, right, values = task.columns(m, most), task.columns(n, most), task.new(1, most)
    task.run(left, values, right, before=(rank, extra, iterations))
    return SVD(left[0, :, :rank], task.zeroed(values)[0, :rank], right[0, :, :rank])


def polar(matrix: torch.Tensor, *, overwrite: bool = False) -> Polar:
    """Return the polar decomposition of one matrix, by QDWH.

    Parameters
    ----------
    matrix : Tensor, m x n
        The layout that needs no transposition is row-major for m < n and column-major for m >= n.
    overwrite : bool
        The polar factor may take the place of the input.

    Notes
    -----
    cusolverDnXpolar (cuSOLVER 12.2, CUDA 13.2 update 1). Of a zero matrix the factor is the
    identity.
    """
    task = _Task("polar", matrix, 2, tall=True, overwrite=overwrite)
    order = min(matrix.shape)
    hermitian = task.columns(order, order)
    # cuSOLVER 12.2.0 reads these before it writes them.
    certificate = torch.zeros(1, 3, dtype=torch.float64, device=matrix.device)
    task.run(hermitian, certificate)
    return Polar(task.matrices[0], task.zeroed(hermitian)[0], task.zeroed(certificate)[0])


def by_shape(solve: Callable[..., Factors], matrices: Sequence[torch.Tensor]) -> list[Factors]:
    """Solve unequal matrices: one batched call per shape and dtype.

    Parameters
    ----------
    solve : callable
        From B x m x n to SVD or Eigen, such as `gesvdj_batched` or `partial(gesvda_batched,
        rank=8)`; called with `overwrite=True`, since the batch is a copy.
    matrices : sequence of Tensor, m x n

    Returns
    -------
    list
        In the order of `matrices`.

    Raises
    ------
    SolverError
        Names positions in `matrices`, of all batches together.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, matrix in enumerate(matrices):
        key = (tuple(matrix.shape), matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(position)
    results: dict[int, Factors] = {}
    wrong: dict[int, str] = {}
    for positions in groups.values():
        stack = torch.stack([matrices[position] for position in positions])
        try:
            found = solve(stack, overwrite=True)
        except SolverError as error:
            if not error.entries:
                raise
            wrong |= {positions[entry]: why for entry, why in error.entries.items()}
            continue
        parts = [getattr(found, field.name) for field in dataclasses.fields(found)]
        for entry, position in enumerate(positions):
            results[position] = type(found)(*(part[entry] for part in parts))
    if wrong:
        raise _failure("cuSOLVER", wrong)
    return [results[position] for position in range(len(matrices))]


@dataclass(frozen=True)
class _Found:
    """The libraries, or why there are none; tests put a fake here."""

    library: _cusolver.Library | None
    reason: str | None = None
    device_type: str = "cuda"


@functools.cache
def _found() -> _Found:
    try:
        extension = _extension()
    except ImportError as error:
        return _Found(None, f"the extension is not built ({error})")
    if torch.version.cuda is None:
        return _Found(None, f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return _Found(None, "torch finds no CUDA device")
    try:
        return _Found(extension.Library(*candidates(torch.version.cuda)))
    except extension.CusolverError as error:
        return _Found(None, str(error))


def _extension() -> ModuleType:
    return importlib.import_module("resm_kernels._cusolver")


def candidates(cuda: str) -> tuple[list[str], list[str]]:
    """What to open for torch's CUDA version: names first, then wheels' files, then names again.

    The extension asks for the names among what the process holds before it opens anything.
    """
    sonames = SONAMES.get(cuda.partition(".")[0])
    if sonames is None:
        return [], []
    folders = [Path(torch.__file__).parent / "lib"]
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels.submodule_search_locations or []) if wheels else []:
        folders += sorted(Path(root).glob("*/lib"))
    solver, runtime = (
        [*(str(folder / name) for folder in folders if (folder / name).is_file()), name]
        for name in sonames
    )
    return solver, runtime


class _Solvers(threading.local):
    """A thread's solvers, since cuSOLVER handles are not to be shared between threads."""

    def __init__(self, every: weakref.WeakSet[_cusolver.Solver], change: threading.Lock) -> None:
        self._mine: dict[tuple[_cusolver.Library, int], _cusolver.Solver] = {}
        self._every, self._change = every, change

    def of(self, library: _cusolver.Library, device: torch.device) -> _cusolver.Solver:
        """The one for a device, which is the current one: its handle and workspace stay."""
        key = (library, device.index or 0)
        if key not in self._mine:
            allocate = functools.partial(torch.empty, dtype=torch.uint8, device=device)
            made = _extension().Solver(*key, allocate)
            with self._change:
                self._every.add(made)
            self._mine[key] = made
        return self._mine[key]

    def every(self) -> list[_cusolver.Solver]:
        """Those of all threads."""
        with self._change:
            return list(self._every)


@functools.cache
def _solvers() -> _Solvers:
    return _Solvers(weakref.WeakSet(), threading.Lock())


def release() -> None:
    """Give back the workspace that solvers keep, of all threads, but for those at work."""
    for solver in _solvers().every():
        solver.release()


def workspace() -> int:
    """Device bytes of workspace that solvers keep, of all threads."""
    return sum(solver.device_bytes for solver in _solvers().every())


class _Task:
    """One call: checks, the copy to work on, what is flagged, and the read of the outcome."""

    def __init__(
        self,
        name: SolverName,
        matrices: torch.Tensor,
        dims: int,
        *,
        overwrite: bool,
        tall: bool = False,
        symmetric: bool = False,
    ) -> None:
        found = _found()
        reason = available()[name]
        if reason is not None or found.library is None:
            raise MissingDependencyError(
                f"cuSOLVER's {name} is not available",
                got=reason,
                fix="see `resm doctor`; torch.linalg offers the same factorisations",
            )
        expected = f"a {'batch of matrices' if dims == 3 else 'matrix'}, float32 or float64, on "
        if (
            matrices.ndim != dims
            or 0 in matrices.shape
            or matrices.dtype not in (torch.float32, torch.float64)
            or matrices.device.type != found.device_type
        ):
            got = f"{tuple(matrices.shape)}, {matrices.dtype}, on {matrices.device}"
            raise _usage(name, got, expected + f"{found.device_type}, not empty")
        if symmetric and matrices.shape[-1] != matrices.shape[-2]:
            raise _usage(name, f"shape {tuple(matrices.shape)}", "square matrices")
        self.name = name
        self._library, self._device = found.library, matrices.device
        batch = matrices.detach() if dims == 3 else matrices.detach()[None]
        # inf and NaN stay what they are in a maximum of absolute values: one pass finds both.
        largest = torch.linalg.vector_norm(batch, float("inf"), dim=(1, 2))
        nonfinite, self._zero = ~torch.isfinite(largest), largest == 0
        self._status = torch.stack([torch.zeros_like(nonfinite), nonfinite]).to(torch.int32)
        self.matrices = _dense(batch, tall=tall, overwrite=overwrite)
        replaced = (nonfinite | self._zero)[:, None]
        self.matrices.masked_fill_(replaced[..., None], 0.0)
        self.matrices.diagonal(dim1=1, dim2=2).masked_fill_(replaced, 1.0)

    def new(self, *shape: int) -> torch.Tensor:
        return self.matrices.new_empty(shape)

    def columns(self, rows: int, columns: int) -> torch.Tensor:
        """A batch x rows x columns output with contiguous columns."""
        return self.new(self.matrices.shape[0], columns, rows).mT

    def vectors(self) -> torch.Tensor:
        """The eigenvectors, which are by columns in the memory of the input."""
        by_rows = self.matrices.stride(-1) == 1 and self.matrices.shape[-1] > 1
        return self.matrices.mT if by_rows else self.matrices

    def zeroed(self, values: torch.Tensor) -> torch.Tensor:
        """`values` with zeros for the zero matrices, in whose place an identity was solved."""
        return values.masked_fill_(self._zero.view(-1, *[1] * (values.ndim - 1)), 0.0)

    def run(self, *outputs: torch.Tensor, before: tuple[int, ...] = ()) -> float:
        """Call the solver and raise what its outcome says; gesvdp's second result, else 0."""
        arrays = [_array(tensor) for tensor in outputs]
        given = (_array(self.matrices), *before, *arrays, _array(self._status))
        error_type: type[Exception] = _extension().CusolverError
        try:
            with _current(self._device) as stream:
                solver = _solvers().of(self._library, self._device)
                result = getattr(solver, self.name)(*given, stream)
        except ValueError as error:
            raise UsageError(f"cuSOLVER's {self.name}: {error}") from error
        except error_type as error:
            if tells_no_memory(str(error)):
                raise torch.OutOfMemoryError(f"cuSOLVER's {self.name}: {error}") from error
            raise SolverError(
                f"cuSOLVER's {self.name} failed",
                got=str(error),
                fix="use torch.linalg for this factorisation",
                entries={},
            ) from error
        outcome, extra = result if isinstance(result, tuple) else (result, 0.0)
        wrong = dict.fromkeys(outcome.nonfinite, "NaN or Inf")
        wrong |= {entry: f"info = {info}" for entry, info in outcome.failed}
        if wrong:
            raise _failure(f"cuSOLVER's {self.name}", wrong)
        return float(extra)


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Make a device the current one, and tell its current stream.

    torch makes no context on the device that was current before where there was none.
    """
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _dense(batch: torch.Tensor, *, tall: bool, overwrite: bool) -> torch.Tensor:
    """What cuSOLVER may destroy: the batch or a copy, dense, by rows or by columns.

    `tall`: m >= n goes by columns and m < n by rows; to cuSOLVER both are a tall problem.
    """
    if tall:
        by_columns = batch.shape[1] >= batch.shape[2]
    else:
        by_columns = batch.mT.is_contiguous() and not batch.is_contiguous()
    rows = batch.mT if by_columns else batch
    if not (overwrite and rows.is_contiguous()):
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.mT if by_columns else rows


def _array(tensor: torch.Tensor) -> _cusolver.Array:
    array: _cusolver.Array = _extension().Array(
        tensor.data_ptr(), KINDS[tensor.dtype], tensor.shape, tensor.stride()
    )
    return array


def _usage(name: SolverName, got: str, expected: str) -> UsageError:
    return UsageError(f"cuSOLVER's {name}", got=got, expected=expected)


def _failure(solver: str, wrong: Mapping[int, str]) -> SolverError:
    listed = [f"entry {entry}: {wrong[entry]}" for entry in sorted(wrong)]
    if len(listed) > SHOWN:
        listed[SHOWN:] = [f"and {len(listed) - SHOWN} more"]
    return SolverError(
        f"{solver} could not factor {len(wrong)} matri{'x' if len(wrong) == 1 else 'ces'}",
        got="; ".join(listed),
        fix="check these inputs for NaN and Inf, or factor them with torch.linalg",
        entries=wrong,
    )
