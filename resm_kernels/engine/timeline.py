"""When each thread of a run was busy, in a bounded number of intervals."""

from __future__ import annotations

import threading

LIMIT = 2000
"""Most intervals kept: about 100 kB in the report."""
FINEST = 1e-3
"""Seconds; shorter pauses are not told apart."""


class Timeline:
    """Busy intervals by track, in seconds from `origin`.

    Past `LIMIT` intervals pauses are bridged, the shortest first, so that a run of any length
    keeps its picture.
    """

    def __init__(self, origin: float, limit: int = LIMIT) -> None:
        self._origin = origin
        self._limit = limit
        self._grain = FINEST
        self._tracks: dict[str, list[list[float]]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def add(self, track: str, start: float, stop: float) -> None:
        """One interval; those of a track come in order."""
        with self._lock:
            intervals = self._tracks.setdefault(track, [])
            if intervals and start - self._origin - intervals[-1][1] < self._grain:
                intervals[-1][1] = stop - self._origin
                return
            intervals.append([start - self._origin, stop - self._origin])
            self._count += 1
            while self._count > max(self._limit, len(self._tracks)):
                self._grain *= 2
                self._tracks = {name: self._bridged(kept) for name, kept in self._tracks.items()}
                self._count = sum(map(len, self._tracks.values()))

    def _bridged(self, intervals: list[list[float]]) -> list[list[float]]:
        kept = intervals[:1]
        for start, stop in intervals[1:]:
            if start - kept[-1][1] < self._grain:
                kept[-1][1] = stop
            else:
                kept.append([start, stop])
        return kept

    def to_dict(self) -> dict[str, list[float]]:
        """Start, stop, start, stop ... of every track, to the millisecond."""
        with self._lock:
            return {
                name: [round(edge, 3) for interval in self._tracks[name] for edge in interval]
                for name in sorted(self._tracks)
            }
