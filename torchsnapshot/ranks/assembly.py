"""From the reports of all ranks to one manifest. Pure: runs on rank 0, does no I/O.

What lives here: a rank's report of its tree, and how the trees of all ranks are put together: replicas once, sharded
tensors once for their mesh, chunk tables side by side. What doesn't: who reports what (``agreement``), how trees are
written (``format.entries``), the commit (``group_take``).

Ranks whose trees have the same structure send the same bytes, which are read once: what differs between them, small
values of their own, stands beside the tree. In a report a sharded tensor's columns name the reporting rank's own row
for every region; which region that is, is known here from the sharding.

Invariant: in the manifest each rank's tree is whole, and every region of every sharded tensor has its chunks; a region
that nobody reported is an error that names path and ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.errors import FormatError, SnapshotError
from torchsnapshot.format.entries import (
    USER_METADATA,
    EntriesBuilder,
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    TensorEntry,
    ValueEntry,
    pack_entries,
    spans_of,
    unpack_entries,
)
from torchsnapshot.geometry.placements import Sharding
from torchsnapshot.ranks.agreement import Duty
from torchsnapshot.state.flatten import ShardedLeaf
from torchsnapshot.state.sharded import ShardedSource
from torchsnapshot.state.values import encode
from torchsnapshot.store.envelope import ChunkTable, ChunkTableBuilder
from torchsnapshot.taking.plan import Leaf, TakePlan, add_rows, entry_of

_REPLICATED = "%replicated"
"""The type name of what stands in a report for a leaf that rank 0 reports. No class has such a name."""

_STAND_IN = OpaqueEntry(_REPLICATED, b"", None, 0)

Tree = dict[str, Entry]


NOT_REPORTED = 0xFFFF_FFFF
"""Stands for the first row of a sharded tensor's part that another rank reports."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank has.

    ``table`` is its chunk table, ``tree`` what ``pack_entries`` made of its tree (or b"" where rank 0 knows that of
    ``tree_digest``), ``private`` its own small values by path, ``rows`` the first row of each sharded tensor's part in
    the order of the tree, as u32.
    """

    table: bytes
    tree: bytes
    tree_digest: bytes
    private: Mapping[str, bytes]
    rows: bytes


def report_of(plan: TakePlan, duties: Mapping[str, Duty], rank: int) -> Report:
    """One rank's report.

    Args:
        plan: finished: every chunk is stored.
        duties: for each leaf of the plan by path.
        rank: the reporting rank.
    """
    table = ChunkTableBuilder()
    tree: Tree = {}
    private: dict[str, bytes] = {}
    rows = array("I")
    for leaf in plan.leaves:
        duty = duties.get(leaf.path, Duty.OWN)
        if duty is Duty.REPLICATED and rank != 0:
            tree[f"0/{leaf.path}"] = _STAND_IN
            continue
        if isinstance(leaf.node, ShardedLeaf):
            tree[f"0/{leaf.path}"], row = _reported_part(leaf, leaf.node.source, duty, table)
            rows.append(row)
            continue
        entry = entry_of(leaf, add_rows(leaf, table))
        if duty is Duty.OWN and isinstance(entry, (TensorEntry, ValueEntry, OpaqueEntry)):
            entry = _without_inline(leaf.path, entry, private)
        tree[f"0/{leaf.path}"] = entry
    packed = pack_entries(tree)
    return Report(table.build().pack(), packed, digest_of(memoryview(packed)), private, rows.tobytes())


def _reported_part(
    leaf: Leaf, source: ShardedSource, duty: Duty, table: ChunkTableBuilder
) -> tuple[ShardedTensorEntry, int]:
    """The entry without any rows, and the first one of this rank's part."""
    span = None if duty is Duty.ELSEWHERE else add_rows(leaf, table)
    return source.entry(leaf.cell, [None] * source.sharding.num_regions), NOT_REPORTED if span is None else span.first


