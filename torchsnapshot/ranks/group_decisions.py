"""What rank 0 of a take over several ranks makes of the others' messages, round by round.

What lives here: opening the store for everybody, the lease, the decisions, the commit. What doesn't: what each rank
does (``group_take``), how messages travel (``coordination.distributed``), the rules themselves: who writes what
(``ownership``), who reports what (``agreement``), who hashes for whom (``sharing``), how the manifest comes together
(``assembly``).

Invariant: the manifest is put after every rank has said that its blobs are durable.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.coordination.distributed import Group
from torchsnapshot.coordination.messages import pack, squeeze, unpack, unsqueeze
from torchsnapshot.errors import CommitUnknownError
from torchsnapshot.format.entries import StoredManifest
from torchsnapshot.ranks import agreement, assembly, ownership
from torchsnapshot.ranks.agreement import Answer
from torchsnapshot.ranks.replicas import agreed_globs
from torchsnapshot.ranks.sharing import PassedOn
from torchsnapshot.reading.opening import Opened
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import (
    ChunkRef,
    ChunkTable,
    ChunkTableBuilder,
    Head,
    pack_manifest,
    user_metadata_fits,
)
from torchsnapshot.store.leases import TakeSession, start_take
from torchsnapshot.store.locate import place_for_take
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking import history
from torchsnapshot.taking.take import TakeOptions
from torchsnapshot.version import __version__

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

FIGURES = ("state_nbytes", "new_nbytes", "stored_nbytes", "num_chunks", "num_new_chunks", "num_blobs")
"""What ranks report of themselves and rank 0 adds up; their names are those in the manifest's head."""


MAX_LIST_NBYTES = 4096
"""A longer list is sent only when rank 0 has asked for it, by one of the ranks that have the same."""

MAX_SHARED_LIST_NBYTES = 32 << 10
"""The same for lists of what is new where ranks hash for one another: each has its own, so that all would be asked."""

MAX_KNOWN_SUMS_NBYTES = 64 << 20
"""Where the ranks' different lists of sums are larger than this together, none is remembered."""

MAX_KNOWN_TREES = 64
"""Where ranks have more different trees than this, none is remembered."""

_known_trees: dict[bytes, assembly.KnownTree] = {}
"""Those of the last take of this process, so that ranks need not send them again."""

_known_sums: dict[bytes, bytes] = {}
"""The lists of sums of the last take of this process, by digest."""


