"""Plain values ↔ bytes, without pickle: a closed table of kinds over msgpack.

Exact None, bool, int (64 bits), float, str, bytes, list and dict are msgpack's own; every other kind is an extension
whose code stands in ``atoms``, ``kinds`` or here, and whose payload is msgpack again. ``Lowering`` walks a state once
and turns each subtree into something that msgpack packs in C, or, where the subtree holds what is not plain, into a
``Branch`` with its children: ``flatten`` stores those child by child.

Decoding imports nothing and builds only kinds of the table; a class comes back through ``resolve`` alone. What doesn't
live here: tensors and arrays, which are never part of a plain value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgpack
import torch

from torchsnapshot.errors import FormatError, SnapshotError
from torchsnapshot.state import dtypes
from torchsnapshot.state.atoms import (
    ATOMS,
    BIG_INT_CODE,
    CANNOT,
    NUMPY_DTYPE,
    NUMPY_SCALAR,
    Atom,
    big_int_from_bytes,
    big_int_to_bytes,
)
from torchsnapshot.state.kinds import (
    ATOM_BASES,
    CONTAINER_BASES,
    KINDS,
    KINDS_BY_CODE,
    Apart,
    Context,
    Resolve,
    attributes_of,
    class_name,
    put_enum_together,
    put_subclass_together,
    put_together,
    safe_class,
    take_apart,
)
from torchsnapshot.store.bounded import check_lengths

MAX_DEPTH = 100
"""How deep containers may be nested in a state; entries are allowed a little more."""

_MAX_EXTENSION_DEPTH = MAX_DEPTH + 8
# msgpack's one-shot function keeps about 40 KB on the C stack of its thread
_MAX_ONE_SHOT_DEPTH = 8
_TUPLE_CODE = KINDS["tuple"].code
_ENUM_CODE = 64
_SUBCLASS_CODE = 65

SCALARS = frozenset({type(None), bool, int, float, str, bytes})
"""Exact types that msgpack holds as they are."""

Key = Any
Lowered = Any
"""What msgpack packs without our help: scalars, lists, dicts and ``msgpack.ExtType``."""

_CONTAINER_TYPES = frozenset(kind.base for kind in KINDS.values())
_ATOMS_BY_TYPE: Mapping[type, Atom] = {kind: atom for atom in ATOMS for kind in atom.types}
_ATOMS_BY_CODE: Mapping[int, Atom] = {atom.code: atom for atom in ATOMS}


class NotPlain(SnapshotError, TypeError):
    """The value, or something in it, is of no plain kind.

    ``path`` holds the keys that lead to it, outermost first; ``type_name`` is the type found there.
    """

    def __init__(self, type_name: str, reason: str, path: tuple[Key, ...] = ()) -> None:
        self.type_name = type_name
        self.reason = reason
        self.path = path
        super().__init__(type_name, reason, path)

    def __str__(self) -> str:
        where = f" at {'/'.join(map(str, self.path))!r}" if self.path else ""
        return f"{self.type_name}{where} is not a plain value: {self.reason}"


class Special:
    """Base of what a subtree becomes that is no plain value."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Branch(Special):
    """A container with at least one special child. Plain children are lowered already.

    ``keys`` is None for sequences and sets; ``context`` is plain.
    """

    kind: str
    keys: Sequence[Key] | None
    children: Sequence[Lowered | Special]
    context: Context | None


Other = Callable[[Any, str], "Lowered | Special"]
"""What to make of a value that is of no plain kind: (value, reason)."""

_Handler = Callable[["Lowering", Any], "Lowered | Special"]


def _refuse(value: Any, reason: str) -> Special:
    raise NotPlain(class_name(type(value)), reason)


