"""A reader of the format on storage, written from docs/format.md alone: it imports nothing of the library.

It shows that the page says enough. It is meant to be read beside the page, so it is plain, slow and checks only
digests and what would go wrong silently. ``tests/test_read_format.py`` holds it and the library to the same answers.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash
import zstandard

SUFFIXES = ("", ".z", ".d", ".p", ".t")
NO_BASE = (1 << 32) - 1
HEAD, ENVELOPE, ENTRIES = 1, 2, 3
RAW, ENCODED, DELTA = 0, 1, 2

LoadBlob = Callable[[str], bytes]


def check(data: bytes, digest: bytes) -> None:
    """Compare a digest."""
    if xxhash.xxh3_128_digest(data) != digest:
        raise ValueError("digest does not match")


# --- records (config)


def read_record(data: bytes) -> dict[str, Any]:
    """The map of a record: ``.torchsnapshot/config`` and others."""
    if data[:6] != b"\x89tsr1\n":
        raise ValueError("not a record")
    codec, body = data[6:7], data[23:]
    check(codec + body, data[7:23])
    if codec == b"\1":
        body = zstandard.ZstdDecompressor().decompress(body)
    record: dict[str, Any] = msgpack.unpackb(body)
    return record


# --- manifest


def read_sections(data: bytes) -> dict[int, bytes]:
    """The raw bytes of each section by its type."""
    magic, version, count, incompatible, _, header_nbytes, nbytes = struct.unpack_from("<8sHHIIIQ", data)
    if magic != b"\x89TSNAP\r\n":
        raise ValueError("not a manifest")
    check(data[: header_nbytes - 16], data[header_nbytes - 16 : header_nbytes])
    if version != 1 or incompatible:
        raise ValueError("written by a newer version")
    if nbytes != len(data) or header_nbytes != 32 + 48 * count + 16:
        raise ValueError("cut short")
    sections = {}
    end = header_nbytes
    for index in range(count):
        kind, codec, _, offset, stored, raw, digest = struct.unpack_from("<HB5sQQQ16s", data, 32 + 48 * index)
        if offset != end:
            raise ValueError("sections overlap")
        end += stored
        section = data[offset:end]
        check(section, digest)
        if codec == 1:
            if zstandard.frame_content_size(section) != raw:
                raise ValueError("another size than declared")
            section = zstandard.ZstdDecompressor().decompress(section)
        sections[kind] = section
    return sections


HEAD_FIELDS = (
    "take_id", "store_id", "created_ms", "parent", "world_size", "state_nbytes", "new_nbytes", "reused_nbytes",
    "stored_nbytes", "num_chunks", "num_new_chunks", "num_blobs", "library", "user_metadata",
)  # fmt: skip


def read_head(section: bytes) -> dict[str, Any]:
    """The head's fields by name."""
    return dict(zip(HEAD_FIELDS, msgpack.unpackb(section), strict=False))


# --- envelope and chunk tables


@dataclass
class Table:
    """A chunk table: blob keys with their sizes, and rows."""

    keys: list[str]
    blob_sizes: list[int]
    rows: list[dict[str, Any]]


def blob_key(digest: bytes, take: bytes, rank: int, suffix: int) -> str:
    """A blob's key from its parts."""
    return f"{digest.hex()}-{take.hex()}-{rank}{SUFFIXES[suffix]}"


def read_envelope(section: bytes, load_blob: LoadBlob) -> tuple[list[Table], set[str]]:
    """The chunk tables, those in blobs of their own included, and the keys of all blobs that the snapshot needs."""
    algorithm, _, count = struct.unpack_from("<B3sI", section)
    if algorithm != 1:
        raise ValueError("unknown digest algorithm")
    tables, needed = [], set()
    place = 8
    for _ in range(count):
        kind, _, nbytes = struct.unpack_from("<B7sQ", section, place)
        body = section[place + 16 : place + 16 + nbytes]
        place += 16 + nbytes
        if kind == 1:
            digest, take, rank, size, suffix = struct.unpack_from("<16s12sIIB", body)
            key = blob_key(digest, take, rank, suffix)
            needed.add(key)
            body = load_blob(key)
            check(body, digest)
            if len(body) != size:
                raise ValueError("a table blob is cut short")
        table = read_table(body)
        tables.append(table)
        needed.update(table.keys)
    return tables, needed


