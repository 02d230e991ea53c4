"""Factorisations by themselves: every route, every check that leaves one, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.spectral import accuracy_rows
from resm_kernels.errors import PlanError
from resm_kernels.linalg import (
    FactoredDelta,
    Solver,
    SolverOptions,
    lapack,
    leading_subspaces,
    polar,
    polar_factor,
    projector,
)
from resm_kernels.linalg.eigen import PARTIAL_SIZE, gram, leading_eigenpairs
from resm_kernels.linalg.express import best_quintic, orthonormalise, schedule
from resm_kernels.linalg.lapack import Tridiagonal
from resm_kernels.linalg.solver import Route, choose_route, measured_rates
from resm_kernels.linalg.tridiagonal import twisted_vectors
from tests import oracle

N = PARTIAL_SIZE + 44
KINDS = ["noise", "power", "exponential", "lora16-bf16", "noise-bf16"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def symmetric(values: list[float] | np.ndarray, seed: int = 0) -> torch.Tensor:
    """A symmetric matrix with the eigenvalues given."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return torch.from_numpy((q * np.asarray(values)) @ q.T)


def panels(rows: int, ranks: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Random panels of orthonormal columns."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(np.linalg.qr(rng.standard_normal((rows, r)))[0]) for r in ranks]


def polar_error(found: polar.PolarFactor, given: list[torch.Tensor]) -> float:
    expected = oracle.polar(torch.cat(given, dim=1).numpy())
    return oracle.error((found.basis.double() @ found.mixing.double()).numpy(), expected)


# Eigenpairs


@pytest.mark.parametrize("kind", [*KINDS, "steep"])
@pytest.mark.parametrize("share", [0.1, 0.34, 0.5])
def test_partial_eigenpairs_are_those_of_the_full_decomposition(kind: str, share: float) -> None:
    delta = torch.from_numpy(oracle.make_delta(kind, N + 30, N, np.random.default_rng(0)))
    matrix, count = gram(delta), int(share * N)
    expected, _ = torch.linalg.eigh(matrix)
    found = leading_eigenpairs(matrix.clone(), count)
    norm = float(expected[-1])
    if kind != "steep":
        assert (found.backend, found.fallback) == ("partial", None)
    assert found.vectors.shape == (N, count)
    assert torch.allclose(found.values, expected.flip(0), rtol=0, atol=1e-12 * norm)
    residual = matrix @ found.vectors - found.vectors * found.values[:count]
    assert float(residual.abs().max()) <= 1e-8 * norm
    overlap = found.vectors.T @ found.vectors - torch.eye(count)
    assert float(overlap.abs().max()) <= 1e-8


def test_ordinary_spectra_take_the_partial_route() -> None:
    for kind in KINDS:
        delta = torch.from_numpy(oracle.make_delta(kind, N, N, np.random.default_rng(1)))
        assert leading_eigenpairs(gram(delta), N // 3).backend == "partial"


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(N, N, dtype=torch.float64),
        torch.eye(N, dtype=torch.float64),
        torch.diag(torch.arange(N, dtype=torch.float64)),
        torch.block_diag(torch.ones(N // 2, N // 2), torch.eye(N - N // 2)).double(),
        symmetric([1.0] * (N // 2) + [0.5] * (N - N // 2)),
        symmetric([1.0] * 3 + [1e-3] * (N - 3)),
    ],
    ids=["zero", "identity", "diagonal", "blocks", "repeated", "tail"],
)
def test_clustered_spectra_still_give_orthonormal_eigenvectors(matrix: torch.Tensor) -> None:
    count = N // 3
    found = leading_eigenpairs(matrix.clone(), count)
    assert torch.isfinite(found.vectors).all()
    overlap = found.vectors.T @ found.vectors - torch.eye(count)
    assert float(overlap.abs().max()) <= 1e-8
    residual = matrix @ found.vectors - found.vectors * found.values[:count]
    assert float(residual.abs().max()) <= 1e-8 * max(float(found.values[0]), 1.0)


def test_a_repeated_spectrum_says_why_it_fell_back() -> None:
    found = leading_eigenpairs(symmetric([1.0] * (N // 2) + [0.5] * (N - N // 2)), N // 3)
    assert found.backend == "full"
    assert found.fallback is not None
    assert "too close" in found.fallback


def test_tridiagonal_of_one_row_and_its_reflectors() -> None:
    one = Tridiagonal(np.array([[3.0]]))
    assert one.eigenvalues().tolist() == [3.0]
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20, 20))
    a = a + a.T
    reduced = Tridiagonal(a.copy())
    q = np.eye(20)
    reduced.back_transform(q)  # rows hold the columns of Q
    t = np.diag(reduced.diagonal) + np.diag(reduced.off_diagonal, 1)
    t += np.diag(reduced.off_diagonal, -1)
    assert np.allclose(q.T @ t @ q, a, atol=1e-12)


def test_twisted_vectors_of_a_decoupled_matrix() -> None:
    """Two blocks that do not touch: every vector lives in one of them."""
    diagonal, off = np.array([2.0, 3.0, 7.0, 9.0]), np.array([1.0, 0.0, 0.5])
    t = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    values, vectors = np.linalg.eigh(t)
    found = twisted_vectors(diagonal, off, values)
    assert np.allclose(np.abs(np.sum(found * vectors, axis=0)), 1.0, atol=1e-12)


def test_vectors_of_null_eigenvalues_are_not_looked_for() -> None:
    delta = torch.from_numpy(oracle.make_delta("lora", N, N, np.random.default_rng(0)))
    found = leading_subspaces(delta, N // 3)
    assert (found.rank, found.backend, found.fallback) == (4, "gram-partial", None)
    nothing = leading_eigenpairs(torch.zeros(N, N, dtype=torch.float64), 10, floor=1e-12)
    assert nothing.vectors.shape == (N, 0)


def test_gram_is_exact_to_float64_for_float32_inputs() -> None:
    delta = oracle.make_delta("power", 1100, 37, np.random.default_rng(0))
    wide = delta.astype(np.float64)
    found = gram(torch.from_numpy(delta)).numpy()
    assert np.abs(found - wide.T @ wide).max() <= 1e-14 * np.abs(found).max()


# Subspaces


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["gram", "projector", "svd"])
@pytest.mark.parametrize("shape", [(N, N), (N, 2 * N), (700, N)])
def test_subspaces_are_the_leading_ones(kind: str, backend: str, shape: tuple[int, int]) -> None:
    delta = oracle.make_delta(kind, *shape, np.random.default_rng(3))
    rank = N // 3
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    found = leading_subspaces(torch.from_numpy(delta), rank, backend=backend)  # type: ignore[arg-type]
    assert found.rank == rank
    gap = (s[rank - 1] - s[rank]) / s[0]
    # The projector's sign iteration runs in float32 and is cut exactly afterwards.
    tolerance = (1e-4 if backend == "projector" else 1e-14 / gap + 1e-9) * rank**0.5
    truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]
    mine = (found.left * found.values) @ found.right.T
    assert oracle.error(mine.numpy(), truncated) <= tolerance
    eye = torch.eye(rank, dtype=torch.float64)
    assert float((found.right.T @ found.right - eye).abs().max()) <= 1e-8
    slack = 1e-3 if backend == "projector" else 1e-6
    assert float((found.left.T @ found.left - eye).abs().max()) <= slack


def test_a_projector_that_cannot_separate_the_rank_falls_back() -> None:
    few = torch.from_numpy(oracle.make_delta("lora", N, N, np.random.default_rng(0)))
    found = leading_subspaces(few, N // 3, backend="projector")
    assert found.rank == 4
    assert "projector" in str(found.fallback)
    assert projector.leading_eigenspace(torch.eye(N, dtype=torch.float64), N // 3) is None
    assert projector.leading_eigenspace(gram(few), N // 3) is None


def test_zero_deltas_and_rank_zero_on_every_backend() -> None:
    for backend in ("gram", "projector", "svd", "textbook"):
        none = leading_subspaces(torch.zeros(N, N), N // 3, backend=backend)  # type: ignore[arg-type]
        assert none.rank == 0
        assert none.left.shape == (N, 0)
        delta = torch.ones(N, N)
        assert leading_subspaces(delta, 0, backend=backend).rank == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["noise", "power"])
def test_factored_deltas_equal_dense_ones(kind: str) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((120, 16)), rng.standard_normal((90, 16))
    if kind == "power":
        left *= (1.0 + np.arange(16)) ** -2.0
    factored = FactoredDelta(torch.from_numpy(left), torch.from_numpy(right))
    dense = leading_subspaces(torch.from_numpy(left @ right.T), 10, backend="svd")
    found = leading_subspaces(factored, 10)
    assert factored.shape == (120, 90)
    assert found.backend == "factored"
    assert torch.allclose(found.values, dense.values, rtol=1e-12)
    mine, theirs = (s.left * s.values @ s.right.T for s in (found, dense))
    assert oracle.error(mine.numpy(), theirs.numpy()) <= 1e-11
    assert leading_subspaces(factored, 90).rank == 16
    assert leading_subspaces(factored, 16, energy=0.5).rank < 16


def test_factors_of_low_numerical_rank_are_clamped() -> None:
    left = torch.ones(30, 8)
    assert leading_subspaces(FactoredDelta(left, torch.ones(20, 8)), 8).rank == 1
    assert leading_subspaces(FactoredDelta(left, torch.zeros(20, 8)), 8).rank == 0


# Polar factors

FULL = [110, 110, 110]


@pytest.mark.parametrize("rows", [330, 331, 900])
@pytest.mark.parametrize("ranks", [FULL, [130, 140], [80] * 4, [300], [1, 299]])
def test_mixed_polar_factors_err_as_float32_does(rows: int, ranks: list[int]) -> None:
    given = panels(rows, ranks)
    found = polar_factor(given)
    assert (found.backend, found.fallback) == ("polar-mixed", None)
    textbook = polar_factor(given, backend="textbook")
    noise = 2e-6  # of float32 eigenvectors of this order, measured
    assert polar_error(found, given) <= max(2 * polar_error(textbook, given), noise)


def test_express_agrees_where_no_direction_is_weak() -> None:
    given = panels(900, FULL)
    found = polar_factor(given, backend="express")
    assert (found.backend, found.fallback) == ("polar-express", None)
    assert polar_error(found, given) <= 1e-9


def leaning(angle: float, shared: int = 1) -> list[torch.Tensor]:
    """Two panels of 150 columns of which `shared` pairs are `angle` apart."""
    rng = np.random.default_rng(0)
    q = torch.from_numpy(np.linalg.qr(rng.standard_normal((700, 300)))[0])
    one, two = q[:, :150], q[:, 150:].clone()
    two[:, :shared] = np.cos(angle) * one[:, :shared] + np.sin(angle) * two[:, :shared]
    return [one, two]


@pytest.mark.parametrize(
    ("given", "tolerance", "backend", "reason"),
    [
        (leaning(1e-2, shared=100), 1.0, "mixed", "100 of 300 singular values below"),
        (leaning(1e-5), 1.0, "mixed", "smallest singular value"),
        (panels(330, FULL), 1e-7, "mixed", "estimated error"),
        (leaning(1e-5), 1.0, "express", "orthonormal to"),
        (panels(290, [150, 150]), 1.0, "express", "more columns than rows"),
    ],
)
def test_polar_routes_give_way_to_float64_and_say_why(
    given: list[torch.Tensor], tolerance: float, backend: polar.PolarBackend, reason: str
) -> None:
    found = polar_factor(given, tolerance=tolerance, backend=backend)
    assert found.backend in ("polar-fp64", "polar-svd")
    assert found.fallback is not None
    assert reason in found.fallback
    assert polar_error(found, given) <= 1e-8


def test_strongly_coupled_columns_give_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polar, "COUPLING", 1e-12)
    found = polar_factor(panels(330, FULL))
    assert found.backend == "polar-fp64"
    assert "coupled" in str(found.fallback)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_weak_direction_is_corrected_to_first_order(angle: float) -> None:
    given = leaning(angle, shared=5)
    found = polar_factor(given)
    assert found.backend == "polar-mixed"
    assert polar_error(found, given) <= 4e-6


def tilted(count: int, rank: int, rows: int, tilt: float) -> list[torch.Tensor]:
    """Panels that share a space but for tilts: singular values sqrt(T), and T - 1 near `tilt`."""
    rng = np.random.default_rng(0)
    shared, *own = np.split(
        np.linalg.qr(rng.standard_normal((rows, rank * count)))[0], count, axis=1
    )
    simplex = np.linalg.qr(np.eye(count) - 1 / count)[0][:, : count - 1]
    simplex *= np.sqrt((count - 1) / count) / np.linalg.norm(simplex, axis=1).max()
    found = []
    for t in range(count):
        spread = rng.uniform(0.9, 1.1, rank)
        lean = tilt * sum(o * simplex[t, i] for i, o in enumerate(own)) * spread
        found.append(torch.from_numpy(np.linalg.qr(shared + lean)[0]))
    return found


@pytest.mark.parametrize("tilt", [0.05, 0.29, 0.31, 0.6])
@pytest.mark.parametrize("count", [4, 8, 16])
def test_experts_that_share_a_space_stay_within_the_textbooks_error(
    count: int, tilt: float
) -> None:
    given = tilted(count, 480 // count, 512, tilt)
    textbook = polar_error(polar_factor(given, backend="textbook"), given)
    assert polar_error(polar_factor(given, tolerance=5e-6), given) <= 2 * textbook


def test_one_sided_sharing_gives_factors_of_one_dtype() -> None:
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((500, 135)))[0]
    deltas = [
        torch.from_numpy((u @ np.diag(np.linspace(2, 1, 135)) @ v.T).astype(np.float32))
        for v in np.split(np.linalg.qr(rng.standard_normal((400, 270)))[0], 2, axis=1)
    ]
    merge = Solver().merge(deltas, [135, 135])
    assert "polar-mixed" in merge.backends
    assert merge.fallbacks
    found = (merge.left @ merge.right.T).numpy()
    assert oracle.error(found, oracle.tsvm([d.numpy() for d in deltas], [135, 135])) <= 1e-5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-200, 1e-100, 1e-60, 1e78, 1e121, 1e200])
def test_float64_deltas_of_any_size_merge_as_at_size_one(size: float) -> None:
    rng = np.random.default_rng(0)
    found = [oracle.make_delta("power", 300, 300, rng).astype(np.float64) for _ in range(2)]
    expected = oracle.tsvm(found, [150, 150])
    merge = Solver().merge([torch.from_numpy(d * size) for d in found], [150, 150])
    assert merge.backends[0] == "gram-partial"
    assert (
        oracle.error((merge.left / size**0.5 @ merge.right.T / size**0.5).numpy(), expected) <= 1e-6
    )


def test_float32_deltas_near_the_top_of_their_range_merge() -> None:
    rng = np.random.default_rng(0)
    found = [rng.standard_normal((420, 420)).astype(np.float32) for _ in range(3)]
    expected = oracle.tsvm(found, [140] * 3)
    merge = Solver().merge([torch.from_numpy(d * np.float32(3e37)) for d in found], [140] * 3)
    product = merge.left.double() @ merge.right.double().T / 3e37
    assert oracle.error(product.numpy(), expected) <= 1e-5


def test_equal_panels_lose_half_their_columns() -> None:
    (one,) = panels(400, [150])
    found = polar_factor([one, one.clone()])
    assert found.null_directions == 150
    assert polar_error(found, [one, one]) <= 1e-8


# Polar Express


@pytest.mark.parametrize(("lower", "upper"), [(1e-4, 1.0), (1e-2, 1.0), (0.5, 1.3)])
def test_best_quintics_equioscillate(lower: float, upper: float) -> None:
    (a, b, c), error = best_quintic(lower, upper)
    x = np.linspace(lower, upper, 200_001)
    off = 1 - (a * x + b * x**3 + c * x**5)
    assert np.abs(off).max() == pytest.approx(error, rel=1e-6)
    signs = np.sign(off[np.abs(off) > 0.999 * error])
    assert (np.diff(signs) != 0).sum() == 3


@pytest.mark.parametrize("lower", [1e-4, 1e-2, 0.5, 0.9995])
def test_scheduled_steps_reach_one_from_anywhere_in_range(lower: float) -> None:
    x = np.geomspace(lower, 1.0, 10_001)
    for a, b, c in schedule(lower):
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() <= 1e-12


def test_orthonormalise_is_the_polar_factor() -> None:
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((80, 30)))
    v, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    given = torch.from_numpy((u * np.geomspace(1, 1e-3, 30)) @ v.T)
    assert oracle.error(orthonormalise(given, 1e-3).numpy(), u @ v.T) <= 1e-9


# The solver


@pytest.mark.parametrize(
    ("device", "mode", "route"),
    [
        ("cpu", "auto", Route("gram", "mixed")),
        ("cpu", "fast", Route("gram", "mixed")),
        ("cuda", "auto", Route("gram", "express")),
        ("cuda", "fast", Route("projector", "express")),
        ("cuda", "exact", Route("gram", "fp64")),
        ("cpu", "textbook", Route("textbook", "textbook")),
    ],
)
def test_routes(device: str, mode: str, route: Route) -> None:
    assert choose_route(device, SolverOptions(mode=mode)) == route  # type: ignore[arg-type]
    overridden = SolverOptions(mode=mode, subspace="svd", polar="fp64")  # type: ignore[arg-type]
    assert choose_route(device, overridden) == Route("svd", "fp64")


GPU_ROUTE = SolverOptions(subspace="projector", polar="express")
MODES = {
    "auto": SolverOptions(),
    "exact": SolverOptions(mode="exact"),
    "fast": SolverOptions(mode="fast"),
    "textbook": SolverOptions(mode="textbook"),
    "gpu-fast": GPU_ROUTE,
    "gpu-auto": SolverOptions(polar="express"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "count"), [((600, 420), 3), ((420, 900), 2), ((420, 420), 3), ((400, 400), 8)]
)
def test_every_mode_keeps_its_promise(kind: str, shape: tuple[int, int], count: int) -> None:
    """The accuracy contract of the design, at sizes where partial and mixed routes run."""
    rng = np.random.default_rng(0)
    found = [oracle.make_delta(kind, *shape, rng) for _ in range(count)]
    deltas = [torch.from_numpy(d) for d in found]
    for share in (1.0, 0.75, 0.5):
        ranks = [int(share * (min(shape) // count))] * count
        reference = oracle.tsvm(found, ranks)
        errors = {}
        for name, options in MODES.items():
            merge = Solver(options).merge(deltas, ranks)
            errors[name] = oracle.error((merge.left @ merge.right.T).numpy(), reference)
        limit = 1e-5 if share <= 0.75 else max(2 * errors["textbook"], 1e-5)
        assert errors["auto"] <= limit
        assert errors["exact"] <= 1e-6
        assert errors["gpu-auto"] <= limit
        assert errors["fast"] <= 1e-2
        assert errors["gpu-fast"] <= 1e-2


def test_modes_take_the_routes_they_name() -> None:
    rng = np.random.default_rng(0)
    deltas = [torch.from_numpy(oracle.make_delta("noise", 400, 400, rng)) for _ in range(3)]
    expected = {
        "auto": ("gram-partial", "polar-mixed"),
        "exact": ("gram-partial", "polar-fp64"),
        "textbook": ("textbook", "polar-textbook"),
        "gpu-fast": ("gram-projector", "polar-express"),
    }
    for name, backends in expected.items():
        merge = Solver(MODES[name]).merge(deltas, [100] * 3)
        assert (merge.backends, merge.fallbacks) == (backends, ())


def test_dense_and_factored_experts_merge_together() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((320, 8)), rng.standard_normal((300, 8))
    dense = oracle.make_delta("noise", 320, 300, rng)
    experts = [torch.from_numpy(dense), FactoredDelta(*map(torch.from_numpy, (left, right)))]
    merge = Solver().merge(experts, [140, 8], [1.0, 0.5])
    found = (merge.left @ merge.right.T).numpy()
    us, ss, vts = zip(
        *(
            np.linalg.svd(d, full_matrices=False)
            for d in (dense.astype(np.float64), left @ right.T)
        ),
        strict=True,
    )
    u = np.concatenate([us[0][:, :140], us[1][:, :8]], axis=1)
    v = np.concatenate([vts[0][:140], vts[1][:8]]).T
    s = np.concatenate([ss[0][:140], 0.5 * ss[1][:8]])
    assert oracle.error(found, (oracle.polar(u) * s) @ oracle.polar(v).T) <= 1e-5


def test_a_plan_past_the_workspace_is_refused() -> None:
    with pytest.raises(PlanError, match="bytes of workspace planned"):
        Solver(SolverOptions(workspace=1000)).merge([torch.ones(64, 64)] * 2, [8, 8])
    roomy = Solver(SolverOptions(workspace=1 << 30))
    assert roomy.merge([torch.ones(64, 64)] * 2, [8, 8]).left.shape[0] == 64


def test_planned_time_grows_with_the_work() -> None:
    rates = measured_rates(128)
    small = Solver().plan((512, 512), [170] * 3)
    large = Solver().plan((1024, 1024), [341] * 3)
    assert 4 < large.work.seconds(rates) / small.work.seconds(rates) < 16
    textbook = Solver(SolverOptions(mode="textbook")).plan((1024, 1024), [341] * 3)
    assert textbook.work.svd_fp32 > 0 == textbook.work.partial_eigen
    assert Solver().plan((1024, 1024), [100] * 3).workspace < large.workspace


def test_concurrent_merges_give_the_bytes_of_serial_ones_and_restore_threads() -> None:
    rng = np.random.default_rng(0)
    sets = [
        [torch.from_numpy(oracle.make_delta("power", 300, 300, rng)) for _ in range(2)]
        for _ in range(4)
    ]

    def blas_threads() -> list[int]:
        return [get() for get, _ in lapack._thread_counts()]

    for _, set_to in lapack._thread_counts():
        set_to(2)
    serial = [Solver().merge(s, [120, 120]) for s in sets]
    assert 2 in blas_threads()
    with lapack._one_thread:
        assert 2 not in blas_threads()
    before = blas_threads()
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        torch.set_num_threads(1)
        found[i] = Solver().merge(sets[i], [120, 120]).left

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], s.left) for i, s in enumerate(serial))
    assert blas_threads() == before
    for _, set_to in lapack._thread_counts():
        set_to(1)


@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_the_plan_predicts_the_measured_workspace(mode: str) -> None:
    command = [sys.executable, "-m", "benchmarks.spectral", "one-workspace"]
    done = subprocess.run(
        [*command, mode, "1024", "1024", "3", "1.0"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert 0.85 <= json.loads(done.stdout)["planned_over_measured"] <= 1.15


@pytest.mark.parametrize("kind", ["power", "lora16-bf16"])
def test_the_accuracy_table_holds_the_contract(kind: str) -> None:
    for row in accuracy_rows(kind, (300, 280), 3):
        assert row["error"] <= row["contract"] or row["mode"] == "textbook", row
        if row["mode"].startswith("fast"):
            assert row["retention_moved"] <= 1e-2
