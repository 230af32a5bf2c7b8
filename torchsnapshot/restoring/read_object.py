"""Reading single values out of a snapshot, without an application around them.

What doesn't live here: arguments and defaults (``snapshot``), the restore of a whole state (``restore``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchsnapshot.errors import AbsentStateError, MismatchError, PickleRefusedError, SnapshotError
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    ShardedTensorEntry,
    StoredManifest,
    ValueEntry,
    entries_below,
)
from torchsnapshot.reading.opening import Opened, check_key, other_generations_named, still_committed
from torchsnapshot.reading.reads import Reading
from torchsnapshot.restoring.elastic import without
from torchsnapshot.restoring.live_state import find
from torchsnapshot.restoring.options import check_allow_pickle
from torchsnapshot.restoring.parts import Part, gather, refusal
from torchsnapshot.state.sharded import is_sharded_tensor
from torchsnapshot.stats import Stats
from torchsnapshot.store.leases import reading


def read_object(opened: Opened, path: str, target: Any, budget_nbytes: int | None, allow_pickle: bool) -> Any:
    """Read one value. See ``Snapshot.read_object``."""
    # whoever is not checked by mypy may pass anything
    given: object = path
    if not isinstance(given, str):
        raise TypeError(f"path must be a str as in '0/model/weight', not {given!r}")
    budget: object = budget_nbytes
    if budget is not None and (not isinstance(budget, int) or budget < 1):
        raise ValueError(f"memory_budget_bytes must be a positive number of bytes, not {budget!r}")
    check_allow_pickle(allow_pickle)
    with reading(opened.repository, opened.name), other_generations_named(opened):
        manifest = still_committed(opened)
        rank, _, wanted = path.partition("/")
        if not rank.isdecimal():
            raise SnapshotError(_absence(path))
        if int(rank) not in manifest.ranks and manifest.head.world_size == 1:
            # of one process nothing is known to be what every rank holds
            raise SnapshotError(_absence(path))
        known = int(rank) if int(rank) in manifest.ranks else 0
        stored, inside = _locate(manifest.entries_of(known), path, wanted)
        entries = _seen_by(manifest, int(rank), stored)
        if not entries:
            raise SnapshotError(_absence(path))
        is_tensor = isinstance(target, torch.Tensor) and not is_sharded_tensor(target)
        if is_tensor and (is_lazy(target) or target.is_meta):
            raise MismatchError(f"{path}: obj_out has no memory to read into: it is on the meta device, or lazy")
        part = Part(entries, stored, None if inside else target)
        value = _read(opened, manifest, part, stored, budget_nbytes, allow_pickle)
    if not inside:
        return _copied_into(target, value, path) if is_tensor else value
    try:
        return find(value, inside)
    except KeyError:
        raise SnapshotError(_absence(path)) from None


def _copied_into(target: torch.Tensor, value: Any, path: str) -> Any:
    """What was read, in the tensor that was given for it, also where that takes no raw bytes."""
    if value is target or not isinstance(value, torch.Tensor) or {value.layout, target.layout} != {torch.strided}:
        return value
    try:
        with torch.inference_mode() if target.is_inference() else torch.no_grad():
            return target.copy_(value)
    except RuntimeError as error:
        raise MismatchError(f"{path}: obj_out cannot be read into: {error}") from error


def read_state_dict(opened: Opened, key: str, rank: int, allow_pickle: bool) -> Any:
    """Read the whole state of one key, as one rank had it. See ``Snapshot.get_state_dict_for_key``."""
    given: object = key
    if not isinstance(given, str):
        raise TypeError(f"key must be a str, one of those of app_state, not {given!r}")
    check_allow_pickle(allow_pickle)
    with reading(opened.repository, opened.name), other_generations_named(opened):
        manifest = still_committed(opened)
        path = check_key(manifest, key)
        entries = _seen_by(manifest, rank, path)
        if not entries:
            raise AbsentStateError(
                f"{key} is absent in both manifest and flattened for rank {rank}; other ranks have it"
            )
        return _read(opened, manifest, Part(entries, path, None), path, None, allow_pickle)


def _seen_by(manifest: StoredManifest, rank: int, path: str) -> dict[str, Entry]:
    """What a rank sees at and below a path; one that the take did not have sees what all ranks have in common."""
    if rank in manifest.ranks:
        return entries_below(manifest, path, rank)
    entries = entries_below(manifest, path)
    private = [
        each
        for each, entry in entries.items()
        if not isinstance(entry, (ContainerEntry, ShardedTensorEntry)) and manifest.shared(each) is None
    ]
    return without(entries, private) if private else entries


def _locate(entries: Mapping[str, Entry], path: str, wanted: str) -> tuple[str, list[str]]:
    """The entry at or above a path, and the components below it: values have no entries for what is inside them."""
    components = wanted.split("/")
    for length in range(len(components), 0, -1):
        stored = "/".join(components[:length])
        entry = entries.get(stored)
        if entry is not None and (length == len(components) or isinstance(entry, ValueEntry)):
            return stored, components[length:]
        if isinstance(entry, ContainerEntry):
            break
    raise SnapshotError(_absence(path))


def _absence(path: str) -> str:
    return (
        f'The supplied path "{path}" does not exist in the snapshot\'s manifest. Paths begin with a rank, as in '
        '"0/model/weight"; "torchsnapshot show SNAPSHOT" and get_manifest() list them.'
    )


def _read(
    opened: Opened, manifest: StoredManifest, part: Part, path: str, budget_nbytes: int | None, allow_pickle: bool
) -> Any:
    if part.opaque() and not allow_pickle:
        raise PickleRefusedError(refusal({path: part.opaque()}, []))
    work = Reading(opened.repository, manifest, Stats())
    gather([part], work, manifest)
    work.run(budget_nbytes)
    return part.build()
