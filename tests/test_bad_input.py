"""Every kind of bad input gets its own error: what, where, and what to do. Nothing that was committed is harmed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from committed import CHUNK_NBYTES, assert_holds, restored, state_of, take
from conftest import StoreUrl
from faults import Failing
from folders import blobs, keys, new_process, refs
from mounted import fill, read_only, small
from servers import Fault, fault_proxy, free_port

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.cli import main
from torchsnapshot.errors import (
    BucketNotFoundError,
    CollectorStoppedError,
    CorruptionError,
    CredentialsError,
    FormatError,
    MissingBlobError,
    NewerFormatError,
    PartialRestoreError,
    ReadOnlyError,
    SnapshotNotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnknownProtocolError,
)
from torchsnapshot.maintenance import collect
from torchsnapshot.store import locate
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.envelope import MAGIC, ManifestFile, pack_manifest
from torchsnapshot.store.records import CONFIG_OBJECT, Config
from torchsnapshot.store.remote import RetryPolicy


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB; requests are tried again without waiting."""
    monkeypatch.setattr(RetryPolicy, "wait", lambda self, attempt: None)
    monkeypatch.setattr(locate, "_known_roots", {})
    new_process()
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder with the snapshots step_1 and step_2, the first of which must come out of every test unharmed."""
    folder = tmp_path / "runs"
    take(folder / "step_1", 1)
    take(folder / "step_2", 2)
    new_process()
    yield folder
    assert_holds(folder / "step_1", 1)


@contextlib.contextmanager
def refused(kind: type[Exception], *words: object) -> Iterator[None]:
    """The block raises exactly this error, and its message has all of these words."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind, repr(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def manifest_of(snapshot: Path) -> Path:
    """The file of a snapshot's only manifest."""
    (found,) = (path for path in (snapshot / ".manifests").iterdir() if path.suffix != ".ok")
    return found


def flipped(data: bytes, position: int) -> bytes:
    """The bytes with one bit that is not as it was."""
    damaged = bytearray(data)
    damaged[position] ^= 1
    return bytes(damaged)


USES: list[Callable[[Any], object]] = [
    lambda path: take_anywhere(path),
    lambda path: Snapshot(path).restore({"app": StateDict()}),
    lambda path: Snapshot.list(path),
    lambda path: Snapshot.latest(path),
    lambda path: collect(path),
]
"""Ways to use a path."""


def take_anywhere(path: Any) -> Snapshot:
    """Take a snapshot of next to nothing."""
    return Snapshot.take(path, {"app": StateDict(step=1)})


class TestPaths:
    @pytest.mark.parametrize("use", USES)
    def test_unknown_protocol(self, use: Callable[[Any], object]) -> None:
        """The protocol is named, and that something has to be installed."""
        with refused(UnknownProtocolError, "nosuch://bucket", "'nosuch'", "install"):
            use("nosuch://bucket/run")

    @pytest.mark.parametrize("use", USES)
    def test_chained_filesystems(self, use: Callable[[Any], object]) -> None:
        """A chain of filesystems is refused, whatever fsspec thinks of it."""
        with refused(UnknownProtocolError, "chained filesystems", "simplecache::s3://"):
            use("simplecache::s3://bucket/run")

    @pytest.mark.parametrize("use", USES)
    def test_one_slash(self, use: Callable[[Any], object]) -> None:
        """``Path("s3://bucket/run")`` is not a local folder called "s3:"; the message tells how that came about."""
        with refused(ValueError, "s3:/bucket/run", "s3://", "pathlib"):
            use(Path("s3://bucket/run"))

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("url", ["s3://", "gs:///run"])
    def test_no_bucket_in_the_url(self, use: Callable[[Any], object], url: str) -> None:
        """A URL without a bucket says how one is written."""
        with refused(ValueError, url, "bucket", "://BUCKET/FOLDER"):
            use(url)

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("path", [5, None, b"run", ["run"], True])
    def test_wrong_type(self, use: Callable[[Any], object], path: Any) -> None:
        """What is no path at all is named with its type."""
        with refused(TypeError, "a path must be a str", type(path).__name__, repr(path)):
            use(path)

    def test_paths_of_pathlib(self, tmp_path: Path) -> None:
        """A local path may be a ``pathlib.Path`` everywhere."""
        snapshot: Any = tmp_path / "runs" / "step_1"
        folder: Any = tmp_path / "runs"
        take_anywhere(snapshot)
        assert [found.path for found in Snapshot.list(folder)] == [str(snapshot)]
        assert Snapshot(snapshot).metadata.world_size == 1

    def test_empty_path(self) -> None:
        """Nothing is no path."""
        with refused(ValueError, "not a path", "''"):
            take_anywhere("")

    @pytest.mark.parametrize("where", ["local", "s3://bucket/run"])
    def test_options_of_the_wrong_type(self, tmp_path: Path, where: str) -> None:
        """``storage_options`` that are no dict are refused, also where none are needed."""
        options: Any = "endpoint_url=http://localhost"
        path = str(tmp_path / "run") if where == "local" else where
        with refused(TypeError, "storage_options must be a dict", "str"):
            Snapshot.take(path, {"app": StateDict(step=1)}, storage_options=options)
        with refused(TypeError, "storage_options must be a dict"):
            Snapshot(path, storage_options=options).restore({"app": StateDict()})


