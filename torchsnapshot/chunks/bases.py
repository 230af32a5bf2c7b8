"""Which chunk a delta may be against, and the copies of such chunks that a process holds in memory.

What lives here: ``base_of``, and ``Bases``: memory-resident copies under a byte budget, what each base's deltas came
to so far, and what XOR gains at each place. What doesn't: coding (``coder``), storing (``writer``), the proof that a
base may be reused (``store.known``), reading a base from the store (``writer``).

Invariants:

- Everything here is a hint. Whether a base is still in the store is proved by each take anew, and what a copy holds is
  what was hashed when its chunk was put or read: a wrong or missing hint costs bytes, never content.
- Deltas are one deep: a base stands alone and fills its blob.
- A copy that is in use is never freed, and the copies never hold more than the budget. What the last two takes used
  does not make room for something new: a state larger than the budget would else push out, in each pass, just what is
  needed next.

When to begin a new base: the deltas against one base grow from take to take. A base and its deltas come to some number
of bytes a take on average, and as long as the next delta is smaller than that average, it brings the average down;
the first one that is not would bring it up, and a new base is due (``average``).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from torchsnapshot.engine.buffers import Buffer, BufferPool, address_of, size_class
from torchsnapshot.recent import Recent
from torchsnapshot.store.envelope import ChunkRef, Form

GAINLESS: Final = 0.02
"""Where XOR saves less than this fraction of the raw bytes, no copy of a base is kept."""

_RECENT_TAKES = 2
_LEARNING_RATE = 0.5


def base_of(previous: ChunkRef | None) -> ChunkRef | None:
    """The base for a chunk at the place where ``previous`` stood.

    Args:
        previous: a chunk that may be reused, its base included.

    Returns:
        A chunk that stands alone in a blob of its own; None where there is none.
    """
    base = previous if previous is None or previous.base is None else previous.base
    if base is None or base.form is Form.DELTA:
        return None
    if base.offset or base.stored_nbytes != base.blob_nbytes or base.key.endswith(".p"):
        return None
    return base


@dataclass(slots=True)
class _Copy:
    """The raw bytes of a base. ``users`` are reading it now; ``dropped`` ones are freed by the last of them."""

    buffer: Buffer
    nbytes: int
    used_in: int
    users: int = 0
    dropped: bool = False


@dataclass(slots=True)
class _Cycle:
    """A base and its deltas so far: how many chunks, and their stored sizes as fractions of the raw one, summed."""

    total: float
    count: int = 1


class Bases:
    """What one process holds and knows of the bases of one store. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copies: OrderedDict[bytes, _Copy] = OrderedDict()
        self._cycles: dict[bytes, _Cycle] = {}
        self._gains: dict[str, float] = {}
        self._gains_of_names: dict[str, float] = {}
        self._pool = BufferPool(0)
        self._budget = 0
        self._held_nbytes = 0
        self._take = 0

    @property
    def held_nbytes(self) -> int:
        """Memory that the copies take."""
        return self._held_nbytes

    def begin_take(self, budget: int) -> None:
        """A take begins; from now on the copies may take ``budget`` bytes of memory, those in use aside."""
        with self._lock:
            self._take += 1
            self._shrink(budget)
            # memory that a renewed base leaves is what the new one takes
            self._pool.keep(budget)

    def free_copies(self) -> None:
        """Free all copies; the next take may make new ones."""
        with self._lock:
            self._shrink(0)

    def holds(self, ref: ChunkRef) -> bool:
        """Whether memory holds a copy of this chunk."""
        return ref.digest in self._copies

    def keep(self, ref: ChunkRef, raw: memoryview) -> bool:
        """Copy a chunk that stands alone, if the budget has room for it.

        Args:
            ref: the chunk.
            raw: its raw bytes.

        Returns:
            Whether a copy was made.
        """
        need = size_class(raw.nbytes)
        with self._lock:
            known = self._copies.get(ref.digest)
            if known is not None:
                self._use(ref.digest, known)
                return False
            if not self._make_room(need):
                return False
            # counted before it is there, so that others don't count on the same room
            self._held_nbytes += need
        try:
            buffer = self._pool.acquire(raw.nbytes)
            # without the interpreter's lock, unlike an assignment to a slice
            ctypes.memmove(address_of(buffer.memory()), address_of(raw), raw.nbytes)
        except (OSError, MemoryError):
            with self._lock:
                self._held_nbytes -= need
            return False
        with self._lock:
            if ref.digest in self._copies:
                self._free(buffer)
            else:
                self._copies[ref.digest] = _Copy(buffer, raw.nbytes, self._take)
        return True

    @contextmanager
    def borrow(self, ref: ChunkRef) -> Generator[memoryview | None, None, None]:
        """The raw bytes of a base for the length of the block, None where memory holds none."""
        with self._lock:
            copy = self._copies.get(ref.digest)
            if copy is None or copy.nbytes != ref.nbytes:
                copy = None
            else:
                copy.users += 1
                self._use(ref.digest, copy)
        try:
            yield None if copy is None else copy.buffer.memory(copy.nbytes)
        finally:
            if copy is not None:
                with self._lock:
                    copy.users -= 1
                    if copy.dropped and not copy.users:
                        self._free(copy.buffer)

    def replace(self, old: ChunkRef) -> None:
        """Another chunk stands alone where ``old`` was the base: its copy is not needed any more."""
        with self._lock:
            self._cycles.pop(old.digest, None)
            if old.digest in self._copies:
                self._drop(old.digest)

    def average(self, base: ChunkRef) -> float:
        """What a base and its deltas so far came to, as a fraction of the raw size of one chunk."""
        cycle = self._cycles.get(base.digest)
        return base.stored_nbytes / base.nbytes if cycle is None else cycle.total / cycle.count

    def record_delta(self, base: ChunkRef, stored_nbytes: int) -> None:
        """A delta of so many bytes was put against ``base``."""
        with self._lock:
            cycle = self._cycles.setdefault(base.digest, _Cycle(base.stored_nbytes / base.nbytes))
            cycle.total += stored_nbytes / base.nbytes
            cycle.count += 1

    def gain(self, path: str) -> float | None:
        """Which fraction of the raw bytes XOR saved lately at a path, beyond what encoding alone saves; None: unknown.

        Below zero where a delta was larger. Where nothing is known of a path, those with its last name speak for it:
        what is a ``weight`` or an ``exp_avg`` in one layer changes much as it does in another.
        """
        found = self._gains.get(path)
        return self._gains_of_names.get(_last_name(path)) if found is None else found

    def record_gain(self, path: str, gain: float) -> None:
        """A sample at a path showed this."""
        with self._lock:
            _learn(self._gains, path, gain)
            name = _last_name(path)
            # items of lists have numbers, which say nothing about other lists
            if not name.isdecimal():
                _learn(self._gains_of_names, name, gain)

    # --- all below: with the lock held

    def _make_room(self, nbytes: int) -> bool:
        """Free copies that no recent take used until ``nbytes`` more fit."""
        while self._held_nbytes + nbytes > self._budget and self._copies:
            digest, copy = next(iter(self._copies.items()))  # the one whose last use is longest ago
            if copy.users or copy.used_in > self._take - _RECENT_TAKES:
                return False
            self._drop(digest)
        return self._held_nbytes + nbytes <= self._budget

    def _shrink(self, budget: int) -> None:
        self._budget = budget
        excess = self._held_nbytes - budget
        while excess > 0 and self._copies:
            digest, copy = next(iter(self._copies.items()))
            excess -= copy.buffer.nbytes
            self._drop(digest)
        self._pool.trim(budget - self._held_nbytes)

    def _use(self, digest: bytes, copy: _Copy) -> None:
        copy.used_in = self._take
        self._copies.move_to_end(digest)

    def _drop(self, digest: bytes) -> None:
        copy = self._copies.pop(digest)
        copy.dropped = True
        if not copy.users:
            self._free(copy.buffer)

    def _free(self, buffer: Buffer) -> None:
        self._held_nbytes -= buffer.nbytes
        buffer.release()


def _learn(gains: dict[str, float], place: str, gain: float) -> None:
    known = gains.get(place)
    gains[place] = gain if known is None else known + (gain - known) * _LEARNING_RATE


def _last_name(path: str) -> str:
    """What a place is called by its neighbours: ``weight`` of ``model/layers.0.attention.weight``."""
    return path.rpartition("/")[2].rpartition(".")[2]


_bases: Recent[str, Bases] = Recent()


def bases_of(store_id: str) -> Bases:
    """What this process holds for the store that it takes into now.

    The budget is the process's: copies for other stores are freed.
    """
    for other, kept in _bases.items():
        if other != store_id:
            kept.free_copies()
    return _bases.get_or_put(store_id, Bases)


def forget() -> None:
    """Drop everything, as a new process would begin."""
    _bases.clear()


if hasattr(os, "register_at_fork"):
    # the copies are not mapped in the child, and another thread may have held a lock
    os.register_at_fork(after_in_child=forget)
