"""Crashes at every store operation of a take, a collection and a deletion: nothing is lost, and the debris goes."""

from __future__ import annotations

import pytest
from faults import Crash, CrashAt
from interleaving import HOURS
from tiny_takes import Time, blobs_of, keys_of, missing_blobs, new_store, protocol_objects, reopened, take

from torchsnapshot.store import known
from torchsnapshot.store.gc import collect
from torchsnapshot.store.repository import Repository


def prepared() -> tuple[Time, Repository]:
    """A store with two snapshots that share content, and with debris for gc."""
    time = Time()
    repository = new_store(time)
    known.forget()
    take(repository, "one", b"shared", b"first", time=time)
    take(repository, "two", b"shared", b"second", time=time)
    take(repository, "gone", b"shared", b"garbage", time=time)
    repository.delete_snapshot("gone")
    return time, repository


@pytest.mark.parametrize("after", [False, True])
def test_a_take_may_crash_at_every_store_operation(after: bool) -> None:
    """Wherever a take stops: older snapshots are whole, it is committed and whole or not there, gc cleans up."""
    nth = 0
    crashed = True
    while crashed:
        time, repository = prepared()
        take(repository, "again", b"shared", b"old generation", time=time)
        backend = CrashAt(repository.backend, nth, after=after)
        known.forget()
        reported = False
        try:
            take(reopened(repository, backend), "again", b"shared", b"second", b"new", time=time)
            reported = True
        except Crash:
            pass
        crashed = backend.crashed
        nth += 1
        assert reported or crashed
        assert not missing_blobs(repository)
        newest = repository.newest_committed("again")
        assert newest is not None
        assert newest.manifest.generation == 2 or not reported
        time.seconds += 2 * HOURS
        known.forget()
        take(repository, "next", b"shared", b"third", time=time)
        report = collect(repository, clock=time)
        assert report.failed == {}
        assert not missing_blobs(repository)
        assert {info.name for info in repository.list_snapshots()} == {"one", "two", "again", "next"}
        assert protocol_objects(repository.backend) == []
    assert nth > 15


@pytest.mark.parametrize("after", [False, True])
def test_a_collector_may_crash_at_every_store_operation(after: bool) -> None:
    """Wherever a collector stops: every snapshot is whole, takes go on, and the next collector finishes its work."""
    nth = 0
    crashed = True
    while crashed:
        time, repository = prepared()
        backend = CrashAt(repository.backend, nth, after=after)
        try:
            collect(reopened(repository, backend), clock=time)
        except Crash:
            pass
        crashed = backend.crashed
        nth += 1
        assert not missing_blobs(repository)
        # the same process, which remembers what it took, and a new one
        take(repository, "three", b"shared", b"garbage", time=time)
        known.forget()
        take(repository, "four", b"shared", b"garbage", time=time)
        assert not missing_blobs(repository)
        time.seconds += 2 * HOURS
        repository.delete_snapshot("four")
        collect(repository, clock=time)
        collect(repository, clock=time)
        assert not missing_blobs(repository)
        assert protocol_objects(repository.backend) == []
        named: set[str] = set()
        for ref in repository.walk().refs:
            named |= keys_of(repository, ref)
        assert blobs_of(repository.backend) == named
    assert nth > 15


@pytest.mark.parametrize("after", [False, True])
def test_a_deletion_may_crash_at_every_store_operation(after: bool) -> None:
    """Wherever a deletion stops: the others are whole, no older generation comes back, deleting again finishes it."""
    nth = 0
    crashed = True
    while crashed:
        time, repository = prepared()
        first = take(repository, "three", b"shared", b"old generation", time=time)
        backend = CrashAt(repository.backend, nth, after=after)
        try:
            reopened(repository, backend).delete_snapshot("three")
        except Crash:
            pass
        crashed = backend.crashed
        nth += 1
        left = repository.newest_committed("three")
        assert left is None or left.manifest == first.manifest
        if repository.manifests_of("three"):
            repository.delete_snapshot("three")
        collect(repository, clock=time)
        assert not missing_blobs(repository)
        assert {info.name for info in repository.list_snapshots()} == {"one", "two"}
    assert nth > 4
