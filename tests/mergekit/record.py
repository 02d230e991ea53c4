"""Record what mergekit makes of our inputs: run where mergekit 0.1.5 is installed.

pip install mergekit==0.1.5 && python tests/mergekit/record.py
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


def main() -> None:
    """Run mergekit's own command on every recipe, in float32 with one rounding to bfloat16."""
    here = Path(__file__).parent.resolve()
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
