"""Chunk tables that stand in blobs of their own: how a manifest names one.

What doesn't live here: the tables' bytes (``tables``), and fetching them (``envelope``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torchsnapshot.errors import FormatError
from torchsnapshot.store.keys import SUFFIXES, BlobKey, parse_blob_key
from torchsnapshot.store.tables import MAX_RANK

_REFERENCE = struct.Struct("<16s12sIIB3s")

MAX_TABLE_NBYTES = 256 << 20
"""The most bytes that a table blob may have."""


@dataclass(frozen=True, slots=True)
class TableReference:
    """A chunk table that stands in a blob of its own; ``digest`` is that of the blob's bytes, and part of its key."""

    key: str
    nbytes: int
    digest: bytes


def pack_reference(reference: TableReference) -> bytes:
    """The bytes of a reference.

    Raises:
        ValueError: one that no manifest can hold.
    """
    key = parse_blob_key(reference.key)
    if key is None or key.digest != reference.digest:
        raise ValueError(f"{reference.key!r} is not the key of a table blob with that digest")
    if not _is_table_size(reference.nbytes):
        raise ValueError(f"table blob {reference.key} has {reference.nbytes} bytes")
    suffix = SUFFIXES.index(key.suffix)
    return _REFERENCE.pack(key.digest, bytes.fromhex(key.take_id), key.rank, reference.nbytes, suffix, bytes(3))


def unpack_reference(body: memoryview, where: str) -> TableReference:
    """Read and check a reference.

    Raises:
        FormatError: it is none.
    """
    if len(body) != _REFERENCE.size:
        raise FormatError(f"{where}: a reference of {len(body)} bytes")
    digest, take, rank, nbytes, suffix, zeros = _REFERENCE.unpack(body)
    if rank > MAX_RANK or suffix >= len(SUFFIXES) or any(zeros) or not _is_table_size(nbytes):
        raise FormatError(f"{where}: not a reference to a table blob")
    return TableReference(str(BlobKey(digest, take.hex(), rank, SUFFIXES[suffix])), nbytes, digest)


def _is_table_size(nbytes: int) -> bool:
    return 1 <= nbytes <= MAX_TABLE_NBYTES
