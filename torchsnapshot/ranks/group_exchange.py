"""The first half of a take on one rank among several: hash, tell, learn what is this rank's to write and to report.

What lives here: which chunks a rank hashes, alone or for others, and the round *exchange* as every rank goes through
it. What doesn't: the rules (``agreement``, ``ownership``, ``sharing``), what rank 0 makes of the messages
(``group_decisions``), putting and committing (``group_take``).

A rank shares the hashing of replicas where rank 0 says that all may, and its own memory of the last take fits the
state. Whether that is so on every rank shows only in *exchange*; if it isn't, everybody hashes the rest as well, and
the round is gone through again: that is the full check.

Invariants: a chunk whose digest another rank has told is never looked up, and never put, by this rank. What is
remembered of a take is remembered only once it is committed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torchsnapshot.chunks.writer import Encoding
from torchsnapshot.coordination.distributed import Group
from torchsnapshot.coordination.messages import unpack, unsqueeze
from torchsnapshot.coordination.sessions import Session
from torchsnapshot.engine.groups import by_size
from torchsnapshot.engine.pipeline import Job
from torchsnapshot.errors import SnapshotError
from torchsnapshot.format.entries import ContainerEntry
from torchsnapshot.ranks import agreement, ownership, sharing
from torchsnapshot.ranks.agreement import Duty
from torchsnapshot.ranks.group_decisions import Decisions
from torchsnapshot.ranks.group_jobs import HashJob
from torchsnapshot.ranks.group_messages import pack_exchange, pack_lists
from torchsnapshot.ranks.ownership import Content
from torchsnapshot.ranks.replicas import is_declared
from torchsnapshot.ranks.sharing import Shares, Sharing
from torchsnapshot.state.flatten import ShardedLeaf
from torchsnapshot.state.live_digests import live_digests
from torchsnapshot.stats import Stats
from torchsnapshot.store.known import Known
from torchsnapshot.store.leases import Evidence
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking.plan import GROUP_NBYTES, Chunk, Leaf, TakePlan

MAX_SHOWN = 20
"""So many leaves that are not equal are named in an error."""

_sharings: dict[str, Sharing] = {}
"""By store: what this process remembers of the last take over several ranks."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What rank 0 said everybody works on."""

    repository: Repository
    name: str
    take_id: str
    evidence: Evidence
    globs: Sequence[str]
    encoding: Encoding
    is_memory_common: bool
    """Whether all ranks remember the same take of this store, so that they may plan with what they remember."""
    known_trees: Collection[bytes]
    """Digests of trees that rank 0 need not be sent."""
    shares: bool
    """Whether ranks may hash for one another."""
    samples: bool
    """Whether they then compare a sample of what the others hash."""
    tables_of: str | None
    """The take of which rank 0 knows every rank's chunk table."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What is this rank's to do.

    ``duties`` has one for each leaf by path. ``mine`` are the chunks whose digests are this rank's own. ``own`` is what
    is new and for this rank to write, ``shared`` what of it other ranks have to be told of; ``has_shared``: any rank
    has something to tell. ``announcement`` is what this rank has told of what is new to it, ``passed_on`` what it was
    told by others. ``sharing_after`` makes what to remember.
    """

    duties: Mapping[str, Duty]
    mine: Sequence[Chunk]
    own: frozenset[Content]
    shared: Sequence[Content]
    has_shared: bool
    announcement: bytes
    passed_on: bytes
    sharing_after: Callable[[str], Sharing]


def remember(store_id: str, remembered: Sharing) -> None:
    """Keep what a committed take has shown for the next one."""
    _sharings[store_id] = remembered


