"""A dict that forgets: what a process keeps by store is a hint, and a process may see any number of stores."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

NUM_STORES: Final = 4
"""Of how many stores a process remembers anything: a run has one, a job that copies or compares has a few."""


class Recent(dict[K, V]):
    """A dict of at most ``NUM_STORES`` items, those that were put last, in that order.

    Any thread may use it: each step is one operation of a dict, and an item that goes too early is made anew.
    """

    def put(self, key: K, value: V) -> V:
        """Set an item, as the one that was put last; returns its value."""
        self.pop(key, None)
        self[key] = value
        for oldest in list(self)[:-NUM_STORES]:
            self.pop(oldest, None)
        return value
