"""Runs a take over several ranks: agree → hash → exchange → put → places → durable → commit.

What lives here: the order of the steps and the messages of each round. What doesn't: how messages travel
(``distributed``), who writes and who reports what (``ownership``, ``agreement``), how the manifest comes together
(``assembly``), the protocol with the store (``store.leases``; rank 0 holds the one lease).

Rounds. *agree*: rank 0 opens the store, puts the lease and says what everybody works on; before any ``state_dict()``,
which may hold collectives of its own. *exchange*: what is new to each rank, and the sums of its leaves, against what it
is to write and to report. *places*, only where a content has several holders: where its owner has put it. *durable*:
every rank's report against the verdict; rank 0 commits in between.

Invariants: the manifest is put after every rank has said that its blobs are durable. Any rank's error ends the take on
every rank with ``RankError``, and nothing is committed. The manifest's ``.ok`` is the verdict: a rank that can no longer
hear rank 0 looks for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torchsnapshot import agreement, assembly, history, knobs, ownership
from torchsnapshot.agreement import Duty
from torchsnapshot.app_state import read_state
from torchsnapshot.chunks import ChunkWriter
from torchsnapshot.distributed import Group
from torchsnapshot.engine import Job, Mode, Run, submit
from torchsnapshot.entries import ContainerEntry, StoredManifest
from torchsnapshot.errors import CommitUnknownError, KeyAbsentError, SnapshotError
from torchsnapshot.flatten import ShardedLeaf
from torchsnapshot.group_jobs import HashJob, PutJob
from torchsnapshot.messages import CoordinationLost, pack, unpack
from torchsnapshot.opening import Opened
from torchsnapshot.plan import SMALL_CHUNK_NBYTES, Chunk, TakePlan, grouped, plan_take
from torchsnapshot.replicas import agreed_globs, declared_globs, is_declared
from torchsnapshot.sessions import Session
from torchsnapshot.stateful import Stateful
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder, Head, pack_manifest
from torchsnapshot.store.known import Known, known_for_take
from torchsnapshot.store.leases import Evidence, TakeSession, read_condemned, start_take
from torchsnapshot.store.locate import open_backend, place_for_take
from torchsnapshot.store.records import LEASES_FOLDER
from torchsnapshot.store.repository import ManifestRef, Repository
from torchsnapshot.take import TakeOptions
from torchsnapshot.version import __version__

logger = logging.getLogger(__name__)

Content = ownership.Content

_LOOK_SECONDS = 1.0
"""How often a rank that lost the others looks for the verdict in the store."""

_FIGURES = (
    "state_nbytes", "new_nbytes", "reused_nbytes", "stored_nbytes", "num_chunks", "num_new_chunks", "num_blobs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What rank 0 said everybody works on."""

    repository: Repository
    name: str
    take_id: str
    evidence: Evidence
    globs: Sequence[str]
    encoding: Any


@dataclass(frozen=True, slots=True)
class _Work:
    """What a take holds between staging and commit."""

    agreed: _Agreed
    known: Known
    plan: TakePlan
    writer: ChunkWriter
    run: Run
    duties: Mapping[str, Duty]
    others: Sequence[Content]
    """What other ranks write of this rank's content."""
    has_shared: bool
    shared: Sequence[Content]
    """What this rank writes of others' content."""


