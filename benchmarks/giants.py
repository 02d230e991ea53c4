"""The layouts of giants as sparse checkpoints: planned whole, merged a window at a time.

    python -m benchmarks.giants [--folder DIR] [--large] [NAME ...]

Headers, indexes, configs and file sizes are those of the whole model; the data are holes, but for
the tensors of the windows, which are random in the base and differ in every expert. A base and
three experts of the 405B layout are 3.2 TB long and take 4 MB of disk; the windows take 2 GB.
Times are predicted from the rates that `resm doctor --measure` kept, or that are measured now.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks.disk import RESM, run
from benchmarks.record import ROOT, Row, write
from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.manifest import index_file
from resm_kernels.checkpoint.writer import Slot, lay_out_shards, tensor_bytes
from resm_kernels.engine.rates import load_rates, measure_rates, save_rates

EXPERTS = 3
SHARD = 5 * 10**9
BF16 = DTYPES["BF16"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Giant:
    """A model's layout.

    Attributes
    ----------
    shapes : mapping
        Tensor names and shapes, all bfloat16.
    config : mapping
        What its config.json says of sizes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]


def _attention(layer: str, hidden: int, heads: int, kv_heads: int, head_dim: int) -> Shapes:
    return {
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (heads * head_dim, hidden),
        f"{layer}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        f"{layer}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim),
    }


def _gated(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def _whole(layers: Iterable[Shapes], hidden: int, vocabulary: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in layers:
        shapes |= layer
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int
) -> Giant:
    """A Llama with grouped-query attention and untied embeddings."""
    prefixes = [f"model.layers.{i}" for i in range(layers)]
    shapes = _whole(
        (
            _attention(p, hidden, heads, kv_heads, hidden // heads)
            | _gated(f"{p}.mlp", hidden, intermediate)
            for p in prefixes
        ),
        hidden,
        vocabulary,
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Giant(shapes, config)


def mixture(layers: int, experts: int, hidden: int, width: int, vocabulary: int) -> Giant:
    """A Qwen3-MoE whose experts are tensors of their own, three each."""
    heads, kv_heads, head_dim = 32, 4, 128
    shapes = _whole(
        (
            _attention(p, hidden, heads, kv_heads, head_dim)
            | {
                f"{p}.self_attn.q_norm.weight": (head_dim,),
                f"{p}.self_attn.k_norm.weight": (head_dim,),
                f"{p}.mlp.gate.weight": (experts, hidden),
            }
            | {
                name: shape
                for e in range(experts)
                for name, shape in _gated(f"{p}.mlp.experts.{e}", hidden, width).items()
            }
            for p in (f"model.layers.{i}" for i in range(layers))
        ),
        hidden,
        vocabulary,
    )
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "head_dim": head_dim,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Giant(shapes, config)


GIANTS: dict[str, Callable[[], Giant]] = {
    "llama-3-70b": lambda: llama(80, 8192, 28672, 64, 8, 128256),
    "llama-3.1-405b": lambda: llama(126, 16384, 53248, 128, 8, 128256),
    "moe-1000": lambda: mixture(14, 1000, 2048, 768, 151936),
}


@dataclass(frozen=True)
class Window:
    """Full-size tensors of a giant that are merged for real."""

    giant: str
    method: str
    only: tuple[str, ...]


WINDOWS = (
    Window("llama-3-70b", "resm", ("model.layers.40.self_attn.[kv]_proj.*",)),
    Window("llama-3-70b", "ties", ("model.layers.40.self_attn.o_proj.*",)),
    Window("llama-3.1-405b", "resm", ("model.layers.63.self_attn.k_proj.*",)),
    Window("moe-1000", "resm", ("model.layers.7.mlp.experts.50?.*", "*.7.input_layernorm.*")),
)
LARGE = (
    Window("llama-3-70b", "task_arithmetic", ("model.layers.40.mlp.*",)),
    Window("llama-3-70b", "resm", ("model.layers.40.self_attn.q_proj.*",)),
    Window("llama-3.1-405b", "linear", ("model.layers.63.self_attn.[qo]_proj.*",)),
)
"""Some need half an hour and 10 GB of memory and of disk."""


Values = Callable[[Slot, int], torch.Tensor]
"""A tensor of the base (0), or of one of the experts, on the CPU."""


def write_family(
    folder: Path, giant: Giant, patched: Sequence[str] = (), values: Values | None = None
) -> list[Path]:
    """A base and its experts; the tensors that a pattern matches get values, all else is holes."""
    names = ["base", *(f"expert{t}" for t in range(1, EXPERTS + 1))]
    made = values or _values
    return [write_model(folder / name, giant, t, patched, made) for t, name in enumerate(names)]


def write_model(
    folder: Path, giant: Giant, which: int, patched: Sequence[str], values: Values
) -> Path:
    """One of the family: 0 is the base, the others differ from it by a change of their own."""
    folder.mkdir(parents=True)
    tensors = [(name, BF16, tuple(shape)) for name, shape in giant.shapes.items()]
    layouts = lay_out_shards(tensors, SHARD)
    for layout in layouts:
        with open(folder / layout.name, "wb") as file:
            os.truncate(file.fileno(), layout.size)
            file.write(layout.header)
            for slot in layout.slots:
                if any(fnmatchcase(slot.name, pattern) for pattern in patched):
                    file.seek(slot.start)
                    file.write(tensor_bytes(values(slot, which)))
    for name, content in index_file(layouts).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(giant.config))
    return folder


def _values(slot: Slot, which: int) -> torch.Tensor:
    """Gaussian weights; experts add a change whose columns fall as a power law."""
    seed = zlib.crc32(slot.name.encode())
    values = torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
    if which:
        change = torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed + which))
        if change.dim() == 2:
            falling = torch.arange(1, change.shape[1] + 1) ** -0.8
            change *= falling * (change.shape[1] ** 0.5 / falling.norm())
        values.add_(change, alpha=2e-3)
    return values.bfloat16()


