"""Runs a take over several ranks: agree → hash → exchange → put → places → durable → commit.

What lives here: the order of the steps on every rank. What doesn't: hashing and the round *exchange*
(``group_exchange``), what rank 0 makes of the ranks' messages (``group_decisions``), how messages travel
(``coordination.distributed``), who hashes, writes and reports what (``sharing``, ``ownership``, ``agreement``), the
protocol with the store (``store.leases``; rank 0 holds the one lease).

Rounds. *agree*: rank 0 opens the store, puts the lease and says what everybody works on; before any ``state_dict()``,
which may hold collectives of its own. *exchange*: what is new to each rank, and the sums of its leaves, against what
it is to write and to report. *places*, only where a content has several holders: where its owner has put it.
*durable*: every rank's report against the verdict; rank 0 commits in between.

Invariants: the manifest is put after every rank has said that its blobs are durable. Any rank's error ends the take on
every rank with ``RankError``, and nothing is committed. The manifest's ``.ok`` is the verdict: a rank that can no
longer hear rank 0 looks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from torchsnapshot import knobs
from torchsnapshot.chunks.writer import ChunkWriter
from torchsnapshot.coordination.distributed import Group
from torchsnapshot.coordination.messages import CoordinationLost, pack, squeeze, unpack, unsqueeze
from torchsnapshot.coordination.sessions import Session
from torchsnapshot.engine.groups import by_size
from torchsnapshot.engine.pipeline import Job, Run, submit
from torchsnapshot.engine.staging import get_memory_ready, submit_take, wait_staged, warm_up
from torchsnapshot.errors import CommitUnknownError, LeaseLostError, SnapshotError
from torchsnapshot.ranks import assembly, group_exchange
from torchsnapshot.ranks.agreement import Duty
from torchsnapshot.ranks.group_decisions import Decisions
from torchsnapshot.ranks.group_exchange import Agreed, Exchange, Exchanged
from torchsnapshot.ranks.group_jobs import PutJob, PutPackJob
from torchsnapshot.ranks.group_messages import FIGURES, pack_refs, pack_report
from torchsnapshot.ranks.ownership import Content
from torchsnapshot.ranks.replicas import declared_globs
from torchsnapshot.ranks.verdict import wait_for_verdict
from torchsnapshot.reading.opening import Opened
from torchsnapshot.stateful import Stateful
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef, ChunkTable
from torchsnapshot.store.known import Known, known_for_take
from torchsnapshot.store.leases import Evidence, check_lease_is_there, read_condemned
from torchsnapshot.store.locate import open_backend
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking import history
from torchsnapshot.taking.plan import GROUP_NBYTES, SMALL_CHUNK_NBYTES, Chunk, TakePlan
from torchsnapshot.taking.planning import TakenState
from torchsnapshot.taking.take import TakeOptions, chunk_writer

logger = logging.getLogger(__name__)

_tables_told: dict[str, bytes] = {}
"""The chunk table that this process has reported in its last take over several ranks, by the take's id."""

_CHECK_SECONDS = 0.5
"""How often a rank that waits for its own work looks whether another one has failed."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What a take holds between staging and commit."""

    agreed: Agreed
    known: Known
    plan: TakePlan
    writer: ChunkWriter
    exchanged: Exchanged


