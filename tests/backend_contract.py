"""The contract that every backend keeps, as one class of tests; ``test_backends`` runs it over each of them."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchsnapshot.errors import KeyAbsentError, KeyExistsError, StoreError
from torchsnapshot.store.backend import PAGE_NBYTES, Backend

STRANGE_KEYS = (
    "a*b/c[1]",
    "a?b/x{y,z}",
    "spaces and +plus/100%",
    "émoji-🔥/ключ",
    "semi;colon&amp=1/#hash",
    "..hidden/.dot/...",
    "UPPER/lower~tilde'quote\"",
)


def page_aligned(nbytes: int) -> memoryview:
    """A buffer as the engine's pool hands it out: page-aligned, readable and writable up to the next boundary."""
    return memoryview(mmap.mmap(-1, nbytes + PAGE_NBYTES))[:nbytes]


class BackendContract:
    """Subclasses are not needed: give a ``backend`` fixture."""

    def test_put_and_read_back(self, backend: Backend) -> None:
        """What was put is read back, whole, by range, into a buffer, and by its head."""
        data = bytes(range(256)) * 40
        backend.put("folder/key", data)
        assert backend.read("folder/key") == data
        assert backend.read("folder/key", 100) == data[100:]
        assert backend.read("folder/key", 100, 50) == data[100:150]
        assert backend.read("folder/key", len(data) - 1, 1) == data[-1:]
        assert backend.read_head("folder/key", 10) == data[:10]
        assert backend.read_head("folder/key", 10**6) == data
        buffer = bytearray(300)
        backend.read_into("folder/key", 7, memoryview(buffer)[100:200])
        assert buffer == bytes(100) + data[7:107] + bytes(100)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_kinds_of_buffers(self, backend: Backend, kind: type) -> None:
        """Every kind of contiguous buffer is taken, also one of other items than bytes."""
        backend.put("key", kind(b"12345678"))
        assert backend.read("key") == b"12345678"
        backend.put("wide", memoryview(b"12345678").cast("I"))
        assert backend.read("wide") == b"12345678"

    def test_buffer_is_not_kept(self, backend: Backend) -> None:
        """The caller may change its buffer as soon as put has returned."""
        data = bytearray(b"before")
        backend.put("key", data)
        data[:] = b"after!"
        assert backend.read("key") == b"before"

    def test_empty_object(self, backend: Backend) -> None:
        """An object without bytes is an object."""
        backend.put("empty", b"")
        assert backend.read("empty") == b""
        assert backend.read("empty", 0, 0) == b""
        assert backend.read_head("empty", 10) == b""
        backend.read_into("empty", 0, memoryview(bytearray()))
        assert backend.stat("empty").nbytes == 0
        assert [info.key for info in backend.list("")] == ["empty"]

    def test_overwrite(self, backend: Backend) -> None:
        """A second put replaces the first, whichever is longer."""
        backend.put("key", b"a long first content")
        backend.put("key", b"short")
        assert backend.read("key") == b"short"
        backend.put("key", b"a third one")
        assert backend.read("key") == b"a third one"
        assert backend.stat("key").nbytes == 11

    def test_absent_key(self, backend: Backend) -> None:
        """Every way to read an absent key is KeyAbsentError, also where it is a folder or lies below an object."""
        backend.put("folder/key", b"x")
        for key in ("nothing", "folder", "folder/other", "folder/key/below"):
            for request in (
                lambda key=key: backend.read(key),
                lambda key=key: backend.read(key, 0, 1),
                lambda key=key: backend.read(key, 0, 0),
                lambda key=key: backend.read_head(key, 10),
                lambda key=key: backend.read_into(key, 0, memoryview(bytearray(1))),
                lambda key=key: backend.stat(key),
                lambda key=key: backend.touch(key),
            ):
                with pytest.raises(KeyAbsentError) as caught:
                    request()
                assert key in str(caught.value)

    def test_short_object(self, backend: Backend) -> None:
        """Fewer bytes than asked for is an error that isn't "absent", and takes no memory first."""
        backend.put("key", b"12345")
        for request in (
            lambda: backend.read("key", 0, 6),
            lambda: backend.read("key", 5, 1),
            lambda: backend.read("key", 100, 1),
            lambda: backend.read("key", 0, 1 << 44),
            lambda: backend.read_into("key", 0, memoryview(bytearray(6))),
            lambda: backend.read_into("key", 99, memoryview(bytearray(6))),
        ):
            with pytest.raises(StoreError, match="too short") as caught:
                request()
            assert not isinstance(caught.value, KeyAbsentError)
        assert backend.read("key", 5) == b""

    def test_strange_keys(self, backend: Backend) -> None:
        """Nothing in a key is expanded or changed, and neighbours that a pattern would match are left alone."""
        neighbours = ("aXb/c1", "aXb/c[1]", "a*b/c1", "aYb/xy")
        for key in STRANGE_KEYS + neighbours:
            backend.put(key, key.encode())
        assert {info.key for info in backend.list("")} == set(STRANGE_KEYS + neighbours)
        for key in STRANGE_KEYS:
            assert backend.read(key) == key.encode()
            folder, _, name = key.rpartition("/")
            assert key in {info.key for info in backend.list_folder(folder).objects}
            assert name not in backend.list_folder(folder).folders
        assert backend.delete(STRANGE_KEYS) == {}
        assert {info.key for info in backend.list("")} == set(neighbours)

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/../b", "./a", "a\0b", ".."])
    def test_refused_keys(self, backend: Backend, key: str) -> None:
        """A key that could lead elsewhere is refused by every method before anything happens."""
        for request in (
            lambda: backend.put(key, b""),
            lambda: backend.read(key),
            lambda: backend.stat(key),
            lambda: backend.delete([key]),
            lambda: backend.touch(key),
        ):
            with pytest.raises(ValueError, match="not a store key"):
                request()

    def test_put_if_absent(self, backend: Backend) -> None:
        """The first conditional put wins; the second is refused and changes nothing, even with equal bytes."""
        backend.put("config", b"first", if_absent=True)
        with pytest.raises(KeyExistsError, match="config"):
            backend.put("config", b"second", if_absent=True)
        with pytest.raises(KeyExistsError):
            backend.put("config", b"first", if_absent=True)
        assert backend.read("config") == b"first"
        backend.delete(["config"])
        backend.put("config", b"third", if_absent=True)
        assert backend.read("config") == b"third"

    def test_list_is_fresh_and_complete(self, backend: Backend) -> None:
        """A listing shows every put and no deleted object, also right after another listing of the same folder."""
        assert list(backend.list("folder")) == []
        keys = {f"folder/{number % 3}/deep/{number:03d}" for number in range(30)} | {"folder/top", "other/key"}
        for key in keys:
            backend.put(key, b"12")
        found = {info.key: info for info in backend.list("folder")}
        assert set(found) == keys - {"other/key"}
        assert all(info.nbytes == 2 for info in found.values())
        assert all(abs(info.modified - backend.stat(info.key).modified) < 2 for info in found.values())
        backend.delete(["folder/top"])
        backend.put("folder/new", b"123")
        assert {info.key for info in backend.list("folder")} == keys - {"other/key", "folder/top"} | {"folder/new"}
        assert {info.key for info in backend.list("")} == keys - {"folder/top"} | {"folder/new"}

    def test_list_takes_a_folder_not_a_prefix(self, backend: Backend) -> None:
        """``list("a")`` doesn't show ``ab/…``, nor an object called ``a``."""
        for key in ("ab/key", "a/key", "abc"):
            backend.put(key, b"")
        assert [info.key for info in backend.list("a")] == ["a/key"]
        assert [info.key for info in backend.list_folder("a").objects] == ["a/key"]
        assert list(backend.list("abc")) == []
        assert backend.list_folder("abc").objects == ()

    def test_list_folder(self, backend: Backend) -> None:
        """One level: objects that lie directly in the folder, and the names of folders."""
        for key in ("top", "a/one", "a/two", "a/b/three", "a/c/d/four"):
            backend.put(key, b"1")
        root = backend.list_folder("")
        assert set(root.folders) - {".torchsnapshot"} == {"a"}  # a local put leaves a folder for temporary files
        assert [info.key for info in root.objects] == ["top"]
        middle = backend.list_folder("a")
        assert sorted(middle.folders) == ["b", "c"]
        assert sorted(info.key for info in middle.objects) == ["a/one", "a/two"]
        absent = backend.list_folder("nothing/here")
        assert (absent.folders, absent.objects) == ((), ())

    def test_delete(self, backend: Backend) -> None:
        """Deleted objects are gone, absent ones count as deleted, others stay."""
        keys = [f"blobs/{number:02x}/key{number}" for number in range(40)]
        for key in [*keys, "stays"]:
            backend.put(key, b"1")
        assert backend.delete([*keys, "absent", "blobs/00/absent"]) == {}
        assert [info.key for info in backend.list("")] == ["stays"]
        assert backend.delete(iter(keys)) == {}
        assert backend.delete([]) == {}

    def test_touch(self, backend: Backend) -> None:
        """A touched object keeps its bytes and doesn't get older."""
        backend.put("key", b"content")
        before = backend.stat("key").modified
        backend.touch("key")
        assert backend.read("key") == b"content"
        assert backend.stat("key").modified >= before

    def test_remove_empty_folders(self, backend: Backend) -> None:
        """Folders without objects go, folders with objects stay."""
        for key in ("name/.manifests/one", "name/sub/two", "name/sub/keep/three"):
            backend.put(key, b"")
        backend.delete(["name/.manifests/one", "name/sub/two"])
        backend.remove_empty_folders("name")
        assert backend.list_folder("name").folders == ("sub",)
        assert backend.list_folder("name/sub").folders == ("keep",)
        backend.remove_empty_folders("absent")
        backend.put("name/.manifests/again", b"")
        assert backend.read("name/.manifests/again") == b""

    @pytest.mark.parametrize("nbytes", [1, PAGE_NBYTES, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 12345])
    def test_aligned_equals_plain(self, backend: Backend, nbytes: int) -> None:
        """Aligned puts and reads move exactly the same bytes, and touch nothing behind the end."""
        source = page_aligned(nbytes)
        source[:] = (b"0123456789abcdef!" * (nbytes // 17 + 1))[:nbytes]
        backend.put("aligned", source, aligned=True)
        backend.put("plain", bytes(source))
        assert backend.stat("aligned").nbytes == nbytes
        for key in ("aligned", "plain"):
            target = page_aligned(nbytes + 100)
            target[nbytes:] = b"\xee" * 100
            backend.read_into(key, 0, target[:nbytes], aligned=True)
            assert target[:nbytes] == source
            assert target[nbytes:] == b"\xee" * 100
            assert backend.read(key) == source
        if nbytes > PAGE_NBYTES:
            target = page_aligned(nbytes - 100)
            backend.read_into("aligned", 100, target, aligned=True)
            assert target == source[100:]

    def test_many_threads(self, backend: Backend) -> None:
        """Every method may be called from any thread at once; readers never see half an object."""
        contents = [bytes([number]) * 5000 for number in range(8)]
        backend.put("shared", contents[0])
        stop = threading.Event()

        def read_for_ever() -> int:
            num_reads = 0
            while not stop.is_set() or num_reads == 0:
                content = backend.read("shared")
                assert content in contents
                assert "shared" in {info.key for info in backend.list("")}
                num_reads += 1
            return num_reads

        def write(number: int) -> None:
            backend.put("shared", contents[number])
            backend.put(f"own/{number}", contents[number])
            assert backend.read(f"own/{number}") == contents[number]
            assert backend.delete([f"own/{number}"]) == {}

        with ThreadPoolExecutor(6) as pool:
            readers = [pool.submit(read_for_ever) for _ in range(2)]
            try:
                for done in [pool.submit(write, number % 8) for number in range(24)]:
                    # the same key may be in use by two writers: each of them must see its own content or an absent key
                    error = done.exception()
                    assert error is None or isinstance(error, KeyAbsentError), error
            finally:
                stop.set()
            assert all(reader.result() > 0 for reader in readers)

    def test_messages_name_the_place(self, backend: Backend) -> None:
        """An error names the store and the key."""
        with pytest.raises(KeyAbsentError) as caught:
            backend.read("some/key")
        assert backend.url in str(caught.value)
        assert "some/key" in str(caught.value)
