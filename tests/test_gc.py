"""The collector: what it frees, whom it waits for, when it stops."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults import Failing, FailNth, Recording, WrappingBackend
from tiny_takes import (
    Time,
    blobs_of,
    chunk_of,
    drop_ok,
    keys_of,
    manifest_of,
    missing_blobs,
    new_store,
    protocol_objects,
    reopened,
    take,
    write_blobs,
)

from torchsnapshot.errors import CollectorStoppedError, KeyAbsentError, StoreError
from torchsnapshot.store.backend import Folder
from torchsnapshot.store.envelope import ChunkTableBuilder, Form, ManifestFile, TableReference, pack_manifest
from torchsnapshot.store.gc import collect, plan_gc
from torchsnapshot.store.keys import OK_SUFFIX, new_id
from torchsnapshot.store.leases import reading, start_take
from torchsnapshot.store.liveness import is_marked_dead
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.mounts import Coherence, Mount
from torchsnapshot.store.processes import current_process
from torchsnapshot.store.records import (
    DAMAGED_FOLDER,
    LEASES_FOLDER,
    PENDING_FOLDER,
    REMOVED_FOLDER,
    SWEEPS_FOLDER,
    Lease,
    PendingSet,
    Sweep,
)
from torchsnapshot.store.repository import Repository

DAY = 24 * 3600.0


@pytest.fixture
def time() -> Time:
    """The store's clock and the collector's."""
    return Time()


@pytest.fixture
def repository(time: Time) -> Repository:
    """A store with two snapshots that share a blob, and the garbage of a third."""
    found = new_store(time)
    take(found, "one", b"shared", b"first", time=time)
    take(found, "two", b"shared", b"second", time=time)
    take(found, "gone", b"shared", b"garbage", time=time)
    found.delete_snapshot("gone")
    return found


def sweeps(repository: Repository) -> list[Sweep]:
    """The markers there are, oldest first."""
    infos = sorted(repository.backend.list(SWEEPS_FOLDER), key=lambda info: info.modified)
    return [Sweep.unpack(repository.backend.read(info.key)) for info in infos]


def stops(repository: Repository, time: Time, match: str) -> None:
    """The collector stops for this reason and deletes no blob; so does the plan."""
    before = blobs_of(repository.backend)
    with pytest.raises(CollectorStoppedError, match=match):
        plan_gc(repository, clock=time)
    with pytest.raises(CollectorStoppedError, match=match):
        collect(repository, clock=time)
    assert blobs_of(repository.backend) == before


def test_with_nobody_writing_space_is_free_at_once(repository: Repository, time: Time) -> None:
    """One go, without any waiting; the report counts blobs and bytes."""
    report = collect(repository, clock=time)
    assert (report.freed_blobs, report.freed_nbytes) == (1, len(b"garbage"))
    assert (report.kept_blobs, report.kept_nbytes) == (3, len(b"shared") + len(b"first") + len(b"second"))
    assert (report.snapshots, report.failed, report.waited_for) == (2, {}, ())
    assert time.slept == []
    assert missing_blobs(repository) == {}
    assert protocol_objects(repository.backend) == []
    assert [sweep.outcome for sweep in sweeps(repository)] == ["finished"]
    assert {name for name, _ in sweeps(repository)[0].roots or ()} == {"one", "two"}


def test_a_dry_run_touches_nothing(repository: Repository, time: Time) -> None:
    """It reports what a run would do, and changes no object."""
    backend = Recording(repository.backend)
    report = collect(reopened(repository, backend), dry_run=True, clock=time)
    assert report.dry_run
    assert (report.freed_blobs, report.freed_nbytes) == (1, len(b"garbage"))
    assert {operation for operation, _ in backend.operations} <= {"list", "read", "stat"}
    real = collect(repository, clock=time)
    assert replace(real, dry_run=True) == report


def test_a_second_run_has_nothing_to_do(repository: Repository, time: Time) -> None:
    """And it writes nothing, so that the indices of running jobs stay good."""
    collect(repository, clock=time)
    backend = Recording(repository.backend)
    report = collect(reopened(repository, backend), clock=time)
    assert report.freed_blobs == 0
    assert {operation for operation, _ in backend.operations} <= {"list", "read", "stat"}


def test_an_empty_store_is_collected(time: Time) -> None:
    """Nothing there, nothing to stop for."""
    assert collect(new_store(time), clock=time).freed_blobs == 0


def test_bases_and_table_blobs_are_kept(time: Time) -> None:
    """Everything that a restore needs is a reference: the closure of the bases, and the table itself."""
    repository = new_store(time)
    with start_take(repository, "step", clock=time, heartbeat_seconds=None) as session:
        base, junk = write_blobs(session, [b"base...", b"junk"])
        plain = chunk_of(b"delta..", session.take_id)
        delta = plain._replace(key=plain.key + ".d", form=Form.DELTA, base=base)
        builder = ChunkTableBuilder()
        builder.add([delta])
        table = builder.build().pack()
        blob = chunk_of(table, session.take_id)
        head = ManifestFile(manifest_of(repository, session.take_id, [delta])).head
        repository.put_blob(delta.key, b"delta..")
        repository.put_blob(blob.key + ".t", table)
        session.commit(pack_manifest(head, [TableReference(blob.key + ".t", len(table), blob.digest)], b""))
    collect(repository, clock=time)
    assert blobs_of(repository.backend) == {base.key, delta.key, blob.key + ".t"}
    assert junk.key not in blobs_of(repository.backend)


def test_a_manifest_without_its_ok_is_a_root_and_is_reported(repository: Repository, time: Time) -> None:
    """Its take may have been a moment from success."""
    ref = take(repository, "half", b"half", time=time)
    drop_ok(repository, ref)
    report = collect(repository, clock=time)
    assert report.uncommitted == (ref.object,)
    assert keys_of(repository, ref) <= blobs_of(repository.backend)


def test_an_older_generation_that_nobody_removed_is_reported(repository: Repository, time: Time) -> None:
    """A take that was killed between its ``.ok`` and its tidying leaves one; it keeps its blobs, and gc says so."""
    old = take(repository, "again", b"old", time=time)
    data = repository.read_manifest(old)
    new = take(repository, "again", b"new", time=time)
    repository.backend.put(old.object, data)
    repository.backend.put(old.object + OK_SUFFIX, b"")
    lease = f"{LEASES_FOLDER}/{new.manifest.take_id}"
    repository.backend.put(lease, Lease("take", current_process(), "again").pack())
    assert plan_gc(repository, clock=time).superseded == ()  # while the newer take lives, it still may
    repository.backend.delete([lease])
    report = collect(repository, clock=time)
    assert report.superseded == (old.object,)
    kept = keys_of(repository, old)
    assert kept <= blobs_of(repository.backend)
    take(repository, "again", b"newer", time=time)
    assert collect(repository, clock=time).superseded == ()
    assert not kept & blobs_of(repository.backend)


def test_a_failed_take_leaves_debris_for_gc(repository: Repository, time: Time) -> None:
    """What it wrote is freed as soon as its lease has gone, and not before."""
    with start_take(repository, "failed", clock=time, heartbeat_seconds=None) as session:
        write_blobs(session, [b"debris"])
        assert sorted(plan_gc(repository, clock=time).condemned.values()) == [len(b"garbage")]
    assert collect(repository, clock=time).freed_blobs == 2


class Impatient(Time):
    """A clock on which something happens while somebody sleeps."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self._then = then

    def sleep(self, seconds: float) -> None:
        """Move on, and let it happen."""
        super().sleep(seconds)
        self._then()


