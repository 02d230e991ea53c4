"""The models of the benchmark: bases, experts with all weights or LoRA, and joint training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.quality.tasks import (
    SKILLS,
    VOCABULARY,
    base_mixture,
    expert_mixture,
    joint_mixture,
)
from resm_kernels.demo.models import (
    ModelSize,
    load_model,
    new_model,
    new_tokenizer,
    no_progress_bars,
    one_thread,
    save_model,
)
from resm_kernels.demo.tasks import Skill
from resm_kernels.demo.training import train

FULL_RATE, LORA_RATE = 3e-4, 2e-3
BASE_RATE = 0.256
"""Over the hidden size: wider models take smaller steps."""
LORA_RANK = 8


@dataclass(frozen=True)
class Scale:
    """How much is trained and scored; counts of prompts are per skill.

    `sets` has, per size, how the experts of a case are tuned and how many there are.
    """

    sizes: dict[str, ModelSize]
    sets: dict[str, tuple[tuple[str, int], ...]]
    seeds: tuple[int, ...]
    batch: int
    base_steps: int
    expert_steps: int
    validation: int
    test: int


@dataclass(frozen=True)
class Family:
    """The models that share one base."""

    size: str
    seed: int

    def folder(self, work: Path) -> Path:
        """Where they lie."""
        return work / f"{self.size}-{self.seed}"


def expert_name(skill: Skill, tuning: str) -> str:
    """Folder of an expert; a LoRA-trained one is an adapter."""
    return f"{tuning}-{skill.name}"


def joint_name(count: int, tuning: str) -> str:
    """Folder of the model trained on the mixed data of the first `count` skills."""
    return f"{tuning}-joint-{count}"


@no_progress_bars()
@one_thread()
def train_base(work: Path, family: Family, scale: Scale) -> None:
    """Train the base from nothing."""
    tokenizer = new_tokenizer(VOCABULARY)
    size = scale.sizes[family.size]
    model = new_model(size, VOCABULARY, family.seed)
    train(
        model, tokenizer, base_mixture(), steps=scale.base_steps, batch=scale.batch,
        learning_rate=BASE_RATE / size.hidden, seed=f"{family.seed} base",
    )  # fmt: skip
    _keep(family.folder(work) / "base", lambda folder: save_model(model, tokenizer, folder))


def train_expert(work: Path, family: Family, scale: Scale, tuning: str, skill: int) -> None:
    """Fine-tune the base on one skill."""
    mixture = expert_mixture(SKILLS[skill])
    _tune(work, family, scale, tuning, expert_name(SKILLS[skill], tuning), mixture, 1)


def train_joint(work: Path, family: Family, scale: Scale, tuning: str, count: int) -> None:
    """Fine-tune the base on the data of several experts, as many examples as they saw together."""
    mixture = joint_mixture(SKILLS[:count])
    _tune(work, family, scale, tuning, joint_name(count, tuning), mixture, count)


@no_progress_bars()
@one_thread()
def _tune(
    work: Path,
    family: Family,
    scale: Scale,
    tuning: str,
    name: str,
    mixture: list[Skill],
    rounds: int,
) -> None:
    folder = family.folder(work)
    # from disk: the expert starts at the bfloat16 base that its delta is taken from
    model, tokenizer = load_model(folder / "base")
    if tuning == "lora":
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(family.seed)
            model = get_peft_model(model, config)
    train(
        model, tokenizer, mixture, steps=rounds * scale.expert_steps, batch=scale.batch,
        learning_rate=LORA_RATE if tuning == "lora" else FULL_RATE, seed=f"{family.seed} {name}",
    )  # fmt: skip
    if tuning == "lora":
        _keep(folder / name, model.save_pretrained)
    else:
        _keep(folder / name, lambda path: save_model(model, tokenizer, path))


def _keep(folder: Path, save: Callable[[Path], object]) -> None:
    """Save a model whole or not at all: an interrupted run goes on from what is there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    partial.rename(folder)


@no_progress_bars()
def load(folder: Path, base: Path) -> Any:
    """A model in float32, its adapter merged in where the folder holds one."""
    if not (folder / "adapter_config.json").exists():
        return load_model(folder)[0]
    merged: Any = PeftModel.from_pretrained(load_model(base)[0], folder)
    return merged.merge_and_unload()
