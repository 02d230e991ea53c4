"""Element-wise methods against the same formulas in naive torch: whole tensors, one thread.

Every pair is a benchmark group; read the ratio of the medians. The naive side sorts or selects as
one would first write it. A peer that disagrees with us fails before anything is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.test_ops import BASE, EXPERTS, SIDE, WEIGHTS, delta, one_thread, peak_bytes
from resm_kernels.methods import METHODS, Inputs, merge_weight

__all__ = ["one_thread"]

DENSITY, GAMMA, EPSILON, T = 0.2, 0.05, 0.1, 0.3
COUNT = BASE.numel()
KEPT, TAKEN = int(DENSITY * COUNT), int(GAMMA * COUNT)


def largest(d: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros(COUNT)
    kept[d.abs().flatten().topk(KEPT).indices] = 1.0
    return d * kept.view_as(d)


def band(d: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros(COUNT)
    order = d.abs().flatten().argsort(descending=True)
    kept[order[TAKEN : TAKEN + KEPT]] = 1.0
    return d * kept.view_as(d)


def rescaled(d: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    masked = d * kept
    return masked * (d.abs().sum() / masked.abs().sum())


def dropped(d: torch.Tensor) -> torch.Tensor:
    return rescaled(d, torch.bernoulli(torch.full_like(d, DENSITY)))


def dropped_by_rank(d: torch.Tensor) -> torch.Tensor:
    rank = d.abs().argsort(dim=1).argsort(dim=1) / (d.shape[1] - 1)
    return rescaled(d, torch.bernoulli(DENSITY - EPSILON + 2 * EPSILON * rank))


def summed(sparsify: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    deltas = torch.stack([sparsify(delta(expert)) for expert in EXPERTS])
    total = (deltas * torch.tensor(WEIGHTS).view(3, 1, 1)).sum(0)
    return (BASE.float() + total).bfloat16()


def elected(sparsify: Callable[[torch.Tensor], torch.Tensor], mean: bool) -> torch.Tensor:
    weights = torch.tensor(WEIGHTS).view(3, 1, 1)
    deltas = torch.stack([sparsify(delta(expert)) for expert in EXPERTS]) * weights
    agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    total = (deltas * agree).sum(0)
    if mean:
        divisor = (agree * weights).sum(0)
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return (BASE.float() + total).bfloat16()


def stock(by_row: bool) -> torch.Tensor:
    deltas = [delta(e) if by_row else delta(e).flatten()[None] for e in EXPERTS]
    cosines = [cosine_of(deltas[i], deltas[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    cosine = torch.stack(cosines).mean(0)[:, None]
    ratio = 3 * cosine / (1 + 2 * cosine)
    base = BASE.float() if by_row else BASE.float().flatten()[None]
    average = torch.stack([base + d for d in deltas]).mean(0)
    return (ratio * average + (1 - ratio) * base).view_as(BASE).bfloat16()


def cosine_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In float64: on one thread torch's float32 norm of a whole weight errs by 6e-4."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (a, b)]
    product = (a * b).sum(-1, dtype=torch.float64)
    return (product / (norms[0] * norms[1]).clamp_min(1e-6)).float()


def spherical() -> torch.Tensor:
    a, b = BASE.float(), EXPERTS[0].float()
    cosine = cosine_of(a.flatten(), b.flatten())
    if abs(cosine) > 0.9995:
        return ((1 - T) * a + T * b).bfloat16()
    angle = cosine.acos()
    first, second = ((1 - T) * angle).sin() / angle.sin(), (T * angle).sin() / angle.sin()
    return (first * a + second * b).bfloat16()


def ours(method: str, **parameters: Any) -> torch.Tensor:
    chosen = METHODS[method]
    experts = EXPERTS[:1] if chosen.experts == (1, 1) else EXPERTS
    weights = WEIGHTS if "density" in chosen.specs else [1.0] * len(experts)
    options = chosen.make_options(parameters, len(experts))
    inputs = Inputs("weight", BASE, experts)
    return merge_weight(chosen, inputs, weights, options, torch.bfloat16).tensor


RANKED = {"density": DENSITY, "epsilon": EPSILON}
BANDED = {"density": DENSITY, "gamma": GAMMA}
PAIRS: dict[str, tuple[dict[str, Any], Callable[[], torch.Tensor]]] = {
    "ties": ({"density": DENSITY}, lambda: elected(largest, True)),
    "breadcrumbs": (BANDED, lambda: summed(band)),
    "breadcrumbs_ties": (BANDED, lambda: elected(band, False)),
    "dare_linear": ({"density": DENSITY}, lambda: summed(dropped)),
    "dare_ties": ({"density": DENSITY}, lambda: elected(dropped, False)),
    "della_linear": (RANKED, lambda: summed(dropped_by_rank)),
    "della": (RANKED, lambda: elected(dropped_by_rank, True)),
    "model_stock": ({}, lambda: stock(False)),
    "model_stock, filter_wise": ({"filter_wise": True}, lambda: stock(True)),
    "slerp": ({"t": T}, spherical),
    "passthrough": ({"scale": 0.5}, lambda: (EXPERTS[0].float() * 0.5).bfloat16()),
}


def run(case: str, who: str) -> Callable[[], torch.Tensor]:
    parameters, naive = PAIRS[case]
    return naive if who == "peer" else functools.partial(ours, case.split(",")[0], **parameters)


def agree(case: str, mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for one rounding; changes of one size where they are drawn.

    Trims settle ties in magnitude differently, which moves 1 to 3 % of the entries.
    """
    first, second = delta(mine), delta(theirs)
    if case.startswith(("dare", "della")):
        return float(first.norm()) == pytest.approx(float(second.norm()), rel=0.02)
    if case.startswith(("ties", "breadcrumbs")):
        return bool((first - second).norm() <= 0.5 * second.norm())
    return bool(((first - second).abs() <= 2**-7 * mine.float().abs() + 2**-24).all())


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("case", PAIRS)
def test_method(benchmark: Any, case: str, who: str) -> None:
    assert agree(case, run(case, "ours")(), run(case, "peer")())
    work = run(case, who)
    benchmark.group = f"{case} {SIDE}x{SIDE}"
    benchmark.extra_info["peak MB"] = peak_bytes(work) >> 20
    benchmark.pedantic(work, rounds=3, warmup_rounds=0)
