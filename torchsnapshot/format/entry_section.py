"""Reading the *entries* section: a tree of entries for every rank, where what ranks have in common stands once.

What lives here: the section as it is read, tree by tree. What doesn't: building it (``entry_builder``), its records
(``entry_bytes``, ``entry_shardings``), the manifest around it (``entries``).

A tree is written whole, or as what differs from a whole one that stands before it: the places that are other, each
with all below it, and the app_state keys that are gone. Ranks with equal trees share one. So an entry that many ranks
hold alike, a replicated one, is stored once; in memory it is one object.

Invariant: what was read is checked in full before it is used, tree by tree, when a rank's entries are first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.format.entry_bytes import unpack_records
from torchsnapshot.format.entry_kinds import MAX_PATH_NCHARS, ContainerEntry, Entry
from torchsnapshot.format.entry_shardings import unpack_mesh, unpack_ranks, unpack_sharded
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


def is_below(path: str, places: set[str]) -> bool:
    """Whether one of the places is above the path."""
    return any(ancestor in places for ancestor in _ancestors(path))


def is_at_or_below(path: str, places: set[str]) -> bool:
    """Whether the path is one of the places, or below one."""
    return path in places or is_below(path, places)


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
            if entry is None or is_at_or_below(path, varying):
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
            if (not is_known and "/" in path) or is_below(path, changed):
                raise FormatError(f"{self._where}: {path!r:.200} is not the path of an app_state key, nor in the base")
        if any(path not in base or "/" in path for path in tree.removed) or not places.keys().isdisjoint(tree.removed):
            raise FormatError(f"{self._where}: a tree removes what is no app_state key of its base")

    def _apply(self, tree: _Tree, places: Mapping[str, Mapping[str, Entry]]) -> dict[str, Entry]:
        base = {} if tree.base is None else self._entries_of_tree(tree.base)
        gone = {*places, *tree.removed}
        if any(isinstance(base.get(path), ContainerEntry) for path in gone):
            kept = {path: entry for path, entry in base.items() if path in places or not is_at_or_below(path, gone)}
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
