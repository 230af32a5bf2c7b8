"""Resharding: whatever is wanted is put together from whatever is stored, out of the chunks that overlap and no others.

All ranks are simulated in one process; a plain tensor is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placements import cases, sharding_of, slices

from torchsnapshot.errors import FormatError
from torchsnapshot.format.entries import ShardedTensorEntry, ShardEntry, Span, TensorEntry, span_columns
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box, num_pieces, whole
from torchsnapshot.geometry.layout import inverse
from torchsnapshot.geometry.mesh_cells import cell_for
from torchsnapshot.geometry.placements import REPLICATE, Placement, Sharding
from torchsnapshot.state import resharding
from torchsnapshot.state.host_views import host_view, target_view
from torchsnapshot.state.resharding import overlaps, wanted_in_memory_order
from torchsnapshot.state.sharded import PlacedView

CHUNK_NBYTES = 64


class Stored:
    """A tensor as the ranks of a mesh have stored it: its entry, and what stands in each row of each table."""

    def __init__(self, tensor: torch.Tensor, sharding: Sharding, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        shape, itemsize = tuple(tensor.shape), tensor.element_size()
        cell = cell_for(shape, sharding, itemsize, chunk_nbytes)
        self.rows: dict[tuple[int, int], bytes] = {}
        self.boxes: dict[tuple[int, int], Box] = {}
        spans: list[Span | None] = []
        for region, boxes in enumerate(sharding.regions(shape)):
            first, row = 7 * region, 7 * region
            for box in boxes:
                raw = bytes_of(tensor[slices(box)] if shape else tensor)
                for piece in grid.cut(box, cell, itemsize):
                    self.rows[region, row] = raw[piece.offset : piece.offset + piece.nbytes]
                    self.boxes[region, row] = piece.box
                    row += 1
            spans.append(Span(region, first, row - first) if boxes else None)
        self.entry = ShardedTensorEntry(
            "x", shape, cell, sharding, *span_columns(spans), "tensor", False, tensor.numel() * itemsize
        )
        assert self.entry.spans() == spans == [self.entry.span(region) for region in range(sharding.num_regions)]

    def fill(self, views: Sequence[PlacedView], found: Sequence[resharding.Overlap]) -> None:
        """Scatter what was planned."""
        for overlap in found:
            data = memoryview(bytearray(self.rows[overlap.table, overlap.row]))
            views[overlap.wanted].scatter_part(overlap.chunk, data, overlap.part)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """C-contiguous bytes."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of which every element is another."""
    return torch.arange(1, prod(shape) + 1, dtype=torch.int32).reshape(shape)


def views_of(local: torch.Tensor, sharding: Sharding, shape: tuple[int, ...], position: int) -> list[PlacedView]:
    """A position's local tensor as memory of the global one."""
    return [
        PlacedView(box, target_view(local[slices(inner)] if shape else local, None))
        for box, inner in sharding.local_boxes(shape, position)
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], Sharding, Sharding]:
    """A shape, and two shardings of it over two meshes."""
    shape, before = draw(cases())
    other = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    placements = [
        Placement(dim, 1 if dim is None else draw(st.integers(1, 3)))
        for dim in (draw(st.none() | st.integers(0, len(shape) - 1)) for _ in other)
    ]
    return shape, before, sharding_of(other, placements)


@given(pairs(), st.sampled_from([16, 64, 4096]))
@settings(deadline=None, max_examples=200)
def test_any_mesh_becomes_any_other(case: tuple[tuple[int, ...], Sharding, Sharding], chunk_nbytes: int) -> None:
    """Each rank of the new mesh gets exactly its part, and reads exactly the chunks that overlap it."""
    shape, before, after = case
    tensor = numbered(shape)
    stored = Stored(tensor, before, chunk_nbytes)
    for position in range(after.num_positions):
        local = torch.zeros(after.local_shape(shape, position), dtype=torch.int32)
        views = views_of(local, after, shape, position)
        found = overlaps(stored.entry, [view.box for view in views], "x")
        stored.fill(views, found)
        for box, inner in after.local_boxes(shape, position):
            assert torch.equal(local[slices(inner)], tensor[slices(box)])
        needed = {
            (at, wanted)
            for at, chunk in stored.boxes.items()
            for wanted, view in enumerate(views)
            if chunk.intersect(view.box) is not None
        }
        assert {((overlap.table, overlap.row), overlap.wanted) for overlap in found} == needed
        assert len(found) == len(needed)


