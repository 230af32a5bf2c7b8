"""The manifest's container, head and chunk tables: all that ls, gc, verify, copy and du read. Knows nothing of tensors.

What lives here: what a take says about itself (``Head``), which chunk tables a manifest has (``Envelope``), and
reading and building whole manifests. What doesn't: the outer form (``container``), the tables' bytes (``tables``, and
``table_references`` for those in blobs of their own; their names are exported here too), the entries section
(``torchsnapshot.format.entries``), I/O: table blobs come through a callable.

Invariants: the head can be read from the first ``HEAD_READ_NBYTES`` of any manifest; head and envelope of a manifest
with unknown *incompatible* flags are still readable (gc and ls go on), its entries are not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.store import bounded
from torchsnapshot.store.container import (
    DIGEST_NBYTES,
    ENVELOPE_VERSION,
    MAGIC,
    Header,
    PackedSection,
    SectionCodec,
    SectionType,
    check_host,
    check_section,
    digest_of,
    join_sections,
    pack_section,
    parse_header,
    read_section,
)
from torchsnapshot.store.keys import is_id
from torchsnapshot.store.table_references import MAX_TABLE_NBYTES, TableReference, pack_reference, unpack_reference
from torchsnapshot.store.tables import XXH3_128, ChunkRef, ChunkTable, ChunkTableBuilder, Form

__all__ = [
    "DIGEST_NBYTES",
    "ENVELOPE_VERSION",
    "HEAD_READ_NBYTES",
    "MAGIC",
    "MAX_HEAD_NBYTES",
    "MAX_TABLE_NBYTES",
    "MAX_USER_METADATA_NBYTES",
    "XXH3_128",
    "ChunkRef",
    "ChunkTable",
    "ChunkTableBuilder",
    "Envelope",
    "Form",
    "Head",
    "LoadTable",
    "ManifestFile",
    "PackedSection",
    "TableReference",
    "join_manifest",
    "pack_body",
    "pack_manifest",
    "read_entries",
    "read_envelope",
    "read_head",
    "user_metadata_fits",
]

HEAD_READ_NBYTES = 8192
"""How much of a manifest one ranged read fetches to have the header and the head."""

MAX_HEAD_NBYTES = 4096
MAX_USER_METADATA_NBYTES = 2048
KNOWN_INCOMPATIBLE = 0
"""The incompatible flags that this library understands: none have been needed so far."""

LoadTable = Callable[[str], bytes]
"""Fetches the bytes of the table blob of that key; what it returns is checked here."""

_ENVELOPE = struct.Struct("<B3sI")
_TABLE = struct.Struct("<B7sQ")
_INLINE, _BY_REFERENCE = 0, 1


@dataclass(frozen=True, slots=True)
class Head:
    """What a take says about itself; all that a listing of snapshots reads.

    ``created_ms`` is the commit time in milliseconds since the epoch, ``parent`` the take that this process last took
    or restored. Sizes are in bytes: ``state_nbytes`` of the state, ``new_nbytes`` raw bytes of chunks that the store
    did not hold, ``reused_nbytes`` raw bytes of those that it held, ``stored_nbytes`` what was put for the new ones.
    """

    take_id: str
    store_id: str
    created_ms: int
    parent: str | None
    world_size: int
    state_nbytes: int
    new_nbytes: int
    reused_nbytes: int
    stored_nbytes: int
    num_chunks: int
    num_new_chunks: int
    num_blobs: int
    library: str
    user_metadata: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The head section.

        Raises:
            ValueError: a value that no head can hold, or more than ``MAX_HEAD_NBYTES`` of them.
        """
        if not user_metadata_fits(self.user_metadata):
            raise ValueError(
                f"user metadata above {MAX_USER_METADATA_NBYTES} bytes, or not of a head's kinds, does not fit into it"
            )
        packed = bounded.pack([getattr(self, name) for name in _HEAD_FIELDS])
        if len(packed) > MAX_HEAD_NBYTES:
            raise ValueError(f"a head of {len(packed)} bytes, more than {MAX_HEAD_NBYTES}")
        try:
            unpacked = Head.unpack(packed, "head")
        except FormatError as error:
            raise ValueError(str(error)) from error
        if unpacked.user_metadata.keys() != self.user_metadata.keys():
            raise ValueError("user metadata must have text keys")
        return packed

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Head:
        """Read and check a head section.

        Raises:
            FormatError: it is not one.
        """
        if len(data) > MAX_HEAD_NBYTES:
            raise FormatError(f"{where}: a head of {len(data)} bytes, more than {MAX_HEAD_NBYTES}")
        with bounded.reading(where):
            reader = bounded.FieldReader(data, where)
            num_fields = reader.array("head")
            if num_fields < len(_HEAD_FIELDS):
                reader.fail(f"{num_fields} of {len(_HEAD_FIELDS)} fields")
            take_id, store_id = reader.text("take id", 64), reader.text("store id", 64)
            created_ms = reader.integer("commit time")
            parent = reader.text_or_none("parent", 64)
            numbers = {name: reader.integer(name) for name in _HEAD_NUMBERS}
            library = reader.text("library version", 64)
            user_metadata = reader.plain("user metadata")
            # a later minor version may say more; what it says is none of our business, but it must be sound
            for _ in range(num_fields - len(_HEAD_FIELDS)):
                reader.plain("a later field")
            reader.finish()
        if not is_id(take_id) or not (parent is None or is_id(parent)):
            raise FormatError(f"{where}: {take_id!r} or its parent {parent!r} is no take id")
        if not store_id.isascii() or not store_id.isprintable() or not store_id:
            raise FormatError(f"{where}: {store_id!r} is no store id")
        if not isinstance(user_metadata, dict):
            raise FormatError(f"{where}: the user metadata is no map")
        return cls(take_id, store_id, created_ms, parent, library=library, user_metadata=user_metadata, **numbers)


