"""Building the *entries* section from the trees of all ranks: what they have in common is written once.

What lives here: which tree is written whole, which against another one, and how. What doesn't: reading, and what the
parts mean (``entry_section``), the records (``entry_bytes``, ``entry_shardings``).

Invariant: a section that is built can be read; what could not is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchsnapshot.errors import FormatError
from torchsnapshot.format.entry_bytes import pack_record
from torchsnapshot.format.entry_kinds import ContainerEntry, Entry, ShardedTensorEntry, children, is_entry_path
from torchsnapshot.format.entry_section import ENTRIES_VERSION, EntriesSection, Tree, is_at_or_below, is_below, same
from torchsnapshot.format.entry_shardings import MAX_RANK, Mesh, pack_mesh, pack_sharded
from torchsnapshot.store import bounded


@dataclass(slots=True)
class _Packed:
    """A tree as it will be written: the ranks that have it, and all else of its line."""

    ranks: list[int]
    base: int | None
    removed: tuple[str, ...]
    num_records: int
    records: bytes


class EntriesBuilder:
    """Collects the trees of all ranks, and makes the section. It keeps whole trees, and of the others what differs.

    Entries that are the same object in several trees are compared at once; others by their fields.
    """

    def __init__(self) -> None:
        self._meshes: dict[Mesh, int] = {}
        self._sharded: dict[ShardedTensorEntry, int] = {}
        self._sharded_by_id: dict[int, tuple[int, ShardedTensorEntry]] = {}
        self._sharded_records: list[bytes] = []
        self._trees: list[_Packed] = []
        self._whole: dict[int, Tree] = {}
        self._last_base: int | None = None
        self._seen: dict[tuple[int | None, tuple[str, ...], bytes], int] = {}
        self._ranks: set[int] = set()

    def add(self, ranks: Sequence[int], entries: Tree) -> None:
        """Add the tree that these ranks have.

        Args:
            ranks: global ranks; each may be added once.
            entries: by path without rank; every container's children are there. Do not change it afterwards.

        Raises:
            ValueError: an entry that no manifest can hold, a path that is nobody's child, a rank that was added before.
        """
        for rank in ranks:
            if not 0 <= rank <= MAX_RANK or rank in self._ranks:
                raise ValueError(f"rank {rank} was added before, or is no rank")
            self._ranks.add(rank)
        if not ranks:
            raise ValueError("a tree of no rank")
        base, places, removed = self._closest(entries)
        records, num_records = self._pack_places(entries, places, is_all=base is None)
        line = (base, removed, records)
        if line in self._seen:
            self._trees[self._seen[line]].ranks.extend(ranks)
            return
        self._seen[line] = number = len(self._trees)
        if base is None:
            self._whole[number] = entries
            self._last_base = number
        self._trees.append(_Packed(list(ranks), base, removed, num_records, records))

    def build(self) -> bytes:
        """The section.

        Raises:
            ValueError: as for ``add``.
        """
        parts = [
            bounded.pack([ENTRIES_VERSION, len(self._meshes), len(self._sharded_records), len(self._trees)]),
            *map(pack_mesh, self._meshes),
            *self._sharded_records,
        ]
        for tree in self._trees:
            ranks = array("I", sorted(tree.ranks)).tobytes()
            parts.append(bounded.pack([ranks, tree.base, tree.removed, tree.num_records, tree.records]))
        data = b"".join(parts)
        try:
            # one more pass, but nothing is ever committed that cannot be read
            EntriesSection(data).check()
        except FormatError as error:
            raise ValueError(str(error)) from error
        return data

    def _closest(self, entries: Tree) -> tuple[int | None, list[str], tuple[str, ...]]:
        """The whole tree to write this one against, the places that differ, and the app_state keys that are gone."""
        candidates = sorted(self._whole, key=lambda number: number != self._last_base)
        for number in candidates:
            places, removed, num_others = _difference(self._whole[number], entries)
            if num_others <= len(entries) // 2:
                self._last_base = number
                return number, places, removed
        return None, [path for path in entries if "/" not in path], ()

    def _pack_places(self, entries: Tree, places: list[str], *, is_all: bool) -> tuple[bytes, int]:
        """The records at and below these places, depth-first."""
        parts: list[bytes] = []
        seen: set[str] = set()
        for place in places:
            parts.append(bounded.pack(place))
            pending = [place]
            while pending:
                path = pending.pop()
                entry = entries.get(path)
                if entry is None or path in seen:
                    raise ValueError(f"the entry {path!r:.200} of a container is missing, or another entry's child too")
                seen.add(path)
                try:
                    parts.append(pack_record(entry, self._number_of))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                if isinstance(entry, ContainerEntry):
                    pending.extend(reversed(children(path, entry)))
        if is_all and len(seen) != len(entries):
            lost = next(path for path in entries if path not in seen)
            raise ValueError(f"{lost!r:.200} is not the path of an app_state key, and no container's child")
        return b"".join(parts), len(seen)

    def _number_of(self, entry: ShardedTensorEntry) -> int:
        known = self._sharded_by_id.get(id(entry))
        if known is not None:
            return known[0]
        number = self._sharded.setdefault(entry, len(self._sharded))
        # the entry stands beside its number, so that nothing else gets its id
        self._sharded_by_id[id(entry)] = number, entry
        if number == len(self._sharded_records):
            mesh = (entry.sharding.mesh_shape, entry.sharding.mesh_ranks)
            self._sharded_records.append(pack_sharded(entry, self._meshes.setdefault(mesh, len(self._meshes))))
        return number


def _difference(base: Tree, entries: Tree) -> tuple[list[str], tuple[str, ...], int]:
    """What makes ``entries`` of ``base``.

    Returns:
        The places that differ, without those below them; the app_state keys that are gone; and how many entries are
        not taken over.
    """
    others = [
        path for path, entry in entries.items() if base.get(path) is not entry and not same(base.get(path), entry)
    ]
    removed = tuple(path for path in base if path not in entries and "/" not in path)
    differing = set(others)
    places = [path for path in others if not is_below(path, differing)]
    are_leaves = all(
        path in base and not isinstance(base[path], ContainerEntry) and not isinstance(entries[path], ContainerEntry)
        for path in others
    )
    if are_leaves and not removed and len(base) == len(entries):
        return places, removed, len(others)
    num_others = 0
    pending = list(places)
    while pending:
        path = pending.pop()
        num_others += 1
        entry = entries.get(path)
        if isinstance(entry, ContainerEntry):
            pending.extend(children(path, entry))
    gone = {*places, *removed}
    num_kept = sum(not is_at_or_below(path, gone) for path in base)
    if num_kept + num_others != len(entries):
        # it cannot be made of the base, as it is no tree; writing it whole says what is wrong with it
        return places, removed, len(entries) + 1
    return places, removed, num_others


def pack_trees(trees: Mapping[int, Tree]) -> bytes:
    """The entries section of the trees of several ranks. Raises as ``EntriesBuilder`` does."""
    builder = EntriesBuilder()
    for rank in sorted(trees):
        builder.add([rank], trees[rank])
    return builder.build()


def pack_entries(entries: Mapping[str, Entry]) -> bytes:
    """The entries section.

    Args:
        entries: by path, ``<rank>/<app_state key>/…``; every container's children are there.

    Raises:
        ValueError: an entry that no manifest can hold, or a path that is nobody's child.
    """
    trees: dict[int, dict[str, Entry]] = {}
    for path, entry in entries.items():
        if not is_entry_path(path):
            raise ValueError(f"{path!r:.200} is not the path of an app_state key, nor of a place below one")
        rank, _, place = path.partition("/")
        trees.setdefault(int(rank), {})[place] = entry
    return pack_trees(trees)
