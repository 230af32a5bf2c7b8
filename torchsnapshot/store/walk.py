"""Finding manifests: the walk below ROOT, folder by folder.

What lives here: which folders are entered, what in them is a manifest, what is somebody else's. What doesn't: reading
a manifest (``repository``), and what a collector makes of them (``roots``).

Rules, on which the collector's safety rests:

- Every folder is entered but ``.torchsnapshot`` and ``.manifests``, also below a snapshot (``mv a b`` puts a inside b)
  and on other devices. A ``.manifests`` folder is read, not entered.
- A symbolic link to a folder is followed, each (device, inode) once, after all real folders. What is found there is a
  root for the collector, but no snapshot of this ROOT: nobody lists or deletes through a link.
- On a local filesystem, folders of the filesystem itself are passed over: ``.snapshot``, ``.snapshots``, ``.snap``,
  ``.zfs``, and a ``lost+found`` that root owns. No take may use these names (``check_name``).
- A folder that cannot be listed raises. One that is gone since its parent was listed is empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torchsnapshot.store.backend import Backend, Folder, FolderIdentity, ObjectInfo, check_key
from torchsnapshot.store.keys import (
    MANIFEST_FOLDER,
    OK_SUFFIX,
    SIGNPOST,
    STORE_FOLDER,
    ManifestName,
    parse_manifest_name,
)
from torchsnapshot.store.parallel import parallel

SIGNPOST_BYTES = b"\x89torchsnapshot\n"
"""What the signpost holds. A metadata file of another size is one of the old torchsnapshot."""

FILESYSTEM_FOLDERS = frozenset({".snapshot", ".snapshots", ".snap", ".zfs"})
LOST_AND_FOUND = "lost+found"


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """One manifest that a listing showed. ``name`` is the snapshot's folder below ROOT ("" = ROOT itself)."""

    name: str
    manifest: ManifestName
    nbytes: int
    modified: float
    committed: bool

    @property
    def object(self) -> str:
        """Where, below ROOT, the manifest lies."""
        return f"{manifest_folder(self.name)}/{self.manifest}"

    @property
    def root(self) -> tuple[str, str]:
        """(snapshot name, take id)."""
        return self.name, self.manifest.take_id


@dataclass(frozen=True, slots=True)
class Walk:
    """What one walk below ROOT found.

    ``refs``: the manifests of this ROOT's snapshots. ``linked``: those that only symbolic links lead to. ``folders``:
    every folder that holds anything. ``foreign``: files in manifest folders that are none of ours. ``upstream``:
    snapshots of the old torchsnapshot; they hold no blobs of ours.
    """

    refs: tuple[ManifestRef, ...]
    linked: tuple[ManifestRef, ...]
    folders: frozenset[str]
    foreign: tuple[str, ...]
    upstream: tuple[str, ...]

    @property
    def roots(self) -> tuple[ManifestRef, ...]:
        """Every manifest below ROOT, however it is reached."""
        return self.refs + self.linked


def manifest_folder(name: str) -> str:
    """Where, below ROOT, the manifests of the snapshot ``name`` lie."""
    return f"{name}/{MANIFEST_FOLDER}" if name else MANIFEST_FOLDER


def check_name(name: str) -> str:
    """Return the snapshot name, or raise ``ValueError`` where the collector's walk would not find a snapshot there."""
    if not name:
        return name
    check_key(name)
    reserved = FILESYSTEM_FOLDERS | {STORE_FOLDER, MANIFEST_FOLDER, LOST_AND_FOUND}
    taken = [part for part in name.split("/") if part in reserved]
    if taken:
        raise ValueError(f"a snapshot cannot be named {name!r}: {taken[0]!r} is passed over by gc; choose another name")
    return name


class FoundManifests(NamedTuple):
    """What one manifest folder holds."""

    refs: list[ManifestRef]
    foreign: list[str]
    lone_oks: list[ManifestName]


