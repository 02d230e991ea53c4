"""The manifest of a finished output, and the check that nothing in it changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resm_kernels import __version__
from resm_kernels.checkpoint.files import check_sealed_text, hash_ranges, seal, unseal
from resm_kernels.checkpoint.journal import JOURNAL, MANIFEST, PAGE, REPORT
from resm_kernels.checkpoint.layout import are_sizes
from resm_kernels.checkpoint.writer import ShardLayout, weight_map
from resm_kernels.errors import VerificationError

FORMAT = 1
PART = "resm_part"
"""Key in the metadata of shards that hold a part of a merge."""


@dataclass(frozen=True)
class Part:
    """Which tensors of a whole merge an output holds, where it does not hold all.

    Attributes
    ----------
    only : tuple of str
        The patterns that chose them.
    tensors, of : int
        How many it holds, and the whole merge.
    """

    only: tuple[str, ...]
    tensors: int
    of: int

    def to_dict(self) -> dict[str, Any]:
        """The part as plain data."""
        return {"only": list(self.only), "tensors": self.tensors, "of": self.of}


@dataclass(frozen=True)
class Verification:
    """What `verify_folder` found in order.

    `unlisted` are files that somebody added after the merge; they are nobody's promise. `part_of`
    is the number of tensors of the whole merge where the folder holds a part of it, else None.
    """

    path: str
    plan_id: str
    files: int
    tensors: int
    total_bytes: int
    unlisted: tuple[str, ...]
    part_of: int | None = None


def index_file(layouts: Sequence[ShardLayout], stem: str = "model") -> dict[str, bytes]:
    """The index that loaders need where there are several shards."""
    if len(layouts) == 1:
        return {}
    total = sum(slot.stop - slot.start for layout in layouts for slot in layout.slots)
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map(layouts))}
    return {f"{stem}.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode()}


def build_manifest(
    *,
    plan_id: str,
    recipe: Mapping[str, Any],
    inputs: Sequence[tuple[str, str]],
    layouts: Sequence[ShardLayout],
    shards: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, bytes],
    part: Part | None = None,
) -> bytes:
    """Describe every file and tensor of an output; the same plan gives the same bytes."""
    listed = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    tensors = {}
    for layout in layouts:
        entry = shards[layout.name]
        listed[layout.name] = {"size": layout.size, "sha256": entry["sha256"]}
        for slot in layout.slots:
            tensors[slot.name] = {
                **facts[slot.name],
                "file": layout.name,
                "dtype": slot.dtype.name,
                "range": [slot.start, slot.stop],
                "sha256": entry["digests"][slot.name],
            }
    content = {
        "format": FORMAT,
        "tool": f"resm-kernels {__version__}",
        "plan_id": plan_id,
        "recipe": dict(recipe),
        "inputs": [{"model": reference, "digest": digest} for reference, digest in inputs],
        "files": listed,
        "tensors": tensors,
    }
    if part is not None:
        content["part"] = part.to_dict()
    return seal(content)


def verify_folder(folder: Path) -> Verification:
    """Compare every byte of a finished output with its manifest; needs no GPU.

    Raises
    ------
    VerificationError
        Naming every file, and every tensor in it, that is missing or differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise VerificationError(
            f"{folder}: no {MANIFEST}",
            expected="a folder that `resm merge` finished",
        )
    try:
        return _verify_manifest(folder, unseal(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerificationError(f"{path}: sealed, but not a manifest: {error!r}") from error
    except OSError as error:
        raise VerificationError(f"{folder}: cannot be read: {error.strerror}") from error


def _verify_manifest(folder: Path, manifest: Mapping[str, Any]) -> Verification:
    if manifest.get("format") != FORMAT:
        raise VerificationError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} is unknown",
            expected=f"format {FORMAT}",
            fix="verify with the version that wrote it",
        )
    problems = []
    try:
        report = unseal(folder / REPORT)
        if report.get("drawn") or (folder / PAGE).exists():
            check_sealed_text(folder / PAGE)
    except VerificationError as error:
        problems.append(error.what)
    by_file: dict[str, list[tuple[int, int, str, str]]] = {}
    for name, tensor in manifest["tensors"].items():
        start, stop = tensor["range"]
        by_file.setdefault(tensor["file"], []).append((start, stop, name, tensor["sha256"]))
    total = 0
    for name, listed in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise VerificationError(f"{folder / MANIFEST}: lists {name!r}, outside the folder")
        problems += _verify_file(folder / name, listed, sorted(by_file.get(name, [])))
        total += listed["size"]
    if problems:
        raise VerificationError(
            "\n".join([f"{folder}: does not match its manifest", *(f"  - {p}" for p in problems)])
        )
    known = {*manifest["files"], MANIFEST, REPORT, PAGE, JOURNAL}
    part_of = manifest["part"]["of"] if "part" in manifest else None
    if part_of is not None and not are_sizes([part_of]):
        raise ValueError(f"part of {part_of!r} tensors")
    unlisted = sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).as_posix() not in known
    )
    return Verification(
        path=str(folder),
        plan_id=manifest["plan_id"],
        files=len(manifest["files"]) + 2 + (folder / PAGE).exists(),
        tensors=len(manifest["tensors"]),
        total_bytes=total,
        unlisted=tuple(unlisted),
        part_of=part_of,
    )


def _verify_file(
    path: Path, listed: Mapping[str, Any], tensors: Sequence[tuple[int, int, str, str]]
) -> list[str]:
    try:
        size = path.stat().st_size
        digest, parts = hash_ranges(path, [(start, stop) for start, stop, _, _ in tensors])
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    if digest == listed["sha256"]:
        return []
    problems = []
    if size != listed["size"]:
        problems.append(f"{path}: {size} bytes instead of {listed['size']}")
    names = [t[2] for t, part in zip(tensors, parts, strict=True) if part != t[3]]
    if names:
        problems += [f"{path}: tensor {name!r} differs" for name in names]
    elif not problems:
        problems.append(f"{path}: {'its header' if tensors else 'its content'} differs")
    return problems