def test_gc_waits_for_takes_that_run(repository: Repository, time: Time) -> None:
    """A take that commits what was condemned meanwhile keeps it."""
    known = repository.manifests_of("one")
    session = start_take(repository, "three", clock=time, heartbeat_seconds=None)
    garbage = next(iter(plan_gc(repository, clock=time).condemned))
    ref = chunk_of(b"garbage", garbage[33:57])._replace(key=garbage)

    def end() -> None:
        session.commit(manifest_of(repository, session.take_id, [ref]))
        session.close()

    report = collect(repository, clock=Impatient(end))
    assert report.freed_blobs == 0
    assert len(report.waited_for) == 1
    assert "three" in report.waited_for[0]
    assert garbage in blobs_of(repository.backend)
    assert missing_blobs(repository) == {}
    assert known == repository.manifests_of("one")


def test_gc_waits_for_restores_that_run(repository: Repository, time: Time) -> None:
    """A snapshot that was removed while it is being read is read to its end."""
    with reading(repository, "gone", heartbeat_seconds=None) as session:
        report = collect(repository, clock=Impatient(session.close))
    assert report.freed_blobs == 1
    assert "restore" in report.waited_for[0]


def test_gc_gives_up_waiting_and_says_for_whom(repository: Repository, time: Time) -> None:
    """It deletes nothing, leaves no pending set, and a marker stands for the one that it had."""
    before = blobs_of(repository.backend)
    with (
        start_take(repository, "slow", clock=time, heartbeat_seconds=None),
        pytest.raises(CollectorStoppedError, match=r"gave up after 30 s .* take [0-9a-f]{24} of 'slow' by process"),
    ):
        collect(repository, wait=30, clock=time)
    assert 30 <= sum(time.slept) < 40
    assert blobs_of(repository.backend) == before
    assert protocol_objects(repository.backend) == []
    assert [(sweep.outcome, len(sweep.keys)) for sweep in sweeps(repository)] == [("gave up", 0)]


