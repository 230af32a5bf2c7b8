"""The records of the *entries* section: packing, and total validation on reading.

What lives here: one record's layout, and streams of them (docs/format.md has it field by field). What doesn't: the
section, which holds a stream for each tree (``entry_section``), the records of sharded tensors (``entry_shardings``),
the entries themselves (``entry_kinds``), what a dtype's bytes mean (``state.tensors``), plain values
(``state.values``).

Records stand depth-first, parents first; a container's keys give the names of its children, so a stream stores no
other name than those of its roots, and a child that is missing, twice there or out of place cannot be written down.

Invariants of entries that were read: shapes, cells, boxes and permutations fit one another, every span has as many
rows as the grid cuts from its boxes, and no size is above what the format allows. Nothing was allocated that the
section's own size does not justify: neither a list nor a path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torchsnapshot.errors import NewerFormatError
from torchsnapshot.format.entry_kinds import (
    MAX_PATH_NCHARS,
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
    component_of,
    is_place,
)
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.store import bounded

MAX_DEPTH = 256
MAX_DIMS = 64
MAX_DIM = 1 << 48
MAX_NUMEL = 1 << 62
MAX_INLINE_NBYTES = 16 << 10
MAX_WIDE_KEY_NBYTES = 512

_CONTAINER, _VALUE, _TENSOR, _OPAQUE, _SHARDED = range(5)
_NUM_FIELDS = {_CONTAINER: 5, _VALUE: 4, _TENSOR: 10, _OPAQUE: 5, _SHARDED: 2}
_TENSOR_HEAD = bytes([0x90 | _NUM_FIELDS[_TENSOR], _TENSOR])
_PATHS_FREE_NCHARS = 1 << 20
_PATHS_RATIO = 64
# a structured type of numpy is described by JSON
MAX_NAME_NCHARS = 16 << 10
_WORD_INTS = range(-(1 << 63), 1 << 64)
"""What msgpack's own ints hold; keys outside stand as bytes."""

NumberOf = Callable[[ShardedTensorEntry], int]


def pack_record(entry: Entry, number_of: NumberOf) -> bytes:
    """One record.

    Args:
        entry: what it holds.
        number_of: where a sharded tensor stands among those of the section.

    Raises:
        ValueError: an entry that no manifest can hold.
    """
    try:
        return _pack_entry(entry, number_of)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _pack_entry(entry: Entry, number_of: NumberOf) -> bytes:
    if isinstance(entry, ShardedTensorEntry):
        return bounded.pack([_SHARDED, number_of(entry)])
    if isinstance(entry, ContainerEntry):
        numbered = all(type(key) is int and key == index for index, key in enumerate(entry.keys))
        keys = b"" if numbered else b"".join(map(_pack_key, entry.keys))
        return bounded.pack([_CONTAINER, entry.kind, len(entry.keys), keys, entry.extra])
    if isinstance(entry, ValueEntry):
        return bounded.pack([_VALUE, entry.data, _span_fields(entry.span), entry.nbytes])
    if isinstance(entry, OpaqueEntry):
        return bounded.pack([_OPAQUE, entry.type_name, entry.data, _span_fields(entry.span), entry.nbytes])
    shards = [
        [*_span_fields(shard.span), [number for box in shard.boxes for number in (*box.offsets, *box.sizes)]]
        for shard in entry.shards
    ]
    return bounded.pack(
        [
            _TENSOR, entry.dtype, entry.shape, entry.permutation or (), entry.cell, shards, entry.inline,
            WRAPPERS.index(entry.wrapper), entry.requires_grad, entry.nbytes,
        ]
    )  # fmt: skip


