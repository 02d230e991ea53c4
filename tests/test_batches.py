"""Equal matrices of one tensor, merged in batches: the same merges, the same reports."""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.spectral import resident
from resm_kernels.errors import NumericsError
from resm_kernels.linalg import (
    Batching,
    FactoredDelta,
    Solver,
    SolverOptions,
    SpectralMerge,
    dispatch,
    leading_subspaces_batch,
    spectral_merge_batch,
)
from resm_kernels.methods import Inputs, Merged, Method, find_method, merge_weight, split_of
from tests import oracle

COUNT, EXPERTS = 7, 3


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One batch


def merged(deltas: torch.Tensor, rank: int, weights: torch.Tensor) -> list[SpectralMerge | None]:
    found = leading_subspaces_batch(deltas, torch.full(deltas.shape[:2], rank))
    return spectral_merge_batch(found, weights)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (12, 12)])
def test_a_batch_equals_the_oracle(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    kinds = ["noise", "power", "lora", "noise"]
    found = [[oracle.make_delta(k, *shape, rng) for _ in range(3)] for k in kinds]
    found[3] = [np.zeros(shape, np.float32), found[0][0], found[0][0]]
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, (len(kinds), 3)))
    rank = min(shape) // 3
    merges = merged(torch.from_numpy(np.array(found)), rank, weights)
    for members, mine, merge in zip(found, weights.tolist(), merges, strict=True):
        assert merge is not None
        expected = oracle.tsvm(members, [rank] * 3, mine)
        assert oracle.error((merge.left @ merge.right.T).numpy(), expected) <= 1e-6
    single = Solver(SolverOptions(mode="exact"))
    for members, merge in zip(found, merges, strict=True):
        alone = single.merge([torch.from_numpy(d) for d in members], [rank] * 3)
        assert merge is not None
        assert merge.null_directions == alone.null_directions
    assert merges[3] is not None
    assert merges[3].null_directions == 2 * rank


def test_what_a_gram_matrix_cannot_hold_is_left_to_others() -> None:
    rng = np.random.default_rng(0)
    found = [[oracle.make_delta(kind, 80, 80, rng)] for kind in ("steep", "noise")]
    deltas = torch.from_numpy(np.array(found))
    batch = leading_subspaces_batch(deltas, torch.full((2, 1), 25))
    assert batch.doubtful == [True, False]
    first, second = spectral_merge_batch(batch, torch.ones(2, 1, dtype=torch.float64))
    assert first is None
    assert second is not None


def test_nearly_equal_experts_are_left_to_others() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    near = one + 3e-6 * torch.randn(40, 30, generator=generator, dtype=torch.float64)
    far = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    merges = merged(torch.stack([one, near, one, far]).view(2, 2, 40, 30), 15, torch.ones(2, 2))
    assert merges[0] is None
    assert merges[1] is not None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-200, 1e-100, 1e-60, 1e78, 1e121, 1e200])
def test_float64_deltas_of_any_size_merge_as_at_size_one(size: float) -> None:
    rng = np.random.default_rng(0)
    found = [oracle.make_delta("power", 40, 30, rng).astype(np.float64) for _ in range(2)]
    (merge,) = merged(torch.from_numpy(np.array([found]) * size), 15, torch.ones(1, 2))
    assert merge is not None
    product = (merge.left / size**0.5) @ (merge.right / size**0.5).T
    assert oracle.error(product.numpy(), oracle.tsvm(found, [15, 15])) <= 1e-6


def test_experts_of_very_different_size_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    found = [oracle.make_delta("power", 40, 30, rng).astype(np.float64) for _ in range(2)]
    deltas = torch.from_numpy(np.array([[found[0] * 1e-180, found[1] * 1e180]]))
    batch = leading_subspaces_batch(deltas, torch.full((1, 2), 15))
    for subspace, delta, size in zip(batch.subspaces(0), found, (1e-180, 1e180), strict=True):
        expected = np.linalg.svd(delta, compute_uv=False)[:15]
        assert np.allclose(subspace.values.numpy() / size, expected, rtol=1e-9)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_ranks_are_those_of_single_matrices(energy: float) -> None:
    rng = np.random.default_rng(0)
    kinds = ["power", "lora", "noise", "exponential"]
    found = [torch.from_numpy(oracle.make_delta(k, 30, 40, rng)) for k in kinds]
    found[2] = torch.zeros(30, 40)
    ranks = [15, 30, 7, 1]
    batch = leading_subspaces_batch(
        torch.stack(found).view(2, 2, 30, 40), torch.tensor(ranks).view(2, 2), energy=energy
    )
    single = Solver().subspaces(
        [functools.partial(torch.clone, d) for d in found], ranks, energy=energy
    )
    for ours, alone in zip([*batch.subspaces(0), *batch.subspaces(1)], single, strict=True):
        assert ours.rank == alone.rank
        assert ours.numerical_rank == alone.numerical_rank
        assert torch.allclose(ours.values, alone.values, rtol=1e-9)
        assert ours.left.shape == alone.left.shape


