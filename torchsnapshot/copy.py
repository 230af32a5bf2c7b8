"""Copying a snapshot with all that it needs to another root, or to another kind of store.

A copy is a read lease in the source and an ordinary take in the destination: its own take id in every key, and nothing
is written that the destination holds already. Entries are taken over as they are, so the copy needs neither the
application nor its classes.

Invariant: the copy's chunk tables have the same rows in the same order as the source's, which is what makes the
entries' spans valid in it; what a chunk's digest is, is proved when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import ChunkReader
from torchsnapshot.chunks.writer import ChunkWriter
from torchsnapshot.engine.buffers import Buffer
from torchsnapshot.engine.groups import by_size
from torchsnapshot.engine.pipeline import submit
from torchsnapshot.format.entries import StoredManifest, pack_entries, spans_of
from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.reading.opening import Opened, still_committed
from torchsnapshot.stats import Stats
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder, Form, pack_manifest
from torchsnapshot.store.known import Known, known_for_take
from torchsnapshot.store.leases import TakeSession, reading, writing
from torchsnapshot.store.locate import place_for_take
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking.plan import GROUP_NBYTES, SMALL_CHUNK_NBYTES
from torchsnapshot.version import __version__

Content = tuple[bytes, int]


def copy_snapshot(
    source: Opened,
    destination: str,
    storage_options: StorageOptions | None = None,
    *,
    store: str | None = None,
    progress: Progress = NO_PROGRESS,
) -> Stats:
    """Copy a snapshot.

    Args:
        source: the snapshot.
        destination: the path of the copy.
        storage_options: of the destination's filesystem.
        store: the destination's store; as for ``Snapshot.take``.
        progress: told about the bytes that are copied.

    Returns:
        The figures of the take in the destination.

    Raises:
        What reading the source and taking at the destination raise; then there is no copy.
    """
    place = place_for_take(destination, store, storage_options, durable=knobs.is_durable())
    target = Repository.create_or_open(place.backend, chunk_nbytes=source.repository.chunk_nbytes)
    stats = Stats()
    with reading(source.repository, source.name), writing(target, place.name) as session:
        manifest = still_committed(source)
        known = known_for_take(target, session.evidence, None)
        copying = _Copying(ChunkReader(source.repository), target, session, known, progress)
        with stats.phase("write"):
            tables = copying.run(_rows(manifest), stats)
        with stats.phase("commit"):
            data = _manifest(manifest, tables, session, target, stats)
            session.commit(data)
        known.learn(copying.written())
    return stats


def _rows(manifest: StoredManifest) -> list[list[ChunkRef]]:
    """The rows of each table that entries refer to; the rows behind them are bases, which a copy does without."""
    ends = [0] * len(manifest.envelope.tables)
    for entry in manifest.entries.values():
        for span in spans_of(entry):
            ends[span.table] = max(ends[span.table], span.first + span.count)
    return [manifest.table(number).refs(0, end) if end else [] for number, end in enumerate(ends)]


class _Copying:
    """The contents of one copy on their way."""

    def __init__(
        self, reader: ChunkReader, target: Repository, session: TakeSession, known: Known, progress: Progress
    ) -> None:
        self.reader = reader
        self.known = known
        self.progress = progress
        self._target = target
        # what the source stored raw, or encoded, is stored so again: its take has found out what pays
        self.raw = ChunkWriter(target, session.take_id, 0, "raw")
        self.encoded = ChunkWriter(target, session.take_id, 0, "smallest")

    def run(self, tables: list[list[ChunkRef]], stats: Stats) -> list[ChunkTable]:
        """Bring every content over that the destination does not hold; returns its tables."""
        wanted = {(ref.digest, ref.nbytes): ref for rows in tables for ref in rows}
        found = {content: self.known.lookup(*content) for content in wanted}
        refs = {content: ref for content, ref in found.items() if ref is not None}
        missing = [ref for content, ref in wanted.items() if content not in refs]
        self.progress.start("copying", sum(ref.nbytes for ref in missing))
        # as a take there would: what is smaller shares a blob
        small_nbytes = min(SMALL_CHUNK_NBYTES, self._target.chunk_nbytes)
        large, groups = by_size(missing, small_nbytes, GROUP_NBYTES)
        jobs = [_CopyJob(group, self, refs, small_nbytes) for group in (*([ref] for ref in large), *groups)]
        if jobs:
            submit(
                jobs,
                num_workers=knobs.get_num_workers(self._target.backend.concurrency),
                budget=knobs.get_memory_budget_bytes(),
            ).wait()
        self.progress.finish()
        stats.num_chunks = sum(map(len, tables))
        stats.num_new_chunks = len(missing)
        stats.new_nbytes = sum(ref.nbytes for ref in missing)
        stats.reused_nbytes = sum(ref.nbytes for rows in tables for ref in rows) - stats.new_nbytes
        stats.num_blobs = self.raw.num_blobs + self.encoded.num_blobs
        stats.stored_nbytes = self.raw.stored_nbytes + self.encoded.stored_nbytes
        return [_table(refs[ref.digest, ref.nbytes] for ref in rows) for rows in tables]

    def written(self) -> list[ChunkRef]:
        """What this copy has put."""
        return self.raw.refs + self.encoded.refs


class _CopyJob:
    """Carries one large chunk, or a group of small ones."""

    def __init__(
        self, group: list[ChunkRef], copying: _Copying, refs: dict[Content, ChunkRef], small_nbytes: int
    ) -> None:
        self.nbytes = sum(ref.nbytes for ref in group)
        self._is_alone = len(group) == 1 and group[0].nbytes >= small_nbytes
        self._group = group
        self._copying = copying
        self._refs = refs

    def stage(self, buffer: Buffer | None) -> bool:
        """Read and prove."""
        assert buffer is not None
        offset = 0
        for ref in self._group:
            self._copying.reader.read_into(ref, buffer.memory(self.nbytes)[offset : offset + ref.nbytes])
            offset += ref.nbytes
        return True

    def finish(self, buffer: Buffer | None) -> None:
        """Put."""
        assert buffer is not None
        memory, offset = buffer.memory(self.nbytes), 0
        members: dict[bool, list[tuple[bytes, memoryview, int]]] = {True: [], False: []}
        for ref in self._group:
            is_raw = ref.form is Form.RAW
            members[is_raw].append((ref.digest, memory[offset : offset + ref.nbytes], ref.width))
            offset += ref.nbytes
        for is_raw, chunks in members.items():
            writer = self._copying.raw if is_raw else self._copying.encoded
            if self._is_alone:
                put = [writer.put_chunk(raw, digest, width) for digest, raw, width in chunks]
            else:
                put = writer.put_pack(chunks) if chunks else []
            self._refs.update(((ref.digest, ref.nbytes), ref) for ref in put)
        self._copying.progress.advance(self.nbytes)


def _table(refs: Iterable[ChunkRef]) -> ChunkTable:
    builder = ChunkTableBuilder()
    builder.add(list(refs))
    return builder.build()


def _manifest(
    manifest: StoredManifest, tables: list[ChunkTable], session: TakeSession, target: Repository, stats: Stats
) -> bytes:
    stats.state_nbytes = manifest.head.state_nbytes
    head = replace(
        manifest.head,
        take_id=session.take_id,
        store_id=target.store_id,
        created_ms=session.commit_time_ms(),
        parent=None,
        new_nbytes=stats.new_nbytes,
        reused_nbytes=stats.reused_nbytes,
        stored_nbytes=stats.stored_nbytes,
        num_chunks=stats.num_chunks,
        num_new_chunks=stats.num_new_chunks,
        num_blobs=stats.num_blobs,
        library=__version__,
    )
    data = pack_manifest(head, tables, pack_entries(manifest.entries))
    stats.manifest_nbytes = len(data)
    return data
