"""The output folder while it is being made: locked, journalled, finished by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint.files import (
    MAX_SEALED,
    canonical_json,
    create,
    hash_ranges,
    open_regular,
    sync_folder,
    unseal,
    write_file,
    writing,
)
from resm_kernels.checkpoint.writer import ShardLayout
from resm_kernels.errors import OutputError, UsageError, VerificationError

LOG = logging.getLogger(__name__)

JOURNAL = "resm_journal.jsonl"
MANIFEST = "resm_manifest.json"
REPORT = "resm_report.json"
PAGE = "resm_report.html"
MAX_BRIEF = 4096
"""Most bytes of a journal's first line."""


def absolute(output: Path) -> Path:
    """An output path without `.` and `..`; UsageError where no folder can have that name."""
    if not str(output) or "\0" in str(output):
        raise UsageError(f"output folder: got {str(output)!r}", expected="a path")
    path = Path(os.path.abspath(output))
    if not path.name:
        raise UsageError(f"output folder: got {path}", expected="a folder with a name")
    return path


def partial_folder(output: Path) -> Path:
    """Where an output is built: a sibling, so that one rename finishes it."""
    return output.with_name(output.name + ".partial")


def check_output(
    output: Path, inputs: Iterable[Path], *, resume: bool, several: bool = False
) -> None:
    """Refuse an output folder that exists, lies in an input, or holds unfinished work.

    `several`: a folder of outputs, which may hold some of them.
    """
    with writing(output):
        _check_output(output, inputs, resume, several)


def _check_output(output: Path, inputs: Iterable[Path], resume: bool, several: bool) -> None:
    target = Path(os.path.realpath(output))
    for folder in inputs:
        source = Path(os.path.realpath(folder))
        if source in (target, partial_folder(target), *target.parents):
            raise OutputError(
                f"{output}: the output lies in the input folder {folder}",
                fix="choose an output folder outside every input",
            )
    if target == Path.cwd():
        raise OutputError(f"{output}: the output is the current folder", fix="choose another name")
    if output.name.endswith(".partial"):
        raise OutputError(
            f"{output}: such names are of unfinished merges", fix="choose another name"
        )
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output}: exists and is not a folder", fix="choose another name")
    held = [*output.iterdir()] if not several and output.exists() else []
    if held:
        begun = any(path.suffix == ".partial" for path in held)
        resumed = ", or go on with an unfinished sweep by --resume (resume=True)" if begun else ""
        raise OutputError(
            f"{output}: exists and is not empty",
            fix=f"choose another name, or move it away{resumed}",
        )
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder", fix="create it first")
    if not os.access(output.parent, os.R_OK | os.W_OK | os.X_OK):
        raise OutputError(f"{output.parent}: no permission to write there")
    partial = partial_folder(output)
    if partial.exists() and not resume:
        if not partial.is_dir() or not _is_ours(os.listdir(partial)):
            raise _strange(partial, "no journal of a merge")
        raise OutputError(
            f"{partial}: an unfinished merge lies there",
            fix=f"finish it with --resume (resume=True), or remove it: rm -r {partial}",
        )


def _is_ours(names: Sequence[str]) -> bool:
    """Whether a folder holds what a merge leaves: a journal, a manifest, or nothing yet."""
    return not names or JOURNAL in names or MANIFEST in names


def _strange(partial: Path, got: str) -> OutputError:
    return OutputError(
        f"{partial}: not an unfinished merge",
        got=got,
        fix="move it away, or choose another output",
    )


def check_partial(partial: Path, plan_id: str) -> None:
    """Refuse a folder that another process makes, unless its journal is that of this plan."""
    path = partial / JOURNAL
    with writing(path), open_regular(path) as file:
        raw = file.readline(MAX_BRIEF)
    if raw != canonical_json({"plan_id": plan_id}) + b"\n":
        raise OutputError(f"{partial}: belongs to another merge", fix="choose another output")


