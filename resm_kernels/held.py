"""Process-wide settings that must have one value while any thread works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

SettingT = TypeVar("SettingT")


class Held(Generic[SettingT]):
    """A context that gives a setting a value; the last thread to leave restores what was there.

    Parameters
    ----------
    read, write : callable
        Get and set the setting.
    value : callable
        The value to hold.
    """

    def __init__(
        self,
        read: Callable[[], SettingT],
        write: Callable[[SettingT], object],
        value: Callable[[], SettingT],
    ) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._read()
                self._write(self._value())
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._write(self._before)
