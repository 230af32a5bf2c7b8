"""What a rank sees of a snapshot that was taken by another number of ranks. Pure.

What lives here: the entries for a rank, and what becomes of leaves that only one rank had. What doesn't: sharded tensors
(``resharding`` reads any regions from any others).

Replicated leaves and sharded tensors are for every rank. A leaf that a rank had for itself has no place where the number
of ranks is another: unless the caller says what to do about it, that is an error that lists the paths. The random state
is the exception: a new rank starts with rank 0's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

from torchsnapshot.entries import (
    ContainerEntry,
    Entry,
    ShardedTensorEntry,
    StoredManifest,
    component_of,
)
from torchsnapshot.errors import MismatchError
from torchsnapshot.kinds import KINDS
from torchsnapshot.parts import entries_below

MissingRank = Literal["drop", "rank0"]
"""What to do about leaves of ranks that there are not, or no longer: leave them out, or take rank 0's."""


def check_missing_rank(missing_rank: str | None) -> None:
    """Raise ``ValueError`` for anything but the two rules and None."""
    if missing_rank is not None and missing_rank not in get_args(MissingRank):
        raise ValueError(f"missing_rank={missing_rank!r}: allowed are {', '.join(map(repr, get_args(MissingRank)))}")


def entries_for(
    manifest: StoredManifest,
    path: str,
    rank: int,
    world_size: int,
    missing_rank: MissingRank | None,
    is_random_state: bool = False,
) -> dict[str, Entry]:
    """The entries at and below a path, by path without rank, as a rank sees them.

    Args:
        manifest: of a snapshot by any number of ranks.
        path: of a key of the application's state.
        rank: the reading rank.
        world_size: how many ranks read.
        missing_rank: what to do about leaves that one rank had for itself, where the number of ranks is another.
        is_random_state: whether the key is an ``RNGState``: then such leaves are no matter.

    Raises:
        MismatchError: there are such leaves, and no rule for them; it lists all of them.
    """
    stored_size = manifest.head.world_size
    private = {} if stored_size == world_size or is_random_state else _private(manifest, path, world_size)
    if private and missing_rank is None:
        lines = [f"  {each}: ranks {', '.join(map(str, ranks))}" for each, ranks in sorted(private.items())]
        raise MismatchError(
            f"the snapshot was taken by {stored_size} ranks and is restored by {world_size}; these values are not the "
            "same on all ranks, so they have no place:\n" + "\n".join(lines) + "\nDeclare them replicated if they should "
            "be, or pass missing_rank='drop' (new ranks go without) or missing_rank='rank0' (new ranks get rank 0's)"
        )
    source = rank if rank < stored_size else 0
    found = entries_below(manifest, path, source)
    if rank >= stored_size and missing_rank == "drop" and not is_random_state:
        found = _without(found, private)
    return found


def _private(manifest: StoredManifest, path: str, world_size: int) -> dict[str, list[int]]:
    """The leaves that are not the same on all ranks and concern ranks that come or go: path -> ranks that had them."""
    found: dict[str, list[int]] = {}
    stored_size = manifest.head.world_size
    # a rank that goes leaves what it had behind; one that comes lacks what rank 0 had for itself
    concerned = range(world_size, stored_size) if world_size < stored_size else (0,)
    for rank in concerned:
        for each, entry in entries_below(manifest, path, rank).items():
            if isinstance(entry, (ContainerEntry, ShardedTensorEntry)) or manifest.shared(each) is not None:
                continue
            found.setdefault(each, []).append(rank)
    return found


def _without(entries: Mapping[str, Entry], dropped: Collection[str]) -> dict[str, Entry]:
    """Leave leaves out, and their keys out of their containers; a sequence cannot spare one."""
    kept = {path: entry for path, entry in entries.items() if path not in dropped}
    for path in dropped:
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
