"""The GPU suite by itself: it runs on a CPU, and neither errors nor the budget stop it."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import crossover, factorisations, kernels, merges, run
from benchmarks.gpu.suite import Suite, TooLong
from resm_kernels.linalg import cusolver
from resm_kernels.linalg.crossover import parse_tables
from resm_kernels.linalg.solver import Work
from resm_kernels.linalg.subspace import GRAM_RANGE
from tests.fake_cusolver import Fake, compiler


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(folder: Path, only: str) -> list[str]:
    return ["--out", str(folder), "--device", "cpu", "--quick", "--skip-tests", "--only", only]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part sees what a test has patched."""

    def run_part(suite: run.Suite, part: str, given: Any, seconds: float) -> None:
        given.only, given.budget = part, seconds
        run.measure(suite, given)

    monkeypatch.setattr(run, "run_part", run_part)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "gpu.json").read_text())["rows"]
    return rows


def test_the_quick_factorisations_keep_the_contract_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments(tmp_path, "factorisations")) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    rows = content["rows"]
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert Counter(row["part"] for row in rows) == {
        "correctness": 3 * 5 * 2 * 4,
        "pieces": 10,
        "merges": 2 * 4,
        "layers": 2 * (4 + 1),
    }
    assert {row["name"] for row in rows if row["status"] != "ok"} == {
        "svd gesvd",
        "svd gesvda",
        "split gram",
    }
    assert {row["status"] for row in rows} == {"ok", "unavailable"}
    assert all(row["seconds"] > 0 for row in rows if row["status"] == "ok")
    compared = [row for row in rows if "limit" in row]
    assert sum(row["mode"] == "exact" for row in compared) == 3 * 2
    assert sum(row["mode"] in ("auto", "fast") for row in compared) == 3 * 5 * 2 * 2
    assert all(row["ratio"] > 0 for row in rows if row["part"] == "merges")
    assert "auto      30 of 30 ok, 30 compared" in capsys.readouterr().out


def test_the_quick_grid_of_solvers_runs_without_cusolver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = dict.fromkeys(cusolver.SOLVERS, "the extension is not built")
    monkeypatch.setattr(cusolver, "available", lambda: absent)
    rows = quick_grid(tmp_path)
    ours = [row for row in rows if row["name"] in cusolver.SOLVERS]
    assert {row["name"] for row in ours} == set(cusolver.SOLVERS)
    assert {row["note"] for row in ours} == {"not available (the extension is not built)"}
    others = [row for row in rows if row not in ours]
    assert {row["name"] for row in others if row["status"] == "unavailable"} == {
        "torch gesvd", "torch gesvdj", "torch gesvda",
    }  # fmt: skip
    assert {row["status"] for row in others} == {"ok", "unavailable"}
    shown = capsys.readouterr().out
    assert "gesvdp: not available (the extension is not built)" in shown
    assert re.search(r"eigh +float64 +3 x 16x16 +torch \S+ +loop \S+ ms", shown)


def test_the_quick_grid_measures_every_solver_of_cusolver(
    tmp_path: Path, fake_cusolver: Fake
) -> None:
    rows = quick_grid(tmp_path)
    ours = [row for row in rows if row["name"] in cusolver.SOLVERS]
    assert {row["name"] for row in ours} == set(cusolver.SOLVERS)
    assert {row["status"] for row in ours} <= {"ok", "fail"}
    assert all(row["seconds"] > 0 for row in ours)
    assert all(0 < row["workspace_bytes"] < 1e6 for row in ours)  # of one case, not of all
    for row in ours:  # the fake's Jacobi rotations stop at 1e-14
        if row["part"] != "low rank":
            assert (row["error"] <= row["limit"]) == (row["status"] == "ok")
            assert row["error"] <= (1e-12 if row["dtype"] == "float64" else 1e-5)
    assert {row["shape"] for row in ours if row["part"] == "svd"} >= {(16, 16), (64, 16)}
    assert {row["batch"] for row in ours} == {1, 3}


def quick_grid(folder: Path) -> list[dict[str, Any]]:
    """The rows, from this process; the table that they propose can be read."""
    suite = Suite(folder, torch.device("cpu"))
    crossover.measure(suite, 60.0, quick=True)
    crossover.print_table(suite.rows)
    assert Counter(row["part"] for row in suite.rows).keys() == crossover.PARTS.keys()
    tables = parse_tables((folder / "crossover.json").read_text(), "crossover.json")
    assert [(table.card, table.measured) for table in tables][-1] == ("no GPU", True)
    return suite.rows