def test_a_take_whose_heart_stops_while_gc_waits_is_called_dead(repository: Repository, time: Time) -> None:
    """After an hour without a heartbeat gc goes on, and the take cannot succeed any more."""
    with start_take(repository, "stuck", clock=time, heartbeat_seconds=None) as session:
        report = collect(repository, wait=2 * 3600, clock=time)
        assert report.freed_blobs == 1
        assert [("stuck" in who) for who in report.called_dead] == [True]
        assert is_marked_dead(repository.backend, session.take_id)
    assert 3600 < sum(time.slept) < 3700


def test_a_late_heartbeat_of_a_dead_take_holds_up_nobody(repository: Repository, time: Time) -> None:
    """The mark decides, not the lease that is back."""
    with start_take(repository, "dead", clock=time, heartbeat_seconds=None) as session:
        lease = repository.backend.read(f"{LEASES_FOLDER}/{session.take_id}")
        repository.backend.put(f".torchsnapshot/gc/dead/{session.take_id}", b"")
        repository.backend.put(f"{LEASES_FOLDER}/{session.take_id}", lease)
        assert collect(repository, wait=0, clock=time).freed_blobs == 1


def test_an_unreadable_manifest_stops_gc(repository: Repository, time: Time) -> None:
    """Nobody knows what it needs; a newer one likewise."""
    ref = repository.manifests_of("one")[0]
    data = repository.backend.read(ref.object)
    for damage in (b"", data[:-1], b"\xff" + data[1:]):
        repository.backend.put(ref.object, damage)
        stops(repository, time, r"one/\.manifests/.* cannot be read")


def test_a_missing_table_blob_stops_gc(repository: Repository, time: Time) -> None:
    """A manifest without its tables names nothing."""
    table = ChunkTableBuilder().build().pack()
    blob = chunk_of(table, new_id())
    head = ManifestFile(manifest_of(repository, new_id(), [])).head
    data = pack_manifest(head, [TableReference(blob.key + ".t", len(table), blob.digest)], b"")
    repository.backend.put(f"tabled/.manifests/000001-{head.take_id}", data)
    stops(repository, time, r"tabled/\.manifests/.* cannot be read")