@given(cases(), st.permutations(range(3)))
@settings(deadline=None)
def test_a_mesh_becomes_one_tensor_in_any_memory(case: tuple[tuple[int, ...], Sharding], order: list[int]) -> None:
    """What a mesh stored is read whole into a plain tensor, whatever the order of its dimensions in memory."""
    shape, sharding = case
    tensor = numbered(shape)
    stored = Stored(tensor, sharding)
    order = [dim for dim in order if dim < len(shape)]
    target = torch.zeros([shape[dim] for dim in order], dtype=torch.int32).permute(inverse(order))
    view = target_view(target, None)
    found = overlaps(stored.entry, [whole(shape)], "x")
    stored.fill([PlacedView(whole(shape), view)], found)
    assert torch.equal(target, tensor)
    assert len(found) == len(stored.rows)


@given(cases(), st.permutations(range(3)))
@settings(deadline=None)
def test_one_tensor_becomes_a_mesh(case: tuple[tuple[int, ...], Sharding], order: list[int]) -> None:
    """A plain tensor, stored in the order of its own memory, is read by each rank of a mesh into its part."""
    shape, sharding = case
    order = [dim for dim in order if dim < len(shape)]
    tensor = numbered(tuple(shape[dim] for dim in order)).permute(inverse(order))
    view = host_view(tensor)
    cell = grid.choose_cell(view.memory_shape, view.memory_shape, 4, CHUNK_NBYTES)
    pieces = grid.cut(whole(view.memory_shape), cell, 4)
    shards = (ShardEntry((whole(view.memory_shape),), Span(0, 3, len(pieces))),)
    entry = TensorEntry("x", shape, view.permutation, cell, shards, None, "tensor", False, view.nbytes)
    raw = view.read()
    for position in range(sharding.num_positions):
        local = torch.zeros(sharding.local_shape(shape, position), dtype=torch.int32)
        parts = sharding.local_boxes(shape, position)
        boxes = wanted_in_memory_order([box for box, _ in parts], view.permutation)
        views = [
            PlacedView(box, target_view(local[slices(inner)], view.permutation))
            for box, (_, inner) in zip(boxes, parts, strict=True)
        ]
        for overlap in overlaps(entry, boxes, "x"):
            piece = pieces[overlap.row - 3]
            data = memoryview(raw)[piece.offset : piece.offset + piece.nbytes]
            views[overlap.wanted].scatter_part(overlap.chunk, data, overlap.part)
        for box, inner in parts:
            assert torch.equal(local[slices(inner)], tensor[slices(box)])


@given(pairs())
@settings(deadline=None)
def test_chunks_that_lie_whole_can_be_compared(case: tuple[tuple[int, ...], Sharding, Sharding]) -> None:
    """Where a chunk has an offset, the memory of the wanted box holds it there, in one range."""
    shape, before, after = case
    tensor = numbered(shape)
    stored = Stored(tensor, before)
    for boxes in after.regions(shape):
        for overlap in overlaps(stored.entry, boxes, "x"):
            box = boxes[overlap.wanted]
            if overlap.offset is None:
                continue
            start = 4 * overlap.offset
            data = stored.rows[overlap.table, overlap.row]
            assert bytes_of(tensor[slices(box)])[start : start + len(data)] == data
            assert overlap.part == overlap.chunk


@given(cases())
@settings(deadline=None)
def test_the_same_mesh_needs_no_parts(case: tuple[tuple[int, ...], Sharding]) -> None:
    """Restoring onto the mesh that took the snapshot reads each chunk whole, and can compare each before reading."""
    shape, sharding = case
    stored = Stored(numbered(shape), sharding)
    for boxes in sharding.regions(shape):
        found = overlaps(stored.entry, boxes, "x")
        assert all(overlap.part == overlap.chunk and overlap.offset is not None for overlap in found)
        assert len(found) == sum(num_pieces(box, stored.entry.cell) for box in boxes)


def test_scalars() -> None:
    """A replicated scalar is one chunk."""
    tensor = torch.tensor(5, dtype=torch.int32)
    stored = Stored(tensor, sharding_of((2,), [REPLICATE]))
    target = torch.zeros((), dtype=torch.int32)
    found = overlaps(stored.entry, [whole(())], "x")
    stored.fill([PlacedView(whole(()), target_view(target, None))], found)
    assert target == 5


def test_written_down_boxes() -> None:
    """A ShardedTensor's boxes, of different widths and on some ranks none, become a mesh of rows."""
    boxes = ((Box((0, 0), (8, 5)), Box((0, 5), (2, 6))), (), (Box((2, 5), (6, 6)),))
    tensor = numbered((8, 11))
    stored = Stored(tensor, Sharding((3,), (4, 5, 6), None, None, boxes))
    rows = sharding_of((5,), [Placement(0)])
    for position in range(5):
        local = torch.zeros(rows.local_shape((8, 11), position), dtype=torch.int32)
        views = views_of(local, rows, (8, 11), position)
        stored.fill(views, overlaps(stored.entry, [view.box for view in views], "x"))
        assert torch.equal(local, tensor[2 * position : 2 * position + 2])


