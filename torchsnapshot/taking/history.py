"""What this process remembers of the snapshot that it last took or restored in each store.

What lives here: the digests and cells by path that a take compares live memory with, and the commit times that the
next one must exceed. What doesn't: which blobs may be reused (``store.known`` decides, by evidence).

Invariant: everything here is a hint. A wrong or missing memory costs a copy, never content: a digest from here is
only ever compared with a digest of bytes that are read now. Memory is keyed by (path, chunk), never by a tensor's
identity, address or version counter: ``state_dict()`` may return fresh tensors each time, and fused optimizers and
``.data`` bypass version counters.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchsnapshot.errors import SnapshotError
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    ShardedTensorEntry,
    StoredManifest,
    TensorEntry,
    spans_of,
)
from torchsnapshot.pauses import collector_paused
from torchsnapshot.recent import Recent
from torchsnapshot.state.flatten import ShardedLeaf
from torchsnapshot.taking.plan import Leaf, TakePlan

logger = logging.getLogger(__name__)

_NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Place:
    """What stood at one path: its tensor's cell, the digests of its chunks, and which of them had changed."""

    dtype: str
    shape: tuple[int, ...]
    cell: tuple[int, ...]
    digests: Sequence[bytes]
    changed: frozenset[int] = _NOTHING


class Remembered:
    """The snapshot that this process last took or restored, as ``plan.Previous`` wants it.

    Args:
        take_id: its take id, None for nothing.
        places: makes what stood at each path; called when it is first needed.
    """

    def __init__(self, take_id: str | None = None, places: Callable[[], Mapping[str, Place]] = dict) -> None:
        self.take_id = take_id
        self._make_places: Callable[[], Mapping[str, Place]] | None = places
        self._places: Mapping[str, Place] = {}

    @classmethod
    def of_manifest(cls, manifest: StoredManifest, rank: int = 0) -> Remembered:
        """What a manifest that was read says about the places of one rank."""

        def places() -> dict[str, Place]:
            try:
                # a rank that the take did not have saw rank 0's
                entries = manifest.entries_of(rank if rank in manifest.ranks else 0)
                return {
                    path: _place_of_entry(manifest, entry)
                    for path, entry in entries.items()
                    if not isinstance(entry, ContainerEntry)
                }
            except SnapshotError as error:
                # a hint that cannot be read costs time, not the take
                logger.info("%s is not compared with: %s", manifest.where, error)
                return {}

        return cls(manifest.head.take_id, places)

    @classmethod
    @collector_paused()
    def of_plan(cls, take_id: str, plan: TakePlan) -> Remembered:
        """What a take that was just committed knows itself, without reading its manifest back."""
        places = {
            leaf.path: place_of(leaf)
            for leaf in plan.leaves
            # the cell counts also where this rank has no element of the tensor
            if leaf.chunks or isinstance(leaf.node, ShardedLeaf)
        }
        return cls(take_id, lambda: places)

    @classmethod
    def of_settled(cls, take_id: str, leaves: Sequence[Leaf]) -> Remembered:
        """The same, of leaves that are settled: these may wait until somebody asks."""
        return cls(take_id, lambda: {leaf.path: place_of(leaf) for leaf in leaves if leaf.chunks})

    def at(self, path: str) -> Place | None:
        """What stood at a path."""
        return self._all().get(path)

    def equals(self, plan: TakePlan) -> bool:
        """Whether a finished plan has the same chunks at the same paths, and nothing else."""
        num_chunks = 0
        for chunk in plan.chunks():
            if chunk.ref is None or chunk.ref.digest != chunk.previous:
                return False
            num_chunks += 1
        return num_chunks == sum(len(place.digests) for place in self._all().values())

    def _all(self) -> Mapping[str, Place]:
        if self._make_places is not None:
            self._places, self._make_places = self._make_places(), None
        return self._places


def _place_of_entry(manifest: StoredManifest, entry: Entry) -> Place:
    if isinstance(entry, ShardedTensorEntry):
        # which chunks are those of a rank is known only once it has told how the tensor is spread now
        return Place(entry.dtype, entry.shape, entry.cell, ())
    digests = [digest for span in spans_of(entry) for digest in manifest.digests(span)]
    if isinstance(entry, TensorEntry):
        return Place(entry.dtype, entry.shape, entry.cell, digests)
    return Place("", (), (), digests)


def place_of(leaf: Leaf) -> Place:
    """What a leaf of a finished plan leaves at its path."""
    # a settled leaf was compared with what stands there itself, and has kept what came out before
    changes = [chunk.changed_last_time for chunk in leaf.chunks] if leaf.is_settled else leaf.changes()
    changed = frozenset(index for index, has_changed in enumerate(changes) if has_changed)
    digests = [chunk.ref.digest for chunk in leaf.chunks if chunk.ref is not None]
    if isinstance(leaf.node, ShardedLeaf):
        return Place(leaf.node.source.dtype, leaf.node.source.shape, leaf.cell, digests, changed)
    if leaf.view is None:
        return Place("", (), (), digests, changed)
    return Place(leaf.view.dtype, leaf.view.shape, leaf.cell, digests, changed)


_remembered: Recent[str, Remembered] = Recent()
_commit_times: dict[str, int] = {}
_lock = threading.Lock()


def recall(store_id: str) -> Remembered:
    """What this process remembers for the store; empty at first."""
    return _remembered.get(store_id) or Remembered()


def take_ids() -> dict[str, str]:
    """The takes that this process remembers, by store."""
    return {store_id: each.take_id for store_id, each in _remembered.items() if each.take_id is not None}


def remember(store_id: str, remembered: Remembered) -> None:
    """Keep the snapshot that was just taken or restored as the one to compare with."""
    _remembered.put(store_id, remembered)


def next_commit_time(store_id: str, at_least: int) -> int:
    """A commit time, in milliseconds since the epoch: ``at_least``, or after all that this process knows of."""
    with _lock:
        _commit_times[store_id] = max(at_least, _commit_times.get(store_id, -1) + 1)
        return _commit_times[store_id]


def note_commit_time(store_id: str, created_ms: int) -> None:
    """Take in the commit time of a snapshot that was restored."""
    with _lock:
        _commit_times[store_id] = max(created_ms, _commit_times.get(store_id, -1))


def forget() -> None:
    """Drop all memory, as a new process would begin; used by tests and benchmarks."""
    _remembered.clear()
    _commit_times.clear()


def _reset_in_child() -> None:
    global _lock
    _lock = threading.Lock()


# another thread may hold the lock when the process forks
os.register_at_fork(after_in_child=_reset_in_child)