@pytest.mark.parametrize("folder", ["", "one", "one/.manifests", ".torchsnapshot/blobs", ".torchsnapshot/leases"])
def test_a_listing_that_fails_stops_gc(repository: Repository, time: Time, folder: str) -> None:
    """What is not seen is not nothing."""
    before = blobs_of(repository.backend)
    backend = Failing(repository.backend, lambda operation, key: operation == "list" and key == folder)
    with pytest.raises((CollectorStoppedError, StoreError)):
        collect(reopened(repository, backend), clock=time)
    assert blobs_of(repository.backend) == before


def test_blobs_without_any_snapshot_stop_gc_unless_forced(time: Time) -> None:
    """An unmounted disk looks like that."""
    repository = new_store(time)
    take(repository, "only", b"content", time=time)
    repository.delete_snapshot("only")
    stops(repository, time, "not a single snapshot")
    assert collect(repository, force=True, clock=time).freed_blobs == 1


def test_a_first_take_that_runs_does_not_stop_gc(time: Time) -> None:
    """Its blobs are its own."""
    repository = new_store(time)
    with start_take(repository, "first", clock=time, heartbeat_seconds=None) as session:
        write_blobs(session, [b"content"])
        assert collect(repository, clock=time).freed_blobs == 0


@pytest.fixture
def swept(time: Time) -> Repository:
    """A store whose last sweep saw two snapshots in one folder and one in another; since then some are gone."""
    found = new_store(time)
    for name in ("disk/a", "disk/b", "solo/c", "d"):
        take(found, name, name.encode(), time=time)
    take(found, "gone", b"garbage", time=time)
    found.delete_snapshot("gone")
    collect(found, clock=time)
    time.seconds += 60
    return found


def vanish(repository: Repository, name: str) -> None:
    """As rm -r, or an unmounted disk."""
    repository.backend.delete([info.key for info in repository.backend.list(name)])


def test_a_folder_of_snapshots_that_is_gone_stops_gc(swept: Repository, time: Time) -> None:
    """It names the folder; --force goes on."""
    vanish(swept, "disk")
    stops(swept, time, "below 'disk'")
    assert collect(swept, force=True, clock=time).freed_blobs == 2
    collect(swept, clock=time)


@pytest.mark.parametrize("names", [["solo"], ["disk/a"], ["disk/a", "d", "solo"]])
def test_single_snapshots_may_be_gone(swept: Repository, time: Time, names: list[str]) -> None:
    """People delete snapshots, and their folders with them."""
    for name in names:
        vanish(swept, name)
    assert collect(swept, clock=time).freed_blobs == len(names)


def test_what_was_deleted_through_the_library_is_explained(swept: Repository, time: Time) -> None:
    """The notes go with the sweep that they explain."""
    swept.delete_snapshot("disk/a")
    swept.delete_snapshot("disk/b")
    assert collect(swept, clock=time).freed_blobs == 2
    assert list(swept.backend.list(REMOVED_FOLDER)) == []


def test_a_folder_that_was_renamed_is_not_gone(swept: Repository, time: Time) -> None:
    """Its takes are there under another name."""
    for info in list(swept.backend.list("disk")):
        swept.backend.put(info.key.replace("disk", "moved"), swept.backend.read(info.key))
    vanish(swept, "disk")
    vanish(swept, "d")
    assert collect(swept, clock=time).freed_blobs == 1
    assert missing_blobs(swept) == {}


def test_an_unreadable_newest_marker_stops_gc(swept: Repository, time: Time) -> None:
    """Nobody knows what was there; --force goes on."""
    vanish(swept, "d")
    for info in swept.backend.list(SWEEPS_FOLDER):
        swept.backend.put(info.key, b"rubbish")
    stops(swept, time, "sweep marker")


def test_force_replaces_an_unreadable_marker(swept: Repository, time: Time) -> None:
    """Also where there is nothing to delete, so that the next gc need not be forced."""
    for info in swept.backend.list(SWEEPS_FOLDER):
        swept.backend.put(info.key, b"rubbish")
    with pytest.raises(CollectorStoppedError, match="--force"):
        collect(swept, clock=time)
    time.seconds += 1
    assert collect(swept, force=True, clock=time).freed_blobs == 0
    collect(swept, clock=time)


