"""Container, head, envelope and chunk tables: what is packed comes back, and what breaks a rule is refused."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_samples import PARENT, TAKE, chunk, delta, digest, head, manifest, reference_to, refs, table_of

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.store import bounded, container
from torchsnapshot.store.container import SectionType, digest_of, pack_container, parse_header
from torchsnapshot.store.envelope import (
    HEAD_READ_NBYTES,
    MAX_HEAD_NBYTES,
    MAX_USER_METADATA_NBYTES,
    ChunkRef,
    ChunkTable,
    ChunkTableBuilder,
    Envelope,
    Form,
    Head,
    ManifestFile,
    TableReference,
    pack_manifest,
    read_entries,
    read_envelope,
    read_head,
    user_metadata_fits,
)


def no_tables(key: str) -> bytes:
    """Stands for a store that must not be asked."""
    raise AssertionError(f"nobody should fetch {key}")


def test_manifest_comes_back() -> None:
    """Head, tables and entries that were packed are read again, from the manifest as a whole."""
    table = table_of(*refs())
    data = pack_manifest(head(), (table,), b"entries")
    file = ManifestFile(data)
    assert file.head == head()
    assert file.envelope.tables == (table,)
    assert file.entries == b"entries" == read_entries(data)
    assert read_envelope(data).tables == (table,)
    assert file.nbytes == len(data)


def test_head_is_in_the_first_bytes() -> None:
    """One ranged read of HEAD_READ_NBYTES gives the head, whatever else the manifest holds."""
    largest = head(user_metadata={"notes": "x" * (MAX_USER_METADATA_NBYTES - 20)})
    data = pack_manifest(largest, [table_of(*(chunk(number) for number in range(3000)))], b"e" * 100_000)
    assert len(data) > HEAD_READ_NBYTES
    assert read_head(data[:HEAD_READ_NBYTES]) == largest
    assert len(largest.pack()) <= MAX_HEAD_NBYTES


def test_first_byte_is_no_text() -> None:
    """A manifest begins with a byte that no text begins with."""
    assert manifest()[0] >= 0x80


def test_same_content_has_same_bytes() -> None:
    """Packing the same manifest twice gives the same bytes."""
    assert manifest() == manifest()


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)
plain_values = st.recursive(
    scalars | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=20), plain_values, max_size=6))
@settings(deadline=None)
def test_user_metadata_comes_back(metadata: dict[str, object]) -> None:
    """User metadata of plain values comes back as it was."""
    if user_metadata_fits(metadata):
        packed = head(user_metadata=metadata).pack()
        assert Head.unpack(packed, "head").user_metadata == metadata


def test_user_metadata_may_hold_nan() -> None:
    """A loss that is not a number is user metadata like any other."""
    packed = head(user_metadata={"loss": math.nan}).pack()
    assert math.isnan(Head.unpack(packed, "head").user_metadata["loss"])


@pytest.mark.parametrize(
    "fields",
    [
        {"user_metadata": {"notes": "x" * MAX_USER_METADATA_NBYTES}},
        {"user_metadata": {1: "a key that is no text"}},
        {"user_metadata": {"huge": 1 << 64}},
        {"take_id": "no take id"},
        {"parent": "0123"},
        {"store_id": ""},
        {"state_nbytes": -1},
        {"num_chunks": 1 << 63},
        {"library": "x" * 65},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_head_refuses_what_it_cannot_hold(fields: dict[str, object]) -> None:
    """A head that could not be read again is not written."""
    with pytest.raises((ValueError, TypeError)):
        head(**fields).pack()


def test_head_of_a_later_version_may_say_more() -> None:
    """Fields behind those that this library knows are passed over."""
    packed = bytearray(head().pack())
    assert packed[0] == 0x90 + 14
    packed[0] += 1
    assert Head.unpack(bytes(packed) + bounded.pack({"new": [1, 2]}), "head") == head()


def test_newer_envelope_is_refused_with_the_cure() -> None:
    """An unknown envelope version is an error that says to upgrade, for the head too."""
    data = bytearray(manifest())
    struct.pack_into("<H", data, 8, 2)
    header_nbytes = struct.unpack_from("<I", data, 20)[0]
    data[header_nbytes - 16 : header_nbytes] = digest_of(data[: header_nbytes - 16])
    for read in (read_head, read_envelope, read_entries):
        with pytest.raises(NewerFormatError, match="upgrade torchsnapshot"):
            read(bytes(data))


def test_incompatible_flags_stop_readers_of_entries_only() -> None:
    """gc and ls read a manifest with features that they do not know; restore refuses it."""
    data = manifest(incompatible=4)
    assert read_head(data) == head()
    assert len(read_envelope(data).tables) == 1
    with pytest.raises(NewerFormatError, match="0x4"):
        read_entries(data)


def test_compatible_flags_stop_nobody() -> None:
    """Features that a reader may ignore are ignored."""
    data = manifest(compatible=0xFFFF_FFFF)
    assert ManifestFile(data).header.compatible == 0xFFFF_FFFF
    assert read_entries(data)


def test_unknown_sections_are_passed_over() -> None:
    """A section of a type that this library does not know disturbs nobody."""
    parts = [
        (SectionType.HEAD, head().pack()),
        (SectionType.ENVELOPE, Envelope(1, ()).pack()),
        (SectionType.ENTRIES, b"e"),
    ]
    data = pack_container([*parts, (77, b"from the future" * 100)], 0, 0)  # type: ignore[list-item]
    assert ManifestFile(data).entries == b"e"


def test_missing_section_is_an_error() -> None:
    """A manifest without one of its sections says which."""
    data = pack_container([(SectionType.HEAD, head().pack())], 0, 0)
    assert read_head(data) == head()
    with pytest.raises(FormatError, match="no envelope section"):
        read_envelope(data)


def test_two_sections_of_one_type_are_an_error() -> None:
    """Which of two heads counts is no question that a reader may be asked."""
    data = pack_container([(SectionType.HEAD, head().pack())] * 2, 0, 0)
    with pytest.raises(FormatError, match="two sections"):
        parse_header(data, "manifest", whole=True)


def test_big_endian_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that would misread the columns says so, whatever it is asked to do with a manifest."""
    data = manifest()
    table = table_of(chunk(1)).pack()
    monkeypatch.setattr(container, "_BIG_ENDIAN", True)
    for use in (lambda: ManifestFile(data), lambda: read_head(data), lambda: ChunkTable.unpack(table), manifest):
        with pytest.raises((FormatError, ValueError), match="big-endian"):
            use()


