"""The table of element types: their names on disk, their torch or numpy types, and their sizes in bytes.

A name on disk is torch's own (``"bfloat16"``) or, for numpy arrays of a type that torch does not have, ``"numpy:"``
and a description (``"numpy:<M8[ns]"``; structured types as JSON). Sizes are stated here, never computed from ``numel
* itemsize`` alone: several elements of a sub-byte type share one byte. numpy is used only where the process has
imported it already. Knows nothing of tensors' layouts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from torchsnapshot.errors import FormatError

NUMPY_PREFIX = "numpy:"


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the table.

    ``itemsize`` is in bytes; ``per_byte`` elements share a byte where it is above 1.
    """

    name: str
    itemsize: int
    per_byte: int = 1
    quantized: bool = False

    def nbytes(self, numel: int) -> int:
        """The number of bytes of ``numel`` elements."""
        if self.per_byte > 1:
            return -(-numel // self.per_byte)
        return numel * self.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch's type.

        Raises:
            FormatError: This version of torch does not have it.
        """
        found = getattr(torch, self.name, None)
        if not isinstance(found, torch.dtype):
            raise FormatError(f"torch {torch.__version__} has no dtype {self.name!r}; use a version that has it")
        return found


def _table() -> dict[str, DType]:
    sizes = {
        1: "bool uint8 int8 bits1x8 bits2x4 bits4x2 bits8 float4_e2m1fn_x2 float8_e8m0fnu "
        "float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz",
        2: "int16 uint16 float16 bfloat16 bits16",
        4: "int32 uint32 float32 complex32",
        8: "int64 uint64 float64 complex64",
        16: "complex128",
    }
    table = {name: DType(name, itemsize) for itemsize, names in sizes.items() for name in names.split()}
    # torch keeps each element of these in a byte of its own
    for bits in range(1, 8):
        table[f"uint{bits}"] = DType(f"uint{bits}", 1)
        table[f"int{bits}"] = DType(f"int{bits}", 1)
    for name, itemsize, per_byte in (
        ("qint8", 1, 1),
        ("quint8", 1, 1),
        ("qint32", 4, 1),
        ("quint4x2", 1, 2),
        ("quint2x4", 1, 4),
    ):
        table[name] = DType(name, itemsize, per_byte, quantized=True)
    return table


DTYPES: Mapping[str, DType] = _table()

# integer types to move raw bytes through, by element size
RAW_TYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}

_NAMES: dict[torch.dtype, str] = {
    dtype: name for name in DTYPES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
# complex32 has no kernels for most operations and no numpy type; "bool" is "?" of numpy
_NUMPY_NAMES = frozenset(
    name
    for name in DTYPES
    if name.rstrip("0123456789") in ("bool", "int", "uint", "float", "complex")
    and name not in ("complex32", *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)))
)


def name_of(dtype: torch.dtype) -> str:
    """The name on disk of a torch type.

    Raises:
        FormatError: The table does not hold the type (torch is newer than the table).
    """
    name = _NAMES.get(dtype)
    if name is None:
        raise FormatError(f"dtype {dtype} is not in this version's table of element types")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a name on disk.

    Raises:
        FormatError: The name is unknown, or it is a type of numpy that torch does not have.
    """
    found = DTYPES.get(name)
    if found is None:
        raise FormatError(f"unknown dtype {name!r}; a newer version of the library may know it")
    return found.torch_dtype


def is_known(name: str) -> bool:
    """Whether tensors of the named type can be restored by this process."""
    if name.startswith(NUMPY_PREFIX):
        try:
            numpy_dtype(name)
        except FormatError:
            return False
        return True
    return name in DTYPES and isinstance(getattr(torch, name, None), torch.dtype)


def itemsize_of(name: str) -> int:
    """Bytes of one element as the grid counts them.

    Raises:
        FormatError: The name is unknown.
    """
    if name.startswith(NUMPY_PREFIX):
        return int(numpy_dtype(name).itemsize)
    found = DTYPES.get(name)
    if found is None:
        raise FormatError(f"unknown dtype {name!r}; a newer version of the library may know it")
    return found.itemsize


def nbytes_of(name: str, shape: Sequence[int]) -> int:
    """Bytes of a whole dense tensor.

    Raises:
        FormatError: The name is unknown.
    """
    if name.startswith(NUMPY_PREFIX):
        return prod(shape) * int(numpy_dtype(name).itemsize)
    found = DTYPES.get(name)
    if found is None:
        raise FormatError(f"unknown dtype {name!r}; a newer version of the library may know it")
    return found.nbytes(prod(shape))


def numpy_module() -> Any | None:
    """The numpy that this process has imported, or None; it is never imported from here."""
    return sys.modules.get("numpy")


def numpy_name(dtype: Any) -> str | None:
    """The name on disk of a numpy type, or None if its elements are not plain bytes (objects, foreign extensions)."""
    if dtype.hasobject:
        return None
    if dtype.isnative and dtype.name in _NUMPY_NAMES:
        return str(dtype.name)
    description = _describe(dtype)
    name = NUMPY_PREFIX + (description if isinstance(description, str) else json.dumps(description))
    try:
        same = numpy_dtype(name) == dtype
    except FormatError:
        return None
    return name if same else None


def numpy_dtype(name: str) -> Any:
    """The numpy type of a name on disk.

    Raises:
        FormatError: The description is no numpy type, holds objects, or numpy is not imported.
    """
    numpy = numpy_module()
    if numpy is None:
        raise FormatError(f"dtype {name!r} needs numpy: import numpy, then restore")
    if not name.startswith(NUMPY_PREFIX):
        if name not in _NUMPY_NAMES:
            raise FormatError(f"numpy has no dtype {name!r}")
        return numpy.dtype(name)
    text = name.removeprefix(NUMPY_PREFIX)
    try:
        found = _from_description(numpy, json.loads(text) if text.startswith(("{", "[")) else text)
    except (TypeError, ValueError, KeyError, SyntaxError, AttributeError, RecursionError, OverflowError) as error:
        raise FormatError(f"{name!r} does not describe a numpy dtype: {error}") from error
    if found.hasobject:
        raise FormatError(f"{name!r} describes a numpy dtype that holds Python objects")
    return found


def has_numpy_type(name: str) -> bool:
    """Whether an array of the named type can be a numpy array."""
    return name in _NUMPY_NAMES or name.startswith(NUMPY_PREFIX)


def _describe(dtype: Any) -> object:
    """A JSON value for a numpy type: its string, ``[base, shape]`` for a sub-array, a table for a structured type."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_describe(base), list(shape)]
    if dtype.names is None:
        return str(dtype.str)
    fields = [dtype.fields[name] for name in dtype.names]
    return {
        "names": list(dtype.names),
        "formats": [_describe(field[0]) for field in fields],
        "offsets": [int(field[1]) for field in fields],
        "itemsize": int(dtype.itemsize),
        "aligned": bool(dtype.isalignedstruct),
    }


def _from_description(numpy: Any, description: Any) -> Any:
    if isinstance(description, str):
        return numpy.dtype(description)
    if isinstance(description, list):
        base, shape = description
        return numpy.dtype((_from_description(numpy, base), tuple(shape)))
    return numpy.dtype(
        {
            "names": description["names"],
            "formats": [_from_description(numpy, field) for field in description["formats"]],
            "offsets": description["offsets"],
            "itemsize": description["itemsize"],
        },
        align=bool(description["aligned"]),
    )
