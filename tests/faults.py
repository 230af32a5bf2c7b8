"""Backends that fail on purpose: for tests of what is left behind, and of what is done about it.

Each wraps another backend. A delete of many keys counts as one operation for each of them, so that a crash can fall
between two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from torchsnapshot.errors import StoreUnavailableError
from torchsnapshot.store.backend import Backend, Buffer, Folder, FolderIdentity, ObjectInfo


class Crash(BaseException):
    """The process is no more: nothing that it does afterwards reaches the store."""


class WrappingBackend(Backend):
    """Passes everything on; subclasses override ``around``."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.url = inner.url
        self.is_local = inner.is_local
        # requests one after the other, so that "the nth operation" means the same in every run
        self.concurrency = 1

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Do one operation: ``call()`` does it."""
        return call()

    def put(self, key: str, data: Buffer, *, if_absent: bool = False, aligned: bool = False) -> None:
        """See ``Backend.put``."""
        self.around("put", key, lambda: self.inner.put(key, data, if_absent=if_absent, aligned=aligned))

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        """See ``Backend.read``."""
        found = self.around("read", key, lambda: self.inner.read(key, start, nbytes))
        assert isinstance(found, bytes)
        return found

    def read_head(self, key: str, nbytes: int) -> bytes:
        """See ``Backend.read_head``."""
        found = self.around("read", key, lambda: self.inner.read_head(key, nbytes))
        assert isinstance(found, bytes)
        return found

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """See ``Backend.read_into``."""
        found = self.around(
            "read", key, lambda: self.inner.read_into(key, start, buffer, aligned=aligned, at_hand=at_hand)
        )
        assert isinstance(found, bool)
        return found

    def stat(self, key: str) -> ObjectInfo:
        """See ``Backend.stat``."""
        found = self.around("stat", key, lambda: self.inner.stat(key))
        assert isinstance(found, ObjectInfo)
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Backend.list``."""
        found = self.around("list", prefix, lambda: list(self.inner.list(prefix)))
        assert isinstance(found, list)
        return iter(found)

    def list_folder(self, prefix: str) -> Folder:
        """See ``Backend.list_folder``."""
        found = self.around("list", prefix, lambda: self.inner.list_folder(prefix))
        assert isinstance(found, Folder)
        return found

    def delete(self, keys: Iterable[str]) -> dict[str, Exception]:
        """See ``Backend.delete``."""
        failures: dict[str, Exception] = {}
        for key in keys:
            failed = self.around("delete", key, lambda key=key: self.inner.delete([key]))  # type: ignore[misc]
            assert isinstance(failed, dict)
            failures.update(failed)
        return failures

    def touch(self, key: str) -> None:
        """See ``Backend.touch``."""
        self.around("touch", key, lambda: self.inner.touch(key))

    def remove_empty_folders(self, prefix: str) -> None:
        """See ``Backend.remove_empty_folders``."""
        self.around("remove_empty_folders", prefix, lambda: self.inner.remove_empty_folders(prefix))

    def folder_identity(self, prefix: str) -> FolderIdentity | None:
        """See ``Backend.folder_identity``."""
        return self.inner.folder_identity(prefix)


class Recording(WrappingBackend):
    """Notes every operation as (operation, key)."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.operations: list[tuple[str, str]] = []

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Note it, then do it."""
        self.operations.append((operation, key))
        return call()


class CrashAt(WrappingBackend):
    """Crashes at the nth operation (0 = the first) and answers nothing from then on.

    ``after`` = the operation is still done, but nobody learns of it. ``crashed`` says whether it came to that.
    """

    def __init__(self, inner: Backend, nth: int, *, after: bool = False) -> None:
        super().__init__(inner)
        self._left = nth
        self._after = after
        self._lock = threading.Lock()
        self.crashed = False

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Do it, unless the time has come."""
        with self._lock:
            if self.crashed:
                raise Crash
            if self._left == 0:
                self.crashed = True
                if self._after:
                    call()
                raise Crash
            self._left -= 1
        return call()


class Fuse:
    """Ends one process, whatever number of backends it opens, before its nth change of the store (0 = the first).

    Between two changes the store is the same, so these are all the ends that there are. ``blown`` says whether it came
    to that, ``changes`` what was done before.
    """

    def __init__(self, nth: int) -> None:
        self.blown = False
        self.changes: list[tuple[str, str]] = []
        self._nth = nth
        self._lock = threading.Lock()

    def backend(self, inner: Backend) -> Backend:
        """The same backend, for as long as the process lives."""
        return _Fused(inner, self)

    def do(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Do it, unless the time has come. One after the other, so that nothing runs beside the end."""
        with self._lock:
            is_change = operation not in ("read", "stat", "list")
            self.blown |= is_change and len(self.changes) == self._nth
            if self.blown:
                raise Crash
            if is_change:
                self.changes.append((operation, key))
            return call()


class _Fused(WrappingBackend):
    def __init__(self, inner: Backend, fuse: Fuse) -> None:
        super().__init__(inner)
        self._fuse = fuse

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        return self._fuse.do(operation, key, call)


class Failing(WrappingBackend):
    """Fails the operations that ``should_fail(operation, key)`` picks, with a fresh ``error()``.

    ``done`` = the operation is done all the same: the answer is lost, not the request.
    """

    def __init__(
        self,
        inner: Backend,
        should_fail: Callable[[str, str], bool],
        error: Callable[[], Exception] = lambda: StoreUnavailableError("no answer"),
        *,
        done: bool = False,
    ) -> None:
        super().__init__(inner)
        self._should_fail = should_fail
        self._error = error
        self._done = done

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Do it, or fail."""
        if not self._should_fail(operation, key):
            return call()
        if self._done:
            call()
        if operation == "delete":
            return {key: self._error()}
        raise self._error()


class FailNth(Failing):
    """Fails the nth operation of one kind (0 = the first), and no other."""

    def __init__(
        self,
        inner: Backend,
        operation: str,
        nth: int,
        error: Callable[[], Exception] = lambda: StoreUnavailableError("no answer"),
        *,
        done: bool = False,
    ) -> None:
        seen = [0]

        def is_nth(found: str, key: str) -> bool:
            if found != operation:
                return False
            seen[0] += 1
            return seen[0] == nth + 1

        super().__init__(inner, is_nth, error, done=done)
