"""A chunk of live memory and what is known of it; chunks side by side.

What lives here: the bookkeeping of one chunk. What doesn't: when it changes, and why that is exact (``live_digests``),
how the kernel is asked (``page_watch``).

A chunk begins and ends in the middle of pages that may hold other things, too. So its *edges*, the parts of it that
lie in such pages, are kept as bytes: a write to one of these pages makes the chunk doubtful, and comparing the edges
settles that. A write to a page that is all its own makes it unknown.
"""

from __future__ import annotations

import ctypes
import operator
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xxhash import xxh3_128

from torchsnapshot.engine.page_watch import PAGE_NBYTES, Range, pages_of, touching

_CREDIT = 4
_MAX_CREDIT = 16
_MAX_PATIENCE = 64
"""A watched chunk begins with the credit, gains one by each look that finds it unwritten, and loses as much as it began
with by each that does not: below zero it is given up. So what is written less than once in five looks stays watched.
After that it must be found unchanged once, twice, … up to so many times in a row before it is watched again."""

Extent = tuple[int, int]
"""Address and size of a chunk in memory, in bytes."""

Edges = tuple[bytes, bytes]
"""What of a chunk lies before the first, and behind the last, of the pages that are all its own."""


@dataclass(slots=True, eq=False)
class WatchedChunk:
    """A chunk of memory: a candidate, or watched.

    ``digest`` is that of a candidate when it was last read (``noted_at``), and that of a watched one for as long as it
    is known to hold; where the chunk ``is_doubtful``, that depends on whether its edges are still ``edges``.
    ``written_at`` is the last look that found any of its pages written, or that began to watch it; ``lost_at`` the last
    one that found more than edges written. ``still`` counts how many looks in a row found a candidate unchanged, of
    ``patience`` that are wanted.
    """

    extent: Extent
    number: int
    digest: bytes | None
    noted_at: int
    asked_at: int
    is_watched: bool = False
    is_doubtful: bool = False
    edges: Edges | None = None
    written_at: int = 0
    lost_at: int = 0
    credit: int = 0
    still: int = 0
    patience: int = 1

    @property
    def pages(self) -> Range:
        """The pages that hold it, or a part of it."""
        address, nbytes = self.extent
        return pages_of(address, address + nbytes)

    @property
    def own_pages(self) -> Range:
        """The pages that hold nothing else; without any, the second address is not behind the first."""
        address, nbytes = self.extent
        end = address + nbytes
        return -(-address // PAGE_NBYTES) * PAGE_NBYTES, end - end % PAGE_NBYTES

    def edges_of(self, memory: memoryview) -> Edges:
        """The edges as they are now, of the chunk or a copy of it."""
        address, nbytes = self.extent
        first, behind = (min(max(0, page - address), nbytes) for page in self.own_pages)
        return bytes(memory[:first]), bytes(memory[max(first, behind) :])

    def hash(self, memory: memoryview) -> tuple[bytes, Edges]:
        """The digest of live memory, and the edges that are in it: others may write to these at any time."""
        first, last = edges = self.edges_of(memory)
        hasher = xxh3_128(first)
        hasher.update(memory[len(first) : memory.nbytes - len(last)])
        hasher.update(last)
        return hasher.digest(), edges

    def begin(self, look: int) -> None:
        """It is watched from this look on."""
        self.is_watched, self.credit, self.still = True, _CREDIT, 0
        self.digest, self.written_at, self.lost_at = None, look, look

    def forget(self, look: int) -> None:
        """A look could not find out whether it was written."""
        self.digest, self.written_at = None, look

    def lose(self, look: int) -> None:
        """A look has found it written."""
        self.forget(look)
        if self.lost_at < look:
            self.credit = min(_MAX_CREDIT, self.credit + look - self.lost_at - 1) - _CREDIT
            self.lost_at = look
        if self.credit < 0:
            self.is_watched, self.patience = False, min(2 * self.patience, _MAX_PATIENCE)

    def doubt(self, look: int) -> None:
        """A look has found pages of its edges written, and no others."""
        self.written_at, self.is_doubtful = look, True

    def know(self, digest: bytes, edges: Edges) -> None:
        """Its digest is known, and so are the edges that are in it."""
        self.digest, self.edges, self.is_doubtful = digest, edges, False

    def settle(self) -> None:
        """Look at the edges of a doubtful chunk. The memory must be there."""
        address, nbytes = self.extent
        if self.edges == self.edges_of(memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")):
            self.is_doubtful = False
        else:
            self.digest = None

    def note_candidate(self, digest: bytes, look: int) -> None:
        """Somebody has read a chunk that is not watched."""
        if self.noted_at != look:
            self.still = self.still + 1 if self.digest == digest else 0
        elif self.digest != digest:
            self.still = 0
        self.digest, self.noted_at = digest, look


@dataclass(slots=True, eq=False)
class Run:
    """Watched chunks whose pages follow one another: one question to the kernel."""

    start: int
    end: int
    chunks: list[WatchedChunk]

    def touched(self, written: Sequence[Range]) -> Iterator[tuple[WatchedChunk, bool]]:
        """The chunks of which a page was written, and whether it is one of their own.

        Args:
            written: what the kernel has answered: ranges in order.
        """
        starts = [start for start, _ in written]

        def is_written(start: int, end: int) -> bool:
            last = bisect_left(starts, end) - 1
            return last >= 0 and written[last][1] > start

        for chunk in self.chunks:
            if is_written(*chunk.pages):
                first, behind = chunk.own_pages
                yield chunk, first < behind and is_written(first, behind)


def runs_of(chunks: Sequence[WatchedChunk]) -> list[Run]:
    """Chunks gathered into runs.

    Args:
        chunks: in the order of their addresses.
    """
    return [Run(*whole, members) for whole, members in touching(chunks, _PAGES)]


_PAGES = operator.attrgetter("pages")
