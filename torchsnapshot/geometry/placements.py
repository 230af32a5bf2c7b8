"""How one tensor is spread over a mesh of ranks: which boxes every position of the mesh holds. Integers only.

What lives here: placements as torch's ``DTensor`` has them (replicated; cut along a dimension; cut with a stride, as
FSDP2 over tensor parallelism does), and boxes that are written down one by one (``ShardedTensor``). What doesn't:
torch's own objects (``state.sharded``), entries (``format.entry_kinds``), the grid of a sharded tensor
(``mesh_cells``).

A *position* is a place in the mesh, counted in C order of its shape. Positions that differ only in mesh dimensions
that replicate hold the same boxes; such a set of positions is a *region*, and regions are counted in C order of the
other mesh dimensions. Where boxes are written down, every position is a region of its own.

Invariants: the boxes of a position are disjoint, never empty, and stand in the order in which its local tensor holds
them; regions made by placements are disjoint and cover the tensor. A shape without dimensions counts as ``(1,)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box

MAX_BOXES = 1 << 20
"""The most boxes that a tensor may be cut into; a mesh of as many ranks is far away, a hostile stride is not."""

Interval = tuple[int, int]
"""Start and size along one dimension of the tensor."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What one dimension of the mesh does to the tensor.

    ``dim`` is the tensor's dimension that is cut, or None where each position has all of it. It is cut as
    ``torch.chunk`` cuts. With a ``split_factor`` it is first cut into that many parts, each of these is cut for the
    mesh, and a position holds its piece of every part.
    """

    dim: int | None
    split_factor: int = 1


REPLICATE = Placement(None)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread: over which ranks, and by what rule.

    Either ``placements`` has one for each mesh dimension, or ``boxes`` has those of each position. ``mesh_ranks`` are
    global ranks in C order of ``mesh_shape``. Placements are applied from the first mesh dimension to the last, each to
    what the ones before it left. Where ``order`` names mesh dimensions, it is in that order instead, and split factors
    do not count: FSDP2 cuts what tensor parallelism left, and says so by a split factor, which gives the same pieces
    only where the sizes divide evenly.
    """

    mesh_shape: tuple[int, ...]
    mesh_ranks: tuple[int, ...]
    placements: tuple[Placement, ...] | None
    order: tuple[int, ...] | None = None
    boxes: tuple[tuple[Box, ...], ...] | None = None

    @property
    def num_positions(self) -> int:
        """How many ranks the mesh has."""
        return len(self.mesh_ranks)

    @property
    def num_regions(self) -> int:
        """How many different parts of the tensor there are, empty ones included."""
        if self.placements is None:
            return len(self.mesh_ranks)
        return prod(self.mesh_shape[dim] for dim in _sharded_mesh_dims(self.placements))

    def check(self, shape: Sequence[int]) -> None:
        """Refuse what describes no sharding of a tensor of that shape.

        Raises:
            ValueError: it names what is wrong.
        """
        _check_mesh(self.mesh_shape, self.mesh_ranks)
        if (self.placements is None) == (self.boxes is None):
            raise ValueError("a sharding has either placements or boxes")
        if self.boxes is not None and self.order is not None:
            raise ValueError("boxes have no order of mesh dimensions")
        if self.boxes is not None:
            _check_boxes(self.boxes, len(self.mesh_ranks), tuple(shape) or (1,))
        if self.placements is not None:
            _check_placements(self.placements, self.order, self.mesh_shape, len(shape))

    def position_of(self, rank: int) -> int | None:
        """Where in the mesh a global rank is; None if it isn't there."""
        return self.mesh_ranks.index(rank) if rank in self.mesh_ranks else None

    def region_of(self, position: int) -> int:
        """The region that a position holds."""
        return position if self.placements is None else _region_of_each(self.mesh_shape, self.placements)[position]

    def ranks_of(self, region: int) -> list[int]:
        """The global ranks that hold a region. For all regions ``holders`` is quicker."""
        return [rank for position, rank in enumerate(self.mesh_ranks) if self.region_of(position) == region]

    def holders(self) -> list[list[int]]:
        """For each region the global ranks that hold it, in the order of their positions."""
        ranks: list[list[int]] = [[] for _ in range(self.num_regions)]
        for position, rank in enumerate(self.mesh_ranks):
            ranks[self.region_of(position)].append(rank)
        return ranks

    def regions(self, shape: Sequence[int]) -> tuple[tuple[Box, ...], ...]:
        """The boxes of every region, in global coordinates."""
        if self.boxes is not None:
            return self.boxes
        assert self.placements is not None
        return _regions(tuple(shape), self.mesh_shape, self.placements, self.order)

    def boxes_at(self, shape: Sequence[int], position: int) -> tuple[Box, ...]:
        """The boxes that a position holds, in global coordinates."""
        return self.regions(shape)[self.region_of(position)]

    def local_boxes(self, shape: Sequence[int], position: int) -> list[tuple[Box, Box]]:
        """The boxes that a position holds: each in global coordinates, and in those of the local tensor.

        Written-down boxes lie in local tensors of their own.
        """
        if self.placements is None:
            return [(box, grid.whole(box.sizes)) for box in self.boxes_at(shape, position)]
        along = self._intervals_at(shape, position)
        found = []
        for combination in itertools.product(*([*_with_local_starts(intervals)] for intervals in along)):
            starts, sizes, local_starts = zip(*combination, strict=True)
            found.append((Box(starts, sizes), Box(local_starts, sizes)))
        return found

    def local_shape(self, shape: Sequence[int], position: int) -> tuple[int, ...]:
        """The shape of a position's local tensor, for a sharding by placements."""
        along = self._intervals_at(shape, position)
        return tuple(sum(size for _, size in intervals) for intervals in along)[: len(shape)]

    def _intervals_at(self, shape: Sequence[int], position: int) -> list[tuple[Interval, ...]]:
        assert self.placements is not None
        at = _coordinates(position, self.mesh_shape)
        steps = _steps(self.placements, self.order)
        along = []
        for dim, size in enumerate(tuple(shape) or (1,)):
            intervals: tuple[Interval, ...] = ((0, size),) if size else ()
            for mesh_dim, split_factor in steps.get(dim, ()):
                intervals = _select(intervals, at[mesh_dim], self.mesh_shape[mesh_dim], split_factor)
            along.append(intervals)
        return along


