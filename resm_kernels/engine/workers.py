"""How many weights are merged at the same time."""

from __future__ import annotations

from collections.abc import Sequence


def choose_workers(slots: int, weights: Sequence[tuple[int, float]], budget: int) -> int:
    """One worker per slot, or as many as the budget holds: a pure function.

    Parameters
    ----------
    slots : int
        Cores over BLAS threads per worker, or what a device runs well at a time.
    weights : sequence of (int, float)
        Memory in bytes and predicted cost of every weight.
    budget : int
        Bytes.

    Notes
    -----
    What counts is how often the budget holds the weights in which half of the work lies: a table
    that alone is larger waits in the ledger and slows nothing else. Threads are not traded for
    workers: another count of BLAS threads rounds sums differently, and two workers beat two
    threads wherever there are two weights (docs/engine.md).
    """
    half, typical, done = sum(cost for _, cost in weights) / 2, 1, 0.0
    for memory, cost in sorted(weights):
        if done < half:
            typical = memory
        done += cost
    return max(1, min(slots, len(weights), budget // max(1, typical)))