_HEAD_NUMBERS = (
    "world_size", "state_nbytes", "new_nbytes", "reused_nbytes", "stored_nbytes", "num_chunks", "num_new_chunks",
    "num_blobs",
)  # fmt: skip
_HEAD_FIELDS = ("take_id", "store_id", "created_ms", "parent", *_HEAD_NUMBERS, "library", "user_metadata")
"""The head's array, in the order of the file. Later fields are appended; readers pass over those they do not know."""


def user_metadata_fits(user_metadata: Mapping[str, Any]) -> bool:
    """Whether this user metadata may stand in the head: it is small, and comes back from there as it is.

    A take stores everything else as an entry.
    """
    metadata = dict(user_metadata)
    return _is_kept_by_head(metadata) and len(bounded.pack(metadata)) <= MAX_USER_METADATA_NBYTES


def _is_kept_by_head(value: object, depth: int = bounded.MAX_PLAIN_DEPTH - 1) -> bool:
    """Whether a head gives a value back: a tuple would become a list, and a date is nothing to it.

    What is a number or a text by inheritance comes back as that: metrics are numpy's floats more often than not.
    """
    if isinstance(value, (dict, list)) and type(value) in (dict, list):
        is_known = isinstance(value, list) or all(type(key) is str for key in value)
        items = value.values() if isinstance(value, dict) else value
        return is_known and depth > 0 and all(_is_kept_by_head(item, depth - 1) for item in items)
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 64
    return value is None or isinstance(value, (float, str, bytes))


@dataclass(frozen=True, slots=True)
class Envelope:
    """The chunk tables of a manifest, in the order in which entries count them."""

    algorithm: int
    tables: tuple[ChunkTable | TableReference, ...]

    def table(self, index: int, load_table: LoadTable, where: str = "manifest") -> ChunkTable:
        """One table, fetched if it is a reference. Not cached.

        Raises:
            FormatError: a table blob is damaged.
            IndexError: there is no such table.
        """
        table = self.tables[index]
        if isinstance(table, ChunkTable):
            return table
        data = load_table(table.key)
        if len(data) != table.nbytes or digest_of(data) != table.digest:
            raise FormatError(f"{where}: table blob {table.key} is damaged ({len(data)} of {table.nbytes} bytes)")
        return ChunkTable.unpack(data, f"{where}: table blob {table.key}")

    def iter_tables(self, load_table: LoadTable, where: str = "manifest") -> Iterator[ChunkTable]:
        """Every table, one after the other."""
        for index in range(len(self.tables)):
            yield self.table(index, load_table, where)

    def all_keys(self, load_table: LoadTable, where: str = "manifest") -> set[str]:
        """Every blob that the manifest needs: of chunks, of their bases, and the table blobs themselves.

        Raises:
            FormatError: a table blob is damaged; whatever ``load_table`` raises.
        """
        keys = {table.key for table in self.tables if isinstance(table, TableReference)}
        for table in self.iter_tables(load_table, where):
            keys.update(table.keys)
        return keys

    def pack(self) -> bytes:
        """The envelope section.

        Raises:
            ValueError: a reference that no manifest can hold.
        """
        parts = [_ENVELOPE.pack(self.algorithm, bytes(3), len(self.tables))]
        for table in self.tables:
            kind = _INLINE if isinstance(table, ChunkTable) else _BY_REFERENCE
            body = table.pack() if isinstance(table, ChunkTable) else pack_reference(table)
            parts += (_TABLE.pack(kind, bytes(7), len(body)), body)
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Envelope:
        """Read and check an envelope section, except for what stands in table blobs.

        Raises:
            NewerFormatError: a table's version or digest algorithm is unknown.
            FormatError: anything else is wrong.
        """
        check_host()
        if len(data) < _ENVELOPE.size:
            raise FormatError(f"{where}: an envelope of {len(data)} bytes")
        algorithm, zeros, num_tables = _ENVELOPE.unpack_from(data)
        if algorithm != XXH3_128:
            raise NewerFormatError(f"{where}: digest algorithm {algorithm} is unknown; upgrade torchsnapshot")
        if any(zeros) or num_tables * _TABLE.size > len(data):
            raise FormatError(f"{where}: the envelope claims {num_tables} tables")
        view = memoryview(data)
        position = _ENVELOPE.size
        tables: list[ChunkTable | TableReference] = []
        for index in range(num_tables):
            name = f"{where}: table {index}"
            if len(data) - position < _TABLE.size:
                raise FormatError(f"{name}: cut short")
            kind, zeros, nbytes = _TABLE.unpack_from(data, position)
            position += _TABLE.size
            if any(zeros) or nbytes > len(data) - position:
                raise FormatError(f"{name}: claims {nbytes} of the {len(data) - position} bytes that are left")
            body = view[position : position + nbytes]
            position += nbytes
            if kind not in (_INLINE, _BY_REFERENCE):
                raise NewerFormatError(f"{name}: unknown kind {kind}; upgrade torchsnapshot")
            tables.append(ChunkTable.unpack(body, name) if kind == _INLINE else unpack_reference(body, name))
        if position != len(data):
            raise FormatError(f"{where}: {len(data) - position} bytes behind the last table")
        return cls(algorithm, tuple(tables))


