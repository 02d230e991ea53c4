"""The spectral methods against the NumPy oracle, at the accuracy contract of the design."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from resm_kernels.api import merge_tensors
from resm_kernels.errors import NonFiniteError, NumericsError, UsageError
from resm_kernels.linalg import leading_subspaces, polar_factor, spectral_merge
from resm_kernels.methods import Inputs, find_method, merge_weight
from resm_kernels.methods.spectral import outlier_weighting, sparse_rank
from tests import oracle

CONTRACT = 1e-5
SHAPES = [(96, 96), (160, 64), (64, 160), (1, 40), (40, 1), (1, 1), (7, 5)]
KINDS = ["noise", "power", "exponential", "steep", "lora"]


def deltas(kind: str, m: int, n: int, count: int, seed: int = 0) -> list[oracle.Matrix]:
    rng = np.random.default_rng(seed)
    return [oracle.make_delta(kind, m, n, rng) for _ in range(count)]


def merged_delta(found: list[oracle.Matrix], method: str, **parameters: object) -> oracle.Matrix:
    """What a method adds to a zero base, so that no rounding of a base hides errors."""
    base = torch.zeros(found[0].shape)
    experts = [torch.from_numpy(np.asarray(d, dtype=np.float32)) for d in found]
    return merge_tensors(base, experts, method, parameters=parameters).numpy()


def noise_of_float32(reference: oracle.Matrix) -> float:
    """Rounding of a float32 product of two panels: sqrt(K) * eps / 2, K at most the short side."""
    return math.sqrt(max(reference.shape)) * float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_tsvm_below_full_rank_meets_the_contract(
    shape: tuple[int, int], count: int, kind: str
) -> None:
    found = deltas(kind, *shape, count)
    limit = min(shape) // count
    if limit == 0:
        expected = np.mean([d.astype(np.float64) for d in found], axis=0)
        assert oracle.error(merged_delta(found, "tsvm"), expected) <= CONTRACT
        return
    rank = max(1, int(0.75 * limit))
    parameters = {"outlier_power": 0, "rank": "fixed", "rank_fraction": rank / limit}
    expected = oracle.tsvm(found, [rank] * count)
    assert oracle.error(merged_delta(found, "resm", **parameters), expected) <= CONTRACT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_tsvm_at_full_rank_beats_twice_the_float32_textbook(
    shape: tuple[int, int], count: int, kind: str
) -> None:
    found = deltas(kind, *shape, count)
    limit = min(shape) // count
    if limit == 0:
        return
    expected = oracle.tsvm(found, [limit] * count)
    ranks = oracle.clamped(found, limit)
    published = oracle.textbook([torch.from_numpy(d) for d in found], ranks)
    textbook = oracle.error(published.numpy(), expected)
    mine = oracle.error(merged_delta(found, "tsvm"), expected)
    assert mine <= max(2 * textbook, noise_of_float32(expected))


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160), (1, 40), (7, 5)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", [*KINDS, "flat"])
def test_iso_c_meets_the_contract(shape: tuple[int, int], count: int, kind: str) -> None:
    found = deltas(kind, *shape, count)
    if min(shape) < count:
        expected = np.mean([d.astype(np.float64) for d in found], axis=0)
    else:
        expected = oracle.iso_c(found)
    assert oracle.error(merged_delta(found, "iso_c"), expected) <= CONTRACT


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160), (7, 5)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["noise", "power", "exponential", "lora"])
@pytest.mark.parametrize("common", [0.0, 0.8, 1.0])
def test_iso_cts_beats_twice_its_float32_textbook(
    shape: tuple[int, int], count: int, kind: str, common: float
) -> None:
    if min(shape) < count:
        return
    found = [torch.from_numpy(d) for d in deltas(kind, *shape, count)]
    expected = oracle.iso_cts([d.double() for d in found], common).numpy()
    textbook = oracle.error(oracle.iso_cts(found, common).numpy(), expected)
    mine = merged_delta([d.numpy() for d in found], "iso_cts", common_space=common)
    assert oracle.error(mine, expected) <= max(2 * textbook, CONTRACT)


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resm_with_both_additions_off_is_tsvm_bit_for_bit(
    shape: tuple[int, int], count: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(1)
    base = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    experts = [base + torch.from_numpy(d).to(dtype) for d in deltas("noise", *shape, count)]
    off = {"outlier_power": 0, "rank": "fixed", "lambda": 0.7}
    resm = merge_tensors(base, experts, "resm", parameters=off)
    assert torch.equal(resm, merge_tensors(base, experts, "tsvm", parameters={"lambda": 0.7}))


def test_resm_follows_the_formulas() -> None:
    """Outlier shares, weights, sparsity and rank computed again in NumPy, step by step."""
    shape, count = (60, 48), 3
    rng = np.random.default_rng(5)
    found = deltas("noise", *shape, count)
    for t, delta in enumerate(found):
        delta[rng.random(shape) < 0.2] = 0.0
        delta[rng.random(shape) < 0.01 * (t + 1)] *= 8.0
    scores, sparse = [], []
    for delta in found:
        a = np.abs(delta.astype(np.float64))
        scores.append(a[a > a.mean() + 2.5 * a.std()].sum() / a.sum())
        sparse.append((a <= 0.15 * np.sqrt((a**2).mean())).mean())
    assert min(sparse) > 0.2
    powered = np.array(scores) ** 0.5
    weights = count * powered / powered.sum()
    rank = round(48 / count * (1 - 0.9 * np.mean(sparse)))
    expected = oracle.tsvm(found, [rank] * count, list(weights))
    parameters = {
        "sigma": 2.5,
        "outlier_power": 0.5,
        "noise_floor": 0.15,
        "rank": "sparsity",
        "rank_sparsity": 0.9,
    }
    assert oracle.error(merged_delta(found, "resm", **parameters), expected) <= CONTRACT


def test_mask_noise_zeroes_entries_below_the_floor() -> None:
    found = deltas("noise", 40, 30, 2)
    masked = []
    for delta in found:
        floor = 0.5 * np.sqrt((delta.astype(np.float64) ** 2).mean())
        masked.append(np.where(np.abs(delta) <= floor, 0, delta))
    off = {"outlier_power": 0, "rank": "fixed"}
    mine = merged_delta(found, "resm", mask_noise=True, noise_floor=0.5, **off)
    assert oracle.error(mine, oracle.tsvm(masked, [15, 15])) <= CONTRACT


def test_rank_by_energy_keeps_the_share_asked_for() -> None:
    found = deltas("power", 60, 60, 2)
    squares = np.linalg.svd(found[0].astype(np.float64), compute_uv=False) ** 2
    kept = leading_subspaces(torch.from_numpy(found[0]), 60, energy=0.6).rank
    assert squares[:kept].sum() >= 0.6 * squares.sum() > squares[: kept - 1].sum()


@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c", "iso_cts"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_scale_does_not_matter(method: str, scale: float) -> None:
    found = deltas("noise", 32, 24, 3)
    small = [d * np.float32(scale) for d in found]
    one, other = merged_delta(found, method), merged_delta(small, method)
    assert oracle.error(other.astype(np.float64) / scale, one.astype(np.float64)) <= CONTRACT


@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c", "iso_cts"])
def test_zero_deltas_leave_the_base_as_it_is(method: str) -> None:
    base = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(merge_tensors(base, [base, base.clone()], method), base)


@pytest.mark.parametrize("method", ["tsvm", "resm"])
def test_one_zero_expert_gives_the_truncated_other(method: str) -> None:
    (delta,) = deltas("power", 30, 30, 1)
    u, s, vt = np.linalg.svd(delta.astype(np.float64))
    rank = 15
    mine = merged_delta(
        [delta, np.zeros_like(delta)], method, **({"rank": "fixed"} if method == "resm" else {})
    )
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert oracle.error(mine, expected) <= CONTRACT


def test_equal_experts_give_their_truncation() -> None:
    (delta,) = deltas("power", 30, 24, 1)
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    expected = (u[:, :12] * s[:12]) @ vt[:12]
    assert oracle.error(merged_delta([delta, delta.copy()], "tsvm"), expected) <= CONTRACT


def test_opposite_experts_cancel() -> None:
    (delta,) = deltas("power", 30, 24, 1)
    mine = merged_delta([delta, -delta], "tsvm")
    assert np.linalg.norm(mine) <= 1e-5 * np.linalg.norm(delta)


def test_repeated_singular_values_at_the_cut_keep_orthonormal_factors() -> None:
    """Which vectors of a repeated value are kept is arbitrary; the result must still be valid."""
    found = deltas("flat", 40, 40, 2)
    subspaces = [leading_subspaces(torch.from_numpy(d), 20) for d in found]
    for s in subspaces:
        eye = torch.eye(20, dtype=torch.float64)
        assert torch.linalg.norm(s.left.T @ s.left - eye) <= 1e-10
        assert torch.linalg.norm(s.right.T @ s.right - eye) <= 1e-10
    merge = spectral_merge(subspaces, [1, 1])
    values = torch.linalg.svdvals(merge.left @ merge.right.T)
    assert float(values[0]) <= 1 + 1e-5


def test_rank_is_clamped_to_the_numerical_rank_and_reported() -> None:
    (delta,) = deltas("lora", 50, 40, 1)
    found = leading_subspaces(torch.from_numpy(delta), 30)
    assert found.rank == found.numerical_rank == 4


def test_rank_zero_and_more_panels_than_rows() -> None:
    (delta,) = deltas("noise", 12, 9, 1)
    none = leading_subspaces(torch.from_numpy(delta), 0)
    assert none.left.shape == (12, 0)
    full = leading_subspaces(torch.from_numpy(delta), 9)
    assert spectral_merge([none, none], [1, 1]).left.shape == (12, 0)
    merge = spectral_merge([full, full, full], [1, 1, 1])
    assert merge.null_directions == 2 * 18
    assert oracle.error((merge.left @ merge.right.T).numpy(), delta) <= CONTRACT


def test_polar_factor_of_an_ill_conditioned_panel_steps_up_to_an_svd() -> None:
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((60, 20)))
    v, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    panel = (u * np.geomspace(1, 1e-5, 20)) @ v.T
    found = polar_factor([torch.from_numpy(panel)])
    assert found.backend == "polar-svd"
    assert oracle.error((found.basis @ found.mixing).numpy(), u @ v.T) <= 1e-8


def test_backends_are_reported_when_a_steep_spectrum_needs_an_svd() -> None:
    (delta,) = deltas("steep", 80, 80, 1)
    assert leading_subspaces(torch.from_numpy(delta), 25).backend == "svd"
    assert leading_subspaces(torch.from_numpy(delta), 10).backend == "gram-full"


def test_outlier_weights_sum_to_the_number_of_experts() -> None:
    for power in (-1.0, 0.0, 0.5, 1.0, 2.0):
        assert sum(outlier_weighting([0.1, 0.3, 0.7], power)) == pytest.approx(3.0)
    assert outlier_weighting([0.0, 0.0], 1.0) == [1.0, 1.0]
    assert outlier_weighting([0.0, 0.2], 1.0) == [0.0, 2.0]
    assert outlier_weighting([0.0, 0.2], -1.0) == [2.0, 0.0]
    frozen = outlier_weighting([0.0, 0.1, 0.3], -1.0, [False, True, True])
    assert frozen == pytest.approx([1.0, 1.5, 0.5])
    for power in (-1e5, 1e5):
        assert sum(outlier_weighting([0.1, 0.3, 0.7], power)) == pytest.approx(3.0)


def test_sparse_rank_stays_inside_its_bounds() -> None:
    assert sparse_rank(100, 3, 0.0, 1.0) == 33
    assert sparse_rank(101, 3, 0.0, 0.0) == 33
    assert sparse_rank(100, 4, 0.5, 1.0) == 12
    assert sparse_rank(100, 3, 1.0, 1.0) == 1


def test_float64_inputs_are_merged_in_float64() -> None:
    rng = np.random.default_rng(2)
    found = [rng.standard_normal((40, 30)) * 1e-9 for _ in range(2)]
    base = torch.from_numpy(rng.standard_normal((40, 30)))
    experts = [base + torch.from_numpy(d) for d in found]
    exact = [(e - base).numpy() for e in experts]
    mine = (merge_tensors(base, experts, "tsvm") - base).numpy()
    assert oracle.error(mine, oracle.tsvm(exact, [15, 15])) <= 1e-6


FAST_PRODUCTS = [
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
]
MERGE_UNDER_FAST_PRODUCTS = """
import hashlib, sys, torch
from resm_kernels.api import merge_tensors
from resm_kernels.methods import spectral
from resm_kernels.ops import dtypes
seen = []
rebuild = spectral.add_low_rank
spectral.add_low_rank = lambda *a, **k: (seen.append(dtypes._precisions()), rebuild(*a, **k))[1]
exec(sys.argv[1])
before = dtypes._precisions()
torch.manual_seed(0)
merged = merge_tensors(torch.zeros(300, 300), [torch.randn(300, 300) for _ in range(3)], "tsvm")
assert dtypes._precisions() == before, (before, dtypes._precisions())
assert set(seen[0]) <= {"ieee", "highest"}, seen
print(hashlib.sha256(merged.numpy().tobytes()).hexdigest())
"""


def test_a_process_that_asks_for_fast_products_gets_the_same_bytes() -> None:
    """In processes of their own: torch keeps some of these settings for good."""
    digests = set()
    for setting in ["pass", *FAST_PRODUCTS]:
        command = [sys.executable, "-c", MERGE_UNDER_FAST_PRODUCTS, setting]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (setting, done.stderr)
        digests.add(done.stdout)
    assert len(digests) == 1


def test_inputs_are_not_changed_and_not_shared() -> None:
    base = torch.randn(8, 6)
    experts = [torch.randn(8, 6), torch.randn(8, 6)]
    before = [t.clone() for t in (base, *experts)]
    for method in ("resm", "tsvm", "iso_c", "iso_cts", "linear", "task_arithmetic"):
        merged = merge_tensors(base, experts, method)
        merged.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True))


@pytest.mark.parametrize(
    "method", ["resm", "tsvm", "iso_c", "iso_cts", "linear", "task_arithmetic"]
)
def test_strided_views_give_the_same_bytes_as_contiguous_ones(method: str) -> None:
    base, a, b = (torch.randn(33, 44, generator=torch.Generator().manual_seed(i)) for i in range(3))
    views = [torch.stack([t, t], dim=2)[:, :, 0] for t in (base, a, b)]
    assert not views[0].is_contiguous()
    one = merge_tensors(base, [a, b], method)
    assert torch.equal(one, merge_tensors(views[0], views[1:], method))


@pytest.mark.parametrize("size", [1e155, 1e200, 1e-170])
def test_float64_of_extreme_size_neither_overflows_nor_vanishes(size: float) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    found = leading_subspaces(torch.diag(values) * size, 2)
    assert torch.allclose(found.values / size, values[:2], rtol=1e-12)


@pytest.mark.parametrize("exponent", [-900, -600, 600, 900])
@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c", "iso_cts"])
def test_float64_merges_of_extreme_size_are_those_of_size_one(method: str, exponent: int) -> None:
    base = torch.zeros(32, 24, dtype=torch.float64)
    found = [torch.from_numpy(d).double() for d in deltas("noise", 32, 24, 3)]
    huge = [torch.ldexp(d, torch.tensor(exponent)) for d in found]
    one, other = (
        merge_weight(
            find_method(method),
            Inputs("w", base, e),
            [1.0] * 3,
            find_method(method).make_options({}, 3),
            torch.float64,
        )
        for e in (found, huge)
    )
    assert torch.equal(torch.ldexp(other.tensor, torch.tensor(-exponent)), one.tensor)
    assert other.interference == one.interference


@pytest.mark.parametrize("power", [-1.0, 1.0])
def test_a_frozen_layer_of_one_expert_does_not_scale_the_others(power: float) -> None:
    (delta,) = deltas("noise", 24, 24, 1)
    other = {"outlier_power": 0, "rank": "fixed"}
    expected = merged_delta([delta, np.zeros_like(delta)], "resm", **other)
    on = {**other, "outlier_power": power}
    assert np.array_equal(merged_delta([delta, np.zeros_like(delta)], "resm", **on), expected)


def test_results_that_do_not_fit_are_refused() -> None:
    base = torch.zeros(4, 4)
    with pytest.raises(NonFiniteError, match=r"do not fit torch\.float16"):
        merge_tensors(base, [base + 1e6], "linear", out_dtype=torch.float16)
    with pytest.raises(UsageError, match="out_dtype a float"):
        merge_tensors(base, [base], "linear", out_dtype=torch.int32)
    with pytest.raises(UsageError, match="weights must be finite"):
        merge_tensors(base, [base], "linear", weights=[float("nan")])
    with pytest.raises(UsageError, match="sum to zero"):
        merge_tensors(base, [base, base], "linear", weights=[1.0, -1.0])


@pytest.mark.parametrize("size", [2, 40, 300])
@pytest.mark.parametrize("solver", ["auto", "exact", "textbook"])
@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c", "iso_cts"])
def test_differences_past_the_range_of_float32_are_refused(
    method: str, solver: str, size: int
) -> None:
    """LAPACK may take NaN and find rank 0: the base would come back as if nothing had changed."""
    base = torch.eye(size) * 3e38
    parameters = {} if method == "iso_c" else {"solver": solver}
    with pytest.raises(NumericsError, match=r"tensor 'w' .* not finite"):
        merge_tensors(base, [-base, -base], method, name="w", parameters=parameters)


def test_bad_tensors_are_refused() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(UsageError, match="expert 1 does not match"):
        merge_tensors(base, [torch.zeros(4, 3)])
    with pytest.raises(UsageError, match=r"dtype torch\.int64"):
        merge_tensors(base, [torch.zeros(3, 4, dtype=torch.int64)])
    with pytest.raises(NonFiniteError, match="tensor 'w': expert 1 holds NaN"):
        merge_tensors(base, [torch.full((3, 4), float("nan"))], name="w")
    with pytest.raises(UsageError, match="at least one expert"):
        merge_tensors(base, [])
    with pytest.raises(UsageError, match="did you mean 'resm'"):
        merge_tensors(base, [base], "rsem")
