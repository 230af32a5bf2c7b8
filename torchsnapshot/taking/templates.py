"""What stays of a planned state without its memory: each leaf's template, and the tensors by what is done with them.

What doesn't live here: what is done, and with which state (``structure``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchsnapshot.format.entries import ContainerEntry
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Piece
from torchsnapshot.state.columns import BufferColumn
from torchsnapshot.state.flatten import Node, OpaqueLeaf, ShardedLeaf, TensorLeaf, ValueLeaf
from torchsnapshot.state.host_views import HostView
from torchsnapshot.state.skeleton import Skeleton
from torchsnapshot.taking.plan import BytesSource, Leaf, Place, chunks_of
from torchsnapshot.taking.signatures import Signature

HASHED_AT_ONCE_NBYTES = 4096
"""Chunks up to this size are compared with the last take while planning; larger ones are left to the workers."""


@dataclass(frozen=True, slots=True)
class Template:
    """What stays of a leaf: its signature and all that follows from it. ``view`` has no memory.

    ``groups`` says in which group each small chunk is packed, None for large ones.
    """

    signature: Signature
    view: HostView | None
    cell: tuple[int, ...]
    pieces: tuple[Piece, ...]
    groups: tuple[int | None, ...]
    is_inline: bool

    def leaf(self, path: str, node: Node, place: Place | None) -> Leaf | None:
        """A leaf, planned after this one; None where what was there before was cut otherwise."""
        if isinstance(node, ContainerEntry):
            return Leaf(path, node)
        view = self.view
        if self.is_inline:
            if view is not None and isinstance(node, TensorLeaf):
                return Leaf(path, node, view, self.cell, [], _bytes_of(node.tensor, view))
            return None if isinstance(node, (TensorLeaf, ShardedLeaf)) else Leaf(path, node, inline=node.data)
        if place is None or len(place.digests) != len(self.pieces):
            return None
        if isinstance(node, (ValueLeaf, OpaqueLeaf)):
            chunks = chunks_of(path, [(BytesSource(node.data), piece) for piece in self.pieces], 1, place)
            return Leaf(path, node, None, self.cell, chunks)
        if view is None or isinstance(node, ShardedLeaf) or place.cell != self.cell:
            return None
        bound = view.bind(node.tensor)
        chunks = chunks_of(path, [(bound, piece) for piece in self.pieces], bound.itemsize, place)
        return Leaf(path, node, bound, self.cell, chunks)


class Columns:
    """The tensors of a skeleton, sorted by what is done with them; all numbers are those of columns."""

    def __init__(self, skeleton: Skeleton, templates: Sequence[Template]) -> None:
        self.inline: list[int] = []
        self.hashed: list[int] = []
        self.expected: list[int] = []
        self.others: list[int] = []
        self.inline_nbytes = 0
        sizes: dict[int, int] = {}
        for column, number in enumerate(skeleton.numbers):
            template = templates[number]
            view = template.view
            assert view is not None
            sizes[column] = view.nbytes
            if not view.nbytes:
                continue
            if template.is_inline and view.is_plain:
                self.inline.append(column)
                self.inline_nbytes += view.nbytes
            elif view.is_plain and len(template.pieces) == 1 and view.nbytes <= HASHED_AT_ONCE_NBYTES:
                self.hashed.append(column)
            elif view.is_plain:
                self.expected.append(column)
            else:
                self.others.append(column)
        self.hashed_numbers = [skeleton.numbers[column] for column in self.hashed]
        self.inline_buffers = BufferColumn(self.inline, [sizes[column] for column in self.inline])
        self.hashed_buffers = BufferColumn(self.hashed, [sizes[column] for column in self.hashed])
        self.expected_numbers = [skeleton.numbers[column] for column in self.expected]
        pieces = [templates[number].pieces for number in self.expected_numbers]
        self.expected_sizes = [piece.nbytes for cut in pieces for piece in cut]
        self.expected_buffers = BufferColumn(
            [column for column, cut in zip(self.expected, pieces, strict=True) for _ in cut],
            self.expected_sizes,
            [piece.offset for cut in pieces for piece in cut],
        )


def _bytes_of(tensor: Any, view: HostView) -> bytes:
    """The content of a small tensor that ``view`` was made for, or one like it."""
    if not view.nbytes:
        return b""
    if view.is_plain and isinstance(tensor, torch.Tensor):
        address = tensor.data_ptr()
        if address:
            return ctypes.string_at(address, view.nbytes)
    data = bytearray(view.nbytes)
    view.bind(tensor).stage(grid.whole(view.memory_shape), memoryview(data))
    return bytes(data)