# Whole tensors


def singly(method: Method[Any]) -> Method[Any]:
    return replace(method, batch=lambda *given: Batching())


def stack(
    shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(COUNT, *shape, generator=generator)
    experts = [
        base + 1e-3 * torch.randn(COUNT, *shape, generator=generator) for _ in range(EXPERTS)
    ]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def merge_stack(
    method: Method[Any],
    base: torch.Tensor,
    experts: list[torch.Tensor],
    inputs: Inputs | None = None,
    weights: tuple[float, ...] = (1.0, 0.5, 2.0),
    name: str = "model.layers.0.mlp.experts.down_proj",
    **parameters: Any,
) -> Merged:
    options = method.make_options(parameters, EXPERTS)
    split, _ = split_of(method, name, base.shape, EXPERTS, options, {"num_experts": COUNT})
    assert split is not None
    given = inputs or Inputs(name, base, experts)
    return merge_weight(method, given, weights, options, torch.float64, split)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tsvm", {}),
        ("tsvm", {"solver": "exact"}),
        ("resm", {}),
        ("resm", {"rank": "energy", "rank_energy": 0.5}),
        ("resm", {"mask_noise": True, "noise_floor": 0.5}),
    ],
)
@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_a_stack_merges_as_its_matrices_do_one_by_one(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    base, experts = stack(shape, dtype)
    experts[1][2] = base[2]  # an expert that leaves a matrix as it is
    experts[0][4] = experts[2][4]
    found = find_method(method)
    ours = merge_stack(found, base, experts, **parameters)
    alone = merge_stack(singly(found), base, experts, **parameters)
    assert ours.backends == ("gram-batched", "polar-batched")
    assert alone.backends == ("gram-full", "polar-fp64")
    change = (alone.tensor - base.double()).norm()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert float((ours.tensor - alone.tensor).norm()) <= tolerance * float(change)
    for field in ("rule", "ranks", "weights", "outlier_scores", "sparsity", "notes"):
        assert getattr(ours, field) == getattr(alone, field), field
    assert ours.interference == pytest.approx(alone.interference, rel=1e-6)
    assert ours.overlaps == pytest.approx(alone.overlaps, rel=1e-6)
    for mine, theirs in zip(ours.spectra, alone.spectra, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9)
    again = merge_stack(found, base, experts, **parameters)
    assert torch.equal(ours.tensor, again.tensor)


def test_matrices_that_a_batch_cannot_hold_have_the_bytes_of_single_ones() -> None:
    rng = np.random.default_rng(0)
    base, experts = torch.zeros(COUNT, 80, 80), list(torch.zeros(EXPERTS, COUNT, 80, 80))
    for expert in experts:
        for b in range(COUNT):
            kind = "steep" if b == 3 else "noise"
            expert[b] = torch.from_numpy(oracle.make_delta(kind, 80, 80, rng))
    method = find_method("tsvm")
    ours, alone = (merge_stack(m, base, experts) for m in (method, singly(method)))
    assert torch.equal(ours.tensor[3], alone.tensor[3])
    assert not torch.equal(ours.tensor, alone.tensor)
    assert [n for n in ours.notes if "span more" in n] == [
        n for n in alone.notes if "span more" in n
    ]


def test_differences_past_the_range_of_float32_are_refused() -> None:
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((COUNT, 32, 32), dtype=np.float32))
    base[2, 5, 5] = 3e38
    with pytest.raises(NumericsError, match="not finite"):
        merge_stack(find_method("tsvm"), base, [-base] * EXPERTS)


@pytest.mark.parametrize("method", ["tsvm", "resm"])
def test_outputs_that_share_findings_have_the_bytes_of_their_own_merges(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = stack((24, 32))
    found = find_method(method)
    runs: list[dict[str, Any]] = [
        {"weights": (1.0, 1.0, 1.0)},
        {"weights": (1.0, 2.0, 1.0)},
        {"weights": (1.0, 2.0, 1.0), "lambda": 0.5},
        {"weights": (1.0, 2.0, 1.0), "solver": "exact"},
    ]
    expected = [merge_stack(found, base, experts, **run) for run in runs]
    calls = 0
    original = leading_subspaces_batch

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*given, **options)

    monkeypatch.setattr("resm_kernels.methods.spectral.leading_subspaces_batch", counted)
    inputs = Inputs("model.layers.0.mlp.experts.down_proj", base, experts, shared=True)
    for run, alone in zip(runs, expected, strict=True):
        assert torch.equal(merge_stack(found, base, experts, inputs, **run).tensor, alone.tensor)
    assert calls == 2


