"""Chunks of which the same bytes are expected again: compared with the last take where they lie, by any thread.

What lives here: leaves that the last take has settled, and that a plan keeps as they are for as long as every chunk of
theirs is found unchanged. So what has not changed costs a digest, and no object of its own. What doesn't: which leaves
these are (``structure``), the units of work (``take_jobs``), chunks that are planned to be looked at one by one
(``plan``).

Invariants: a chunk passes only if its digest is what the last take stored *and* that may be reused. A settled leaf is
never changed: with the first chunk that does not pass, the plan gets a new leaf in its place.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchsnapshot.errors import UnsupportedValueError
from torchsnapshot.state.live_digests import Look
from torchsnapshot.state.watched_chunks import Extent
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.known import Known
from torchsnapshot.taking.plan import Chunk, Leaf


class ExpectedLeaf:
    """A settled leaf of a plan whose memory is to be compared with it.

    Args:
        leaves: the plan's.
        number: which of them.
        storage: what the memory is part of; it is kept alive.
        renew: makes the leaf's successor, whose chunks can be staged; called at most once.
    """

    __slots__ = ("_extent", "_leaves", "_lock", "_number", "_renew", "_renewed", "_settled", "_storage")

    def __init__(
        self, leaves: list[Leaf], number: int, storage: torch.UntypedStorage, renew: Callable[[], Leaf]
    ) -> None:
        self._storage = storage
        self._extent = storage.data_ptr(), storage.nbytes()
        self._leaves = leaves
        self._number = number
        self._settled = leaves[number]
        self._renew = renew
        self._renewed: Leaf | None = None
        self._lock = threading.Lock()

    def check_memory(self) -> None:
        """Raise ``UnsupportedValueError`` where the storage is not where it was, so that its memory may be gone."""
        if (self._storage.data_ptr(), self._storage.nbytes()) != self._extent:
            raise UnsupportedValueError([f"{self._settled.path}: its memory was freed while it was in use"])

    def renewed(self, index: int) -> Chunk:
        """A chunk that has not passed, of the leaf's successor: to be staged without another look."""
        with self._lock:
            if self._renewed is None:
                self._renewed = self._renew()
                # what is not found to differ is stored where it was
                for chunk, last in zip(self._renewed.chunks, self._settled.chunks, strict=True):
                    chunk.ref = last.ref
                self._leaves[self._number] = self._renewed
        chunk = self._renewed.chunks[index]
        chunk.ref, chunk.changed_last_time = None, True
        return chunk


# not frozen: that would take as long as all else that is done for a chunk that has not changed
@dataclass(slots=True, eq=False)
class ExpectedChunk:
    """A chunk of a leaf: where its bytes lie, and where those that are expected are stored.

    ``extent`` says where ``buffer`` is. ``buffer`` is good for as long as ``leaf`` is held. Where it ``is_unwritten``,
    nobody has written there since the last take.
    """

    leaf: ExpectedLeaf
    index: int
    extent: Extent
    buffer: Any
    ref: ChunkRef
    is_unwritten: bool

    @property
    def nbytes(self) -> int:
        """Raw size in bytes."""
        return self.ref.nbytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What of a plan's settled leaves is still to be looked at.

    ``large`` are large chunks. ``groups`` are small ones, as they are packed together; among these are chunks that the
    plan has made anew, and that are members of the pack in any case. ``unwritten`` are those, of any size, that nobody
    has written since the last take: they need no look, if what they hold may be reused.
    """

    large: list[ExpectedChunk] = field(default_factory=list)
    groups: list[list[Chunk | ExpectedChunk]] = field(default_factory=list)
    unwritten: list[ExpectedChunk] = field(default_factory=list)

    @property
    def refs(self) -> Iterator[ChunkRef]:
        """Where the bytes are stored that are to be looked at."""
        yield from map(_REF, self.large)
        for group in self.groups:
            yield from (chunk.ref for chunk in group if isinstance(chunk, ExpectedChunk))


def differing(chunks: Sequence[Chunk | ExpectedChunk], known: Known, look: Look) -> list[Chunk]:
    """Look at all that are expected: those that are to be staged, and the plan's own, in their order.

    A chunk passes if it is what the last take stored, and that may be reused.

    Raises:
        UnsupportedValueError: the memory of a tensor was freed meanwhile.
    """
    expected = [chunk for chunk in chunks if isinstance(chunk, ExpectedChunk)]
    for leaf in dict.fromkeys(map(_LEAF, expected)):
        leaf.check_memory()
    digests = look.hash_all(list(map(_EXTENT, expected)), list(map(_BUFFER, expected)))
    if digests == list(map(_DIGEST, expected)) and known.may_reuse(map(_REF, expected)):
        return [chunk for chunk in chunks if isinstance(chunk, Chunk)]
    digest_by_place = dict(zip(map(id, expected), digests, strict=True))
    found: list[Chunk] = []
    for chunk in chunks:
        if isinstance(chunk, Chunk):
            found.append(chunk)
        elif digest_by_place[id(chunk)] != chunk.ref.digest or not known.may_reuse((chunk.ref,)):
            found.append(chunk.leaf.renewed(chunk.index))
    return found


def not_reusable(chunks: Sequence[ExpectedChunk], known: Known, look: Look) -> list[Chunk]:
    """Of chunks that nobody has written, those that are to be staged all the same: what they hold may not be reused.

    Raises:
        UnsupportedValueError: the memory of a tensor was freed meanwhile.
    """
    missing: list[ExpectedChunk] = []
    if not known.may_reuse(map(_REF, chunks)):
        missing = [chunk for chunk in chunks if not known.may_reuse((chunk.ref,))]
    look.spare(sum(map(_NBYTES, chunks)) - sum(map(_NBYTES, missing)))
    for leaf in dict.fromkeys(map(_LEAF, missing)):
        leaf.check_memory()
    return [chunk.leaf.renewed(chunk.index) for chunk in missing]


_EXTENT = operator.attrgetter("extent")
_LEAF = operator.attrgetter("leaf")
_BUFFER = operator.attrgetter("buffer")
_REF = operator.attrgetter("ref")
_DIGEST = operator.attrgetter("ref.digest")
_NBYTES = operator.attrgetter("ref.nbytes")
