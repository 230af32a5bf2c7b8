"""The collector: finds blobs that no manifest refers to, and deletes them while takes and other collectors run.

What lives here: the steps, in their order. What doesn't: the argument why they are safe (docs/gc.md), reading the
manifests (``roots``), judging leases (``liveness``), debris (``housekeeping``).

The order is the safety; none of it may be swapped: leases, then blobs → manifests → pending set → leases again → wait
for every one of them → manifests again → is the pending set still ours? → delete → marker → the pending set goes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from torchsnapshot.errors import CollectorStoppedError, KeyAbsentError, NewerFormatError, SnapshotError, StoreFullError
from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.store import housekeeping
from torchsnapshot.store.clock import SYSTEM_CLOCK, Clock
from torchsnapshot.store.gcplan import GCPlan, GCReport, missing_folders, superseded
from torchsnapshot.store.keys import new_id
from torchsnapshot.store.liveness import (
    HeldLease,
    StoreClock,
    call_dead,
    is_marked_dead,
    lease_ids,
    may_be_called_dead,
    read_leases,
)
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.mounts import Coherence, Mount
from torchsnapshot.store.processes import current_process
from torchsnapshot.store.records import GC_LEVEL, LEASES_FOLDER, PENDING_FOLDER, PendingSet, Root
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.roots import Reading, read_roots

__all__ = ["GCPlan", "GCReport", "collect", "plan_gc"]

logger = logging.getLogger(__name__)

DEFAULT_WAIT_SECONDS = 600.0
CACHE_SECONDS = 130.0
"""A pause after which every client of a network filesystem sees what was there before it: twice 60 s, and a margin."""

_LOCAL_FUSE = frozenset({"fuse.mergerfs", "fuse.bindfs", "fuse.fuse-overlayfs", "fuse.unionfs", "fuse.ntfs-3g"})
_DELETE_BATCH = 1000
_POLL_SECONDS = 1.0
_TAKE_ID = slice(33, 57)  # in a blob key: behind 32 digits and a dash


def plan_gc(
    repository: Repository,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    clock: Clock = SYSTEM_CLOCK,
) -> GCPlan:
    """What a collection would delete now. Touches nothing.

    Raises:
        CollectorStoppedError: ``collect`` would stop.
        NewerFormatError: a newer version of the library uses this store.
    """
    return _Collector(repository, 0.0, force, progress, clock, None).plan()


def collect(
    repository: Repository,
    *,
    dry_run: bool = False,
    wait: float = DEFAULT_WAIT_SECONDS,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    clock: Clock = SYSTEM_CLOCK,
    mount: Mount | None = None,
) -> GCReport:
    """Delete every blob that nothing refers to. Safe beside any takes, restores and collectors.

    Args:
        repository: the store.
        dry_run: only plan; nothing is touched.
        wait: for how many seconds to wait for takes and restores that run now, if there is anything to delete.
        force: go on although whole folders of snapshots, or all snapshots, are gone since the last sweep.
        progress: told how far it is.
        clock: what waiting goes by.
        mount: the filesystem below ROOT; None looks.

    Returns:
        What was done. With keys in ``failed``, it did not finish.

    Raises:
        CollectorStoppedError: going on would not have been safe, or takes ran for longer than ``wait``; no blob was
            deleted.
        NewerFormatError: a newer version of the library uses this store.
        StoreError: the store could not be read or written.
        ValueError: ``wait`` is no number of seconds.
    """
    seconds: object = wait  # whoever is not checked by mypy may pass anything, and a NaN would never be over
    if not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"wait must be a number of seconds, 0 or more, not {seconds!r}")
    collector = _Collector(repository, wait, force, progress, clock, mount)
    if dry_run:
        plan = collector.plan()
        freed = sum(plan.condemned.values())
        return _report(plan, len(plan.condemned), freed, dry_run=True)
    return collector.run()


def _report(plan: GCPlan, freed_blobs: int, freed_nbytes: int, *, dry_run: bool) -> GCReport:
    return GCReport(
        dry_run=dry_run,
        kept_blobs=plan.num_blobs - freed_blobs,
        kept_nbytes=plan.nbytes - freed_nbytes,
        freed_blobs=freed_blobs,
        freed_nbytes=freed_nbytes,
        snapshots=plan.num_snapshots,
        uncommitted=plan.uncommitted,
        superseded=plan.superseded,
        foreign=plan.foreign,
        upstream=plan.upstream,
    )


class _Collector:
    def __init__(
        self,
        repository: Repository,
        wait: float,
        force: bool,
        progress: Progress,
        clock: Clock,
        mount: Mount | None,
    ) -> None:
        self._repository = repository
        self._backend = repository.backend
        self._wait = wait
        self._force = force
        self._progress = progress
        self._clock = clock
        self._store_clock = StoreClock(repository.backend, clock)
        self._pending = f"{PENDING_FOLDER}/{new_id()}"
        self._waited_for: list[str] = []
        self._called_dead: list[str] = []
        if repository.config.gc_level > GC_LEVEL:
            raise NewerFormatError(
                f"the store {repository.url} needs a newer collector (level {repository.config.gc_level}, this one "
                f"is {GC_LEVEL}): upgrade the library"
            )
        self._mount = _mount_of(repository) if mount is None else mount
        if self._mount.coherence is Coherence.BUCKET:
            raise CollectorStoppedError(
                f"{repository.url} is a bucket mounted as a folder ({self._mount.type}), which gives no promise "
                "that gc could rest on: name the bucket itself (s3://…, gs://…)"
            )

    # ---- planning

    def plan(self) -> GCPlan:
        """Steps 1 and 2."""
        backend = self._backend
        leases = lease_ids(backend)
        foreign: list[str] = []
        self._progress.start("listing blobs")
        blobs: dict[str, int] = {}
        for key, nbytes in self._repository.list_blobs(foreign):
            blobs[key] = nbytes
            self._progress.advance(nbytes)
        num_blobs, total = len(blobs), sum(blobs.values())
        self._progress.start("reading manifests")
        reading = read_roots(self._repository, lambda keys: _spare(blobs, keys), self._progress)
        self._progress.finish()
        if leases:
            _spare(blobs, [key for key in blobs if key[_TAKE_ID] in leases])
        self._check_reading(reading, blobs)
        walk = reading.walk
        return GCPlan(
            condemned=blobs,
            num_blobs=num_blobs,
            nbytes=total,
            roots=reading.roots,
            num_snapshots=len({ref.name for ref in walk.refs if ref.committed}),
            uncommitted=tuple(
                ref.object for ref in walk.roots if not ref.committed and ref.manifest.take_id not in leases
            ),
            superseded=tuple(superseded(walk.refs, leases)),
            foreign=(*foreign, *walk.foreign),
            upstream=walk.upstream,
        )

    def _check_reading(self, reading: Reading, condemned: dict[str, int]) -> None:
        """Stop where it looks as if manifests cannot be seen, unless somebody said that this is right."""
        if self._force or not condemned:
            return
        url = self._repository.url
        if not reading.roots:
            raise CollectorStoppedError(
                f"gc stopped: {url} holds blobs but not a single snapshot. If the snapshots really are deleted, and "
                "every disk below it is mounted, run gc with --force"
            )
        notes = housekeeping.read_removed(self._backend)
        explained = [root for roots in notes.values() for root in roots]
        known = housekeeping.newest_roots(self._backend)
        missing = missing_folders(known, explained, reading.take_ids, reading.folders)
        if missing:
            raise CollectorStoppedError(
                f"gc stopped: at the last sweep of {url} there were snapshots below {', '.join(map(repr, missing))}, "
                "and now nothing is there; an unmounted disk looks like that. Mount it; if the folders were deleted, "
                "run gc with --force"
            )

    # ---- collecting

    def run(self) -> GCReport:
        """All steps."""
        backend = self._backend
        self._called_dead += housekeeping.bury_dead(backend, self._store_clock, self._clock)
        self._take_over()
        notes = housekeeping.read_removed(backend)
        damaged = housekeeping.read_damaged(backend)
        plan = self.plan()
        roots = plan.roots
        attempted: list[str] = []
        failed: dict[str, str] = {}
        doomed = dict(plan.condemned)
        if plan.condemned:
            self._publish(plan)
            try:
                self._wait_for_leases()
                roots = self._reread(doomed)
            except SnapshotError:
                self._withdraw(plan)
                raise
            attempted, failed = self._delete(doomed)
        if plan.condemned or self._is_news(roots):
            marker = housekeeping.put_marker(backend, "finished", frozenset(attempted), roots, self._clock)
            if plan.condemned:
                self._pause()
                housekeeping.throw_away(backend, [self._pending])
            # a note about something that is still there speaks of a removal that has not happened yet
            done = [key for key, noted in notes.items() if roots.isdisjoint(noted)]
            housekeeping.throw_away(backend, [*done, *housekeeping.old_markers(backend, marker)])
        self._forget_damaged(damaged)
        debris = housekeeping.temporary_debris(backend, self._store_clock)
        freed = [key for key in attempted if key not in failed]
        return replace(
            _report(plan, len(freed), sum(doomed[key] for key in freed), dry_run=False),
            waited_for=tuple(self._waited_for),
            called_dead=tuple(self._called_dead),
            temporary_files=housekeeping.throw_away(backend, debris),
            failed=failed,
        )

    def _take_over(self) -> None:
        """End the collections of dead collectors."""
        dead = housekeeping.dead_pending_sets(self._backend, self._store_clock)
        for found in dead:
            housekeeping.put_marker(self._backend, "taken over", found.keys, None, self._clock)
        if dead:
            self._pause()
            housekeeping.throw_away(self._backend, [found.object for found in dead])

    def _publish(self, plan: GCPlan) -> None:
        """Step 3."""
        try:
            self._backend.put(self._pending, PendingSet(current_process(), frozenset(plan.condemned)).pack())
        except SnapshotError as error:
            # it may be there all the same; another collector takes it over when this process has ended
            why = "gave no clear answer when its plan was published"
            if isinstance(error, StoreFullError):
                why = "has no room for its plan: move something else away first, or a snapshot's folder with rm -r"
            raise CollectorStoppedError(
                f"gc stopped before it deleted anything: {self._repository.url} {why} ({error})"
            ) from error
        self._pause()

    def _wait_for_leases(self) -> None:
        """Steps 4 and 5."""
        waiting = {held.id: held for held in read_leases(self._backend)}
        self._waited_for += [str(held) for held in waiting.values()]
        deadline = self._clock.monotonic() + self._wait
        if waiting:
            self._progress.start(f"waiting up to {self._wait:.0f} s for {'; '.join(self._waited_for)}")
        while True:
            waiting = {held.id: held for held in self._still_held(waiting)}
            if not waiting:
                self._progress.finish()
                return
            if self._clock.monotonic() >= deadline:
                raise CollectorStoppedError(
                    f"gc gave up after {self._wait:.0f} s and deleted nothing: it waited for "
                    f"{'; '.join(map(str, waiting.values()))}. Run it again later, or with a longer --wait"
                )
            self._clock.sleep(_POLL_SECONDS)

    def _still_held(self, waiting: dict[str, HeldLease]) -> Iterable[HeldLease]:
        if not waiting:
            return
        modified = {held.id: held.modified for held in read_leases(self._backend)}
        for held in waiting.values():
            if held.id not in modified and self._is_gone(held):
                continue
            # a heartbeat that was under way may put the lease of a dead take back: the mark decides
            if held.is_take and is_marked_dead(self._backend, held.id):
                continue
            current = replace(held, modified=modified.get(held.id, held.modified))
            if may_be_called_dead(current, self._store_clock):
                call_dead(self._backend, current, self._clock)
                self._called_dead.append(str(current))
                continue
            yield current

    def _is_gone(self, held: HeldLease) -> bool:
        """A lease that a listing lacks is asked for by name: a listing that runs beside a rename may miss one."""
        try:
            self._backend.stat(f"{LEASES_FOLDER}/{held.id}")
        except KeyAbsentError:
            return True
        return False

    def _reread(self, doomed: dict[str, int]) -> frozenset[Root]:
        """Steps 6 and 7: spare what is referenced by now, and see that no other collector has taken over."""
        self._pause()
        self._progress.start("reading manifests again")
        reading = read_roots(self._repository, lambda keys: _spare(doomed, keys), self._progress)
        self._progress.finish()
        self._check_reading(reading, doomed)
        try:
            self._backend.stat(self._pending)
        except KeyAbsentError as error:
            raise CollectorStoppedError(
                f"gc stopped before it deleted anything: another collector of {self._repository.url} took this one for "
                "dead"
            ) from error
        return reading.roots

    def _withdraw(self, plan: GCPlan) -> None:
        """Give up: marker first, then the pending set. If that fails too, another collector does it."""
        try:
            housekeeping.put_marker(self._backend, "gave up", frozenset(), plan.roots, self._clock)
            self._pause()
            housekeeping.throw_away(self._backend, [self._pending])
        except SnapshotError as error:
            logger.warning("could not withdraw the pending set %s: %s", self._pending, error)

    def _delete(self, doomed: dict[str, int]) -> tuple[list[str], dict[str, str]]:
        """Step 8. Returns the keys that were tried, and those that could not be deleted with the reason."""
        self._progress.start("deleting blobs", sum(doomed.values()))
        attempted: list[str] = []
        failed: dict[str, str] = {}
        keys = sorted(doomed)
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = keys[start : start + _DELETE_BATCH]
            attempted += batch
            refused = self._repository.delete_blobs(batch)
            failed.update(refused)
            self._progress.advance(sum(doomed[key] for key in batch), len(batch))
            if len(refused) == len(batch):
                break  # the store refuses everything: asking on only takes time
        self._progress.finish()
        return attempted, failed

    def _is_news(self, roots: frozenset[Root]) -> bool:
        """Whether the last marker, which the next collector compares with, names other snapshots."""
        try:
            return roots != frozenset(housekeeping.newest_roots(self._backend))
        except CollectorStoppedError:
            if self._force:
                return True  # a readable one takes its place, else --force would not cure what it is offered for
            raise

    def _forget_damaged(self, damaged: dict[str, frozenset[str]]) -> None:
        """Damaged sets go when none of their blobs is left."""
        gone = [
            key for key, keys in damaged.items() if all(self._repository.blob_nbytes(blob) is None for blob in keys)
        ]
        housekeeping.throw_away(self._backend, gone)

    def _pause(self) -> None:
        """Let the caches of a network filesystem run out."""
        if _is_cached(self._mount):
            self._progress.start(f"waiting {CACHE_SECONDS:.0f} s for the caches of {self._mount.type}")
            self._clock.sleep(CACHE_SECONDS)
            self._progress.finish()


def _spare(doomed: dict[str, int], keys: Iterable[str]) -> None:
    for key in keys:
        doomed.pop(key, None)


def _mount_of(repository: Repository) -> Mount:
    backend = repository.backend
    return backend.mount if isinstance(backend, LocalBackend) else Mount(Coherence.LOCAL, "")


def _is_cached(mount: Mount) -> bool:
    """Whether another client's change may be seen late. A FUSE filesystem that nobody knows is taken to be one."""
    is_fuse = mount.type == "fuse" or mount.type.startswith("fuse.")
    return mount.coherence is Coherence.CACHED or (is_fuse and mount.type not in _LOCAL_FUSE)
