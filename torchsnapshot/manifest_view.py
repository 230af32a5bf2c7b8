"""Makes the entries that users of the old torchsnapshot see from those that a snapshot really stores.

What lives here: ``view``. What doesn't: the classes that it makes (``manifest``) and those that it reads
(``format.entries``).

Invariants: keys are ``"<rank>/<key>/<path>"``, parents before children. A view is made for reading; changing it
changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torchsnapshot.errors import FormatError
from torchsnapshot.format import entries
from torchsnapshot.geometry.grid import Box
from torchsnapshot.manifest import (
    DictEntry,
    DTensorEntry,
    Entry,
    ListEntry,
    Manifest,
    MeshRanks,
    ObjectEntry,
    OrderedDictEntry,
    PrimitiveEntry,
    Shard,
    ShardedTensorEntry,
    TensorEntry,
    is_primitive,
)
from torchsnapshot.state import values
from torchsnapshot.state.composites import COMPOSITE_KINDS
from torchsnapshot.state.kinds import KINDS, class_name

ReadValue = Callable[[entries.ValueEntry], bytes | None]
"""Reads the bytes of a value that is too large to stand in the manifest; None where they cannot be had."""


def view(stored: Mapping[str, entries.Entry], read_value: ReadValue | None = None) -> Manifest:
    """Make the entries that the old torchsnapshot would show, one for each leaf inside of stored values too.

    Args:
        stored: a snapshot's entries.
        read_value: reads large values; without it each of them is one entry, whatever is inside.
    """
    manifest: Manifest = {}
    composite = None
    for path, entry in stored.items():
        if path.split("/", 2)[1] == entries.USER_METADATA or (composite is not None and path.startswith(composite)):
            continue
        if isinstance(entry, entries.ValueEntry):
            manifest.update(_view_of_value(path, entry, read_value))
        elif isinstance(entry, entries.TensorEntry):
            manifest[path] = _view_of_tensor(path, entry)
        elif isinstance(entry, entries.ShardedTensorEntry):
            manifest[path] = _view_of_sharded(path, entry)
        elif isinstance(entry, entries.OpaqueEntry):
            manifest[path] = ObjectEntry(path, "pickle", entry.type_name, False)
        elif entry.kind in COMPOSITE_KINDS:
            manifest[path] = _view_of_composite(path, entry, stored)
            # its parts are how it is stored, not what the state holds
            composite = f"{path}/"
        else:
            manifest[path] = _view_of_container(entry.kind, list(entry.keys))
    return manifest


def view_of_manifest(manifest: entries.StoredManifest, read_value: ReadValue | None = None) -> Manifest:
    """What the old torchsnapshot would show of a snapshot, by one process or by several; see ``view``."""
    if manifest.head.world_size == 1:
        return view(manifest.entries, read_value)
    return view_of_ranks(manifest, read_value)


def view_of_ranks(manifest: entries.StoredManifest, read_value: ReadValue | None = None) -> Manifest:
    """What the old torchsnapshot would show of a snapshot by several ranks; see ``view``.

    What all ranks hold stands under rank 0 only, as ``replicated``; containers stand under every rank; of a tensor that
    is spread over ranks each rank has its own regions.
    """
    shown: Manifest = {}
    for rank in manifest.ranks:
        stored = manifest.entries_of(rank)
        common = {
            path
            for path, entry in stored.items()
            if (not isinstance(entry, entries.ContainerEntry) or entry.kind in COMPOSITE_KINDS)
            and manifest.shared(path) is not None
        }
        for key, entry in view({f"{rank}/{path}": entry for path, entry in stored.items()}, read_value).items():
            path = key.partition("/")[2]
            origin = path
            while origin not in stored:
                origin = origin.rpartition("/")[0]
            source = stored[origin]
            if isinstance(source, entries.ShardedTensorEntry):
                entry = _with_regions_of(rank, entry, source)
                if entry.shards:
                    shown[key] = entry
            elif origin not in common or isinstance(entry, (DictEntry, ListEntry, OrderedDictEntry)):
                shown[key] = entry
            elif rank == manifest.ranks[0]:
                shown[key] = replace(entry, replicated=True)  # type: ignore[call-arg]
    return shown


def _with_regions_of(rank: int, entry: Entry, source: entries.ShardedTensorEntry) -> DTensorEntry | ShardedTensorEntry:
    assert isinstance(entry, (DTensorEntry, ShardedTensorEntry))
    position = source.sharding.position_of(rank)
    boxes = () if position is None else source.sharding.boxes_at(source.shape, position)
    own = [(list(box.offsets), list(box.sizes)) for box in boxes]
    return replace(entry, shards=[shard for shard in entry.shards if (shard.offsets, shard.sizes) in own])


def _view_of_composite(path: str, entry: entries.ContainerEntry, stored: Mapping[str, entries.Entry]) -> Entry:
    """A tensor made of several: one entry, with the kind of composite as its serializer."""
    try:
        context = values.decode(entry.extra)
        if "class" in context:
            return ObjectEntry(path, entry.kind, str(context["class"]), False)
        part = stored[f"{path}/values"]
        dtype = context.get("dtype") or part.dtype  # type: ignore[union-attr]
        return TensorEntry(path, entry.kind, f"torch.{dtype}", [int(size) for size in context["shape"]], False)
    except (FormatError, KeyError, TypeError, ValueError, AttributeError):
        # a context that this version doesn't understand: restoring says so, looking goes on
        return ObjectEntry(path, entry.kind, "unknown", False)


def _view_of_container(kind: str, keys: list[Any]) -> Entry:
    if kind == "OrderedDict":
        return OrderedDictEntry(keys)
    return ListEntry() if kind in KINDS and not KINDS[kind].mapping else DictEntry(keys)


def _view_of_tensor(path: str, entry: entries.TensorEntry) -> TensorEntry | ShardedTensorEntry:
    boxes = [_in_order_of_shape(box, entry.permutation) for shard in entry.shards for box in shard.boxes]
    shape = list(entry.shape)
    if len(boxes) <= 1:
        # one box is the whole tensor; none are inline or empty ones
        return _view_of_region(path, entry, shape)
    return ShardedTensorEntry(
        [Shard(list(box.offsets), list(box.sizes), _view_of_region(path, entry, list(box.sizes))) for box in boxes]
    )


def _view_of_sharded(path: str, entry: entries.ShardedTensorEntry) -> DTensorEntry | ShardedTensorEntry:
    sharding = entry.sharding
    shards = [
        Shard(list(box.offsets), list(box.sizes), _view_of_region(path, entry, list(box.sizes)))
        for boxes in sharding.regions(entry.shape)
        for box in boxes
    ]
    if sharding.placements is None:
        return ShardedTensorEntry(shards)
    mesh: MeshRanks = list(sharding.mesh_ranks)
    for size in reversed(sharding.mesh_shape[1:]):
        mesh = [mesh[start : start + size] for start in range(0, len(mesh), size)]
    dim_map = [
        [mesh_dim for mesh_dim, placement in enumerate(sharding.placements) if placement.dim == dim] or [-1]
        for dim in range(len(entry.shape))
    ]
    return DTensorEntry(shards, mesh, dim_map)


def _view_of_region(
    path: str, entry: entries.TensorEntry | entries.ShardedTensorEntry, sizes: list[int]
) -> TensorEntry:
    dtype = entry.dtype if ":" in entry.dtype else f"torch.{entry.dtype}"
    return TensorEntry(path, "buffer_protocol", dtype, sizes, False)


def _in_order_of_shape(box: Box, permutation: tuple[int, ...] | None) -> Box:
    """The box with its dimensions as the tensor's shape has them, not as its memory does."""
    if permutation is None:
        return box
    memory_dims = sorted(range(len(permutation)), key=permutation.__getitem__)
    return Box(tuple(box.offsets[dim] for dim in memory_dims), tuple(box.sizes[dim] for dim in memory_dims))