class Decisions:
    """What rank 0 decides in one take. The other ranks make one too, and nothing in it is ever called there.

    Attributes:
        lease: the take's, once *agree* was decided.
        opened: the snapshot, once it is committed.
    """

    def __init__(self, group: Group, path: str, options: TakeOptions, stats: Stats) -> None:
        self.lease: TakeSession | None = None
        self.opened: Opened | None = None
        self._group = group
        self._path = path
        self._options = options
        self._stats = stats
        self._announcements: list[bytes] = []
        self._contents = _Lists()
        self._sums = _Lists(dict(_known_sums))
        self._told: list[memoryview] = []
        self._passed_on: PassedOn | None = None
        # as they were when the ranks were told: another take of the group may end meanwhile
        self._trees = dict(_known_trees)
        self._duties: list[ownership.Duty] = []

    def agree(self, values: list[bytes]) -> bytes:
        """Open the store, put the lease, say what everybody works on."""
        asked = [unpack(value)[0] for value in values]
        if any(skips for *_, skips, _ in asked):
            return pack(None)
        paths = {path for path, *_ in asked}
        if len(paths) > 1:
            logger.warning("ranks gave different paths, rank 0's counts: %s", ", ".join(sorted(paths)))
        options = self._options
        checks = {verifies for *_, verifies in asked}
        if len(checks) > 1:
            logger.warning(
                "ranks gave different verify_replicas (%s), rank 0's counts: %r",
                ", ".join(map(repr, sorted(checks))),
                options.verify_replicas,
            )
        place = place_for_take(self._path, options.store, options.storage_options, durable=knobs.is_durable())
        repository = Repository.create_or_open(place.backend, chunk_nbytes=knobs.get_chunk_size_bytes())
        lease = self.lease = start_take(repository, place.name)
        remembered = {takes.get(repository.store_id) for _, _, takes, *_ in asked}
        evidence = lease.evidence
        return pack(
            [
                place.root_url,
                place.name,
                lease.take_id,
                list(evidence.sets),
                sorted(evidence.sweeps),
                evidence.usable,
                agreed_globs([globs for _, globs, *_ in asked]),
                options.encoding,
                len(remembered) == 1,
                list(self._trees),
                len(remembered) == 1 and options.verify_replicas != "full",
                options.verify_replicas == "sample",
            ]
        )

    def exchange(self, values: list[bytes]) -> list[bytes]:
        """Say who writes what, and who reports what; or first who is to send a list that several ranks may have.

        Where only some ranks have hashed for others, or not all after the same take, everybody is to hash everything.
        """
        told = [unpack(value, 3) for value in values]
        if len({after for (*_, after), _ in told}) > 1:
            return [pack(["all"])] * len(values)
        self._told = [] if told[0][0][2] is None else [parts for _, (*_, parts) in told]
        self._contents.hear([digest for (digest, *_), _ in told], [contents for _, (contents, *_) in told])
        self._sums.hear([digest for (_, digest, _), _ in told], [sums for _, (_, sums, _) in told])
        asked = self._contents.missing(), self._sums.missing()
        if not any(asked):
            return self._exchanged()
        return [pack(["lists", *(rank in ranks for ranks in asked)]) for rank in range(len(values))]

    def lists(self, values: list[bytes]) -> list[bytes]:
        """The lists that were asked for have come."""
        told = [unpack(value, 2)[1] for value in values]
        self._contents.hear(self._contents.digests, [contents for contents, _ in told])
        self._sums.hear(self._sums.digests, [sums for _, sums in told])
        return self._exchanged()

    def _exchanged(self) -> list[bytes]:
        announcements = self._announcements = self._contents.all()
        self._duties = ownership.assign(announcements)
        answers = agreement.decide(self._sums.all())
        _known_sums.clear()
        _known_sums.update(self._sums.of_this_take(MAX_KNOWN_SUMS_NBYTES))
        if self._told:
            self._passed_on = PassedOn(
                [unsqueeze(parts, known) for parts, known in zip(self._told, announcements, strict=True)]
            )
        self._contents, self._sums, self._told = _Lists(), _Lists(), []
        has_shared = any(any(duty.is_shared) for duty in self._duties)
        has_shared = has_shared or (self._passed_on is not None and self._passed_on.has_new)
        passed_on: _Once[tuple[int, ...]] = _Once(lambda numbers: squeeze(self._heard(numbers)))
        counts = _Once(squeeze)
        return [
            pack(
                ["done", answer.conflicts, has_shared],
                [ownership.pack_duty(duty), answer.duties, counts(_counts(answer)), passed_on(self._hears(rank))],
            )
            for rank, (duty, answer) in enumerate(zip(self._duties, answers, strict=True))
        ]

    def _hears(self, rank: int) -> tuple[int, ...]:
        """The numbers of what is passed on to a rank."""
        return () if self._passed_on is None else self._passed_on.to(rank)

    def _heard(self, numbers: Sequence[int]) -> bytes:
        return b"" if self._passed_on is None else self._passed_on.packed(numbers)

    def places(self, values: list[bytes]) -> list[bytes]:
        """Tell every rank where the contents are that others have put: those that it announced, or was told of."""
        tables = [
            ChunkTable.unpack(unsqueeze(value, announcement))
            for announcement, value in zip(self._announcements, values, strict=True)
        ]
        places = {(ref.digest, ref.nbytes): ref for table in tables for ref in table.iter_refs()}

        def of_passed_on(numbers: tuple[int, ...]) -> bytes:
            new = [] if self._passed_on is None else self._passed_on.new_in(numbers)
            return squeeze(pack_refs(places[content] for content in new), self._heard(numbers))

        passed_on = _Once(of_passed_on)
        answers = []
        for rank, (announcement, duty) in enumerate(zip(self._announcements, self._duties, strict=True)):
            announced = pack_refs(places[content] for content, writes in _told(announcement, duty) if not writes)
            answers.append(pack(None, [squeeze(announced, announcement), passed_on(self._hears(rank))]))
        return answers

    def commit(self, values: list[bytes]) -> bytes:
        """All blobs are durable: put the manifest together and commit it.

        Returns:
            The verdict: None, or why nobody knows whether it is committed.
        """
        lease = self.lease
        assert lease is not None
        user_metadata = dict(self._options.user_metadata or {})
        is_beside_head = not user_metadata_fits(user_metadata)
        tables, entries, totals, chunk_nbytes = self.assemble(values, user_metadata if is_beside_head else None)
        data = pack_manifest(
            self._head(lease, totals, chunk_nbytes, {} if is_beside_head else user_metadata),
            tables,
            entries,
        )
        self._stats.manifest_nbytes = len(data)
        try:
            ref = lease.commit(data)
        except CommitUnknownError as error:
            # no rank knows more than this one
            return pack(str(error))
        repository = lease.repository
        self.opened = Opened(repository, lease.name, ref, StoredManifest(data, repository.read_table))
        return pack(None)

    def assemble(
        self, values: list[bytes], user_metadata: dict[str, object] | None
    ) -> tuple[list[ChunkTable], bytes, dict[str, int], int]:
        """The chunk tables, the entries, the ranks' figures added up, and the raw bytes of all chunks."""
        assembler = assembly.Assembler(self._group.global_ranks, user_metadata, self._trees)
        totals = [0] * len(FIGURES)
        chunk_nbytes = 0
        used: set[bytes] = set()
        for announcement, value in zip(self._announcements, values, strict=True):
            (figures, nbytes, private, tree_digest), (table, tree, rows) = unpack(value, 3)
            totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
            chunk_nbytes += nbytes
            whole = unsqueeze(tree) if len(tree) else b""
            assembler.add(assembly.Report(unsqueeze(table, announcement), whole, tree_digest, private, unsqueeze(rows)))
            used.add(tree_digest)
        tables, entries = assembler.build()
        if len(used) <= MAX_KNOWN_TREES:
            _known_trees.clear()
            _known_trees.update((digest, assembler.known[digest]) for digest in used)
        return tables, entries, dict(zip(FIGURES, totals, strict=True)), chunk_nbytes

    def _head(
        self, lease: TakeSession, totals: dict[str, int], chunk_nbytes: int, user_metadata: dict[str, object]
    ) -> Head:
        # takes of one path commit in the order of their starts, and so do their commit times
        lease.wait_turn()
        store_id = lease.repository.store_id
        return Head(
            take_id=lease.take_id,
            store_id=store_id,
            created_ms=history.next_commit_time(store_id, lease.commit_time_ms()),
            parent=history.recall(store_id).take_id,
            world_size=self._group.world_size,
            reused_nbytes=max(0, chunk_nbytes - totals["new_nbytes"]),
            library=__version__,
            user_metadata=user_metadata,
            **totals,
        )


