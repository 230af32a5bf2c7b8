"""gc and retention for callers who have a ROOT's path or URL; the command line does the same with progress bars.

What doesn't live here: the collector (``store.gc``) and the policy (``store.retention``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.reading.opening import open_below
from torchsnapshot.store import gc, retention
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.gcplan import GCReport
from torchsnapshot.store.locate import open_root
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.retention import RetentionPlan


def collect(
    root: str,
    storage_options: StorageOptions | None = None,
    *,
    dry_run: bool = False,
    wait: float = gc.DEFAULT_WAIT_SECONDS,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> GCReport:
    """Free what no snapshot below ``root`` needs any more. Safe beside takes, restores and other collectors.

    Args:
        root: the folder or URL that holds the store.
        storage_options: passed to the filesystem.
        dry_run: only say what would be freed.
        wait: seconds to wait for takes and restores that are running, if there is anything to free.
        force: go on although folders that held snapshots have vanished (an unmounted disk looks like that).
        progress: told how far it is.

    Raises:
        CollectorStoppedError: going on would not have been safe; nothing was deleted.
        SnapshotNotFoundError: there is no store at ``root``.
    """
    repository = Repository.open(open_root(root, storage_options))
    return gc.collect(repository, dry_run=dry_run, wait=wait, force=force, progress=progress)


def retain(
    root: str,
    storage_options: StorageOptions | None = None,
    *,
    last: int | None = None,
    every: int | None = None,
    keep: Sequence[str] = (),
    dry_run: bool = False,
) -> RetentionPlan:
    """Delete the snapshots below ``root`` that no rule keeps; their space is free after the next gc.

    Where several runs share a store, name the folder of one run: the rules then see its snapshots only.

    Args:
        root: the folder or URL that holds the store, or one below it.
        storage_options: passed to the filesystem.
        last: keep this many of the newest.
        every: keep those whose step number (the last integer in the name) is a multiple of this.
        keep: keep those whose name matches one of these globs.
        dry_run: only say what would be deleted.

    Returns:
        What was kept and why, and what was deleted.

    Raises:
        TypeError, ValueError: no rule at all, or one that makes no sense.
        SnapshotNotFoundError: there is no store at ``root`` or above it.
    """
    repository, below = open_below(root, storage_options)
    return retention.retain(repository, below=below, last=last, every=every, keep=keep, dry_run=dry_run)
