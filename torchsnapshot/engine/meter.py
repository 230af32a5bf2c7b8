"""Whether encoding pays for a take's time: what encoding costs against what it saves the store, measured as it goes.

What lives here: the decision, from numbers that are handed in, and the numbers, which a process keeps from take to take
for each disk or bucket (``meter_of``): a take that changes little puts too little to find them out. What doesn't:
clocks, threads' work, bytes (``chunks.writer``).

The rule, for chunks of one element width: a worker that encodes spends ``encode`` seconds per raw byte and hands the
store only the fraction ``ratio`` of the bytes, each of which takes it ``put`` seconds, under the load that the take
itself causes. Encoding pays where ``encode < (1 - ratio) × put``. What is chosen is given up only when the other way is
better by ``MARGIN``, and not before ``MIN_PUTS`` more puts were measured: with less load the store answers faster, so
without the margin the choice would swing. While chunks are stored raw, one in ``PROBE_EVERY`` is encoded all the same,
so that the measurement stays fresh; until there is one, the first, the second, the fourth, and so on.

A remote store begins with encoding. A local one begins raw: a disk may be faster than the codec, and then a process's
first take would have all its workers encode, in memory that they touch for the first time; while on a slow disk a few
raw chunks are all that is lost.

Deltas follow the same rule, chunk by chunk, with the fractions that samples of this very chunk came to: what coding
against the base costs more than what would be done without it, against the puts of the bytes by which it is smaller
(``wants_delta``). Before that, a base has to be at hand: reading it from the store (``wants_base``) and keeping a copy
of it in memory for later takes (``wants_copy``) must cost less than the puts that XOR saved lately at that place, or,
where nothing is known of the place, than those of ``ASSUMED_GAIN``.

In a background take nobody waits for encoding: it only takes turns with training on the cores, and training leaves
some of them idle. So there it counts at ``BACKGROUND_WEIGHT`` of its seconds. Not at nothing: on a machine whose cores
are all busy with training it is training that encoding slows down, and the next take may have to wait for this one.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Final

MARGIN: Final = 1.25
MIN_PUTS: Final = 8
PROBE_EVERY: Final = 256
BACKGROUND_WEIGHT: Final = 0.5

ASSUMED_GAIN: Final = 0.15
"""What XOR saves of the raw bytes beyond encoding alone, where nothing is known yet: fp32 weights after ten steps."""

ASSUMED_COPY_SECONDS: Final = 1e-9
"""Seconds a byte for a copy into fresh memory, until it was measured: page faults make it slow."""

_DECAY = 0.9


@dataclass(slots=True)
class _Rate:
    """Seconds per byte, the newest samples weighing most."""

    seconds: float = 0.0
    nbytes: float = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        self.seconds = self.seconds * _DECAY + seconds
        self.nbytes = self.nbytes * _DECAY + nbytes

    @property
    def per_byte(self) -> float:
        return self.seconds / self.nbytes if self.nbytes else 0.0


@dataclass(slots=True)
class _Width:
    """What is known of chunks of one element width."""

    encoding: bool
    encode: _Rate = field(default_factory=_Rate)
    stored: _Rate = field(default_factory=_Rate)  # stored bytes per raw byte
    puts_at_switch: int = 0
    num_asked: int = 0


class EncodingMeter:
    """Decides for takes of one kind into one store, in any number of threads.

    Args:
        in_background: nobody waits for the takes' workers.
        begins_raw: encoding has to prove itself first.
    """

    def __init__(self, *, in_background: bool = False, begins_raw: bool = False) -> None:
        self._lock = threading.Lock()
        self._begins_raw = begins_raw
        self._weight = BACKGROUND_WEIGHT if in_background else 1.0
        self._put = _Rate()
        self._num_puts = 0
        self._widths: dict[int, _Width] = {}
        self._deltas: dict[int, _Rate] = {}
        self._base_reads = _Rate()
        self._copies = _Rate()
        self._num_asked_for_base = 0

    def record_encode(
        self, width: int, raw_nbytes: int, stored_nbytes: int, seconds: float, *, delta: bool = False
    ) -> None:
        """A chunk was encoded, alone or, with ``delta``, against a base."""
        with self._lock:
            if delta:
                self._deltas.setdefault(width, _Rate()).add(raw_nbytes, seconds)
                return
            state = self._width(width)
            state.encode.add(raw_nbytes, seconds)
            state.stored.add(raw_nbytes, stored_nbytes)

    def record_base_read(self, nbytes: int, seconds: float) -> None:
        """A base of so many raw bytes was read from the store and decoded."""
        with self._lock:
            self._base_reads.add(nbytes, seconds)

    def record_copy(self, nbytes: int, seconds: float) -> None:
        """A base of so many raw bytes was copied into memory that is kept."""
        with self._lock:
            self._copies.add(nbytes, seconds)

    def record_put(self, nbytes: int, seconds: float) -> None:
        """A blob was put."""
        with self._lock:
            self._put.add(nbytes, seconds)
            self._num_puts += 1

    def wants_encoding(self, width: int) -> bool:
        """Whether the next chunk of this width should be encoded."""
        with self._lock:
            state = self._width(width)
            state.num_asked += 1
            if self._num_puts - state.puts_at_switch >= MIN_PUTS and state.encode.nbytes:
                cost = state.encode.per_byte * self._weight
                saved = (1 - state.stored.per_byte) * self._put.per_byte
                better = cost > saved * MARGIN if state.encoding else cost * MARGIN < saved
                if better:
                    state.encoding = not state.encoding
                    state.puts_at_switch = self._num_puts
            return state.encoding or _is_probe(state.num_asked, state.encode)

    def wants_delta(self, width: int, alone: float, delta: float) -> bool:
        """Whether a chunk whose base is at hand should be stored as a delta.

        Args:
            width: element size in bytes.
            alone: the fraction of its raw size that the chunk would come to without the base.
            delta: the fraction that it would come to as a delta.
        """
        with self._lock:
            rate = self._deltas.get(width)
            if rate is None or self._num_puts < MIN_PUTS:
                return True
            plain = self._widths.get(width)
            cost = rate.per_byte
            if plain is None or plain.encoding:
                cost -= 0.0 if plain is None else plain.encode.per_byte
            else:
                alone = 1.0
            return cost * self._weight < (alone - delta) * self._put.per_byte

    def wants_base(self, gain: float | None) -> bool:
        """Whether it pays to read a base from the store, to have it for one chunk.

        Args:
            gain: what XOR saved lately at this place, as a fraction of the raw bytes; None where it is not known.
        """
        with self._lock:
            self._num_asked_for_base += 1
            if _is_probe(self._num_asked_for_base, self._base_reads):
                return True
            if not self._base_reads.nbytes:
                return False
            saved = (ASSUMED_GAIN if gain is None else gain) * self._put.per_byte
            return self._base_reads.per_byte * self._weight < saved

    def wants_copy(self, gain: float | None) -> bool:
        """Whether it pays to copy a chunk that stands alone into memory, to have it as a base in later takes."""
        with self._lock:
            cost = self._copies.per_byte if self._copies.nbytes else ASSUMED_COPY_SECONDS
            return cost * self._weight * MARGIN < (ASSUMED_GAIN if gain is None else gain) * self._put.per_byte

    def _width(self, width: int) -> _Width:
        return self._widths.setdefault(width, _Width(not self._begins_raw))


def _is_probe(number: int, measured: _Rate) -> bool:
    """Whether the question of this number, from 1 on, is to be answered by trying it."""
    return number % PROBE_EVERY == 0 if measured.nbytes else number & (number - 1) == 0


_meters: dict[tuple[str, bool], EncodingMeter] = {}


def meter_of(device: str, *, is_local: bool, in_background: bool) -> EncodingMeter:
    """What this process has measured so far.

    Args:
        device: what holds the store's bytes, such that stores on the same one are as fast: a disk, a bucket.
        is_local: whether it is a disk.
        in_background: what background takes see is kept apart: their threads wait for those of the application.
    """
    fresh = EncodingMeter(in_background=in_background, begins_raw=is_local)
    return _meters.setdefault((device, in_background), fresh)


def forget() -> None:
    """Drop everything, as a new process would begin."""
    _meters.clear()


if hasattr(os, "register_at_fork"):
    # another thread may have held a lock
    os.register_at_fork(after_in_child=forget)
