"""The format of an encoded chunk: its header, packed and read with every check.

What lives here: the layout and its validation. What doesn't: coding and decoding (``codecs``).

An encoded chunk, integers little-endian::

    offset  size  what
    0       4     magic: 89 74 73 63 ("\\x89tsc")
    4       1     version of this layout: 1
    5       1     codec: 1 (planes)
    6       1     width in bytes of an element: 1, 2, 4 or 8; the raw size is a multiple of it
    7       1     flags: 1 = rotated, 2 = XOR with a base, 4 = difference to a base (alone), 8 = levelled (alone),
                  other bits 0
    8       8     raw size in bytes
    16      1     number of lanes, 1 to width
    17      7     zero
    24      8 × number of lanes
                  +0  1  start: the lane's first byte within the element (0 = least significant)
                  +1  1  size: how many bytes of each element it holds: 1, 2, 4 or 8
                  +2  1  method: 0 = stored as it is, 1 = one zstd frame that states its content's size
                  +3  1  zero
                  +4  4  stored size in bytes
    then, if levelled
                  +0  4  row length in elements; their number is a multiple of it
                  +4  1  rotation in bits, 0 to 7
                  +5  3  zero
                  +8  2 × row length: the levels of columns, one for each place in a row
                      2 × number of rows: the levels of rows
                      zeros to a multiple of 8 bytes
    then the lanes' stored bytes, one after the other in the order of their records; nothing follows

The lanes cover each byte of the element exactly once. A lane is the array of its bytes of every element. To decode,
put every element together from its lanes as an unsigned little-endian integer; if "rotated", rotate it right by one
bit (the encoder rotated left: the sign went to the bottom, all of an IEEE exponent's bits came together at the top);
if "XOR", XOR it with the element of the base, which has the same raw size. If "difference", it is the zigzag form of
the difference *d* to the base's element, as integers modulo 2^bits (2 *d*, or −2 *d* − 1 where *d* is negative): shift
it right by one bit, invert all bits if the bit that fell out was 1, and add the element of the base. If "levelled",
rotate it right by the rotation and add the levels of its column and its row, as integers modulo 2^bits; what is stored
of a level are its top 16 bits, the others are 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torchsnapshot.errors import FormatError, NewerFormatError

MAGIC: Final = b"\x89tsc"
VERSION: Final = 1
CODEC_PLANES: Final = 1
FLAG_ROTATED: Final = 1
FLAG_XOR: Final = 2
FLAG_DIFFERENCE: Final = 4
FLAG_LEVELLED: Final = 8
METHOD_RAW: Final = 0
METHOD_ZSTD: Final = 1

WIDTHS: Final = (1, 2, 4, 8)
"""Sizes that an element, and a lane's part of it, may have."""
MAX_RAW_NBYTES: Final = 1 << 30
MAX_ROTATION: Final = 7

_HEADER = struct.Struct("<4sBBBBQB7x")
_LANE = struct.Struct("<BBBxI")
_LEVELS = struct.Struct("<IB3x")
_KNOWN_FLAGS = FLAG_ROTATED | FLAG_XOR | FLAG_DIFFERENCE | FLAG_LEVELLED


