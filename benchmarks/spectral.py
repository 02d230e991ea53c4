"""The factorisations measured: accuracy, speed of a layer and of a checkpoint, workspace.

    python -m benchmarks.spectral accuracy     # about five minutes on two cores
    python -m benchmarks.spectral layer        # about twelve minutes
    python -m benchmarks.spectral workspace    # about a minute
    python -m benchmarks.spectral checkpoint   # about six minutes
    python -m benchmarks.spectral batches      # about a minute

Each writes `benchmarks/results/<name>.csv` with its conditions in `<name>.json`; `accuracy` also
writes the table of `docs/accuracy.md`. FusionBench is a peer where `fusion_bench` can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import io
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import ROOT, Row, conditions, write
from resm_kernels.linalg import Batching, FactoredDelta, Solver, SolverOptions
from resm_kernels.methods import Inputs, find_method, merge_weight, split_of
from tests import oracle

Shape = tuple[int, int]

SPECTRA = ("power", "exponential", "flat", "lora16-bf16", "noise-bf16")
MODES = {
    "textbook": SolverOptions(mode="textbook"),
    "exact": SolverOptions(mode="exact"),
    "auto": SolverOptions(mode="auto"),
    "fast (GPU route)": SolverOptions(subspace="projector", polar="express"),
}
SHAPES: tuple[Shape, ...] = ((512, 512), (768, 512), (512, 768))
EXPERTS = (2, 3, 8)
ENERGY = 0.8
RMS = 1e-3
"""Root mean square of the deltas when outputs are rounded to bfloat16, beside weights of 0.02."""

LAYERS: dict[str, dict[Shape, int]] = {
    "1024/2816 (Qwen1.5-0.5B)": {(1024, 1024): 4, (2816, 1024): 2, (1024, 2816): 1},
    "2048/5632 (TinyLlama-1.1B)": {
        (2048, 2048): 2,
        (256, 2048): 2,
        (5632, 2048): 2,
        (2048, 5632): 1,
    },
}
"""Shape -> how many weights of a decoder layer have it."""


def make_deltas(kind: str, shape: Shape, count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(oracle.make_delta(kind, *shape, rng)) for _ in range(count)]


# Accuracy


def accuracy_rows(
    kind: str, shape: Shape, count: int, rules: Iterable[str] = ("p/T", "p/2T", "energy")
) -> list[Row]:
    """Every mode on one family of deltas, against float64 singular value decompositions."""
    deltas = [d.numpy() for d in make_deltas(kind, shape, count)]
    wide = [d.astype(np.float64) for d in deltas]
    svds = [np.linalg.svd(d, full_matrices=False) for d in wide]
    limit = min(shape) // count
    rows: list[Row] = []
    for rule in rules:
        ranks = []
        for _, s, _ in svds:
            share = np.cumsum(s**2) / np.sum(s**2)
            by_energy = int((share < ENERGY).sum()) + 1
            wanted = {"p/T": limit, "p/2T": limit // 2, "energy": min(limit, by_energy)}[rule]
            ranks.append(min(wanted, oracle.rank_of(s, max(shape))))
        u = np.concatenate([u[:, :r] for (u, _, _), r in zip(svds, ranks, strict=True)], axis=1)
        v = np.concatenate([vt[:r].T for (_, _, vt), r in zip(svds, ranks, strict=True)], axis=1)
        s = np.concatenate([s[:r] for (_, s, _), r in zip(svds, ranks, strict=True)])
        reference = (oracle.polar(u) * s) @ oracle.polar(v).T
        scale = RMS / float(np.sqrt(np.mean(wide[0] ** 2)))
        base = torch.from_numpy(np.random.default_rng(1).standard_normal(shape) * 0.02).bfloat16()
        rounded = (base.double() + scale * torch.from_numpy(reference)).bfloat16()
        kept = [retention(reference, d) for d in wide]
        errors: dict[str, float] = {}
        for mode, options in MODES.items():
            merge = Solver(options).merge([torch.from_numpy(d) for d in deltas], ranks)
            merged = (merge.left @ merge.right.T).double()
            errors[mode] = oracle.error(merged.numpy(), reference)
            mine = (base.double() + scale * merged).bfloat16()
            moved = [
                abs(retention(merged.numpy(), d) - k) / max(abs(k), 1e-12)
                for d, k in zip(wide, kept, strict=True)
            ]
            allowed = 1e-5 if sum(ranks) <= 0.75 * min(shape) else 2 * errors["textbook"]
            rows.append(
                {
                    "spectrum": kind,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "experts": count,
                    "rank_rule": rule,
                    "ranks": " ".join(map(str, sorted(set(ranks)))),
                    "mode": mode,
                    "backends": " ".join(merge.backends),
                    "fell_back": "; ".join(merge.fallbacks),
                    "error": errors[mode],
                    "contract": 1e-2 if mode.startswith("fast") else max(allowed, 1e-6),
                    "lowest_retention": min(kept),
                    "retention_moved": max(moved),
                    "bf16_outputs_that_differ": float((mine != rounded).double().mean()),
                }
            )
    return rows


def retention(merged: oracle.Matrix, delta: oracle.Matrix) -> float:
    """<M, D> / ||D||^2: how much of an expert's change is in the merged one."""
    return float(np.sum(merged * delta) / np.sum(delta**2))


