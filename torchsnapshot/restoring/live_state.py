"""Walking a live state by the paths that entries use: which children a value has, and what stands at a path. Pure.

What doesn't live here: storing values (``state.flatten``), building them anew (``state.kinds``).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torchsnapshot.format.entries import component_of, unescape


def children_of(value: object) -> list[tuple[str, Any]] | None:
    """The children of a container with their path components; None for a leaf (also a set: items have no places)."""
    if isinstance(value, dict):
        keys = list(dict.keys(value))
        if not all(isinstance(key, (str, int)) for key in keys):
            return None
        return list(zip(component_of(keys), dict.values(value), strict=True))
    if isinstance(value, tuple) and isinstance(getattr(value, "_fields", None), tuple):
        return list(zip(component_of(value._fields), value, strict=True))  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple, deque)):
        return [(str(index), child) for index, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [(component, getattr(value, name)) for component, name in zip(component_of(fields), fields, strict=True)]
    return None


def leaves_of(path: str, value: object) -> Iterator[tuple[str, Any]]:
    """The leaves at and below ``path``: everything that is no container, and empty containers."""
    pending = [(path, value)]
    while pending:
        path, value = pending.pop()
        children = children_of(value)
        if children:
            pending.extend((f"{path}/{component}", child) for component, child in reversed(children))
        else:
            yield path, value


def find(value: object, components: list[str]) -> Any:
    """What stands below ``value`` at these components.

    Raises:
        KeyError: nothing does.
    """
    for component in components:
        for name, child in children_of(value) or ():
            if name == component:
                value = child
                break
        else:
            raise KeyError(component)
    return value


def lay_over(path: str, value: Any, replacements: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Put new leaves into a nested state.

    Args:
        path: where ``value`` stands.
        value: the state; it is not changed.
        replacements: new leaves by path.

    Returns:
        The new state, which shares all that is not replaced, and the paths that found a place. A new key finds one in
        a dict that is there already.
    """
    root = _Node(path)
    for other, leaf in replacements.items():
        if other == path:
            return leaf, {path}
        if other.startswith(f"{path}/"):
            node = root
            for component in other[len(path) + 1 :].split("/"):
                node = node.below.setdefault(component, _Node(f"{node.path}/{component}"))
            node.leaf = leaf
    placed: set[str] = set()
    return _lay(root, value, placed), placed


_ABSENT: Any = object()


@dataclasses.dataclass(slots=True)
class _Node:
    """New leaves by component: what lies at and below one path."""

    path: str
    leaf: Any = _ABSENT
    below: dict[str, _Node] = dataclasses.field(default_factory=dict)


def _lay(node: _Node, value: Any, placed: set[str]) -> Any:
    if node.leaf is not _ABSENT:
        placed.add(node.path)
        return node.leaf
    children = children_of(value)
    if not node.below or children is None:
        return value
    num_placed = len(placed)
    laid = [_lay(node.below[name], child, placed) if name in node.below else child for name, child in children]
    fresh: dict[Any, Any] = {}
    if isinstance(value, dict):
        known = {name for name, _ in children}
        for component, new in node.below.items():
            if component not in known and new.leaf is not _ABSENT:
                placed.add(new.path)
                fresh[_key_of(component, value)] = new.leaf
    if len(placed) == num_placed:
        return value
    result = _with_children(value, laid)
    for key, leaf in fresh.items():
        result[key] = leaf
    return result


def _key_of(component: str, siblings: Mapping[Any, Any]) -> str | int | bool:
    """The key that a component of a path stands for, in a dict that has others."""
    if component.startswith("%b"):
        return component == "%bTrue"
    if component.startswith("%i"):
        return int(component[2:])
    if siblings and all(type(key) is int for key in siblings) and component.removeprefix("-").isdecimal():
        return int(component)
    return unescape(component)


def _with_children(value: Any, children: list[Any]) -> Any:
    """A container like ``value`` with other children."""
    if isinstance(value, dict):
        # not value.copy(), which leaves behind its class, and the version numbers that nn.Module hangs on it
        result = copy.copy(value)
        for key, child in zip(list(dict.keys(value)), children, strict=True):
            result[key] = child
        return result
    if isinstance(value, deque):
        return type(value)(children, value.maxlen)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(children)
    if isinstance(value, (list, tuple)):
        return type(value)(children)
    result = copy.copy(value)
    fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    for name, child in zip(fields, children, strict=True):
        # also where the class is frozen
        object.__setattr__(result, name, child)
    return result