class GroupTake:
    """One take of one rank among several. A context: leaving it ends the coordination and drops the lease."""

    def __init__(self, group: Group, path: str, statefuls: Mapping[str, Stateful], options: TakeOptions) -> None:
        self.stats = Stats()
        self._group = group
        self._path = path
        self._statefuls = statefuls
        self._options = options
        self._session: Session | None = None
        self._lease: TakeSession | None = None
        self._run: Run | None = None
        self._work: _Work | None = None
        self._opened: Opened | None = None
        self._announced: list[list[Content]] = []
        self._answers: list[ownership.Duty] = []
        self._regions: list[frozenset[bytes]] = []

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
            with self.stats.phase("state_dict"):
                nodes = read_state(self._statefuls, self._options.prepare)
            with self.stats.phase("index"):
                parent = history.recall(agreed.repository.store_id)
                known = known_for_take(agreed.repository, agreed.evidence, parent.take_id)
            with self.stats.phase("plan"):
                chunk_nbytes = knobs.get_chunk_size_bytes(agreed.repository.chunk_nbytes)
                small_nbytes = 0 if knobs.is_batching_disabled() else min(SMALL_CHUNK_NBYTES, chunk_nbytes)
                plan = plan_take(nodes, parent, chunk_nbytes, small_nbytes)
            with self.stats.phase("hash"):
                self._hash(plan, known)
            with self.stats.phase("exchange"):
                work = self._exchange(session, agreed, known, plan)
            with self.stats.phase("stage" if in_background else "write"):
                run = self._start(work, small_nbytes, in_background)
                self._work = _Work(run=run, **work)
                run.wait_staged() if in_background else run.wait()
        if in_background and not self._group.background:
            # rounds would be collectives, which may not run beside the application's own
            self.commit()

    def _agree(self, session: Session) -> _Agreed:
        options = self._options
        with self.stats.phase("agree"):
            mine = pack([self._path, declared_globs(options.replicated, self._statefuls), sorted(self._statefuls)])
            answer, _ = unpack(session.round("agree", mine, self._decide_agree))
        root, name, take_id, sets, sweeps, usable, globs, encoding = answer
        if self._lease is not None:
            return _Agreed(self._lease.repository, name, take_id, self._lease.evidence, globs, encoding)
        with self.stats.phase("open"):
            backend = open_backend(root, options.storage_options, durable=knobs.is_durable())
            repository = Repository.create_or_open(backend)
            try:
                condemned = read_condemned(repository, sets) if usable else frozenset()
            except KeyAbsentError:
                # a collector has finished since rank 0 listed them: without the whole truth nothing is reused
                condemned, usable = frozenset(), False
        evidence = Evidence(frozenset(sweeps), condemned, usable, tuple(sets))
        return _Agreed(repository, name, take_id, evidence, globs, encoding)

    def _decide_agree(self, values: list[bytes]) -> bytes:
        """On rank 0: open the store, put the lease."""
        asked = [unpack(value)[0] for value in values]
        paths = {path for path, _, _ in asked}
        if len(paths) > 1:
            logger.warning("ranks gave different paths, rank 0's counts: %s", ", ".join(sorted(paths)))
        options = self._options
        place = place_for_take(self._path, options.store, options.storage_options, durable=knobs.is_durable())
        repository = Repository.create_or_open(place.backend, chunk_nbytes=knobs.get_chunk_size_bytes())
        lease = self._lease = start_take(repository, place.name)
        globs = agreed_globs([globs for _, globs, _ in asked])
        evidence = lease.evidence
        return pack(
            [
                place.root_url,
                place.name,
                lease.take_id,
                list(evidence.sets),
                sorted(evidence.sweeps),
                evidence.usable,
                globs,
                options.encoding,
            ]
        )

    def _hash(self, plan: TakePlan, known: Known) -> None:
        jobs: list[Job] = [HashJob(group, known) for group in plan.groups]
        jobs += [HashJob([chunk], known) for chunk in plan.large]
        if jobs:
            run = self._run = submit(jobs, num_workers=knobs.get_num_threads(), budget=knobs.get_memory_budget_bytes())
            run.wait()

    def _exchange(self, session: Session, agreed: _Agreed, known: Known, plan: TakePlan) -> dict[str, Any]:
        leaves = [leaf for leaf in plan.leaves if not isinstance(leaf.node, ContainerEntry)]
        sums = [agreement.sum_of(leaf, declared=is_declared(leaf.path, agreed.globs)) for leaf in leaves]
        new = list(dict.fromkeys((chunk.digest, chunk.nbytes) for chunk in plan.chunks() if chunk.ref is None))
        message = pack(None, [ownership.pack_contents(new), agreement.pack_sums(sums)])
        (conflicts, has_shared), (what_to_put, what_to_report) = unpack(
            session.round("exchange", message, self._decide_exchange), 2
        )
        if conflicts:
            raise SnapshotError(self._describe(conflicts, leaves))
        duty = ownership.unpack_duty(bytes(what_to_put), len(new))
        own = [content for content, writes in zip(new, duty.writes, strict=True) if writes]
        is_shared = {content for content, shared in zip(new, duty.is_shared, strict=True) if shared}
        return {
            "agreed": agreed,
            "known": known,
            "plan": plan,
            "writer": ChunkWriter(agreed.repository, agreed.take_id, self._group.rank, agreed.encoding),
            "duties": {leaf.path: Duty(number) for leaf, number in zip(leaves, what_to_report, strict=True)},
            "others": [content for content in new if content not in set(own)],
            "has_shared": has_shared,
            "shared": [content for content in own if content in is_shared],
        }

    def _decide_exchange(self, values: list[bytes]) -> list[bytes]:
        """On rank 0: who writes what, who reports what."""
        arrays = [unpack(value, 2)[1] for value in values]
        announcements = [bytes(contents) for contents, _ in arrays]
        duties = ownership.assign(announcements)
        answers = agreement.decide([sums for _, sums in arrays])
        has_shared = any(any(duty.is_shared) for duty in duties)
        self._announced = [ownership.unpack_contents(announcement) for announcement in announcements]
        self._answers = duties
        return [
            pack([answer.conflicts, has_shared], [ownership.pack_duty(duty), answer.duties])
            for duty, answer in zip(duties, answers, strict=True)
        ]

    def _describe(self, conflicts: Sequence[tuple[int, int]], leaves: Sequence[Any]) -> str:
        lines = []
        for index, other in conflicts[:20]:
            leaf = leaves[index]
            kind = "hold the same part of this tensor" if isinstance(leaf.node, ShardedLeaf) else "are replicas"
            lines.append(f"  {leaf.path}: ranks {self._group.rank} and {other} {kind}, but their contents differ")
        more = f"\n  and {len(conflicts) - 20} more" if len(conflicts) > 20 else ""
        return "\n".join(["ranks that must hold the same do not:", *lines]) + more

    def _start(self, work: Mapping[str, Any], small_nbytes: int, in_background: bool) -> Run:
        plan, writer, agreed = work["plan"], work["writer"], work["agreed"]
        elsewhere = set(work["others"])
        first: dict[Content, Chunk] = {}
        for chunk in plan.chunks():
            content = (chunk.digest, chunk.nbytes)
            if chunk.ref is None and content not in elsewhere:
                first.setdefault(content, chunk)
        small = [chunk for chunk in first.values() if chunk.nbytes < small_nbytes]
        jobs = [PutJob(group, writer, is_pack=True) for group in grouped(small)]
        jobs += [PutJob([chunk], writer, is_pack=False) for chunk in first.values() if chunk.nbytes >= small_nbytes]
        budget = knobs.get_memory_budget_bytes()
        if in_background:
            budget = knobs.get_staging_budget_bytes(max(1, sum(job.nbytes for job in jobs)))
        run = self._run = submit(
            jobs,
            budget=budget,
            num_workers=max(knobs.get_num_threads(), agreed.repository.backend.concurrency),
            mode=Mode.STAGE_FIRST if in_background else Mode.THROUGH,
        )
        return run

    # ------------------------------------------------------------------ to the commit

    def commit(self) -> Opened | None:
        """Wait until this rank's blobs are durable, report, and wait for the verdict.

        Returns:
            The snapshot on rank 0; None on the others, which open it when they need it.

        Raises:
            RankError: a rank failed; nothing was committed.
            CommitUnknownError: the verdict could not be learned.
        """
        session, work = self._session, self._work
        if session is None or work is None:
            return self._opened
        with _reported(session):
            with self.stats.phase("write"):
                work.run.wait()
            session.check()
            self._settle(session, work)
            report = assembly.report_of(work.plan, work.duties, self._group.rank)
            self._sum_up(work)
        figures = [getattr(self.stats, name) for name in _FIGURES]
        regions = [
            leaf.path
            for leaf in work.plan.leaves
            if isinstance(leaf.node, ShardedLeaf) and work.duties[leaf.path] is not Duty.ELSEWHERE
        ]
        value = pack([figures, dict(report.private), regions], [report.table, report.tree])
        with self.stats.phase("commit"):
            try:
                with _reported(session):
                    session.finish(value, self._decide_commit)
            except CoordinationLost as lost:
                self._look_for_verdict(work, lost)
        # what others have put for this rank is known to it from now on, too
        refs = {chunk.ref.digest: chunk.ref for chunk in work.plan.chunks() if chunk.ref is not None}
        work.known.learn(list(refs.values()), work.agreed.take_id)
        history.remember(work.agreed.repository.store_id, history.Remembered.of_plan(work.agreed.take_id, work.plan))
        self._work = None
        return self._opened

    def _settle(self, session: Session, work: _Work) -> None:
        """Learn where the contents are that others put, and give every chunk its place."""
        stored: dict[Content, ChunkRef] = {(ref.digest, ref.nbytes): ref for ref in work.writer.refs}
        if work.has_shared:
            with self.stats.phase("places"):
                answer = session.round(
                    "places", _pack_refs(stored[content] for content in work.shared), self._decide_places
                )
                stored |= {(ref.digest, ref.nbytes): ref for ref in ChunkTable.unpack(answer).iter_refs()}
        for chunk in work.plan.chunks():
            if chunk.ref is None:
                chunk.ref = stored[chunk.digest, chunk.nbytes]

    def _decide_places(self, values: list[bytes]) -> list[bytes]:
        """On rank 0: tell every rank where the contents are that it announced and others have put."""
        places = {(ref.digest, ref.nbytes): ref for value in values for ref in ChunkTable.unpack(value).iter_refs()}
        return [
            _pack_refs(places[content] for content, writes in zip(announced, duty.writes, strict=True) if not writes)
            for announced, duty in zip(self._announced, self._answers, strict=True)
        ]

    def _sum_up(self, work: _Work) -> None:
        stats, new = self.stats, work.writer.refs
        stats.state_nbytes = work.plan.state_nbytes
        stats.num_chunks = sum(len(leaf.chunks) for leaf in work.plan.leaves)
        stats.num_new_chunks = len(new)
        stats.new_nbytes = sum(ref.nbytes for ref in new)
        stats.reused_nbytes = sum(chunk.nbytes for chunk in work.plan.chunks()) - stats.new_nbytes
        stats.stored_nbytes, stats.num_blobs = work.writer.stored_nbytes, work.writer.num_blobs

    def _decide_commit(self, values: list[bytes]) -> bytes:
        """On rank 0: all blobs are durable; put the manifest together and commit it."""
        lease = self._lease
        assert lease is not None
        assembler = assembly.Assembler(self._group.global_ranks)
        totals = [0] * len(_FIGURES)
        for value in values:
            (figures, private, regions), (table, tree) = unpack(value, 2)
            totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
            assembler.add(assembly.Report(bytes(table), bytes(tree), private), frozenset(regions))
        tables, entries = assembler.build()
        repository = lease.repository
        lease.wait_turn()
        parent = history.recall(repository.store_id)
        head = Head(
            take_id=lease.take_id,
            store_id=repository.store_id,
            created_ms=history.next_commit_time(repository.store_id, lease.commit_time_ms()),
            parent=parent.take_id,
            world_size=len(values),
            library=__version__,
            user_metadata=dict(self._options.user_metadata or {}),
            **dict(zip(_FIGURES, totals, strict=True)),
        )
        data = pack_manifest(head, tables, entries)
        self.stats.manifest_nbytes = len(data)
        ref = lease.commit(data)
        self._opened = Opened(repository, lease.name, ref, StoredManifest(data, repository.read_table))
        return pack([str(ref.manifest)])

    def _look_for_verdict(self, work: _Work, lost: CoordinationLost) -> None:
        """The other ranks cannot be heard any more: the store says whether this take was committed."""
        repository, take_id = work.agreed.repository, work.agreed.take_id
        while True:
            is_over = _is_absent(repository, f"{LEASES_FOLDER}/{take_id}")
            # after the lease was seen to be gone nothing is committed any more, so this look is the last word
            if self._is_committed(repository, work.agreed.name, take_id):
                logger.warning(
                    "%s is committed, though the other ranks could not be heard any more: %s", self._path, lost
                )
                return
            if is_over:
                raise CommitUnknownError(
                    f"{self._path}: the other ranks could not be heard any more, and the take {take_id} is not committed. "
                    f"{lost}"
                ) from lost
            time.sleep(_LOOK_SECONDS)

    @staticmethod
    def _is_committed(repository: Repository, name: str, take_id: str) -> bool:
        refs: list[ManifestRef] = repository.manifests_of(name)
        return any(ref.committed and ref.manifest.take_id == take_id for ref in refs)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop what still runs, end the coordination, drop the lease. May be called at any point, more than once."""
        if self._run is not None and not self._run.done:
            self._run.cancel()
        if self._session is not None:
            self._session.leave()
        if self._lease is not None:
            self._lease.close()
        self._run = self._work = None

    def __enter__(self) -> GroupTake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        # an interrupt is told to the others, but remains an interrupt here
        if raised is not error and isinstance(error, Exception):
            raise raised


def _pack_refs(refs: Any) -> bytes:
    table = ChunkTableBuilder()
    table.add(list(refs))
    return table.build().pack()


def _is_absent(repository: Repository, key: str) -> bool:
    try:
        repository.backend.stat(key)
    except KeyAbsentError:
        return True
    return False
