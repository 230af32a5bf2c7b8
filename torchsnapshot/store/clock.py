"""Time, as the store's protocol sees it: injectable, so that no test sleeps.

What lives here: the protocol of a clock and the real one. What doesn't: any rule about time. Invariant: safety never
rests on a clock; clocks decide only how long somebody waits, and what people read in a listing.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where seconds come from."""

    def now(self) -> float:
        """Seconds since the epoch, by this host."""

    def monotonic(self) -> float:
        """Seconds that never run backwards."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class _SystemClock:
    """The host's clock."""

    __slots__ = ()

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


SYSTEM_CLOCK: Clock = _SystemClock()
"""The host's clock."""
