"""Runs a restore: manifest → targets → jobs → structure → ``load_state_dict``.

What lives here: the order of a restore's steps, for a whole state (the snapshot's structure leads) and for a part of
one (``paths``, ``rename``: the target's structure leads). What doesn't: arguments (``snapshot``), single values
(``read_object``), finding targets (``parts``, ``reading.targets``), the reads (``reading.reads``), the selection
(``selection``).

Invariants: everything that can be refused is refused before the first byte of the target changes; a chunk reaches the
target only after its digest was checked; what fails later says that the target is a mix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from torchsnapshot.errors import (
    AbsentStateError,
    MismatchError,
    PartialRestoreError,
    PickleRefusedError,
    SnapshotNotFoundError,
)
from torchsnapshot.format.entries import (
    USER_METADATA,
    ContainerEntry,
    Entry,
    StoredManifest,
    ValueEntry,
    escape,
    unescape,
)
from torchsnapshot.pauses import collector_paused
from torchsnapshot.reading.opening import Opened, other_generations_named
from torchsnapshot.reading.reads import Reading
from torchsnapshot.restoring.elastic import MissingRank, check_missing_rank, entries_for, selectable_entries
from torchsnapshot.restoring.live_state import lay_over, leaves_of
from torchsnapshot.restoring.loading import allocator, load, parameter_finder
from torchsnapshot.restoring.parts import AllocateTensor, Part, gather
from torchsnapshot.restoring.selection import Selection
from torchsnapshot.restoring.stages import Reader
from torchsnapshot.state.app_state import random_state_kept
from torchsnapshot.state.composites import COMPOSITE_KINDS
from torchsnapshot.state.flatten import resolver
from torchsnapshot.state.sharded import mesh_of
from torchsnapshot.state.wrappers import explain
from torchsnapshot.stateful import HasParameters, RNGState, Stateful
from torchsnapshot.stats import Stats
from torchsnapshot.store.leases import reading
from torchsnapshot.taking import history

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What ``Snapshot.restore`` was asked to do beyond the state itself."""

    strict: bool = True
    paths: Sequence[str] | None = None
    rename: Callable[[str], str] | None = None
    allow_pickle: bool = False
    device: torch.device | str | None = None
    missing_rank: MissingRank | None = None
    rank: int = 0
    world_size: int = 1
    global_ranks: tuple[int, ...] = (0,)
    """For each reading rank its global rank: tensors that are spread speak of these."""

    def __post_init__(self) -> None:
        check_missing_rank(self.missing_rank)
        check_allow_pickle(self.allow_pickle)
        check_device(self.device)


def check_allow_pickle(allow_pickle: object) -> None:
    """Raise ``TypeError`` for what is no bool: ``allow_pickle="no"`` would allow it."""
    if not isinstance(allow_pickle, bool):
        raise TypeError(f"allow_pickle must be True, False or None, not {allow_pickle!r}")


