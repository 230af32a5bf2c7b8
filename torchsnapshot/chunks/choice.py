"""How a chunk is to be encoded: what its sample comes to in each of the ways that there are.

What lives here: sampling, trying, comparing. What doesn't: the encoding itself, and why there are these ways
(``codecs``), whether encoding pays at all (``coder``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from torchsnapshot.chunks import planes
from torchsnapshot.chunks.encoded import METHOD_RAW, METHOD_ZSTD, WIDTHS, Lane, levels_nbytes
from torchsnapshot.chunks.scratch import Scratch

_SEARCH_GAIN = 0.98
_ROTATION_GAIN = 0.998
_LEVELS_GAIN = 0.995


class Effort(Enum):
    """How hard ``encode`` tries.

    ``AUTO`` codes the planes that a small sample shows compressible, at the speed of an entropy coder. ``SMALLEST``
    looks at a larger sample, also for matches, within planes and in the bytes as they lie, tries the rotation and
    levels, and takes small gains.
    """

    AUTO = "auto"
    SMALLEST = "smallest"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a chunk is to be encoded, and the fraction of the raw size that its sample came to.

    ``difference``: against a base, the elements' difference; else their XOR. ``levels``: without base and rotation.
    """

    width: int
    rotated: bool
    lanes: tuple[Lane, ...]
    fraction: float
    difference: bool = False
    levels: planes.Levels | None = None


