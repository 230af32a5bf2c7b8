"""One store and the snapshots below its ROOT: config, blobs, manifests, and the order in which they are written.

What lives here: ROOT's layout as operations. What doesn't: leases and the commit (``leases``, ``commit``), the search
below ROOT (``walk``), the decision to delete blobs (``gc``, and nothing else in the library).

Ordering rules. Each is one half of a promise that a reader or a collector relies on:

- A blob is durable before a manifest names it; a manifest is durable before its ``.ok``; the ``.ok`` is there before
  the take reports success. So what a reader may open is complete.
- A manifest goes up whole and never changes. A re-take adds a generation; older ones go only after the new ``.ok``.
- Removing a snapshot: first the note in ``gc/removed``, then, from the lowest generation on, ``.ok`` before its
  manifest, then the signpost, and that only when no manifest is left. So a stop at any instant leaves either the
  snapshot or an uncommitted manifest, and never an older generation brought back.
- Exactly the files that a listing showed are removed: what another take commits meanwhile stays.
- ``config`` is made once and read again after a take's lease: who lost the race uses what it reads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torchsnapshot.errors import (
    FormatError,
    KeyAbsentError,
    KeyExistsError,
    MissingBlobError,
    NewerFormatError,
    SnapshotError,
    SnapshotNotFoundError,
    StoreError,
    StoreFullError,
)
from torchsnapshot.store.backend import Backend, Buffer
from torchsnapshot.store.config import hint_of_neighbour, read_config
from torchsnapshot.store.envelope import HEAD_READ_NBYTES, Head, read_head
from torchsnapshot.store.keys import OK_SUFFIX, SIGNPOST, blob_object, new_id, parse_blob_key
from torchsnapshot.store.liveness import without_takes_in_flight
from torchsnapshot.store.parallel import parallel
from torchsnapshot.store.records import (
    ALGORITHM_XXH3_128,
    BLOBS_FOLDER,
    CONFIG_OBJECT,
    DAMAGED_FOLDER,
    DEFAULT_CHUNK_NBYTES,
    REMOVED_FOLDER,
    SWEEPS_FOLDER,
    WRITER_LEVEL,
    Config,
    DamagedSet,
    Removed,
    Sweep,
)
from torchsnapshot.store.walk import ManifestRef, Walk, manifest_folder, manifests_in, walk

__all__ = ["ManifestRef", "Repository", "SnapshotInfo", "Walk"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A committed snapshot: its name below ROOT, its newest manifest, and that manifest's head."""

    name: str
    ref: ManifestRef
    head: Head


