"""The kinds of containers, taken apart and put together: one table for plain values and for containers of tensors.

A container is a kind's name, keys (for mappings), children, and a plain context: class name, attributes, a deque's
``maxlen``. Classes are stored by name only. They come back from what ``Resolve`` gives (the restore's target, or
torch's list of safe globals); without one the plain base is built: dict for a dataclass, tuple for a namedtuple, the
value for an Enum. Nothing is ever imported because a stored name asks for it.

What doesn't live here: values without children (``atoms``), bytes (``values``), tensors (``tensors``, ``composites``).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

Resolve = Callable[[str], "type | None"]
"""The class of a stored ``module.qualname``, or None where the process offers none."""

Context = Mapping[str, Any]

_FACTORIES: Mapping[str, Callable[[], Any]] = {
    factory.__name__: factory
    for factory in (
        bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, OrderedDict, Counter, deque
    )
}  # fmt: skip
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}

_SLOTS_WITHOUT_CONTENT = frozenset({"__dict__", "__weakref__"})


@dataclass(frozen=True, slots=True)
class Apart:
    """A container taken apart. ``keys`` is None for sequences and sets; ``context`` is None where there is none."""

    kind: str
    keys: Sequence[Any] | None
    children: Sequence[Any]
    context: Context | None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of container: its name in entries, its code in stored values, its base class, mapping or not."""

    name: str
    code: int
    base: type
    mapping: bool


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("list", 1, list, False),
        Kind("tuple", 2, tuple, False),
        Kind("set", 3, set, False),
        Kind("frozenset", 4, frozenset, False),
        Kind("deque", 5, deque, False),
        Kind("dict", 6, dict, True),
        Kind("OrderedDict", 7, OrderedDict, True),
        Kind("Counter", 8, Counter, True),
        Kind("defaultdict", 9, defaultdict, True),
        Kind("namedtuple", 10, tuple, True),
        Kind("dataclass", 11, dict, True),
    )
}
KINDS_BY_CODE: Mapping[int, Kind] = {kind.code: kind for kind in KINDS.values()}

# bases before their own bases
CONTAINER_BASES: tuple[type, ...] = (OrderedDict, Counter, defaultdict, dict, list, tuple, set, frozenset, deque)
ATOM_BASES: tuple[type, ...] = (str, bytes, bytearray, int, float, complex)


def class_name(kind: type) -> str:
    """How a class is named in stored values."""
    return f"{kind.__module__}.{kind.__qualname__}"


def safe_class(name: str) -> type | None:
    """The class of that name in torch's list of safe globals, or None."""
    for offered in torch.serialization.get_safe_globals():
        if isinstance(offered, tuple):
            found, offered_name = offered
        else:
            found, offered_name = offered, None
        if isinstance(found, type) and name in (offered_name, class_name(found)):
            return found
    return None


_WITHOUT_CLASSES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, torch.Tensor})


def classes_in(value: object) -> dict[str, type]:
    """Every class that a state's containers and leaves are of, by name. Visits each object once."""
    found: dict[str, type] = {}
    seen: set[int] = set()
    ahead: list[object] = [value]
    while ahead:
        value = ahead.pop()
        kind = type(value)
        if kind in _WITHOUT_CLASSES or id(value) in seen:
            continue
        seen.add(id(value))
        found[class_name(kind)] = kind
        if isinstance(value, dict):
            ahead.extend(dict.keys(value))
            ahead.extend(dict.values(value))
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            ahead.extend(value)
        elif dataclasses.is_dataclass(kind):
            ahead.extend(getattr(value, field.name, None) for field in dataclasses.fields(kind))
        else:
            # nobody else's attributes are stored, and walking them could lead anywhere
            continue
        ahead.extend(getattr(value, "__dict__", {}).values())
    return found


def attributes_of(value: Any, base: type) -> dict[str, Any] | str:
    """What an instance of a subclass holds beside the content of its base, or why that cannot be told."""
    for each in type(value).__mro__:
        if each is base:
            break
        slots = each.__dict__.get("__slots__", ())
        if not _SLOTS_WITHOUT_CONTENT.issuperset((slots,) if isinstance(slots, str) else slots):
            return f"its class {class_name(each)} has slots"
    return dict(getattr(value, "__dict__", ()))


