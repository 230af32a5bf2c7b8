"""Pure planning: from leaves, grid and what is known to the work of a take. No I/O, no threads, no clock.

What lives here: which byte ranges of the state become chunks, which of these are small enough to be packed together,
and how the results become entries. What doesn't: how bytes are read, hashed or put (``take``), how tensors look inside
(``state.tensors``), what a chunk table is (``store.envelope``).

Invariants: the chunks of one leaf stand in one span, in the order of the grid; the order of chunks and groups depends
only on the state's structure, so that two takes of one state cut and pack alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torchsnapshot.engine.groups import by_size
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    OpaqueEntry,
    ShardEntry,
    Span,
    TensorEntry,
    ValueEntry,
)
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.pauses import collector_paused
from torchsnapshot.state.flatten import Node, OpaqueLeaf, ShardedLeaf, TensorLeaf, ValueLeaf
from torchsnapshot.state.host_views import HostView, host_view
from torchsnapshot.state.watched_chunks import Extent
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder

SMALL_CHUNK_NBYTES = 1 << 20
"""A chunk below this size is packed with others instead of becoming a blob of its own."""

GROUP_NBYTES = 8 << 20
"""How much raw content one group of small chunks holds: one worker carries it, so it bounds a pack and a buffer."""

MIN_ROW_LENGTH = 64
"""Shorter rows count together with their neighbours along the next dimension: kernels are rows by output channel."""

INLINE_TENSOR_NBYTES = 256
INLINE_VALUE_NBYTES = 16 << 10


class Source(Protocol):
    """Where the bytes of a leaf come from: a tensor's host view, or plain bytes."""

    def extent(self, offset: int, nbytes: int) -> Extent | None:
        """The address and the size of what ``live`` shows; None where it shows nothing, or nothing that lasts."""

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """The bytes where they lie, without a copy; None where that is impossible."""

    def stage(self, box: Box, into: memoryview) -> None:
        """Copy the region ``box`` into ``into``."""


@dataclass(frozen=True, slots=True)
class BytesSource:
    """The bytes of a large value or pickle, cut like a one-dimensional uint8 tensor."""

    data: bytes

    def extent(self, offset: int, nbytes: int) -> Extent | None:
        """Bytes are made anew for each take."""
        return None

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """The bytes where they lie."""
        return memoryview(self.data)[offset : offset + nbytes]

    def stage(self, box: Box, into: memoryview) -> None:
        """Copy the region ``box`` into ``into``."""
        (start,), (nbytes,) = box.offsets, box.sizes
        into[:] = memoryview(self.data)[start : start + nbytes]


@dataclass(slots=True, eq=False)
class Chunk:
    """One chunk of a take: where its bytes come from, what was there last time, and, in the end, where it is stored.

    ``previous`` is the digest that the last take stored at this place; ``changed_last_time`` says that the last take
    found other bytes than the one before, so that comparing before copying is not worth a pass over the memory.
    ``digest`` is what ranks that take together have told one another, empty before that.
    """

    path: str
    source: Source
    piece: Piece
    width: int
    previous: bytes | None
    changed_last_time: bool = False
    ref: ChunkRef | None = None
    digest: bytes = b""

    @property
    def nbytes(self) -> int:
        """Raw size in bytes."""
        return self.piece.nbytes

    @property
    def extent(self) -> Extent | None:
        """Where it lies in memory: address and size in bytes; None where the host cannot read it as it lies."""
        return self.source.extent(self.piece.offset, self.nbytes)

    @property
    def row_length(self) -> int:
        """How many elements make a row: a hint for the codec."""
        return row_length(self.piece.box.sizes)


@dataclass(slots=True, eq=False)
class Leaf:
    """One node of the state with its chunks: what becomes an entry once every digest is known.

    A settled leaf is what a committed take has left of it, without memory. Several takes share one: it never changes.
    """

    path: str
    node: Node
    view: HostView | None = None
    cell: tuple[int, ...] = ()
    chunks: list[Chunk] = field(default_factory=list)
    inline: bytes | None = None
    is_settled: bool = False

    def settled(self, view: HostView | None) -> Leaf:
        """What a committed take leaves of it.

        Args:
            view: the leaf's without memory.
        """
        node = self.node
        if isinstance(node, TensorLeaf):
            node = TensorLeaf(None, node.wrapper, node.requires_grad)
        elif not isinstance(node, ContainerEntry):
            node = ValueLeaf(b"")
        source = BytesSource(b"") if view is None else view
        chunks = []
        for chunk, has_changed in zip(self.chunks, self.changes(), strict=True):
            assert chunk.ref is not None
            digest = chunk.ref.digest
            chunks.append(Chunk(self.path, source, chunk.piece, chunk.width, digest, has_changed, chunk.ref))
        return Leaf(self.path, node, view, self.cell, chunks, None if view is None else self.inline, is_settled=True)

    def changes(self) -> list[bool]:
        """Which chunks of a finished leaf the take found to be others than those that stood there before."""
        return [
            chunk.previous is not None and chunk.ref is not None and chunk.ref.digest != chunk.previous
            for chunk in self.chunks
        ]


