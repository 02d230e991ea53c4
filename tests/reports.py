"""Reports of merges that never ran, as large as real ones."""

from __future__ import annotations

import random
from typing import Any

from resm_kernels.engine.measures import spectrum_points, spectrum_positions
from resm_kernels.engine.result import Measures, MergeReport, TensorResult

ATTENTION = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}
MATRICES = {
    **{f"self_attn.{name}": shape for name, shape in ATTENTION.items()},
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of Llama 3 8B, with so many layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 4096)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{n}.weight": shape for n, shape in MATRICES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (4096,)
    return shapes | {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}


def made_up(
    shapes: dict[str, tuple[int, ...]], experts: int = 3, method: str = "resm", **changes: Any
) -> MergeReport:
    """A report with plausible numbers for every tensor."""
    numbers = random.Random(0)
    points = spectrum_points(len(shapes), experts)
    tensors = {
        name: _result(name, shape, experts, method, points, numbers)
        for name, shape in shapes.items()
    }
    models = [{"model": f"org/expert-{t}"} for t in range(experts)]
    values: dict[str, Any] = {
        "output": "/models/merged",
        "plan_id": "5f" * 32,
        "method": method,
        "recipe": {"merge_method": method, "base_model": "org/base", "models": models},
        "device": "cpu",
        "workers": 2,
        "threads": 1,
        "versions": {"resm-kernels": "0.1.0", "torch": "2.13.0"},
        "left_out": {},
        "seconds": 1234.5,
        "stage_seconds": {"read": 60.0, "compute": 2400.0, "write": 20.0, "finish": 15.0},
        "timeline": {
            "read 0": [0.0, 30.0, 40.5, 70.5],
            **{f"compute {i}": [2.0 + i, 1200.0, 1210.0, 1230.25] for i in range(2)},
            "write 0": [600.0, 620.0],
            "finish 0": [1219.5, 1234.5],
        },
        "read_bytes": 64 * 10**9,
        "written_bytes": 16 * 10**9,
        "inputs": [{"model": "x", "digest": f"{t:064x}"} for t in range(experts + 1)],
    }
    return MergeReport(**{**values, **changes}, tensors=tensors)


def _result(
    name: str,
    shape: tuple[int, ...],
    experts: int,
    method: str,
    points: int,
    numbers: random.Random,
) -> TensorResult:
    def some(low: float, high: float, count: int = experts) -> tuple[float, ...]:
        return tuple(float(f"{numbers.uniform(low, high):.4g}") for _ in range(count))

    pairs = experts * (experts - 1) // 2
    norms = {
        "base_norm": some(50, 90, 1)[0],
        "merged_norm": some(2, 4, 1)[0],
        "delta_norms": some(1, 3),
        "retentions": some(0.3, 1.1),
        "cosines": some(-0.1, 0.3, pairs),
    }
    seconds = some(0.1, 9, 1)[0]
    if len(shape) != 2 or "embed" in name or "lm_head" in name:
        result = TensorResult(name, "mean", f"{len(shape)}-D", shape, seconds=seconds)
        return TensorResult(**{**vars(result), "measures": Measures(**norms)})
    rank = min(shape) // experts
    at = spectrum_positions(rank, points)
    spectra = [some(0.5, 0.9, 1)[0] for _ in range(experts)]
    measures = Measures(
        **norms,
        interference=some(0.1, 2, 1)[0],
        overlaps=some(0, 0.4, pairs),
        spectrum_at=at,
        spectra=tuple(tuple(float(f"{top * i**-0.6:.4g}") for i in at) for top in spectra),
    )
    return TensorResult(
        name,
        method,
        None,
        shape,
        ranks=(rank,) * experts,
        weights=some(0.5, 1.5),
        outlier_scores=some(0.02, 0.2),
        sparsity=some(0, 0.4, 1)[0],
        backends=("gram-partial", "polar-mixed"),
        seconds=seconds,
        measures=measures,
    )