class Lowering:
    """One walk over a state. Every object is visited once for each place where it stands."""

    def __init__(self, other: Other, broken: Other | None = None, above: Iterable[int] = ()) -> None:
        """
        Args:
            other: told of each value of no plain kind; what it returns takes the value's place.
            broken: told of each value that no kind of storage can hold (a cycle, nesting too deep).
            above: the ids of the containers around the value, each of which makes it nested one level deeper.
        """
        self._other = other
        self._broken = broken or other
        self._inside: set[int] = set(above)
        # functions that take the walk as argument: methods would make it a cycle, which keeps tensors alive
        self._handlers: dict[type, _Handler] = {}

    def lower(self, value: Any) -> Lowered | Special:
        """Turn a value into what msgpack packs, or into a special node."""
        kind = type(value)
        if kind in SCALARS:
            return value
        handler = self._handlers.get(kind)
        if handler is None:
            handler = self._handlers[kind] = _handler(kind)
        return handler(self, value)

    def _not_plain(self, value: Any) -> Lowered | Special:
        return self._other(value, "its type is not in the table of plain kinds")

    def _atom(self, atom: Atom, value: Any) -> Lowered | Special:
        content = atom.reduce(value)
        if content is CANNOT:
            return self._other(value, "its numpy type is not made of plain bytes")
        return self._extension(atom.code, content, value)

    def _enum(self, value: Enum) -> Lowered | Special:
        return self._extension(_ENUM_CODE, [class_name(type(value)), value.value], value)

    def _subclass(self, value: Any, base: Any) -> Lowered | Special:
        attributes = attributes_of(value, base)
        if isinstance(attributes, str):
            return self._other(value, attributes)
        # the base's own methods: what the subclass overrides is not asked
        if base is str:
            content: Any = str.__str__(value)
        elif base in (bytes, bytearray):
            content = base(memoryview(value))
        else:
            content = base.__pos__(value)
        return self._extension(_SUBCLASS_CODE, [class_name(type(value)), content, attributes], value)

    def _extension(self, code: int, content: Any, value: Any) -> Lowered | Special:
        if type(content) is not list or not SCALARS.issuperset(map(type, content)):
            content = self._plain_only(content)
        if content is _NOT_PLAIN:
            return self._other(value, "what it holds is not plain")
        return msgpack.ExtType(code, pack(content))

    def _plain_only(self, content: Any) -> Lowered:
        """Lower content that cannot be stored child by child; ``_NOT_PLAIN`` where some of it is special."""
        quiet = Lowering(_refuse)
        quiet._inside = self._inside
        try:
            return quiet.lower(content)
        except NotPlain:
            return _NOT_PLAIN

    def _obstacle(self, value: Any) -> str | None:
        """Why the walk must not go into ``value``: cycles and bottomless nesting end in an error."""
        if id(value) in self._inside:
            return "it contains itself"
        if len(self._inside) >= MAX_DEPTH:
            return f"it is nested more than {MAX_DEPTH} levels deep"
        return None

    def _container(self, value: Any, base: type | None = None) -> Lowered | Special:
        kind = type(value)
        # a fast path for what most states are full of: numbers in plain lists, tuples and dicts
        if kind is dict:
            if SCALARS.issuperset(map(type, value)) and SCALARS.issuperset(map(type, value.values())):
                return value
        elif (kind is list or kind is tuple) and SCALARS.issuperset(map(type, value)):
            return value if kind is list else msgpack.ExtType(_TUPLE_CODE, pack([None, *value]))
        if (obstacle := self._obstacle(value)) is not None:
            return self._broken(value, obstacle)
        self._inside.add(id(value))
        try:
            return self._walk(value, base)
        finally:
            self._inside.discard(id(value))

    def _walk(self, value: Any, base: type | None) -> Lowered | Special:
        apart = take_apart(value, base)
        if isinstance(apart, str):
            return self._other(value, apart)
        context = None
        if apart.context is not None and (context := self._plain_only(apart.context)) is _NOT_PLAIN:
            return self._other(value, "its attributes are not plain")
        keys = apart.keys
        if keys is not None and not SCALARS.issuperset(map(type, keys)):
            keys = self._plain_only(keys)
            if keys is _NOT_PLAIN:
                return self._other(value, "its keys are not plain")
        children, special = self._children(apart.children, apart.keys)
        if special:
            return Branch(apart.kind, apart.keys, children, apart.context)
        if apart.kind == "list" and apart.context is None:
            return children
        if apart.kind == "dict" and apart.context is None:
            assert keys is not None
            return dict(zip(keys, children, strict=True))
        if apart.kind in ("set", "frozenset"):
            # the order of a set differs from process to process, and equal values shall give equal bytes
            children.sort(key=pack)
        if keys is not None:
            children = [part for pair in zip(keys, children, strict=True) for part in pair]
        return msgpack.ExtType(KINDS[apart.kind].code, pack([context, *children]))

    def _children(self, values: Sequence[Any], keys: Sequence[Key] | None) -> tuple[list[Lowered | Special], bool]:
        children: list[Lowered | Special] = []
        special = False
        handlers = self._handlers
        for value in values:
            kind = type(value)
            if kind not in SCALARS:
                handler = handlers.get(kind)
                try:
                    value = handler(self, value) if handler is not None else self.lower(value)
                except NotPlain as error:
                    index = len(children)
                    error.path = (index if keys is None else keys[index], *error.path)
                    raise
                special = special or isinstance(value, Special)
            children.append(value)
        return children, special


_NOT_PLAIN: Any = object()


