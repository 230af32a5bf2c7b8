"""A memory that forgets: what a process keeps by store is a hint, and a process may see any number of stores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

NUM_STORES: Final = 4
"""Of how many stores a process remembers anything: a run has one, a job that copies or compares has a few."""


class Recent(Generic[K, V]):
    """At most ``NUM_STORES`` items, those that were put last.

    Any thread may use it, and a fork leaves nothing locked: each step is one operation of a dict. An item that goes
    too early is made anew.
    """

    def __init__(self) -> None:
        self._items: dict[K, tuple[int, V]] = {}
        self._numbers = itertools.count()

    def get(self, key: K) -> V | None:
        """An item; None where there is none."""
        found = self._items.get(key)
        return None if found is None else found[1]

    def put(self, key: K, value: V) -> None:
        """Set an item, as the one that was put last."""
        self._items[key] = next(self._numbers), value
        for oldest, _ in self.items()[:-NUM_STORES]:
            self.pop(oldest)

    def get_or_put(self, key: K, make: Callable[[], V]) -> V:
        """An item, made where there is none; now it is the one that was put last."""
        _, value = self._items.setdefault(key, (next(self._numbers), self.get(key) or make()))
        self.put(key, value)
        return value

    def pop(self, key: K) -> None:
        """Drop an item, if it is there."""
        self._items.pop(key, None)

    def items(self) -> list[tuple[K, V]]:
        """All of them, the one that was put last at the end."""
        return [(key, value) for key, (_, value) in sorted(self._items.copy().items(), key=lambda item: item[1][0])]

    def clear(self) -> None:
        """Drop all of them."""
        self._items.clear()

    def __len__(self) -> int:
        return len(self._items)
