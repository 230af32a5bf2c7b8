"""Walking a live state by the paths that entries use: which children a value has, and what stands at a path. Pure.

What doesn't live here: storing values (``flatten``), building them anew (``kinds``).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torchsnapshot.entries import component_of


def children_of(value: object) -> list[tuple[str, Any]] | None:
    """The children of a container with their path components; None for a leaf (sets too: their items have no places)."""
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
    if path in replacements:
        return replacements[path], {path}
    below = {other: leaf for other, leaf in replacements.items() if other.startswith(f"{path}/")}
    children = children_of(value)
    if not below or children is None:
        return value, set()
    placed: set[str] = set()
    laid = []
    for component, child in children:
        new, found = lay_over(f"{path}/{component}", child, below)
        laid.append(new)
        placed |= found
    result = _with_children(value, laid) if placed else value
    if isinstance(value, dict):
        fresh = {other[len(path) + 1 :]: leaf for other, leaf in below.items() if "/" not in other[len(path) + 1 :]}
        fresh = {key: leaf for key, leaf in fresh.items() if f"{path}/{key}" not in placed}
        if fresh:
            result = _with_children(value, laid)
            result.update(fresh)
            placed |= {f"{path}/{key}" for key in fresh}
    return result, placed


def _with_children(value: Any, children: list[Any]) -> Any:
    """A container like ``value`` with other children."""
    if isinstance(value, dict):
        result = value.copy()
        # nn.Module keeps its version numbers in an attribute of the dict, which copy() leaves behind
        if hasattr(value, "__dict__"):
            vars(result).update(vars(value))
        for key, child in zip(list(dict.keys(value)), children, strict=True):
            result[key] = child
        return result
    if isinstance(value, deque):
        return type(value)(children, value.maxlen)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(children)
    if isinstance(value, (list, tuple)):
        return type(value)(children)
    fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return dataclasses.replace(value, **dict(zip(fields, children, strict=True)))
