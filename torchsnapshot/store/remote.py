"""The backend over fsspec: S3, GCS, and any other filesystem that fsspec knows.

What lives here: retries with their bound, threads, forks, and the contract's rules on top of one-request calls. What
doesn't: how a kind of filesystem is opened and spoken to (``filesystems``), what an error means (``remote_errors``).

Invariants:

- There is one retry loop, this one; those of the clients below are switched off, so that the bound is what it says.
- A conditional put leaves a token with the object. "Taken" may mean that it was ours and only the reply was lost (the
  HTTP client below sends a PUT again when a kept connection breaks): the token tells.
- After a fork the child opens connections of its own.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torchsnapshot.errors import BucketNotFoundError, KeyAbsentError, KeyExistsError, StoreError
from torchsnapshot.store.backend import Backend, Buffer, Folder, ObjectInfo, StorageOptions, check_key
from torchsnapshot.store.filesystems import open_files
from torchsnapshot.store.parallel import parallel
from torchsnapshot.store.remote_errors import is_taken, is_transient, translate, without_password
from torchsnapshot.store.remote_files import Page, RemoteFiles, wanted_part

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CONCURRENCY = 32
_LONG_SECONDS = 5.0
"""A failed attempt that took longer than this is told of: it is a service that does not answer."""

_SEQUENTIAL_DELETES = 4


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried, and how long is waited in between: a random half to whole of a doubling time.

    Times are in seconds.
    """

    attempts: int = 6
    first_wait: float = 0.3
    longest_wait: float = 8.0

    def wait(self, attempt: int) -> None:
        """Wait after the failed attempt number ``attempt`` (from 0)."""
        time.sleep(min(self.longest_wait, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0))


