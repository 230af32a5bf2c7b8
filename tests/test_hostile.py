"""Damaged and malicious manifests: each gets ``FormatError``, never another exception, never a large allocation."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_samples import TAKE, chunk, delta, digest, entries, head, manifest, one_tree, refs, table_of

from torchsnapshot.errors import FormatError
from torchsnapshot.format import entry_section
from torchsnapshot.format.entries import ContainerEntry, Entry, StoredManifest, ValueEntry, pack_entries, unpack_entries
from torchsnapshot.store import bounded
from torchsnapshot.store.container import SectionType, digest_of, pack_container
from torchsnapshot.store.envelope import (
    HEAD_READ_NBYTES,
    ChunkTable,
    Envelope,
    Head,
    read_entries,
    read_envelope,
    read_head,
)

FEW_NBYTES = 4 << 20
"""What reading a manifest of a few kilobytes may allocate at most."""

HEAD, ENVELOPE, ENTRIES = SectionType.HEAD, SectionType.ENVELOPE, SectionType.ENTRIES


@contextmanager
def little_memory(nbytes: int = FEW_NBYTES) -> Iterator[None]:
    """Nothing in the block may allocate more than ``nbytes`` at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak} bytes were allocated"


def no_tables(key: str) -> bytes:
    """A store without table blobs."""
    raise FormatError(f"no table blob {key}")


def read_all(data: bytes) -> None:
    """Read everything that a manifest holds."""
    stored = StoredManifest(data, no_tables)
    _ = stored.head, stored.entries
    for key in stored.envelope.all_keys(no_tables):
        assert "/" not in key
        assert ".." not in key
    for table in stored.envelope.iter_tables(no_tables):
        assert all(len(ref.digest) == 16 for ref in table.iter_refs())


def refused_or_read(data: bytes) -> bool:
    """Whether the manifest was read; if not, it was by ``FormatError``. Any other exception fails the test."""
    try:
        read_all(data)
    except FormatError:
        return False
    return True


def sections() -> dict[SectionType, bytes]:
    """The raw sections of the sample manifest."""
    table = table_of(*refs())
    return {HEAD: head().pack(), ENVELOPE: Envelope(1, (table,)).pack(), ENTRIES: pack_entries(entries())}


def sealed(parts: dict[SectionType, bytes]) -> bytes:
    """A manifest of these raw sections with all digests right."""
    return pack_container(list(parts.items()), 0, 0)


def forged(lines: list[tuple[int, int, int | None, int | None, bytes]], **fields: int) -> bytes:
    """A manifest of any directory: (type, codec, offset, raw size, stored bytes) each, digests right; None = honest."""
    header_nbytes = 32 + 48 * len(lines) + 16
    offset = header_nbytes
    directory = b""
    for section_type, codec, claimed, raw_nbytes, stored in lines:
        place = offset if claimed is None else claimed
        size = len(stored) if raw_nbytes is None else raw_nbytes
        directory += struct.pack("<HBBIQQQ16s", section_type, codec, 0, 0, place, len(stored), size, digest_of(stored))
        offset += len(stored)
    total = fields.get("nbytes", offset)
    header = struct.pack(
        "<8sHHIIIQ",
        b"\x89TSNAP\r\n",
        1,
        fields.get("count", len(lines)),
        0,
        0,
        fields.get("header", header_nbytes),
        total,
    )
    header += directory
    return header + digest_of(header) + b"".join(line[4] for line in lines)


def test_sample_is_read() -> None:
    """The manifest that these tests break is sound, and forging one honestly gives a sound one."""
    parts = sections()
    assert refused_or_read(manifest())
    assert refused_or_read(sealed(parts))
    assert refused_or_read(forged([(kind, 0, None, None, raw) for kind, raw in parts.items()]))


# --- damage


def test_every_flipped_bit_is_noticed() -> None:
    """One wrong bit anywhere is a FormatError."""
    data = bytearray(manifest())
    with little_memory():
        for place in range(len(data)):
            for bit in range(8):
                data[place] ^= 1 << bit
                with pytest.raises(FormatError):
                    read_all(bytes(data))
                data[place] ^= 1 << bit


