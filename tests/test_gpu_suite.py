"""The GPU suite by itself: it runs on a CPU, and neither errors nor the budget stop it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from resm_kernels.linalg.solver import Work


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_quick_suite_keeps_the_contract_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([str(tmp_path), "--device", "cpu", "--quick"]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    rows = content["rows"]
    assert content["versions"]["torch"] == torch.__version__
    assert Counter(row["part"] for row in rows) == {
        "correctness": 3 * 5 * 2 * 4,
        "pieces": 10 + 2,
        "merges": 2 * 4,
        "layers": 2 * (4 + 1),
    }
    assert {row["name"] for row in rows if row["status"] != "ok"} == {
        "svd gesvd",
        "svd gesvda",
        "split gram",
        "Xgesvdp",
        "Xpolar",
    }
    assert {row["status"] for row in rows} == {"ok", "unavailable"}
    assert all(row["seconds"] > 0 for row in rows if row["status"] == "ok")
    compared = [row for row in rows if "limit" in row]
    assert sum(row["mode"] == "exact" for row in compared) == 3 * 2
    assert sum(row["mode"] in ("auto", "fast") for row in compared) == 3 * 5 * 2 * 2
    assert all(row["ratio"] > 0 for row in rows if row["part"] == "merges")
    assert "auto      30 of 30 ok, 30 compared" in capsys.readouterr().out


def test_errors_and_the_budget_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), "--device", "cpu", "--quick"]

    def broken(*given: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(gpu, "judge", broken)
    monkeypatch.setattr(gpu, "RATES", {"cpu": Work(*[2e10] * 3, *[1.0] * 4)})
    monkeypatch.setattr(gpu, "QUICK_CHECKED", {(48, 32): "power"})
    assert gpu.main(arguments) == 0  # at one operation a second nothing is even tried
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    skipped = [row for row in rows if row["part"] == "correctness"]
    assert {row["status"] for row in skipped} == {"skipped"}
    assert all("s left to correctness" in row["note"] for row in skipped)

    monkeypatch.undo()
    monkeypatch.setattr(gpu, "judge", broken)
    monkeypatch.setattr(gpu, "QUICK_CHECKED", {(48, 32): "power"})
    assert gpu.main(arguments) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["note"] for row in rows if row["status"] == "error"} == {"RuntimeError: first line"}
    assert "error RuntimeError: first line" in capsys.readouterr().out
