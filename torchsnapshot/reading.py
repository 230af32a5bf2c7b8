"""Gathers what a restore wants of a manifest, and reads it: each content once, through the engine.

What doesn't live here: where tensors go (``targets``), the jobs themselves (``read_jobs``), structure (``restore``).

Invariant: nothing is written into any memory before ``run``; what is asked for is compared with the chunk tables
first, so that a manifest that lies about sizes is an error and not a wrong write.
"""

from __future__ import annotations

import pickle
from typing import Any

from torchsnapshot import grid, knobs
from torchsnapshot.chunk_reader import ChunkReader
from torchsnapshot.engine import Mode, submit
from torchsnapshot.entries import OpaqueEntry, Span, StoredManifest, TensorEntry, ValueEntry
from torchsnapshot.errors import FormatError, PartialRestoreError, SnapshotError
from torchsnapshot.grid import Box
from torchsnapshot.read_jobs import Counters, Sink, Wanted, read_jobs
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.repository import Repository
from torchsnapshot.targets import Target


class BytesMemory:
    """The bytes of a large value or pickle, to be filled."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """There is nothing in it yet that could be right."""
        return None

    def scatter(self, box: Box, data: memoryview) -> None:
        """Write the region ``box``."""
        (start,), (nbytes,) = box.offsets, box.sizes
        self.data[start : start + nbytes] = data


class Reading:
    """One restore's reads: ``add_...`` everything, then ``run`` once."""

    def __init__(self, repository: Repository, manifest: StoredManifest, stats: Stats) -> None:
        self._repository = repository
        self._manifest = manifest
        self.stats = stats
        self._wanted: dict[tuple[bytes, int], tuple[ChunkRef, Wanted]] = {}
        self._leaves: list[tuple[Sink, Target]] = []
        self._inline: list[tuple[Sink, Box, bytes]] = []

    def add_tensor(self, path: str, entry: TensorEntry, target: Target) -> None:
        """Want a tensor.

        Args:
            path: where it is, for messages.
            entry: what is stored.
            target: what its boxes are scattered into, in the entry's memory order.

        Raises:
            FormatError: the entry does not fit its chunks or its dtype.
        """
        # memory of the application may hold the bytes already
        sink = Sink(path, target.view, looks=target.is_written_in_place)
        itemsize = target.view.itemsize
        self._leaves.append((sink, target))
        whole = grid.whole(entry.memory_shape)
        if entry.nbytes != whole.numel * itemsize:
            raise FormatError(
                f"{self._manifest.where}: {path}: {entry.nbytes} bytes for {list(entry.shape)} of {entry.dtype}"
            )
        if entry.inline is not None:
            self._inline.append((sink, whole, entry.inline))
        for shard in entry.shards:
            pieces = [piece for box in shard.boxes for piece in grid.cut(box, entry.cell, itemsize)]
            self._want(sink, shard.span, pieces)

    def add_bytes(self, path: str, entry: ValueEntry | OpaqueEntry) -> bytes | bytearray:
        """Want the bytes of a value or pickle; what is returned is filled once ``run`` has returned."""
        if entry.data is not None:
            return entry.data
        if entry.span is None:
            raise FormatError(f"{self._manifest.where}: {path}: no bytes and no chunks")
        memory = BytesMemory(entry.nbytes)
        sink = Sink(path, memory)
        pieces, offset = [], 0
        for ref in self._manifest.refs(entry.span):
            pieces.append(grid.Piece(Box((offset,), (ref.nbytes,)), offset, ref.nbytes))
            offset += ref.nbytes
        if offset != entry.nbytes:
            raise FormatError(f"{self._manifest.where}: {path}: {entry.nbytes} bytes, but its chunks have {offset}")
        self._want(sink, entry.span, pieces)
        return memory.data

    def _want(self, sink: Sink, span: Span, pieces: list[grid.Piece]) -> None:
        refs = self._manifest.refs(span)
        if len(refs) != len(pieces) or any(r.nbytes != p.nbytes for r, p in zip(refs, pieces, strict=True)):
            raise FormatError(f"{self._manifest.where}: {sink.path}: its chunks are not those of its grid")
        for ref, piece in zip(refs, pieces, strict=True):
            self._wanted.setdefault((ref.digest, ref.nbytes), (ref, []))[1].append((sink, piece))
            self.stats.num_chunks += 1
            self.stats.state_nbytes += piece.nbytes

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
            for _, target in self._leaves:
                target.convert()
                num_converted += target.is_own and target.staging is not None
        except Exception as error:
            num_written = num_converted + sum(
                sink.written for sink, target in self._leaves if target.is_written_in_place
            )
            if not num_written:
                raise
            raise PartialRestoreError(
                f"the restore failed after it had written to {num_written} of {len(self._leaves)} tensors: the target "
                f"is now a mix of old and new values; restore a snapshot that verifies before going on. {error}"
            ) from error
        finally:
            for sink, target in self._leaves:
                if sink.written and target.is_written_in_place:
                    target.note_write()

    def _read(self, budget_nbytes: int | None) -> None:
        jobs = list(read_jobs(self._wanted.values(), ChunkReader(self._repository), Counters(self.stats)))
        for sink, box, data in self._inline:
            sink.written = True
            sink.memory.scatter(box, memoryview(data))
        if jobs:
            submit(
                jobs,
                num_workers=max(knobs.get_num_threads(), self._repository.backend.concurrency),
                budget=budget_nbytes or knobs.get_memory_budget_bytes(),
                mode=Mode.THROUGH,
            ).wait()


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
