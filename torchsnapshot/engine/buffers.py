"""Memory for buffers that are reused: page-aligned, mapped privately, in huge pages, left out of forks, and pooled.

What lives here: ``map_pages``, ``Buffer``, ``BufferPool`` and the pool of the process. What doesn't: how many bytes
may be lent at once (each run of the ``pipeline`` has its budget).

Invariants:

- Every mapping is excluded from forks (``MADV_DONTFORK``): direct I/O into or out of private memory while the process
  forks corrupts it (open(2), NOTES). So a child must never touch memory that its parent mapped: its pool is new, and
  what it inherited refuses to be used. Nothing is unmapped there either when it is dropped: by then something else may
  live at those addresses.
- Fresh memory is slow (page faults can cost more than the work done on it), so the pool keeps what it mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping

from torchsnapshot.store.backend import PAGE_NBYTES

DEFAULT_KEEP_NBYTES = 256 << 20
"""What a pool holds on to until somebody needs more, in bytes."""

HUGE_PAGE_NBYTES = 2 << 20
"""Mappings of at least this size begin on a multiple of it, so that the kernel can back all of them with huge pages."""

_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def round_up(nbytes: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``nbytes``."""
    return -(-nbytes // multiple) * multiple


def address_of(memory: memoryview) -> int:
    """Where writable, non-empty ``memory`` begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def map_pages(nbytes: int) -> memoryview:
    """Map fresh memory of at least ``nbytes`` bytes: writable, zero, page-aligned, a whole number of pages long.

    It is unmapped when the last view of it is gone.

    Raises:
        MemoryError: the machine, or this process, may have no more.
    """
    nbytes = round_up(max(nbytes, 1), PAGE_NBYTES)
    alignment = HUGE_PAGE_NBYTES if nbytes >= HUGE_PAGE_NBYTES else PAGE_NBYTES
    slack = alignment if alignment > mmap.PAGESIZE else 0
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            mapping = mmap.mmap(-1, nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            mapping = mmap.mmap(-1, nbytes + slack)
    except OSError as error:
        raise MemoryError(
            f"no memory is left for a buffer of {nbytes} bytes ({error.strerror}): free some, or lower what snapshots "
            "may use with TORCHSNAPSHOT_PER_RANK_MEMORY_BUDGET_BYTES"
        ) from error
    # advice that a kernel does not know costs speed, or safety only where direct I/O does not exist
    for name in ("MADV_DONTFORK", "MADV_HUGEPAGE") if slack else ("MADV_DONTFORK",):
        if hasattr(mmap, name):
            with contextlib.suppress(OSError):
                mapping.madvise(getattr(mmap, name))
    _mappings.add(mapping)
    memory = memoryview(mapping)
    start = -address_of(memory) % alignment if slack else 0
    return memory[start : start + nbytes]


def is_page_memory(memory: memoryview) -> bool:
    """Whether ``memory`` begins on a page of a mapping of ours: direct I/O may read to its last page's end."""
    mapping = memory.obj
    return isinstance(mapping, mmap.mmap) and mapping in _mappings and address_of(memory) % PAGE_NBYTES == 0


def size_class(nbytes: int) -> int:
    """Bytes that a buffer of at least ``nbytes`` takes: whole pages, in steps of a quarter of a power of two."""
    nbytes = max(nbytes, PAGE_NBYTES)
    step = max(PAGE_NBYTES, (1 << (nbytes - 1).bit_length()) >> 3)
    return round_up(nbytes, step)


class Buffer:
    """Page-aligned memory on loan from a pool. Views into it must not be used after ``release``."""

    __slots__ = ("_lent", "_memory", "_pool", "nbytes")

    def __init__(self, pool: BufferPool, memory: memoryview) -> None:
        self._pool = pool
        self._memory = memory
        self._lent = True
        self.nbytes = memory.nbytes

    def memory(self, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` bytes (all by default), writable; they hold whatever the last user left there.

        Raises:
            RuntimeError: the buffer was given back, or this process is a fork of the one that owns it.
            ValueError: the buffer is smaller.
        """
        self._pool.check_process()
        if not self._lent:
            raise RuntimeError("a pool buffer was used after its release")
        if nbytes is None:
            return self._memory
        if not 0 <= nbytes <= self.nbytes:
            raise ValueError(f"{nbytes} bytes wanted from a buffer of {self.nbytes}")
        return self._memory[:nbytes]

    def release(self) -> None:
        """Give the memory back. A second call does nothing; nor does a call in a forked child."""
        self._pool.give_back(self)


class BufferPool:
    """Reuses page-aligned memory. ``acquire`` never waits: how much may be lent is each run's budget's business.

    Args:
        keep_nbytes: how much memory, lent and free together, the pool holds on to; what goes beyond is unmapped as it
            comes back. ``keep`` raises it, ``limit`` lowers it.
    """

    def __init__(self, keep_nbytes: int = DEFAULT_KEEP_NBYTES) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._free: dict[int, list[memoryview]] = {}
        self._lent: Counter[int] = Counter()
        self._keep_nbytes = keep_nbytes
        self._free_nbytes = 0
        self._lent_nbytes = 0

    @property
    def lent_nbytes(self) -> int:
        """Bytes of the buffers that are on loan."""
        return self._lent_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes of the buffers that wait for their next user."""
        return self._free_nbytes

    def check_process(self) -> None:
        """Raise ``RuntimeError`` in a fork of the process that the pool was made in."""
        if os.getpid() != self._process:
            raise RuntimeError("a pool buffer was used in a fork of its process: its memory is not mapped here")

    def keep(self, nbytes: int) -> None:
        """Hold on to at least ``nbytes`` bytes from now on."""
        with self._lock:
            self._keep_nbytes = max(self._keep_nbytes, nbytes)

    def limit(self, nbytes: int) -> None:
        """Hold on to at most ``nbytes`` bytes from now on, or to what every pool keeps."""
        with self._lock:
            self._keep_nbytes = min(self._keep_nbytes, max(nbytes, DEFAULT_KEEP_NBYTES))
            self._shrink_free(self._keep_nbytes - self._lent_nbytes)

    def acquire(self, nbytes: int) -> Buffer:
        """A buffer of at least ``nbytes`` bytes, of ``size_class(nbytes)`` to be exact.

        Raises:
            MemoryError: the machine has no memory left.
        """
        self.check_process()
        nbytes = size_class(nbytes)
        with self._lock:
            self._count_lent(nbytes, 1)
            free = self._free.get(nbytes)
            if free:
                self._free_nbytes -= nbytes
                return Buffer(self, free.pop())
            # memory of other sizes makes room, else sizes that are no longer in use would be kept for ever
            self._shrink_free(self._keep_nbytes - self._lent_nbytes)
        try:
            return Buffer(self, map_pages(nbytes))
        except BaseException:
            with self._lock:
                self._count_lent(nbytes, -1)
            raise

    def give_back(self, buffer: Buffer) -> None:
        """What ``Buffer.release`` does."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if not buffer._lent:
                return
            buffer._lent = False
            self._count_lent(buffer.nbytes, -1)
            self._free.setdefault(buffer.nbytes, []).append(buffer._memory)
            self._free_nbytes += buffer.nbytes
            self._shrink_free(self._keep_nbytes - self._lent_nbytes)

    def warm_nbytes(self, wanted: Mapping[int, int]) -> int:
        """How much of what is wanted waits here: mapped, and touched by whoever had it before.

        Args:
            wanted: how many buffers of each ``size_class``.
        """
        with self._lock:
            return sum(size * min(count, len(self._free.get(size, ()))) for size, count in wanted.items())

    def lacks(self, wanted: Mapping[int, int]) -> bool:
        """Whether fewer buffers are here than are wanted, counting those on loan, which come back."""
        with self._lock:
            return any(self._num_of(size) < count for size, count in wanted.items())

    def prefault(self, wanted: Mapping[int, int], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Map free buffers until nothing is lacking, and make sure that memory backs their pages.

        Meant for a background thread; it raises what the pool keeps to what that needs.

        Args:
            wanted: how many buffers of each ``size_class``; those on loan count, they come back.
            goes_on: asked before each 2 MiB; when it says no, what has not been touched yet is unmapped.
        """
        self.check_process()
        with self._lock:
            to_come = sum(size * max(0, count - self._lent[size]) for size, count in wanted.items())
            self._keep_nbytes = max(self._keep_nbytes, self._lent_nbytes + to_come)
        for size, count in wanted.items():
            while self._num_of(size) < count:
                if not goes_on():
                    return
                memory = map_pages(size)
                for start in range(0, memory.nbytes, HUGE_PAGE_NBYTES):
                    if not goes_on():
                        return
                    # without the interpreter's lock, and without torch's threads
                    nbytes = min(HUGE_PAGE_NBYTES, memory.nbytes - start)
                    ctypes.memset(address_of(memory[start:]), 0, nbytes)
                with self._lock:
                    self._drop_surplus(size, wanted)
                    if self._lent_nbytes + self._free_nbytes + size > self._keep_nbytes:
                        return
                    self._free.setdefault(size, []).append(memory)
                    self._free_nbytes += size

    def trim(self, nbytes: int = 0) -> None:
        """Unmap free buffers until at most ``nbytes`` bytes of them are left."""
        with self._lock:
            self._shrink_free(nbytes)

    def _drop_surplus(self, nbytes: int, wanted: Mapping[int, int]) -> None:
        """Make room for ``nbytes`` more by unmapping free buffers of sizes that are not wanted so often."""
        for size, free in self._free.items():
            while free and self._num_of(size) > wanted.get(size, 0):
                if self._lent_nbytes + self._free_nbytes + nbytes <= self._keep_nbytes:
                    return
                free.pop()
                self._free_nbytes -= size

    def _num_of(self, size: int) -> int:
        return len(self._free.get(size, ())) + self._lent[size]

    def _count_lent(self, size: int, change: int) -> None:
        self._lent[size] += change
        self._lent_nbytes += size * change

    def _shrink_free(self, target_nbytes: int) -> None:
        while self._free_nbytes > max(target_nbytes, 0):
            size = max(size for size, free in self._free.items() if free)
            self._free[size].pop()
            self._free_nbytes -= size


_shared_pool = BufferPool()


def shared_pool() -> BufferPool:
    """The pool of this process."""
    return _shared_pool


def _forget_parent() -> None:
    global _shared_pool
    # the addresses are not mapped here, and munmap would hit whatever comes to live there
    for mapping in list(_mappings):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))
    _shared_pool = BufferPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
