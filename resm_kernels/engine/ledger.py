"""Who may be in memory: tensors wait until there is room for them on some device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Account:
    """What is held in one memory, against what may be; kept by a `Ledger`.

    Attributes
    ----------
    budget : int
        Most bytes at once; one tensor alone is always admitted.
    window : int
        Most tensors at once.
    used, most : int
        Bytes admitted now, and at most so far.
    inside : int
        Tensors admitted now.
    load : float
        Their predicted cost.
    """

    budget: int
    window: int
    used: int = 0
    most: int = 0
    inside: int = 0
    load: float = 0.0

    def fits(self, amount: int) -> bool:
        """Whether there is room for one more tensor of so many bytes."""
        return self.inside < self.window and (not self.inside or self.used + amount <= self.budget)


@dataclass(frozen=True)
class Bid:
    """What one tensor would take of one account, in bytes and in predicted cost."""

    account: Account
    amount: int
    cost: float


class Ledger:
    """Admits tensors in the order in which they ask, from reading to writing."""

    def __init__(self) -> None:
        self._closed = False
        self._change = threading.Condition()

    def acquire(self, bids: Sequence[Bid]) -> int | None:
        """Wait until one of the bids fits, and take it; None once the ledger is closed.

        Of several that fit, the one with the least work before it: so devices share work by its
        cost while all tensors are read in order.
        """
        with self._change:
            while not self._closed:
                fitting = [i for i, bid in enumerate(bids) if bid.account.fits(bid.amount)]
                if fitting:
                    taken = min(fitting, key=lambda i: (bids[i].account.load, i))
                    bid, account = bids[taken], bids[taken].account
                    account.used += bid.amount
                    account.most = max(account.most, account.used)
                    account.inside += 1
                    account.load += bid.cost
                    return taken
                self._change.wait()
            return None

    def release(self, bid: Bid) -> None:
        """Give back what was taken."""
        with self._change:
            bid.account.used -= bid.amount
            bid.account.inside -= 1
            bid.account.load = max(0.0, bid.account.load - bid.cost) if bid.account.inside else 0.0
            self._change.notify_all()

    def narrow(self, account: Account, window: int) -> None:
        """Admit fewer tensors at once from now on."""
        with self._change:
            account.window = min(account.window, window)

    def close(self) -> None:
        """Admit nothing more and wake everyone who waits."""
        with self._change:
            self._closed = True
            self._change.notify_all()