class ManifestFile:
    """A whole manifest; each section is checked and read when it is first asked for.

    Args:
        data: all of its bytes.
        where: which manifest this is, for messages.

    Raises:
        NewerFormatError: the envelope's version is not ours.
        FormatError: the header is wrong, or bytes are missing or too many.
    """

    def __init__(self, data: bytes, where: str = "manifest") -> None:
        self.where = where
        self._data = data
        self.header: Header = parse_header(data, where, whole=True)

    @property
    def nbytes(self) -> int:
        """The manifest's size in bytes."""
        return len(self._data)

    def check_digests(self) -> None:
        """Compare every section with its digest, undecoded; ``FormatError`` where one is damaged."""
        for section in self.header.sections:
            check_section(self._data, section, self.where)

    @cached_property
    def head(self) -> Head:
        """What the take says about itself."""
        return _read_head(self._data, self.header, self.where)

    @cached_property
    def envelope(self) -> Envelope:
        """The chunk tables; readable whatever the flags are."""
        section = self.header.section(SectionType.ENVELOPE, self.where)
        return Envelope.unpack(read_section(self._data, section, self.where), f"{self.where}: envelope")

    @property
    def entries(self) -> bytes:
        """The entries section, for ``torchsnapshot.format.entries``.

        Raises:
            NewerFormatError: the manifest uses features that this library does not know.
        """
        unknown = self.header.incompatible & ~KNOWN_INCOMPATIBLE
        if unknown:
            raise NewerFormatError(f"{self.where}: has unknown features (flags {unknown:#x}); upgrade torchsnapshot")
        return read_section(self._data, self.header.section(SectionType.ENTRIES, self.where), self.where)


def _read_head(data: bytes | memoryview, header: Header, where: str) -> Head:
    section = header.section(SectionType.HEAD, where)
    # so that one ranged read of HEAD_READ_NBYTES is always enough
    if section.offset + section.stored_nbytes > HEAD_READ_NBYTES or section.codec != SectionCodec.RAW:
        raise FormatError(f"{where}: the head is not within the first {HEAD_READ_NBYTES} bytes, uncompressed")
    return Head.unpack(read_section(data, section, where), f"{where}: head")


def read_head(data: bytes | memoryview, where: str = "manifest") -> Head:
    """The head of a manifest of which the first ``HEAD_READ_NBYTES`` bytes (or all) are there.

    Raises:
        NewerFormatError, FormatError: see ``ManifestFile``.
    """
    return _read_head(data, parse_header(data, where, whole=False), where)


def read_envelope(data: bytes, where: str = "manifest") -> Envelope:
    """The envelope of a whole manifest. Raises as ``ManifestFile`` does."""
    return ManifestFile(data, where).envelope


def read_entries(data: bytes, where: str = "manifest") -> bytes:
    """The entries section of a whole manifest. Raises as ``ManifestFile.entries`` does."""
    return ManifestFile(data, where).entries


def pack_manifest(
    head: Head,
    tables: Sequence[ChunkTable | TableReference],
    entries: bytes,
    *,
    incompatible: int = 0,
    compatible: int = 0,
) -> bytes:
    """Build a manifest.

    Args:
        head: what the take says about itself.
        tables: the chunk tables, in the order in which the entries count them.
        entries: the entries section, from ``torchsnapshot.format.entries.pack_entries``.
        incompatible: flags of features that a reader of the entries must know.
        compatible: flags of features that a reader may ignore.

    Raises:
        ValueError: a value that no manifest can hold.
    """
    return join_manifest(head, pack_body(tables, entries), incompatible, compatible)


def pack_body(tables: Sequence[ChunkTable | TableReference], entries: bytes) -> list[PackedSection]:
    """All sections of a manifest but its head; see ``pack_manifest``."""
    envelope = Envelope(XXH3_128, tuple(tables)).pack()
    return [pack_section(SectionType.ENVELOPE, envelope), pack_section(SectionType.ENTRIES, entries)]


def join_manifest(head: Head, body: Sequence[PackedSection], incompatible: int = 0, compatible: int = 0) -> bytes:
    """Build a manifest of what ``pack_body`` gave; see ``pack_manifest``."""
    return join_sections([pack_section(SectionType.HEAD, head.pack()), *body], incompatible, compatible)
