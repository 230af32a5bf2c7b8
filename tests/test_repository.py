"""ROOT's layout: config, blobs, manifests, and removing snapshots."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from faults import FailNth, Recording
from tiny_takes import Time, chunk_of, drop_blob, keys_of, new_store, reopened, take

from torchsnapshot.errors import (
    FormatError,
    MissingBlobError,
    NewerFormatError,
    SnapshotNotFoundError,
    StoreError,
)
from torchsnapshot.store.gc import collect
from torchsnapshot.store.keys import SIGNPOST, ManifestName, blob_object, new_id
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.memory import MemoryBackend
from torchsnapshot.store.processes import current_process
from torchsnapshot.store.records import (
    CONFIG_OBJECT,
    REMOVED_FOLDER,
    Config,
    DamagedSet,
    Lease,
    PendingSet,
    Removed,
    Sweep,
)
from torchsnapshot.store.repository import Repository


def test_a_store_is_made_once() -> None:
    """The second opening reads what the first one made, whatever chunk size it asks for."""
    backend = MemoryBackend()
    made = Repository.create_or_open(backend, chunk_nbytes=1 << 20)
    again = Repository.create_or_open(backend, chunk_nbytes=1 << 22)
    assert again.config == made.config
    assert again.chunk_nbytes == 1 << 20
    assert Repository.open(backend).store_id == made.store_id


def test_who_loses_the_race_for_the_config_uses_the_winners() -> None:
    """A config that appears between the look and the put is read, not overwritten."""

    class Raced(Recording):
        def put(self, key: str, data: object, **options: object) -> None:
            if not self.operations.count(("put", key)):
                self.inner.put(key, Config("a" * 24).pack())
            super().put(key, data, **options)  # type: ignore[arg-type]

    backend = Raced(MemoryBackend())
    assert Repository.create_or_open(backend).store_id == "a" * 24


def test_a_place_without_a_store_says_so() -> None:
    """Opening never creates."""
    with pytest.raises(SnapshotNotFoundError, match="holds no store"):
        Repository.open(MemoryBackend())


@pytest.mark.parametrize("chunk_nbytes", [0, 1 << 40])
def test_a_chunk_size_out_of_bounds_stores_nothing(chunk_nbytes: int) -> None:
    """What could not be read back is not written."""
    backend = MemoryBackend()
    with pytest.raises(FormatError):
        Repository.create_or_open(backend, chunk_nbytes=chunk_nbytes)
    assert list(backend.list("")) == []


def test_a_newer_writer_level_refuses_takes_but_not_readers() -> None:
    """Whoever is too old to write may still read."""
    backend = MemoryBackend()
    backend.put(CONFIG_OBJECT, Config("a" * 24, writer_level=2).pack())
    assert Repository.open(backend).store_id == "a" * 24
    with pytest.raises(NewerFormatError, match="upgrade"):
        Repository.create_or_open(backend)


def test_an_unknown_digest_algorithm_refuses_takes() -> None:
    """Content under names that nobody else computes would never be shared."""
    backend = MemoryBackend()
    backend.put(CONFIG_OBJECT, Config("a" * 24, algorithm=2).pack())
    with pytest.raises(NewerFormatError, match="digest algorithm"):
        Repository.create_or_open(backend)


def test_making_a_store_beside_another_one_says_that_nothing_is_shared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One INFO line for each store, once."""
    with caplog.at_level(logging.INFO):
        Repository.create_or_open(LocalBackend(str(tmp_path / "run1")))
        assert "nothing is shared" not in caplog.text
        Repository.create_or_open(LocalBackend(str(tmp_path / "run2")))
        Repository.create_or_open(LocalBackend(str(tmp_path / "run2")))
    assert [record.message.count("store=") for record in caplog.records] == [0, 1]


def test_a_newer_collector_level_refuses_gc() -> None:
    """An old collector never sweeps what it does not understand."""
    backend = MemoryBackend()
    backend.put(CONFIG_OBJECT, Config("a" * 24, gc_level=2).pack())
    with pytest.raises(NewerFormatError, match="newer collector"):
        collect(Repository.open(backend))


