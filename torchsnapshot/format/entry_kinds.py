"""The closed set of entry kinds, and the names of places in a state.

What lives here: entries as values, and how a container's typed keys become components of paths. What doesn't: their
bytes (``entry_bytes``), the manifest that holds them (``entries``, which exports all of this too).

Entries are keyed ``<rank>/<app_state key>/<path…>``. Components escape ``%`` and ``/``; the empty text is a component
like any other. Within one container different keys have different components.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.placements import Sharding

Key = str | int | bool
"""A container's key; ``1``, ``True`` and ``"1"`` are three different ones."""

MAX_PATH_NCHARS = 8192
"""The most characters that a path may have below its rank."""

USER_METADATA = "%user_metadata"
"""Where, below a rank, user metadata stands that is too large for the head. No app_state key escapes to this."""

WRAPPERS = ("tensor", "parameter", "buffer", "numpy")
"""What a tensor was wrapped in; the order is their number in the file."""

_ESCAPED = re.compile(r"(?:[^%/]|%25|%2F)*\Z", re.DOTALL)
_TYPED = re.compile(r"%i(?:0|-?[1-9][0-9]*)\Z|%b(?:True|False)\Z")
_RANK = re.compile(r"(?:0|[1-9][0-9]{0,8})\Z")


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` rows from ``first`` of the manifest's chunk table number ``table``."""

    table: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class ContainerEntry:
    """A node with children, one for each key.

    Sequences have the keys 0, 1, 2… . ``extra`` holds plain context of this kind of container, as ``values.encode``
    wrote it (b"" = none).
    """

    kind: str
    keys: tuple[Key, ...]
    extra: bytes = b""


@dataclass(frozen=True, slots=True)
class ValueEntry:
    """A plain value, or a whole subtree of them, as ``values.encode`` wrote it: inline, or cut into chunks."""

    data: bytes | None
    span: Span | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Boxes of a tensor and their chunks: in the order of the boxes, in each box in the order of the grid."""

    boxes: tuple[Box, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor or an array.

    Its memory order is its shape permuted: ``memory_shape[i] == shape[permutation[i]]`` (None = as it is). ``cell`` and
    all boxes are in memory order. ``nbytes`` is what the chunks of all shards, or the inline bytes, amount to.
    """

    dtype: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None
    cell: tuple[int, ...]
    shards: tuple[ShardEntry, ...]
    inline: bytes | None
    wrapper: str
    requires_grad: bool
    nbytes: int

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The shape in memory order."""
        if self.permutation is None:
            return self.shape
        return tuple(self.shape[dim] for dim in self.permutation)


@dataclass(frozen=True, slots=True)
class OpaqueEntry:
    """An object that only pickle can hold; ``type_name`` tells the user what it is without loading it."""

    type_name: str
    data: bytes | None
    span: Span | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardedTensorEntry:
    """A tensor that is spread over a mesh of ranks: one entry, which all of them share.

    ``cell`` and all boxes are in the order of ``shape``. ``tables`` and ``firsts`` are columns, a little-endian u32 for
    each region of the sharding: the chunk table and the row where its chunks begin (0 where it has no element); how
    many they are follows from boxes and cell. ``nbytes`` counts all regions.

    Args:
        wrapper: ``"tensor"`` or ``"parameter"``.
    """

    dtype: str
    shape: tuple[int, ...]
    cell: tuple[int, ...]
    sharding: Sharding
    tables: bytes
    firsts: bytes
    wrapper: str
    requires_grad: bool
    nbytes: int

    @property
    def identity(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """What tells sharded tensors of one path apart: global ranks of the mesh, global shape, dtype."""
        return self.sharding.mesh_ranks, self.shape, self.dtype

    def span(self, region: int) -> Span | None:
        """Where a region's chunks are; None where it has no element."""
        boxes = self.sharding.regions(self.shape)[region]
        if not boxes:
            return None
        count = sum(grid.num_pieces(box, self.cell) for box in boxes)
        return Span(memoryview(self.tables).cast("I")[region], memoryview(self.firsts).cast("I")[region], count)

    def spans(self) -> list[Span | None]:
        """Those of all regions."""
        tables, firsts = memoryview(self.tables).cast("I"), memoryview(self.firsts).cast("I")
        return [
            Span(table, first, sum([grid.num_pieces(box, self.cell) for box in boxes])) if boxes else None
            for boxes, table, first in zip(self.sharding.regions(self.shape), tables, firsts, strict=True)
        ]


def span_columns(spans: Iterable[Span | None]) -> tuple[bytes, bytes]:
    """The columns ``tables`` and ``firsts`` of a sharded tensor's entry.

    Args:
        spans: where the chunks of each region are, in the order of the regions; None for one without elements.
    """
    spans = list(spans)
    if not any(spans):
        # what each of many ranks reports of each tensor
        nothing = bytes(4 * len(spans))
        return nothing, nothing
    tables, firsts = array("I"), array("I")
    for span in spans:
        tables.append(0 if span is None else span.table)
        firsts.append(0 if span is None else span.first)
    return tables.tobytes(), firsts.tobytes()


Entry = ContainerEntry | ValueEntry | TensorEntry | OpaqueEntry | ShardedTensorEntry


def spans_of(entry: Entry) -> Sequence[Span]:
    """Where an entry's chunks are; nothing for containers and inline entries."""
    if isinstance(entry, TensorEntry):
        return [shard.span for shard in entry.shards]
    if isinstance(entry, ShardedTensorEntry):
        return [span for span in entry.spans() if span is not None]
    if isinstance(entry, ContainerEntry) or entry.span is None:
        return ()
    return (entry.span,)


def escape(component: str) -> str:
    """Make a text fit for one component of a path."""
    return component.replace("%", "%25").replace("/", "%2F")


def unescape(component: str) -> str:
    """The inverse of ``escape``."""
    return component.replace("%2F", "/").replace("%25", "%")


def component_of(keys: Iterable[Key]) -> list[str]:
    """The path components of a container's keys, in their order.

    A text stands for itself, escaped; an int in decimal; a bool as ``True`` or ``False``. Where an int or a bool would
    read like a text of the same container, the text stays plain and the other becomes ``%i1`` or ``%bTrue``.
    """
    keys = tuple(keys)
    texts = {key for key in keys if isinstance(key, str)}
    return [escape(key) if isinstance(key, str) else _component_of_number(key, texts) for key in keys]


def _component_of_number(key: int | bool, texts: set[str]) -> str:
    plain = str(key)
    if plain not in texts:
        return plain
    return f"%b{plain}" if isinstance(key, bool) else f"%i{plain}"


def children(path: str, entry: ContainerEntry) -> list[str]:
    """The paths of a container's children, in the order of its keys."""
    return [f"{path}/{component}" for component in component_of(entry.keys)]


def is_place(path: str) -> bool:
    """Whether ``path`` has the form of a place below a rank: an app_state key, and escaped components."""
    components = path.split("/")
    if components[0] == USER_METADATA:
        components = components[1:]
    return len(path) <= MAX_PATH_NCHARS and all(
        _ESCAPED.match(component) or _TYPED.match(component) for component in components
    )


def is_entry_path(path: str) -> bool:
    """Whether ``path`` has the form of an entry's key: a rank, and a place below it."""
    rank, slash, place = path.partition("/")
    return bool(slash) and _RANK.match(rank) is not None and is_place(place)
