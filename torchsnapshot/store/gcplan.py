"""What a collection is about to do, and what it did, as values. Pure: no I/O, no clock.

What lives here: the plan, the report, and the rule of the missing folders. What doesn't: the steps (``gc``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torchsnapshot.store.records import Root
from torchsnapshot.store.walk import ManifestRef


@dataclass(frozen=True, slots=True)
class GCPlan:
    """What nothing refers to, computed before anything is touched.

    ``condemned`` maps each key to its size in bytes. ``roots`` are the (snapshot name, take id) of every manifest.
    ``uncommitted`` are manifests without ``.ok`` whose take has no lease: they keep their blobs until somebody removes
    them. ``superseded`` are committed manifests of a path that was taken again by a take that ended before it could
    remove them: they too keep their blobs. ``foreign`` are files that are none of ours; they are left alone.
    ``upstream`` are snapshots of the old torchsnapshot.
    """

    condemned: dict[str, int]
    num_blobs: int
    nbytes: int
    roots: frozenset[Root]
    num_snapshots: int
    uncommitted: tuple[str, ...]
    superseded: tuple[str, ...]
    foreign: tuple[str, ...]
    upstream: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GCReport:
    """What a collection did, or with ``dry_run`` would do. Sizes in bytes.

    ``waited_for`` and ``called_dead`` name leases; ``failed`` maps keys that could not be deleted to the reason: if
    there are any, the collection has not finished. See ``GCPlan`` for the other fields.
    """

    dry_run: bool
    kept_blobs: int
    kept_nbytes: int
    freed_blobs: int
    freed_nbytes: int
    snapshots: int
    uncommitted: tuple[str, ...] = ()
    superseded: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    waited_for: tuple[str, ...] = ()
    called_dead: tuple[str, ...] = ()
    temporary_files: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def superseded(refs: Iterable[ManifestRef], leases: Collection[str]) -> list[str]:
    """Committed manifests that a reader would never open, as their path has a newer one.

    A take removes these itself once it is committed; while it has its lease, it still may.

    Args:
        refs: the manifests of all snapshots.
        leases: ids of takes that are alive.
    """
    committed = [ref for ref in refs if ref.committed]
    newest: dict[str, ManifestRef] = {}
    for ref in committed:
        if ref.name not in newest or newest[ref.name].manifest < ref.manifest:
            newest[ref.name] = ref
    old = (ref for ref in committed if ref.manifest != newest[ref.name].manifest)
    return sorted(ref.object for ref in old if newest[ref.name].manifest.take_id not in leases)


def missing_folders(
    known: Iterable[Root], explained: Iterable[Root], take_ids: frozenset[str], folders: frozenset[str]
) -> list[str]:
    """Folders that held two or more snapshots at the last sweep and are gone, or empty, for no known reason.

    An unmounted disk looks like that. A single snapshot that is gone says nothing: people delete snapshots.

    Args:
        known: the roots of the newest sweep marker.
        explained: what was noted before it was removed.
        take_ids: the takes whose manifests are there now, wherever: what was moved is not missing.
        folders: the folders below ROOT that hold anything.
    """
    gone: dict[str, set[str]] = {}
    explained = set(explained)
    for name, take_id in known:
        if (name, take_id) in explained or take_id in take_ids:
            continue
        parts = name.split("/")
        for length in range(1, len(parts)):
            gone.setdefault("/".join(parts[:length]), set()).add(name)
    return sorted(folder for folder, names in gone.items() if len(names) > 1 and folder not in folders)
