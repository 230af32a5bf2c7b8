"""Jobs that are cut into stages, as by pipeline parallelism: whose tree a rank restores from. Pure.

What lives here: which ranks of a snapshot spread their tensors over one another (a *stage*), which stage of a snapshot
is that of a reading rank, and the trees of several stages put together. What doesn't: what becomes of leaves that one
rank had for itself (``elastic``), the regions of a tensor (``state.resharding``).

The same path on disjoint meshes is several tensors. Where a snapshot has such, as an optimizer's state that is
numbered within its stage, only the order of the stages tells which is which: the reading job must have as many. Where
it has none, as names are unique in the whole job, each reading rank takes what it has a place for, from whatever
stage.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchsnapshot.errors import FormatError, MismatchError
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    Key,
    ShardedTensorEntry,
    StoredManifest,
    ValueEntry,
    component_of,
    entries_below,
)
from torchsnapshot.state.values import NotPlain, decode, encode

Ranks = frozenset[int]


@dataclass(frozen=True, slots=True)
class Reader:
    """The rank that restores, and what of one key of the application's state it has.

    Args:
        rank: in its group.
        world_size: how many ranks read.
        mesh: over which ranks of the group the tensors are spread that it has a part of; None: there are none.
        paths: all places of its state.
        makes: whether it can make a place that it does not have yet, by path.
        is_numbered: names are numbers that begin anew on every stage, as those of a torch optimizer.
        is_random_state: it is an ``RNGState``.
    """

    rank: int
    world_size: int
    mesh: Ranks | None = None
    paths: Container[str] = ()
    makes: Callable[[str], bool] = lambda _: False
    is_numbered: bool = False
    is_random_state: bool = False

    def has_place(self, path: str) -> bool:
        """Whether there is a place for a leaf, or there will be."""
        return path in self.paths or self.makes(path)

    @property
    def is_staged(self) -> bool:
        """Whether its tensors are spread over some of the ranks that read, but not over all."""
        return self.mesh is not None and len(self.mesh) < self.world_size


def representatives(manifest: StoredManifest) -> list[int]:
    """Ranks that together have every tensor that is spread over some ranks of a snapshot, but not over all."""
    meshes = {frozenset(entry.sharding.mesh_ranks) for entry in manifest.section.sharded}
    ranks = frozenset(manifest.ranks)
    firsts = {min(mesh) for mesh in meshes if mesh != ranks}
    # where the take's group was a part of its job, meshes speak of ranks that have other numbers here
    return sorted(firsts) if all(mesh <= ranks for mesh in meshes) else manifest.ranks


def stages_of(manifest: StoredManifest, path: str) -> list[Ranks]:
    """The ranks of a snapshot that spread tensors below a path over one another, in the order of their first ranks."""
    stages: list[Ranks] = []
    for rank in sorted({0, *representatives(manifest)}) if manifest.section.sharded else ():
        entries = entries_below(manifest, path, rank).values()
        for mesh in {entry.sharding.mesh_ranks for entry in entries if isinstance(entry, ShardedTensorEntry)}:
            joined = frozenset(mesh).union(*(stage for stage in stages if not stage.isdisjoint(mesh)))
            stages = [*(stage for stage in stages if stage.isdisjoint(joined)), joined]
    return sorted(stages, key=min)


def tiles_of(mesh: Ranks, world_size: int) -> list[Ranks] | None:
    """All stages of a job, from one of them: those have its shape. None where such do not make up the job."""
    offsets = [rank - min(mesh) for rank in mesh]
    tiles: list[Ranks] = []
    covered: set[int] = set()
    for rank in range(world_size):
        if rank in covered:
            continue
        tile = frozenset(rank + offset for offset in offsets)
        if max(tile) >= world_size or not covered.isdisjoint(tile):
            return None
        covered |= tile
        tiles.append(tile)
    return tiles


def numbered_paths(manifest: StoredManifest, path: str, stages: Sequence[Ranks]) -> list[str]:
    """The paths at which different stages hold different sharded tensors; replicas of one tensor are not different."""
    found: dict[str, ShardedTensorEntry] = {}
    several = set()
    for stage in stages:
        for each, entry in entries_below(manifest, path, min(stage)).items():
            if isinstance(entry, ShardedTensorEntry):
                first = found.setdefault(each, entry)
                if first.identity != entry.identity and not _are_replicas(manifest, first, entry):
                    several.add(each)
    return sorted(several)


def _are_replicas(manifest: StoredManifest, one: ShardedTensorEntry, other: ShardedTensorEntry) -> bool:
    """Whether two meshes hold the same tensor in the same way, as under data parallelism around tensor parallelism."""
    moved = replace(other.sharding, mesh_ranks=one.sharding.mesh_ranks)
    return replace(one, tables=b"", firsts=b"") == replace(other, sharding=moved, tables=b"", firsts=b"") and all(
        (first is None and second is None)
        or (first is not None and second is not None and manifest.digests(first) == manifest.digests(second))
        for first, second in zip(one.spans(), other.spans(), strict=True)
    )


def source_of(stages: Sequence[Ranks], stored_size: int, reader: Reader, numbered: Sequence[str]) -> int:
    """The rank of a snapshot whose tree a reading rank restores from, by the place of its stage among all.

    Args:
        stages: of the snapshot.
        stored_size: how many ranks took it.
        reader: who reads.
        numbered: places whose tensor is another one on every stage, for the message.

    Raises:
        MismatchError: the reading job has not as many stages, or it cannot be seen which they are.
    """
    rank, mesh = reader.rank, reader.mesh
    if stored_size == reader.world_size and (mesh is None or mesh in stages):
        return rank
    tiles = None if mesh is None else tiles_of(mesh, reader.world_size)
    if mesh is None or tiles is None or mesh not in tiles or len(tiles) != len(stages):
        raise MismatchError(not_matched(stages, tiles, numbered))
    stage = sorted(stages[tiles.index(mesh)])
    place = sorted(mesh).index(rank) if rank in mesh else 0
    return stage[place] if place < len(stage) else stage[0]


def not_matched(stages: Sequence[Ranks], tiles: Sequence[Ranks] | None, numbered: Sequence[str]) -> str:
    """What to say where stages cannot be matched.

    Args:
        stages: of the snapshot.
        tiles: those of the reading job, None where it shows none.
        numbered: places whose tensor is another one on every stage.
    """
    then = " and ".join(str(sorted(stage)) for stage in stages)
    now = "shows none that could be told apart" if tiles is None else f"has {len(tiles)}"
    listed = "".join(f"\n  {path}" for path in numbered[:10])
    return (
        f"the snapshot was taken by {len(stages)} stage(s), ranks {then}, and this job {now}. Names that are numbers "
        f"begin anew on every stage, so it is not known which tensors they name:{listed}\nTake and restore with "
        "tricks.ModelState(model, optimizer), which names everything as the whole model does"
    )


Keeps = Callable[[str, Entry, bool], bool]
"""Whether a leaf is kept: its path, what stands there, and whether the first tree has it."""


def merged(trees: Sequence[Mapping[str, Entry]], path: str, keeps: Keeps) -> dict[str, Entry]:
    """Several trees as one.

    Args:
        trees: what several ranks have at and below the path, the most important first; where several have a leaf, the
            first one's counts.
        path: where the trees begin.
        keeps: says which leaves are wanted. Containers stay if they are the first tree's, or anything below them does.
    """
    kept: list[dict[str, Entry]] = []
    for number, tree in enumerate(trees):
        leaves: dict[str, Entry] = {
            each: entry
            for each, entry in tree.items()
            if not isinstance(entry, ContainerEntry) and keeps(each, entry, number == 0)
        }
        parents = {each[:end] for each in leaves for end, char in enumerate(each) if char == "/"}
        # a container that was empty from the beginning is as much as a leaf
        empty = {each for each, entry in tree.items() if isinstance(entry, ContainerEntry) and not entry.keys}
        wanted = parents | (empty | {path} if number == 0 else set())
        wanted |= {each[:end] for each in wanted for end, char in enumerate(each) if char == "/"}
        kept.append(leaves | {each: tree[each] for each in wanted if each in tree})
    return dict(_merged(path, [tree for tree in kept if path in tree]))


def is_empty(entry: Entry | None) -> bool:
    """Whether it's a dict without a key. Where a rank has none of a dict's tensors, the dict is stored as a value."""
    return isinstance(entry, ValueEntry) and entry.data == _EMPTY


_EMPTY = encode({})


def _merged(path: str, trees: Sequence[Mapping[str, Entry]]) -> Iterator[tuple[str, Entry]]:
    if not trees:
        return
    if is_empty(trees[0][path]):
        trees = [tree for tree in trees if isinstance(tree[path], ContainerEntry)] or trees
    first = trees[0][path]
    if not isinstance(first, ContainerEntry):
        yield path, _united([tree[path] for tree in trees])
        return
    places: dict[str, tuple[Key, list[Mapping[str, Entry]]]] = {}
    for tree in trees:
        entry = tree[path]
        if isinstance(entry, ContainerEntry) and entry.kind == first.kind:
            for key, component in zip(entry.keys, component_of(entry.keys), strict=True):
                child = f"{path}/{component}"
                if child in tree:
                    places.setdefault(child, (key, []))[1].append(tree)
    yield path, ContainerEntry(first.kind, tuple(key for key, _ in places.values()), first.extra)
    for child, (_, holders) in places.items():
        yield from _merged(child, holders)


def _united(entries: Sequence[Entry]) -> Entry:
    """The entry of a place where several trees have a leaf: the first; of small dicts of values one with all keys."""
    first = entries[0]
    dicts: list[dict[Any, Any]] = []
    for entry in entries:
        if not isinstance(entry, ValueEntry) or entry.data is None:
            return first
        try:
            value = decode(entry.data)
            # what needs a class of the application to be read is left as it is
            if not isinstance(value, dict) or encode(value) != entry.data:
                return first
        except (FormatError, NotPlain):
            return first
        dicts.append(value)
    data = encode(dict(ChainMap(*dicts)) if any(each != dicts[0] for each in dicts) else dicts[0])
    return ValueEntry(data, None, len(data))
