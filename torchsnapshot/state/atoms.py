"""The plain kinds without children of their own: how each is reduced to simpler values and built again.

A closed table: a kind that is not here is not plain. Reducing gives values that are nearer to numbers, strings and
bytes; building imports nothing, calls nothing that a stored name chose, and raises ordinary errors on bad input, which
``values`` turns into ``FormatError``. What doesn't live here: containers (``kinds``), bytes (``values``).
"""

from __future__ import annotations

import datetime
import io
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch

from torchsnapshot.state import dtypes

Content = Any
"""What a kind is reduced to: a value of kinds that come earlier in the table, or a list of such."""


CANNOT: Content = object()
"""Returned by a kind's ``reduce`` for a value that the table cannot hold."""


@dataclass(frozen=True, slots=True)
class Atom:
    """One kind: its code in the stored bytes, the exact types it is for, and the two directions."""

    code: int
    types: tuple[type, ...]
    reduce: Callable[[Any], Content]
    build: Callable[[Content], Any]


def _from_bytes_io(stream: io.BytesIO) -> Content:
    return [stream.getvalue(), stream.tell()]


def _to_bytes_io(content: Content) -> io.BytesIO:
    data, position = content
    stream = io.BytesIO(data)
    stream.seek(position)
    return stream


def _to_slice(content: Content) -> slice:
    start, stop, step = content
    return slice(start, stop, step)


def _named(kind: type) -> Mapping[str, Any]:
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is kind}


_TORCH_DTYPES = _named(torch.dtype)
_LAYOUTS = _named(torch.layout)
_MEMORY_FORMATS = _named(torch.memory_format)


def _from_torch_constant(value: object) -> str:
    return str(value).removeprefix("torch.")


def _to_torch_dtype(content: Content) -> Any:
    return _TORCH_DTYPES[content]


def _to_layout(content: Content) -> Any:
    return _LAYOUTS[content]


def _to_memory_format(content: Content) -> Any:
    return _MEMORY_FORMATS[content]


def _from_device(device: torch.device) -> Content:
    return [device.type, device.index]


def _to_device(content: Content) -> torch.device:
    kind, index = content
    return torch.device(kind) if index is None else torch.device(kind, index)


def _to_size(content: Content) -> torch.Size:
    return torch.Size(content)


def _from_time_of_day(value: datetime.time | datetime.datetime) -> list[Content]:
    return [value.hour, value.minute, value.second, value.microsecond, value.fold, value.tzinfo]


def _from_datetime(value: datetime.datetime) -> Content:
    return [value.year, value.month, value.day, *_from_time_of_day(value)]


def _to_datetime(content: Content) -> datetime.datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = content
    return datetime.datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)


def _to_date(content: Content) -> datetime.date:
    year, month, day = content
    return datetime.date(year, month, day)


def _to_time(content: Content) -> datetime.time:
    hour, minute, second, microsecond, fold, zone = content
    return datetime.time(hour, minute, second, microsecond, zone, fold=fold)


def _to_timedelta(content: Content) -> datetime.timedelta:
    days, seconds, microseconds = content
    return datetime.timedelta(days, seconds, microseconds)


def _from_timezone(zone: datetime.timezone) -> Content:
    # the only public way to tell a name that was given from one that is made up
    return list(zone.__getinitargs__())  # type: ignore[attr-defined]


def _to_timezone(content: Content) -> datetime.timezone:
    zone = datetime.timezone(*content)
    return datetime.timezone.utc if zone == datetime.timezone.utc and len(content) == 1 else zone


_PATHS: Mapping[str, type[pathlib.PurePath]] = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    # the other system's paths can only be held as pure ones
    "PosixPath": pathlib.PurePosixPath if os.name == "nt" else pathlib.PosixPath,
    "WindowsPath": pathlib.WindowsPath if os.name == "nt" else pathlib.PureWindowsPath,
}


