"""What rank 0 of a take over several ranks makes of the others' messages, round by round.

What lives here: opening the store for everybody, the lease, the decisions, the commit. What doesn't: what each rank
does (``group_take``), messages as bytes (``group_messages``), how they travel (``coordination.distributed``), the rules
themselves: who writes what (``ownership``), who reports what (``agreement``), who hashes for whom (``sharing``), how
the manifest comes together (``assembly``).

Invariant: the manifest is put after every rank has said that its blobs are durable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torchsnapshot import knobs
from torchsnapshot.coordination.distributed import Group
from torchsnapshot.coordination.messages import pack, squeeze, unpack, unsqueeze
from torchsnapshot.errors import CommitUnknownError, FormatError
from torchsnapshot.format.entries import StoredManifest
from torchsnapshot.ranks import agreement, assembly, ownership
from torchsnapshot.ranks.group_messages import FIGURES, Lists, Once, contents_of, pack_counts, pack_refs
from torchsnapshot.ranks.replicas import agreed_globs
from torchsnapshot.ranks.sharing import PassedOn
from torchsnapshot.reading.opening import Opened
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkTable, Head, pack_manifest, user_metadata_fits
from torchsnapshot.store.leases import TakeSession, start_take
from torchsnapshot.store.locate import place_for_take
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking import history
from torchsnapshot.taking.take import TakeOptions
from torchsnapshot.version import __version__

logger = logging.getLogger(__name__)

MAX_KNOWN_TREES = 64
"""Where ranks have more different trees than this, none is remembered."""

MAX_KNOWN_NBYTES = 64 << 20
"""Where the ranks' different lists of sums, or their chunk tables, are larger together, none is remembered."""


@dataclass(frozen=True, slots=True)
class _Tables:
    """The chunk tables that the ranks of a take have reported: what is equal in the next ones is not sent again."""

    take_id: str
    global_ranks: tuple[int, ...]
    tables: Sequence[bytes]


_known_trees: dict[bytes, assembly.KnownTree] = {}
"""Those of the last take of this process, so that ranks need not send them again."""

_known_tables: list[_Tables] = []
"""Those of the last take of this process; none or one."""

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
        self._contents = Lists()
        self._sums = Lists(dict(_known_sums))
        self._told: list[memoryview] = []
        self._passed_on: PassedOn | None = None
        # as they were when the ranks were told: another take of the group may end meanwhile
        self._trees = dict(_known_trees)
        ranks = tuple(group.global_ranks)
        self._tables = next((known for known in _known_tables if known.global_ranks == ranks), None)
        self._reported: list[bytes] = []
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
                None if self._tables is None else self._tables.take_id,
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
        _known_sums.update(self._sums.of_this_take(MAX_KNOWN_NBYTES))
        if self._told:
            self._passed_on = PassedOn(
                [unsqueeze(parts, known) for parts, known in zip(self._told, announcements, strict=True)]
            )
        self._contents, self._sums, self._told = Lists(), Lists(), []
        has_shared = any(any(duty.is_shared) for duty in self._duties)
        has_shared = has_shared or (self._passed_on is not None and self._passed_on.has_new)
        passed_on: Once[tuple[int, ...]] = Once(lambda numbers: squeeze(self._heard(numbers)))
        counts = Once(squeeze)
        return [
            pack(
                ["done", answer.conflicts, has_shared],
                [ownership.pack_duty(duty), answer.duties, counts(pack_counts(answer)), passed_on(self._hears(rank))],
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

        passed_on = Once(of_passed_on)
        answers = []
        for rank, (announcement, duty) in enumerate(zip(self._announcements, self._duties, strict=True)):
            announced = pack_refs(places[content] for content, writes in contents_of(announcement, duty) if not writes)
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
        _known_tables.clear()
        if sum(map(len, self._reported)) <= MAX_KNOWN_NBYTES:
            _known_tables.append(_Tables(lease.take_id, tuple(self._group.global_ranks), self._reported))
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
        self._reported = []
        for rank, (announcement, value) in enumerate(zip(self._announcements, values, strict=True)):
            (figures, nbytes, private, tree_digest, after), (table, tree, rows) = unpack(value, 3)
            totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
            chunk_nbytes += nbytes
            whole = unsqueeze(tree) if len(tree) else b""
            self._reported.append(unsqueeze(table, announcement + self._last_table(rank, after)))
            assembler.add(assembly.Report(self._reported[-1], whole, tree_digest, private, unsqueeze(rows)))
            used.add(tree_digest)
        tables, entries = assembler.build()
        if len(used) <= MAX_KNOWN_TREES:
            _known_trees.clear()
            _known_trees.update((digest, assembler.known[digest]) for digest in used)
        return tables, entries, dict(zip(FIGURES, totals, strict=True)), chunk_nbytes

    def _last_table(self, rank: int, take_id: str | None) -> bytes:
        """What a rank takes for known: the table that it reported in a take, if it names one."""
        if take_id is None:
            return b""
        if self._tables is None or self._tables.take_id != take_id:
            raise FormatError(
                f"rank {rank} refers to what it reported in the take {take_id}, which rank 0 did not name"
            )
        return self._tables.tables[rank]

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
