"""The grid's cell of a tensor that is spread over a mesh: the same on every rank, as all of them know all boxes.

What lives here: the choice over many boxes. What doesn't: the recipe for one (``grid``), the boxes (``placements``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.placements import Placement, Sharding


def cell_for(
    shape: Sequence[int], sharding: Sharding, itemsize: int, chunk_nbytes: int, kept: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The cell of a sharded tensor's grid.

    Args:
        shape: the global shape.
        sharding: how it is spread.
        itemsize: bytes of one element.
        chunk_nbytes: the store's chunk size; it is lowered for tensors that are spread.
        kept: the cell of the newest manifest for the same path, shape and dtype.
    """
    if sharding.placements is None:
        return _cell(tuple(shape), sharding.regions(shape), itemsize, chunk_nbytes, kept)
    return _cell_by_placements(
        tuple(shape), sharding.mesh_shape, sharding.placements, sharding.order, itemsize, chunk_nbytes, kept
    )


@lru_cache(maxsize=1024)
def _cell_by_placements(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    order: tuple[int, ...] | None,
    itemsize: int,
    chunk_nbytes: int,
    kept: tuple[int, ...] | None,
) -> tuple[int, ...]:
    # which ranks they are does not matter, so the layers of a model are computed once
    sharding = Sharding(mesh_shape, tuple(range(prod(mesh_shape))), placements, order)
    return _cell(shape, sharding.regions(shape), itemsize, chunk_nbytes, kept)


def _cell(
    shape: tuple[int, ...],
    regions: Sequence[Sequence[Box]],
    itemsize: int,
    chunk_nbytes: int,
    kept: tuple[int, ...] | None,
) -> tuple[int, ...]:
    nbytes = grid.choose_chunk_nbytes(prod(shape) * itemsize, chunk_nbytes, sharded=len(regions) > 1)
    boxes = [box for boxes in regions for box in boxes]
    cell = grid.cell_for(shape, boxes, itemsize, nbytes, kept)
    if all(grid.cell_fits(box, cell, itemsize, nbytes) for box in boxes):
        return cell
    # boxes that were written down may be wider than the one with the most elements
    cells = [grid.choose_cell(shape, sizes, itemsize, nbytes) for sizes in {box.sizes for box in boxes}]
    return tuple(map(min, zip(*cells, strict=True)))