def _asked(models: Sequence[Path], method: str, *more: str) -> list[str]:
    experts = [part for expert in models[1:] for part in ("--expert", str(expert))]
    return [*RESM, "merge", "--base", str(models[0]), *experts, "--method", method, *more]


def rehearse(name: str, giant: Giant, models: Sequence[Path], out: Path) -> Row:
    """What a dry run of the whole says, and what it takes; disks too small are no obstacle."""
    asked = _asked(models, "resm", "--memory-budget", "1TB", "--dry-run", "--json", str(out))
    with tempfile.TemporaryFile() as said:
        cost = run(asked, out, fine=(0, 1), stdout=said)
        said.seek(0)
        plan = json.load(said)
    row = {
        "giant": name,
        "tensors": len(giant.shapes),
        "parameters": sum(math.prod(shape) for shape in giant.shapes.values()),
        "read_GB": round(plan["read_bytes"] / 1e9, 1),
        "disk_GB": round(plan["disk_bytes"] / 1e9, 1),
        "memory_GB": round(plan["peak_memory_bytes"] / 1e9, 2),
        **{f"{k}_h": round(v / 3600, 2) for k, v in plan["predicted_seconds"].items()},
        **{f"dry_run_{key}": value for key, value in cost.items()},
    }
    print(*row.values(), sep=" | ", flush=True)
    return row


def merge_window(window: Window, models: Sequence[Path], out: Path) -> Row:
    """Merge a window in a process of its own; memory and time as planned and as measured."""
    only = [part for pattern in window.only for part in ("--only", pattern)]
    asked = _asked(models, window.method, *only, "--quiet", "--no-report", "--json", str(out))
    found = [
        json.loads(subprocess.run(a, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
        for a in ([*asked, "--dry-run"], asked)
    ]
    plan, report = found
    subprocess.run([*RESM, "verify", str(out)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(out)
    shapes = [tensor["shape"] for tensor in plan["tensors"]]
    predicted, measured = plan["predicted_seconds"]["wall"], report["seconds"]
    row = {
        "giant": window.giant,
        "method": window.method,
        "only": " ".join(window.only),
        "tensors": len(shapes),
        "largest": "x".join(map(str, max(shapes, key=math.prod))),
        "parameters": sum(map(math.prod, shapes)),
        "predicted_s": round(predicted, 1),
        "measured_s": round(measured, 1),
        "planned_MB": round(report["predicted_memory"] / 1e6),
        "peak_MB": round(report["peak_memory"] / 1e6),
        "peak_over_planned": round(report["peak_memory"] / report["predicted_memory"], 2),
    }
    print(*row.values(), sep=" | ", flush=True)
    return row


def main() -> None:
    """Write, rehearse and merge; keep the figures where every giant was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(GIANTS))
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--large", action="store_true", help="also merge windows of the largest")
    parser.add_argument("--no-windows", action="store_true", help="dry runs only")
    options = parser.parse_args()
    names = options.names or list(GIANTS)
    windows = () if options.no_windows else (*WINDOWS, *(LARGE if options.large else ()))
    rehearsed: list[Row] = []
    merged: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if load_rates() is None:
            save_rates(measure_rates(Path(folder)))
        for name in names:
            giant, place = GIANTS[name](), Path(folder) / name
            mine = [window for window in windows if window.giant == name]
            models = write_family(place, giant, [p for window in mine for p in window.only])
            rehearsed.append(rehearse(name, giant, models, place / "out"))
            merged += [merge_window(window, models, place / "out") for window in mine]
            shutil.rmtree(place)
    if not options.names:
        write("giants", rehearsed, 1)
        if merged:
            write("giants_windows", merged, 1)


if __name__ == "__main__":
    main()
