"""The POSIX backend: objects are files below one folder, put atomically and durably.

What lives here: the order of system calls that makes a put atomic and durable. What doesn't: direct writes
(``posix``), what an errno means to the user (``local_errors``), where ROOT is (``locate``), any layout but that of
temporary files.

Invariants:

- A put is: write a temporary file → fsync → rename (or link) → fsync of the folder → once for each folder that this
  process meets: fsync of its parent. A failed fsync is final: the kernel may have dropped the pages it could not write.
- Leases and signposts are atomic but not fsynced on a local disk: a lease says that a process lives, and none of them
  outlives a power loss; nothing is decided by a signpost. It saves a take half of its fixed cost.
- Below ``.torchsnapshot`` only regular files are objects. A link, a pipe or a folder in an object's place is "no object
  of that key"; it is never followed, opened for its content, or waited on.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torchsnapshot.errors import KeyExistsError, StoreError
from torchsnapshot.store.backend import Backend, Buffer, Folder, FolderIdentity, ObjectInfo, check_key
from torchsnapshot.store.blob_folders import make_blob_folders
from torchsnapshot.store.durable_names import DurableNames, is_below
from torchsnapshot.store.keys import LEASES_FOLDER, SIGNPOST, STORE_FOLDER
from torchsnapshot.store.local_errors import OpenFile, translate
from torchsnapshot.store.mounts import Coherence, Mount, device_of, find_mount
from torchsnapshot.store.posix import (
    FileReader,
    FileWriter,
    fsync,
    fsync_folder,
    link,
    make_folder,
    sizes_of,
    unlink_quietly,
)
from torchsnapshot.store.temporary_names import temporary_name
from torchsnapshot.store.whole_filesystem import FILESYSTEMS

_PUT_ATTEMPTS = 5


class LocalBackend(Backend):
    """Objects as files below the folder ``root``.

    Args:
        root: an absolute path; it is made by the first put.
        durable: False skips every fsync: a power loss may then lose or empty what was put before it. A crash of the
            process alone loses nothing either way.
    """

    is_local = True
    concurrency = 8

    def __init__(self, root: str, *, durable: bool = True) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root
        self.durable = durable
        self._temp_folder = os.path.join(self.root, STORE_FOLDER, "tmp")
        self._blobs_folder = os.path.join(self.root, STORE_FOLDER, "blobs")
        self._seen_folders: set[str] = set()
        self._names = DurableNames(self.root, os.path.join(self.root, STORE_FOLDER), self._blobs_folder)
        self._writer = FileWriter()
        self._reader = FileReader()
        self._mount: Mount | None = None

    @property
    def device(self) -> str:
        """See ``Backend.device``. ROOT itself may not be there yet."""
        return f"device {device_of(self.root)}"

    # ---- writing

    def put(self, key: str, data: Buffer, *, if_absent: bool = False, aligned: bool = False) -> None:
        """See ``Backend.put``."""
        self._put(key, data, if_absent, aligned, later=False)

    def put_later(self, key: str, data: Buffer, *, aligned: bool = False) -> None:
        """See ``Backend.put_later``. Each fsync makes the drive empty its cache, which holds up the other writes."""
        self._put(key, data, False, aligned, later=self._is_on_local_disk())

    def sync(self, keys: Iterable[str]) -> None:
        """See ``Backend.sync``."""
        if not self.durable:
            return
        try:
            self._names.settle_files([self._path(key) for key in keys], together=self.mount.type in FILESYSTEMS)
        except OSError as error:
            raise translate(error, self.url, "sync", "", writing=True) from error

    def _put(self, key: str, data: Buffer, if_absent: bool, aligned: bool, *, later: bool) -> None:
        target = self._path(key)
        view = memoryview(data).cast("B")
        # Without fsync the page cache takes the bytes at memory speed: direct I/O would only wait for the disk.
        durable = self.durable and not self._may_be_lost(key)
        direct = aligned and durable
        temp_folder = self._temp_folder
        failure: OSError | None = None
        for _ in range(_PUT_ATTEMPTS):
            try:
                self._put_once(key, temp_folder, target, view, if_absent, durable, direct, later)
                return
            except FileExistsError as error:
                raise KeyExistsError(f"{self.url}: key {key!r} is taken already") from error
            except OSError as error:
                failure = error
            if failure.errno == errno.EXDEV and temp_folder == self._temp_folder:
                temp_folder = os.path.dirname(target)
            elif failure.errno == errno.ENOENT:
                # A folder is not there yet, or somebody removed an empty one, or a collector took the temporary file
                # of a take that it holds for dead: make the folders and begin again.
                self._seen_folders.discard(os.path.dirname(target))
                try:
                    self._make_folder(temp_folder)
                    self._make_folder(os.path.dirname(target), alone=later)
                except FileNotFoundError as error:
                    # somebody removed an empty one between two of ours
                    failure = error
                except OSError as error:
                    raise translate(error, self.url, "put", key, writing=True) from error
            else:
                break
        assert failure is not None
        raise translate(failure, self.url, "put", key, writing=True) from failure

    def _put_once(
        self,
        key: str,
        temp_folder: str,
        target: str,
        view: memoryview,
        if_absent: bool,
        durable: bool,
        direct: bool,
        later: bool,
    ) -> None:
        if durable and not self._is_folder(os.path.dirname(target)):
            # the rename would say so too, but only after the write
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target)
        temp = os.path.join(temp_folder, temporary_name(key))
        file, direct = self._writer.create(temp, view, direct=direct)
        try:
            try:
                all_direct = self._writer.write(file, view, direct=direct)
                # of a failed write out of the page cache only this descriptor is sure to hear
                if durable and not (later and all_direct):
                    fsync(file)
            finally:
                os.close(file)  # NFS reports a failed write-back here: it is not swallowed
            durable = durable and not later
            unsettled = self._names.unsettled(os.path.dirname(target)) if durable else []
            if not (if_absent and link(temp, target)):
                os.rename(temp, target)
        except BaseException:
            unlink_quietly(temp)
            raise
        if if_absent:
            unlink_quietly(temp)
        if durable:
            self._names.settle(os.path.dirname(target), unsettled)

    def _may_be_lost(self, key: str) -> bool:
        """Whether a power loss may take the object. Not on a network: there others go on when this machine stops."""
        if not key.startswith(f"{LEASES_FOLDER}/") and key.rpartition("/")[2] != SIGNPOST:
            return False
        return self._is_on_local_disk()

    @property
    def mount(self) -> Mount:
        """Where ROOT is mounted, or will be."""
        if self._mount is None:
            self._mount = find_mount(self.root)
        return self._mount

    def _is_on_local_disk(self) -> bool:
        return self.mount.coherence is Coherence.LOCAL

    # ---- folders

    def _is_folder(self, path: str) -> bool:
        """Whether a folder is there. One that has been seen is taken to be there still: a put finds out if it isn't."""
        if path in self._seen_folders:
            return True
        if not os.path.isdir(path):
            return False
        self._seen_folders.add(path)
        return True

    def _make_folder(self, folder: str, *, alone: bool = False) -> None:
        """Make ``folder`` and what is missing above it; unless ``alone``, a folder of blobs with all its neighbours."""
        missing: list[str] = []
        path = folder
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            make_folder(path)
            if os.path.dirname(path) == self._blobs_folder and not alone:
                # their names then cost one fsync of the parent, not one each
                make_blob_folders(self._blobs_folder)
            if self.durable and not is_below(path, self.root):
                fsync_folder(os.path.dirname(path))

    # ---- reading

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        """See ``Backend.read``."""
        with self._open(key) as file:
            available = max(0, os.fstat(file.number).st_size - start)
            if nbytes is None:
                nbytes = available
            elif available < nbytes:
                # before any memory is taken: the size may come from a hostile manifest
                raise self._short(key, start, nbytes, available)
            return self._read_fully(file, key, start, nbytes)

    def read_head(self, key: str, nbytes: int) -> bytes:
        """See ``Backend.read_head``."""
        with self._open(key) as file:
            return self._read_fully(file, key, 0, min(nbytes, os.fstat(file.number).st_size))

    def _read_fully(self, file: OpenFile, key: str, start: int, nbytes: int) -> bytes:
        pieces: list[bytes] = []
        done = 0
        while done < nbytes:
            piece = os.pread(file.number, nbytes - done, start + done)
            if not piece:
                raise self._short(key, start, nbytes, done)
            pieces.append(piece)
            done += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """See ``Backend.read_into``."""
        view = buffer.cast("B")
        with self._open(key) as file:
            done = self._reader.read(file.number, view, start, direct=aligned, at_hand=at_hand)
            if done is not None and done < view.nbytes:
                raise self._short(key, start, view.nbytes, done)
        return done is not None

    def stat(self, key: str) -> ObjectInfo:
        """See ``Backend.stat``."""
        try:
            status = os.stat(self._path(key), follow_symlinks=not _is_in_store(key))
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ELOOP, "not a regular file")
        except OSError as error:
            raise translate(error, self.url, "stat", key, writing=False) from error
        return ObjectInfo(key, status.st_size, status.st_mtime)

    def sizes(self, keys: Sequence[str]) -> Mapping[str, int]:
        """See ``Backend.sizes``. Where another machine has the files, each would be waited for."""
        if self.mount.coherence is not Coherence.LOCAL:
            return {}
        found = sizes_of(map(self._path, keys))
        return {key: nbytes for key, nbytes in zip(keys, found, strict=True) if nbytes is not None}

    def _open(self, key: str) -> OpenFile:
        # O_NONBLOCK: opening a planted pipe must not wait for its other end; regular files ignore it
        flags = os.O_RDONLY | os.O_NONBLOCK | (os.O_NOFOLLOW if _is_in_store(key) else 0)
        try:
            file = os.open(self._path(key), flags)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                os.close(file)
                raise OSError(errno.ELOOP, "not a regular file")
        except OSError as error:
            raise translate(error, self.url, "read", key, writing=False) from error
        return OpenFile(file, self.url, key)

    def _short(self, key: str, start: int, nbytes: int, available: int) -> StoreError:
        return StoreError(
            f"{self.url}: {key!r} is too short: {nbytes} bytes were asked for from offset {start}, and {available} are "
            "there. It was truncated after it was written: verify the snapshots of this store"
        )

    # ---- listing

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Backend.list``. Links to folders are not followed."""
        pending = [prefix]
        while pending:
            folder = pending.pop()
            found = self._scan(folder, follow_folders=False)
            yield from found.objects
            pending.extend(f"{folder}/{name}" if folder else name for name in found.folders)

    def list_folder(self, prefix: str) -> Folder:
        """See ``Backend.list_folder``. Outside ``.torchsnapshot``, a link to a folder counts as a folder."""
        return self._scan(prefix, follow_folders=True)

    def folder_identity(self, prefix: str) -> FolderIdentity | None:
        """See ``Backend.folder_identity``."""
        path = self._path(prefix) if prefix else self.root
        try:
            status = os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                return None
            return FolderIdentity(status.st_dev, status.st_ino, status.st_uid, os.path.islink(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise translate(error, self.url, "list", prefix, writing=False) from error

    def _scan(self, prefix: str, *, follow_folders: bool) -> Folder:
        in_store = _is_in_store(prefix)
        subfolders: list[str] = []
        objects: list[ObjectInfo] = []
        try:
            with os.scandir(self._path(prefix) if prefix else self.root) as entries:
                for entry in entries:
                    try:
                        if entry.is_dir(follow_symlinks=follow_folders and not in_store):
                            subfolders.append(entry.name)
                            continue
                        status = entry.stat(follow_symlinks=not in_store)
                    except OSError as error:
                        if error.errno in (errno.ENOENT, errno.ELOOP):
                            continue  # it vanished while we looked, or it is a link to nothing or to itself
                        raise
                    if stat.S_ISREG(status.st_mode):
                        key = f"{prefix}/{entry.name}" if prefix else entry.name
                        objects.append(ObjectInfo(key, status.st_size, status.st_mtime))
        except (FileNotFoundError, NotADirectoryError):
            return Folder((), ())
        except OSError as error:
            raise translate(error, self.url, "list", prefix, writing=False) from error
        return Folder(tuple(subfolders), tuple(objects))

    # ---- removing and renewing

    def delete(self, keys: Iterable[str]) -> dict[str, Exception]:
        """See ``Backend.delete``.

        Outside ``.torchsnapshot`` the folders are fsynced: a deleted snapshot must not come back after gc has taken its
        blobs. A blob or protocol object that comes back is garbage, and gc takes it again.
        """
        failures: dict[str, Exception] = {}
        changed: dict[str, str] = {}
        for key in keys:
            path = self._path(key)
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue  # no object of that key
            except OSError as error:
                failures[key] = translate(error, self.url, "delete", key, writing=True)
                continue
            if not _is_in_store(key):
                changed[os.path.dirname(path)] = key
        for folder, key in changed.items() if self.durable else ():
            try:
                fsync_folder(folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                failures[key] = translate(error, self.url, "delete", key, writing=True)
        return failures

    def touch(self, key: str) -> None:
        """See ``Backend.touch``. The time is the file server's own."""
        self.stat(key)  # a folder or a link is no object
        try:
            os.utime(self._path(key), follow_symlinks=False)
        except OSError as error:
            absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
            raise translate(error, self.url, "touch", key, writing=not absent) from error

    def remove_empty_folders(self, prefix: str) -> None:
        """See ``Backend.remove_empty_folders``. ROOT itself stays."""
        top = self._path(prefix) if prefix else self.root
        for folder, _, _ in os.walk(top, topdown=False, followlinks=False):
            if folder != self.root:
                try:
                    os.rmdir(folder)
                except OSError:
                    pass  # something is in it, or somebody else was faster

    def _path(self, key: str) -> str:
        return f"{self.root}/{check_key(key)}"


def _is_in_store(key: str) -> bool:
    return key == STORE_FOLDER or key.startswith(STORE_FOLDER + "/")
