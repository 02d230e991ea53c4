"""Fused weights: TSV-M of a q, k, v matrix as one against TSV-M of its three parts.

    python -m benchmarks.fused [--size 512] [--experts 4]

Retention of a part is <M, D_t> / ||D_t||^2 over its rows, the mean over experts t. Size is
||M|| / ||sum_t D_t|| there: far above 1, the part is filled with what belongs to no expert.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from resm_kernels import merge_tensors
from resm_kernels.methods.matrices import split_rule

NAME = "layers.0.self_attn.qkv_proj.weight"
CASES = (
    # title, scales of q, k, v; their shared input directions; key-value heads of 8
    ("equal scales", (1.0, 1.0, 1.0), False, 8),
    ("q, k 10 x smaller", (0.1, 0.1, 1.0), False, 8),
    ("q, k 10 x smaller, one input basis", (0.1, 0.1, 1.0), True, 8),
    ("q, k 10 x smaller, 2 of 8 kv heads", (0.1, 0.1, 1.0), False, 2),
    ("v 10 x smaller", (1.0, 1.0, 0.1), False, 8),
)


def delta(rows: int, right: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """A power-law spectrum i^-0.5 with random left directions; Frobenius norm `scale`."""
    left, _ = torch.linalg.qr(torch.randn(right.shape[0], rows, generator=generator))
    values = torch.arange(1, rows + 1).pow(-0.5)
    matrix = (left[:rows].T * values) @ right[:, :rows].T
    return matrix * (scale / matrix.norm())


def fused_deltas(
    size: int, experts: int, scales: Sequence[float], shared: bool, kv_heads: int
) -> list[torch.Tensor]:
    """One fused delta per expert; `shared`: its parts read the same input directions."""
    generator = torch.Generator().manual_seed(0)
    rows = (size, size * kv_heads // 8, size * kv_heads // 8)
    deltas = []
    for _ in range(experts):
        bases = [
            torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
            for _ in range(1 if shared else 3)
        ]
        parts = zip(rows, bases * 3 if shared else bases, scales, strict=False)
        deltas.append(torch.cat([delta(m, right, s, generator) for m, right, s in parts]))
    return deltas


def measure(merged: torch.Tensor, deltas: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Retention and size of a merged part."""
    kept = sum(float((merged * d).sum() / d.square().sum()) for d in deltas) / len(deltas)
    return kept, float(merged.norm() / torch.stack(list(deltas)).sum(dim=0).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--experts", type=int, default=4)
    arguments = parser.parse_args()
    print(
        f"{arguments.size} columns, {arguments.experts} experts; retention, then size, of q, k, v"
    )
    for title, scales, shared, kv_heads in CASES:
        deltas = fused_deltas(arguments.size, arguments.experts, scales, shared, kv_heads)
        base = torch.zeros_like(deltas[0])
        config = {"num_attention_heads": 8, "num_key_value_heads": kv_heads}
        split = split_rule(NAME, base.shape, {**config, "hidden_size": arguments.size})
        if split is None:
            raise SystemExit("--size must be a multiple of 8")
        whole = merge_tensors(base, deltas, method="tsvm")
        rows: dict[str, list[tuple[float, float]]] = {"fused": [], "split": []}
        for part in split.parts:
            own = [part.of(d) for d in deltas]
            rows["fused"].append(measure(part.of(whole), own))
            merged = merge_tensors(torch.zeros(part.shape), own, method="tsvm")
            rows["split"].append(measure(merged, own))
        for how, values in rows.items():
            columns = [f"{value:7.3f}" for pair in zip(*values, strict=True) for value in pair]
            print(f"{title:36} {how:6}", *columns)


if __name__ == "__main__":
    main()
