"""What the remote backend needs of a filesystem: one request per method, no retries, keys relative to the root.

Implementations: ``s3_files``, ``gcs_files``, ``other_files``; ``filesystems`` opens the right one. What doesn't live
there: retries, threads and the translation of errors (``remote``, ``remote_errors``).

Invariants of all of them:

- No listing cache and no shared instances: a listing that another client's put made stale would be taken for the truth.
- Nothing that expands ``*`` or ``[`` in a path, and nothing that swallows an error of one key among many.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from torchsnapshot.store.backend import ObjectInfo

CREATION = "torchsnapshot-creation"
"""The name of the metadata that holds a conditional put's token."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing: names of sub-folders, objects, and the token of the next page (None = complete)."""

    folders: tuple[str, ...]
    objects: tuple[ObjectInfo, ...]
    next_token: str | None


class RemoteFiles(ABC):
    """Objects under keys below one root, through one filesystem."""

    lists_deep = True
    """Whether ``page(deep=True)`` exists; else folders are listed one by one."""

    delete_batch = 1
    """How many keys one ``delete`` takes."""

    forbidden: tuple[str, ...] = ()
    """What no key may contain, because the filesystem would read something else into it."""

    @abstractmethod
    def put(self, key: str, data: bytes, *, creation: str | None = None) -> None:
        """Store ``data``. With ``creation``, a token that is kept with the object: an error where the key is taken."""

    def creation_of(self, key: str) -> str | None:
        """The token that the object was created with, if any."""
        return None

    @abstractmethod
    def get(self, key: str, start: int, end: int | None) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive; None = the end); fewer where the object is shorter."""

    def get_into(self, key: str, start: int, memory: memoryview) -> int:
        """Fill memory with the object's bytes from ``start``; returns how many, fewer only where the object ends there.

        Nothing is written to ``memory`` once this has returned or raised.
        """
        data = wanted_part(self.get(key, start, start + memory.nbytes), start, memory.nbytes)
        memory[: len(data)] = data
        return len(data)

    @abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Size and time; ``FileNotFoundError`` where there is no such object."""

    @abstractmethod
    def page(self, folder: str, *, deep: bool, token: str | None) -> Page:
        """One page of what lies below ``folder`` (directly, or at any depth); raises if the page isn't complete."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> dict[str, Exception]:
        """Delete up to ``delete_batch`` objects; absent ones count as deleted. Returns the failures."""

    def probe(self) -> None:  # noqa: B027 (most have no buckets)
        """Raise if the bucket doesn't exist."""


def wanted_part(data: bytes, start: int, nbytes: int) -> bytes:
    """The ``nbytes`` bytes from ``start`` that were asked for; a server without ranges sends the whole object."""
    return data if len(data) <= nbytes else data[start : start + nbytes]


def seconds(value: object) -> float:
    """Seconds since the epoch, from what filesystems give as a time."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).timestamp()
    return float(value)  # type: ignore[arg-type]