def check_device(device: torch.device | str | None) -> None:
    """Raise ``ValueError`` for a device that torch cannot use here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # an AssertionError is what torch raises for a backend that it was built without
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}") from error


def restore(opened: Opened, statefuls: Mapping[str, Stateful], options: RestoreOptions) -> Stats:
    """Bring a state back. See ``Snapshot.restore``."""
    stats = Stats()
    # tables and bytes that are read without a lease could be swept while they are being read
    with reading(opened.repository, opened.name), other_generations_named(opened):
        manifest = still_committed(opened)
        if options.paths is not None or options.rename is not None:
            _restore_part(opened, manifest, statefuls, options, stats)
        else:
            _restore_whole(opened, manifest, statefuls, options, stats)
    return stats


def still_committed(opened: Opened) -> StoredManifest:
    """The newest committed manifest, as a listing made under a lease shows it.

    Raises:
        SnapshotNotFoundError: the snapshot has been deleted since it was opened.
    """
    ref = opened.repository.newest_committed(opened.name)
    if ref is None:
        raise SnapshotNotFoundError(f"{opened.name or 'ROOT'!r} in {opened.repository.url} has just been deleted")
    if ref.manifest == opened.ref.manifest:
        return opened.manifest
    where = f"{opened.name}: manifest {ref.manifest}"
    return StoredManifest(opened.repository.read_manifest(ref), opened.repository.read_table, where)


def check_key(manifest: StoredManifest, key: str) -> str:
    """The path of an app_state key in this manifest.

    Raises:
        AbsentStateError: the snapshot has no such key.
    """
    path = escape(key)
    known: set[str] = set()
    # what only one rank had is looked for last: reading the trees of all ranks takes time
    for rank in [0, *manifest.ranks[1:]]:
        entries = manifest.entries_of(rank)
        if path in entries:
            return path
        known.update(unescape(each) for each in entries if "/" not in each and each != USER_METADATA)
    raise AbsentStateError(
        f"{key} is absent in both manifest and flattened. The snapshot has: {', '.join(sorted(known))}."
    )


def _read_states(statefuls: Mapping[str, Stateful], stats: Stats) -> dict[str, Any]:
    with stats.phase("state_dict"), random_state_kept(statefuls):
        return {key: stateful.state_dict() for key, stateful in statefuls.items()}


def _restore_whole(
    opened: Opened,
    manifest: StoredManifest,
    statefuls: Mapping[str, Stateful],
    options: RestoreOptions,
    stats: Stats,
) -> None:
    paths = {key: check_key(manifest, key) for key in statefuls}
    states = _read_states(statefuls, stats)
    with stats.phase("plan"):
        parts: dict[str, Part] = {}
        for key, path in paths.items():
            reader = _reader(statefuls[key], states[key], path, options)
            entries = entries_for(manifest, path, reader, options.missing_rank)
            if path in entries:
                _check_names(path, statefuls[key], states[key], entries, options)
                allocate = _allocator(statefuls[key], path, options)
                parts[key] = Part(entries, path, states[key], allocate=allocate)
            elif options.missing_rank != "drop":
                raise AbsentStateError(
                    f"{key} is absent in both manifest and flattened for rank {options.rank}; other ranks have it"
                )
        refused = {} if options.allow_pickle else {key: part.opaque() for key, part in parts.items() if part.opaque()}
        wanted = {key: part for key, part in parts.items() if key not in refused}
        work = Reading(opened.repository, manifest, stats)
        gather(wanted.values(), work, manifest, options.device)
    with stats.phase("read"):
        work.run()
    with stats.phase("load"):
        for key, state in _built(wanted).items():
            load(key, statefuls[key], state, options.strict)
    if refused:
        raise PickleRefusedError(refusal(refused, list(wanted)))
    history.note_commit_time(opened.repository.store_id, manifest.head.created_ms)
    history.remember(opened.repository.store_id, history.Remembered.of_manifest(manifest, options.rank))


def _built(parts: Mapping[str, Part]) -> dict[str, Any]:
    """All parts put together, before any of them is handed to its object.

    Raises:
        PartialRestoreError: one of them cannot be, and tensors have been written by now.
        SnapshotError: one of them cannot be; the target is as it was.
    """
    try:
        return {key: part.build() for key, part in parts.items()}
    except Exception as error:
        if not any(part.writes for part in parts.values()):
            raise
        raise PartialRestoreError(
            "the restore failed after tensors had been written, and before any load_state_dict was called: the target "
            f"is now a mix of old and new values. {error}"
        ) from error


def _check_names(
    path: str, stateful: Stateful, state: Any, entries: Mapping[str, Entry], options: RestoreOptions
) -> None:
    """Say so before anything is written where a module's names differ by wrappers only."""
    if not isinstance(stateful, torch.nn.Module) or not isinstance(state, dict):
        return
    below = f"{path}/"
    stored = {
        unescape(each[len(below) :]) for each in entries if each.startswith(below) and "/" not in each[len(below) :]
    }
    reason = explain(path, stored, state.keys())
    if reason is not None and options.strict:
        raise MismatchError(f"{reason}. Nothing was restored")
    if reason is not None:
        logger.warning("%s", reason)


@collector_paused()
def _reader(stateful: Stateful, state: Any, path: str, options: RestoreOptions) -> Reader:
    """What this rank has of one key, before it is restored."""
    tensors = [leaf for _, leaf in leaves_of(path, state)]
    parameter_of = parameter_finder(stateful, path)
    is_optimizer = isinstance(stateful, torch.optim.Optimizer)
    if isinstance(stateful, torch.optim.Optimizer):
        # one that has not stepped has nothing else yet
        tensors += [parameter for group in stateful.param_groups for parameter in group["params"]]
    group_rank = {rank: number for number, rank in enumerate(options.global_ranks)}
    meshes = {mesh for mesh in map(mesh_of, tensors) if mesh is not None}
    mesh = frozenset(group_rank[rank] for ranks in meshes for rank in ranks if rank in group_rank)
    return Reader(
        options.rank,
        options.world_size,
        mesh or None,
        _Places(path, state),
        lambda where: parameter_of(where) is not None,
        is_optimizer,
        isinstance(stateful, RNGState),
    )


class _Places:
    """The paths of all leaves and containers of a state; made when they are first asked for, as few restores do."""

    def __init__(self, path: str, state: Any) -> None:
        self._path = path
        self._state = state

    def __contains__(self, path: object) -> bool:
        return path in self._paths

    @cached_property
    def _paths(self) -> set[str]:
        paths = {self._path}
        for leaf, _ in leaves_of(self._path, self._state):
            while leaf not in paths:
                paths.add(leaf)
                leaf = leaf.rpartition("/")[0]
        return paths


