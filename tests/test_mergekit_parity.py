"""Methods against mergekit 0.1.5's own output: whole checkpoints, single weights, and draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import resm_kernels
from tests.mergekit.inputs import RECIPES, write_inputs
from tests.mergekit.tensors import Case, cases, random_cases

RECORDED = Path(__file__).parent / "mergekit"
EPS = 2.0**-24
EXACT = {
    "linear",
    "linear_sum",
    "task_arithmetic",
    "task_arithmetic_settings",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "passthrough",
    "passthrough_plain",
}
"""Recipes where both round the same operations in the same order: equal to the last bit."""
UNEQUAL = 0.002
"""Most of the entries of another recipe that may differ, by one bfloat16 rounding."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_mergekits_checkpoints(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both compute in float32 and round once."""
    monkeypatch.chdir(inputs)
    recipe = tmp_path / "recipe.yml"
    content = {**RECIPES[name], "dtype": "float32", "out_dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump(content))
    resm_kernels.merge(recipe=recipe, output=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    recorded = {
        key.partition("/")[2]: value
        for key, value in load_file(RECORDED / "outputs.safetensors").items()
        if key.startswith(f"{name}/")
    }
    assert merged.keys() == recorded.keys()
    ours = torch.cat([merged[key].view(-1) for key in recorded]).double()
    theirs = torch.cat([value.view(-1) for value in recorded.values()]).double()
    unequal = int((ours != theirs).sum())
    print(f"{name}: {unequal} of {len(ours)} entries differ")
    if name in EXACT:
        assert unequal == 0
    # One bfloat16 number further, or float32 roundings of terms (all below 0.1) that cancel.
    bound = 2.0**-7 * theirs.abs() + 4 * EPS * 0.1
    assert bool(((ours - theirs).abs() <= bound).all())
    assert unequal <= UNEQUAL * len(ours)


def merge(case: Case, seed: int | None = None) -> torch.Tensor:
    parameters = {**case.parameters} if seed is None else {**case.parameters, "seed": seed}
    return resm_kernels.merge_tensors(
        case.base,
        case.experts,
        case.method,
        weights=case.weights or None,
        parameters=parameters,
        out_dtype=torch.float32,
        name="weight",
    )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_mergekits_weights(case: Case) -> None:
    """Single weights in float32, to a few roundings of what is added up."""
    found = merge(case)
    expected = load_file(RECORDED / "tensors.safetensors")[case.name]
    size = max(float(tensor.abs().max()) for tensor in (case.base, *case.experts, expected))
    if case.name.endswith(" of constant"):
        # Which of equal magnitudes are kept is not settled there: their number and size are.
        found, expected = (
            (merged - case.base).view(-1).abs().sort().values for merged in (found, expected)
        )
    # A rescaled sum of three experts errs most: a dozen roundings, and mergekit's float32 norms.
    assert bool(((found - expected).abs() <= 40 * EPS * size).all()), (found - expected).abs().max()


@pytest.mark.parametrize("case", list(random_cases()), ids=lambda case: case.name)
def test_mergekits_draws(case: Case) -> None:
    """Mean and variance of every entry over many seeds, by z-tests; the seeds are fixed."""
    count = 3000
    with safe_open(RECORDED / "tensors.safetensors", framework="pt") as file:
        mean, variance, fourth = file.get_tensor(f"moments of {case.name}")
        theirs = int(file.metadata()["draws"])
    drawn = torch.stack([merge(case, seed) for seed in range(count)]).double()
    share = 1 / count + 1 / theirs
    apart = (drawn.mean(0) - mean).abs()
    # 192 numbers are compared: 4.7 standard deviations are passed by one run in 2000.
    assert bool((apart <= 4.7 * (variance * share).sqrt()).all())
    spread = (drawn - mean).square().mean(0)
    bound = 4.7 * ((fourth - variance**2).clamp_min(0) * share).sqrt()
    assert bool(((spread - variance).abs() <= bound + 1e-9).all())
    assert bool((variance > 0).any())
