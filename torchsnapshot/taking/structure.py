"""What planning and packing a state once has shown about every state that is made like it: the way for the next take.

What lives here: ``Structure``, kept between takes, and the check that a state still has it. What doesn't: planning
and packing themselves (``plan``, ``format.entries``): what is done here gives the same, only with less work for each
tensor.

A state has the same structure as another one if it has the same paths in the same order, equal containers, and tensors
of the same class, dtype, shape, strides and device, with the same wrappers. Then the same cells, chunks and table rows
come out; what differs is addresses and content. And the entries section differs only in the bytes of inline tensors
and values: where these are as long as before, they are put into their places in the last section. That one was read
back and checked when it was packed; nothing that is checked depends on the bytes inside a value of the same length.

Invariant: nothing here keeps a tensor or its memory alive.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchsnapshot.format.entries import WRAPPERS, ContainerEntry, Entry, ShardedTensorEntry, TensorEntry, pack_entries
from torchsnapshot.format.entry_bytes import pack_record
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Piece
from torchsnapshot.pauses import collector_paused
from torchsnapshot.state.flatten import Node, OpaqueLeaf, ShardedLeaf, TensorLeaf, ValueLeaf
from torchsnapshot.state.host_views import HostView
from torchsnapshot.store import bounded
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder
from torchsnapshot.taking.plan import (
    INLINE_VALUE_NBYTES,
    BytesSource,
    Leaf,
    Previous,
    TakePlan,
    build_entries,
    chunks_of,
    plan_of_leaves,
)

Signature = tuple[Any, ...]


def _signature_of(node: Node) -> Signature | None:
    """What must be equal for another node in the same place to be planned alike; None where that isn't known."""
    if type(node) is TensorLeaf:
        tensor = node.tensor
        if not isinstance(tensor, torch.Tensor):
            return None
        return (
            tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.is_conj(), tensor.is_neg(),
            type(tensor), node.wrapper, node.requires_grad,
        )  # fmt: skip
    if type(node) is ContainerEntry:
        # 1, 1.0 and True are equal to Python
        return node.kind, node.keys, tuple(map(type, node.keys)), node.extra
    if type(node) is ValueLeaf:
        return ValueLeaf, max(len(node.data), INLINE_VALUE_NBYTES)
    if type(node) is OpaqueLeaf:
        return OpaqueLeaf, node.type_name, max(len(node.data), INLINE_VALUE_NBYTES)
    return None


@dataclass(frozen=True, slots=True)
class _Template:
    """What stays of a leaf: its signature and all that follows from it. ``view`` has no memory."""

    signature: Signature
    view: HostView | None
    cell: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_inline: bool


@dataclass(frozen=True, slots=True)
class _Section:
    """An entries section without the bytes of its inline leaves: what stands before, between and behind them."""

    parts: list[bytes]
    sizes: list[int]

    def filled(self, inline: Sequence[bytes]) -> bytes | None:
        """The section with other bytes in it; None where their sizes differ."""
        if list(map(len, inline)) != self.sizes:
            return None
        pieces = [b""] * (2 * len(inline) + 1)
        pieces[::2] = self.parts
        pieces[1::2] = inline
        return b"".join(pieces)


class Structure:
    """What one plan has shown. Any thread may use it.

    Args:
        paths: of the leaves, in their order.
        templates: of the leaves.
        sizes: the sizes of chunks that were planned with.
    """

    def __init__(self, paths: list[str], templates: list[_Template], sizes: tuple[int, int]) -> None:
        self._paths = paths
        self._templates = templates
        self._sizes = sizes
        self._section: _Section | None = None
        self._table: tuple[list[ChunkRef], ChunkTable] | None = None

    @classmethod
    @collector_paused()
    def of(cls, plan: TakePlan, chunk_nbytes: int, small_nbytes: int) -> Structure | None:
        """The structure of a state that was planned so; None where it has leaves of kinds that are always planned anew.

        Args:
            plan: made of the state.
            chunk_nbytes: as ``plan_take`` was given it.
            small_nbytes: as ``plan_take`` was given it.
        """
        templates = []
        for leaf in plan.leaves:
            signature = _signature_of(leaf.node)
            if signature is None:
                return None
            view = None if leaf.view is None else leaf.view.bare()
            pieces = tuple([chunk.piece for chunk in leaf.chunks])
            templates.append(_Template(signature, view, leaf.cell, pieces, leaf.inline is not None))
        return cls([leaf.path for leaf in plan.leaves], templates, (chunk_nbytes, small_nbytes))

    @collector_paused()
    def plan(
        self, nodes: Mapping[str, Node], previous: Previous, chunk_nbytes: int, small_nbytes: int
    ) -> TakePlan | None:
        """What ``plan_take`` would give; None where the state has another structure."""
        if (chunk_nbytes, small_nbytes) != self._sizes or list(nodes) != self._paths:
            return None
        leaves = []
        for (path, node), template in zip(nodes.items(), self._templates, strict=True):
            if _signature_of(node) != template.signature:
                return None
            leaf = _leaf(path, node, template, previous)
            if leaf is None:
                return None
            leaves.append(leaf)
        return plan_of_leaves(leaves, small_nbytes)

    @collector_paused()
    def pack(self, plan: TakePlan) -> tuple[bytes, ChunkTable]:
        """The entries section and the chunk table of a finished plan of this structure, of rank 0."""
        section, table = self._section, self._known_table(plan)
        inline = [leaf.inline for leaf in plan.leaves if leaf.inline is not None]
        data = None if section is None or table is None else section.filled(inline)
        if data is not None and table is not None:
            return data, table
        entries, table = build_entries(plan, rank=0)
        data = pack_entries(entries)
        self._section = _section_of(plan, entries, data)
        self._table = [ref for chunk in plan.chunks() if (ref := chunk.ref) is not None], table
        return data, table

    def _known_table(self, plan: TakePlan) -> ChunkTable | None:
        """The table of these chunks: the last one where nothing has changed."""
        refs = [ref for chunk in plan.chunks() if (ref := chunk.ref) is not None]
        last = self._table
        if last is None or len(refs) != len(last[0]):
            return None
        if all(map(operator.is_, refs, last[0])):
            return last[1]
        builder = ChunkTableBuilder()
        builder.add(refs)
        table = builder.build()
        self._table = refs, table
        return table


