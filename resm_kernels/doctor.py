"""What this machine has, and what of it a merge will use."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch

from resm_kernels import __version__
from resm_kernels.engine.memory import available_memory
from resm_kernels.engine.options import usable_cores
from resm_kernels.engine.rates import load_rates
from resm_kernels.linalg import cusolver
from resm_kernels.linalg.crossover import committed_tables, table_for
from resm_kernels.ops.launch import OLDEST_TRITON, has_triton, triton_version

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "rich",
    "PyYAML",
)

UNMEASURED = "not yet measured on this card"


def diagnose() -> dict[str, Any]:
    """Versions, devices, optional parts and where each part of a merge will run."""
    rates = load_rates()
    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
        }
        for i in range(torch.cuda.device_count())
    ]
    crossover = measured([str(device["name"]) for device in devices])
    return {
        "resm_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": usable_cores(),
        "rates": rates and rates.to_dict(),
        "available_memory_bytes": available_memory(),
        "cuda_devices": devices,
        "cusolver": {
            "libraries": cusolver.libraries(),
            "solvers": {
                name: f"not available: {reason}" if reason else f"available; {crossover}"
                for name, reason in cusolver.available().items()
            },
        },
        "runs_on": {
            "merging": "cpu unless --device says otherwise; not yet measured on a GPU",
            "factorisations": "torch.linalg in float64, where merging runs; cuSOLVER itself where "
            "the crossover table says so",
            "element-wise operations": _kernels(),
        },
    }


def measured(cards: Sequence[str]) -> str:
    """Whether the crossover table between torch and cuSOLVER was measured on these cards."""
    tables = [table_for(committed_tables(), card) for card in cards]
    if not tables or not all(table.measured for table in tables):
        return UNMEASURED
    versions = dict.fromkeys(f"torch {t.versions.get('torch')} at {t.commit}" for t in tables)
    return f"measured on this card with {', '.join(versions)}"


def _kernels() -> str:
    if not has_triton():
        needed, found = ".".join(map(str, OLDEST_TRITON)), triton_version() or "none"
        return f"torch, also on a GPU: kernels need triton {needed} or newer, found {found}"
    return f"torch on the CPU, triton {triton_version()} on a GPU; not yet measured on one"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