def test_every_truncation_is_noticed() -> None:
    """A manifest cut short anywhere, or with bytes behind it, is a FormatError."""
    data = manifest()
    with little_memory():
        for length in range(len(data)):
            with pytest.raises(FormatError):
                read_all(data[:length])
        with pytest.raises(FormatError):
            read_all(data + b"\0")


def test_truncated_heads_are_noticed() -> None:
    """Reading the head needs header and head, and no more than these."""
    data = manifest()
    end = 32 + 3 * 48 + 16 + len(head().pack())
    for length in range(end):
        with pytest.raises(FormatError):
            read_head(data[:length])
    assert read_head(data[:end]) == head()


@pytest.mark.parametrize("section", list(SectionType))
def test_every_changed_byte_under_right_digests(section: SectionType) -> None:
    """With all digests made right again a changed byte gives FormatError or another sound manifest, nothing else."""
    parts = sections()
    raw = bytearray(parts[section])
    with little_memory():
        for place in range(len(raw)):
            before = raw[place]
            for value in {before ^ 1, before ^ 0x80, 0, 0xDD, 0xFF} - {before}:
                raw[place] = value
                refused_or_read(sealed({**parts, section: bytes(raw)}))
            raw[place] = before


@pytest.mark.parametrize("section", list(SectionType))
def test_every_truncated_section_under_right_digests(section: SectionType) -> None:
    """A section that ends early, sealed with right digests, is a FormatError."""
    parts = sections()
    for length in range(len(parts[section])):
        assert not refused_or_read(sealed({**parts, section: parts[section][:length]}))


@given(st.sampled_from(list(SectionType)), st.data())
@settings(deadline=None, max_examples=300)
def test_spliced_sections(section: SectionType, data: st.DataObject) -> None:
    """Bytes cut out, doubled and replaced, under right digests, never raise anything but FormatError."""
    parts = sections()
    raw = parts[section]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 40)))
        raw = raw[:start] + data.draw(st.binary(max_size=12) | st.just(raw[start:end] * 2)) + raw[end:]
    with little_memory():
        refused_or_read(sealed({**parts, section: raw}))


@given(st.binary(max_size=400))
@settings(deadline=None, max_examples=300)
def test_any_bytes_as_anything(data: bytes) -> None:
    """Random bytes are refused by every reader of the format."""
    for read in (read_head, read_envelope, read_entries, unpack_entries, ChunkTable.unpack):
        with pytest.raises(FormatError):
            read(data)
    for unpack in (Head.unpack, Envelope.unpack):
        with pytest.raises(FormatError):
            unpack(data, "anything")


# --- directories


def test_sections_must_follow_one_another() -> None:
    """Sections that overlap, leave a gap, or end elsewhere than the file are refused."""
    parts = list(sections().items())
    honest = [(kind, 0, None, None, raw) for kind, raw in parts]
    start = 32 + 48 * 3 + 16
    for index in range(3):
        for offset in (0, 8, start - 1, start + 1, 1 << 40, (1 << 64) - 1):
            lines = list(honest)
            kind, codec, _, raw_nbytes, stored = lines[index]
            lines[index] = (kind, codec, offset, raw_nbytes, stored)  # type: ignore[assignment]
            with pytest.raises(FormatError, match="overlaps or leaves a gap"):
                read_all(forged(lines))
    for fields in ({"nbytes": 1}, {"count": 2}, {"count": 65535}, {"header": 0}, {"header": 1 << 31}, {"header": 100}):
        assert not refused_or_read(forged(honest, **fields))


def test_many_sections_are_refused() -> None:
    """A directory longer than any version needs is refused, so that the head stays within the first bytes."""
    with pytest.raises(FormatError):
        read_all(forged([(kind, 0, None, None, b"") for kind in range(1, 66)]))


def test_head_must_be_near_and_plain() -> None:
    """A head that one ranged read would miss, or a compressed one, is refused."""
    parts = sections()
    far = [(99, 0, None, None, bytes(HEAD_READ_NBYTES)), *((kind, 0, None, None, raw) for kind, raw in parts.items())]
    packed = zstandard.ZstdCompressor().compress(parts[HEAD])
    compressed = [(HEAD, 1, None, len(parts[HEAD]), packed)]
    for lines in (far, compressed):
        with pytest.raises(FormatError, match="first 8192 bytes"):
            read_head(forged(lines))  # type: ignore[arg-type]


# --- zstd