def test_parts_of_several_shapes_keep_their_order() -> None:
    """Keys and values are one batch; queries stand before them in reports."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(32, 16, generator=generator)
    experts = [base + 0.01 * torch.randn(32, 16, generator=generator) for _ in range(EXPERTS)]
    experts[0][16:24] = base[16:24] + 0.01 * torch.ones(8, 16)
    config = {
        "model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    results = []
    for method in (find_method("tsvm"), singly(find_method("tsvm"))):
        options = method.make_options({}, EXPERTS)
        name = "model.layers.0.self_attn.qkv_proj.weight"
        split, _ = split_of(method, name, base.shape, EXPERTS, options, config)
        inputs = Inputs(name, base, experts)
        results.append(merge_weight(method, inputs, [1.0] * 3, options, torch.float64, split))
    ours, alone = results
    assert set(ours.backends) == {"gram-full", "polar-fp64", "gram-batched", "polar-batched"}
    assert ours.ranks == alone.ranks == (5, 5, 5, 1, 2, 2, 2, 2, 2)
    assert ours.notes == alone.notes
    assert ours.notes[0].startswith("k: expert 1: rank clamped")
    assert float((ours.tensor - alone.tensor).norm()) <= 1e-6 * float((ours.tensor - base).norm())


@pytest.mark.parametrize("kind", ["factors", "the base itself"])
def test_experts_that_are_no_weights_of_their_own_are_not_batched(kind: str) -> None:
    base, experts = stack((24, 32), torch.float32)
    flat = torch.zeros(COUNT * 24, 2), torch.zeros(32, 2)
    first = base if kind == "the base itself" else FactoredDelta(*flat)
    name = "model.layers.0.mlp.experts.down_proj"
    inputs = Inputs(name, base, [first, *experts[1:]])
    merged = merge_stack(find_method("tsvm"), base, experts, inputs)
    assert "gram-batched" not in merged.backends


# What is batched, and what it holds


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [
        ((32, 32), 100, 16),
        ((32, 32), 5, 5),
        ((32, 32), 1, 1),
        ((128, 128), 100, 8),
        ((128, 192), 100, 5),
        ((16, 1024), 100, 8),
        ((128, 193), 100, 1),
        ((129, 129), 100, 1),
        ((2, 2), 100, 1),
    ],
)
def test_the_size_of_batches_on_a_cpu(shape: tuple[int, int], count: int, size: int) -> None:
    found = Solver().batch(shape, count, 3)
    assert found.size == size == Solver().batch(shape[::-1], count, 3).size
    assert (found.workspace > 0) == (size > 1)
    assert Solver(SolverOptions(mode="textbook")).batch(shape, count, 3).size == 1


def test_a_gpu_batches_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch, "backend", lambda problem, device: "loop" if problem.shape[0] > 64 else "torch"
    )
    assert Solver().batch((64, 64), 512, 3, device="cuda").size == 512
    assert Solver().batch((64, 1 << 15), 512, 4, device="cuda").size == 2
    assert Solver().batch((8, 8), 8192, 8, device="cuda").size == 2048
    assert Solver().batch((65, 65), 512, 3, device="cuda") == Batching()


def one_workspace(m: int, n: int, count: int, method: str) -> None:
    """The peak of merging a stack over that of merging its matrices one by one, and the plan's."""
    torch.set_num_threads(1)
    found = find_method(method)
    options = found.make_options({}, EXPERTS)
    base = torch.randn(count, m, n).bfloat16()
    experts = [(base + 0.01 * torch.randn(count, m, n)).bfloat16() for _ in range(EXPERTS)]
    name = "experts.down_proj"
    split, _ = split_of(found, name, base.shape, EXPERTS, options, {"num_experts": count})
    peaks = []
    for one in (singly(found), found):
        merge_weight(one, Inputs(name, base, experts), [1.0] * 3, options, torch.bfloat16, split)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        merge_weight(one, Inputs(name, base, experts), [1.0] * 3, options, torch.bfloat16, split)
        peaks.append(resident("VmHWM") - before)
    planned = found.batch((m, n), count, EXPERTS, 4, options, "cpu").workspace
    print(json.dumps({"measured": peaks[1] - peaks[0], "planned": planned}))


@pytest.mark.parametrize(("m", "n"), [(128, 128), (16, 1024)])
def test_a_batch_holds_what_was_planned(m: int, n: int) -> None:
    code = f"from tests.test_batches import one_workspace; one_workspace({m}, {n}, 64, 'tsvm')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert 0.5 * found["planned"] <= found["measured"] <= found["planned"], found
