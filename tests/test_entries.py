"""Entries: what is packed comes back, places have one name each, and what breaks a rule is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_samples import chunk, entries, head, manifest, one_tree, reference_to, refs, table_of

from torchsnapshot import entry_bytes
from torchsnapshot.entries import (
    MAX_DEPTH,
    MAX_INLINE_NBYTES,
    MAX_PATH_NCHARS,
    USER_METADATA,
    ContainerEntry,
    Entry,
    Key,
    OpaqueEntry,
    ShardEntry,
    Span,
    StoredManifest,
    TensorEntry,
    ValueEntry,
    children,
    component_of,
    escape,
    is_entry_path,
    pack_entries,
    unescape,
    unpack_entries,
)
from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.grid import Box, num_pieces, whole
from torchsnapshot.store import bounded
from torchsnapshot.store.envelope import pack_manifest

LEAF = ValueEntry(b"\xc0", None, 1)
TENSOR = TensorEntry(
    "float32", (4, 6), None, (2, 6), (ShardEntry((whole((4, 6)),), Span(0, 0, 2)),), None, "tensor", False, 96
)


# --- names of places


@given(st.text())
def test_escaping_comes_back(text: str) -> None:
    """Any text is one component of a path, and comes back from it."""
    assert "/" not in escape(text)
    assert unescape(escape(text)) == text


keys_of_containers = st.lists(
    st.text(max_size=5)
    | st.integers(-3, 30)
    | st.integers()
    | st.sampled_from(["1", "True", "%i1", "%25", "False", "-1", ""]),
    unique_by=lambda key: (type(key), key),
    max_size=8,
)


@given(keys_of_containers, st.sets(st.booleans()))
def test_different_keys_have_different_components(keys: list[Key], flags: set[bool]) -> None:
    """No two keys of one container share a name, whatever their types; and each name is a valid one."""
    keys = [*keys, *flags]
    components = component_of(keys)
    assert len(set(components)) == len(keys)
    assert all(is_entry_path(f"0/model/{component}") for component in components if len(component) < 1000)


def test_colliding_keys_are_written_with_their_type() -> None:
    """The text stays plain; the int and the bool that would read like it say what they are."""
    assert component_of(["1", 1, "True", True, 2, False]) == ["1", "%i1", "True", "%bTrue", "2", "False"]


def test_components_are_upstreams() -> None:
    """Without collisions the names are those that users of the old torchsnapshot know."""
    assert component_of(["layers.0.weight", "a/b", "50%", 3, True]) == [
        "layers.0.weight",
        "a%2Fb",
        "50%25",
        "3",
        "True",
    ]


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        ("0/model", True),
        ("12/model/a%2Fb/%i1/%bTrue/", True),
        (f"0/{USER_METADATA}", True),
        (f"0/model/{USER_METADATA}", False),
        ("0", False),
        ("01/model", False),
        ("-1/model", False),
        ("model", False),
        ("0/a%2fb", False),
        ("0/%i01", False),
        ("0/%bno", False),
        ("0/" + "x" * MAX_PATH_NCHARS, True),
        ("0/" + "x" * (MAX_PATH_NCHARS + 1), False),
    ],
)
def test_entry_paths(path: str, valid: bool) -> None:
    """A path is a rank in decimal, an app_state key and escaped components."""
    assert is_entry_path(path) is valid


# --- packing


def test_entries_of_every_kind_come_back() -> None:
    """All kinds come back equal and in their order."""
    unpacked = unpack_entries(pack_entries(entries()))
    assert unpacked == entries()
    assert list(unpacked) == list(entries())


def test_keys_keep_their_types() -> None:
    """1, "1" and a False stay what they are; True is not taken for 1."""
    keys = unpack_entries(pack_entries(entries()))["0/model"].keys  # type: ignore[union-attr]
    assert [type(key) for key in keys] == [str, str, int, str, bool, int]
    (flag,) = unpack_entries(pack_entries({"0/a": ContainerEntry("dict", (False,)), "0/a/False": LEAF}))["0/a"].keys  # type: ignore[union-attr]
    assert flag is False


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Entry]:
    """A state's entries: containers of any keys, any leaves."""
    found: dict[str, Entry] = {}

    def grow(path: str, depth: int) -> None:
        if not depth or draw(st.booleans()):
            found[path] = draw(leaves())
            return
        keys: list[Key] = draw(keys_of_containers)
        found[path] = ContainerEntry(
            draw(st.sampled_from(["dict", "list", "OrderedDict"])), tuple(keys), draw(st.binary(max_size=4))
        )
        for component in component_of(keys):
            grow(f"{path}/{component}", depth - 1)

    for name in draw(st.lists(st.text(max_size=4), unique=True, max_size=3)):
        grow(f"{draw(st.integers(0, 3))}/{escape(name)}", 3)
    return found