# a plane is coded if its sample shrinks to this; small gains are not worth what they cost at every restore
_PLANE_GAIN = {Effort.AUTO: 0.92, Effort.SMALLEST: 0.99}
_SAMPLE_RUN_LENGTH = {Effort.AUTO: 1024, Effort.SMALLEST: planes.TILE // 8}
_SAMPLE_NUM_RUNS = 8
# by 1 the exponent fills the top plane, by 4 its lower five bits and three of the mantissa: what levels leave of second
# moments' exponents are some two bits, in which zstd finds matches by chance that cost more than they save
_LEVELS_ROTATIONS = (1, 4)
_MIN_ROW_LENGTH = 32
_NUM_RUNS = 8
_PEEK_RUN_NBYTES = 512
_GLANCE_RUN_NBYTES = 64
_GLANCE_MANY_VALUES = 128


def choose(
    raw: memoryview,
    width: int,
    effort: Effort,
    scratch: Scratch,
    base: memoryview | None = None,
    row_length: int = 0,
) -> Scheme:
    """Look at a sample of ``raw`` and choose how to encode it.

    Args:
        raw: contiguous bytes.
        width: size of an element in bytes.
        effort: see ``Effort``.
        scratch: the caller's own.
        base: what ``raw`` will be coded against; of the same size.
        row_length: how many elements probably make a row; 0 where there are none.
    """
    width = _effective_width(raw.nbytes, width)
    best: Scheme | None = None
    if base is not None:
        best = replace(_choose(raw, width, effort, scratch, base, difference=True), difference=True)
    # against a base, XOR is hardly ever the smaller one
    if best is None or effort is Effort.SMALLEST:
        other = _choose(raw, width, effort, scratch, base, difference=False)
        if best is None or other.fraction < best.fraction:
            best = other
    if base is None and effort is Effort.SMALLEST and _may_level(raw.nbytes, width, row_length):
        return _choose_levels(raw, width, row_length, scratch, best)
    return best


def _choose(
    raw: memoryview, width: int, effort: Effort, scratch: Scratch, base: memoryview | None, *, difference: bool
) -> Scheme:
    run_length = _SAMPLE_RUN_LENGTH[effort]
    sample = planes.sample(raw, base, width, _SAMPLE_NUM_RUNS, run_length, scratch.tiles, difference=difference)
    best = _scheme(sample, False, effort, scratch)
    # rotation makes bf16 weights 1 % smaller and takes a third more time
    if effort is Effort.SMALLEST and width > 1:
        if not difference:
            rotated = _scheme(planes.rotated(sample, scratch.tiles), True, effort, scratch)
            if rotated.fraction < best.fraction * _ROTATION_GAIN:
                best = rotated
        data = scratch.tiles.memory(width, 0, sample.numel())
        fraction = len(scratch.search.compress(data)) / data.nbytes
        if fraction < best.fraction * _SEARCH_GAIN:
            best = Scheme(width, False, (Lane(0, width, METHOD_ZSTD, strong=True),), fraction)
    return best


def _may_level(nbytes: int, width: int, row_length: int) -> bool:
    if width == 1 or not _MIN_ROW_LENGTH <= row_length <= planes.TILE or nbytes % (width * row_length):
        return False
    return 1 < nbytes // (width * row_length) <= planes.TILE


def _choose_levels(raw: memoryview, width: int, row_length: int, scratch: Scratch, best: Scheme) -> Scheme:
    """``best``, or the scheme with levels if that is clearly better."""
    tiles = scratch.tiles
    sample = planes.sample_rows(raw, width, row_length, tiles)
    rotation = 0
    for tried in _LEVELS_ROTATIONS:
        levels = planes.measure_levels(sample, tried, tiles)
        # nothing is worth a search for matches any more
        scheme = _scheme(planes.levelled(sample, levels, tiles), False, Effort.AUTO, scratch)
        fraction = scheme.fraction + levels_nbytes(raw.nbytes // width, row_length) / raw.nbytes
        if fraction > best.fraction:
            break
        if fraction < best.fraction * _LEVELS_GAIN:
            best, rotation = replace(scheme, fraction=fraction), tried
    if not rotation:
        return best
    grid = planes.elements(raw, width).view(-1, row_length)
    return replace(best, levels=planes.measure_levels(grid, rotation, tiles))


def peek(raw: memoryview, scratch: Scratch) -> float:
    """The fraction to which a few kilobytes of the bytes as they lie shrink: a small part of the time of ``choose``."""
    runs = _runs(raw, _PEEK_RUN_NBYTES)
    return len(scratch.entropy.compress(runs)) / max(len(runs), 1)


def is_varied(raw: memoryview) -> bool:
    """Whether 512 of the bytes as they lie take more values than those of a chunk that shrinks to a quarter.

    A quarter of its bytes may be noise, and 128 random bytes have some hundred values.

    A small part of the time of ``peek``, and it keeps the interpreter's lock: beside other workers, whoever lets go of
    it waits for it longer than this takes.
    """
    return len(set(_runs(raw, _GLANCE_RUN_NBYTES))) > _GLANCE_MANY_VALUES


def _runs(raw: memoryview, run_nbytes: int) -> bytes:
    """Some of the bytes, from all over the chunk."""
    step = max(raw.nbytes // _NUM_RUNS, run_nbytes)
    return b"".join([raw[start : start + run_nbytes] for start in range(0, raw.nbytes, step)])


def _effective_width(nbytes: int, width: int) -> int:
    if width not in WIDTHS:
        raise ValueError(f"width {width}: an element is 1, 2, 4 or 8 bytes wide")
    return width if nbytes % width == 0 else 1


def _scheme(sample: torch.Tensor, rotated: bool, effort: Effort, scratch: Scratch) -> Scheme:
    """The best scheme for a sample, which is rotated already if it is to be: each plane coded if that pays."""
    width, num_elements = sample.element_size(), sample.numel()
    plane = memoryview(bytearray(num_elements))
    coded: list[Lane] = []
    cost = 0.0
    for start in reversed(range(width)):
        planes.extract(sample, start, plane, scratch.tiles)
        fraction = len(scratch.entropy.compress(plane)) / num_elements
        strong = False
        if effort is Effort.SMALLEST:
            searched = len(scratch.search.compress(plane)) / num_elements
            strong = searched < fraction * _SEARCH_GAIN
            fraction = min(fraction, searched)
        if fraction <= _PLANE_GAIN[effort]:
            coded.append(Lane(start, 1, METHOD_ZSTD, strong))
            cost += fraction
        else:
            cost += 1
    left = set(range(width)).difference(lane.start for lane in coded)
    plain = [Lane(start, size, METHOD_RAW) for start, size in planes.plain_extents(sorted(left))]
    return Scheme(width, rotated, (*coded, *plain), cost / width)
