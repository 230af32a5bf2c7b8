"""Nested states ↔ nodes by path: what becomes a container, a tensor, a value or an opaque object.

A subtree without tensors is one value, encoded in one pass; ``expand`` shows its inside on demand. Containers of
tensors become ``ContainerEntry`` nodes with typed keys. What no plain kind holds is pickled; what cannot be pickled,
and tensors that cannot be read, are collected and raised at once.

What doesn't live here: bytes of values (``values``), memory of tensors (``tensors``), what a manifest stores
(``format.entries``). Paths here have no rank; no I/O, and no state is changed by reading it.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchsnapshot.errors import FormatError, SnapshotError, UnsupportedValueError
from torchsnapshot.format.entries import (
    MAX_PATH_NCHARS,
    ContainerEntry,
    Entry,
    ShardedTensorEntry,
    TensorEntry,
    children,
)
from torchsnapshot.pauses import collector_paused
from torchsnapshot.state import values
from torchsnapshot.state.composites import COMPOSITE_KINDS, put_tensor_together, take_tensor_apart
from torchsnapshot.state.kinds import (
    KINDS,
    Apart,
    Context,
    Resolve,
    class_name,
    classes_in,
    put_together,
    safe_class,
    take_apart,
)
from torchsnapshot.state.sharded import ShardedSource, describe
from torchsnapshot.state.tensors import is_array, wrap, wrapper_of
from torchsnapshot.state.values import Branch, Lowering, NotPlain, Special

_MAX_KEY_NCHARS = 1024
_INT64 = range(-(1 << 63), 1 << 64)
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class ValueLeaf:
    """A plain value, or a whole subtree of them, as ``values.encode`` wrote it."""

    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class TensorLeaf(Special):
    """A dense tensor or numpy array, not yet read."""

    tensor: Any
    wrapper: str
    requires_grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class ShardedLeaf(Special):
    """A tensor that is spread over ranks: what it is, and this rank's parts of it, not yet read."""

    source: ShardedSource


@dataclass(frozen=True, slots=True)
class OpaqueLeaf(Special):
    """An object that only pickle can hold, pickled."""

    type_name: str
    data: bytes


Node = ContainerEntry | ValueLeaf | TensorLeaf | ShardedLeaf | OpaqueLeaf

OnOpaque = Callable[[str, str], None]
"""Told the path and the type's name of every value that is stored as a pickle."""


@dataclass(frozen=True, slots=True)
class _Problem(Special):
    type_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExpandedValue:
    """A value inside a plain subtree, as ``expand`` shows it."""

    value: Any


@collector_paused()
def flatten(prefix: str, state: Any, *, on_opaque: OnOpaque, above: Iterable[int] = ()) -> dict[str, Node]:
    """Take a state apart.

    Args:
        prefix: the path of the state: the escaped key of the application's state.
        state: what ``state_dict()`` returned. It must not change meanwhile; its tensors may, until they are staged.
        on_opaque: told of each value that is pickled.
        above: the ids of the containers that ``state`` stands in, where it is a part of a larger state.

    Returns:
        The nodes by path, depth-first, parents before children.

    Raises:
        UnsupportedValueError: values that cannot be stored, all of them, by path and type.
    """
    nodes: dict[str, Node] = {}
    problems: list[str] = []
    root = Lowering(_special, _broken, above).lower(state)
    ahead: list[tuple[str, Any]] = [(prefix, root)]
    while ahead:
        path, node = ahead.pop()
        if len(path) > MAX_PATH_NCHARS // 2:
            problems.append(f"{path[:64]}…: its path has more than {MAX_PATH_NCHARS // 2} characters")
        elif isinstance(node, Branch):
            try:
                entry = _container(node)
            except NotPlain as error:
                problems.append(f"{path}: {error}")
                continue
            nodes[path] = entry
            ahead.extend(reversed(list(zip(children(path, entry), node.children, strict=True))))
        elif isinstance(node, _Problem):
            problems.append(f"{path}: {node.type_name}: {node.reason}")
        elif isinstance(node, (TensorLeaf, ShardedLeaf, OpaqueLeaf)):
            nodes[path] = node
            if isinstance(node, OpaqueLeaf):
                on_opaque(path, node.type_name)
        else:
            try:
                nodes[path] = ValueLeaf(values.pack(node))
            except NotPlain as error:
                problems.append(f"{path}: {error}")
    if problems:
        raise UnsupportedValueError(problems)
    return nodes


