"""The chunk grid: integers only, so everything here is a property of all inputs."""

from __future__ import annotations

import itertools
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box

shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)
positive_shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
itemsizes = st.sampled_from([1, 2, 4, 8, 16])
chunk_sizes = st.integers(1, 600)


@st.composite
def shapes_with_box(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A global shape and a box inside it that is not empty."""
    shape = draw(positive_shapes)
    starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - start)) for start, size in zip(starts, shape, strict=True))
    return shape, Box(starts, sizes)


def cells_of(box: Box, cell: tuple[int, ...]) -> list[Box]:
    """Every cell of the grid that meets the box, by brute force over indices."""
    found = {tuple(index // step for index, step in zip(place, cell, strict=True)) for place in places(box)}
    return [Box(tuple(i * c for i, c in zip(index, cell, strict=True)), cell) for index in sorted(found)]


def places(box: Box) -> list[tuple[int, ...]]:
    """Every index of the box in C order."""
    return list(itertools.product(*(range(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))))


@given(shapes_with_box(), itemsizes, chunk_sizes)
def test_pieces_cover_every_byte_of_a_box_once_and_in_order(
    shape_and_box: tuple[tuple[int, ...], Box], itemsize: int, chunk_nbytes: int
) -> None:
    """Pieces are the cells that meet the box; laid end to end in their order they are the box's C-contiguous memory."""
    shape, box = shape_and_box
    cell = grid.choose_cell(shape, box.sizes, itemsize, chunk_nbytes)
    pieces = grid.cut(box, cell, itemsize)
    assert [piece.box for piece in pieces] == [each.intersect(box) for each in cells_of(box, cell)]
    assert [place for piece in pieces for place in places(piece.box)] == places(box)
    assert [piece.offset for piece in pieces] == [
        sum(piece.nbytes for piece in pieces[:index]) for index in range(len(pieces))
    ]
    assert all(piece.nbytes == piece.box.numel * itemsize for piece in pieces)
    assert len(pieces) == grid.num_pieces(box, cell)


@given(shapes, itemsizes, chunk_sizes)
def test_a_chosen_cell_follows_the_recipe(shape: tuple[int, ...], itemsize: int, chunk_nbytes: int) -> None:
    """The longest suffix that fits a chunk is whole, the dimension before it has a power of two, the others have 1."""
    cell = grid.choose_cell(shape, shape, itemsize, chunk_nbytes)
    sizes = shape or (1,)
    assert len(cell) == len(sizes)
    assert all(step >= 1 for step in cell)
    suffixes = [index for index in range(len(sizes) + 1) if prod(sizes[index:]) * itemsize <= chunk_nbytes]
    first = min(suffixes, default=len(sizes))
    assert cell[first:] == tuple(max(1, size) for size in sizes[first:])
    if first:
        suffix_nbytes = prod(sizes[first:]) * itemsize
        step = cell[first - 1]
        assert step & (step - 1) == 0
        assert step == 1 or step * suffix_nbytes <= chunk_nbytes
        assert 2 * step * suffix_nbytes > chunk_nbytes
        assert cell[: first - 1] == (1,) * (first - 1)


@given(shapes_with_box(), itemsizes, chunk_sizes)
def test_a_chosen_cell_fits_its_own_box(
    shape_and_box: tuple[tuple[int, ...], Box], itemsize: int, chunk_nbytes: int
) -> None:
    """A fresh cell never has to be computed anew, unless one element alone is larger than two chunks."""
    shape, box = shape_and_box
    cell = grid.choose_cell(shape, box.sizes, itemsize, chunk_nbytes)
    assert grid.cell_fits(box, cell, itemsize, chunk_nbytes) or itemsize > chunk_nbytes


@given(shapes_with_box(), positive_shapes, itemsizes, chunk_sizes)
def test_a_cell_fits_exactly_where_its_chunks_are_contiguous_and_small(
    shape_and_box: tuple[tuple[int, ...], Box], cell: tuple[int, ...], itemsize: int, chunk_nbytes: int
) -> None:
    """The quick test agrees with looking at every chunk's addresses."""
    _, box = shape_and_box
    cell = (*cell, 1, 1, 1, 1)[: len(box.sizes)]
    address = {place: index for index, place in enumerate(places(box))}
    fits = True
    for each in cells_of(box, cell):
        piece = each.intersect(box)
        assert piece is not None
        taken = [address[place] for place in places(piece)]
        contiguous = taken == list(range(taken[0], taken[0] + len(taken)))
        fits = fits and contiguous and len(taken) * itemsize <= 2 * chunk_nbytes
    assert grid.cell_fits(box, cell, itemsize, chunk_nbytes) == fits


@given(shapes_with_box(), itemsizes, chunk_sizes)
def test_a_cell_that_fits_is_kept(shape_and_box: tuple[tuple[int, ...], Box], itemsize: int, chunk_nbytes: int) -> None:
    """Another chunk size alone changes no cell; one that fits no more, or of other dimensions, is computed anew."""
    shape, box = shape_and_box
    kept = grid.choose_cell(shape, shape, itemsize, 64)
    chosen = grid.cell_for(shape, [box], itemsize, chunk_nbytes, kept)
    if grid.cell_fits(box, kept, itemsize, chunk_nbytes):
        assert chosen == kept
    else:
        assert chosen == grid.choose_cell(shape, box.sizes, itemsize, chunk_nbytes)
    assert grid.cell_for(shape, [box], itemsize, chunk_nbytes, (*kept, 1)) == grid.choose_cell(
        shape, box.sizes, itemsize, chunk_nbytes
    )


def test_the_largest_box_decides_the_cell() -> None:
    """Of boxes of one size the one with the lowest offsets counts, whatever the order they come in."""
    boxes = [Box((4, 0), (4, 2)), Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), Box((0, 2), (1, 1))]
    for order in itertools.permutations(boxes):
        assert grid.cell_for((8, 4), order, 1, 4) == grid.choose_cell((8, 4), (2, 4), 1, 4)