class RemoteBackend(Backend):
    """Objects in a bucket, or wherever else fsspec leads.

    Args:
        url: the root, as ``protocol://…``.
        storage_options: what the filesystem's constructor takes (endpoint, keys, project…).
        retry: how transient errors are retried.

    Raises:
        UnknownProtocolError, CredentialsError, StoreError.
        ValueError: the filesystem refuses one of the options.

    A put is atomic where the filesystem's is: on object stores. Through filesystems that write in place (plain sftp,
    smb) a reader may see half an object, and a crash may leave one. Chunks and manifests are checked by digest when
    they are read, so that this shows as an error; prefer a mounted path there all the same.
    """

    concurrency = _CONCURRENCY

    def __init__(
        self, url: str, storage_options: StorageOptions | None = None, *, retry: RetryPolicy | None = None
    ) -> None:
        self._full_url = url.rstrip("/") if not url.endswith("://") else url
        self.url = without_password(self._full_url)
        self._options = dict(storage_options or {})
        self._retry = retry or RetryPolicy()
        self._bucket_seen = False
        self._opened: tuple[int, RemoteFiles] = (os.getpid(), self._open())

    # ---- writing

    def put(self, key: str, data: Buffer, *, if_absent: bool = False, aligned: bool = False) -> None:
        """See ``Backend.put``."""
        self._check(key)
        content = data if isinstance(data, bytes) else bytes(data)
        token = os.urandom(16).hex() if if_absent else None

        def put_once() -> None:
            try:
                self._files.put(key, content, creation=token)
            except Exception as error:
                if token is None or not is_taken(error):
                    raise
                if self._files.creation_of(key) != token:
                    raise KeyExistsError(f"{self.url}: key {key!r} is taken already") from error

        try:
            self._call("put", key, put_once, writing=True)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                self._check_bucket()
            raise

    # ---- reading

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        """See ``Backend.read``."""
        data = self._get(key, start, nbytes)
        if nbytes is not None:
            self._check_length(key, start, nbytes, len(data))
        return data

    def read_head(self, key: str, nbytes: int) -> bytes:
        """See ``Backend.read_head``."""
        return self._get(key, 0, nbytes)

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """See ``Backend.read_into``."""
        if at_hand:
            return False
        view = buffer.cast("B")
        if not view.nbytes:
            self.stat(key)
            return True
        self._check(key)
        found = self._call_for("read", key, lambda: self._files.get_into(key, start, view))
        self._check_length(key, start, view.nbytes, found)
        return True

    def _check_length(self, key: str, start: int, wanted: int, found: int) -> None:
        if found < wanted:
            raise StoreError(
                f"{self.url}: {key!r} is too short: {wanted} bytes were asked for from offset {start}, and {found} "
                "are there. It was truncated after it was written: verify the snapshots of this store"
            )

    def _get(self, key: str, start: int, nbytes: int | None) -> bytes:
        self._check(key)
        if nbytes == 0:
            self.stat(key)
            return b""
        end = None if nbytes is None else start + nbytes
        data = self._call_for("read", key, lambda: self._files.get(key, start, end))
        return data if nbytes is None else wanted_part(data, start, nbytes)

    def stat(self, key: str) -> ObjectInfo:
        """See ``Backend.stat``."""
        self._check(key)
        return self._call_for("stat", key, lambda: self._files.info(key))

    # ---- listing

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Backend.list``."""
        if prefix:
            check_key(prefix)
        deep = self._files.lists_deep
        pending = [prefix]
        while pending:
            folder = pending.pop()
            for page in self._pages(folder, deep=deep):
                yield from filter(_is_object, page.objects)
                if not deep:
                    pending.extend(f"{folder}/{name}" if folder else name for name in page.folders)

    def list_folder(self, prefix: str) -> Folder:
        """See ``Backend.list_folder``."""
        if prefix:
            check_key(prefix)
        folders: dict[str, None] = {}
        objects: list[ObjectInfo] = []
        for page in self._pages(prefix, deep=False):
            folders.update((name, None) for name in page.folders if name)
            objects.extend(filter(_is_object, page.objects))
        return Folder(tuple(folders), tuple(objects))

    def _pages(self, folder: str, *, deep: bool) -> Iterator[Page]:
        token: str | None = None
        while True:
            request = partial(self._files.page, folder, deep=deep, token=token)
            try:
                page = self._call("list", folder, request, writing=False)
            except KeyAbsentError as error:
                # folders are never absent in a bucket, they are empty
                raise self._no_bucket("list", folder, error) from error
            self._bucket_seen = True
            yield page
            if page.next_token is None:
                return
            if page.next_token == token:
                raise StoreError(
                    f"{self.url}: the listing of {folder!r} does not go on: after this page comes this page"
                )
            token = page.next_token

    # ---- removing and renewing

    def delete(self, keys: Iterable[str]) -> dict[str, Exception]:
        """See ``Backend.delete``."""
        todo = [self._check(key) for key in keys]
        size = self._files.delete_batch
        batches = [todo[first : first + size] for first in range(0, len(todo), size)]
        num_threads = self.concurrency if len(batches) > _SEQUENTIAL_DELETES else 1
        failures: dict[str, Exception] = {}
        for failed in parallel(self._delete_batch, batches, num_threads):
            failures.update(failed)
        return failures

    def _delete_batch(self, keys: Iterable[str]) -> dict[str, Exception]:
        todo = tuple(keys)
        failures: dict[str, Exception] = {}
        for attempt in range(self._retry.attempts):
            try:
                failed = self._files.delete(todo)
            except Exception as error:
                failed = dict.fromkeys(todo, error)
            again = tuple(key for key in todo if key in failed and is_transient(failed[key]))
            failures.update((key, error) for key, error in failed.items() if key not in again)
            if not again:
                break
            if attempt + 1 == self._retry.attempts:
                failures.update((key, failed[key]) for key in again)
                break
            todo = again
            self._retry.wait(attempt)
        return {key: translate(error, self.url, "delete", key, writing=True) for key, error in failures.items()}

    def touch(self, key: str) -> None:
        """See ``Backend.touch``. Objects have no touch: the same content is put again."""
        self.put(key, self.read(key))

    # ---- requests

    def _check(self, key: str) -> str:
        check_key(key)
        for part in self._files.forbidden:
            if part in key:
                raise ValueError(f"{self.url}: {key!r} must not contain {part!r} on this kind of store")
        return key

    @property
    def _files(self) -> RemoteFiles:
        owner, files = self._opened
        if owner != os.getpid():
            # The parent's event loop and sockets don't live here. Two threads may both open: the last one stays.
            files = self._open()
            self._opened = (os.getpid(), files)
        return files

    def _open(self) -> RemoteFiles:
        try:
            return open_files(self._full_url, self._options, num_connections=self.concurrency)
        except (ValueError, StoreError):
            raise
        except Exception as error:
            raise translate(error, self.url, "open", "", writing=False) from error

    def _call(self, action: str, key: str, request: Callable[[], T], *, writing: bool) -> T:
        attempt = 0
        while True:
            started = time.monotonic()
            try:
                return request()
            except StoreError:
                raise
            except Exception as error:
                if attempt + 1 >= self._retry.attempts or not is_transient(error):
                    raise translate(error, self.url, action, key, writing=writing) from error
                problem = error
            attempt += 1
            # whoever waits for minutes wants to know for what; a passing hiccup is nobody's business
            level = logging.WARNING if time.monotonic() - started > _LONG_SECONDS else logging.DEBUG
            logger.log(
                level,
                "%s: %s %r failed, attempt %d of %d: %s",
                self.url,
                action,
                key,
                attempt,
                self._retry.attempts,
                without_password(f"{type(problem).__name__}: {problem}"),
            )
            self._retry.wait(attempt - 1)

    def _call_for(self, action: str, key: str, request: Callable[[], T]) -> T:
        """A reading request for one object: an absent one may also mean that the bucket is."""
        try:
            return self._call(action, key, request, writing=False)
        except KeyAbsentError as error:
            self._check_bucket()
            raise KeyAbsentError(f"{self.url}: no object {key!r}") from error

    def _check_bucket(self) -> None:
        if self._bucket_seen:
            return
        try:
            self._call("open", "", self._files.probe, writing=False)
        except KeyAbsentError as error:
            raise self._no_bucket("open", "", error) from error
        except BucketNotFoundError:
            raise
        except StoreError:
            return  # these credentials may read objects but not list: the absent key is all that is known
        self._bucket_seen = True

    def _no_bucket(self, action: str, key: str, error: Exception) -> BucketNotFoundError:
        where = f"{action} {key!r}" if key else action
        return BucketNotFoundError(
            f"{self.url}: {where}: there is no such bucket (create it, or check its name and the endpoint): {error}"
        )


def _is_object(info: ObjectInfo) -> bool:
    """Whether an entry can be an object of ours: not a console's marker for a folder, nor a name that is no key."""
    try:
        check_key(info.key)
    except ValueError:
        return False
    return True
