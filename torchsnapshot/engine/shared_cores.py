"""How long a piece of work takes, of which threads of ours do several at once on fewer cores: as if it were alone.

What doesn't live here: what follows from it (``meter``).

By the clock on the wall, eight threads that encode on two cores need four times as long each as one alone, though the
cores do as much as ever; whoever compared that with what a store makes them wait for would find encoding dear and the
store quick. The time that a thread computed for would not do either: where the application has the cores for itself,
work takes it long, and that is to count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter


@dataclass(slots=True)
class Work:
    """One piece of work. ``seconds`` are known once it is done."""

    seconds: float = 0.0


class SharedCores:
    """Times work that is done on the same cores. Any thread may use it.

    Args:
        count: how many cores there are for it; None: it is timed by the clock alone.
        clock: seconds.
    """

    def __init__(self, count: int | None, clock: Callable[[], float] = perf_counter) -> None:
        self._count = count
        self._clock = clock
        self._lock = threading.Lock()
        self._num_working = 0
        self._changed_at = 0.0
        # seconds that a piece of work would have got by now if it had been there from the beginning
        self._granted = 0.0

    @contextmanager
    def work(self) -> Generator[Work, None, None]:
        """Time the block: its seconds on the wall, those in which several such blocks shared a core only in part."""
        work = Work()
        before = self._change(1)
        try:
            yield work
        finally:
            work.seconds = self._change(-1) - before

    def _change(self, change: int) -> float:
        """One piece of work comes or goes: what each one that is there has been granted so far."""
        with self._lock:
            now = self._clock()
            share = 1.0 if self._count is None else max(1.0, self._num_working / self._count)
            self._granted += (now - self._changed_at) / share
            self._changed_at = now
            self._num_working += change
            return self._granted