class Exchange:
    """Goes through hashing and *exchange*.

    Args:
        session: of the take.
        decisions: rank 0's.
        group: the ranks.
        agreed: in the round before.
        plan: of this rank's state.
        known: what may be reused.
        small_nbytes: chunks below this size are hashed in groups.
        parent: the take that this process took or restored last in this store.
        run: carries jobs to their end.
        stats: of the take.
    """

    def __init__(
        self,
        session: Session,
        decisions: Decisions,
        group: Group,
        agreed: Agreed,
        plan: TakePlan,
        known: Known,
        small_nbytes: int,
        parent: str | None,
        run: Callable[[Sequence[Job]], None],
        stats: Stats,
    ) -> None:
        self._session = session
        self._decisions = decisions
        self._group = group
        self._agreed = agreed
        self._known = known
        self._small_nbytes = small_nbytes
        self._run = run
        self._stats = stats
        self._leaves = {leaf.path: leaf for leaf in plan.leaves if not isinstance(leaf.node, ContainerEntry)}
        self._chunks = list(plan.chunks())
        leaves = self._leaves.values()
        self._candidates = sharing.candidates(leaves, agreed.globs, group.global_ranks)
        self._structure = sharing.structure_of(leaves, self._candidates)
        self._shares = self._find_shares(parent)
        self._look = live_digests().look()

    def _find_shares(self, parent: str | None) -> Shares | None:
        """How this take is divided; None where this rank has no memory that fits."""
        last = _sharings.get(self._agreed.repository.store_id)
        if not self._agreed.shares or last is None or last.take_id != parent:
            return None
        if (last.global_ranks, last.structure) != (tuple(self._group.global_ranks), self._structure):
            return None
        return Shares(last, self._leaves, self._group.rank, samples=self._agreed.samples)

    def run(self) -> Exchanged:
        """Hash and exchange.

        Raises:
            SnapshotError: ranks that must hold the same do not.
            RankError: another rank failed.
        """
        mine = self._chunks
        if self._shares is not None:
            mine = [chunk for chunk in mine if chunk.path not in self._shares.paths] + self._shares.mine
            self._hash(self._shares.sampled, None)
        self._hash(mine, self._known)
        answer = self._tell(mine)
        if answer is None:
            # some rank's memory, or state, is not what this one's is
            for chunk in [] if self._shares is None else self._shares.sampled:
                chunk.ref = self._known.lookup(chunk.digest, chunk.nbytes)
            self._hash([chunk for chunk in self._chunks if not chunk.digest], self._known)
            mine, self._shares = self._chunks, None
            answer = self._tell(mine)
            assert answer is not None
        return answer

    def _hash(self, chunks: Sequence[Chunk], known: Known | None) -> None:
        large, groups = by_size(chunks, self._small_nbytes, GROUP_NBYTES)
        jobs = [HashJob(group, known, self._look) for group in (*groups, *([chunk] for chunk in large))]
        spared_nbytes = self._look.spared_nbytes
        if jobs:
            with self._stats.phase("hash"):
                self._run(jobs)
        self._stats.hashed_nbytes += sum(chunk.nbytes for chunk in chunks) - (self._look.spared_nbytes - spared_nbytes)

    def _tell(self, mine: Sequence[Chunk]) -> Exchanged | None:
        """One round of *exchange*; None where everybody has to hash everything."""
        shares = self._shares
        leaves = self._leaves.values()
        told = [
            leaf
            for leaf in leaves
            if (shares is None or leaf.path not in shares.paths) and agreement.may_have_other_holders(leaf)
        ]
        sums = agreement.pack_sums(
            agreement.sum_of(leaf, declared=is_declared(leaf.path, self._agreed.globs)) for leaf in told
        )
        new = list(dict.fromkeys((chunk.digest, chunk.nbytes) for chunk in mine if chunk.ref is None))
        announcement = ownership.pack_contents(new)
        with self._stats.phase("exchange"):
            divided = () if shares is None else (shares.take_id, shares.told())
            message = pack_exchange(announcement, sums, *divided)
            answer = self._session.round("exchange", message, self._decisions.exchange)
            (step, *control), arrays = unpack(answer)
            if step == "all":
                return None
            if step == "lists":
                message = pack_lists(announcement, sums, control)
                answer = self._session.round("lists", message, self._decisions.lists)
                (step, *control), arrays = unpack(answer)
            (conflicts, has_shared), (what_to_put, what_to_report, counts, passed_on) = control, arrays
            heard = unsqueeze(passed_on)
            if conflicts:
                raise SnapshotError(self._unequal([(told[index].path, other) for index, other in conflicts]))
            if shares is not None and (unequal := shares.learn(heard)):
                raise SnapshotError(self._unequal(unequal))
        duty = ownership.unpack_duty(bytes(what_to_put), len(new))
        duties = dict.fromkeys(self._leaves, Duty.OWN) | ({} if shares is None else shares.duties())
        duties |= {leaf.path: Duty(number) for leaf, number in zip(told, what_to_report, strict=True)}
        own = [content for content, writes in zip(new, duty.writes, strict=True) if writes]
        to_tell = {content for content, is_shared in zip(new, duty.is_shared, strict=True) if is_shared}
        if shares is not None:
            # what this rank hashes for others it has to tell them, whoever else holds it
            to_tell.update((chunk.digest, chunk.nbytes) for chunk in shares.mine)
        return Exchanged(
            duties,
            mine,
            frozenset(own),
            [content for content in own if content in to_tell],
            has_shared,
            announcement,
            heard,
            self._sharing_after(told, duties, array("I", unsqueeze(counts))),
        )

    def _sharing_after(
        self, told: Sequence[Leaf], duties: Mapping[str, Duty], num_holders: Sequence[int]
    ) -> Callable[[str], Sharing]:
        if self._shares is not None:
            return self._shares.after
        holders = {leaf.path: number for leaf, number in zip(told, num_holders, strict=True)}
        equal = {
            path: holders[path]
            for path in self._candidates
            if duties[path] is not Duty.OWN or isinstance(self._leaves[path].node, ShardedLeaf)
        }
        crews = sharing.crews_of(self._leaves.values(), self._candidates, equal)
        return lambda take_id: Sharing(take_id, tuple(self._group.global_ranks), self._structure, crews)

    def _unequal(self, leaves: Sequence[tuple[str, int]]) -> str:
        lines = []
        for path, other in leaves[:MAX_SHOWN]:
            is_part = isinstance(self._leaves[path].node, ShardedLeaf)
            kind = "hold the same part of this tensor" if is_part else "are replicas"
            lines.append(f"  {path}: ranks {self._group.rank} and {other} {kind}, but their contents differ")
        more = f"\n  and {len(leaves) - MAX_SHOWN} more" if len(leaves) > MAX_SHOWN else ""
        return "\n".join(["ranks that must hold the same do not:", *lines]) + more