def _view_of_value(path: str, entry: entries.ValueEntry, read_value: ReadValue | None) -> Iterable[tuple[str, Entry]]:
    data = entry.data
    if data is None and read_value is not None:
        data = read_value(entry)
    if data is None:
        return [(path, ObjectEntry(path, "plain", "unknown", False))]
    try:
        value = values.decode(data)
    except FormatError:
        # a numpy value where numpy isn't there: the manifest can be looked at all the same
        return [(path, ObjectEntry(path, "plain", "unknown", False))]
    return _expand(path, value)


def _expand(path: str, value: Any) -> Iterator[tuple[str, Entry]]:
    """The entries of a plain value: exact lists and dicts are containers, everything else is a leaf."""
    kind = type(value)
    if is_primitive(value):
        yield path, PrimitiveEntry.from_object(value)
    elif kind is list:
        yield path, ListEntry()
        yield from _expand_children(path, range(len(value)), value)
    elif kind in (dict, OrderedDict) and all(type(key) in (str, int, bool) for key in value):
        yield path, _view_of_container(kind.__name__, list(value))
        yield from _expand_children(path, value.keys(), value.values())
    else:
        yield path, ObjectEntry(path, "plain", class_name(kind), False)


def _expand_children(path: str, keys: Iterable[entries.Key], children: Iterable[Any]) -> Iterator[tuple[str, Entry]]:
    for component, child in zip(entries.component_of(keys), children, strict=True):
        yield from _expand(f"{path}/{component}", child)
