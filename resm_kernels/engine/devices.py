"""The devices that a merge may use, and how much of their memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resm_kernels.engine.options import EngineOptions
from resm_kernels.errors import PlanError, UsageError
from resm_kernels.linalg import dispatch

GPU_SHARE = 0.85
"""Share of a device's free memory that is used by default; libraries keep some for themselves."""


def find_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that `--device` names: `auto`, `all`, or names with commas between.

    Raises
    ------
    UsageError
        Where one is not there, or they are not of one kind.
    """
    names = name.split(",")
    if name == "auto":
        names = ["cuda" if torch.cuda.is_available() else "cpu"]
    elif name == "all":
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not names:
        raise UsageError("device: got 'all', and there are no CUDA devices", fix="use --device cpu")
    devices = tuple(_device(one.strip()) for one in names)
    if len(set(devices)) < len(devices) or len({device.type for device in devices}) > 1:
        raise UsageError(f"device: got {name!r}", expected="cpu, or CUDA devices, each once")
    kinds = {dispatch.card(device) for device in devices if device.type == "cuda"}
    if len(kinds) > 1:
        raise UsageError(
            f"device: {name} are not of one kind, and would give other bytes",
            got=", ".join(sorted(kinds)),
            fix="name those of one kind",
        )
    return devices


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device: got {name!r}", expected="auto, all, cpu, cuda, cuda:N or cuda:N,cuda:M"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device: {name} is not there",
            got=f"{torch.cuda.device_count()} CUDA devices",
            fix="use --device cpu",
        )
    return torch.device("cuda", device.index or 0)


def device_memory(devices: Sequence[torch.device], options: EngineOptions) -> int:
    """Bytes that tensors may take on each device: as asked, or most of what is free on all."""
    if devices[0].type == "cpu":
        return 0
    if options.gpu_memory is not None:
        return options.gpu_memory
    try:
        free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    except RuntimeError as error:
        names = ", ".join(map(str, devices))
        raise PlanError(f"{names} cannot be used: {error}", fix="use --device cpu") from error
    return max(1, int(GPU_SHARE * free))