def _leaf(path: str, node: Node, template: _Template, previous: Previous) -> Leaf | None:
    """One leaf, planned after its template; None where what was there before was cut otherwise."""
    if isinstance(node, ContainerEntry):
        return Leaf(path, node)
    view = template.view
    if template.is_inline:
        if view is not None and isinstance(node, TensorLeaf):
            return Leaf(path, node, view, template.cell, [], _bytes_of(node.tensor, view))
        return None if isinstance(node, (TensorLeaf, ShardedLeaf)) else Leaf(path, node, inline=node.data)
    place = previous.at(path)
    if place is None or len(place.digests) != len(template.pieces):
        return None
    if isinstance(node, (ValueLeaf, OpaqueLeaf)):
        chunks = chunks_of(path, [(BytesSource(node.data), piece) for piece in template.pieces], 1, place)
        return Leaf(path, node, None, template.cell, chunks)
    if view is None or isinstance(node, ShardedLeaf) or place.cell != template.cell:
        return None
    bound = view.bind(node.tensor)
    chunks = chunks_of(path, [(bound, piece) for piece in template.pieces], bound.itemsize, place)
    return Leaf(path, node, bound, template.cell, chunks)


def _bytes_of(tensor: torch.Tensor, view: HostView) -> bytes:
    """The content of a small tensor that ``view`` was made for, or one like it."""
    if not view.nbytes:
        return b""
    if view.is_plain:
        address = tensor.data_ptr()
        if address:
            return ctypes.string_at(address, view.nbytes)
    data = bytearray(view.nbytes)
    view.bind(tensor).stage(grid.whole(view.memory_shape), memoryview(data))
    return bytes(data)


def _section_of(plan: TakePlan, entries: Mapping[str, Entry], data: bytes) -> _Section | None:
    """Cut a section at its inline bytes; None where it isn't made of these entries in this order, and of no other."""
    parts: list[bytes] = []
    sizes: list[int] = []
    records: list[bytes] = []
    for leaf in plan.leaves:
        entry = entries[f"0/{leaf.path}"]
        if "/" not in leaf.path:
            records.append(bounded.pack(leaf.path))
        record = pack_record(entry, _no_number)
        if leaf.inline is None:
            records.append(record)
            continue
        assert not isinstance(entry, (ContainerEntry, ShardedTensorEntry))
        behind = [WRAPPERS.index(entry.wrapper), entry.requires_grad] if isinstance(entry, TensorEntry) else [()]
        end = len(record) - sum(len(bounded.pack(field)) for field in (*behind, entry.nbytes))
        start = end - len(leaf.inline)
        parts.append(b"".join([*records, record[:start]]))
        sizes.append(len(leaf.inline))
        records = [record[end:]]
    parts.append(b"".join(records))
    num_behind = sum(map(len, parts)) + sum(sizes)
    parts[0] = data[: len(data) - num_behind] + parts[0]
    section = _Section(parts, sizes)
    # not taken on trust: what comes out must be what was packed and checked
    same = section.filled([leaf.inline for leaf in plan.leaves if leaf.inline is not None]) == data
    return section if same else None


def _no_number(entry: ShardedTensorEntry) -> int:
    raise AssertionError("a structure has no sharded tensors")


_structures: dict[str, Structure] = {}


def recall(store_id: str) -> Structure | None:
    """The structure of the state that this process last took into the store."""
    return _structures.get(store_id)


def remember(store_id: str, structure: Structure | None) -> None:
    """Keep the structure of a state for its next take."""
    if structure is None:
        _structures.pop(store_id, None)
    else:
        _structures[store_id] = structure


def forget() -> None:
    """Drop all memory, as a new process would begin."""
    _structures.clear()