def remote_uses(url: str, options: dict[str, Any]) -> list[Callable[[], object]]:
    """Ways to use a place in a bucket."""
    return [
        lambda: Snapshot.take(f"{url}/step_2", {"app": StateDict(step=1)}, storage_options=options),
        lambda: Snapshot(f"{url}/step_1", storage_options=options).restore({"app": StateDict()}),
        lambda: Snapshot.list(url, options),
        lambda: Snapshot.latest(url, options),
        lambda: collect(url, options),
    ]


WRONG_KEY = b"<Error><Code>InvalidAccessKeyId</Code><Message>This access key does not exist.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class TestBuckets:
    @pytest.fixture(params=["s3", "gcs"])
    def bucket(self, request: pytest.FixtureRequest) -> Iterator[StoreUrl]:
        """A place in a bucket with the snapshot step_1, which must come out of every test unharmed."""
        url, options = request.getfixturevalue(f"{request.param}_url")
        take(f"{url}/step_1", 1, storage_options=options)
        new_process()
        yield url, options
        assert_holds(f"{url}/step_1", 1, options)

    def test_no_credentials(self, bucket: StoreUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Missing credentials are not refused ones: the message says what to pass."""
        url, options = bucket
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "CLOUDSDK_CONFIG", "HOME"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        # with an endpoint of one's own, GCS goes without credentials
        endpoint = {"endpoint_url": options["endpoint_url"]} if url.startswith("s3://") else {}
        for use in remote_uses(url, {**endpoint, "use_ssl": False} if endpoint else {"project": "none"}):
            with refused(CredentialsError, url.partition("/run")[0], "storage_options", "token"):
                use()

    def test_wrong_credentials(self, bucket: StoreUrl) -> None:
        """Refused credentials are told apart from everything else, and ``latest`` doesn't call it "none yet"."""
        url, options = bucket
        with fault_proxy(options["endpoint_url"]) as proxy:
            proxy.decide = lambda method, path: Fault(403, WRONG_KEY) if url.startswith("s3://") else Fault(401)
            for use in remote_uses(url, {**options, "endpoint_url": proxy.url}):
                with refused(CredentialsError, url.partition("/run")[0], "storage_options", "login"):
                    use()

    def test_no_such_bucket(self, bucket: StoreUrl) -> None:
        """A bucket that doesn't exist is named, and the cure."""
        url, options = bucket
        elsewhere = url.replace("://bucket-", "://no-such-bucket-")
        for use in remote_uses(elsewhere, options):
            with refused(BucketNotFoundError, elsewhere.partition("/run")[0], "create", "bucket"):
                use()

    def test_unreachable_endpoint(self, bucket: StoreUrl) -> None:
        """Where nobody answers, endpoint and network are what to check."""
        url, options = bucket
        for use in remote_uses(url, {**options, "endpoint_url": f"http://127.0.0.1:{free_port()}"}):
            with refused(StoreUnavailableError, url.partition("/run")[0], "127.0.0.1", "endpoint", "network"):
                use()

    def test_credentials_that_may_only_read(self, bucket: StoreUrl) -> None:
        """A take says that writing is what is missing; restoring works without a lease."""
        url, options = bucket
        with fault_proxy(options["endpoint_url"]) as proxy:
            proxied = {**options, "endpoint_url": proxy.url}
            proxy.decide = lambda method, path: None if method in ("GET", "HEAD") else Fault(403, DENIED)
            for path in (f"{url}/step_1", f"{url}/step_2"):
                with refused(ReadOnlyError, url, "may read but not write", "permission"):
                    take(path, 2, storage_options=proxied)
            assert_holds(f"{url}/step_1", 1, proxied)
            with refused(ReadOnlyError, url, "permission"):
                Snapshot(f"{url}/step_1", storage_options=proxied).delete()

    def test_full_bucket(self, bucket: StoreUrl) -> None:
        """A bucket over its quota says how to make room."""
        url, options = bucket
        with fault_proxy(options["endpoint_url"]) as proxy:
            proxied = {**options, "endpoint_url": proxy.url}
            proxy.decide = lambda method, path: None if method in ("GET", "HEAD", "DELETE") else Fault(507)
            with refused(StoreFullError, url, "gc", "quota", "intact"):
                take(f"{url}/step_1", 2, storage_options=proxied)
        assert_holds(f"{url}/step_1", 1, options)
        take(f"{url}/step_2", 2, storage_options=options)
        assert_holds(f"{url}/step_2", 2, options)

    def test_not_a_snapshot(self, bucket: StoreUrl) -> None:
        """What is at a path instead of a snapshot is said, as for local folders."""
        url, options = bucket
        for path, words in (
            (f"{url}/step_7", ("nothing is there", f"torchsnapshot ls {url}")),
            (url, ("a folder of snapshots", f"torchsnapshot ls {url}")),
            (f"{url}/step_1/.snapshot_metadata", ("inside of a snapshot", f"{url}/step_1")),
            (f"{url}/.torchsnapshot/config", ("inside of a snapshot or store", url)),
        ):
            with refused(SnapshotNotFoundError, path, *words):
                restored(path, options)


class TestNotASnapshot:
    def put_nothing(self, folder: Path) -> None:
        """Nothing."""

    def put_empty_folder(self, folder: Path) -> None:
        """A folder."""
        folder.mkdir()

    def put_file(self, folder: Path) -> None:
        """A file."""
        folder.write_bytes(b"hello")

    def put_folder(self, folder: Path) -> None:
        """A folder with something else in it."""
        folder.mkdir()
        (folder / "notes.txt").write_text("hello")

    def put_old_snapshot(self, folder: Path) -> None:
        """What the old torchsnapshot leaves."""
        (folder / "0").mkdir(parents=True)
        (folder / "0" / "weight").write_bytes(bytes(100))
        (folder / ".snapshot_metadata").write_text("version: 0.1.0\nworld_size: 1\nmanifest: {}\n")

    def put_uncommitted(self, folder: Path) -> None:
        """What a take leaves that stopped before its commit."""
        take(folder, 3)
        manifest_of(folder).with_name(manifest_of(folder).name + ".ok").unlink()

    def put_visible_files_only(self, folder: Path) -> None:
        """What a copy leaves that passed over hidden folders."""
        folder.mkdir()
        shutil.copy(folder.parent / "step_2" / ".snapshot_metadata", folder)

    @pytest.mark.parametrize(
        ("put", "words"),
        [
            (put_nothing, ["nothing is there"]),
            (put_empty_folder, ["nothing is there"]),
            (put_file, ["it is a file"]),
            (put_folder, ["a folder, but no snapshot"]),
            (put_old_snapshot, ["old torchsnapshot", "restore it with that"]),
            (put_uncommitted, ["000001-", "not committed", "taken again"]),
            (put_visible_files_only, [".manifests", "without hidden folders"]),
        ],
        ids=lambda value: value.__name__.removeprefix("put_") if callable(value) else "",
    )
    def test_reading(self, root: Path, put: Callable[[object, Path], None], words: list[str]) -> None:
        """Every way to read says what is there instead of a snapshot, where to look for one, and the old hint."""
        place = root / "place"
        put(self, place)
        new_process()
        snapshot = Snapshot(str(place))
        for read in (
            lambda: snapshot.restore({"app": StateDict()}),
            lambda: snapshot.read_object("0/app/step"),
            lambda: snapshot.metadata,
            lambda: snapshot.verify(),
            lambda: snapshot.delete(),
        ):
            with refused(
                SnapshotNotFoundError, place, f"torchsnapshot ls {root}", "Failed to read .snapshot_metadata", *words
            ):
                read()

    def test_the_folder_of_snapshots(self, root: Path) -> None:
        """A ROOT is not a snapshot, and the message names the command that lists those in it."""
        with refused(SnapshotNotFoundError, "a folder of snapshots", f"torchsnapshot ls {root}"):
            restored(root)

    def test_the_inside_of_a_snapshot(self, root: Path) -> None:
        """Whoever names a file of a snapshot is told the snapshot's path."""
        for inside in (".snapshot_metadata", ".manifests", f".manifests/{manifest_of(root / 'step_1').name}"):
            with refused(SnapshotNotFoundError, "the inside of a snapshot", f"holds it, {root}/step_1)"):
                restored(root / "step_1" / inside)

    def test_a_root_without_a_store(self, root: Path, tmp_path: Path) -> None:
        """Where no store is, what takes a ROOT says which folder to name; ``latest`` says that there is none yet."""
        with refused(SnapshotNotFoundError, tmp_path, "no store is here", ".torchsnapshot"):
            Snapshot.list(str(tmp_path))
        with refused(SnapshotNotFoundError, root / "step_1", f"the store above it is {root}"):
            collect(str(root / "step_1"))
        assert Snapshot.latest(str(tmp_path / "elsewhere")) is None

    def test_a_run_inside_a_root(self, tmp_path: Path) -> None:
        """``list`` and ``latest`` of a run's folder find its snapshots in the store above it, and no others."""
        for run in ("a", "a/b", "ab"):
            take(tmp_path / "all" / run / "step_1", 1, store=str(tmp_path / "all"))
        found = Snapshot.list(f"{tmp_path}/all/a")
        assert [snapshot.path for snapshot in found] == [f"{tmp_path}/all/a/step_1", f"{tmp_path}/all/a/b/step_1"]
        latest = Snapshot.latest(f"{tmp_path}/all/a/")
        assert latest is not None
        assert latest.path == f"{tmp_path}/all/a/b/step_1"
        assert_holds(latest.path, 1)
        assert Snapshot.list(f"{tmp_path}/all/c") == []


class TestTakesThatWouldHarm:
    def test_store_that_is_not_above(self, root: Path, tmp_path: Path) -> None:
        """gc would not find the snapshot: the message says so, with both paths."""
        for store in (tmp_path / "elsewhere", root / "step_3" / "below", root / "step"):
            with refused(ValueError, f"store='{store}'", root / "step_3", "or a folder above it", "gc"):
                take(root / "step_3", 3, store=str(store))
            assert not (root / "step_3").exists()
            assert not store.exists()

    def test_inside_another_snapshot(self, root: Path) -> None:
        """Deleting the outer one would delete the inner one."""
        with refused(
            ValueError, root / "step_1" / "best", f"inside the folder of the snapshot {root}/step_1", "outside"
        ):
            take(root / "step_1" / "best", 3)
        assert not (root / "step_1" / "best").exists()

    def test_around_other_snapshots(self, root: Path) -> None:
        """Deleting the new one would delete those in its folder."""
        with refused(ValueError, f"{root} ", "holds snapshots already", f"{root}/step_", "beside or below"):
            take(root, 3)
        assert not (root / ".manifests").exists()

    def test_in_place_of_an_old_snapshot(self, root: Path) -> None:
        """A snapshot of the old torchsnapshot keeps its metadata file, without which it is lost."""
        TestNotASnapshot().put_old_snapshot(root / "old")
        before = (root / "old" / ".snapshot_metadata").read_bytes()
        with refused(ValueError, root / "old", "old torchsnapshot", "overwrite", "another path"):
            take(root / "old", 3)
        assert (root / "old" / ".snapshot_metadata").read_bytes() == before
        assert not (root / "old" / ".manifests").exists()

    def test_at_or_below_a_file(self, root: Path) -> None:
        """A file in the way is named before anything is written."""
        (root / "file").write_bytes(b"hello")
        before = len(blobs(root))
        for path in (root / "file", root / "file" / "below" / "step_3"):
            with refused(ValueError, path, f"{root}/file is a file"):
                take(path, 3)
        assert (root / "file").read_bytes() == b"hello"
        assert len(blobs(root)) == before

    def test_names_that_gc_passes_over(self, root: Path) -> None:
        """A snapshot that gc would not see cannot be taken."""
        for name in (".torchsnapshot", "lost+found", ".snapshot", ".zfs/step_1"):
            with refused(ValueError, name, "passed over by gc", "another name"):
                take(root / name, 3)


class TestManifests:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:10],
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: data + b"\0",
            lambda data: b"<html>404</html>" * 40,
            lambda data: bytes(len(data)),
            *(lambda data, at=at: flipped(data, at * (len(data) - 1) // 12) for at in range(13)),
        ],
    )
    def test_damaged(self, root: Path, damage: Callable[[bytes], bytes]) -> None:
        """A damaged manifest is named with its path and the way out; gc stops at it; every other snapshot is fine."""
        manifest = manifest_of(root / "step_2")
        manifest.write_bytes(damage(manifest.read_bytes()))
        target = StateDict(**state_of(7))
        with refused(FormatError, root / "step_2", manifest.name, "backup", "another snapshot", "torchsnapshot rm"):
            Snapshot(str(root / "step_2")).restore({"app": target})
        assert torch.equal(target["large"], state_of(7)["large"])
        assert {problem.name for problem in Snapshot(str(root / "step_1")).verify("blobs")} == set()
        assert main(["verify", str(root), "--depth", "manifests"]) == 1
        take(root / "step_3", 3)
        assert_holds(root / "step_3", 3)

    def test_damaged_and_removed(self, root: Path) -> None:
        """gc refuses to guess what a damaged manifest needs, and goes on when its snapshot has been removed."""
        manifest = manifest_of(root / "step_2")
        envelope = ManifestFile(manifest.read_bytes()).header.sections[1]
        manifest.write_bytes(flipped(manifest.read_bytes(), envelope.offset))
        before = set(blobs(root))
        with refused(CollectorStoppedError, f"step_2/.manifests/{manifest.name}", root, "remove that snapshot"):
            collect(str(root))
        assert set(blobs(root)) == before
        assert main(["rm", str(root / "step_2")]) == 0
        assert collect(str(root)).freed_blobs > 0

    def test_damaged_and_taken_again(self, root: Path) -> None:
        """A take of the same path replaces the damaged manifest."""
        manifest = manifest_of(root / "step_2")
        manifest.write_bytes(b"")
        take(root / "step_2", 3)
        assert_holds(root / "step_2", 3)
        assert not manifest.exists()

    def test_older_generation(self, root: Path) -> None:
        """Where a re-take stopped before it had tidied up, the message tells how to go back; going back works."""
        manifest = manifest_of(root / "step_2")
        saved = {name: (manifest.parent / name).read_bytes() for name in os.listdir(manifest.parent)}
        take(root / "step_2", 3)
        newer = manifest_of(root / "step_2")
        for name, data in saved.items():
            (manifest.parent / name).write_bytes(data)
        newer.write_bytes(newer.read_bytes()[:-1])
        with refused(FormatError, newer.name, f"An older generation is there, {manifest.name}", f"{newer.name}.ok"):
            restored(root / "step_2")
        newer.with_name(f"{newer.name}.ok").unlink()
        newer.unlink()
        assert_holds(root / "step_2", 2)

    def test_newer_envelope(self, root: Path) -> None:
        """A manifest whose outer form is of a later version asks for an upgrade, and gc stops at it."""
        manifest = manifest_of(root / "step_2")
        manifest.write_bytes(of_later_version(manifest.read_bytes()))
        with refused(NewerFormatError, root / "step_2", "version", "upgrade torchsnapshot"):
            restored(root / "step_2")
        with refused(CollectorStoppedError, "step_2/.manifests/", "upgrade"):
            collect(str(root))

    def test_newer_features(self, root: Path) -> None:
        """A manifest with features that this library doesn't know is not read; gc needs none of them and goes on."""
        manifest = manifest_of(root / "step_2")
        file = ManifestFile(manifest.read_bytes())
        tables = file.envelope.tables
        manifest.write_bytes(pack_manifest(file.head, tables, file.entries, incompatible=1 << 30))
        before = set(blobs(root))
        with refused(NewerFormatError, root / "step_2", "features", "upgrade torchsnapshot"):
            restored(root / "step_2")
        assert collect(str(root)).freed_blobs == 0
        assert set(blobs(root)) == before
        assert [problem.kind for problem in Snapshot(str(root / "step_2")).verify()] == ["newer"]


