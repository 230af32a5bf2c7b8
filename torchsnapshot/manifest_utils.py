"""Questions about entries of a manifest, under the names of the old torchsnapshot."""

from __future__ import annotations

from torchsnapshot.manifest import (
    DictEntry,
    DTensorEntry,
    Entry,
    ListEntry,
    OrderedDictEntry,
    ShardedTensorEntry,
)


def is_dict_entry(entry: Entry) -> bool:
    """Whether it is a container with keys."""
    return isinstance(entry, (DictEntry, OrderedDictEntry))


def is_container_entry(entry: Entry) -> bool:
    """Whether other entries are below it."""
    return isinstance(entry, (ListEntry, DictEntry, OrderedDictEntry))


def is_sharded_entry(entry: Entry) -> bool:
    """Whether it is a tensor that is spread over ranks in at least one dimension."""
    if isinstance(entry, DTensorEntry):
        return any(map(_is_spread, entry.dim_map))
    return isinstance(entry, ShardedTensorEntry)


def is_fully_replicated_entry(entry: Entry) -> bool:
    """Whether every rank held the whole of it."""
    if isinstance(entry, DTensorEntry):
        return not any(map(_is_spread, entry.dim_map))
    return bool(getattr(entry, "replicated", False))


def is_partially_replicated_entry(entry: Entry) -> bool:
    """Whether it is a ``DTensor`` that is spread in some dimensions and not in others."""
    return isinstance(entry, DTensorEntry) and 0 < sum(map(_is_spread, entry.dim_map)) < len(entry.dim_map)


def is_replicated_entry(entry: Entry) -> bool:
    """Whether it is fully or partially replicated."""
    return is_fully_replicated_entry(entry) or is_partially_replicated_entry(entry)


def _is_spread(mesh_dimensions: list[int]) -> bool:
    """Whether these dimensions of the mesh, of one dimension of a tensor, are any: ``[-1]`` stands for none."""
    return mesh_dimensions[0] != -1
