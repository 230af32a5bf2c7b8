"""docs/format.md says enough: a reader written from it alone agrees with the library."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
import read_format
import torch
from manifest_samples import PARENT, TAKE, chunk, delta, entries, head, manifest, reference_to, refs, table_of

from torchsnapshot.chunks.codecs import Effort, encode_bytes
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    ShardEntry,
    Span,
    TensorEntry,
    ValueEntry,
    pack_entries,
    pack_trees,
    span_columns,
    unpack_entries,
)
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.placements import REPLICATE, Placement, Sharding
from torchsnapshot.state.values import encode
from torchsnapshot.store.container import digest_of
from torchsnapshot.store.envelope import ChunkRef, ChunkTableBuilder, Form, pack_manifest
from torchsnapshot.store.keys import BlobKey
from torchsnapshot.store.records import Config


def no_blobs(key: str) -> bytes:
    """Stands for a store that must not be asked."""
    raise AssertionError(f"nobody should fetch {key}")


def test_it_imports_nothing_of_the_library() -> None:
    """The reader stands on its own."""
    text = Path(read_format.__file__).read_text()
    assert "import torchsnapshot" not in text
    assert "from torchsnapshot" not in text


def test_heads_agree() -> None:
    """Every field of the head is found under its name."""
    found = read_format.read_head(read_format.read_sections(manifest())[read_format.HEAD])
    assert found == {name: getattr(head(), name) for name in read_format.HEAD_FIELDS}


def as_ref(table: read_format.Table, index: int) -> ChunkRef:
    """A row as the library's own type."""
    row = table.rows[index]
    base = None if row["base"] == read_format.NO_BASE else as_ref(table, row["base"])
    size = table.blob_sizes[row["blob"]]
    form = Form(row["form"])
    return ChunkRef(
        row["digest"], row["size"], row["key"], size, row["offset"], row["stored"], form, row["width"], base
    )


def test_tables_agree() -> None:
    """Rows and keys of inline tables and of table blobs are read alike."""
    inline, table = table_of(*refs()), table_of(delta(1, delta(2, chunk(3))), chunk(4))
    reference = reference_to(table)
    data = pack_manifest(head(), (inline, reference), b"")
    section = read_format.read_sections(data)[read_format.ENVELOPE]
    tables, needed = read_format.read_envelope(section, {reference.key: table.pack()}.__getitem__)
    for ours, theirs in zip((inline, table), tables, strict=True):
        assert [as_ref(theirs, index) for index in range(len(ours))] == list(ours.iter_refs())
        assert theirs.keys == list(ours.keys)
    assert needed == {*inline.keys, *table.keys, reference.key}


def as_fields(entry: Entry) -> dict[str, Any]:
    """An entry of the library as the reader returns it."""

    def span(of: Span | None) -> list[int]:
        return [] if of is None else [of.table, of.first, of.count]

    if isinstance(entry, ContainerEntry):
        return {
            "record": 0, "kind": entry.kind, "count": len(entry.keys), "keys": list(entry.keys), "extra": entry.extra
        }  # fmt: skip
    if isinstance(entry, ValueEntry):
        return {"record": 1, "data": entry.data, "span": span(entry.span), "size": entry.nbytes}
    if isinstance(entry, OpaqueEntry):
        name = entry.type_name
        return {"record": 3, "type_name": name, "data": entry.data, "span": span(entry.span), "size": entry.nbytes}
    if isinstance(entry, ShardedTensorEntry):
        sharding = entry.sharding
        return {
            "record": 4, "dtype": entry.dtype, "shape": list(entry.shape), "cell": list(entry.cell),
            "mesh": (list(sharding.mesh_shape), list(sharding.mesh_ranks)),
            "placements": [
                number
                for placement in sharding.placements or ()
                for number in (0 if placement.dim is None else placement.dim + 1, placement.split_factor)
            ],
            "order": list(sharding.order or ()),
            "boxes": b"" if sharding.boxes is None else array("Q", [
                number for held in sharding.boxes
                for number in (len(held), *(number for box in held for number in (*box.offsets, *box.sizes)))
            ]).tobytes(),
            "tables": list(memoryview(entry.tables).cast("I")), "firsts": list(memoryview(entry.firsts).cast("I")),
            "wrapper": ("tensor", "parameter", "buffer", "numpy").index(entry.wrapper),
            "requires_grad": entry.requires_grad, "size": entry.nbytes,
        }  # fmt: skip
    return {
        "record": 2,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "permutation": list(entry.permutation or ()),
        "cell": list(entry.cell),
        "shards": [
            [*span(shard.span), [number for box in shard.boxes for number in (*box.offsets, *box.sizes)]]
            for shard in entry.shards
        ],
        "data": entry.inline,
        "wrapper": ("tensor", "parameter", "buffer", "numpy").index(entry.wrapper),
        "requires_grad": entry.requires_grad,
        "size": entry.nbytes,
    }


