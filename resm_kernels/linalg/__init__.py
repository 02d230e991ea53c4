"""Leading subspaces of deltas, polar factors of their concatenation, and what they merge to."""

from resm_kernels.linalg.batched import (
    SubspaceBatch,
    leading_subspaces_batch,
    spectral_merge_batch,
)
from resm_kernels.linalg.overlap import Overlap, subspace_overlap
from resm_kernels.linalg.polar import PolarFactor, polar_factor
from resm_kernels.linalg.solver import (
    Batching,
    Mode,
    Route,
    Solver,
    SolverOptions,
    SolverPlan,
    Work,
    equalising_work,
    measured_rates,
)
from resm_kernels.linalg.spectral import SpectralMerge, equalise, spectral_merge
from resm_kernels.linalg.subspace import FactoredDelta, Subspace, leading_subspaces, numerical_rank

__all__ = [
    "Batching",
    "FactoredDelta",
    "Mode",
    "Overlap",
    "PolarFactor",
    "Route",
    "Solver",
    "SolverOptions",
    "SolverPlan",
    "SpectralMerge",
    "Subspace",
    "SubspaceBatch",
    "Work",
    "equalise",
    "equalising_work",
    "leading_subspaces",
    "leading_subspaces_batch",
    "measured_rates",
    "numerical_rank",
    "polar_factor",
    "spectral_merge",
    "spectral_merge_batch",
    "subspace_overlap",
]