def read_table(data: bytes) -> Table:
    """A chunk table."""
    magic, version, algorithm, _, num_keys, num_rows, _ = struct.unpack_from("<8sHBBII12s", data)
    if magic != b"\x89TSTABL\n" or (version, algorithm) != (1, 1):
        raise ValueError("not a chunk table of this version")
    place = 32

    def column(code: str, count: int) -> list[Any]:
        nonlocal place
        size = struct.calcsize("<" + code)
        found = [value for (value,) in struct.iter_unpack("<" + code, data[place : place + size * count])]
        place += size * count
        return found

    digests, takes, ranks = column("16s", num_keys), column("12s", num_keys), column("I", num_keys)
    blob_sizes, suffixes = column("I", num_keys), column("B", num_keys)
    keys = [blob_key(*parts) for parts in zip(digests, takes, ranks, suffixes, strict=True)]
    names = ("digest", "size", "blob", "offset", "stored", "base", "form", "width")
    columns = [column(code, num_rows) for code in ("16s", "I", "I", "I", "I", "I", "B", "B")]
    if place != len(data):
        raise ValueError("a table has other bytes than its counts say")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    for row in rows:
        row["key"] = keys[row["blob"]]
    return Table(keys, blob_sizes, rows)


# --- chunks


def read_chunk(table: Table, index: int, load_blob: LoadBlob) -> bytes:
    """The raw bytes of one row's chunk."""
    row = table.rows[index]
    data = load_blob(row["key"])[row["offset"] : row["offset"] + row["stored"]]
    if row["form"] != RAW:
        base = read_chunk(table, row["base"], load_blob) if row["form"] == DELTA else None
        data = decode_chunk(data, base)
    if len(data) != row["size"]:
        raise ValueError("a chunk of another size")
    check(data, row["digest"])
    return data