@st.composite
def leaves(draw: st.DrawFn) -> Entry:
    """A value, an opaque object or a tensor, inline or in chunks."""
    kind = draw(st.integers(0, 2))
    if kind == 2:
        return draw(tensors())
    data = draw(st.none() | st.binary(max_size=20))
    if data is None:
        span, nbytes = Span(0, draw(st.integers(0, 1 << 31)), draw(st.integers(1, 1000))), draw(st.integers(0, 1 << 61))
    else:
        span, nbytes = None, len(data)
    return ValueEntry(data, span, nbytes) if kind else OpaqueEntry(draw(st.text(max_size=9)), data, span, nbytes)


@st.composite
def tensors(draw: st.DrawFn) -> TensorEntry:
    """A tensor in one or more shards, its rows counted as the grid counts them."""
    shape = tuple(draw(st.lists(st.integers(0, 20), max_size=3)))
    permutation = draw(st.none() | st.permutations(range(len(shape))).map(tuple)) if len(shape) else None
    wrapper = draw(st.sampled_from(["tensor", "parameter", "buffer", "numpy"]))
    fields: dict[str, Any] = {"dtype": "float32", "wrapper": wrapper, "requires_grad": draw(st.booleans())}
    memory_shape = (tuple(shape[dim] for dim in permutation) if permutation else shape) or (1,)
    cell = tuple(draw(st.integers(1, 20)) for _ in memory_shape)
    if draw(st.booleans()):
        data = draw(st.binary(max_size=20))
        return TensorEntry(
            shape=shape, permutation=permutation, cell=cell, shards=(), inline=data, nbytes=len(data), **fields
        )
    shards = []
    for _ in range(draw(st.integers(1, 3))):
        boxes = []
        for _ in range(draw(st.integers(1, 2))):
            offsets = tuple(draw(st.integers(0, size)) for size in memory_shape)
            sizes = tuple(
                draw(st.integers(0, size - offset)) for size, offset in zip(memory_shape, offsets, strict=True)
            )
            boxes.append(Box(offsets, sizes))
        count = sum(num_pieces(box, cell) for box in boxes)
        shards.append(ShardEntry(tuple(boxes), Span(draw(st.integers(0, 3)), draw(st.integers(0, 99)), count)))
    nbytes = sum(4 * box.numel for shard in shards for box in shard.boxes)
    return TensorEntry(
        shape=shape, permutation=permutation, cell=cell, shards=tuple(shards), inline=None, nbytes=nbytes, **fields
    )


@given(trees())
@settings(deadline=None)
def test_any_tree_comes_back(tree: dict[str, Entry]) -> None:
    """Any tree of entries comes back equal, the first rank's in the same order, parents first."""
    unpacked = unpack_entries(pack_entries(tree))
    assert unpacked == tree
    assert [path for path in unpacked if path[0] == "0"] == [path for path in tree if path[0] == "0"]
    assert all(is_entry_path(path) for path in unpacked)
    assert pack_entries(unpacked) == pack_entries(tree)


def test_children_may_come_in_any_order() -> None:
    """Packing puts entries depth-first, wherever they stood behind their parents."""
    tree = {"0/a": ContainerEntry("dict", ("x", "y")), "0/b": LEAF, "0/a/y": LEAF, "0/a/x": TENSOR}
    assert list(unpack_entries(pack_entries(tree))) == ["0/a", "0/a/x", "0/a/y", "0/b"]


def test_lone_surrogates_are_names_too() -> None:
    """A key that is no valid Unicode (a file name, say) does not cost anybody a checkpoint."""
    tree: dict[str, Entry] = {"0/a": ContainerEntry("dict", ("\udc80",)), "0/a/\udc80": LEAF}
    assert unpack_entries(pack_entries(tree)) == tree


def tensor(**fields: Any) -> TensorEntry:
    """The sample tensor with ``fields`` changed."""
    return replace(TENSOR, **fields)


