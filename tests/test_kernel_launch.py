"""What the launchers ask Triton for compiles to machine code of an H100, without one.

The interpreter, in which CI runs the kernels, never binds arguments to a signature, specialises
them or generates code. Here a driver that knows a target and no device takes the launches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PRODUCTS = (
    *itertools.product(((65, 48), (2048, 1536)), ("tf32x3", "ieee", "tf32")),
    ((1537, 2049), "tf32x3"),
)
"""Small and large tiles in every precision, and a width that is no multiple of 16."""
SHARED = 227 * 1024
"""Bytes of shared memory that a block may have."""
KERNELS = {
    "_moments_kernel",
    "_limits_kernel",
    "_outliers_kernel",
    "_mask_kernel",
    "_digits_kernel",
    "_ties_kernel",
    "_norms_kernel",
    "_rank_drop_kernel",
    "_sum_kernel",
    "_elect_kernel",
    "_low_rank_kernel",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_launch_compiles_for_an_h100(tmp_path: Path) -> None:
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernel_launch"]
    done = subprocess.run(
        command,
        env=given | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = json.loads(done.stdout)
    assert {launch["kernel"] for launch in launches} == KERNELS
    for launch in launches:
        assert launch["signature"].get("count", "i64") == "i64"
        assert launch["signature"].get("experts", "i32") == "i32"
        assert launch["fp_fusion"] == (launch["kernel"] == "_low_rank_kernel")
        assert launch["cubin"] > 0
        assert launch["shared"] <= SHARED, launch
        assert launch["spills"] == 0, launch


def launches() -> Iterator[Any]:
    """Every kernel once per specialisation that matters: even or odd, masked, dropped, split."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from resm_kernels.ops.consensus import kernel as consensus
    from resm_kernels.ops.delta_stats import kernel as delta_stats
    from resm_kernels.ops.low_rank import kernel as low_rank
    from resm_kernels.ops.mask import Mask
    from resm_kernels.ops.mask import kernel as mask
    from resm_kernels.ops.rank_drop import kernel as rank_drop

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    low_rank.architecture = lambda device: "sm_90"
    found: list[Any] = []
    compile_and_run = JITFunction.run

    def compile_only(self: Any, *args: object, grid: Any, warmup: bool, **options: object) -> None:
        assert 0 < grid[0] < 2**31
        compiled = compile_and_run(self, *args, grid=grid, warmup=True, **options)
        found.append((compiled, self.signature.parameters))

    JITFunction.run = compile_only
    masks = [Mask(floor=0.1, clip=2.0), Mask(threshold=0.5, cut=7, ceiling=2.0)]
    drop = Mask(density=0.5, key=2**128 - 1)
    # What reads the tables that no kernel wrote may find no sense in them.
    senseless = contextlib.suppress(IndexError, OverflowError, RuntimeError, ValueError)
    for count, dtype in ((4096, torch.bfloat16), (4097, torch.float32)):
        base, *experts = (torch.zeros(count, dtype=dtype) for _ in range(3))
        with senseless:
            delta_stats.delta_stats(base, experts)
        with senseless:
            mask.trim(base.repeat(2), [expert.repeat(2) for expert in experts], [count] * 2)
        with senseless:
            mask._cut(base, experts[0], torch.zeros(1), 1)
        mask.masked_delta(base, experts[0], masks[0], weight=2)
        mask.masked_delta(base, experts[0], drop, out_dtype=torch.float16)
        mask.split_delta(base, experts[0], drop)
        for chosen in (masks, [drop, drop]):
            mask.masked_norms(base, experts, chosen)
        rank_drop.rank_drop(base, experts[0], density=0.5, epsilon=0.25, key=2**128 - 1)
        given: dict[str, Any] = {"weights": (1, 2.0), "out_dtype": dtype}
        consensus.weighted_sum(experts, **given, normalize=True)
        for chosen in (None, masks, [drop, drop]):
            consensus.weighted_deltas(base, experts, **given, scale=1, masks=chosen)
            given |= {"mean": chosen is None, "elect": "count" if chosen is masks else "sum"}
            consensus.elected_deltas(base, experts, **given, scale=0.5, masks=chosen)
            del given["mean"], given["elect"]
    for shape, precision in PRODUCTS:
        left, right = (torch.zeros(side, 33) for side in shape)
        base = torch.zeros(shape, dtype=torch.bfloat16)
        given = {"scales": (1, 0.5), "out_dtype": torch.bfloat16, "precision": precision}
        low_rank.add_low_rank(base, left, right, **given)
    return iter(found)


def describe() -> list[dict[str, Any]]:
    """What was asked for, and what came out."""
    from benchmarks.compile import of_cubin

    described = {}
    for compiled, parameters in launches():
        about, names = compiled.metadata, list(parameters)
        described[compiled.hash] = {
            "kernel": about.name,
            "signature": dict(zip(names, compiled.src.signature.values(), strict=True)),
            "fp_fusion": about.enable_fp_fusion,
            "cubin": len(compiled.asm["cubin"]),
            "shared": about.shared,
            "spills": of_cubin(compiled.asm)[1],
        }
    return list(described.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(describe()))
