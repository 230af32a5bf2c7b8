"""A pause of Python's cycle collector while many small objects are made that all live on.

The collector runs after so many new objects, walks over all that there are, and finds nothing: with tens of thousands
of tensors that was half of the time that a take's planning took. What other threads leave in cycles meanwhile is
collected a moment later. Only code that takes well under a second is to run in such a pause. Where pauses of several
threads overlap all the time, the collector still gets its turn: a pause of ``_MAX_SECONDS`` is prolonged by
nobody.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic

_lock = threading.Lock()
_num_pauses = 0
_paused_at = 0.0

_MAX_SECONDS = 0.5


@contextmanager
def collector_paused() -> Generator[None, None, None]:
    """Pause the cycle collector for the length of the block, or of the function that this decorates."""
    global _num_pauses, _paused_at
    with _lock:
        # where the application has turned it off, it stays off
        pauses = monotonic() - _paused_at < _MAX_SECONDS if _num_pauses else gc.isenabled()
        if pauses:
            if not _num_pauses:
                _paused_at = monotonic()
            _num_pauses += 1
            gc.disable()
    try:
        yield
    finally:
        if pauses:
            with _lock:
                _num_pauses -= 1
                if not _num_pauses:
                    gc.enable()


def _reset_in_child() -> None:
    global _lock, _num_pauses
    _lock = threading.Lock()
    # the thread that would have ended the pause exists in the parent only
    if _num_pauses:
        _num_pauses = 0
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