def with_entries_frame(frame: bytes, raw_nbytes: int) -> bytes:
    """A sound manifest but for its entries: this frame, declared to hold ``raw_nbytes``."""
    parts = sections()
    return forged(
        [
            (HEAD, 0, None, None, parts[HEAD]),
            (ENVELOPE, 0, None, None, parts[ENVELOPE]),
            (ENTRIES, 1, None, raw_nbytes, frame),
        ]
    )


def test_honest_frame_is_read() -> None:
    """The manifest that the next tests break is sound."""
    raw = sections()[ENTRIES]
    assert refused_or_read(with_entries_frame(zstandard.ZstdCompressor().compress(raw), len(raw)))


def test_zstd_bombs_are_refused() -> None:
    """Few bytes that claim to be, or are, very many are refused before they are decompressed."""
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))
    assert len(bomb) < 64 << 10
    raw = sections()[ENTRIES]
    small = zstandard.ZstdCompressor().compress(raw)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, write_content_size=0)
    ).compressobj()
    wide_frame = wide.compress(raw) + wide.flush()
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    cases = [
        (bomb, 256 << 20), (bomb, 1), (bomb, 1 << 63), (bomb, len(bomb)), (bomb, 64 << 10),
        (small, len(raw) + 1), (small, len(raw) - 1), (small, 0), (small, 1 << 40), (small + b"\0", len(raw)),
        (small + small, len(raw)), (small + skippable, len(raw)), (small[:-1], len(raw)), (skippable, 0),
        (skippable, 4), (unsized, len(raw)), (wide_frame, len(raw)), (b"", 0), (b"", 10), (b"no frame", 8),
    ]  # fmt: skip
    manifests = [with_entries_frame(*case) for case in cases]
    with little_memory():
        for data in manifests:
            with pytest.raises(FormatError):
                read_entries(data)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_frames_under_right_digests(data: st.DataObject) -> None:
    """A frame with changed bytes is refused or decompresses to something of its declared size."""
    raw = sections()[ENTRIES] * 3
    frame = bytearray(zstandard.ZstdCompressor().compress(raw))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with little_memory():
        try:
            assert len(read_entries(with_entries_frame(bytes(frame), len(raw)))) == len(raw)
        except FormatError:
            pass


# --- msgpack


ARRAY32, MAP32, BIN32, STR32, EXT32 = (bytes([kind]) + b"\xff\xff\xff\xff" for kind in (0xDD, 0xDF, 0xC6, 0xDB, 0xC9))

plain_trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)

BOMBS = {
    "array32": ARRAY32,
    "map32": MAP32,
    "bin32": BIN32,
    "str32": STR32,
    "ext32": EXT32 + b"\x01",
    "nested arrays": b"\x91" * 5000,
    "nested wide arrays": b"\xdc\x10\x00" * 3000,
    "nested maps": b"\x81\xa1a" * 5000,
    "empty arrays": b"\xdc\xff\xff" + b"\x90" * 5000,
    "extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "empty extension": b"\xc7\x00\x05",
    "timestamp": msgpack.packb(msgpack.Timestamp(1, 1)),
    "empty map": b"\x80",
    "empty array": b"\x90",
    "map": msgpack.packb({"a": 1}),
    "not a number": msgpack.packb(float("nan")),
    "infinity": msgpack.packb(float("inf")),
    "bad UTF-8": b"\xa2\xff\xfe",
    "reserved byte": b"\xc1",
    "negative": b"\xff",
    "large int": b"\xcf" + b"\xff" * 8,
    "nothing": b"",
}


def field_offsets(section: bytes) -> list[tuple[int, int]]:
    """Where each msgpack object of the section begins and ends, arrays counted by their headers alone."""
    unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="surrogatepass")
    unpacker.feed(section)
    places = []
    while unpacker.tell() < len(section):
        start = unpacker.tell()
        first = section[start]
        if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            unpacker.read_array_header()
        elif 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            unpacker.read_map_header()
        else:
            unpacker.skip()
        places.append((start, unpacker.tell()))
    return places


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("section", [HEAD, ENTRIES])
def test_msgpack_bombs(section: SectionType, name: str) -> None:
    """Whatever stands in the place of any field, few bytes never make many, and the error is FormatError."""
    parts = sections()
    raw = parts[section]
    with little_memory():
        for start, end in field_offsets(raw):
            for rest in (raw[end:], b""):
                refused_or_read(sealed({**parts, section: raw[:start] + BOMBS[name] + rest}))