def _container(branch: Branch) -> ContainerEntry:
    context = dict(branch.context or {})
    keys: Sequence[Any] = range(len(branch.children)) if branch.keys is None else branch.keys
    if not all(fits_path(key) for key in keys):
        # such keys stand in the context, and the children's paths count them
        context["keys"] = list(keys)
        keys = range(len(branch.children))
    return ContainerEntry(branch.kind, tuple(keys), values.encode(context) if context else b"")


def fits_path(key: Any) -> bool:
    """Whether a dict's key may stand in a path. Where one of its keys doesn't, the paths count all of its children."""
    kind = type(key)
    if kind is int:
        return key in _INT64
    if kind is not str:
        return kind is bool
    return len(key) <= _MAX_KEY_NCHARS and (key.isascii() or not any("\ud800" <= char <= "\udfff" for char in key))


def _special(value: Any, reason: str) -> Special:
    """What becomes of a value of no plain kind."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if is_array(value):
        return TensorLeaf(value, "numpy", False)
    name = class_name(type(value))
    try:
        return OpaqueLeaf(name, pickle.dumps(value, protocol=4))
    except Exception as error:
        # a class's own pickling code may raise anything
        return _Problem(name, f"{reason}, and it cannot be pickled: {type(error).__name__}: {error}")


def _broken(value: Any, reason: str) -> Special:
    return _Problem(class_name(type(value)), reason)


def _tensor(tensor: torch.Tensor) -> Special:
    source = describe(tensor)
    if source is not None:
        return _Problem(class_name(type(tensor)), source) if isinstance(source, str) else ShardedLeaf(source)
    parts = take_tensor_apart(tensor)
    if parts is None:
        return TensorLeaf(tensor, wrapper_of(tensor), tensor.requires_grad)
    if isinstance(parts, str):
        return _Problem(class_name(type(tensor)), parts)
    if not values.is_plain(dict(parts.context)):
        return _Problem(class_name(type(tensor)), "the context that its __tensor_flatten__ gives is not plain")
    return Branch(
        parts.kind, list(parts.children), [_tensor(child) for child in parts.children.values()], parts.context
    )


def resolver(*targets: object) -> Resolve:
    """Offer the classes that stand in the restore's targets, and torch's safe globals after them."""
    offered: dict[str, type] = {}
    for target in targets:
        offered.update(classes_in(target))
    return lambda name: offered.get(name) or safe_class(name)


@collector_paused()
def inflate(
    prefix: str,
    nodes: Mapping[str, Entry],
    leaf: Callable[[str, Entry], Any],
    target: object = None,
    resolve: Resolve | None = None,
) -> Any:
    """Put a state together.

    Args:
        prefix: the path of the state's root in ``nodes``.
        nodes: the entries by path.
        leaf: gives the restored tensor, decoded value or loaded object of a path. A tensor that is not the target's
            own gets the wrapper that its entry names.
        target: the state that is restored into, or None. Composite tensors of the same make are written in place.
        resolve: gives classes by stored name; from ``target`` and torch's safe globals where None.

    Raises:
        FormatError: the entries make no state; MismatchError: a tensor's class is not known. Both name the path.
    """
    return _Inflating(nodes, leaf, resolve or resolver(target)).at(prefix, target)


class _Inflating:
    def __init__(self, nodes: Mapping[str, Entry], leaf: Callable[[str, Entry], Any], resolve: Resolve) -> None:
        self._nodes = nodes
        self._leaf = leaf
        self._resolve = resolve

    def at(self, path: str, target: Any) -> Any:
        entry = self._nodes.get(path)
        if entry is None:
            raise FormatError(f"{path}: the snapshot has no such entry")
        if not isinstance(entry, ContainerEntry):
            value = self._leaf(path, entry)
            if isinstance(entry, TensorEntry) and value is not target:
                return wrap(value, entry.wrapper, entry.requires_grad)
            return value
        context, keys = _context_of(path, entry, self._resolve)
        inner = [self.at(child, child_of(target, key)) for child, key in zip(children(path, entry), keys, strict=True)]
        try:
            if entry.kind in COMPOSITE_KINDS:
                parts = {str(key): child for key, child in zip(keys, inner, strict=True)}
                return put_tensor_together(entry.kind, parts, context, self._resolve, target)
            kind = KINDS[entry.kind]
            return put_together(Apart(entry.kind, keys if kind.mapping else None, inner, context), self._resolve)
        except SnapshotError as error:
            raise type(error)(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: a stored {entry.kind} cannot be rebuilt: {error}") from error


def _context_of(path: str, entry: ContainerEntry, resolve: Resolve) -> tuple[Context, Sequence[Any]]:
    """The plain context of a container, and the keys of its children."""
    if entry.kind not in KINDS and entry.kind not in COMPOSITE_KINDS:
        raise FormatError(f"{path}: unknown kind of container {entry.kind!r}; a newer version may know it")
    if not entry.extra:
        return {}, entry.keys
    context = values.decode(entry.extra, resolve)
    if not isinstance(context, dict):
        raise FormatError(f"{path}: the context of a {entry.kind} is no dict")
    keys: Sequence[Any] = context.pop("keys", entry.keys)
    if not isinstance(keys, (list, tuple)) or len(keys) != len(entry.keys):
        raise FormatError(f"{path}: a {entry.kind} with {len(entry.keys)} children has other keys in its context")
    return context, keys


def keys_of(path: str, entry: ContainerEntry, resolve: Resolve) -> Sequence[Any]:
    """The keys of a container's children, also those that cannot stand in a path.

    Raises:
        FormatError: the entry is no container of a known kind.
    """
    return _context_of(path, entry, resolve)[1]


def child_of(target: Any, key: Any) -> Any:
    """What a state holds under a key, index, field or inner tensor's name; None where it holds nothing there."""
    if isinstance(target, dict):
        return dict.get(target, key)
    if isinstance(key, str):
        # inner tensors of quantized and sparse ones are rebuilt, and settled as a whole
        if type(target) in (torch.Tensor, torch.nn.Parameter):
            return None
        holds_fields = isinstance(target, (torch.Tensor, tuple)) or dataclasses.is_dataclass(target)
        return getattr(target, key, None) if holds_fields else None
    if isinstance(target, (list, tuple, deque)) and type(key) is int and 0 <= key < len(target):
        return target[key]
    return None


