"""What of a delta is kept, as plain numbers that hold for any block, chunk or device."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

WORD = 1 << 32
"""Random numbers of a drop are uniform below this."""


@dataclass(frozen=True)
class Mask:
    """Which entries D_i of a delta survive, and what becomes of them.

    Applied in this order: entries with |D_i| <= `floor` are zero; so are those with
    |D_i| < `threshold`, and those with |D_i| = `threshold` at flat index >= `cut`; magnitudes
    above `clip` become `clip`; every entry is dropped with probability 1 - `density`, the others
    are divided by `density`.

    Attributes
    ----------
    floor, threshold, clip : float
        Magnitudes, compared in the dtype of the delta.
    cut : int or None
        None keeps every entry of magnitude `threshold`.
    density : float
        In (0, 1]; rounded to a multiple of 2**-32.
    key : int
        128 bits that fix the random drop (`drop_key`).
    """

    floor: float = -1.0
    threshold: float = 0.0
    cut: int | None = None
    clip: float = math.inf
    density: float = 1.0
    key: int = 0

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
        return weight * (WORD / self.keep)


def drop_key(seed: int, name: str, expert: int) -> int:
    """The key of one tensor's random drop: 128 bits of BLAKE2b over seed, name and expert."""
    text = f"{seed}\0{expert}\0{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