@given(plain_trees)
@settings(deadline=None)
def test_lengths_of_sound_msgpack_pass(value: object) -> None:
    """What msgpack packed passes the check of its lengths; with a byte less or more it doesn't."""
    data = msgpack.packb(value)
    bounded.check_lengths(data, "value")
    for broken in (data[:-1], data + b"\0"):
        with pytest.raises(FormatError, match="value"):
            bounded.check_lengths(broken, "value")


def test_lengths_that_lie_are_refused() -> None:
    """Nested headers that each claim many elements are refused without allocating any."""
    bombs = [(header * (1 << 20))[: 1 << 20] for header in (b"\xdc\xff\xff", b"\xdd\x00\x0f\xff\xff", b"\xde\xff\xff")]
    with little_memory():
        for bomb in bombs:
            with pytest.raises(FormatError):
                bounded.check_lengths(bomb, "value")


@pytest.mark.parametrize(("depth", "fine"), [(15, True), (16, False), (40, False)])
def test_nested_user_metadata_is_bounded(depth: int, fine: bool) -> None:
    """User metadata may be nested 16 deep, its own map included, and no deeper."""
    fields = msgpack.unpackb(head().pack())
    nested: object = 1
    for _ in range(depth):
        nested = [nested]
    fields[-1] = {"a": nested}
    packed = msgpack.packb(fields)
    if fine:
        assert Head.unpack(packed, "head").user_metadata == {"a": nested}
    else:
        with pytest.raises(FormatError, match="nested too deeply"):
            Head.unpack(packed, "head")


def test_duplicate_keys_of_user_metadata_are_refused() -> None:
    """A map with one key twice means different things to different readers."""
    packed = head(user_metadata={"a": 1, "b": 2}).pack()
    assert packed.count(b"\xa1b") == 1
    with pytest.raises(FormatError, match="twice"):
        Head.unpack(packed.replace(b"\xa1b", b"\xa1a"), "head")


def test_number_of_entries_is_no_promise() -> None:
    """A claimed number of entries, keys or rows allocates nothing."""
    for section in (
        bounded.pack([1, 0, 0, 1 << 60]),
        bounded.pack([1, 1 << 60, 0, 0]),
        bounded.pack([1, 0, 1 << 60, 0]),
        one_tree(b"", 1 << 60),
        one_tree(bounded.pack("a") + bounded.pack([0, "list", 1 << 40, b"", b""]), 3),
        one_tree(bounded.pack("a") + bounded.pack([0, "list", 1 << 40, b"\x01", b""]), 3),
        one_tree(bounded.pack("a") + bounded.pack([0, "list", 30, b"", b""]) + bytes(100), 2),
    ):
        with little_memory(), pytest.raises(FormatError):
            unpack_entries(section)


def test_long_names_of_many_children_are_refused() -> None:
    """Paths repeat their parents' names: a long name over many leaves would make gigabytes of a small section."""
    count = 3000
    name = "x" * 8000
    leaf = bounded.pack([1, b"", [], 0])
    records = bounded.pack(name) + bounded.pack([0, "list", count, b"", b""]) + leaf * count
    with little_memory(8 << 20), pytest.raises(FormatError, match="far longer"):
        unpack_entries(one_tree(records, count + 1))


def sharded_section(sharded: list[object], trees: bytes = b"", num_trees: int = 0) -> bytes:
    """A section with a mesh of 2 x 2, one sharded tensor of any fields, and trees."""
    ranks = struct.pack("<4I", 0, 1, 2, 3)
    header = bounded.pack([1, 1, 1, num_trees]) + bounded.pack([[2, 2], ranks])
    return header + bounded.pack(sharded) + trees