def _pack_key(key: Key) -> bytes:
    if isinstance(key, int) and key not in _WORD_INTS:
        return bounded.pack(key.to_bytes(key.bit_length() // 8 + 1, "little", signed=True))
    return bounded.pack(key)


def _span_fields(span: Span | None) -> tuple[int, ...]:
    return () if span is None else (span.table, span.first, span.count)


def unpack_records(
    data: bytes, num_records: int, sharded: Sequence[ShardedTensorEntry], where: str
) -> dict[str, dict[str, Entry]]:
    """Read and check a stream of records.

    Args:
        data: all of its bytes.
        num_records: how many there are.
        sharded: the sharded tensors of the section.
        where: which tree of which manifest this is, for messages.

    Returns:
        For each path that stands in the stream, in its order: the entries there and below, depth-first, parents first.

    Raises:
        NewerFormatError: an entry of a kind that this library does not know.
        FormatError: anything else is wrong.
    """
    with bounded.reading(where):
        reader = bounded.FieldReader(data, where)
        if num_records > reader.left:
            reader.fail(f"claims {num_records} entries")
        found = _Unpacking(reader, num_records, sharded).run()
        reader.finish()
    return found


class _Unpacking:
    """One run over records: which places are still to come, and what may still be allocated."""

    def __init__(self, reader: bounded.FieldReader, num_records: int, sharded: Sequence[ShardedTensorEntry]) -> None:
        self._reader = reader
        self._num_records = num_records
        self._sharded = sharded
        self._nchars_left = _PATHS_FREE_NCHARS + _PATHS_RATIO * reader.left
        # places whose records are still to come, the next one last, each with how deep it lies
        self._pending: list[tuple[str, int]] = []
        self._found: dict[str, dict[str, Entry]] = {}

    def run(self) -> dict[str, dict[str, Entry]]:
        entries: dict[str, Entry] = {}
        for num_read in range(self._num_records):
            if not self._pending:
                entries = self._begin()
            path, depth = self._pending.pop()
            entry = _unpack_entry(self._reader, path, self._sharded)
            entries[path] = entry
            if isinstance(entry, ContainerEntry):
                self._expect(path, entry, depth + 1, self._num_records - num_read - 1)
        if self._pending:
            self._reader.fail(f"{len(self._pending)} entries of containers are missing")
        return self._found

    def _begin(self) -> dict[str, Entry]:
        path = self._reader.text("path", MAX_PATH_NCHARS)
        if not is_place(path):
            self._reader.fail(f"{path!r:.200} is not the path of an app_state key, or of a place below one")
        if path in self._found:
            self._reader.fail(f"{path!r:.200} stands there twice")
        self._spend(len(path))
        self._pending.append((path, path.count("/")))
        self._found[path] = {}
        return self._found[path]

    def _expect(self, path: str, entry: ContainerEntry, depth: int, num_left: int) -> None:
        if depth > MAX_DEPTH:
            self._reader.fail(f"{path!r:.200} is nested deeper than {MAX_DEPTH}")
        if len(self._pending) + len(entry.keys) > num_left:
            self._reader.fail(f"the container at {path!r:.200} claims more children than there are entries")
        components = component_of(entry.keys)
        longest = len(path) + 1 + max(map(len, components), default=0)
        if longest > MAX_PATH_NCHARS:
            self._reader.fail(f"a path below {path!r:.200} has more than {MAX_PATH_NCHARS} characters")
        self._spend((len(path) + 1) * len(components) + sum(map(len, components)))
        self._pending.extend((f"{path}/{component}", depth) for component in reversed(components))

    def _spend(self, nchars: int) -> None:
        # a path is made of its parents' names, so without a limit few bytes could make very long ones
        self._nchars_left -= nchars
        if self._nchars_left < 0:
            self._reader.fail("the paths are far longer than what names them")


def _unpack_entry(reader: bounded.FieldReader, path: str, sharded: Sequence[ShardedTensorEntry]) -> Entry:
    if reader.starts_with(_TENSOR_HEAD):
        record = reader.item()
        entry = usual_tensor(record)
        if entry is not None:
            return entry
        reader = reader.part(record)
    num_fields = reader.array("entry")
    kind = reader.integer("kind", 1 << 32) if num_fields else -1
    if kind not in _NUM_FIELDS:
        raise NewerFormatError(f"{reader.what}: {path!r:.200} is of unknown kind {kind}; upgrade torchsnapshot")
    if num_fields != _NUM_FIELDS[kind]:
        reader.fail(f"{path!r:.200} has {num_fields} fields")
    if kind == _TENSOR:
        return _unpack_tensor(reader, path)
    if kind == _CONTAINER:
        return _unpack_container(reader, path)
    if kind == _SHARDED:
        number = reader.integer("sharded tensor", 1 << 32)
        if number >= len(sharded):
            reader.fail(f"{path!r:.200} is sharded tensor {number} of {len(sharded)}")
        return sharded[number]
    type_name = reader.text("type name", MAX_NAME_NCHARS) if kind == _OPAQUE else ""
    data = reader.binary_or_none("inline bytes")
    span = _unpack_span(reader)
    nbytes = reader.integer("size", MAX_NUMEL)
    if (data is None) == (span is None):
        reader.fail(f"{path!r:.200} must stand either inline or in chunks")
    if data is not None and (len(data) != nbytes or nbytes > MAX_INLINE_NBYTES):
        reader.fail(f"{path!r:.200} has {len(data)} inline bytes, not {nbytes} (at most {MAX_INLINE_NBYTES})")
    return ValueEntry(data, span, nbytes) if kind == _VALUE else OpaqueEntry(type_name, data, span, nbytes)


def _unpack_container(reader: bounded.FieldReader, path: str) -> ContainerEntry:
    kind = reader.text("container kind", MAX_NAME_NCHARS)
    count = reader.integer("number of keys")
    if count > reader.left:
        reader.fail(f"{path!r:.200} claims {count} keys")
    packed = reader.binary("keys")
    extra = reader.binary("extra")
    if not packed:
        return ContainerEntry(kind, tuple(range(count)), extra)
    keys_reader = bounded.FieldReader(packed, f"{reader.what}: keys of {path!r:.200}")
    keys = tuple([_unpack_key(keys_reader) for _ in range(count)])
    keys_reader.finish()
    # 1 and True are one key of a dict
    if len(set(keys)) != count:
        reader.fail(f"{path!r:.200} has a key twice")
    return ContainerEntry(kind, keys, extra)


def _unpack_key(reader: bounded.FieldReader) -> Key:
    key = reader.scalar("key", (str, int, bool, bytes))
    if isinstance(key, bytes):
        if len(key) > MAX_WIDE_KEY_NBYTES:
            reader.fail(f"an int of {len(key)} bytes")
        number = int.from_bytes(key, "little", signed=True)
        if number in _WORD_INTS or len(key) != number.bit_length() // 8 + 1:
            reader.fail("an int that is written longer than it must be")
        return number
    result: Key = key
    return result


def _unpack_span(reader: bounded.FieldReader) -> Span | None:
    numbers = reader.integers("span", 3, 1 << 32)
    if not numbers:
        return None
    if len(numbers) != 3 or not numbers[2]:
        reader.fail("a span is [table, first row, number of rows]")
    return Span(*numbers)


def _unpack_tensor(reader: bounded.FieldReader, path: str) -> TensorEntry:
    dtype = reader.text("dtype", MAX_NAME_NCHARS)
    shape = reader.integers("shape", MAX_DIMS, MAX_DIM)
    permutation = reader.integers("permutation", MAX_DIMS, MAX_DIMS)
    cell = reader.integers("cell", MAX_DIMS, MAX_DIM)
    num_dims = max(1, len(shape))
    shards = tuple([_unpack_shard(reader, num_dims) for _ in range(reader.array("shards"))])
    inline = reader.binary_or_none("inline bytes")
    wrapper = reader.integer("wrapper", 1 << 32)
    if wrapper >= len(WRAPPERS):
        raise NewerFormatError(f"{reader.what}: {path!r:.200} has the unknown wrapper {wrapper}; upgrade torchsnapshot")
    requires_grad = reader.boolean("requires_grad")
    nbytes = reader.integer("size", MAX_NUMEL)
    if prod(shape) >= MAX_NUMEL:
        reader.fail(f"{path!r:.200} has too many elements: {shape}")
    if permutation and sorted(permutation) != list(range(len(shape))):
        reader.fail(f"{path!r:.200}: {permutation} does not permute the dimensions of {shape}")
    if len(cell) != num_dims or 0 in cell:
        reader.fail(f"{path!r:.200}: {cell} is no cell for the shape {shape}")
    if inline is not None and (shards or len(inline) != nbytes or nbytes > MAX_INLINE_NBYTES):
        reader.fail(f"{path!r:.200} has {len(inline)} inline bytes, not {nbytes} (at most {MAX_INLINE_NBYTES})")
    if inline is None and not shards and nbytes:
        reader.fail(f"{path!r:.200} has {nbytes} bytes, but neither inline bytes nor chunks")
    entry = TensorEntry(
        dtype, shape, permutation or None, cell, shards, inline, WRAPPERS[wrapper], requires_grad, nbytes
    )
    _check_shards(reader, path, entry)
    return entry


def _unpack_shard(reader: bounded.FieldReader, num_dims: int) -> ShardEntry:
    if reader.array("shard") != 4:
        reader.fail("a shard is [table, first row, number of rows, boxes]")
    span = Span(reader.integer("table", 1 << 32), reader.integer("row", 1 << 32), reader.integer("rows", 1 << 32))
    length = reader.array("boxes")
    if length % (2 * num_dims) or not length:
        reader.fail(f"{length} numbers make no boxes of {num_dims} dimensions")
    boxes = []
    for _ in range(length // (2 * num_dims)):
        numbers = [reader.integer("box", MAX_DIM) for _ in range(2 * num_dims)]
        boxes.append(Box(tuple(numbers[:num_dims]), tuple(numbers[num_dims:])))
    return ShardEntry(tuple(boxes), span)


def _check_shards(reader: bounded.FieldReader, path: str, entry: TensorEntry) -> None:
    memory_shape = entry.memory_shape or (1,)
    for shard in entry.shards:
        for box in shard.boxes:
            for offset, size, dim in zip(box.offsets, box.sizes, memory_shape, strict=True):
                if offset + size > dim:
                    reader.fail(f"{path!r:.200}: the box {box} reaches out of {memory_shape}")
        num_rows = sum(grid.num_pieces(box, entry.cell) for box in shard.boxes)
        if num_rows != shard.span.count:
            reader.fail(f"{path!r:.200}: the grid cuts {num_rows} chunks, the span has {shard.span.count}")


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What tensors of one form have in common: they share it."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None
    cell: tuple[int, ...]
    boxes: tuple[Box, ...]
    num_rows: int


@lru_cache(maxsize=1024)
def _usual_geometry(
    shape: tuple[int, ...], permutation: tuple[int, ...], cell: tuple[int, ...], box: tuple[int, ...]
) -> _Geometry | None:
    """The geometry of a tensor in one box, or in none; None where these ints make none."""
    num_dims = max(1, len(shape))
    if len(cell) != num_dims or len(box) not in (0, 2 * num_dims):
        return None
    numbers = (*cell, *shape, *box)
    if min(numbers) < 0 or max(numbers) >= MAX_DIM or 0 in cell or prod(shape) >= MAX_NUMEL:
        return None
    if permutation and sorted(permutation) != list(range(len(shape))):
        return None
    offsets, sizes = box[:num_dims], box[num_dims:]
    memory_shape = tuple([shape[dim] for dim in permutation] or shape or (1,))
    if any(offset + size > dim for offset, size, dim in zip(offsets, sizes, memory_shape, strict=False)):
        return None
    boxes = (Box(offsets, sizes),) if box else ()
    num_rows = sum(grid.num_pieces(each, cell) for each in boxes)
    return _Geometry(shape, permutation or None, cell, boxes, num_rows)


def usual_tensor(record: bytes) -> TensorEntry | None:
    """A tensor of the usual form: small, in one piece or inline. None where the record is anything else, or wrong.

    That costs a quarter of reading it field by field, which also says what is wrong.
    """
    if record[:2] != _TENSOR_HEAD or len(record) > bounded.SMALL_NBYTES:
        return None
    try:
        fields = bounded.unpack_small(record)
        _, dtype, shape, permutation, cell, shards, inline, wrapper, requires_grad, nbytes = fields
        (table, first, count, box), *others = shards or [(0, 0, 0, [])]
        if set(map(type, (shape, permutation, cell, shards, box))) != {list} or others or bool(box) != bool(shards):
            return None
        if set(map(type, (wrapper, nbytes, table, first, count, *shape, *permutation, *cell, *box))) != {int}:
            return None
        # what is kept for the next one is to be small
        if max(len(shape), len(permutation), len(cell)) > MAX_DIMS or len(box) > 2 * MAX_DIMS:
            return None
        geometry = _usual_geometry(tuple(shape), tuple(permutation), tuple(cell), tuple(box))
    except (ValueError, TypeError):
        return None
    if type(dtype) is not str or type(requires_grad) is not bool or not 0 <= wrapper < len(WRAPPERS):
        return None
    if geometry is None or geometry.num_rows != count or not 0 <= nbytes < MAX_NUMEL:
        return None
    if min(table, first) < 0 or max(table, first, count) >= 1 << 32:
        return None
    if inline is None:
        if bool(nbytes) != bool(shards):
            return None
    elif type(inline) is not bytes or shards or len(inline) != nbytes:
        return None
    span = (ShardEntry(geometry.boxes, Span(table, first, count)),) if shards else ()
    return TensorEntry(
        dtype, geometry.shape, geometry.permutation, geometry.cell, span, inline, WRAPPERS[wrapper], requires_grad,
        nbytes,
    )  # fmt: skip
