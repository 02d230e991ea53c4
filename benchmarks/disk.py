"""From disk to disk: a sweep against separate merges, and adapters against PEFT and mergekit.

    python -m benchmarks.disk sweep
    python -m benchmarks.disk lora [--mergekit PATH/TO/mergekit-yaml]

Every run is a process of its own on one thread; wall seconds, CPU seconds and peak resident memory
are those that the kernel reports of it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO

import torch
import yaml
from safetensors import safe_open

from benchmarks.record import ROOT, Row, write

LAYERS, WIDTH, FEED_FORWARD, VOCABULARY = 4, 1024, 2816, 8192
RANK, EXPERTS = 16, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAMBDAS = "0.5,0.8,1.0"
RESM = [sys.executable, "-c", "import sys; from resm_kernels.cli import main; sys.exit(main())"]

PEFT_ROUTE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, out, how, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
for i, adapter in enumerate(adapters[1:], start=1):
    model.load_adapter(adapter, adapter_name=str(i))
names = [str(i) for i in range(len(adapters))]
extra = {"svd_rank": 16} if how == "svd" else {}
model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=how, **extra)
model.set_adapter("merged")
model.merge_and_unload().save_pretrained(out)
"""


def run(
    command: Sequence[str],
    output: Path,
    fine: Collection[int] = (0,),
    stdout: IO[bytes] | None = None,
) -> Row:
    """Run a command that makes `output`, measure it, and remove the output of an earlier run.

    `fine` are the exit statuses that it may have; what it prints goes to `stdout`.
    """
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stdout or said, stderr=said
        )
        peak = 0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.01)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) not in fine:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}:\n{said.read().decode()[-3000:]}")
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_MB": round(peak / 1e6),
    }


def _resident(pid: int) -> int:
    """Most bytes a process ever held; `ru_maxrss` starts from those of the process that forked."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM")), 0)
    return 0


def write_base(folder: Path) -> Path:
    """A random Llama in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_experts(base: Path, folder: Path) -> list[Path]:
    """Whole models whose changes have a power-law spectrum."""
    from transformers import AutoModelForCausalLM

    paths = []
    for t in range(EXPERTS):
        torch.manual_seed(t + 1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                change = torch.randn(parameter.shape)
                if change.dim() == 2:
                    falling = torch.arange(1, change.shape[1] + 1) ** -0.8
                    change = change * (math.sqrt(change.shape[1]) * falling / falling.norm())
                parameter += 2e-3 * change
        paths.append(folder / f"expert{t}")
        model.save_pretrained(paths[-1])
    return paths


def write_adapters(base: Path, folder: Path) -> list[Path]:
    """PEFT adapters of one rank on every linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    paths = []
    for t in range(EXPERTS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        peft = get_peft_model(model, config)
        torch.manual_seed(t + 1)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.01 if "lora_B" in name else 0.03)
        paths.append(folder / f"adapter{t}")
        peft.save_pretrained(paths[-1])
    return paths


def sweep(repeats: int) -> None:
    """Three lambdas at once against one merge and against three."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base")
        experts = write_experts(base, Path(folder))
        out = Path(folder) / "out"
        given = ["--base", str(base), *(a for e in experts for a in ("--expert", str(e)))]
        given += ["--workers", "1", "--quiet"]
        for method in ("resm", "tsvm", "ties", "task_arithmetic"):
            single = [*RESM, "merge", *given, "--method", method, str(out)]
            three = [*RESM, "sweep", *given, "--method", method, "--lambda", LAMBDAS, str(out)]
            pairs = [(run(single, out), run(three, out)) for _ in range(repeats)]
            one, several = (
                {
                    key: round(statistics.median(pair[i][key] for pair in pairs), 2)
                    for key in pairs[0][i]
                }
                for i in (0, 1)
            )
            rows.append(
                {
                    "method": method,
                    **{f"one_{key}": value for key, value in one.items()},
                    **{f"sweep_{key}": value for key, value in several.items()},
                    "wall_over_one": round(several["wall_s"] / one["wall_s"], 2),
                    "cpu_over_one": round(several["cpu_s"] / one["cpu_s"], 2),
                    "cpu_over_three": round(several["cpu_s"] / (3 * one["cpu_s"]), 2),
                }
            )
            print(*rows[-1].values(), flush=True)
    write("sweep", rows, 1)


