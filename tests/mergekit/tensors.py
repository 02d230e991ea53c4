"""Small weights, degenerate ones among them, and what mergekit is asked to make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Weights = tuple[torch.Tensor, list[torch.Tensor]]
PER_MODEL = ("density", "gamma", "epsilon")
DEFAULTS = {"lambda": 1.0, "normalize": False, "rescale": False, "int8_mask": False}


@dataclass(frozen=True)
class Case:
    """One merge: its inputs, and parameters as mergekit wants them, one of a kind per expert."""

    name: str
    method: str
    base: torch.Tensor
    experts: list[torch.Tensor]
    weights: list[float] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


def weights(shape: tuple[int, ...], seed: int) -> Weights:
    """A base and three experts without equal magnitudes in a delta."""
    dice = np.random.default_rng(seed)
    base = dice.integers(-1000, 1000, shape) / np.float32(1024)
    experts = []
    for _ in range(3):
        size = dice.permutation(base.size).reshape(shape) + 1
        sign = 2 * dice.integers(0, 2, shape) - 1
        experts.append(torch.from_numpy((base + sign * size / 128).astype(np.float32)))
    return torch.from_numpy(base.astype(np.float32)), experts


def constant(shape: tuple[int, ...], seed: int) -> Weights:
    """One delta of one magnitude."""
    base, (expert, *_) = weights(shape, seed)
    return base, [base + 0.25 * (expert - base).sign()]


KINDS: dict[str, Callable[[], Weights]] = {
    "plain": lambda: weights((5, 7), 1),
    "one zero delta": lambda: (lambda b, e: (b, [e[0], b.clone(), e[2]]))(*weights((4, 6), 2)),
    "zero deltas": lambda: (lambda b, e: (b, [b.clone() for _ in e]))(*weights((4, 6), 3)),
    "equal experts": lambda: (lambda b, e: (b, [e[0]] * 3))(*weights((4, 6), 4)),
    "opposed experts": lambda: (lambda b, e: (b, [e[0], 2 * b - e[0]]))(*weights((4, 6), 5)),
    "one expert": lambda: (lambda b, e: (b, e[:1]))(*weights((4, 6), 6)),
    "vector": lambda: weights((33,), 7),
    "one column": lambda: weights((9, 1), 8),
    "one entry": lambda: weights((1,), 9),
    "three axes": lambda: weights((2, 3, 5), 10),
    "constant": lambda: constant((4, 6), 11),
}
SHARES = (0.7, -0.4, 1.1)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"density": (0.5, 0.3, 0.8), "normalize": True}),
    "ties to nothing": ("ties", {"density": (0.0, 1.0, 0.001), "rescale": True, "lambda": 0.6}),
    "breadcrumbs": ("breadcrumbs", {"density": (0.5, 0.9, 0.2), "gamma": (0.1, 0.2, 0.0)}),
    "breadcrumbs rescaled": (
        "breadcrumbs",
        {"density": (0.5, 0.0, 0.3), "gamma": (0.2, 0.1, 1.0), "rescale": True, "normalize": True},
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        {"density": (0.5, 1.0, 0.4), "gamma": (0.01, 0.3, 0.3), "rescale": True},
    ),
    "model_stock": ("model_stock", {"filter_wise": False}),
    "model_stock by row": ("model_stock", {"filter_wise": True}),
    "slerp": ("slerp", {"t": 0.3}),
    "slerp beyond": ("slerp", {"t": 1.25}),
    "passthrough": ("passthrough", {"scale": -0.75}),
}


def cases() -> Iterator[Case]:
    """Every setting on every kind of weight that it merges."""
    for kind, make in KINDS.items():
        for setting, (method, given) in SETTINGS.items():
            base, experts = make()
            if method in ("slerp", "passthrough"):
                experts = experts[:1]
            if method == "model_stock" and len(experts) < 2:
                continue
            name = f"{setting} of {kind}"
            if method in ("slerp", "passthrough", "model_stock"):
                yield Case(name, method, base, experts, [], given)
            else:
                yield Case(name, method, base, experts, *_settings(given, len(experts)))


def _settings(given: dict[str, Any], experts: int) -> tuple[list[float], dict[str, Any]]:
    cut = {k: list(v[:experts]) if k in PER_MODEL else v for k, v in given.items()}
    return list(SHARES[:experts]), {**DEFAULTS, **cut}


RANDOM = {
    "dare_linear": {"normalize": True},
    "dare_ties": {},
    "della_linear": {"epsilon": (0.2, 0.1, 0.15)},
    "della": {"epsilon": (0.2, 0.0, 0.15), "normalize": True},
}


def random_cases() -> Iterator[Case]:
    """Methods that draw, on one weight each."""
    for seed, (method, more) in enumerate(RANDOM.items()):
        base, experts = weights((4, 6), 20 + seed)
        given = {"density": (0.5, 0.3, 0.8), "rescale": True, "lambda": 0.9, **more}
        yield Case(method, method, base, experts, *_settings(given, 3))
