"""How much memory a block of code takes while it runs, measured from outside by a thread."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta


@contextmanager
def measure_rss_deltas(
    rss_deltas: list[int], interval: timedelta = timedelta(milliseconds=100)
) -> Generator[None, None, None]:
    """Append to ``rss_deltas``, every ``interval``, how much this process's resident memory has grown since the start.

    The first figure is taken at once and the last when the block ends, so that there are always two; the highest is
    ``max(rss_deltas)``.

    Args:
        rss_deltas: takes the figures, in bytes.
        interval: time between two figures.
    """
    baseline = resident_nbytes()
    ended = threading.Event()

    def sample() -> None:
        while True:
            rss_deltas.append(resident_nbytes() - baseline)
            if ended.wait(interval.total_seconds()):
                rss_deltas.append(resident_nbytes() - baseline)
                return

    thread = threading.Thread(target=sample, name="rss-profiler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def resident_nbytes() -> int:
    """This process's resident memory in bytes; the most it ever had, where the system has no ``/proc``."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
