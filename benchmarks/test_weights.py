"""One weight: our methods against naive torch and the textbook, on one thread.

Every pair is a benchmark group; read the ratio of the medians, not the times. A peer that
disagrees with us fails the benchmark before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resm_kernels.api import merge_tensors
from resm_kernels.ops.delta_stats import delta_stats
from tests.oracle import textbook

Family = tuple[torch.Tensor, list[torch.Tensor]]
SHAPES = [(768, 768), (2048, 768), (1024, 2816)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Pin torch; restore afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family(shape: tuple[int, int]) -> Family:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator) * 0.02
    experts = [
        (base + torch.randn(shape, generator=generator) * 0.001).bfloat16() for _ in range(3)
    ]
    return base.bfloat16(), experts


def textbook_tsvm(base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    origin = base.float()
    rank = min(base.shape) // len(experts)
    merged = textbook([e.float() - origin for e in experts], [rank] * len(experts))
    return (origin + merged).to(base.dtype)


def naive_task_arithmetic(base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    origin = base.float()
    return (origin + torch.stack([e.float() - origin for e in experts]).sum(0)).to(base.dtype)


def naive_linear(base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([e.float() for e in experts]).mean(0).to(base.dtype)


PEERS: dict[str, Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]] = {
    "tsvm": textbook_tsvm,
    "task_arithmetic": naive_task_arithmetic,
    "linear": naive_linear,
}


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("method", PEERS)
def test_method(benchmark: Any, method: str, shape: tuple[int, int], who: str) -> None:
    base, experts = family(shape)
    ours, theirs = merge_tensors(base, experts, method), PEERS[method](base, experts)
    change = (ours.float() - base.float()).norm()
    # Both round to bfloat16 once; one differing ulp per entry is the most that is allowed.
    assert (ours.float() - theirs.float()).norm() <= 2**-8 * base.float().norm() + 0.01 * change
    benchmark.group = f"{method} {shape[0]}x{shape[1]}"
    work = (
        (lambda: merge_tensors(base, experts, method))
        if who == "ours"
        else (lambda: PEERS[method](base, experts))
    )
    rounds = 3 if method == "tsvm" else 20
    benchmark.pedantic(work, rounds=rounds, warmup_rounds=1)


def naive_stats(base: torch.Tensor, expert: torch.Tensor) -> tuple[float, float]:
    a = (expert.float() - base.float()).abs()
    threshold = a.mean() + 3 * a.std(unbiased=False)
    floor = 0.1 * a.square().mean().sqrt()
    share = float(a[a > threshold].sum() / a.sum())
    return share, float((a <= floor).float().mean())


@pytest.mark.parametrize("who", ["ours", "peer"])
def test_delta_stats(benchmark: Any, who: str) -> None:
    base, experts = family((2048, 2048))
    (ours,) = delta_stats(base, experts[:1], sigma=3.0, noise_floor=0.1)
    share, sparse = naive_stats(base, experts[0])
    assert ours.outlier_share == pytest.approx(share, rel=1e-3)
    assert ours.sparsity == pytest.approx(sparse, rel=1e-3)
    benchmark.group = "delta_stats 2048x2048"
    work = (
        (lambda: delta_stats(base, experts[:1], sigma=3.0, noise_floor=0.1))
        if who == "ours"
        else (lambda: naive_stats(base, experts[0]))
    )
    benchmark.pedantic(work, rounds=20, warmup_rounds=2)