RECORDS = [
    Config("a" * 24),
    Lease("take", current_process(), "step_1"),
    PendingSet(current_process(), frozenset(str(chunk_of(bytes([n]), "a" * 24).key) for n in range(40))),
    Sweep("finished", current_process(), 1.5, frozenset(), (("caf\udce9", "c" * 24), ("step_1", "b" * 24))),
    Sweep("taken over", current_process(), 1.5, frozenset(), None),
    Removed((("", "b" * 24),)),
    DamagedSet(frozenset({chunk_of(b"x", "a" * 24).key})),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back_as_they_were(record: Config | Lease | PendingSet | Sweep | Removed | DamagedSet) -> None:
    """Packing and unpacking is the identity."""
    assert type(record).unpack(record.pack()) == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_flipped_bit_anywhere_in_a_record_is_an_error(
    record: Config | Lease | PendingSet | Sweep | Removed | DamagedSet,
) -> None:
    """No bit flip and no cut gives another record: a pending set never shrinks unnoticed."""
    data = record.pack()
    for position in range(len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(FormatError):
                type(record).unpack(bytes(damaged))
        with pytest.raises(FormatError):
            type(record).unpack(data[:position])


def test_an_unreadable_config_names_the_store() -> None:
    """The message says which store it is."""
    backend = MemoryBackend("memory-test://somewhere")
    backend.put(CONFIG_OBJECT, b"rubbish")
    with pytest.raises(FormatError, match="somewhere"):
        Repository.open(backend)


def test_sizes_of_many_blobs(tmp_path: Path) -> None:
    """Of those that are there, on a disk; elsewhere nothing is said, as each would cost a request."""
    keys = [chunk_of(bytes([number]) * 10, "a" * 24).key for number in range(3)]
    local = Repository.create_or_open(LocalBackend(str(tmp_path)))
    for repository in (local, new_store()):
        for nbytes, key in enumerate(keys[:2], start=5):
            repository.put_blob(key, bytes(nbytes))
        assert dict(repository.blob_sizes(keys)) == ({keys[0]: 5, keys[1]: 6} if repository is local else {})
        assert repository.blob_nbytes(keys[0]) == 5


def test_blobs_are_read_as_they_were_written() -> None:
    """Whole, in part, and into a buffer."""
    repository = new_store()
    key = chunk_of(b"0123456789", "a" * 24).key
    assert repository.blob_nbytes(key) is None
    repository.put_blob(key, b"0123456789")
    assert repository.blob_nbytes(key) == 10
    assert repository.read_blob(key) == b"0123456789"
    assert repository.read_blob(key, 2, 3) == b"234"
    buffer = bytearray(4)
    repository.read_blob_into(key, 6, memoryview(buffer))
    assert buffer == b"6789"


@pytest.mark.parametrize("key", ["", "../x", "a" * 32, "A" * 32 + "-" + "a" * 24 + "-0"])
def test_only_blob_keys_name_blobs(key: str) -> None:
    """No text from a manifest becomes a place outside of the blobs."""
    with pytest.raises(ValueError, match="not a blob key"):
        new_store().read_blob(key)


def test_blobs_are_listed_with_their_sizes_and_foreign_files_apart() -> None:
    """A file whose name is no key, or that lies in the wrong folder, is no blob."""
    repository = new_store()
    keys = {chunk_of(bytes([number]), "a" * 24).key: 1 for number in range(20)}
    for number, key in enumerate(keys):
        repository.put_blob(key, bytes([number]))
    wrong = next(iter(keys))
    strays = [".torchsnapshot/blobs/stray", f"{blob_object(wrong)}.tmp", f".torchsnapshot/blobs/zz/{wrong}"]
    for stray in strays:
        repository.backend.put(stray, b"")
    foreign: list[str] = []
    assert dict(repository.list_blobs(foreign)) == keys
    assert sorted(foreign) == sorted(strays)
    assert dict(repository.list_blobs()) == keys


def test_a_missing_blob_is_explained_by_the_sweep_that_took_it() -> None:
    """The error names the collector where a sweep marker knows it, and says so where none does."""
    time = Time()
    repository = new_store(time)
    gone = keys_of(repository, take(repository, "gone", b"one", time=time)).pop()
    lost = keys_of(repository, take(repository, "lost", b"two", time=time)).pop()
    repository.delete_snapshot("gone")
    collect(repository, clock=time)
    drop_blob(repository, lost)
    with pytest.raises(MissingBlobError, match="gc run by process"):
        repository.read_blob(gone)
    with pytest.raises(MissingBlobError, match="something else did"):
        repository.read_blob_into(lost, 0, memoryview(bytearray(3)))


def test_a_retake_adds_a_generation_and_removes_the_older_one() -> None:
    """One snapshot has one manifest when all is quiet, and its number grows."""
    repository = new_store()
    take(repository, "step", b"one")
    second = take(repository, "step", b"two")
    assert second.manifest.generation == 2
    assert [ref.manifest for ref in repository.manifests_of("step")] == [second.manifest]
    assert repository.backend.stat(f"step/{SIGNPOST}").nbytes == 15


def test_a_reader_opens_the_highest_generation_with_its_ok() -> None:
    """What another take has not committed yet is not the newest."""
    repository = new_store()
    first = take(repository, "step", b"one")
    repository.backend.put(f"step/.manifests/{ManifestName(2, new_id())}", b"not committed")
    assert [ref.committed for ref in repository.manifests_of("step")] == [True, False]
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest == first.manifest
    assert repository.newest_committed("other") is None


def test_generations_above_a_million_are_compared_as_numbers() -> None:
    """More digits is newer, not "smaller as text"."""
    repository = new_store()
    for generation in (999_999, 1_000_000):
        name = ManifestName(generation, "a" * 24)
        repository.backend.put(f"step/.manifests/{name}", b"")
        repository.backend.put(f"step/.manifests/{name}.ok", b"")
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest.generation == 1_000_000


def test_snapshots_are_listed_by_commit_time(caplog: pytest.LogCaptureFixture) -> None:
    """The newest commit is last, nested names and ROOT itself count, and one unreadable manifest hides only itself."""
    time = Time()
    repository = new_store(time)
    for name in ("b", "evals/best", "", "a"):
        take(repository, name, name.encode() + b"content", time=time)
        time.seconds += 1
    broken = take(repository, "broken", b"x", time=time)
    repository.backend.put(broken.object, b"rubbish")
    with caplog.at_level(logging.WARNING):
        assert [info.name for info in repository.list_snapshots()] == ["b", "evals/best", "", "a"]
    assert "broken" in caplog.text


def test_commit_times_grow_also_when_the_clock_does_not() -> None:
    """A take comes after every commit time that was read, by one millisecond at least."""
    time = Time()
    repository = new_store(time)
    take(repository, "one", b"1", time=time)
    time.seconds -= 1000
    take(repository, "two", b"2", time=time)
    other = reopened(repository)
    assert [info.name for info in other.list_snapshots()] == ["one", "two"]
    take(other, "three", b"3", time=time)
    assert [info.name for info in repository.list_snapshots()] == ["one", "two", "three"]


def test_deleting_goes_by_the_rules() -> None:
    """Note, then lowest generation first with its .ok before it, then the signpost; nothing of the snapshot is left."""
    repository = new_store()
    take(repository, "step", b"one")
    second = ManifestName(2, "f" * 24)
    repository.backend.put(f"step/.manifests/{second}", b"uncommitted")
    backend = Recording(repository.backend)
    removed = reopened(repository, backend).delete_snapshot("step")
    assert [ref.manifest.generation for ref in removed] == [1, 2]
    changes = [(operation, key) for operation, key in backend.operations if operation in ("put", "delete")]
    assert changes[0][1].startswith(REMOVED_FOLDER)
    assert [key.rpartition("/")[2][:6] for _, key in changes[1:5]] == ["000001", "000001", "000002", "000002"]
    assert [key.endswith(".ok") for _, key in changes[1:5]] == [True, False, True, False]
    assert changes[5:] == [("delete", f"step/{SIGNPOST}")]
    assert list(repository.backend.list("step")) == []
    with pytest.raises(SnapshotNotFoundError):
        repository.delete_snapshot("step")


def test_deleting_leaves_what_came_later() -> None:
    """Exactly the listed manifests go; the signpost stays while one is left."""
    repository = new_store()
    take(repository, "step", b"one")
    seen = repository.manifests_of("step")
    newer = take(repository, "step", b"two")
    repository.remove_manifests(seen)
    assert repository.newest_committed("step") == repository.manifests_of("step")[0]
    assert repository.manifests_of("step")[0].manifest == newer.manifest
    repository.backend.stat(f"step/{SIGNPOST}")


def test_a_listing_that_misses_a_manifest_beside_its_ok_costs_nothing() -> None:
    """The .ok of a take that commits while a deletion looks is not taken for a left-over."""
    repository = new_store()
    take(repository, "step", b"one")
    seen = repository.manifests_of("step")
    newer = take(repository, "step", b"two")

    class Blind(Recording):
        def list_folder(self, prefix: str) -> object:  # type: ignore[override]
            found = super().list_folder(prefix)
            return type(found)(found.folders, tuple(info for info in found.objects if info.key != newer.object))

    reopened(repository, Blind(repository.backend)).remove_manifests(seen)
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest == newer.manifest


def test_a_deletion_that_fails_says_what_is_left() -> None:
    """The error names the object; the snapshot is still there, whole."""
    repository = new_store()
    ref = take(repository, "step", b"one")
    backend = FailNth(repository.backend, "delete", 0)
    with pytest.raises(StoreError, match="could not delete"):
        reopened(repository, backend).delete_snapshot("step")
    newest = repository.newest_committed("step")
    assert newest is not None
    assert newest.manifest == ref.manifest
