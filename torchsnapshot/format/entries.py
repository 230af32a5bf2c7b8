"""What a manifest says about the state, as restore, ``show`` and the next take read it.

What lives here: ``StoredManifest``, a whole manifest from the tensor side. Exported from here too: the entry kinds and
the names of places (``entry_kinds``), and the *entries* section (``entry_section``, ``entry_builder``). What doesn't
live here: upstream's view of a manifest (``manifest_view``), the container (``store.envelope``).

Invariant: an entry that ``StoredManifest`` gives out fits its chunk table: its spans are inside, and its chunks' raw
sizes add up to its own. Where the table is a reference, that holds once ``check`` has been called for the entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torchsnapshot.errors import FormatError
from torchsnapshot.format.entry_builder import EntriesBuilder, pack_entries, pack_trees
from torchsnapshot.format.entry_bytes import MAX_DEPTH, MAX_INLINE_NBYTES
from torchsnapshot.format.entry_kinds import (
    MAX_PATH_NCHARS,
    USER_METADATA,
    WRAPPERS,
    ContainerEntry,
    Entry,
    Key,
    OpaqueEntry,
    ShardedTensorEntry,
    ShardEntry,
    Span,
    TensorEntry,
    ValueEntry,
    children,
    component_of,
    escape,
    is_entry_path,
    span_columns,
    spans_of,
    unescape,
)
from torchsnapshot.format.entry_section import ENTRIES_VERSION, EntriesSection, Tree, unpack_entries
from torchsnapshot.pauses import collector_paused
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, Envelope, Head, LoadTable, ManifestFile

__all__ = [
    "ENTRIES_VERSION",
    "MAX_DEPTH",
    "MAX_INLINE_NBYTES",
    "MAX_PATH_NCHARS",
    "USER_METADATA",
    "WRAPPERS",
    "ContainerEntry",
    "EntriesBuilder",
    "EntriesSection",
    "Entry",
    "Key",
    "OpaqueEntry",
    "ShardEntry",
    "ShardedTensorEntry",
    "Span",
    "StoredManifest",
    "TensorEntry",
    "Tree",
    "ValueEntry",
    "children",
    "component_of",
    "entries_below",
    "escape",
    "is_entry_path",
    "pack_entries",
    "pack_trees",
    "span_columns",
    "spans_of",
    "unescape",
    "unpack_entries",
]


class StoredManifest:
    """A manifest as restore, ``show`` and the next take read it. Each part is read when it is first asked for.

    Args:
        data: all of the manifest's bytes.
        load_table: fetches a table blob by its key; each is fetched at most once.
        where: which manifest this is, for messages.

    Raises:
        FormatError: see ``ManifestFile``; so do all properties and methods.
    """

    def __init__(self, data: bytes, load_table: LoadTable, where: str = "manifest") -> None:
        self._file = ManifestFile(data, where)
        self._load_table = load_table
        self._tables: dict[int, ChunkTable] = {}
        self._checked: set[int] = set()
        self._checked_ranks: set[int] = set()

    @property
    def where(self) -> str:
        """Which manifest this is, for messages."""
        return self._file.where

    @property
    def nbytes(self) -> int:
        """The manifest's size in bytes, without its table blobs."""
        return self._file.nbytes

    @property
    def head(self) -> Head:
        """What the take says about itself."""
        return self._file.head

    @property
    def envelope(self) -> Envelope:
        """The chunk tables."""
        return self._file.envelope

    @cached_property
    def section(self) -> EntriesSection:
        """The entries of all ranks; what it gives out has not been compared with the chunk tables."""
        section = EntriesSection(self._file.entries, f"{self.where}: entries")
        num_tables = len(self.envelope.tables)
        for entry in section.sharded:
            if entry.nbytes and max(memoryview(entry.tables).cast("I")) >= num_tables:
                raise FormatError(f"{self.where}: a sharded tensor has chunks in a table that is not there")
        return section

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entries of all ranks by path, ``<rank>/<app_state key>/…``, depth-first, parents first.

        Those whose chunk tables stand in the manifest itself have been compared with these tables, the others not. Of
        a job of many ranks this is large: ``entries_of`` and ``shared`` make less.
        """
        for rank in self.ranks:
            self.entries_of(rank)
        return self.section.all_entries()

    @property
    def ranks(self) -> list[int]:
        """The ranks that have entries, in their order."""
        return self.section.ranks

    @collector_paused()
    def entries_of(self, rank: int) -> dict[str, Entry]:
        """The entries of one rank by path without the rank, depth-first, parents first. Not to be changed.

        They have been compared with the chunk tables as ``entries`` says.

        Raises:
            KeyError: the rank has none.
        """
        entries = self.section.entries_of(rank)
        if rank not in self._checked_ranks:
            for path, entry in entries.items():
                # ranks share what is equal, as one object that the section keeps
                if id(entry) not in self._checked:
                    self._check_inline(f"{rank}/{path}", entry)
                    self._checked.add(id(entry))
            self._checked_ranks.add(rank)
        return entries

    def shared(self, path: str) -> Entry | None:
        """The entry that all ranks have in common at a path without rank: a replicated leaf, a container with the same
        keys everywhere, or a tensor that is sharded over all ranks. None where ranks differ, or lack it.
        """
        if self.section.shared(path) is None:
            return None
        return self.entries_of(self.ranks[0])[path]

    def _check_inline(self, path: str, entry: Entry) -> None:
        tables = self.envelope.tables
        if isinstance(entry, ShardedTensorEntry):
            numbers = set(memoryview(entry.tables).cast("I")) if entry.nbytes else set()
        else:
            numbers = {span.table for span in spans_of(entry)}
        if any(number >= len(tables) for number in numbers):
            raise FormatError(f"{self.where}: {path!r:.200} has chunks in a table that is not there")
        if all(isinstance(tables[number], ChunkTable) for number in numbers):
            self.check(path, entry)

    @property
    def roots(self) -> list[str]:
        """The paths of the app_state keys, ``<rank>/<app_state key>``."""
        return [path for path in self.entries if path.count("/") == 1]

    def children(self, path: str) -> list[str]:
        """The paths of an entry's children in the order of its keys; ``""`` has the roots. A leaf has none.

        Raises:
            KeyError: no entry of that path.
        """
        if not path:
            return self.roots
        entry = self.entries[path]
        return children(path, entry) if isinstance(entry, ContainerEntry) else []

    def walk(self, path: str = "") -> Iterator[tuple[str, Entry]]:
        """The entry at ``path`` and all below it, depth-first; ``""`` walks over everything."""
        pending = list(reversed(self.roots)) if not path else [path]
        while pending:
            path = pending.pop()
            yield path, self.entries[path]
            pending.extend(reversed(self.children(path)))

    def table(self, index: int) -> ChunkTable:
        """One chunk table of the envelope, fetched where it is a reference."""
        table = self._tables.get(index)
        if table is None:
            table = self._tables[index] = self.envelope.table(index, self._load_table, self.where)
        return table

    def refs(self, span: Span) -> list[ChunkRef]:
        """The chunks of a span."""
        try:
            return self.table(span.table).refs(span.first, span.count)
        except IndexError as error:
            raise FormatError(f"{self.where}: {span} is outside the chunk tables") from error

    def digests(self, span: Span) -> list[bytes]:
        """The digests of a span's chunks; cheaper than ``refs``."""
        try:
            return self.table(span.table).digests(span.first, span.count)
        except IndexError as error:
            raise FormatError(f"{self.where}: {span} is outside the chunk tables") from error

    def check(self, path: str, entry: Entry) -> None:
        """Compare an entry's size with those of its chunks, fetching their tables where needed.

        Raises:
            FormatError: they differ, or a span is outside its table.
        """
        spans = spans_of(entry)
        if not spans:
            return
        try:
            nbytes = sum(self.table(span.table).nbytes(span.first, span.count) for span in spans)
        except IndexError as error:
            raise FormatError(f"{self.where}: {path!r:.200} has chunks outside the chunk tables") from error
        if not isinstance(entry, ContainerEntry) and nbytes != entry.nbytes:
            raise FormatError(f"{self.where}: {path!r:.200} has {entry.nbytes} bytes, its chunks {nbytes}")


def entries_below(manifest: StoredManifest, path: str, rank: int = 0) -> dict[str, Entry]:
    """The entries at and below a path, by path without rank."""
    below = f"{path}/"
    return {each: entry for each, entry in manifest.entries_of(rank).items() if each == path or each.startswith(below)}