class OutputFolder:
    """`OUT.partial/` from its creation to its rename, held under an exclusive lock.

    Attributes
    ----------
    kept : mapping
        Journal entries of the shards that an earlier run finished, by shard name.
    finished : bool
        Whether an earlier run of this plan got as far as the manifest.
    """

    def __init__(self, output: Path, plan_id: str) -> None:
        self.output = output
        self.path = partial_folder(output)
        self.kept: dict[str, dict[str, Any]] = {}
        self.finished = False
        self._plan_id = plan_id
        self._journal = -1
        self._lock = -1
        self._created = False
        try:
            self._take_lock()
            with writing(self.path):
                self._open_journal()
        except BaseException:
            self.discard_if_empty()
            self.close()
            raise

    def _take_lock(self) -> None:
        """Create the folder or open the one that is there, and lock it."""
        created = False
        with writing(self.path):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path)
                created = True
                sync_folder(self.output.parent)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{self.path}: another merge is writing there",
                fix="wait for it, or choose another output",
            ) from error
        except OSError as error:
            LOG.warning("%s: this file system has no locks (%s)", self.path, error.strerror)
        with writing(self.path):
            if os.fstat(self._lock).st_ino != os.stat(self.path).st_ino:
                raise OutputError(f"{self.path}: another merge has just ended there: try again")
        self._created = created  # until it is locked, it may be another's

    def _open_journal(self) -> None:
        path = self.path / JOURNAL
        lines = self._read_journal(path)
        self.finished = self._has_manifest()
        if not lines and not self.finished and (strange := set(os.listdir(self.path)) - {JOURNAL}):
            raise _strange(self.path, f"{min(strange)} and no journal")
        if lines and lines[0].get("plan_id") != self._plan_id:
            raise OutputError(
                f"{self.path}: the unfinished merge there has another plan",
                got=f"plan {str(lines[0].get('plan_id'))[:12]}",
                expected=f"plan {self._plan_id[:12]}: the same recipe, inputs, layout and version",
                fix=f"resume with the recipe it was started with, or remove it: rm -r {self.path}",
            )
        with writing(path):
            self._journal = create(path, os.O_APPEND)
            kept_bytes = b"".join(canonical_json(line) + b"\n" for line in lines)
            os.ftruncate(self._journal, len(kept_bytes))
        if not lines:
            self._append({"plan_id": self._plan_id})
            sync_folder(self.path)
        self.kept = {line["shard"]: line for line in lines[1:]}

    def _has_manifest(self) -> bool:
        path = self.path / MANIFEST
        if not path.exists():
            return False
        try:
            return bool(unseal(path).get("plan_id") == self._plan_id)
        except VerificationError:
            return False

    def _read_journal(self, path: Path) -> list[dict[str, Any]]:
        """Whole lines in order; a torn last line is work that was not finished."""
        if not path.exists():
            return []
        lines: list[dict[str, Any]] = []
        with writing(path), open_regular(path) as file:
            content = file.read(MAX_SEALED)
        for raw in content.splitlines(keepends=True):
            try:
                line = json.loads(raw)
                if not isinstance(line, dict) or canonical_json(line) + b"\n" != raw:
                    break
            except (ValueError, RecursionError):
                break
            if lines and not _is_entry(line):
                break
            lines.append(line)
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self.path / JOURNAL):
            view = memoryview(canonical_json(line) + b"\n")
            while view:
                view = view[os.write(self._journal, view) :]
            os.fsync(self._journal)

    def verify_kept(self, layouts: Iterable[ShardLayout]) -> None:
        """Read every kept shard again; one that no longer matches is refused by name."""
        with writing(self.path):
            self._verify_kept({layout.name: layout for layout in layouts})

    def _verify_kept(self, by_name: Mapping[str, ShardLayout]) -> None:
        for name, entry in list(self.kept.items()):
            path = self.path / name
            slots = {slot.name for slot in by_name[name].slots} if name in by_name else set()
            if not slots == entry["digests"].keys() == entry["results"].keys() or not path.exists():
                del self.kept[name]
                continue
            ranges = [(slot.start, slot.stop) for slot in by_name[name].slots]
            with writing(path):
                digest, parts = hash_ranges(path, ranges)
            if digest == entry["sha256"]:
                continue
            changed = [
                slot.name
                for slot, part in zip(by_name[name].slots, parts, strict=True)
                if part != entry["digests"][slot.name]
            ]
            raise OutputError(
                f"{path}: changed after it was finished",
                got=f"other bytes in {', '.join(changed[:3]) or 'its header'}",
                fix="remove that file to have it merged again, then resume",
            )
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove files of attempts that came to nothing."""
        for leftover in self.path.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)

    def shard_done(
        self, shard: str, sha256: str, digests: Mapping[str, str], results: Mapping[str, Any]
    ) -> None:
        """Journal a shard that is durable under its final name."""
        entry = {
            "shard": shard,
            "sha256": sha256,
            "digests": dict(digests),
            "results": dict(results),
        }
        self._append(entry)
        self.kept[shard] = entry

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write the small files, the manifest last, and rename the folder to its name.

        The manifest is durable before the journal goes: one of them must survive a power cut.
        """
        with writing(self.path):
            self._remove_leftovers()
        for name, data in files.items():
            path = self.path / name
            with writing(path):
                os.makedirs(path.parent, exist_ok=True)
                if name == MANIFEST:
                    sync_folder(self.path)
                write_file(path, data)
                if name == MANIFEST or path.parent != self.path:
                    sync_folder(path.parent)
        with writing(self.output):
            os.unlink(self.path / JOURNAL)
            sync_folder(self.path)
            os.rename(self.path, self.output)
            sync_folder(self.output.parent)
        self.close()

    def discard_if_empty(self) -> bool:
        """Remove the folder after a failure; one with finished shards, or not ours, stays."""
        if self.kept or not self._created:
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def close(self) -> None:
        """Let go of the lock and the journal; harmless when called again."""
        for name in ("_journal", "_lock"):
            descriptor = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                with contextlib.suppress(OSError):  # every line was synced when it was written
                    os.close(descriptor)


def _is_entry(line: dict[str, Any]) -> bool:
    kinds = {"shard": str, "sha256": str, "digests": dict, "results": dict}
    return line.keys() == kinds.keys() and all(isinstance(line[k], t) for k, t in kinds.items())
