"""Looking for damage without changing anything: manifests, and whether every blob is there with its size.

What lives here: depths 1 and 2 of verify. What doesn't: depth 3, every byte's digest, which needs decoding
(``torchsnapshot.verify``), and any repair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torchsnapshot.errors import FormatError, KeyAbsentError, MissingBlobError, NewerFormatError, SnapshotError
from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.store.envelope import Envelope, ManifestFile, TableReference
from torchsnapshot.store.leases import reading
from torchsnapshot.store.liveness import lease_ids
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.walk import ManifestRef


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    ``kind``: "manifest" (it is unreadable), "newer" (a newer version of the library wrote it), "uncommitted" (a take
    did not finish; no damage), "missing" (a blob is not there), "size" (a blob has another size than the manifest says)
    or "unreadable" (the store would not give it). ``name`` is the snapshot, ``key`` the object or blob in question.
    """

    kind: str
    name: str
    key: str
    message: str


def check_manifests(
    repository: Repository, progress: Progress = NO_PROGRESS, *, names: Iterable[str] | None = None
) -> Iterator[Problem]:
    """Depth 1: every manifest is whole, every section fits its digest, every table its rules.

    Args:
        repository: the store.
        progress: told about each manifest.
        names: only these snapshots; None = all.
    """
    with reading(repository, ""):
        progress.start("reading manifests")
        leases = lease_ids(repository.backend)
        for ref in _refs(repository, names):
            yield from _check_manifest(repository, ref, leases, progress, lambda envelope: None)
        progress.finish()


def check_blobs(
    repository: Repository, progress: Progress = NO_PROGRESS, *, names: Iterable[str] | None = None
) -> Iterator[Problem]:
    """Depth 2: depth 1, and every blob that a manifest needs is there with its size. Reads no blob but tables.

    Args:
        repository: the store.
        progress: told about each blob listed and each manifest read.
        names: only these snapshots; None = all.
    """
    with reading(repository, ""):
        refs = _refs(repository, names)
        leases = lease_ids(repository.backend)
        # after the manifests were listed: every blob that they need was there before
        progress.start("listing blobs")
        blobs: dict[str, int] = {}
        for key, nbytes in repository.list_blobs():
            blobs[key] = nbytes
            progress.advance(nbytes)
        progress.start("reading manifests")
        for ref in refs:
            needed: dict[str, int] = {}
            use = functools.partial(_collect, repository, needed)
            problems = list(_check_manifest(repository, ref, leases, progress, use))
            problems += _compare(repository, ref, needed, blobs)
            if problems and _is_gone(repository, ref):
                continue  # removed while it was being checked
            yield from problems
        progress.finish()


def _refs(repository: Repository, names: Iterable[str] | None) -> list[ManifestRef]:
    wanted = None if names is None else set(names)
    return [ref for ref in repository.walk().roots if wanted is None or ref.name in wanted]


def _check_manifest(
    repository: Repository,
    ref: ManifestRef,
    leases: frozenset[str],
    progress: Progress,
    use: Callable[[Envelope], None],
) -> Iterator[Problem]:
    try:
        data = repository.backend.read(ref.object)
        progress.advance(len(data))
        manifest = ManifestFile(data, ref.object)
        if manifest.head.take_id != ref.manifest.take_id:
            raise FormatError(f"{ref.object}: it is the manifest of the take {manifest.head.take_id}")
        use(manifest.envelope)
        _ = manifest.entries
    except KeyAbsentError:
        return  # removed since the walk
    except MissingBlobError as error:
        yield Problem("missing", ref.name, ref.object, f"a table that it needs is missing: {error}")
    except NewerFormatError as error:
        yield Problem("newer", ref.name, ref.object, str(error))
    except FormatError as error:
        yield Problem("manifest", ref.name, ref.object, str(error))
    except SnapshotError as error:
        yield Problem("unreadable", ref.name, ref.object, str(error))
    if not ref.committed and ref.manifest.take_id not in leases:
        yield Problem(
            "uncommitted",
            ref.name,
            ref.object,
            f"{ref.object}: a take stopped between its manifest and its commit; delete the file, then run gc",
        )


def _collect(repository: Repository, needed: dict[str, int], envelope: Envelope) -> None:
    for index, table in enumerate(envelope.tables):
        if isinstance(table, TableReference):
            needed[table.key] = table.nbytes
        found = envelope.table(index, repository.read_table)
        needed.update(zip(found.keys, found.blob_nbytes, strict=True))


def _compare(
    repository: Repository, ref: ManifestRef, needed: dict[str, int], blobs: dict[str, int]
) -> Iterator[Problem]:
    for key, nbytes in needed.items():
        found = blobs.get(key)
        if found is None:
            # the answer for this one key, in case that it came after the listing
            found = repository.blob_nbytes(key)
        if found is None:
            yield Problem("missing", ref.name, key, f"blob {key}: {repository.explain_missing(key)}")
        elif found != nbytes:
            yield Problem("size", ref.name, key, f"blob {key} has {found} bytes, the manifest says {nbytes}")


def _is_gone(repository: Repository, ref: ManifestRef) -> bool:
    try:
        repository.backend.stat(ref.object)
    except KeyAbsentError:
        return True
    except SnapshotError:
        pass  # in doubt it is there
    return False
