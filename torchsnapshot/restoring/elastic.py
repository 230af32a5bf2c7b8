"""What a rank sees of a snapshot that was taken by another number of ranks. Pure.

What lives here: the entries for a rank, and what becomes of leaves that only one rank had. What doesn't: the stages of
a pipeline (``stages``), sharded tensors (``state.resharding`` reads any regions from any others).

Replicated leaves and sharded tensors are for every rank. A leaf that a rank had for itself has no place where the
number of ranks is another: unless the caller says what to do about it, that is an error that lists the paths. The
random state is the exception: a new rank starts with rank 0's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torchsnapshot.errors import FormatError, MismatchError
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    StoredManifest,
    TensorEntry,
    ValueEntry,
    component_of,
    entries_below,
    spans_of,
    unescape,
)
from torchsnapshot.restoring.stages import (
    Keeps,
    Reader,
    is_empty,
    merged,
    not_matched,
    numbered_paths,
    representatives,
    source_of,
    stages_of,
)
from torchsnapshot.state.kinds import KINDS
from torchsnapshot.state.values import NotPlain, decode, encode

MissingRank = Literal["drop", "rank0"]
"""What to do about leaves of ranks that there are not, or no longer: leave them out, or take rank 0's."""


def check_missing_rank(missing_rank: str | None) -> None:
    """Raise ``ValueError`` for anything but the two rules and None."""
    if missing_rank is not None and missing_rank not in get_args(MissingRank):
        raise ValueError(f"missing_rank={missing_rank!r}: allowed are {', '.join(map(repr, get_args(MissingRank)))}")


def entries_for(
    manifest: StoredManifest, path: str, reader: Reader, missing_rank: MissingRank | None
) -> dict[str, Entry]:
    """The entries at and below a path, by path without rank, as a rank sees them.

    Args:
        manifest: of a snapshot by any number of ranks.
        path: of a key of the application's state.
        reader: the reading rank, and what it has there.
        missing_rank: what to do about leaves that one rank had for itself, where the number of ranks is another.

    Raises:
        MismatchError: there are such leaves, and no rule for them; or stages of the snapshot cannot be matched.
    """
    stored_size = manifest.head.world_size
    source = reader.rank if reader.rank < stored_size else 0
    stages = stages_of(manifest, path)
    by_number: list[str] | None = None
    if len(stages) > 1 or (stages and reader.is_staged):
        numbered = numbered_paths(manifest, path, stages)
        # of one stage that becomes several nobody can tell what its numbers mean
        if numbered or (reader.is_numbered and len(stages) == 1):
            by_number = numbered
            source = source_of(stages, stored_size, reader, numbered)
    group = next((stage for stage in stages if source in stage), frozenset(manifest.ranks))
    private: Mapping[str, Collection[int]] = {}
    if stored_size != reader.world_size and not reader.is_random_state:
        private = private_leaves(manifest, path, group, reader.world_size)
    others = [rank for rank in representatives(manifest) if rank != source] if stages else []
    if by_number is None and (others or reader.is_staged):
        keeps = _rule(manifest, reader, num_stages=len(stages))
        found = merged([entries_below(manifest, path, rank) for rank in [source, *others]], path, keeps)
        private = {each: ranks for each, ranks in private.items() if reader.has_place(each) or not reader.is_staged}
    else:
        found = entries_below(manifest, path, source)
    if private and missing_rank is None:
        raise MismatchError(without_place(private, stored_size, reader.world_size))
    if reader.rank >= stored_size and missing_rank == "drop":
        found = without(found, private)
    return found


def _rule(manifest: StoredManifest, reader: Reader, num_stages: int) -> Keeps:
    """Which leaves of its own tree, and of others', a rank takes, where every name stands for one thing."""
    everybody = frozenset(manifest.ranks)
    is_alone = reader.world_size == 1

    def keeps(path: str, entry: Entry, is_own: bool) -> bool:
        is_sharded = isinstance(entry, ShardedTensorEntry)
        has_place = reader.has_place(path)
        if not is_own:
            # what a whole stage holds is wanted by whoever has a place for it, and by who has all stages in one
            is_from_stage = is_sharded or num_stages > 1
            return is_from_stage and (has_place or is_alone or (num_stages > 1 and not reader.is_staged))
        if has_place or reader.is_numbered or is_alone:
            return True
        if isinstance(entry, ShardedTensorEntry) and frozenset(entry.sharding.mesh_ranks) != everybody:
            # ranks that have a place for it take it; one that had it before, and is still there, ought to
            is_missed = manifest.head.world_size == reader.world_size and reader.rank in entry.sharding.mesh_ranks
            return is_missed and not reader.is_staged
        return not reader.is_staged

    return keeps


