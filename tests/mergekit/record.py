"""Record what mergekit makes of our inputs: run where mergekit 0.1.5 is installed.

pip install mergekit==0.1.5 && python tests/mergekit/record.py

`outputs.safetensors` holds what its command writes for every recipe, `tensors.safetensors` what its
methods make of single weights, and the moments of what they draw.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from inputs import RECIPES, write_inputs
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.slerp import slerp
from tensors import PER_MODEL, Case, cases, random_cases

DRAWS = 20_000


def merged(case: Case) -> torch.Tensor:
    """One weight, merged by mergekit's own function in float32."""
    if case.method == "slerp":
        t = torch.tensor([case.parameters["t"]])
        return slerp(t, case.base[None], case.experts[0][None])[0]
    if case.method == "passthrough":
        group = TensorGroup.from_tensors(case.experts)
        given = {"scale": {0: case.parameters["scale"]}}
    else:
        group = TensorGroup.from_tensors([case.base, *case.experts], base_index=0)
        given = {
            name: dict(enumerate(value, 1)) if name in PER_MODEL else value
            for name, value in {**case.parameters}.items()
        }
        if case.weights:
            given["weight"] = dict(enumerate(case.weights, 1))
    return registry.get(case.method).merge_group(group, **given)


def moments(case: Case) -> torch.Tensor:
    """Mean, variance and fourth central moment of every entry over many draws: float64 [3, ...]."""
    torch.manual_seed(0)
    drawn = torch.stack([merged(case) for _ in range(DRAWS)]).double()
    centred = drawn - drawn.mean(0)
    return torch.stack((drawn.mean(0), centred.square().mean(0), centred.pow(4).mean(0)))


def record_tensors(path: Path) -> None:
    """Single weights, and moments."""
    found = {case.name: merged(case).contiguous() for case in cases()}
    found |= {f"moments of {case.name}": moments(case) for case in random_cases()}
    save_file(found, path, metadata={"draws": str(DRAWS)})


def main() -> None:
    """Run mergekit's own command on every recipe, in float32 with one rounding to bfloat16."""
    here = Path(__file__).parent.resolve()
    record_tensors(here / "tensors.safetensors")
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        write_inputs(Path(work))
        outputs: dict[str, torch.Tensor] = {}
        for name, recipe in RECIPES.items():
            content = {**recipe, "dtype": "float32", "out_dtype": "bfloat16"}
            Path("recipe.yml").write_text(yaml.safe_dump(content))
            command = str(Path(sys.executable).with_name("mergekit-yaml"))
            subprocess.run([command, "recipe.yml", name, "--no-write-model-card"], check=True)
            for tensor, value in load_file(Path(name) / "model.safetensors").items():
                outputs[f"{name}/{tensor}"] = value
        save_file(outputs, here / "outputs.safetensors")


if __name__ == "__main__":
    main()
