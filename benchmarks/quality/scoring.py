"""Scores of every candidate on every skill, each with the lambda that validation prompts choose."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.quality.candidates import Candidate, ablations, methods
from benchmarks.quality.models import Family, Scale, expert_name, joint_name, load
from benchmarks.quality.tasks import SKILLS
from resm_kernels import merge
from resm_kernels.demo.evaluation import Score, evaluate
from resm_kernels.demo.models import load_model, no_progress_bars, one_thread
from resm_kernels.demo.tasks import Example, held_out

COARSE = (0.5, 1.0, 2.0)
"""Lambdas that are tried first; then further ones beside the best."""
LEAST, MOST = 1 / 16, 16.0

Prompts = Mapping[str, Sequence[Example]]
Weights = Mapping[str, torch.Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One set of experts: the first `count` skills, tuned one way from one base."""

    family: Family
    tuning: str
    count: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.family.size}-{self.family.seed}-{self.tuning}-{self.count}"


def kept_rows(work: Path, case: Case) -> list[Row]:
    """The rows of a case so far."""
    file = work / f"{case.name}.json"
    found: list[Row] = json.loads(file.read_text()) if file.exists() else []
    return found


@no_progress_bars()
@one_thread()
def score_and_keep(work: Path, case: Case, scale: Scale) -> None:
    """Keep one row per model and skill as JSON in `work`: exact match and loss on test prompts.

    What an earlier run kept, of candidates with the same parameters, is not scored again.
    """
    earlier, scoring = kept_rows(work, case), _Scoring(work, case, scale)
    rows = scoring.references()
    candidates = [*methods(case.count), *ablations()]
    for label, group in groupby(candidates, lambda candidate: candidate.label):
        competing = list(group)
        known = {candidate.settings for candidate in competing}
        kept = [r for r in earlier if r["model"] == label and r["settings"] in known]
        rows += kept or scoring.contest(competing)
    partial = work / f"{case.name}.partial"
    partial.write_text(json.dumps(rows))
    partial.rename(work / f"{case.name}.json")


class _Scoring:
    def __init__(self, work: Path, case: Case, scale: Scale) -> None:
        self.case = case
        self.folder = case.family.folder(work)
        self.skills = SKILLS[: case.count]
        self.experts = [self.folder / expert_name(s, case.tuning) for s in self.skills]
        self.vessel, self.tokenizer = load_model(self.folder / "base")
        self.base: Weights = load_file(self.folder / "base" / "model.safetensors")
        seed = case.family.seed
        self.validation, self.test = (
            {s.name: held_out(s, split, count, seed) for s in self.skills}
            for split, count in (("validation", scale.validation), ("test", scale.test))
        )
        self.own: dict[str, float] = {}

    def references(self) -> list[Row]:
        """The base, joint training, and the experts, whose scores the others are measured by."""
        joint = self.folder / joint_name(self.case.count, self.case.tuning)
        folders = {"base": self.folder / "base", "joint training": joint}
        for skill, folder in zip(self.skills, self.experts, strict=True):
            folders[f"expert {skill.name}"] = folder
        found = {
            name: evaluate(load(folder, self.folder / "base"), self.tokenizer, self.test)
            for name, folder in folders.items()
        }
        for skill in self.skills:
            self.own[skill.name] = found[f"expert {skill.name}"][skill.name].exact_match
        return [row for n, scores in found.items() for row in self._rows(n, "reference", scores)]

    def contest(self, competing: Sequence[Candidate]) -> list[Row]:
        """The candidate of one label that is best on validation prompts, on test prompts."""
        best = max(map(self._best, competing), key=lambda chosen: chosen.rank)
        self.vessel.load_state_dict(self._merge(best.candidate, best.lambda_, "bfloat16"))
        scores = evaluate(self.vessel, self.tokenizer, self.test)
        chosen = best.candidate
        return self._rows(chosen.label, chosen.group, scores, best.lambda_, chosen)

    def _best(self, candidate: Candidate) -> _Chosen:
        """The candidate with the lambda that is best on validation prompts."""
        if not candidate.scaled:
            weights = self._merge(candidate, None, "bfloat16")
            return _Chosen(candidate, None, self._rank(weights))
        # the merged delta is linear in lambda: one merge serves for all of them
        unit = self._merge(candidate, 1.0, "float32")
        tried: dict[float, tuple[float, float]] = {}

        def best_of(*lambdas: float) -> float:
            for value in lambdas:
                if value not in tried:
                    tried[value] = self._rank(self._scaled(unit, value))
            return max(tried, key=lambda value: tried[value])

        best, previous = best_of(*COARSE), 0.0
        while best != previous and LEAST < best < MOST:
            best, previous = best_of(best / 2.0, best * 2.0), best
        best = best_of(best / 2.0**0.5, best * 2.0**0.5)
        return _Chosen(candidate, best, tried[best])

    def _scaled(self, unit: Weights, value: float) -> Weights:
        """The merge with another lambda, rounded as the engine's output is."""
        scaled = {}
        for name, base in self.base.items():
            delta = unit[name] - base.float()
            scaled[name] = (base.float() + value * delta).to(base.dtype)
        return scaled

    def _rank(self, weights: Weights) -> tuple[float, float]:
        """How good a merge is on validation prompts: mean exact match, then the lower loss."""
        self.vessel.load_state_dict(weights)
        scores = evaluate(self.vessel, self.tokenizer, self.validation).values()
        return fmean(s.exact_match for s in scores), -fmean(s.answer_loss for s in scores)

    def _merge(self, candidate: Candidate, value: float | None, dtype: str) -> Weights:
        parameters = dict(candidate.parameters)
        if value is not None:
            parameters["lambda"] = value
        base, experts = self.folder / "base", self.experts
        if candidate.method == "slerp":
            base, experts = self.experts[0], self.experts[1:]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "merged")
            merge(
                base=base, experts=experts, output=output, method=candidate.method,
                parameters=parameters, out_dtype=dtype, workers=1, no_report=True,
            )  # fmt: skip
            return load_file(output / "model.safetensors")

    def _rows(
        self,
        model: str,
        group: str,
        scores: Mapping[str, Score],
        value: float | None = None,
        chosen: Candidate | None = None,
    ) -> list[Row]:
        case = self.case
        return [
            {
                "size": case.family.size,
                "tuning": case.tuning,
                "experts": case.count,
                "seed": case.family.seed,
                "group": group,
                "model": model,
                "settings": chosen.settings if chosen else "",
                "parameters": chosen.changed if chosen else "",
                "lambda": "" if value is None else f"{value:.4g}",
                "skill": skill,
                "exact_match": round(score.exact_match, 4),
                "answer_loss": round(score.answer_loss, 4),
                "normalised": round(score.exact_match / own, 4)
                if (own := self.own[skill])
                else 0.0,
            }
            for skill, score in scores.items()
        ]


@dataclass(frozen=True)
class _Chosen:
    candidate: Candidate
    lambda_: float | None
    rank: tuple[float, float]
