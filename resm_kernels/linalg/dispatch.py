"""Dense factorisations by the backend that the crossover table names: torch, or cuSOLVER itself."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from resm_kernels.linalg import cusolver
from resm_kernels.linalg.crossover import Problem, choose, committed_tables, table_for

Pair = tuple[torch.Tensor, torch.Tensor]

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


def eigh(matrices: torch.Tensor, *, overwrite: bool = False) -> Pair:
    """All eigenvalues, ascending, and eigenvectors of symmetric n x n matrices, batched or not.

    `overwrite`: the matrices are not needed any more.
    """
    *batch, n, _ = matrices.shape
    chosen = backend(_problem("eigh", matrices), matrices.device) if n else "torch"
    if chosen == "syev_batched":
        found = cusolver.syev_batched(matrices.reshape(-1, n, n), overwrite=overwrite)
        return found.values.reshape(*batch, n), found.vectors.reshape(*batch, n, n)
    if chosen == "syevd" and not batch:
        found = cusolver.syevd(matrices, overwrite=overwrite)
        return found.values, found.vectors
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def leading_eigh(matrix: torch.Tensor, count: int) -> Pair | None:
    """The `count` largest eigenvalues, ascending, and their vectors; None where `eigh` has to do.

    `matrix` stays as it is.
    """
    problem = _problem("leading", matrix, count)
    if not count or backend(problem, matrix.device) != "syevdx":
        return None
    found = cusolver.syevdx(matrix, count)
    return found.values, found.vectors


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin decomposition of one m x n matrix, as torch.linalg.svd gives it: U, S, V^T.

    gesvdp moves the singular values of a matrix of deficient rank; torch's has to do for these.
    """
    if backend(_problem("svd", matrix), matrix.device) == "gesvdp":
        found, perturbation = cusolver.gesvdp(matrix)
        if perturbation <= PERTURBATION * float(found.values[0]):
            return found.left, found.values, found.right.mT
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _problem(operation: Any, matrices: torch.Tensor, count: int | None = None) -> Problem:
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
