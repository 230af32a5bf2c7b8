"""Chunks of which the same bytes are expected again: compared with the last take where they lie, by any thread.

What lives here: leaves that the last take has settled, and that a plan keeps as they are for as long as every chunk of
theirs is found unchanged. So what has not changed costs a digest, and no object of its own. What doesn't: which leaves
these are (``structure``), the units of work (``take_jobs``), chunks that are planned to be looked at one by one
(``plan``).

Invariants: a chunk passes only if its digest is what the last take stored *and* that may be reused. A settled leaf is
never changed: with the first chunk that does not pass, the plan gets a new leaf in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.store.known import Known
from torchsnapshot.taking.plan import Chunk, Leaf


class ExpectedLeaf:
    """A settled leaf of a plan, and the memory that is to be compared with it.

    Args:
        leaves: the plan's.
        number: which of them.
        buffers: the memory of each of its chunks.
        renew: makes the leaf's successor, whose chunks can be staged; called at most once. With ``buffers`` it keeps
            the memory alive.
    """

    __slots__ = ("_buffers", "_leaves", "_lock", "_number", "_renew", "_renewed", "_settled")

    def __init__(self, leaves: list[Leaf], number: int, buffers: Sequence[Any], renew: Callable[[], Leaf]) -> None:
        self._leaves = leaves
        self._number = number
        self._settled = leaves[number]
        self._buffers = buffers
        self._renew = renew
        self._renewed: Leaf | None = None
        self._lock = threading.Lock()

    def nbytes(self, index: int) -> int:
        """The size of a chunk."""
        return self._settled.chunks[index].nbytes

    def differing(self, index: int, known: Known) -> Chunk | None:
        """Look at one chunk.

        Returns:
            None where it is what the last take stored, and that may be reused. Else the chunk, to be staged without
            another look.
        """
        ref = self._settled.chunks[index].ref
        assert ref is not None
        if digest_of(self._buffers[index]) == ref.digest and known.may_reuse((ref,)):
            return None
        chunk = self._successor().chunks[index]
        chunk.ref, chunk.changed_last_time = None, True
        return chunk

    def _successor(self) -> Leaf:
        with self._lock:
            if self._renewed is None:
                self._renewed = self._renew()
                # what is not found to differ is stored where it was
                for chunk, last in zip(self._renewed.chunks, self._settled.chunks, strict=True):
                    chunk.ref = last.ref
                self._leaves[self._number] = self._renewed
            return self._renewed


ExpectedChunk = tuple[ExpectedLeaf, int]
"""A leaf, and the number of one of its chunks."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What of a plan's settled leaves is still to be looked at.

    ``large`` are large chunks. ``groups`` are small ones, as they are packed together; among these are chunks that the
    plan has made anew, and that are members of the pack in any case.
    """

    large: list[ExpectedChunk] = field(default_factory=list)
    groups: list[list[Chunk | ExpectedChunk]] = field(default_factory=list)


def differing(chunks: Iterable[Chunk | ExpectedChunk], known: Known) -> list[Chunk]:
    """Look at all that are expected: those that are to be staged, and the plan's own, in their order."""
    found = [chunk if isinstance(chunk, Chunk) else chunk[0].differing(chunk[1], known) for chunk in chunks]
    return [chunk for chunk in found if chunk is not None]


def size_of(chunk: Chunk | ExpectedChunk) -> int:
    """The bytes of a chunk."""
    return chunk.nbytes if isinstance(chunk, Chunk) else chunk[0].nbytes(chunk[1])