@dataclass(slots=True)
class TakePlan:
    """The work of a take: leaves in the order of the state, and what of their chunks is to be looked at.

    ``large`` are large chunks, ``groups`` small ones, as they are packed together; the chunks of settled leaves are in
    neither. ``chunked_nbytes`` is what all chunks hold, a chunk below ``small_nbytes`` is a small one. What of settled
    leaves is still to be compared with their memory stands beside the plan (``expected``).
    """

    leaves: list[Leaf]
    large: list[Chunk]
    groups: list[list[Chunk]]
    state_nbytes: int
    chunked_nbytes: int = 0
    small_nbytes: int = 0

    @property
    def is_settled(self) -> bool:
        """Whether every chunk is where the last take had left it: nothing was planned anew."""
        return all(leaf.is_settled or not leaf.chunks for leaf in self.leaves)

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk, in the order of the leaves."""
        for leaf in self.leaves:
            yield from leaf.chunks


class Place(Protocol):
    """What stood at one path when the state was last taken or restored."""

    @property
    def dtype(self) -> str:
        """The tensor's dtype by name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def cell(self) -> tuple[int, ...]:
        """The cell that it was cut on."""

    @property
    def digests(self) -> Sequence[bytes]:
        """The digests of its chunks."""

    @property
    def changed(self) -> frozenset[int]:
        """Which chunks the last take found changed."""


class Previous(Protocol):
    """What the process remembers of the last take or restore, by path. A hint: it decides no content."""

    def at(self, path: str) -> Place | None:
        """What stood at the path, if anything did."""


@collector_paused()
def plan_take(nodes: Mapping[str, Node], previous: Previous, chunk_nbytes: int, small_nbytes: int) -> TakePlan:
    """Cut the state into chunks.

    Args:
        nodes: the flattened state, in its order, by path.
        previous: what the last take left.
        chunk_nbytes: the most bytes that a new cell gives a chunk.
        small_nbytes: chunks below this size are packed.

    Returns:
        The plan. Inline tensors and values are copied into it here, so these never change afterwards.
    """
    leaves: list[Leaf] = []
    for path, node in nodes.items():
        if isinstance(node, TensorLeaf):
            leaves.append(_plan_tensor(path, node, previous, chunk_nbytes))
        elif isinstance(node, ShardedLeaf):
            leaves.append(_plan_sharded(path, node, previous, chunk_nbytes))
        elif isinstance(node, (ValueLeaf, OpaqueLeaf)):
            leaves.append(_plan_bytes(path, node, previous, chunk_nbytes))
        else:
            leaves.append(Leaf(path, node))
    return plan_of_leaves(leaves, small_nbytes)


def plan_of_leaves(leaves: list[Leaf], small_nbytes: int) -> TakePlan:
    """The plan of leaves that are cut already; see ``plan_take``."""
    chunks = [chunk for leaf in leaves for chunk in leaf.chunks]
    inline_nbytes = sum(len(leaf.inline) for leaf in leaves if leaf.inline is not None)
    chunked_nbytes = sum(chunk.nbytes for chunk in chunks)
    large, groups = by_size(chunks, small_nbytes, GROUP_NBYTES)
    return TakePlan(
        leaves,
        large,
        groups,
        chunked_nbytes + inline_nbytes,
        chunked_nbytes,
        small_nbytes,
    )


def _plan_tensor(path: str, node: TensorLeaf, previous: Previous, chunk_nbytes: int) -> Leaf:
    view = host_view(node.tensor)
    if view.nbytes <= INLINE_TENSOR_NBYTES:
        data = bytearray(view.nbytes)
        if data:
            view.stage(grid.whole(view.memory_shape), memoryview(data))
        cell = grid.choose_cell(view.memory_shape, view.memory_shape, view.itemsize, chunk_nbytes)
        return Leaf(path, node, view, cell, [], bytes(data))
    box = grid.whole(view.memory_shape)
    place = previous.at(path)
    kept = place.cell if place is not None and (place.dtype, place.shape) == (view.dtype, view.shape) else None
    cell = grid.cell_for(view.memory_shape, [box], view.itemsize, chunk_nbytes, kept)
    return Leaf(path, node, view, cell, _cut(path, view, box, cell, view.itemsize, place))


