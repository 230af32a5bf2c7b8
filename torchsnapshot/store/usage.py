"""Who takes how much space: per snapshot, and what nothing refers to. Only reads and lists."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torchsnapshot.errors import KeyAbsentError
from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.store.envelope import ManifestFile
from torchsnapshot.store.repository import Repository


@dataclass(frozen=True, slots=True)
class SnapshotUsage:
    """One snapshot's share of the store, all its generations together.

    ``state_nbytes`` is the raw size of its state, ``referenced_nbytes`` what the blobs that it refers to take, and
    ``own_nbytes`` the part of these that no other snapshot refers to: what deleting it (and gc) would free.
    """

    name: str
    state_nbytes: int
    referenced_nbytes: int
    own_nbytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """A whole store: its snapshots, its blobs, and the blobs that no manifest refers to (gc frees them)."""

    snapshots: tuple[SnapshotUsage, ...]
    num_blobs: int
    nbytes: int
    unreferenced_blobs: int
    unreferenced_nbytes: int


def measure_usage(repository: Repository, progress: Progress = NO_PROGRESS) -> Usage:
    """Measure the store; takes and sweeps that run meanwhile make the figures approximate, never wrong for long."""
    progress.start("listing blobs")
    blobs: dict[str, int] = {}
    for key, nbytes in repository.list_blobs():
        blobs[key] = nbytes
        progress.advance(nbytes)
    progress.start("reading manifests")
    keys: dict[str, set[str]] = {}
    state_nbytes: dict[str, int] = {}
    for ref in repository.walk().roots:
        try:
            data = repository.read_manifest(ref)
        except KeyAbsentError:
            continue  # deleted since the walk
        file = ManifestFile(data, ref.object)
        keys.setdefault(ref.name, set()).update(file.envelope.all_keys(repository.read_table))
        state_nbytes[ref.name] = file.head.state_nbytes
        progress.advance(len(data))
    progress.finish()
    references = Counter(key for used in keys.values() for key in used)
    snapshots = tuple(
        SnapshotUsage(
            name,
            state_nbytes[name],
            sum(blobs.get(key, 0) for key in used),
            sum(blobs.get(key, 0) for key in used if references[key] == 1),
        )
        for name, used in sorted(keys.items())
    )
    loose = [nbytes for key, nbytes in blobs.items() if key not in references]
    return Usage(snapshots, len(blobs), sum(blobs.values()), len(loose), sum(loose))