def test_entries_agree() -> None:
    """Every kind of entry is found under its path, with all its fields, in the same order."""
    found = read_format.read_entries(read_format.read_sections(manifest())[read_format.ENTRIES])
    assert found == {path: as_fields(entry) for path, entry in entries().items()}
    assert list(found) == list(entries())


class Store:
    """Blobs in memory, written with the library's codec and table."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.builder = ChunkTableBuilder()

    def put(self, raw: bytes, width: int, form: Form, base: tuple[ChunkRef, bytes] | None = None) -> ChunkRef:
        """Store one chunk in that form."""
        stored: bytes | None = raw
        if form is not Form.RAW:
            stored = encode_bytes(memoryview(raw), width, Effort.SMALLEST, base and memoryview(base[1]))
        assert stored is not None
        digest = digest_of(raw)
        key = str(BlobKey(digest, TAKE, 3, ("", ".z", ".d")[form]))
        self.blobs[key] = stored
        return ChunkRef(
            digest, len(raw), key, len(stored), 0, len(stored), form, 1 if form is Form.RAW else width,
            base[0] if base else None,
        )  # fmt: skip


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_tensors_agree(form: Form, dtype: torch.dtype) -> None:
    """A tensor that the library cut and encoded is put together again, bit for bit."""
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(64, 96, generator=generator).mul(7).to(dtype)
    itemsize = tensor.element_size()
    cell = (16, 96)
    store = Store()
    raw = tensor.view(torch.uint8).numpy().tobytes()
    boxes = [Box((0, 0), (24, 96)), Box((24, 0), (40, 96))]
    found = []
    for box in boxes:
        start = box.offsets[0] * 96 * itemsize
        for piece in grid.cut(box, cell, itemsize):
            data = raw[start + piece.offset : start + piece.offset + piece.nbytes]
            base = None
            if form is Form.DELTA:
                other = bytes(byte ^ (index % 5 == 0) for index, byte in enumerate(data))
                base = (store.put(other, itemsize, Form.RAW), other)
            found.append(store.put(data, itemsize, form, base))
    shard = ShardEntry(tuple(boxes), Span(0, store.builder.add(found), len(found)))
    entry = TensorEntry("x", (96, 64), (1, 0), cell, (shard,), None, "tensor", False, len(raw))
    data = pack_manifest(head(), (store.builder.build(),), pack_entries({"0/a": entry}))
    sections = read_format.read_sections(data)
    tables, _ = read_format.read_envelope(sections[read_format.ENVELOPE], no_blobs)
    read = read_format.read_entries(sections[read_format.ENTRIES])["0/a"]
    assert read_format.read_tensor(read, tables, itemsize, store.blobs.__getitem__) == raw


def test_boxes_are_placed() -> None:
    """Boxes that split several dimensions are put where they belong."""
    raw = random.Random(0).randbytes(8 * 12)
    store = Store()
    shards = []
    for row in (0, 5):
        for column in (0, 7):
            box = Box((row, column), (3 if row else 5, 5 if column else 7))
            box_bytes = b"".join(
                raw[12 * at + column : 12 * at + column + box.sizes[1]] for at in range(row, row + box.sizes[0])
            )
            chunks = [
                store.put(box_bytes[piece.offset : piece.offset + piece.nbytes], 1, Form.RAW)
                for piece in grid.cut(box, (2, 12), 1)
            ]
            shards.append(ShardEntry((box,), Span(0, store.builder.add(chunks), len(chunks))))
    entry = TensorEntry("uint8", (8, 12), None, (2, 12), tuple(shards), None, "tensor", False, 96)
    data = pack_manifest(head(), (store.builder.build(),), pack_entries({"0/a": entry}))
    sections = read_format.read_sections(data)
    tables, _ = read_format.read_envelope(sections[read_format.ENVELOPE], no_blobs)
    read = read_format.read_entries(sections[read_format.ENTRIES])["0/a"]
    assert read_format.read_tensor(read, tables, 1, store.blobs.__getitem__) == raw


SHARDINGS = [
    Sharding((2, 3), tuple(range(6)), (REPLICATE, Placement(0))),
    Sharding((3, 2), tuple(range(6)), (Placement(0), Placement(1))),
    Sharding((2, 2), tuple(range(4)), (Placement(0), Placement(0))),
    Sharding((3, 2), tuple(range(6)), (Placement(0, 2), Placement(0))),
    Sharding((3, 2), tuple(range(6)), (Placement(0, 2), Placement(0)), (1, 0)),
    Sharding((2, 2), tuple(range(4)), (Placement(1, 3), REPLICATE)),
    Sharding((2, 2), tuple(range(4)), (Placement(1, 3), Placement(0, 2))),
    Sharding((1,), (7,), (REPLICATE,)),
    Sharding((9,), tuple(range(9)), (Placement(0),)),
    Sharding(
        (3,), (4, 5, 6), None, None,
        ((Box((0, 0), (2, 5)), Box((0, 5), (7, 6))), (), (Box((2, 0), (5, 5)),)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_tensors_agree(sharding: Sharding) -> None:
    """What the ranks of a mesh have stored is put together again, whatever the sharding."""
    shape, cell = (7, 11), (2, 11)
    tensor = torch.arange(77, dtype=torch.int16).reshape(shape)
    store = Store()
    spans = []
    for boxes in sharding.regions(shape):
        chunks = []
        for box in boxes:
            part = tensor[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
            raw = part.contiguous().view(torch.uint8).numpy().tobytes()
            chunks += [
                store.put(raw[piece.offset : piece.offset + piece.nbytes], 2, Form.RAW)
                for piece in grid.cut(box, cell, 2)
            ]
        spans.append(Span(0, store.builder.add(chunks), len(chunks)) if boxes else None)
    entry = ShardedTensorEntry("int16", shape, cell, sharding, *span_columns(spans), "tensor", False, 154)
    data = pack_manifest(head(), (store.builder.build(),), pack_entries({"3/a": entry}))
    sections = read_format.read_sections(data)
    tables, _ = read_format.read_envelope(sections[read_format.ENVELOPE], no_blobs)
    read = read_format.read_entries(sections[read_format.ENTRIES])["3/a"]
    assert read_format.read_sharded(read, tables, 2, store.blobs.__getitem__) == tensor.numpy().tobytes()


def test_trees_of_many_ranks_agree() -> None:
    """Trees that differ in leaves, in whole subtrees and in their app_state keys are read as the library does."""

    def leaf(number: int) -> ValueEntry:
        return ValueEntry(bytes([number]), None, 1)

    common: dict[str, Entry] = {
        "model": ContainerEntry("dict", ("a", "b", "c")), "model/a": leaf(1), "model/b": ContainerEntry("list", (0, 1)),
        "model/b/0": leaf(2), "model/b/1": leaf(3), "model/c": leaf(4), "extra": leaf(5),
    }  # fmt: skip
    shorter = {path: entry for path, entry in common.items() if path != "model/b/1"}
    shorter["model/b"] = ContainerEntry("list", (0,))
    trees: dict[int, dict[str, Entry]] = {
        0: common,
        1: {**common, "model/c": leaf(9)},
        2: shorter,
        3: common,
        4: {path: entry for path, entry in common.items() if path != "extra"},
        5: {**common, "more": leaf(7)},
        6: {"other": leaf(8)},
    }
    section = pack_trees(trees)
    assert section.count(b"model") == 3
    found = read_format.read_entries(section)
    expected = {f"{rank}/{path}": as_fields(entry) for rank, tree in trees.items() for path, entry in tree.items()}
    assert found == expected
    assert list(found) == list(unpack_entries(section))


def test_values_agree() -> None:
    """Plain values are read as the page says, inline and in chunks."""
    attributed: OrderedDict[str, int] = OrderedDict(a=1)
    attributed._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    value = {
        "a": [1, 2.5, None, True, b"x"],
        3: (1, "two"),
        "huge": 1 << 90,
        "deque": deque([1, 2], maxlen=5),
        "complex": 1 + 2j,
        "dtype": torch.float16,
        "ordered": attributed,
    }
    data = encode(value)
    expected = {
        "a": [1, 2.5, None, True, b"x"],
        3: (2, [None, 1, "two"]),
        "huge": 1 << 90,
        "deque": (5, [{"maxlen": 5}, 1, 2]),
        "complex": (33, [1.0, 2.0]),
        "dtype": (38, "float16"),
        "ordered": (7, [{"attributes": {"_metadata": {"": {"version": 2}}}}, "a", 1]),
    }
    inline = {"data": data, "span": []}
    assert read_format.read_value(inline, [], no_blobs) == expected
    store = Store()
    parts = [store.put(data[:50], 1, Form.RAW), store.put(data[50:], 1, Form.RAW)]
    store.builder.add(parts)
    table = read_format.read_table(store.builder.build().pack())
    assert read_format.read_value({"data": None, "span": [0, 0, 2]}, [table], store.blobs.__getitem__) == expected


def test_config_agrees() -> None:
    """The store's config is the record that the page describes."""
    found = read_format.read_record(Config(PARENT, 1 << 20).pack())
    assert found == {
        "kind": "config", "store_id": PARENT, "chunk_nbytes": 1 << 20, "algorithm": 1, "gc_level": 1, "writer_level": 1
    }  # fmt: skip
