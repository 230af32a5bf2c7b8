"""Entries: what is packed comes back, places have one name each, and what breaks a rule is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import msgpack
import pytest
import read_format
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_samples import chunk, entries, head, manifest, one_tree, reference_to, refs, table_of

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.format import entry_bytes
from torchsnapshot.format.entries import (
    MAX_DEPTH,
    MAX_INLINE_NBYTES,
    MAX_PATH_NCHARS,
    USER_METADATA,
    ContainerEntry,
    EntriesBuilder,
    EntriesSection,
    Entry,
    Key,
    OpaqueEntry,
    ShardedTensorEntry,
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
    pack_trees,
    span_columns,
    unescape,
    unpack_entries,
)
from torchsnapshot.geometry.grid import Box, num_pieces, whole
from torchsnapshot.geometry.placements import Placement, Sharding
from torchsnapshot.reading.reads import Reading
from torchsnapshot.reading.targets import Target
from torchsnapshot.state.sharded import PlacedView
from torchsnapshot.stats import Stats
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


def read_by_field(record: bytes) -> Entry | str:
    """What comes of one record without the short cut for usual tensors; the kind of error where it is refused."""
    stream = bounded.pack("a") + record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry_bytes, "usual_tensor", lambda record: None)
        try:
            return entry_bytes.unpack_records(stream, 1, [], "test")["a"]["a"]
        except FormatError as error:
            return type(error).__name__


@given(tensors())
@settings(deadline=None)
def test_usual_tensors_are_read_alike(tensor: TensorEntry) -> None:
    """The short cut for usual tensors gives what reading field by field gives, and takes those in one box or inline."""
    record = entry_bytes.pack_record(tensor, lambda entry: 0)
    found = entry_bytes.usual_tensor(record)
    assert read_by_field(record) == tensor
    assert found in (None, tensor)
    assert found is not None or sum(len(shard.boxes) for shard in tensor.shards) > 1 or not tensor.nbytes


ODD_FIELDS: list[Any] = [
    True,
    1.0,
    None,
    "x",
    b"x",
    -1,
    0,
    1 << 32,
    (1 << 64) - 1,
    [],
    [1],
    [True],
    [[1]],
    [-1],
    [1 << 48],
]


@given(tensors(), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(ODD_FIELDS))
@settings(deadline=None, max_examples=300)
def test_what_breaks_a_rule_is_left_to_the_careful_reader(tensor: TensorEntry, place: list[int], odd: Any) -> None:
    """A record with any field replaced is refused by the short cut, or both ways of reading give the same entry."""
    fields = msgpack.unpackb(entry_bytes.pack_record(tensor, lambda entry: 0), raw=False)
    inside = fields
    for index in place[:-1]:
        deeper = inside[index % len(inside)]
        if not isinstance(deeper, list) or not deeper:
            break
        inside = deeper
    inside[place[-1] % len(inside)] = odd
    record = bounded.pack(fields)
    found = entry_bytes.usual_tensor(record)
    assert found is None or found == read_by_field(record)
    if found is not None:
        assert set(map(type, (*found.shape, *found.cell, found.nbytes))) == {int}


def test_the_short_cut_keeps_the_limits_of_the_format() -> None:
    """Fields that fit each other, but are larger than the format allows, are refused by the careful reader."""
    num_rows = 1 << 40
    fields = [2, "float32", [num_rows], [], [1], [[0, 0, num_rows, [0, num_rows]]], None, 0, False, 4 * num_rows]
    assert entry_bytes.usual_tensor(bounded.pack(fields)) is None
    assert read_by_field(bounded.pack(fields)) == "FormatError"
    fields = [2, "float32", [1] * 65, [], [1] * 65, [[0, 0, 1, [0] * 65 + [1] * 65]], None, 0, False, 4]
    assert entry_bytes.usual_tensor(bounded.pack(fields)) is None
    assert read_by_field(bounded.pack(fields)) == "FormatError"


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


# --- trees of many ranks


@given(trees(), st.data())
@settings(deadline=None)
def test_the_trees_of_all_ranks_come_back(tree: dict[str, Entry], data: st.DataObject) -> None:
    """Trees that are alike, that differ in leaves, structure or app_state keys, or altogether come back."""
    base = {path.partition("/")[2]: entry for path, entry in tree.items() if path.startswith("0/")}
    by_rank: dict[int, dict[str, Entry]] = {0: base}
    for rank in range(1, 5):
        mine = dict(base)
        for path in data.draw(st.lists(st.sampled_from(sorted(base)), max_size=3, unique=True)) if base else ():
            entry = mine.get(path)
            if entry is None:
                continue
            below = [other for other in mine if other.startswith(f"{path}/")]
            if isinstance(entry, ContainerEntry) and "/" in path and not data.draw(st.booleans()):
                # one key more: the container changes, and all below it stands there again
                more = ContainerEntry(entry.kind, (*entry.keys, "more than before"), entry.extra)
                if component_of(more.keys)[:-1] == component_of(entry.keys):
                    mine[path] = more
                    mine[f"{path}/more than before"] = LEAF
                continue
            for other in below:
                del mine[other]
            if "/" not in path and data.draw(st.booleans()):
                del mine[path]
            else:
                mine[path] = data.draw(leaves())
        if data.draw(st.booleans()):
            mine[f"new {rank}"] = data.draw(leaves())
        by_rank[rank * 3] = mine
    data_of_all = pack_trees(by_rank)
    section = EntriesSection(data_of_all)
    assert section.ranks == sorted(by_rank)
    for rank, mine in by_rank.items():
        assert section.entries_of(rank) == mine
    for path in base:
        everywhere = [mine.get(path) for mine in by_rank.values()]
        is_shared = all(entry == everywhere[0] for entry in everywhere)
        found = section.shared(path)
        # a place below one that was written anew is not looked into
        assert found is None or (is_shared and found == base[path])
        if is_shared and all(mine == base for mine in by_rank.values()):
            assert found is not None
    assert set(read_format.read_entries(data_of_all)) == set(section.all_entries())


def tree_of_rank(rank: int) -> dict[str, Entry]:
    """A job's tree: replicas, a sharded tensor, and a leaf of the rank's own."""
    sharding = Sharding((4,), (0, 1, 2, 3), (Placement(0),))
    columns = span_columns([Span(region, 0, 1) for region in range(4)])
    return {
        "model": ContainerEntry("dict", ("a", "b")),
        "model/a": ShardedTensorEntry("float32", (8,), (8,), sharding, *columns, "parameter", True, 32),
        "model/b": ValueEntry(b"\x01", None, 1),
        "rng": ValueEntry(bytes([rank]), None, 1),
    }


def test_what_ranks_share_is_one_entry() -> None:
    """A replicated leaf and a sharded tensor are stored once, are one object for all ranks, and are known as shared."""
    section = EntriesSection(pack_trees({rank: tree_of_rank(rank) for rank in range(4)}))
    assert len(section.sharded) == 1
    for path in ("model/a", "model/b"):
        found = section.shared(path)
        assert found is not None
        assert all(section.entries_of(rank)[path] is found for rank in range(4))
    assert section.shared("model") == tree_of_rank(0)["model"]
    assert section.shared("rng") is None
    assert section.shared("nothing") is None
    with pytest.raises(KeyError):
        section.entries_of(4)


def test_ranks_of_different_structure_share_too() -> None:
    """Stages of a pipeline have trees of their own; what is equal in all of them counts as shared all the same."""
    first = {**tree_of_rank(0), **{f"stage 0 {index}": LEAF for index in range(9)}}
    second = {**tree_of_rank(0), **{f"stage 1 {index}": LEAF for index in range(9)}}
    section = EntriesSection(pack_trees({0: first, 1: second, 2: {**second, "rng": LEAF}}))
    assert len(section.sharded) == 1
    assert section.entries_of(0)["model/a"] is section.entries_of(1)["model/a"]
    assert section.shared("model/a") is not None
    assert section.shared("model/b") is not None
    assert section.shared("rng") is None
    assert section.shared("stage 1 0") is None


def test_tensors_on_other_meshes_stay_apart() -> None:
    """The same path on disjoint meshes is several tensors, of equal shape or not."""

    def stage(ranks: tuple[int, int], row: int) -> dict[str, Entry]:
        sharding = Sharding((2,), ranks, (Placement(0),))
        columns = span_columns([Span(rank, row, 1) for rank in ranks])
        return {"optim": ShardedTensorEntry("float32", (8,), (8,), sharding, *columns, "tensor", False, 32)}

    section = EntriesSection(
        pack_trees({0: stage((0, 1), 0), 1: stage((0, 1), 0), 2: stage((2, 3), 0), 3: stage((2, 3), 0)})
    )
    assert len(section.sharded) == 2
    assert len({entry.identity for entry in section.sharded}) == 2
    found = [section.entries_of(rank)["optim"] for rank in range(4)]
    assert found[0] is found[1]
    assert found[2] is found[3]
    assert found[0] != found[2]
    assert section.shared("optim") is None


def test_a_rank_has_one_tree() -> None:
    """Adding a rank twice, or none, is refused."""
    builder = EntriesBuilder()
    builder.add([0, 2], tree_of_rank(0))
    for ranks in ([2], [], [-1], [1_000_000_000]):
        with pytest.raises(ValueError, match="rank"):
            builder.add(ranks, tree_of_rank(0))
    assert EntriesSection(builder.build()).ranks == [0, 2]


def test_keys_types_tell_containers_apart() -> None:
    """Containers that Python calls equal, of keys 1 and True, are not taken for one."""
    one: dict[str, Entry] = {"a": ContainerEntry("dict", (1,)), "a/1": LEAF, "b": LEAF, "c": LEAF}
    true: dict[str, Entry] = {"a": ContainerEntry("dict", (True,)), "a/True": LEAF, "b": LEAF, "c": LEAF}
    section = EntriesSection(pack_trees({0: one, 1: true}))
    assert list(section.entries_of(1)) == ["a", "a/True", "b", "c"]
    assert section.shared("a") is None
    assert section.shared("b") == LEAF


def test_many_regions_are_small() -> None:
    """1,000 ranks and 100 sharded tensors: 10 bytes for a region, and a few for a rank."""
    num_ranks, num_tensors = 1000, 100
    mesh = tuple(range(num_ranks))
    tensors: dict[str, Entry] = {}
    for index in range(num_tensors):
        columns = span_columns([Span(rank, index, 1) for rank in mesh])
        sharding = Sharding((num_ranks,), mesh, (Placement(0),))
        tensors[f"model/{index}"] = ShardedTensorEntry(
            "float32", (num_ranks, 1024), (1, 1024), sharding, *columns, "parameter", True, num_ranks << 12
        )
    builder = EntriesBuilder()
    root = ContainerEntry("list", tuple(range(num_tensors)))
    for rank in range(num_ranks):
        builder.add([rank], {"model": root, **tensors, "rng": ValueEntry(b"\xcd" + rank.to_bytes(2, "big"), None, 3)})
    data = builder.build()
    assert len(data) < 10 * num_ranks * num_tensors
    section = EntriesSection(data)
    assert section.entries_of(999)["rng"] == ValueEntry(b"\xcd\x03\xe7", None, 3)
    assert section.entries_of(999)["model/7"] == tensors["model/7"]


def test_manifests_give_ranks_apart() -> None:
    """A manifest gives each rank's entries by path without rank, and what all have in common."""
    stored = StoredManifest(manifest(), no_tables)
    assert stored.ranks == [0, 1]
    for rank in (0, 1):
        expected = {path[2:]: entry for path, entry in entries().items() if path.startswith(f"{rank}/")}
        assert stored.entries_of(rank) == expected
    assert stored.shared("optim/moment") == entries()["0/optim/moment"]
    assert stored.shared("extra") is None
    assert stored.shared("model") is None