def take_apart(value: Any, base: type | None = None) -> Apart | str:
    """Take a container apart.

    Args:
        value: an instance of one of the kinds.
        base: the kind's base class where ``value`` is of a subclass.

    Returns:
        Its parts, or why it has content that its kind cannot hold.
    """
    kind = type(value)
    if dataclasses.is_dataclass(kind) and base is None:
        return _take_dataclass_apart(value)
    context: dict[str, Any] = {}
    if base is None or base is kind:
        base = kind
        if kind is OrderedDict and vars(value):
            context["attributes"] = dict(vars(value))
    else:
        context["class"] = class_name(kind)
        attributes = attributes_of(value, base)
        if isinstance(attributes, str):
            return attributes
        if attributes:
            context["attributes"] = attributes
    if base is tuple and isinstance(getattr(kind, "_fields", None), tuple):
        return Apart("namedtuple", kind._fields, tuple(value), context)
    if base is defaultdict:
        factory = value.default_factory
        if factory is not None and factory not in _FACTORY_NAMES:
            return f"its default_factory {factory!r} is not a builtin"
        context["factory"] = None if factory is None else _FACTORY_NAMES[factory]
    elif base is deque:
        context["maxlen"] = value.maxlen
    elif base is tuple and getattr(kind, "n_fields", 0) > getattr(kind, "n_sequence_fields", 0):
        return "it has fields beyond its items"
    name = base.__name__
    if KINDS[name].mapping:
        return Apart(name, list(dict.keys(value)), list(dict.values(value)), context or None)
    return Apart(name, None, list(value), context or None)


def _take_dataclass_apart(value: Any) -> Apart | str:
    names = [field.name for field in dataclasses.fields(value)]
    missing = [name for name in names if not hasattr(value, name)]
    if missing:
        return f"its fields {missing} were never set"
    context: dict[str, Any] = {"class": class_name(type(value))}
    attributes = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in set(names)}
    if attributes:
        context["attributes"] = attributes
    return Apart("dataclass", names, [getattr(value, name) for name in names], context)


def put_together(apart: Apart, resolve: Resolve) -> Any:
    """The inverse of :func:`take_apart`.

    Raises:
        KeyError, TypeError, ValueError: what is stored makes no such container.
    """
    context = apart.context or {}
    kind = KINDS[apart.kind]
    found = resolve(context["class"]) if "class" in context else None
    keys, children = apart.keys, apart.children
    if kind.mapping and (keys is None or len(keys) != len(children)):
        raise ValueError(f"{apart.kind} with {keys and len(keys)} keys for {len(children)} children")
    if kind.name == "dataclass":
        return _put_dataclass_together(dict(zip(keys or (), children, strict=True)), context, found)
    if kind.name == "namedtuple":
        return _put_namedtuple_together(tuple(keys or ()), children, context, found)
    target = found if found is not None and issubclass(found, kind.base) else kind.base
    value = _fill(target, kind, keys, children, context)
    attributes = context.get("attributes")
    if attributes and (target is not kind.base or target is OrderedDict):
        vars(value).update(attributes)
    return value


def _fill(target: type, kind: Kind, keys: Sequence[Any] | None, children: Sequence[Any], context: Context) -> Any:
    """Build by the base's own methods: what a subclass overrides is not run."""
    base: Any = kind.base
    if base in (tuple, frozenset):
        if target is not base and hasattr(target, "n_sequence_fields"):
            return target(children)
        return base.__new__(target, children)
    value = base.__new__(target)
    if base is list:
        list.extend(value, children)
    elif base is set:
        set.update(value, children)
    elif base is deque:
        deque.__init__(value, children, context["maxlen"])
    else:
        if base is defaultdict:
            factory = context["factory"]
            defaultdict.__init__(value, None if factory is None else _FACTORIES[factory])
        store = OrderedDict.__setitem__ if base is OrderedDict else dict.__setitem__
        for key, child in zip(keys or (), children, strict=True):
            store(value, key, child)
    return value


def _put_dataclass_together(fields: dict[str, Any], context: Context, found: type | None) -> Any:
    if found is None or not dataclasses.is_dataclass(found):
        return fields
    known = {field.name: field for field in dataclasses.fields(found)}
    if not fields.keys() <= known.keys():
        return fields
    for name, field in known.items():
        if name in fields:
            continue
        if field.default is not dataclasses.MISSING:
            fields[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            fields[name] = field.default_factory()
        else:
            return fields
    value = found.__new__(found)
    for name, item in {**fields, **context.get("attributes", {})}.items():
        # also where the class is frozen
        object.__setattr__(value, name, item)
    return value


def _put_namedtuple_together(
    fields: tuple[Any, ...], children: Iterable[Any], context: Context, found: type | None
) -> Any:
    if found is None or not issubclass(found, tuple) or getattr(found, "_fields", None) != fields:
        return tuple(children)
    value = tuple.__new__(found, children)
    if context.get("attributes"):
        vars(value).update(context["attributes"])
    return value


def put_enum_together(name: str, value: Any, resolve: Resolve) -> Any:
    """The member with that value, or the value itself where there is no such class or member."""
    found = resolve(name)
    if found is None or not issubclass(found, Enum):
        return value
    try:
        return found(value)
    except (ValueError, TypeError):
        return value


def put_subclass_together(name: str, value: Any, attributes: Context, resolve: Resolve) -> Any:
    """An instance of a str, bytes, int, float or complex subclass, or its plain base."""
    found = resolve(name)
    base: Any = type(value)
    if found is None or base not in ATOM_BASES or not issubclass(found, base):
        return value
    built = base.__new__(found, value) if base is not bytearray else bytearray.__new__(found)
    if base is bytearray:
        built.extend(value)
    if attributes:
        vars(built).update(attributes)
    return built
