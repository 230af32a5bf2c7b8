"""What the local backend asks of the kernel: direct reads and writes, links, and fsync. Knows no keys and no layout.

Writes go past the page cache: they are fsynced at once, so the cache would only add a copy (measured: three times as
fast for 4 MiB files). Reads take from the cache what it holds, and go past it for what it doesn't: filling it costs
fresh memory and a copy (measured: direct reads of 4 MiB files are nearly twice as fast). Whether it holds a range is
asked with ``RWF_NOWAIT`` at two of its pages. Where it doesn't, that very question starts a read into the cache, so the
file is marked for random access first, which keeps that to the one page; and the pages are chosen by chance, so that
pages which earlier questions have left there do not pass for the whole range.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import stat
import threading
from collections.abc import Iterable

from torchsnapshot.store.backend import PAGE_NBYTES

DIRECT_MIN_NBYTES = 1 << 20
"""Below this size the page cache is faster than direct I/O."""

_NUM_PROBES = 2

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_FULL_FSYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the data in the drive's cache


class FileWriter:
    """Fills files, past the page cache where that is asked for and the filesystem plays along.

    Where a filesystem has refused direct writes once, they are not tried again.
    """

    def __init__(self) -> None:
        self._direct = _O_DIRECT != 0
        self._page = _BouncePage()

    def create(self, path: str, view: memoryview, *, direct: bool) -> tuple[int, bool]:
        """Make a new file that all of ``view`` will be written to.

        Args:
            path: of the file; there must be none yet.
            view: what is to be written.
            direct: ``view`` begins on a page boundary of memory.

        Returns:
            The descriptor, and whether it goes past the page cache.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        if direct and self._direct and view.nbytes >= DIRECT_MIN_NBYTES:
            try:
                return os.open(path, flags | _O_DIRECT, 0o666), True
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self._direct = False
                # open(2): whoever refuses O_DIRECT may have made the file before
                unlink_quietly(path)
        return os.open(path, flags, 0o666), False

    def write(self, file: int, view: memoryview, *, direct: bool) -> bool:
        """Write all of ``view`` to a new file.

        Args:
            file: made by ``create``.
            view: as ``create`` was given it.
            direct: as ``create`` has returned it.

        Returns:
            Whether all of it went past the page cache, so that no write of it can still fail unseen.
        """
        done = 0
        if direct:
            done = self._write_direct(file, view)
            if done == view.nbytes:
                return True
            fcntl.fcntl(file, fcntl.F_SETFL, 0)
        while done < view.nbytes:
            num_written = os.pwrite(file, view[done:], done)
            if num_written <= 0:
                raise OSError(errno.EIO, f"write of {view.nbytes - done} bytes wrote nothing")
            done += num_written
        _check_size(file, view.nbytes)
        return False

    def _write_direct(self, file: int, view: memoryview) -> int:
        """Write past the page cache as far as it goes; the number of bytes written, 0 where direct I/O is refused."""
        whole = view.nbytes & -PAGE_NBYTES
        pieces: list[memoryview] = [view[:whole]]
        if whole < view.nbytes:
            # The last page goes through a page of our own, so that no stranger's bytes reach the disk.
            page = self._page.memory
            tail_nbytes = view.nbytes - whole
            page[:tail_nbytes] = view[whole:]
            page[tail_nbytes:] = bytes(PAGE_NBYTES - tail_nbytes)
            pieces.append(page)
        try:
            num_written = os.pwritev(file, pieces, 0)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._direct = False
            return 0
        if num_written > view.nbytes:
            os.ftruncate(file, view.nbytes)
            _check_size(file, view.nbytes)
        return min(num_written, view.nbytes)