def _without_inline(path: str, entry: TensorEntry | ValueEntry | OpaqueEntry, private: dict[str, bytes]) -> Entry:
    """Take an entry's own bytes out of the tree, so that trees of one structure are equal."""
    if isinstance(entry, TensorEntry):
        if not entry.inline:
            return entry
        private[path] = entry.inline
        return replace(entry, inline=bytes(entry.nbytes))
    if entry.data is None:
        return entry
    private[path] = entry.data
    return replace(entry, data=b"", nbytes=0)


def _with_inline(entry: Entry, data: bytes) -> Entry:
    if isinstance(entry, TensorEntry):
        return replace(entry, inline=data)
    if isinstance(entry, (ValueEntry, OpaqueEntry)):
        return replace(entry, data=data, nbytes=len(data))
    raise SnapshotError("a rank reported a value of its own where its tree has none")


class KnownTree:
    """A tree that rank 0 has read, without what differs from rank to rank.

    Args:
        packed: what ``pack_entries`` made.
    """

    def __init__(self, packed: bytes) -> None:
        entries = {path[2:]: entry for path, entry in unpack_entries(packed).items()}
        self.entries = {path: _without_rows(entry) for path, entry in entries.items()}
        self.sharded = [(path, entry) for path, entry in self.entries.items() if isinstance(entry, ShardedTensorEntry)]
        self.with_chunks = {
            path: entry
            for path, entry in self.entries.items()
            if not isinstance(entry, ShardedTensorEntry) and spans_of(entry)
        }
        self.stand_ins = [
            path
            for path, entry in self.entries.items()
            if isinstance(entry, OpaqueEntry) and entry.type_name == _REPLICATED
        ]


def _without_rows(entry: Entry) -> Entry:
    # zeros for every region of every tensor: nothing to keep
    return replace(entry, tables=b"", firsts=b"") if isinstance(entry, ShardedTensorEntry) else entry


class _Parts:
    """One sharded tensor while its regions come in."""

    def __init__(self, entry: ShardedTensorEntry, sharding: Sharding) -> None:
        self.entry = entry
        self.sharding = sharding
        """One object for all tensors that are spread alike."""
        num_regions = entry.sharding.num_regions
        self.tables = array("I", bytes(4 * num_regions))
        self.firsts = array("I", bytes(4 * num_regions))
        self.is_there = bytearray(num_regions)


