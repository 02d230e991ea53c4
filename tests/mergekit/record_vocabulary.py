"""Record mergekit's embeddings under `tokenizer_source`: run where mergekit 0.1.5 is installed.

pip install mergekit==0.1.5 && python tests/mergekit/record_vocabulary.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from vocabulary import RECIPES, TABLE, write_inputs


def main() -> None:
    """Run every recipe in float32 with one rounding to bfloat16; keep the tables and the ids."""
    here = Path(__file__).parent.resolve()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        write_inputs(Path(work))
        tables: dict[str, torch.Tensor] = {}
        facts: dict[str, str] = {}
        for name, recipe in RECIPES.items():
            content = {**recipe, "dtype": "float32", "out_dtype": "bfloat16"}
            Path("recipe.yml").write_text(yaml.safe_dump(content))
            command = str(Path(sys.executable).with_name("mergekit-yaml"))
            # The order of mergekit's models follows the hashes of their names.
            subprocess.run(
                [command, "recipe.yml", name, "--no-write-model-card"],
                check=True,
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
            tables[name] = load_file(Path(name) / "model.safetensors")[TABLE]
            ids = Tokenizer.from_file(f"{name}/tokenizer.json").get_vocab()
            size = json.loads((Path(name) / "config.json").read_text())["vocab_size"]
            facts[name] = json.dumps({"ids": ids, "vocab_size": size}, sort_keys=True)
        save_file(tables, here / "vocabulary.safetensors", metadata=facts)


if __name__ == "__main__":
    main()
