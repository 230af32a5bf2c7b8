"""Elements ↔ lanes: byte planes of a chunk's elements, rotation, XOR, difference; tile by tile in reused memory.

What lives here: arithmetic on arrays of integers, with torch as the library for them. What doesn't: any format or
entropy coder (``codecs``).

A lane is the array of ``size`` bytes, from byte ``start`` on, of every element. Shifting an element and casting it to
a narrower integer is vectorised by torch (some 5 to 10 GB/s a core); a strided copy of bytes is not (2.5 GB/s).

Invariants: every operation covers fewer elements than torch's intra-op grain, so it runs in the calling thread and no
thread is ever started here.
"""

from __future__ import annotations

from collections.abc import Sequence
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
_BELOW_SIGN = {width: torch.tensor((1 << (8 * width - 1)) - 1, dtype=_SIGNED[width], device="cpu") for width in WIDTHS}

Extent = tuple[int, int]
"""A lane's place in the element: first byte and number of bytes."""


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
    """Cover these bytes of the element with as few lanes as there are naturally aligned pieces."""
    extents: list[Extent] = []
    left = set(starts)
    while left:
        start = min(left)
        size = 8
        while size > 1 and (start % size or not left.issuperset(range(start, start + size))):
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
    return _rotate_left(chosen, out, spare)


def split(
    raw: memoryview,
    base: memoryview | None,
    width: int,
    rotate: bool,
    lanes: Sequence[tuple[Extent, memoryview]],
    tiles: Tiles,
    *,
    difference: bool = False,
) -> None:
    """Distribute the elements' bytes over lanes.

    Args:
        raw: the elements.
        base: what to XOR them with first, or, with ``difference``, to subtract.
        width: bytes of an element.
        rotate: rotate left by one bit then.
        lanes: extents, each with the memory that its bytes go to, aligned to its size.
        tiles: the caller's own.
    """
    first_area, second_area, spare = tiles.arrays(width)
    source = elements(raw, width)
    against = None if base is None else elements(base, width)
    targets = [(start, array(place, torch.uint8 if size == 1 else _SIGNED[size])) for (start, size), place in lanes]
    shifts = _SHIFTS[width]
    for first in range(0, source.numel(), TILE):
        piece = source[first : first + TILE]
        size = piece.numel()
        if size < TILE:
            first_area, second_area, spare = first_area[:size], second_area[:size], spare[:size]
        if against is not None and difference:
            piece = _zigzag(piece, against[first : first + TILE], first_area, spare)
        elif against is not None:
            piece = torch.bitwise_xor(piece, against[first : first + TILE], out=first_area)
        if rotate:
            piece = _rotate_left(piece, second_area, spare)
        for start, target in targets:
            shifted = torch.bitwise_right_shift(piece, shifts[8 * start], out=spare) if start else piece
            target[first : first + TILE].copy_(shifted)


def merge(
    lanes: Sequence[tuple[Extent, memoryview]],
    base: memoryview | None,
    width: int,
    rotate: bool,
    out: memoryview,
    tiles: Tiles,
    *,
    difference: bool = False,
) -> None:
    """Put elements together from their lanes: the inverse of ``split``. ``base`` may be ``out``."""
    work, other, _ = tiles.arrays(width)
    target = array(out, _SIGNED[width])
    against = None if base is None else elements(base, width)
    highest_first = sorted(lanes, key=lambda lane: -lane[0][0])
    sources = [(size, array(place, _UNSIGNED[size])) for (_, size), place in highest_first]
    shifts = _SHIFTS[width]
    for first in range(0, target.numel(), TILE):
        piece = target[first : first + TILE]
        size = piece.numel()
        if size < TILE:
            work, other = work[:size], other[:size]
        work.copy_(sources[0][1][first : first + TILE])
        for size, source in sources[1:]:
            torch.bitwise_left_shift(work, shifts[8 * size], out=work)
            torch.bitwise_or(work, other.copy_(source[first : first + TILE]), out=work)
        if rotate:
            torch.bitwise_left_shift(work, shifts[8 * width - 1], out=other)
            torch.bitwise_right_shift(work, shifts[1], out=work)
            # the shift was arithmetic: what it put at the top goes, the rotated bit comes
            torch.bitwise_and(work, _BELOW_SIGN[width], out=work)
            torch.bitwise_or(work, other, out=work)
        if against is None:
            piece.copy_(work)
        elif difference:
            torch.bitwise_and(work, _SHIFTS[width][1], out=other)
            torch.bitwise_right_shift(work, _SHIFTS[width][1], out=work)
            # the shift was arithmetic, so what it put at the top goes; inverting all bits is XOR with -1
            torch.bitwise_and(work, _BELOW_SIGN[width], out=work)
            torch.bitwise_xor(work, torch.neg(other, out=other), out=work)
            torch.add(work, against[first : first + TILE], out=piece)
        else:
            torch.bitwise_xor(work, against[first : first + TILE], out=piece)


def _zigzag(piece: torch.Tensor, against: torch.Tensor, out: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """The difference as a number whose size is the difference's: its sign goes to the bottom. In ``out``."""
    width = piece.element_size()
    torch.sub(piece, against, out=out)
    torch.bitwise_right_shift(out, _SHIFTS[width][8 * width - 1], out=spare)
    torch.add(out, out, out=out)
    return torch.bitwise_xor(out, spare, out=out)


def _rotate_left(piece: torch.Tensor, out: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    width = piece.element_size()
    # the arithmetic shift makes the sign 0 or -1, so subtracting it from twice the number puts the bit at the bottom
    torch.bitwise_right_shift(piece, _SHIFTS[width][8 * width - 1], out=spare)
    torch.add(piece, piece, out=out)
    return torch.sub(out, spare, out=out)
