"""How urgent a thread is to the system.

What doesn't live here: which threads are less urgent than others, and from when on (``run``, ``staging``).
"""

from __future__ import annotations

import os
import sys
import threading

BACKGROUND_NICENESS = 10
"""How much nicer than the process a worker is in the background phase."""


def lower_priority() -> None:
    """Make the calling thread nicer by ``BACKGROUND_NICENESS``; it can't be undone."""
    # On Linux a thread has its own niceness, under its kernel id; elsewhere the call would name a process
    if sys.platform == "linux":
        thread = threading.get_native_id()
        try:
            niceness = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness + BACKGROUND_NICENESS, 19))
        except OSError:
            return
