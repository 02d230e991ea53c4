"""Structure-aware mutations for hypothesis: healthy data with a few values gone wrong."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = (-1, 0, 1, 4, 1.0, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
SHIFTS = (-8, -1, 1, 2, 8, 2**32, 2**63)
KINDS = ("replace", "shift", "copy", "drop", "add")


def odd(*more: Any) -> st.SearchStrategy[Any]:
    """Values that stand where they should not; `more` are those of one format."""
    values = (None, True, *NUMBERS, "", [], {}, {"a": {}}, *more)
    return st.sampled_from(values).map(copy.deepcopy)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with a key or index of it, inside and out."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


@st.composite
def mutations(
    draw: st.DrawFn, whole: dict[str, Any], values: st.SearchStrategy[Any], keys: Sequence[str]
) -> None:
    """Change `whole` once where it matters: replace, shift, copy, drop or add a value."""
    found = places(whole)
    if not found:
        whole[draw(st.sampled_from(keys))] = draw(values)
        return
    holder, key = draw(st.sampled_from(found))
    kind = draw(st.sampled_from(KINDS))
    if kind == "shift" and type(holder[key]) in (int, float):
        holder[key] += draw(st.sampled_from(SHIFTS))
    elif kind == "copy":
        other, source = draw(st.sampled_from(found))
        holder[key] = copy.deepcopy(other[source])
    elif kind == "drop":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(keys))] = draw(values)
    elif kind == "add":
        holder.insert(key, draw(values))
    else:
        holder[key] = draw(values)