def nested_order(mesh_shape: Sequence[int], placements: Sequence[Placement]) -> tuple[int, ...] | None:
    """The order of cuts that split factors stand for: (2, 0) says that mesh dimension 2 cut first.

    A cut by mesh dimension d after others that stand behind d in the mesh is written with their sizes' product as its
    split factor. Mesh dimensions of different dimensions of the tensor do not matter to one another.

    Returns:
        All mesh dimensions that cut, or None where no order gives these split factors.
    """
    orders: dict[int, list[int]] = {}
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if placement.dim is None:
            continue
        before = orders.setdefault(placement.dim, [])
        factor = 1
        for place in range(len(before) + 1):
            if factor == placement.split_factor:
                before.insert(place, mesh_dim)
                break
            if place < len(before):
                factor *= mesh_shape[before[place]]
        else:
            return None
    return tuple(mesh_dim for _, order in sorted(orders.items()) for mesh_dim in order)


@lru_cache(maxsize=1024)
def is_nesting_the_same(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], order: tuple[int, ...]
) -> bool:
    """Whether cutting in this order gives every position what applying the placements one by one gives it."""
    return _regions(shape, mesh_shape, placements, None) == _regions(shape, mesh_shape, placements, order)


# ------------------------------------------------------------------ rules


def _sharded_mesh_dims(placements: Sequence[Placement]) -> list[int]:
    return [mesh_dim for mesh_dim, placement in enumerate(placements) if placement.dim is not None]


def _coordinates(position: int, mesh_shape: Sequence[int]) -> list[int]:
    at = []
    for size in reversed(mesh_shape):
        position, coordinate = divmod(position, size)
        at.append(coordinate)
    at.reverse()
    return at


@lru_cache(maxsize=256)
def _region_of_each(mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]) -> tuple[int, ...]:
    """The region of each position."""
    found = [0]
    for size, placement in zip(mesh_shape, placements, strict=True):
        if placement.dim is None:
            found = [region for region in found for _ in range(size)]
        else:
            found = [region * size + at for region in found for at in range(size)]
    return tuple(found)


