"""Plain values: every kind comes back as it was, without pickle and without an import."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import datetime
import decimal
import enum
import io
import math
import pathlib
import pickletools
import struct
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_states import same

from torchsnapshot.errors import FormatError, SnapshotError
from torchsnapshot.state import values
from torchsnapshot.state.values import NotPlain, decode, encode, is_plain


class Color(enum.Enum):
    RED = 1
    DEEP = ("a", 2)


class Level(enum.IntEnum):
    LOW = 1


class Mode(str, enum.Enum):
    FAST = "fast"


class Options(enum.Flag):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Progress:
    step: int
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: int


@dataclasses.dataclass
class Grown:
    """``Progress`` of a later version of some program."""

    step: int
    names: list[str]
    note: str = "none"


class Point(NamedTuple):
    x: int
    y: int


class MyDict(dict):  # type: ignore[type-arg]
    """Its methods must not be run by decoding."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError


class MyList(list):  # type: ignore[type-arg]
    pass


class MyOrdered(collections.OrderedDict):  # type: ignore[type-arg]
    pass


class MyStr(str):
    def __str__(self) -> str:
        return "lies"


class MyInt(int):
    pass


class MyFloat(float):
    pass


class MyBytes(bytes):
    pass


class MyTuple(tuple):  # type: ignore[type-arg]
    pass


class WithSlots(list):  # type: ignore[type-arg]
    __slots__ = ("hidden",)


OWN = (
    Color,
    Level,
    Mode,
    Options,
    Progress,
    Frozen,
    Point,
    MyDict,
    MyList,
    MyOrdered,
    MyStr,
    MyInt,
    MyFloat,
    MyBytes,
    MyTuple,
)
BY_NAME = {f"{each.__module__}.{each.__qualname__}": each for each in OWN}


def ordered_with_metadata() -> collections.OrderedDict[str, int]:
    """What a module's state dict looks like."""
    state = collections.OrderedDict(a=1)
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


def positioned() -> io.BytesIO:
    """A stream that is not at its start."""
    stream = io.BytesIO(b"content")
    stream.seek(3)
    return stream


EVERY_KIND: list[Any] = [
    None,
    True,
    0,
    -1,
    (1 << 63) - 1,
    1 << 64,
    -(1 << 63) - 1,
    1 << 4000,
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    5e-324,
    1j,
    complex(-0.0, math.nan),
    "",
    "a/b%c 🔥",
    "\ud800",
    b"\x00",
    bytearray(b"xy"),
    positioned(),
    [],
    [1, [2, [3]]],
    (),
    (1, (2,)),
    {},
    {"1": 1, 1: 2, "True": 3, None: 4, 2.5: 5, b"k": 6, (1, "x"): 7, frozenset({1}): 8},
    {True: "a"},
    {1, "a", (1, 2)},
    set(),
    frozenset({b"x"}),
    collections.deque([1, 2], maxlen=5),
    collections.deque(),
    collections.OrderedDict([("b", 1), ("a", 2)]),
    ordered_with_metadata(),
    collections.Counter("hello"),
    collections.defaultdict(list, a=[1]),
    collections.defaultdict(None, a=1),
    range(3, 1 << 70, 2),
    slice(None, 3, -1),
    torch.float32,
    torch.float8_e4m3fn,
    torch.device("cpu"),
    torch.device("cuda", 3),
    torch.Size([2, 3]),
    torch.strided,
    torch.sparse_csr,
    torch.channels_last,
    datetime.datetime(2024, 2, 29, 12, 30, 1, 5, fold=1),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "here")),
    datetime.date(1, 1, 1),
    datetime.time(23, 59, 59, 999999, datetime.timezone.utc, fold=1),
    datetime.timedelta(days=-1, microseconds=7),
    datetime.timezone(datetime.timedelta(minutes=90)),
    uuid.UUID(int=5),
    decimal.Decimal("-1.2300E+400"),
    decimal.Decimal("sNaN12"),
    pathlib.PurePosixPath("/a/../b"),
    pathlib.PureWindowsPath("C:\\x"),
    pathlib.Path("rel"),
    numpy.float32(1.5),
    numpy.float64(math.nan),
    numpy.bool_(True),
    numpy.int8(-3),
    numpy.complex64(1j),
    numpy.float16(0.1),
    numpy.datetime64("2024-02-29T01:02:03", "ms"),
    numpy.timedelta64(5, "h"),
    numpy.str_("é"),
    numpy.bytes_(b"ab"),
    numpy.longdouble(1) / 3,
    numpy.array([(1, 2.5)], dtype=[("a", "i4"), ("b", ">f8")])[0],
    numpy.dtype("int16"),
    numpy.dtype([("a", "i1"), ("b", "f8", (2, 2))], align=True),
    Color.RED,
    Color.DEEP,
    Level.LOW,
    Mode.FAST,
    Options.ONE | Options.TWO,
    Progress(3, ["a"]),
    Frozen(1),
    Point(1, 2),
    MyDict(a=1),
    MyList([1]),
    MyOrdered(b=1, a=2),
    MyStr("x"),
    MyInt(1 << 80),
    MyFloat(0.5),
    MyBytes(b"x"),
    MyTuple((1, 2)),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters()),
    st.binary(),
    st.complex_numbers(),
    st.decimals(allow_nan=False),
    st.datetimes(timezones=st.just(datetime.timezone.utc)),
    st.timedeltas(),
    st.uuids(),
    st.sampled_from([torch.int64, torch.device("meta"), numpy.float32(2), Color.RED, Point(1, 2), range(5)]),
)
hashables = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(lambda items: collections.deque(items, 4)),
        st.dictionaries(hashables, inner, max_size=4),
        st.dictionaries(st.text(), inner, max_size=4).map(collections.OrderedDict),
        st.sets(hashables, max_size=4),
        st.dictionaries(st.text(), inner, max_size=3).map(MyDict),
        inner.map(lambda value: Progress(1, value)),
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("value", EVERY_KIND, ids=lambda value: type(value).__name__)
def test_every_kind_comes_back_as_it_was(value: Any) -> None:
    """Type, content, order and every bit; alone, in a list, and as a value of a dict."""
    assert same(decode(encode(value), BY_NAME.get), value)
    assert same(decode(encode([value, {"k": value}]), BY_NAME.get), [value, {"k": value}])
    assert is_plain(value)


