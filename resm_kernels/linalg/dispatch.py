"""Dense factorisations by the backend that the crossover table names: torch, or cuSOLVER itself."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from resm_kernels.linalg import cusolver
from resm_kernels.linalg.crossover import Operation, Problem, choose, committed_tables, table_for
from resm_kernels.linalg.cusolver import SolverError


class Eigh(NamedTuple):
    """Eigenvalues, ascending, eigenvectors, and why a solver of ours was left for torch's."""

    values: torch.Tensor
    vectors: torch.Tensor
    fallback: str | None = None


class Svd(NamedTuple):
    """U, S and V^T of a thin decomposition, and why a solver of ours was left for torch's."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    fallback: str | None = None


WORKSPACE = 3
"""Matrices of the problem's size in the workspace of cuSOLVER's syevd: 3.01 n^2 numbers at
n = 15,000 (JuliaGPU/CUDA.jl #2413); those of the other solvers are taken for the same."""
PERTURBATION = 1e-12
"""What gesvdp may add to singular values, over the largest: one of 1e-6 is then right to 1e-6."""


def backend(problem: Problem, device: torch.device) -> str:
    """What runs a problem on a device: `choose` of what is installed and of the device's card."""
    if device.type != "cuda":
        return "torch"
    table = table_for(committed_tables(), card(device))
    return choose(table, problem, usable_solvers(), torch.__version__)


def identity(device: torch.device) -> dict[str, Any] | None:
    """What decides between backends beside the shapes: for a plan's id. None on a CPU."""
    if device.type != "cuda":
        return None
    table = table_for(committed_tables(), card(device))
    return {
        "card": card(device),
        "table": [table.card, table.commit, [repr(rule) for rule in table.rules]],
        "solvers": sorted(usable_solvers()),
        "libraries": {n: v.partition(" (")[0] for n, v in cusolver.libraries().items()},
    }


def eigh(matrices: torch.Tensor) -> Eigh:
    """All eigenpairs of symmetric n x n matrices, batched or not; the matrices stay as they are.

    Where a solver of ours fails, torch's has to do; memory that runs out is no such failure.
    """
    *batch, n, _ = matrices.shape
    chosen = backend(_problem("eigh", matrices), matrices.device) if n else "torch"
    fallback = None
    try:
        if chosen == "syev_batched":
            found = cusolver.syev_batched(matrices.reshape(-1, n, n))
            return Eigh(found.values.reshape(*batch, n), found.vectors.reshape(*batch, n, n))
        if chosen == "syevd" and not batch:
            found = cusolver.syevd(matrices)
            return Eigh(found.values, found.vectors)
    except SolverError as error:
        fallback = f"{chosen}: {error.got}"
    values, vectors = torch.linalg.eigh(matrices)
    return Eigh(values, vectors, fallback)


def leading_eigh(matrix: torch.Tensor, count: int) -> Eigh | None:
    """The `count` largest eigenvalues, ascending, and their vectors; None where `eigh` has to do.

    `matrix` stays as it is.
    """
    problem = _problem("leading", matrix, count)
    if not count or backend(problem, matrix.device) != "syevdx":
        return None
    found = cusolver.syevdx(matrix, count)
    return Eigh(found.values, found.vectors)


def svd(matrix: torch.Tensor) -> Svd:
    """The thin decomposition of one m x n matrix.

    gesvdp moves the singular values of a matrix of deficient rank; torch's has to do for these, as
    where it fails.
    """
    fallback = None
    if backend(_problem("svd", matrix), matrix.device) == "gesvdp":
        try:
            found, perturbation = cusolver.gesvdp(matrix)
            if perturbation <= PERTURBATION * float(found.values[0]):
                return Svd(found.left, found.values, found.right.mT)
        except SolverError as error:
            fallback = f"gesvdp: {error.got}"
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Svd(left, values, right, fallback)


def kept_space(problem: Problem, device: torch.device) -> int:
    """Bytes that a thread's solver keeps after a problem: `WORKSPACE` times its matrices.

    0 where torch does it, whose workspace goes back to its allocator.
    """
    if backend(problem, device) not in cusolver.SOLVERS:
        return 0
    itemsize = 8 if problem.dtype == "float64" else 4
    return WORKSPACE * itemsize * problem.batch * math.prod(problem.shape)


def joined(*reasons: str | None) -> str | None:
    """Reasons for leaving routes, those that there are."""
    return "; ".join(filter(None, reasons)) or None


def _problem(operation: Operation, matrices: torch.Tensor, count: int | None = None) -> Problem:
    *batch, m, n = matrices.shape
    dtype = str(matrices.dtype).removeprefix("torch.")
    return Problem(operation, (m, n), dtype, math.prod(batch), count)


@functools.cache
def usable_solvers() -> frozenset[str]:
    """Solvers of the extension that can be called here."""
    return frozenset(name for name, reason in cusolver.available().items() if reason is None)


@functools.cache
def card(device: torch.device) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(device)
