"""Placements: the boxes of every position are those that torch's DTensor computes, or those that FSDP2 has made."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as torch_says
from torch.distributed.tensor.placement_types import _StridedShard

from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.mesh_cells import cell_for
from torchsnapshot.geometry.placements import (
    MAX_BOXES,
    REPLICATE,
    Placement,
    Sharding,
    is_nesting_the_same,
    nested_order,
)

SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 12, 17])
shapes = st.lists(SIZES, min_size=1, max_size=3).map(tuple)
mesh_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def sharding_of(mesh_shape: tuple[int, ...], placements: list[Placement], order: Any = None) -> Sharding:
    """A sharding over the ranks 0, 1, 2… ."""
    return Sharding(mesh_shape, tuple(range(prod(mesh_shape))), tuple(placements), order)


@st.composite
def cases(draw: st.DrawFn, strided: bool = True) -> tuple[tuple[int, ...], Sharding]:
    """A shape, and placements of it over a mesh."""
    shape, mesh_shape = draw(shapes), draw(mesh_shapes)
    placements = []
    for _ in mesh_shape:
        dim = draw(st.none() | st.integers(0, len(shape) - 1))
        factor = draw(st.integers(1, 5)) if dim is not None and strided else 1
        placements.append(Placement(dim, factor))
    return shape, sharding_of(mesh_shape, placements)


def as_torch(placement: Placement) -> Any:
    """The placement of torch that it stands for."""
    if placement.dim is None:
        return Replicate()
    if placement.split_factor == 1:
        return Shard(placement.dim)
    return _StridedShard(placement.dim, split_factor=placement.split_factor)


def slices(box: Box) -> tuple[slice, ...]:
    """The index of a box."""
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


def coordinates(sharding: Sharding) -> list[tuple[int, ...]]:
    """Of each position, in order."""
    return list(itertools.product(*map(range, sharding.mesh_shape)))


def torch_cuts(tensor: torch.Tensor, sharding: Sharding, at: tuple[int, ...]) -> torch.Tensor:
    """The local tensor that ``distribute_tensor`` gives a position."""
    assert sharding.placements is not None
    for placement, size, index in zip(sharding.placements, sharding.mesh_shape, at, strict=True):
        if placement.dim is not None:
            tensor = as_torch(placement)._split_tensor(tensor, size, with_padding=False)[0][index]
    return tensor


@given(cases())
@settings(deadline=None, max_examples=300)
def test_boxes_are_those_that_torch_computes(case: tuple[tuple[int, ...], Sharding]) -> None:
    """Local shape, first offset, and every element of the local tensor are where torch has them, on every position."""
    shape, sharding = case
    sharding.check(shape)
    assert sharding.placements is not None
    tensor = torch.arange(prod(shape)).reshape(shape)
    for position, at in enumerate(coordinates(sharding)):
        local_shape, offsets = torch_says(
            shape, sharding.mesh_shape, list(at), list(map(as_torch, sharding.placements))
        )
        boxes = sharding.boxes_at(shape, position)
        assert sharding.local_shape(shape, position) == local_shape
        assert bool(boxes) == bool(prod(local_shape))
        if boxes:
            assert boxes[0].offsets == offsets
        local = torch.full(local_shape, -1)
        pairs = sharding.local_boxes(shape, position)
        assert tuple(box for box, _ in pairs) == boxes
        for box, inner in pairs:
            local[slices(inner)] = tensor[slices(box)]
        assert torch.equal(local, torch_cuts(tensor, sharding, at))


@given(cases())
@settings(deadline=None, max_examples=200)
def test_regions_cover_the_tensor_once(case: tuple[tuple[int, ...], Sharding]) -> None:
    """Regions are disjoint and cover everything; positions of one region hold the same boxes, and are all its ranks."""
    shape, sharding = case
    regions = sharding.regions(shape)
    assert len(regions) == sharding.num_regions
    seen = torch.zeros(shape, dtype=torch.int32)
    for boxes in regions:
        for box in boxes:
            assert box.numel
            seen[slices(box)] += 1
    assert bool((seen == 1).all())
    held: dict[int, list[int]] = {}
    for position in range(sharding.num_positions):
        held.setdefault(sharding.region_of(position), []).append(position)
        assert sharding.boxes_at(shape, position) == regions[sharding.region_of(position)]
    assert dict(enumerate(sharding.holders())) == held
    assert [sharding.ranks_of(region) for region in held] == [held[region] for region in held]


@st.composite
def nestings(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, a mesh whose dimensions all cut dimension 0, and the order in which they do."""
    mesh_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    return (draw(st.integers(0, 60)), 2), mesh_shape, draw(st.permutations(range(len(mesh_shape))).map(tuple))


