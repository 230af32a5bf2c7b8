"""Integers only: boxes of a tensor, how they overlap, and the grid that cuts them into chunks.

All coordinates are those of the *memory order* of the global tensor (its shape after the entry's permutation). The
grid is fixed to the global tensor: a chunk is the intersection of one cell with one box, so two boxes that hold the
same cell-aligned region share its chunks. Nothing here knows bytes, dtypes or files beyond an element's size in
bytes.

Invariants: the pieces of a box cover every byte of its C-contiguous local memory exactly once, each is one contiguous
range, and they come in C order, which is the order of their offsets. A shape without dimensions counts as ``(1,)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

SMALLEST_SHARDED_CHUNK_NBYTES = 1 << 20
_CHUNKS_PER_SHARDED_TENSOR = 64


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a tensor: where it starts and how far it reaches in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements in the box."""
        return prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The region that both boxes hold, or None if it is empty."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
        if any(size <= 0 for size in sizes):
            return None
        return Box(offsets, sizes)

    def relative_to(self, outer: Box) -> Box:
        """The same region in the coordinates of ``outer``."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk of a box: its region in global coordinates and its byte range in the box's C-contiguous memory."""

    box: Box
    offset: int
    nbytes: int


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor; a shape without dimensions counts as ``(1,)``."""
    sizes = tuple(shape) or (1,)
    return Box((0,) * len(sizes), sizes)


def choose_cell(shape: Sequence[int], box_sizes: Sequence[int], itemsize: int, chunk_nbytes: int) -> tuple[int, ...]:
    """Compute the grid's cell for a tensor whose largest box has ``box_sizes``.

    Args:
        shape: Global shape in memory order.
        box_sizes: Sizes of the largest box.
        itemsize: Bytes of one element.
        chunk_nbytes: The most bytes that a chunk should have.

    Returns:
        One positive integer for each dimension (one for a shape without dimensions).
    """
    shape = tuple(shape) or (1,)
    box_sizes = tuple(box_sizes) or (1,)
    cell = [max(1, size) for size in shape]
    if 0 in box_sizes:
        # the longest suffix that fits is everything
        return tuple(cell)
    suffix_nbytes = itemsize
    dim = len(shape) - 1
    while dim >= 0 and suffix_nbytes * box_sizes[dim] <= chunk_nbytes:
        suffix_nbytes *= box_sizes[dim]
        dim -= 1
    if dim >= 0:
        rows = max(1, chunk_nbytes // suffix_nbytes)
        cell[dim] = 1 << (rows.bit_length() - 1)
        cell[:dim] = [1] * dim
    return tuple(cell)


def choose_chunk_nbytes(total_nbytes: int, chunk_nbytes: int, *, sharded: bool) -> int:
    """Lower the chunk size for a sharded tensor, so that a reshard cuts few chunks in two.

    Args:
        total_nbytes: Bytes of the whole global tensor.
        chunk_nbytes: The store's chunk size.
        sharded: Whether the tensor is spread over several boxes or ranks.

    Returns:
        ``chunk_nbytes`` or the power of two at or below a 64th of the tensor, but never less than 1 MiB because of it.
    """
    if not sharded:
        return chunk_nbytes
    share = max(1, total_nbytes // _CHUNKS_PER_SHARDED_TENSOR)
    return min(chunk_nbytes, max(SMALLEST_SHARDED_CHUNK_NBYTES, 1 << (share.bit_length() - 1)))


def cell_for(
    shape: Sequence[int],
    boxes: Sequence[Box],
    itemsize: int,
    chunk_nbytes: int,
    kept: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """The cell of an entry: the kept one while it fits every box, else computed from the largest box.

    Args:
        shape: Global shape in memory order.
        boxes: All boxes of the entry.
        itemsize: Bytes of one element.
        chunk_nbytes: The most bytes that a chunk should have.
        kept: The cell of the newest manifest for the same path, shape and dtype.
    """
    if (
        kept is not None
        and len(kept) == max(1, len(shape))
        and all(cell_fits(box, kept, itemsize, chunk_nbytes) for box in boxes)
    ):
        return kept
    if not boxes:
        return choose_cell(shape, shape, itemsize, chunk_nbytes)
    # of boxes of one size the one with the lowest offsets decides, so that all ranks compute the same
    largest = min(boxes, key=lambda box: (-box.numel, box.offsets))
    return choose_cell(shape, largest.sizes, itemsize, chunk_nbytes)


def num_pieces(box: Box, cell: Sequence[int]) -> int:
    """How many chunks :func:`cut` makes of the box, without making them."""
    if not box.sizes:
        return 1
    if 0 in box.sizes:
        return 0
    return prod(
        (start + size - 1) // step - start // step + 1
        for start, size, step in zip(box.offsets, box.sizes, cell, strict=True)
    )


def cell_fits(box: Box, cell: Sequence[int], itemsize: int, chunk_nbytes: int) -> bool:
    """Whether every chunk of the box is one contiguous range of at most twice ``chunk_nbytes``."""
    if not box.sizes:
        return itemsize <= 2 * chunk_nbytes
    if 0 in box.sizes:
        return True
    nbytes = itemsize
    cut_behind = False
    for start, size, step in zip(reversed(box.offsets), reversed(box.sizes), reversed(cell), strict=True):
        extent = _largest_extent(start, size, step)
        if extent > 1 and cut_behind:
            return False
        cut_behind = cut_behind or extent < size
        nbytes *= extent
    return nbytes <= 2 * chunk_nbytes


def cut(box: Box, cell: Sequence[int], itemsize: int) -> list[Piece]:
    """Cut a box on the grid.

    Args:
        box: The region, in global coordinates of the memory order.
        cell: The grid's cell.
        itemsize: Bytes of one element.

    Returns:
        The chunks in C order; none for an empty box. Their offsets count from the start of the box's local memory.

    Raises:
        ValueError: A chunk would not be contiguous in the box's memory.
    """
    if not box.sizes:
        return [Piece(Box((0,), (1,)), 0, itemsize)]
    if 0 in box.sizes:
        return []
    nbytes = box.numel * itemsize
    if box.sizes == cell and not any(box.offsets):
        return [Piece(box, 0, nbytes)]
    dims = list(zip(box.offsets, box.sizes, cell, strict=True))
    if all(start // step == (start + size - 1) // step for start, size, step in dims):
        return [Piece(box, 0, nbytes)]
    segments = [_segments(*dim) for dim in dims]
    if not cell_fits(box, cell, itemsize, nbytes):
        raise ValueError(f"cell {tuple(cell)} cuts box {box.offsets}+{box.sizes} into pieces that are not contiguous")
    pieces = []
    offset = 0
    for combination in itertools.product(*segments):
        offsets, sizes = zip(*combination, strict=True)
        piece = Piece(Box(offsets, sizes), offset, prod(sizes) * itemsize)
        pieces.append(piece)
        offset += piece.nbytes
    return pieces


def _segments(start: int, size: int, step: int) -> list[tuple[int, int]]:
    """Cut ``[start, start + size)`` at the multiples of ``step``: (offset, size) of each part."""
    end = start + size
    edges = [start, *range((start // step + 1) * step, end, step), end]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def _largest_extent(start: int, size: int, step: int) -> int:
    first = min(size, step - start % step)
    rest = size - first
    return max(first, min(rest, step))