def selectable_entries(
    manifest: StoredManifest,
    path: str,
    reader: Reader,
    missing_rank: MissingRank | None,
    is_selected: Callable[[str], bool],
) -> dict[str, Entry]:
    """As ``entries_for``, for the restore of single leaves: rules concern those that are selected.

    Args:
        is_selected: whether the leaf at a path is wanted.
    """
    stored_size = manifest.head.world_size
    stages = stages_of(manifest, path)
    source = reader.rank if reader.rank < stored_size else 0
    ranks = [source, *(rank for rank in representatives(manifest) if rank != source)]
    found = merged([entries_below(manifest, path, rank) for rank in ranks], path, lambda *_: True)
    if stored_size == reader.world_size:
        return found
    numbered = list(filter(is_selected, numbered_paths(manifest, path, stages)))
    if numbered:
        raise MismatchError(not_matched(stages, None, numbered))
    private: Mapping[str, Collection[int]] = {}
    if not reader.is_random_state:
        private = private_leaves(manifest, path, range(stored_size), reader.world_size)
        private = {each: ranks for each, ranks in private.items() if is_selected(each)}
    if private and missing_rank is None:
        raise MismatchError(without_place(private, stored_size, reader.world_size))
    is_dropped = reader.rank >= stored_size and missing_rank == "drop"
    if not is_dropped:
        return found
    kept = {each: entry for each, entry in found.items() if each not in private}
    for each in private.keys() - found.keys():
        _drop_inside(kept, each)
    return kept


def without_place(private: Mapping[str, Collection[int]], stored_size: int, world_size: int) -> str:
    """What to say about leaves that only one rank had."""
    lines = [f"  {each}: ranks {', '.join(map(str, ranks))}" for each, ranks in sorted(private.items())]
    return (
        f"the snapshot was taken by {stored_size} ranks and is restored by {world_size}; these values are not the same "
        "on all ranks, so they have no place:\n" + "\n".join(lines) + "\nDeclare them replicated if they should be, or "
        "pass missing_rank='drop' (new ranks go without) or missing_rank='rank0' (new ranks get rank 0's)"
    )


def private_leaves(
    manifest: StoredManifest, path: str, group: Collection[int], world_size: int
) -> dict[str, list[int]]:
    """The leaves that are not the same on all ranks and concern ranks that come or go.

    Args:
        manifest: of a snapshot by another number of ranks.
        path: where to look.
        group: the ranks that are compared: those of one stage, or all.
        world_size: how many ranks read.

    Returns:
        path -> ranks that had them.
    """
    found: dict[str, list[int]] = {}
    stored_size = manifest.head.world_size
    # a rank that goes leaves what it had behind; one that comes lacks what rank 0 had for itself
    gone = [rank for rank in sorted(group) if rank >= world_size]
    concerned = gone if world_size < stored_size else [min(group)]
    trees = {rank: entries_below(manifest, path, rank) for rank in {min(group), *concerned}}
    for rank in concerned:
        for each, entry in trees[rank].items():
            if isinstance(entry, (ContainerEntry, ShardedTensorEntry)) or manifest.shared(each) is not None:
                continue
            if len(group) < stored_size and _is_held_alike(manifest, each, group):
                continue
            if is_empty(entry) and _are_containers(manifest, each, group):
                continue
            found.setdefault(each, []).append(rank)
    refined: dict[str, list[int]] = {}
    for each, ranks in found.items():
        refined.update(dict.fromkeys(_differing(manifest, each, group), ranks))
    return refined


def _are_containers(manifest: StoredManifest, path: str, ranks: Collection[int]) -> bool:
    """Whether these ranks have nothing at a place but a dict, whose leaves stand for themselves, or an empty one."""
    entries = (manifest.entries_of(rank).get(path) for rank in ranks)
    return all(entry is None or isinstance(entry, ContainerEntry) or is_empty(entry) for entry in entries)


