"""Attack files of a few KB, from raw bytes where no library would write them."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SMALL = 1 << 20
CONFIG = '{"model_type": "tiny"}\n'


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Two layers and a norm: 544 bytes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.weight": (8, 8), "layers.1.weight": (8, 8), "norm.weight": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A healthy checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(CONFIG)


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """A LoRA adapter of rank 2 as PEFT saves it; `config` changes what its config says."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header (text, bytes or JSON value) and any claimed length."""
    if isinstance(header, bytes):
        raw = header
    else:
        raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(**changes: object) -> dict[str, object]:
    """A header entry for four float32 numbers, with some fields changed; None drops a field."""
    fields = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def torch_zip(program: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """A `.bin` in torch's zip format whose pickle is exactly `program`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def torch_bytes(content: object, *, legacy: bool = False) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


class Bomb:
    """Unpickling it makes a folder: proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def snapshot(root: Path) -> dict[str, object]:
    """Everything under a folder: kinds, modes, links and contents (of big files, the stamp)."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            small = status.st_size <= SMALL
            content = path.read_bytes() if small else (status.st_size, status.st_mtime_ns)
        found[str(path.relative_to(root))] = (oct(status.st_mode), content)
    return found
