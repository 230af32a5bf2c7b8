"""Runs a take: lease → index → plan → jobs → commit.

What lives here: the order of a take's steps and its figures. What doesn't: arguments and defaults (``snapshot``), the
work on one chunk (``take_jobs``), what is cut how (``plan``), the protocol's rules (``store.leases``,
``store.known``).

Invariant: the manifest is put after every blob that it names is durable; ``store.leases`` does the rest of the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

from torchsnapshot import knobs
from torchsnapshot.chunks.bases import bases_of
from torchsnapshot.chunks.reader import BlobStore
from torchsnapshot.chunks.writer import ChunkWriter, Encoding
from torchsnapshot.engine.meter import meter_of
from torchsnapshot.engine.pipeline import Run
from torchsnapshot.engine.staging import get_memory_ready, submit_take, wait_staged, warm_up
from torchsnapshot.format.entries import (
    MAX_INLINE_NBYTES,
    USER_METADATA,
    Entry,
    StoredManifest,
    ValueEntry,
    pack_entries,
)
from torchsnapshot.reading.opening import Opened
from torchsnapshot.state.app_state import PrepareTensor
from torchsnapshot.state.live_digests import Look, live_digests
from torchsnapshot.state.values import NotPlain, encode
from torchsnapshot.stateful import Stateful
from torchsnapshot.stats import Stats
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.envelope import Head, PackedSection, join_manifest, pack_body, user_metadata_fits
from torchsnapshot.store.known import Known, known_for_take
from torchsnapshot.store.leases import TakeSession, start_take
from torchsnapshot.store.locate import place_for_take
from torchsnapshot.store.pending_blobs import PendingBlobs
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking import history
from torchsnapshot.taking.plan import SMALL_CHUNK_NBYTES, TakePlan, build_entries
from torchsnapshot.taking.planning import TakenState
from torchsnapshot.taking.repack import lonely_chunks, move
from torchsnapshot.taking.structure import Structure
from torchsnapshot.taking.take_jobs import buffer_sizes, take_jobs
from torchsnapshot.version import __version__

VerifyReplicas = Literal["sample", "full", "off"]
"""How much of what ranks are said to hold alike is compared in each take; see ``Snapshot.take``."""


@dataclass(frozen=True, slots=True)
class TakeOptions:
    """What ``Snapshot.take`` was asked to do beyond the state itself; checked when it is made.

    Raises:
        ValueError: an unknown encoding or ``verify_replicas``, or user metadata that is too large.
        TypeError: ``replicated`` is not a list of globs, ``user_metadata`` no dict of plain values with str keys, or
            ``prepare`` no function.
    """

    replicated: Sequence[str] | None = None
    storage_options: StorageOptions | None = None
    prepare: PrepareTensor | None = None
    encoding: Encoding = "auto"
    store: str | None = None
    user_metadata: Mapping[str, Any] | None = None
    verify_replicas: VerifyReplicas = "sample"

    def __post_init__(self) -> None:
        if self.encoding not in get_args(Encoding):
            raise ValueError(f"encoding={self.encoding!r}: allowed are {', '.join(map(repr, get_args(Encoding)))}")
        if self.verify_replicas not in get_args(VerifyReplicas):
            allowed = ", ".join(map(repr, get_args(VerifyReplicas)))
            raise ValueError(f"verify_replicas={self.verify_replicas!r}: allowed are {allowed}")
        # whoever is not checked by mypy may pass anything
        globs: Any = self.replicated
        is_list = isinstance(globs, (list, tuple, set, frozenset))
        if globs is not None and not (is_list and all(isinstance(glob, str) for glob in globs)):
            raise TypeError(f"replicated must be a list of globs, got {globs!r}")
        prepare: object = self.prepare
        if prepare is not None and not callable(prepare):
            raise TypeError(f"_custom_tensor_prepare_func must be a function, got {prepare!r}")
        metadata: Any = self.user_metadata
        if metadata is None:
            return
        if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
            raise TypeError(f"user_metadata must be a dict with str keys, got {metadata!r}")
        try:
            encoded = encode(dict(metadata))
        except NotPlain as error:
            raise TypeError(f"user_metadata: {error}; put it into app_state") from error
        if len(encoded) > MAX_INLINE_NBYTES:
            raise ValueError(f"user_metadata is larger than {MAX_INLINE_NBYTES} bytes; put it into app_state as a dict")


def open_take(path: str, statefuls: Mapping[str, Stateful], options: TakeOptions) -> Take:
    """Read the state and open the store: all that can fail before anything is written."""
    stats = Stats()
    with stats.phase("state_dict"):
        state = TakenState(statefuls, options.prepare)
    with stats.phase("open"):
        place = place_for_take(path, options.store, options.storage_options, durable=knobs.is_durable())
        repository = Repository.create_or_open(place.backend, chunk_nbytes=knobs.get_chunk_size_bytes())
    return Take(repository, place.name, options, stats, state)


def chunk_writer(
    repository: Repository,
    take_id: str,
    rank: int,
    encoding: Encoding,
    *,
    in_background: bool,
    blobs: BlobStore | None = None,
) -> ChunkWriter:
    """What stores the new chunks of one take of one rank, with what the process knows of bases.

    ``blobs``: where they go, if not right into the repository.
    """
    bases, backend = bases_of(repository.store_id), repository.backend
    if encoding != "raw":
        bases.begin_take(knobs.get_base_memory_bytes(bases.held_nbytes))
    return ChunkWriter(
        blobs or repository,
        take_id,
        rank,
        encoding,
        meter=meter_of(backend.device, is_local=backend.is_local, in_background=in_background),
        bases=bases,
        reads_bases=backend.is_local,
        # in the background, cores that are scarce for the take's threads are scarce for training, too
        num_cores=None if in_background else knobs.get_num_cores(),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What a take holds between staging and commit."""

    session: TakeSession
    parent: history.Remembered
    previous: history.Remembered
    known: Known
    look: Look
    plan: TakePlan
    writer: ChunkWriter
    blobs: PendingBlobs
    run: Run