class _Lists:
    """One list of every rank, of which equal ones come once.

    Args:
        known: lists that need not come, by digest.
    """

    def __init__(self, known: dict[bytes, bytes] | None = None) -> None:
        self.digests: list[bytes] = []
        self._found: dict[bytes, bytes] = known or {}

    def hear(self, digests: list[bytes], lists: Sequence[bytes | memoryview]) -> None:
        """Take in what every rank has sent: nothing, or its list, squeezed."""
        self.digests = digests
        for digest, data in zip(digests, lists, strict=True):
            if len(data) and digest not in self._found:
                self._found[digest] = unsqueeze(data)

    def missing(self) -> set[int]:
        """The ranks that are to send theirs: the first of those that have the same."""
        first = {digest: rank for rank, digest in reversed(list(enumerate(self.digests)))}
        return {rank for digest, rank in first.items() if digest not in self._found}

    def all(self) -> list[bytes]:
        """The list of every rank."""
        return [self._found[digest] for digest in self.digests]

    def of_this_take(self, max_nbytes: int) -> dict[bytes, bytes]:
        """The different lists by digest; none where they are larger together."""
        found = {digest: self._found[digest] for digest in self.digests}
        return found if sum(map(len, found.values())) <= max_nbytes else {}


class _Once(Generic[K]):
    """A function whose results are kept: many ranks get the same."""

    def __init__(self, function: Callable[[K], bytes]) -> None:
        self._function = function
        self._results: dict[K, bytes] = {}

    def __call__(self, argument: K) -> bytes:
        found = self._results.get(argument)
        if found is None:
            found = self._results[argument] = self._function(argument)
        return found


def _counts(answer: Answer) -> bytes:
    return array("I", answer.num_holders).tobytes()


def pack_exchange(announcement: bytes, sums: bytes, after: str | None = None, told: bytes = b"") -> bytes:
    """A rank's message for *exchange*: of a long list, which other ranks may have too, only its digest.

    Args:
        announcement: what is new to it.
        sums: of its leaves.
        after: the take by which ranks have divided their hashing; None where this one has hashed all for itself.
        told: what it tells of chunks that it has hashed for others.
    """
    contents, squeezed = squeeze(announcement), squeeze(sums)
    limit = MAX_LIST_NBYTES if after is None else MAX_SHARED_LIST_NBYTES
    return pack(
        [digest_of(memoryview(announcement)), digest_of(memoryview(sums)), after],
        [
            contents if len(contents) <= limit else b"",
            squeezed if len(squeezed) <= MAX_LIST_NBYTES else b"",
            squeeze(told, announcement),
        ],
    )


def pack_lists(announcement: bytes, sums: bytes, asked: Sequence[bool]) -> bytes:
    """A rank's message for *lists*: those that rank 0 has asked for."""
    return pack(
        None, [squeeze(each) if is_asked else b"" for each, is_asked in zip((announcement, sums), asked, strict=True)]
    )


def pack_report(
    figures: Sequence[int], chunk_nbytes: int, report: assembly.Report, announcement: bytes, known: Collection[bytes]
) -> bytes:
    """A rank's message for *durable*.

    Args:
        figures: in the order of ``FIGURES``.
        chunk_nbytes: raw bytes of the chunks that count for this rank.
        report: its tree and its chunks.
        announcement: what it told in *exchange*: rank 0 knows these digests.
        known: digests of trees that rank 0 knows.
    """
    tree = b"" if report.tree_digest in known else squeeze(report.tree)
    control = [list(figures), chunk_nbytes, dict(report.private), report.tree_digest]
    return pack(control, [squeeze(report.table, announcement), tree, squeeze(report.rows)])


def _told(announcement: bytes, duty: ownership.Duty) -> Iterator[tuple[ownership.Content, bool]]:
    """A rank's contents, each with whether it writes it."""
    return zip(ownership.unpack_contents(announcement), duty.writes, strict=True)


def pack_refs(refs: Iterable[ChunkRef]) -> bytes:
    """Where contents are, as a chunk table."""
    table = ChunkTableBuilder()
    table.add(list(refs))
    return table.build().pack()