# --- chunk tables


@st.composite
def chunk_refs(draw: st.DrawFn) -> ChunkRef:
    """A chunk of any form, a delta with one or two bases; every blob has the same size wherever it is named."""
    number = draw(st.integers(0, 40))
    nbytes = 64 + number
    form = draw(st.sampled_from(Form))
    if form is Form.DELTA:
        base = chunk(100 + number, nbytes)
        return delta(number, delta(200 + number, base) if draw(st.booleans()) else base)
    stored = nbytes if form is Form.RAW else draw(st.integers(1, 150))
    return chunk(
        number, nbytes, draw(st.sampled_from(["", ".z", ".p"])), blob_nbytes=300,
        offset=draw(st.integers(0, 300 - stored)), stored_nbytes=stored, form=form, width=draw(st.integers(1, 255)),
    )  # fmt: skip


@given(st.lists(st.lists(chunk_refs(), max_size=5), max_size=5))
@settings(deadline=None)
def test_table_comes_back(spans: list[list[ChunkRef]]) -> None:
    """Every span of chunks comes back from its rows, with its bases, and the keys are complete."""
    everything = [ref for span in spans for ref in span]
    builder = ChunkTableBuilder()
    firsts = [builder.add(span) for span in spans]
    table = ChunkTable.unpack(builder.build().pack())
    for first, span in zip(firsts, spans, strict=True):
        assert table.refs(first, len(span)) == span
        assert table.digests(first, len(span)) == [ref.digest for ref in span]
        assert table.nbytes(first, len(span)) == sum(ref.nbytes for ref in span)
    needed = set()
    for ref in everything:
        link: ChunkRef | None = ref
        while link is not None:
            needed.add(link.key)
            link = link.base
    assert set(table.keys) == needed
    assert len(table.keys) == len(needed) == len(table.blob_nbytes)
    assert [table.key(index) for index in range(len(needed))] == list(table.keys)
    assert set(table.iter_refs()) >= set(everything)
    assert ChunkTable.unpack(table.pack()) == table


def test_bases_stand_behind_the_rows() -> None:
    """The closure of the bases is part of the table, each base once, behind the rows that were added."""
    base = chunk(1)
    between = delta(2, base)
    table = table_of(delta(3, between), delta(4, between), chunk(5))
    assert len(table) == 5
    assert table.ref(0).base == table.ref(1).base == between
    assert table.refs(3, 2) == [between, base]


def test_empty_table_comes_back() -> None:
    """A state without chunks has a table without rows."""
    table = ChunkTable.unpack(table_of().pack())
    assert (len(table), list(table.keys), list(table.iter_refs()), table.digests(0, 0)) == (0, [], [], [])


def test_table_cannot_be_asked_for_other_rows() -> None:
    """Rows outside the table are an IndexError, never a wrong slice."""
    table = table_of(chunk(1), chunk(2))
    for ask in (table.refs, table.digests, table.nbytes):
        for first, count in ((0, 3), (3, 0), (-1, 1), (1, -1)):
            with pytest.raises(IndexError):
                ask(first, count)
    for row in (-1, 2):
        with pytest.raises(IndexError):
            table.ref(row)