def accuracy() -> None:
    """Write the accuracy table."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in itertools.product(SPECTRA, SHAPES, EXPERTS):
        rows += accuracy_rows(*case)
        print(*case, flush=True)
    write("accuracy_table", rows, 1)
    (ROOT / "docs" / "accuracy.md").write_text(accuracy_page(rows))


def accuracy_page(rows: list[Row]) -> str:
    """The worst of every spectrum, rank rule and mode, as Markdown."""
    lines = [
        "# Accuracy of the factorisations",
        "",
        "Generated by `python -m benchmarks.spectral accuracy`; every case is in",
        "`benchmarks/results/accuracy_table.csv`. Worst over the shapes "
        + ", ".join(f"{m}x{n}" for m, n in SHAPES)
        + f" and T = {', '.join(map(str, EXPERTS))}.",
        "",
        "- *error*: ||M - M64|| / ||M64|| of the merged delta, M64 from float64 SVDs of the same",
        "  float32 deltas at the same (numerical) ranks.",
        "- *retention moved*: largest relative change of <M, D_t> / ||D_t||^2 of an expert.",
        "- *bf16 outputs*: share of entries of bf16(W0 + M) that differ from bf16(W0 + M64), with",
        f"  deltas of root mean square {RMS} on weights of 0.02.",
        "- `flat` has equal singular values: which are kept is decided by the last bit of the",
        "  data, so two correct programs give different deltas there. Read its retention.",
        f"- *energy* keeps {ENERGY:.0%} of ||D_t||_F^2, at most p/T triplets.",
        "",
        "| spectrum | rank | mode | error | in contract | retention moved | bf16 outputs |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("spectrum", "rank_rule", "mode")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    for (spectrum, rule, mode), found in groups.items():
        inside = sum(r["error"] <= r["contract"] for r in found)
        verdict = "the bar" if mode == "textbook" else f"{inside} of {len(found)}"
        if spectrum == "flat":
            verdict = "undefined"
        worst = {
            k: max(r[k] for r in found)
            for k in ("error", "retention_moved", "bf16_outputs_that_differ")
        }
        lines.append(
            f"| {spectrum} | {rule} | {mode} | {worst['error']:.1e} | {verdict} "
            f"| {worst['retention_moved']:.0e} | {worst['bf16_outputs_that_differ']:.2%} |"
        )
    return "\n".join([*lines, ""])


# Speed


def fusion_bench_merge() -> Callable[[Sequence[torch.Tensor]], torch.Tensor] | None:
    """FusionBench's TaskSingularVectorMerging on one weight, or None where it is missing."""
    try:
        from fusion_bench import BaseModelPool
        from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
    except ImportError:
        return None

    class Weight(torch.nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(value.clone(), requires_grad=False)

    def merge(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        models = {f"expert{t}": Weight(d) for t, d in enumerate(deltas)}
        pool = BaseModelPool({"_pretrained_": Weight(torch.zeros_like(deltas[0])), **models})
        with contextlib.redirect_stdout(io.StringIO()):
            merged: torch.Tensor = TaskSingularVectorMerging().run(pool).weight
        return merged

    return merge


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """CPU seconds, wall seconds, result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def layer(repeats: int = 3) -> None:
    """CPU seconds of a decoder layer at equal or better accuracy, peers in turn."""
    peer, commit = fusion_bench_merge(), conditions(1)["commit"]
    rows: list[Row] = []
    shapes = sorted({shape for weights in LAYERS.values() for shape in weights})
    settings = ((1, "power"), (1, "noise-bf16"), (2, "power"))
    for (threads, kind), shape, share in itertools.product(settings, shapes, (1.0, 0.5)):
        if 2048 in shape and kind == "noise-bf16":
            continue  # half of the running time, and the spectrum does not change what is done
        torch.set_num_threads(threads)
        deltas = make_deltas(kind, shape, 3)
        ranks = [int(share * (min(shape) // 3))] * 3
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "textbook": lambda d=deltas, r=ranks: oracle.textbook(d, r),
            "auto": lambda d=deltas, r=ranks: product(Solver().merge(d, r)),
            "exact": lambda d=deltas, r=ranks: product(
                Solver(SolverOptions(mode="exact")).merge(d, r)
            ),
        }
        if peer is not None and share == 1.0:  # it knows no other rank
            runs["fusion-bench"] = lambda d=deltas: peer(d)
        best: dict[str, Row] = {}
        for _ in range(repeats if min(shape) < 2048 else 1):
            for name, run in runs.items():
                cpu, wall, result = timed(run)
                if name not in best or cpu < best[name]["cpu_s"]:
                    best[name] = {"cpu_s": cpu, "wall_s": wall, "result": result}
        reference = best["exact"]["result"].double()
        for name, found in best.items():
            error = (found["result"].double() - reference).norm() / reference.norm()
            rows.append(
                {
                    "spectrum": kind,
                    "threads": threads,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "rank": ranks[0],
                    "rank_rule": "p/T" if share == 1.0 else "p/2T",
                    "who": name,
                    "cpu_s": round(found["cpu_s"], 4),
                    "wall_s": round(found["wall_s"], 4),
                    "error_to_exact": float(error),
                    "commit": commit,
                }
            )
        line = {name: round(found["cpu_s"], 2) for name, found in best.items()}
        print(threads, kind, shape, share, line, flush=True)
        write("layer", rows, 2)
    rows += factored_rows()
    write("layer", rows, 2)
    summarise_layers(rows)


def product(merge: Any) -> torch.Tensor:
    """The merged delta, as the textbook forms it too."""
    formed: torch.Tensor = merge.left.float() @ merge.right.float().T
    return formed


def factored_rows() -> list[Row]:
    """Three rank-16 LoRA experts as factors, against the textbook on the dense deltas."""
    torch.set_num_threads(1)
    commit = conditions(1)["commit"]
    rows: list[Row] = []
    for shape in ((1024, 1024), (2816, 1024), (2048, 2048)):
        generator = torch.Generator().manual_seed(0)
        factors = [
            FactoredDelta(*(torch.randn(size, 16, generator=generator) for size in shape))
            for _ in range(3)
        ]
        dense = [f.left @ f.right.T for f in factors]
        ranks = [16] * 3
        truth = Solver(SolverOptions(subspace="svd", polar="fp64"))
        reference = product(truth.merge(dense, ranks)).double()
        runs: dict[str, Callable[[], Any]] = {
            "textbook": lambda d=dense, r=ranks: oracle.textbook(d, r),
            "factored": lambda f=factors, r=ranks: Solver().merge(f, r),
        }
        for name, run in runs.items():
            run()
            times = [timed(run) for _ in range(3 if name == "textbook" else 20)]
            cpu, wall, result = min(times, key=lambda t: t[0])
            formed = result if name == "textbook" else product(result)
            error = (formed.double() - reference).norm() / reference.norm()
            rows.append(
                {
                    "spectrum": "lora16 factors",
                    "threads": 1,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "rank": 16,
                    "rank_rule": "16",
                    "who": name,
                    "cpu_s": cpu,
                    "wall_s": wall,
                    "error_to_exact": float(error),
                    "commit": commit,
                }
            )
    return rows


def summarise_layers(rows: list[Row]) -> None:
    """Print each layer's CPU and wall seconds and the ratio to `auto`."""
    found = {(r["spectrum"], r["threads"], r["rank_rule"], r["shape"], r["who"]): r for r in rows}
    summary: list[Row] = []
    keys = sorted({k[:3] for k in found if k[0] != "lora16 factors"}, key=str)
    for (kind, threads, rule), (name, weights) in itertools.product(keys, LAYERS.items()):
        totals: dict[str, tuple[float, float]] = {}
        for who in ("textbook", "fusion-bench", "exact", "auto"):
            cells = [
                (found.get((kind, threads, rule, f"{m}x{n}", who)), count)
                for (m, n), count in weights.items()
            ]
            if all(row for row, _ in cells):
                totals[who] = (
                    sum(row["cpu_s"] * count for row, count in cells if row),
                    sum(row["wall_s"] * count for row, count in cells if row),
                )
        if "auto" not in totals:
            continue
        for who, (cpu, wall) in totals.items():
            summary.append(
                {
                    "layer": name,
                    "spectrum": kind,
                    "threads": threads,
                    "rank_rule": rule,
                    "who": who,
                    "cpu_s": round(cpu, 2),
                    "wall_s": round(wall, 2),
                    "cpu_ratio_to_auto": round(cpu / totals["auto"][0], 2),
                    "wall_ratio_to_auto": round(wall / totals["auto"][1], 2),
                }
            )
            print(*summary[-1].values(), sep=" | ")
    for shape in sorted({r["shape"] for r in rows if r["spectrum"] == "lora16 factors"}):
        pair = {
            r["who"]: r["cpu_s"]
            for r in rows
            if (r["spectrum"], r["shape"]) == ("lora16 factors", shape)
        }
        print(
            f"LoRA factors {shape}: textbook / factored = {pair['textbook'] / pair['factored']:.0f}"
        )
    write("layer_summary", summary, 2)


# Workspace


def workspace() -> None:
    """Peak resident memory of a merge over what it started with, beside the plan's figure."""
    rows: list[Row] = []
    cases = [
        (mode, shape, count, share)
        for mode in ("auto", "exact", "textbook")
        for shape, count, share in (
            ((1024, 1024), 3, 1.0),
            ((2048, 2048), 3, 1.0),
            ((2816, 1024), 3, 1.0),
            ((1024, 2816), 3, 1.0),
            ((2048, 2048), 3, 0.5),
            ((2048, 2048), 8, 1.0),
        )
    ]
    for mode, shape, count, share in cases:
        command = [sys.executable, "-m", "benchmarks.spectral", "one-workspace", mode]
        command += [str(x) for x in (*shape, count, share)]
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            # Freed blocks go back at once: the figure is of what is alive.
            env={"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin"},
        )
        rows.append(json.loads(done.stdout))
        print(*rows[-1].values(), flush=True)
    write("workspace", rows, 1)


def one_workspace(mode: Any, m: int, n: int, count: int, share: float) -> None:
    """One case, in a process of its own."""
    torch.set_num_threads(1)
    solver = Solver(SolverOptions(mode=mode))
    warm = [torch.randn(300, 280) for _ in range(3)]
    solver.merge(warm, [93] * 3)
    experts = [torch.randn(m, n).bfloat16() for _ in range(count)]
    ranks = [int(share * (min(m, n) // count))] * count
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    subspaces = solver.subspaces([e.float for e in experts], ranks)
    solver.combine(subspaces, [1.0] * count)
    peak = resident("VmHWM") - before
    planned = solver.plan((m, n), ranks).workspace
    row = {"mode": mode, "shape": f"{m}x{n}", "experts": count, "rank": ranks[0]}
    row |= {"planned_MB": planned / 1e6, "measured_MB": peak / 1e6}
    print(json.dumps(row | {"planned_over_measured": round(planned / peak, 3)}))


def resident(field: str) -> int:
    """A memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


# A whole checkpoint

CHECKPOINT = (12, 640, 1792, 32_000)
"""Layers, width, intermediate width, vocabulary: about 100 M parameters."""


def checkpoint() -> None:
    """A 100 M-parameter checkpoint from disk to disk, ours and FusionBench's, one process each."""
    from tests.test_scale import write_family

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), *CHECKPOINT)
        for who, threads in itertools.product(("resm-kernels", "fusion-bench"), (1, 2)):
            out = str(Path(folder) / f"{who}-{threads}")
            command = [sys.executable, "-m", "benchmarks.spectral", "one-checkpoint", who]
            done = subprocess.run(
                [*command, str(threads), folder, out], check=True, capture_output=True, text=True,
                cwd=ROOT,
            )  # fmt: skip
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(*rows[-1].values(), flush=True)
    write("checkpoint", rows, 2)


def one_checkpoint(who: str, threads: int, folder: str, out: str) -> None:
    """One merge of the family in `folder`, embeddings and head averaged by both."""
    torch.set_num_threads(threads)
    base, experts = Path(folder) / "base", [Path(folder) / f"e{t}" for t in range(3)]
    if who == "resm-kernels":
        import resm_kernels

        start = time.perf_counter()
        resm_kernels.merge(base, experts, out, method="tsvm", workers=threads, threads=1)
    else:
        from fusion_bench import BaseModelPool
        from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
        from transformers import AutoModelForCausalLM

        def load(path: Path) -> torch.nn.Module:
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16
            )
            return model

        start = time.perf_counter()
        pool = BaseModelPool({"_pretrained_": load(base), **{e.name: load(e) for e in experts}})
        method = TaskSingularVectorMerging(
            exclude_keys=["model.embed_tokens.weight", "lm_head.weight"]
        )
        with contextlib.redirect_stdout(io.StringIO()):
            merged: Any = method.run(pool)
        merged.save_pretrained(out)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "who": who,
        "threads": threads,
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_MB": round(resident("VmHWM") / 1e6),
    }
    print(json.dumps(row))


