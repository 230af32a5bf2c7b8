"""The manifest as users of the old torchsnapshot see it."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot import Snapshot, StateDict, manifest_utils
from torchsnapshot.errors import FormatError
from torchsnapshot.format import entries
from torchsnapshot.geometry.grid import Box
from torchsnapshot.manifest import (
    ChunkedTensorEntry,
    DictEntry,
    DTensorEntry,
    Entry,
    ListEntry,
    ObjectEntry,
    OrderedDictEntry,
    PrimitiveEntry,
    Shard,
    ShardedTensorEntry,
    SnapshotMetadata,
    TensorEntry,
)
from torchsnapshot.manifest_view import view
from torchsnapshot.state import values

SPAN = entries.Span(0, 0, 1)
WHOLE = TensorEntry("0/m/w", "buffer_protocol", "torch.float32", [4, 2], False)
REPLICATED = TensorEntry("0/m/w", "buffer_protocol", "torch.float32", [4, 2], True, [0, 32])
SHARD = Shard([2, 0], [4, 2], WHOLE)


def value(content: Any) -> entries.ValueEntry:
    """The stored entry of a plain value."""
    data = values.encode(content)
    return entries.ValueEntry(data, None, len(data))


def tensor(
    shape: tuple[int, ...],
    boxes: tuple[Box, ...],
    *,
    permutation: tuple[int, ...] | None = None,
    dtype: str = "float32",
) -> entries.TensorEntry:
    """The stored entry of a tensor of the given regions."""
    shards = (entries.ShardEntry(boxes, SPAN),) if boxes else ()
    inline = None if boxes else b""
    return entries.TensorEntry(dtype, shape, permutation, shape, shards, inline, "tensor", False, 0)


# ------------------------------------------------------------------ view


def test_containers() -> None:
    """Kinds of containers become the three of old, with their keys as they are."""
    stored = {
        "0/s": entries.ContainerEntry("dict", ("a", 1, True)),
        "0/s/a": entries.ContainerEntry("OrderedDict", ("x",)),
        "0/s/1": entries.ContainerEntry("tuple", ()),
        "0/s/True": entries.ContainerEntry("list", ()),
    }
    assert view(stored) == {
        "0/s": DictEntry(["a", 1, True]),
        "0/s/a": OrderedDictEntry(["x"]),
        "0/s/1": ListEntry(),
        "0/s/True": ListEntry(),
    }


def test_tensor() -> None:
    """A tensor says its dtype as torch writes it and its shape; a type of numpy's own keeps its name."""
    stored = {
        "0/m/w": tensor((4, 2), (Box((0, 0), (4, 2)),)),
        "0/m/small": tensor((), ()),
        "0/m/time": tensor((3,), (Box((0,), (3,)),), dtype="numpy:<M8[ns]"),
    }
    shown = view(stored)
    assert shown["0/m/w"] == WHOLE
    assert (shown["0/m/small"].type, shown["0/m/small"].shape) == ("Tensor", [])
    assert shown["0/m/time"].dtype == "numpy:<M8[ns]"


@pytest.mark.parametrize("permutation", [None, (1, 2, 0)])
def test_tensor_in_regions(permutation: tuple[int, ...] | None) -> None:
    """Regions are shown in the order of the shape's dimensions, whatever the order in memory."""
    shape = (2, 3, 4)
    memory = shape if permutation is None else tuple(shape[dim] for dim in permutation)
    halves = []
    for start in (0, 1):
        offsets, sizes = (start, 0, 0), (1, 3, 4)
        order = permutation or (0, 1, 2)
        halves.append(Box(tuple(offsets[dim] for dim in order), tuple(sizes[dim] for dim in order)))
    assert all(a + n <= m for box in halves for a, n, m in zip(box.offsets, box.sizes, memory, strict=True))
    shown = view({"0/m/w": tensor(shape, tuple(halves), permutation=permutation)})["0/m/w"]
    assert isinstance(shown, ShardedTensorEntry)
    assert [(shard.offsets, shard.sizes) for shard in shown.shards] == [([0, 0, 0], [1, 3, 4]), ([1, 0, 0], [1, 3, 4])]
    assert (shown.type, shown.shape, shown.dtype) == ("ShardedTensor", [2, 3, 4], "torch.float32")


