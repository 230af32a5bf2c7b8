"""Elements ↔ lanes: byte planes of a chunk's elements, rotation, XOR, difference, levels; by tiles in reused memory.

What lives here: arithmetic on arrays of integers, with torch as the library for them. What doesn't: any format or
entropy coder (``codecs``).

A lane is the array of ``size`` bytes, from byte ``start`` on, of every element. Shifting an element and casting it to
a narrower integer is vectorised by torch (some 5 to 10 GB/s a core); a strided copy of bytes is not (2.5 GB/s).

Invariants: every operation covers fewer elements than the grain that torch gives it, so it runs in the calling thread
and no thread is ever started here. (It is at::internal::GRAIN_SIZE for nearly all; rounding, for one, has a smaller.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from torchsnapshot.chunks.encoded import WIDTHS
from torchsnapshot.engine.buffers import address_of, map_pages

TILE: Final = 32256
"""Elements of one step: below at::internal::GRAIN_SIZE (32768), at and above which torch would use its thread pool."""

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
# shifts by a 0-d tensor of the same dtype skip torch's wrapping of Python numbers: half the time of a call on a tile
_SHIFTS = {
    width: [torch.tensor(shift, dtype=_SIGNED[width], device="cpu") for shift in range(8 * width)] for width in WIDTHS
}
# masks of so many bits at the bottom
_LOWEST = {
    width: [
        torch.tensor((1 << count) - 1 if count < 8 * width else -1, dtype=_SIGNED[width], device="cpu")
        for count in range(8 * width + 1)
    ]
    for width in WIDTHS
}
_LEVEL_BITS = 16
# where in the range of numbers that rotation brings to the top their mean should lie: below it there is more
_MEAN_PLACE = 0.75
_MIN_SAMPLE_ROWS = 16

Extent = tuple[int, int]
"""A lane's place in the element: first byte and number of bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """What is subtracted from the elements of each column and of each row, and how far they are rotated then.

    ``numbers`` is the array of 16-bit integers that is stored, those of columns first: the levels' top bits.
    """

    row_length: int
    rotation: int
    numbers: memoryview

    def wide(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels of columns and those of rows, as elements."""
        source = elements(self.numbers, _LEVEL_BITS // 8)
        wide = torch.empty(source.numel(), dtype=_SIGNED[width], device="cpu")
        shift = _SHIFTS[width][8 * width - _LEVEL_BITS]
        for first in range(0, wide.numel(), TILE):
            piece = wide[first : first + TILE]
            torch.bitwise_left_shift(piece.copy_(source[first : first + TILE]), shift, out=piece)
        return wide[: self.row_length], wide[self.row_length :]


class Tiles:
    """Work areas of one thread."""

    def __init__(self) -> None:
        self._memory = map_pages(3 * 8 * TILE)

    def memory(self, width: int, index: int, num_elements: int = TILE) -> memoryview:
        """The bytes of area 0, 1 or 2 as far as ``num_elements`` elements need."""
        start = index * 8 * TILE
        return self._memory[start : start + width * num_elements]

    def arrays(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three areas as elements."""
        first, second, third = (array(self.memory(width, index), _SIGNED[width]) for index in range(3))
        return first, second, third


def array(memory: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A view of writable, aligned memory as an array."""
    return torch.frombuffer(memory, dtype=dtype)


def elements(memory: memoryview, width: int) -> torch.Tensor:
    """The signed elements of any memory: a view where that can be, else of a copy."""
    if memory.readonly or address_of(memory) % width:
        memory = memoryview(bytearray(memory))
    return array(memory, _SIGNED[width])


def plain_extents(starts: Sequence[int]) -> list[Extent]:
    """Cover these bytes of the element with few lanes of 1, 2, 4 or 8 bytes."""
    extents: list[Extent] = []
    left = set(starts)
    while left:
        start = min(left)
        size = 8
        while size > 1 and not left.issuperset(range(start, start + size)):
            size //= 2
        extents.append((start, size))
        left.difference_update(range(start, start + size))
    return extents


def sample(
    raw: memoryview,
    base: memoryview | None,
    width: int,
    num_runs: int,
    run_length: int,
    tiles: Tiles,
    *,
    difference: bool = False,
) -> torch.Tensor:
    """Elements from evenly spread runs, XORed with the base's or their difference to it, in area 0 of ``tiles``."""
    source = elements(raw, width)
    against = None if base is None else elements(base, width)
    total = source.numel()
    chosen = tiles.arrays(width)[0][: min(total, num_runs * run_length)]
    step = run_length if total <= num_runs * run_length else (total - run_length) // (num_runs - 1)
    for place, start in zip(range(0, chosen.numel(), run_length), range(0, total, step), strict=False):
        target = chosen[place : place + run_length]
        piece = source[start : start + target.numel()]
        if against is None:
            target.copy_(piece)
        elif difference:
            _zigzag(piece, against[start : start + target.numel()], target, tiles.arrays(width)[2][: target.numel()])
        else:
            torch.bitwise_xor(piece, against[start : start + target.numel()], out=target)
    return chosen


def extract(chosen: torch.Tensor, start: int, out: memoryview, tiles: Tiles) -> None:
    """Byte ``start`` of at most one tile of elements, which may lie in areas 0 and 1."""
    if start:
        spare = tiles.arrays(chosen.element_size())[2][: chosen.numel()]
        chosen = torch.bitwise_right_shift(chosen, _SHIFTS[chosen.element_size()][8 * start], out=spare)
    array(out, torch.uint8).copy_(chosen)


def rotated(chosen: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """At most one tile of elements rotated left by one bit; they lie in area 1."""
    _, out, spare = (area[: chosen.numel()] for area in tiles.arrays(chosen.element_size()))
    return _rotate_left(chosen, 1, out, spare)


def sample_rows(raw: memoryview, width: int, row_length: int, tiles: Tiles) -> torch.Tensor:
    """Elements of evenly spread rows, as rows, in area 0; long rows are cut off."""
    grid = elements(raw, width).view(-1, row_length)
    num_rows = min(max(TILE // row_length, _MIN_SAMPLE_ROWS), len(grid))
    length = min(TILE // num_rows, row_length)
    chosen = tiles.arrays(width)[0][: num_rows * length].view(num_rows, length)
    return chosen.copy_(grid[:: len(grid) // num_rows, :length][:num_rows])


def measure_levels(source: torch.Tensor, rotation: int, tiles: Tiles) -> Levels:
    """The levels that bring the mean of each column and of each row of a matrix to the same place.

    The mean of floating-point numbers' binary forms is about that of their logarithms. Signs are left out.

    Args:
        source: signed elements; neither rows nor columns are more than fit into a tile.
        rotation: what the elements are going to be rotated by.
        tiles: the caller's own; area 0 is left as it is.
    """
    width, (num_rows, row_length) = source.element_size(), source.shape
    columns = torch.zeros(row_length, dtype=torch.float32, device="cpu")
    rows = torch.empty(num_rows, dtype=torch.float32, device="cpu")
    floats, unsigned = array(tiles.memory(4, 1), torch.float32), tiles.arrays(width)[2]
    step = TILE // row_length
    for first in range(0, num_rows, step):
        piece = source[first : first + step]
        size = piece.numel()
        below_sign = torch.bitwise_and(piece, _LOWEST[width][8 * width - 1], out=unsigned[:size].view_as(piece))
        tile = floats[:size].view_as(piece).copy_(below_sign)
        columns.add_(tile.sum(0))
        torch.mean(tile, 1, out=rows[first : first + step])
    columns.div_(num_rows).sub_(rows.mean())
    scale = 2.0 ** (_LEVEL_BITS - 8 * width)
    place = _MEAN_PLACE * 2.0 ** (_LEVEL_BITS - rotation)
    numbers = memoryview(bytearray(_LEVEL_BITS // 8 * (row_length + num_rows)))
    target = array(numbers, _SIGNED[_LEVEL_BITS // 8])
    # cut off, not rounded: any number near the mean does, and torch rounds in threads of its own
    target[:row_length].copy_(columns.mul_(scale).int())
    target[row_length:].copy_(rows.mul_(scale).sub_(place).int())
    return Levels(row_length, rotation, numbers)


def levelled(chosen: torch.Tensor, levels: Levels, tiles: Tiles) -> torch.Tensor:
    """A sample of rows without its levels, rotated; it lies in area 1."""
    width = chosen.element_size()
    _, out, spare = (area[: chosen.numel()] for area in tiles.arrays(width))
    _shift_levels(torch.sub, chosen.flatten(), 0, levels.wide(width), out)
    return _rotate_left(out, levels.rotation, out, spare)


def split(
    raw: memoryview,
    base: memoryview | None,
    width: int,
    rotation: int,
    lanes: Sequence[tuple[Extent, memoryview]],
    tiles: Tiles,
    *,
    difference: bool = False,
    levels: Levels | None = None,
) -> None:
    """Distribute the elements' bytes over lanes.

    Args:
        raw: the elements.
        base: what to XOR them with first, or, with ``difference``, to subtract.
        width: bytes of an element.
        rotation: rotate left by so many bits then.
        lanes: extents, each with the memory that its bytes go to, aligned to its size.
        tiles: the caller's own.
        levels: what to subtract before rotating; there is no base then.
    """
    areas = first_area, second_area, spare = tiles.arrays(width)
    source = elements(raw, width)
    against = None if base is None else elements(base, width)
    targets = [(start, array(place, torch.uint8 if size == 1 else _SIGNED[size])) for (start, size), place in lanes]
    shifts = _SHIFTS[width]
    wide = None if levels is None else levels.wide(width)
    for first, last in _steps(source.numel(), TILE if levels is None else levels.row_length):
        piece = source[first:last]
        if spare.numel() != last - first:
            first_area, second_area, spare = (area[: last - first] for area in areas)
        if wide is not None:
            piece = _shift_levels(torch.sub, piece, first, wide, first_area)
        elif against is not None and difference:
            piece = _zigzag(piece, against[first:last], first_area, spare)
        elif against is not None:
            piece = torch.bitwise_xor(piece, against[first:last], out=first_area)
        if rotation:
            piece = _rotate_left(piece, rotation, second_area, spare)
        for start, target in targets:
            shifted = torch.bitwise_right_shift(piece, shifts[8 * start], out=spare) if start else piece
            target[first:last].copy_(shifted)


def merge(
    lanes: Sequence[tuple[Extent, memoryview]],
    base: memoryview | None,
    width: int,
    rotation: int,
    out: memoryview,
    tiles: Tiles,
    *,
    difference: bool = False,
    levels: Levels | None = None,
) -> None:
    """Put elements together from their lanes: the inverse of ``split``. ``base`` may be ``out``."""
    areas = work, other, _ = tiles.arrays(width)
    target = array(out, _SIGNED[width])
    against = None if base is None else elements(base, width)
    highest_first = sorted(lanes, key=lambda lane: -lane[0][0])
    sources = [(size, array(place, _UNSIGNED[size])) for (_, size), place in highest_first]
    shifts = _SHIFTS[width]
    wide = None if levels is None else levels.wide(width)
    for first, last in _steps(target.numel(), TILE if levels is None else levels.row_length):
        piece = target[first:last]
        if work.numel() != last - first:
            work, other, _ = (area[: last - first] for area in areas)
        work.copy_(sources[0][1][first:last])
        for size, source in sources[1:]:
            torch.bitwise_left_shift(work, shifts[8 * size], out=work)
            torch.bitwise_or(work, other.copy_(source[first:last]), out=work)
        if rotation:
            torch.bitwise_left_shift(work, shifts[8 * width - rotation], out=other)
            torch.bitwise_right_shift(work, shifts[rotation], out=work)
            # the shift was arithmetic: what it put at the top goes, the rotated bits come
            torch.bitwise_and(work, _LOWEST[width][8 * width - rotation], out=work)
            torch.bitwise_or(work, other, out=work)
        if wide is not None:
            _shift_levels(torch.add, work, first, wide, piece)
        elif against is None:
            piece.copy_(work)
        elif difference:
            torch.bitwise_and(work, _SHIFTS[width][1], out=other)
            torch.bitwise_right_shift(work, _SHIFTS[width][1], out=work)
            # the shift was arithmetic, so what it put at the top goes; inverting all bits is XOR with -1
            torch.bitwise_and(work, _LOWEST[width][8 * width - 1], out=work)
            torch.bitwise_xor(work, torch.neg(other, out=other), out=work)
            torch.add(work, against[first:last], out=piece)
        else:
            torch.bitwise_xor(work, against[first:last], out=piece)


def _steps(num_elements: int, row_length: int) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end: tiles of whole rows, or, where a row is longer than a tile, parts of one row."""
    block = TILE // row_length * row_length or row_length
    for start in range(0, num_elements, block):
        end = min(start + block, num_elements)
        for first in range(start, end, TILE):
            yield first, min(first + TILE, end)


def _shift_levels(
    shift: Callable[..., torch.Tensor],
    piece: torch.Tensor,
    first: int,
    wide: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
) -> torch.Tensor:
    """Add or subtract the levels of a step that begins with element ``first``. In ``out``, which may be ``piece``."""
    columns, rows = wide
    row, column = divmod(first, columns.numel())
    length = min(columns.numel(), piece.numel())
    grid, target = piece.view(-1, length), out.view(-1, length)
    shift(grid, columns[column : column + length], out=target)
    shift(target, rows[row : row + len(grid)].unsqueeze(1), out=target)
    return out


def _zigzag(piece: torch.Tensor, against: torch.Tensor, out: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """The difference as a number whose size is the difference's: its sign goes to the bottom. In ``out``."""
    width = piece.element_size()
    torch.sub(piece, against, out=out)
    torch.bitwise_right_shift(out, _SHIFTS[width][8 * width - 1], out=spare)
    torch.add(out, out, out=out)
    return torch.bitwise_xor(out, spare, out=out)


def _rotate_left(piece: torch.Tensor, rotation: int, out: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Rotated by at least one bit. In ``out``, which may be ``piece``."""
    width = piece.element_size()
    torch.bitwise_right_shift(piece, _SHIFTS[width][8 * width - rotation], out=spare)
    if rotation == 1:
        # the arithmetic shift made the sign 0 or -1, so subtracting it from twice the number puts it at the bottom
        torch.add(piece, piece, out=out)
        return torch.sub(out, spare, out=out)
    # the shift was arithmetic: of what it put at the bottom only the rotated bits stay
    torch.bitwise_and(spare, _LOWEST[width][rotation], out=spare)
    torch.bitwise_left_shift(piece, _SHIFTS[width][rotation], out=out)
    return torch.bitwise_or(out, spare, out=out)
