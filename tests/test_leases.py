"""Sessions of takes and restores: lease, evidence, commit, heartbeat, end."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults import Failing, FailNth, Recording, WrappingBackend
from tiny_takes import Time, chunk_of, manifest_of, new_store, protocol_objects, reopened, take, write_blobs

from torchsnapshot.errors import (
    CommitUnknownError,
    FormatError,
    LeaseLostError,
    ReadOnlyError,
    SnapshotError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from torchsnapshot.store import durable_names
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.gc import collect
from torchsnapshot.store.keys import SIGNPOST, ManifestName, new_id
from torchsnapshot.store.leases import TakeSession, read_condemned, read_evidence, reading, start_take, writing
from torchsnapshot.store.liveness import StoreClock, call_dead, is_marked_dead, may_be_called_dead, read_leases
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.processes import current_process, is_gone
from torchsnapshot.store.records import (
    CONFIG_OBJECT,
    DAMAGED_FOLDER,
    DEAD_FOLDER,
    LEASES_FOLDER,
    PENDING_FOLDER,
    SWEEPS_FOLDER,
    Config,
    PendingSet,
)
from torchsnapshot.store.repository import Repository


def begin(repository: Repository, name: str = "step") -> TakeSession:
    """A take without a heartbeat of its own."""
    return start_take(repository, name, clock=Time(), heartbeat_seconds=None)


def commit(session: TakeSession, content: bytes = b"content") -> ManifestName:
    """Write one blob and commit."""
    refs = write_blobs(session, [content])
    return session.commit(manifest_of(session.repository, session.take_id, refs)).manifest


def mark_dead(repository: Repository, session: TakeSession) -> None:
    """Somebody calls this take dead."""
    (held,) = [held for held in read_leases(repository.backend) if held.id == session.take_id]
    call_dead(repository.backend, held, Time())


def test_the_lease_comes_before_everything_else_and_the_sweeps_around_the_sets() -> None:
    """Nothing seen before the lease is evidence."""
    repository = new_store()
    backend = Recording(repository.backend)
    with begin(reopened(repository, backend)) as session:
        assert backend.operations == [
            ("put", f"{LEASES_FOLDER}/{session.take_id}"),
            ("read", CONFIG_OBJECT),
            ("list", SWEEPS_FOLDER),
            ("list", PENDING_FOLDER),
            ("list", DAMAGED_FOLDER),
            ("list", SWEEPS_FOLDER),
        ]
    assert backend.operations[6:] == [("delete", f"{LEASES_FOLDER}/{session.take_id}")]


def test_the_commit_keeps_its_order() -> None:
    """Check, list, manifest, check, .ok, signpost, then the older generation with its .ok first."""
    repository = new_store()
    older = take(repository, "step", b"old").object
    backend = Recording(repository.backend)
    with begin(reopened(repository, backend)) as session:
        refs = write_blobs(session, [b"content"])
        backend.operations.clear()
        ref = session.commit(manifest_of(repository, session.take_id, refs))
        assert backend.operations == [
            ("stat", f"{DEAD_FOLDER}/{session.take_id}"),
            ("list", "step/.manifests"),
            ("put", ref.object),
            ("stat", f"{DEAD_FOLDER}/{session.take_id}"),
            ("put", f"{ref.object}.ok"),
            ("put", f"step/{SIGNPOST}"),
            ("delete", f"{older}.ok"),
            ("delete", older),
        ]


def test_evidence_holds_pending_and_damaged_keys_and_the_sweeps() -> None:
    """What a collector has condemned, and what was found damaged, is no evidence."""
    repository = new_store()
    pending, damaged = chunk_of(b"1", new_id()).key, chunk_of(b"2", new_id()).key
    repository.backend.put(f"{PENDING_FOLDER}/x", PendingSet(current_process(), frozenset({pending})).pack())
    repository.mark_damaged([damaged])
    repository.backend.put(f"{SWEEPS_FOLDER}/y", b"not read by a take")
    evidence = read_evidence(repository)
    assert evidence.usable
    assert evidence.condemned == {pending, damaged}
    assert evidence.sweeps == {"y"}
    assert read_condemned(repository, evidence.sets) == evidence.condemned


def test_an_unreadable_condemned_set_makes_a_take_reuse_nothing() -> None:
    """What may be condemned is unknown, so everything may be."""
    repository = new_store()
    repository.backend.put(f"{PENDING_FOLDER}/x", b"rubbish")
    with begin(repository) as session:
        assert not session.evidence.usable
    down = Failing(repository.backend, lambda operation, key: operation == "read" and key.startswith(PENDING_FOLDER))
    assert not read_evidence(reopened(repository, down)).usable


def test_a_set_that_vanishes_makes_the_reading_start_again() -> None:
    """Its collector has finished: that sweep must be among the sweeps, so all is listed anew."""
    repository = new_store()
    key = f"{PENDING_FOLDER}/x"
    repository.backend.put(key, PendingSet(current_process(), frozenset()).pack())

    def finish(operation: str, wanted: str) -> bool:
        if operation == "read" and wanted == key:
            repository.backend.put(f"{SWEEPS_FOLDER}/x", b"")
            repository.backend.delete([key])
        return False

    backend = Recording(Failing(repository.backend, finish))
    evidence = read_evidence(reopened(repository, backend))
    assert evidence.sweeps == {"x"}
    assert evidence.sets == ()
    assert backend.operations.count(("list", PENDING_FOLDER)) == 2


def test_sets_that_vanish_for_ever_end_in_no_reuse() -> None:
    """A take never waits for collectors."""
    repository = new_store()

    class Ghost(WrappingBackend):
        def list(self, prefix: str) -> object:  # type: ignore[override]
            found = list(super().list(prefix))
            return iter([*found, replace(self.stat(CONFIG_OBJECT), key=f"{PENDING_FOLDER}/ghost")])

    assert not read_evidence(reopened(repository, Ghost(repository.backend))).usable


def test_a_take_uses_the_config_that_it_reads_after_its_lease() -> None:
    """Who lost the race for the config goes by the winner's."""
    repository = new_store()
    stale = reopened(repository)
    repository.backend.put(CONFIG_OBJECT, Config("b" * 24, 1 << 20).pack())
    with begin(stale):
        assert stale.store_id == "b" * 24
        assert stale.chunk_nbytes == 1 << 20