def _handler(kind: type) -> _Handler:
    """How values of a type are lowered: exact type first, then numpy, then subclass."""
    if kind in _CONTAINER_TYPES:
        return Lowering._container
    if kind in _ATOMS_BY_TYPE:
        atom = _ATOMS_BY_TYPE[kind]
        return lambda walk, value: walk._atom(atom, value)
    numpy = dtypes.numpy_module()
    if numpy is not None and issubclass(kind, numpy.generic):
        return lambda walk, value: walk._atom(NUMPY_SCALAR, value)
    if numpy is not None and issubclass(kind, numpy.dtype):
        return lambda walk, value: walk._atom(NUMPY_DTYPE, value)
    if issubclass(kind, torch.Tensor) or (numpy is not None and issubclass(kind, numpy.ndarray)):
        return Lowering._not_plain
    if issubclass(kind, Enum):
        return Lowering._enum
    for base in CONTAINER_BASES:
        if issubclass(kind, base):
            return functools.partial(Lowering._container, base=base)
    for base in ATOM_BASES:
        if issubclass(kind, base):
            return functools.partial(Lowering._subclass, base=base)
    return Lowering._container if dataclasses.is_dataclass(kind) else Lowering._not_plain


def pack(lowered: Lowered) -> bytes:
    """Lowered value → bytes.

    Raises:
        NotPlain: a part of it is larger than 4 GiB.
    """
    try:
        packed = msgpack.packb(
            lowered, use_bin_type=True, strict_types=True, unicode_errors="surrogatepass", default=_pack_rest
        )
    except ValueError as error:
        raise NotPlain(class_name(type(lowered)), f"a part of it is too large ({error})") from error
    return bytes(packed)


def _pack_rest(value: Any) -> msgpack.ExtType:
    """What msgpack's C code cannot pack of what ``Lowering`` let through: ints beyond 64 bits."""
    if type(value) is not int:
        raise TypeError(f"{type(value)} was not lowered")
    return msgpack.ExtType(BIG_INT_CODE, big_int_to_bytes(value))


def encode(value: Any) -> bytes:
    """A plain value as bytes. Equal values give equal bytes, except for the order of dicts.

    Raises:
        NotPlain: it, or something in it, is of no plain kind.
    """
    return pack(Lowering(_refuse).lower(value))


def is_plain(value: Any) -> bool:
    """Whether :func:`encode` can hold the value."""
    if type(value) in SCALARS:
        return True
    try:
        Lowering(_refuse).lower(value)
    except NotPlain:
        return False
    return True


def decode(data: bytes | memoryview, resolve: Resolve | None = None) -> Any:
    """The inverse of :func:`encode`.

    Args:
        data: what ``encode`` returned.
        resolve: gives the class of a stored name; without it only torch's safe globals are offered.

    Raises:
        FormatError: the bytes are no encoded value, or need numpy where it is not imported.
    """
    try:
        return _Building(resolve or safe_class).unpack(data)
    except FormatError:
        raise
    except Exception as error:
        # whatever bad bytes provoke in a constructor: it is the bytes that are wrong
        raise FormatError(f"a stored value cannot be decoded: {type(error).__name__}: {error}") from error


class _Building:
    """Decoding one value: nested extensions share the resolver and the bound on their depth."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._depth = 0
        self._options = {
            "raw": False,
            "strict_map_key": False,
            "unicode_errors": "surrogatepass",
            "ext_hook": self._extension,
        }

    def unpack(self, data: bytes | memoryview) -> Any:
        # msgpack allocates what a header asks for before it looks whether the bytes are there
        check_lengths(data, "a stored value")
        if self._depth < _MAX_ONE_SHOT_DEPTH:
            return msgpack.unpackb(data, **self._options)
        unpacker = msgpack.Unpacker(max_buffer_size=len(data), **self._options)
        unpacker.feed(data)
        value = unpacker.unpack()
        if unpacker.tell() != len(data):
            raise ValueError("bytes behind the end of a stored value")
        return value

    def _extension(self, code: int, payload: bytes) -> Any:
        if code == BIG_INT_CODE:
            return big_int_from_bytes(payload)
        self._depth += 1
        if self._depth > _MAX_EXTENSION_DEPTH:
            raise FormatError("a stored value is nested too deep")
        content = self.unpack(payload)
        self._depth -= 1
        if code in _ATOMS_BY_CODE:
            return _ATOMS_BY_CODE[code].build(content)
        if code in KINDS_BY_CODE:
            return put_together(_apart(KINDS_BY_CODE[code].name, content), self._resolve)
        if code == _ENUM_CODE:
            name, value = content
            return put_enum_together(name, value, self._resolve)
        if code == _SUBCLASS_CODE:
            name, value, attributes = content
            return put_subclass_together(name, value, attributes, self._resolve)
        raise FormatError(f"unknown kind {code} of a stored value; a newer version of the library may know it")


def _apart(kind: str, content: Iterable[Any]) -> Apart:
    context, *items = content
    if not KINDS[kind].mapping:
        return Apart(kind, None, items, context)
    if len(items) % 2:
        raise ValueError(f"a stored {kind} has a key without a value")
    return Apart(kind, items[::2], items[1::2], context)
