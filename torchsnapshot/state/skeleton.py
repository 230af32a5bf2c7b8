"""The frame of a state that was flattened once: a state that is built alike is read into it in a fraction of the time.

What lives here: the walk over the containers of a state that is compared with the last one as it goes. What doesn't:
the walk over any state (``flatten``, whose nodes this gives), what tensors say of themselves (``columns``).

Plain dicts, lists, tuples and OrderedDicts with tensors in them are compared: their classes, keys and the keys'
classes, what their attributes are, and which of their children are containers, tensors or neither. Everything else in
them (values, arrays, tensors of other devices and kinds, containers of other classes) is flattened each time.

Invariants: ``Skeleton.read`` gives the nodes that ``flatten`` would give, or None. Nothing here keeps the state alive.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchsnapshot.errors import UnsupportedValueError
from torchsnapshot.format.entries import ContainerEntry, children, escape
from torchsnapshot.pauses import collector_paused
from torchsnapshot.state import values
from torchsnapshot.state.columns import TensorColumns, TensorMemory, fits_columns
from torchsnapshot.state.flatten import Node, OnOpaque, TensorLeaf, ValueLeaf, flatten
from torchsnapshot.state.values import SCALARS, NotPlain

_FRAME_TYPES = (dict, OrderedDict, list, tuple)


@dataclass(frozen=True, slots=True)
class _Other:
    """A child that is flattened each time: its place among its siblings, its path, and what nodes come of it.

    Their classes count: a container in which nothing is left but plain values is a value itself.
    """

    position: int
    number: int
    path: str
    paths: list[str]
    kinds: list[type]


@dataclass(frozen=True, slots=True)
class _Frame:
    """A container: what it must be, and where its children are found.

    ``kinds`` are the classes of its children, None where any will do. ``tensors`` are the places of those that stand in
    columns, None for all children.
    """

    kind: type
    keys: list[Any] | None
    key_kinds: list[type] | None
    extra: bytes
    kinds: list[type | None]
    tensors: list[int] | None
    others: list[_Other]
    frames: list[tuple[int, _Frame]]


@dataclass(slots=True)
class _Found:
    """What a walk has gathered: tensors in the order of the columns, other nodes with their numbers."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    others: list[tuple[int, Node]] = field(default_factory=list)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    above: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A state that was read into a skeleton.

    ``tensors`` are in the order of the columns, ``memory`` is theirs, ``others`` are the nodes that were flattened anew
    with their numbers in the order of all nodes.
    """

    skeleton: Skeleton
    tensors: Sequence[torch.Tensor]
    memory: TensorMemory
    others: Sequence[tuple[int, Node]]

    def leaf(self, column: int) -> TensorLeaf:
        """The node of the tensor in a column."""
        wrapper, requires_grad = self.skeleton.wrappers[column]
        return TensorLeaf(self.tensors[column], wrapper, requires_grad)

    def held_leaf(self, column: int) -> TensorLeaf:
        """The same, of the tensor as it was when it was read: nobody can give that another memory."""
        wrapper, requires_grad = self.skeleton.wrappers[column]
        return TensorLeaf(self.skeleton.columns.held(column, self.memory), wrapper, requires_grad)

    @collector_paused()
    def nodes(self) -> dict[str, Node]:
        """All nodes by path, as ``flatten`` gives them."""
        skeleton = self.skeleton
        found: list[Any] = list(skeleton.containers)
        for column, number in enumerate(skeleton.numbers):
            found[number] = self.leaf(column)
        for number, node in self.others:
            found[number] = node
        return dict(zip(skeleton.paths, found, strict=True))


class Skeleton:
    """See the module. Any thread may use it.

    ``paths`` are those of all nodes, in their order; ``containers`` what stands there, None for leaves and for what is
    flattened each time; ``numbers`` the places of the tensors in columns among them, ``wrappers`` what their nodes say,
    ``columns`` what the tensors say.

    Args:
        states: what the objects' ``state_dict`` returned, by key.
        nodes: what ``flatten`` made of it, key by key.
    """

    def __init__(self, states: Mapping[str, Any], nodes: Mapping[str, Node]) -> None:
        self.keys = list(states)
        self.paths = list(nodes)
        self.containers: list[ContainerEntry | None] = [None] * len(nodes)
        self.numbers: list[int] = []
        self.wrappers: list[tuple[str, bool]] = []
        self._nodes: Mapping[str, Node] = nodes
        self._number_of = {path: number for number, path in enumerate(nodes)}
        self._tops: list[_Frame | _Other] = []
        for key, state in states.items():
            self._tops.append(self._frame(escape(key), state) or self._other(0, escape(key)))
        self.columns = TensorColumns([_tensor_at(nodes, self.paths[number]) for number in self.numbers])
        # needed only to build it; tensors must not live as long as this
        self._nodes, self._number_of = {}, {}

    @collector_paused()
    def read(self, states: Mapping[str, Any], on_opaque: OnOpaque) -> Reading | None:
        """Read a state that may be built like the first one.

        Args:
            states: what the objects' ``state_dict`` returned, by key.
            on_opaque: told of each value that is pickled.

        Returns:
            None where it is built otherwise, or holds what cannot be stored: ``flatten`` tells more.
        """
        if list(states) != self.keys:
            return None
        found = _Found()
        try:
            for state, top in zip(states.values(), self._tops, strict=True):
                if isinstance(top, _Other):
                    if not _flatten(top, state, found):
                        return None
                elif type(state) is not top.kind or not _walk(top, state, found):
                    return None
        except (NotPlain, UnsupportedValueError):
            return None
        memory = self.columns.memory(found.tensors)
        if memory is None:
            return None
        for path, name in found.opaque:
            on_opaque(path, name)
        return Reading(self, found.tensors, memory, found.others)

    def _frame(self, path: str, value: Any) -> _Frame | None:
        """The frame of a container; None where it is to be flattened each time."""
        kind, entry = type(value), self._nodes.get(path)
        if kind not in _FRAME_TYPES or not isinstance(entry, ContainerEntry) or entry.kind != kind.__name__:
            return None
        keys = list(dict.keys(value)) if isinstance(value, dict) else None
        if keys is not None and (keys != list(entry.keys) or list(map(type, keys)) != list(map(type, entry.keys))):
            # keys that cannot be part of a path
            return None
        if entry.extra != _extra_of(value):
            return None
        self.containers[self._number_of[path]] = entry
        inside = list(dict.values(value)) if isinstance(value, dict) else list(value)
        kinds: list[type | None] = [None] * len(inside)
        tensors, frames, others = [], [], []
        paths = children(path, entry)
        for position, (child, place) in enumerate(zip(inside, paths, strict=True)):
            node = self._nodes[place]
            if isinstance(node, TensorLeaf) and node.tensor is child and fits_columns(child):
                kinds[position] = type(child)
                tensors.append(position)
                self.numbers.append(self._number_of[place])
                self.wrappers.append((node.wrapper, node.requires_grad))
        for position, (child, place) in enumerate(zip(inside, paths, strict=True)):
            if kinds[position] is None:
                if (frame := self._frame(place, child)) is not None:
                    kinds[position] = frame.kind
                    frames.append((position, frame))
                else:
                    others.append(self._other(position, place))
        everything = len(tensors) == len(inside)
        key_kinds = None if keys is None else list(map(type, keys))
        return _Frame(kind, keys, key_kinds, entry.extra, kinds, None if everything else tensors, others, frames)

    def _other(self, position: int, path: str) -> _Other:
        """A child that is flattened each time, with all nodes that came of it: they stand one behind the other."""
        first = last = self._number_of[path]
        below = f"{path}/"
        while last < len(self.paths) and (last == first or self.paths[last].startswith(below)):
            last += 1
        paths = self.paths[first:last]
        return _Other(position, first, path, paths, [type(self._nodes[each]) for each in paths])


def _tensor_at(nodes: Mapping[str, Node], path: str) -> torch.Tensor:
    node = nodes[path]
    assert isinstance(node, TensorLeaf)
    assert isinstance(node.tensor, torch.Tensor)
    return node.tensor


def _extra_of(value: Any) -> bytes:
    """What the entry of such a container says beside its keys."""
    if type(value) is OrderedDict and (attributes := vars(value)):
        return values.encode({"attributes": dict(attributes)})
    return b""


def _walk(frame: _Frame, value: Any, found: _Found) -> bool:
    """Gather what is in a container of the frame's class; False where it is another one."""
    if frame.keys is None:
        inside = list(value)
    else:
        keys = list(dict.keys(value))
        if keys != frame.keys or list(map(type, keys)) != frame.key_kinds:
            return False
        inside = list(dict.values(value))
    kinds = list(map(type, inside))
    if kinds != frame.kinds:
        if len(kinds) != len(frame.kinds):
            return False
        if any(wanted is not None and wanted is not kind for wanted, kind in zip(frame.kinds, kinds, strict=True)):
            return False
    if (frame.extra or frame.kind is OrderedDict) and _extra_of(value) != frame.extra:
        return False
    if frame.tensors is None:
        found.tensors += inside
        return True
    found.tensors += [inside[position] for position in frame.tensors]
    if id(value) in found.above:
        return False
    found.above.add(id(value))
    for other in frame.others:
        if not _flatten(other, inside[other.position], found):
            return False
    for position, inner in frame.frames:
        if not _walk(inner, inside[position], found):
            return False
    found.above.discard(id(value))
    return True


def _flatten(other: _Other, value: Any, found: _Found) -> bool:
    """Flatten a child; False where other paths or kinds of nodes come of it."""
    if type(value) in SCALARS:
        if other.kinds != [ValueLeaf]:
            return False
        found.others.append((other.number, ValueLeaf(values.pack(value))))
        return True
    opaque: list[tuple[str, str]] = []
    nodes = flatten(other.path, value, on_opaque=lambda path, name: opaque.append((path, name)), above=found.above)
    if list(nodes) != other.paths or list(map(type, nodes.values())) != other.kinds:
        return False
    found.others.extend(enumerate(nodes.values(), other.number))
    found.opaque += opaque
    return True