def shard(box: Box, count: int) -> tuple[ShardEntry, ...]:
    """One shard of one box."""
    return (ShardEntry((box,), Span(0, 0, count)),)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"0/a": ContainerEntry("dict", ("x",))}, "missing"),
        ({"0/a/x": LEAF}, "not the path of an app_state key"),
        ({"a": LEAF}, "not the path of an app_state key"),
        ({"0/a": ContainerEntry("dict", (1, True)), "0/a/1": LEAF, "0/a/True": LEAF}, "key twice"),
        ({"0/a": ContainerEntry("dict", ("x", "x")), "0/a/x": LEAF}, "another entry's child"),
        ({"0/a": ContainerEntry("dict", (1 << 5000,)), f"0/a/{1 << 5000}": LEAF}, "int of 626 bytes"),
        ({"0/a": ValueEntry(None, None, 0)}, "either inline or in chunks"),
        ({"0/a": ValueEntry(b"", Span(0, 0, 1), 0)}, "either inline or in chunks"),
        ({"0/a": ValueEntry(b"abc", None, 4)}, "3 inline bytes, not 4"),
        ({"0/a": ValueEntry(bytes(MAX_INLINE_NBYTES + 1), None, MAX_INLINE_NBYTES + 1)}, "at most"),
        ({"0/a": ValueEntry(None, Span(0, 0, 0), 0)}, "a span is"),
        ({"0/a": OpaqueEntry("x", None, None, 0)}, "either inline or in chunks"),
        ({"0/a": tensor(shape=(1,) * 65)}, "claims 65"),
        ({"0/a": tensor(shape=(1 << 48, 6))}, "shape holds"),
        ({"0/a": tensor(shape=(1 << 40, 1 << 40))}, "too many elements"),
        ({"0/a": tensor(shape=(-1, 6))}, "shape holds"),
        ({"0/a": tensor(permutation=(0, 0))}, "does not permute"),
        ({"0/a": tensor(permutation=(1, 2))}, "does not permute"),
        ({"0/a": tensor(permutation=(0,))}, "does not permute"),
        ({"0/a": tensor(cell=(2,))}, "no cell"),
        ({"0/a": tensor(cell=(0, 6))}, "no cell"),
        ({"0/a": tensor(shards=shard(Box((0, 0), (5, 6)), 3))}, "reaches out"),
        ({"0/a": tensor(shards=shard(Box((4, 0), (1, 6)), 1))}, "reaches out"),
        ({"0/a": tensor(shards=shard(whole((4, 6)), 3))}, "cuts 2 chunks, the span has 3"),
        ({"0/a": tensor(shards=shard(Box((1, 0), (3, 6)), 3))}, "cuts 2 chunks, the span has 3"),
        ({"0/a": tensor(permutation=(1, 0))}, "reaches out"),
        ({"0/a": tensor(shards=shard(Box((0,), (4,)), 2))}, "make no boxes"),
        ({"0/a": tensor(shards=(ShardEntry((), Span(0, 0, 0)),))}, "make no boxes"),
        ({"0/a": tensor(shards=())}, "neither inline bytes nor chunks"),
        ({"0/a": tensor(inline=b"")}, "0 inline bytes"),
        ({"0/a": tensor(shards=(), inline=b"abc")}, "3 inline bytes"),
        ({"0/a": tensor(wrapper="other")}, "wrapper|not in tuple|index"),
        ({"0/a": tensor(nbytes=1 << 62)}, "size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_be_read_is_not_written(tree: dict[str, Entry], message: str) -> None:
    """Entries that break a rule are refused when they are packed, by the same checks that guard the reader."""
    with pytest.raises(ValueError, match=message):
        pack_entries(tree)


def deep(depth: int) -> dict[str, Entry]:
    """Containers one inside the other."""
    tree: dict[str, Entry] = {}
    path = "0/a"
    for _ in range(depth):
        tree[path] = ContainerEntry("list", (0,))
        path += "/0"
    tree[path] = LEAF
    return tree


def test_nesting_is_bounded() -> None:
    """Containers may be nested MAX_DEPTH deep and no deeper."""
    assert len(unpack_entries(pack_entries(deep(MAX_DEPTH)))) == MAX_DEPTH + 1
    with pytest.raises(ValueError, match="nested deeper"):
        pack_entries(deep(MAX_DEPTH + 1))


# --- versions


def test_unknown_kinds_are_a_newer_format() -> None:
    """An entry kind, a wrapper or a version from the future says to upgrade."""
    for section in (
        one_tree(bounded.pack("a") + bounded.pack([9, "?"]), 1),
        bounded.pack([2, 0, 0, 0]),
        pack_entries({"0/a": tensor(wrapper="numpy")}).replace(b"\x03\xc2\x60", b"\x04\xc2\x60"),
    ):
        with pytest.raises(NewerFormatError, match="upgrade torchsnapshot"):
            unpack_entries(section)


# --- a whole manifest


def no_tables(key: str) -> bytes:
    """Stands for a store that must not be asked."""
    raise AssertionError(f"nobody should fetch {key}")


def test_stored_manifest_gives_what_was_stored() -> None:
    """Head, entries and chunks come back through one object."""
    stored = StoredManifest(manifest(), no_tables)
    assert stored.head == head()
    assert stored.entries == entries()
    assert stored.refs(Span(0, 1, 2)) == refs()[1:3]
    assert stored.digests(Span(0, 1, 2)) == [ref.digest for ref in refs()[1:3]]
    assert stored.nbytes == len(manifest())


def test_walk_and_children_follow_the_tree() -> None:
    """The places below a path come depth-first, in the order of the keys."""
    stored = StoredManifest(manifest(), no_tables)
    assert stored.roots == stored.children("") == ["0/model", "0/extra", "0/optim", "1/extra", "1/optim"]
    assert stored.children("0/model/weight") == []
    root = stored.entries["0/model"]
    assert isinstance(root, ContainerEntry)
    assert stored.children("0/model") == children("0/model", root)
    assert [path for path, _ in stored.walk()] == list(entries())
    assert [path for path, _ in stored.walk("0/model")] == [path for path in entries() if path.startswith("0/model")]
    with pytest.raises(KeyError):
        stored.children("0/nothing")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0/a": ValueEntry(None, Span(0, 5, 1), 20001)}, "its chunks 20000"),
        ({"0/a": ValueEntry(None, Span(0, 6, 2), 9)}, "outside the chunk tables"),
        ({"0/a": ValueEntry(None, Span(1, 0, 1), 9)}, "table that is not there"),
        ({"0/a": replace(TENSOR, nbytes=97)}, "has 97 bytes"),
    ],
)
def test_sizes_are_compared_with_the_chunks(changed: dict[str, Entry], message: str) -> None:
    """An entry whose chunks are not there, or do not add up to its size, is refused before anything is allocated."""
    data = pack_manifest(head(), (table_of(*refs()),), pack_entries(changed))
    with pytest.raises(FormatError, match=message):
        _ = StoredManifest(data, no_tables).entries


