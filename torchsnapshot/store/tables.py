"""Chunk tables: which chunks there are and where their bytes lie, as packed little-endian columns.

What lives here: one chunk as a value (``ChunkRef``), the table that holds many of them, and its bytes. What doesn't:
the manifest around it (``envelope``), tensors, I/O.

Invariants of a table, checked when it is unpacked, before anything of the size that it claims is allocated:

- It is complete in itself: the keys of all blobs that its rows name, and the rows of all bases, however deep.
- Every stored range lies inside its blob. A raw chunk is stored in exactly its own size.
- A delta has a base of the same raw size that fills its blob (members of packs are no bases). Chains of bases end
  after at most ``MAX_DEPTH`` steps; no other form has a base.

The columns stay what they are, views of one piece of bytes; a ``ChunkRef`` is made when somebody asks for it.
"""

from __future__ import annotations

import itertools
import operator
import struct
from array import array
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.store.container import DIGEST_NBYTES, check_host
from torchsnapshot.store.keys import SUFFIXES, parse_blob_key

XXH3_128 = 1
"""The only digest algorithm so far: canonical (big-endian) xxh3_128 of a chunk's raw bytes."""

MAX_CHUNK_NBYTES = 1 << 30
MAX_STORED_OVERHEAD = 64 << 10
"""A stored chunk may be this much longer than its raw bytes, not more."""

MAX_DEPTH = 8
"""How many bases one behind the other a reader follows."""

MAX_RANK = 999_999_999
NO_BASE = 0xFFFF_FFFF

_MAGIC = b"\x89TSTABL\n"
_VERSION = 1
_HEADER = struct.Struct("<8sHBBII12s")
_TAKE_NBYTES = 12
_KEY_NBYTES = DIGEST_NBYTES + _TAKE_NBYTES + 4 + 4 + 1
_ROW_NBYTES = DIGEST_NBYTES + 5 * 4 + 1 + 1


class Form(IntEnum):
    """How a chunk's bytes are stored."""

    RAW = 0
    ENCODED = 1
    DELTA = 2


class ChunkRef(NamedTuple):
    """Where one chunk's bytes are: a byte range of a blob, how it is stored, and what its raw bytes are.

    ``nbytes`` is the raw size, ``stored_nbytes`` the size of the range in the blob, ``width`` the element width in
    bytes that the codec split into planes (1 = none), ``base`` the chunk that a delta is against (None for other
    forms). ``blob_nbytes`` is the size of the whole blob. (A tuple: those are made fastest, and a restore makes one
    for each chunk.)
    """

    digest: bytes
    nbytes: int
    key: str
    blob_nbytes: int
    offset: int = 0
    stored_nbytes: int = 0
    form: Form = Form.RAW
    width: int = 1
    base: ChunkRef | None = None


