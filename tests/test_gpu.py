"""What a CUDA device computes: the accuracy contract, the CPU's answers, and no surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import resm_kernels
from resm_kernels.api import merge_tensors
from resm_kernels.linalg import (
    FactoredDelta,
    Solver,
    SolverOptions,
    cusolver,
    dispatch,
    leading_subspaces,
)
from resm_kernels.linalg.solver import Mode
from tests import oracle
from tests.checkpoints import contents, fine_tuned, make_state, save
from tests.test_merge import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
MODES: tuple[Mode, ...] = ("auto", "exact", "fast", "textbook")
SHAPE = (420, 300)
"""Ranks of three experts sum to more than the panels that are always whitened in float64."""


def make_deltas(kind: str, shape: tuple[int, int], count: int = 3) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(oracle.make_delta(kind, *shape, rng)) for _ in range(count)]


def on_device(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize(
    ("kind", "shape"), [("power", (600, 420)), ("lora16-bf16", (420, 900)), ("noise", (512, 512))]
)
def test_every_mode_keeps_its_promise(kind: str, shape: tuple[int, int]) -> None:
    deltas = make_deltas(kind, shape)
    arrays = [delta.numpy() for delta in deltas]
    given = on_device(deltas)
    for share in (1.0, 0.75, 0.5):
        ranks = [int(share * (min(shape) // 3))] * 3
        reference = oracle.tsvm(arrays, ranks)
        kept = [float((reference * d).sum()) for d in arrays]
        errors: dict[str, float] = {}
        for mode in MODES:
            merge = Solver(SolverOptions(mode=mode)).merge(given, ranks)
            merged = (merge.left.double() @ merge.right.double().T).cpu().numpy()
            errors[mode] = oracle.error(merged, reference)
            if mode == "fast":
                found = [float((merged * d).sum()) for d in arrays]
                assert found == pytest.approx(kept, rel=1e-2)
        assert errors["exact"] <= 1e-6
        assert errors["auto"] <= (1e-5 if share <= 0.75 else max(2 * errors["textbook"], 1e-5))
        assert errors["fast"] <= 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_results_stay_on_the_device(mode: Mode) -> None:
    solver, deltas = Solver(SolverOptions(mode=mode)), on_device(make_deltas("noise", SHAPE))
    subspace = leading_subspaces(deltas[0], 100)
    merge = solver.merge(deltas, [100] * 3)
    held = (subspace.left, subspace.values, subspace.right, merge.left, merge.right)
    assert {tensor.device for tensor in held} == {deltas[0].device}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, (96, 64)])
@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c", "linear", "task_arithmetic"])
def test_merged_tensors_are_those_of_the_cpu(
    method: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    deltas = make_deltas("power", shape)
    base = torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).to(dtype)
    scale = float(base.norm() / deltas[0].norm())
    experts = [base + (scale * delta).to(dtype) for delta in deltas]
    expected = merge_tensors(base, experts, method)
    found = merge_tensors(base.to(DEVICE), on_device(experts), method)
    assert found.device.type == DEVICE
    assert found.dtype == dtype
    assert float((found.cpu() - expected).norm()) <= 1e-5 * float((expected - base).norm())


def test_merging_on_the_device_repeats_itself_to_the_last_bit() -> None:
    base, *experts = on_device(make_deltas("noise", SHAPE, 4))
    assert torch.equal(merge_tensors(base, experts, "resm"), merge_tensors(base, experts, "resm"))


def low_rank(rank: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((SHAPE[0], rank)) @ rng.standard_normal((rank, SHAPE[1]))
    return torch.from_numpy(factors.astype(np.float32))


NOISE = make_deltas("noise", SHAPE)
DEGENERATE = {
    "zero": [torch.zeros(SHAPE)] * 3,
    "one zero": [NOISE[0], torch.zeros(SHAPE), NOISE[1]],
    "equal": [NOISE[0]] * 3,
    "lora": [low_rank(8, seed) for seed in range(3)],
    "equal lora": [low_rank(8, 0)] * 3,
    "orthogonal": [torch.eye(*SHAPE)] * 3,
    "extreme": [1e-30 * NOISE[0], 1e30 * NOISE[1], NOISE[2]],
    "alone": NOISE[:1],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_experts_give_finite_merges(case: str, mode: Mode) -> None:
    deltas = on_device(DEGENERATE[case])
    merge = Solver(SolverOptions(mode=mode)).merge(deltas, [SHAPE[1] // len(deltas)] * len(deltas))
    assert bool(merge.left.isfinite().all())
    assert bool(merge.right.isfinite().all())
    if case == "zero":
        assert not bool((merge.left @ merge.right.T).any())


@pytest.mark.parametrize("case", ["lora", "one zero"])
def test_rank_deficient_experts_agree_with_the_oracle(case: str) -> None:
    deltas = DEGENERATE[case]
    ranks = [SHAPE[1] // len(deltas)] * len(deltas)
    merge = Solver().merge(on_device(deltas), ranks)
    reference = oracle.tsvm([delta.numpy() for delta in deltas], ranks)
    merged = (merge.left.double() @ merge.right.double().T).cpu().numpy()
    assert oracle.error(merged, reference) <= 1e-5


# The cuSOLVER extension


def needs(name: str) -> None:
    if reason := cusolver.available()[name]:  # type: ignore[index]
        pytest.skip(reason)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["syev_batched", "syevd", "syevdx"])
def test_eigenpairs_of_cusolver(name: str, dtype: torch.dtype) -> None:
    needs(name)
    noise = torch.randn(5, 200, 120, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    matrices = noise.mT @ noise
    kept = matrices.clone()
    if name == "syev_batched":
        found = cusolver.syev_batched(matrices)
    elif name == "syevd":
        matrices, kept = matrices[0], kept[0]
        found = cusolver.syevd(matrices)
    else:
        matrices, kept = matrices[0], kept[0]
        found = cusolver.syevdx(matrices, 40)
    assert torch.equal(matrices, kept)
    tolerance = 1e3 * torch.finfo(dtype).eps
    values, vectors = found.values.double(), found.vectors.double()
    expected = torch.linalg.eigvalsh(kept.double())[..., -values.shape[-1] :]
    assert relative(values, expected) <= tolerance
    assert relative(kept.double() @ vectors, vectors * values[..., None, :]) <= tolerance
    eye = torch.eye(vectors.shape[-1], device=DEVICE, dtype=torch.float64)
    assert float((vectors.mT @ vectors - eye).abs().max()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("name", ["gesvdj_batched", "gesvda_batched", "gesvdp", "polar"])
def test_singular_values_of_cusolver(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    needs(name)
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(5, *shape, generator=generator).to(DEVICE, dtype)
    matrices[3] = 0.0
    one, wide = matrices[0], matrices[0].double()
    left, values, right = torch.linalg.svd(wide.cpu(), full_matrices=False)
    tolerance = (1e-2 if name == "gesvda_batched" else 1e3) * torch.finfo(dtype).eps ** (
        0.5 if name == "gesvda_batched" else 1.0
    )
    if name == "polar":
        found = cusolver.polar(one).factor.double().cpu()
        assert relative(found, left @ right) <= tolerance
        return
    if name == "gesvdp":
        svds = cusolver.gesvdp(one)[0]
        parts = [part[None] for part in (svds.left, svds.values, svds.right)]
    else:
        svds = getattr(cusolver, name)(matrices)
        parts = [svds.left, svds.values, svds.right]
        assert not bool(svds.values[3].any())
        assert all(bool(part.isfinite().all()) for part in parts)
    left, found, right = (part[0].double() for part in parts)
    assert relative(found.cpu(), values) <= tolerance
    assert relative(left * found @ right.T, wide) <= tolerance


@pytest.mark.parametrize("name", ["syevd", "syevdx", "gesvdp"])
def test_merges_by_cusolver_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(name)
    kind = "steep" if name == "gesvdp" else "power"
    deltas = make_deltas(kind, SHAPE)
    expected = oracle.tsvm([delta.numpy() for delta in deltas], [SHAPE[1] // 3] * 3)
    monkeypatch.setattr(dispatch, "backend", lambda problem, device: name)
    merge = Solver(SolverOptions(mode="exact")).merge(on_device(deltas), [SHAPE[1] // 3] * 3)
    merged = (merge.left.double() @ merge.right.double().T).cpu().numpy()
    assert oracle.error(merged, expected) <= 1e-6


@pytest.mark.parametrize("name", ["torch", "syev_batched"])
def test_batches_of_small_matrices_are_those_of_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "torch":
        needs(name)
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(24, 48, 64, generator=generator)
    experts = [base + 1e-3 * torch.randn(base.shape, generator=generator) for _ in range(3)]
    given: dict[str, Any] = {"name": "experts.down_proj", "config": {"num_experts": 24}}
    expected = merge_tensors(base, experts, "resm", **given)
    monkeypatch.setattr(dispatch, "backend", lambda problem, device: name)
    found = merge_tensors(base.to(DEVICE), on_device(experts), "resm", **given)
    assert relative(found.cpu() - base, expected - base) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_factored_and_dense_experts_merge_together(mode: Mode) -> None:
    rng = np.random.default_rng(0)
    left, right = (torch.from_numpy(rng.standard_normal((side, 8))) for side in SHAPE)
    factored = FactoredDelta(left.to(DEVICE), right.to(DEVICE))
    dense = NOISE[0].to(DEVICE)
    merge = Solver(SolverOptions(mode=mode)).merge([dense, factored], [140, 8])
    reference = oracle.tsvm([NOISE[0].numpy(), (left @ right.T).numpy()], [140, 8])
    merged = (merge.left.double() @ merge.right.double().T).cpu().numpy()
    assert oracle.error(merged, reference) <= (1e-2 if mode == "fast" else 1e-5)
    assert merge.left.device == dense.device


def model_files(folder: Path) -> dict[str, bytes]:
    return {n: d for n, d in contents(folder).items() if not n.startswith("resm_report.")}


@pytest.mark.parametrize("method", ["resm", "ties"])
def test_from_disk_to_disk(method: str, tmp_path: Path) -> None:
    """Any workers and devices give the same bytes, near the CPU's, in the memory planned."""
    shapes = {f"layers.{i}.up_proj.weight": SHAPE for i in range(6)} | {"norm.weight": (300,)}
    state = make_state(shapes=shapes, dtype=torch.float32)
    state["steps"] = torch.arange(7)
    base = save(tmp_path / "base", state)
    experts = [save(tmp_path / f"e{t}", fine_tuned(state, t + 1)) for t in range(3)]
    resm_kernels.merge(base, experts, tmp_path / "cpu", method)
    reports = {}
    for name, workers in ((DEVICE, 1), (DEVICE, 2), ("all", None)):
        output = tmp_path / f"{name}-{workers}"
        report = resm_kernels.merge(base, experts, output, method, device=name, workers=workers)
        reports[output] = report
        assert not any(result.memory_notes for result in report.tensors.values())
        peaks = report.peak_device_memory.values()
        assert all(0 < peak <= report.predicted_device_memory for peak in peaks)
    first, *others = map(model_files, reports)
    assert all(other == first for other in others)
    origin, merged, expected = (load(f) for f in (base, next(iter(reports)), tmp_path / "cpu"))
    assert torch.equal(merged["steps"], expected["steps"])
    for tensor in shapes:
        change = (expected[tensor] - origin[tensor]).norm()
        assert (merged[tensor] - expected[tensor]).norm() <= 1e-4 * change


def test_too_little_device_memory_ends_on_the_cpu(tmp_path: Path) -> None:
    """A limit of the allocator itself, below what was planned with."""
    shapes = {f"layers.{i}.up_proj.weight": (1024, 1024) for i in range(3)}
    state = make_state(shapes=shapes)
    base = save(tmp_path / "base", state)
    experts = [save(tmp_path / f"e{t}", fine_tuned(state, t + 1)) for t in range(3)]
    resm_kernels.merge(base, experts, tmp_path / "cpu", "tsvm")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**24) / total)
    try:
        report = resm_kernels.merge(base, experts, tmp_path / "out", "tsvm", device=DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert set(report.all_notes) == set(shapes)
    merged, expected = load(tmp_path / "out"), load(tmp_path / "cpu")
    assert all(torch.equal(merged[name], expected[name]) for name in shapes)
