"""Every case, by area."""

from __future__ import annotations

from tests.hostile.adapters import ADAPTERS
from tests.hostile.cases import (
    BINS,
    BOMBS,
    FILES,
    FITS,
    INDEXES,
    LINKS,
    RECIPES,
    STRANGE,
)
from tests.hostile.fused import FUSED
from tests.hostile.sweeps import SWEEPS
from tests.hostile.vocabularies import VOCABULARIES

CORPUS = {
    "file": FILES,
    "index": INDEXES,
    "bin": BINS,
    "fit": FITS,
    "recipe": RECIPES,
    "bomb": BOMBS,
    "link": LINKS,
    "adapter": ADAPTERS,
    "tokenizer": VOCABULARIES,
    "sweep": SWEEPS,
    "fused": FUSED,
    "strange": STRANGE,
}
