"""The units of work of a take over several ranks: first hash what lies there, then put what this rank was given.

What lives here: the kinds of job that the engine carries. What doesn't: what is whose (``ownership``,
``agreement``), the order of the steps (``group_take``).

Invariant: the digest that names a blob is that of the copy that is put, as in ``taking.take_jobs``. Other ranks were
told the digest of live memory; a copy that differs from it is an error, as what they rely on would not be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.chunks.writer import ChunkWriter
from torchsnapshot.engine.buffers import Buffer
from torchsnapshot.errors import SnapshotError
from torchsnapshot.state.live_digests import Look
from torchsnapshot.store.known import Known
from torchsnapshot.taking.plan import Chunk


class HashJob:
    """Finds the digests of some chunks, and which of them may be reused.

    Args:
        chunks: one large one, or a group of small ones.
        known: what may be reused; None where only the digests are of interest.
        look: what is known of memory; it learns what is read.
    """

    def __init__(self, chunks: Sequence[Chunk], known: Known | None, look: Look) -> None:
        # a copy is needed only where the bytes cannot be had as they lie: on a device, or with strides
        needed = [chunk.nbytes for chunk in chunks if chunk.source.live(chunk.piece.offset, chunk.nbytes) is None]
        self.nbytes = max(needed, default=0)
        self._chunks = chunks
        self._known = known
        self._look = look

    def stage(self, buffer: Buffer | None) -> bool:
        """Do all of it; nothing is left to finish."""
        for chunk in self._chunks:
            chunk.digest = self._digest(chunk, buffer)
            if self._known is not None:
                chunk.ref = self._known.lookup(chunk.digest, chunk.nbytes)
        return False

    def _digest(self, chunk: Chunk, buffer: Buffer | None) -> bytes:
        extent = chunk.extent
        digest = self._look.digest(extent)
        if digest is not None:
            self._look.spare(chunk.nbytes)
            return digest
        raw = chunk.source.live(chunk.piece.offset, chunk.nbytes)
        if raw is not None:
            return self._look.hash(extent, raw)
        assert buffer is not None
        raw = buffer.memory(chunk.nbytes)
        chunk.source.stage(chunk.piece.box, raw)
        return digest_of(raw)

    def finish(self, buffer: Buffer | None) -> None:
        """Nothing is left."""


class PutJob:
    """Copies and puts one large chunk that this rank was given.

    Args:
        chunk: announced.
        known: says whether what was there last time may be a base.
        writer: of the take.
    """

    def __init__(self, chunk: Chunk, known: Known, writer: ChunkWriter) -> None:
        self.nbytes = chunk.nbytes
        self._chunk = chunk
        self._known = known
        self._writer = writer

    def stage(self, buffer: Buffer | None) -> bool:
        """Copy."""
        assert buffer is not None
        self._chunk.source.stage(self._chunk.piece.box, buffer.memory(self.nbytes))
        return True

    def finish(self, buffer: Buffer | None) -> None:
        """Hash the copy, compare with what was announced, put."""
        assert buffer is not None
        chunk, raw, previous = self._chunk, buffer.memory(self.nbytes), None
        _check(chunk, raw)
        if self._writer.wants_bases and chunk.previous is not None:
            previous = self._known.lookup(chunk.previous, chunk.nbytes)
        chunk.ref = self._writer.put_chunk(
            raw, chunk.digest, chunk.width, path=chunk.path, previous=previous, row_length=chunk.row_length
        )


class PutPackJob:
    """Copies and puts a group of small chunks that this rank was given, as one pack."""

    def __init__(self, chunks: Sequence[Chunk], writer: ChunkWriter) -> None:
        self.nbytes = sum(chunk.nbytes for chunk in chunks)
        self._chunks = chunks
        self._writer = writer

    def stage(self, buffer: Buffer | None) -> bool:
        """Copy."""
        assert buffer is not None
        for chunk, raw in self._members(buffer):
            chunk.source.stage(chunk.piece.box, raw)
        return True

    def finish(self, buffer: Buffer | None) -> None:
        """Hash the copies, compare with what was announced, put."""
        assert buffer is not None
        members = []
        for chunk, raw in self._members(buffer):
            _check(chunk, raw)
            members.append((chunk.digest, raw, chunk.width))
        for chunk, ref in zip(self._chunks, self._writer.put_pack(members), strict=True):
            chunk.ref = ref

    def _members(self, buffer: Buffer) -> Iterator[tuple[Chunk, memoryview]]:
        memory, offset = buffer.memory(self.nbytes), 0
        for chunk in self._chunks:
            yield chunk, memory[offset : offset + chunk.nbytes]
            offset += chunk.nbytes


def _check(chunk: Chunk, raw: memoryview) -> None:
    if digest_of(raw) != chunk.digest:
        raise SnapshotError(
            f"{chunk.path} changed while the snapshot was being taken: something writes to it from another thread or "
            "stream. Nothing was committed; take the snapshot again when nobody does"
        )