class FileReader:
    """Fills memory from files, past the page cache where that does not hold what is wanted.

    Where a filesystem has refused direct reads once, they are not tried again.
    """

    def __init__(self) -> None:
        self._can_ask = _NOWAIT != 0 and hasattr(os, "posix_fadvise")
        self._direct = _O_DIRECT != 0 and self._can_ask
        self._page = _BouncePage()

    def read(self, file: int, view: memoryview, start: int, *, direct: bool, at_hand: bool | None = None) -> int | None:
        """Fill ``view`` from ``start`` on in the file.

        Args:
            file: open for reading, at no position that matters.
            view: where to.
            start: in bytes.
            direct: ``view`` begins on a page of memory that is left out of forks.
            at_hand: True: only where the page cache seems to hold all of it. False: the page cache is not asked.

        Returns:
            How many bytes there were: less than the view's only where the file ends. None where nothing was read, as
            the disk would have had to be waited for.
        """
        done = 0
        if at_hand:
            if self._would_wait(file, start, view.nbytes):
                return None
        elif direct and self._direct and view.nbytes >= DIRECT_MIN_NBYTES and start % PAGE_NBYTES == 0:
            done = self._read_direct(file, view, start, is_cold=at_hand is False)
        while done < view.nbytes:
            num_read = os.preadv(file, [view[done:]], start + done)
            if num_read == 0:
                break
            done += num_read
        return done

    def _read_direct(self, file: int, view: memoryview, start: int, *, is_cold: bool) -> int:
        """Read past the page cache; the number of bytes, 0 where the cache has them or direct I/O is refused."""
        try:
            if not is_cold and self._is_cached(file, start, view.nbytes):
                return 0
            fcntl.fcntl(file, fcntl.F_SETFL, _O_DIRECT)
            try:
                # whole pages: what remains comes through the cache, so that nothing behind the view is written
                return os.preadv(file, [view[: view.nbytes & -PAGE_NBYTES]], start)
            finally:
                fcntl.fcntl(file, fcntl.F_SETFL, 0)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._direct = False
            return 0

    def _would_wait(self, file: int, start: int, nbytes: int) -> bool:
        if not nbytes:
            return False
        if not self._can_ask:
            return True
        try:
            return not self._is_cached(file, start, nbytes)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._can_ask = False
            return True

    def _is_cached(self, file: int, start: int, nbytes: int) -> bool:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            for _ in range(_NUM_PROBES):
                page = start + random.randrange(-(-nbytes // PAGE_NBYTES)) * PAGE_NBYTES
                if os.preadv(file, [self._page.memory], page, _NOWAIT) <= 0:
                    return False
        except BlockingIOError:
            return False
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_NORMAL)
        return True


def _check_size(file: int, nbytes: int) -> None:
    size = os.fstat(file).st_size
    if size != nbytes:
        raise OSError(errno.EIO, f"file is {size} bytes long after {nbytes} bytes were written")


class _BouncePage(threading.local):
    """One page of memory per thread, aligned for direct I/O.

    Private, so that a fork's tails are not the parent's. Not left out of forks: direct I/O never fills it.
    """

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, PAGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def make_folder(path: str) -> None:
    """Make one folder; one that is there already is as good."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None


def fsync(file: int) -> None:
    """Return when the file is on the disk, not only in the drive's cache."""
    os.fsync(file)
    if _FULL_FSYNC is not None:
        fcntl.fcntl(file, _FULL_FSYNC)


def fsync_folder(path: str) -> int:
    """Fsync a folder; returns its inode."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fsync(file)
        except OSError as error:
            # some filesystems have no fsync of folders and say so: their names are durable or never can be
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        return os.fstat(file).st_ino
    finally:
        os.close(file)


def link(temp: str, target: str) -> bool:
    """Link ``temp`` as ``target``; False where the filesystem has no links, ``FileExistsError`` where it is taken."""
    try:
        os.link(temp, target, follow_symlinks=False)
    except FileExistsError:
        if os.stat(temp).st_nlink == 1:
            raise
        # the reply to our own link was lost (NFS): the name is ours
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        return False
    return True


def sizes_of(paths: Iterable[str]) -> list[int | None]:
    """The sizes of regular files in bytes; None for one of which nothing is known. Links are not followed.

    That costs a third of what a stat with a message for each error costs.
    """
    sizes: list[int | None] = []
    for path in paths:
        try:
            status = os.lstat(path)
            sizes.append(status.st_size if stat.S_ISREG(status.st_mode) else None)
        except OSError:
            sizes.append(None)
    return sizes


def unlink_quietly(temp: str) -> None:
    """Remove a temporary file, if that is possible."""
    try:
        os.unlink(temp)
    except OSError:
        pass  # it was renamed already, or a collector takes it