@given(shapes_with_box(), st.data())
def test_two_boxes_share_the_chunks_of_cells_that_both_hold(
    shape_and_box: tuple[tuple[int, ...], Box], data: st.DataObject
) -> None:
    """Rows that move from one shard to another keep their chunks, because the grid is that of the global tensor."""
    shape, _ = shape_and_box
    split = data.draw(st.integers(0, shape[0]))
    cell = grid.choose_cell(shape, shape, 4, 64)
    whole = grid.whole(shape)
    first = Box(whole.offsets, (split, *shape[1:]))
    second = Box((split, *whole.offsets[1:]), (shape[0] - split, *shape[1:]))
    pieces = [piece.box for box in (first, second) for piece in grid.cut(box, cell, 4)]
    complete = {piece.box for piece in grid.cut(whole, cell, 4)}
    assert len([box for box in pieces if box not in complete]) <= 2 * prod(shape[1:])
    assert sum(box.numel for box in pieces) == prod(shape)


def test_zero_dimensions_count_as_one_element() -> None:
    """A 0-d tensor has one chunk on the grid of ``(1,)``."""
    assert grid.whole(()) == Box((0,), (1,))
    assert grid.choose_cell((), (), 8, 4) == (1,)
    assert grid.cut(Box((), ()), (1,), 8) == [grid.Piece(Box((0,), (1,)), 0, 8)]
    assert grid.num_pieces(Box((), ()), (1,)) == 1
    assert grid.cell_for((), [grid.whole(())], 4, 64, (1,)) == (1,)


def test_an_empty_box_has_no_chunk() -> None:
    """Nothing is stored for a tensor with a zero in its shape."""
    box = grid.whole((0, 3))
    cell = grid.choose_cell((0, 3), (0, 3), 4, 64)
    assert cell == (1, 3)
    assert grid.cut(box, cell, 4) == []
    assert grid.num_pieces(box, cell) == 0
    assert grid.cell_fits(box, cell, 4, 1)


def test_pieces_that_are_not_contiguous_are_refused() -> None:
    """A cell that cuts the inner dimension while the outer one is longer than 1 is an error, not wrong bytes."""
    with pytest.raises(ValueError, match="not contiguous"):
        grid.cut(Box((0, 0), (4, 4)), (2, 2), 1)


def test_huge_grids_are_counted_without_being_made() -> None:
    """A hostile box is refused by its count, before any list of it exists."""
    assert grid.num_pieces(Box((0, 0), (1 << 40, 1 << 40)), (1, 1)) == 1 << 80


@pytest.mark.parametrize(
    ("total", "sharded", "expected"),
    [(1 << 40, False, 1 << 22), (1 << 40, True, 1 << 22), (100 << 20, True, 1 << 20), ((1 << 27) + 5, True, 1 << 21)],
)
def test_sharded_tensors_get_smaller_chunks(total: int, sharded: bool, expected: int) -> None:
    """A sharded tensor's chunks are at most a 64th of it, as a power of two, but at least 1 MiB."""
    assert grid.choose_chunk_nbytes(total, 1 << 22, sharded=sharded) == expected
    assert grid.choose_chunk_nbytes(total, 1000, sharded=sharded) == 1000


@given(shapes_with_box(), st.data())
def test_intersections_hold_what_both_boxes_hold(
    shape_and_box: tuple[tuple[int, ...], Box], data: st.DataObject
) -> None:
    """``intersect`` is symmetric, agrees with sets of indices, and is None where these share nothing."""
    shape, box = shape_and_box
    starts = tuple(data.draw(st.integers(0, size)) for size in shape)
    other = Box(
        starts, tuple(data.draw(st.integers(0, size - start)) for start, size in zip(starts, shape, strict=True))
    )
    common = set(places(box)) & set(places(other))
    both = box.intersect(other)
    assert both == other.intersect(box)
    assert (set() if both is None else set(places(both))) == common
    if both is not None:
        assert both.relative_to(box).sizes == both.sizes
        assert min(both.relative_to(box).offsets) >= 0