def composite(kind: str, context: dict[str, Any]) -> dict[str, entries.Entry]:
    """The stored entries of a tensor made of several, and of the one after it."""
    return {
        "0/m": entries.ContainerEntry("dict", ("w", "wx")),
        "0/m/w": entries.ContainerEntry(kind, ("values",), values.encode(context)),
        "0/m/w/values": tensor((3,), (Box((0,), (3,)),)),
        "0/m/wx": value(1),
    }


@pytest.mark.parametrize(
    ("kind", "context", "shown"),
    [
        ("quantized", {"shape": [3], "dtype": "qint8"}, TensorEntry("0/m/w", "quantized", "torch.qint8", [3], False)),
        ("sparse_coo", {"shape": [9, 9]}, TensorEntry("0/m/w", "sparse_coo", "torch.float32", [9, 9], False)),
        ("subclass", {"class": "app.Two", "size": [3]}, ObjectEntry("0/m/w", "subclass", "app.Two", False)),
        ("quantized", {}, ObjectEntry("0/m/w", "quantized", "unknown", False)),
    ],
    ids=["quantized", "sparse", "subclass", "unknown"],
)
def test_tensors_made_of_several_are_one_entry(kind: str, context: dict[str, Any], shown: Entry) -> None:
    """A quantized or sparse tensor is shown as the tensor that it is, not as its parts."""
    assert view(composite(kind, context)) == {
        "0/m": DictEntry(["w", "wx"]),
        "0/m/w": shown,
        "0/m/wx": PrimitiveEntry("int", "1", False),
    }


def test_plain_values_are_shown_leaf_by_leaf() -> None:
    """Exact dicts and lists inside of a stored value are containers; everything else in it is one leaf."""
    content = {
        "lr": 0.1,
        "list": [1, "a", True, b"\xff"],
        "tuple": (1, 2),
        "none": None,
        "ordered": OrderedDict(x=1),
        "counter": Counter("a"),
        "a/b": {1: 0, "1": 0, 2: 0},
        "odd": {(1, 2): 3},
    }
    shown = view({"0/s": value(content)})
    assert list(shown) == [
        *("0/s", "0/s/lr", "0/s/list", "0/s/list/0", "0/s/list/1", "0/s/list/2", "0/s/list/3", "0/s/tuple", "0/s/none"),
        *(
            "0/s/ordered",
            "0/s/ordered/x",
            "0/s/counter",
            "0/s/a%2Fb",
            "0/s/a%2Fb/%i1",
            "0/s/a%2Fb/1",
            "0/s/a%2Fb/2",
            "0/s/odd",
        ),
    ]
    assert shown["0/s"] == DictEntry(list(content))
    assert shown["0/s/list/1"] == PrimitiveEntry("str", "a", False)
    assert shown["0/s/tuple"] == ObjectEntry("0/s/tuple", "plain", "builtins.tuple", False)
    assert shown["0/s/none"].obj_type == "builtins.NoneType"
    assert shown["0/s/ordered"] == OrderedDictEntry(["x"])
    assert shown["0/s/counter"].obj_type == "collections.Counter"
    assert shown["0/s/odd"].obj_type == "builtins.dict"


def test_large_values_are_read_on_request() -> None:
    """A value outside of the manifest is one entry, or its leaves where its bytes can be read."""
    data = values.encode({"a": 1})
    stored = {"0/s": entries.ValueEntry(None, SPAN, len(data))}
    assert view(stored) == {"0/s": ObjectEntry("0/s", "plain", "unknown", False)}
    assert list(view(stored, read_value=lambda entry: data)) == ["0/s", "0/s/a"]


