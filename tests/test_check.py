"""Depths 1 and 2 of verify: what is found, and that sound stores give nothing."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from faults import Failing
from tiny_takes import chunk_of, drop_blob, drop_ok, keys_of, new_store, protocol_objects, reopened, take, write_blobs

from torchsnapshot.errors import StoreError
from torchsnapshot.store.check import Problem, check_blobs, check_manifests
from torchsnapshot.store.keys import blob_object
from torchsnapshot.store.leases import start_take
from torchsnapshot.store.repository import Repository


@pytest.fixture
def repository() -> Repository:
    """A store with two snapshots that share a blob."""
    found = new_store()
    take(found, "one", b"shared", b"first")
    take(found, "two", b"shared", b"second")
    return found


def kinds(problems: Iterable[Problem]) -> list[tuple[str, str]]:
    """Kind and snapshot of each."""
    return sorted((problem.kind, problem.name) for problem in problems)


def test_a_sound_store_has_no_problems(repository: Repository) -> None:
    """Nothing is found, and nothing is left behind."""
    before = sorted(info.key for info in repository.backend.list(""))
    assert list(check_manifests(repository)) == []
    assert list(check_blobs(repository)) == []
    assert sorted(info.key for info in repository.backend.list("")) == before
    assert protocol_objects(repository.backend) == []


def test_every_flipped_bit_of_a_manifest_is_found(repository: Repository) -> None:
    """No byte of it is outside of every digest."""
    ref = repository.manifests_of("one")[0]
    data = repository.backend.read(ref.object)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        repository.backend.put(ref.object, bytes(damaged))
        found = list(check_manifests(repository))
        assert [problem.name for problem in found] == ["one"]
        assert found[0].kind in ("manifest", "newer")
    repository.backend.put(ref.object, data[:-1])
    assert kinds(check_manifests(repository)) == [("manifest", "one")]


def test_a_manifest_under_another_takes_name_is_found(repository: Repository) -> None:
    """The file's name and its head must agree."""
    one, two = repository.manifests_of("one")[0], repository.manifests_of("two")[0]
    repository.backend.put(one.object, repository.backend.read(two.object))
    assert kinds(check_manifests(repository)) == [("manifest", "one")]


def test_missing_and_truncated_blobs_are_found_in_every_snapshot_that_needs_them(repository: Repository) -> None:
    """Each snapshot that lost something is named, with the blob."""
    one, two = (keys_of(repository, repository.manifests_of(name)[0]) for name in ("one", "two"))
    (shared,) = one & two
    (second,) = two - one
    drop_blob(repository, shared)
    repository.backend.put(blob_object(second), b"sec")
    assert list(check_manifests(repository)) == []
    found = list(check_blobs(repository))
    assert kinds(found) == [("missing", "one"), ("missing", "two"), ("size", "two")]
    assert {problem.key for problem in found} == {shared, second}
    assert kinds(check_blobs(repository, names=["one"])) == [("missing", "one")]


def test_an_unfinished_take_is_reported_unless_it_runs(repository: Repository) -> None:
    """A manifest without .ok whose take holds no lease is debris."""
    drop_ok(repository, take(repository, "three", b"x"))
    assert kinds(check_manifests(repository)) == [("uncommitted", "three")]
    with start_take(repository, "four", heartbeat_seconds=None) as session:
        write_blobs(session, [b"y"])
        repository.backend.put(f"four/.manifests/000001-{session.take_id}", b"")
        found = kinds(check_manifests(repository, names=["four"]))
    assert found == [("manifest", "four")]


def test_a_manifest_that_the_store_does_not_give_is_reported(repository: Repository) -> None:
    """One bad sector does not end the check."""
    broken = repository.manifests_of("one")[0].object
    backend = Failing(
        repository.backend, lambda operation, key: key == broken, lambda: StoreError("input/output error")
    )
    assert kinds(check_blobs(reopened(repository, backend))) == [("unreadable", "one")]


def test_a_snapshot_that_goes_while_it_is_checked_is_no_problem(repository: Repository) -> None:
    """What was removed needs no blobs."""
    key = chunk_of(b"first", repository.manifests_of("one")[0].manifest.take_id).key
    drop_blob(repository, key)

    def remove(operation: str, wanted: str) -> bool:
        if operation == "stat" and wanted == blob_object(key):
            repository.delete_snapshot("one")
        return False

    assert list(check_blobs(reopened(repository, Failing(repository.backend, remove)))) == []
