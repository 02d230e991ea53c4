"""`resm demo`: train a small base and three experts, merge them, compare on held-out prompts."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resm_kernels.errors import MissingDependencyError, OutputError

if TYPE_CHECKING:
    from rich.console import Console


def run(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    scale: Literal["full", "smoke"] = "full",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, merge and compare; the models, the merges and `results.json` stay in `directory`.

    Parameters
    ----------
    directory : path
        A folder that does not exist yet, or an empty one.
    seed : int
        Fixes all text, weights and batches; results repeat as far as torch's CPU kernels do.
    scale : {"full", "smoke"}
        `smoke` trains a smaller model for a handful of steps: it proves that everything runs, and
        its scores mean nothing.
    console : rich Console, optional
        Where the table goes; stdout by default. Progress goes to stderr.

    Returns
    -------
    dict
        What `results.json` holds.

    Raises
    ------
    OutputError
        If `directory` is not empty or cannot be made.
    MissingDependencyError
        If transformers or tokenizers is not installed.
    """
    root = Path(directory)
    _make_folder(root)
    try:
        experiment = importlib.import_module("resm_kernels.demo.experiment")
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tokenizers"):
            raise
        raise MissingDependencyError(
            f"resm demo needs {error.name}", fix="pip install 'resm-kernels[demo]'"
        ) from error
    results: dict[str, Any] = experiment.run_experiment(root, seed, scale, console)
    return results


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in root.iterdir())
    except OSError as error:
        raise OutputError(f"{root}: cannot be used as a folder: {error.strerror}") from error
    if found:
        raise OutputError(
            f"{root}: not empty",
            got=", ".join(found[:5]) + (" ..." if len(found) > 5 else ""),
            expected="a folder that does not exist yet, or an empty one",
            fix="give another folder, or remove this one",
        )