class Take:
    """One take of one process, from the flattened state to the commit. A context: leaving it drops the lease."""

    def __init__(
        self, repository: Repository, name: str, options: TakeOptions, stats: Stats, state: TakenState
    ) -> None:
        self.repository = repository
        self.name = name
        self.stats = stats
        self._state: TakenState | None = state
        self._options = options
        self._session: TakeSession | None = None
        self._run: Run | None = None
        self._work: _Work | None = None
        self._structure: Structure | None = None

    def begin(self, *, in_background: bool) -> None:
        """Put the lease, plan, and hand the work to the engine.

        Args:
            in_background: return as soon as the caller may change its tensors; else when every blob is durable.
        """
        repository, stats = self.repository, self.stats
        with stats.phase("lease"):
            session = self._session = start_take(repository, self.name)
        parent = history.recall(repository.store_id)
        with stats.phase("index"):
            known = known_for_take(repository, session.evidence, parent.take_id)
        with stats.phase("plan"):
            previous = parent
            if parent.take_id is None and known.newest is not None:
                # a process without a memory of its own compares with the newest manifest of the store
                previous = history.Remembered.of_manifest(StoredManifest(known.newest, repository.read_table))
            chunk_nbytes = knobs.get_chunk_size_bytes(repository.chunk_nbytes)
            small_nbytes = 0 if knobs.is_batching_disabled() else min(SMALL_CHUNK_NBYTES, chunk_nbytes)
            assert self._state is not None
            look = live_digests().look()
            plan, expected, self._structure = self._state.plan(
                repository.store_id, previous, known, look, chunk_nbytes, small_nbytes
            )
            self._state = None
            blobs, encoding = PendingBlobs(repository), self._options.encoding
            writer = chunk_writer(repository, session.take_id, 0, encoding, in_background=in_background, blobs=blobs)
            jobs, sizes = take_jobs(plan, expected, known, writer, look), buffer_sizes(plan, expected)
            if expected.unwritten:
                # workers have nothing to hash meanwhile; before there are any, looking for many blobs is quickest
                known.look_for([chunk.ref for chunk in expected.unwritten])
            refs = list(expected.refs)
            # tensors of which nothing has to be staged live no longer than the look at them
            del expected
        with stats.phase("stage" if in_background else "write"):
            concurrency = repository.backend.concurrency
            run = self._run = submit_take(jobs, concurrency=concurrency, in_background=in_background, sizes=sizes)
            del jobs
            # the first bytes are being compared; workers that looked for each blob would take turns at Python's lock
            with run.stopped_by_errors():
                known.look_for(refs, lambda: not run.is_staged)
            wait_staged(run) if in_background else run.wait()
        self._work = _Work(session, parent, previous, known, look, plan, writer, blobs, run)

    def commit(self) -> Opened:
        """Wait until every blob is durable, put the manifest, commit.

        Raises:
            LeaseLostError: a collector called this take dead; nothing was committed.
            CommitUnknownError: the store gave no clear answer.
            Whatever staging or putting raised.
        """
        work = self._work
        if work is None:
            raise AssertionError("commit() before begin()")
        get_memory_ready(work.run)
        with self.stats.phase("write"):
            work.run.wait()
            lonely = lonely_chunks(work.plan)
            if lonely and not work.previous.equals(work.plan):
                move(lonely, self.repository, work.writer)
            # no manifest names a blob before this has returned
            work.blobs.sync()
        with self.stats.phase("commit"):
            # takes of one path commit in the order of their starts, and so do their commit times
            work.session.wait_turn()
            data = self._manifest(work)
            ref = work.session.commit(data)
        take_id = work.session.take_id
        work.known.learn(work.writer.refs, take_id)
        leaves = None if self._structure is None else self._structure.settle(work.plan, take_id, work.known)
        if leaves is None:
            remembered = history.Remembered.of_plan(take_id, work.plan)
        else:
            remembered = history.Remembered.of_settled(take_id, leaves)
        history.remember(self.repository.store_id, remembered)
        warm_up(work.run)
        manifest = StoredManifest(data, self.repository.read_table)
        return Opened(self.repository, self.name, ref, manifest)

    def _manifest(self, work: _Work) -> bytes:
        """Sum up the figures and pack the manifest."""
        stats, new = self.stats, work.writer.refs
        stats.state_nbytes = work.plan.state_nbytes
        stats.num_chunks = sum(len(leaf.chunks) for leaf in work.plan.leaves)
        stats.num_new_chunks = len(new)
        stats.new_nbytes = sum(ref.nbytes for ref in new)
        stats.hashed_nbytes = work.plan.chunked_nbytes - work.look.spared_nbytes
        stats.reused_nbytes = work.plan.chunked_nbytes - stats.new_nbytes
        stats.stored_nbytes, stats.num_blobs = work.writer.stored_nbytes, work.writer.num_blobs
        user_metadata = dict(self._options.user_metadata or {})
        extra: dict[str, Entry] = {}
        if not user_metadata_fits(user_metadata):
            data = encode(user_metadata)
            extra[f"0/{USER_METADATA}"] = ValueEntry(data, None, len(data))
            user_metadata = {}
        head = Head(
            take_id=work.session.take_id,
            store_id=self.repository.store_id,
            created_ms=history.next_commit_time(self.repository.store_id, work.session.commit_time_ms()),
            parent=work.parent.take_id,
            world_size=1,
            state_nbytes=stats.state_nbytes,
            new_nbytes=stats.new_nbytes,
            reused_nbytes=stats.reused_nbytes,
            stored_nbytes=stats.stored_nbytes,
            num_chunks=stats.num_chunks,
            num_new_chunks=stats.num_new_chunks,
            num_blobs=stats.num_blobs,
            library=__version__,
            user_metadata=user_metadata,
        )
        data = join_manifest(head, self._body(work.plan, extra))
        stats.manifest_nbytes = len(data)
        return data

    def _body(self, plan: TakePlan, extra: Mapping[str, Entry]) -> Sequence[PackedSection]:
        """The chunk table and the entries section."""
        if self._structure is not None and not extra:
            return self._structure.pack_body(plan)
        entries, table = build_entries(plan, rank=0)
        return pack_body((table,), pack_entries({**entries, **extra}))

    def close(self) -> None:
        """Stop what still runs and drop the lease. May be called at any point, more than once."""
        run, session = self._run, self._session
        if run is not None:
            run.cancel()
        if session is not None:
            if run is not None and not run.done and not self.repository.backend.is_local:
                # a second Ctrl-C came before the workers had ended
                session.requests.unanswered = True
            session.close()
        # staged bytes and tensors must not live as long as a handle that the caller keeps
        self._run = self._work = None
        self._state = None

    def __enter__(self) -> Take:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
