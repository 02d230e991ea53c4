"""What fuzzing starts from and what it has found, run through its targets without atheris."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.seeds import write_seeds
from tests.fuzz.targets import TARGETS, replay


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str, seeds: Path, tmp_path: Path) -> None:
    """Every seed is a value or one of our own errors, and there are some of each."""
    refused = [
        replay(TARGETS[name], p.read_bytes(), tmp_path / "x") for p in (seeds / name).iterdir()
    ]
    assert None in refused
    assert any(refused)