@given(trees)
def test_trees_come_back_as_they_were(tree: Any) -> None:
    """Any nesting of plain kinds; what was read encodes to the same bytes again."""
    data = encode(tree)
    back = decode(data, BY_NAME.get)
    assert same(back, tree)
    assert encode(back) == data


def test_equal_sets_give_equal_bytes() -> None:
    """The order in which a set was filled, or hashes its strings, leaves no trace: unchanged values are not new."""
    names = [str(number) for number in range(100)]
    other_order = set()
    for name in reversed(names):
        other_order.add(name)
    assert encode(set(names)) == encode(other_order)


@pytest.mark.parametrize("bits", [0x7FF8000000000001, 0xFFF8DEADBEEF0001, 0x7FF0000000000001])
def test_the_payload_of_a_nan_survives(bits: int) -> None:
    """A float is 64 bits, also where it is no number."""
    (nan,) = struct.unpack("<d", struct.pack("<Q", bits))
    assert struct.pack("<d", decode(encode({"x": nan}))["x"]) == struct.pack("<d", nan)


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Color.DEEP, ("a", 2)),
        (Level.LOW, 1),
        (Progress(3, ["a"]), {"step": 3, "names": ["a"]}),
        (Point(1, 2), (1, 2)),
        (MyDict(a=1), {"a": 1}),
        (MyOrdered(b=1), collections.OrderedDict(b=1)),
        (MyList([1]), [1]),
        (MyTuple((1,)), (1,)),
        (MyStr("x"), "x"),
        (MyInt(5), 5),
        (MyBytes(b"x"), b"x"),
    ],
)
def test_a_class_that_nobody_offers_becomes_its_plain_base(value: Any, base: Any) -> None:
    """Content is never lost, only the class."""
    assert same(decode(encode(value)), base)


def test_classes_come_back_from_safe_globals() -> None:
    """A class that torch was told to trust needs no target."""
    data = encode([Color.RED, Progress(1)])
    with torch.serialization.safe_globals([Color, (Progress, f"{__name__}.Progress")]):
        assert decode(data) == [Color.RED, Progress(1)]
    assert decode(data) == [1, {"step": 1, "names": []}]


def test_a_class_of_the_wrong_make_is_not_used() -> None:
    """Whatever stands under a name: a class is only built from content of its own kind."""
    wrong: Callable[[str], type | None] = lambda name: MyStr  # noqa: E731
    for value, base in [
        (Color.RED, 1),
        (Progress(1), {"step": 1, "names": []}),
        (Point(1, 2), (1, 2)),
        (MyList([1]), [1]),
    ]:
        assert same(decode(encode(value), wrong), base)


def test_a_dataclass_that_has_grown_a_field_takes_its_default() -> None:
    """New fields with defaults don't lose the class; fields that are gone do, and the content stays as a dict."""
    data = encode(Progress(3, ["a"]))
    assert decode(data, lambda name: Grown) == Grown(3, ["a"], "none")
    assert decode(data, lambda name: Frozen) == {"step": 3, "names": ["a"]}