@pytest.mark.parametrize(
    ("columns", "nbytes", "message"),
    [
        (span_columns([Span(1, 1, 1), Span(0, 2, 1)]), 4096, "table that is not there"),
        (span_columns([Span(0, 99, 1), Span(0, 2, 1)]), 4096, "outside the chunk tables"),
        (span_columns([Span(0, 1, 1), Span(0, 2, 1)]), 4095, "has 4095 bytes, its chunks 4096"),
        (span_columns([Span(0, 1, 1), Span(0, 2, 1)]), 0, "has 0 bytes, its chunks 4096"),
    ],
)
def test_sharded_sizes_are_compared_with_the_chunks(columns: tuple[bytes, bytes], nbytes: int, message: str) -> None:
    """A sharded tensor whose regions' chunks are not there, or do not add up, is refused."""
    sound = entries()["0/optim/moment"]
    assert isinstance(sound, ShardedTensorEntry)
    changed = replace(sound, tables=columns[0], firsts=columns[1], nbytes=nbytes)
    data = pack_manifest(head(), (table_of(*refs()),), pack_entries({"0/a": changed}))
    with pytest.raises(FormatError, match=message):
        StoredManifest(data, no_tables).entries_of(0)


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


def test_a_span_is_compared_with_its_table_before_pieces_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A span that its table does not have may claim billions of rows: none of their pieces is ever made."""
    num_rows = 1 << 30
    shards = (ShardEntry((whole((num_rows,)),), Span(0, 0, num_rows)),)
    tensor = TensorEntry("uint8", (num_rows,), None, (1,), shards, None, "tensor", False, num_rows)

    def refused(*_: object) -> None:
        raise AssertionError("pieces are made")

    monkeypatch.setattr("torchsnapshot.geometry.grid.cut", refused)
    table = table_of(chunk(1))
    data = pack_manifest(head(), (reference_to(table),), pack_entries({"0/a": tensor}))
    stored = StoredManifest(data, lambda key: table.pack())
    reading = Reading(None, stored, Stats())  # type: ignore[arg-type]
    target = Target(torch.empty(0), [PlacedView(whole((num_rows,)), None)])  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="outside the chunk tables"):
        reading.add_tensor("a", tensor, target)
