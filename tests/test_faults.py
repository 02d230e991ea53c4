"""Every call that touches a file may fail: one clear error, nothing lost, resumable."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.faults import FAULTS, Scene, fault, small_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return small_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_any_call_is_one_error_and_loses_nothing(
    kind: str, scene: Scene, tmp_path: Path
) -> None:
    """Every third call here, every one in `make torture`."""
    places = {"EIO": 5, "EINTR": 9}.get(kind, 3)
    steps = itertools.takewhile(
        lambda step: fault(scene, tmp_path / f"out{step}", kind, step) is not None,
        itertools.count(1, places),
    )
    assert len(list(steps)) * places > 12
