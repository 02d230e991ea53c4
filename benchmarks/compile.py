"""Compile every kernel configuration that can be launched, without a GPU.

    python -m benchmarks.compile [--arch sm_80 sm_90 sm_100 gfx942] [--save]

The launchers themselves say what they ask for: they run on small tensors with the launch
recorded in its place, over all dtypes and options. Prints registers, spills and shared memory per
kernel and architecture; exit code 1 where registers spill or a kernel does not compile. `--save`
writes the table to benchmarks/results/kernels.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.record import Row, write
from resm_kernels.ops.consensus import kernel as consensus
from resm_kernels.ops.delta_stats import kernel as delta_stats
from resm_kernels.ops.launch import DTYPES
from resm_kernels.ops.low_rank import kernel as low_rank
from resm_kernels.ops.mask import Mask
from resm_kernels.ops.mask import kernel as mask
from resm_kernels.ops.rank_drop import kernel as rank_drop

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = {
    value.__name__: value
    for module in (delta_stats, mask, rank_drop, consensus, low_rank)
    for value in vars(module).values()
    if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
}


@dataclass(frozen=True)
class Launch:
    """What one launch asks of the compiler."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


class Recorded(Exception):
    """Ends a launcher whose next step would need the kernel's result."""


@contextlib.contextmanager
def recording(found: dict[Launch, None], stop: bool = False) -> Iterator[None]:
    """Note launches instead of running them; with `stop`, end the launcher at the first."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        names = kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | keywords
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        types = {p.name: p.annotation_type for p in kernel.params}
        signature = {
            name: types[name] or POINTERS[given[name].dtype]
            for name in names
            if name not in constexprs
        }
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
                raise ValueError(f"{kernel.__name__}: {name} is not aligned")
        options = {name: value for name, value in given.items() if name not in names}
        launch = Launch(
            kernel.__name__,
            tuple(signature.items()),
            tuple((name, given[name]) for name in names if name in constexprs),
            tuple(options.items()),
        )
        found[launch] = None
        if stop:
            raise Recorded

    # Launchers go on to read what no kernel wrote: zeros, not whatever lies there.
    zeroed = mock.patch.object(torch, "empty", torch.zeros)
    with mock.patch.object(JITFunction, "run", run), zeroed, contextlib.suppress(Recorded):
        yield


def requested(arch: str) -> list[Launch]:
    """Every configuration that the launchers ask for on an architecture."""
    found: dict[Launch, None] = {}
    masks = (None, [Mask(floor=0.1)] * 2, [Mask(density=0.5)] * 2)
    with mock.patch.object(low_rank, "architecture", return_value=arch):
        for dtype, count in itertools.product(DTYPES, (32, 33)):
            base = torch.zeros(count, dtype=dtype)
            experts = [base, base]
            with recording(found):
                delta_stats.delta_stats(base, experts)
            with recording(found, stop=True):
                mask.trim(base, experts, [1, 1])
            with recording(found, stop=True):
                mask._cut(base, base, torch.zeros(()), 1)
            for masked in masks[1:]:
                with recording(found):
                    mask.split_delta(base, base, masked[0])
                    mask.masked_norms(base, experts, masked)
            with recording(found):
                rank_drop.rank_drop(base, base, density=0.5, epsilon=0.25, key=0)
            for out, masked in itertools.product(DTYPES, masks):
                with recording(found):
                    mask.masked_delta(base, base, masked and masked[0], out_dtype=out)
                    given = {"scale": 1.0, "out_dtype": out, "masks": masked}
                    consensus.weighted_deltas(base, experts, [1.0] * 2, **given)
                    for elect in ("sum", "count"):
                        consensus.elected_deltas(
                            base, experts, [1.0] * 2, elect=elect, mean=True, **given
                        )
                    consensus.weighted_sum(experts, [1.0] * 2, out_dtype=out)
            for out, precision, rows in itertools.product(
                DTYPES, ("tf32x3", "ieee", "tf32"), (64, 2048)
            ):
                columns = rows + count - 32
                matrix = torch.empty(rows, columns, dtype=dtype)
                factors = torch.empty(rows, 32), torch.empty(columns, 32)
                with recording(found):
                    low_rank.add_low_rank(
                        *(matrix, *factors), scales=[1.0], out_dtype=out, precision=precision
                    )
    return list(found)


def compiled(launch: Launch, arch: str) -> Row:
    """One row: what the kernel takes of a processor."""
    kernel, constants = KERNELS[launch.kernel], dict(launch.constants)
    types = dict(launch.signature)
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    binary = triton.compile(source, target=TARGETS[arch], options=dict(launch.options))
    read = of_cubin if "cubin" in binary.asm else of_amdgcn
    registers, spills = read(binary.asm)
    return {
        "kernel": launch.kernel.strip("_").removesuffix("_kernel"),
        "arch": arch,
        "registers": registers,
        "spills": spills,
        "shared": binary.metadata.shared,
        "configuration": ", ".join(f"{k}={v}" for k, v in {**types, **constants}.items()),
    }


def of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers per thread, and bytes of stack they spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers per lane, and how many of them spill."""
    text = asm["amdgcn"]
    return tuple(
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count")
    )


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row per kernel and architecture: the most that any configuration takes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    return [
        {
            "kernel": kernel,
            "arch": arch,
            "configurations": len(group),
            "least registers": min(row["registers"] for row in group),
            "most registers": max(row["registers"] for row in group),
            "spills": max(row["spills"] for row in group),
            "shared bytes": max(row["shared"] for row in group),
        }
        for (kernel, arch), group in sorted(groups.items())
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; 1 if registers spill."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kernels.csv")
    given = parser.parse_args(arguments)
    if not KERNELS:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    work = [(launch, arch) for arch in given.arch for launch in requested(arch)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(compiled, *zip(*work, strict=True), chunksize=8))
    table = summary(rows)
    widths = {name: max(len(name), 12) for name in table[0]}
    print(*(f"{name:>{width}}" for name, width in widths.items()))
    for row in table:
        print(*(f"{row[name]:>{width}}" for name, width in widths.items()))
    spilled = [row for row in rows if row["spills"]]
    for row in spilled:
        print(f"{row['kernel']} spills {row['spills']} on {row['arch']}: {row['configuration']}")
    if given.save:
        write("kernels", table, threads=1)
    return int(bool(spilled))


if __name__ == "__main__":
    raise SystemExit(main())