def _plan_sharded(path: str, node: ShardedLeaf, previous: Previous, chunk_nbytes: int) -> Leaf:
    """This rank's part of a sharded tensor."""
    source = node.source
    place = previous.at(path)
    kept = place.cell if place is not None and (place.dtype, place.shape) == (source.dtype, source.shape) else None
    cell = source.cell(chunk_nbytes, kept)
    return Leaf(path, node, None, cell, chunks_of(path, source.pieces(cell), source.itemsize, place))


def _plan_bytes(path: str, node: ValueLeaf | OpaqueLeaf, previous: Previous, chunk_nbytes: int) -> Leaf:
    if len(node.data) <= INLINE_VALUE_NBYTES:
        return Leaf(path, node, inline=node.data)
    box = grid.whole((len(node.data),))
    cell = grid.choose_cell(box.sizes, box.sizes, 1, chunk_nbytes)
    return Leaf(path, node, None, cell, _cut(path, BytesSource(node.data), box, cell, 1, previous.at(path)))


def _cut(path: str, source: Source, box: Box, cell: tuple[int, ...], width: int, place: Place | None) -> list[Chunk]:
    return chunks_of(path, [(source, piece) for piece in grid.cut(box, cell, width)], width, place)


def chunks_of(path: str, pieces: Sequence[tuple[Source, Piece]], width: int, place: Place | None) -> list[Chunk]:
    """The chunks of one leaf; ``place`` says what was there last time."""
    if place is None or len(place.digests) != len(pieces):
        return [Chunk(path, source, piece, width, None) for source, piece in pieces]
    return [
        Chunk(path, source, piece, width, digest, index in place.changed)
        for index, ((source, piece), digest) in enumerate(zip(pieces, place.digests, strict=True))
    ]


def row_length(sizes: Sequence[int]) -> int:
    """The elements of the innermost dimensions, of as few as make a row."""
    length = 1
    for size in reversed(sizes):
        length *= size
        if length >= MIN_ROW_LENGTH:
            break
    return length


def build_entries(plan: TakePlan, rank: int) -> tuple[dict[str, Entry], ChunkTable]:
    """Turn a finished plan into what the manifest stores.

    Args:
        plan: a plan whose chunks are all stored.
        rank: the rank whose state this is; entry keys begin with it.

    Returns:
        The entries by key, and the chunk table that their spans count in.
    """
    table = ChunkTableBuilder()
    entries: dict[str, Entry] = {}
    for leaf in plan.leaves:
        entries[f"{rank}/{leaf.path}"] = entry_of(leaf, add_rows(leaf, table))
    return entries, table.build()


def add_rows(leaf: Leaf, table: ChunkTableBuilder) -> Span | None:
    """Add the chunks of a finished leaf to a table; None where it has none, being a container or inline."""
    if leaf.inline is not None or isinstance(leaf.node, ContainerEntry):
        return None
    refs = [chunk.ref for chunk in leaf.chunks if chunk.ref is not None]
    if len(refs) != len(leaf.chunks):
        raise AssertionError(f"a chunk of {leaf.path} was never stored")
    return Span(0, table.add(refs), len(refs))


def entry_of(leaf: Leaf, span: Span | None) -> Entry:
    """What the manifest says of one leaf.

    Args:
        leaf: of a finished plan; a sharded one has a single region here.
        span: where its chunks are.
    """
    node = leaf.node
    if isinstance(node, ValueLeaf):
        return ValueEntry(leaf.inline, span, len(node.data))
    if isinstance(node, OpaqueLeaf):
        return OpaqueEntry(node.type_name, leaf.inline, span, len(node.data))
    if isinstance(node, TensorLeaf):
        view = leaf.view
        assert view is not None
        shards = () if span is None else (ShardEntry((grid.whole(view.memory_shape),), span),)
        return TensorEntry(
            dtype=view.dtype,
            shape=view.shape,
            permutation=view.permutation,
            cell=leaf.cell,
            shards=shards,
            inline=leaf.inline,
            wrapper=node.wrapper,
            requires_grad=node.requires_grad,
            nbytes=view.nbytes,
        )
    if isinstance(node, ShardedLeaf):
        if node.source.sharding.num_regions != 1:
            raise AssertionError(f"{leaf.path}: only the ranks of its mesh together know where its regions are")
        return node.source.entry(leaf.cell, [span if leaf.chunks else None])
    return node