@dataclass(frozen=True, slots=True)
class Lane:
    """Bytes ``start`` to ``start + size`` of every element. ``strong``: coded with a search for matches."""

    start: int
    size: int
    method: int
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before an encoded chunk's lanes.

    ``stored`` holds the lanes' stored sizes, ``rotation`` is in bits, ``row_length`` is 0 where nothing is levelled.
    """

    width: int
    flags: int
    raw_nbytes: int
    lanes: tuple[Lane, ...]
    stored: tuple[int, ...]
    rotation: int = 0
    row_length: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the header itself, levels included."""
        return header_nbytes(len(self.lanes)) + levels_nbytes(self.raw_nbytes // self.width, self.row_length)

    @property
    def levels(self) -> slice:
        """Where the numbers of the levels are."""
        start = header_nbytes(len(self.lanes)) + _LEVELS.size
        return slice(start, start + 2 * num_levels(self.raw_nbytes // self.width, self.row_length))


def header_nbytes(num_lanes: int) -> int:
    """Size of the header of a chunk with so many lanes, in bytes."""
    return _HEADER.size + _LANE.size * num_lanes


def num_levels(num_elements: int, row_length: int) -> int:
    """How many levels there are, of columns and of rows together."""
    return row_length + num_elements // row_length if row_length else 0


def levels_nbytes(num_elements: int, row_length: int) -> int:
    """Size of what stands between the lanes' records and their bytes."""
    return -(-(_LEVELS.size + 2 * num_levels(num_elements, row_length)) // 8) * 8 if row_length else 0


def pack_levels(out: memoryview, num_lanes: int, row_length: int, rotation: int, numbers: memoryview) -> None:
    """Write the levels behind the records of the lanes."""
    start = header_nbytes(num_lanes)
    _LEVELS.pack_into(out, start, row_length, rotation)
    start += _LEVELS.size
    end = start + numbers.nbytes
    out[start:end] = numbers
    padding = -end % 8
    out[end : end + padding] = bytes(padding)


def pack_header(
    out: memoryview, width: int, flags: int, raw_nbytes: int, lanes: Sequence[Lane], stored: Sequence[int]
) -> None:
    """Write a header to the beginning of ``out``; ``stored`` holds the stored sizes of ``lanes``."""
    _HEADER.pack_into(out, 0, MAGIC, VERSION, CODEC_PLANES, width, flags, raw_nbytes, len(lanes))
    for index, (lane, nbytes) in enumerate(zip(lanes, stored, strict=True)):
        _LANE.pack_into(out, header_nbytes(index), lane.start, lane.size, lane.method, nbytes)


def read_header(stored: memoryview) -> Header:
    """The checked header of an encoded chunk.

    Raises:
        FormatError: ``stored`` is no encoded chunk.
        NewerFormatError: it is of a version or codec that this library doesn't know.
    """
    if stored.nbytes < _HEADER.size or bytes(stored[:4]) != MAGIC:
        raise FormatError("not an encoded chunk: it does not begin with the magic bytes")
    _, version, codec, width, flags, raw_nbytes, num_lanes = _HEADER.unpack_from(stored)
    if version != VERSION or codec != CODEC_PLANES or flags & ~_KNOWN_FLAGS:
        raise NewerFormatError(
            f"an encoded chunk of version {version}, codec {codec}, flags {flags:#x}: a newer torchsnapshot wrote it"
        )
    if width not in WIDTHS or not 1 <= num_lanes <= width or any(stored[17:24]):
        raise FormatError(f"an encoded chunk says width {width} and {num_lanes} lanes")
    if not 0 < raw_nbytes <= MAX_RAW_NBYTES or raw_nbytes % width or (flags & FLAG_ROTATED and width == 1):
        raise FormatError(f"an encoded chunk says raw size {raw_nbytes}, width {width}, flags {flags}")
    if flags & FLAG_DIFFERENCE and flags != FLAG_DIFFERENCE:
        raise FormatError(f"an encoded chunk says flags {flags}: a difference is neither rotated nor XORed")
    if flags & FLAG_LEVELLED and (flags != FLAG_LEVELLED or width == 1):
        raise FormatError(f"an encoded chunk says flags {flags}, width {width}: levels stand alone, and not for bytes")
    end = header_nbytes(num_lanes)
    if stored.nbytes < end:
        raise FormatError("an encoded chunk ends within its header")
    rotation, row_length = flags & FLAG_ROTATED, 0
    if flags & FLAG_LEVELLED:
        row_length, rotation = _read_levels(stored, end, raw_nbytes // width)
        end += levels_nbytes(raw_nbytes // width, row_length)
    lanes: list[Lane] = []
    sizes: list[int] = []
    covered: set[int] = set()
    for index in range(num_lanes):
        start, size, method, nbytes = _LANE.unpack_from(stored, header_nbytes(index))
        places = set(range(start, start + size))
        padding = stored[header_nbytes(index) + 3]
        if size not in WIDTHS or start + size > width or places & covered or padding:
            raise FormatError(f"an encoded chunk has a lane of bytes {start} to {start + size} of {width}")
        if method not in (METHOD_RAW, METHOD_ZSTD):
            raise NewerFormatError(f"an encoded chunk has a lane of method {method}: a newer torchsnapshot wrote it")
        if method == METHOD_RAW and nbytes != raw_nbytes // width * size:
            raise FormatError(f"an encoded chunk stores {nbytes} bytes for a lane of {raw_nbytes // width * size}")
        covered |= places
        lanes.append(Lane(start, size, method))
        sizes.append(nbytes)
        end += nbytes
    if len(covered) != width or end != stored.nbytes:
        raise FormatError(f"an encoded chunk of {stored.nbytes} bytes whose lanes end at {end}")
    return Header(width, flags, raw_nbytes, tuple(lanes), tuple(sizes), rotation, row_length)


def _read_levels(stored: memoryview, start: int, num_elements: int) -> tuple[int, int]:
    """Row length and rotation; that the numbers are there is checked too."""
    if stored.nbytes < start + _LEVELS.size:
        raise FormatError("an encoded chunk ends within its header")
    row_length, rotation = _LEVELS.unpack_from(stored, start)
    if not row_length or num_elements % row_length or rotation > MAX_ROTATION or any(stored[start + 5 : start + 8]):
        raise FormatError(f"an encoded chunk of {num_elements} elements says rows of {row_length}, rotation {rotation}")
    end = start + levels_nbytes(num_elements, row_length)
    padding = start + _LEVELS.size + 2 * num_levels(num_elements, row_length)
    if stored.nbytes < end or any(stored[padding:end]):
        raise FormatError("an encoded chunk ends within its levels, or no zeros follow them")
    return row_length, rotation
