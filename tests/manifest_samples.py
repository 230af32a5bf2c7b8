"""Small manifests for the tests of the format, made of fixed numbers so that their bytes never differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    span_columns,
)
from torchsnapshot.geometry.grid import Box, whole
from torchsnapshot.geometry.placements import REPLICATE, Placement, Sharding
from torchsnapshot.store import bounded
from torchsnapshot.store.container import digest_of
from torchsnapshot.store.envelope import (
    ChunkRef,
    ChunkTable,
    ChunkTableBuilder,
    Form,
    Head,
    TableReference,
    pack_manifest,
)
from torchsnapshot.store.keys import BlobKey

TAKE = "0123456789abcdef01234567"
PARENT = "89abcdef0123456789abcdef"
STORE = "fedcba9876543210fedcba98"


def digest(number: int) -> bytes:
    """A digest that looks like one."""
    return digest_of(number.to_bytes(8, "little"))


def chunk(number: int, nbytes: int = 4096, suffix: str = "", **fields: Any) -> ChunkRef:
    """A raw chunk that fills a blob of its own, or whatever ``fields`` make of it."""
    content = digest(number)
    key = str(BlobKey(content, TAKE, number % 7, suffix))
    return ChunkRef(content, nbytes, key, nbytes, 0, nbytes)._replace(**fields)


def delta(number: int, base: ChunkRef, stored_nbytes: int = 100) -> ChunkRef:
    """A chunk that is stored as the difference to another one."""
    return chunk(
        number, base.nbytes, ".d", blob_nbytes=stored_nbytes, stored_nbytes=stored_nbytes, form=Form.DELTA, width=4,
        base=base,
    )  # fmt: skip


def table_of(*refs: ChunkRef) -> ChunkTable:
    """A table with these chunks as its first rows."""
    builder = ChunkTableBuilder()
    builder.add(refs)
    return builder.build()


def reference_to(table: ChunkTable) -> TableReference:
    """The reference to a table blob that holds ``table``."""
    data = table.pack()
    content = digest_of(data)
    return TableReference(str(BlobKey(content, PARENT, 1, ".t")), len(data), content)


def head(**fields: Any) -> Head:
    """A head, with ``fields`` changed."""
    return replace(
        Head(TAKE, STORE, 1_700_000_000_000, PARENT, 1, 9000, 5000, 4000, 4500, 6, 4, 3, "1.0", {"step": 100}), **fields
    )


def refs() -> list[ChunkRef]:
    """Six chunks, one of each form, two of them in one pack."""
    pack = chunk(50, suffix=".p").key
    return [
        chunk(1),
        chunk(2, 2048, ".z", blob_nbytes=1500, stored_nbytes=1500, form=Form.ENCODED, width=2),
        delta(3, chunk(4, 2048)),
        chunk(5, 96, key=pack, blob_nbytes=300, offset=0),
        chunk(6, 204, key=pack, blob_nbytes=300, offset=96),
        chunk(7, 20000),
    ]


def entries() -> dict[str, Entry]:
    """Entries of every kind over the chunks of ``refs``."""
    matrix = TensorEntry(
        "float32", (16, 64), (1, 0), (64, 16),
        (ShardEntry((whole((64, 16)),), Span(0, 0, 1)),), None, "parameter", True, 4096,
    )  # fmt: skip
    sharded = TensorEntry(
        "bfloat16", (32, 64), None, (16, 64),
        (ShardEntry((Box((0, 0), (32, 64)),), Span(0, 1, 2)),), None, "tensor", False, 4096,
    )  # fmt: skip
    small = TensorEntry("int64", (), None, (1,), (), bytes(range(8)), "tensor", False, 8)
    packed = TensorEntry(
        "uint8", (300,), None, (96,), (ShardEntry((Box((0,), (96,)),), Span(0, 3, 1)),), None, "buffer", False, 96
    )
    moment = ShardedTensorEntry(
        "float32", (1024,), (512,), Sharding((2, 2), (0, 1, 4, 5), (REPLICATE, Placement(0))),
        *span_columns([Span(0, 1, 1), Span(0, 2, 1)]), "tensor", False, 4096,
    )  # fmt: skip
    boxes = ((Box((0,), (96,)),), (), (Box((96,), (204,)),))
    rows = ShardedTensorEntry(
        "uint8", (300,), (300,), Sharding((3,), (0, 1, 2), None, None, boxes),
        *span_columns([Span(0, 3, 1), None, Span(0, 4, 1)]), "parameter", True, 300,
    )  # fmt: skip
    optim: dict[str, Entry] = {"optim": ContainerEntry("dict", ("moment", "rows")), "optim/moment": moment}
    optim["optim/rows"] = rows
    return {
        "0/model": ContainerEntry("OrderedDict", ("weight", "a/b%", 1, "1", False, 1 << 70), b"\xc0"),
        "0/model/weight": matrix,
        "0/model/a%2Fb%25": sharded,
        "0/model/%i1": small,
        "0/model/1": ValueEntry(b"\x01", None, 1),
        "0/model/False": packed,
        f"0/model/{1 << 70}": ContainerEntry("list", (0, 1)),
        f"0/model/{1 << 70}/0": ValueEntry(None, Span(0, 5, 1), 20000),
        f"0/model/{1 << 70}/1": OpaqueEntry("somewhere.Thing", b"\x80\x04N.", None, 4),
        "0/extra": ValueEntry(b"\xc0", None, 1),
        **{f"0/{path}": entry for path, entry in optim.items()},
        "1/extra": ContainerEntry("dict", ()),
        **{f"1/{path}": entry for path, entry in optim.items()},
    }


def one_tree(records: bytes, num_records: int) -> bytes:
    """An entries section of one whole tree, rank 0's, with any records."""
    return bounded.pack([1, 0, 0, 1]) + bounded.pack([bytes(4), None, [], num_records, records])


def manifest(**fields: Any) -> bytes:
    """A whole manifest with entries of every kind."""
    return pack_manifest(head(), (table_of(*refs()),), pack_entries(entries()), **fields)