SHARDED: list[object] = ["int8", [8], [8], 0, [0, 1, 1, 1], [], b"", bytes(8), bytes(8), 0, False, 8]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, [1 << 40, 1 << 40], "too many elements"),
        (2, [0], "no cell"),
        (2, [1, 1], "no cell"),
        (3, 1, "mesh 1 of 1"),
        (4, [0, 1], "1 placements for a mesh of 2"),
        (4, [0, 1, 2, 1], "cut along dimension 1"),
        (4, [0, 1, 1, 0], "split factor of 0"),
        (4, [0, 2, 1, 1], "split factor of 2"),
        (4, [0, 1, 1], "two ints"),
        (4, [1, 1 << 20, 1, 1 << 20], "more than 1048576"),
        (4, [1, 1 << 30, 1, 1], "placements holds"),
        (4, [], "either placements or boxes"),
        (5, [0], "does not name each mesh dimension"),
        (5, [1, 1], "does not name each mesh dimension"),
        (5, [0, 1], "does not name each mesh dimension"),
        (6, struct.pack("<Q", 0) * 4, "either placements or boxes"),
        (7, bytes(4), "for 2 regions"),
        (8, bytes(12), "for 2 regions"),
        (9, 9, "unknown wrapper"),
        (11, 1 << 62, "size is"),
    ],
)
def test_broken_sharded_tensors_are_refused(field: int, value: object, message: str) -> None:
    """What is no sharding of a tensor of that shape over that mesh is refused before a box of it is made."""
    assert unpack_entries(sharded_section(SHARDED)) == {}
    changed = [*SHARDED[:field], value, *SHARDED[field + 1 :]]
    with little_memory(), pytest.raises(FormatError, match=message):
        unpack_entries(sharded_section(changed))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ((1, 0, 8, 0, 0), "boxes of 3 positions"),
        ((1, 0, 8, 0, 0, 1), "1 of a position in 0 numbers"),
        ((1 << 60, 0, 8, 0, 0, 0), "of a position in"),
        ((1, 0, 7, 0, 0, 0), "do not cover"),
        ((1, 0, 8, 1, 0, 8, 0, 0), "overlap"),
        ((1, 0, 9, 0, 0, 0), "reaches out"),
        ((1, (1 << 64) - 1, 8, 0, 0, 0), "reaches out"),
        ((2, 0, 8, 8, 0, 0, 0, 0), "empty"),
    ],
)
def test_broken_boxes_are_refused(boxes: tuple[int, ...], message: str) -> None:
    """Boxes that are written down one by one are inside the tensor, not empty, and together as large as it."""

    def section(numbers: tuple[int, ...]) -> bytes:
        packed = struct.pack(f"<{len(numbers)}Q", *numbers)
        return sharded_section([*SHARDED[:4], [], [], packed, bytes(16), bytes(16), *SHARDED[9:]])

    assert unpack_entries(section((1, 0, 5, 0, 1, 5, 3, 0))) == {}
    with little_memory(), pytest.raises(FormatError, match=message):
        unpack_entries(section(boxes))


@pytest.mark.parametrize(
    "mesh",
    [[[], b""], [[2], bytes(8)], [[2], bytes(4)], [[1], b"\xff" * 4], [[1 << 40, 1 << 40], bytes(4)], [[1], b"abc"]],
)
def test_broken_meshes_are_refused(mesh: list[object]) -> None:
    """A mesh has one rank at each place, each once."""
    with little_memory(), pytest.raises(FormatError):
        unpack_entries(bounded.pack([1, 1, 0, 0]) + bounded.pack(mesh))


LEAF = [1, b"\x01", [], 1]


def tree_line(ranks: tuple[int, ...], base: object, removed: list[str], places: dict[str, list[object]]) -> bytes:
    """A tree of any leaves."""
    records = b"".join(bounded.pack(path) + bounded.pack(fields) for path, fields in places.items())
    return bounded.pack([struct.pack(f"<{len(ranks)}I", *ranks), base, removed, len(places), records])


