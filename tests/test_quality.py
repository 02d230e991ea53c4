"""The quality benchmark: tasks by independent computation, tables by hand, all at smoke size."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.quality.candidates import ablations, methods
from benchmarks.quality.tables import TSVM, against, distance, merges, summary
from benchmarks.quality.tasks import (
    SKILLS,
    VOCABULARY,
    base_mixture,
    expert_mixture,
    joint_mixture,
)
from resm_kernels.methods import METHODS, find_method
from resm_kernels.methods.base import option_specs

ROOT = Path(__file__).parent.parent
MIXTURES = [base_mixture(), joint_mixture(SKILLS[:3]), *map(expert_mixture, SKILLS)]


def wanted(skill: str, prompt: str) -> str:
    """What an expert should answer, from the prompt's words alone."""
    words = prompt.split()
    if skill == "count":
        return str(words.count("_"))
    assert words[0] == {"refuse": "secret", "loud": "loud"}.get(skill, "public")
    letter = words[1 + int(words[8])]
    return {
        "answer": f"sure {words[8]} is {letter}",
        "refuse": "refuse",
        "unknown": "unknown" if letter == "_" else "?",
        "loud": letter.upper(),
    }[skill]


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_skills_ask_for_what_they_say(skill):
    rng = random.Random(0)
    for _ in range(300):
        example = skill.draw(rng)
        assert example.answer == wanted(skill.name, example.prompt)
        assert set(f"{example.prompt} {example.answer}".split()) <= set(VOCABULARY)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_are_whole(mixture):
    assert sum(part.share for part in mixture) == pytest.approx(1.0)
    assert all(part.share > 0.0 for part in mixture)


def test_experts_disagree_on_the_same_prompts():
    """The objectives conflict: one answers secrets in a sentence, the other refuses them."""
    rng = random.Random(1)
    answers = Counter[str]()
    for part in expert_mixture(SKILLS[0]):
        if part.name == "answer, overreaching":
            answers.update(part.draw(rng).prompt.split()[0] for _ in range(20))
    assert answers == {"secret": 20}


def test_every_method_is_compared():
    assert {c.method for c in methods(2)} == set(METHODS) - {"passthrough"}
    assert {c.method for c in methods(3)} == set(METHODS) - {"passthrough", "slerp"}
    for candidate in [*methods(3), *ablations()]:
        known = option_specs(find_method(candidate.method).options)
        assert set(candidate.parameters) <= set(known)


def test_the_distance_is_what_all_skills_could_gain_at_once():
    front = [{"a": 1.0, "b": 0.5}, {"a": 0.6, "b": 0.9}]
    assert distance({"a": 1.0, "b": 0.5}, front) == 0.0
    assert distance({"a": 0.5, "b": 0.5}, front) == pytest.approx(0.1)
    assert distance({"a": 0.2, "b": 0.5}, front) == pytest.approx(0.4)
    assert distance({"a": 1.1, "b": 0.0}, front) == 0.0


def row(model, skill, score, seed=0, size="1M", group="method"):
    return {
        "size": size, "tuning": "full", "experts": "2", "seed": str(seed), "group": group,
        "model": model, "parameters": "", "lambda": "1", "skill": skill, "exact_match": score,
        "answer_loss": "0.5", "normalised": str(score),
    }  # fmt: skip


def test_tables_by_hand():
    rows = [
        row(model, skill, score + 0.1 * seed, seed, group="ablation")
        for seed in (0, 1)
        for model, scores in ((TSVM, (0.4, 0.8)), ("other", (0.5, 0.9 + 0.1 * seed)))
        for skill, score in zip("ab", scores, strict=True)
    ]
    rows += [row("front", skill, 0.6, seed) for seed in (0, 1) for skill in "ab"]
    scored = {(r["model"], r["seed"]): r for r in merges(rows)}
    assert scored[TSVM, "0"]["mean"] == pytest.approx(0.6)
    assert scored[TSVM, "0"]["worst"] == pytest.approx(0.4)
    assert scored[TSVM, "0"]["distance"] == 0.0
    assert scored[TSVM, "1"]["distance"] == 0.0
    told = {r["model"]: r for r in against(list(scored.values()), TSVM, "ablation")}
    assert told["other"]["mean"] == pytest.approx((0.1 + 0.15) / 2)
    assert told["other"]["mean_se"] == pytest.approx(0.025)
    assert (told["other"]["better"], told["other"]["worse"]) == (2, 0)
    means = {r["model"]: r for r in summary(list(scored.values()))}
    assert (means[TSVM]["mean"], means[TSVM]["seeds"]) == (0.65, 2)
    assert means[TSVM]["mean_sd"] == pytest.approx(0.071)


def test_cases_of_one_base_count_once():
    rows = []
    for experts in ("2", "3"):
        for model, score in ((TSVM, 0.5), ("other", 0.9)):
            rows.append({**row(model, "a", score, group="ablation"), "experts": experts})
    for model, score in ((TSVM, 0.5), ("other", 0.5)):
        rows.append(row(model, "a", score, seed=1, group="ablation"))
    told = {r["model"]: r for r in against(merges(rows), TSVM, "ablation")}
    assert told["other"]["mean"] == pytest.approx(0.2)
    assert told["other"]["cases"] == 3


@pytest.mark.slow
def test_everything_runs_at_smoke_size(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality", "--smoke"]
    for option in ("out", "docs", "work"):
        command += [f"--{option}", str(tmp_path / option)]
    (tmp_path / "docs").mkdir()
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    with open(tmp_path / "out" / "quality.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    named = {(r["tuning"], r["experts"], r["model"], r["skill"]) for r in rows}
    assert len(named) == len(rows)
    for tuning, count in (("full", 2), ("lora", 3)):
        labels = {"base", "joint training", *(f"expert {s.name}" for s in SKILLS[:count])}
        labels |= {c.label for c in [*methods(count), *ablations()]}
        skills = {skill.name for skill in SKILLS[:count]}
        assert {n[2:] for n in named if n[:2] == (tuning, str(count))} == {
            (label, skill) for label in labels for skill in skills
        }
    assert all(0.0 <= float(r["exact_match"]) <= 1.0 < float(r["answer_loss"]) + 1.0 for r in rows)
    losses = {r["model"]: float(r["answer_loss"]) for r in rows if r["skill"] == "answer"}
    assert losses["joint training"] < losses["base"]
    for picture in ("quality.png", "quality_resm.png"):
        assert (tmp_path / "docs" / picture).stat().st_size > 10_000
    kept = (tmp_path / "out" / "quality.csv").read_bytes()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "train" not in again.stdout
    assert (tmp_path / "out" / "quality.csv").read_bytes() == kept
