"""Restores a part of a state: the selected leaves of a snapshot are laid over what the target has.

What lives here: from ``paths`` and ``rename`` to loaded objects. Here the target's structure leads. What doesn't: the
restore of a whole state (``restore``), which paths are selected (``selection``), where a way through a state leads
(``live_state``).

Invariants: everything that can be refused is refused before the first byte of the target changes; a selection that
leaves the target as it is, is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchsnapshot.errors import MismatchError, PickleRefusedError
from torchsnapshot.format.entries import (
    USER_METADATA,
    ContainerEntry,
    Entry,
    StoredManifest,
    ValueEntry,
    component_of,
    escape,
    unescape,
)
from torchsnapshot.reading.opening import Opened, check_key
from torchsnapshot.reading.reads import Reading
from torchsnapshot.restoring.elastic import selectable_entries
from torchsnapshot.restoring.live_state import Route, Step, aligned, lay_over, routes_of
from torchsnapshot.restoring.loading import allocator_for, load, read_states
from torchsnapshot.restoring.options import RestoreOptions
from torchsnapshot.restoring.parts import AllocateTensor, Part, built, gather, refusal
from torchsnapshot.restoring.selection import Selection
from torchsnapshot.restoring.stages import Reader
from torchsnapshot.state.composites import COMPOSITE_KINDS
from torchsnapshot.state.flatten import keys_of, resolver
from torchsnapshot.state.kinds import Resolve
from torchsnapshot.stateful import RNGState, Stateful
from torchsnapshot.stats import Stats


def restore_part(
    opened: Opened,
    manifest: StoredManifest,
    statefuls: Mapping[str, Stateful],
    options: RestoreOptions,
    stats: Stats,
) -> None:
    """Bring the selected part of a state back. See ``Snapshot.restore``."""
    selection = Selection(options.paths, options.rename)
    states = {escape(key): state for key, state in read_states(statefuls, stats).items()}
    with stats.phase("plan"):
        random_keys = {escape(key) for key, stateful in statefuls.items() if isinstance(stateful, RNGState)}
        resolve = resolver(*states.values())
        leaves = list(_leaves(manifest, options, selection, random_keys, resolve))
        placements = _Placements(states)
        values = [leaf for leaf in leaves if leaf.is_value]
        _place_values(opened, manifest, values, selection, placements, resolve, stats)
        wanted: dict[str, _Leaf] = {}
        for leaf in leaves:
            target = None if leaf.is_value else selection.target_of(leaf.path)
            if target is not None and placements.add(target, leaf.route(), None):
                wanted[target] = leaf
        selection.check()
        if not placements and options.missing_rank != "drop":
            for key in statefuls:
                check_key(manifest, key)
            raise MismatchError(
                f"of what is selected nothing belongs to {', '.join(map(repr, statefuls))}: nothing was restored"
            )
        current = placements.check()
        parts = {
            target: Part(leaf.entries, leaf.path, current[target], allocate=_allocator_at(target, statefuls, options))
            for target, leaf in wanted.items()
        }
        refused = {path: part.opaque() for path, part in parts.items() if part.opaque() and not options.allow_pickle}
        if refused:
            raise PickleRefusedError(refusal(refused, []))
        work = Reading(opened.repository, manifest, stats)
        gather(parts.values(), work, manifest, options.device)
    with stats.phase("read"):
        work.run()
    with stats.phase("load"):
        placements.fill(built(parts))
        writes = any(part.writes for part in parts.values())
        for key, stateful in statefuls.items():
            if placements.has_any(escape(key)):
                load(key, stateful, placements.laid_over(escape(key)), options.strict, has_written=writes)
                writes = True


@dataclass(frozen=True, slots=True)
class _Leaf:
    """What can be selected: a tensor (a composite one with its parts), a value or an opaque object."""

    path: str
    entries: Mapping[str, Entry]
    keys: _Keys

    @property
    def is_value(self) -> bool:
        """Whether it is a value, or a tree of them."""
        return isinstance(self.entries[self.path], ValueEntry)

    def route(self) -> Route:
        """The way to it, with the keys that it was stored under."""
        return self.keys.route(self.path)


class _Keys:
    """The keys that the containers of one stored tree have."""

    def __init__(self, entries: Mapping[str, Entry], resolve: Resolve) -> None:
        self._entries = entries
        self._resolve = resolve
        self._steps: dict[str, dict[str, Step]] = {}

    def route(self, path: str) -> Route:
        """The way from the tree's root to what stands at a path."""
        above, *components = path.split("/")
        steps = []
        for component in components:
            steps.append(self._below(above).get(component, Step(component)))
            above = f"{above}/{component}"
        return tuple(steps)

    def _below(self, path: str) -> Mapping[str, Step]:
        steps = self._steps.get(path)
        if steps is None:
            entry = self._entries.get(path)
            steps = {}
            if isinstance(entry, ContainerEntry):
                keys, from_dict = keys_of(path, entry, self._resolve), entry.kind == "dict"
                for component, key in zip(component_of(entry.keys), keys, strict=True):
                    steps[component] = Step(component, key, from_dict)
            self._steps[path] = steps
        return steps


