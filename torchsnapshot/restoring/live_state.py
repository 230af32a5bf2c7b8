"""Walking a live state by the paths that entries use: which children a value has, and what stands at a path. Pure.

What doesn't live here: storing values (``state.flatten``), building them anew (``state.kinds``).

Invariant: a path alone does not tell the int 0 from the text "0", and of keys that cannot stand in a path it only
counts the children. So what is stored goes to where its own key leads, wherever that is known.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torchsnapshot.format.entries import component_of, unescape
from torchsnapshot.state.flatten import fits_path

TEXT: Any = object()
"""In the place of a key: all that is known of it is the text in the path."""


class Step(NamedTuple):
    """One step of a way through a state, from a container to one of its children.

    ``component`` is that of the path. ``key`` is what it stands for, ``TEXT`` where only the path is known.
    ``from_dict``: the container is a plain dict, which can be made where it is missing.
    """

    component: str
    key: Any = TEXT
    from_dict: bool = False


Route = tuple[Step, ...]
"""The way from the state of a key to what stands at a path below it."""


def route_along(path: str) -> Route:
    """The route of a path, its first component aside, of which nothing but the path is known."""
    return tuple([Step(component) for component in path.split("/")[1:]])


def aligned(route: Route, target: str) -> Route:
    """The route of another path: at both ends, as far as they agree, it has the keys of ``route``."""
    if [step.component for step in route] == target.split("/")[1:]:
        return route
    steps = list(route_along(target))
    count = min(len(steps), len(route))
    for number in range(count):
        if steps[number].component != route[number].component:
            break
        steps[number] = route[number]
    for number in range(-1, -count - 1, -1):
        if steps[number].component != route[number].component:
            break
        steps[number] = route[number]
    return tuple(steps)


def children_of(value: object) -> list[tuple[str, Any]] | None:
    """The children of a container with their path components; None for a leaf (also a set: items have no places)."""
    if isinstance(value, dict):
        return list(zip(_components(list(dict.keys(value))), dict.values(value), strict=True))
    if isinstance(value, tuple) and isinstance(getattr(value, "_fields", None), tuple):
        return list(zip(component_of(value._fields), value, strict=True))  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple, deque)):
        return [(str(index), child) for index, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [(component, getattr(value, name)) for component, name in zip(component_of(fields), fields, strict=True)]
    return None


def _components(keys: list[Any]) -> list[str]:
    """The path components of a dict's keys, as ``flatten`` names them."""
    return component_of(keys if all(map(fits_path, keys)) else range(len(keys)))


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


def routes_of(value: object) -> Iterator[tuple[Route, Any]]:
    """The same leaves, each with the way to it from ``value``."""
    pending: list[tuple[Route, object]] = [((), value)]
    while pending:
        route, value = pending.pop()
        children = children_of(value)
        if not children:
            yield route, value
            continue
        keys = list(dict.keys(value)) if isinstance(value, dict) else [TEXT] * len(children)
        from_dict = type(value) is dict
        for (component, child), key in zip(reversed(children), reversed(keys), strict=True):
            pending.append(((*route, Step(component, key, from_dict)), child))


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


def lay_over(value: Any, replacements: Iterable[tuple[Route, Any]]) -> tuple[Any, dict[Route, Any]]:
    """Put new leaves into a nested state.

    In a dict a step leads to the very key that it has; where that is not there, or not known, to the one of the same
    component. A new key finds a place in a dict, and so does what lies in plain dicts below a new key.

    Args:
        value: the state; it is not changed.
        replacements: the new leaves, and the ways to them.

    Returns:
        The new state, which shares all that is not replaced; and of each leaf that found a place, by its route, what
        stood there before: None for nothing.
    """
    root = _Node(Step(""))
    for route, leaf in replacements:
        node = root
        for step in route:
            node = node.below.setdefault((step.component, _typed(step.key)), _Node(step))
        node.route, node.leaf = route, leaf
    placed: dict[Route, Any] = {}
    return _lay(root, value, placed), placed


_ABSENT: Any = object()


@dataclasses.dataclass(slots=True)
class _Node:
    """New leaves by the steps to them: what lies at and below one place."""

    step: Step
    route: Route = ()
    leaf: Any = _ABSENT
    below: dict[Hashable, _Node] = dataclasses.field(default_factory=dict)


def _typed(key: Any) -> Hashable:
    """A key so that 1, 1.0 and True differ."""
    return type(key), key


class _Children:
    """The children of a container, and where steps lead among them."""

    def __init__(self, value: Any, children: list[tuple[str, Any]]) -> None:
        self._dict = value if isinstance(value, dict) else None
        keys = [] if self._dict is None else list(dict.keys(self._dict))
        self._are_counted = not all(map(fits_path, keys))
        self._by_key = {_typed(key): number for number, key in enumerate(keys)}
        self._by_component = {component: number for number, (component, _) in enumerate(children)}

    def position(self, step: Step) -> int | None:
        """Which child a step leads to; None where there is none."""
        if self._dict is not None and step.key is not TEXT:
            number = self._by_key.get(_typed(step.key))
            # a number in a path that only counts says nothing about keys
            if number is not None or self._are_counted or not fits_path(step.key):
                return number
        return self._by_component.get(step.component)

    def new_key(self, step: Step) -> Any:
        """The key that a step gets where it leads to no child; ``_ABSENT`` where it can get none."""
        if self._dict is None:
            return _ABSENT
        if step.key is not TEXT:
            return step.key
        return _ABSENT if self._are_counted else _key_of(step.component, self._dict)


def _lay(node: _Node, value: Any, placed: dict[Route, Any]) -> Any:
    if node.leaf is not _ABSENT:
        placed[node.route] = value
        return node.leaf
    children = children_of(value)
    if not node.below or children is None:
        return value
    num_placed = len(placed)
    places = _Children(value, children)
    laid = [child for _, child in children]
    fresh: dict[Any, Any] = {}
    for inner in node.below.values():
        number = places.position(inner.step)
        if number is not None:
            laid[number] = _lay(inner, laid[number], placed)
        elif (key := places.new_key(inner.step)) is not _ABSENT and (made := _made(inner, placed)) is not _ABSENT:
            fresh[key] = made
    if len(placed) == num_placed:
        return value
    result = _with_children(value, laid)
    for key, leaf in fresh.items():
        result[key] = leaf
    return result


def _made(node: _Node, placed: dict[Route, Any]) -> Any:
    """What stands at a place that was empty: a leaf, or plain dicts with leaves in them; else ``_ABSENT``."""
    if node.leaf is not _ABSENT:
        placed[node.route] = None
        return node.leaf
    # a name that somebody has mistyped makes no dict
    if node.step.key is TEXT or not all(inner.step.from_dict for inner in node.below.values()):
        return _ABSENT
    made = {inner.step.key: _made(inner, placed) for inner in node.below.values()}
    return {key: child for key, child in made.items() if child is not _ABSENT}


def _key_of(component: str, siblings: Mapping[Any, Any]) -> str | int | bool:
    """The key that a component of a path most likely stands for, in a dict that has others."""
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