def of_later_version(data: bytes) -> bytes:
    """The manifest with the next version of the envelope, and a header whose digest is right."""
    header = ManifestFile(data).header
    end = min(section.offset for section in header.sections) - 16
    changed = bytearray(data)
    changed[len(MAGIC)] += 1
    changed[end : end + 16] = xxhash.xxh3_128_digest(bytes(changed[:end]))
    return bytes(changed)


class TestBlobs:
    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
    def test_damaged(self, root: Path, damage: str) -> None:
        """A damaged blob is named with snapshot and tensor; no byte of it reaches the target."""
        ref = refs(root / "step_2", "app/large")[1]
        blob = blobs(root)[ref.key]
        data = blob.read_bytes()
        if damage == "remove":
            blob.unlink()
        else:
            blob.write_bytes({"flip": flipped(data, len(data) // 2), "truncate": data[:-1], "empty": b""}[damage])
        target = StateDict(large=torch.zeros(3 * CHUNK_NBYTES // 4))
        kind = MissingBlobError if damage == "remove" else CorruptionError
        words = (root / "step_2", "app/large", ref.key, "Restore another snapshot", "torchsnapshot verify")
        with refused(kind, *words):
            Snapshot(str(root / "step_2")).read_object("0/app/large")
        with pytest.raises((kind, PartialRestoreError)) as caught:
            Snapshot(str(root / "step_2")).restore({"app": target}, paths=["app/large"])
        for word in words:
            assert str(word) in str(caught.value)
        chunk = target["large"][CHUNK_NBYTES // 4 : 2 * CHUNK_NBYTES // 4]
        assert not chunk.any()
        if target["large"].any():
            assert type(caught.value) is PartialRestoreError
            assert "a mix of old and new values" in str(caught.value)

    def test_removed_by_gc(self, root: Path) -> None:
        """A blob that a gc deleted is explained from that gc's own record."""
        new_process()
        moved = root.parent / "moved"
        (root / "step_2").rename(moved)
        collect(str(root))
        moved.rename(root / "step_2")
        with refused(MissingBlobError, root / "step_2", "a gc run by", "outside of this ROOT"):
            Snapshot(str(root / "step_2")).read_object("0/app/large")

    def test_older_generation(self, root: Path) -> None:
        """A missing blob is an error that names the other generations, never a silent fallback."""
        folder = root / "step_2" / ".manifests"
        saved = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
        take(root / "step_2", 3)
        blob = blobs(root)[refs(root / "step_2", "app/large")[0].key]
        for name, data in saved.items():
            (folder / name).write_bytes(data)
        blob.unlink()
        with refused(MissingBlobError, "An older generation is there", *(n for n in saved if not n.endswith(".ok"))):
            Snapshot(str(root / "step_2")).read_object("0/app/large")


class TestConfig:
    @pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: flipped(data, 40)])
    def test_damaged(self, root: Path, damage: Callable[[bytes], bytes]) -> None:
        """A damaged config stops everything with one message, whose cure brings every snapshot back."""
        config = root / CONFIG_OBJECT
        config.write_bytes(damage(config.read_bytes()))
        for use in (
            lambda: restored(root / "step_1"),
            lambda: take(root / "step_3", 3),
            lambda: Snapshot.latest(str(root)),
            lambda: collect(str(root)),
        ):
            with refused(FormatError, root, CONFIG_OBJECT, "damaged", "no data", "backup", "delete", "store="):
                use()
        config.unlink()
        take(root / "step_3", 3, store=str(root))
        for number in (1, 2, 3):
            assert_holds(root / f"step_{number}", number)
        assert collect(str(root)).freed_blobs == 0

    def test_missing(self, root: Path) -> None:
        """A store without its config is told apart from a snapshot without its store; the cure works."""
        (root / CONFIG_OBJECT).unlink()
        with refused(FormatError, root, f"{CONFIG_OBJECT} is missing", "no data", "store="):
            restored(root / "step_1")
        take(root / "step_3", 3, store=str(root))

    def test_newer_writers(self, root: Path) -> None:
        """A store that newer libraries write may be read and swept by this one, not written."""
        config = Config.unpack((root / CONFIG_OBJECT).read_bytes())
        (root / CONFIG_OBJECT).write_bytes(Config(config.store_id, writer_level=2).pack())
        with refused(NewerFormatError, root, "level 2", "upgrade"):
            take(root / "step_3", 3)
        assert_holds(root / "step_2", 2)
        assert collect(str(root)).freed_blobs == 0

    def test_newer_collectors(self, root: Path) -> None:
        """A store whose garbage this library can't tell is not swept by it."""
        config = Config.unpack((root / CONFIG_OBJECT).read_bytes())
        (root / CONFIG_OBJECT).write_bytes(Config(config.store_id, gc_level=2).pack())
        shutil.rmtree(root / "step_2")
        before = set(blobs(root))
        with refused(NewerFormatError, root, "level 2", "upgrade"):
            collect(str(root))
        assert set(blobs(root)) == before

    def test_newer_form(self, root: Path) -> None:
        """A config that only a newer library can read asks for an upgrade, and names the store."""
        config = root / CONFIG_OBJECT
        data = config.read_bytes()
        config.write_bytes(data.replace(b"tsr1", b"tsr2"))
        for use in (lambda: restored(root / "step_1"), lambda: take(root / "step_3", 3), lambda: collect(str(root))):
            with refused(NewerFormatError, root, "newer version", "upgrade"):
                use()
        config.write_bytes(data)

    def test_a_strangers_store_above(self, root: Path, tmp_path: Path) -> None:
        """An unreadable store above the snapshot's own is nobody's business."""
        (tmp_path / ".torchsnapshot").mkdir()
        (tmp_path / CONFIG_OBJECT).write_bytes(b"not a config")
        assert_holds(root / "step_2", 2)


class TestWithoutItsStore:
    def test_copied_away(self, root: Path, tmp_path: Path) -> None:
        """A snapshot's folder alone says that it has no tensor data, and what to do."""
        away = tmp_path / "elsewhere" / "step_1"
        shutil.copytree(root / "step_1", away)
        for use in (
            lambda: restored(away),
            lambda: Snapshot(str(away)).verify(),
            lambda: Snapshot(str(away)).read_object("0/app/large"),
            lambda: Snapshot(str(away)).delete(),
        ):
            with refused(MissingBlobError, away, "no folder above it holds its store", "torchsnapshot copy"):
                use()
        assert main(["verify", str(away)]) == 1

    def test_copied_below_another_store(self, root: Path, tmp_path: Path) -> None:
        """A strange store above it doesn't hide the reason, and a take at that path makes it whole."""
        away = tmp_path / "elsewhere" / "step_1"
        take(tmp_path / "elsewhere" / "step_0", 0)
        shutil.copytree(root / "step_1", away)
        with refused(MissingBlobError, away, "no folder above it holds its store", "torchsnapshot copy"):
            restored(away)
        take(away, 4)
        assert_holds(away, 4)
        assert_holds(tmp_path / "elsewhere" / "step_0", 0)

    def test_moved_back(self, root: Path, tmp_path: Path) -> None:
        """What the message proposes works: moved back below its ROOT, under any name, it opens."""
        (root / "step_2").rename(tmp_path / "step_2")
        with refused(MissingBlobError, "Move it back below its ROOT"):
            restored(tmp_path / "step_2")
        (tmp_path / "step_2").rename(root / "other name")
        assert_holds(root / "other name", 2)


class TestReadOnly:
    def test_read_only_filesystem(self, root: Path, tmp_path: Path) -> None:
        """Every way to write is refused with the cure; reading, restoring and verifying go without a lease."""
        with read_only(root, tmp_path / "read only") as place:
            for write in (
                lambda: take(place / "step_1", 3),
                lambda: take(place / "step_3", 3),
                lambda: Snapshot.async_take(str(place / "step_3"), {"app": StateDict(step=1)}).wait(),
                lambda: Snapshot(str(place / "step_1")).delete(),
                lambda: collect(str(place)),
            ):
                with refused(ReadOnlyError, place, "mounted read-only", "remount"):
                    write()
            assert_holds(place / "step_1", 1)
            assert_holds(place / "step_2", 2)
            assert len(Snapshot.list(str(place))) == 2
            assert collect(str(place), dry_run=True).freed_blobs == 0
            assert main(["copy", str(place / "step_2"), str(tmp_path / "copies" / "step_2")]) == 0
        assert_holds(tmp_path / "copies" / "step_2", 2)

    def test_permission_denied(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where writing is refused in the middle of a take, nothing is committed."""

        def is_blob(operation: str, key: str) -> bool:
            return operation == "put" and "/blobs/" in key

        inject(monkeypatch, lambda inner: Failing(inner, is_blob, lambda: ReadOnlyError("permission denied")))
        with refused(ReadOnlyError):
            take(root / "step_1", 3)
        monkeypatch.undo()
        assert not (root / ".torchsnapshot" / "leases").exists() or not os.listdir(root / ".torchsnapshot" / "leases")


def inject(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Backend], Backend]) -> None:
    """Put a backend that fails between every take and its store."""
    real = locate.open_backend
    monkeypatch.setattr(locate, "open_backend", lambda *args, **options: wrap(real(*args, **options)))


class TestFullDisk:
    def test_first_take(self, tmp_path: Path) -> None:
        """A first take that doesn't fit commits nothing; with more room the next one works, and gc takes the debris."""
        with small(tmp_path / "disk", 2 << 20) as disk:
            runs = disk / "runs"
            filler = disk / "other things"
            filler.write_bytes(bytes(1 << 20))
            with refused(StoreFullError, runs, "No space left", "free space", "gc"):
                Snapshot.take(str(runs / "step_1"), {"app": StateDict(large=torch.rand(1 << 19))}, encoding="raw")
            with refused(SnapshotNotFoundError, "nothing is there"):
                restored(runs / "step_1")
            assert Snapshot.latest(str(runs)) is None
            assert not any(path.is_file() for path in (runs / ".torchsnapshot" / "tmp").rglob("*"))
            filler.unlink()
            new_process()
            take(runs / "step_1", 1)
            debris = len(blobs(runs)) - len(keys(runs / "step_1"))
            assert collect(str(runs)).freed_blobs == debris > 0
            assert_holds(runs / "step_1", 1)

    @pytest.mark.parametrize("is_async", [False, True])
    def test_retake(self, tmp_path: Path, is_async: bool) -> None:
        """While a re-take fails for want of room, what was there restores; afterwards the next take works."""
        with small(tmp_path / "disk", 4 << 20) as disk:
            runs = disk / "runs"
            take(runs / "step_1", 1)
            take(runs / "step_2", 2)
            filler = disk / "other things"
            filler.write_bytes(bytes(3 << 20))
            app_state = {"app": StateDict(large=torch.rand(1 << 18))}
            with refused(StoreFullError, runs, "No space left", "free space", "gc"):
                if is_async:
                    Snapshot.async_take(str(runs / "step_1"), app_state, encoding="raw").wait()
                else:
                    Snapshot.take(str(runs / "step_1"), app_state, encoding="raw")
            assert_holds(runs / "step_1", 1)
            assert_holds(runs / "step_2", 2)
            filler.unlink()
            take(runs / "step_1", 4)
            assert collect(str(runs)).freed_blobs > 0
            assert_holds(runs / "step_1", 4)
            assert_holds(runs / "step_2", 2)
            assert set(blobs(runs)) == keys(runs / "step_1") | keys(runs / "step_2")

    def test_not_one_byte_left(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """On a disk without a free byte snapshots restore, and can be removed to make room; gc says what it lacks."""
        with small(tmp_path / "disk", 4 << 20) as disk:
            runs = disk / "runs"
            for number in (1, 2, 3):
                take(runs / f"step_{number}", number)
            fill(disk)
            assert_holds(runs / "step_1", 1)
            with refused(StoreFullError, runs, "No space left", "free space"):
                take(runs / "step_4", 1)
            shutil.rmtree(runs / "step_3" / ".manifests")
            fill(disk)
            with refused(CollectorStoppedError, runs, "no room for its plan", "rm -r"):
                collect(str(runs))
            caplog.clear()
            Snapshot(str(runs / "step_2")).delete()
            assert "no room to note" in caplog.text
            assert collect(str(runs), force=True).freed_blobs > 0
            assert set(blobs(runs)) == keys(runs / "step_1")
            take(runs / "step_2", 1)
            assert_holds(runs / "step_1", 1)
            assert_holds(runs / "step_2", 1)

    @pytest.mark.parametrize("part", ["/blobs/", "/.manifests/", ".ok", "/leases/", ".snapshot_metadata"])
    def test_every_kind_of_object(self, root: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
        """Whichever object finds no room, what was there before stays, and the next take is a whole one."""

        def is_it(operation: str, key: str) -> bool:
            return operation == "put" and part in key

        with monkeypatch.context() as patch:
            inject(patch, lambda inner: Failing(inner, is_it, lambda: StoreFullError("no space left")))
            if part == ".snapshot_metadata":
                take(root / "step_2", 3)  # a signpost, by which nothing is decided
            else:
                with refused(StoreFullError, "no space left"):
                    take(root / "step_2", 3)
        new_process()
        assert_holds(root / "step_2", 3 if part == ".snapshot_metadata" else 2)
        take(root / "step_2", 4)
        assert_holds(root / "step_2", 4)
        collect(str(root))
        assert set(blobs(root)) == keys(root / "step_1") | keys(root / "step_2")


def test_errors_of_the_store_are_errors_of_the_store() -> None:
    """What a store refuses is a ``StoreError``, so that one ``except`` is enough for "try elsewhere or later"."""
    for kind in (UnknownProtocolError, CredentialsError, BucketNotFoundError, ReadOnlyError, StoreFullError):
        assert issubclass(kind, StoreError)
    assert issubclass(StoreUnavailableError, StoreError)