def _restore_part(
    opened: Opened,
    manifest: StoredManifest,
    statefuls: Mapping[str, Stateful],
    options: RestoreOptions,
    stats: Stats,
) -> None:
    selection = Selection(options.paths, options.rename)
    states = {escape(key): state for key, state in _read_states(statefuls, stats).items()}
    with stats.phase("plan"):
        random_keys = {escape(key) for key, stateful in statefuls.items() if isinstance(stateful, RNGState)}
        leaves = list(_leaf_entries(manifest, options, selection, random_keys))
        resolve = resolver(*states.values())
        values = {path: Part(entries, path, None, resolve) for path, entries in leaves if _is_value(entries, path)}
        first = Reading(opened.repository, manifest, stats)
        gather(values.values(), first, manifest)
        first.run()
        replacements: dict[str, Any] = {}
        for path, part in values.items():
            for leaf, value in leaves_of(path, part.build()):
                _place(selection.target_of(leaf), value, states, replacements)
        current = dict(chain.from_iterable(leaves_of(key, state) for key, state in states.items()))
        parts: dict[str, Part] = {}
        for path, entries in leaves:
            target = None if _is_value(entries, path) else selection.target_of(path)
            if target is not None and _place(target, None, states, replacements):
                parts[target] = Part(
                    entries, path, current.get(target), allocate=_allocator_at(target, statefuls, options)
                )
        selection.check()
        _check_places(states, replacements)
        refused = {path: part.opaque() for path, part in parts.items() if part.opaque() and not options.allow_pickle}
        if refused:
            raise PickleRefusedError(refusal(refused, []))
        work = Reading(opened.repository, manifest, stats)
        gather(parts.values(), work, manifest, options.device)
    with stats.phase("read"):
        work.run()
    with stats.phase("load"):
        replacements.update(_built(parts))
        for key, stateful in statefuls.items():
            state, placed = lay_over(escape(key), states[escape(key)], replacements)
            if placed:
                load(key, stateful, state, options.strict)


def _leaf_entries(
    manifest: StoredManifest, options: RestoreOptions, selection: Selection, random_keys: Collection[str]
) -> Iterator[tuple[str, dict[str, Entry]]]:
    """What can be selected: each tensor (a composite one with its parts), value and opaque object, by path."""
    own = options.rank if options.rank < manifest.head.world_size else 0
    for key in [each for each in manifest.entries_of(own) if "/" not in each and each != USER_METADATA]:
        reader = Reader(options.rank, options.world_size, is_random_state=key in random_keys)
        entries = selectable_entries(manifest, key, reader, options.missing_rank, selection.selects)
        composite: dict[str, Entry] | None = None
        inside = ""
        for path, entry in entries.items():
            if composite is not None and path.startswith(inside):
                composite[path] = entry
                continue
            composite = None
            if not isinstance(entry, ContainerEntry):
                yield path, {path: entry}
            elif entry.kind in COMPOSITE_KINDS:
                composite, inside = {path: entry}, f"{path}/"
                yield path, composite


def _allocator(stateful: Stateful, path: str, options: RestoreOptions) -> AllocateTensor | None:
    # a process that is alone can have any tensor whole
    knows = isinstance(stateful, (torch.optim.Optimizer, HasParameters))
    return allocator(stateful, path) if knows or options.world_size > 1 else None


def _allocator_at(target: str, statefuls: Mapping[str, Stateful], options: RestoreOptions) -> AllocateTensor | None:
    """As ``_allocator``, for the part that goes to one path of the target."""
    key = target.partition("/")[0]
    allocate = _allocator(statefuls[unescape(key)], key, options)
    return None if allocate is None else lambda _, entry: allocate(target, entry)


def _is_value(entries: Mapping[str, Entry], path: str) -> bool:
    return isinstance(entries[path], ValueEntry)


def _place(target: str | None, value: Any, states: Mapping[str, Any], replacements: dict[str, Any]) -> bool:
    """Take in a new leaf, if it is wanted and belongs to a key that is being restored."""
    if target is None or target.partition("/")[0] not in states:
        return False
    replacements[target] = value
    return True


def _check_places(states: Mapping[str, Any], replacements: Mapping[str, Any]) -> None:
    placed: set[str] = set()
    for key, state in states.items():
        placed |= lay_over(key, state, replacements)[1]
    lost = sorted(replacements.keys() - placed)
    if lost:
        listed = "\n".join(f"  {path}" for path in lost)
        raise MismatchError(f"the target has no place for these paths, nothing was restored:\n{listed}")


def refusal(refused: Mapping[str, list[tuple[str, str]]], restored: list[str]) -> str:
    """Which values were refused because only pickle can rebuild them, and what to do."""
    lines = [f"  {path}: {type_name}" for opaque in refused.values() for path, type_name in opaque]
    others = f"Restored all the same: {', '.join(restored)}." if restored else "Nothing was restored."
    return "\n".join(
        [
            "these values are stored as pickles, and loading a pickle runs code from the snapshot:",
            *lines,
            f"{others} If you trust this snapshot, pass allow_pickle=True or set TORCHSNAPSHOT_ALLOW_PICKLE=1.",
        ]
    )