def test_value_that_cannot_be_decoded_here() -> None:
    """One value of an unknown kind doesn't keep the manifest from being looked at."""
    stored = {"0/s": entries.ValueEntry(b"\xc1", None, 1), "0/t": value(1)}
    assert view(stored) == {
        "0/s": ObjectEntry("0/s", "plain", "unknown", False),
        "0/t": PrimitiveEntry("int", "1", False),
    }


def test_pickles_are_objects() -> None:
    """A value that only pickle can hold says what type it is, and that it is a pickle."""
    stored = {"0/s/o": entries.OpaqueEntry("app.Thing", b"...", None, 3)}
    assert view(stored) == {"0/s/o": ObjectEntry("0/s/o", "pickle", "app.Thing", False)}


def test_user_metadata_is_no_state() -> None:
    """Large user metadata stands among the entries, but is not shown as state."""
    assert view({f"0/{entries.USER_METADATA}": value({"a": 1}), "0/s": value([])}) == {"0/s": ListEntry()}


# ------------------------------------------------------------------ primitives


@given(st.one_of(st.integers(), st.text(), st.booleans(), st.binary(), st.floats()))
def test_primitives_give_their_value(content: Any) -> None:
    """Every int, str, bool, bytes and float comes back from its entry, bit for bit."""
    entry = PrimitiveEntry.from_object(content)
    found = entry.get_value()
    assert type(found) is type(content)
    assert entry.type == type(content).__name__
    assert found == content or (math.isnan(content) and math.isnan(found))
    assert entry.readable == (str(content) if isinstance(content, float) else None)


def test_only_primitives_are_primitives() -> None:
    """Other values, subclasses among them, are refused."""

    class Text(str):
        __slots__ = ()

    for content in (None, (), Text("a")):
        with pytest.raises(TypeError, match="no primitive"):
            PrimitiveEntry.from_object(content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "text"), [("int", "x"), ("bool", "1"), ("float", "AAAA"), ("bytes", "?"), ("float", "?")]
)
def test_bad_primitive(kind: str, text: str) -> None:
    """Text that is no value of the type is an error."""
    with pytest.raises(FormatError, match=f"is no {kind}"):
        PrimitiveEntry(kind, text, False).get_value()


# ------------------------------------------------------------------ text form


ENTRIES: dict[str, Entry] = {
    "0/m": OrderedDictEntry(["w"]),
    "0/m/w": REPLICATED,
    "0/m/sharded": ShardedTensorEntry([SHARD]),
    "0/m/spread": DTensorEntry([SHARD], [[0, 1], [2, 3]], [[0], [-1]]),
    "0/m/chunked": ChunkedTensorEntry("torch.int8", [4, 2], [SHARD], True),
    "0/s": DictEntry(["a", 1, "😀"]),
    "0/s/a": ListEntry(),
    "0/s/1": PrimitiveEntry.from_object(0.1),
    "0/s/😀": PrimitiveEntry.from_object("😀"),
    "0/s/o": ObjectEntry("0/s/o", "torch_save", "Thing", False),
}


def test_text_form_goes_round() -> None:
    """Every kind of entry survives being written as text and read again."""
    metadata = SnapshotMetadata("1.0", 4, ENTRIES)
    assert SnapshotMetadata.from_yaml(metadata.to_yaml()) == metadata


def test_text_form_is_yaml_that_holds_every_character() -> None:
    """Characters beyond the BMP stand as they are: as JSON's surrogates, YAML readers refuse them."""
    assert "😀" in SnapshotMetadata("1.0", 1, ENTRIES).to_yaml()