def test_a_session_that_cannot_begin_leaves_no_lease() -> None:
    """An error after the lease takes the lease away again."""
    repository = new_store()
    repository.backend.put(CONFIG_OBJECT, b"rubbish")
    with pytest.raises(FormatError):
        begin(repository)
    assert protocol_objects(repository.backend) == []
    with pytest.raises(ValueError, match="passed over"):
        begin(repository, "run/.snapshots/step")


def test_the_lease_goes_with_its_session_also_after_an_error() -> None:
    """A failing take blocks no collector."""
    repository = new_store()

    def fail() -> None:
        with writing(repository, "step", heartbeat_seconds=None):
            assert len(protocol_objects(repository.backend)) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert protocol_objects(repository.backend) == []


@pytest.mark.parametrize("is_local", [True, False])
def test_the_lease_stays_while_a_write_may_be_under_way(is_local: bool) -> None:
    """On a remote store a put without an answer may land later; on a local one it cannot."""
    repository = new_store()
    backend = Failing(repository.backend, lambda operation, key: operation == "put" and "/.manifests/" in key)
    backend.is_local = is_local
    session = begin(reopened(repository, backend))
    with pytest.raises(StoreUnavailableError):
        commit(session)
    session.close()
    assert len(protocol_objects(repository.backend)) == (0 if is_local else 1)
    assert repository.manifests_of("step") == []