# Expert stacks

STACK = 128
"""Matrices of a stack."""
STACK_SHAPES = ((32, 32), (64, 64), (96, 128), (128, 128), (128, 192))


def batches(repeats: int = 3) -> None:
    """CPU seconds of an expert stack merged in batches and matrix by matrix, in turn."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, shape in itertools.product(("tsvm", "resm"), STACK_SHAPES):
        method = find_method(name)
        singly = dataclasses.replace(method, batch=lambda *given: Batching())
        generator = torch.Generator().manual_seed(0)
        base = (0.02 * torch.randn(STACK, *shape, generator=generator)).bfloat16()
        experts = [
            (base + RMS * torch.randn(base.shape, generator=generator)).bfloat16() for _ in range(3)
        ]
        options = method.make_options({}, 3)
        config = {"num_experts": STACK}
        split, _ = split_of(method, "experts.down_proj", base.shape, 3, options, config)

        def run(
            how: Any, given: Any = (base, experts, options, split)
        ) -> Callable[[], torch.Tensor]:
            base, experts, options, split = given
            return lambda: (
                merge_weight(
                    how, Inputs("w", base, experts), [1.0] * 3, options, torch.float32, split
                ).tensor
            )

        found = [[timed(run(how)) for how in (method, singly)] for _ in range(repeats)]
        together, alone = (min(pair[i][0] for pair in found) for i in (0, 1))
        merged, expected = found[0][0][2], found[0][1][2]
        rows.append(
            {
                "method": name,
                "matrices": STACK,
                "shape": f"{shape[0]}x{shape[1]}",
                "experts": 3,
                "batched_cpu_s": round(together, 4),
                "singly_cpu_s": round(alone, 4),
                "ratio": round(alone / together, 2),
                "difference": float((merged - expected).norm() / (expected - base.float()).norm()),
            }
        )
        print(*rows[-1].values(), flush=True)
    write("batches", rows, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the measurements."""
    runs = {
        "accuracy": accuracy, "layer": layer, "workspace": workspace, "checkpoint": checkpoint,
        "batches": batches,
    }  # fmt: skip
    names = (*runs, "one-workspace", "one-checkpoint")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=names)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.what == "one-workspace":
        mode, m, n, count, share = given.rest
        one_workspace(mode, int(m), int(n), int(count), float(share))
    elif given.what == "one-checkpoint":
        who, threads, folder, out = given.rest
        one_checkpoint(who, int(threads), folder, out)
    else:
        runs[given.what]()


if __name__ == "__main__":
    main()