def test_a_note_stays_while_what_it_speaks_of_is_still_there(repository: Repository, time: Time) -> None:
    """A deletion that runs beside the sweep is explained to the next one."""
    note = FailNth(repository.backend, "delete", 0)
    with pytest.raises(StoreError):
        reopened(repository, note).delete_snapshot("one")
    collect(repository, clock=time)
    assert len(list(repository.backend.list(REMOVED_FOLDER))) == 1


def test_a_plan_that_cannot_be_published_stops_gc(repository: Repository, time: Time) -> None:
    """Whether it is there is unknown, so takes may not know it."""
    backend = Failing(repository.backend, lambda operation, key: operation == "put" and key.startswith(PENDING_FOLDER))
    before = blobs_of(repository.backend)
    with pytest.raises(CollectorStoppedError, match="no clear answer"):
        collect(reopened(repository, backend), clock=time)
    assert blobs_of(repository.backend) == before


def test_keys_that_cannot_be_deleted_are_reported(repository: Repository, time: Time) -> None:
    """They are not counted as freed, and the next run deletes them."""
    backend = Failing(repository.backend, lambda operation, key: operation == "delete" and "/blobs/" in key)
    report = collect(reopened(repository, backend), clock=time)
    assert (report.freed_blobs, report.kept_blobs) == (0, 4)
    assert list(report.failed.values()) == ["no answer"]
    assert protocol_objects(repository.backend) == []
    assert collect(repository, clock=time).freed_blobs == 1


def test_foreign_files_are_left_alone_and_reported(repository: Repository, time: Time) -> None:
    """A file whose name is no key is none of gc's business."""
    repository.backend.put(".torchsnapshot/blobs/ab/notes.txt", b"mine")
    report = collect(repository, clock=time)
    assert report.foreign == (".torchsnapshot/blobs/ab/notes.txt",)
    assert repository.backend.read(".torchsnapshot/blobs/ab/notes.txt") == b"mine"


class OneBlindList(WrappingBackend):
    """The first listing of ROOT misses a folder, as a scan beside a rename may."""

    def __init__(self, repository: Repository, folder: str) -> None:
        super().__init__(repository.backend)
        self._folder = folder

    def list_folder(self, prefix: str) -> Folder:
        """Blind once."""
        found = super().list_folder(prefix)
        if prefix == "" and self._folder in found.folders:
            folders = tuple(name for name in found.folders if name != self._folder)
            self._folder = ""
            return Folder(folders, found.objects)
        return found


def test_one_listing_is_not_enough(repository: Repository, time: Time) -> None:
    """A manifest that only the second listing shows is a root."""
    report = collect(reopened(repository, OneBlindList(repository, "two")), clock=time)
    assert report.freed_blobs == 1
    assert missing_blobs(repository) == {}


def test_listings_that_show_what_cannot_be_read_stop_gc(repository: Repository, time: Time) -> None:
    """It does not read for ever."""
    ghost = repository.manifests_of("one")[0].object
    backend = Failing(repository.backend, lambda operation, key: key == ghost, lambda: KeyAbsentError("no such object"))
    with pytest.raises(CollectorStoppedError, match="go on showing"):
        collect(reopened(repository, backend), clock=time)


def test_damaged_sets_go_when_their_blobs_are_gone(repository: Repository, time: Time) -> None:
    """Until then they keep takes from reusing these blobs."""
    garbage = next(iter(plan_gc(repository, clock=time).condemned))
    kept = next(iter(blobs_of(repository.backend) - {garbage}))
    repository.mark_damaged([garbage])
    repository.mark_damaged([kept])
    collect(repository, clock=time)
    assert len(list(repository.backend.list(DAMAGED_FOLDER))) == 1


