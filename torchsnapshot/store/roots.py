"""A collector's reading of the manifests: everything that is referenced, completely.

What lives here: the reading that may not miss a manifest, and when it must stop. What doesn't: what is done with the
keys (``gc``).

One listing is not enough: a manifest that is renamed while a folder is scanned may be seen under neither name. So:
list, read, list again and read what is new, until every take id of the last complete list has been read. The roots are
the union of all lists; one too many is safe. A manifest without its ``.ok`` is a root too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torchsnapshot.errors import CollectorStoppedError, KeyAbsentError, SnapshotError
from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.store.envelope import TableReference, read_envelope
from torchsnapshot.store.parallel import parallel
from torchsnapshot.store.records import Root
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.walk import ManifestRef, Walk

_MAX_IDLE_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reading found. ``roots`` is the union of all its lists, ``walk`` the last one, ``folders`` of all."""

    roots: frozenset[Root]
    folders: frozenset[str]
    walk: Walk

    @property
    def take_ids(self) -> frozenset[str]:
        """The takes that have a manifest."""
        return frozenset(take_id for _, take_id in self.roots)


def read_roots(
    repository: Repository, use: Callable[[Iterable[str]], None], progress: Progress = NO_PROGRESS
) -> Reading:
    """Read every manifest below ROOT.

    Args:
        repository: the store.
        use: is given the blob keys of one manifest, or of a part of it, at a time, by several threads.
        progress: told about each manifest.

    Raises:
        CollectorStoppedError: a folder cannot be listed, or a manifest cannot be read, wholly.
    """
    reader = _Reader(repository, use)
    read: set[str] = set()
    roots: set[Root] = set()
    folders: set[str] = set()
    idle = 0
    while True:
        try:
            found = repository.walk()
        except (SnapshotError, OSError) as error:
            raise CollectorStoppedError(f"gc stopped, the search for snapshots failed: {error}") from error
        roots.update(ref.root for ref in found.roots)
        folders |= found.folders
        new = {ref.manifest.take_id: ref for ref in found.roots if ref.manifest.take_id not in read}
        if not new:
            return Reading(frozenset(roots), frozenset(folders), found)
        before = len(read)
        for take_id, nbytes in parallel(reader.read, new.values(), repository.backend.concurrency):
            if nbytes is not None:
                read.add(take_id)
                progress.advance(nbytes)
        idle = 0 if len(read) > before else idle + 1
        if idle >= _MAX_IDLE_ROUNDS:
            ref = next(iter(new.values()))
            raise CollectorStoppedError(
                f"gc stopped: listings of {repository.url} go on showing {ref.object}, which cannot be read"
            )


class _Reader:
    """Reads the envelopes; a table blob that many manifests share is read once."""

    def __init__(self, repository: Repository, use: Callable[[Iterable[str]], None]) -> None:
        self._repository = repository
        self._use = use
        self._tables: set[str] = set()

    def read(self, ref: ManifestRef) -> tuple[str, int | None]:
        """Use one manifest's keys. Returns its take id, and its size or None where it is gone since the listing."""
        take_id = ref.manifest.take_id
        try:
            data = self._repository.backend.read(ref.object)
        except KeyAbsentError:
            return take_id, None  # deleted or moved: the next list tells
        except (SnapshotError, OSError) as error:
            raise self._stopped(ref, error) from error
        try:
            envelope = read_envelope(data, ref.object)
            for index, table in enumerate(envelope.tables):
                if isinstance(table, TableReference):
                    self._use((table.key,))
                    if table.key in self._tables:
                        continue
                self._use(envelope.table(index, self._repository.read_table, ref.object).keys)
                if isinstance(table, TableReference):
                    self._tables.add(table.key)
        except (SnapshotError, OSError) as error:
            if self._is_gone(ref):
                return take_id, None  # its snapshot was removed, and another collector has just swept its table
            raise self._stopped(ref, error) from error
        return take_id, len(data)

    def _is_gone(self, ref: ManifestRef) -> bool:
        try:
            self._repository.backend.stat(ref.object)
        except KeyAbsentError:
            return True
        except SnapshotError:
            pass  # in doubt it is there
        return False

    def _stopped(self, ref: ManifestRef, error: Exception) -> CollectorStoppedError:
        return CollectorStoppedError(
            f"gc stopped before it deleted anything: the manifest {ref.object} in {self._repository.url} cannot be "
            f"read, so nobody knows what it needs ({error}). Repair it, or remove that snapshot, then run gc again"
        )
