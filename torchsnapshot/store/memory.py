"""The backend of tests: a dictionary behind the same contract, with a clock that the test sets.

``MemoryBackend`` objects share nothing with each other; a test that wants two clients of one store gives both the same
object.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from torchsnapshot.errors import KeyAbsentError, KeyExistsError, StoreError
from torchsnapshot.store.backend import Backend, Buffer, Folder, ObjectInfo, check_key


class MemoryBackend(Backend):
    """Objects in a dictionary.

    Args:
        url: what messages name.
        clock: gives the store's time, in seconds since the epoch.
    """

    def __init__(self, url: str = "memory-test://store", *, clock: Callable[[], float] = time.time) -> None:
        self.url = url
        self.clock = clock
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: Buffer, *, if_absent: bool = False, aligned: bool = False) -> None:
        """See ``Backend.put``."""
        check_key(key)
        content = bytes(data)
        with self._lock:
            if if_absent and key in self._objects:
                raise KeyExistsError(f"{self.url}: key {key!r} is taken already")
            self._objects[key] = (content, self.clock())

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        """See ``Backend.read``."""
        content, _ = self._get(key)
        if nbytes is None:
            return content[start:]
        piece = content[start : start + nbytes]
        if len(piece) < nbytes:
            raise StoreError(f"{self.url}: {key!r} is too short: {nbytes} bytes asked for, {len(piece)} are there")
        return piece

    def read_head(self, key: str, nbytes: int) -> bytes:
        """See ``Backend.read_head``."""
        return self._get(key)[0][:nbytes]

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """See ``Backend.read_into``."""
        buffer.cast("B")[:] = self.read(key, start, buffer.nbytes)
        return True

    def stat(self, key: str) -> ObjectInfo:
        """See ``Backend.stat``."""
        content, modified = self._get(key)
        return ObjectInfo(key, len(content), modified)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Backend.list``."""
        start = f"{check_key(prefix)}/" if prefix else ""
        with self._lock:
            found = [
                ObjectInfo(key, len(content), modified)
                for key, (content, modified) in self._objects.items()
                if key.startswith(start)
            ]
        return iter(found)

    def list_folder(self, prefix: str) -> Folder:
        """See ``Backend.list_folder``."""
        start = len(prefix) + 1 if prefix else 0
        folders: dict[str, None] = {}
        objects: list[ObjectInfo] = []
        for info in self.list(prefix):
            name, slash, _ = info.key[start:].partition("/")
            if slash:
                folders[name] = None
            else:
                objects.append(info)
        return Folder(tuple(folders), tuple(objects))

    def delete(self, keys: Iterable[str]) -> dict[str, Exception]:
        """See ``Backend.delete``."""
        with self._lock:
            for key in keys:
                self._objects.pop(check_key(key), None)
        return {}

    def touch(self, key: str) -> None:
        """See ``Backend.touch``."""
        check_key(key)
        with self._lock:
            if key not in self._objects:
                raise self._absent(key)
            self._objects[key] = (self._objects[key][0], self.clock())

    def _get(self, key: str) -> tuple[bytes, float]:
        with self._lock:
            found = self._objects.get(check_key(key))
        if found is None:
            raise self._absent(key)
        return found

    def _absent(self, key: str) -> KeyAbsentError:
        return KeyAbsentError(f"{self.url}: no object {key!r}")
