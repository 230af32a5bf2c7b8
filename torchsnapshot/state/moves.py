"""Copying bytes between addresses.

What doesn't live here: whose bytes they are (``host_views``).
"""

from __future__ import annotations

import ctypes

_SHORT_NBYTES = 16 << 10

_ADDRESS = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
assert _ADDRESS is not None
# keeps the GIL
_move_short = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)


def move(to: int, start: int, nbytes: int) -> None:
    """Copy bytes from one address to another.

    A short copy takes less time than giving up the GIL for it: another thread may then keep it for milliseconds.
    """
    if nbytes <= _SHORT_NBYTES:
        _move_short(to, start, nbytes)
    else:
        ctypes.memmove(to, start, nbytes)