def test_text_of_the_old_torchsnapshot_is_read() -> None:
    """Its fields are the entries' fields."""
    text = """{"version": "0.1.0", "world_size": 2, "manifest": {
        "0/x": {"type": "dict", "keys": ["n"]},
        "0/x/n": {"type": "float", "serialized_value": "mpmZmZmZuT8=", "readable": "0.1", "replicated": false},
        "0/x/t": {"type": "Tensor", "location": "0/x/t", "serializer": "buffer_protocol", "dtype": "torch.int64",
                  "shape": [3], "replicated": true, "byte_range": null}}}"""
    metadata = SnapshotMetadata.from_yaml(text)
    assert (metadata.version, metadata.world_size) == ("0.1.0", 2)
    assert metadata.manifest["0/x/n"].get_value() == 0.1
    assert metadata.manifest["0/x/t"].shape == [3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "version: 0.1.0",
        "[]",
        '{"version": "1", "world_size": 1}',
        '{"version": "1", "world_size": "x", "manifest": {}}',
        '{"version": "1", "world_size": 1, "manifest": {"0/a": {"type": "unheard of"}}}',
        '{"version": "1", "world_size": 1, "manifest": {"0/a": {"type": "Tensor"}}}',
        '{"version": "1", "world_size": 1, "manifest": {"0/a": {"type": "ShardedTensor", "shards": [1]}}}',
        '{"version": "1", "world_size": 1, "manifest": {"0/a": 1}}',
    ],
)
def test_bad_text(text: str) -> None:
    """Anything else than such a text is a ``FormatError``."""
    with pytest.raises(FormatError, match="old torchsnapshot"):
        SnapshotMetadata.from_yaml(text)


# ------------------------------------------------------------------ questions


DTENSORS = {
    "spread": DTensorEntry([SHARD], [0, 1], [[0], [0]]),
    "both": DTensorEntry([SHARD], [[0, 1]], [[1], [-1]]),
    "replicated": DTensorEntry([SHARD], [0, 1], [[-1], [-1]]),
}


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        (DictEntry([]), {"container", "dict"}),
        (OrderedDictEntry([]), {"container", "dict"}),
        (ListEntry(), {"container"}),
        (WHOLE, set()),
        (REPLICATED, {"replicated", "fully_replicated"}),
        (ShardedTensorEntry([SHARD]), {"sharded"}),
        (PrimitiveEntry("int", "1", True), {"replicated", "fully_replicated"}),
        (DTENSORS["spread"], {"sharded"}),
        (DTENSORS["both"], {"sharded", "replicated", "partially_replicated"}),
        (DTENSORS["replicated"], {"replicated", "fully_replicated"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Entry) else "-".join(sorted(value)),
)
def test_questions_about_entries(entry: Entry, answers: set[str]) -> None:
    """Each question has the answer that the entry's kind implies."""
    questions = ("container", "dict", "sharded", "replicated", "fully_replicated", "partially_replicated")
    assert {name for name in questions if getattr(manifest_utils, f"is_{name}_entry")(entry)} == answers


def test_byte_range_as_tuple() -> None:
    """The byte range is there as a tuple too."""
    assert REPLICATED.byte_range_tuple == (0, 32)
    assert WHOLE.byte_range_tuple is None


def test_dtype_names_are_torchs() -> None:
    """What a view says of a dtype is what ``str`` says of torch's."""
    assert view({"0/t": tensor((), (), dtype="bfloat16")})["0/t"].dtype == str(torch.bfloat16)


def test_large_values_are_shown_like_small_ones(tmp_path: Path) -> None:
    """What is too large to stand in the manifest has its paths too; where its bytes are lost, looking goes on."""
    path = str(tmp_path / "run" / "step")
    Snapshot.take(path, {"p": StateDict(epoch=7, history=[0.5] * 3000, digits=10**5000)})
    manifest = Snapshot(path).get_manifest()
    assert manifest["0/p/epoch"].get_value() == 7  # type: ignore[attr-defined]
    assert manifest["0/p/history/2999"].get_value() == 0.5  # type: ignore[attr-defined]
    assert manifest["0/p/digits"].get_value() == 10**5000  # type: ignore[attr-defined]
    for blob in (tmp_path / "run" / ".torchsnapshot" / "blobs").rglob("*"):
        if blob.is_file():
            blob.unlink()
    assert Snapshot(path).get_manifest().keys() == {"0/p"}