def decode_chunk(data: bytes, base: bytes | None) -> bytes:
    """The raw bytes of an encoded chunk or a delta."""
    magic, version, codec, width, flags, size, num_lanes = struct.unpack_from("<4sBBBBQB", data)
    if magic != b"\x89tsc" or (version, codec) != (1, 1):
        raise ValueError("not an encoded chunk of this version")
    count = size // width
    elements = [0] * count
    place = 24 + 8 * num_lanes
    row_length = rotation = 0
    levels: list[int] = []
    if flags & 8:
        row_length, rotation = struct.unpack_from("<IB", data, place)
        num_levels = row_length + count // row_length
        levels = numbers(data[place + 8 : place + 8 + 2 * num_levels], "H")
        place += -(-(8 + 2 * num_levels) // 8) * 8
    for lane in range(num_lanes):
        first, nbytes, method, _, stored = struct.unpack_from("<BBBBI", data, 24 + 8 * lane)
        content = data[place : place + stored]
        place += stored
        if method == 1:
            content = zstandard.ZstdDecompressor().decompress(content)
        for index in range(count):
            part = int.from_bytes(content[index * nbytes : (index + 1) * nbytes], "little")
            elements[index] |= part << (8 * first)
    if flags & 1:
        elements = [element >> 1 | (element & 1) << (8 * width - 1) for element in elements]
    if flags & 2:
        assert base is not None
        others = (int.from_bytes(base[start : start + width], "little") for start in range(0, size, width))
        elements = [element ^ other for element, other in zip(elements, others, strict=True)]
    if flags & 4:
        assert base is not None
        all_ones = (1 << 8 * width) - 1
        others = (int.from_bytes(base[start : start + width], "little") for start in range(0, size, width))
        elements = [
            ((element >> 1 ^ all_ones * (element & 1)) + other) & all_ones
            for element, other in zip(elements, others, strict=True)
        ]
    if flags & 8:
        bits = 8 * width
        turned = [element >> rotation | element << (bits - rotation) for element in elements]
        elements = [
            element + (levels[index % row_length] + levels[row_length + index // row_length] << (bits - 16))
            for index, element in enumerate(turned)
        ]
        elements = [element % (1 << bits) for element in elements]
    return b"".join(element.to_bytes(width, "little") for element in elements)


# --- entries


RECORDS = {
    0: ("kind", "count", "keys", "extra"),
    1: ("data", "span", "size"),
    2: ("dtype", "shape", "permutation", "cell", "shards", "data", "wrapper", "requires_grad", "size"),
    3: ("type_name", "data", "span", "size"),
    4: ("number",),
}
SHARDED = (
    "dtype", "shape", "cell", "mesh", "placements", "order", "boxes", "tables", "firsts", "wrapper", "requires_grad",
    "size",
)  # fmt: skip


def stream_of(data: bytes) -> Any:
    """The msgpack objects in these bytes, one by one."""
    stream = msgpack.Unpacker(unicode_errors="surrogatepass")
    stream.feed(data)
    return stream


def numbers(data: bytes, code: str = "I") -> list[int]:
    """A column of unsigned integers."""
    return [value for (value,) in struct.iter_unpack("<" + code, data)]


def read_entries(section: bytes) -> dict[str, dict[str, Any]]:
    """Each record's fields by its path, with the rank before it; ``record`` is its kind's number."""
    stream = stream_of(section)
    version, num_meshes, num_sharded, num_trees = next(stream)
    if version != 1:
        raise ValueError("written by a newer version")
    meshes = [(shape, numbers(ranks)) for shape, ranks in itertools.islice(stream, num_meshes)]
    sharded = [dict(zip(SHARDED, fields, strict=True)) for fields in itertools.islice(stream, num_sharded)]
    for entry in sharded:
        entry["record"] = 4
        entry["mesh"] = meshes[entry["mesh"]]
        entry["tables"], entry["firsts"] = numbers(entry["tables"]), numbers(entry["firsts"])
    trees: list[dict[str, dict[str, Any]]] = []
    entries: dict[int, dict[str, dict[str, Any]]] = {}
    for ranks, base, removed, count, records in itertools.islice(stream, num_trees):
        changes = read_records(records, count, sharded)
        whole = {} if base is None else trees[base]
        tree = {}
        for path, entry in whole.items():
            if path in changes:
                tree.update(changes[path])
            elif not any(f"{path}/".startswith(f"{place}/") for place in (*changes, *removed)):
                tree[path] = entry
        for place, below in changes.items():
            if place not in whole:
                tree.update(below)
        trees.append(tree)
        entries.update(dict.fromkeys(numbers(ranks), tree))
    return {f"{rank}/{path}": entry for rank in sorted(entries) for path, entry in entries[rank].items()}


def read_records(data: bytes, count: int, sharded: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each path in a stream of records: the records there and below."""
    stream = stream_of(data)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    waiting: list[str] = []
    for _ in range(count):
        if not waiting:
            waiting.append(next(stream))
            found[waiting[0]] = entries = {}
        path = waiting.pop()
        number, *fields = next(stream)
        entry = dict(zip(RECORDS[number], fields, strict=True))
        entry["record"] = number
        if number == 0:
            entry["keys"] = read_keys(entry["keys"], entry["count"])
            names = components(entry["keys"])
            waiting.extend(f"{path}/{name}" for name in reversed(names))
        entries[path] = sharded[entry["number"]] if number == 4 else entry
    if waiting:
        raise ValueError("entries are missing")
    return found


def read_keys(data: bytes, count: int) -> list[Any]:
    """A container's keys."""
    if not data:
        return list(range(count))
    return [int.from_bytes(key, "little", signed=True) if isinstance(key, bytes) else key for key in stream_of(data)]


def components(keys: list[Any]) -> list[str]:
    """How the keys of one container stand in paths."""
    texts = {key for key in keys if isinstance(key, str)}
    names = []
    for key in keys:
        if isinstance(key, str):
            names.append(key.replace("%", "%25").replace("/", "%2F"))
        elif str(key) in texts:
            names.append(("%b" if isinstance(key, bool) else "%i") + str(key))
        else:
            names.append(str(key))
    return names


def pieces(box: list[int], cell: list[int]) -> Iterator[int]:
    """The number of elements of each chunk of a box, in C order."""
    half = len(box) // 2
    segments = []
    for offset, size, step in zip(box[:half], box[half:], cell, strict=True):
        edges = [offset, *range((offset // step + 1) * step, offset + size, step), offset + size]
        segments.append([end - start for start, end in itertools.pairwise(edges)] if size else [])
    for sizes in itertools.product(*segments):
        numel = 1
        for size in sizes:
            numel *= size
        yield numel


def read_tensor(entry: dict[str, Any], tables: list[Table], itemsize: int, load_blob: LoadBlob) -> bytes:
    """The bytes of a tensor that is stored inline or in shards, in memory order."""
    if entry["data"] is not None:
        data: bytes = entry["data"]
        return data
    order = entry["permutation"] or range(len(entry["shape"]))
    shape = [entry["shape"][dim] for dim in order] or [1]
    result = bytearray(entry["size"])
    for number, first, count, boxes in entry["shards"]:
        rows = iter(range(first, first + count))
        for start in range(0, len(boxes), 2 * len(shape)):
            box = boxes[start : start + 2 * len(shape)]
            content = bytearray()
            for numel in pieces(box, entry["cell"]):
                chunk = read_chunk(tables[number], next(rows), load_blob)
                if len(chunk) != numel * itemsize:
                    raise ValueError("a chunk of another size than its piece of the grid")
                content += chunk
            place_box(content, box, shape, itemsize, result)
    return bytes(result)


def cut(held: list[int], places: int, at: int, factor: int) -> list[int]:
    """What one step of a placement leaves of the elements ``held`` along a dimension to the place ``at``."""
    part = -(-len(held) // factor)
    left = []
    for start in range(0, len(held), max(1, part)):
        elements = held[start : start + part]
        chunk = -(-len(elements) // places)
        left += elements[chunk * at : chunk * (at + 1)]
    return left


def intervals(elements: list[int]) -> list[tuple[int, int]]:
    """Offset and size of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for element in elements:
        if runs and element == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((element, 1))
    return runs


def regions(entry: dict[str, Any]) -> list[list[list[int]]]:
    """The boxes of each region of a sharded tensor, in the form in which shards have them."""
    shape = entry["shape"] or [1]
    mesh_shape = entry["mesh"][0]
    if entry["boxes"]:
        found = []
        stream = iter(numbers(entry["boxes"], "Q"))
        for count in stream:
            found.append([list(itertools.islice(stream, 2 * len(shape))) for _ in range(count)])
        return found
    steps = dict(enumerate(zip(entry["placements"][::2], entry["placements"][1::2], strict=True)))
    steps = {mesh_dim: (dim - 1, factor) for mesh_dim, (dim, factor) in steps.items() if dim}
    found = []
    for place in itertools.product(*(range(mesh_shape[mesh_dim]) for mesh_dim in steps)):
        at = dict(zip(steps, place, strict=True))
        held = [list(range(size)) for size in shape]
        for mesh_dim in entry["order"] or steps:
            dim, factor = steps[mesh_dim]
            held[dim] = cut(held[dim], mesh_shape[mesh_dim], at[mesh_dim], 1 if entry["order"] else factor)
        boxes = itertools.product(*map(intervals, held))
        found.append([[offset for offset, _ in box] + [size for _, size in box] for box in boxes])
    return found


def read_sharded(entry: dict[str, Any], tables: list[Table], itemsize: int, load_blob: LoadBlob) -> bytes:
    """The bytes of a whole sharded tensor in C order."""
    shards = []
    for boxes, number, first in zip(regions(entry), entry["tables"], entry["firsts"], strict=True):
        count = sum(1 for box in boxes for _ in pieces(box, entry["cell"]))
        shards.append([number, first, count, [value for box in boxes for value in box]])
    whole = {**entry, "permutation": [], "data": None, "shards": shards}
    return read_tensor(whole, tables, itemsize, load_blob)


def place_box(content: bytearray, box: list[int], shape: list[int], itemsize: int, result: bytearray) -> None:
    """Copy a box, row by row, to where it belongs in the whole tensor."""
    dims = len(shape)
    offsets, sizes = box[:dims], box[dims:]
    row = sizes[-1] * itemsize
    for index, position in enumerate(itertools.product(*(range(size) for size in sizes[:-1]))):
        place = 0
        for dim, at in enumerate((*position, 0)):
            place = place * shape[dim] + offsets[dim] + at
        result[place * itemsize : place * itemsize + row] = content[index * row : (index + 1) * row]


def read_value(entry: dict[str, Any], tables: list[Table], load_blob: LoadBlob) -> Any:
    """A value; what is an extension comes as (code, payload)."""
    data = entry["data"]
    if data is None:
        number, first, count = entry["span"]
        data = b"".join(read_chunk(tables[number], row, load_blob) for row in range(first, first + count))
    return decode_value(data)


def decode_value(data: bytes) -> Any:
    """One encoded value."""

    def extension(code: int, payload: bytes) -> Any:
        return int.from_bytes(payload, "little", signed=True) if code == 32 else (code, decode_value(payload))

    return msgpack.unpackb(data, ext_hook=extension, strict_map_key=False, unicode_errors="surrogatepass")