def _steps(placements: Sequence[Placement], order: Sequence[int] | None) -> dict[int, list[tuple[int, int]]]:
    """For each dimension of the tensor that is cut: the mesh dimensions that cut it, in turn, and split factors."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for mesh_dim in _sharded_mesh_dims(placements) if order is None else order:
        placement = placements[mesh_dim]
        assert placement.dim is not None
        split_factor = placement.split_factor if order is None else 1
        steps.setdefault(placement.dim, []).append((mesh_dim, split_factor))
    return steps


def _chunk(size: int, num_chunks: int, index: int) -> Interval:
    """Where ``torch.chunk`` puts a chunk: all are of the same size, but for the last ones, which may be empty."""
    chunk = -(-size // num_chunks)
    start = min(size, chunk * index)
    return start, min(size, start + chunk) - start


def _select(intervals: tuple[Interval, ...], index: int, num_chunks: int, split_factor: int) -> tuple[Interval, ...]:
    """What one more cut leaves of the elements in these intervals, to the position of that index."""
    size = sum(size for _, size in intervals)
    wanted = []
    part = -(-size // split_factor)
    # parts behind the last element are empty, however many the factor asks for
    for part_start in range(0, size, max(1, part)):
        start, chunk = _chunk(min(part, size - part_start), num_chunks, index)
        if chunk:
            wanted.append((part_start + start, chunk))
    return tuple(_slices(intervals, wanted))


def _slices(intervals: Sequence[Interval], wanted: Sequence[Interval]) -> Iterator[Interval]:
    """Ranges of the elements that the intervals hold one behind the other; neighbours are joined."""
    held = iter(intervals)
    start, size = next(held, (0, 0))
    passed = 0
    joined: Interval | None = None
    for first, count in wanted:
        while count:
            while passed + size <= first:
                passed += size
                start, size = next(held)
            skip = first - passed
            found = (start + skip, min(count, size - skip))
            if joined is not None and joined[0] + joined[1] == found[0]:
                joined = (joined[0], joined[1] + found[1])
            else:
                if joined is not None:
                    yield joined
                joined = found
            first += found[1]
            count -= found[1]
    if joined is not None:
        yield joined


def _with_local_starts(intervals: Sequence[Interval]) -> Iterator[tuple[int, int, int]]:
    local_start = 0
    for start, size in intervals:
        yield start, size, local_start
        local_start += size


@lru_cache(maxsize=256)
def _regions(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    order: tuple[int, ...] | None,
) -> tuple[tuple[Box, ...], ...]:
    steps = _steps(placements, order)
    mesh_dims = _sharded_mesh_dims(placements)
    # along each dimension of the tensor: the intervals by the coordinates of the mesh dimensions that cut it
    along: list[tuple[list[int], dict[tuple[int, ...], tuple[Interval, ...]]]] = []
    for dim, size in enumerate(shape or (1,)):
        cuts = steps.get(dim, [])
        table: dict[tuple[int, ...], tuple[Interval, ...]] = {(): ((0, size),) if size else ()}
        for mesh_dim, split_factor in cuts:
            num_chunks = mesh_shape[mesh_dim]
            table = {
                (*at, index): _select(intervals, index, num_chunks, split_factor)
                for at, intervals in table.items()
                for index in range(num_chunks)
            }
        along.append(([mesh_dims.index(mesh_dim) for mesh_dim, _ in cuts], table))
    found = []
    for at in itertools.product(*(range(mesh_shape[mesh_dim]) for mesh_dim in mesh_dims)):
        intervals_by_dim = [table[tuple([at[index] for index in indices])] for indices, table in along]
        boxes = []
        for combination in itertools.product(*intervals_by_dim):
            starts, sizes = zip(*combination, strict=True)
            boxes.append(Box(starts, sizes))
        found.append(tuple(boxes))
    return tuple(found)


# ------------------------------------------------------------------ checks


def _check_mesh(shape: Sequence[int], ranks: Sequence[int]) -> None:
    if not shape or any(size < 1 for size in shape) or prod(shape) != len(ranks):
        raise ValueError(f"a mesh of shape {tuple(shape)} with {len(ranks)} ranks")
    if len(set(ranks)) != len(ranks) or min(ranks) < 0:
        raise ValueError("a mesh names a rank twice, or a negative one")


def _check_placements(
    placements: Sequence[Placement], order: Sequence[int] | None, mesh_shape: Sequence[int], num_dims: int
) -> None:
    if len(placements) != len(mesh_shape):
        raise ValueError(f"{len(placements)} placements for a mesh of {len(mesh_shape)} dimensions")
    for placement in placements:
        if placement.dim is not None and not 0 <= placement.dim < num_dims:
            raise ValueError(f"a tensor of {num_dims} dimensions cut along dimension {placement.dim}")
        if placement.split_factor < 1 or (placement.dim is None and placement.split_factor != 1):
            raise ValueError(f"a split factor of {placement.split_factor}")
    if order is not None and sorted(order) != _sharded_mesh_dims(placements):
        raise ValueError(f"{tuple(order)} does not name each mesh dimension that cuts once")
    num_boxes = 1
    for cuts in _steps(placements, order).values():
        # each cut makes at most as many pieces as it has parts and chunks, of what each earlier coordinate holds
        coordinates, pieces = 1, 0
        for mesh_dim, split_factor in cuts:
            pieces += coordinates * split_factor * mesh_shape[mesh_dim]
            coordinates *= mesh_shape[mesh_dim]
        num_boxes *= pieces
    if num_boxes > MAX_BOXES:
        raise ValueError(f"it may be cut into {num_boxes} boxes, more than {MAX_BOXES}")


def _check_boxes(boxes: Sequence[Sequence[Box]], num_positions: int, dims: tuple[int, ...]) -> None:
    if len(boxes) != num_positions:
        raise ValueError(f"boxes of {len(boxes)} positions for {num_positions} ranks")
    every = [box for held in boxes for box in held]
    if len(every) > MAX_BOXES:
        raise ValueError(f"{len(every)} boxes, more than {MAX_BOXES}")
    for box in every:
        if len(box.offsets) != len(dims) or len(box.sizes) != len(dims):
            raise ValueError(f"the box {box} in {len(dims)} dimensions")
        for offset, size, dim in zip(box.offsets, box.sizes, dims, strict=True):
            if offset < 0 or size < 1 or offset + size > dim:
                raise ValueError(f"the box {box} is empty or reaches out of {dims}")
    if sum(box.numel for box in every) != prod(dims):
        raise ValueError("its boxes overlap, or do not cover the tensor")