class Repository:
    """A store below one ROOT. Every method may be called from any thread."""

    def __init__(self, backend: Backend, config: Config) -> None:
        self.backend = backend
        self.config = config
        self._newest_commit_ms = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, backend: Backend) -> Repository:
        """Open an existing store.

        Raises:
            SnapshotNotFoundError: ROOT has no store.
            FormatError: its config is unreadable.
        """
        return cls(backend, read_config(backend))

    @classmethod
    def create_or_open(cls, backend: Backend, *, chunk_nbytes: int = DEFAULT_CHUNK_NBYTES) -> Repository:
        """Open the store to write into it, and make it where there is none.

        Args:
            backend: the store's ROOT.
            chunk_nbytes: for a new store; an existing one keeps its own.

        Raises:
            NewerFormatError: a newer version of the library writes this store.
            FormatError: its config is unreadable.
        """
        try:
            config = read_config(backend)
        except SnapshotNotFoundError:
            fresh = Config(new_id(), chunk_nbytes)
            # what is put is what would be read: a size out of bounds fails before it is stored
            Config.unpack(fresh.pack())
            try:
                backend.put(CONFIG_OBJECT, fresh.pack(), if_absent=True)
                logger.info(
                    "created a store in %s: snapshots below it share their content%s",
                    backend.url,
                    hint_of_neighbour(backend),
                )
            except KeyExistsError:
                pass
            config = read_config(backend)
        repository = cls(backend, config)
        repository.check_writable()
        return repository

    @property
    def url(self) -> str:
        """ROOT, as the user would write it."""
        return self.backend.url

    @property
    def store_id(self) -> str:
        """The store's random id."""
        return self.config.store_id

    @property
    def chunk_nbytes(self) -> int:
        """The most bytes that a new grid gives a chunk."""
        return self.config.chunk_nbytes

    def reload_config(self) -> None:
        """Read the config again: of two takes that made it at once, one lost."""
        self.config = read_config(self.backend)
        self.check_writable()

    def check_writable(self) -> None:
        """Raise ``NewerFormatError`` where this library is too old to write here."""
        if self.config.writer_level > WRITER_LEVEL:
            raise NewerFormatError(
                f"the store {self.url} is written by a newer version of the library (level {self.config.writer_level}, "
                f"this one knows {WRITER_LEVEL}): upgrade it"
            )
        if self.config.algorithm != ALGORITHM_XXH3_128:
            raise NewerFormatError(
                f"new content of the store {self.url} is named by digest algorithm {self.config.algorithm}, which this "
                "library does not know: upgrade it"
            )

    # blobs

    def put_blob(self, key: str, data: Buffer, *, aligned: bool = False, later: bool = False) -> None:
        """Store a blob under a key that no other content ever has.

        Durable on return; with ``later``, when ``sync_blobs`` has been told of it and has returned.
        """
        put = self.backend.put_later if later else self.backend.put
        put(_blob(key), data, aligned=aligned)

    def sync_blobs(self, keys: Iterable[str]) -> None:
        """Make durable what ``put_blob`` has stored under these keys."""
        self.backend.sync([_blob(key) for key in keys])

    def blob_nbytes(self, key: str) -> int | None:
        """The stored size of a blob, None where it is absent. One request."""
        try:
            return self.backend.stat(_blob(key)).nbytes
        except KeyAbsentError:
            return None

    def blob_sizes(self, keys: Iterable[str]) -> Mapping[str, int]:
        """The stored sizes of those blobs of which they can be had cheaply. See ``Backend.sizes``."""
        objects = {_blob(key): key for key in keys}
        return {objects[found]: nbytes for found, nbytes in self.backend.sizes(list(objects)).items()}

    def read_blob(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        """A blob's bytes from ``start``; ``nbytes=None`` means to its end.

        Raises:
            MissingBlobError: the blob is not there.
        """
        try:
            return self.backend.read(_blob(key), start, nbytes)
        except KeyAbsentError as error:
            raise self._missing(key) from error

    def read_blob_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """Fill ``buffer`` with a blob's bytes from ``start``; see ``Backend.read_into``.

        Raises:
            MissingBlobError: the blob is not there.
        """
        try:
            return self.backend.read_into(_blob(key), start, buffer, aligned=aligned, at_hand=at_hand)
        except KeyAbsentError as error:
            raise self._missing(key) from error

    def read_table(self, key: str) -> bytes:
        """The bytes of a table blob; what reads an envelope checks them by their digest."""
        return self.read_blob(key)

    def list_blobs(self, foreign: list[str] | None = None) -> Iterator[tuple[str, int]]:
        """Every blob as (key, size in bytes), in no order.

        Args:
            foreign: takes up the objects in ``blobs/`` that are no blobs of ours.
        """
        top = self.backend.list_folder(BLOBS_FOLDER)
        if foreign is not None:
            foreign += [info.key for info in top.objects]

        def list_one(folder: str) -> list[tuple[str, int]]:
            return [(info.key, info.nbytes) for info in self.backend.list(f"{BLOBS_FOLDER}/{folder}")]

        for found in parallel(list_one, top.folders, self.backend.concurrency):
            for where, nbytes in found:
                key = where.rpartition("/")[2]
                if parse_blob_key(key) is not None and where == blob_object(key):
                    yield key, nbytes
                elif foreign is not None:
                    foreign.append(where)

    def delete_blobs(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete blobs; for the collector alone. Returns the keys that could not be deleted, with the reason."""
        objects = {_blob(key): key for key in keys}
        try:
            failures = self.backend.delete(objects)
        except SnapshotError as error:
            return {key: str(error) for key in keys}
        return {objects[where]: str(reason) for where, reason in failures.items()}

    def mark_damaged(self, keys: Iterable[str]) -> None:
        """Note blobs that were found damaged: no take reuses them from now on."""
        found = frozenset(keys)
        if found:
            self.backend.put(f"{DAMAGED_FOLDER}/{new_id()}", DamagedSet(found).pack())

    # manifests

    def manifests_of(self, name: str) -> list[ManifestRef]:
        """Every manifest of one snapshot, committed or not, newest last."""
        return manifests_in(name, self.backend.list_folder(manifest_folder(name)).objects).refs

    def newest_committed(self, name: str) -> ManifestRef | None:
        """The manifest that a reader of this snapshot opens."""
        return next((ref for ref in reversed(self.manifests_of(name)) if ref.committed), None)

    def walk(self) -> Walk:
        """Every manifest below ROOT. Raises ``StoreError`` where a folder cannot be listed."""
        return walk(self.backend)

    def read_manifest(self, ref: ManifestRef) -> bytes:
        """The whole manifest. Raises ``KeyAbsentError`` where it is gone since the listing."""
        data = self.backend.read(ref.object)
        self.note_commit_time(read_head(data[:HEAD_READ_NBYTES]).created_ms)
        return data

    def read_manifest_head(self, ref: ManifestRef) -> Head:
        """The head alone. Raises ``KeyAbsentError`` where the manifest is gone since the listing."""
        head = read_head(self.backend.read_head(ref.object, HEAD_READ_NBYTES))
        self.note_commit_time(head.created_ms)
        return head

    def list_snapshots(self, below: str = "") -> list[SnapshotInfo]:
        """Every committed snapshot of this ROOT, the newest commit last. An unreadable one is logged and left out.

        Args:
            below: only the one of this name and those below it; "" = all.
        """
        newest: dict[str, ManifestRef] = {}
        for ref in self.walk().refs:
            if below and ref.name != below and not ref.name.startswith(f"{below}/"):
                continue
            if ref.committed and (ref.name not in newest or newest[ref.name].manifest < ref.manifest):
                newest[ref.name] = ref
        found = parallel(self._info, newest.values(), self.backend.concurrency)
        return sorted((info for info in found if info is not None), key=lambda info: (info.head.created_ms, info.name))

    def _info(self, ref: ManifestRef) -> SnapshotInfo | None:
        try:
            return SnapshotInfo(ref.name, ref, self.read_manifest_head(ref))
        except KeyAbsentError:
            return None  # deleted since the walk
        except FormatError as error:
            logger.warning("snapshot %r in %s is left out, its manifest is unreadable: %s", ref.name, self.url, error)
            return None

    def delete_snapshot(self, name: str) -> list[ManifestRef]:
        """Remove one snapshot: all manifests that a listing shows now, but that of a take which has not committed yet.

        Its content goes with the next gc.

        Returns:
            What was removed.

        Raises:
            SnapshotNotFoundError: there is no manifest.
        """
        refs = without_takes_in_flight(self.backend, lambda: self.manifests_of(name))
        if not refs:
            why = ", only a take that runs, or was interrupted" if self.manifests_of(name) else ""
            raise SnapshotNotFoundError(f"no snapshot {name!r} in {self.url}{why}")
        self.remove_manifests(refs)
        return refs

    def remove_manifests(self, refs: Sequence[ManifestRef]) -> None:
        """Remove exactly these manifests, in the order that the module's docstring gives.

        Raises:
            StoreError: something could not be removed; the rest of that snapshot was left as it is.
        """
        if not refs:
            return
        try:
            self.backend.put(f"{REMOVED_FOLDER}/{new_id()}", Removed(tuple({ref.root for ref in refs})).pack())
        except StoreFullError as error:
            # it would be absurd to refuse to make room for want of room: without the note a collector may stop and ask
            logger.warning("no room to note what is removed, so gc may ask for --force: %s", error)
        for name in sorted({ref.name for ref in refs}):
            self.delete_manifest_files(sorted((ref for ref in refs if ref.name == name), key=lambda ref: ref.manifest))
            self._clear_folder(name)

    def delete_manifest_files(self, refs: Sequence[ManifestRef]) -> None:
        """Delete these manifests of one snapshot, given newest last: lowest first, each ``.ok`` before its manifest."""
        for ref in refs:
            for key in (ref.object + OK_SUFFIX, ref.object):
                for failed, reason in self.backend.delete([key]).items():
                    raise StoreError(f"could not delete {failed} in {self.url}: {reason}") from reason

    def _clear_folder(self, name: str) -> None:
        """Remove what belongs to a snapshot's manifests, if none is left."""
        folder = manifest_folder(name)
        left = manifests_in(name, self.backend.list_folder(folder).objects)
        lone = [f"{folder}/{manifest}" for manifest in left.lone_oks]
        # a listing may show the .ok of a take that commits meanwhile and miss its manifest, which was there before it
        if left.refs or any(self._exists(manifest) for manifest in lone):
            return
        lone = [manifest + OK_SUFFIX for manifest in lone]
        failures = self.backend.delete([*lone, f"{name}/{SIGNPOST}" if name else SIGNPOST])
        for key, reason in failures.items():
            logger.warning("could not delete %s in %s: %s", key, self.url, reason)
        self.backend.remove_empty_folders(name or folder)

    def _exists(self, key: str) -> bool:
        try:
            self.backend.stat(key)
        except KeyAbsentError:
            return False
        return True

    # commit times

    def note_commit_time(self, created_ms: int) -> None:
        """Take in a commit time that was read, in milliseconds since the epoch."""
        with self._lock:
            self._newest_commit_ms = max(self._newest_commit_ms, created_ms)

    def next_commit_time(self, now_ms: int) -> int:
        """The commit time of a take that packs its head now: after every one that this repository has read or given."""
        with self._lock:
            self._newest_commit_ms = max(now_ms, self._newest_commit_ms + 1)
            return self._newest_commit_ms

    # explaining

    def _missing(self, key: str) -> MissingBlobError:
        return MissingBlobError(
            f"blob {key} is not in {self.url}: {self.explain_missing(key)}. Restore another snapshot; `torchsnapshot "
            "verify` lists all that is missing"
        )

    def explain_missing(self, key: str) -> str:
        """Why this blob is not there, as far as the store knows; for messages."""
        try:
            for info in self.backend.list(SWEEPS_FOLDER):
                sweep = Sweep.unpack(self.backend.read(info.key))
                if sweep.outcome != "gave up" and key in sweep.keys:
                    return (
                        f"a gc run by {sweep.process} deleted it, because no manifest named it: the snapshot had been "
                        "removed, or lay outside of this ROOT"
                    )
        except SnapshotError:
            return "nobody knows why, the store's sweep markers are unreadable"
        return "no gc of the last 30 days deleted it: something else did, or the snapshot was copied without its store"


@lru_cache(maxsize=1 << 14)  # a take asks for the blobs of the one before
def _blob(key: str) -> str:
    if parse_blob_key(key) is None:
        raise ValueError(f"not a blob key: {key!r}")
    return blob_object(key)