@pytest.mark.parametrize("is_read", [True, False])
def test_ctrl_c_while_a_session_begins_leaves_no_heartbeat(is_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its thread would renew a lease that nobody can end, and every gc would wait for that in vain."""
    repository = new_store()
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (reading if is_read else start_take)(repository, "step")
    (thread,) = started
    thread.join()
    assert protocol_objects(repository.backend) == []


def test_ctrl_c_while_the_lease_is_put_leaves_none(tmp_path: Path) -> None:
    """On a local store it is known that nothing lands later."""

    class Interrupted(WrappingBackend):
        def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
            found = call()
            if operation == "put" and key.startswith(LEASES_FOLDER):
                raise KeyboardInterrupt
            return found

    repository = Repository.create_or_open(LocalBackend(str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        start_take(reopened(repository, Interrupted(repository.backend)), "step")
    assert protocol_objects(repository.backend) == []


def test_a_session_commits_once_and_not_after_its_end() -> None:
    """What has ended holds no lease, so it must not commit."""
    repository = new_store()
    with begin(repository) as session:
        commit(session)
        with pytest.raises(SnapshotError, match="has ended"):
            commit(session)
    with begin(repository) as session:
        pass
    session.close()
    with pytest.raises(SnapshotError, match="has ended"):
        commit(session)


def test_a_take_that_was_called_dead_commits_nothing() -> None:
    """The first check saves it the writing; a late heartbeat changes nothing about it."""
    repository = new_store()
    with begin(repository) as session:
        mark_dead(repository, session)
        repository.backend.put(f"{LEASES_FOLDER}/{session.take_id}", b"a heartbeat that lands late")
        with pytest.raises(LeaseLostError, match="take the snapshot again"):
            commit(session)
    assert repository.manifests_of("step") == []
    assert protocol_objects(repository.backend) == []


def test_a_take_that_is_called_dead_while_it_commits_removes_its_own_manifest_only() -> None:
    """The older generation stays, committed."""
    repository = new_store()
    older = take(repository, "step", b"old")

    def kill(operation: str, key: str) -> bool:
        if operation == "put" and key.startswith("step/.manifests/"):
            mark_dead(repository, session)
        return False

    session = begin(reopened(repository, Failing(repository.backend, kill)))
    with session, pytest.raises(LeaseLostError):
        commit(session)
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest == older.manifest
    assert len(repository.manifests_of("step")) == 1


def test_no_answer_to_the_second_check_is_an_unknown_commit() -> None:
    """The manifest stays, so whatever the truth is, its blobs stay."""
    repository = new_store()
    backend = FailNth(repository.backend, "stat", 1)
    with begin(reopened(repository, backend)) as session, pytest.raises(CommitUnknownError, match="called dead"):
        commit(session)
    assert [ref.committed for ref in repository.manifests_of("step")] == [False]


def put_of_ok(operation: str, key: str) -> bool:
    """Whether this is the put of an .ok."""
    return operation == "put" and key.endswith(".ok")


def test_a_lost_answer_to_the_ok_is_looked_up() -> None:
    """It is there, so the take is a success."""
    repository = new_store()
    with begin(reopened(repository, Failing(repository.backend, put_of_ok, done=True))) as session:
        manifest = commit(session)
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest == manifest


def test_an_ok_that_may_not_outlive_a_power_failure_is_an_unknown_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is there when the fsync of its folder fails; the older generation stays for whoever comes back."""
    repository = Repository.create_or_open(LocalBackend(str(tmp_path)))
    older = take(repository, "step", b"old")
    fsync_folder = durable_names.fsync_folder

    def failing(path: str) -> int:
        if list(Path(path).glob("000002-*.ok")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fsync_folder(path)

    monkeypatch.setattr(durable_names, "fsync_folder", failing)
    with begin(repository) as session, pytest.raises(CommitUnknownError, match="Input/output error"):
        commit(session)
    assert older.manifest in [ref.manifest for ref in repository.manifests_of("step") if ref.committed]


def test_no_answer_to_the_ok_is_an_unknown_commit() -> None:
    """The message says where to look; the lease stays, the manifest too."""
    repository = new_store()
    session = begin(reopened(repository, Failing(repository.backend, put_of_ok)))
    with session, pytest.raises(CommitUnknownError, match=r"000001-[0-9a-f]{24}\.ok is there"):
        commit(session)
    assert [ref.committed for ref in repository.manifests_of("step")] == [False]
    assert len(protocol_objects(repository.backend)) == 1


def test_a_full_local_disk_at_the_last_moment_is_a_clear_failure() -> None:
    """A local put that was refused cannot land later."""
    repository = new_store()
    backend = Failing(repository.backend, put_of_ok, lambda: StoreFullError("no space"))
    backend.is_local = True
    with begin(reopened(repository, backend)) as session, pytest.raises(StoreFullError):
        commit(session)
    assert repository.manifests_of("step") == []
    assert protocol_objects(repository.backend) == []


@pytest.mark.parametrize(
    "should_fail",
    [
        lambda operation, key: operation == "put" and key.endswith(SIGNPOST),
        lambda operation, key: operation == "delete" and "/.manifests/" in key,
    ],
)
def test_what_follows_the_ok_can_only_warn(
    should_fail: Callable[[str, str], bool], caplog: pytest.LogCaptureFixture
) -> None:
    """The take is a success, whatever becomes of the signpost and of older generations."""
    repository = new_store()
    take(repository, "step", b"old")
    with (
        caplog.at_level(logging.WARNING),
        begin(reopened(repository, Failing(repository.backend, should_fail))) as session,
    ):
        manifest = commit(session)
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest == manifest
    assert "is committed, but" in caplog.text


def test_a_generation_that_nothing_follows_is_refused() -> None:
    """A hostile file name does not make a take commit where no reader looks."""
    repository = new_store()
    repository.backend.put(f"step/.manifests/{'9' * 15}-{'a' * 24}", b"")
    with begin(repository) as session, pytest.raises(FormatError, match="no number follows"):
        commit(session)


def test_takes_of_one_path_commit_in_the_order_of_their_starts() -> None:
    """The later one waits for the earlier one; one of another path does not."""
    repository = new_store()
    first, second, other = begin(repository), begin(repository), begin(repository, "other")
    commit(other)
    done: list[ManifestName] = []
    thread = threading.Thread(target=lambda: done.append(commit(second, b"second")))
    thread.start()
    earlier = commit(first, b"first")
    thread.join()
    assert [earlier.generation, done[0].generation] == [1, 2]
    for session in (first, second, other):
        session.close()


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_take_that_ends_or_is_forgotten_holds_up_nobody(forgotten: bool) -> None:
    """A later one of the same path commits."""
    repository = new_store()
    first, second = begin(repository), begin(repository)
    if forgotten:
        del first
        gc.collect()
    else:
        first.close()
    assert commit(second).generation == 1
    second.close()


@pytest.mark.parametrize("is_local", [True, False])
def test_a_heartbeat_renews_the_lease_by_the_stores_clock(is_local: bool) -> None:
    """Locally by a touch, elsewhere by putting it again."""
    time = Time()
    repository = new_store(time)
    backend = Recording(repository.backend)
    backend.is_local = is_local
    with start_take(reopened(repository, backend), "step", heartbeat_seconds=None) as session:
        time.seconds += 100
        session.beat()
        (held,) = read_leases(repository.backend)
        assert held.modified == time.seconds
        assert backend.operations[-1][0] == ("touch" if is_local else "put")
        session.check_alive()


def test_a_heartbeat_puts_a_lost_lease_back_but_not_a_dead_one() -> None:
    """The mark decides, not the lease."""
    repository = new_store()
    backend = Recording(repository.backend)
    backend.is_local = True
    with begin(reopened(repository, backend)) as session:
        repository.backend.delete([f"{LEASES_FOLDER}/{session.take_id}"])
        session.beat()
        assert len(read_leases(repository.backend)) == 1
        mark_dead(repository, session)
        session.beat()
        assert read_leases(repository.backend) == []
        with pytest.raises(LeaseLostError):
            session.check_alive()


def test_the_heartbeat_runs_by_itself_and_survives_errors() -> None:
    """A store that is away for a while costs nothing."""
    beats = threading.Semaphore(0)
    repository = new_store()

    def fail(operation: str, key: str) -> bool:
        if operation == "stat" and key.startswith(DEAD_FOLDER):
            beats.release()
            return True
        return False

    with start_take(reopened(repository, Failing(repository.backend, fail)), "step", heartbeat_seconds=0.001):
        for _ in range(3):
            assert beats.acquire(timeout=60)


def test_a_forgotten_session_gives_up_its_lease() -> None:
    """Its heartbeat's thread deletes it."""
    gone = threading.Event()
    repository = new_store()

    class Watched(WrappingBackend):
        def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
            found = super().around(operation, key, call)
            if operation == "delete":
                gone.set()
            return found

    session = start_take(reopened(repository, Watched(repository.backend)), "step", heartbeat_seconds=0.001)
    del session
    gc.collect()
    assert gone.wait(timeout=60)
    assert protocol_objects(repository.backend) == []


def test_a_restore_holds_a_read_lease() -> None:
    """It is there inside the block, and only there."""
    repository = new_store()
    with reading(repository, "step", heartbeat_seconds=None) as session:
        (held,) = read_leases(repository.backend)
        assert held.id == session.lease_id
        assert not held.is_take
        assert str(held).startswith("restore")
    assert protocol_objects(repository.backend) == []


@pytest.mark.parametrize("error", [ReadOnlyError("read-only"), StoreFullError("full")])
def test_a_restore_goes_on_without_a_lease_where_it_cannot_write(error: StoreError) -> None:
    """A full or read-only store can still be read."""
    repository = new_store()
    take(repository, "step", b"content")
    backend = Failing(repository.backend, lambda operation, key: operation == "put", lambda: error)
    with reading(reopened(repository, backend), "step") as session:
        assert session.lease_id is None
        session.beat()
        assert session.repository.newest_committed("step") is not None


def test_a_read_lease_that_is_called_dead_gets_no_mark() -> None:
    """It can commit nothing, so nothing must look for a mark."""
    repository = new_store()
    with reading(repository, "step", heartbeat_seconds=None) as session:
        assert session.lease_id is not None
        (held,) = read_leases(repository.backend)
        call_dead(repository.backend, held, Time())
        assert not is_marked_dead(repository.backend, session.lease_id)
        assert read_leases(repository.backend) == []


def test_a_lease_is_dead_an_hour_after_its_last_heartbeat_by_the_stores_clock() -> None:
    """The host's clock, fast or slow, has no part in it."""
    time, host = Time(), Time(5.0)
    repository = new_store(time)
    with begin(repository) as session:
        (held,) = read_leases(repository.backend)
        time.seconds += 3599
        assert not may_be_called_dead(held, StoreClock(repository.backend, host))
        time.seconds += 2
        assert may_be_called_dead(held, StoreClock(repository.backend, host))
        session.beat()
        (held,) = read_leases(repository.backend)
        assert not may_be_called_dead(held, StoreClock(repository.backend, host))
    assert list(repository.backend.list(".torchsnapshot/tmp")) == []


def test_an_unreadable_lease_counts_as_a_take_until_the_hour_is_over() -> None:
    """In doubt it lives, and in doubt it gets a mark."""
    time = Time()
    repository = new_store(time)
    repository.backend.put(f"{LEASES_FOLDER}/{'a' * 24}", b"rubbish")
    (held,) = read_leases(repository.backend)
    assert held.is_take
    assert not may_be_called_dead(held, StoreClock(repository.backend, time))
    time.seconds += 3601
    assert may_be_called_dead(held, StoreClock(repository.backend, Time()))


def test_only_a_process_of_this_host_boot_and_namespace_can_be_seen_to_be_gone() -> None:
    """Anything else is somebody else's process, which lives until the hour is over."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    here = current_process()
    gone = replace(here, pid=child.pid, start_time=1)
    child.wait()
    assert is_gone(gone)
    assert not is_gone(here)
    assert is_gone(replace(here, start_time=here.start_time + 1))
    assert not is_gone(replace(gone, host="elsewhere"))
    assert not is_gone(replace(gone, boot_id="another boot"))
    assert not is_gone(replace(gone, pid_namespace="pid:[1]"))
    assert not is_gone(replace(here, start_time=0))


def test_a_process_that_ended_and_was_not_waited_for_is_gone() -> None:
    """A zombie takes no snapshots."""
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=read_end, stdout=subprocess.PIPE
    ) as child:
        os.close(read_end)
        fields = Path(f"/proc/{child.pid}/stat").read_bytes().rpartition(b")")[2].split()
        process = replace(current_process(), pid=child.pid, start_time=int(fields[19]))
        assert not is_gone(process)
        os.close(write_end)
        assert child.stdout is not None
        child.stdout.read()  # ends when the child does
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(process)


SCRIPT = """
import os, sys
from torchsnapshot.errors import SnapshotError
from torchsnapshot.store.leases import start_take
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.repository import Repository

repository = Repository.create_or_open(LocalBackend(sys.argv[1]))
session = start_take(repository, "step")
repository.put_blob("ab" * 16 + "-" + session.take_id + "-0", b"debris")
leases = os.path.join(sys.argv[1], ".torchsnapshot", "leases")
"""


def run_script(root: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a process that has begun a take."""
    command = [sys.executable, "-c", SCRIPT + text, str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_that_exits_leaves_no_lease(tmp_path: Path) -> None:
    """Also when nobody ended the session."""
    result = run_script(tmp_path, "")
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path / ".torchsnapshot" / "leases") == []


def test_a_forked_child_neither_commits_nor_ends_its_parents_take(tmp_path: Path) -> None:
    """The session belongs to the process that opened it."""
    result = run_script(
        tmp_path,
        """
if os.fork() == 0:
    try:
        session.commit(b"")
    except SnapshotError as error:
        assert "forked child" in str(error)
        session.close()
        sys.exit(7)
status = os.waitstatus_to_exitcode(os.wait()[1])
assert status == 7, status
assert len(os.listdir(leases)) == 1
session.close()
assert os.listdir(leases) == []
""",
    )
    assert result.returncode == 0, result.stderr


def test_a_killed_process_is_called_dead_at_once(tmp_path: Path) -> None:
    """gc need not wait for the hour: the process is gone, so its debris goes too."""
    result = run_script(tmp_path, "os.kill(os.getpid(), 9)")
    assert result.returncode == -signal.SIGKILL
    repository = Repository.open(LocalBackend(str(tmp_path)))
    (held,) = read_leases(repository.backend)
    take(repository, "other", b"content")
    report = collect(repository, wait=0)
    assert report.freed_blobs == 1
    assert len(report.called_dead) == 1
    assert is_marked_dead(repository.backend, held.id)
    assert protocol_objects(repository.backend) == []


def test_a_backend_without_conditional_puts_is_enough() -> None:
    """No step of a take needs more than plain puts."""
    repository = new_store()

    class Plain(WrappingBackend):
        def put(self, key: str, data: object, *, if_absent: bool = False, aligned: bool = False) -> None:
            super().put(key, data)  # type: ignore[arg-type]

    backend: Backend = Plain(repository.backend)
    with begin(Repository.create_or_open(backend)) as session:
        commit(session)
    assert repository.newest_committed("step") is not None