@pytest.mark.parametrize("kind", ["gap", "twice"])
def test_what_is_not_there_is_an_error(kind: str) -> None:
    """Shards that leave a gap, or hold an element twice, are refused where that part is wanted, and only there."""
    second = Box((3,), (1,)) if kind == "gap" else Box((1,), (3,))
    shards = (ShardEntry((Box((0,), (2,)),), Span(0, 0, 1)), ShardEntry((second,), Span(0, 1, 1)))
    entry = TensorEntry("x", (4,), None, (4,), shards, None, "tensor", False, 4)
    assert overlaps(entry, [Box((0,), (1,))], "x")
    with pytest.raises(FormatError, match="does not hold all"):
        overlaps(entry, [whole((4,))], "0/model/x")


def test_many_regions_are_not_searched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10^5 regions only those near the wanted box are looked at, along whichever dimension they differ."""
    count = 100_000
    looked_at = 0
    intersect = Box.intersect

    def counting(self: Box, other: Box) -> Box | None:
        nonlocal looked_at
        looked_at += 1
        return intersect(self, other)

    monkeypatch.setattr(Box, "intersect", counting)
    for dim in (0, 1):
        shape = tuple(count if each == dim else 2 for each in range(2))
        sharding = sharding_of((count,), [Placement(dim)])
        columns = span_columns([Span(region, 0, 1) for region in range(count)])
        entry = ShardedTensorEntry("x", shape, (1, 1), sharding, *columns, "tensor", False, 2 * count)
        wanted = [
            Box(
                tuple(start if each == dim else 0 for each in range(2)),
                tuple(50 if each == dim else 2 for each in range(2)),
            )
            for start in (0, 77_777, count - 50)
        ]
        looked_at = 0
        assert len({overlap.table for overlap in overlaps(entry, wanted, "x")}) == 150
        assert looked_at < 1000


@st.composite
def boxes_within(draw: st.DrawFn, outer: Box) -> Box:
    """A box inside another one."""
    starts = [draw(st.integers(0, size - 1)) for size in outer.sizes]
    sizes = [draw(st.integers(1, size - start)) for size, start in zip(outer.sizes, starts, strict=True)]
    return Box(tuple(a + b for a, b in zip(outer.offsets, starts, strict=True)), tuple(sizes))


@given(st.data())
@settings(deadline=None)
def test_scattering_a_part_writes_only_it(data: st.DataObject) -> None:
    """A part of a chunk goes where it belongs in tensors and arrays of any layout, and nothing else changes."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    # the chunk reaches out of the tensor on every side
    chunk = data.draw(boxes_within(Box((-2,) * len(shape), tuple(size + 4 for size in shape))))
    inside = chunk.intersect(whole(shape))
    if inside is None:
        return
    part = data.draw(boxes_within(inside))
    content = torch.arange(chunk.numel, dtype=torch.int16).reshape(chunk.sizes) + 1
    raw = bytes_of(content)
    expected = torch.zeros(shape, dtype=torch.int16)
    expected[slices(part)] = content[slices(part.relative_to(chunk))]
    order = data.draw(st.permutations(range(len(shape))))
    plain = torch.zeros([shape[dim] for dim in order], dtype=torch.int16).permute(inverse(order))
    strided = torch.zeros([2 * size for size in shape], dtype=torch.int16)[tuple(slice(0, None, 2) for _ in shape)]
    array: Any = np.zeros(shape, dtype=np.int16)
    for target in (plain, strided, array):
        for buffer in (memoryview(bytearray(raw)), memoryview(raw)):
            target_view(target, None).scatter_part(chunk, buffer, part)
            assert torch.equal(torch.as_tensor(target), expected)
            target[...] = 0


@pytest.mark.parametrize(
    ("chunk", "part", "nbytes"),
    [
        (Box((0, 0), (2, 2)), Box((0, 0), (1, 2)), 3),
        (Box((0, 0), (2, 2)), Box((1, 0), (2, 1)), 4),
        (Box((1, 1), (2, 2)), Box((0, 1), (1, 1)), 4),
        (Box((-1, 0), (4, 4)), Box((-1, 0), (2, 2)), 16),
    ],
)
def test_parts_outside_are_refused(chunk: Box, part: Box, nbytes: int) -> None:
    """A part that is not in the chunk or not in the tensor, or data of another size, writes nothing."""
    target = torch.zeros(3, 3, dtype=torch.uint8)
    with pytest.raises(ValueError):
        target_view(target, None).scatter_part(chunk, memoryview(bytearray(b"x" * nbytes)), part)
    assert not target.any()
