"""How the bytes of a chunk become fewer: byte planes, the difference to a base, zstd on the planes that compress.

What lives here: coding and decoding; pure functions from bytes to bytes. What doesn't: the choice of how to encode
(``choice``, whose names stand here too), the layout of an encoded chunk (``encoded``), the arithmetic on planes
(``planes``), digests, keys, blobs, which chunk is whose base (``writer``).

Why planes: the bytes of floating-point weights that hold sign and exponent are far from uniform, those of the mantissa
are noise. Split apart, the former shrink to a third under an entropy coder and the latter are stored as they are. With
the parameters of ``scratch`` zstd is nearly a pure Huffman coder: it hardly looks for matches, which numbers do not
have, and runs at about 1 GB/s a core. Long runs (zeros, constants) are matches all the same and vanish.

Against a base, the elements' difference as integers is what is split: neighbouring floats of one sign are neighbouring
integers. XOR says the same with more bits wherever a carry runs through the number (a step from 0x7FFF to 0x8000 flips
sixteen of them); on weights and second moments after ten steps the difference came out 2 to 8 % smaller.

Levels: how large an optimizer's moments are depends on row and column, nearly as a product of two factors, which is
what Adafactor lives on. As integers again, that is a sum; so means of rows and columns are stored and subtracted. In a
small GPT this brought AdamW's second moments from 81 to 77 % of their size and the first from 83.5 to 82 %; weights
are as they were.

Invariants: decoding reads and writes nothing outside what it was given and allocates in proportion to ``out``,
whatever the bytes say.
"""

from __future__ import annotations

from typing import Final

import zstandard

from torchsnapshot.chunks import planes
from torchsnapshot.chunks.choice import Effort as Effort
from torchsnapshot.chunks.choice import Scheme as Scheme
from torchsnapshot.chunks.choice import choose as choose
from torchsnapshot.chunks.choice import is_varied as is_varied
from torchsnapshot.chunks.choice import peek as peek
from torchsnapshot.chunks.encoded import (
    FLAG_DIFFERENCE,
    FLAG_LEVELLED,
    FLAG_ROTATED,
    FLAG_XOR,
    MAX_RAW_NBYTES,
    METHOD_RAW,
    METHOD_ZSTD,
    Header,
    header_nbytes,
    levels_nbytes,
    pack_header,
    pack_levels,
    read_header,
)
from torchsnapshot.chunks.scratch import Scratch
from torchsnapshot.chunks.scratch import borrow_scratch as borrow_scratch
from torchsnapshot.engine.buffers import address_of
from torchsnapshot.errors import CorruptionError, FormatError

WORTHWHILE: Final = 0.97
"""Encoding must bring a chunk to at most this fraction of its raw size, else it is stored raw."""

# --- encoding


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
    levels = scheme.levels
    end = header_nbytes(len(lanes)) + levels_nbytes(num_elements, levels.row_length if levels else 0)
    if end > out.nbytes:
        return None
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
    if len(lanes) == 1 and lanes[0].method == METHOD_ZSTD and not scheme.rotated and not levels and base is None:
        places = [raw]  # the elements as they lie
    else:
        extents = [((lane.start, lane.size), place) for lane, place in zip(lanes, places, strict=True)]
        rotation, difference = levels.rotation if levels else int(scheme.rotated), scheme.difference
        planes.split(raw, base, scheme.width, rotation, extents, scratch.tiles, difference=difference, levels=levels)
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
    if levels:
        flags |= FLAG_LEVELLED
        pack_levels(out, len(lanes), levels.row_length, levels.rotation, levels.numbers)
    pack_header(out, scheme.width, flags, raw.nbytes, lanes, stored)
    return end


def encode_bytes(
    raw: memoryview,
    width: int,
    effort: Effort = Effort.AUTO,
    base: memoryview | None = None,
    row_length: int = 0,
) -> bytes | None:
    """``choose`` and ``encode`` in one, into fresh memory; None where it is not worth it. For tests and tools."""
    if not 0 < raw.nbytes <= MAX_RAW_NBYTES:
        return None
    with borrow_scratch() as scratch:
        scheme = choose(raw, width, effort, scratch, base, row_length)
        if scheme.fraction > WORTHWHILE:
            return None
        out = memoryview(bytearray(max(int(raw.nbytes * WORTHWHILE), 8)))
        nbytes = encode(raw, scheme, out, scratch, base)
        return None if nbytes is None else bytes(out[:nbytes])


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
        difference = bool(header.flags & FLAG_DIFFERENCE)
        levels = None
        if header.row_length:
            levels = planes.Levels(header.row_length, header.rotation, stored[header.levels])
        planes.merge(
            extents, base, header.width, header.rotation, out, scratch.tiles, difference=difference, levels=levels
        )


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
