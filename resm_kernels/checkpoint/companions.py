"""The small files that make weights a model: config, generation config, tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint.dtypes import OUT_DTYPES
from resm_kernels.checkpoint.files import open_regular
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.errors import CheckpointError

TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
)
TOKENIZER_PATTERNS = ("*.tiktoken", "additional_chat_templates/*.jinja")
OTHER_NAMES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
MAX_BYTES = 256 << 20


def companion_files(base: Checkpoint, out_dtype: str | None) -> dict[str, bytes]:
    """Contents of the files that an output takes over from its base.

    `config.json` is copied byte for byte, unless `out_dtype` changes what it must say. Python
    files are copied only where the config's `auto_map` needs them; none is ever run.
    """
    files: dict[str, bytes] = {}
    if base.config:
        raw = _read(base.folder / "config.json")
        if out_dtype is not None:
            config = _with_dtype(base.config, out_dtype)
            if not {"dtype", "torch_dtype"} & config.keys():
                config["dtype"] = out_dtype
            raw = (json.dumps(config, indent=2) + "\n").encode()
        files["config.json"] = raw
    code = ("*.py",) if "auto_map" in base.config else ()
    others = {path.name: _read(path) for path in _present(base.folder, OTHER_NAMES, code)}
    return files | others | tokenizer_files(base)


def tokenizer_paths(checkpoint: Checkpoint) -> list[Path]:
    """A model's tokenizer files, chat templates included."""
    return _present(checkpoint.folder, TOKENIZER_NAMES, TOKENIZER_PATTERNS)


def tokenizer_files(checkpoint: Checkpoint, only: Container[str] | None = None) -> dict[str, bytes]:
    """Contents of a model's tokenizer files, or of some; names are relative to its folder."""
    names = {p.relative_to(checkpoint.folder).as_posix(): p for p in tokenizer_paths(checkpoint)}
    return {name: _read(path) for name, path in names.items() if only is None or name in only}


def is_tokenizer_file(name: str) -> bool:
    """Whether a companion file belongs to the tokenizer."""
    return name in TOKENIZER_NAMES or any(fnmatchcase(name, p) for p in TOKENIZER_PATTERNS)


def _present(folder: Path, names: Sequence[str], patterns: Sequence[str]) -> list[Path]:
    found = [folder / name for name in names]
    try:
        found += [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        return [path for path in found if _is_there(path)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error


def _is_there(path: Path) -> bool:
    """Whether anything has that name, a link to nothing included; other failures are raised."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _with_dtype(config: Mapping[str, Any], out_dtype: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in tuple(OUT_DTYPES):
            changed[key] = out_dtype
        else:
            changed[key] = _with_dtype(value, out_dtype) if isinstance(value, dict) else value
    return changed


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise CheckpointError(f"{path}: too large for a companion file")
            content = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) < size:
        raise CheckpointError(
            f"{path}: the file ended early", got=f"{len(content)} of {size} bytes"
        )
    return content