def written_by_torch(mesh_shape: tuple[int, ...], order: tuple[int, ...]) -> list[Placement]:
    """The placements with which torch writes this order of cuts down."""
    placements = [Placement(0)] * len(mesh_shape)
    for place, mesh_dim in enumerate(order):
        factor = prod(mesh_shape[before] for before in order[:place] if before > mesh_dim)
        placements[mesh_dim] = Placement(0, factor)
    return placements


@given(nestings())
@settings(deadline=None)
def test_split_factors_tell_the_order_of_cuts(nesting: tuple[Any, Any, Any]) -> None:
    """The order that split factors stand for gives every position what cutting in the written order gives it."""
    shape, mesh_shape, order = nesting
    placements = written_by_torch(mesh_shape, order)
    found = nested_order(mesh_shape, placements)
    assert found is not None
    tensor = torch.arange(prod(shape)).reshape(shape)
    sharding = sharding_of(mesh_shape, placements, found)
    sharding.check(shape)
    for position, at in enumerate(coordinates(sharding)):
        local = tensor
        for mesh_dim in order:
            local = Shard(0)._split_tensor(local, mesh_shape[mesh_dim], with_padding=False)[0][at[mesh_dim]]
        boxes = sharding.boxes_at(shape, position)
        assert len(boxes) <= 1
        assert sharding.local_shape(shape, position) == tuple(local.shape)
        assert torch.equal(torch.cat([tensor[:0], *(tensor[slices(box)] for box in boxes)]), local)


@given(nestings())
@settings(deadline=None)
def test_even_cuts_need_no_order(nesting: tuple[Any, Any, Any]) -> None:
    """Where the sizes divide evenly, split factors give exactly what the order of cuts gives."""
    shape, mesh_shape, order = nesting
    shape = (shape[0] * prod(mesh_shape), 2)
    placements = tuple(written_by_torch(mesh_shape, order))
    found = nested_order(mesh_shape, placements)
    assert found is not None
    assert is_nesting_the_same(shape, mesh_shape, placements, found)


def test_uneven_cuts_do() -> None:
    """50,257 rows over tensor parallelism of 2 below FSDP of 8: FSDP2's pieces are not those that torch computes."""
    placements = (Placement(0, 2), Placement(0))
    assert nested_order((8, 2), placements) == (1, 0)
    assert not is_nesting_the_same((50257,), (8, 2), placements, (1, 0))
    last = sharding_of((8, 2), list(placements), (1, 0)).boxes_at((50257,), 14)
    assert last == (Box((21994,), (3135,)),)


def test_factors_of_no_order() -> None:
    """Split factors that no order explains (a dimension of the mesh was gathered) are applied as they are."""
    assert nested_order((2, 2), (Placement(0, 2), REPLICATE)) is None
    sharding = sharding_of((2, 2), [Placement(0, 2), REPLICATE])
    assert sharding.boxes_at((8,), 0) == (Box((0,), (2,)), Box((4,), (2,)))
    assert sharding.local_boxes((8,), 3) == [
        (Box((2,), (2,)), Box((0,), (2,))),
        (Box((6,), (2,)), Box((2,), (2,))),
    ]


def test_scalars_have_one_element() -> None:
    """A shape without dimensions counts as one of one element; its local tensor has none either."""
    sharding = sharding_of((2,), [REPLICATE])
    assert sharding.regions(()) == ((Box((0,), (1,)),),)
    assert sharding.local_shape((), 1) == ()


def test_positions_are_found_by_rank() -> None:
    """A mesh may name any ranks in any order."""
    sharding = Sharding((2, 2), (6, 4, 7, 5), (Placement(0), REPLICATE))
    assert [sharding.position_of(rank) for rank in (4, 5, 6, 7, 0)] == [1, 3, 0, 2, None]
    assert sharding.holders() == [[6, 4], [7, 5]]


