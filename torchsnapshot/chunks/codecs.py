"""How the bytes of a chunk become fewer: byte planes, the difference to a base, zstd on the planes that compress.

What lives here: the choice of how to encode, coding and decoding; pure functions from bytes to bytes. What doesn't:
the layout of an encoded chunk (``encoded``), the arithmetic on planes (``planes``), digests, keys, blobs, which chunk
is whose base (``writer``).

Why planes: the bytes of floating-point weights that hold sign and exponent are far from uniform, those of the mantissa
are noise. Split apart, the former shrink to a third under an entropy coder and the latter are stored as they are. With
the parameters below zstd is nearly a pure Huffman coder: it hardly looks for matches, which numbers do not have, and
runs at about 1 GB/s a core. Long runs (zeros, constants) are matches all the same and vanish.

Against a base, the elements' difference as integers is what is split: neighbouring floats of one sign are neighbouring
integers. XOR says the same with more bits wherever a carry runs through the number (a step from 0x7FFF to 0x8000 flips
sixteen of them); on weights and second moments after ten steps the difference came out 2 to 8 % smaller.

Invariants: decoding reads and writes nothing outside what it was given and allocates in proportion to ``out``,
whatever the bytes say.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import torch
import zstandard

from torchsnapshot.chunks import planes
from torchsnapshot.chunks.encoded import (
    FLAG_DIFFERENCE,
    FLAG_ROTATED,
    FLAG_XOR,
    MAX_RAW_NBYTES,
    METHOD_RAW,
    METHOD_ZSTD,
    WIDTHS,
    Header,
    Lane,
    header_nbytes,
    pack_header,
    read_header,
)
from torchsnapshot.engine.buffers import address_of, map_pages
from torchsnapshot.errors import CorruptionError, FormatError

WORTHWHILE: Final = 0.97
"""Encoding must bring a chunk to at most this fraction of its raw size, else it is stored raw."""

_MAX_WINDOW_NBYTES = 1 << 23
_SEARCH_GAIN = 0.98
_ROTATION_GAIN = 0.998


class Effort(Enum):
    """How hard ``encode`` tries.

    ``AUTO`` codes the planes that a small sample shows compressible, at the speed of an entropy coder. ``SMALLEST``
    looks at a larger sample, also for matches, within planes and in the bytes as they lie, tries the rotation, and
    takes small gains.
    """

    AUTO = "auto"
    SMALLEST = "smallest"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a chunk is to be encoded, and the fraction of the raw size that its sample came to.

    ``difference``: against a base, the elements' difference; else their XOR.
    """

    width: int
    rotated: bool
    lanes: tuple[Lane, ...]
    fraction: float
    difference: bool = False


# a plane is coded if its sample shrinks to this; small gains are not worth what they cost at every restore
_PLANE_GAIN = {Effort.AUTO: 0.92, Effort.SMALLEST: 0.99}
_SAMPLE_RUN_LENGTH = {Effort.AUTO: 1024, Effort.SMALLEST: planes.TILE // 8}
_SAMPLE_NUM_RUNS = 8
_PEEK_NUM_RUNS = 8
_PEEK_RUN_NBYTES = 512


class Scratch:
    """What one thread needs while it encodes or decodes: room for planes, and the compressors. Not thread-safe."""

    def __init__(self) -> None:
        self._room = memoryview(bytearray())
        self.tiles = planes.Tiles()
        # the window is small, so that decoders need little memory; a block of zstd is no longer than it in any case
        self.entropy = _compressor(1, window_log=17, hash_log=6, chain_log=6, min_match=7, target_length=0)
        self.search = _compressor(5, window_log=22)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES)

    def room(self, nbytes: int) -> memoryview:
        """Memory of ``nbytes`` bytes; holds anything."""
        if self._room.nbytes < nbytes:
            self._room = map_pages(nbytes)
        return self._room[:nbytes]


def _compressor(level: int, **parameters: int) -> zstandard.ZstdCompressor:
    chosen = zstandard.ZstdCompressionParameters.from_level(
        level, **parameters, write_content_size=True, write_checksum=False, write_dict_id=False
    )
    return zstandard.ZstdCompressor(compression_params=chosen)


_free_scratches: list[Scratch] = []


@contextmanager
def borrow_scratch() -> Generator[Scratch, None, None]:
    """A scratch of this process's own, kept for the next user."""
    try:
        scratch = _free_scratches.pop()
    except IndexError:
        scratch = Scratch()
    process = os.getpid()
    try:
        yield scratch
    finally:
        if os.getpid() == process:
            _free_scratches.append(scratch)


if hasattr(os, "register_at_fork"):
    # their memory is not mapped in the child
    os.register_at_fork(after_in_child=_free_scratches.clear)


# --- encoding


