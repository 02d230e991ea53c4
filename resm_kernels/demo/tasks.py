"""The demo's three skills: text made from a seed, split into train, validation and test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

LETTERS = tuple("abcdefghijklmnop")
COUNTED = LETTERS[:6]
DIGITS = tuple("0123456789")

Split = Literal["train", "validation", "test"]


class Example(NamedTuple):
    """A prompt and the one right answer, as words separated by spaces."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """What one expert learns.

    Attributes
    ----------
    name, summary : str
        The prompt's first word, and the skill for people.
    share : float
        Share of the base's training mixture; the shares of all skills sum to 1.
    draw : callable
        Makes one example, whatever its split.
    """

    name: str
    summary: str
    share: float
    draw: Callable[[random.Random], Example]


def _draw_reverse(rng: random.Random) -> Example:
    letters = [rng.choice(LETTERS) for _ in range(10)]
    return Example(f"reverse {' '.join(letters)} =", " ".join(reversed(letters)))


def _draw_add(rng: random.Random) -> Example:
    left, right = rng.randrange(100), rng.randrange(100)
    prompt = f"add {' '.join(f'{left:02d}')} + {' '.join(f'{right:02d}')} ="
    return Example(prompt, " ".join(f"{left + right:03d}"))


def _draw_count(rng: random.Random) -> Example:
    asked, count = rng.choice(COUNTED), rng.randrange(10)
    others = [letter for letter in COUNTED if letter != asked]
    letters = [asked] * count + [rng.choice(others) for _ in range(10 - count)]
    rng.shuffle(letters)
    return Example(f"count {asked} in {' '.join(letters)} =", str(count))


SKILLS = (
    Skill("reverse", "ten letters backwards", 0.15, _draw_reverse),
    Skill("add", "the sum of two two-digit numbers", 0.5, _draw_add),
    Skill("count", "how often a letter occurs among ten", 0.35, _draw_count),
)

PAD, END = "<pad>", "<eos>"
VOCABULARY = (PAD, END, "reverse", "add", "count", "in", "+", "=", *LETTERS, *DIGITS)


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to by its hash: 80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    if bucket < 205:
        return "train"
    return "validation" if bucket < 230 else "test"


def draw(skill: Skill, split: Split, rng: random.Random) -> Example:
    """One example of a split; the same prompt may come again."""
    while True:
        example = skill.draw(rng)
        if split_of(example.prompt) == split:
            return example


def held_out(skill: Skill, split: Split, count: int, seed: int) -> list[Example]:
    """Different examples of one split, the same ones for the same seed.

    Parameters
    ----------
    skill : Skill
    split : {"train", "validation", "test"}
    count : int
        At most 900: addition has 10 000 prompts in all.
    seed : int
    """
    rng = random.Random(f"{seed} {skill.name} {split}")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = draw(skill, split, rng)
        examples[example.prompt] = example
    return list(examples.values())
