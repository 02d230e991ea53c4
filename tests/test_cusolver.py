"""The cuSOLVER extension against a fake cuSOLVER: the whole C++ path, without a GPU."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resm_kernels.errors import MissingDependencyError, NumericsError, UsageError
from resm_kernels.linalg import cusolver
from resm_kernels.linalg.cusolver import SVD, Eigen, SolverError
from tests.fake_cusolver import OLDEST, ROOT, Fake, build, compiler, extension

SHAPES = [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1), (1, 1), (32, 32)]
DTYPES = [torch.float32, torch.float64]
SVDS: list[Callable[..., SVD]] = [
    cusolver.gesvdj_batched,
    cusolver.gesvda_batched,
    lambda stack, **options: single(cusolver.gesvdp, stack, **options),
    lambda stack, **options: single(
        functools.partial(cusolver.gesvdr, rank=min(stack.shape[1:])), stack, **options
    ),
]
EIGENS: list[Callable[..., Eigen]] = [
    cusolver.syev_batched,
    lambda stack, **options: single(cusolver.syevd, stack, **options),
    lambda stack, **options: single(
        functools.partial(cusolver.syevdx, count=stack.shape[-1]), stack, **options
    ),
]


def single(solve: Callable[..., Any], stack: torch.Tensor, **options: bool) -> Any:
    """A solver of one matrix on the first of a batch, with its results as a batch of one."""
    found = solve(stack[0], **options)
    found = found[0] if isinstance(found, tuple) else found
    return type(found)(*(value[None] for value in vars(found).values()))


def layouts(stack: torch.Tensor) -> list[torch.Tensor]:
    """The same matrices by rows, by columns, and with gaps."""
    gaps = torch.full((stack.shape[0], stack.shape[1] * 2, stack.shape[2] * 3), torch.nan)
    gaps = gaps.to(stack.dtype)
    gaps[:, ::2, ::3] = stack
    return [stack, stack.mT.contiguous().mT, gaps[:, ::2, ::3]]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def symmetric(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    matrix = random(*shape, shape[-1], dtype=dtype)
    return matrix + matrix.mT


def rounding(matrices: torch.Tensor) -> float:
    """What storing a factorisation in the dtype costs."""
    size = max(matrices.shape)
    return size * torch.finfo(matrices.dtype).eps * float(matrices.abs().max()) * 4


def assert_svd(found: SVD, matrices: torch.Tensor, tolerance: float | None = None) -> None:
    tolerance = rounding(matrices) if tolerance is None else tolerance
    rebuilt = (found.left * found.values[..., None, :]) @ found.right.mT
    assert (rebuilt - matrices).abs().max() <= tolerance
    exact = torch.linalg.svdvals(matrices.to(torch.float64))[..., : found.values.shape[-1]]
    assert (found.values - exact).abs().max() <= tolerance
    for vectors in (found.left, found.right):
        assert_orthonormal(vectors)
        assert vectors.shape[-2] == 1 or vectors.stride(-2) == 1


def assert_orthonormal(vectors: torch.Tensor) -> None:
    eye = torch.eye(vectors.shape[-1], dtype=vectors.dtype)
    error = (vectors.mT @ vectors - eye).abs().max()
    assert error <= 8 * vectors.shape[-2] * torch.finfo(vectors.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solve", SVDS)
def test_svd(
    fake_cusolver: Fake, solve: Callable[..., SVD], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrices = random(3, *shape, dtype=dtype)
    for given in layouts(matrices):
        before = given.clone()
        found = solve(given)
        assert torch.equal(given, before)
        assert_svd(found, matrices[: found.values.shape[0]])
    assert_svd(solve(matrices.clone(), overwrite=True), matrices[: found.values.shape[0]])
    assert fake_cusolver.count("REFUSED") == fake_cusolver.count("NONFINITE") == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solve", EIGENS)
@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_eigen(
    fake_cusolver: Fake, solve: Callable[..., Eigen], n: int, dtype: torch.dtype
) -> None:
    matrices = symmetric(3, n, dtype=dtype)
    # Only the lower triangle of the tensor is read, however it lies in memory.
    for given in layouts(matrices + torch.triu(torch.full((n, n), 1e3, dtype=dtype), 1)):
        found = solve(given)
        expected = matrices[: found.values.shape[0]]
        residual = expected @ found.vectors - found.vectors * found.values[..., None, :]
        assert residual.abs().max() <= 4 * n * rounding(matrices)
        assert_orthonormal(found.vectors)
        exact = torch.linalg.eigvalsh(expected.to(torch.float64))
        assert (found.values - exact).abs().max() <= 4 * n * rounding(matrices)
    assert fake_cusolver.count("REFUSED") == 0


def test_leading_part_of_the_spectrum(fake_cusolver: Fake) -> None:
    matrix = symmetric(9)
    exact = torch.linalg.eigh(matrix)
    for count in (1, 4, 9):
        found = cusolver.syevdx(matrix, count)
        assert found.vectors.shape == (9, count)
        assert torch.allclose(found.values, exact.eigenvalues[9 - count :], atol=1e-12)
        aligned = (found.vectors.T @ exact.eigenvectors[:, 9 - count :]).diagonal().abs()
        assert torch.allclose(aligned, torch.ones(count, dtype=torch.float64), atol=1e-12)
    assert fake_cusolver.calls("cusolverDnXsyevdx")[1][3:] == ["6", "9"]


def test_leading_triplets(fake_cusolver: Fake) -> None:
    matrices = random(2, 6, 4)
    exact = torch.linalg.svd(matrices, full_matrices=False)
    rank_2 = (exact.U[..., :2] * exact.S[:, None, :2]) @ exact.Vh[:, :2]
    found = cusolver.gesvda_batched(matrices, 2)
    assert_svd(found, rank_2, 1e-12)
    assert_svd(cusolver.gesvda_batched(matrices.mT, 2), rank_2.mT, 1e-12)
    assert_svd(cusolver.gesvdr(matrices[0], 2), rank_2[0], 1e-12)
    assert fake_cusolver.calls("cusolverDnXgesvdr")[0][1:] == ["4", "6", "2", "2", "2"]
    cusolver.gesvdr(matrices[0], 1, oversampling=3, iterations=5)
    assert fake_cusolver.calls("cusolverDnXgesvdr")[1][3:] == ["1", "3", "5"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_polar(fake_cusolver: Fake, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random(*shape, dtype=dtype)
    for given in layouts(matrix[None]):
        found = cusolver.polar(given[0])
        tall = shape[0] >= shape[1]
        assert_orthonormal(found.factor if tall else found.factor.T)
        factors = (found.factor, found.hermitian) if tall else (found.hermitian, found.factor)
        assert (factors[0] @ factors[1] - matrix).abs().max() <= rounding(matrix)
        assert torch.linalg.eigvalsh(found.hermitian).min() >= -rounding(matrix)
        # The fake adds to what it finds, as cuSOLVER 12.2.0 does.
        singular = torch.linalg.svdvals(matrix.to(torch.float64))
        expected = [1e-7, float(singular.square().sum().sqrt()), float(singular[-1] / singular[0])]
        assert torch.allclose(found.certificate, torch.tensor(expected).to(torch.float64))


def test_row_major_is_the_transposed_problem_and_overwriting_copies_nothing(
    fake_cusolver: Fake,
) -> None:
    by_rows, by_columns = random(2, 5, 3), random(2, 3, 5).mT
    cusolver.gesvdj_batched(by_rows)
    cusolver.gesvdj_batched(by_columns)
    assert [call[1:3] for call in fake_cusolver.calls("gesvdjBatched")] == [["3", "5"], ["5", "3"]]

    matrix = symmetric(4)
    address = matrix.data_ptr()
    assert cusolver.syevd(matrix).vectors.data_ptr() != address
    assert cusolver.syevd(matrix, overwrite=True).vectors.data_ptr() == address
    for tall in (random(3, 5).T, random(3, 5)):
        address = tall.data_ptr()
        assert cusolver.polar(tall, overwrite=True).factor.data_ptr() == address
    spread = layouts(symmetric(2, 4))[2]
    assert cusolver.syev_batched(spread, overwrite=True).vectors.data_ptr() != spread.data_ptr()


def test_gesvdp_returns_the_perturbation(fake_cusolver: Fake) -> None:
    fake_cusolver.report_size("cusolverDnXgesvdp", 10**11)
    assert cusolver.gesvdp(random(4, 3))[1] == pytest.approx(1e-9, rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_matrices_do_not_reach_cusolver(fake_cusolver: Fake, dtype: torch.dtype) -> None:
    for shape in [(6, 4), (4, 6), (4, 4)]:
        for solve in SVDS:
            matrices = random(3, *shape, dtype=dtype)
            matrices[0] = 0
            found = solve(matrices)
            assert not found.values[0].any()
            assert_svd(found, matrices[: found.values.shape[0]])
    matrices = symmetric(3, 4, dtype=dtype)
    matrices[0] = 0
    for solve_symmetric in EIGENS:
        eigen = solve_symmetric(matrices)
        assert not eigen.values[0].any()
        assert_orthonormal(eigen.vectors)
    for shape in [(5, 3), (3, 5)]:
        polar = cusolver.polar(torch.zeros(shape, dtype=dtype))
        assert_orthonormal(polar.factor if shape[0] > shape[1] else polar.factor.T)
        assert not polar.hermitian.any()
        assert not polar.certificate.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_and_does_not_reach_cusolver(
    fake_cusolver: Fake, bad: float
) -> None:
    matrices = random(5, 4, 4)
    matrices[1, 2, 3] = matrices[4, 0, 0] = bad
    for solve in (cusolver.gesvdj_batched, cusolver.gesvda_batched, cusolver.syev_batched):
        with pytest.raises(NumericsError, match="could not factor 2 matrices") as error:
            solve(matrices)
        assert isinstance(error.value, SolverError)
        assert error.value.entries == {1: "NaN or Inf", 4: "NaN or Inf"}
        assert "entry 1: NaN or Inf; entry 4: NaN or Inf" in str(error.value)
    for one in (cusolver.gesvdp, cusolver.polar, cusolver.syevd):
        with pytest.raises(NumericsError, match="entry 0: NaN or Inf"):
            one(matrices[1])
    with pytest.raises(NumericsError, match="entry 0: NaN or Inf"):
        cusolver.gesvdr(matrices[1], 1)
    with pytest.raises(NumericsError, match="entry 0: NaN or Inf"):
        cusolver.syevdx(matrices[1], 1)
    assert fake_cusolver.count("NONFINITE") == 0


def test_entries_that_do_not_converge_are_named(fake_cusolver: Fake) -> None:
    fake_cusolver.report_info(2, 5)
    matrices = symmetric(4, 4)
    matrices[0, 0, 0] = torch.nan
    for solve in (cusolver.gesvdj_batched, cusolver.gesvda_batched, cusolver.syev_batched):
        with pytest.raises(SolverError) as error:
            solve(matrices)
        assert error.value.entries == {0: "NaN or Inf", 2: "info = 5"}
    fake_cusolver.report_info(0, -3)
    for one in (cusolver.gesvdp, cusolver.polar, cusolver.syevd):
        with pytest.raises(SolverError, match="entry 0: info = -3"):
            one(random(3, 3))
    for partial in (cusolver.gesvdr, cusolver.syevdx):
        with pytest.raises(SolverError, match="entry 0: info = -3"):
            partial(random(3, 3), 2)
    for entry in range(30):
        fake_cusolver.report_info(entry, 1)
    with pytest.raises(SolverError, match=r"entry 19: info = 1; and 10 more\n") as many:
        cusolver.syev_batched(symmetric(30, 2))
    assert len(many.value.entries) == 30


@pytest.mark.parametrize(
    ("function", "run"),
    [
        ("cusolverDnDgesvdjBatched", lambda m: cusolver.gesvdj_batched(m[None])),
        ("cusolverDnDgesvdjBatched_bufferSize", lambda m: cusolver.gesvdj_batched(m[None])),
        ("cusolverDnDgesvdaStridedBatched", lambda m: cusolver.gesvda_batched(m[None])),
        ("cusolverDnDgesvdaStridedBatched_bufferSize", lambda m: cusolver.gesvda_batched(m[None])),
        ("cusolverDnXsyevBatched", lambda m: cusolver.syev_batched(m[None])),
        ("cusolverDnXsyevBatched_bufferSize", lambda m: cusolver.syev_batched(m[None])),
        ("cusolverDnXsyevd", cusolver.syevd),
        ("cusolverDnXsyevd_bufferSize", cusolver.syevd),
        ("cusolverDnXsyevdx", lambda m: cusolver.syevdx(m, 2)),
        ("cusolverDnXsyevdx_bufferSize", lambda m: cusolver.syevdx(m, 2)),
        ("cusolverDnXgesvdp", cusolver.gesvdp),
        ("cusolverDnXgesvdp_bufferSize", cusolver.gesvdp),
        ("cusolverDnXgesvdr", lambda m: cusolver.gesvdr(m, 2)),
        ("cusolverDnXgesvdr_bufferSize", lambda m: cusolver.gesvdr(m, 2)),
        ("cusolverDnXpolar", cusolver.polar),
        ("cusolverDnXpolar_bufferSize", cusolver.polar),
    ],
)
def test_a_status_is_an_error_that_names_it(
    fake_cusolver: Fake, function: str, run: Callable[[torch.Tensor], object]
) -> None:
    fake_cusolver.report_status(function, 7)
    matrix = symmetric(4)
    with pytest.raises(SolverError, match="CUSOLVER_STATUS_INTERNAL_ERROR") as error:
        run(matrix)
    assert error.value.entries == {}
    # Whatever was started is waited for before its buffers can go.
    assert fake_cusolver.count("cudaStreamSynchronize") == 1
    fake_cusolver.report_status(function, 27)
    with pytest.raises(SolverError, match="status 27"):
        run(matrix)
    fake_cusolver.report_status(function, 0)
    run(matrix)


def test_a_failed_read_of_the_outcome(fake_cusolver: Fake) -> None:
    fake_cusolver.report_status("cudaMemcpyAsync", 999)
    with pytest.raises(SolverError, match="cudaMemcpyAsync: the fake was told to fail"):
        cusolver.syevd(symmetric(4))


def test_a_partial_spectrum_of_another_size(fake_cusolver: Fake) -> None:
    fake_cusolver.report_size("cusolverDnXsyevdx", 1)
    with pytest.raises(SolverError, match="found 1 eigenvalues, expected 3"):
        cusolver.syevdx(symmetric(4), 3)


@pytest.mark.parametrize("solve", [cusolver.gesvdj_batched, cusolver.gesvda_batched])
@pytest.mark.parametrize("letter", ["S", "D"])
def test_a_workspace_past_int32(fake_cusolver: Fake, solve: Any, letter: str) -> None:
    for name in ("gesvdjBatched", "gesvdaStridedBatched"):
        fake_cusolver.report_size(f"cusolverDn{letter}{name}_bufferSize", -(2**31))
    with pytest.raises(SolverError, match="workspace that passes int32"):
        solve(random(2, 4, 4, dtype=DTYPES["SD".index(letter)]))


def test_one_read_and_one_wait_per_call_and_deterministic(fake_cusolver: Fake) -> None:
    def run() -> None:
        cusolver.gesvdj_batched(random(7, 5, 3))

    thread = threading.Thread(target=run)  # a new thread makes a new solver
    thread.start()
    thread.join()
    assert fake_cusolver.calls("cuda") == [
        ["cudaMemcpyAsync", str(2 * 7 * 4), "2"],
        ["cudaStreamSynchronize", "0"],
    ]
    assert fake_cusolver.calls("Deterministic") == [["cusolverDnSetDeterministicMode", "1"]]


def test_batches_past_the_limits_are_split(fake_cusolver: Fake) -> None:
    """At most 16384 matrices and 2^31 bytes; entries are named by their place in the whole."""
    matrices = random(16389, 1, 1)
    found = cusolver.syev_batched(matrices)
    assert torch.allclose(found.values, matrices[:, 0], rtol=0, atol=1e-14)
    assert [call[-1] for call in fake_cusolver.calls("XsyevBatched")] == ["16384", "5"]
    assert fake_cusolver.count("cudaStreamSynchronize") == 1
    fake_cusolver.report_info(3, 1)
    for solve in (cusolver.syev_batched, cusolver.gesvdj_batched, cusolver.gesvda_batched):
        with pytest.raises(SolverError) as error:
            solve(matrices)
        assert error.value.entries == {3: "info = 1", 16387: "info = 1"}


def test_unequal_matrices_are_grouped_by_shape(fake_cusolver: Fake) -> None:
    shapes = [(4, 3), (5, 5), (4, 3), (3, 4), (5, 5), (4, 3)]
    matrices = [random(*shape) + i for i, shape in enumerate(shapes)]
    matrices.append(random(4, 3, dtype=torch.float32))
    copies = [matrix.clone() for matrix in matrices]
    found = cusolver.by_shape(cusolver.gesvdj_batched, matrices)
    for svd, matrix, copy in zip(found, matrices, copies, strict=True):
        assert torch.equal(matrix, copy)
        assert_svd(svd, matrix)
    batches = sorted(call[6] for call in fake_cusolver.calls("gesvdjBatched"))
    assert batches == ["1", "1", "2", "3"]

    leading = cusolver.by_shape(functools.partial(cusolver.gesvda_batched, rank=2), matrices)
    assert [svd.values.shape for svd in leading] == [(2,)] * len(matrices)
    square = [symmetric(n) for n in (3, 4, 3)]
    for eigen, matrix in zip(cusolver.by_shape(cusolver.syev_batched, square), square, strict=True):
        assert torch.allclose(eigen.values, torch.linalg.eigvalsh(matrix), atol=1e-12)
    assert cusolver.by_shape(cusolver.gesvdj_batched, []) == []


def test_grouped_errors_name_positions_of_all_groups(fake_cusolver: Fake) -> None:
    matrices = [random(n, n) for n in (3, 4, 3, 4, 3)]
    matrices[3][0, 0] = matrices[4][0, 0] = torch.nan
    with pytest.raises(SolverError) as error:
        cusolver.by_shape(cusolver.gesvdj_batched, matrices)
    assert error.value.entries == {3: "NaN or Inf", 4: "NaN or Inf"}
    fake_cusolver.report_status("cusolverDnDgesvdjBatched", 7)
    with pytest.raises(SolverError, match="INTERNAL_ERROR"):
        cusolver.by_shape(cusolver.gesvdj_batched, matrices)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda: cusolver.gesvdj_batched(random(2, 33, 2)), "at most 32 x 32"),
        (lambda: cusolver.gesvdj_batched(random(3, 3)), "batch of matrices"),
        (lambda: cusolver.gesvdp(random(2, 3, 3)), "a matrix"),
        (lambda: cusolver.gesvda_batched(random(2, 0, 3)), "not empty"),
        (lambda: cusolver.syevd(torch.zeros(3, 3, dtype=torch.bfloat16)), "float32 or float64"),
        (lambda: cusolver.polar(torch.empty(3, 3, device="meta")), "on cpu"),
        (lambda: cusolver.syevd(random(3, 4)), "square"),
        (lambda: cusolver.syevdx(random(3, 4), 1), "square"),
        (lambda: cusolver.syev_batched(random(2, 3, 4)), "square"),
        (lambda: cusolver.syevdx(symmetric(3), 0), "1 to 3"),
        (lambda: cusolver.syevdx(symmetric(3), 4), "1 to 3"),
        (lambda: cusolver.gesvda_batched(random(2, 3, 4), 4), "1 to 3"),
        (lambda: cusolver.gesvda_batched(random(2, 3, 4), 0), "1 to 3"),
        (lambda: cusolver.gesvdr(random(3, 4), 0), "rank >= 1"),
        (lambda: cusolver.gesvdr(random(3, 4), 4), "<= 3"),
        (lambda: cusolver.gesvdr(random(3, 4), 2, oversampling=2), "<= 3"),
        (lambda: cusolver.gesvdr(random(3, 4), 2, iterations=-1), "none negative"),
    ],
)
def test_arguments_of_the_python_face(
    fake_cusolver: Fake, run: Callable[[], object], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        run()
    assert fake_cusolver.count("gesvd") == fake_cusolver.count("Xsyev") == 0


class Raw:
    """The extension itself, with arrays of any pointer, shape and strides."""

    def __init__(self, fake: Fake) -> None:
        allocated: list[torch.Tensor] = []

        # No method: a solver that holds its owner would never be collected.
        def allocate(size: int) -> torch.Tensor:
            allocated.append(torch.empty(size, dtype=torch.uint8))
            return allocated[-1]

        self.allocated, self.allocate, self.Array = allocated, allocate, extension().Array
        self.solver = extension().Solver(fake.library, 0, allocate)

    def array(self, *shape: int, kind: str = "f8", strides: tuple[int, ...] | None = None) -> Any:
        """By rows, somewhere that nothing reads."""
        plain = tuple(int(torch.Size(shape[i + 1 :]).numel()) for i in range(len(shape)))
        return self.Array(4096, kind, shape, plain if strides is None else strides)

    def columns(self, batch: int, rows: int, columns: int, kind: str = "f8") -> Any:
        return self.array(batch, rows, columns, kind=kind, strides=(rows * columns, 1, rows))

    def status(self, batch: int = 1) -> Any:
        return self.array(2, batch, kind="i4")


@pytest.fixture
def raw(fake_cusolver: Fake) -> Raw:
    return Raw(fake_cusolver)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda a: a(0, "f8", [2, 2], [2, 1]), "null pointer"),
        (lambda a: a(4100, "f8", [2, 2], [2, 1]), "aligned"),
        (lambda a: a(4096, "c8", [2, 2], [2, 1]), "kind c8"),
        (lambda a: a(4096, "", [2, 2], [2, 1]), "kind"),
        (lambda a: a(4096, "f8", [2, 2], [1]), "strides"),
        (lambda a: a(4096, "f8", [2, 0], [2, 1]), "empty"),
        (lambda a: a(4096, "f8", [2, -1], [2, 1]), "empty or negative"),
        (lambda a: a(4096, "f8", [2, 2], [-2, 1]), "strides"),
        (lambda a: a(4096, "f8", [2**40, 2**40], [2**40, 1]), "address space"),
        (lambda a: a(4096, "f4", [2**62, 2], [1, 2**62]), "address space"),
        (lambda a: a(4096, "f8", [2**62], [1]), "address space"),
    ],
)
def test_arrays_that_cannot_be(raw: Raw, make: Callable[[Any], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(raw.Array)


BIG = 46341
"""The least n for which n * n passes int32."""


def svd_outputs(raw: Raw, batch: int, m: int, n: int, rank: int) -> tuple[Any, Any, Any]:
    return raw.columns(batch, m, rank), raw.array(batch, rank), raw.columns(batch, n, rank)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        # Inputs
        (lambda r: r.solver.syevd(r.array(4), r.array(1, 4), r.status(), 0), "a batch"),
        (lambda r: r.solver.syevd(r.array(2, 4, 4), r.array(1, 4), r.status(), 0), "one matrix"),
        (lambda r: r.solver.syevd(r.array(4, 5), r.array(1, 4), r.status(), 0), "square"),
        (
            lambda r: r.solver.syevd(r.array(4, 4, kind="i4"), r.array(1, 4), r.status(), 0),
            "float32 or float64",
        ),
        (
            lambda r: r.solver.syevd(r.array(4, 4, strides=(8, 2)), r.array(1, 4), r.status(), 0),
            "contiguous",
        ),
        (
            lambda r: r.solver.syevd(r.array(4, 4, strides=(3, 1)), r.array(1, 4), r.status(), 0),
            "contiguous",
        ),
        (
            lambda r: r.solver.syev_batched(
                r.array(2, 4, 4, strides=(0, 4, 1)), r.array(2, 4), r.status(2), 0
            ),
            "overlap",
        ),
        (
            lambda r: r.solver.syev_batched(
                r.array(2, 4, 4, strides=(17, 4, 1)), r.array(2, 4), r.status(2), 0
            ),
            "directly after",
        ),
        (
            lambda r: r.solver.gesvdj_batched(
                r.array(1, 33, 4), *svd_outputs(r, 1, 33, 4, 4), r.status(), 0
            ),
            "at most 32",
        ),
        (
            lambda r: r.solver.gesvda_batched(
                r.array(1, 5, 4), 4, *svd_outputs(r, 1, 5, 4, 4), r.status(), 0
            ),
            "tall matrices by columns",
        ),
        (
            lambda r: r.solver.polar(r.array(5, 4), r.array(4, 4), r.array(1, 3), r.status(), 0),
            "tall matrix by columns",
        ),
        # Outputs
        (lambda r: r.solver.syevd(r.array(4, 4), r.array(1, 5), r.status(), 0), "values"),
        (
            lambda r: r.solver.syevd(r.array(4, 4), r.array(1, 4, kind="f4"), r.status(), 0),
            "values: wrong dtype",
        ),
        (lambda r: r.solver.syevd(r.array(4, 4), r.array(1, 4), r.status(2), 0), "status"),
        (
            lambda r: r.solver.syevd(r.array(4, 4), r.array(1, 4), r.array(2, 1), 0),
            "status: wrong dtype",
        ),
        (
            lambda r: r.solver.syevd(r.array(4, 4), r.array(1, 4), r.array(1, 2, kind="i4"), 0),
            r"status: expected \(2, 1\)",
        ),
        (
            lambda r: r.solver.syev_batched(
                r.array(2, 4, 4), r.array(2, 4), r.array(2, 2, kind="i4", strides=(3, 1)), 0
            ),
            r"status: expected \(2, 2\), contiguous",
        ),
        (
            lambda r: r.solver.syev_batched(
                r.array(2, 4, 4), r.array(2, 4, strides=(5, 1)), r.status(2), 0
            ),
            "values",
        ),
        (
            lambda r: r.solver.gesvdp(
                r.array(5, 4), r.array(5, 4), r.array(1, 4), r.columns(1, 4, 4), r.status(), 0
            ),
            "left: expected",
        ),
        (
            lambda r: r.solver.gesvdp(
                r.array(5, 4),
                r.columns(1, 5, 4),
                r.array(1, 4),
                r.columns(1, 4, 4, kind="f4"),
                r.status(),
                0,
            ),
            "right: expected the dtype",
        ),
        (
            lambda r: r.solver.polar(
                r.array(4, 5), r.columns(1, 4, 4), r.array(1, 2), r.status(), 0
            ),
            "certificate",
        ),
        # Numbers
        (lambda r: r.solver.syevdx(r.array(4, 4), 5, r.array(1, 4), r.status(), 0), "count = 5"),
        (
            lambda r: r.solver.gesvda_batched(
                r.array(1, 4, 5), 5, *svd_outputs(r, 1, 4, 5, 5), r.status(), 0
            ),
            "rank = 5",
        ),
        (
            lambda r: r.solver.gesvdr(
                r.array(4, 5), 3, 2, 2, *svd_outputs(r, 1, 4, 5, 4), r.status(), 0
            ),
            "oversampling = 2",
        ),
        (
            lambda r: r.solver.gesvdr(
                r.array(4, 5), 3, 2**63 - 1, 2, *svd_outputs(r, 1, 4, 5, 4), r.status(), 0
            ),
            "oversampling",
        ),
        (
            lambda r: r.solver.gesvdr(
                r.array(4, 5), 3, 1, -1, *svd_outputs(r, 1, 4, 5, 4), r.status(), 0
            ),
            "iterations = -1",
        ),
        # int32
        (
            lambda r: r.solver.syev_batched(r.array(1, BIG, BIG), r.array(1, BIG), r.status(), 0),
            "counts them in int32",
        ),
        (
            lambda r: r.solver.gesvda_batched(
                r.array(1, BIG, BIG), 1, *svd_outputs(r, 1, BIG, BIG, 1), r.status(), 0
            ),
            "counts them in int32",
        ),
        (
            lambda r: r.solver.gesvda_batched(
                r.array(1, 2, 2**31), 1, *svd_outputs(r, 1, 2, 2**31, 1), r.status(), 0
            ),
            "rows = 2147483648 passes int32",
        ),
        (
            lambda r: r.solver.gesvdj_batched(
                r.array(1, 2, 2, strides=(0, 2**31, 1)),
                *svd_outputs(r, 1, 2, 2, 2),
                r.status(),
                0,
            ),
            "leading dimension = 2147483648 passes int32",
        ),
    ],
)
def test_arguments_of_the_extension(raw: Raw, run: Callable[[Raw], object], match: str) -> None:
    """Nothing of these reaches cuSOLVER: the pointers lead nowhere."""
    with pytest.raises(ValueError, match=match):
        run(raw)


def arrays(*tensors: torch.Tensor) -> list[Any]:
    return [cusolver._array(tensor) for tensor in tensors]


def eigen_call(raw: Raw, n: int, stream: int = 0) -> None:
    matrix, values = symmetric(n), torch.empty(1, n, dtype=torch.float64)
    status = torch.zeros(2, 1, dtype=torch.int32)
    raw.solver.syevd(*arrays(matrix, values, status), stream)


def test_workspace_grows_once_and_is_reused(raw: Raw) -> None:
    for n in (8, 8, 4, 8):
        eigen_call(raw, n)
    assert len(raw.allocated) == 1
    assert raw.solver.device_bytes == raw.allocated[0].numel()
    host = raw.solver.host_bytes
    assert host > 0
    eigen_call(raw, 9)
    assert len(raw.allocated) == 2
    assert raw.solver.device_bytes == raw.allocated[1].numel()
    assert raw.solver.host_bytes > host
    # Outgrown buffers go when the call that outgrew them has been waited for.
    assert sys.getrefcount(raw.allocated[0]) < sys.getrefcount(raw.allocated[1])


def test_an_allocator_that_fails_leaves_the_solver_usable(fake_cusolver: Fake, raw: Raw) -> None:
    class Null:
        def data_ptr(self) -> int:
            return 0

    answers: list[Any] = [MemoryError("no memory left"), Null(), 7]

    def allocate(size: int) -> Any:
        if not answers:
            return torch.empty(size, dtype=torch.uint8)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    raw.solver = extension().Solver(fake_cusolver.library, 0, allocate)
    with pytest.raises(MemoryError, match="no memory left"):
        eigen_call(raw, 4)
    with pytest.raises(RuntimeError, match="returned no workspace"):
        eigen_call(raw, 4)
    with pytest.raises(AttributeError, match="data_ptr"):
        eigen_call(raw, 4)
    eigen_call(raw, 4)


def test_stream_and_device(fake_cusolver: Fake, raw: Raw) -> None:
    """The caller selects the device; nothing here does, or sets one back."""
    eigen_call(raw, 4, stream=4096)
    assert fake_cusolver.calls("cudaStreamSynchronize") == [["cudaStreamSynchronize", "4096"]]
    before = fake_cusolver.live()
    with pytest.raises(ValueError, match="device 1 is not the thread's current one"):
        extension().Solver(fake_cusolver.library, 1, raw.allocate)
    assert fake_cusolver.live() == before
    with fake_cusolver.current(1):
        solver = extension().Solver(fake_cusolver.library, 1, raw.allocate)
        with pytest.raises(ValueError, match="device 0 is not the thread's current one"):
            eigen_call(raw, 4)
        raw.solver, first = solver, raw.solver
        eigen_call(raw, 4)
        assert fake_cusolver.live() == before + 3
        del raw.solver, solver
        gc.collect()
        assert fake_cusolver.live() == before
        del first
        gc.collect()
        assert fake_cusolver.live() == before  # handles of another device stay
    assert fake_cusolver.count("REFUSED") == 0


def test_the_python_face_makes_the_device_current(
    fake_cusolver: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 1)
    stream = SimpleNamespace(cuda_stream=4096)
    monkeypatch.setattr(torch.cuda, "device", lambda d: fake_cusolver.current(d.index))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: {device: stream}[d])
    made = functools.partial(torch.empty, device="cpu")
    monkeypatch.setattr(torch, "empty", lambda *size, **given: made(*size, dtype=given["dtype"]))
    matrix, wrong = symmetric(6), list[BaseException]()

    def work() -> None:
        task = cusolver._Task("syevd", matrix, 2, symmetric=True, overwrite=False)
        task._device, values = device, task.new(1, 6)
        try:
            task.run(values)
            assert torch.allclose(values[0], torch.linalg.eigvalsh(matrix), atol=1e-12)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=work)  # with solvers of its own
    thread.start()
    thread.join()
    assert not wrong
    assert fake_cusolver.calls("cudaStreamSynchronize") == [["cudaStreamSynchronize", "4096"]]


def test_workspace_is_given_back_of_solvers_that_are_idle(fake_cusolver: Fake) -> None:
    made, held, found = list[Any](), threading.Event(), list[cusolver.Eigen]()
    matrix = symmetric(7)

    def work() -> None:
        cusolver.syevd(matrix)
        made.append(cusolver._solvers().of(fake_cusolver.library, matrix.device))
        held.wait(20)
        found.append(cusolver.syevd(matrix))

    thread = threading.Thread(target=work)
    thread.start()
    while not made:
        assert thread.is_alive()
        time.sleep(0.001)
    (solver,) = made
    assert 0 < solver.device_bytes <= cusolver.workspace()
    cusolver.release()
    assert solver.device_bytes == solver.host_bytes == cusolver.workspace() == 0

    fake_cusolver.gate(closed=True)
    held.set()
    while fake_cusolver.count("cusolverDnXsyevd ") < 2:
        assert thread.is_alive()
        time.sleep(0.001)
    cusolver.release()
    assert solver.device_bytes > 0
    fake_cusolver.gate(closed=False)
    thread.join()
    assert torch.allclose(found[0].values, torch.linalg.eigvalsh(matrix), atol=1e-12)
    made.clear()
    del solver
    gc.collect()
    cusolver.release()


def test_handles_end_with_their_solver(fake_cusolver: Fake) -> None:
    before = fake_cusolver.live()
    raw = Raw(fake_cusolver)
    assert fake_cusolver.live() == before + 3
    del raw
    gc.collect()
    assert fake_cusolver.live() == before
    for function in ("cusolverDnCreateParams", "cusolverDnCreate"):
        fake_cusolver.report_status(function, 2)
        with pytest.raises(RuntimeError, match=f"{function}: CUSOLVER_STATUS_ALLOC_FAILED"):
            Raw(fake_cusolver)
        assert fake_cusolver.live() == before


def test_every_thread_has_its_own_solver_and_they_run_at_once(fake_cusolver: Fake) -> None:
    matrices = [symmetric(4, n) for n in range(2, 10)]
    wrong: list[object] = []

    def run(stack: torch.Tensor) -> None:
        for _ in range(20):
            found = cusolver.syev_batched(stack)
            if not torch.allclose(found.values, torch.linalg.eigvalsh(stack), atol=1e-11):
                wrong.append(found)

    threads = [threading.Thread(target=run, args=(stack,)) for stack in matrices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    assert fake_cusolver.count("cusolverDnCreate") == len(matrices)


def test_python_goes_on_while_a_solver_runs(fake_cusolver: Fake) -> None:
    """Were the GIL held, nobody could open the gate."""
    matrix, found = symmetric(4), []
    fake_cusolver.gate(closed=True)
    thread = threading.Thread(target=lambda: found.append(cusolver.syevd(matrix)))
    thread.start()
    while not fake_cusolver.count("Xsyevd"):
        assert thread.is_alive()
        time.sleep(0.001)
    fake_cusolver.gate(closed=False)
    thread.join()
    assert torch.allclose(found[0].values, torch.linalg.eigvalsh(matrix), atol=1e-12)


def test_one_solver_shared_by_threads_takes_turns(raw: Raw) -> None:
    threads = [threading.Thread(target=eigen_call, args=(raw, n)) for n in range(2, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def old_fake(tmp_path_factory: pytest.TempPathFactory, built_fake: Fake) -> Fake:
    return Fake(build(tmp_path_factory.mktemp("old"), OLDEST))


def test_an_older_cusolver_lacks_single_solvers(
    old_fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_fake.install(monkeypatch)
    reasons = cusolver.available()
    assert {name for name, reason in reasons.items() if reason} == {"syev_batched", "polar"}
    assert reasons["syev_batched"] == "needs cuSOLVER >= 11.7.1, found 11.4.0"
    assert reasons["polar"] == "needs cuSOLVER >= 12.2, found 11.4.0"
    with pytest.raises(MissingDependencyError, match=r"needs cuSOLVER >= 12\.2"):
        cusolver.polar(random(4, 3))
    assert_svd(cusolver.gesvdj_batched(random(2, 4, 3)), random(2, 4, 3))
    raw = Raw(old_fake)
    with pytest.raises(RuntimeError, match="syev_batched: needs cuSOLVER"):
        raw.solver.syev_batched(raw.array(2, 4, 4), raw.array(2, 4), raw.status(2), 0)


def test_libraries_are_named(fake_cusolver: Fake) -> None:
    path = str(fake_cusolver.path)
    assert cusolver.libraries() == {"cusolver": f"12.4.0 ({path})", "cudart": path}
    assert cusolver.available() == dict.fromkeys(cusolver.SOLVERS)


def test_what_the_process_holds_is_found_first(built_fake: Fake, old_fake: Fake) -> None:
    """The name of a library that is open already wins against the path of another."""
    names = [str(old_fake.path), built_fake.path.name]
    library = extension().Library(names, names)
    assert library.solver_path() == library.runtime_path() == str(built_fake.path)
    assert extension().Library(names[:1], names).version() == "11.4.0"


def test_libraries_that_are_not_there(built_fake: Fake) -> None:
    there = [str(built_fake.path)]
    with pytest.raises(RuntimeError, match="the CUDA runtime was not found: no candidates"):
        extension().Library(there, [])
    with pytest.raises(RuntimeError, match=r"cuSOLVER was not found: .*/no/such\.so.*; .*nor"):
        extension().Library(["/no/such.so", "libnor_this.so.1"], there)
    with pytest.raises(RuntimeError, match="lacks cusolverGetProperty cusolverDnCreate"):
        extension().Library(["libc.so.6"], there)
    with pytest.raises(RuntimeError, match="lacks cudaGetDevice"):
        extension().Library(there, ["libc.so.6"])


def test_what_is_missing_is_said(built_fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons() -> set[str | None]:
        cusolver._found.cache_clear()
        assert cusolver.libraries() == {}
        return set(cusolver.available().values())

    monkeypatch.setattr(torch.version, "cuda", None)
    assert reasons() == {f"torch {torch.__version__} is built without CUDA"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reasons() == {"torch finds no CUDA device"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cusolver, "candidates", lambda cuda: ([], []))
    assert reasons() == {"the CUDA runtime was not found: no candidates"}

    def fails() -> None:
        raise ImportError("no module")

    monkeypatch.setattr(cusolver, "_extension", fails)
    assert reasons() == {"the extension is not built (no module)"}
    with pytest.raises(MissingDependencyError, match="not built"):
        cusolver.syevd(symmetric(3))
    cusolver._found.cache_clear()


def test_where_libraries_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["nvidia/cu13/lib/libcusolver.so.12", "nvidia/cu13/lib/libcudart.so.13"]
    files += ["nvidia/cusolver/lib/libcusolver.so.11", "nvidia/cuda_runtime/lib/libcudart.so.12"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    solver, runtime = cusolver.candidates("13.2")
    assert solver[-1] == "libcusolver.so.12"
    assert runtime[-1] == "libcudart.so.13"
    assert str(tmp_path / files[0]) in solver
    assert str(tmp_path / files[1]) in runtime
    solver, runtime = cusolver.candidates("12.8")
    assert solver[-1] == "libcusolver.so.11"
    assert runtime[-1] == "libcudart.so.12"
    assert str(tmp_path / files[2]) in solver
    assert str(tmp_path / files[3]) in runtime
    assert cusolver.candidates("11.8") == ([], [])


def test_declarations_equal_nvidias_headers(built_fake: Fake) -> None:
    roots = [Path(entry) / "nvidia" for entry in sys.path] + [Path("/usr/local/cuda/include")]
    folders = [f for root in roots for f in [root, *root.glob("*/include")] if f.is_dir()]
    needed = ("cusolverDn.h", "cublas_v2.h", "cuda_runtime_api.h", "crt/host_defines.h")
    missing = [name for name in needed if not any((f / name).is_file() for f in folders)]
    if missing:
        pytest.skip(f"NVIDIA's headers are not installed: {', '.join(missing)}")
    command = [str(compiler()), "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{folder}" for folder in folders]
    source = Path(__file__).parent / "fake_cusolver" / "abi_check.cpp"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_build_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    environment = dict(os.environ, CXX="/nonexistent", CC="/nonexistent")
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path / 'lib'}"]
    command += [f"--build-temp={tmp_path / 'temp'}", "--force"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