def test_old_markers_go_except_for_the_newest(repository: Repository, time: Time) -> None:
    """Thirty days explain a missing blob; the newest says what was there last time."""
    collect(repository, clock=time)
    time.seconds += 31 * DAY
    assert collect(repository, clock=time).freed_blobs == 0
    assert len(sweeps(repository)) == 1
    repository.delete_snapshot("two")
    collect(repository, clock=time)
    assert len(sweeps(repository)) == 1
    assert {name for name, _ in sweeps(repository)[0].roots or ()} == {"one"}


def test_a_dead_collectors_pending_set_is_taken_over(repository: Repository, time: Time) -> None:
    """After an hour, or at once if its process is gone; a marker names what it may have deleted."""
    garbage = frozenset(plan_gc(repository, clock=time).condemned)
    here = current_process()
    live = f"{PENDING_FOLDER}/live"
    repository.backend.put(live, PendingSet(here, garbage).pack())
    dead = replace(here, start_time=here.start_time + 1)
    repository.backend.put(f"{PENDING_FOLDER}/dead", PendingSet(dead, garbage).pack())
    repository.backend.put(f"{PENDING_FOLDER}/unreadable", b"rubbish")
    collect(repository, clock=time)
    assert protocol_objects(repository.backend) == [live, f"{PENDING_FOLDER}/unreadable"]
    assert ("taken over", garbage) in [(sweep.outcome, sweep.keys) for sweep in sweeps(repository)]
    time.seconds += 3601
    collect(repository, clock=time)
    assert protocol_objects(repository.backend) == []


@pytest.mark.parametrize("kind", ["nfs", "fuse.unheard-of"])
def test_on_a_network_filesystem_gc_lets_the_caches_run_out(repository: Repository, time: Time, kind: str) -> None:
    """After publishing, before the second reading, and between marker and removing its set."""
    coherence = Coherence.CACHED if kind == "nfs" else Coherence.LOCAL
    assert collect(repository, clock=time, mount=Mount(coherence, kind)).freed_blobs == 1
    assert time.slept == [130.0, 130.0, 130.0]


def test_a_bucket_that_is_mounted_as_a_folder_is_refused(repository: Repository, time: Time) -> None:
    """It keeps none of the promises that gc rests on."""
    with pytest.raises(CollectorStoppedError, match="name the bucket itself"):
        collect(repository, clock=time, mount=Mount(Coherence.BUCKET, "fuse.s3fs"))


def test_temporary_files_of_takes_without_a_lease_go(tmp_path: Path) -> None:
    """Those of a take that runs stay, and so do young ones of nobody."""
    repository = Repository.create_or_open(LocalBackend(str(tmp_path), durable=False))
    take(repository, "one", b"content")
    folder = tmp_path / ".torchsnapshot" / "tmp"
    with start_take(repository, "two", heartbeat_seconds=None) as session:
        names = [f"{'a' * 24}-0-12345678", f"{session.take_id}-0-12345678", "anon-1-0-12345678", "anon-2-0-12345678"]
        for name in names:
            (folder / name).write_bytes(b"half")
        os.utime(folder / names[2], (1.0, 1.0))
        report = collect(repository)
        assert report.temporary_files == 2
        assert sorted(os.listdir(folder)) == sorted([names[1], names[3]])


def test_progress_is_told(repository: Repository, time: Time) -> None:
    """Every phase begins and ends."""

    class Watcher:
        def __init__(self) -> None:
            self.told: list[str] = []

        def start(self, label: str, total_nbytes: int | None = None) -> None:
            self.told.append(label)

        def advance(self, nbytes: int, items: int = 1) -> None:
            self.told.append("advance")

        def finish(self) -> None:
            self.told.append("finish")

    watcher = Watcher()
    collect(repository, clock=time, progress=watcher)
    labels = [word for word in watcher.told if word not in ("advance", "finish")]
    assert labels == ["listing blobs", "reading manifests", "reading manifests again", "deleting blobs"]
    assert watcher.told[-1] == "finish"