def test_chains_of_bases_end_at_depth_eight() -> None:
    """Eight bases one behind the other are allowed, nine are refused."""
    ref = chunk(0)
    for number in range(1, 9):
        ref = delta(number, ref)
    table = table_of(ref)
    assert table.ref(0) == ref
    with pytest.raises(ValueError, match="deeper than 8"):
        table_of(delta(9, ref))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (chunk(1, key="../../etc/passwd"), "no blob can be named"),
        (chunk(1, digest=b"short"), "digest of 5 bytes"),
        (chunk(1, 0), "empty"),
        (chunk(1, (1 << 30) + 1), "empty or has more"),
        (chunk(1, offset=1), "beyond the end"),
        (chunk(1, stored_nbytes=4095), "own size"),
        (chunk(1, form=Form.DELTA), "needs a base"),
        (chunk(1, base=chunk(2)), "needs a base"),
        (delta(1, chunk(2, blob_nbytes=9000)), "does not fill its blob"),
        (delta(1, chunk(2))._replace(nbytes=5000), "differ in size"),
        (chunk(1, 100, form=Form.ENCODED, stored_nbytes=70_000, blob_nbytes=70_000), "far more"),
        (chunk(1, width=0), "width is 0"),
        (chunk(1, width=256, form=Form.ENCODED), "out of range"),
        (chunk(1, blob_nbytes=1 << 32), "no blob can be named"),
        (chunk(1, offset=-1), "out of range"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_builder_refuses_what_no_table_can_hold(broken: ChunkRef, message: str) -> None:
    """A chunk that could not be read again is not written."""
    with pytest.raises(ValueError, match=message):
        table_of(broken)


def test_builder_refuses_two_sizes_of_one_blob() -> None:
    """A blob has one size."""
    with pytest.raises(ValueError, match="two sizes"):
        table_of(chunk(1), chunk(1, blob_nbytes=5000))


def test_very_wide_elements_of_raw_chunks_are_let_through() -> None:
    """Only a codec reads the width, so a raw chunk of wide elements (numpy's texts) is stored with width 1."""
    assert table_of(chunk(1, width=400)).ref(0).width == 1


# --- tables in blobs of their own


def test_table_blob_is_fetched_and_checked() -> None:
    """A table by reference is fetched by its key, and only the very bytes that were referenced are accepted."""
    table = table_of(*refs())
    reference = reference_to(table)
    envelope = read_envelope(pack_manifest(head(), (table_of(chunk(9)), reference), b""))
    assert envelope.tables == (table_of(chunk(9)), reference)
    blobs = {reference.key: table.pack()}
    assert envelope.table(1, blobs.__getitem__) == table
    for damaged in (table.pack()[:-1], table.pack() + b"\0", bytes(len(table.pack())), b""):
        with pytest.raises(FormatError, match="damaged"):
            envelope.table(1, lambda key, damaged=damaged: damaged)  # type: ignore[misc]


def test_all_keys_name_every_blob() -> None:
    """What gc must keep: chunks, bases, packs, and the table blobs themselves."""
    inline, table = table_of(delta(1, chunk(2))), table_of(*refs())
    reference = reference_to(table)
    envelope = read_envelope(pack_manifest(head(), (inline, reference), b""))
    keys = envelope.all_keys({reference.key: table.pack()}.__getitem__)
    assert keys == {*inline.keys, *table.keys, reference.key}
    assert chunk(2).key in keys
    assert read_envelope(manifest()).all_keys(no_tables) == set(table.keys)


def test_table_blob_never_nests() -> None:
    """An envelope is no table blob: what a reference leads to is a table and nothing else."""
    data = Envelope(1, (reference_to(table_of(chunk(1))),)).pack()
    reference = TableReference(f"{digest_of(data).hex()}-{TAKE}-0.t", len(data), digest_of(data))
    envelope = Envelope(1, (reference,))
    with pytest.raises(FormatError, match="chunk table"):
        envelope.all_keys(lambda key: data)


@pytest.mark.parametrize(
    "reference",
    [
        TableReference(f"{digest(1).hex()}-{PARENT}-0.t", 100, digest(2)),
        TableReference("../tables/1.t", 100, digest(1)),
        TableReference(f"{digest(1).hex()}-{PARENT}-0.t", 0, digest(1)),
        TableReference(f"{digest(1).hex()}-{PARENT}-0.t", 1 << 30, digest(1)),
    ],
)
def test_reference_must_be_sound(reference: TableReference) -> None:
    """A reference names a blob by its own digest, with a size that a table can have."""
    with pytest.raises(ValueError):
        pack_manifest(head(), (reference,), b"")


# --- compression


@given(st.binary(max_size=300), st.integers(1, 3000))
@settings(deadline=None)
def test_sections_come_back_compressed_or_not(content: bytes, times: int) -> None:
    """Any bytes survive as a section, and a writer keeps to the ratio that readers accept."""
    data = pack_manifest(head(), (), content * times)
    assert read_entries(data) == content * times


def test_sections_that_compress_too_well_are_stored_as_they_are() -> None:
    """So that a reader may bound what it allocates by what it was given."""
    raw = bytes(10 << 20)
    data = pack_manifest(head(), (), raw)
    assert len(data) > len(raw)
    assert read_entries(data) == raw
