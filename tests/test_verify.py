"""The three depths of verify: what each finds, that the deepest finds everything, and what becomes of the findings."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from committed import CHUNK_NBYTES, assert_holds, take
from faults import Failing
from folders import blobs, keys, new_process, refs
from mounted import read_only

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.errors import FormatError, SnapshotNotFoundError, StoreError
from torchsnapshot.maintenance import collect
from torchsnapshot.store.keys import OK_SUFFIX, SIGNPOST, blob_object
from torchsnapshot.store.locate import open_root
from torchsnapshot.store.memory import MemoryBackend
from torchsnapshot.store.records import CONFIG_OBJECT, DAMAGED_FOLDER
from torchsnapshot.store.repository import Repository
from torchsnapshot.verify import DEPTHS, Depth, VerifyResult, verify_names, verify_path


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB."""
    new_process()
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A ROOT with three snapshots that share some of their content."""
    for number, name in enumerate(("step_1", "step_2", "evals/best")):
        take(tmp_path / "runs" / name, number)
    new_process()
    return tmp_path / "runs"


def found(path: Path, depth: Depth) -> set[tuple[str, str]]:
    """Kind and snapshot of every finding."""
    return {(problem.kind, problem.name) for problem in verify_path(str(path), depth).problems}


def flip(path: Path, position: int = -1) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class TestSound:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_nothing_is_found(self, root: Path, depth: Depth) -> None:
        """Sound snapshots have no problems, alone and together, and looking changes no file."""
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert verify_path(str(root), depth) == VerifyResult(["evals/best", "step_1", "step_2"], [])
        assert verify_path(str(root / "evals"), depth) == VerifyResult(["evals/best"], [])
        assert verify_path(str(root / "step_1"), depth) == VerifyResult(["step_1"], [])
        assert list(Snapshot(str(root / "step_2")).verify(depth)) == []
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before

    def test_depths_have_names(self, root: Path) -> None:
        """Another depth is refused, with those that there are."""
        with pytest.raises(ValueError, match="'manifests', 'blobs', 'bytes'"):
            Snapshot(str(root / "step_1")).verify("everything")  # type: ignore[arg-type]

    def test_no_snapshot(self, root: Path) -> None:
        """A path without snapshots is an error and not a clean bill, and says where some are."""
        with pytest.raises(SnapshotNotFoundError, match=f"torchsnapshot ls {root}"):
            verify_path(str(root / "step_7"), "manifests")


class TestDepths:
    def test_manifests(self, root: Path) -> None:
        """Every depth finds a damaged manifest, once."""
        (manifest,) = (path for path in (root / "step_1" / ".manifests").iterdir() if path.suffix != OK_SUFFIX)
        flip(manifest)
        for depth in DEPTHS:
            problems = verify_path(str(root), depth).problems
            assert [(problem.kind, problem.name) for problem in problems] == [("manifest", "step_1")]
            assert manifest.name in problems[0].message

    def test_missing_blobs(self, root: Path) -> None:
        """A missing blob is found by looking at names, in every snapshot that needs it; reading finds nothing more."""
        shared, own = refs(root / "step_1", "app/frozen")[0].key, refs(root / "step_2", "app/large")[0].key
        for key in (shared, own):
            blobs(root)[key].unlink()
        assert found(root, "manifests") == set()
        expected = {("missing", "step_1"), ("missing", "step_2"), ("missing", "evals/best")}
        for depth in DEPTHS[1:]:
            result = verify_path(str(root), depth)
            assert {(problem.kind, problem.name) for problem in result.problems} == expected
            assert len(result.problems) == 4
            assert all(problem.key in problem.message for problem in result.problems)

    @pytest.mark.parametrize("keep", [lambda size: 0, lambda size: size - 1, lambda size: size + 1])
    def test_blobs_of_another_size(self, root: Path, keep: object) -> None:
        """A truncated blob, an empty one, and one that has grown are found by looking at sizes, each of them."""
        assert callable(keep)
        for key in sorted(keys(root / "step_2")):
            blob = blobs(root)[key]
            data = blob.read_bytes()
            blob.write_bytes((data + b"\0")[: keep(len(data))])
            assert found(root, "manifests") == set()
            assert ("size", "step_2") in found(root, "blobs")
            assert ("size", "step_2") in found(root, "bytes")
            blob.write_bytes(data)

    def test_bytes(self, root: Path) -> None:
        """A flipped bit is found by reading alone, in every snapshot that shares the chunk and in no other."""
        shared = refs(root / "step_1", "app/frozen")[0]
        flip(blobs(root)[shared.key])
        for depth in DEPTHS[:2]:
            assert found(root, depth) == set()
        everyone = {("damaged", name) for name in ("step_1", "step_2", "evals/best")}
        assert found(root, "bytes") == everyone
        assert found(root / "step_1", "bytes") == {("damaged", "step_1")}
        own = refs(root / "step_2", "app/large")[1]
        flip(blobs(root)[own.key], 0)
        assert found(root / "step_2", "bytes") == {("damaged", "step_2")}
        problems = verify_path(str(root), "bytes").problems
        assert {problem.key for problem in problems} == {shared.key, own.key}
        assert all(problem.key in problem.message for problem in problems)

    def test_store_that_refuses(self, root: Path) -> None:
        """What the store will not give is told apart from what is damaged."""
        repository = Repository.open(open_root(str(root)))
        key = refs(root / "step_1", "app/large")[0].key
        backend = Failing(
            repository.backend, lambda operation, name: operation == "read" and key in name, lambda: StoreError("no")
        )
        problems = verify_names(Repository(backend, repository.config), ["step_1", "step_2"], "bytes")
        assert [(problem.kind, problem.name, problem.key) for problem in problems] == [("unreadable", "step_1", key)]


def small_store() -> Repository:
    """A store in memory of few bytes, with a raw blob, an encoded one, a pack and inline values."""
    with tempfile.TemporaryDirectory() as folder, knobs.override_max_chunk_size_bytes(1024):
        state = {
            "noise": torch.randint(0, 256, (1024,), dtype=torch.uint8),
            "smooth": torch.arange(256, dtype=torch.float32),
            "small": [torch.full((80,), 1.5), torch.full((70,), 2.5)],
            "inline": torch.ones(3),
            "value": {"a": 1},
        }
        Snapshot.take(f"{folder}/runs/step_1", {"app": StateDict(**state)}, encoding="smallest")
        backend = MemoryBackend()
        backend.concurrency = 1  # so that no threads are started over and over
        for path in sorted(Path(folder, "runs").rglob("*")):
            if path.is_file():
                backend.put(str(path.relative_to(Path(folder, "runs"))), path.read_bytes())
    return Repository.open(backend)


def test_every_byte_that_is_flipped_is_found() -> None:
    """There is no byte in blobs, manifests or config whose damage hurts and goes unnoticed; nothing else is found."""
    repository = small_store()
    backend = repository.backend
    assert verify_names(repository, ["step_1"], "bytes") == []
    assert sorted(key.partition(".")[2] for key, _ in repository.list_blobs()) == ["", "p", "z"]
    objects = [info for info in backend.list("") if not info.key.endswith(SIGNPOST)]  # by which nothing is decided
    num_flipped = num_harmless = 0
    for info in objects:
        data = backend.read(info.key)
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            backend.put(info.key, damaged)
            num_flipped += 1
            if info.key == CONFIG_OBJECT:
                with pytest.raises(FormatError):
                    Repository.open(backend)
                continue
            problems = verify_names(repository, ["step_1"], "bytes")
            if not problems and info.key.endswith(".z"):
                # bits of a zstd frame that stand for nothing: the decoded bytes have just been proved the same
                num_harmless += 1
                continue
            assert problems, f"byte {position} of {info.key}"
            hit = info.key.rpartition("/")[2]
            assert {problem.key.rpartition("/")[2] for problem in problems} == {hit}, f"byte {position} of {info.key}"
        backend.put(info.key, data)
    assert num_flipped > 2000
    assert num_harmless < 10
    assert verify_names(repository, ["step_1"], "bytes") == []


class TestAfterwards:
    def test_damaged_blobs_are_not_reused(self, root: Path) -> None:
        """What was found damaged is noted, and the next take of the same content writes it again."""
        damaged = [refs(root / "step_1", "app/frozen")[1].key, refs(root / "step_1", "app/small/0")[0].key]
        for key in damaged:
            flip(blobs(root)[key])
        assert found(root / "step_1", "bytes") == {("damaged", "step_1")}
        for fresh in (True, False):
            if fresh:
                new_process()
            take(root / f"again {fresh}", 0)
            assert keys(root / f"again {fresh}").isdisjoint(damaged)
            assert_holds(root / f"again {fresh}", 0)
        assert ("damaged", "step_1") in found(root, "bytes")

    def test_this_process_stops_reusing_them_too(self, root: Path) -> None:
        """A process that knew the blob as good from its own takes doesn't reuse it after a verify."""
        take(root / "step_1", 0)
        key = refs(root / "step_1", "app/frozen")[0].key
        flip(blobs(root)[key])
        Snapshot(str(root / "step_1")).verify()
        stats = take(root / "step_9", 0).stats
        assert stats is not None
        assert stats.new_nbytes == CHUNK_NBYTES
        assert_holds(root / "step_9", 0)

    def test_notes_go_with_their_blobs(self, root: Path) -> None:
        """When gc has taken the damaged blobs, it takes the note as well, not before."""
        key = refs(root / "step_2", "app/large")[0].key
        flip(blobs(root)[key])
        verify_path(str(root), "bytes")
        backend = open_root(str(root))
        collect(str(root))
        assert len(list(backend.list(DAMAGED_FOLDER))) == 1
        assert key in blobs(root)
        Snapshot(str(root / "step_2")).delete()
        collect(str(root))
        assert list(backend.list(DAMAGED_FOLDER)) == []
        assert key not in blobs(root)
        assert found(root, "bytes") == set()

    def test_store_that_cannot_be_written(self, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Where damage can't be noted it is reported all the same."""
        key = refs(root / "step_1", "app/large")[0].key
        flip(blobs(root)[key])
        with read_only(root, tmp_path / "read only") as place, caplog.at_level(logging.INFO, "torchsnapshot"):
            assert found(place, "bytes") == {("damaged", "step_1")}
        assert "could not be noted" in caplog.text


def test_snapshot_that_goes_meanwhile(root: Path) -> None:
    """A snapshot that is deleted and collected while it is being checked is no problem."""
    repository = Repository.open(open_root(str(root)))
    key = refs(root / "step_1", "app/large")[0].key

    def remove(operation: str, name: str) -> bool:
        if operation == "list" and name.endswith("blobs"):
            repository.delete_snapshot("step_1")
            repository.backend.delete([blob_object(key)])
            return False
        return False

    backend = Failing(repository.backend, remove)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "delete_snapshot", once(repository.delete_snapshot))
        assert verify_names(Repository(backend, repository.config), ["step_1", "step_2"], "bytes") == []