def _from_path(path: pathlib.PurePath) -> Content:
    return [type(path).__name__, str(path)]


def _to_path(content: Content) -> pathlib.PurePath:
    kind, text = content
    return _PATHS[kind](text)


def _from_numpy_scalar(scalar: Any) -> Content:
    # a structured scalar's view of foreign memory may have any byte order: the name says which
    name = dtypes.numpy_name(scalar.dtype)
    if name is None:
        return CANNOT
    return [name, scalar.tobytes()]


def _to_numpy_scalar(content: Content) -> Any:
    name, data = content
    dtype = dtypes.numpy_dtype(name)
    if len(data) != dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for a numpy scalar of {dtype.itemsize}")
    numpy = dtypes.numpy_module()
    assert numpy is not None
    if not dtype.itemsize:
        return numpy.zeros((), dtype)[()]
    # a scalar of its own memory, also where it is structured
    return numpy.frombuffer(bytearray(data), dtype)[0]


def _from_numpy_dtype(dtype: Any) -> Content:
    name = dtypes.numpy_name(dtype)
    return CANNOT if name is None else name


def _from_complex(value: complex) -> Content:
    return [value.real, value.imag]


def _to_complex(content: Content) -> complex:
    real, imag = content
    return complex(real, imag)


def _from_range(value: range) -> Content:
    return [value.start, value.stop, value.step]


def _to_range(content: Content) -> range:
    start, stop, step = content
    return range(start, stop, step)


def _from_slice(value: slice) -> Content:
    return [value.start, value.stop, value.step]


def _from_date(value: datetime.date) -> Content:
    return [value.year, value.month, value.day]


def _from_timedelta(value: datetime.timedelta) -> Content:
    return [value.days, value.seconds, value.microseconds]


def _from_uuid(value: uuid.UUID) -> bytes:
    return value.bytes


def _to_uuid(content: Content) -> uuid.UUID:
    return uuid.UUID(bytes=content)


BIG_INT_CODE = 32
NUMPY_SCALAR = Atom(50, (), _from_numpy_scalar, _to_numpy_scalar)
NUMPY_DTYPE = Atom(51, (), _from_numpy_dtype, dtypes.numpy_dtype)

ATOMS: tuple[Atom, ...] = (
    Atom(33, (complex,), _from_complex, _to_complex),
    Atom(34, (bytearray,), bytes, bytearray),
    Atom(35, (io.BytesIO,), _from_bytes_io, _to_bytes_io),
    Atom(36, (range,), _from_range, _to_range),
    Atom(37, (slice,), _from_slice, _to_slice),
    Atom(38, (torch.dtype,), _from_torch_constant, _to_torch_dtype),
    Atom(39, (torch.device,), _from_device, _to_device),
    Atom(40, (torch.Size,), list, _to_size),
    Atom(41, (torch.layout,), _from_torch_constant, _to_layout),
    Atom(42, (torch.memory_format,), _from_torch_constant, _to_memory_format),
    Atom(43, (datetime.datetime,), _from_datetime, _to_datetime),
    Atom(44, (datetime.date,), _from_date, _to_date),
    Atom(45, (datetime.time,), _from_time_of_day, _to_time),
    Atom(46, (datetime.timedelta,), _from_timedelta, _to_timedelta),
    Atom(47, (datetime.timezone,), _from_timezone, _to_timezone),
    Atom(48, (uuid.UUID,), _from_uuid, _to_uuid),
    Atom(49, (Decimal,), str, Decimal),
    NUMPY_SCALAR,
    NUMPY_DTYPE,
    Atom(
        52,
        (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath),
        _from_path,
        _to_path,
    ),
)


def big_int_to_bytes(value: int) -> bytes:
    """An int of any size as signed little-endian bytes."""
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def big_int_from_bytes(data: bytes) -> int:
    """The inverse of :func:`big_int_to_bytes`."""
    return int.from_bytes(data, "little", signed=True)
