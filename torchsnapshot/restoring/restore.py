"""Runs a restore: manifest → targets → jobs → structure → ``load_state_dict``.

What lives here: the order of a restore's steps, for a whole state: the snapshot's structure leads. What doesn't: the
restore of a part of one (``partial``), arguments (``snapshot``, ``options``), single values (``read_object``), finding
targets (``parts``, ``reading.targets``), the reads (``reading.reads``).

Invariants: everything that can be refused is refused before the first byte of the target changes; a chunk reaches the
target only after its digest was checked; what fails later says that the target is a mix.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from torchsnapshot.errors import (
    AbsentStateError,
    MismatchError,
    PickleRefusedError,
)
from torchsnapshot.format.entries import (
    Entry,
    StoredManifest,
    unescape,
)
from torchsnapshot.pauses import collector_paused
from torchsnapshot.reading.opening import Opened, check_key, other_generations_named, still_committed
from torchsnapshot.reading.reads import Reading
from torchsnapshot.restoring.elastic import entries_for
from torchsnapshot.restoring.live_state import leaves_of
from torchsnapshot.restoring.loading import allocator_for, load, names_refused, parameter_finder, read_states
from torchsnapshot.restoring.options import RestoreOptions
from torchsnapshot.restoring.partial import restore_part
from torchsnapshot.restoring.parts import Part, built, gather, refusal
from torchsnapshot.restoring.stages import Reader
from torchsnapshot.state.sharded import mesh_of
from torchsnapshot.state.wrappers import explain
from torchsnapshot.stateful import RNGState, Stateful
from torchsnapshot.stats import Stats
from torchsnapshot.store.leases import reading
from torchsnapshot.taking import history

logger = logging.getLogger(__name__)


def restore(opened: Opened, statefuls: Mapping[str, Stateful], options: RestoreOptions) -> Stats:
    """Bring a state back. See ``Snapshot.restore``."""
    stats = Stats()
    # tables and bytes that are read without a lease could be swept while they are being read
    with reading(opened.repository, opened.name), other_generations_named(opened):
        manifest = still_committed(opened)
        if options.paths is not None or options.rename is not None:
            restore_part(opened, manifest, statefuls, options, stats)
        else:
            _restore_whole(opened, manifest, statefuls, options, stats)
    return stats


def _restore_whole(
    opened: Opened,
    manifest: StoredManifest,
    statefuls: Mapping[str, Stateful],
    options: RestoreOptions,
    stats: Stats,
) -> None:
    paths = {key: check_key(manifest, key) for key in statefuls}
    states = read_states(statefuls, stats)
    with stats.phase("plan"):
        parts: dict[str, Part] = {}
        for key, path in paths.items():
            reader = _reader(statefuls[key], states[key], path, options)
            entries = entries_for(manifest, path, reader, options.missing_rank)
            if path in entries:
                _check_names(path, statefuls[key], states[key], entries, options)
                allocate = allocator_for(statefuls[key], path, options.world_size)
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
        writes = any(part.writes for part in wanted.values())
        for key, state in built(wanted).items():
            load(key, statefuls[key], state, options.strict, has_written=writes)
            writes = True
    if refused:
        raise PickleRefusedError(refusal(refused, list(wanted)))
    history.note_commit_time(opened.repository.store_id, manifest.head.created_ms)
    history.remember(opened.repository.store_id, history.Remembered.of_manifest(manifest, options.rank))


def _check_names(
    path: str, stateful: Stateful, state: Any, entries: Mapping[str, Entry], options: RestoreOptions
) -> None:
    """Say so before anything is written where a module would refuse the stored names."""
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
    refused = names_refused(stateful, state.keys(), stored) if options.strict else ""
    if refused:
        raise MismatchError(f"{path}: {refused}. Nothing was restored; strict=False restores what both have")


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
