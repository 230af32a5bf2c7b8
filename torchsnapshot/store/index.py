"""Which content is stored where: digest → chunk, out of manifests. A hint, never the truth.

What lives here: the map, filled from chunk tables and single chunks, and how keys are taken out of it. What doesn't:
I/O, clocks, and the question whether a hit may be reused (``known``).

Invariants: a lookup gives a chunk of exactly that digest and raw size, whose key and bases were not dropped. Nothing
is ever read here, so a hit says only that some manifest named the chunk when it was read.

Memory: a table that is added is kept as its packed columns, plus one dictionary entry for each new digest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from torchsnapshot.store.envelope import ChunkRef, ChunkTable, Envelope

_ROW_BITS = 40


class Index:
    """Digest → where the chunk is. Any thread may use it."""

    def __init__(self) -> None:
        self._tables: list[ChunkTable] = []
        self._rows: dict[bytes, int] = {}
        self._refs: dict[bytes, ChunkRef] = {}
        self._dropped: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many digests it knows."""
        return len(self._rows) + sum(digest not in self._rows for digest in self._refs)

    def lookup(self, digest: bytes, nbytes: int) -> ChunkRef | None:
        """The chunk of this digest and raw size in bytes, or None."""
        ref = self._refs.get(digest)
        if ref is None:
            place = self._rows.get(digest)
            if place is None:
                return None
            ref = self._tables[place >> _ROW_BITS].ref(place & ((1 << _ROW_BITS) - 1))
        return ref if ref.nbytes == nbytes and not self.is_dropped(ref) else None

    def add(self, ref: ChunkRef) -> None:
        """Take in one chunk. It replaces what was known of its digest: the caller has just seen this one work."""
        with self._lock:
            if not self.is_dropped(ref):
                self._refs[ref.digest] = ref

    def add_table(self, table: ChunkTable) -> None:
        """Take in every row of a table; a digest that is known already keeps its place."""
        with self._lock:
            number = len(self._tables)
            self._tables.append(table)
            rows, first = self._rows, number << _ROW_BITS
            if self._dropped and not self._dropped.isdisjoint(table.keys):
                for row, ref in enumerate(table.iter_refs()):
                    if not self.is_dropped(ref):
                        rows.setdefault(ref.digest, first + row)
                return
            for row, digest in enumerate(table.digests(0, len(table))):
                rows.setdefault(digest, first + row)

    def add_envelope(self, envelope: Envelope, load_table: Callable[[str], bytes]) -> None:
        """Take in every table of a manifest.

        Args:
            envelope: the manifest's.
            load_table: gives the bytes of a table that stands in a blob of its own.
        """
        for table in envelope.iter_tables(load_table):
            self.add_table(table)

    def drop(self, keys: Iterable[str]) -> None:
        """Forget every chunk in these blobs, and every chunk with such a base, now and whenever one is added."""
        with self._lock:
            dropped = set(keys) - self._dropped
            if not dropped:
                return
            self._dropped |= dropped
            self._refs = {digest: ref for digest, ref in self._refs.items() if not self.is_dropped(ref)}
            for number, table in enumerate(self._tables):
                # a table holds the keys of all bases of its rows, so most tables need no second look
                if dropped.isdisjoint(table.keys):
                    continue
                for row, ref in enumerate(table.iter_refs()):
                    if self._rows.get(ref.digest) == (number << _ROW_BITS) + row and self.is_dropped(ref):
                        del self._rows[ref.digest]

    def is_dropped(self, ref: ChunkRef) -> bool:
        """Whether the chunk's blob, or that of a base of it, was dropped."""
        if not self._dropped:
            return False
        link: ChunkRef | None = ref
        while link is not None:
            if link.key in self._dropped:
                return True
            link = link.base
        return False
