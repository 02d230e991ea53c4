"""The same plan gives the same bytes: in any process, with any workers, resumed or not."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import resm_kernels
from resm_kernels.engine import flow
from tests.checkpoints import contents, fine_tuned, make_state, save
from tests.test_merge import METHODS, load

SHAPES = {
    "embed_tokens.weight": (50, 96),
    **{f"layers.{i}.up_proj.weight": (160, 96) for i in range(4)},
    **{f"layers.{i}.norm.weight": (96,) for i in range(4)},
}
WORKERS = (None, 1, 4)
SHARD_SIZES = ("1GB", "1B")
SCRIPT = """
import json, sys
from pathlib import Path
from tests.test_determinism import fingerprints
print(json.dumps(fingerprints(Path(sys.argv[1]), Path(sys.argv[2]))))
"""


def family(folder: Path) -> tuple[Path, list[Path]]:
    state = make_state(shapes=SHAPES)
    experts = [save(folder / f"e{t}", fine_tuned(state, t + 1), shards=1 + t) for t in range(3)]
    return save(folder / "base", state), experts


def digest(items: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(items):
        whole.update(f"{name} {len(items[name])} ".encode() + items[name])
    return whole.hexdigest()


def files(output: Path) -> str:
    found = contents(output)
    del found["resm_report.json"], found["resm_report.html"]
    return digest(found)


def tensors(output: Path) -> str:
    return digest({name: t.view(-1).float().numpy().tobytes() for name, t in load(output).items()})


def fingerprints(inputs: Path, outputs: Path) -> dict[str, list[str]]:
    """Digests of the outputs that must be equal, in this process."""
    base, experts = inputs / "base", [inputs / f"e{t}" for t in range(3)]
    found: dict[str, list[str]] = {}
    for method in METHODS:
        merge = functools.partial(resm_kernels.merge, method=method)
        if method == "resm":  # else it is TSV-M for spectra as flat as these
            merge = functools.partial(merge, parameters={"outlier_power": 0.5})
        for workers in WORKERS:
            output = outputs / f"{method}-{workers}"
            merge(base, experts, output, workers=workers, shard_size="40KB")
            found.setdefault(f"{method} files", []).append(files(output))
        for size in SHARD_SIZES:
            output = outputs / f"{method}-{size}"
            merge(base, experts, output, shard_size=size)
            found.setdefault(f"{method} tensors", []).append(tensors(output))
    return found


def in_process(inputs: Path, outputs: Path, **settings: str) -> dict[str, list[str]]:
    outputs.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, inputs, outputs],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **settings},
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_processes_hash_seeds_workers_and_shard_sizes(tmp_path: Path) -> None:
    family(tmp_path)
    one = in_process(tmp_path, tmp_path / "one", PYTHONHASHSEED="0", OMP_NUM_THREADS="1")
    two = in_process(tmp_path, tmp_path / "two", PYTHONHASHSEED="4242", OMP_NUM_THREADS="2")
    assert one == two
    assert {name: len(set(values)) for name, values in one.items()} == dict.fromkeys(one, 1)
    assert len({value for values in one.values() for value in values}) == 2 * len(METHODS)


@pytest.mark.parametrize("workers", [1, 4])
def test_resumed_at_any_tensor(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off before the n-th merge of a tensor, and finished with other workers."""
    base, experts = family(tmp_path)
    resm_kernels.merge(base, experts, tmp_path / "whole", shard_size="40KB")
    expected = files(tmp_path / "whole")
    original = flow.merge_planned
    left = 0

    def breaking(*arguments: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    for moment in range(1, len(SHAPES) + 1):
        output = tmp_path / f"out{moment}"
        left = moment
        with monkeypatch.context() as patch:
            patch.setattr(flow, "merge_planned", breaking)
            with pytest.raises(KeyboardInterrupt):
                resm_kernels.merge(base, experts, output, shard_size="40KB", workers=workers)
        resm_kernels.merge(base, experts, output, shard_size="40KB", resume=True, workers=3)
        assert files(output) == expected