def test_tables_by_reference_are_fetched_when_needed() -> None:
    """Entries are read without the other ranks' table blobs; each blob is fetched once, and ``check`` uses it."""
    table = table_of(*refs())
    fetched = []

    def load(key: str) -> bytes:
        fetched.append(key)
        return table.pack()

    tree: dict[str, Entry] = {"0/a": ValueEntry(None, Span(1, 0, 1), 4096), "1/a": ValueEntry(None, Span(1, 0, 1), 1)}
    reference = reference_to(table)
    stored = StoredManifest(pack_manifest(head(), (table_of(chunk(9)), reference), pack_entries(tree)), load)
    assert stored.entries == tree
    assert not fetched
    assert stored.refs(Span(1, 0, 2)) == refs()[:2]
    stored.check("0/a", tree["0/a"])
    with pytest.raises(FormatError, match="has 1 bytes, its chunks 4096"):
        stored.check("1/a", tree["1/a"])
    for ask in (stored.refs, stored.digests):
        with pytest.raises(FormatError, match="outside the chunk tables"):
            ask(Span(1, 99, 1))
        with pytest.raises(FormatError, match="outside the chunk tables"):
            ask(Span(7, 0, 1))
    assert fetched == [reference.key]


def test_shape_limits_are_those_of_the_format() -> None:
    """The largest shapes that the format allows are read."""
    sizes = (1 << 47, 1 << 14)
    entry = tensor(shape=sizes, cell=sizes, shards=shard(whole(sizes), 1), nbytes=prod(sizes))
    assert unpack_entries(pack_entries({"0/a": entry}))["0/a"] == entry


@pytest.mark.parametrize("break_it", [lambda data: data + b"\xc0", lambda data: data[:-1], lambda data: b""])
def test_section_must_end_where_it_ends(break_it: Callable[[bytes], bytes]) -> None:
    """Bytes too many or too few are an error."""
    with pytest.raises(FormatError):
        unpack_entries(break_it(pack_entries(entries())))


def test_paths_cannot_grow_out_of_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many children of a long name are refused: their paths would be far longer than the section."""
    monkeypatch.setattr(entry_bytes, "_PATHS_FREE_NCHARS", 1000)
    keys = tuple(range(400))
    tree: dict[str, Entry] = {"0/" + "x" * 4000: ContainerEntry("list", keys)}
    tree |= {path: LEAF for root, entry in list(tree.items()) for path in children(root, entry)}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="far longer"):
        pack_entries(tree)