def choose(raw: memoryview, width: int, effort: Effort, scratch: Scratch, base: memoryview | None = None) -> Scheme:
    """Look at a sample of ``raw`` and choose how to encode it.

    Args:
        raw: contiguous bytes.
        width: size of an element in bytes.
        effort: see ``Effort``.
        scratch: the caller's own.
        base: what ``raw`` will be coded against; of the same size.
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
            rotated = _scheme(sample, True, effort, scratch)
            if rotated.fraction < best.fraction * _ROTATION_GAIN:
                best = rotated
        data = scratch.tiles.memory(width, 0, sample.numel())
        fraction = len(scratch.search.compress(data)) / data.nbytes
        if fraction < best.fraction * _SEARCH_GAIN:
            best = Scheme(width, False, (Lane(0, width, METHOD_ZSTD, strong=True),), fraction)
    return best


def peek(raw: memoryview, scratch: Scratch) -> float:
    """The fraction to which a few kilobytes of the bytes as they lie shrink: a small part of the time of ``choose``."""
    step = max(raw.nbytes // _PEEK_NUM_RUNS, _PEEK_RUN_NBYTES)
    runs = b"".join([raw[start : start + _PEEK_RUN_NBYTES] for start in range(0, raw.nbytes, step)])
    return len(scratch.entropy.compress(runs)) / max(len(runs), 1)


def encode(
    raw: memoryview,
    scheme: Scheme,
    out: memoryview,
    scratch: Scratch,
    base: memoryview | None = None,
) -> int | None:
    """Encode ``raw`` into ``out`` as ``scheme`` says.

    Args:
        raw: contiguous bytes, at most ``MAX_RAW_NBYTES``.
        scheme: what ``choose`` said about these bytes.
        out: writable memory, aligned to 8 bytes, that does not overlap ``raw``; its size is the limit.
        scratch: the caller's own.
        base: what the scheme was chosen with.

    Returns:
        How many bytes of ``out`` the encoded chunk takes; None where it does not fit in.
    """
    if not 0 < raw.nbytes <= MAX_RAW_NBYTES or raw.nbytes % scheme.width:
        raise ValueError(f"cannot encode {raw.nbytes} bytes of width {scheme.width}")
    if base is not None and base.nbytes != raw.nbytes:
        raise ValueError(f"a base of {base.nbytes} bytes for a chunk of {raw.nbytes}")
    num_elements = raw.nbytes // scheme.width
    # stored lanes first, the widest first: then each begins on a multiple of its size
    lanes = sorted(scheme.lanes, key=lambda lane: (lane.method, -lane.size, -lane.start))
    end = header_nbytes(len(lanes))
    places: list[memoryview] = []
    room = scratch.room(sum(lane.size for lane in lanes if lane.method) * num_elements + 8 * len(lanes))
    room_end = 0
    for lane in lanes:
        nbytes = lane.size * num_elements
        if lane.method == METHOD_RAW:
            if end + nbytes > out.nbytes:
                return None
            places.append(out[end : end + nbytes])
            end += nbytes
        else:
            room_end = -(-room_end // 8) * 8
            places.append(room[room_end : room_end + nbytes])
            room_end += nbytes
    if len(lanes) == 1 and lanes[0].method == METHOD_ZSTD and not scheme.rotated and base is None:
        places = [raw]  # the elements as they lie
    else:
        extents = [((lane.start, lane.size), place) for lane, place in zip(lanes, places, strict=True)]
        planes.split(raw, base, scheme.width, scheme.rotated, extents, scratch.tiles, difference=scheme.difference)
    stored: list[int] = []
    for lane, place in zip(lanes, places, strict=True):
        if lane.method == METHOD_RAW:
            stored.append(place.nbytes)
            continue
        filled = _compress(scratch.search if lane.strong else scratch.entropy, place, out[end:])
        if filled is None:
            return None
        stored.append(filled)
        end += filled
    flags = FLAG_ROTATED * scheme.rotated
    if base is not None:
        flags |= FLAG_DIFFERENCE if scheme.difference else FLAG_XOR
    pack_header(out, scheme.width, flags, raw.nbytes, lanes, stored)
    return end


def encode_bytes(
    raw: memoryview, width: int, effort: Effort = Effort.AUTO, base: memoryview | None = None
) -> bytes | None:
    """``choose`` and ``encode`` in one, into fresh memory; None where it is not worth it. For tests and tools."""
    if not 0 < raw.nbytes <= MAX_RAW_NBYTES:
        return None
    with borrow_scratch() as scratch:
        scheme = choose(raw, width, effort, scratch, base)
        if scheme.fraction > WORTHWHILE:
            return None
        out = memoryview(bytearray(max(int(raw.nbytes * WORTHWHILE), 8)))
        nbytes = encode(raw, scheme, out, scratch, base)
        return None if nbytes is None else bytes(out[:nbytes])


def _effective_width(nbytes: int, width: int) -> int:
    if width not in WIDTHS:
        raise ValueError(f"width {width}: an element is 1, 2, 4 or 8 bytes wide")
    return width if nbytes % width == 0 else 1


def _scheme(sample: torch.Tensor, rotated: bool, effort: Effort, scratch: Scratch) -> Scheme:
    """The best scheme for a sample: each plane coded if that pays."""
    width, num_elements = sample.element_size(), sample.numel()
    if rotated:
        sample = planes.rotated(sample, scratch.tiles)
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


def _compress(compressor: zstandard.ZstdCompressor, data: memoryview, out: memoryview) -> int | None:
    """One frame into ``out``; its size, or None where it doesn't fit in."""
    filled = 0
    with compressor.stream_reader(data, size=data.nbytes, closefd=False) as reader:
        while filled < out.nbytes:
            count = reader.readinto(out[filled:])
            if not count:
                return filled
            filled += count
    return None