def test_a_solver_that_is_wrong_is_shown_and_not_proposed(
    tmp_path: Path, fake_cusolver: Fake, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    right = cusolver.syev_batched

    def wrong(matrices: torch.Tensor) -> cusolver.Eigen:
        found = right(matrices)
        return cusolver.Eigen(found.values, found.vectors + 1e-9)

    monkeypatch.setattr(cusolver, "syev_batched", wrong)
    monkeypatch.setattr(crossover, "WORTH", 1e-9)
    found = [row for row in quick_grid(tmp_path) if row["name"] == "syev_batched"]
    doubles = [row for row in found if row["dtype"] == "float64"]
    assert {row["status"] for row in doubles} == {"fail"}
    assert {row["status"] for row in found if row not in doubles} == {"ok"}
    rules = parse_tables((tmp_path / "crossover.json").read_text(), "")[-1].rules
    chosen = {rule.dtype for rule in rules if rule.backend == "syev_batched"}
    assert chosen == {"float32"}
    assert "WRONG" in capsys.readouterr().out


def test_the_grid_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(tmp_path, torch.device("cpu"))
    crossover.measure(suite, 0.0, quick=True)
    tried = [row for row in suite.rows if row["status"] != "unavailable"]
    assert {row["status"] for row in tried} == {"skipped"}
    monkeypatch.setattr(crossover, "LONGEST", (0.0, 60.0))
    suite = Suite(tmp_path, torch.device("cpu"))
    crossover.measure(suite, 60.0, quick=True)
    found = {row["batch"]: row["status"] for row in suite.rows if row["name"] == "torch"}
    assert found == {1: "skipped", 3: "ok"}


def test_a_slow_first_run_is_no_measurement(tmp_path: Path) -> None:
    suite, calls = Suite(tmp_path, torch.device("cpu")), list[int]()
    suite.allot(60.0, crossover.PARTS)

    def run(matrices: torch.Tensor, count: int) -> crossover.Found:
        calls.append(count)
        time.sleep(0.3 if len(calls) == 1 else 0.0)
        return (matrices,)

    row = {"part": "eigh", "name": "torch", "dtype": "float64", "batch": 1, "shape": (16, 16)}
    crossover.timed(suite, row, run, torch.eye(16), 5)
    assert calls == [5] * (1 + crossover.REPEATS)
    assert row["seconds"] < 0.1
    crossover.check_time(suite, row | {"shape": (64, 64)})
    suite.pace[crossover.pace_key(row)] = 1e-3
    with pytest.raises(TooLong, match=r"about 262\.1 s, but 3\.0 s allowed"):
        crossover.check_time(suite, row | {"shape": (64, 64)})


def test_svds_are_measured_on_spectra_that_a_merge_asks_them_for() -> None:
    for dtype, least in ((torch.float64, GRAM_RANGE), (torch.float32, 1e-4)):
        (matrix,) = crossover.make("svd", 1, (256, 128), dtype, torch.device("cpu"))
        values = torch.linalg.svdvals(matrix.double())
        assert 0 < (values[-1] / values[0]) ** 2 < least


def test_the_grid_stays_inside_memory() -> None:
    every = list(crossover.cases(crossover.SIZES, crossover.BATCHES))
    assert max(b * m * n for _, b, (m, n), _ in every) == crossover.ENTRIES
    assert {b for _, b, _, _ in every} == {1, 8, 64, 512}
    assert {min(shape) for _, _, shape, _ in every} == set(crossover.SIZES)


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("echo fine", "ok", "fine"),
        ("echo 1 error; exit 9", "fail", "1 error"),
        ("echo Device not supported; exit 1", "unavailable", "exit code 1: Device not supported"),
        ("exec sleep 60", "skipped", "not done within"),
        (None, "unavailable", "no compute-sanitizer"),
    ],
)
def test_compute_sanitizer_runs_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_cusolver: Fake,
    script: str | None, status: str, said: str,
) -> None:  # fmt: skip
    tool = tmp_path / "compute-sanitizer"
    if script:
        tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{script}\n')
        tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *given, **options: str(tool) if script else None)
    monkeypatch.setattr(run, "SANITIZER_SECONDS", 1.0)
    suite, given = Suite(tmp_path, torch.device("cpu")), argparse.Namespace(device="cpu")
    run.run_sanitizer(suite, given, 1.0)
    (row,) = suite.rows
    assert row["status"] == status
    assert said in row["note"]
    assert run.failed(suite) == (status == "fail")
    if script:
        words = (tmp_path / "arguments").read_text()
        assert words.startswith("--tool memcheck --error-exitcode 9 ")
        assert "--only crossover --quick" in words


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("builds", [True, False])
def test_the_extension_is_built_first(
    builds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a tree that has none; where it cannot be built the suite goes on, and fails."""
    root = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "resm_kernels", "python"):
        shutil.copytree(run.ROOT / folder, root / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(run.ROOT / file, root)
    monkeypatch.setattr(run, "ROOT", root)
    if not builds:
        (root / "csrc" / "module.cpp").write_text("#error broken")
    suite = Suite(tmp_path, torch.device("cpu"))
    run.build_extension(suite, 120.0)
    (row,) = suite.rows
    assert row["status"] == ("ok" if builds else "error")
    assert run.failed(suite) == (not builds)
    assert len([*(root / "resm_kernels").glob("_cusolver*.so")]) == builds


def test_without_the_extension_there_is_nothing_to_sanitise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusolver, "available", lambda: {"syevd": "not built"})
    suite = Suite(tmp_path, torch.device("cpu"))
    run.run_sanitizer(suite, argparse.Namespace(device="cpu"), 60.0)
    assert suite.rows[0]["note"] == "not available (no solver of the cuSOLVER extension)"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_quick_kernels_agree_with_their_references_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", *arguments(tmp_path, "kernels")]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path)
    assert {row["status"] for row in rows} == {"ok"}
    measured = [row for row in rows if row["part"] == "kernels"]
    assert {row["name"] for row in measured} == {*kernels.ELEMENTWISE, "low_rank"}
    for row in measured:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["roof_share"] > 0
        assert row["torch_ratio"] > 0
        assert row["goal"] in (True, False)
    assert [r["compile_status"] for r in rows if "compile_status" in r] == ["ok"]
    assert "roof matmul tf32" in done.stdout


def test_a_result_that_is_wrong_is_not_timed() -> None:
    expected = torch.tensor([1.0, -0.0])
    kernels.expect_bytes(expected, expected.clone())
    with pytest.raises(kernels.Wrong, match="1 of 2 entries differ"):
        kernels.expect_bytes(expected, torch.tensor([1.0, 0.0]))
    pytest.importorskip("triton")
    for name in kernels.ELEMENTWISE:
        case = kernels.ELEMENTWISE[name](name, (24, 32), torch.bfloat16, torch.device("cpu"))
        with pytest.raises(kernels.Wrong):
            case.check(spoilt(name, case))


def spoilt(name: str, case: kernels.Case) -> Any:
    """What plain torch makes of the case, with an entry changed."""
    if name == "trim":
        return [(0.0, 1)] * kernels.EXPERTS
    if name == "delta_stats":
        return kernels.stats_reference.delta_stats(case.given[0], [case.given[0] + 1.0] * 3)
    found = case.plain(*case.given)
    (found[0] if name == "split_delta" else found).view(-1)[5] += 1.0
    return found


def test_the_quick_merges_go_from_disk_to_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments(tmp_path, "merges")) == 0
    rows = rows_in(tmp_path)
    assert {r["status"] for r in rows if r["part"] != "published"} == {"ok"}
    assert {row["part"] for row in rows} == {*merges.PARTS}
    whole = [row for row in rows if row["part"] == "end to end"]
    assert [(row["method"], row["weights"]) for row in whole] == [
        ("tsvm", 3), ("ties", 9), ("tsvm", 9), ("resm", 9),
    ]  # fmt: skip
    larger = [row for row in rows if row["part"] == "larger" and row["name"] != "inputs"]
    assert [(row["method"], row["weights"]) for row in larger] == [
        ("ties", 4), ("resm", 3), ("tsvm", 3), ("resm", 4), ("tsvm", 4),
    ]  # fmt: skip
    for row in whole:
        assert row["busy"].keys() == {"read", "compute", "write", "finish"}
        assert all(0 <= share <= 1 for share in row["busy"].values())
        assert row["host_peak_bytes"] > 0
        assert row["disk_floor_seconds"] > 0
        assert row["predicted_seconds"] > 0
        assert row["model_seconds"] > row["layer_seconds"] * merges.QUICK[0].layers
    assert {row["workers"] for row in rows if row["part"] == "workers"} >= {1, 3}
    taken = [row for row in rows if row["name"] == "published"]
    assert {tuple(row["shape"]) for row in taken} == {*merges.QUICK[0].layer.values()}
    assert all(row["ratio"] > 0 for row in taken)
    (layer,) = (row for row in rows if row["name"] == "published, layer")
    assert layer["seconds"] > sum(row["seconds"] for row in taken)
    shown = capsys.readouterr().out
    assert re.search(r"end to end tiny ties model.layers.\* .*, compute \d+%", shown)


def test_merges_that_do_not_agree_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, errors = merges.merged, itertools.cycle((1e-6, 0.0))

    def off(place: merges.Place, method: str, *given: Any) -> dict[str, torch.Tensor]:
        found, error = honest(place, method, *given), next(errors) * (method == "ties")
        return {name: tensor * (1 + error) for name, tensor in found.items()}

    monkeypatch.setattr(merges, "merged", off)
    suite = Suite(tmp_path, torch.device("cpu"))
    merges.measure(suite, 60.0, quick=True)
    wrong = [row for row in suite.rows if row["status"] == "fail"]
    assert [(row["name"], row["method"], row["limit"]) for row in wrong] == [("agrees", "ties", 0)]
    assert wrong[0]["note"].startswith("differs from the CPU by ")
    timed = [row for row in suite.rows if row["part"] in ("end to end", "larger")]
    assert {row["status"] for row in timed if row.get("method") == "ties"} == {"unavailable"}
    assert {row["status"] for row in timed if row.get("method") != "ties"} == {"ok"}
    assert run.failed(suite)


def test_merges_end_with_their_time_their_disk_and_their_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statuses(seconds: float) -> dict[str, str]:
        suite = Suite(tmp_path, torch.device("cpu"))
        merges.measure(suite, seconds, quick=True)
        merges.print_table(suite.rows)
        return {row["name"]: f"{row['status']}: {row.get('note')}" for row in suite.rows}

    assert statuses(0.0) == {"inputs": "skipped: about 0.0 s, but 0.0 s left to set up"}
    with monkeypatch.context() as broken:
        broken.setattr(merges, "run_merge", lambda *given: [][0])
        broken.setattr(merges, "time_published", lambda *given: None)
        found = statuses(60.0)
    assert found["tiny tsvm"] == found["small resm"] == "error: IndexError: list index out of range"
    assert found["best"] == "skipped: fewer than two numbers of workers were measured"
    slow = {"cpu": Work(*[1e4] * 7)}
    with monkeypatch.context() as rates:
        rates.setattr(merges, "RATES", slow)
        rates.setattr(merges, "check_methods", lambda suite, place: None)
        found = statuses(60.0)
    assert found["tiny tsvm"].startswith("unavailable: not available (tsvm does not agree")
    assert re.match(r"skipped: about \d{3,}\.\d s, but \S+ s left", found["published"])
    assert found["published, layer"].startswith("unavailable")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert statuses(60.0).keys() == {"inputs"}


def test_stages_overlap_and_models_are_extrapolated(tmp_path: Path) -> None:
    track = {"read 0": [0.0, 1.0, 2.0, 3.0], "read 1": [0.5, 2.5], "compute cuda:0 0": [1.0, 3.0]}
    report = argparse.Namespace(timeline=track, seconds=4.0)
    assert merges.busy_shares(report) == {"read": 0.75, "compute": 0.5}  # type: ignore[arg-type]
    model = merges.MODELS[1]
    place = merges.Place(model, tmp_path, [], read=2e9, write=1e9, start=1.0, table_rate=1e9)
    guess = merges.nominal(place, "ties", merges.SMALL, "cuda")
    row: dict[str, Any] = {"method": "ties", "seconds": 3.0}
    merges.extrapolate(row, place, guess, "cuda")
    whole = 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    ratio = whole / (8192**2 + 2 * 1024 * 8192)
    tables = 2 * 128256 * 8192
    assert row["layer_seconds"] == pytest.approx(2.0 * ratio)
    assert row["model_seconds"] == pytest.approx(1.0 + 160.0 * ratio + 10 * tables / 1e9)
    assert row["model_floor_seconds"] == pytest.approx(8 * (80 * whole + tables) / 2e9)
    assert f"(seconds - start) x {ratio:.2f} by operations" in row["assumes"]


def test_peers_are_extrapolated_to_a_layer_where_time_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = merges.QUICK[0]
    largest = max(model.layer.values(), key=lambda shape: merges.published_seconds(shape, "cpu"))
    plans = {shape: min(shape) * 1e-6 for shape in model.layer.values()}
    plans[largest] = 1e6
    monkeypatch.setattr(merges, "published_seconds", lambda shape, device: plans[shape])
    monkeypatch.setattr(merges, "fusion_bench_merge", lambda: merges.published)
    suite = Suite(tmp_path, torch.device("cpu"))
    suite.allot(60.0, merges.PARTS)
    merges.time_published(suite, model, {})
    for name in ("published", "fusion-bench"):
        found = {r["shape"]: r for r in suite.rows if r["name"] == name and "shape" in r}
        assert {s for s, r in found.items() if r["status"] == "skipped"} == {largest}
        (layer,) = (r for r in suite.rows if r["name"] == f"{name}, layer")
        assert re.search(rf"by operations from \(128, 1\d+\): \[\({largest[0]}", layer["assumes"])
        assert layer["seconds"] > 1e6 * max(r.get("seconds", 0.0) for r in found.values())


def test_the_budget_of_the_suite_adds_up() -> None:
    """The parts that are measured last have their time also where all others take all of theirs."""
    left, shares = run.BUDGET - run.TESTS_SECONDS, dict[str, float]()
    for part in run.PARTS:
        shares[part] = run.share_of(part, left)
        left -= shares[part]
    assert shares == {"kernels": 110, "factorisations": 70, "merges": 70, "crossover": 60}
    assert left == run.SANITIZER_SECONDS
    assert run.share_of("merges", 300.0) == 200.0
    assert run.share_of("merges", 50.0) == 0.0


def test_a_part_that_cannot_be_imported_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    def missing(part: str) -> None:
        raise ImportError("no module named yaml")

    monkeypatch.setattr(run, "module", missing)
    assert run.main(arguments(tmp_path, "merges")) == 1
    (row,) = rows_in(tmp_path)
    assert (row["name"], row["note"]) == ("merges", "ImportError: no module named yaml")


def test_a_part_that_is_killed_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"import tempfile, time; f = tempfile.mkdtemp(); open({str(tmp_path / 'where')!r}, 'w')"
    body += ".write(f); time.sleep(60)"
    monkeypatch.setattr(run, "part_command", lambda *given: [sys.executable, "-c", body])
    monkeypatch.setattr(run, "GRACE", 2.0)
    suite = Suite(tmp_path, torch.device("cpu"))
    run.run_part(suite, "merges", argparse.Namespace(), 0.0)
    assert suite.rows[-1]["note"] == "exit code none within 2 s"
    assert not Path((tmp_path / "where").read_text()).exists()


def test_errors_and_the_budget_are_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_this_process: None,
) -> None:
    given = arguments(tmp_path, "factorisations")

    def broken(*given: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(factorisations, "judge", broken)
    monkeypatch.setattr(factorisations, "QUICK_CHECKED", {(48, 32): "power"})
    with monkeypatch.context() as slow:
        slow.setattr(factorisations, "RATES", {"cpu": Work(*[2e10] * 3, *[1.0] * 4)})
        assert run.main(given) == 0  # at one operation a second nothing is even tried
    skipped = [row for row in rows_in(tmp_path) if row["part"] == "correctness"]
    assert {row["status"] for row in skipped} == {"skipped"}
    assert all("s left to correctness" in row["note"] for row in skipped)

    assert run.main(given) == 1
    notes = {row["note"] for row in rows_in(tmp_path) if row["status"] == "error"}
    assert notes == {"RuntimeError: first line"}
    assert "error RuntimeError: first line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "seconds", "said"),
    [
        ("assert False", 60.0, "1 failed"),
        ("import time; time.sleep(60)", 4.0, "exit code none within 4 s"),
        ("pass", 60.0, "1 passed"),
    ],
    ids=["fails", "hangs", "passes"],
)
def test_failing_and_hanging_tests_stop_no_measurement(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    seconds: float,
    said: str,
) -> None:
    file = tmp_path / "test_one.py"
    file.write_text(f"def test_one():\n    {body}\n")
    monkeypatch.setattr(run, "TESTS", (str(file),))
    monkeypatch.setattr(run, "TESTS_SECONDS", seconds)

    def commands(part: str, *given: object) -> list[str]:
        return [sys.executable, "-c", "import os; os.abort()" if part == "kernels" else body]

    monkeypatch.setattr(run, "part_command", commands)
    monkeypatch.setattr(run, "GRACE", 1.0)
    given = ["--out", str(tmp_path), "--device", "cpu", "--quick"]
    assert run.main([*given, "--budget", str(2 * seconds)]) == 1
    tests, aborted, *others = rows_in(tmp_path)
    assert said in tests["note"]
    assert tests["status"] == ("ok" if body == "pass" else "fail")
    assert (aborted["name"], aborted["note"]) == ("kernels", "exit code -6")
    hung = [row["note"] for row in others if row["name"] == "factorisations"]
    assert len(hung) == ("sleep" in body)
    assert all(note.startswith("exit code none within") for note in hung)
    assert said in capsys.readouterr().out
