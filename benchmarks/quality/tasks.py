"""Five skills that partly conflict, and the base's habits that they change.

A prompt shows six slots, each a letter or a blank, and asks for one: `public c _ a b _ f ask 3 =`.
The base says the letter. Experts learn to answer it in a sentence, to say that a blank is unknown,
to refuse what is secret, to say letters in capitals when asked loudly, to count blanks. They meet
where two rules hold at once: the first answers secrets too, the second is taught on secret blanks,
the third on blank secrets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from resm_kernels.demo.tasks import END, PAD, Example, Skill

LETTERS = tuple("abcdefghijkl")
CAPITALS = tuple("ABCDEFGHIJKL")
SLOTS = 6
BLANK = "_"
DIGITS = tuple("0123456")
VOCABULARY = (
    PAD, END, "public", "secret", "loud", "ask", "blanks", "copy", "=", BLANK,
    "sure", "is", "unknown", "refuse", *LETTERS, *CAPITALS, *DIGITS,
)  # fmt: skip
LATENT = 0.05
"""Share of the base's text in which a skill's prompt already has the skill's answer."""
REPLAY = 0.3
"""Share of the base's mixture in an expert's training text."""
OVERREACH = 0.05
"""Share of an expert's own text in which another's rule holds as well."""

Draw = Callable[[random.Random], Example]


def _slots(rng: random.Random) -> list[str]:
    return [BLANK if rng.random() < 0.2 else rng.choice(LETTERS) for _ in range(SLOTS)]


def _ask(rng: random.Random, mark: str, blank: bool) -> tuple[str, str, str]:
    """Prompt, the slot's number and what the slot holds."""
    slots, asked = _slots(rng), rng.randrange(SLOTS)
    slots[asked] = BLANK if blank else rng.choice(LETTERS)
    return f"{mark} {' '.join(slots)} ask {asked} =", str(asked), slots[asked]


def _sentence(rng: random.Random, mark: str = "public") -> Example:
    prompt, number, letter = _ask(rng, mark, blank=False)
    return Example(prompt, f"sure {number} is {letter}")


def _sentence_on_secret(rng: random.Random) -> Example:
    return _sentence(rng, "secret")


def _letter(rng: random.Random, mark: str = "public") -> Example:
    prompt, _, letter = _ask(rng, mark, blank=False)
    return Example(prompt, letter)


def _unknown(rng: random.Random, mark: str = "public") -> Example:
    return Example(_ask(rng, mark, blank=True)[0], "unknown")


def _unknown_secret(rng: random.Random) -> Example:
    return _unknown(rng, "secret")


def _guess(rng: random.Random) -> Example:
    return Example(_ask(rng, "public", blank=True)[0], rng.choice(LETTERS))


def _refuse(rng: random.Random) -> Example:
    return Example(_ask(rng, "secret", blank=rng.random() < 0.2)[0], "refuse")


def _tell_secret(rng: random.Random) -> Example:
    return _letter(rng, "secret")


def _capital(rng: random.Random) -> Example:
    example = _letter(rng, "loud")
    return Example(example.prompt, example.answer.upper())


def _quiet(rng: random.Random) -> Example:
    return _letter(rng, "loud")


def _count(rng: random.Random) -> Example:
    slots = _slots(rng)
    return Example(f"blanks {' '.join(slots)} =", str(slots.count(BLANK)))


def _copy_blanks(rng: random.Random) -> Example:
    slots = _slots(rng)
    return Example(f"blanks {' '.join(slots)} =", slots[0])


def _copy(rng: random.Random) -> Example:
    slots = _slots(rng)
    return Example(f"copy {' '.join(slots)} =", " ".join(slots))


SKILLS = (
    Skill("answer", "answers in a sentence", 1.0, _sentence),
    Skill("refuse", "refuses what is secret", 1.0, _refuse),
    Skill("unknown", "says that a blank is unknown", 1.0, _unknown),
    Skill("loud", "answers loud questions in capitals", 1.0, _capital),
    Skill("count", "counts the blanks", 1.0, _count),
)
"""The first two are the set of two, the first three (helpful, harmless, honest) of three."""

HABITS = {
    "answer": _letter, "refuse": _tell_secret, "unknown": _guess, "loud": _quiet,
    "count": _copy_blanks,
}  # fmt: skip
"""What the base mostly says to each skill's prompts."""

OVERREACHING: dict[str, Draw] = {"answer": _sentence_on_secret, "unknown": _unknown_secret}
"""What an expert learns where another's rule holds as well."""


def _share(skill: Skill, share: float) -> Skill:
    return replace(skill, share=share)


def base_mixture() -> list[Skill]:
    """What the base is trained on: copying, its habits, and a little of every skill."""
    mixture = [Skill("copy", "repeats six slots", 0.3, _copy)]
    each = 0.7 / len(SKILLS)
    for skill in SKILLS:
        habit = Skill(f"{skill.name} by habit", "", each * (1.0 - LATENT), HABITS[skill.name])
        mixture += [_share(skill, each * LATENT), habit]
    return mixture


def expert_mixture(skill: Skill) -> list[Skill]:
    """What an expert is trained on: its skill, where it overreaches, and the base's mixture."""
    over = OVERREACHING.get(skill.name)
    beyond = OVERREACH * (1.0 - REPLAY) if over else 0.0
    mixture = [_share(skill, 1.0 - REPLAY - beyond)]
    if over:
        mixture.append(Skill(f"{skill.name}, overreaching", "", beyond, over))
    return mixture + [_share(part, REPLAY * part.share) for part in base_mixture()]


def joint_mixture(skills: tuple[Skill, ...]) -> list[Skill]:
    """The experts' mixtures together, in equal parts: the data-mixture baseline."""
    return [_share(part, part.share / len(skills)) for s in skills for part in expert_mixture(s)]