def once(function: object) -> object:
    """The function, the first time that it is called."""
    assert callable(function)
    called: list[object] = []

    def call(*arguments: object) -> object:
        called.append(arguments)
        return function(*arguments) if len(called) == 1 else None

    return call


def test_what_is_shared_is_read_once(root: Path) -> None:
    """A chunk that many snapshots share is read and hashed once."""
    repository = Repository.open(open_root(str(root)))
    reads: list[str] = []

    def note(operation: str, key: str) -> bool:
        if operation == "read" and "/blobs/" in key:
            reads.append(key)
        return False

    names = ["step_1", "step_2", "evals/best"]
    assert verify_names(Repository(Failing(repository.backend, note), repository.config), names, "bytes") == []
    for ref in refs(root / "step_1", "app/frozen"):
        assert ref.base is None
        assert reads.count(blob_object(ref.key)) == 1


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_store_inside_of_a_store(tmp_path: Path, depth: Depth) -> None:
    """A run that had a store before one was made above it is checked in its own, under its name in the outer one."""
    state = {"s": StateDict(t=torch.ones(CHUNK_NBYTES))}
    Snapshot.take(str(tmp_path / "run7" / "step_1"), state)
    Snapshot.take(str(tmp_path / "base"), {"s": StateDict(t=torch.zeros(CHUNK_NBYTES))})
    for path in (str(tmp_path), f"{tmp_path}/"):
        assert verify_path(path, depth) == VerifyResult(["base", "run7/step_1"], [])
    (blob,) = [file for file in (tmp_path / "run7" / ".torchsnapshot" / "blobs").rglob("*") if file.is_file()][:1]
    blob.unlink()
    found = {(problem.kind, problem.name) for problem in verify_path(str(tmp_path), depth).problems}
    assert found == (set() if depth == "manifests" else {("missing", "run7/step_1")})
