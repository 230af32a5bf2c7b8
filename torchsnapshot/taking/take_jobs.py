"""The units of work of a take, as the engine carries them: one large chunk, one group of small ones, or a look at many.

What lives here: unwritten? → compare → stage → digest → known? → put, for one unit. What doesn't: the order of a
take's steps (``take``), what is cut how (``plan``), how bytes are stored, and that one content is stored once
(``chunks.writer``), what becomes of packs that are hardly used any more (``repack``).

Invariant: the digest that names a blob is computed over the very buffer that is encoded and put: copy, digest of the
copy, put. A digest of live memory only answers "is this what the last take stored here?", and so does one that is known
from before where nobody has written since (``state.live_digests``); where it isn't, the bytes are copied and the copy
is hashed. So a tensor that another thread changes meanwhile cannot poison the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.chunks.writer import ChunkWriter
from torchsnapshot.engine.buffers import Buffer
from torchsnapshot.engine.groups import LOOK_NBYTES, by_size, grouped
from torchsnapshot.engine.pipeline import Job
from torchsnapshot.state.live_digests import Look
from torchsnapshot.state.watched_chunks import Extent
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.known import Known
from torchsnapshot.taking.expected import Expected, ExpectedChunk, differing, not_reusable
from torchsnapshot.taking.plan import GROUP_NBYTES, Chunk, TakePlan

NUM_AHEAD = 16
"""How many large chunks are staged before small ones: enough to keep a store busy meanwhile."""


def _reuse(chunk: Chunk, extent: Extent | None, known: Known, look: Look) -> bool:
    """Give the chunk what the last take stored here, if live memory equals it and it may be reused; returns whether."""
    if chunk.previous is None:
        return False
    digest = look.digest(extent)
    is_unwritten = digest is not None
    if digest is None:
        live = None if chunk.changed_last_time else chunk.source.live(chunk.piece.offset, chunk.nbytes)
        if live is None:
            return False
        digest = look.hash(extent, live)
    if digest != chunk.previous:
        return False
    chunk.ref = known.lookup(digest, chunk.nbytes)
    if chunk.ref is not None and is_unwritten:
        look.spare(chunk.nbytes)
    return chunk.ref is not None


class ChunkJob:
    """Carries one large chunk."""

    def __init__(self, chunk: Chunk, known: Known, writer: ChunkWriter, look: Look) -> None:
        self.nbytes = chunk.nbytes
        self._chunk = chunk
        self._known = known
        self._writer = writer
        self._look = look
        self._extent: Extent | None = None

    def stage(self, buffer: Buffer | None) -> bool:
        """Compare with the last take; where that differs, copy."""
        # later the application may have given the tensor other memory
        self._extent = self._chunk.extent
        if _reuse(self._chunk, self._extent, self._known, self._look):
            return False
        assert buffer is not None
        self._chunk.source.stage(self._chunk.piece.box, buffer.memory(self.nbytes))
        return True

    def finish(self, buffer: Buffer | None) -> None:
        """Hash the copy and put it, unless its content is known."""
        assert buffer is not None
        raw = buffer.memory(self.nbytes)
        digest = digest_of(raw)
        self._look.note(self._extent, digest, raw)
        ref = self._known.lookup(digest, self.nbytes)
        self._chunk.ref = ref or self._put(raw, digest)

    def _put(self, raw: memoryview, digest: bytes) -> ChunkRef:
        chunk, previous = self._chunk, None
        if self._writer.wants_bases and chunk.previous is not None:
            previous = self._known.lookup(chunk.previous, chunk.nbytes)
        return self._writer.put_chunk(
            raw, digest, chunk.width, path=chunk.path, previous=previous, row_length=chunk.row_length
        )


class GroupJob:
    """Carries a group of small chunks; those that are new become one pack."""

    def __init__(self, group: Sequence[Chunk], known: Known, writer: ChunkWriter, look: Look) -> None:
        self.nbytes = sum(chunk.nbytes for chunk in group)
        self._group = group
        self._known = known
        self._writer = writer
        self._look = look
        self._staged: list[tuple[Chunk, Extent | None, int]] = []

    def stage(self, buffer: Buffer | None) -> bool:
        """Compare each member with the last take; copy what differs."""
        assert buffer is not None
        memory = buffer.memory(self.nbytes)
        offset = 0
        for chunk in self._group:
            extent = chunk.extent
            if not _reuse(chunk, extent, self._known, self._look):
                chunk.source.stage(chunk.piece.box, memory[offset : offset + chunk.nbytes])
                self._staged.append((chunk, extent, offset))
                offset += chunk.nbytes
        return bool(self._staged)

    def finish(self, buffer: Buffer | None) -> None:
        """Hash the copies and put those that are new as one pack."""
        assert buffer is not None
        memory = buffer.memory(self.nbytes)
        new = []
        for chunk, extent, offset in self._staged:
            raw = memory[offset : offset + chunk.nbytes]
            digest = digest_of(raw)
            self._look.note(extent, digest, raw)
            chunk.ref = self._known.lookup(digest, chunk.nbytes)
            if chunk.ref is None:
                new.append((chunk, (digest, raw, chunk.width)))
        if new:
            refs = self._writer.put_pack([member for _, member in new])
            for (chunk, _), ref in zip(new, refs, strict=True):
                chunk.ref = ref


class LookJob:
    """Looks at chunks where they lie; those that are not stored still become jobs of their own.

    Args:
        find_missing: does the looking; returns those chunks.
        jobs_of: the jobs for them.
    """

    nbytes = 0

    def __init__(
        self, find_missing: Callable[[], Sequence[Chunk]], jobs_of: Callable[[Sequence[Chunk]], Sequence[Job]]
    ) -> None:
        self._find_missing = find_missing
        self._jobs_of = jobs_of

    def stage(self, buffer: Buffer | None) -> Sequence[Job]:
        """Look at all of them."""
        return self._jobs_of(self._find_missing())

    def finish(self, buffer: Buffer | None) -> None:
        """Nothing is left."""


def take_jobs(plan: TakePlan, expected: Expected, known: Known, writer: ChunkWriter, look: Look) -> list[Job]:
    """The jobs of a take, in the order in which they should be staged."""

    def one_by_one(chunks: Sequence[Chunk]) -> list[Job]:
        return [ChunkJob(chunk, known, writer, look) for chunk in chunks]

    def together(group: Sequence[Chunk]) -> list[Job]:
        return [GroupJob(group, known, writer, look)] if group else []

    def of_any_size(chunks: Sequence[Chunk]) -> list[Job]:
        large, groups = by_size(chunks, plan.small_nbytes, GROUP_NBYTES)
        return [*one_by_one(large), *(job for group in groups for job in together(group))]

    groups = [job for group in plan.groups for job in together(group)]
    groups += [LookJob(partial(differing, group, known, look), together) for group in expected.groups]
    # what changed last time has to be written, most likely: the sooner that begins, the more work it overlaps with
    large = one_by_one(sorted(plan.large, key=lambda chunk: not chunk.changed_last_time))
    for chunks in grouped(expected.large, LOOK_NBYTES):
        large.append(LookJob(partial(differing, chunks, known, look), one_by_one))
    if expected.unwritten:
        large.append(LookJob(partial(not_reusable, expected.unwritten, known, look), of_any_size))
    # the many chunks of a group take the cores some time, for which the store should have something to do
    return [*large[:NUM_AHEAD], *groups, *large[NUM_AHEAD:]]


def buffer_sizes(plan: TakePlan, expected: Expected) -> list[int]:
    """The bytes of every buffer that the jobs of a take need if everything has changed."""
    large, groups = by_size(expected.unwritten, plan.small_nbytes, GROUP_NBYTES)
    one_by_one: list[Chunk | ExpectedChunk] = [*plan.large, *expected.large, *large]
    together: list[Sequence[Chunk | ExpectedChunk]] = [*plan.groups, *expected.groups, *groups]
    return [chunk.nbytes for chunk in one_by_one] + [sum(chunk.nbytes for chunk in group) for group in together]
