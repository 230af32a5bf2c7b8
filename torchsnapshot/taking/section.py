"""The manifest's sections of a state that is made like the last one: only what differs is packed anew.

What lives here: ``Packer``, which packs a finished plan, and keeps what it takes to do so faster the next time. What
doesn't: the bytes of entries (``format``), planning (``structure``, ``plan``).

The entries sections of two states of one structure differ only in the bytes of inline tensors and values: where these
are as long as before, they are put into their places in the last section. That one was read back and checked when it
was packed; nothing that is checked depends on the bytes inside a value of the same length. Where nothing differs, the
last section is taken as it was stored.

Invariant: what comes out is what ``pack_entries`` and ``ChunkTableBuilder`` would make of the plan.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchsnapshot.format.entries import WRAPPERS, ContainerEntry, Entry, ShardedTensorEntry, TensorEntry, pack_entries
from torchsnapshot.format.entry_bytes import pack_record
from torchsnapshot.pauses import collector_paused
from torchsnapshot.store import bounded
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder, PackedSection, pack_body
from torchsnapshot.taking.plan import TakePlan, build_entries


@dataclass(frozen=True, slots=True)
class _Section:
    """An entries section without the bytes of its inline leaves: what stands before, between and behind them."""

    parts: list[bytes]
    sizes: list[int]

    def filled(self, inline: Sequence[bytes]) -> bytes | None:
        """The section with other bytes in it; None where their sizes differ."""
        if list(map(len, inline)) != self.sizes:
            return None
        pieces = [b""] * (2 * len(inline) + 1)
        pieces[::2] = self.parts
        pieces[1::2] = inline
        return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class _Packed:
    """What was packed last: of which inline bytes and which chunks, and what came out."""

    inline: list[bytes]
    entries: bytes
    refs: list[ChunkRef]
    table: ChunkTable
    body: Sequence[PackedSection] | None = None


class Packer:
    """Packs finished plans of one structure, of rank 0. Any thread may use it."""

    def __init__(self) -> None:
        self._section: _Section | None = None
        self._last: _Packed | None = None

    def pack(self, plan: TakePlan) -> tuple[bytes, ChunkTable]:
        """The entries section and the chunk table."""
        packed = self._pack(plan)
        return packed.entries, packed.table

    def pack_body(self, plan: TakePlan) -> Sequence[PackedSection]:
        """All sections of the manifest but its head, ready to be stored."""
        packed = self._pack(plan)
        if packed.body is not None:
            return packed.body
        body = pack_body((packed.table,), packed.entries)
        self._last = _Packed(packed.inline, packed.entries, packed.refs, packed.table, body)
        return body

    @collector_paused()
    def _pack(self, plan: TakePlan) -> _Packed:
        inline = [leaf.inline for leaf in plan.leaves if leaf.inline is not None]
        refs = [ref for leaf in plan.leaves if leaf.chunks for chunk in leaf.chunks if (ref := chunk.ref) is not None]
        last, section = self._last, self._section
        if last is None or section is None or len(refs) != len(last.refs):
            return self._pack_anew(plan, inline, refs)
        is_same_table = all(map(operator.is_, refs, last.refs))
        if is_same_table and inline == last.inline:
            return last
        entries = section.filled(inline)
        if entries is None:
            return self._pack_anew(plan, inline, refs)
        packed = _Packed(inline, entries, refs, last.table if is_same_table else _table_of(refs))
        self._last = packed
        return packed

    def _pack_anew(self, plan: TakePlan, inline: list[bytes], refs: list[ChunkRef]) -> _Packed:
        entries, table = build_entries(plan, rank=0)
        data = pack_entries(entries)
        packed = _Packed(inline, data, refs, table)
        self._section, self._last = _section_of(plan, entries, data), packed
        return packed


def _table_of(refs: Sequence[ChunkRef]) -> ChunkTable:
    builder = ChunkTableBuilder()
    builder.add(refs)
    return builder.build()


def _section_of(plan: TakePlan, entries: Mapping[str, Entry], data: bytes) -> _Section | None:
    """Cut a section at its inline bytes; None where it isn't made of these entries in this order, and of no other."""
    parts: list[bytes] = []
    sizes: list[int] = []
    records: list[bytes] = []
    for leaf in plan.leaves:
        entry = entries[f"0/{leaf.path}"]
        if "/" not in leaf.path:
            records.append(bounded.pack(leaf.path))
        record = pack_record(entry, _no_number)
        if leaf.inline is None:
            records.append(record)
            continue
        assert not isinstance(entry, (ContainerEntry, ShardedTensorEntry))
        behind = [WRAPPERS.index(entry.wrapper), entry.requires_grad] if isinstance(entry, TensorEntry) else [()]
        end = len(record) - sum(len(bounded.pack(field)) for field in (*behind, entry.nbytes))
        start = end - len(leaf.inline)
        parts.append(b"".join([*records, record[:start]]))
        sizes.append(len(leaf.inline))
        records = [record[end:]]
    parts.append(b"".join(records))
    num_behind = sum(map(len, parts)) + sum(sizes)
    parts[0] = data[: len(data) - num_behind] + parts[0]
    section = _Section(parts, sizes)
    # not taken on trust: what comes out must be what was packed and checked
    same = section.filled([leaf.inline for leaf in plan.leaves if leaf.inline is not None]) == data
    return section if same else None


def _no_number(entry: ShardedTensorEntry) -> int:
    raise AssertionError("a structure has no sharded tensors")
