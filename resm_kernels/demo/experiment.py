"""The demo from start to end: train, choose lambda, merge, evaluate what lies on disk, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from resm_kernels import __version__, merge
from resm_kernels.demo.evaluation import Score, evaluate, generate, try_lambdas
from resm_kernels.demo.models import (
    ModelSize,
    load_model,
    new_model,
    new_tokenizer,
    no_progress_bars,
    one_thread,
    save_model,
)
from resm_kernels.demo.summary import print_summary
from resm_kernels.demo.tasks import SKILLS, VOCABULARY, held_out
from resm_kernels.demo.training import train

EXPERTS = tuple(f"expert-{skill.name}" for skill in SKILLS)
METHODS_WITH_LAMBDA = ("task_arithmetic", "tsvm", "resm")
BASE_RATE, EXPERT_RATE = 2e-3, 3e-4


@dataclass(frozen=True)
class Scale:
    """How much is trained and evaluated; counts of prompts are per skill."""

    size: ModelSize
    batch: int
    base_steps: int
    expert_steps: int
    validation: int
    test: int


SCALES = {
    "full": Scale(ModelSize(128, 4, 8), 64, 400, 300, 256, 512),
    "smoke": Scale(ModelSize(32, 2, 2), 16, 60, 30, 16, 32),
}


class Clock:
    """Says on stderr what is going on, with the seconds since the start."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._start = perf_counter()

    def seconds(self) -> float:
        """Seconds since the clock was made."""
        return round(perf_counter() - self._start, 1)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(f"{self.seconds():6.1f} s  {text}", markup=False, soft_wrap=True)


@no_progress_bars()
@one_thread()
def run_experiment(root: Path, seed: int, scale: str, console: Console | None) -> dict[str, Any]:
    """Do what `resm_kernels.demo.run` promises, in a folder that is there and empty."""
    clock, sizes = Clock(), SCALES[scale]
    _train_all(root, seed, sizes, clock)
    selection = _choose_lambdas(root, seed, sizes, clock)
    chosen = {"linear": None, **{method: tried[0]["lambda"] for method, tried in selection.items()}}
    for method, value in chosen.items():
        clock.say(f"writing merged-{method}")
        merge(
            base=root / "base",
            experts=[root / name for name in EXPERTS],
            output=root / f"merged-{method}",
            method=method,
            parameters=None if value is None else {"lambda": value},
        )
    results = {
        "seed": seed,
        "scale": scale,
        "skills": {skill.name: skill.summary for skill in SKILLS},
        "prompts_per_skill": {"validation": sizes.validation, "test": sizes.test},
        **_test(root, seed, sizes, chosen, clock),
        "selection": selection,
        "seconds": clock.seconds(),
        "versions": {
            "resm_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (root / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_summary(results, root, console or Console())
    return results


def _train_all(root: Path, seed: int, sizes: Scale, clock: Clock) -> None:
    clock.say(f"training the base on {', '.join(skill.name for skill in SKILLS)}")
    tokenizer, model = new_tokenizer(VOCABULARY), new_model(sizes.size, VOCABULARY, seed)
    train(
        model, tokenizer, SKILLS, steps=sizes.base_steps, batch=sizes.batch,
        learning_rate=BASE_RATE, seed=f"{seed} base",
    )  # fmt: skip
    save_model(model, tokenizer, root / "base")
    for skill, name in zip(SKILLS, EXPERTS, strict=True):
        clock.say(f"fine-tuning {name}")
        # from disk: the expert starts at the bfloat16 base that its delta is taken from
        model, tokenizer = load_model(root / "base")
        train(
            model, tokenizer, [skill], steps=sizes.expert_steps, batch=sizes.batch,
            learning_rate=EXPERT_RATE, seed=f"{seed} {skill.name}",
        )  # fmt: skip
        save_model(model, tokenizer, root / name)


def _choose_lambdas(
    root: Path, seed: int, sizes: Scale, clock: Clock
) -> dict[str, list[dict[str, float]]]:
    """Validation scores of every lambda by method, best first."""
    prompts = {s.name: held_out(s, "validation", sizes.validation, seed) for s in SKILLS}
    weights = [load_file(root / name / "model.safetensors") for name in ("base", *EXPERTS)]
    model, tokenizer = load_model(root / "base")
    selection = {}
    for method in METHODS_WITH_LAMBDA:
        clock.say(f"choosing lambda for {method} on validation prompts")
        selection[method] = try_lambdas(model, tokenizer, weights, method, prompts)
    return selection


def _test(
    root: Path, seed: int, sizes: Scale, chosen: Mapping[str, float | None], clock: Clock
) -> dict[str, Any]:
    """Scores of every checkpoint on disk, and what the RESM merge says to each first prompt."""
    clock.say(f"testing on {sizes.test} held-out prompts per skill")
    prompts = {skill.name: held_out(skill, "test", sizes.test, seed) for skill in SKILLS}
    made = {f"merged-{method}": (method, value) for method, value in chosen.items()}
    scores = {
        name: evaluate(*load_model(root / name), prompts) for name in ("base", *EXPERTS, *made)
    }
    own = {
        skill.name: scores[name][skill.name].exact_match
        for skill, name in zip(SKILLS, EXPERTS, strict=True)
    }
    models = []
    for name, by_skill in scores.items():
        method, value = made.get(name, (None, None))
        models.append({"name": name, "method": method, "lambda": value, **_row(by_skill, own)})
    resm, tokenizer = load_model(root / "merged-resm")
    generations = []
    for skill, (example, *_) in prompts.items():
        text = generate(resm, tokenizer, example.prompt)
        generations.append({"skill": skill, **example._asdict(), "generated": text})
    return {"models": models, "generations": generations}


def _row(scores: Mapping[str, Score], own: Mapping[str, float]) -> dict[str, Any]:
    """One model's scores; `normalised` is None where an expert has nothing to normalise by."""
    exact = {skill: score.exact_match for skill, score in scores.items()}
    comparable = all(own.values())
    return {
        "exact_match": exact,
        "answer_loss": {skill: score.answer_loss for skill, score in scores.items()},
        "mean": fmean(exact.values()),
        "worst": min(exact.values()),
        "normalised": fmean(exact[s] / own[s] for s in exact) if comparable else None,
    }
