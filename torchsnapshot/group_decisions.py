"""What rank 0 of a take over several ranks makes of the others' messages, round by round.

What lives here: opening the store for everybody, the lease, the decisions, the commit. What doesn't: what each rank
does (``group_take``), how messages travel (``distributed``), the rules themselves: who writes what (``ownership``), who
reports what (``agreement``), how the manifest comes together (``assembly``).

Invariant: the manifest is put after every rank has said that its blobs are durable.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torchsnapshot import agreement, assembly, history, knobs, ownership
from torchsnapshot.distributed import Group
from torchsnapshot.entries import StoredManifest
from torchsnapshot.errors import CommitUnknownError
from torchsnapshot.messages import pack, unpack
from torchsnapshot.opening import Opened
from torchsnapshot.replicas import agreed_globs
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
from torchsnapshot.take import TakeOptions
from torchsnapshot.version import __version__

logger = logging.getLogger(__name__)

FIGURES = ("state_nbytes", "new_nbytes", "stored_nbytes", "num_chunks", "num_new_chunks", "num_blobs")
"""What ranks report of themselves and rank 0 adds up; their names are those in the manifest's head."""


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
        self._announced: list[list[ownership.Content]] = []
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
            ]
        )

    def exchange(self, values: list[bytes]) -> list[bytes]:
        """Say who writes what, and who reports what."""
        arrays = [unpack(value, 2)[1] for value in values]
        announcements = [bytes(contents) for contents, _ in arrays]
        self._duties = ownership.assign(announcements)
        self._announced = [ownership.unpack_contents(announcement) for announcement in announcements]
        answers = agreement.decide([sums for _, sums in arrays])
        has_shared = any(any(duty.is_shared) for duty in self._duties)
        return [
            pack([answer.conflicts, has_shared], [ownership.pack_duty(duty), answer.duties])
            for duty, answer in zip(self._duties, answers, strict=True)
        ]

    def places(self, values: list[bytes]) -> list[bytes]:
        """Tell every rank where the contents are that it announced and others have put."""
        places = {(ref.digest, ref.nbytes): ref for value in values for ref in ChunkTable.unpack(value).iter_refs()}
        return [
            pack_refs(places[content] for content, writes in zip(announced, duty.writes, strict=True) if not writes)
            for announced, duty in zip(self._announced, self._duties, strict=True)
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
        assembler = assembly.Assembler(self._group.global_ranks, user_metadata if is_beside_head else None)
        totals = [0] * len(FIGURES)
        num_chunk_bytes = 0
        for value in values:
            (figures, chunk_nbytes, private, regions), (table, tree) = unpack(value, 2)
            totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
            num_chunk_bytes += chunk_nbytes
            assembler.add(assembly.Report(bytes(table), bytes(tree), private), frozenset(regions))
        tables, entries = assembler.build()
        data = pack_manifest(
            self._head(
                lease, dict(zip(FIGURES, totals, strict=True)), num_chunk_bytes, {} if is_beside_head else user_metadata
            ),
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


def pack_refs(refs: Iterable[ChunkRef]) -> bytes:
    """Where contents are, as a chunk table."""
    table = ChunkTableBuilder()
    table.add(list(refs))
    return table.build().pack()
