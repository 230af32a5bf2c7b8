"""A snapshot's content as users of the old torchsnapshot see it: one entry for every container and every leaf.

What lives here: the entries' classes under their old names, and ``SnapshotMetadata`` with its text form. What doesn't:
making them from what a snapshot really stores (``manifest_view``), anything that is on disk.

Invariant: keys are ``"<rank>/<key>/<path>"``, parents before children.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torchsnapshot.errors import FormatError

Primitive = int | str | bool | bytes | float
MeshRanks = list[Any]
"""Ranks nested as deep as the mesh has dimensions."""

MAX_DECIMAL_BITS = 2000
"""Larger ints are written in base 16: Python may be told to write no more than 640 decimal digits, or 2126 bits."""

_PRIMITIVE_TYPES: dict[str, type] = {kind.__name__: kind for kind in (int, str, bool, bytes, float)}


# ------------------------------------------------------------------ entries


@dataclass(frozen=True, slots=True)
class Entry:
    """One container or leaf; ``type`` says of which kind."""

    type: str = field(init=False)


@dataclass(frozen=True, slots=True)
class TensorEntry(Entry):
    """A tensor that stands in the snapshot whole, however many chunks it has.

    ``dtype`` is written as torch does (``"torch.float32"``). ``location``, ``serializer`` and ``byte_range`` say in
    snapshots of the old torchsnapshot where its bytes are; in ours ``location`` is the entry's own key.
    """

    type: str = field(default="Tensor", init=False)
    location: str
    serializer: str
    dtype: str
    shape: list[int]
    replicated: bool
    byte_range: list[int] | None = None

    @property
    def byte_range_tuple(self) -> tuple[int, int] | None:
        """``byte_range`` as a tuple."""
        return None if self.byte_range is None else (self.byte_range[0], self.byte_range[1])


@dataclass(frozen=True, slots=True)
class Shard:
    """A region of a tensor: where it starts, how far it reaches, and the tensor that it is."""

    offsets: list[int]
    sizes: list[int]
    tensor: TensorEntry


@dataclass(frozen=True, slots=True)
class _Pieces(Entry):
    """A tensor that stands in the snapshot as several regions."""

    shards: list[Shard]

    def get_tensor_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        ends = ([a + n for a, n in zip(shard.offsets, shard.sizes, strict=True)] for shard in self.shards)
        return [max(dimension) for dimension in zip(*ends, strict=True)]

    @property
    def shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return self.get_tensor_shape()

    @property
    def dtype(self) -> str:
        """The dtype as torch writes it."""
        return self.shards[0].tensor.dtype


@dataclass(frozen=True, slots=True)
class ShardedTensorEntry(_Pieces):
    """A tensor that is spread over ranks."""

    type: str = field(default="ShardedTensor", init=False)


@dataclass(frozen=True, slots=True)
class DTensorEntry(_Pieces):
    """A ``DTensor``.

    ``mesh`` nests the ranks as the device mesh does; ``dim_map`` gives for each dimension of the tensor the dimensions
    of the mesh that it is spread over, ``[-1]`` for none.
    """

    type: str = field(default="DTensor", init=False)
    mesh: MeshRanks
    dim_map: list[list[int]]


@dataclass(frozen=True, slots=True)
class ChunkedTensorEntry(Entry):
    """A tensor in several files: snapshots of the old torchsnapshot have these, ours never do."""

    type: str = field(default="ChunkedTensor", init=False)
    dtype: str
    shape: list[int]
    chunks: list[Shard]
    replicated: bool


@dataclass(frozen=True, slots=True)
class ObjectEntry(Entry):
    """A value that is neither tensor nor primitive.

    ``serializer`` is ``"pickle"`` for one that only pickle can hold, and ``"plain"`` for one that needs none; snapshots
    of the old torchsnapshot have ``"torch_save"``.
    """

    type: str = field(default="object", init=False)
    location: str
    serializer: str
    obj_type: str
    replicated: bool


@dataclass(frozen=True, slots=True)
class ListEntry(Entry):
    """A list; its elements are the entries below it."""

    type: str = field(default="list", init=False)


@dataclass(frozen=True, slots=True)
class DictEntry(Entry):
    """A dict and its keys in order."""

    type: str = field(default="dict", init=False)
    keys: list[Any]


@dataclass(frozen=True, slots=True)
class OrderedDictEntry(Entry):
    """An ``OrderedDict`` and its keys in order."""

    type: str = field(default="OrderedDict", init=False)
    keys: list[Any]


@dataclass(frozen=True, slots=True)
class PrimitiveEntry(Entry):
    """An int, str, bool, bytes or float; ``type`` is the type's name.

    ``serialized_value`` is the value as text: base64 of bytes and of a float's eight bytes. ``readable`` is a float for
    people.
    """

    type: str = field()
    serialized_value: str
    replicated: bool
    readable: str | None = None

    def get_value(self) -> Primitive:
        """The value.

        Raises:
            FormatError: ``serialized_value`` is not what ``type`` says.
        """
        text = self.serialized_value
        try:
            if self.type == "float":
                return float(struct.unpack("<d", base64.b64decode(text, validate=True))[0])
            if self.type == "bytes":
                return base64.b64decode(text, validate=True)
            if self.type == "bool":
                return {"True": True, "False": False}[text]
            if self.type == "int":
                return int(text, 16) if "x" in text else int(text)
            return text
        except (ValueError, KeyError, struct.error) as error:
            raise FormatError(f"{text!r} is no {self.type} of a manifest") from error

    @classmethod
    def from_object(cls, value: Primitive) -> PrimitiveEntry:
        """The entry of a value.

        Raises:
            TypeError: it is of another type than the five.
        """
        name = type(value).__name__
        if _PRIMITIVE_TYPES.get(name) is not type(value):
            raise TypeError(f"no primitive: {value!r} of type {name}; allowed are {', '.join(_PRIMITIVE_TYPES)}")
        if isinstance(value, float):
            return cls(name, base64.b64encode(struct.pack("<d", value)).decode(), False, str(value))
        if isinstance(value, bytes):
            return cls(name, base64.b64encode(value).decode(), False)
        if isinstance(value, int) and value.bit_length() > MAX_DECIMAL_BITS:
            return cls(name, hex(value), False)
        return cls(name, str(value), False)


Manifest = dict[str, Entry]


def is_primitive(value: object) -> bool:
    """Whether a value has an entry of its own type: exactly one of the five, no subclass."""
    return type(value) in _PRIMITIVE_TYPES.values()


# ------------------------------------------------------------------ text form


@dataclass(frozen=True, slots=True)
class SnapshotMetadata:
    """A snapshot's version, world size and manifest.

    Args:
        version: of the library that wrote the snapshot.
        world_size: how many ranks wrote it.
        manifest: every entry by its key.
    """

    version: str
    world_size: int
    manifest: Manifest

    def to_yaml(self) -> str:
        """The text that the old torchsnapshot writes: JSON, which is YAML too."""
        # surrogate escapes, which JSON has for characters beyond the BMP, are not YAML
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_yaml(cls, text: str) -> SnapshotMetadata:
        """Read what ``to_yaml`` or the old torchsnapshot wrote.

        Raises:
            FormatError: it is no such text; the YAML that was written before October 2022 is not read.
        """
        try:
            content = json.loads(text)
            manifest = {str(path): _entry_from_fields(dict(fields)) for path, fields in content["manifest"].items()}
            return cls(str(content["version"]), int(content["world_size"]), manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"not the metadata of a snapshot of the old torchsnapshot in JSON form ({error!r}); "
                "if it was written before October 2022, read it and take it again with a torchsnapshot 0.1.0"
            ) from error


def _entry_from_fields(fields: dict[str, Any]) -> Entry:
    kind = fields["type"]
    if kind in _PRIMITIVE_TYPES:
        return PrimitiveEntry(**fields)
    del fields["type"]
    for name in ("shards", "chunks"):
        if name in fields:
            fields[name] = [_shard_from_fields(shard) for shard in fields[name]]
    return _ENTRY_TYPES[kind](**fields)


def _shard_from_fields(fields: dict[str, Any]) -> Shard:
    tensor = _entry_from_fields(dict(fields["tensor"]))
    if not isinstance(tensor, TensorEntry):
        raise TypeError(f"a shard's tensor is a {tensor.type}")
    return Shard(list(fields["offsets"]), list(fields["sizes"]), tensor)


_ENTRY_TYPES: dict[str, Callable[..., Entry]] = {
    "Tensor": TensorEntry,
    "ShardedTensor": ShardedTensorEntry,
    "DTensor": DTensorEntry,
    "ChunkedTensor": ChunkedTensorEntry,
    "object": ObjectEntry,
    "list": ListEntry,
    "dict": DictEntry,
    "OrderedDict": OrderedDictEntry,
}
