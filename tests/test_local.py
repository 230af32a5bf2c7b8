"""The local backend: the order of its system calls, direct I/O, faults of the disk, and what somebody may plant."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from backend_contract import page_aligned

from torchsnapshot.engine.buffers import map_pages
from torchsnapshot.errors import (
    CredentialsError,
    KeyAbsentError,
    KeyExistsError,
    ReadOnlyError,
    StoreError,
    StoreFullError,
)
from torchsnapshot.store import durable_names, keys, local
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.mounts import Coherence, Mount

NBYTES = (2 << 20) + 777
MS_RDONLY, MS_REMOUNT = 1, 32

Call = tuple[str, ...]


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    """An empty local store."""
    return LocalBackend(str(tmp_path / "root"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every system call that changes something, as (name, path, …), in order."""
    return record_calls(monkeypatch)


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Record the calls of ``os`` that change something; a descriptor is shown by the path that it was opened with."""
    recorded: list[Call] = []
    paths: dict[int, str] = {}
    real_open = os.open

    def recording_open(path: str, flags: int, *rest: Any) -> int:
        number = real_open(path, flags, *rest)
        paths[number] = path
        if flags & os.O_CREAT:
            recorded.append(("create", path))
        return number

    def record(name: str, show: Callable[..., tuple[str, ...]]) -> None:
        real = getattr(os, name)

        def recording(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            recorded.append((name, *show(*arguments)))
            return result

        monkeypatch.setattr(os, name, recording)

    monkeypatch.setattr(os, "open", recording_open)
    for name in ("pwrite", "pwritev", "fsync", "ftruncate"):
        record(name, lambda number, *_: (paths[number],))
    for name in ("rename", "link"):
        record(name, lambda source, target: (source, target))
    for name in ("mkdir", "unlink"):
        record(name, lambda path, *_: (path,))
    return recorded


def temporary_files(backend: LocalBackend) -> list[str]:
    """What lies in the folder for temporary files."""
    return [info.key for info in backend.list(".torchsnapshot/tmp")]


def blob(content: bytes = b"content") -> tuple[str, str, bytes]:
    """A fresh take's id, a blob's key below ROOT, and its content."""
    take_id = keys.new_id()
    return take_id, keys.blob_object(str(keys.BlobKey(os.urandom(16), take_id, 0))), content


def put_many_later(backend: LocalBackend) -> list[str]:
    """Put so many blobs that it is worth making them durable together; their keys."""
    keys = [blob()[1] for _ in range(20)]
    for key in keys:
        backend.put_later(key, page_aligned(NBYTES), aligned=True)
    return keys


class TestOrder:
    def test_a_missing_folder_is_made_before_anything_is_written(
        self, backend: LocalBackend, calls: list[Call]
    ) -> None:
        """The first object of a folder costs one write and one fsync of its own, as every other one does."""
        backend.put("step/.manifests/first", page_aligned(NBYTES))
        temps = [call[1] for call in calls if call[0] == "create"]
        assert len(temps) == 1
        assert calls.count(("fsync", temps[0])) == 1

    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("if_absent", [False, True])
    def test_write_fsync_rename_fsync(
        self, backend: LocalBackend, calls: list[Call], aligned: bool, if_absent: bool
    ) -> None:
        """The bytes are on disk before the name is, and the name before put returns."""
        backend.put("warm/up", b"")
        calls.clear()
        backend.put("warm/key", page_aligned(NBYTES), aligned=aligned, if_absent=if_absent)
        temp = calls[0][1]
        target = os.path.join(backend.root, "warm", "key")
        names = [call[0] for call in calls if call[0] not in ("ftruncate", "unlink")]
        assert names[0] == "create"
        num_writes = names.index("fsync") - 1
        assert num_writes >= 1
        assert set(names[1 : 1 + num_writes]) <= {"pwrite", "pwritev"}
        publish = "link" if if_absent else "rename"
        assert [call for call in calls if call[0] in ("fsync", "rename", "link")] == [
            ("fsync", temp),
            (publish, temp, target),
            ("fsync", os.path.dirname(target)),
        ]
        assert all(call[1] == temp for call in calls if call[0] in ("pwrite", "pwritev", "ftruncate"))
        assert temporary_files(backend) == []

    @pytest.mark.parametrize("nbytes", [4 << 20, NBYTES, 1000])
    def test_later_puts_are_durable_after_sync(self, backend: LocalBackend, calls: list[Call], nbytes: int) -> None:
        """``sync`` fsyncs the file and its folder; what the page cache holds is fsynced by the put that wrote it."""
        backend.put(blob()[1], b"")
        key = blob()[1]
        target = os.path.join(backend.root, key)
        calls.clear()
        backend.put_later(key, page_aligned(nbytes), aligned=True)
        was_synced = [call for call in calls if call[0] == "fsync"]
        assert was_synced in ([], [("fsync", calls[0][1])])
        if nbytes < 1 << 20 or not backend._writer._direct:
            assert was_synced
        assert bytes(backend.read(key)) == bytes(page_aligned(nbytes))
        calls.clear()
        backend.sync([key])
        assert [call for call in calls if call[0] == "fsync"] == [
            ("fsync", target),
            ("fsync", os.path.dirname(target)),
        ]

    @pytest.mark.parametrize("is_clean", [True, False])
    def test_many_files_are_made_durable_together(
        self, backend: LocalBackend, calls: list[Call], is_clean: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On ext4 one call does for all of them, unless others have left much to write: then each has its own again."""
        synced: list[str] = []

        def sync_filesystem(path: str) -> bool:
            synced.append(path)
            return is_clean

        monkeypatch.setattr(durable_names, "sync_filesystem", sync_filesystem)
        monkeypatch.setattr(backend, "_mount", Mount(Coherence.LOCAL, "ext4"))
        keys = put_many_later(backend)
        calls.clear()
        backend.sync(keys)
        assert len(synced) == 1
        assert synced[0].startswith(backend.root)
        fsyncs = [call[1] for call in calls if call[0] == "fsync"]
        assert len(fsyncs) == 0 if is_clean else len(fsyncs) > 20
        # what is durable now is not made durable again
        key = f"{keys[0][:-1]}9"
        calls.clear()
        backend.put(key, b"")
        assert len([call for call in calls if call[0] == "fsync"]) == 2

    def test_elsewhere_each_file_is_made_durable(
        self, backend: LocalBackend, calls: list[Call], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A filesystem of which it is not known what that one call reports is not asked to."""
        monkeypatch.setattr(durable_names, "sync_filesystem", lambda path: pytest.fail("it was"))
        monkeypatch.setattr(backend, "_mount", Mount(Coherence.LOCAL, "xfs"))
        keys = put_many_later(backend)
        calls.clear()
        backend.sync(keys)
        assert {os.path.join(backend.root, key) for key in keys} <= {call[1] for call in calls if call[0] == "fsync"}

    def test_blobs_on_another_disk_are_made_durable_there(
        self, backend: LocalBackend, calls: list[Call], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the store is a link to another filesystem than ROOT's, each file has its own fsync."""
        elsewhere = Path("/dev/shm")
        os.mkdir(backend.root)
        if not elsewhere.is_dir() or elsewhere.stat().st_dev == os.stat(backend.root).st_dev:
            pytest.skip("there is no second filesystem")
        monkeypatch.setattr(durable_names, "sync_filesystem", lambda path: pytest.fail("it was"))
        monkeypatch.setattr(backend, "_mount", Mount(Coherence.LOCAL, "ext4"))
        folder = tempfile.mkdtemp(dir=elsewhere)
        try:
            os.symlink(folder, os.path.join(backend.root, ".torchsnapshot"))
            keys = put_many_later(backend)
            calls.clear()
            backend.sync(keys)
        finally:
            # the tidying uses what is being listened to in ways that no store does
            monkeypatch.undo()
            shutil.rmtree(folder)
        assert {os.path.join(backend.root, key) for key in keys} <= {call[1] for call in calls if call[0] == "fsync"}

    def test_sync_of_what_is_gone_is_an_error(self, backend: LocalBackend) -> None:
        """A blob that somebody has removed before it was durable is no blob."""
        here, gone = blob()[1], blob()[1]
        for key in (here, gone):
            backend.put_later(key, page_aligned(4 << 20), aligned=True)
        backend.delete([gone])
        with pytest.raises(StoreError):
            backend.sync([here, gone])

    def test_new_folders_are_durable(self, backend: LocalBackend, calls: list[Call]) -> None:
        """The parent of every folder just made is fsynced after it was made, ROOT's own parent included."""
        backend.put("step_1/.manifests/key", b"")
        made = [call[1] for call in calls if call[0] == "mkdir"]
        assert backend.root in made
        wanted = {
            os.path.join(backend.root, "step_1", ".manifests"),
            os.path.join(backend.root, "step_1"),
            backend.root,
        }
        for path in wanted:
            after = calls[calls.index(("mkdir", path)) :]
            assert ("fsync", os.path.dirname(path)) in after

    def test_folder_of_another_process_is_durable(self, backend: LocalBackend, calls: list[Call]) -> None:
        """A folder that was there already gets its parent fsynced once: whoever made it may not have come to that."""
        os.makedirs(os.path.join(backend.root, "theirs"))
        calls.clear()
        backend.put("theirs/one", b"")
        assert ("fsync", backend.root) in calls
        calls.clear()
        backend.put("theirs/two", b"")
        assert ("fsync", backend.root) not in calls

    def test_folder_made_again_is_durable_again(self, backend: LocalBackend, calls: list[Call]) -> None:
        """A folder that was removed and made again by somebody else isn't taken for the one that we know."""
        backend.put("name/one", b"")
        backend.delete(["name/one"])
        backend.remove_empty_folders("name")
        os.mkdir(os.path.join(backend.root, "between"))  # takes the inode number that has become free
        os.mkdir(os.path.join(backend.root, "name"))
        calls.clear()
        backend.put("name/two", b"")
        assert ("fsync", backend.root) in calls

    def test_blob_folders_cost_one_fsync_together(self, backend: LocalBackend, calls: list[Call]) -> None:
        """The 256 blob folders are made at once, so that their parent is fsynced once and not 256 times."""
        blobs = os.path.join(backend.root, ".torchsnapshot", "blobs")
        for _ in range(20):
            backend.put(blob()[1], b"")
        assert len(os.listdir(blobs)) == 256
        assert calls.count(("fsync", blobs)) == 1
        another = LocalBackend(backend.root)
        calls.clear()
        for _ in range(20):
            another.put(blob()[1], b"")
        assert calls.count(("fsync", blobs)) == 1

    def test_folders_are_made_by_one_put(self, backend: LocalBackend, calls: list[Call]) -> None:
        """The first puts of a store come together: one of them makes the folders, and the others wait for it."""
        together = threading.Barrier(8)

        def put(_: int) -> None:
            together.wait()
            backend.put(blob()[1], b"")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(8)))
        made = [call[1] for call in calls if call[0] == "mkdir"]
        # each may find its own folder, and those above it, missing before it waits
        assert len(set(made)) <= len(made) <= len(set(made)) + 8 * 4

    def test_later_puts_make_only_their_own_folders(self, backend: LocalBackend, calls: list[Call]) -> None:
        """Folders that become durable together at the end are made as they are needed: each takes some time."""
        names = [blob()[1] for _ in range(5)]
        for key in names:
            backend.put_later(key, b"")
        blobs = os.path.join(backend.root, ".torchsnapshot", "blobs")
        assert set(os.listdir(blobs)) == {key.split("/")[2] for key in names}
        calls.clear()
        backend.sync(names)
        assert calls.count(("fsync", blobs)) == 1

    def test_not_durable_never_fsyncs(self, tmp_path: Path, calls: list[Call]) -> None:
        """With durable=False there is no fsync at all, and still a rename of a whole file."""
        backend = LocalBackend(str(tmp_path / "root"), durable=False)
        backend.put("step/key", page_aligned(NBYTES), aligned=True)
        backend.delete(["step/key"])
        assert not [call for call in calls if call[0] == "fsync"]
        assert [call for call in calls if call[0] == "rename"]

    def test_deleted_snapshot_stays_deleted(self, backend: LocalBackend, calls: list[Call]) -> None:
        """A deletion outside of the store is made durable; of blobs, which gc would take again, it isn't."""
        _, key, content = blob()
        backend.put(key, content)
        backend.put("step/.manifests/one", b"")
        calls.clear()
        backend.delete([key, "step/.manifests/one"])
        assert [call[1] for call in calls if call[0] == "fsync"] == [os.path.join(backend.root, "step", ".manifests")]


