"""Digests of live memory that need no second pass over it, as the kernel says that nobody has written there since.

What lives here: which chunks of memory are watched, and when what is known of their content counts. What doesn't: what
is kept of a chunk (``watched_chunks``), how the kernel is asked (``page_watch``), who writes without its seeing it
(``unseen_writers``), what a digest is compared with (``taking``, ``reading``).

A chunk that was found unchanged where it lies is watched from the next look on; its digest is then computed once more,
and holds until a write is seen. Watching costs the first write to each page about a microsecond, some five times what
hashing the page would: so what is written again is watched no longer, and has to lie still for longer each time before
it is watched again. What changes in every step is never watched, and costs nothing.

Why that is exact. ``look`` asks the kernel, which in one step tells which pages were written since the last look, and
begins to watch them anew. Digests of chunks with such pages are dropped. A digest is taken in only from bytes that were
read after the look, and only if no later look has found the chunk written: so a write that came before the bytes were
read is in the digest, and one that came after shows at the next look. At its edges a chunk shares pages with other
things; of these the very bytes that were hashed are kept beside the digest, and compared. Nothing here knows a tensor,
a storage or a version counter: what is said is "these addresses hold these bytes", whoever uses them now.

What page tables do not tell is that somebody writes into memory which was given away earlier. Where that may be,
nothing is watched unless ``TORCHSNAPSHOT_WATCH_MEMORY=1`` says that no tensor lies there. It is found out after the
kernel was asked: what was given away before and is back by then has been written before anything is read, and what is
given away later counts as written. And against what nobody has thought of, each look lets one in ``AUDIT_EVERY``
watched chunks be hashed all the same: a digest that differs, though the kernel has seen no write, is an error that ends
the take, or the restore, and the watching.

Invariants: memory is asked about only after a look that came when it was there already; a fork begins anew; a signal
handler that takes a snapshot, and has come between, finds nothing known and changes nothing.
"""

from __future__ import annotations

import logging
import operator
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.engine.page_watch import PageWatch
from torchsnapshot.errors import SnapshotError
from torchsnapshot.state import unseen_writers
from torchsnapshot.state.watched_chunks import Edges, Extent, Run, WatchedChunk, runs_of

logger = logging.getLogger(__name__)

MIN_NBYTES = 128 << 10
"""Smaller chunks are hashed in less time than it takes to look after them."""

AUDIT_EVERY = 64
"""One in so many chunks that nobody has written is hashed all the same."""

_FORGET_AFTER = 32
"""So many looks after somebody has last asked about a chunk, it is given up."""


class Look:
    """What is known of live memory at one moment; by default, nothing. Any thread may use it. See ``LiveDigests.look``.

    ``spared_nbytes``: how much was not hashed thanks to it.
    """

    def __init__(self, digests: LiveDigests | None = None, number: int = 0) -> None:
        self._digests = digests
        self._number = number
        self._lock = threading.Lock()
        self.spared_nbytes = 0

    def digest(self, extent: Extent | None) -> bytes | None:
        """The digest of one chunk; see ``digests``. None of what has none."""
        return None if extent is None else self.digests((extent,))[0]

    def digests(self, extents: Sequence[Extent]) -> Sequence[bytes | None]:
        """The digests of chunks that nobody has written since they were computed; None for all others.

        Args:
            extents: of memory that was there already at the look, and is still there.
        """
        if self._digests is None:
            return [None] * len(extents)
        return self._digests._known(extents, self._number)

    def hash(self, extent: Extent | None, memory: memoryview) -> bytes:
        """The digest of one chunk of live memory, computed now; see ``hash_all``.

        Args:
            extent: where it lies; None: nothing of it is known later.
            memory: a view of it.
        """
        return digest_of(memory) if extent is None else self.hash_all((extent,), (memory,))[0]

    def hash_all(self, extents: Sequence[Extent], buffers: Sequence[Any]) -> list[bytes]:
        """The digests of chunks of live memory, computed now, and taken in.

        Args:
            extents: where they lie.
            buffers: views of them.

        Raises:
            SnapshotError: memory has changed though the kernel has seen no write. Nothing is watched from now on.
        """
        if self._digests is None:
            return list(map(digest_of, buffers))
        return self._digests._hash(extents, buffers, self._number)

    def note(self, extent: Extent | None, digest: bytes, copy: memoryview) -> None:
        """Take in the digest of a copy that was made of live memory after the look.

        Args:
            extent: where the chunk lies, or has lain; None: nothing is taken in.
            digest: the copy's.
            copy: of all of the chunk.

        Raises:
            SnapshotError: see ``hash_all``.
        """
        if extent is not None and self._digests is not None:
            self._digests._note(extent, digest, self._number, copy)

    def spare(self, nbytes: int) -> None:
        """Count bytes that were not hashed, as their digest was known."""
        with self._lock:
            self.spared_nbytes += nbytes


