"""The *entries* section: a tree of entries for every rank, where what ranks have in common stands once.

What lives here: building the section tree by tree, and reading it. What doesn't: its records (``entry_bytes``,
``entry_shardings``), the manifest around it (``entries``).

A tree is written whole, or as what differs from a whole one that stands before it: the places that are other, each with
all below it, and the app_state keys that are gone. Ranks with equal trees share one. So an entry that many ranks hold
alike, a replicated one, is stored once; in memory it is one object.

Invariants: what was read is checked in full before it is used, tree by tree, when a rank's entries are first asked for;
a tree that is written down can be read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torchsnapshot.entry_bytes import pack_record, unpack_records
from torchsnapshot.entry_kinds import (
    MAX_PATH_NCHARS,
    ContainerEntry,
    Entry,
    ShardedTensorEntry,
    children,
    is_entry_path,
)
from torchsnapshot.entry_shardings import (
    MAX_RANK,
    Mesh,
    pack_mesh,
    pack_sharded,
    unpack_mesh,
    unpack_ranks,
    unpack_sharded,
)
from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.store import bounded

ENTRIES_VERSION = 1

MAX_LISTED = 1 << 24
"""The most entries of all ranks together that are ever put into one dict."""

Tree = Mapping[str, Entry]
"""The entries of one rank by path, without the rank."""


def same(one: Entry | None, other: Entry | None) -> bool:
    """Whether two entries are equal, keys' types included: 1, 1.0 and True are equal to Python."""
    if one is other:
        return True
    if one != other:
        return False
    if isinstance(one, ContainerEntry) and isinstance(other, ContainerEntry):
        return list(map(type, one.keys)) == list(map(type, other.keys))
    return True


def _ancestors(path: str) -> Iterator[str]:
    """The places above a path, nearest first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _is_below(path: str, places: set[str]) -> bool:
    return any(ancestor in places for ancestor in _ancestors(path))


def _is_at_or_below(path: str, places: set[str]) -> bool:
    return path in places or _is_below(path, places)


# ------------------------------------------------------------------ writing


@dataclass(slots=True)
class _Packed:
    """A tree as it will be written: the ranks that have it, and all else of its line."""

    ranks: list[int]
    base: int | None
    removed: tuple[str, ...]
    num_records: int
    records: bytes


class EntriesBuilder:
    """Collects the trees of all ranks, and makes the section. It keeps whole trees only, and of the others what differs.

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
    """What makes ``entries`` of ``base``: the places that differ, without those below them; the app_state keys that
    are gone; and how many entries are not taken over."""
    others = [path for path, entry in entries.items() if base.get(path) is not entry and not same(base.get(path), entry)]
    removed = tuple(path for path in base if path not in entries and "/" not in path)
    differing = set(others)
    places = [path for path in others if not _is_below(path, differing)]
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
    num_kept = sum(not _is_at_or_below(path, gone) for path in base)
    if num_kept + num_others != len(entries):
        # it cannot be made of the base, as it is no tree; writing it whole says what is wrong with it
        return places, removed, len(entries) + 1
    return places, removed, num_others


def pack_trees(trees: Mapping[int, Tree]) -> bytes:
    """The entries section of the trees of several ranks. Raises as ``EntriesBuilder`` does."""
    builder = EntriesBuilder()
    for rank, entries in trees.items():
        builder.add([rank], entries)
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


# ------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class _Tree:
    """A tree as it is written."""

    ranks: tuple[int, ...]
    base: int | None
    removed: tuple[str, ...]
    num_records: int
    records: bytes


