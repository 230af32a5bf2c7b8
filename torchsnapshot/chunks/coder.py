"""The choice how a chunk is stored: raw, encoded, or as a delta against a base; and the coding that it takes.

What lives here: sampling, asking the meter, coding into a buffer, and the check that it comes back. What doesn't: the
bytes of codes (``codecs``), which base there is (``bases``), keys, puts and packs (``writer``).

Invariant: the first coded chunk of each kind (element width; against a base or not; levelled or not) and one in 64
after it is decoded and compared before it is handed out, and so is every other one until the first has come back. One
that does not come back right is a bug of ours: it is reported and the take goes on without coding.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Final, Literal

from torchsnapshot.chunks.codecs import (
    WORTHWHILE,
    Effort,
    Scheme,
    borrow_scratch,
    choose,
    decode_into,
    encode,
    is_varied,
    peek,
)
from torchsnapshot.chunks.encoded import WIDTHS
from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.engine.buffers import BufferPool
from torchsnapshot.engine.meter import EncodingMeter
from torchsnapshot.engine.shared_cores import SharedCores
from torchsnapshot.errors import CorruptionError, FormatError
from torchsnapshot.store.envelope import Form

logger = logging.getLogger(__name__)

Encoding = Literal["raw", "auto", "smallest"]
"""How chunks are stored: as they are; encoded where that costs no time; encoded wherever it saves bytes."""

CHECK_EVERY: Final = 64
"""One coded chunk in so many is decoded before it is put."""

CLEARLY_SMALLER: Final = 0.95
"""A delta must come to at most this fraction of what the chunk would take standing alone: it costs a second read."""

# below this, looking at a sample costs more time than the bytes are worth
_MIN_ENCODED_NBYTES = {"auto": 32 << 10, "smallest": 1 << 10}
# what shrinks to this (zeros, constants, counters) is encoded however fast the store is
_ALWAYS_WORTHWHILE = 0.25
# a chunk of which a few kilobytes take more than this is not one of those
_NOT_WORTH_A_LOOK = 0.6


_Kind = tuple[int, bool, bool]
"""Element width, whether against a base, whether levelled."""


@dataclass(frozen=True, slots=True)
class Against:
    """A base at hand: its raw bytes, and what it and its deltas came to so far on average (``Bases.average``)."""

    raw: memoryview
    average: float


@dataclass(frozen=True, slots=True)
class Coded:
    """What a chunk came to: how many bytes of the buffer, in which form, of which width.

    ``gain``: the fraction of the raw bytes by which, in the sample, a delta was smaller than the chunk alone; None
    where no base was at hand. ``form`` is ``RAW`` and ``nbytes`` 0 where nothing was coded.
    """

    nbytes: int
    form: Form
    width: int
    gain: float | None = None


class ChunkCoder:
    """Decides and codes for one take. Any thread may call it.

    Args:
        encoding: see ``Encoding``.
        pool: where buffers for checking come from.
        meter: decides for "auto".
        cores: times what coding costs, for the meter.
    """

    def __init__(self, encoding: Encoding, pool: BufferPool, meter: EncodingMeter, cores: SharedCores) -> None:
        self._encoding = encoding
        self._effort = Effort.SMALLEST if encoding == "smallest" else Effort.AUTO
        self._pool = pool
        self._meter = meter
        self._cores = cores
        self._lock = threading.Lock()
        self._num_coded: dict[_Kind, int] = {}
        self._proved: set[_Kind] = set()
        self._is_broken = False

    def may_code(self, nbytes: int) -> bool:
        """Whether a chunk of this size is worth a look."""
        return self._encoding != "raw" and not self._is_broken and nbytes >= _MIN_ENCODED_NBYTES[self._encoding]

    def code(
        self,
        raw: memoryview,
        digest: bytes,
        width: int,
        out: memoryview,
        against: Against | None = None,
        row_length: int = 0,
    ) -> Coded:
        """Code a chunk in the way that is best for it.

        Args:
            raw: the chunk.
            digest: ``digest_of(raw)``.
            width: element size in bytes.
            out: room for ``WORTHWHILE`` of its size; what doesn't fit in is to be stored raw.
            against: the base, if there is one.
            row_length: see ``choose``.
        """
        width = codec_width(width, raw.nbytes)
        gain: float | None = None
        with borrow_scratch() as scratch:
            is_wanted = self._encoding == "smallest" or self._meter.wants_encoding(width)
            if not is_wanted and against is None and (is_varied(raw) or peek(raw, scratch) > _NOT_WORTH_A_LOOK):
                return Coded(0, Form.RAW, 1)
            scheme = choose(raw, width, self._effort, scratch, row_length=row_length)
            base: memoryview | None = None
            if against is not None:
                delta = choose(raw, width, self._effort, scratch, against.raw)
                gain = min(scheme.fraction, 1.0) - delta.fraction
                if self._is_delta_wanted(scheme, delta, against):
                    scheme, base = delta, against.raw
            is_wanted |= scheme.fraction <= _ALWAYS_WORTHWHILE
            if scheme.fraction > WORTHWHILE or (base is None and not is_wanted):
                return Coded(0, Form.RAW, 1, gain)
            is_delta = base is not None
            with self._cores.work() as work:
                nbytes = encode(raw, scheme, out, scratch, base) if is_delta else encode(raw, scheme, out, scratch)
        stored_nbytes = raw.nbytes if nbytes is None else nbytes
        self._meter.record_encode(width, raw.nbytes, stored_nbytes, work.seconds, delta=is_delta)
        if nbytes is None:
            return Coded(0, Form.RAW, 1, gain)
        kind = (width, is_delta, scheme.levels is not None)
        if self._is_due_for_check(kind) and not self._comes_back(kind, out[:nbytes], raw.nbytes, digest, base):
            self._report(raw.nbytes, width)
            return Coded(0, Form.RAW, 1, gain)
        return Coded(nbytes, Form.DELTA if is_delta else Form.ENCODED, width, gain)

    def _is_delta_wanted(self, alone: Scheme, delta: Scheme, against: Against) -> bool:
        if delta.fraction > min(alone.fraction, 1.0) * CLEARLY_SMALLER or delta.fraction >= against.average:
            return False
        if self._encoding == "smallest" or delta.fraction <= _ALWAYS_WORTHWHILE:
            return True
        return self._meter.wants_delta(delta.width, min(alone.fraction, 1.0), delta.fraction)

    def _is_due_for_check(self, kind: _Kind) -> bool:
        with self._lock:
            count = self._num_coded.get(kind, 0)
            self._num_coded[kind] = count + 1
            return count % CHECK_EVERY == 0 or kind not in self._proved

    def _comes_back(self, kind: _Kind, stored: memoryview, nbytes: int, digest: bytes, base: memoryview | None) -> bool:
        buffer = self._pool.acquire(nbytes)
        try:
            raw = buffer.memory(nbytes)
            decode_into(stored, raw, base)
            if digest_of(raw) != digest:
                return False
            with self._lock:
                self._proved.add(kind)
            return True
        except (FormatError, CorruptionError):
            return False
        finally:
            buffer.release()

    def _report(self, nbytes: int, width: int) -> None:
        with self._lock:
            if self._is_broken:
                return
            self._is_broken = True
        logger.error(
            "an encoded chunk of %d bytes (width %d) does not decode to what it was: it and the rest of this take are "
            "stored raw. Nothing is lost; please report this as a bug of torchsnapshot",
            nbytes,
            width,
        )


def codec_width(width: int, nbytes: int) -> int:
    """The width that the codec uses: complex128 comes as pairs of float64, what has no whole elements as bytes."""
    if width not in WIDTHS:
        width = 8 if width % 8 == 0 else 1
    return width if nbytes % width == 0 else 1