class GroupTake:
    """One take of one rank among several. A context: leaving it ends the coordination and drops the lease.

    Args:
        skips: this rank has an earlier take in flight and wants to skip this one then; if one rank does, all do.

    Attributes:
        is_skipped: ``begin`` found that some rank skips this take, and has begun nothing.
    """

    def __init__(
        self,
        group: Group,
        path: str,
        statefuls: Mapping[str, Stateful],
        options: TakeOptions,
        *,
        skips: bool = False,
    ) -> None:
        self.stats = Stats()
        self.is_skipped = False
        self._skips = skips
        self._group = group
        self._path = path
        self._statefuls = statefuls
        self._options = options
        self._session: Session | None = None
        self._decisions = Decisions(group, path, options, self.stats)
        self._table = b""
        self._memories: Mapping[str, history.Remembered] = {}
        self._run: Run | None = None
        self._work: _Work | None = None

    # ------------------------------------------------------------------ up to staging

    def begin(self, *, in_background: bool) -> None:
        """Go through *agree* and *exchange*, and hand the work to the engine.

        Args:
            in_background: return as soon as the caller may change its tensors; else when every blob is durable.

        Raises:
            RankError: a rank failed; every rank raises it.
        """
        session = self._session = self._group.session()
        with _reported(session):
            agreed = self._agree(session)
            if agreed is None:
                self.is_skipped = True
                session.leave()
                return
            with self.stats.phase("state_dict"):
                state = TakenState(self._statefuls, self._options.prepare)
            with self.stats.phase("index"):
                parent = self._memories.get(agreed.repository.store_id, history.Remembered())
                known = known_for_take(agreed.repository, agreed.evidence, parent.take_id)
            with self.stats.phase("plan"):
                chunk_nbytes = knobs.get_chunk_size_bytes(agreed.repository.chunk_nbytes)
                small_nbytes = 0 if knobs.is_batching_disabled() else min(SMALL_CHUNK_NBYTES, chunk_nbytes)
                # cells come from memory, and all ranks must cut alike
                previous = parent if agreed.is_memory_common else history.Remembered()
                plan, _ = state.plan_anew(agreed.repository.store_id, previous, chunk_nbytes, small_nbytes)
                # it holds the tensors' memory
                del state
            exchanged = Exchange(
                session,
                self._decisions,
                self._group,
                agreed,
                plan,
                known,
                small_nbytes,
                parent.take_id,
                partial(self._hash, session),
                self.stats,
            ).run()
            writer = chunk_writer(
                agreed.repository, agreed.take_id, self._group.rank, agreed.encoding, in_background=in_background
            )
            work = self._work = _Work(agreed, known, plan, writer, exchanged)
            with self.stats.phase("stage" if in_background else "write"):
                run = self._run = self._start(work, small_nbytes, in_background)
                _wait(session, partial(wait_staged, run) if in_background else run.wait)
        if in_background and not self._group.background:
            # rounds would be collectives, which may not run beside the application's own
            self.commit()

    def _agree(self, session: Session) -> Agreed | None:
        options = self._options
        with self.stats.phase("agree"):
            globs = declared_globs(options.replicated, self._statefuls)
            # an overlapping take may be remembered while this one goes on: what counts is what was told
            self._memories = {store_id: history.recall(store_id) for store_id in history.take_ids()}
            take_ids = {store_id: each.take_id for store_id, each in self._memories.items()}
            mine = pack([self._path, globs, take_ids, self._skips, options.verify_replicas])
            answer, _ = unpack(session.round("agree", mine, self._decisions.agree))
        if answer is None:
            return None
        root, name, take_id, sets, sweeps, usable, *others = answer
        lease = self._decisions.lease
        if lease is not None:
            return Agreed(lease.repository, name, take_id, lease.evidence, *others)
        with self.stats.phase("open"):
            backend = open_backend(root, options.storage_options, durable=knobs.is_durable())
            # opened first: a client of a network filesystem may have noted that there is no store yet
            repository = Repository.create_or_open(backend)
            check_lease_is_there(backend, take_id)
            try:
                condemned = read_condemned(repository, sets) if usable else frozenset()
            except SnapshotError as error:
                # a collector has finished since rank 0 listed them: without the whole truth nothing is reused
                logger.info("a condemned set is gone or unreadable, so this rank reuses nothing: %s", error)
                condemned, usable = frozenset(), False
        return Agreed(repository, name, take_id, Evidence(frozenset(sweeps), condemned, usable, tuple(sets)), *others)

    def _hash(self, session: Session, jobs: Sequence[Job]) -> None:
        run = self._run = submit(jobs, num_workers=knobs.get_num_threads(), budget=knobs.get_memory_budget_bytes())
        _wait(session, run.wait)

    def _start(self, work: _Work, small_nbytes: int, in_background: bool) -> Run:
        first: dict[Content, Chunk] = {}
        for chunk in work.exchanged.mine:
            content = (chunk.digest, chunk.nbytes)
            if chunk.ref is None and content in work.exchanged.own:
                first.setdefault(content, chunk)
        large, groups = by_size(first.values(), small_nbytes, GROUP_NBYTES)
        jobs: list[Job] = [PutPackJob(group, work.writer) for group in groups]
        jobs += [PutJob(chunk, work.known, work.writer) for chunk in large]
        return submit_take(jobs, concurrency=work.agreed.repository.backend.concurrency, in_background=in_background)

    # ------------------------------------------------------------------ to the commit

    def commit(self) -> Opened | None:
        """Wait until this rank's blobs are durable, report, and wait for the verdict.

        Returns:
            The snapshot on rank 0; None on the others, which open it when they need it.

        Raises:
            RankError: a rank failed; nothing was committed.
            CommitUnknownError: the verdict could not be learned.
        """
        session, work, run = self._session, self._work, self._run
        if session is None or work is None or run is None:
            return self._decisions.opened
        with _reported(session):
            get_memory_ready(run)
            with self.stats.phase("write"):
                _wait(session, run.wait)
            session.check()
            self._settle(session, work)
            value = self._report(work)
        with self.stats.phase("commit"):
            try:
                with _reported(session):
                    verdict, _ = unpack(session.finish(value, self._decisions.commit))
                if verdict is not None:
                    raise CommitUnknownError(verdict)
            except CoordinationLost as lost:
                self._look_for_verdict(work, lost)
        # what others have put for this rank is known to it from now on, too
        refs = {chunk.ref.digest: chunk.ref for chunk in work.plan.chunks() if chunk.ref is not None}
        work.known.learn(list(refs.values()), work.agreed.take_id)
        store_id, take_id = work.agreed.repository.store_id, work.agreed.take_id
        history.remember(store_id, history.Remembered.of_plan(take_id, work.plan))
        group_exchange.remember(store_id, work.exchanged.sharing_after(take_id))
        _tables_told.clear()
        _tables_told[take_id] = self._table
        warm_up(run)
        self._work = None
        return self._decisions.opened

    def _settle(self, session: Session, work: _Work) -> None:
        """Learn where the contents are that others put, and give every chunk its place."""
        exchanged = work.exchanged
        stored: dict[Content, ChunkRef] = {(ref.digest, ref.nbytes): ref for ref in work.writer.refs}
        if exchanged.has_shared:
            with self.stats.phase("places"):
                refs = pack_refs(stored[content] for content in exchanged.shared)
                message = squeeze(refs, exchanged.announcement)
                _, tables = unpack(session.round("places", message, self._decisions.places), 2)
            for table, known in zip(tables, (exchanged.announcement, exchanged.passed_on), strict=True):
                stored |= {
                    (ref.digest, ref.nbytes): ref for ref in ChunkTable.unpack(unsqueeze(table, known)).iter_refs()
                }
        for chunk in work.plan.chunks():
            if chunk.ref is None:
                chunk.ref = stored[chunk.digest, chunk.nbytes]

    def _report(self, work: _Work) -> bytes:
        """What this rank has and what it did, for the manifest."""
        plan, new, stats = work.plan, work.writer.refs, self.stats
        stats.state_nbytes = plan.state_nbytes
        stats.num_chunks = sum(len(leaf.chunks) for leaf in plan.leaves)
        stats.num_new_chunks = len(new)
        stats.new_nbytes = sum(ref.nbytes for ref in new)
        stats.reused_nbytes = max(0, sum(chunk.nbytes for chunk in plan.chunks()) - stats.new_nbytes)
        stats.stored_nbytes, stats.num_blobs = work.writer.stored_nbytes, work.writer.num_blobs
        # in the manifest's head, what several ranks hold counts once
        counted = [leaf for leaf in plan.leaves if self._counts(work.exchanged.duties.get(leaf.path))]
        chunk_nbytes = sum(chunk.nbytes for leaf in counted for chunk in leaf.chunks)
        figures = {
            **{name: getattr(stats, name) for name in FIGURES},
            "state_nbytes": chunk_nbytes + sum(len(leaf.inline or b"") for leaf in counted),
            "num_chunks": sum(len(leaf.chunks) for leaf in counted),
        }
        report = assembly.report_of(plan, work.exchanged.duties, self._group.rank)
        numbers = [figures[name] for name in FIGURES]
        agreed, self._table = work.agreed, report.table
        last = _tables_told.get(agreed.tables_of or "")
        return pack_report(
            numbers,
            chunk_nbytes,
            report,
            work.exchanged.announcement,
            agreed.known_trees,
            None if last is None or agreed.tables_of is None else (agreed.tables_of, last),
        )

    def _counts(self, duty: Duty | None) -> bool:
        return duty is Duty.OWN or (duty is Duty.REPLICATED and self._group.rank == 0)

    def _look_for_verdict(self, work: _Work, lost: CoordinationLost) -> None:
        """The other ranks cannot be heard any more: the store says whether this take was committed."""
        agreed = work.agreed
        if not wait_for_verdict(agreed.repository, agreed.name, agreed.take_id):
            raise CommitUnknownError(
                f"{self._path}: the other ranks can no longer be heard, and the take {agreed.take_id} has not been "
                f"committed so far. Look again later: Snapshot.list shows it if it has been after all. {lost}"
            ) from lost
        logger.warning("%s is committed, though the other ranks can no longer be heard: %s", self._path, lost)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop what still runs, end the coordination, drop the lease. May be called at any point, more than once."""
        run, lease = self._run, self._decisions.lease
        if run is not None and not run.done:
            run.cancel()
        if self._session is not None:
            self._session.leave()
        if lease is not None:
            if run is not None and not run.done and not lease.repository.backend.is_local:
                # a request of this rank may still be under way
                lease.requests.unanswered = True
            lease.close()
        self._run = self._work = None
        self._memories = {}

    def __enter__(self) -> GroupTake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wait(session: Session, wait: Callable[[float], bool]) -> None:
    """Wait for a run, but no longer once another rank is known to have failed."""
    while not wait(_CHECK_SECONDS):
        session.check()


class _reported:
    """A context that tells the other ranks of an error, and raises what they raise too."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, CoordinationLost):
            return
        raised = self._session.fail(error)
        if isinstance(raised.__cause__, LeaseLostError):
            # to its holder it is what it is; the others are told what happened to rank 0
            raise raised.__cause__
        # an interrupt is told to the others, but remains an interrupt here
        if raised is not error and isinstance(error, Exception):
            raise raised