def lora(mergekit: str | None) -> None:
    """Adapters on one base to a merged model, by every tool that does it."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(folder / "base")
        adapters = write_adapters(base, folder)
        exact = _exact(base, adapters)
        recipe = folder / "recipe.yml"
        models = [
            {"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}} for adapter in adapters
        ]
        content = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
        recipe.write_text(yaml.safe_dump({**content, "dtype": "float32", "out_dtype": "bfloat16"}))
        ours = [*RESM, "merge", "--base", str(base), "--workers", "1", "--quiet"]
        ours += [a for adapter in adapters for a in ("--expert", str(adapter))]
        peft = [sys.executable, "-c", PEFT_ROUTE, str(base), str(folder / "out")]
        given = list(map(str, adapters))
        routes = {
            ("resm-kernels", "task_arithmetic"): [*ours, "--method", "task_arithmetic"],
            ("peft", "cat, the same sum"): [*peft, "cat", *given],
            ("resm-kernels", "tsvm, in the core"): [*ours, "--method", "tsvm"],
            ("resm-kernels", "resm"): [*ours, "--method", "resm"],
            ("peft", "svd of the sum, rank 16"): [*peft, "svd", *given],
        }
        if mergekit:
            routes["mergekit", "task_arithmetic, adapters merged to disk first"] = [
                mergekit, str(recipe), str(folder / "out"), "--no-copy-tokenizer",
                "--lora-merge-cache", str(folder / "cache"),
            ]  # fmt: skip
        for (who, what), command in routes.items():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            out = folder / "out"
            row = run([*command, str(out)] if who == "resm-kernels" else command, out)
            cache = sum(f.stat().st_size for f in (folder / "cache").rglob("*.safetensors"))
            same_sum = "svd" not in what and "tsvm" not in what and what != "resm"
            error = round(_error(out, base, exact), 6) if same_sum else ""
            rows.append(
                {"who": who, "what": what, **row, "disk_MB": round(cache / 1e6), "error": error}
            )
            print(*rows[-1].values(), sep=" | ", flush=True)
    write("lora_to_disk", rows, 1)


SAMPLED = "model.layers.0.mlp.up_proj.weight"


def _exact(base: Path, adapters: Sequence[Path]) -> torch.Tensor:
    """The base plus the sum of the adapters' deltas for one weight, in float64."""
    with safe_open(base / "model.safetensors", "pt") as file:
        total = file.get_tensor(SAMPLED).double()
    for adapter in adapters:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            prefix = f"base_model.model.{SAMPLED.removesuffix('.weight')}"
            a, b = (file.get_tensor(f"{prefix}.lora_{f}.weight").double() for f in "AB")
        total += b @ a
    return total


def _error(out: Path, base: Path, exact: torch.Tensor) -> float:
    """Relative error of the merged delta of that weight, the rounding to bfloat16 included."""
    with safe_open(base / "model.safetensors", "pt") as file:
        origin = file.get_tensor(SAMPLED).double()
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if SAMPLED in file.keys():  # noqa: SIM118
                found = file.get_tensor(SAMPLED).double()
                return float((found - exact).norm() / (exact - origin).norm())
    raise SystemExit(f"{out}: no {SAMPLED}")


def main() -> None:
    """Measure what was asked for and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sweep", "lora"))
    parser.add_argument("--mergekit", help="the mergekit-yaml command of another environment")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.what == "sweep":
        sweep(options.repeats)
    else:
        lora(options.mergekit)


if __name__ == "__main__":
    main()
