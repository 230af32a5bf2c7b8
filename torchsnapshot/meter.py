"""Whether encoding pays for a take's time: what encoding costs against what it saves the store, measured as it goes.

What lives here: the decision, from numbers that are handed in. What doesn't: clocks, threads' work, bytes (``chunks``).

The rule, for chunks of one element width: a worker that encodes spends ``encode`` seconds per raw byte and hands the
store only the fraction ``ratio`` of the bytes, each of which takes it ``put`` seconds, under the load that the take
itself causes. Encoding pays where ``encode < (1 - ratio) × put``. Encoding is tried first. What is chosen is given up
only when the other way is better by ``MARGIN``, and not before ``MIN_PUTS`` more puts were measured: with less load the
store answers faster, so without the margin the choice would swing. While chunks are stored raw, one in ``PROBE_EVERY``
is encoded all the same, so that the measurement stays fresh.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

MARGIN: Final = 1.25
MIN_PUTS: Final = 8
PROBE_EVERY: Final = 32

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

    encode: _Rate = field(default_factory=_Rate)
    stored: _Rate = field(default_factory=_Rate)  # stored bytes per raw byte
    encoding: bool = True
    puts_at_switch: int = 0
    num_asked: int = 0


class EncodingMeter:
    """Decides for one take, in any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._put = _Rate()
        self._num_puts = 0
        self._widths: dict[int, _Width] = {}

    def record_encode(self, width: int, raw_nbytes: int, stored_nbytes: int, seconds: float) -> None:
        """A chunk was encoded."""
        with self._lock:
            state = self._widths.setdefault(width, _Width())
            state.encode.add(raw_nbytes, seconds)
            state.stored.add(raw_nbytes, stored_nbytes)

    def record_put(self, nbytes: int, seconds: float) -> None:
        """A blob was put."""
        with self._lock:
            self._put.add(nbytes, seconds)
            self._num_puts += 1

    def wants_encoding(self, width: int) -> bool:
        """Whether the next chunk of this width should be encoded."""
        with self._lock:
            state = self._widths.setdefault(width, _Width())
            state.num_asked += 1
            if self._num_puts - state.puts_at_switch >= MIN_PUTS and state.encode.nbytes:
                cost = state.encode.per_byte
                saved = (1 - state.stored.per_byte) * self._put.per_byte
                better = cost > saved * MARGIN if state.encoding else cost * MARGIN < saved
                if better:
                    state.encoding = not state.encoding
                    state.puts_at_switch = self._num_puts
            return state.encoding or state.num_asked % PROBE_EVERY == 0
