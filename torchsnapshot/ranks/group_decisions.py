"""What rank 0 of a take over several ranks makes of the others' messages, round by round.

What lives here: opening the store for everybody, the lease, the decisions, the commit. What doesn't: what each rank
does (``group_take``), how messages travel (``coordination.distributed``), the rules themselves: who writes what
(``ownership``), who reports what (``agreement``), how the manifest comes together (``assembly``).

Invariant: the manifest is put after every rank has said that its blobs are durable.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.coordination.distributed import Group
from torchsnapshot.coordination.messages import pack, squeeze, unpack, unsqueeze
from torchsnapshot.errors import CommitUnknownError
from torchsnapshot.format.entries import StoredManifest
from torchsnapshot.ranks import agreement, assembly, ownership
from torchsnapshot.ranks.replicas import agreed_globs
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

FIGURES = ("state_nbytes", "new_nbytes", "stored_nbytes", "num_chunks", "num_new_chunks", "num_blobs")
"""What ranks report of themselves and rank 0 adds up; their names are those in the manifest's head."""


MAX_LIST_NBYTES = 4096
"""A longer list of what is new is sent only when rank 0 has asked for it, by one of the ranks that have the same."""

MAX_KNOWN_TREES = 64
"""Where ranks have more different trees than this, none is remembered."""

_known_trees: dict[bytes, assembly.KnownTree] = {}
"""Those of the last take of this process, so that ranks need not send them again."""


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
        self._list_digests: list[bytes] = []
        self._lists: dict[bytes, bytes] = {}
        self._sums: list[bytes] = []
        # as they were when the ranks were told: another take of the group may end meanwhile
        self._trees = dict(_known_trees)
        self._duties: list[ownership.Duty] = []

    def agree(self, values: list[bytes]) -> bytes:
        """Open the store, put the lease, say what everybody works on."""
        asked = [unpack(value)[0] for value in values]
        if any(skips for *_, skips in asked):
            return pack(None)
        paths = {path for path, *_ in asked}
        if len(paths) > 1:
            logger.warning("ranks gave different paths, rank 0's counts: %s", ", ".join(sorted(paths)))
        options = self._options
        place = place_for_take(self._path, options.store, options.storage_options, durable=knobs.is_durable())
        repository = Repository.create_or_open(place.backend, chunk_nbytes=knobs.get_chunk_size_bytes())
        lease = self.lease = start_take(repository, place.name)
        remembered = {takes.get(repository.store_id) for _, _, takes, _ in asked}
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
            ]
        )

    def exchange(self, values: list[bytes]) -> list[bytes]:
        """Say who writes what, and who reports what; or first who is to send the list that several ranks may have."""
        told = [unpack(value, 2) for value in values]
        self._list_digests = [digest for digest, _ in told]
        self._sums = [unsqueeze(sums) for _, (_, sums) in told]
        self._lists = {digest: unsqueeze(contents) for digest, (contents, _) in told if len(contents)}
        asked = {digest: rank for rank, digest in reversed(list(enumerate(self._list_digests)))}
        if asked.keys() <= self._lists.keys():
            return self._exchanged()
        return [
            pack(asked[digest] == rank and digest not in self._lists) for rank, digest in enumerate(self._list_digests)
        ]

    def lists(self, values: list[bytes]) -> list[bytes]:
        """The lists that were asked for have come."""
        self._lists |= {
            digest: unsqueeze(value) for digest, value in zip(self._list_digests, values, strict=True) if value
        }
        return self._exchanged()

    def _exchanged(self) -> list[bytes]:
        announcements = self._announcements = [self._lists[digest] for digest in self._list_digests]
        self._duties = ownership.assign(announcements)
        answers = agreement.decide(self._sums)
        self._lists, self._sums = {}, []
        has_shared = any(any(duty.is_shared) for duty in self._duties)
        return [
            pack([answer.conflicts, has_shared], [ownership.pack_duty(duty), answer.duties])
            for duty, answer in zip(self._duties, answers, strict=True)
        ]

    def places(self, values: list[bytes]) -> list[bytes]:
        """Tell every rank where the contents are that it announced and others have put."""
        tables = [
            ChunkTable.unpack(unsqueeze(value, announcement))
            for announcement, value in zip(self._announcements, values, strict=True)
        ]
        places = {(ref.digest, ref.nbytes): ref for table in tables for ref in table.iter_refs()}
        return [
            squeeze(
                pack_refs(places[content] for content, writes in _told(announcement, duty) if not writes), announcement
            )
            for announcement, duty in zip(self._announcements, self._duties, strict=True)
        ]

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


def pack_exchange(announcement: bytes, sums: bytes) -> bytes:
    """A rank's message for *exchange*: of a long list, which other ranks may have too, only its digest."""
    contents = squeeze(announcement)
    digest = digest_of(memoryview(announcement))
    return pack(digest, [contents if len(contents) <= MAX_LIST_NBYTES else b"", squeeze(sums)])


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