def manifests_in(name: str, objects: Iterable[ObjectInfo]) -> FoundManifests:
    """Sort the objects of one manifest folder: manifests (newest last), foreign keys, ``.ok`` without a manifest."""
    manifests: dict[ManifestName, ObjectInfo] = {}
    oks: set[ManifestName] = set()
    foreign: list[str] = []
    for info in objects:
        base = info.key.rpartition("/")[2]
        is_ok = base.endswith(OK_SUFFIX)
        parsed = parse_manifest_name(base[: -len(OK_SUFFIX)] if is_ok else base)
        if parsed is None:
            foreign.append(info.key)
        elif is_ok:
            oks.add(parsed)
        else:
            manifests[parsed] = info
    refs = [
        ManifestRef(name, parsed, info.nbytes, info.modified, parsed in oks)
        for parsed, info in sorted(manifests.items())
    ]
    return FoundManifests(refs, foreign, sorted(oks - manifests.keys()))


def walk(backend: Backend) -> Walk:
    """Find every manifest below ROOT.

    Raises:
        StoreError: a folder could not be listed.
    """
    return _Walker(backend).run()


class _Walker:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._refs: list[ManifestRef] = []
        self._folders: set[str] = set()
        self._foreign: list[str] = []
        self._upstream: list[str] = []
        self._links: list[str] = []
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> Walk:
        self._descend([""], linked=False)
        refs, foreign, upstream = tuple(self._refs), tuple(self._foreign), tuple(self._upstream)
        self._refs = []
        while self._links:
            links, self._links = sorted(self._links), []
            self._descend(self._new(links), linked=True)
        return Walk(refs, tuple(self._refs), frozenset(self._folders), foreign, upstream)

    def _new(self, links: list[str]) -> list[str]:
        """Those of the links that lead to folders where nothing else has led yet."""
        found = []
        for link in links:
            identity = self._backend.folder_identity(link)
            if identity is not None and self._mark(identity):
                found.append(link)
        return found

    def _mark(self, identity: FolderIdentity) -> bool:
        place = (identity.device, identity.inode)
        if place in self._seen:
            return False
        self._seen.add(place)
        return True

    def _descend(self, wave: list[str], *, linked: bool) -> None:
        while wave:
            below: list[str] = []
            for folder, found, identities in parallel(self._list, wave, self._backend.concurrency):
                below += self._enter(folder, found, identities, linked)
            wave = below

    def _list(self, folder: str) -> tuple[str, Folder, dict[str, FolderIdentity | None]]:
        found = self._backend.list_folder(folder)
        identities = {name: self._backend.folder_identity(_join(folder, name)) for name in found.folders}
        return folder, found, identities

    def _enter(
        self, folder: str, found: Folder, identities: dict[str, FolderIdentity | None], linked: bool
    ) -> list[str]:
        """Take in one listed folder; returns the folders to list next."""
        if folder.rpartition("/")[2] == MANIFEST_FOLDER:
            refs, foreign, _ = manifests_in(folder[: -len(MANIFEST_FOLDER)].rstrip("/"), found.objects)
            self._refs += refs
            self._foreign += foreign
            return []
        if found.folders or found.objects:
            self._folders.add(folder)
        if MANIFEST_FOLDER not in found.folders:
            signpost = _join(folder, SIGNPOST)
            self._upstream += [
                folder for info in found.objects if info.key == signpost and info.nbytes != len(SIGNPOST_BYTES)
            ]
        below = []
        for name, identity in identities.items():
            if _is_passed_over(name, identity):
                continue
            if identity is not None and identity.is_link:
                self._links.append(_join(folder, name))
            elif identity is None or self._mark(identity) or not linked:
                # real folders are a tree and end by themselves; no inode number of theirs is trusted to tell them apart
                below.append(_join(folder, name))
        return below


def _is_passed_over(name: str, identity: FolderIdentity | None) -> bool:
    if name == STORE_FOLDER:
        return True
    if identity is None:
        return False  # no filesystem, or a folder that has just gone
    return name in FILESYSTEM_FOLDERS or (name == LOST_AND_FOUND and identity.owner == 0)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
