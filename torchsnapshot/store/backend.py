"""The seam between the store and what holds its bytes: keys in, bytes out, nothing else.

What lives here: the abstract ``Backend``, the values that cross it, and the rules for keys. What doesn't: any layout
(``repository``), any location logic (``locate``), any retry policy (each backend's own).

Contract, tested for every backend by one suite:

- A key is a relative path with ``/``: no empty, ``.`` or ``..`` component, no leading or trailing slash, no NUL.
  Nothing in a key is ever expanded (``*``, ``[``, ``?`` are ordinary characters).
- ``put`` is atomic: a reader sees the old object, or the new one whole. When it returns, the object is durable (unless
  the backend was opened with a lesser durability).
- A short read is an error. An absent key is ``KeyAbsentError``, always.
- A listing is complete and uncached: it holds every object whose put had returned before the listing began.
- Every method may be called from any thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview
"""What ``put`` takes: contiguous bytes, not kept after the call returns."""

StorageOptions = dict[str, Any]
"""What the user passes through to the filesystem: endpoint, keys, project."""

PAGE_NBYTES = 4096
"""Alignment that ``put(aligned=True)`` and aligned reads promise; a multiple of every common logical block size."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: its key, its size in bytes and its modification time by the store's clock.

    ``modified`` is in seconds since the epoch.
    """

    key: str
    nbytes: int
    modified: float


@dataclass(frozen=True, slots=True)
class Folder:
    """One level of a listing: names of sub-folders, and the objects that lie directly in it."""

    folders: tuple[str, ...]
    objects: tuple[ObjectInfo, ...]


@dataclass(frozen=True, slots=True)
class FolderIdentity:
    """Which folder a path really leads to, who owns it, and whether the path's last component is a symbolic link."""

    device: int
    inode: int
    owner: int
    is_link: bool


class Backend(ABC):
    """Bytes under keys below one root. See the module's docstring for the contract."""

    url: str
    """The root as the user would write it, for messages; holds no credentials."""

    is_local: bool = False
    """Whether a stat is cheap and truthful (a POSIX filesystem), so that reuse is proved by stat, not by listing."""

    concurrency: int = 8
    """How many requests in flight this backend profits from."""

    @property
    def device(self) -> str:
        """What holds the bytes, such that all below it is as fast: a disk, a bucket."""
        scheme, separator, rest = self.url.partition("://")
        return f"{scheme}{separator}{rest.partition('/')[0]}" if separator else self.url

    @abstractmethod
    def put(self, key: str, data: Buffer, *, if_absent: bool = False, aligned: bool = False) -> None:
        """Store ``data`` under ``key``, atomically and durably.

        Args:
            key: where.
            data: contiguous bytes.
            if_absent: raise ``KeyExistsError`` if the key is taken. Only honest where the service honours
                conditional writes; the protocol never depends on it.
            aligned: the caller promises that ``data`` begins on a ``PAGE_NBYTES`` boundary of memory that is excluded
                from forks: direct I/O may be used.

        Raises:
            KeyExistsError, StoreFullError, ReadOnlyError, StoreError.
        """

    def put_later(self, key: str, data: Buffer, *, aligned: bool = False) -> None:
        """``put``, but the object need not be durable before ``sync`` has been told of it and has returned.

        For many objects, which nothing refers to before then: a disk makes them durable together for little more than
        one of them costs.
        """
        self.put(key, data, aligned=aligned)

    def sync(self, keys: Iterable[str]) -> None:  # noqa: B027 (most have made them durable already)
        """Make durable what ``put_later`` has stored under these keys.

        Raises:
            StoreError: at least one of them may not be durable; that is final.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        """The object's bytes from ``start``; ``nbytes=None`` means to its end.

        With ``nbytes`` given, fewer bytes than that is a ``StoreError`` (a short object).

        Raises:
            KeyAbsentError, StoreError.
        """

    @abstractmethod
    def read_head(self, key: str, nbytes: int) -> bytes:
        """At most the first ``nbytes`` bytes of the object; a shorter object gives what it has. One request."""

    @abstractmethod
    def read_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """Fill ``buffer`` with the object's bytes from ``start``; a short object is a ``StoreError``.

        Args:
            key: of the object.
            start: in bytes.
            buffer: writable.
            aligned: ``buffer`` begins on a ``PAGE_NBYTES`` boundary of pool memory, and the memory up to the next
                boundary behind its end may be written: direct I/O may be used.
            at_hand: True: only if the bytes are in this machine's memory. False: they are known not to be, or not to be
                right there. None: nothing is known.

        Returns:
            Whether it was filled; if not, it would have had to be waited for, and ``buffer`` holds anything.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """The object's size and time, uncached. Raises ``KeyAbsentError``."""

    def sizes(self, keys: Sequence[str]) -> Mapping[str, int]:
        """The sizes of those objects, in bytes, of which they can be had cheaply, uncached, many at once.

        Of what is left out nothing is known: it may be there or not.
        """
        return {}

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below the folder ``prefix`` (``""`` = all), at any depth, in no order.

        An absent folder is empty. A listing that fails or is cut short raises; it never just ends.
        """

    @abstractmethod
    def list_folder(self, prefix: str) -> Folder:
        """One level: what lies directly in the folder ``prefix`` (``""`` = the root). An absent folder is empty."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> dict[str, Exception]:
        """Delete objects; an absent one counts as deleted. Returns those that could not be deleted, with the reason."""

    @abstractmethod
    def touch(self, key: str) -> None:
        """Renew the object's modification time by the store's clock. Raises ``KeyAbsentError``."""

    def remove_empty_folders(self, prefix: str) -> None:  # noqa: B027 (object stores have nothing to do)
        """Remove the folder ``prefix`` and those below it where nothing is left in them; object stores have none."""

    def folder_identity(self, prefix: str) -> FolderIdentity | None:
        """The folder that ``prefix`` leads to, links followed; None without one, or where the store knows no links."""
        return None

    def close(self) -> None:  # noqa: B027 (most have nothing to release)
        """Release connections. A closed backend must not be used again."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OpenBackend(Protocol):
    """How a backend is opened for a root URL; ``locate.open_backend`` is the real one, tests pass their own."""

    def __call__(self, url: str, storage_options: StorageOptions | None = None) -> Backend:
        """Open the backend of a root URL."""
        ...


# a take asks for the same blobs as the one before
@lru_cache(maxsize=1 << 14)
def check_key(key: str) -> str:
    """Return ``key``, or raise ``ValueError`` where it breaks the rules of the module's docstring."""
    if not key or key[0] == "/" or key[-1] == "/" or "\0" in key:
        raise ValueError(f"not a store key: {key!r}")
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"not a store key: {key!r} (empty, '.' or '..' component)")
    return key
