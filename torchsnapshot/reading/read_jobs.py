"""The units of work of a restore, as the engine carries them: a look at many chunks, one of them, or a part of a pack.

What lives here: look whether the targets hold the bytes already → read → decode → check → scatter. A look brings the
jobs for what is missing; these do all of theirs in ``stage`` where the store need not be waited for, else ``finish``
does the rest. So the cores go on looking while the store is waited for. What doesn't: which chunk goes where
(``restoring.restore``, ``targets``), how bytes are read and checked (``chunks.reader``).

Invariants: bytes reach a sink only after their digest was checked; content that several sinks want is read once; a
sink that already holds a chunk is neither read for nor written to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torchsnapshot.chunks.reader import ChunkReader
from torchsnapshot.engine.buffers import Buffer
from torchsnapshot.engine.groups import LOOK_NBYTES, grouped
from torchsnapshot.engine.job import Job
from torchsnapshot.errors import SnapshotError
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.pauses import collector_paused
from torchsnapshot.state.live_digests import Look
from torchsnapshot.state.watched_chunks import Extent
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef

MAX_RANGE_NBYTES = 8 << 20
"""How much of a pack one job reads at a time."""

MAX_GAP_NBYTES = 64 << 10
"""Bytes of a pack that nobody wants are read all the same if that saves a request: about what one takes to set up."""


class Memory(Protocol):
    """What bytes are scattered into."""

    def extent(self, offset: int, nbytes: int) -> Extent | None:
        """The address and the size of what ``live`` shows; None where it shows nothing, or nothing that lasts."""

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """The present bytes where they lie; None where that is impossible."""

    def scatter(self, box: Box, data: memoryview) -> None:
        """Write the region ``box``."""

    def scatter_part(self, chunk: Box, data: memoryview, part: Box) -> None:
        """Write the region ``part`` of the chunk that the data are."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a sink wants of a chunk: all of it, or a part.

    ``offset`` is where the whole chunk lies in the sink's memory, in bytes; None where that is not one range.
    """

    chunk: Box
    part: Box
    offset: int | None

    @classmethod
    def whole(cls, piece: Piece) -> Share:
        """All of a chunk that is a piece of the sink."""
        return cls(piece.box, piece.box, piece.offset)


@dataclass(slots=True, eq=False)
class Sink:
    """Where the chunks of one leaf go.

    ``looks``: its memory may hold them already. ``has_held``: it has been found to hold one. ``written``: it got one.
    """

    path: str
    memory: Memory
    looks: bool = False
    has_held: bool = False
    written: bool = False

    def holds(self, share: Share, ref: ChunkRef, look: Look) -> bool:
        """Whether the memory holds this content already."""
        if not self.looks or share.offset is None:
            return False
        extent = self.memory.extent(share.offset, ref.nbytes)
        digest = look.digest(extent)
        if digest is None:
            live = self.memory.live(share.offset, ref.nbytes)
            if live is None:
                return False
            digest = look.hash(extent, live)
        if digest != ref.digest:
            return False
        self.has_held = True
        return True

    def scatter(self, share: Share, data: memoryview) -> None:
        """Write one chunk, or the part of it that is wanted."""
        self.written = True
        if share.part == share.chunk:
            self.memory.scatter(share.chunk, data)
        else:
            self.memory.scatter_part(share.chunk, data, share.part)


Wanted = list[tuple[Sink, Share]]
"""Everywhere that one content goes."""

WantedChunk = tuple[ChunkRef, Wanted]


class Looking:
    """Whether targets are looked at before chunks are read for them. Thread-safe enough: its counts may be off by some.

    A look costs a pass over the target's memory, and saves a read where it finds something. So a restore begins with
    looking, and when ``PATIENCE`` looks in a row have found nothing, looks only at one chunk in ``EVERY``, until it
    finds something again. At what belongs to a tensor that held a chunk it looks in any case.
    """

    PATIENCE = 24
    EVERY = 8

    def __init__(self, look: Look) -> None:
        self._look = look
        self._num_in_vain = 0
        self._num_passed = 0

    def still_wanted(self, ref: ChunkRef, wanted: Wanted) -> Wanted:
        """Those of ``wanted`` that are not known to hold the chunk."""
        if not any(sink.looks for sink, _ in wanted) or not self._is_worth_it(wanted):
            return wanted
        still = [(sink, share) for sink, share in wanted if not sink.holds(share, ref, self._look)]
        self._num_in_vain = 0 if len(still) < len(wanted) else self._num_in_vain + 1
        return still

    def _is_worth_it(self, wanted: Wanted) -> bool:
        if self._num_in_vain < self.PATIENCE or any(sink.has_held for sink, _ in wanted):
            return True
        self._num_passed += 1
        return self._num_passed % self.EVERY == 0


@dataclass(slots=True)
class Counters:
    """Sums over the jobs of one restore. Thread-safe."""

    stats: Stats
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, refs: Sequence[ChunkRef]) -> None:
        """Count chunks that were read."""
        nbytes, stored_nbytes = sum(ref.nbytes for ref in refs), sum(ref.stored_nbytes for ref in refs)
        with self._lock:
            self.stats.new_nbytes += nbytes
            self.stats.stored_nbytes += stored_nbytes
            self.stats.num_new_chunks += len(refs)

    def held(self, nbytes: int) -> None:
        """Count the bytes of chunks that every sink held."""
        with self._lock:
            self.stats.reused_nbytes += nbytes


class LookJob:
    """Looks whether targets hold their chunks already; those that are missing become jobs of their own.

    Args:
        members: the chunks, and who wants them.
        looking: which of them are looked at.
        counters: of the restore.
        jobs_of: the jobs that bring what is missing.
    """

    nbytes = 0

    def __init__(
        self,
        members: Sequence[WantedChunk],
        looking: Looking,
        counters: Counters,
        jobs_of: Callable[[Sequence[WantedChunk]], Sequence[Job]],
    ) -> None:
        self._members = members
        self._looking = looking
        self._counters = counters
        self._jobs_of = jobs_of

    @collector_paused()
    def stage(self, buffer: Buffer | None) -> Sequence[Job]:
        """Look at all of them."""
        missing: list[WantedChunk] = []
        held_nbytes = 0
        for ref, wanted in self._members:
            with naming(wanted):
                still = self._looking.still_wanted(ref, wanted)
            if still:
                missing.append((ref, still))
            else:
                held_nbytes += ref.nbytes
        self._counters.held(held_nbytes)
        return self._jobs_of(missing)

    def finish(self, buffer: Buffer | None) -> None:
        """Nothing is left."""


class ChunkReadJob:
    """Brings one chunk to all that want it."""

    def __init__(self, ref: ChunkRef, wanted: Wanted, reader: ChunkReader, counters: Counters) -> None:
        self.nbytes = ref.nbytes
        self._ref = ref
        self._wanted = wanted
        self._reader = reader
        self._counters = counters

    def stage(self, buffer: Buffer | None) -> bool:
        """Bring it where the store need not be waited for."""
        assert buffer is not None
        raw = buffer.memory(self.nbytes)
        with naming(self._wanted):
            is_at_hand = self._reader.read_at_hand(self._ref, raw)
        if is_at_hand:
            self._bring(raw)
        return not is_at_hand

    def finish(self, buffer: Buffer | None) -> None:
        """Wait for it and bring it."""
        assert buffer is not None
        raw = buffer.memory(self.nbytes)
        with naming(self._wanted):
            self._reader.read_into(self._ref, raw, at_hand=False)
        self._bring(raw)

    def _bring(self, raw: memoryview) -> None:
        for sink, share in self._wanted:
            sink.scatter(share, raw)
        self._counters.read([self._ref])


class PackReadJob:
    """Brings neighbouring chunks of one pack to all that want them, with one request."""

    def __init__(self, members: Sequence[WantedChunk], reader: ChunkReader, counters: Counters) -> None:
        first, last = members[0][0], members[-1][0]
        self._range_nbytes = last.offset + last.stored_nbytes - first.offset
        self.nbytes = self._range_nbytes + max(ref.nbytes for ref, _ in members)
        self._members = members
        self._reader = reader
        self._counters = counters

    def stage(self, buffer: Buffer | None) -> bool:
        """Bring them where the store need not be waited for."""
        return not self._read_and_bring(buffer, at_hand=True)

    def finish(self, buffer: Buffer | None) -> None:
        """Wait for it and bring it."""
        self._read_and_bring(buffer, at_hand=False)

    def _read_and_bring(self, buffer: Buffer | None, *, at_hand: bool) -> bool:
        assert buffer is not None
        memory = buffer.memory(self.nbytes)
        first, wanted = self._members[0]
        stored = memory[: self._range_nbytes]
        with naming(wanted):
            if not self._reader.read_range(first, first.offset, stored, at_hand=at_hand):
                return False
        self._bring(stored, memory[self._range_nbytes :])
        return True

    @collector_paused()
    def _bring(self, stored: memoryview, space: memoryview) -> None:
        start = self._members[0][0].offset
        for ref, wanted in self._members:
            offset = ref.offset - start
            with naming(wanted):
                raw = self._reader.decode(ref, stored[offset : offset + ref.stored_nbytes], space[: ref.nbytes])
            for sink, share in wanted:
                sink.scatter(share, raw)
        self._counters.read([ref for ref, _ in self._members])


class naming:
    """A context that adds to an error of this library whose bytes they were."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SnapshotError):
            paths = sorted({sink.path for sink, _ in self._wanted})
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            raise type(error)(f"{', '.join(paths[:3])}{more}: {error}") from error


