"""What each errno means to the user: one of our errors, with the place and the cure."""

from __future__ import annotations

import errno
import os

from torchsnapshot.errors import (
    CredentialsError,
    KeyAbsentError,
    ReadOnlyError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

_CURES: dict[int, str] = {
    errno.ENOSPC: "free space (delete snapshots, then run gc) or use another disk; committed snapshots are intact",
    errno.EDQUOT: "your quota is used up: free space (delete snapshots, then run gc) or have it raised",
    errno.EFBIG: "a file-size limit is in force: see `ulimit -f`",
    errno.EROFS: "the filesystem is mounted read-only: remount it, or take the snapshot elsewhere",
    errno.EACCES: "check the owner and the mode of the folder and of those above it",
    errno.EPERM: "check the owner, the mode and the attributes (lsattr) of the folder and of those above it",
    errno.EIO: "the disk reported an error: see the kernel's log before you trust it with more",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine",
    errno.ENAMETOOLONG: "use a shorter snapshot path",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ELOOP: "a link, pipe or folder lies there instead of a file; links are not followed inside the store",
    errno.ENXIO: "a socket or device lies there instead of a file",
    errno.ESTALE: "the file server lost its handle: try again",
    errno.ETIMEDOUT: "the file server does not answer: try again later",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO)
_UNAVAILABLE = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)


def translate(error: OSError, url: str, action: str, key: str, *, writing: bool) -> StoreError:
    """The error to raise for ``error``, met while doing ``action`` to ``key`` in the store at ``url``."""
    number = error.errno or 0
    reason = error.strerror or str(error)
    message = f"{url}: {action} {key!r}: {reason}" if key else f"{url}: {action}: {reason}"
    cure = _CURES.get(number)
    if number == errno.ENOENT and writing:
        cure = "its folder was removed meanwhile, or this filesystem lets nobody make one there"
    if cure is not None:
        message = f"{message} ({cure})"
    return _kind(number, writing)(message)


def _kind(number: int, writing: bool) -> type[StoreError]:
    if number in _FULL:
        return StoreFullError
    if number == errno.EROFS:
        return ReadOnlyError
    if number in _REFUSED:
        return ReadOnlyError if writing else CredentialsError
    if number in _UNAVAILABLE:
        return StoreUnavailableError
    if number in _ABSENT and not writing:
        return KeyAbsentError
    return StoreError


class OpenFile:
    """An open file descriptor, to be read in a ``with`` block whose errors name the store and the key."""

    __slots__ = ("key", "number", "url")

    def __init__(self, number: int, url: str, key: str) -> None:
        self.number = number
        self.url = url
        self.key = key

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        os.close(self.number)
        if isinstance(error, OSError):
            raise translate(error, self.url, "read", self.key, writing=False) from error