class ChunkTable:
    """The rows of a chunk table and the keys of their blobs. Made by ``unpack`` or by a ``ChunkTableBuilder``."""

    __slots__ = (
        "_base", "_blob", "_data", "_digest", "_form", "_key_digest", "_key_rank", "_key_suffix", "_key_take", "_keys",
        "_nbytes", "_num_keys", "_num_rows", "_offset", "_stored", "_width", "algorithm", "blob_nbytes",
    )  # fmt: skip

    algorithm: int
    blob_nbytes: Sequence[int]
    """The size in bytes of each key's blob."""

    def __init__(self, data: bytes, algorithm: int, num_keys: int, num_rows: int) -> None:
        """Slice the columns; ``data`` must have been measured. Callers use ``unpack``."""
        self._data = data
        self.algorithm = algorithm
        self._num_keys = num_keys
        self._num_rows = num_rows
        self._keys: list[str] | None = None
        view = memoryview(data)
        ends = itertools.accumulate(
            [_HEADER.size]
            + [num_keys * size for size in (DIGEST_NBYTES, _TAKE_NBYTES, 4, 4, 1)]
            + [num_rows * size for size in (DIGEST_NBYTES, 4, 4, 4, 4, 4, 1, 1)]
        )
        columns = [view[start:end] for start, end in itertools.pairwise(ends)]
        self._key_digest, self._key_take = columns[0], columns[1]
        self._key_rank, self.blob_nbytes = columns[2].cast("I"), columns[3].cast("I")
        self._key_suffix, self._digest = columns[4], columns[5]
        self._nbytes, self._blob, self._offset = columns[6].cast("I"), columns[7].cast("I"), columns[8].cast("I")
        self._stored, self._base = columns[9].cast("I"), columns[10].cast("I")
        self._form, self._width = columns[11], columns[12]

    @classmethod
    def unpack(cls, buffer: bytes | memoryview, where: str = "chunk table") -> ChunkTable:
        """Read and check a table.

        Args:
            buffer: all of its bytes.
            where: which table this is, for messages.

        Raises:
            NewerFormatError: a version or digest algorithm that this library does not know.
            FormatError: anything else is wrong.
        """
        check_host()
        if len(buffer) < _HEADER.size:
            raise FormatError(f"{where}: {len(buffer)} bytes are no chunk table")
        magic, version, algorithm, zero, num_keys, num_rows, zeros = _HEADER.unpack_from(buffer)
        if magic != _MAGIC or zero or any(zeros):
            raise FormatError(f"{where}: does not begin like a chunk table")
        if version != _VERSION:
            raise NewerFormatError(f"{where}: table version {version}, known is {_VERSION}; upgrade torchsnapshot")
        if algorithm != XXH3_128:
            raise NewerFormatError(f"{where}: digest algorithm {algorithm} is unknown; upgrade torchsnapshot")
        if len(buffer) != _HEADER.size + num_keys * _KEY_NBYTES + num_rows * _ROW_NBYTES:
            raise FormatError(f"{where}: {num_keys} keys and {num_rows} rows do not fit {len(buffer)} bytes")
        table = cls(bytes(buffer), algorithm, num_keys, num_rows)
        table._check_keys(where)
        table._check_rows(where)
        table._check_bases(where)
        return table

    def pack(self) -> bytes:
        """The table's bytes, as they stand in an envelope or in a table blob."""
        return self._data

    def __len__(self) -> int:
        return self._num_rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkTable) and self._data == other._data

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"ChunkTable({self._num_rows} chunks in {self._num_keys} blobs)"

    @property
    def keys(self) -> Sequence[str]:
        """The blob keys, in the order of the key table; made once, when first asked for."""
        return self._make_keys()

    def key(self, index: int) -> str:
        """One blob key, without making all of them."""
        if self._keys is not None:
            return self._keys[index]
        digest = self._key_digest[index * DIGEST_NBYTES : (index + 1) * DIGEST_NBYTES].hex()
        take = self._key_take[index * _TAKE_NBYTES : (index + 1) * _TAKE_NBYTES].hex()
        return f"{digest}-{take}-{self._key_rank[index]}{SUFFIXES[self._key_suffix[index]]}"

    def ref(self, row: int) -> ChunkRef:
        """The chunk of one row, its bases resolved.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < self._num_rows:
            raise IndexError(f"row {row} of a chunk table of {self._num_rows}")
        base = self._base[row]
        blob = self._blob[row]
        return ChunkRef(
            bytes(self._digest[row * DIGEST_NBYTES : (row + 1) * DIGEST_NBYTES]),
            self._nbytes[row],
            self.key(blob),
            self.blob_nbytes[blob],
            self._offset[row],
            self._stored[row],
            _FORMS[self._form[row]],
            self._width[row],
            # the depth was bounded when the table was unpacked
            None if base == NO_BASE else self.ref(base),
        )

    def refs(self, first: int, count: int) -> list[ChunkRef]:
        """The chunks of ``count`` rows from ``first``."""
        self._check_range(first, count)
        return [self.ref(row) for row in range(first, first + count)]

    def iter_refs(self) -> Iterator[ChunkRef]:
        """Every row's chunk, the bases' own rows included."""
        self._make_keys()
        return map(self.ref, range(self._num_rows))

    def digests(self, first: int, count: int) -> list[bytes]:
        """The digests of ``count`` rows from ``first``."""
        self._check_range(first, count)
        column = bytes(self._digest[first * DIGEST_NBYTES : (first + count) * DIGEST_NBYTES])
        return [column[start : start + DIGEST_NBYTES] for start in range(0, len(column), DIGEST_NBYTES)]

    def nbytes(self, first: int, count: int) -> int:
        """The raw bytes of ``count`` rows from ``first``, added up."""
        self._check_range(first, count)
        return sum(self._nbytes[first : first + count])

    def _make_keys(self) -> list[str]:
        if self._keys is None:
            digests = _hex(self._key_digest, DIGEST_NBYTES)
            takes = _hex(self._key_take, _TAKE_NBYTES)
            self._keys = [
                f"{digest}-{take}-{rank}{SUFFIXES[suffix]}"
                for digest, take, rank, suffix in zip(digests, takes, self._key_rank, self._key_suffix, strict=True)
            ]
        return self._keys

    def _check_range(self, first: int, count: int) -> None:
        if not 0 <= first <= first + count <= self._num_rows:
            raise IndexError(f"rows {first} to {first + count} of a chunk table of {self._num_rows}")

    def _check_keys(self, where: str) -> None:
        if self._num_keys == 0:
            return
        if max(self._key_suffix) >= len(SUFFIXES):
            raise FormatError(f"{where}: a key has an unknown suffix")
        if max(self._key_rank) > MAX_RANK:
            raise FormatError(f"{where}: a key's rank is above {MAX_RANK}")
        digests = self._key_digest.cast("Q")
        # two keys with one digest (written by two takes) are rare, so the full keys are made only then
        halves = set(zip(digests[::2].tolist(), digests[1::2].tolist(), strict=True))
        if len(halves) != self._num_keys and len(set(self.keys)) != self._num_keys:
            raise FormatError(f"{where}: a blob key stands there twice")

    def _check_rows(self, where: str) -> None:
        if self._num_rows == 0:
            return
        if max(self._blob) >= self._num_keys:
            raise FormatError(f"{where}: a chunk is in blob {max(self._blob)} of {self._num_keys}")
        if min(self._nbytes) < 1 or max(self._nbytes) > MAX_CHUNK_NBYTES or min(self._stored) < 1:
            raise FormatError(f"{where}: a chunk is empty or has more than {MAX_CHUNK_NBYTES} bytes")
        if not set(bytes(self._form)) <= set(map(int, Form)):
            raise NewerFormatError(f"{where}: a chunk is stored in an unknown form; upgrade torchsnapshot")
        if 0 in bytes(self._width):
            raise FormatError(f"{where}: a chunk's element width is 0")
        sizes = self.blob_nbytes
        ends = map(operator.add, self._offset, self._stored)
        if not all(map(operator.le, ends, map(sizes.__getitem__, self._blob))):
            raise FormatError(f"{where}: a chunk reaches beyond the end of its blob")
        excess = map(operator.sub, self._stored, self._nbytes)
        if max(excess) > MAX_STORED_OVERHEAD:
            raise FormatError(f"{where}: a chunk's stored bytes are far more than its raw bytes")
        same = map(operator.eq, self._stored, self._nbytes)
        if not all(map(operator.or_, self._form, same)):
            raise FormatError(f"{where}: a raw chunk is not stored in its own size")

    def _check_bases(self, where: str) -> None:
        forms = bytes(self._form)
        num_deltas = forms.count(Form.DELTA)
        if self._num_rows - sum(map(NO_BASE.__eq__, self._base)) != num_deltas:
            raise FormatError(f"{where}: a delta without a base, or a base of what is no delta")
        if not num_deltas:
            return
        base, nbytes, blob, sizes = self._base, self._nbytes, self._blob, self.blob_nbytes
        depth = bytearray(self._num_rows)
        start = -1
        for _ in range(num_deltas):
            start = forms.index(Form.DELTA, start + 1)
            below = base[start]
            if below >= self._num_rows:
                raise FormatError(f"{where}: the base of row {start} is row {below} of {self._num_rows}")
            if nbytes[below] != nbytes[start]:
                raise FormatError(f"{where}: row {start} and its base differ in size")
            if self._offset[below] or self._stored[below] != sizes[blob[below]]:
                raise FormatError(f"{where}: the base of row {start} does not fill its blob")
            # rows that were measured before are taken at their word, so a chain is walked once
            steps, row = 1, below
            while forms[row] == Form.DELTA and not depth[row]:
                row = base[row]
                steps += 1
                if steps > MAX_DEPTH or row >= self._num_rows:
                    raise FormatError(f"{where}: the bases of row {start} go in a circle or deeper than {MAX_DEPTH}")
            if steps + depth[row] > MAX_DEPTH:
                raise FormatError(f"{where}: the bases of row {start} go deeper than {MAX_DEPTH}")
            depth[start] = steps + depth[row]


class ChunkTableBuilder:
    """Collects chunks in spans of contiguous rows; each blob's key is stored once."""

    def __init__(self) -> None:
        self._keys: dict[str, int] = {}
        self._key_digest = bytearray()
        self._key_take = bytearray()
        self._key_rank = array("I")
        self._key_suffix = bytearray()
        self._blob_nbytes = array("I")
        self._digest = bytearray()
        self._nbytes, self._blob, self._offset = array("I"), array("I"), array("I")
        self._stored, self._base = array("I"), array("I")
        self._form, self._width = bytearray(), bytearray()
        self._bases: list[tuple[int, ChunkRef]] = []

    def __len__(self) -> int:
        return len(self._form)

    def add(self, refs: Sequence[ChunkRef]) -> int:
        """Append chunks, one row each, in their order.

        Returns:
            The first of the new rows (where the next row goes, if there are no chunks).

        Raises:
            ValueError: a ref that no table can hold.
        """
        first = len(self._form)
        for ref in refs:
            self._append(ref)
        return first

    def build(self) -> ChunkTable:
        """Append the closure of the bases, and make the table.

        Raises:
            ValueError: a ref, or a chain of bases, that no table can hold.
        """
        rows: dict[ChunkRef, int] = {}
        # bases of bases are appended to the list while it is walked
        for row, base in self._bases:
            if base not in rows:
                rows[base] = len(self._form)
                self._append(base)
            self._base[row] = rows[base]
        self._bases.clear()
        data = b"".join(
            (
                _HEADER.pack(_MAGIC, _VERSION, XXH3_128, 0, len(self._keys), len(self._form), bytes(12)),
                self._key_digest, self._key_take, self._key_rank, self._blob_nbytes, self._key_suffix,
                self._digest, self._nbytes, self._blob, self._offset, self._stored, self._base,
                self._form, self._width,
            )
        )  # fmt: skip
        try:
            return ChunkTable.unpack(data)
        except FormatError as error:
            raise ValueError(str(error)) from error

    def _append(self, ref: ChunkRef) -> None:
        if len(ref.digest) != DIGEST_NBYTES:
            raise ValueError(f"a digest of {len(ref.digest)} bytes")
        if (ref.base is not None) != (ref.form is Form.DELTA):
            raise ValueError(f"chunk in {ref.key}: a delta needs a base, and nothing else has one")
        blob = self._blob_of(ref.key, ref.blob_nbytes)
        try:
            self._nbytes.append(ref.nbytes)
            self._blob.append(blob)
            self._offset.append(ref.offset)
            self._stored.append(ref.stored_nbytes)
            self._base.append(NO_BASE)
            # only a codec reads the width; wide elements (numpy's texts) are never split into planes
            self._width.append(1 if ref.form is Form.RAW and ref.width > 0xFF else ref.width)
        except (OverflowError, ValueError) as error:
            raise ValueError(f"chunk in {ref.key}: sizes out of range") from error
        self._form.append(ref.form)
        self._digest += ref.digest
        if ref.base is not None:
            self._bases.append((len(self._form) - 1, ref.base))

    def _blob_of(self, key: str, nbytes: int) -> int:
        blob = self._keys.get(key)
        if blob is not None:
            if self._blob_nbytes[blob] != nbytes:
                raise ValueError(f"blob {key} has two sizes, {self._blob_nbytes[blob]} and {nbytes}")
            return blob
        parts = parse_blob_key(key)
        if parts is None or not 0 <= nbytes <= 0xFFFF_FFFF:
            raise ValueError(f"no blob can be named {key!r} and have {nbytes} bytes")
        self._key_digest += parts.digest
        self._key_take += bytes.fromhex(parts.take_id)
        self._key_rank.append(parts.rank)
        self._key_suffix.append(SUFFIXES.index(parts.suffix))
        self._blob_nbytes.append(nbytes)
        self._keys[key] = blob = len(self._keys)
        return blob


_FORMS = tuple(Form)


def _hex(column: memoryview, width: int) -> list[str]:
    """The hex digits of each ``width`` bytes of the column; one pass over all of it is far quicker than many small."""
    return column.hex("-", width).split("-") if len(column) else []