class LiveDigests:
    """What a process knows of its memory. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_in_use = False
        self._watch: PageWatch | None = None
        self._is_unavailable = False
        self._looks = 0
        self._chunks: dict[Extent, WatchedChunk] = {}
        self._runs: list[Run] = []
        self._numbers = count()

    def look(self) -> Look:
        """Find out what was written since the last look: the beginning of a take or a restore.

        Until the caller has read it, no other thread should write to what it is going to ask about.
        """
        wanted = knobs.watches_memory()
        if self._is_unavailable or wanted is False:
            return Look()
        with self._alone() as is_alone, self._all_or_nothing():
            if not is_alone:
                return Look()
            self._looks += 1
            if self._looks % _FORGET_AFTER == 0:
                self._forget_unasked()
            self._watch_candidates()
            self._ask(self._runs)
            if wanted is None and unseen_writers.may_exist():
                self._drop_all()
                return Look()
            return Look(self, self._looks)

    def forget(self) -> None:
        """Watch nothing any more, as a new process would begin."""
        with self._lock:
            self._drop_all()
            self._is_unavailable = False

    def forget_parent(self) -> None:
        """In a fork: let go of what belongs to the parent. Its threads are not here, and neither is who holds locks."""
        if self._watch is not None:
            self._watch.close()

    # ------------------------------------------------------------------ what is said of memory

    def _known(self, extents: Iterable[Extent], look: int) -> list[bytes | None]:
        found: list[bytes | None] = []
        for chunk in map(self._chunks.get, extents):
            digest = None
            if chunk is not None:
                chunk.asked_at = look
                if chunk.is_watched and (chunk.number + look) % AUDIT_EVERY:
                    digest = self._settled(chunk) if chunk.is_doubtful else chunk.digest
            found.append(digest)
        return found

    def _settled(self, chunk: WatchedChunk) -> bytes | None:
        with self._alone() as is_alone:
            if not is_alone:
                return None
            # another thread may have come first
            if chunk.is_doubtful and chunk.digest is not None:
                chunk.settle()
            return chunk.digest

    def _hash(self, extents: Sequence[Extent], buffers: Sequence[Any], look: int) -> list[bytes]:
        digests = []
        for extent, buffer in zip(extents, buffers, strict=True):
            if extent[1] < MIN_NBYTES:
                digests.append(digest_of(buffer))
                continue
            chunk = self._chunks.get(extent)
            edges = None
            if chunk is None or not chunk.is_watched:
                digest = digest_of(buffer)
            else:
                digest, edges = chunk.hash(memoryview(buffer).cast("B"))
            digests.append(digest)
            self._note(extent, digest, look, edges)
        return digests

    def _note(self, extent: Extent, digest: bytes, look: int, seen: memoryview | Edges | None) -> None:
        """``seen``: the bytes that were hashed, or what of them are edges; None where the chunk was not watched yet."""
        with self._alone() as is_alone:
            if not is_alone:
                return
            chunk = self._chunks.get(extent)
            if chunk is None:
                if extent[1] >= MIN_NBYTES:
                    # numbers follow one another as neighbours do, so each look audits chunks all over the state
                    self._chunks[extent] = WatchedChunk(extent, next(self._numbers), digest, look, look)
            elif not chunk.is_watched:
                chunk.note_candidate(digest, look)
            elif chunk.written_at <= look and seen is not None:
                if chunk.digest not in (None, digest) and not chunk.is_doubtful:
                    self._check_written(chunk)
                else:
                    chunk.know(digest, chunk.edges_of(seen) if isinstance(seen, memoryview) else seen)

    def _check_written(self, chunk: WatchedChunk) -> None:
        """With the lock held: a watched chunk does not hold what it is known to hold.

        Either somebody is writing to it just now, or nothing that the kernel says can be relied on.
        """
        # a look of its own: what was read before it and is noted after it may be older than what it finds
        with self._all_or_nothing():
            self._looks += 1
            self._ask(self._runs)
        if chunk.digest is None or chunk.is_doubtful:
            chunk.digest = None
            return
        self._is_unavailable = True
        self._drop_all()
        raise SnapshotError(
            "memory of the state has changed although the kernel has seen no write to it. Does a device, or a direct "
            "or asynchronous read that has not ended, write to memory of this process? Snapshots that it "
            "took before may hold older bytes in its place. What was being taken is not committed, and everything is "
            f"hashed from here on: take, or restore, once more, and set {knobs.WATCH_MEMORY}=0 for jobs like this one"
        )

    # ------------------------------------------------------------------ what is watched; all with the lock held

    def _watch_candidates(self) -> None:
        """Begin to watch what has lain still."""
        ready = [chunk for chunk in self._chunks.values() if chunk.still >= chunk.patience]
        if not ready:
            return
        try:
            if self._watch is None:
                self._watch = PageWatch()
            are_watched = self._watch.add([chunk.pages for chunk in ready])
        except OSError as error:
            logger.debug("the kernel does not tell which memory was written, so all of it is hashed: %s", error)
            self._is_unavailable = True
            self._drop_all()
            return
        for chunk, is_watched in zip(ready, are_watched, strict=True):
            if is_watched:
                chunk.begin(self._looks)
            else:
                chunk.patience = sys.maxsize
        self._arrange()

    def _arrange(self) -> None:
        """Gather what is watched into runs."""
        self._runs = runs_of(sorted(filter(_IS_WATCHED, self._chunks.values()), key=_EXTENT))

    def _ask(self, runs: Sequence[Run]) -> None:
        """Find out which chunks were written, and watch them anew, unless that does not pay."""
        watch, given_up = self._watch, False
        if watch is None:
            return
        for run in runs:
            try:
                written = watch.written(run.start, run.end)
            except OSError:
                self._lose(run)
                given_up = True
                continue
            if written:
                for chunk, is_own in run.touched(written):
                    if is_own:
                        chunk.lose(self._looks)
                        given_up |= not chunk.is_watched
                    else:
                        chunk.doubt(self._looks)
        if given_up:
            self._arrange()

    def _lose(self, run: Run) -> None:
        """Some memory of a run is not what it was; what an answer would have said of the rest is lost with it."""
        assert self._watch is not None
        for chunk in run.chunks:
            chunk.forget(self._looks)
            try:
                self._watch.written(*chunk.pages)
            except OSError:
                del self._chunks[chunk.extent]

    def _forget_unasked(self) -> None:
        since = self._looks - _FORGET_AFTER
        self._chunks = {extent: chunk for extent, chunk in self._chunks.items() if chunk.asked_at >= since}
        self._arrange()

    def _drop_all(self) -> None:
        self._chunks, self._runs = {}, []
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep other threads out; yields whether this one is not within such a block already, by a signal handler."""
        with self._lock:
            if self._is_in_use:
                yield False
                return
            try:
                self._is_in_use = True
                yield True
            finally:
                self._is_in_use = False

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What the kernel has told it does not tell again: if anything (Ctrl-C) comes between, nothing is known."""
        try:
            yield
        except BaseException:
            self._drop_all()
            raise


_IS_WATCHED = operator.attrgetter("is_watched")
_EXTENT = operator.attrgetter("extent")


_live_digests = LiveDigests()


def live_digests() -> LiveDigests:
    """What this process knows."""
    return _live_digests


def _forget_parent() -> None:
    global _live_digests
    _live_digests.forget_parent()
    _live_digests = LiveDigests()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
