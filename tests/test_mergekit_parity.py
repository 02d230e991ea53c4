"""`linear` and `task_arithmetic` against mergekit 0.1.5's own output, to the last bfloat16 bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import resm_kernels
from tests.mergekit.inputs import RECIPES, write_inputs

RECORDED = Path(__file__).parent / "mergekit" / "outputs.safetensors"


@pytest.mark.parametrize("name", RECIPES)
def test_same_bits_as_mergekit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compute in float32 and round once; the order of the sums is the same too."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = {**RECIPES[name], "dtype": "float32", "out_dtype": "bfloat16"}
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    resm_kernels.merge(recipe="recipe.yml", output="merged")
    merged = load_file("merged/model.safetensors")
    recorded = {
        key.partition("/")[2]: value
        for key, value in load_file(RECORDED).items()
        if key.startswith(f"{name}/")
    }
    assert merged.keys() == recorded.keys()
    different = {
        key: int((merged[key].view(torch.int16) != value.view(torch.int16)).sum())
        for key, value in recorded.items()
    }
    assert not any(different.values()), different
