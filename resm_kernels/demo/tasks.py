"""The demo's three skills: text made from a seed, split into train, validation and test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

LETTERS = tuple("abcdefghijklmnop")
DIGITS = tuple("0123456789")
SYMBOLS = ("+", "?", "=")

Split = Literal["train", "validation", "test"]


class Example(NamedTuple):
    """A prompt and the one right answer, as words separated by spaces."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """One thing that an expert learns; `draw` makes one example, whatever its split."""

    name: str
    summary: str
    draw: Callable[[random.Random], Example]


def _draw_sort(rng: random.Random) -> Example:
    letters = rng.sample(LETTERS, 6)
    return Example(f"sort {' '.join(letters)} =", " ".join(sorted(letters)))


def _draw_add(rng: random.Random) -> Example:
    left, right = rng.randrange(100), rng.randrange(100)
    prompt = f"add {' '.join(f'{left:02d}')} + {' '.join(f'{right:02d}')} ="
    return Example(prompt, " ".join(f"{left + right:03d}"))


def _draw_recall(rng: random.Random) -> Example:
    keys = rng.sample(LETTERS, 5)
    values = [rng.choice(DIGITS) for _ in keys]
    asked = rng.randrange(len(keys))
    pairs = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return Example(f"recall {pairs} ? {keys[asked]} =", values[asked])


SKILLS = (
    Skill("sort", "six letters into alphabetical order", _draw_sort),
    Skill("add", "the sum of two two-digit numbers", _draw_add),
    Skill("recall", "the value of one of five keys given in the prompt", _draw_recall),
)

VOCABULARY = ("<pad>", "<eos>", *(skill.name for skill in SKILLS), *SYMBOLS, *LETTERS, *DIGITS)


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, by its hash: 80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    if bucket < 205:
        return "train"
    return "validation" if bucket < 230 else "test"


def draw(skill: Skill, split: Split, rng: random.Random) -> Example:
    """One example of a split; the same prompt may be drawn again."""
    while True:
        example = skill.draw(rng)
        if split_of(example.prompt) == split:
            return example


def held_out(skill: Skill, split: Split, count: int, seed: int) -> list[Example]:
    """Different examples of one split, the same for the same seed.

    Parameters
    ----------
    skill : Skill
    split : {"train", "validation", "test"}
    count : int
        How many; every skill has at least 900 prompts in each split.
    seed : int
    """
    rng = random.Random(f"{seed} {skill.name} {split}")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = draw(skill, split, rng)
        examples[example.prompt] = example
    return list(examples.values())
