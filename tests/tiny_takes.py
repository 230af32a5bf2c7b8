"""Takes of byte strings instead of tensors: the store's part of a take, done by the real code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from torchsnapshot.store.backend import Backend
from torchsnapshot.store.clock import Clock
from torchsnapshot.store.envelope import ChunkRef, ChunkTableBuilder, Head, ManifestFile, pack_manifest
from torchsnapshot.store.keys import OK_SUFFIX, BlobKey, blob_object
from torchsnapshot.store.known import Known, known_for_take
from torchsnapshot.store.leases import TakeSession, start_take
from torchsnapshot.store.memory import MemoryBackend
from torchsnapshot.store.repository import ManifestRef, Repository


class Time:
    """A clock that stands still until somebody sleeps or moves it. Seconds since the epoch."""

    def __init__(self, seconds: float = 1_000_000.0) -> None:
        self.seconds = seconds
        self.slept: list[float] = []

    def now(self) -> float:
        """The time."""
        return self.seconds

    def monotonic(self) -> float:
        """The time."""
        return self.seconds

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.slept.append(seconds)
        self.seconds += seconds


def new_store(time: Time | None = None) -> Repository:
    """An empty store in memory, whose clock is ``time``."""
    return Repository.create_or_open(MemoryBackend(clock=(time or Time()).now))


def reopened(repository: Repository, backend: Backend | None = None) -> Repository:
    """The same store, seen through another backend."""
    return Repository(backend or repository.backend, repository.config)


def manifest_of(repository: Repository, take_id: str, refs: Sequence[ChunkRef], created_ms: int = 1) -> bytes:
    """A manifest that names these chunks."""
    builder = ChunkTableBuilder()
    builder.add(refs)
    table = builder.build()
    nbytes = sum(ref.nbytes for ref in refs)
    head = Head(
        take_id=take_id,
        store_id=repository.store_id,
        created_ms=created_ms,
        parent=None,
        world_size=1,
        state_nbytes=nbytes,
        new_nbytes=nbytes,
        reused_nbytes=0,
        stored_nbytes=nbytes,
        num_chunks=len(refs),
        num_new_chunks=len(refs),
        num_blobs=len(refs),
        library="test",
    )
    return pack_manifest(head, [table], b"")


def chunk_of(content: bytes, take_id: str) -> ChunkRef:
    """The chunk that a take would write for this content."""
    digest = xxhash.xxh3_128_digest(content)
    key = str(BlobKey(digest, take_id, 0))
    return ChunkRef(digest, len(content), key, len(content), 0, len(content))


def write_blobs(session: TakeSession, contents: Iterable[bytes], known: Known | None = None) -> list[ChunkRef]:
    """Reuse what may be reused (nothing, if ``known`` is None), write the rest."""
    refs = []
    for content in contents:
        fresh = chunk_of(content, session.take_id)
        ref = known.lookup(fresh.digest, fresh.nbytes) if known is not None else None
        if ref is None:
            session.repository.put_blob(fresh.key, content)
            ref = fresh
        refs.append(ref)
    return refs


def take(repository: Repository, name: str, *contents: bytes, time: Clock | None = None) -> ManifestRef:
    """A whole take. Its chunks enter the index of this process when it has succeeded."""
    time = time or Time()
    with start_take(repository, name, clock=time, heartbeat_seconds=None) as session:
        known = known_for_take(repository, session.evidence, None, time.monotonic)
        refs = write_blobs(session, contents, known)
        ref = session.commit(manifest_of(repository, session.take_id, refs, session.commit_time_ms()))
        known.learn(refs)
        return ref


def keys_of(repository: Repository, ref: ManifestRef) -> set[str]:
    """The blobs that a manifest names."""
    return ManifestFile(repository.backend.read(ref.object)).envelope.all_keys(repository.read_table)


def blobs_of(backend: Backend) -> set[str]:
    """The keys of all blobs."""
    return {info.key.rpartition("/")[2] for info in backend.list(".torchsnapshot/blobs")}


def missing_blobs(repository: Repository) -> dict[str, set[str]]:
    """What committed snapshots lack, by name; empty in a sound store."""
    there = blobs_of(repository.backend)
    missing = {}
    for ref in repository.walk().roots:
        if ref.committed and not keys_of(repository, ref) <= there:
            missing[ref.name] = keys_of(repository, ref) - there
    return missing


def protocol_objects(backend: Backend) -> list[str]:
    """Everything in ``gc/`` and ``leases/`` that should not outlive its maker: leases and pending sets."""
    return [info.key for folder in ("leases", "gc/pending") for info in backend.list(f".torchsnapshot/{folder}")]


def drop_ok(repository: Repository, ref: ManifestRef) -> None:
    """Make a committed take look as if it had stopped before its ``.ok``."""
    repository.backend.delete([ref.object + OK_SUFFIX])


def drop_blob(repository: Repository, key: str) -> None:
    """Lose a blob."""
    repository.backend.delete([blob_object(key)])