def find_targets(prefix: str, nodes: Mapping[str, Entry], target: object) -> dict[str, Any]:
    """What stands in the restore's target at the place of each tensor entry, by path.

    Args:
        prefix: the path of the state's root in ``nodes``.
        nodes: the entries by path.
        target: the state that is restored into.

    Returns:
        Tensors (on any device, also meta, quantized, sparse, sharded) and numpy arrays. A path is absent where the
        target has nothing, or something else. Inner tensors of sparse and quantized entries have no target:
        ``inflate`` settles them as a whole.
    """
    found: dict[str, Any] = {}
    ahead: list[tuple[str, Any]] = [(prefix, target)]
    while ahead:
        path, here = ahead.pop()
        entry = nodes.get(path)
        if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
            if isinstance(here, torch.Tensor) or is_array(here):
                found[path] = here
        elif isinstance(entry, ContainerEntry) and here is not None:
            _, keys = _context_of(path, entry, safe_class)
            ahead.extend((child, child_of(here, key)) for child, key in zip(children(path, entry), keys, strict=True))
    return found


def expand(
    path: str, data: bytes | memoryview, resolve: Resolve | None = None
) -> dict[str, ContainerEntry | ExpandedValue]:
    """Show the inside of a plain subtree as entries of its own.

    Args:
        path: where the subtree stands.
        data: what its ``ValueLeaf`` or ``ValueEntry`` holds.
        resolve: see ``values.decode``.

    Returns:
        Containers and single values by path, depth-first, ``path`` itself first. Sets are single values.
    """
    found: dict[str, ContainerEntry | ExpandedValue] = {}
    ahead: list[tuple[str, Any]] = [(path, values.decode(data, resolve))]
    while ahead:
        path, value = ahead.pop()
        kind = KINDS.get(type(value).__name__)
        apart = take_apart(value) if kind is not None and kind.base is type(value) else ""
        if isinstance(apart, str) or apart.kind in ("set", "frozenset"):
            found[path] = ExpandedValue(value)
            continue
        entry = _container(Branch(apart.kind, apart.keys, apart.children, apart.context))
        found[path] = entry
        ahead.extend(reversed(list(zip(children(path, entry), apart.children, strict=True))))
    return found
