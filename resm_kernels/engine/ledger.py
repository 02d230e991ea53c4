"""Who may be in memory: tensors wait until there is room for them on some device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Account:
    """What is held in one memory, against what may be; kept by a `Ledger`.

    Attributes
    ----------
    budget : int
        Most bytes at once; one tensor alone is always admitted.
    window : int
        Most tensors at once.
    workers : int
        Most of them that are merged at once, and hold a workspace.
    held, most : int
        Bytes of inputs and outputs admitted now; bytes in use at most so far.
    workspaces : list of int
        Bytes that each of the admitted tensors needs while it is merged.
    load : float
        Their predicted cost.
    """

    budget: int
    window: int
    workers: int = 1
    held: int = 0
    most: int = 0
    workspaces: list[int] = field(default_factory=list)
    load: float = 0.0

    @property
    def inside(self) -> int:
        """Tensors admitted now."""
        return len(self.workspaces)

    def used(self, *more: int) -> int:
        """Most bytes in use at once by what is admitted, and by one of this workspace."""
        return self.held + sum(sorted((*self.workspaces, *more))[-self.workers :])

    def fits(self, bid: Bid) -> bool:
        """Whether there is room for one more."""
        if not self.inside:
            return True
        full = self.inside >= self.window
        return not full and self.used(bid.workspace) + bid.held <= self.budget


@dataclass(frozen=True)
class Bid:
    """What one tensor would take of one account.

    Attributes
    ----------
    held : int
        Bytes from reading to writing.
    cost : float
        Predicted.
    workspace : int
        Bytes beside them while it is merged.
    """

    account: Account
    held: int
    cost: float
    workspace: int = 0


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
                fitting = [i for i, bid in enumerate(bids) if bid.account.fits(bid)]
                if fitting:
                    taken = min(fitting, key=lambda i: (bids[i].account.load, i))
                    bid, account = bids[taken], bids[taken].account
                    account.held += bid.held
                    account.workspaces.append(bid.workspace)
                    account.most = max(account.most, account.used())
                    account.load += bid.cost
                    return taken
                self._change.wait()
            return None

    def release(self, bid: Bid) -> None:
        """Give back what was taken."""
        with self._change:
            bid.account.held -= bid.held
            bid.account.workspaces.remove(bid.workspace)
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