def read_jobs(
    chunks: Iterable[WantedChunk], reader: ChunkReader, counters: Counters, look: Look | None = None
) -> list[Job]:
    """The jobs that bring every content to all that want it: packs by neighbourhood first, then whole blobs.

    Those without a buffer are looks, which bring the jobs for what they do not find.

    Args:
        chunks: all contents, and who wants them.
        reader: of the snapshot's store.
        counters: of the restore.
        look: what is known of the targets' memory; it came after they were allocated.
    """

    def one_by_one(members: Sequence[WantedChunk]) -> list[Job]:
        return [ChunkReadJob(ref, wanted, reader, counters) for ref, wanted in members]

    def together(members: Sequence[WantedChunk]) -> list[Job]:
        return [PackReadJob(neighbours, reader, counters) for neighbours in _neighbours(members)]

    packs: dict[str, list[WantedChunk]] = {}
    whole: list[WantedChunk] = []
    for chunk in chunks:
        ref, _ = chunk
        is_whole = ref.stored_nbytes == ref.blob_nbytes
        (whole if is_whole else packs.setdefault(ref.key, [])).append(chunk)
    looking = Looking(look or Look())
    jobs: list[Job] = []
    for pack in packs.values():
        pack.sort(key=lambda chunk: chunk[0].offset)
        jobs += [LookJob(pack, looking, counters, together)] if any(map(_may_hold, pack)) else together(pack)
    jobs += one_by_one([chunk for chunk in whole if not _may_hold(chunk)])
    groups = grouped(filter(_may_hold, whole), LOOK_NBYTES, lambda chunk: chunk[0].nbytes)
    jobs += [LookJob(group, looking, counters, one_by_one) for group in groups]
    return jobs


def _may_hold(chunk: WantedChunk) -> bool:
    """Whether there is anything to look at."""
    _, wanted = chunk
    return any(sink.looks for sink, _ in wanted)


def _neighbours(members: Iterable[WantedChunk]) -> Iterator[list[WantedChunk]]:
    run: list[WantedChunk] = []
    end = 0
    for ref, sinks in members:
        is_far = run and ref.offset - end > MAX_GAP_NBYTES
        is_full = run and ref.offset + ref.stored_nbytes - run[0][0].offset > MAX_RANGE_NBYTES
        if is_far or is_full:
            yield run
            run = []
        run.append((ref, sinks))
        end = ref.offset + ref.stored_nbytes
    if run:
        yield run
