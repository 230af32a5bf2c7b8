"""From a snapshot's path to its manifest and the store that holds its blobs.

A manifest holds no location, only the id of its store: a snapshot that was renamed inside ROOT, or moved with ROOT as
a whole, opens as before. What doesn't live here: where a *new* snapshot's store is (``store.locate``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torchsnapshot.entries import USER_METADATA, StoredManifest, ValueEntry
from torchsnapshot.errors import FormatError, MissingBlobError, SnapshotNotFoundError
from torchsnapshot.store.backend import Backend, StorageOptions
from torchsnapshot.store.envelope import ManifestFile, TableReference
from torchsnapshot.store.keys import MANIFEST_FOLDER, SIGNPOST
from torchsnapshot.store.locate import ancestors, open_backend
from torchsnapshot.store.repository import ManifestRef, Repository
from torchsnapshot.store.walk import manifests_in
from torchsnapshot.values import decode

UPSTREAM_HINT = (
    "Failed to read .snapshot_metadata. Ensure path to snapshot is correct, otherwise snapshot is likely incomplete or "
    "corrupted."
)
"""What the old torchsnapshot says, and its users search their logs for."""


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
        FormatError: the manifest is damaged, or of a newer version.
    """
    backend = open_backend(path, storage_options)
    refs = [ref for ref in manifests_in("", backend.list_folder(MANIFEST_FOLDER).objects).refs if ref.committed]
    if not refs:
        raise SnapshotNotFoundError(_absence(path, backend))
    newest = refs[-1]
    where = f"{path}: manifest {newest.manifest}"
    data = backend.read(newest.object)
    try:
        store_id = ManifestFile(data, where).head.store_id
    except FormatError as error:
        others = ", ".join(str(ref.manifest) for ref in refs[:-1]) or "none"
        raise type(error)(f"{error} (other generations here: {others})") from error
    stores = list(_stores_above(path, storage_options))
    found = next((place for place in stores if place[0].store_id == store_id), None)
    if found is None:
        # a store that was made anew, or put together by hand, has another id; keys are unique, so one blob is proof
        found = next((place for place in stores if _holds_first_blob(place[0], ManifestFile(data, where))), None)
    if found is None:
        raise MissingBlobError(
            f"{path}: its manifest is here, but no folder above it holds its store (id {store_id}): a snapshot's "
            "folder alone has no tensor data. Move it back below its ROOT, or make a copy that stands alone with: "
            "torchsnapshot copy ORIGINAL_PATH DESTINATION"
        )
    repository, name = found
    return Opened(repository, name, replace(newest, name=name), StoredManifest(data, repository.read_table, where))


def user_metadata_beside_head(manifest: StoredManifest) -> dict[str, Any]:
    """User metadata that was too large for the head; empty where there is none."""
    entry = manifest.entries.get(f"0/{USER_METADATA}")
    if not isinstance(entry, ValueEntry) or entry.data is None:
        return {}
    found = decode(entry.data)
    if not isinstance(found, dict):
        raise FormatError(f"{manifest.where}: user metadata is no dict")
    return found


def _stores_above(path: str, storage_options: StorageOptions | None) -> Iterator[tuple[Repository, str]]:
    """The stores at and above the path, nearest first, each with the snapshot's name below it."""
    for root, name in ancestors(path):
        try:
            yield Repository.open(open_backend(root, storage_options)), name
        except SnapshotNotFoundError:
            continue


def _absence(path: str, backend: Backend) -> str:
    """Why nothing can be opened at the path, and what to do."""
    folder = backend.list_folder("")
    if any(info.key == SIGNPOST for info in folder.objects):
        reason = "it has a .snapshot_metadata but no committed manifest: an unfinished take, or an old torchsnapshot's"
    elif folder.folders or folder.objects:
        reason = f"it is no snapshot, though a folder; for snapshots below it: torchsnapshot ls {path}"
    else:
        reason = "nothing is there"
    return f"{path}: no committed snapshot ({reason}). {UPSTREAM_HINT}"


def _holds_first_blob(repository: Repository, file: ManifestFile) -> bool:
    """Whether the store holds the first blob that the manifest names; keys are unique, so one is enough."""
    for table in file.envelope.tables:
        key = table.key if isinstance(table, TableReference) else next(iter(table.keys), None)
        if key is not None:
            return repository.blob_nbytes(key) is not None
    return False
