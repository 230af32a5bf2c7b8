"""The blobs of one take, made durable together at its end.

What lives here: which blobs have been put and are not durable yet. What doesn't: how a backend puts them and makes them
durable (``local``), and the commit that waits for it.

Invariant: a blob may be named by a manifest only after the ``sync`` that follows its put has returned. Before that it
is garbage that nothing refers to: a power loss may leave anything in its place, and gc takes it.
"""

from __future__ import annotations

import threading

from torchsnapshot.store.repository import Repository


class PendingBlobs:
    """A repository's blobs, put without waiting for the disk one by one. Any thread may put.

    Args:
        repository: where they go.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._keys: list[str] = []

    def put_blob(self, key: str, data: memoryview, *, aligned: bool = False) -> None:
        """Store a blob; it is durable after the next ``sync``."""
        self._repository.put_blob(key, data, aligned=aligned, later=True)
        with self._lock:
            self._keys.append(key)

    def blob_nbytes(self, key: str) -> int | None:
        """See ``Repository.blob_nbytes``."""
        return self._repository.blob_nbytes(key)

    def read_blob_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """See ``Repository.read_blob_into``."""
        return self._repository.read_blob_into(key, start, buffer, aligned=aligned, at_hand=at_hand)

    def sync(self) -> None:
        """Make all that was put durable.

        Raises:
            StoreError: some of it may not be durable: nothing may refer to it.
        """
        with self._lock:
            keys, self._keys = self._keys, []
        if keys:
            self._repository.sync_blobs(keys)
