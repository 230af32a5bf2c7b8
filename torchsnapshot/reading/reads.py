"""Gathers what a restore wants of a manifest, and reads it: each content once, through the engine.

What doesn't live here: where tensors go (``targets``), the jobs themselves (``read_jobs``), structure
(``restoring.restore``).

Invariant: nothing is written into any memory before ``run``; what is asked for is compared with the chunk tables
first, so that a manifest that lies about sizes is an error and not a wrong write.
"""

from __future__ import annotations

import pickle
from typing import Any

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import ChunkReader
from torchsnapshot.engine.pipeline import Mode, apart, submit
from torchsnapshot.errors import CorruptionError, FormatError, PartialRestoreError, SnapshotError
from torchsnapshot.format.entries import OpaqueEntry, ShardedTensorEntry, StoredManifest, TensorEntry, ValueEntry
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.reading.read_jobs import Counters, Share, Sink, Wanted, read_jobs
from torchsnapshot.reading.targets import Target
from torchsnapshot.state.dtypes import itemsize_of
from torchsnapshot.state.live_digests import live_digests
from torchsnapshot.state.resharding import overlaps
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.repository import Repository


class BytesMemory:
    """The bytes of a large value or pickle, to be filled."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def extent(self, offset: int, nbytes: int) -> tuple[int, int] | None:
        """Nobody has to find it again."""
        return None

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """There is nothing in it yet that could be right."""
        return None

    def scatter(self, box: Box, data: memoryview) -> None:
        """Write the region ``box``."""
        (start,), (nbytes,) = box.offsets, box.sizes
        self.data[start : start + nbytes] = data

    def scatter_part(self, chunk: Box, data: memoryview, part: Box) -> None:
        """Write the region ``part`` of the chunk that the data are."""
        start = part.offsets[0] - chunk.offsets[0]
        self.scatter(part, data[start : start + part.sizes[0]])


class Reading:
    """One restore's reads: ``add_...`` everything, then ``run`` once."""

    def __init__(self, repository: Repository, manifest: StoredManifest, stats: Stats) -> None:
        self._repository = repository
        self._manifest = manifest
        self.stats = stats
        self._wanted: dict[tuple[bytes, int], tuple[ChunkRef, Wanted]] = {}
        self._leaves: list[tuple[Target, list[Sink]]] = []
        self._inline: list[tuple[Sink, Share, bytes]] = []

    def add_tensor(self, path: str, entry: TensorEntry | ShardedTensorEntry, target: Target) -> None:
        """Want a tensor, or those regions of it that the target has.

        Args:
            path: where it is, for messages.
            entry: what is stored.
            target: what its boxes are scattered into, in the entry's memory order.

        Raises:
            FormatError: the entry does not fit its chunks or its dtype, or it lacks a region.
        """
        itemsize = itemsize_of(entry.dtype)
        memory_shape = entry.memory_shape if isinstance(entry, TensorEntry) else entry.shape
        whole = grid.whole(memory_shape)
        if entry.nbytes != whole.numel * itemsize:
            raise FormatError(
                f"{self._manifest.where}: {path}: {entry.nbytes} bytes for {list(entry.shape)} of {entry.dtype}"
            )
        # memory of the application may hold the bytes already
        sinks = [Sink(path, view, looks=target.is_written_in_place) for view in target.views]
        self._leaves.append((target, sinks))
        if isinstance(entry, TensorEntry) and entry.inline is not None:
            for sink, view in zip(sinks, target.views, strict=True):
                self._inline.append((sink, Share(whole, view.box, None), entry.inline))
        elif isinstance(entry, TensorEntry) and len(target.views) == 1 and target.views[0].box == whole:
            for shard in entry.shards:
                # first, as a span that its table does not have could claim any number of pieces
                refs = self._manifest.refs(shard.span)
                pieces = [piece for box in shard.boxes for piece in grid.cut(box, entry.cell, itemsize)]
                self._want(sinks[0], refs, pieces)
        else:
            self._want_regions(path, entry, target, sinks, itemsize)

    def _want_regions(
        self, path: str, entry: TensorEntry | ShardedTensorEntry, target: Target, sinks: list[Sink], itemsize: int
    ) -> None:
        where = f"{self._manifest.where}: {path}"
        for overlap in overlaps(entry, [view.box for view in target.views], where):
            ref = self._manifest.table(overlap.table).ref(overlap.row)
            if ref.nbytes != overlap.chunk.numel * itemsize:
                raise FormatError(f"{where}: its chunks are not those of its grid")
            offset = None if overlap.offset is None else overlap.offset * itemsize
            share = Share(overlap.chunk, overlap.part, offset)
            self._wanted.setdefault((ref.digest, ref.nbytes), (ref, []))[1].append((sinks[overlap.wanted], share))
            self.stats.num_chunks += 1
            self.stats.state_nbytes += overlap.part.numel * itemsize

    def add_bytes(self, path: str, entry: ValueEntry | OpaqueEntry) -> bytes | bytearray:
        """Want the bytes of a value or pickle; what is returned is filled once ``run`` has returned."""
        if entry.data is not None:
            return entry.data
        if entry.span is None:
            raise FormatError(f"{self._manifest.where}: {path}: no bytes and no chunks")
        memory = BytesMemory(entry.nbytes)
        sink = Sink(path, memory)
        pieces, offset = [], 0
        refs = self._manifest.refs(entry.span)
        for ref in refs:
            pieces.append(grid.Piece(Box((offset,), (ref.nbytes,)), offset, ref.nbytes))
            offset += ref.nbytes
        if offset != entry.nbytes:
            raise FormatError(f"{self._manifest.where}: {path}: {entry.nbytes} bytes, but its chunks have {offset}")
        self._want(sink, refs, pieces)
        return memory.data

    def _want(self, sink: Sink, refs: list[ChunkRef], pieces: list[grid.Piece]) -> None:
        if len(refs) != len(pieces) or any(r.nbytes != p.nbytes for r, p in zip(refs, pieces, strict=True)):
            raise FormatError(f"{self._manifest.where}: {sink.path}: its chunks are not those of its grid")
        for ref, piece in zip(refs, pieces, strict=True):
            self._wanted.setdefault((ref.digest, ref.nbytes), (ref, []))[1].append((sink, Share.whole(piece)))
        self.stats.num_chunks += len(refs)
        self.stats.state_nbytes += sum(ref.nbytes for ref in refs)

    def run(self, budget_nbytes: int | None = None) -> None:
        """Read everything that was added, convert what has another dtype, and tell autograd what changed.

        Args:
            budget_nbytes: bytes of buffers at most; None: what the environment says.

        Raises:
            CorruptionError, StoreError: the application's own memory has not been written to.
            PartialRestoreError: whatever went wrong, some of it has.
        """
        num_converted = 0
        try:
            self._read(budget_nbytes)
            for target, _ in self._leaves:
                target.convert()
                num_converted += target.is_own and bool(target.staging)
        except Exception as error:
            num_written = num_converted + sum(map(_is_written_in_place, self._leaves))
            if not num_written and isinstance(error, (CorruptionError, FormatError)):
                raise type(error)(f"{self._manifest.where}: {error}") from error
            if not num_written:
                raise
            raise PartialRestoreError(
                f"{self._manifest.where}: the restore failed after it had written to {num_written} of "
                f"{len(self._leaves)} tensors: the target is now a mix of old and new values; restore a snapshot that "
                f"verifies before going on. {error}"
            ) from error
        finally:
            for target, sinks in self._leaves:
                if _is_written_in_place((target, sinks)):
                    target.note_write()

    def _read(self, budget_nbytes: int | None) -> None:
        reader = ChunkReader(self._repository, is_alone=knobs.get_local_world_size() == 1)
        # all targets are there by now
        look = live_digests().look()
        jobs, looks = apart(read_jobs(self._wanted.values(), reader, Counters(self.stats), look))
        for sink, share, data in self._inline:
            sink.scatter(share, memoryview(data))
        if jobs or looks:
            submit(
                jobs,
                beside=looks,
                num_workers=knobs.get_num_workers(self._repository.backend.concurrency),
                num_staging=knobs.get_num_threads(),
                budget=budget_nbytes or knobs.get_memory_budget_bytes(),
                mode=Mode.THROUGH,
            ).wait()


def _is_written_in_place(leaf: tuple[Target, list[Sink]]) -> bool:
    target, sinks = leaf
    return target.is_written_in_place and any(sink.written for sink in sinks)


def load_opaque(path: str, type_name: str, data: bytes | bytearray) -> Any:
    """Rebuild an object from its pickle. Runs code from the snapshot: only for callers who have allowed that.

    Raises:
        SnapshotError: the pickle cannot be loaded here, for example as its class is not importable.
    """
    try:
        return pickle.loads(data)
    except Exception as error:
        raise SnapshotError(
            f"{path}: the pickle of a {type_name} cannot be loaded: {error!r}. Is its module importable here, in the "
            "version that took the snapshot?"
        ) from error
