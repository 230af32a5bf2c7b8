"""What differs between two snapshots, leaf by leaf, from their manifests alone: no tensor data is read.

What doesn't live here: printing (``cli``). Pure: two manifests in, differences out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torchsnapshot.format.entries import (
    USER_METADATA,
    ContainerEntry,
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    StoredManifest,
    TensorEntry,
    ValueEntry,
    spans_of,
)

Content = tuple[bytes, int]
"""One chunk's digest and raw size in bytes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One path that is not the same in both snapshots.

    ``change`` is ``"added"``, ``"removed"`` or ``"changed"``; ``detail`` says what else than the content differs
    (dtype, shape), or is empty. ``num_chunks`` and ``nbytes`` are of the leaf as it is in the second snapshot (in the
    first where it was removed), ``num_new_chunks`` and ``new_nbytes`` what of it the first one's leaf does not have.
    """

    path: str
    change: str
    detail: str
    num_chunks: int
    num_new_chunks: int
    nbytes: int
    new_nbytes: int


def compare(before: StoredManifest, after: StoredManifest) -> Iterator[Difference]:
    """The paths that differ, in the order of ``after``; those that were removed come last. Only the state counts."""
    old, new = _state(before), _state(after)
    for path, entry in new.items():
        earlier = old.get(path)
        if earlier is None:
            if not isinstance(entry, ContainerEntry):
                contents = _contents(after, entry)
                yield Difference(path, "added", "", len(contents), len(contents), entry.nbytes, entry.nbytes)
            continue
        difference = _compare_entries(path, before, earlier, after, entry)
        if difference is not None:
            yield difference
    for path, entry in old.items():
        if path not in new and not isinstance(entry, ContainerEntry):
            yield Difference(path, "removed", "", len(_contents(before, entry)), 0, entry.nbytes, 0)


def is_user_metadata(path: str) -> bool:
    """Whether an entry holds user metadata that is too large for the head, and nothing of the state."""
    return path.partition("/")[2] == USER_METADATA


def _state(manifest: StoredManifest) -> dict[str, Entry]:
    return {path: entry for path, entry in manifest.entries.items() if not is_user_metadata(path)}


def _compare_entries(
    path: str, before: StoredManifest, old: Entry, after: StoredManifest, new: Entry
) -> Difference | None:
    if isinstance(new, ContainerEntry):
        if isinstance(old, ContainerEntry) and (old.kind, old.extra) == (new.kind, new.extra):
            return None  # keys that came or went show as paths of their own
        return Difference(path, "changed", f"{_kind(old)} -> {_kind(new)}", 0, 0, 0, 0)
    detail = _describe_change(old, new)
    had = _contents(before, old)
    has = _contents(after, new)
    if _cut(old) == _cut(new):
        differing = [content for earlier, content in zip(had, has, strict=True) if earlier != content]
    else:
        known = set(had)
        differing = [content for content in has if content not in known]
        detail = detail or "cut into other chunks"
    inline_nbytes = new.nbytes if _inline(old) != _inline(new) else 0
    if not differing and not inline_nbytes and not detail:
        return None
    new_nbytes = sum(nbytes for _, nbytes in differing) or inline_nbytes
    return Difference(path, "changed", detail, len(has), len(differing), new.nbytes, new_nbytes)


def _contents(manifest: StoredManifest, entry: Entry) -> list[Content]:
    """What every chunk of a leaf holds, in order."""
    return [(ref.digest, ref.nbytes) for span in spans_of(entry) for ref in manifest.refs(span)]


def _cut(entry: Entry) -> object:
    """Equal for two leaves whose chunks can be compared one by one."""
    if isinstance(entry, TensorEntry):
        boxes = tuple((shard.boxes, shard.span.count) for shard in entry.shards)
        return (entry.shape, entry.dtype, entry.permutation, entry.cell, boxes)
    if isinstance(entry, ShardedTensorEntry):
        return (entry.shape, entry.dtype, entry.cell, entry.sharding)
    if isinstance(entry, ContainerEntry) or entry.span is None:
        return None
    return (type(entry), entry.span.count)


def _inline(entry: Entry) -> bytes | None:
    """The bytes of a leaf that stands in the manifest itself."""
    if isinstance(entry, TensorEntry):
        return entry.inline
    return None if isinstance(entry, (ContainerEntry, ShardedTensorEntry)) else entry.data


def _kind(entry: Entry) -> str:
    if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
        return f"{entry.dtype} {list(entry.shape)}"
    if isinstance(entry, OpaqueEntry):
        return f"pickled {entry.type_name}"
    return "value" if isinstance(entry, ValueEntry) else entry.kind


def _describe_change(old: Entry, new: Entry) -> str:
    return "" if _kind(old) == _kind(new) else f"{_kind(old)} -> {_kind(new)}"
