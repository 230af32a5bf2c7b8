"""From the regions that a snapshot holds of a tensor to the regions that somebody wants: which chunks, which parts.

What lives here: pure planning over boxes. What doesn't: reading (``reading.reads``, ``reading.read_jobs``), memory
(``host_views``, ``sharded``), how tensors are spread (``geometry.placements``).

All boxes are in the memory order of the stored tensor: ``wanted_in_memory_order`` brings a target's boxes there.

Invariants: only chunks that overlap something wanted are named, each with exactly the part that does; what is wanted
is covered in full, or it is an error. The work grows with the regions' number times its logarithm, plus what
overlaps.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import attrgetter

from torchsnapshot.errors import FormatError
from torchsnapshot.format.entry_kinds import ShardedTensorEntry, TensorEntry
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.layout import contiguous_offset
from torchsnapshot.geometry.placements import Placement, Sharding


@dataclass(frozen=True, slots=True)
class Overlap:
    """A chunk, and the part of it that goes into one of the wanted boxes.

    ``chunk`` and ``part`` are in global coordinates. ``offset`` says where the chunk begins in the C-contiguous memory
    of the wanted box, in elements, if it lies there whole and in one range: then these bytes can be compared with it.
    """

    table: int
    row: int
    chunk: Box
    part: Box
    wanted: int
    offset: int | None


def wanted_in_memory_order(boxes: Sequence[Box], permutation: Sequence[int] | None) -> list[Box]:
    """Boxes of a tensor's logical shape as those of its memory order."""
    if permutation is None:
        return list(boxes)
    return [
        Box(tuple(box.offsets[dim] for dim in permutation), tuple(box.sizes[dim] for dim in permutation))
        for box in boxes
    ]


def overlaps(entry: TensorEntry | ShardedTensorEntry, wanted: Sequence[Box], where: str) -> list[Overlap]:
    """Which chunks of an entry hold what is wanted.

    Args:
        entry: what is stored; not inline.
        wanted: boxes in memory order, each inside the tensor.
        where: which tensor this is, for messages.

    Returns:
        One for each chunk and wanted box that overlap: in the order of ``wanted``, and for each of these by table and
        row.

    Raises:
        FormatError: the entry does not hold all that is wanted.
    """
    index, tables, rows = _stored(entry)
    found: list[Overlap] = []
    for number, box in enumerate(wanted):
        mine: list[Overlap] = []
        for stored in index.near(box):
            part = stored.box.intersect(box)
            if part is not None:
                table, row = tables[stored.region], rows[stored.region] + stored.skip
                mine.extend(_chunks(table, row, stored.box, entry.cell, part, box, number))
        if sum([overlap.part.numel for overlap in mine]) != box.numel:
            raise FormatError(f"{where}: the snapshot does not hold all of {list(box.offsets)}+{list(box.sizes)}, once")
        mine.sort(key=attrgetter("table", "row"))
        found.extend(mine)
    return found


@dataclass(frozen=True, slots=True)
class _StoredBox:
    """A box of a region; its first chunk is the region's number ``skip``."""

    box: Box
    region: int
    skip: int


class _Index:
    """Finds the stored boxes near a wanted one: by their starts along the dimension that they differ most in."""

    def __init__(self, regions: Sequence[Sequence[Box]], cell: tuple[int, ...]) -> None:
        boxes: list[_StoredBox] = []
        for region, held in enumerate(regions):
            skip = 0
            for box in held:
                boxes.append(_StoredBox(box, region, skip))
                # nearly always there is one box, and nobody needs to know where the next one would begin
                skip += grid.num_pieces(box, cell) if len(held) > 1 else 0
        num_starts = [len({stored.box.offsets[dim] for stored in boxes}) for dim in range(len(cell))]
        self._dim = dim = num_starts.index(max(num_starts))
        boxes.sort(key=lambda stored: stored.box.offsets[dim])
        self._boxes = boxes
        self._starts = [stored.box.offsets[dim] for stored in boxes]
        self._longest = max((stored.box.sizes[dim] for stored in boxes), default=0)

    def near(self, box: Box) -> Sequence[_StoredBox]:
        """Those that may overlap the box."""
        if not box.numel:
            return ()
        start, size = box.offsets[self._dim], box.sizes[self._dim]
        first = bisect_left(self._starts, start - self._longest + 1)
        return self._boxes[first : bisect_left(self._starts, start + size)]


@lru_cache(maxsize=128)
def _index_of_placements(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    order: tuple[int, ...] | None,
    cell: tuple[int, ...],
) -> _Index:
    # which ranks they are does not matter, so the layers of a model share one index
    ranks = tuple(range(prod(mesh_shape)))
    return _Index(Sharding(mesh_shape, ranks, placements, order).regions(shape), cell)


def _stored(entry: TensorEntry | ShardedTensorEntry) -> tuple[_Index, Sequence[int], Sequence[int]]:
    """The boxes of an entry's regions, and of each region the chunk table and the first row."""
    if isinstance(entry, TensorEntry):
        spans = [shard.span for shard in entry.shards]
        index = _Index([shard.boxes for shard in entry.shards], entry.cell)
        return index, [span.table for span in spans], [span.first for span in spans]
    sharding = entry.sharding
    if sharding.placements is None:
        index = _Index(sharding.regions(entry.shape), entry.cell)
    else:
        index = _index_of_placements(entry.shape, sharding.mesh_shape, sharding.placements, sharding.order, entry.cell)
    return index, memoryview(entry.tables).cast("I"), memoryview(entry.firsts).cast("I")


def _chunks(
    table: int, first_row: int, box: Box, cell: tuple[int, ...], part: Box, wanted: Box, number: int
) -> Iterator[Overlap]:
    """The chunks of a stored box that overlap a part of it, without making the others."""
    ranges, counts = [], []
    for start, size, step, part_start, part_size in zip(
        box.offsets, box.sizes, cell, part.offsets, part.sizes, strict=True
    ):
        first = start // step
        counts.append((start + size - 1) // step - first + 1)
        ranges.append(range(part_start // step - first, (part_start + part_size - 1) // step - first + 1))
    strides = [prod(counts[dim + 1 :]) for dim in range(len(counts))]
    for indices in itertools.product(*ranges):
        offsets, sizes = [], []
        for index, start, size, step in zip(indices, box.offsets, box.sizes, cell, strict=True):
            cell_start = (start // step + index) * step
            low = max(start, cell_start)
            offsets.append(low)
            sizes.append(min(start + size, cell_start + step) - low)
        chunk = Box(tuple(offsets), tuple(sizes))
        held = chunk.intersect(wanted)
        assert held is not None
        offset = contiguous_offset(chunk.relative_to(wanted), wanted.sizes) if held == chunk else None
        row = first_row + sum([index * stride for index, stride in zip(indices, strides, strict=True)])
        yield Overlap(table, row, chunk, held, number, offset)
