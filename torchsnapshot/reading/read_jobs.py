"""The units of work of a restore, as the engine carries them: one chunk, or neighbouring chunks of one pack.

What lives here: look whether the target holds the bytes already → read → decode → check → scatter, for one unit, in the
engine's two steps: ``stage`` does all of it where the store need not be waited for, else ``finish`` does the rest. What
doesn't: which chunk goes where (``restoring.restore``, ``targets``), how bytes are read and checked
(``chunks.reader``).

Invariants: bytes reach a sink only after their digest was checked; content that several sinks want is read once; a
sink that already holds a chunk is neither read for nor written to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torchsnapshot.chunks.reader import ChunkReader, digest_of
from torchsnapshot.engine.buffers import Buffer
from torchsnapshot.errors import SnapshotError
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef

MAX_RANGE_NBYTES = 8 << 20
"""How much of a pack one job reads at a time."""

MAX_GAP_NBYTES = 64 << 10
"""Bytes of a pack that nobody wants are read all the same if that saves a request: about what one takes to set up."""


class Memory(Protocol):
    """What bytes are scattered into."""

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

    def holds(self, share: Share, ref: ChunkRef) -> bool:
        """Whether the memory holds this content already."""
        if not self.looks or share.offset is None:
            return False
        live = self.memory.live(share.offset, ref.nbytes)
        if live is None or digest_of(live) != ref.digest:
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


class Looking:
    """Whether targets are looked at before chunks are read for them. Thread-safe enough: its counts may be off by some.

    A look costs a pass over the target's memory, and saves a read where it finds something. So a restore begins with
    looking, and when ``PATIENCE`` looks in a row have found nothing, looks only at one chunk in ``EVERY``, until it
    finds something again. At what belongs to a tensor that held a chunk it looks in any case.
    """

    PATIENCE = 24
    EVERY = 8

    def __init__(self) -> None:
        self._num_in_vain = 0
        self._num_passed = 0

    def still_wanted(self, ref: ChunkRef, wanted: Wanted) -> Wanted:
        """Those of ``wanted`` that are not known to hold the chunk."""
        if not any(sink.looks for sink, _ in wanted) or not self._is_worth_it(wanted):
            return wanted
        still = [(sink, share) for sink, share in wanted if not sink.holds(share, ref)]
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

    def read(self, ref: ChunkRef) -> None:
        """Count a chunk that was read."""
        with self._lock:
            self.stats.new_nbytes += ref.nbytes
            self.stats.stored_nbytes += ref.stored_nbytes
            self.stats.num_new_chunks += 1

    def held(self, ref: ChunkRef) -> None:
        """Count a chunk that every sink held."""
        with self._lock:
            self.stats.reused_nbytes += ref.nbytes


class ChunkReadJob:
    """Brings one chunk to all that want it."""

    def __init__(
        self, ref: ChunkRef, wanted: Wanted, reader: ChunkReader, looking: Looking, counters: Counters
    ) -> None:
        self.nbytes = ref.nbytes
        self._ref = ref
        self._wanted = wanted
        self._reader = reader
        self._looking = looking
        self._counters = counters

    def stage(self, buffer: Buffer | None) -> bool:
        """See who wants it still, and bring it where the store need not be waited for."""
        self._wanted = self._looking.still_wanted(self._ref, self._wanted)
        if not self._wanted:
            self._counters.held(self._ref)
            return False
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
        self._counters.read(self._ref)


class PackReadJob:
    """Brings neighbouring chunks of one pack to all that want them, with one request."""

    def __init__(
        self, members: list[tuple[ChunkRef, Wanted]], reader: ChunkReader, looking: Looking, counters: Counters
    ) -> None:
        first, last = members[0][0], members[-1][0]
        self._range_nbytes = last.offset + last.stored_nbytes - first.offset
        self.nbytes = self._range_nbytes + max(ref.nbytes for ref, _ in members)
        self._members = members
        self._reader = reader
        self._looking = looking
        self._counters = counters

    def stage(self, buffer: Buffer | None) -> bool:
        """See what is still wanted, and bring it where the store need not be waited for."""
        missing = []
        for ref, wanted in self._members:
            still = self._looking.still_wanted(ref, wanted)
            if still:
                missing.append((ref, still))
            else:
                self._counters.held(ref)
        self._members = missing
        return bool(missing) and not self._read_and_bring(buffer, at_hand=True)

    def finish(self, buffer: Buffer | None) -> None:
        """Wait for it and bring it."""
        self._read_and_bring(buffer, at_hand=False)

    def _read_and_bring(self, buffer: Buffer | None, *, at_hand: bool) -> bool:
        assert buffer is not None
        memory = buffer.memory(self.nbytes)
        (first, wanted), (last, _) = self._members[0], self._members[-1]
        stored = memory[: last.offset + last.stored_nbytes - first.offset]
        with naming(wanted):
            if not self._reader.read_range(first, first.offset, stored, at_hand=at_hand):
                return False
        for ref, wanted in self._members:
            start = ref.offset - first.offset
            raw = memory[self._range_nbytes : self._range_nbytes + ref.nbytes]
            with naming(wanted):
                self._reader.decode_into(ref, stored[start : start + ref.stored_nbytes], raw)
            for sink, share in wanted:
                sink.scatter(share, raw)
            self._counters.read(ref)
        return True


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
    wanted: Iterable[tuple[ChunkRef, Wanted]], reader: ChunkReader, counters: Counters
) -> Iterator[ChunkReadJob | PackReadJob]:
    """The jobs that bring every content to all that want it: whole blobs first, then packs by neighbourhood."""
    looking = Looking()
    packed: dict[str, list[tuple[ChunkRef, Wanted]]] = {}
    for ref, sinks in wanted:
        if ref.stored_nbytes == ref.blob_nbytes:
            yield ChunkReadJob(ref, sinks, reader, looking, counters)
        else:
            packed.setdefault(ref.key, []).append((ref, sinks))
    for members in packed.values():
        members.sort(key=lambda member: member[0].offset)
        for run in _neighbours(members):
            yield PackReadJob(run, reader, looking, counters)


def _neighbours(members: Iterable[tuple[ChunkRef, Wanted]]) -> Iterator[list[tuple[ChunkRef, Wanted]]]:
    run: list[tuple[ChunkRef, Wanted]] = []
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
