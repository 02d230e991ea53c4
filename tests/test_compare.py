"""`resm compare`: distances with known answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import resm_kernels
from resm_kernels.cli import main
from resm_kernels.engine import comparison
from resm_kernels.engine.comparison import by_module
from resm_kernels.errors import CheckpointError
from tests.checkpoints import fine_tuned, make_state, save, save_family

UP = "model.layers.0.mlp.up_proj.weight"


def test_a_checkpoint_equals_itself_in_other_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_state()
    state["steps"] = torch.tensor([3, 4], dtype=torch.int64)
    state["nothing"] = torch.empty(0, 4)
    a, b = save(tmp_path / "a", state), save(tmp_path / "b", state, shards=3)
    found = resm_kernels.compare(a, b)
    assert found.equal
    assert len(found.tensors) == len(state)
    assert all((d.relative, d.largest, d.equal_share) == (0.0, 0.0, 1.0) for d in found.tensors)
    assert main(["compare", str(a), str(b)]) == 0
    assert "every value the same" in capsys.readouterr().out


def test_distances_are_those_of_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "PIECE", 100)  # tensors of several pieces
    base, (one, other) = make_state(), (fine_tuned(make_state(), t) for t in (1, 2))
    paths = [save(tmp_path / name, s) for name, s in zip("abw", (one, other, base), strict=True)]
    found = resm_kernels.compare(paths[0], paths[1], paths[2])
    assert not found.equal
    distances = [d.relative for d in found.tensors]
    assert distances == sorted(distances, reverse=True)  # type: ignore[type-var]
    for distance in found.tensors:
        a, b, w = (state[distance.name].double() for state in (one, other, base))
        apart = float((a - b).norm())
        assert distance.relative == pytest.approx(apart / float(a.norm()), rel=1e-12)
        assert distance.largest == float((a - b).abs().max())
        assert distance.equal_share == float((a == b).double().mean())
        assert distance.of_deltas == pytest.approx(apart / float((a - w).norm()), rel=1e-9)
        cosine = float(((a - w) * (b - w)).sum() / (a - w).norm() / (b - w).norm())
        assert distance.cosine == pytest.approx(cosine, rel=1e-9)
    kinds = {name: (count, top) for name, count, _, top in by_module(found)}
    name = "model.layers.*.mlp.up_proj.weight"
    both = [d.relative for d in found.tensors if "up_proj" in d.name]
    assert kinds[name] == (2, max(r for r in both if r is not None))


def test_one_changed_entry_is_found(tmp_path: Path) -> None:
    state = make_state(dtype=torch.float32)
    a = save(tmp_path / "a", state)
    changed = {**state, UP: state[UP].clone()}
    changed[UP][3, 5] += 1.0
    found = resm_kernels.compare(a, save(tmp_path / "b", changed))
    first, *others = found.tensors
    assert (first.name, first.largest) == (UP, pytest.approx(1.0))
    assert first.equal_share == pytest.approx(1 - 1 / state[UP].numel())
    assert all(d.relative == 0.0 for d in others)
    assert not found.equal


def test_misfits_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state()
    other = {**state, "extra.weight": torch.zeros(2, 2), UP: torch.zeros(24, 8)}
    del other["model.norm.weight"]
    a, b = save(tmp_path / "a", state), save(tmp_path / "b", other)
    assert main(["compare", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert found["only_a"] == ["model.norm.weight"]
    assert found["only_b"] == ["extra.weight"]
    assert found["shapes"] == {UP: [[24, 16], [24, 8]]}
    assert main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("model.norm.weight", "extra.weight", UP))


def test_other_dtypes_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    wide = make_state(dtype=torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    exact = {name: tensor.float() for name, tensor in narrow.items()}
    a, b = save(tmp_path / "a", narrow), save(tmp_path / "b", exact)
    found = resm_kernels.compare(a, b)
    assert all(d.equal_share == 1.0 for d in found.tensors)
    assert not found.equal
    holed = {**narrow, UP: narrow[UP].clone()}
    holed[UP][0, 0], holed[UP][0, 1] = math.nan, math.inf
    c = save(tmp_path / "c", holed)
    (first,) = [d for d in resm_kernels.compare(a, c).tensors if d.name == UP]
    assert (first.nonfinite, first.relative) == (2, 0.0)
    assert first.equal_share == 1 - 2 / narrow[UP].numel()
    assert resm_kernels.compare(c, c).equal


def test_scaled_numbers_are_compared_bit_by_bit(tmp_path: Path) -> None:
    values = torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(8, 8)
    other = values.view(torch.uint8).clone()
    other[0, 0] = 99
    a = save(tmp_path / "a", {"w": values})
    b = save(tmp_path / "b", {"w": other.view(torch.float8_e4m3fn)})
    (distance,) = resm_kernels.compare(a, b).tensors
    assert (distance.relative, distance.equal_share) == (None, 63 / 64)
    assert resm_kernels.compare(a, a).equal


def test_zero_against_something_is_infinitely_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = save(tmp_path / "a", {"model.layers.0.w.weight": torch.zeros(4, 4)})
    b = save(tmp_path / "b", {"model.layers.0.w.weight": torch.ones(4, 4)})
    assert resm_kernels.compare(a, b).tensors[0].relative == math.inf
    assert main(["compare", str(a), str(b), "--html", str(tmp_path / "x.html")]) == 0
    assert "inf" in capsys.readouterr().out
    assert main(["compare", str(a), str(b), "--json"]) == 0
    (distance,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["tensors"]
    assert (distance["relative"], distance["largest"]) == (None, 1.0)


def test_the_page(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, experts=2)
    page = tmp_path / "page.html"
    words = ["compare", *map(str, experts), "--base", str(base), "--html", str(page)]
    assert main(words) == 0
    text = page.read_text()
    assert "expert0 against expert1" in text
    for title in ("Relative distance", "Distance against the change", "Cosine of the changes"):
        assert f"<h3>{title}</h3>" in text


def test_what_cannot_be_read_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = save_family(tmp_path, experts=1)
    with pytest.raises(CheckpointError):
        resm_kernels.compare(base, tmp_path / "none")
    assert main(["compare", str(base), str(tmp_path / "none")]) == 1
    assert main(["compare", str(base), str(base), "--html", str(tmp_path / "no" / "x")]) == 1
    assert "Traceback" not in capsys.readouterr().err
