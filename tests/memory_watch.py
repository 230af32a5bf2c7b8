"""Whether this system tells which memory was written, for tests of what follows from that; and memory for them."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from torchsnapshot.engine.page_watch import PageWatch

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def _is_possible() -> bool:
    try:
        PageWatch().close()
    except OSError:
        return False
    return True


needs_page_watch = pytest.mark.skipif(not _is_possible(), reason="the kernel does not tell which memory was written")


def map_anew(page: int) -> None:
    """Other memory takes the place of a page."""
    map_memory = ctypes.CDLL(None, use_errno=True).mmap
    map_memory.restype = ctypes.c_void_p
    protection, fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
    where, nbytes = ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE)
    assert map_memory(where, nbytes, protection, PRIVATE | fixed, -1, ctypes.c_long(0)) == page