def test_boxes_may_be_written_down() -> None:
    """Each position has the boxes that are given, each in a local tensor of its own."""
    boxes = ((Box((0, 0), (2, 3)), Box((0, 3), (4, 1))), (), (Box((2, 0), (2, 3)),))
    sharding = Sharding((3,), (1, 2, 3), None, None, boxes)
    sharding.check((4, 4))
    assert sharding.num_regions == 3
    assert sharding.regions((4, 4)) == boxes
    assert sharding.region_of(2) == 2
    assert sharding.local_boxes((4, 4), 0) == [
        (Box((0, 0), (2, 3)), Box((0, 0), (2, 3))),
        (Box((0, 3), (4, 1)), Box((0, 0), (4, 1))),
    ]


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (Sharding((), (), ()), "a mesh of shape"),
        (Sharding((2,), (0,), (REPLICATE,)), "a mesh of shape"),
        (Sharding((0,), (), (REPLICATE,)), "a mesh of shape"),
        (Sharding((2,), (1, 1), (REPLICATE,)), "twice"),
        (Sharding((1,), (-1,), (REPLICATE,)), "negative"),
        (Sharding((1,), (0,), None), "either"),
        (Sharding((1,), (0,), (REPLICATE,), None, ((Box((0,), (4,)),),)), "either"),
        (Sharding((1,), (0,), (REPLICATE, REPLICATE)), "2 placements"),
        (Sharding((1,), (0,), (Placement(1),)), "along dimension 1"),
        (Sharding((1,), (0,), (Placement(-1),)), "along dimension -1"),
        (Sharding((1,), (0,), (Placement(0, 0),)), "split factor"),
        (Sharding((1,), (0,), (Placement(None, 2),)), "split factor"),
        (Sharding((1,), (0,), (Placement(0, MAX_BOXES + 1),)), "boxes, more than"),
        (Sharding((1,), (0,), (Placement(0),), (0, 0)), "each mesh dimension"),
        (Sharding((1,), (0,), (Placement(0),), (1,)), "each mesh dimension"),
        (Sharding((1,), (0,), None, (0,), ((Box((0,), (4,)),),)), "no order"),
        (Sharding((1,), (0,), None, None, ()), "boxes of 0 positions"),
        (Sharding((1,), (0,), None, None, ((Box((0, 0), (4, 1)),),)), "in 1 dimensions"),
        (Sharding((1,), (0,), None, None, ((Box((0,), (5,)),),)), "reaches out"),
        (Sharding((1,), (0,), None, None, ((Box((0,), (3,)),),)), "cover"),
        (Sharding((1,), (0,), None, None, ((Box((0,), (4,)), Box((4,), (0,))),)), "empty"),
    ],
)
def test_what_is_no_sharding_is_refused(sharding: Sharding, message: str) -> None:
    """Each rule has its message."""
    with pytest.raises(ValueError, match=message):
        sharding.check((4,))


@given(cases(), st.sampled_from([1, 2, 4]), st.sampled_from([64, 256, 4096]))
@settings(deadline=None)
def test_one_cell_fits_all_ranks(case: tuple[tuple[int, ...], Sharding], itemsize: int, chunk_nbytes: int) -> None:
    """The cell cuts every rank's boxes into chunks of bounded size, each one range of its box; it is kept."""
    shape, sharding = case
    cell = cell_for(shape, sharding, itemsize, chunk_nbytes)
    for boxes in sharding.regions(shape):
        for box in boxes:
            for piece in grid.cut(box, cell, itemsize):
                assert piece.nbytes <= max(chunk_nbytes, itemsize)
    assert cell_for(shape, sharding, itemsize, chunk_nbytes, cell) == cell


def test_a_wide_box_beside_a_larger_narrow_one() -> None:
    """Written-down boxes of very different shapes all get chunks of bounded size."""
    boxes = ((Box((0, 0), (4096, 1)),), (Box((0, 1), (2, 999)),))
    for order in itertools.permutations(boxes):
        sharding = Sharding((2,), (0, 1), None, None, order)
        cell = cell_for((4096, 1000), sharding, 1, 256)
        assert all(piece.nbytes <= 512 for (box,) in sharding.boxes or () for piece in grid.cut(box, cell, 1))
    narrow = Sharding((2,), (0, 1), None, None, ((Box((0, 0), (1 << 22, 1)),), (Box((0, 1), (1 << 22, 1)),)))
    wide = Sharding((2,), (0, 1), None, None, ((Box((0, 0), (1 << 20, 2)),), (Box((1 << 20, 0), (3 << 20, 2)),)))
    assert cell_for((1 << 22, 2), narrow, 1, 1 << 20) == (1 << 20, 2)
    assert cell_for((1 << 22, 2), wide, 1, 1 << 20) == (1 << 19, 2)


def test_chunks_of_spread_tensors_are_smaller() -> None:
    """A tensor over several ranks is cut finer, so that another mesh shares most chunks; a replicated one is not."""
    shape, nbytes = (1 << 14, 1 << 10), 4 << 20
    whole = cell_for(shape, sharding_of((4,), [REPLICATE]), 4, nbytes)
    spread = cell_for(shape, sharding_of((4,), [Placement(0)]), 4, nbytes)
    assert whole == (1024, 1024)
    assert spread == (256, 1024)
    assert spread == cell_for(shape, sharding_of((8,), [Placement(0)]), 4, nbytes)