# --- decoding


def decode_into(
    stored: memoryview, out: memoryview, base: memoryview | None = None, scratch: Scratch | None = None
) -> None:
    """Decode ``stored`` into ``out``.

    Args:
        stored: exactly one encoded chunk.
        out: writable memory of the chunk's raw size, as the chunk's reference states it; not overlapping ``stored``.
        base: the base's raw bytes where the chunk was coded against one; may be ``out`` itself.
        scratch: the caller's own; borrowed if None.

    Raises:
        FormatError: the header breaks the format, or doesn't fit ``out`` or ``base``.
        CorruptionError: the header is good and what follows is not.
    """
    header = read_header(stored)
    if header.raw_nbytes != out.nbytes:
        raise FormatError(f"an encoded chunk of {header.raw_nbytes} raw bytes where {out.nbytes} were expected")
    if bool(header.flags & (FLAG_XOR | FLAG_DIFFERENCE)) != (base is not None):
        raise FormatError("an encoded chunk needs a base and none was given, or the other way round")
    if base is not None and base.nbytes != out.nbytes:
        raise FormatError(f"a base of {base.nbytes} bytes for a chunk of {out.nbytes}")
    if scratch is None:
        with borrow_scratch() as borrowed:
            _decode(header, stored, out, base, borrowed)
    else:
        _decode(header, stored, out, base, scratch)


def _decode(header: Header, stored: memoryview, out: memoryview, base: memoryview | None, scratch: Scratch) -> None:
    if out.readonly:
        raise ValueError("cannot decode into read-only memory")
    if address_of(out) % header.width:
        fresh = memoryview(bytearray(out.nbytes))
        _decode(header, stored, fresh, base, scratch)
        out[:] = fresh
        return
    num_elements = header.raw_nbytes // header.width
    direct = len(header.lanes) == 1 and not header.flags
    room = scratch.room(0 if direct else header.raw_nbytes + 8 * len(header.lanes))
    end, room_end = header.nbytes, 0
    places: list[memoryview] = []
    for lane, nbytes in zip(header.lanes, header.stored, strict=True):
        data = stored[end : end + nbytes]
        end += nbytes
        lane_nbytes = lane.size * num_elements
        # what cannot be viewed as an array where it lies goes through the scratch
        if lane.method == METHOD_RAW and not direct and not data.readonly and address_of(data) % lane.size == 0:
            places.append(data)
            continue
        room_end = -(-room_end // 8) * 8
        place = out if direct else room[room_end : room_end + lane_nbytes]
        room_end += lane_nbytes
        if lane.method == METHOD_RAW:
            place[:] = data
        else:
            _decompress(scratch.decompressor, data, place)
        places.append(place)
    if not direct:
        extents = [((lane.start, lane.size), place) for lane, place in zip(header.lanes, places, strict=True)]
        rotated, difference = bool(header.flags & FLAG_ROTATED), bool(header.flags & FLAG_DIFFERENCE)
        planes.merge(extents, base, header.width, rotated, out, scratch.tiles, difference=difference)


def _decompress(decompressor: zstandard.ZstdDecompressor, data: memoryview, out: memoryview) -> None:
    """Fill ``out`` from exactly one frame."""
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != out.nbytes or frame.dict_id:
            raise CorruptionError(f"a zstd frame of {frame.content_size} bytes stands for a lane of {out.nbytes}")
        filled = 0
        with decompressor.stream_reader(data, read_across_frames=False, closefd=False) as reader:
            while filled < out.nbytes:
                count = reader.readinto(out[filled:])
                if not count:
                    raise CorruptionError(f"a zstd frame ends after {filled} of {out.nbytes} bytes")
                filled += count
    except zstandard.ZstdError as error:
        raise CorruptionError(f"a zstd frame is damaged: {error}") from error
