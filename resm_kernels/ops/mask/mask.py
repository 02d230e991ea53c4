"""What of a delta is kept, as plain numbers that hold for any block, chunk or device."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

WORD = 1 << 32
"""Random numbers of a drop are uniform below this."""
BLOCK = 4096
"""Entries whose magnitudes `masked_norms` adds up in units of their largest."""
FRACTION = 39
"""Bits of a magnitude below that unit: a block's sum has at most 53, so float64 holds it."""


@dataclass(frozen=True)
class Mask:
    """Which entries D_i of a delta survive, and what becomes of them.

    Applied in this order: entries with |D_i| <= `floor` are zero; so are those with
    |D_i| < `threshold`, and those with |D_i| = `threshold` at flat index >= `cut`; so are those
    with |D_i| > `ceiling`, and those with |D_i| = `ceiling` at flat index < `ceiling_cut`;
    magnitudes above `clip` become `clip`; every entry is dropped with probability 1 - `density`,
    the others are multiplied by `rescale`.

    Attributes
    ----------
    floor, threshold, ceiling, clip : float
        Magnitudes, compared in the dtype of the delta.
    cut : int or None
        None keeps every entry of magnitude `threshold`.
    ceiling_cut : int
        0 keeps every entry of magnitude `ceiling`.
    density : float
        In (0, 1]; rounded to a multiple of 2**-32.
    key : int
        128 bits that fix the random drop (`drop_key`).
    rescale : float or None
        None is 1 / `density`.
    """

    floor: float = -1.0
    threshold: float = 0.0
    cut: int | None = None
    ceiling: float = math.inf
    ceiling_cut: int = 0
    clip: float = math.inf
    density: float = 1.0
    key: int = 0
    rescale: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density {self.density}, expected 0 < density <= 1")
        if not self.clip >= 0.0:
            raise ValueError(f"clip {self.clip}, expected clip >= 0")
        if not 0 <= self.key < 1 << 128:
            raise ValueError(f"key {self.key}, expected 128 bits")

    @property
    def keep(self) -> int:
        """An entry is kept where its random 32-bit number is below this."""
        return max(1, round(self.density * WORD))

    def factor(self, weight: float) -> float:
        """What survivors are multiplied by."""
        return weight * (WORD / self.keep if self.rescale is None else self.rescale)


def drop_key(seed: int, name: str, expert: int) -> int:
    """The key of one tensor's random drop: 128 bits of BLAKE2b over seed, name and expert.

    `expert` is the place in the list of experts: another order gives other drops.
    """
    text = f"{seed}\0{expert}\0{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
