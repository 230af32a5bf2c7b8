"""Making the names of files and folders durable: fsync of the folder, and of the parent of every folder above it once.

What lives here: which folders' names this process knows to be on disk. What doesn't: the files in them (``local``).

Invariants: a folder counts as settled only while it is the one that was settled: outside of the store, where anybody
may remove a folder and make it again, that takes its inode *and* its change time (inode numbers are reused at once);
below ``.torchsnapshot`` and for ROOT, which nobody removes while it is in use, the inode is enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torchsnapshot.store.parallel import parallel
from torchsnapshot.store.posix import fsync, fsync_folder
from torchsnapshot.store.whole_filesystem import sync_filesystem

_MANY_FILES = 8
"""For fewer files it isn't worth asking what else the filesystem has to write."""

_NUM_THREADS = 8
"""Fsyncs at once: the kernel answers those that wait together with one commit of its journal."""

_Identity = tuple[int, int]


class DurableNames:
    """The folders below one ROOT whose own names are known to be on disk.

    Args:
        root: ROOT's path.
        store: the store's folder in it.
        blobs: the folder of the blob folders; these are settled together.
    """

    def __init__(self, root: str, store: str, blobs: str) -> None:
        self._root = root
        self._store = store
        self._blobs = blobs
        self._settled: dict[str, _Identity] = {}

    def unsettled(self, folder: str) -> list[str]:
        """The folders from ``folder`` up to ROOT whose names this process has not made durable yet.

        To be asked before a name is put into ``folder``: that changes its change time.
        """
        found: list[str] = []
        path = folder
        while self._settled.get(path) != self._identity(path):
            found.append(path)
            if not is_below(path, self._root):
                break
            path = os.path.dirname(path)
        return found

    def settle(self, folder: str, unsettled: list[str]) -> None:
        """Fsync ``folder``, into which a name was put, then the parents of the folders in ``unsettled``, ROOT's first.

        Somebody else may have made a folder and not have fsynced its parent yet: seeing it is not enough.
        """
        fsync_folder(folder)
        for path in reversed(unsettled):
            self._settle_one(path)
        self._settled[folder] = self._identity(folder)

    def settle_files(self, paths: Sequence[str], *, together: bool = False) -> None:
        """Make files durable that have their names already, and these names: all files first, then each folder once.

        Args:
            paths: below the store's folder.
            together: on ROOT's filesystem one call for all of it is as good as one for each of them.
        """
        folders = sorted({os.path.dirname(path) for path in paths})
        if together and len(paths) >= _MANY_FILES and self._settle_together(folders):
            for path in paths:
                # a file that is gone was not made durable
                os.stat(path)
            return
        _for_each(_fsync_file, paths)
        # the first one settles what is above all of them
        for folder in folders[:1]:
            self.settle(folder, self.unsettled(folder))
        _for_each(lambda folder: self.settle(folder, self.unsettled(folder)), folders[1:])

    def _settle_together(self, folders: Sequence[str]) -> bool:
        # what is seen before the call is durable after it, whoever made it
        found = {self._root: os.stat(self._root)}
        for folder in folders:
            path = folder
            # upwards, as far as a folder that is settled, or was looked at before
            while path not in found:
                found[path] = os.stat(path)
                if self._settled.get(path) != self._identity_in(path, found[path]):
                    path = os.path.dirname(path)
        # one filesystem's call says nothing of another's: the store may be a mount point, or a link to another disk
        if len({status.st_dev for status in found.values()}) > 1:
            return False
        if not sync_filesystem(folders[0]):
            return False
        self._settled |= {path: self._identity_in(path, status) for path, status in found.items()}
        return True

    def _settle_one(self, path: str) -> None:
        parent = os.path.dirname(path)
        settled = {path: self._identity(path)}
        if parent == self._blobs:
            with os.scandir(parent) as entries:
                settled |= {entry.path: (entry.inode(), 0) for entry in entries}
        try:
            fsync_folder(parent)
        except PermissionError:
            if path != self._root:
                raise
            # ROOT was there before us in a folder that we may not even open: its name isn't ours to make durable
        self._settled |= settled

    def _identity(self, path: str) -> _Identity:
        return self._identity_in(path, os.stat(path))

    def _identity_in(self, path: str, status: os.stat_result) -> _Identity:
        is_lasting = path == self._root or path == self._store or is_below(path, self._store)
        return status.st_ino, 0 if is_lasting else status.st_ctime_ns


def _fsync_file(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fsync(file)
    finally:
        os.close(file)


def _for_each(function: Callable[[str], None], paths: Sequence[str]) -> None:
    # one task for each thread, not for each path: handing one over takes as long as its fsync
    left = iter(paths)

    def work(_: int) -> None:
        for path in left:
            function(path)

    for _ in parallel(work, range(min(_NUM_THREADS, len(paths))), _NUM_THREADS):
        pass


def is_below(path: str, folder: str) -> bool:
    """Whether ``path`` lies inside ``folder``."""
    return path.startswith(folder.rstrip("/") + "/")
