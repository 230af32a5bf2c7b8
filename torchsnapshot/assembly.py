"""From the reports of all ranks to one manifest. Pure: runs on rank 0, does no I/O.

What lives here: a rank's report of its tree, and how the trees of all ranks are put together: replicas once, sharded
tensors once for their mesh, chunk tables side by side. What doesn't: who reports what (``agreement``), how trees are
written (``entries``), the commit (``group_take``).

Ranks whose trees have the same structure send the same bytes, which are read once: what differs between them, small
values of their own, stands beside the tree. In a report a sharded tensor's columns name the reporting rank's own row
for every region; which region that is, is known here from the sharding.

Invariant: in the manifest each rank's tree is whole, and every region of every sharded tensor has its chunks; a region
that nobody reported is an error that names path and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torchsnapshot.agreement import Duty
from torchsnapshot.entries import (
    USER_METADATA,
    EntriesBuilder,
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    Span,
    TensorEntry,
    ValueEntry,
    pack_entries,
    span_columns,
    unpack_entries,
)
from torchsnapshot.errors import SnapshotError
from torchsnapshot.flatten import ShardedLeaf
from torchsnapshot.plan import Leaf, TakePlan, add_rows, entry_of
from torchsnapshot.store.envelope import ChunkTable, ChunkTableBuilder
from torchsnapshot.values import encode

_REPLICATED = "%replicated"
"""The type name of what stands in a report for a leaf that rank 0 reports. No class has such a name."""

_STAND_IN = OpaqueEntry(_REPLICATED, b"", None, 0)

Tree = dict[str, Entry]


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank has: its chunk table, its tree as ``pack_entries`` packs it, and its own small values by path."""

    table: bytes
    tree: bytes
    private: Mapping[str, bytes]


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
    for leaf in plan.leaves:
        duty = duties.get(leaf.path, Duty.OWN)
        if duty is Duty.REPLICATED and rank != 0:
            tree[f"0/{leaf.path}"] = _STAND_IN
            continue
        entry = _reported(leaf, duty, table)
        if duty is Duty.OWN and isinstance(entry, (TensorEntry, ValueEntry, OpaqueEntry)):
            entry = _without_inline(leaf.path, entry, private)
        tree[f"0/{leaf.path}"] = entry
    return Report(table.build().pack(), pack_entries(tree), private)


def _reported(leaf: Leaf, duty: Duty, table: ChunkTableBuilder) -> Entry:
    if not isinstance(leaf.node, ShardedLeaf):
        return entry_of(leaf, add_rows(leaf, table))
    span = None if duty is Duty.ELSEWHERE else add_rows(leaf, table)
    source = leaf.node.source
    return source.entry(leaf.cell, [span or Span(0, 0, 0)] * source.sharding.num_regions)


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


@dataclass(slots=True)
class _ShardedParts:
    """One sharded tensor while its regions come in."""

    entry: ShardedTensorEntry
    spans: dict[int, Span] = field(default_factory=dict)
    complete: ShardedTensorEntry | None = None


@dataclass(slots=True)
class Assembler:
    """Puts the reports of all ranks together.

    Args:
        global_ranks: for each rank of the take its global rank: shardings speak of these.
        user_metadata: where it is too large for the manifest's head.
    """

    global_ranks: Sequence[int]
    user_metadata: Mapping[str, object] | None = None
    _tables: list[ChunkTable] = field(default_factory=list)
    _trees: list[Tree] = field(default_factory=list)
    _read: dict[bytes, Tree] = field(default_factory=dict)
    _sharded: dict[tuple[str, object], _ShardedParts] = field(default_factory=dict)

    def add(self, report: Report, reported_regions: frozenset[str]) -> None:
        """Add the report of the next rank.

        Args:
            report: ranks come in order.
            reported_regions: the paths of the sharded tensors whose region this rank reports.
        """
        rank = len(self._trees)
        self._tables.append(ChunkTable.unpack(report.table))
        tree = self._read.get(report.tree)
        if tree is None:
            tree = {path[2:]: entry for path, entry in unpack_entries(report.tree).items()}
            self._read[report.tree] = tree
        mine: Tree = {}
        for path, entry in tree.items():
            if isinstance(entry, ShardedTensorEntry):
                self._add_region(rank, path, entry, is_reported=path in reported_regions)
            elif path in report.private:
                entry = _with_inline(entry, report.private[path])
            mine[path] = _in_table(entry, rank)
        self._trees.append(mine)

    def _add_region(self, rank: int, path: str, entry: ShardedTensorEntry, *, is_reported: bool) -> None:
        parts = self._sharded.setdefault((path, entry.identity), _ShardedParts(entry))
        if (entry.sharding, entry.cell) != (parts.entry.sharding, parts.entry.cell):
            raise SnapshotError(
                f"{path}: rank {rank} says that it is spread, or cut, in another way than other ranks say"
            )
        position = entry.sharding.position_of(self.global_ranks[rank])
        if position is None or not is_reported:
            return
        region = entry.sharding.region_of(position)
        if entry.sharding.boxes_at(entry.shape, position):
            first = memoryview(entry.firsts).cast("I")[region]
            parts.spans[region] = Span(rank, first, 0)

    def build(self) -> tuple[list[ChunkTable], bytes]:
        """The chunk tables, and the *entries* section.

        Raises:
            SnapshotError: a region of a sharded tensor was reported by nobody.
        """
        beside: Tree = {}
        if self.user_metadata is not None:
            data = encode(dict(self.user_metadata))
            beside[USER_METADATA] = ValueEntry(data, None, len(data))
        first = {path: self._complete(path, entry) for path, entry in self._trees[0].items()}
        builder = EntriesBuilder()
        builder.add([0], first | beside)
        for rank, tree in enumerate(self._trees[1:], start=1):
            # what all ranks have is written once
            whole: Tree = dict(beside)
            for path, entry in tree.items():
                is_stand_in = isinstance(entry, OpaqueEntry) and entry.type_name == _REPLICATED
                whole[path] = first[path] if is_stand_in else self._complete(path, entry)
            builder.add([rank], whole)
        return self._tables, builder.build()

    def _complete(self, path: str, entry: Entry) -> Entry:
        if not isinstance(entry, ShardedTensorEntry):
            return entry
        parts = self._sharded[path, entry.identity]
        if parts.complete is None:
            regions = entry.sharding.regions(entry.shape)
            lost = [region for region, boxes in enumerate(regions) if boxes and region not in parts.spans]
            if lost:
                ranks = sorted({rank for region in lost for rank in entry.sharding.ranks_of(region)})
                raise SnapshotError(
                    f"{path}: no rank of this take holds the parts of global ranks {ranks}: all ranks of its mesh must "
                    "take part, and with the same tensor at this path"
                )
            tables, firsts = span_columns(parts.spans.get(region) for region in range(len(regions)))
            parts.complete = replace(entry, tables=tables, firsts=firsts)
        return parts.complete


def _in_table(entry: Entry, number: int) -> Entry:
    """The entry with its spans in another chunk table."""
    if isinstance(entry, TensorEntry) and entry.shards:
        return replace(
            entry, shards=tuple(replace(shard, span=replace(shard.span, table=number)) for shard in entry.shards)
        )
    if isinstance(entry, (ValueEntry, OpaqueEntry)) and entry.span is not None:
        return replace(entry, span=replace(entry.span, table=number))
    return entry
