"""Where a store is: from the path that the user names to a backend, ROOT, and the snapshot's name below it.

What doesn't live here: what stands in a store (``repository``), and which of several stores above a moved snapshot
holds its blobs (``reading.opening``).

Invariants:

- Local paths are resolved first, so that one folder has one place, whatever links lead to it.
- The store is the path itself or above it: a manifest that gc cannot find would lose its blobs.
- That a store was found above a remote folder is remembered; that none was found is not.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torchsnapshot.errors import CredentialsError, KeyAbsentError, SnapshotNotFoundError
from torchsnapshot.store.backend import Backend, StorageOptions
from torchsnapshot.store.keys import MANIFEST_FOLDER, SIGNPOST, STORE_FOLDER
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.mounts import Coherence, device_of
from torchsnapshot.store.remote import RemoteBackend
from torchsnapshot.store.remote_errors import without_password
from torchsnapshot.store.walk import SIGNPOST_BYTES

CONFIG = f"{STORE_FOLDER}/config"
STORE_VARIABLE = "TORCHSNAPSHOT_STORE"

_LOCAL_PROTOCOLS = ("file", "local")
_SAME_PROTOCOLS = {"gcs": "gs", "s3a": "s3"}
_BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
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
    def shown(self) -> str:
        """The path or URL for messages: without a password."""
        return without_password(self.url)

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
        TypeError: it is neither a str nor a path.
        ValueError: the path can't be that of a store.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"a path must be a str or an os.PathLike, not {type(text).__name__}: {path!r}")
    if not text or "\0" in text:
        raise ValueError(f"not a path: {text!r}")
    squeezed = _ONE_SLASH.match(text)
    if squeezed is not None:
        raise ValueError(
            f"{text}: a URL has two slashes, {squeezed[1]}://… (pathlib makes one of them: pass URLs as str); a local "
            f"folder of that name is ./{text}"
        )
    if text == "~" or text.startswith("~/"):
        raise ValueError(
            f"{text}: '~' means the home folder only to a shell: pass os.path.expanduser({text!r}); a local folder of "
            f"that name is ./{text}"
        )
    protocol, separator, rest = text.partition("://")
    if not separator or protocol in _LOCAL_PROTOCOLS:
        try:
            local = os.path.realpath(rest if separator else text)
        except FileNotFoundError as error:
            raise ValueError(f"{text}: the current folder has been deleted: pass an absolute path") from error
        return Location("", tuple(part for part in local.split("/") if part))
    bucket, _, folders = rest.partition("/")
    parts = tuple(part for part in folders.split("/") if part)
    if "." in parts or ".." in parts:
        raise ValueError(f"{without_password(text)}: '.' and '..' have no meaning in a URL")
    if not bucket and protocol in _BUCKET_PROTOCOLS:
        raise ValueError(f"{text}: names no bucket; write {protocol}://BUCKET/FOLDER")
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
        TypeError: not a path, or options that are no dict.
        ValueError: not a path, or the filesystem refuses an option.
    """
    place = parse(url)
    # whoever is not checked by mypy may pass anything
    options: object = storage_options
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"storage_options must be a dict, not {type(options).__name__}")
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
        f"the store above it is {without_password(above.root_url)}: name that"
        if above is not None
        else "name the folder that holds .torchsnapshot, usually the parent of the snapshots"
    )
    raise SnapshotNotFoundError(f"{place.shown}: no store is here ({CONFIG} is missing); {cure}")


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
        ValueError: ``store`` isn't above the path, lies on another device or is ``/``; or the take would lie inside
            another snapshot's folder, around others, in place of one of the old torchsnapshot, or below a file.
    """
    place = parse(path)
    root = _root_for_take(place, store, storage_options)
    if root.is_local and not root.parts:
        raise ValueError(
            f"{place.url}: the store would be in /, where gc would have to search the whole machine for snapshots. "
            "Choose a folder below it"
        )
    name = place.name_below(root)
    assert name is not None
    found = Place(open_backend(root.url, storage_options, durable=durable), root.url, name)
    # the store is never on another device than the snapshot, nor is what it finds out about its mount asked for twice
    if isinstance(found.backend, LocalBackend) and found.backend.mount.coherence is Coherence.BUCKET:
        raise ValueError(f"{place.url} is a bucket mounted as a folder: name the bucket itself (s3://…, gs://…)")
    if place.is_local:
        _check_folders(place)
    _check_surroundings(found, place)
    return found


def _root_for_take(
    place: Location, store: str | os.PathLike[str] | None, storage_options: StorageOptions | None
) -> Location:
    if store is not None:
        root = parse(store)
        if place.name_below(root) is None:
            raise ValueError(
                f"store={root.shown!r} must be the snapshot's path ({place.shown}) or a folder above it: gc looks for "
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
    passed: list[Location] = []
    refused: CredentialsError | None = None
    answered = False
    with open_backend(place.base, storage_options) as bucket:
        options = repr(sorted((storage_options or {}).items(), key=lambda item: item[0]))
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


def _check_folders(place: Location) -> None:
    """Refuse a path that is a file or lies below one, before anything is written."""
    for folder in _candidates(place):
        if os.path.isdir(folder.url):
            return
        # asked last, as another take may be making the folder just now
        if os.path.lexists(folder.url) and not os.path.isdir(folder.url):
            raise ValueError(
                f"{place.url}: {folder.url} is a file, and a snapshot is a folder. Choose another path, or move that "
                "file away"
            )


def _check_surroundings(found: Place, place: Location) -> None:
    """Refuse a take that would harm another snapshot.

    Inside another's folder or around others, deleting one would delete the other; in place of a snapshot of the old
    torchsnapshot, the signpost would overwrite its metadata.
    """
    parts = found.name.split("/") if found.name else []
    for num_parts in range(len(parts)):
        above = "/".join(parts[:num_parts])
        if _holds_manifests(found.backend, above):
            raise ValueError(
                f"{place.shown} lies inside the folder of the snapshot {_join(found.backend.url, above)}: deleting "
                "that one would delete this one. Choose a path outside of it"
            )
    here = found.backend.list_folder(found.name)
    if MANIFEST_FOLDER not in here.folders and any(
        info.key == _join(found.name, SIGNPOST) and info.nbytes != len(SIGNPOST_BYTES) for info in here.objects
    ):
        raise ValueError(
            f"{place.shown} holds a snapshot of the old torchsnapshot, which this take would overwrite. Choose another "
            "path, or remove that folder"
        )
    nested = _nested_snapshot(found.backend, found.name, here.folders)
    if nested is not None:
        raise ValueError(
            f"{place.shown} is a folder that holds snapshots already ({_join(found.backend.url, nested)}): deleting "
            "the new one would delete them. Choose a path beside or below them"
        )


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}".rstrip("/") if folder else name


def _holds_manifests(backend: Backend, folder: str) -> bool:
    return bool(backend.list_folder(_join(folder, MANIFEST_FOLDER)).objects)


def _nested_snapshot(backend: Backend, folder: str, names: Iterable[str]) -> str | None:
    """A snapshot that lies below ``folder``, which holds ``names``; an early warning, not a search."""
    level = _below(folder, names)
    for _ in range(_NESTED_DEPTH - 1):
        below: list[str] = []
        for each in level[:_NESTED_FOLDERS]:
            names = backend.list_folder(each).folders
            if MANIFEST_FOLDER in names and _holds_manifests(backend, each):
                return each
            below += _below(each, names)
        level = below
    return None


def _below(folder: str, names: Iterable[str]) -> list[str]:
    return [_join(folder, name) for name in names if name not in (MANIFEST_FOLDER, STORE_FOLDER)]


def _same_base(one: str, other: str) -> bool:
    return _canonical(one) == _canonical(other)


def _canonical(base: str) -> str:
    protocol, separator, bucket = base.partition("://")
    return f"{_SAME_PROTOCOLS.get(protocol, protocol)}{separator}{bucket}"