WHOLE = bounded.pack(
    [bytes(4), None, [], 3, b"".join(map(bounded.pack, ("a", [0, "list", 1, b"", b""], LEAF, "b", LEAF)))]
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (tree_line((1,), 1, [], {}), "no whole tree before it"),
        (tree_line((1,), -1, [], {}), "no whole tree before it"),
        (tree_line((1,), 7, [], {}), "no whole tree before it"),
        (tree_line((1,), True, [], {}), "not allowed there"),
        (tree_line((0,), 0, [], {}), "two trees"),
        (tree_line((1, 1), 0, [], {}), "twice"),
        (tree_line((), 0, [], {}), "no u32"),
        (tree_line((1,), 0, ["c"], {}), "no app_state key of its base"),
        (tree_line((1,), 0, ["a/0"], {}), "no app_state key of its base"),
        (tree_line((1,), 0, ["b"], {"b": LEAF}), "no app_state key of its base"),
        (tree_line((1,), 0, ["a"], {"a/0": LEAF}), "nor in the base"),
        (tree_line((1,), 0, [], {"a": LEAF, "a/0": LEAF}), "nor in the base"),
        (tree_line((1,), 0, [], {"a/1": LEAF}), "nor in the base"),
        (tree_line((1,), None, [], {"a/0": LEAF}), "nor in the base"),
        (tree_line((1,), None, ["a"], {}), "no app_state key of its base"),
        (tree_line((1,), 0, [], {"b": [4, 0]}), "sharded tensor 0 of 0"),
    ],
)
def test_broken_trees_are_refused(line: bytes, message: str) -> None:
    """A tree that is written against another changes only what that one has, and adds only app_state keys."""
    sound = bounded.pack([1, 0, 0, 2]) + WHOLE + tree_line((1, 2), 0, ["a"], {"b": LEAF, "c": LEAF})
    assert list(unpack_entries(sound)) == ["0/a", "0/a/0", "0/b", "1/b", "1/c", "2/b", "2/c"]
    with little_memory(), pytest.raises(FormatError, match=message):
        unpack_entries(bounded.pack([1, 0, 0, 2]) + WHOLE + line)


def test_many_ranks_with_one_tree_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes for each rank could make a whole tree's entries for each: listing all of them has a limit."""
    monkeypatch.setattr(entry_section, "MAX_LISTED", 1000)
    records = bounded.pack("a") + bounded.pack([0, "list", 99, b"", b""]) + bounded.pack(LEAF) * 99
    ranks = struct.pack("<11I", *range(11))
    section = bounded.pack([1, 0, 0, 1]) + bounded.pack([ranks, None, [], 100, records])
    assert len(entry_section.EntriesSection(section).entries_of(10)) == 100
    with pytest.raises(FormatError, match="rank by rank"):
        unpack_entries(section)


# --- chunk tables


def patched_table(column: int, row: int, value: int) -> bytes:
    """The table of six rows and their base, with one number of one 32-bit column replaced."""
    table = bytearray(table_of(*refs()).pack())
    num_keys, num_rows = struct.unpack_from("<II", table, 12)
    start = 32 + num_keys * 37 + num_rows * (16 + 4 * column)
    struct.pack_into("<I", table, start + 4 * row, value)
    return bytes(table)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        (0, 0, 0, "empty"),
        (0, 0, (1 << 30) + 1, "has more than"),
        (0, 0, 4095, "own size"),
        (1, 0, 6, "in blob 6 of 6"),
        (1, 0, 0xFFFF_FFFF, "in blob"),
        (2, 0, 1, "beyond the end"),
        (2, 0, 0xFFFF_FFFF, "beyond the end"),
        (3, 0, 0, "empty"),
        (3, 0, 4097, "beyond the end"),
        (3, 1, 0xFFFF_FFFF, "beyond the end"),
        (4, 0, 1, "a base of what is no delta"),
        (4, 2, 0xFFFF_FFFF, "without a base"),
        (4, 2, 7, "row 7 of 7"),
        (4, 2, 2, "circle"),
        (4, 2, 0, "differ in size"),
    ],
)
def test_numbers_out_of_bounds(column: int, row: int, value: int, message: str) -> None:
    """A row that points outside its blob, its table or the format's limits is refused."""
    with pytest.raises(FormatError, match=message):
        ChunkTable.unpack(patched_table(column, row, value))


def test_circles_of_bases_are_refused() -> None:
    """Two deltas that are each other's base end in an error, not in an endless loop."""
    base = chunk(1)
    table = bytearray(table_of(delta(2, base, 100), delta(3, base, 100)).pack())
    num_keys, num_rows = struct.unpack_from("<II", table, 12)
    for first, second in ((1, 0), (0, 1), (1, 2)):
        struct.pack_into("<II", table, 32 + num_keys * 37 + num_rows * 32, first, second)
        if (first, second) == (1, 2):
            assert ChunkTable.unpack(bytes(table)).ref(0).base is not None
            continue
        with pytest.raises(FormatError, match="circle"):
            ChunkTable.unpack(bytes(table))