class EntriesSection:
    """An entries section. Its trees are read when they are first asked for.

    Args:
        data: all of its bytes.
        where: which manifest this is, for messages.

    Raises:
        NewerFormatError: an entry of a kind that this library does not know; so do all methods.
        FormatError: anything else is wrong; so do all methods.
    """

    def __init__(self, data: bytes, where: str = "entries") -> None:
        self._where = where
        with bounded.reading(where):
            reader = bounded.FieldReader(data, where)
            if reader.array("the section's header") != 4:
                reader.fail("the section's header has four fields")
            version = reader.integer("entries version", 1 << 32)
            if version != ENTRIES_VERSION:
                raise NewerFormatError(f"{where}: entries version {version} is unknown; upgrade torchsnapshot")
            num_meshes, num_sharded, num_trees = [reader.integer("a number of records") for _ in range(3)]
            if num_meshes + num_sharded + num_trees > reader.left:
                reader.fail(f"claims {num_meshes} meshes, {num_sharded} sharded tensors and {num_trees} trees")
            meshes = [unpack_mesh(reader) for _ in range(num_meshes)]
            self.sharded = [unpack_sharded(reader, meshes) for _ in range(num_sharded)]
            self._trees: list[_Tree] = []
            for _ in range(num_trees):
                self._trees.append(self._read_tree(reader))
            reader.finish()
        self._tree_of = {rank: number for number, tree in enumerate(self._trees) for rank in tree.ranks}
        if len(self._tree_of) != sum(len(tree.ranks) for tree in self._trees):
            raise FormatError(f"{where}: a rank has two trees")
        self._places: dict[int, dict[str, dict[str, Entry]]] = {}
        self._entries: dict[int, dict[str, Entry]] = {}
        self._varying: dict[int, set[str]] | None = None

    @property
    def ranks(self) -> list[int]:
        """The ranks that have a tree, in their order."""
        return sorted(self._tree_of)

    def entries_of(self, rank: int) -> dict[str, Entry]:
        """The entries of one rank by path without the rank, depth-first, parents first. Not to be changed.

        Raises:
            KeyError: the rank has no tree.
        """
        return self._entries_of_tree(self._tree_of[rank])

    def shared(self, path: str) -> Entry | None:
        """The entry that every rank has at a path, without rank; None where one has another, or none.

        A leaf that is found so is replicated, or a tensor that is sharded over a mesh of all ranks.
        """
        if self._varying is None:
            self._varying = {number: set() for number, tree in enumerate(self._trees) if tree.base is None}
            for number, tree in enumerate(self._trees):
                if tree.base is not None:
                    self._varying[tree.base].update(tree.removed, self._places_of(number))
        found: Entry | None = None
        for number, varying in self._varying.items():
            entry = self._entries_of_tree(number).get(path)
            if entry is None or _is_at_or_below(path, varying):
                return None
            if found is not None and not same(found, entry):
                return None
            found = entry
        return found

    def all_entries(self) -> dict[str, Entry]:
        """The entries of all ranks by path, ``<rank>/<app_state key>/…``, rank by rank."""
        num_entries = accumulate(len(self.entries_of(rank)) for rank in self.ranks)
        if any(count > MAX_LISTED for count in num_entries):
            raise FormatError(f"{self._where}: more than {MAX_LISTED} entries; read them rank by rank")
        return {f"{rank}/{path}": entry for rank in self.ranks for path, entry in self.entries_of(rank).items()}

    def check(self) -> None:
        """Read everything. Of the trees that are written against others nothing is kept."""
        for number, tree in enumerate(self._trees):
            if tree.base is None:
                self._entries_of_tree(number)
            else:
                self._check_places(tree, self._read_places(tree))

    def _read_tree(self, reader: bounded.FieldReader) -> _Tree:
        if reader.array("tree") != 5:
            reader.fail("a tree has five fields")
        ranks = unpack_ranks(reader, "ranks of a tree")
        base: int | None = reader.scalar("base of a tree", (int, type(None)))
        if base is not None and not (0 <= base < len(self._trees) and self._trees[base].base is None):
            reader.fail(f"a tree's base is {base}, which is no whole tree before it")
        num_removed = reader.array("removed keys")
        removed = tuple([reader.text("removed key", MAX_PATH_NCHARS) for _ in range(num_removed)])
        return _Tree(ranks, base, removed, reader.integer("number of records"), reader.binary("records"))

    def _places_of(self, number: int) -> dict[str, dict[str, Entry]]:
        """What stands in a tree: the entries at and below each of its places."""
        places = self._places.get(number)
        if places is None:
            places = self._places[number] = self._read_places(self._trees[number])
        return places

    def _read_places(self, tree: _Tree) -> dict[str, dict[str, Entry]]:
        where = f"{self._where}: tree of rank {tree.ranks[0]}"
        return unpack_records(tree.records, tree.num_records, self.sharded, where)

    def _entries_of_tree(self, number: int) -> dict[str, Entry]:
        entries = self._entries.get(number)
        if entries is None:
            tree, places = self._trees[number], self._places_of(number)
            self._check_places(tree, places)
            entries = self._entries[number] = self._apply(tree, places)
        return entries

    def _check_places(self, tree: _Tree, places: Mapping[str, Mapping[str, Entry]]) -> None:
        base = {} if tree.base is None else self._entries_of_tree(tree.base)
        changed = {*places, *tree.removed}
        for path in changed:
            is_known = path in base
            if (not is_known and "/" in path) or _is_below(path, changed):
                raise FormatError(f"{self._where}: {path!r:.200} is not the path of an app_state key, nor in the base")
        if any(path not in base or "/" in path for path in tree.removed) or not places.keys().isdisjoint(tree.removed):
            raise FormatError(f"{self._where}: a tree removes what is no app_state key of its base")

    def _apply(self, tree: _Tree, places: Mapping[str, Mapping[str, Entry]]) -> dict[str, Entry]:
        base = {} if tree.base is None else self._entries_of_tree(tree.base)
        gone = {*places, *tree.removed}
        if any(isinstance(base.get(path), ContainerEntry) for path in gone):
            kept = {path: entry for path, entry in base.items() if path in places or not _is_at_or_below(path, gone)}
        else:
            # a leaf has nothing below it
            kept = {path: entry for path, entry in base.items() if path in places or path not in gone}
        if all(path in kept and len(below) == 1 for path, below in places.items()):
            for below in places.values():
                kept.update(below)
            return kept
        entries: dict[str, Entry] = {}
        for path, entry in kept.items():
            entries.update(places.get(path) or {path: entry})
        for path, below in places.items():
            if path not in kept:
                entries.update(below)
        return entries


def unpack_entries(data: bytes, where: str = "entries") -> dict[str, Entry]:
    """The entries of all ranks by path, ``<rank>/<app_state key>/…``. Raises as ``EntriesSection`` does."""
    return EntriesSection(data, where).all_entries()
