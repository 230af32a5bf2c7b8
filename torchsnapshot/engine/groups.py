"""Cutting a long list into pieces of work of about one size.

What doesn't live here: what is done with a piece (``taking.take_jobs``, ``reading.read_jobs``, ``copy``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

LOOK_NBYTES = 16 << 20
"""How much one look compares: little enough that cores which share a state come to its end together."""

_Item = TypeVar("_Item")


def grouped(
    items: Iterable[_Item], max_nbytes: int, nbytes_of: Callable[[_Item], int] = operator.attrgetter("nbytes")
) -> Iterator[list[_Item]]:
    """Items in groups of at most ``max_nbytes`` bytes, or of one that is larger; in their order."""
    group: list[_Item] = []
    nbytes = 0
    for item in items:
        size = nbytes_of(item)
        if group and nbytes + size > max_nbytes:
            yield group
            group, nbytes = [], 0
        group.append(item)
        nbytes += size
    if group:
        yield group


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_SizedItem = TypeVar("_SizedItem", bound=_Sized)


def by_size(
    items: Iterable[_SizedItem], small_nbytes: int, group_nbytes: int
) -> tuple[list[_SizedItem], list[list[_SizedItem]]]:
    """Those of at least ``small_nbytes`` bytes, and groups of the others (see ``grouped``); in their order."""
    large: list[_SizedItem] = []
    small: list[_SizedItem] = []
    for item in items:
        (small if item.nbytes < small_nbytes else large).append(item)
    return large, list(grouped(small, group_nbytes))
