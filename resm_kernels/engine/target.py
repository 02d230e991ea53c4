"""One output of a run: its folder, its shards, and the small files that finish it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resm_kernels import __version__
from resm_kernels.checkpoint.companions import companion_files
from resm_kernels.checkpoint.files import seal, seal_text, unseal
from resm_kernels.checkpoint.journal import (
    JOURNAL,
    MANIFEST,
    PAGE,
    REPORT,
    OutputFolder,
    check_output,
)
from resm_kernels.checkpoint.manifest import build_manifest, index_file, verify_folder
from resm_kernels.checkpoint.vocabulary import output_files
from resm_kernels.checkpoint.writer import ShardFile, ShardLayout
from resm_kernels.engine.plan import MergePlan, PlannedTensor
from resm_kernels.engine.result import MergeReport, TensorResult
from resm_kernels.errors import OutputError, VerificationError

LOG = logging.getLogger(__name__)

ExtraFiles = Callable[[MergeReport], Mapping[str, bytes]]
Companions = dict[tuple[str | None, int, int], dict[str, bytes]]
Draw = Callable[[MergeReport], str]


class Target:
    """One output of a run: its plan, its folder and what is known of its tensors."""

    def __init__(self, plan: MergePlan, output: Path) -> None:
        self.plan = plan
        self.report = _empty_report(plan, output)
        self.folder = OutputFolder(output, plan.plan_id)
        self.shards: dict[int, ShardFile] = {}
        self.results: dict[str, TensorResult] = {}
        self.companions: dict[str, bytes] = {}
        self.complete = False

    def prepare(self, shared: Companions) -> None:
        """Judge what an earlier run left, now that nobody else may write there.

        `shared` has the companion files of the targets before: a tokenizer takes many megabytes.
        """
        check_output(self.folder.output, self.plan.input_folders, resume=True)
        if self.folder.finished and (earlier := _complete_report(self.folder)) is not None:
            self.folder.finish({})
            LOG.info("%s was complete but for its name", self.folder.output)
            self.report, self.complete = earlier, True
            return
        self.folder.verify_kept(self.plan.layouts)
        if self.plan.part is not None:  # no model, and nothing that makes it look like one
            return
        base, alignment = self.plan.base, self.plan.alignment
        key = (self.plan.recipe.out_dtype, id(base), id(alignment))
        if key not in shared:
            files = companion_files(base, self.plan.recipe.out_dtype)
            shared[key] = output_files(files, alignment) if alignment else files
        self.companions = shared[key]

    @property
    def lacking(self) -> list[ShardLayout]:
        """The shards that are not finished yet."""
        return [layout for layout in self.plan.layouts if layout.name not in self.folder.kept]

    def lacks(self, tensor: PlannedTensor) -> bool:
        """Whether the tensor's shard is not finished yet."""
        return self.plan.layouts[tensor.shard].name not in self.folder.kept

    def begin(self, index: int, due: Callable[[ShardFile], None]) -> ShardFile:
        """The file of a shard, for its first tensor."""
        return ShardFile(self.folder.path, self.plan.layouts[index], due)

    def done(self, shard: ShardFile, sha256: str) -> None:
        """Journal a shard that is durable under its final name."""
        results = {slot.name: asdict(self.results[slot.name]) for slot in shard.layout.slots}
        self.folder.shard_done(shard.layout.name, sha256, shard.digests, results)

    def collect(self) -> None:
        """Take over the results of kept shards, and put all in order."""
        for shard, entry in self.folder.kept.items():
            for name, content in entry["results"].items():
                if name not in self.results:
                    self.results[name] = self._kept_result(shard, content)
        self.report.tensors = {t.name: self.results[t.name] for t in self.plan.tensors}

    def _kept_result(self, shard: str, content: Mapping[str, Any]) -> TensorResult:
        try:
            return TensorResult.from_dict(content)
        except VerificationError as error:
            raise OutputError(
                f"{self.folder.path / JOURNAL}: shard {shard!r}: {error}",
                fix=f"remove {self.folder.path / shard} to have it merged again, then resume",
            ) from error

    def finish(self, extra_files: ExtraFiles | None, draw: Draw | None) -> None:
        """Write the small files and give the folder its name."""
        plan, report = self.plan, self.report
        files = dict(self.companions)
        files.update(index_file(plan.layouts, "part" if plan.part else "model"))
        files.update(extra_files(report) if extra_files else {})
        page = _drawn(report, draw)
        report.drawn = bool(page)
        timed = {REPORT: seal(report.to_dict()), **page}
        files[MANIFEST] = build_manifest(
            plan_id=plan.plan_id,
            recipe=plan.recipe.to_dict(),
            inputs=[(c.reference, c.digest) for c in (plan.base, *plan.experts)],
            layouts=plan.layouts,
            shards=self.folder.kept,
            facts={name: result.facts() for name, result in report.tensors.items()},
            files=files,
            part=plan.part,
        )
        self.folder.finish({**timed, **files})
        self.complete = True


def _drawn(report: MergeReport, draw: Draw | None) -> dict[str, bytes]:
    """The HTML report, sealed; nothing where it cannot be drawn."""
    if draw is None:
        return {}
    try:
        return {PAGE: seal_text(draw(report))}
    except Exception as error:  # a merge is not lost for its picture
        LOG.warning("%s was not drawn: %r", PAGE, error)
        return {}


def _complete_report(folder: OutputFolder) -> MergeReport | None:
    """The report of a folder that only lacked its name; None where it was damaged since."""
    try:
        verify_folder(folder.path)
        return MergeReport.from_dict(unseal(folder.path / REPORT))
    except VerificationError as error:
        LOG.warning("%s; its shards are checked one by one", error)
        return None


def _empty_report(plan: MergePlan, output: Path) -> MergeReport:
    return MergeReport(
        output=str(output),
        plan_id=plan.plan_id,
        method=plan.recipe.method,
        recipe=plan.recipe.to_dict(),
        device=",".join(map(str, plan.devices)),
        workers=plan.workers,
        threads=plan.options.threads,
        versions={
            "resm-kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        left_out=dict(plan.left_out),
        part=None if plan.part is None else plan.part.to_dict(),
        inputs=[{"model": c.reference, "digest": c.digest} for c in (plan.base, *plan.experts)],
    )
