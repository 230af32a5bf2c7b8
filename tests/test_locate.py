"""Where a store is: the rules for a take, the walk up to open, roots, and the checks that keep gc able to find it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import StoreUrl
from servers import Fault, fault_proxy

from torchsnapshot.errors import CredentialsError, SnapshotNotFoundError, UnknownProtocolError
from torchsnapshot.store import local, locate
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.locate import CONFIG, STORE_VARIABLE, ancestors, open_backend, open_root, place_for_take
from torchsnapshot.store.mounts import Coherence, Mount, find_mount
from torchsnapshot.store.remote import RemoteBackend


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of the user's, with links resolved."""
    folder = tmp_path.resolve() / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the stores that another one has found."""
    monkeypatch.setattr(locate, "_known_roots", {})


def make_store(folder: Path) -> None:
    """A store, as far as finding it goes."""
    (folder / ".torchsnapshot").mkdir(parents=True)
    (folder / CONFIG).write_bytes(b"config")


def make_snapshot(folder: Path) -> None:
    """A snapshot, as far as finding it goes."""
    (folder / ".manifests").mkdir(parents=True)
    (folder / ".manifests" / f"000001-{'a' * 24}").write_bytes(b"manifest")


def where(path: object, store: object = None) -> tuple[str, str]:
    """Root and name that a take at ``path`` gets."""
    place = place_for_take(str(path), None if store is None else str(store))
    assert place.backend.url == place.root_url
    return place.root_url, place.name


class TestNewStore:
    def test_parent(self, runs: Path) -> None:
        """Where no store is, it goes to the parent, so that the next steps share it."""
        assert where(runs / "step_1") == (str(runs), "step_1")
        assert where(f"{runs}/step_1/") == (str(runs), "step_1")
        assert where(f"file://{runs}/step_1") == (str(runs), "step_1")
        assert where(runs / "new" / "deeper" / "step_1") == (str(runs / "new" / "deeper"), "step_1")

    def test_relative_and_linked_paths(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Relative paths and links lead to the same place as the real path."""
        monkeypatch.chdir(runs)
        assert where("step_1") == (str(runs), "step_1")
        assert where("./a/../step_1") == (str(runs), "step_1")
        (runs.parent / "link").symlink_to(runs)
        assert where(runs.parent / "link" / "step_1") == (str(runs), "step_1")

    def test_shared_parents(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A parent that many others share gets no store: the snapshot's own folder does."""
        assert where("/some-snapshot") == ("/some-snapshot", "")
        assert where("/tmp/some-snapshot") == ("/tmp/some-snapshot", "")
        monkeypatch.setenv("HOME", str(runs))
        assert where(runs / "step_1") == (str(runs / "step_1"), "")
        monkeypatch.setenv("HOME", "/nowhere")
        monkeypatch.setattr(tempfile, "tempdir", str(runs))
        assert where(runs / "step_1") == (str(runs / "step_1"), "")
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        assert where(runs / "step_1") == (str(runs), "step_1")
        runs.chmod(0o1777)
        assert where(runs / "step_1") == (str(runs / "step_1"), "")

    def test_parent_that_cannot_be_written(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A parent that this user may not write to gets no store."""
        (runs / "step_1").mkdir()
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != str(runs) and real(path, mode))
        assert where(runs / "step_1") == (str(runs / "step_1"), "")

    def test_parent_on_another_device(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A snapshot's folder that is a mount of its own holds its own store."""
        real = locate.device_of
        monkeypatch.setattr(locate, "device_of", lambda path: 7 if "/mounted" in path else real(path))
        make_store(runs)
        assert where(runs / "mounted") == (str(runs / "mounted"), "")
        assert where(runs / "mounted" / "step_1") == (str(runs / "mounted"), "step_1")


class TestFoundStore:
    def test_nearest(self, runs: Path) -> None:
        """The path's own store, else the nearest one above it, wins over the parent."""
        make_store(runs)
        assert where(runs / "a" / "b" / "step_1") == (str(runs), "a/b/step_1")
        make_store(runs / "a")
        assert where(runs / "a" / "b" / "step_1") == (str(runs / "a"), "b/step_1")
        make_store(runs / "a" / "b" / "step_1")
        assert where(runs / "a" / "b" / "step_1") == (str(runs / "a" / "b" / "step_1"), "")

    def test_removed_store_is_not_remembered(self, runs: Path) -> None:
        """A local store that was removed isn't found any more."""
        make_store(runs)
        assert where(runs / "a" / "step_1")[0] == str(runs)
        (runs / CONFIG).unlink()
        assert where(runs / "a" / "step_1")[0] == str(runs / "a")

    def test_variable(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """TORCHSNAPSHOT_STORE counts for paths below it and for no others; store= wins over it."""
        make_store(runs / "a")
        monkeypatch.setenv(STORE_VARIABLE, str(runs))
        assert where(runs / "a" / "step_1") == (str(runs), "a/step_1")
        assert where(runs / "a" / "step_1", runs / "a") == (str(runs / "a"), "step_1")
        other = runs.parent / "other"
        assert where(other / "step_1") == (str(other), "step_1")
        assert where(f"{runs}-not/step_1") == (f"{runs}-not", "step_1")


class TestStoreArgument:
    def test_above_or_at(self, runs: Path) -> None:
        """store= may be the path itself or any folder above it."""
        assert where(runs / "a" / "step_1", runs) == (str(runs), "a/step_1")
        assert where(runs / "step_1", runs / "step_1") == (str(runs / "step_1"), "")
        assert where(runs / "step_1", f"file://{runs}") == (str(runs), "step_1")

    @pytest.mark.parametrize("store", ["other", "runs/step_1/below", "runs/step", "s3://bucket/runs"])
    def test_elsewhere(self, runs: Path, store: str) -> None:
        """A store= that isn't above the path is refused: gc would not find the snapshot."""
        named = store if "://" in store else runs.parent / store
        with pytest.raises(ValueError, match="gc looks for"):
            where(runs / "step_1", named)

    @pytest.mark.parametrize(("path", "store"), [("/", None), ("/run7/step_1", "/")])
    def test_root_of_the_filesystem(self, path: str, store: str | None) -> None:
        """No store is made in ``/``: gc would search the whole machine for snapshots."""
        with pytest.raises(ValueError, match="Choose a folder below"):
            place_for_take(path, store)

    def test_on_another_device(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A store= on another device than the path is refused."""
        real = locate.device_of
        monkeypatch.setattr(locate, "device_of", lambda path: 7 if "/mounted" in path else real(path))
        with pytest.raises(ValueError, match="another device"):
            where(runs / "mounted" / "step_1", runs)


class TestSurroundings:
    def test_inside_another_snapshot(self, runs: Path) -> None:
        """A take inside another snapshot's folder is refused, also where that one holds its own store."""
        make_store(runs)
        make_snapshot(runs / "step_1")
        for path in (runs / "step_1" / "below", runs / "step_1" / "a" / "b"):
            with pytest.raises(ValueError, match="inside the folder of the snapshot"):
                where(path)
        make_store(runs / "alone")
        make_snapshot(runs / "alone")
        with pytest.raises(ValueError, match="inside the folder of the snapshot"):
            where(runs / "alone" / "below")

    def test_around_other_snapshots(self, runs: Path) -> None:
        """A take into a folder that holds snapshots is refused, a few levels down too."""
        make_store(runs)
        make_snapshot(runs / "evals" / "best")
        with pytest.raises(ValueError, match="evals/best"):
            where(runs / "evals")
        with pytest.raises(ValueError, match="evals/best"):
            where(runs)
        assert where(runs / "evals" / "other") == (str(runs), "evals/other")

    def test_again(self, runs: Path) -> None:
        """Taking the same path again is fine, whatever else lies in its folder."""
        make_store(runs)
        make_snapshot(runs / "step_1")
        (runs / "step_1" / "logs").mkdir()
        (runs / "step_1" / "notes.txt").write_text("hello")
        assert where(runs / "step_1") == (str(runs), "step_1")

    def test_leftovers_are_no_snapshot(self, runs: Path) -> None:
        """An empty manifest folder, or a lone signpost, doesn't make a snapshot."""
        make_store(runs)
        (runs / "step_1" / ".manifests").mkdir(parents=True)
        (runs / "step_1" / ".snapshot_metadata").write_bytes(b"")
        assert where(runs / "step_1" / "below") == (str(runs), "step_1/below")

    def test_mounted_bucket(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bucket that is mounted as a folder is refused, and the URL is named as the cure."""
        monkeypatch.setattr(local, "find_mount", lambda path: Mount(Coherence.BUCKET, "fuse.s3fs"))
        with pytest.raises(ValueError, match="s3://"):
            where(runs / "step_1")


class TestOpening:
    def test_kinds(self, tmp_path: Path, s3_url: StoreUrl) -> None:
        """Each kind of path opens its kind of backend."""
        assert isinstance(open_backend(tmp_path), LocalBackend)
        assert isinstance(open_backend(f"file://{tmp_path}"), LocalBackend)
        assert isinstance(open_backend("memory://somewhere/x"), RemoteBackend)
        assert isinstance(open_backend(*s3_url), RemoteBackend)
        assert not LocalBackend("/x", durable=False).durable
        local = open_backend(str(tmp_path), durable=False)
        assert isinstance(local, LocalBackend)
        assert not local.durable

    def test_bad_paths(self) -> None:
        """What can't be a path is refused with the reason."""
        for path in ("", "a\0b", "s3://bucket/a/../b"):
            with pytest.raises(ValueError):
                open_backend(path)
        with pytest.raises(UnknownProtocolError, match="nonsense"):
            open_backend("nonsense://a/b")

    def test_ancestors_local(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All folders from the path up to the device's boundary, nearest first."""
        found = ancestors(runs / "a" / "step_1")
        assert found[:3] == [
            (str(runs / "a" / "step_1"), ""),
            (str(runs / "a"), "step_1"),
            (str(runs), "a/step_1"),
        ]
        real = locate.device_of
        monkeypatch.setattr(locate, "device_of", lambda path: 7 if path.startswith(str(runs)) else real(path))
        assert len(ancestors(runs / "a" / "step_1")) == 3

    def test_ancestors_remote(self) -> None:
        """All prefixes from the path up to the bucket, nearest first."""
        assert ancestors("s3://bucket/runs//7/step_1/") == [
            ("s3://bucket/runs/7/step_1", ""),
            ("s3://bucket/runs/7", "step_1"),
            ("s3://bucket/runs", "7/step_1"),
            ("s3://bucket", "runs/7/step_1"),
        ]

    def test_open_root(self, runs: Path) -> None:
        """A ROOT must be named exactly; the error names the store above, or what to name."""
        with pytest.raises(SnapshotNotFoundError, match="name the folder that holds"):
            open_root(runs)
        make_store(runs)
        assert open_root(runs).url == str(runs)
        with pytest.raises(SnapshotNotFoundError, match=f"the store above it is {runs}"):
            open_root(runs / "step_1")


class TestRemote:
    @pytest.mark.parametrize("service", ["s3", "gcs"])
    def test_rules(self, request: pytest.FixtureRequest, service: str) -> None:
        """Buckets follow the same rules; a bucket's root never gets a store by itself."""
        url, options = request.getfixturevalue(f"{service}_url")
        bucket = url.removesuffix("/runs")

        def place(path: str, store: str | None = None) -> tuple[str, str]:
            found = place_for_take(path, store, options)
            assert found.backend.url == found.root_url
            return found.root_url, found.name

        assert place(f"{url}/7/step_1") == (f"{url}/7", "step_1")
        assert place(f"{bucket}/step_1") == (f"{bucket}/step_1", "")
        assert place(f"{bucket}/step_1", bucket) == (bucket, "step_1")
        open_backend(url, options).put(CONFIG, b"config")
        assert place(f"{url}/7/step_1") == (url, "7/step_1")
        assert open_root(url, options).url == url
        with pytest.raises(SnapshotNotFoundError, match=url):
            open_root(f"{url}/7", options)
        with pytest.raises(ValueError, match="gc looks for"):
            place(f"{url}/step_1", f"{bucket}/other")
        open_backend(url, options).put(f"7/step_1/.manifests/000001-{'a' * 24}", b"")
        with pytest.raises(ValueError, match="inside the folder"):
            place(f"{url}/7/step_1/below")
        with pytest.raises(ValueError, match="7/step_1"):
            place(f"{url}/7")

    def test_aliases(self, gcs_url: StoreUrl) -> None:
        """gs:// and gcs:// are the same place."""
        url, options = gcs_url
        found = place_for_take(f"{url}/step_1", url.replace("gs://", "gcs://"), options)
        assert found.name == "step_1"

    def test_hits_are_remembered(self, s3_url: StoreUrl) -> None:
        """The next step in a folder whose store was found looks at its own path only; a miss is looked up anew."""
        url, options = s3_url
        with fault_proxy(options["endpoint_url"]) as proxy:
            options = {**options, "endpoint_url": proxy.url}

            def looked_for() -> list[str]:
                return [path for method, path in proxy.seen if method == "HEAD" and path.endswith(CONFIG)]

            place_for_take(f"{url}/7/step_1", None, options)
            num_first = len(looked_for())
            assert num_first == 4
            proxy.seen.clear()
            place_for_take(f"{url}/7/step_2", None, options)
            assert len(looked_for()) == num_first
            open_backend(url, options).put(CONFIG, b"config")
            place_for_take(f"{url}/7/step_2", None, options)
            proxy.seen.clear()
            assert place_for_take(f"{url}/7/step_3", None, options).root_url == url
            assert len(looked_for()) == 1

    def test_credentials_for_a_prefix(self, s3_url: StoreUrl) -> None:
        """Credentials that are refused above a prefix find the store within it; refused everywhere is an error."""
        url, options = s3_url
        bucket_name = url.removeprefix("s3://").partition("/")[0]
        open_backend(f"{url}/mine", options).put(CONFIG, b"config")
        with fault_proxy(options["endpoint_url"]) as proxy:
            options = {**options, "endpoint_url": proxy.url}

            def only_mine(method: str, path: str) -> Fault | None:
                return None if "runs%2Fmine" in path or f"{bucket_name}/runs/mine" in path else Fault(403)

            proxy.decide = only_mine
            assert place_for_take(f"{url}/mine/7/step_1", None, options).root_url == f"{url}/mine"
            proxy.decide = lambda method, path: Fault(403)
            with pytest.raises(CredentialsError):
                place_for_take(f"{url}/mine/8/step_1", None, {**options, "max_concurrency": 3})


def test_find_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filesystem of a path is that of the innermost mount above it; /proc is one that every Linux has."""
    assert find_mount("/proc/self").type == "proc"
    assert find_mount(str(tmp_path / "not" / "there")).coherence is Coherence.LOCAL
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 0:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:2 / /mnt/my\\040disk rw shared:1 - nfs4 server:/ rw\n"
        "3 1 0:3 / /mnt/bucket rw - fuse.s3fs s3fs rw\n"
    )
    real: Any = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, **k: real(table if "mountinfo" in str(path) else path, *a, **k)
    )
    assert find_mount("/mnt/my disk/runs") == Mount(Coherence.CACHED, "nfs4")
    assert find_mount("/mnt/bucket/runs").coherence is Coherence.BUCKET
    assert find_mount("/mnt/bucket2").coherence is Coherence.LOCAL
