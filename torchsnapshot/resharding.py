"""From the regions that a snapshot holds of a tensor to the regions that somebody wants: which chunks, which parts.

What lives here: pure planning over boxes. What doesn't: reading (``reading``, ``read_jobs``), memory (``host_views``,
``sharded``), how tensors are spread (``placements``).

All boxes are in the memory order of the stored tensor: ``wanted_in_memory_order`` brings a target's boxes there.

Invariants: only chunks that overlap something wanted are named, each with exactly the part that does; what is wanted is
covered in full, or it is an error. The work grows with the regions' number times its logarithm, plus what overlaps.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter

from torchsnapshot import grid
from torchsnapshot.entry_kinds import ShardedTensorEntry, TensorEntry
from torchsnapshot.errors import FormatError
from torchsnapshot.grid import Box
from torchsnapshot.layout import contiguous_offset


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box that is stored: its first chunk is row ``row`` of chunk table number ``table``, the others follow."""

    box: Box
    table: int
    row: int


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


def stored_boxes(entry: TensorEntry | ShardedTensorEntry) -> list[StoredBox]:
    """The boxes that an entry holds; none for a tensor whose bytes stand in the entry itself."""
    held: Iterable[tuple[Sequence[Box], int, int]]
    if isinstance(entry, ShardedTensorEntry):
        tables, firsts = memoryview(entry.tables).cast("I"), memoryview(entry.firsts).cast("I")
        held = zip(entry.sharding.regions(entry.shape), tables, firsts, strict=True)
    else:
        held = [(shard.boxes, shard.span.table, shard.span.first) for shard in entry.shards]
    found = []
    for boxes, table, row in held:
        for box in boxes:
            found.append(StoredBox(box, table, row))
            # nearly always there is one box, and nobody needs to know where the next one would begin
            row += grid.num_pieces(box, entry.cell) if len(boxes) > 1 else 0
    return found


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
    index = _Index(stored_boxes(entry))
    found: list[Overlap] = []
    for number, box in enumerate(wanted):
        mine: list[Overlap] = []
        for stored in index.near(box):
            part = stored.box.intersect(box)
            if part is not None:
                mine.extend(_chunks(stored, part, entry.cell, box, number))
        if sum(overlap.part.numel for overlap in mine) != box.numel:
            raise FormatError(f"{where}: the snapshot does not hold all of {list(box.offsets)}+{list(box.sizes)}, once")
        mine.sort(key=lambda overlap: (overlap.table, overlap.row))
        found.extend(mine)
    return found


class _Index:
    """Finds the stored boxes near a wanted one: by their starts along the dimension that they differ most in."""

    def __init__(self, boxes: Sequence[StoredBox]) -> None:
        num_dims = len(boxes[0].box.offsets) if boxes else 0
        starts = [len({stored.box.offsets[dim] for stored in boxes}) for dim in range(num_dims)]
        self._dim = starts.index(max(starts)) if starts else 0
        pairs = [(stored.box.offsets[self._dim], stored) for stored in boxes]
        pairs.sort(key=itemgetter(0))
        self._starts = [start for start, _ in pairs]
        self._boxes = [stored for _, stored in pairs]
        self._longest = max((stored.box.sizes[self._dim] for stored in boxes), default=0)

    def near(self, box: Box) -> Sequence[StoredBox]:
        """Those that may overlap the box."""
        if not self._boxes or not box.numel:
            return ()
        start, size = box.offsets[self._dim], box.sizes[self._dim]
        first = bisect_left(self._starts, start - self._longest + 1)
        return self._boxes[first : bisect_left(self._starts, start + size)]


def _chunks(stored: StoredBox, part: Box, cell: tuple[int, ...], wanted: Box, number: int) -> Iterator[Overlap]:
    """The chunks of a stored box that overlap a part of it, without making the others."""
    box = stored.box
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
        row = stored.row + sum(index * stride for index, stride in zip(indices, strides, strict=True))
        yield Overlap(stored.table, row, chunk, held, number, offset)
