"""Leading subspaces of deltas, polar factors of their concatenation, and what they merge to."""

from resm_kernels.linalg.overlap import Overlap, subspace_overlap
from resm_kernels.linalg.polar import PolarFactor, polar_factor
from resm_kernels.linalg.solver import (
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
    "Work",
    "equalise",
    "equalising_work",
    "leading_subspaces",
    "measured_rates",
    "numerical_rank",
    "polar_factor",
    "spectral_merge",
    "subspace_overlap",
]
