"""The CPU references of the ops against the naive torch expressions, on one thread.

Every pair is a benchmark group; read the ratio of the medians. A peer that disagrees with us
fails before anything is timed; `extra_info` has what each holds beyond its inputs at its peak.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resm_kernels.ops.consensus import elected_deltas, weighted_deltas, weighted_sum
from resm_kernels.ops.delta_stats import delta_stats
from resm_kernels.ops.low_rank import add_low_rank
from resm_kernels.ops.mask import Mask, drop_key, masked_delta, split_delta, trim

SIDE, INNER, DENSITY = 4096, 64, 0.2
WEIGHTS = [0.3, 0.3, 0.4]
GENERATOR = torch.Generator().manual_seed(0)
BASE = (0.02 * torch.randn(SIDE, SIDE, generator=GENERATOR)).bfloat16()
EXPERTS = [
    (BASE.float() + 0.001 * torch.randn(SIDE, SIDE, generator=GENERATOR)).bfloat16()
    for _ in range(3)
]
LEFT, RIGHT = (0.01 * torch.randn(SIDE, INNER, generator=GENERATOR) for _ in range(2))
KEPT = int(DENSITY * BASE.numel())
TRIMMED = [Mask(threshold=t) for t, _ in trim(BASE, EXPERTS, [KEPT] * 3)]
"""Without a cut: like the naive expression, they keep every entry of the threshold's size."""
DROPPED = Mask(density=DENSITY, key=drop_key(0, "weight", 0))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pin torch; restore afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def delta(expert: torch.Tensor) -> torch.Tensor:
    return expert.float() - BASE.float()


def naive_stats() -> list[tuple[float, float]]:
    found = []
    for expert in EXPERTS:
        a = delta(expert).abs()
        threshold, floor = a.mean() + 3 * a.std(correction=0), 0.1 * a.square().mean().sqrt()
        share = a[a > threshold].sum() / a.sum()
        found.append((float(share), float((a <= floor).float().mean())))
    return found


def naive_trim() -> list[float]:
    return [float(delta(e).abs().flatten().topk(KEPT).values[-1]) for e in EXPERTS]


def naive_mask() -> torch.Tensor:
    d = delta(EXPERTS[0])
    return torch.where(d.abs() >= TRIMMED[0].threshold, d, 0.0)


def naive_drop() -> torch.Tensor:
    d = delta(EXPERTS[0])
    return d * torch.bernoulli(torch.full_like(d, DENSITY)) / DENSITY


def naive_split() -> tuple[torch.Tensor, torch.Tensor]:
    d = delta(EXPERTS[0])
    high = d.bfloat16()
    return high, (d - high.float()).bfloat16()


def naive_sum() -> torch.Tensor:
    return sum(w * e.float() for w, e in zip(WEIGHTS, EXPERTS, strict=True)).bfloat16()


def naive_deltas() -> torch.Tensor:
    return (BASE.float() + torch.stack([delta(e) for e in EXPERTS]).sum(0)).bfloat16()


def naive_ties() -> torch.Tensor:
    deltas = torch.stack(
        [
            torch.where(d.abs() >= mask.threshold, d, 0.0) * weight
            for d, mask, weight in zip(map(delta, EXPERTS), TRIMMED, WEIGHTS, strict=True)
        ]
    )
    agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    weights = torch.tensor(WEIGHTS).view(3, 1, 1)
    divisor = (agree * weights).sum(0)
    merged = (deltas * agree).sum(0) / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return (BASE.float() + merged).bfloat16()


def naive_low_rank() -> torch.Tensor:
    return (BASE.float() + 0.7 * (LEFT @ RIGHT.T)).bfloat16()


def ours_stats() -> list[tuple[float, float]]:
    found = delta_stats(BASE, EXPERTS, noise_floor=0.1)
    return [(stats.outlier_share, stats.sparsity) for stats in found]


def ours_ties() -> torch.Tensor:
    return elected_deltas(
        *(BASE, EXPERTS, WEIGHTS),
        **{"elect": "sum", "mean": True, "scale": 1.0},
        out_dtype=torch.bfloat16,
        masks=TRIMMED,
    )


def ours_low_rank() -> torch.Tensor:
    return add_low_rank(BASE, LEFT, RIGHT, scales=[0.7], out_dtype=torch.bfloat16)[0]


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "delta_stats": (ours_stats, naive_stats),
    "trim": (lambda: [t for t, _ in trim(BASE, EXPERTS, [KEPT] * 3)], naive_trim),
    "masked_delta, trimmed": (lambda: masked_delta(BASE, EXPERTS[0], TRIMMED[0]), naive_mask),
    "masked_delta, dropped": (lambda: masked_delta(BASE, EXPERTS[0], DROPPED), naive_drop),
    "split_delta": (lambda: split_delta(BASE, EXPERTS[0]), naive_split),
    "weighted_sum": (
        lambda: weighted_sum(EXPERTS, WEIGHTS, out_dtype=torch.bfloat16),
        naive_sum,
    ),
    "weighted_deltas": (
        lambda: weighted_deltas(BASE, EXPERTS, [1.0] * 3, scale=1.0, out_dtype=torch.bfloat16),
        naive_deltas,
    ),
    "elected_deltas, trimmed": (ours_ties, naive_ties),
    "add_low_rank": (ours_low_rank, naive_low_rank),
}


def agree(op: str, ours: Any, theirs: Any) -> bool:
    """The same result: statistics to 1e-3, tensors to an ulp of bf16, random ones in size."""
    if op in ("delta_stats", "trim"):
        return bool(np.allclose(ours, theirs, rtol=1e-3))
    if op.endswith("dropped"):
        return float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-2)
    if op == "split_delta":
        return all(torch.equal(mine, peer) for mine, peer in zip(ours, theirs, strict=True))
    apart = (ours.float() - theirs.float()).norm()
    return bool(apart <= 2**-8 * theirs.float().norm())


def peak_bytes(work: Callable[[], Any]) -> int:
    """What the process holds at its peak during a call, beyond what it held before."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("op", PAIRS)
def test_op(benchmark: Any, op: str, who: str) -> None:
    ours, theirs = PAIRS[op]
    assert agree(op, ours(), theirs())
    work = ours if who == "ours" else theirs
    benchmark.group = f"{op} {SIDE}x{SIDE}"
    benchmark.extra_info["peak MB"] = peak_bytes(work) >> 20
    benchmark.pedantic(work, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("op", PAIRS)
def test_no_more_memory_than_the_naive_expression(op: str) -> None:
    ours, theirs = PAIRS[op]
    assert peak_bytes(ours) < peak_bytes(theirs)
