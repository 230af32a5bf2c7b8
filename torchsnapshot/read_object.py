"""Reading single values out of a snapshot, without an application around them.

What doesn't live here: arguments and defaults (``snapshot``), the restore of a whole state (``restore``).
"""

from __future__ import annotations

from typing import Any

from torchsnapshot.entries import ContainerEntry, StoredManifest, ValueEntry
from torchsnapshot.errors import PickleRefusedError, SnapshotError
from torchsnapshot.live_state import find
from torchsnapshot.opening import Opened, other_generations_named
from torchsnapshot.parts import Part, entries_below, gather
from torchsnapshot.reading import Reading
from torchsnapshot.restore import check_key, refusal, still_committed
from torchsnapshot.stats import Stats
from torchsnapshot.store.leases import reading


def read_object(opened: Opened, path: str, target: Any, budget_nbytes: int | None, allow_pickle: bool) -> Any:
    """Read one value. See ``Snapshot.read_object``."""
    with reading(opened.repository, opened.name), other_generations_named(opened):
        manifest = still_committed(opened)
        stored, inside = _locate(manifest, path)
        value = _read(
            opened, manifest, stored.partition("/")[2], None if inside else target, budget_nbytes, allow_pickle
        )
    if not inside:
        return value
    try:
        return find(value, inside)
    except KeyError:
        raise SnapshotError(_absence(path)) from None


def read_state_dict(opened: Opened, key: str, allow_pickle: bool) -> Any:
    """Read the whole state of one key. See ``Snapshot.get_state_dict_for_key``."""
    with reading(opened.repository, opened.name), other_generations_named(opened):
        manifest = still_committed(opened)
        return _read(opened, manifest, check_key(manifest, key), None, None, allow_pickle)


def _locate(manifest: StoredManifest, path: str) -> tuple[str, list[str]]:
    """The entry at or above a path, and the components below it: values have no entries for what is inside them."""
    components = path.split("/")
    for length in range(len(components), 1, -1):
        stored = "/".join(components[:length])
        entry = manifest.entries.get(stored)
        if entry is not None and (length == len(components) or isinstance(entry, ValueEntry)):
            return stored, components[length:]
        if isinstance(entry, ContainerEntry):
            break
    raise SnapshotError(_absence(path))


def _absence(path: str) -> str:
    return (
        f'The supplied path "{path}" does not exist in the snapshot\'s manifest. Paths begin with a rank, as in '
        '"0/model/weight"; "torchsnapshot show SNAPSHOT" and get_manifest() list them.'
    )


def _read(
    opened: Opened, manifest: StoredManifest, path: str, target: Any, budget_nbytes: int | None, allow_pickle: bool
) -> Any:
    part = Part(entries_below(manifest, path), path, target)
    if part.opaque() and not allow_pickle:
        raise PickleRefusedError(refusal({path: part.opaque()}, []))
    work = Reading(opened.repository, manifest, Stats())
    gather([part], work, manifest)
    work.run(budget_nbytes)
    return part.build()