def _differing(manifest: StoredManifest, path: str, ranks: Collection[int]) -> list[str]:
    """What differs between ranks at a leaf: of plain dicts the places inside, else the leaf."""
    values = [_plain_dict(manifest.entries_of(rank).get(path)) for rank in sorted(ranks)]
    dicts = [value for value in values if value is not None]
    return _places_that_differ(path, dicts) if len(dicts) == len(values) else [path]


def _places_that_differ(path: str, dicts: Sequence[Mapping[Any, Any]]) -> list[str]:
    found: list[str] = []
    # a key may be missing on some ranks; it has the same component on all
    keys = list(dict.fromkeys(key for each in dicts for key in each))
    for key, component in zip(keys, component_of(keys), strict=True):
        inside = [each.get(key, _MISSING) for each in dicts]
        if all(type(value) is dict for value in inside) and all(map(_has_names, inside)):
            found += _places_that_differ(f"{path}/{component}", inside)
        elif any(value is _MISSING for value in inside) or len({encode(value) for value in inside}) > 1:
            found.append(f"{path}/{component}")
    return found


_MISSING: Any = object()


def _has_names(value: Mapping[Any, Any]) -> bool:
    return all(type(key) is str for key in value)


def _plain_dict(entry: Entry | None) -> dict[str, Any] | None:
    """The dict that a leaf holds, if it can be read here and now and its keys are names."""
    if not isinstance(entry, ValueEntry) or entry.data is None:
        return None
    try:
        value = decode(entry.data)
        # what needs a class of the application to be read is left in one piece
        is_whole = type(value) is dict and _has_names(value) and encode(value) == entry.data
    except (FormatError, NotPlain):
        return None
    return value if is_whole else None


def _is_held_alike(manifest: StoredManifest, path: str, ranks: Collection[int]) -> bool:
    """Whether these ranks have the same at a path, wherever its bytes are."""
    return len({_content_of(manifest, manifest.entries_of(rank).get(path)) for rank in ranks}) == 1


def _content_of(manifest: StoredManifest, entry: Entry | None) -> object:
    if not isinstance(entry, (TensorEntry, ValueEntry, OpaqueEntry)):
        return entry
    digests = tuple(digest for span in spans_of(entry) for digest in manifest.digests(span))
    return digests, replace(entry, shards=()) if isinstance(entry, TensorEntry) else replace(entry, span=None)


def without(entries: Mapping[str, Entry], dropped: Collection[str]) -> dict[str, Entry]:
    """Leave leaves out, and their keys out of their containers; a sequence cannot spare one."""
    kept = {path: entry for path, entry in entries.items() if path not in dropped}
    for path in dropped:
        if path not in entries:
            _drop_inside(kept, path)
            continue
        parent, _, _ = path.rpartition("/")
        container = entries.get(parent)
        if not isinstance(container, ContainerEntry):
            continue
        if container.kind not in KINDS or not KINDS[container.kind].mapping:
            raise MismatchError(
                f"{path} is not the same on all ranks, and it cannot be dropped from a {container.kind}; "
                "pass missing_rank='rank0', or restore without it by paths="
            )
    for path, entry in list(kept.items()):
        if isinstance(entry, ContainerEntry):
            keys = [
                key
                for key, component in zip(entry.keys, component_of(entry.keys), strict=True)
                if f"{path}/{component}" in kept
            ]
            if len(keys) != len(entry.keys):
                kept[path] = ContainerEntry(entry.kind, tuple(keys), entry.extra)
    return kept


def _drop_inside(entries: dict[str, Entry], path: str) -> None:
    """Leave a place out that is inside of a leaf."""
    origin, _, name = path.rpartition("/")
    names = [unescape(name)]
    while origin and origin not in entries:
        origin, _, name = origin.rpartition("/")
        names.append(unescape(name))
    value = _plain_dict(entries.get(origin))
    if value is None:
        return
    parent = value
    for each in reversed(names[1:]):
        parent = parent[each]
    # the first rank may be one of those that lack it
    parent.pop(names[0], None)
    data = encode(value)
    entries[origin] = ValueEntry(data, None, len(data))