class _Placements:
    """What goes where in the states of an application.

    Args:
        states: what the objects' ``state_dict`` returned, by escaped key.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states
        self._leaves: dict[str, dict[str, tuple[Route, Any]]] = {key: {} for key in states}

    def __bool__(self) -> bool:
        return any(self._leaves.values())

    def add(self, target: str, route: Route, leaf: Any) -> bool:
        """Take in a new leaf, if it belongs to a key that is being restored.

        Args:
            target: the path where it goes.
            route: the way to where it was stored.
            leaf: what goes there; None for what ``fill`` brings.
        """
        leaves = self._leaves.get(target.partition("/")[0])
        if leaves is None:
            return False
        leaves[target] = aligned(route, target), leaf
        return True

    def check(self) -> Mapping[str, Any]:
        """What stands at the places now, by path; None where nothing does.

        Raises:
            MismatchError: there is no place for some of it.
        """
        current: dict[str, Any] = {}
        for key, leaves in self._leaves.items():
            _, placed = lay_over(self._states[key], leaves.values())
            current.update({path: placed[route] for path, (route, _) in leaves.items() if route in placed})
        lost = sorted(path for leaves in self._leaves.values() for path in leaves if path not in current)
        if lost:
            listed = "\n".join(f"  {path}" for path in lost)
            raise MismatchError(f"the target has no place for these paths, nothing was restored:\n{listed}")
        return current

    def fill(self, leaves: Mapping[str, Any]) -> None:
        """Bring what was added without being there yet, by path."""
        for path, leaf in leaves.items():
            below = self._leaves[path.partition("/")[0]]
            route, _ = below[path]
            below[path] = route, leaf

    def has_any(self, key: str) -> bool:
        """Whether a key has new leaves."""
        return bool(self._leaves[key])

    def laid_over(self, key: str) -> Any:
        """The state of a key with its new leaves."""
        return lay_over(self._states[key], self._leaves[key].values())[0]


def _place_values(
    opened: Opened,
    manifest: StoredManifest,
    leaves: Collection[_Leaf],
    selection: Selection,
    placements: _Placements,
    resolve: Resolve,
    stats: Stats,
) -> None:
    """Read all values, and place those that are selected: a tree of values is one entry, each of them has a path."""
    parts = [(leaf, Part(leaf.entries, leaf.path, None, resolve)) for leaf in leaves]
    work = Reading(opened.repository, manifest, stats)
    gather([part for _, part in parts], work, manifest)
    work.run()
    for leaf, part in parts:
        for inner, value in routes_of(part.build()):
            target = selection.target_of("/".join([leaf.path, *[step.component for step in inner]]))
            if target is not None:
                placements.add(target, (*leaf.route(), *inner), value)


def _leaves(
    manifest: StoredManifest,
    options: RestoreOptions,
    selection: Selection,
    random_keys: Collection[str],
    resolve: Resolve,
) -> Iterator[_Leaf]:
    own = options.rank if options.rank < manifest.head.world_size else 0
    for key in [each for each in manifest.entries_of(own) if "/" not in each and each != USER_METADATA]:
        reader = Reader(options.rank, options.world_size, is_random_state=key in random_keys)
        entries = selectable_entries(manifest, key, reader, options.missing_rank, selection.selects)
        keys = _Keys(entries, resolve)
        composite: dict[str, Entry] | None = None
        inside = ""
        for path, entry in entries.items():
            if composite is not None and path.startswith(inside):
                composite[path] = entry
                continue
            composite = None
            if not isinstance(entry, ContainerEntry):
                yield _Leaf(path, {path: entry}, keys)
            elif entry.kind in COMPOSITE_KINDS:
                composite, inside = {path: entry}, f"{path}/"
                yield _Leaf(path, composite, keys)


def _allocator_at(target: str, statefuls: Mapping[str, Stateful], options: RestoreOptions) -> AllocateTensor | None:
    """``allocator_for`` the part that goes to one path of the target."""
    key = target.partition("/")[0]
    allocate = allocator_for(statefuls[unescape(key)], key, options.world_size)
    return None if allocate is None else lambda _, entry: allocate(target, entry)