@dataclass(slots=True)
class Assembler:
    """Puts the reports of all ranks together.

    Args:
        global_ranks: for each rank of the take its global rank: shardings speak of these.
        user_metadata: where it is too large for the manifest's head.
        known: trees that were read before, by digest; those of this take are added.
    """

    global_ranks: Sequence[int]
    user_metadata: Mapping[str, object] | None = None
    known: dict[bytes, KnownTree] = field(default_factory=dict)
    _tables: list[ChunkTable] = field(default_factory=list)
    _trees: list[KnownTree] = field(default_factory=list)
    _changes: list[Tree] = field(default_factory=list)
    _parts: dict[tuple[str, object], _Parts] = field(default_factory=dict)
    _parts_of: dict[int, list[_Parts]] = field(default_factory=dict)
    _shardings: dict[Sharding, Sharding] = field(default_factory=dict)
    _complete: dict[tuple[str, object], Entry] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        """Add the report of the next rank; ranks come in order.

        Raises:
            SnapshotError: it does not fit what other ranks report.
            FormatError: it is none.
        """
        rank = len(self._trees)
        self._tables.append(ChunkTable.unpack(report.table))
        tree = self.known.get(report.tree_digest)
        if tree is None:
            if digest_of(memoryview(report.tree)) != report.tree_digest:
                raise FormatError(f"rank {rank} has sent a tree with another digest, or none")
            tree = self.known[report.tree_digest] = KnownTree(report.tree)
        self._add_rows(rank, tree, memoryview(report.rows).cast("I"))
        changes = {path: _in_table(entry, rank) for path, entry in tree.with_chunks.items()} if rank else {}
        for path, data in report.private.items():
            changes[path] = _with_inline(tree.entries[path], data)
        self._trees.append(tree)
        self._changes.append(changes)

    def _add_rows(self, rank: int, tree: KnownTree, rows: Sequence[int]) -> None:
        """Take in where one rank's parts of sharded tensors are."""
        if len(rows) != len(tree.sharded):
            raise FormatError(f"rank {rank} reports {len(rows)} parts of {len(tree.sharded)} sharded tensors")
        parts = self._parts_of.get(id(tree))
        if parts is None:
            parts = self._parts_of[id(tree)] = [self._parts_at(rank, path, entry) for path, entry in tree.sharded]
        global_rank = self.global_ranks[rank]
        regions: dict[int, int | None] = {}
        for each, row in zip(parts, rows, strict=True):
            if row == NOT_REPORTED:
                continue
            sharding = each.sharding
            if id(sharding) not in regions:
                position = sharding.position_of(global_rank)
                regions[id(sharding)] = None if position is None else sharding.region_of(position)
            region = regions[id(sharding)]
            if region is not None:
                each.tables[region], each.firsts[region], each.is_there[region] = rank, row, 1

    def _parts_at(self, rank: int, path: str, entry: ShardedTensorEntry) -> _Parts:
        key = (path, entry.identity)
        parts = self._parts.get(key)
        if parts is None:
            sharding = self._shardings.setdefault(entry.sharding, entry.sharding)
            parts = self._parts[key] = _Parts(entry, sharding)
        if (entry.sharding, entry.cell) != (parts.entry.sharding, parts.entry.cell):
            raise SnapshotError(
                f"{path}: rank {rank} says that it is spread, or cut, in another way than other ranks say"
            )
        return parts

    def build(self) -> tuple[list[ChunkTable], bytes]:
        """The chunk tables, and the *entries* section.

        Raises:
            SnapshotError: a region of a sharded tensor was reported by nobody.
        """
        beside: Tree = {}
        if self.user_metadata is not None:
            data = encode(dict(self.user_metadata))
            beside[USER_METADATA] = ValueEntry(data, None, len(data))
        wholes: dict[int, Tree] = {}
        builder = EntriesBuilder()
        first: Tree = {}
        for rank, (tree, changes) in enumerate(zip(self._trees, self._changes, strict=True)):
            whole = wholes.get(id(tree))
            if whole is None:
                whole = dict(beside)
                whole.update((path, self._completed(path, entry)) for path, entry in tree.entries.items())
                whole.update((path, first[path]) for path in tree.stand_ins)
                wholes[id(tree)] = whole
            # what ranks have in common is the same object in their trees, and is written once
            mine = whole | changes if changes else whole
            builder.add([rank], mine)
            if not rank:
                first = mine
        return self._tables, builder.build()

    def _completed(self, path: str, entry: Entry) -> Entry:
        if not isinstance(entry, ShardedTensorEntry):
            return entry
        key = (path, entry.identity)
        found = self._complete.get(key)
        if found is None:
            parts = self._parts[key]
            regions = entry.sharding.regions(entry.shape)
            lost = [region for region, boxes in enumerate(regions) if boxes and not parts.is_there[region]]
            if lost:
                ranks = sorted({rank for region in lost for rank in entry.sharding.ranks_of(region)})
                raise SnapshotError(
                    f"{path}: no rank of this take holds the parts of global ranks {ranks}: all ranks of its mesh must "
                    "take part, and with the same tensor at this path"
                )
            for region, boxes in enumerate(regions):
                if not boxes:
                    parts.tables[region] = parts.firsts[region] = 0
            found = replace(entry, tables=parts.tables.tobytes(), firsts=parts.firsts.tobytes())
            self._complete[key] = found
        return found


def _in_table(entry: Entry, number: int) -> Entry:
    """The entry with its spans in another chunk table."""
    if isinstance(entry, TensorEntry) and entry.shards:
        return replace(
            entry, shards=tuple(replace(shard, span=replace(shard.span, table=number)) for shard in entry.shards)
        )
    if isinstance(entry, (ValueEntry, OpaqueEntry)) and entry.span is not None:
        return replace(entry, span=replace(entry.span, table=number))
    return entry
