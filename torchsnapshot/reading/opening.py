"""From a snapshot's path to its manifest and the store that holds its blobs.

A manifest holds no location, only the id of its store: a snapshot that was renamed inside ROOT, or moved with ROOT as
a whole, opens as before. What doesn't live here: where a *new* snapshot's store is (``store.locate``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torchsnapshot.errors import (
    AbsentStateError,
    CorruptionError,
    FormatError,
    KeyAbsentError,
    MissingBlobError,
    NewerFormatError,
    PartialRestoreError,
    SnapshotError,
    SnapshotNotFoundError,
    StoreError,
)
from torchsnapshot.format.entries import USER_METADATA, StoredManifest, ValueEntry, escape, unescape
from torchsnapshot.state.values import decode
from torchsnapshot.store.backend import Backend, StorageOptions
from torchsnapshot.store.config import CONFIG_CURE
from torchsnapshot.store.envelope import ManifestFile, TableReference
from torchsnapshot.store.keys import MANIFEST_FOLDER, SIGNPOST, STORE_FOLDER, blob_object
from torchsnapshot.store.locate import Location, ancestors, find_root, open_backend, open_root, parse
from torchsnapshot.store.records import CONFIG_OBJECT
from torchsnapshot.store.remote_errors import without_password
from torchsnapshot.store.repository import ManifestRef, Repository, SnapshotInfo
from torchsnapshot.store.walk import SIGNPOST_BYTES, manifests_in

UPSTREAM_HINT = (
    "Failed to read .snapshot_metadata. Ensure path to snapshot is correct, otherwise snapshot is likely incomplete or "
    "corrupted."
)
"""What the old torchsnapshot says, and its users search their logs for."""

_MAX_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Opened:
    """A committed snapshot: its store, its name below ROOT, and its manifest."""

    repository: Repository
    name: str
    ref: ManifestRef
    manifest: StoredManifest


def open_snapshot(path: str, storage_options: StorageOptions | None = None) -> Opened:
    """Open the newest committed generation at ``path``.

    Raises:
        SnapshotNotFoundError: nothing committed is there.
        MissingBlobError: a manifest is there, but no store above it holds its blobs.
        FormatError: the manifest, or the config of its store, is damaged or of a newer version.
    """
    backend = open_backend(path, storage_options)
    shown = without_password(os.fspath(path))
    refs, data = _read_newest(path, backend, storage_options)
    newest = refs[-1]
    where = f"{shown}: manifest {newest.manifest}"
    try:
        file = ManifestFile(data, where)
        store_id = file.head.store_id
        # now, and not when its entries are asked for, while the way out can still be told
        file.check_digests()
    except NewerFormatError:
        raise
    except FormatError as error:
        raise FormatError(f"{error}. {_way_out(refs)}") from error
    repository, name = _find_store(path, store_id, file, storage_options)
    return Opened(repository, name, replace(newest, name=name), StoredManifest(data, repository.read_table, where))


def _read_newest(
    path: str, backend: Backend, storage_options: StorageOptions | None
) -> tuple[list[ManifestRef], bytes]:
    """The committed manifests, newest last, and the bytes of that one."""
    rounds = 0
    while True:
        found = manifests_in("", backend.list_folder(MANIFEST_FOLDER).objects).refs
        committed = [ref for ref in found if ref.committed]
        if not committed:
            raise SnapshotNotFoundError(_absence(path, backend, found, storage_options))
        try:
            return committed, backend.read(committed[-1].object)
        except KeyAbsentError:
            # the path was taken again since the listing
            rounds += 1
            if rounds >= _MAX_ROUNDS:
                raise


def _way_out(refs: list[ManifestRef]) -> str:
    """What to do about a damaged manifest, the last of these."""
    newest = refs[-1].object
    if len(refs) > 1:
        return (
            f"An older generation is there, {refs[-2].manifest}: to go back to it, delete {newest}.ok and then {newest}"
        )
    return (
        "Bring the file back from a backup, or restore another snapshot; `torchsnapshot rm` removes this one (gc stops "
        "while it is there), and taking the path again replaces it"
    )


@contextmanager
def other_generations_named(opened: Opened) -> Iterator[None]:
    """Add to an error about stored bytes which older generations of the snapshot are there; there rarely are."""
    try:
        yield
    except (CorruptionError, PartialRestoreError) as error:
        refs = [ref for ref in opened.repository.manifests_of(opened.name) if ref.committed]
        if len(refs) < 2:
            raise
        raise type(error)(f"{error}. {_way_out(refs)}") from error


def _find_store(
    path: str, store_id: str, file: ManifestFile, storage_options: StorageOptions | None
) -> tuple[Repository, str]:
    """The store that holds the manifest's blobs, and the snapshot's name below it."""
    others: list[tuple[Repository, str]] = []
    problems: list[SnapshotError] = []
    for root, name in ancestors(path):
        try:
            repository = Repository.open(open_backend(root, storage_options))
        except SnapshotNotFoundError:
            continue
        except (FormatError, StoreError) as error:
            # a stranger's, as far as we know; of no interest if another one turns out to be ours
            problems.append(error)
            continue
        if repository.store_id == store_id:
            return repository, name
        others.append((repository, name))
    key = _first_key(file)
    for repository, name in others:
        # a store that was made anew, or put together by hand, has another id; keys are unique, so one blob is proof
        if key is None or repository.blob_nbytes(key) is not None:
            return repository, name
    if problems:
        raise problems[0]
    for root, _ in ancestors(path):
        if key is not None and _holds_blob(open_backend(root, storage_options), key):
            raise FormatError(
                f"{without_password(root)}: {CONFIG_OBJECT} is missing. It holds settings, no data: {CONFIG_CURE}"
            )
    raise MissingBlobError(
        f"{without_password(os.fspath(path))}: its manifest is here, but no folder above it holds its store (id "
        f"{store_id}): a snapshot's folder alone has no tensor data. Move it back below its ROOT, or make a copy that "
        "stands alone with: torchsnapshot copy ORIGINAL_PATH DESTINATION"
    )


def open_below(folder: str, storage_options: StorageOptions | None = None) -> tuple[Repository, str]:
    """The store at or above a folder, and the folder's name below its ROOT.

    Raises:
        SnapshotNotFoundError: neither the folder nor one above it holds a store.
    """
    place = find_root(folder, storage_options)
    if place is None:
        return Repository.open(open_root(folder, storage_options)), ""
    return Repository.open(place.backend), place.name


def list_below(
    folder: str, storage_options: StorageOptions | None = None
) -> tuple[Repository, list[tuple[str, SnapshotInfo]]]:
    """The committed snapshots at and below a folder, each with its path; oldest commit first. And their store.

    The store may be above the folder: a run's folder in a store of many runs has that run's snapshots.

    Raises:
        SnapshotNotFoundError: neither the folder nor one above it holds a store.
    """
    repository, below = open_below(folder, storage_options)
    top = os.fspath(folder).rstrip("/")
    found = repository.list_snapshots(below)
    return repository, [(f"{top}/{info.name[len(below) :].lstrip('/')}".rstrip("/"), info) for info in found]


def user_metadata_beside_head(manifest: StoredManifest) -> dict[str, Any]:
    """User metadata that the head could not hold; empty where there is none."""
    entry = manifest.entries.get(f"0/{USER_METADATA}")
    if not isinstance(entry, ValueEntry) or entry.data is None:
        return {}
    found = decode(entry.data)
    if not isinstance(found, dict):
        raise FormatError(f"{manifest.where}: user metadata is no dict")
    return found


def _first_key(file: ManifestFile) -> str | None:
    """A blob that the manifest needs; None where it needs none."""
    for table in file.envelope.tables:
        key = table.key if isinstance(table, TableReference) else next(iter(table.keys), None)
        if key is not None:
            return key
    return None


def _holds_blob(backend: Backend, key: str) -> bool:
    try:
        backend.stat(blob_object(key))
    except StoreError:
        return False
    return True


def _absence(
    path: str, backend: Backend, uncommitted: list[ManifestRef], storage_options: StorageOptions | None
) -> str:
    """Why nothing can be opened at the path, and what to do."""
    shown = without_password(os.fspath(path))
    reason = _reason_of_absence(parse(path), backend, uncommitted, storage_options)
    place = find_root(path, storage_options)
    cure = "" if place is None else f" What is there: torchsnapshot ls {without_password(place.root_url)}."
    return f"{shown}: no committed snapshot ({reason}).{cure} {UPSTREAM_HINT}"


def _reason_of_absence(
    place: Location, backend: Backend, uncommitted: list[ManifestRef], storage_options: StorageOptions | None
) -> str:
    if uncommitted:
        return (
            f"a take has put its manifest there, {uncommitted[-1].manifest}, and not committed it: it still runs, or "
            "it was interrupted, and then the snapshot has to be taken again"
        )
    inside = next((part for part in place.parts if part in (MANIFEST_FOLDER, STORE_FOLDER, SIGNPOST)), None)
    if inside is not None:
        outer = Location(place.base, place.parts[: place.parts.index(inside)])
        return f"{inside} is the inside of a snapshot or store; name the folder that holds it, {outer.shown}"
    folder = backend.list_folder("")
    signpost = next((info for info in folder.objects if info.key == SIGNPOST), None)
    if signpost is not None and signpost.nbytes != len(SIGNPOST_BYTES):
        return "it is one of the old torchsnapshot: restore it with that, and take it again with this one"
    if signpost is not None and MANIFEST_FOLDER in folder.folders:
        return f"no manifest is in its {MANIFEST_FOLDER} folder: somebody deleted it, or did not copy all of it"
    if signpost is not None:
        return f"its {MANIFEST_FOLDER} folder is gone: it was being deleted, or was copied without hidden folders"
    if STORE_FOLDER in folder.folders:
        return "it is a folder of snapshots, not a snapshot: name one of those in it"
    if folder.folders or folder.objects:
        return "it is a folder, but no snapshot"
    if place.parts and _is_object(place, storage_options):
        return "it is a file, and a snapshot is a folder"
    return "nothing is there"


def _is_object(place: Location, storage_options: StorageOptions | None) -> bool:
    try:
        open_backend(place.parent.url, storage_options).stat(place.parts[-1])
    except StoreError:
        return False
    return True


def still_committed(opened: Opened) -> StoredManifest:
    """The newest committed manifest, as a listing made under a lease shows it.

    Raises:
        SnapshotNotFoundError: the snapshot has been deleted since it was opened.
    """
    ref = opened.repository.newest_committed(opened.name)
    if ref is None:
        raise SnapshotNotFoundError(f"{opened.name or 'ROOT'!r} in {opened.repository.url} has just been deleted")
    if ref.manifest == opened.ref.manifest:
        return opened.manifest
    where = f"{opened.name}: manifest {ref.manifest}"
    return StoredManifest(opened.repository.read_manifest(ref), opened.repository.read_table, where)


def check_key(manifest: StoredManifest, key: str) -> str:
    """The path of an app_state key in this manifest.

    Raises:
        AbsentStateError: the snapshot has no such key.
    """
    path = escape(key)
    known: set[str] = set()
    # what only one rank had is looked for last: reading the trees of all ranks takes time
    for rank in [0, *manifest.ranks[1:]]:
        entries = manifest.entries_of(rank)
        if path in entries:
            return path
        known.update(unescape(each) for each in entries if "/" not in each and each != USER_METADATA)
    raise AbsentStateError(
        f"{key} is absent in both manifest and flattened. The snapshot has: {', '.join(sorted(known))}."
    )
