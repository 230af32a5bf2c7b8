"""Where a store is: from the path that the user names to a backend, ROOT, and the snapshot's name below it.

What doesn't live here: what stands in a store (``repository``), and which of several stores above a moved snapshot
holds its blobs (``opening``).

Invariants:

- Local paths are resolved first, so that one folder has one place, whatever links lead to it.
- The store is the path itself or above it: a manifest that gc cannot find would lose its blobs.
- That a store was found above a remote folder is remembered; that none was found is not.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from torchsnapshot.errors import CredentialsError, KeyAbsentError, SnapshotNotFoundError
from torchsnapshot.store.backend import Backend, StorageOptions
from torchsnapshot.store.keys import MANIFEST_FOLDER, STORE_FOLDER
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.mounts import Coherence, device_of, find_mount
from torchsnapshot.store.remote import RemoteBackend

CONFIG = f"{STORE_FOLDER}/config"
STORE_VARIABLE = "TORCHSNAPSHOT_STORE"

_LOCAL_PROTOCOLS = ("file", "local")
_SAME_PROTOCOLS = {"gcs": "gs", "s3a": "s3"}
_NESTED_DEPTH = 3
_NESTED_FOLDERS = 64

_known_roots: dict[tuple[str, str], str] = {}
"""(options, folder's URL) → root's URL, of remote stores that were found."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a take goes: the store's backend and root, and the snapshot's name below it (``""`` = the root itself)."""

    backend: Backend
    root_url: str
    name: str


@dataclass(frozen=True, slots=True)
class Location:
    """A path or URL in parts. ``base`` is ``""`` for local paths, else ``protocol://bucket``; ``parts`` are folders."""

    base: str
    parts: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine."""
        return not self.base

    @property
    def url(self) -> str:
        """The path or URL as one string."""
        return f"{self.base}/{'/'.join(self.parts)}" if self.parts or self.is_local else self.base

    @property
    def parent(self) -> Location:
        """The folder above; the topmost one is its own parent."""
        return Location(self.base, self.parts[:-1])

    def name_below(self, root: Location) -> str | None:
        """The path from ``root`` to this one, ``""`` if they are the same, None if ``root`` isn't above this one."""
        num_parts = len(root.parts)
        if _same_base(root.base, self.base) and self.parts[:num_parts] == root.parts:
            return "/".join(self.parts[num_parts:])
        return None


def parse(path: str | os.PathLike[str]) -> Location:
    """Take a path or URL apart; local paths are made absolute and their links resolved.

    Raises:
        ValueError: the path can't be that of a store.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"not a path: {text!r}")
    protocol, separator, rest = text.partition("://")
    if not separator or protocol in _LOCAL_PROTOCOLS:
        local = os.path.realpath(rest if separator else text)
        return Location("", tuple(part for part in local.split("/") if part))
    bucket, _, folders = rest.partition("/")
    parts = tuple(part for part in folders.split("/") if part)
    if "." in parts or ".." in parts:
        raise ValueError(f"{text}: '.' and '..' have no meaning in a URL")
    return Location(f"{protocol}://{bucket}", parts)


def open_backend(
    url: str | os.PathLike[str], storage_options: StorageOptions | None = None, *, durable: bool = True
) -> Backend:
    """Open the backend whose root is ``url``.

    Args:
        url: a local path, ``file://…``, ``s3://…``, ``gs://…``, ``gcs://…`` or any URL that fsspec knows.
        storage_options: reach the filesystem; a local path needs none.
        durable: for local paths, whether a put waits until the bytes are on the disk.

    Raises:
        UnknownProtocolError, CredentialsError, StoreError.
        ValueError: not a path, or the filesystem refuses an option.
    """
    place = parse(url)
    if place.is_local:
        return LocalBackend(place.url, durable=durable)
    return RemoteBackend(place.url, storage_options)


def ancestors(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The folders that may hold the store of ``path``, nearest first: (root's URL, name of ``path`` below it).

    Begins with the path itself; ends, locally, at the device's boundary, else at the bucket.
    """
    place = parse(path)
    return [(root.url, place.name_below(root) or "") for root in _candidates(place)]


def open_root(url: str | os.PathLike[str], storage_options: StorageOptions | None = None) -> Backend:
    """Open the store whose ROOT is ``url``.

    Raises:
        SnapshotNotFoundError: no store is there; the message names the one above it, if there is one.
    """
    place = parse(url)
    backend = open_backend(url, storage_options)
    if _holds_store(backend, ""):
        return backend
    above = find_root(url, storage_options)
    cure = (
        f"the store above it is {above.root_url}: name that"
        if above is not None
        else "name the folder that holds .torchsnapshot, usually the parent of the snapshots"
    )
    raise SnapshotNotFoundError(f"{place.url}: no store is here ({CONFIG} is missing); {cure}")


def find_root(path: str | os.PathLike[str], storage_options: StorageOptions | None = None) -> Place | None:
    """The nearest store at or above ``path``, or None."""
    place = parse(path)
    root = _nearest_root(place, storage_options)
    if root is None:
        return None
    return Place(open_backend(root.url, storage_options), root.url, place.name_below(root) or "")


def place_for_take(
    path: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    storage_options: StorageOptions | None = None,
    *,
    durable: bool = True,
) -> Place:
    """Decide where the store of a take at ``path`` is.

    In this order: ``store``; ``TORCHSNAPSHOT_STORE`` where the path lies below it; the nearest store at or above the
    path; the parent, unless many others share it (``/``, home, temporary folders, buckets) or it can't be used; the
    path itself.

    Raises:
        ValueError: ``store`` isn't above the path or lies on another device; or the take would lie inside another
            snapshot's folder, or around other snapshots.
    """
    place = parse(path)
    root = _root_for_take(place, store, storage_options)
    name = place.name_below(root)
    assert name is not None
    found = Place(open_backend(root.url, storage_options, durable=durable), root.url, name)
    if place.is_local and find_mount(place.url).coherence is Coherence.BUCKET:
        raise ValueError(f"{place.url} is a bucket mounted as a folder: name the bucket itself (s3://…, gs://…)")
    _check_surroundings(found, place)
    return found


def _root_for_take(
    place: Location, store: str | os.PathLike[str] | None, storage_options: StorageOptions | None
) -> Location:
    if store is not None:
        root = parse(store)
        if place.name_below(root) is None:
            raise ValueError(
                f"store={root.url!r} must be the snapshot's path ({place.url}) or a folder above it: gc looks for "
                "snapshots below the store only"
            )
        if place.is_local and device_of(root.url) != device_of(place.url):
            raise ValueError(
                f"store={root.url!r} lies on another device than {place.url}: leave it out, or name a folder on the "
                "same device"
            )
        return root
    variable = os.environ.get(STORE_VARIABLE)
    if variable:
        root = parse(variable)
        if place.name_below(root) is not None:
            return root
    return _nearest_root(place, storage_options) or _new_root(place)


def _candidates(place: Location) -> Iterator[Location]:
    device = device_of(place.url) if place.is_local else 0
    while True:
        yield place
        parent = place.parent
        if parent == place or (place.is_local and device_of(parent.url) != device):
            return
        place = parent


def _nearest_root(place: Location, storage_options: StorageOptions | None) -> Location | None:
    """The nearest folder at or above ``place`` that holds a store."""
    if place.is_local:
        for folder in _candidates(place):
            if os.path.lexists(os.path.join(folder.url, CONFIG)):
                return folder
        return None
    options = repr(sorted((storage_options or {}).items(), key=lambda item: item[0]))
    passed: list[Location] = []
    refused: CredentialsError | None = None
    answered = False
    with open_backend(place.base, storage_options) as bucket:
        for folder in _candidates(place):
            known = _known_roots.get((options, folder.url))
            passed.append(folder)
            try:
                holds = known is None and _holds_store(bucket, "/".join(folder.parts))
            except CredentialsError as error:
                # Credentials for one prefix are refused above it, and for absent keys too if they may not list.
                refused = error
                continue
            answered = True
            if known is not None or holds:
                root = parse(known) if known is not None else folder
                # Not for the path itself: it may get a store of its own, say by a take with store=.
                _known_roots.update(((options, each.url), root.url) for each in passed[1:])
                return root
    if refused is not None and not answered:
        raise refused
    return None


def _holds_store(backend: Backend, folder: str) -> bool:
    try:
        backend.stat(f"{folder}/{CONFIG}" if folder else CONFIG)
    except KeyAbsentError:
        return False
    return True


def _new_root(place: Location) -> Location:
    """Where a store is made: the parent, so that the runs' next steps share it, unless it isn't the user's to share."""
    parent = place.parent
    if parent == place:
        return place
    if not place.is_local:
        return parent if parent.parts else place
    return parent if _may_be_shared(parent.url, place.url) else place


def _may_be_shared(parent: str, path: str) -> bool:
    shared = {"/", "/tmp", "/var/tmp", os.path.realpath(tempfile.gettempdir())}
    if parent in shared or parent == os.path.realpath(os.path.expanduser("~")):
        return False
    try:
        status = os.stat(parent)
    except OSError:
        return True  # the take will make it
    if status.st_mode & stat.S_ISVTX and status.st_mode & stat.S_IWOTH:
        return False
    return device_of(path) == status.st_dev and os.access(parent, os.W_OK | os.X_OK)


def _check_surroundings(found: Place, place: Location) -> None:
    """Refuse a take inside another snapshot's folder, or around others: deleting one would delete the other."""
    parts = found.name.split("/") if found.name else []
    for num_parts in range(len(parts)):
        above = "/".join(parts[:num_parts])
        if _holds_manifests(found.backend, above):
            raise ValueError(
                f"{place.url} lies inside the folder of the snapshot {found.root_url}/{above}: deleting that one would "
                "delete this one. Choose a path outside of it"
            )
    nested = _nested_snapshot(found.backend, found.name)
    if nested is not None:
        raise ValueError(
            f"{place.url} is a folder that holds snapshots already ({found.root_url}/{nested}): deleting the new one "
            "would delete them. Choose a path beside or below them"
        )


def _holds_manifests(backend: Backend, folder: str) -> bool:
    manifests = f"{folder}/{MANIFEST_FOLDER}" if folder else MANIFEST_FOLDER
    return bool(backend.list_folder(manifests).objects)


def _nested_snapshot(backend: Backend, folder: str) -> str | None:
    """A snapshot that lies below ``folder``, if one is found soon; an early warning, not a search."""
    level = [folder]
    for _ in range(_NESTED_DEPTH):
        below: list[str] = []
        for each in level[:_NESTED_FOLDERS]:
            names = backend.list_folder(each).folders
            if MANIFEST_FOLDER in names and each != folder and _holds_manifests(backend, each):
                return each
            below.extend(
                f"{each}/{name}" if each else name for name in names if name not in (MANIFEST_FOLDER, STORE_FOLDER)
            )
        level = below
    return None


def _same_base(one: str, other: str) -> bool:
    return _canonical(one) == _canonical(other)


def _canonical(base: str) -> str:
    protocol, separator, bucket = base.partition("://")
    return f"{_SAME_PROTOCOLS.get(protocol, protocol)}{separator}{bucket}"
