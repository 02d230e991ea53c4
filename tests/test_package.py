"""The package as a user meets it: import time, the command, its dependencies, the layering."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import resm_kernels
from resm_kernels.cli import main
from resm_kernels.linalg.cusolver import SOLVERS
from resm_kernels.methods import METHODS
from tests.checkpoints import save_family

ROOT = Path(__file__).parent.parent
RESM = Path(sys.executable).with_name("resm")
LIMIT = 0.5


def fastest(command: list[str | Path], runs: int = 5) -> float:
    """The least of several wall times, so that a busy machine does not decide."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_is_fast_and_loads_neither_torch_nor_triton() -> None:
    code = "import resm_kernels, sys; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert fastest([sys.executable, "-c", "import resm_kernels"]) < LIMIT


def test_help_is_fast() -> None:
    assert fastest([RESM, "--help"]) < LIMIT
    assert fastest([RESM, "merge", "--help"]) < LIMIT


def test_one_version_everywhere() -> None:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == resm_kernels.__version__


RANKS = {
    "errors": 0, "held": 0, "ops": 1, "linalg": 1, "methods": 2, "checkpoint": 3, "recipe": 4,
    "engine": 5, "doctor": 6, "report": 6, "api": 7, "demo": 8, "cli": 9, "__main__": 10,
}  # fmt: skip


def rooms() -> list[tuple[Path, str]]:
    package = ROOT / "resm_kernels"
    return [
        (path, path.relative_to(package).parts[0].removesuffix(".py"))
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py" or path.parent != package
    ]


@pytest.mark.parametrize(("path", "room"), rooms(), ids=lambda x: str(x)[-40:])
def test_imports_run_downwards(path: Path, room: str) -> None:
    """A lower room never knows a higher one, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "resm_kernels" and len(parts) > 1 and parts[1] in RANKS:
                assert RANKS[parts[1]] < RANKS[room] or parts[1] == room, f"{room} imports {name}"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resm_kernels"] == resm_kernels.__version__
    assert found["packages"]["torch"]
    assert found["available_memory_bytes"] > 0
    assert set(found["runs_on"]) == {"merging", "factorisations", "element-wise operations"}
    assert main(["doctor"]) == 0
    assert set(found["cusolver"]["solvers"]) == set(SOLVERS)
    if not found["cuda_devices"]:
        assert all("not available: " in why for why in found["cusolver"]["solvers"].values())
    assert "cuSOLVER" in capsys.readouterr().out


def test_methods_lists_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(METHODS)
    assert found["resm"]["parameters"]["sigma"]["default"] == 3.0
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for method in found.values() for name in method["parameters"])


def test_merge_verify_and_dry_run_as_a_user_types_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = save_family(tmp_path, experts=2)
    words = ["merge", "--base", str(base), "--method", "tsvm", "--lambda", "0.5"]
    words += [part for expert in experts for part in ("--expert", str(expert))]
    output = tmp_path / "merged"
    assert main([*words, str(output), "--dry-run"]) == 0
    assert "peak memory" in capsys.readouterr().out
    assert not output.exists()
    assert main([*words, str(output), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rules"] == {"mean": 5, "tsvm": 4}
    assert main([*words, str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rules"] == plan["rules"]
    assert report["plan_id"] == plan["plan_id"]
    assert report["read_bytes"] == plan["read_bytes"]
    written = sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert written == plan["write_bytes"]
    assert main(["verify", str(output)]) == 0
    assert "9 tensors" in capsys.readouterr().out
    assert main(["verify", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 9


def test_the_recipe_and_the_flags_give_the_same_bytes(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, experts=2)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: resm\nbase_model: {base}\nlambda: 0.5\nout_dtype: float32\n"
        f"parameters: {{sigma: 2, exclude: []}}\nmodels:\n"
        f"  - {{model: {experts[0]}, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {experts[1]}, parameters: {{weight: 2}}}}\n"
    )
    subprocess.run([RESM, "merge", recipe, tmp_path / "a", "--quiet"], check=True)
    words = ["merge", "--base", str(base), "--expert", str(experts[0]), "--expert", str(experts[1])]
    words += ["--weight", "0.5", "--weight", "2", "--lambda", "0.5", "--out-dtype", "float32"]
    words += ["--param", "sigma=2", "--param", "exclude=[]", str(tmp_path / "b"), "--quiet"]
    assert main(words) == 0
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_progress_goes_to_stderr_and_results_to_stdout(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    words = [RESM, "merge", "--base", base, "--expert", experts[0], tmp_path / "out", "--json"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    assert "Traceback" not in done.stderr