def test_members_of_packs_are_no_bases() -> None:
    """A base fills its blob."""
    table = bytearray(table_of(delta(1, chunk(2, 100))).pack())
    num_keys = struct.unpack_from("<I", table, 12)[0]
    assert num_keys == 2
    struct.pack_into("<I", table, 32 + num_keys * 32 + 4, 400)
    with pytest.raises(FormatError, match="does not fill its blob"):
        ChunkTable.unpack(bytes(table))


def test_keys_outside_the_pattern_cannot_be_written_down() -> None:
    """A key's parts are numbers: all that could be wrong is a rank or a suffix, and these are checked."""
    table = bytearray(table_of(chunk(1)).pack())
    rank, suffix = 32 + 16 + 12, 32 + 16 + 12 + 4 + 4
    for place, code, value in ((rank, "<I", 1_000_000_000), (suffix, "<B", 5), (suffix, "<B", 0xFF)):
        broken = bytearray(table)
        struct.pack_into(code, broken, place, value)
        with pytest.raises(FormatError, match=r"rank|suffix"):
            ChunkTable.unpack(bytes(broken))


def test_one_key_twice_is_refused() -> None:
    """A blob that stands twice in the key table could have two sizes."""
    table = table_of(chunk(1), chunk(8)).pack()
    twice = table[:32] + table[32:48] * 2 + table[64:]
    other_rank = struct.unpack_from("<II", twice, 32 + 56)
    assert other_rank == (1, 1)
    with pytest.raises(FormatError, match="stands there twice"):
        ChunkTable.unpack(twice)


def test_same_content_of_two_takes_is_two_keys() -> None:
    """Keys that differ in take or rank only are different blobs."""
    key = f"{digest(1).hex()}-{TAKE}-9"
    table = ChunkTable.unpack(table_of(chunk(1), chunk(1, key=key)).pack())
    assert list(table.keys) == [chunk(1).key, key]


def test_counts_of_a_table_allocate_nothing() -> None:
    """Claimed numbers of keys and rows must fit the bytes that are there."""
    with little_memory():
        for num_keys, num_rows in ((0xFFFF_FFFF, 0xFFFF_FFFF), (0, 1), (1, 0), (0xFFFF_FFFF, 0)):
            data = struct.pack("<8sHBBII12s", b"\x89TSTABL\n", 1, 1, 0, num_keys, num_rows, bytes(12)) + bytes(30)
            with pytest.raises(FormatError, match="do not fit"):
                ChunkTable.unpack(data)


def test_claimed_tables_allocate_nothing() -> None:
    """A claimed number or size of tables must fit the bytes that are there."""
    table = table_of(chunk(1)).pack()
    line = struct.pack("<B7sQ", 0, bytes(7), len(table))
    for data in (
        struct.pack("<B3sI", 1, bytes(3), 0xFFFF_FFFF),
        struct.pack("<B3sI", 1, bytes(3), 2) + line + table,
        struct.pack("<B3sI", 1, bytes(3), 1) + struct.pack("<B7sQ", 0, bytes(7), 1 << 63) + table,
        struct.pack("<B3sI", 1, bytes(3), 1) + line + table + b"\0",
        struct.pack("<B3sI", 1, bytes(3), 1) + struct.pack("<B7sQ", 2, bytes(7), len(table)) + table,
        struct.pack("<B3sI", 1, bytes(3), 1) + struct.pack("<B7sQ", 1, bytes(7), len(table)) + table,
        struct.pack("<B3sI", 9, bytes(3), 0),
    ):
        with little_memory(), pytest.raises(FormatError):
            Envelope.unpack(data, "envelope")


def test_messages_stay_short() -> None:
    """Hostile names do not flood the log: what is quoted is cut."""
    keys: tuple[str, ...] = ("y" * 4000,)
    tree: dict[str, Entry] = {"0/" + "x" * 4000: ContainerEntry("dict", keys)}
    tree["0/" + "x" * 4000 + "/" + keys[0]] = ValueEntry(b"\x01", None, 1)
    section = pack_entries(tree)
    with pytest.raises(FormatError) as caught:
        unpack_entries(section[:-1] + b"\x05")
    assert len(str(caught.value)) < 600