def test_an_enum_without_the_member_gives_its_value() -> None:
    """A member that was removed since is no error."""
    assert decode(encode(Color.RED), lambda name: Mode) == 1


def test_attributes_of_subclasses_survive_with_their_class() -> None:
    """A list that carries more than its items comes back with it; attributes that are not plain make it opaque."""
    value = MyList([1])
    value.note = "n"  # type: ignore[attr-defined]
    back = decode(encode(value), BY_NAME.get)
    assert (back, vars(back)) == ([1], {"note": "n"})
    value.note = object()  # type: ignore[attr-defined]
    assert not is_plain(value)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        len,
        lambda: None,
        torch.zeros(1),
        numpy.zeros(1),
        numpy.array([None])[0:1],
        collections.defaultdict(lambda: 0),
        WithSlots(),
        time.gmtime(),
        slice(object()),
        {object(): 1},
        datetime.datetime(2024, 1, 1, tzinfo=type("Zone", (datetime.tzinfo,), {})()),
        Ellipsis,
        numpy.void,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_in_no_table_is_not_plain(value: Any) -> None:
    """It is refused, never stored as something similar."""
    assert not is_plain(value)
    with pytest.raises(NotPlain):
        encode(value)


def test_the_error_says_where_the_value_is() -> None:
    """The path counts from the outermost container."""
    with pytest.raises(NotPlain) as caught:
        encode({"a": [1, {2: (0, object())}]})
    assert caught.value.path == ("a", 1, 2, 1)
    assert "'a/1/2/1'" in str(caught.value)
    assert isinstance(caught.value, SnapshotError)


def test_cycles_and_bottomless_nesting_are_errors() -> None:
    """Neither hangs, nor ends in a RecursionError."""
    cycle: list[Any] = [1]
    cycle.append({"x": cycle})
    with pytest.raises(NotPlain, match="contains itself"):
        encode(cycle)
    deep: Any = 0
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(NotPlain, match="levels deep"):
        encode(deep)


def test_an_object_in_two_places_is_no_cycle() -> None:
    """Shared plain objects are stored twice."""
    shared = [1, (2, None)]
    assert decode(encode([shared, {"a": shared}])) == [shared, {"a": shared}]


def test_decoding_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stored name leads to an import, and stored bytes are no pickle."""
    data = encode(EVERY_KIND)

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"import of {name}")

    monkeypatch.setattr(builtins, "__import__", refuse)
    back = decode(data)
    monkeypatch.undo()
    assert len(back) == len(EVERY_KIND)
    with pytest.raises(ValueError):
        pickletools.dis(data, out=io.StringIO())


def test_numpy_scalars_need_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process has not imported numpy the error says what to do, and everything else decodes."""
    data, plain = encode(numpy.float32(1)), encode([1, (2, torch.float32)])
    monkeypatch.delitem(sys.modules, "numpy")
    with pytest.raises(FormatError, match="import numpy"):
        decode(data)
    assert decode(plain) == [1, (2, torch.float32)]


def test_values_of_later_versions_are_named_as_such() -> None:
    """An unknown kind is an error about versions, not a wrong value."""
    import msgpack

    with pytest.raises(FormatError, match="newer version"):
        decode(msgpack.packb(msgpack.ExtType(120, msgpack.packb(1))))


@given(st.binary(max_size=40))
def test_hostile_bytes_give_a_format_error(data: bytes) -> None:
    """Whatever the bytes: a value or a FormatError, nothing else."""
    try:
        decode(data)
    except FormatError:
        pass


@given(st.sampled_from([encode(value) for value in EVERY_KIND]), st.data())
def test_damaged_values_give_a_format_error(data: bytes, draw: st.DataObject) -> None:
    """One changed byte in any kind gives another value or a FormatError."""
    place = draw.draw(st.integers(0, len(data) - 1))
    damaged = data[:place] + bytes([draw.draw(st.integers(0, 255))]) + data[place + 1 :]
    try:
        decode(damaged, BY_NAME.get)
    except FormatError:
        pass


def test_extensions_nested_too_deep_are_refused() -> None:
    """A small file cannot exhaust the stack."""
    import msgpack

    data = msgpack.packb(None)
    for _ in range(3000):
        data = msgpack.packb(msgpack.ExtType(2, b"\x92\xc0" + data))
    with pytest.raises(FormatError):
        decode(data)


def test_the_table_of_kinds_is_closed() -> None:
    """Every code stands once, so that a stored value has one meaning."""
    codes = [atom.code for atom in values.ATOMS] + [kind.code for kind in values.KINDS.values()]
    codes += [values.BIG_INT_CODE, values._ENUM_CODE, values._SUBCLASS_CODE]
    assert len(codes) == len(set(codes))
    assert all(0 < code < 128 for code in codes)