class TestTemporaryFiles:
    def test_names(self, backend: LocalBackend, calls: list[Call]) -> None:
        """A temporary file is named by its take, where the key tells it, so that gc knows whose it is."""
        take_id, key, content = blob()
        backend.put(key, content)
        backend.put(f"step/.manifests/000001-{take_id}", b"")
        backend.put(f"step/.manifests/000001-{take_id}.ok", b"")
        backend.put("step/.snapshot_metadata", b"")
        created = [os.path.basename(call[1]) for call in calls if call[0] == "create"]
        labels = [name.rsplit("-", 2)[0] for name in created]
        # the first one is begun again once the folders are there
        assert [label for label, before in zip(labels, ["", *labels], strict=False) if label != before] == [
            take_id,
            f"anon-{os.getpid()}",
        ]
        assert len(set(created)) == len(created)

    @pytest.mark.parametrize("function", ["fsync", "rename", "pwrite"])
    def test_failure_leaves_nothing(
        self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        """A put that fails leaves no temporary file and the old object, and is not tried again."""
        backend.put("folder/key", b"old")
        attempts = []

        def fail(*_: Any, **__: Any) -> None:
            attempts.append(function)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(StoreError, match=r"folder/key.*Input/output error"):
                backend.put("folder/key", b"new")
        assert attempts == [function]
        assert temporary_files(backend) == []
        assert backend.read("folder/key") == b"old"

    def test_interrupt_leaves_nothing(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C in the middle of a put leaves no temporary file and no object."""
        backend.put("warm", b"")

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            backend.put("key", b"x")
        assert temporary_files(backend) == []
        assert [info.key for info in backend.list("")] == ["warm"]

    def test_temporary_file_taken_by_a_collector(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A put whose temporary file disappears begins again."""
        backend.put("warm", b"")
        real = os.rename
        stolen = []

        def steal_first(source: str, target: str) -> None:
            if not stolen:
                stolen.append(source)
                os.unlink(source)
            real(source, target)

        monkeypatch.setattr(os, "rename", steal_first)
        backend.put("key", b"content")
        assert len(stolen) == 1
        assert backend.read("key") == b"content"

    def test_folder_removed_for_ever(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the folder vanishes again and again, put gives up with an error that isn't "absent key"."""

        def vanish(source: str, target: str) -> None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)

        monkeypatch.setattr(os, "rename", vanish)
        with pytest.raises(StoreError) as caught:
            backend.put("key", b"content")
        assert not isinstance(caught.value, KeyAbsentError)
        assert temporary_files(backend) == []

    def test_target_on_another_device(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the store's temporary folder is on another device than the target, the file is made beside it."""
        real = os.rename

        def cross_device(source: str, target: str) -> None:
            if "/tmp/" in source.removeprefix(os.path.dirname(backend.root)):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            real(source, target)

        monkeypatch.setattr(os, "rename", cross_device)
        backend.put("step/key", b"content")
        assert backend.read("step/key") == b"content"
        assert [info.key for info in backend.list("")] == ["step/key"]

    def test_filesystem_without_links(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """if_absent works by looking first where the filesystem has no hard links."""

        def no_links(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", no_links)
        backend.put("key", b"first", if_absent=True)
        with pytest.raises(KeyExistsError):
            backend.put("key", b"second", if_absent=True)
        assert backend.read("key") == b"first"
        assert temporary_files(backend) == []

    def test_lost_reply_of_link(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A link that was made although the server says "exists" (a reply lost by NFS) is a success."""
        backend.put("warm", b"")
        real = os.link

        def link_twice(source: str, target: str, **options: Any) -> None:
            real(source, target, **options)
            real(source, target, **options)

        monkeypatch.setattr(os, "link", link_twice)
        backend.put("key", b"mine", if_absent=True)
        assert backend.read("key") == b"mine"


class TestDirect:
    def test_is_used_and_equal(self, backend: LocalBackend, calls: list[Call]) -> None:
        """Where the filesystem takes direct writes, they are used, and the file is exactly as long as the data."""
        data = page_aligned(NBYTES)
        data[:] = os.urandom(NBYTES)
        backend.put("key", data, aligned=True)
        used = any(call[0] == "pwritev" for call in calls)
        assert used == backend._writer._direct
        assert backend.read("key") == data
        assert os.path.getsize(os.path.join(backend.root, "key")) == NBYTES

    @pytest.mark.parametrize("where", ["open", "open, once the file is made", "write"])
    def test_refusal_is_remembered(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        """A filesystem that refuses direct writes gets the same bytes through the cache, and isn't asked again."""
        refusals = []
        real = os.open

        def refuse(*arguments: Any) -> int:
            refusals.append(where)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        def open_or_refuse(path: str, flags: int, *mode: int) -> int:
            if not flags & os.O_DIRECT:
                return real(path, flags, *mode)
            if where != "open":
                os.close(real(path, flags & ~os.O_DIRECT, *mode))
            return refuse()

        monkeypatch.setattr(*((os, "pwritev", refuse) if where == "write" else (os, "open", open_or_refuse)))
        data = page_aligned(NBYTES)
        data[:] = os.urandom(NBYTES)
        for key in ("one", "two"):
            backend.put(key, data, aligned=True)
            assert backend.read(key) == data
        assert len(refusals) == 1
        assert temporary_files(backend) == []

    def test_forks_have_tails_of_their_own(self, backend: LocalBackend) -> None:
        """What a forked child writes through the page for the last bytes of files is not seen by its parent."""
        page = backend._writer._page.memory
        page[:6] = b"parent"
        if not os.fork():
            page[:6] = b"child."
            os._exit(0)
        os.wait()
        assert page[:6] == b"parent"

    @pytest.mark.parametrize("cached", [False, True])
    @pytest.mark.parametrize("nbytes", [4 << 20, NBYTES])
    @pytest.mark.parametrize("start", [0, 4096, 5000])
    def test_direct_reads_give_what_cached_ones_give(
        self, backend: LocalBackend, cached: bool, nbytes: int, start: int
    ) -> None:
        """Past the page cache or from it, whole files or parts of them: the same bytes, and nothing beyond them."""
        content = os.urandom(nbytes)
        backend.put("warm/key", content)
        with open(os.path.join(backend.root, "warm", "key"), "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached:
                file.read()
        memory = map_pages(nbytes)
        wanted = nbytes - start - 3
        backend.read_into("warm/key", start, memory[:wanted], aligned=True)
        assert memory[:wanted] == content[start : start + wanted]
        with pytest.raises(StoreError, match="too short"):
            backend.read_into("warm/key", start, map_pages(nbytes + 1)[: nbytes + 1 - start], aligned=True)

    def test_read_without_waiting(self, backend: LocalBackend) -> None:
        """What the page cache holds is read without waiting; for what it doesn't hold the caller is told to wait."""
        content = os.urandom(NBYTES)
        backend.put("warm/key", content)
        memory = map_pages(NBYTES)
        with open(os.path.join(backend.root, "warm", "key"), "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert not backend.read_into("warm/key", 0, memory[:NBYTES], at_hand=True)
            file.read()
        assert backend.read_into("warm/key", 0, memory[:NBYTES], at_hand=True)
        assert memory[:NBYTES] == content
        assert backend.read_into("warm/key", NBYTES - 5, memory[:5], at_hand=True)
        assert memory[:5] == content[-5:]
        with pytest.raises(StoreError, match="too short"):
            backend.read_into("warm/key", NBYTES - 5, memory[:6], at_hand=True)

    def test_systems_that_cannot_be_asked_are_waited_for(
        self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where it cannot be found out whether a read would wait, it is taken to, and nobody asks again."""
        backend.put("warm/key", bytes(NBYTES))
        questions = []

        def refuse(*_: object) -> bool:
            questions.append(1)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(backend._reader, "_is_cached", refuse)
        for _ in range(2):
            assert not backend.read_into("warm/key", 0, memoryview(bytearray(NBYTES)), at_hand=True)
        assert backend.read_into("warm/key", 0, memoryview(bytearray(NBYTES)))
        assert len(questions) == 1

    def test_refused_direct_read(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A filesystem that refuses direct reads gives the same bytes through the cache, and isn't asked again."""
        content = os.urandom(NBYTES)
        backend.put("warm/key", content)
        monkeypatch.setattr(backend._reader, "_is_cached", lambda *_: False)
        real = fcntl.fcntl

        def refuse(file: int, command: int, flags: int = 0) -> int:
            if command == fcntl.F_SETFL and flags:
                raise OSError(errno.EINVAL, "no direct I/O here")
            return real(file, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
        memory = map_pages(NBYTES)
        backend.read_into("warm/key", 0, memory[:NBYTES], aligned=True)
        assert memory[:NBYTES] == content
        assert not backend._reader._direct

    def test_short_direct_write(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a direct write leaves over is written through the cache."""
        real = os.pwritev
        monkeypatch.setattr(os, "pwritev", lambda number, pieces, offset: real(number, [pieces[0][: 1 << 20]], offset))
        data = page_aligned(NBYTES)
        data[:] = os.urandom(NBYTES)
        backend.put("key", data, aligned=True)
        assert backend.read("key") == data

    def test_short_buffered_writes(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Writes that stop early are continued."""
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda number, view, offset: real(number, view[:1000], offset))
        backend.put("key", bytes(range(256)) * 20)
        assert backend.read("key") == bytes(range(256)) * 20

    def test_lost_bytes_are_noticed(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is shorter than what was reported as written is an error, not an object."""
        real = os.pwrite

        def lie(number: int, view: memoryview, offset: int) -> int:
            real(number, view[:-1], offset)
            return view.nbytes

        monkeypatch.setattr(os, "pwrite", lie)
        with pytest.raises(StoreError, match="bytes long after"):
            backend.put("key", b"0123456789")
        assert list(backend.list("")) == []


class TestFullAndReadOnly:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A real filesystem of 1 MiB."""
        folder = tmp_path / "disk"
        folder.mkdir()
        mount(folder, "size=1m")
        yield folder
        unmount(folder)

    def test_full_disk(self, small_disk: Path) -> None:
        """A full disk is its own error that names the cure; nothing half-written stays, old objects are whole."""
        backend = LocalBackend(str(small_disk / "root"))
        backend.put("small", b"content")
        with pytest.raises(StoreFullError, match=r"big.*No space left.*delete snapshots, then run gc"):
            backend.put("big", bytes(2 << 20))
        with pytest.raises(StoreFullError):
            backend.put("big", page_aligned(2 << 20), aligned=True)
        assert [info.key for info in backend.list("")] == ["small"]
        assert backend.read("small") == b"content"
        backend.put("fits", b"more")

    def test_read_only_filesystem(self, small_disk: Path) -> None:
        """Writing to a read-only filesystem is ReadOnlyError, for every method that writes; reading works."""
        backend = LocalBackend(str(small_disk / "root"))
        backend.put("key", b"content")
        mount(small_disk, "", MS_REMOUNT | MS_RDONLY)
        assert backend.read("key") == b"content"
        for request in (lambda: backend.put("new", b""), lambda: backend.put("a/b", b""), lambda: backend.touch("key")):
            with pytest.raises(ReadOnlyError, match="read-only"):
                request()
        failures = backend.delete(["key"])
        assert isinstance(failures["key"], ReadOnlyError)

    def test_file_size_limit(self, backend: LocalBackend) -> None:
        """A limit on the size of files reads like a full disk, with its own cure."""
        backend.put("small", b"content")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
            with pytest.raises(StoreFullError, match="ulimit -f"):
                backend.put("big", bytes(1 << 20))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert [info.key for info in backend.list("")] == ["small"]

    def test_forbidden(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without permission, reading and writing fail with errors of their own."""
        backend.put("key", b"")

        def refuse(path: str, *_: Any) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ReadOnlyError, match="owner"):
            backend.put("key", b"")
        with pytest.raises(CredentialsError, match="owner"):
            backend.read("key")

    def test_listing_that_fails_raises(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A folder that can't be listed is an error, never an empty folder."""
        backend.put("folder/key", b"")
        real = os.scandir

        def refuse(path: str) -> Any:
            if path.endswith("/folder"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real(path)

        monkeypatch.setattr(os, "scandir", refuse)
        for request in (lambda: list(backend.list("")), lambda: backend.list_folder("folder")):
            with pytest.raises(CredentialsError, match="folder"):
                request()

    def test_file_where_a_folder_is_needed(self, backend: LocalBackend) -> None:
        """A put below an object fails clearly and harms nothing."""
        backend.put("key", b"content")
        with pytest.raises(StoreError, match="key/below"):
            backend.put("key/below", b"")
        with pytest.raises(StoreError):
            LocalBackend(os.path.join(backend.root, "key")).put("x", b"")
        backend.put("folder/key", b"")
        with pytest.raises(StoreError, match="folder"):
            backend.put("folder", b"")
        assert backend.read("key") == b"content"
        assert temporary_files(backend) == []


class TestPlanted:
    @pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "socket"])
    def test_in_place_of_a_blob(self, backend: LocalBackend, tmp_path: Path, kind: str) -> None:
        """What lies in a blob's place but isn't a regular file is no object: not followed, not waited on, not seen."""
        backend.put(blob()[1], b"")
        _, key, _ = blob()
        path = os.path.join(backend.root, key)
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret")
        plant(kind, path, secret)
        for request in (
            lambda: backend.read(key),
            lambda: backend.read_head(key, 6),
            lambda: backend.read_into(key, 0, memoryview(bytearray(6))),
            lambda: backend.stat(key),
            lambda: backend.touch(key),
        ):
            with pytest.raises(KeyAbsentError):
                request()
        assert backend.sizes([key]) == {}
        assert key not in {info.key for info in backend.list(".torchsnapshot/blobs")}
        assert os.path.basename(path) not in {info.key for info in backend.list_folder(os.path.dirname(key)).objects}
        assert secret.read_bytes() == b"secret"

    def test_put_replaces_a_link(self, backend: LocalBackend, tmp_path: Path) -> None:
        """A put over a planted link replaces the link and doesn't write through it."""
        _, key, content = blob()
        backend.put(blob()[1], b"")
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret")
        os.symlink(secret, os.path.join(backend.root, key))
        backend.put(key, content)
        assert secret.read_bytes() == b"secret"
        assert backend.read(key) == content

    def test_linked_folders(self, backend: LocalBackend, tmp_path: Path) -> None:
        """Outside the store a linked folder is shown by list_folder, not followed by list; inside it is not shown."""
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "file").write_bytes(b"123")
        backend.put("real/key", b"")
        os.symlink(elsewhere, os.path.join(backend.root, "linked"))
        os.symlink("loop", os.path.join(backend.root, "loop"))
        os.symlink(elsewhere, os.path.join(backend.root, ".torchsnapshot", "linked"))
        assert set(backend.list_folder("").folders) == {"real", "linked", ".torchsnapshot"}
        assert [info.key for info in backend.list_folder("linked").objects] == ["linked/file"]
        assert {info.key for info in backend.list("")} == {"real/key"}
        assert "linked" not in backend.list_folder(".torchsnapshot").folders
        identity = backend.folder_identity("linked")
        assert identity is not None
        assert (identity.is_link, identity.inode) == (True, elsewhere.stat().st_ino)
        assert backend.folder_identity("loop") is None

    def test_remove_empty_folders_follows_no_link(self, backend: LocalBackend, tmp_path: Path) -> None:
        """Empty folders behind a link stay."""
        (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
        backend.put("name/key", b"")
        os.symlink(tmp_path / "elsewhere", os.path.join(backend.root, "name", "linked"))
        backend.remove_empty_folders("name")
        assert (tmp_path / "elsewhere" / "empty").is_dir()


class TestListing:
    def test_entries_that_vanish(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files and folders that vanish while a listing runs are left out; the others are all there."""
        for key in ("a/one", "a/two", "gone/three"):
            backend.put(key, b"")
        real = os.scandir

        class Vanishing:
            def __init__(self, path: str) -> None:
                self._entries = real(path)

            def __enter__(self) -> Iterator[os.DirEntry[str]]:
                entries = list(self._entries)
                if (gone := Path(backend.root, "a", "two")).exists():
                    gone.unlink()
                    Path(backend.root, "gone", "three").unlink()
                    Path(backend.root, "gone").rmdir()
                return iter(entries)

            def __exit__(self, *_: object) -> None:
                self._entries.close()

        def at_last_moment(path: str) -> Any:
            return Vanishing(path) if not path.endswith("tmp") else real(path)

        monkeypatch.setattr(os, "scandir", at_last_moment)
        assert {info.key for info in backend.list("")} == {"a/one"}

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_forked_child_can_write(self, backend: LocalBackend) -> None:
        """A backend that has written in the parent works in a forked child, direct writes included."""
        data = page_aligned(NBYTES)
        backend.put("parent", data, aligned=True)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                backend.put("child", page_aligned(NBYTES), aligned=True)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert backend.read("child") == bytes(NBYTES)


def plant(kind: str, path: str, secret: Path) -> None:
    """Put something else where a blob belongs."""
    if kind == "link":
        os.symlink(secret, path)
    elif kind == "dangling link":
        os.symlink(f"{secret}-nothing", path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        os.mknod(path, 0o600 | 0o140000)


def mount(folder: Path, options: str, flags: int = 0) -> None:
    """Mount a tmpfs; needs the right to (a container's root has it), and the test fails without."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), options.encode()) != 0:
        pytest.skip(f"this user may not mount a filesystem: {os.strerror(ctypes.get_errno())}")


def unmount(folder: Path) -> None:
    """Undo ``mount``."""
    ctypes.CDLL(None).umount2(os.fsencode(folder), 2)


def test_folders_that_are_removed_between_two_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put tries again where somebody takes an empty folder away while the one inside of it is being made."""
    backend = LocalBackend(str(tmp_path / "root"))
    real = local.make_folder
    left = [3]

    def make(path: str) -> None:
        if path.endswith("inner") and left[0]:
            left[0] -= 1
            os.rmdir(os.path.dirname(path))
        real(path)

    monkeypatch.setattr(local, "make_folder", make)
    backend.put("outer/inner/key", b"content")
    assert backend.read("outer/inner/key") == b"content"
    assert left == [0]
