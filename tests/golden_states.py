"""What the golden stores hold: states that follow from arithmetic alone, the same in every version of torch and Python.

Never change a state that a store in ``tests/golden`` was made of: the store stays, and has to be read for ever. What a
later format can hold beyond this goes into states of its own.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import io
import math
import pathlib
import uuid
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from torchsnapshot.state.dtypes import DTYPES


class Point(NamedTuple):
    x: Any
    y: Any


"""A class that is found in the target, or else is a plain tuple."""


def noise(name: str, nbytes: int) -> bytearray:
    """Bytes that nothing compresses, and that are the same everywhere."""
    blocks = (hashlib.blake2b(f"{name} {index}".encode()).digest() for index in range(-(-nbytes // 64)))
    return bytearray(b"".join(blocks)[:nbytes])


def tensor_of(dtype: torch.dtype, numel: int, name: str = "") -> torch.Tensor:
    """A tensor with every kind of bit pattern that the type has."""
    if dtype is torch.bool:
        return torch.tensor([byte & 1 for byte in noise(f"{name} bool", numel)], dtype=torch.uint8).to(torch.bool)
    itemsize = DTYPES[str(dtype).removeprefix("torch.")].itemsize
    return torch.frombuffer(noise(f"{name} {dtype}", numel * itemsize), dtype=torch.uint8).view(dtype)


def every_dtype() -> dict[str, torch.Tensor]:
    """Two tensors, an inline one and one of chunks, of each element type that this torch has."""
    found = {}
    for name, row in DTYPES.items():
        dtype = getattr(torch, name, None)
        if isinstance(dtype, torch.dtype) and not row.quantized:
            found[f"{name} small"] = tensor_of(dtype, 3)
            found[f"{name} large"] = tensor_of(dtype, 600 // row.itemsize)
    return found


def every_shape() -> dict[str, Any]:
    """Tensors of all shapes, orders in memory, layouts and wrappers."""
    matrix = tensor_of(torch.float32, 24 * 30, "matrix").reshape(24, 30)
    tied = tensor_of(torch.int64, 100, "tied")
    return {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "empty 2-d": torch.zeros(0, 3),
        "transposed": matrix.t(),
        "channels last": matrix.reshape(2, 3, 8, 15).to(memory_format=torch.channels_last),
        "slice": matrix[1::2, ::3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 4),
        "conjugate": tensor_of(torch.complex64, 40, "conjugate").conj(),
        "negative": tensor_of(torch.complex64, 40, "negative").conj().imag,
        "requires grad": torch.arange(70, dtype=torch.float32, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.arange(80, dtype=torch.float64), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.arange(90, dtype=torch.float16)),
        "tied": tied,
        "tied too": tied,
        "equal": tied.clone(),
        "coo": torch.eye(12).to_sparse(),
        "coo, not coalesced": torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,)),
        "csr": torch.eye(12).to_sparse_csr(),
        "csc": torch.eye(12).to_sparse_csc(),
        "bsr": torch.eye(12).to_sparse_bsr((3, 3)),
        "bsc": torch.eye(12).to_sparse_bsc((3, 3)),
        "of 0.5 MB and one chunk": torch.full((1 << 17,), 0.125),
    }


def every_array() -> dict[str, Any]:
    """numpy arrays and scalars."""
    return {
        "array": np.arange(300, dtype=np.float32).reshape(20, 15),
        "fortran": np.asfortranarray(np.arange(300, dtype=np.int16).reshape(20, 15)),
        "times": np.array(["2020-02-29T12:30:59", "NaT"], dtype="datetime64[ns]"),
        "text": np.array(["a", "bcd", "é"]),
        "records": np.array([(1, 2.5), (3, -0.0)], dtype=[("a", "<i4"), ("b", "<f8")]),
        "0-d": np.array(7.5),
        "scalar": np.float32(1.5),
        "no elements": np.zeros((0, 4), dtype=np.uint8),
    }


def every_value() -> dict[str, Any]:
    """Plain values of every kind, each alone, and each once more beside a tensor, where its container is an entry."""
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30), "IST")
    atoms = {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 2**63 - 1, -(2**63), 2**64, 10**40, -(10**40)],
        "floats": [0.0, -0.0, 0.1, 5e-324, math.inf, -math.inf, math.nan],
        "complex": [1 + 2j, complex(-0.0, math.inf)],
        "texts": ["", "a/b%c", "\N{SNOWMAN}\N{DROMEDARY CAMEL}", "\0", "x" * 300],
        "bytes": [b"", b"\0\xff", bytearray(b"abc"), io.BytesIO(b"stream")],
        "ranges": [range(3), range(10, -5, -3), slice(None), slice(1, 2, 3)],
        "torch": [
            torch.bfloat16,
            torch.device("cuda", 3),
            torch.Size([2, 3]),
            torch.sparse_csr,
            torch.channels_last,
        ],
        "dates": [
            datetime.date(2020, 2, 29),
            datetime.time(23, 59, 58, 999999, zone),
            datetime.datetime(2024, 3, 31, 2, 30, fold=1),
            datetime.timedelta(days=-3, microseconds=7),
            zone,
        ],
        "others": [uuid.UUID(int=2**127 + 1), decimal.Decimal("1.230E-7"), pathlib.PurePosixPath("/a/b")],
    }
    containers = {
        "list": [1, [2, []]],
        "tuple": (1, (), ("x",)),
        "set": {1, "a", (2, 3)},
        "frozenset": frozenset({1.5, None}),
        "deque": deque([1, 2], maxlen=5),
        "dict": {"a": 1, 2: "b", True: [], "a/b": {"%": None}, "": 0},
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "counter": Counter("hello"),
        "defaultdict": defaultdict(list, {"a": [1]}),
        "named": Point(1, [2]),
    }
    ordered = OrderedDict([("weight", torch.ones(2))])
    ordered._metadata = {"version": 3}  # type: ignore[attr-defined]
    tensor = torch.arange(3)
    with_tensors = {
        "list": [tensor, 1],
        "tuple": (tensor, (1,)),
        "deque": deque([tensor], maxlen=2),
        "dict": {"a": tensor, 2: tensor, True: 0, "2": 1, "True": 2, "a/b%": tensor, "": {}},
        "ordered": ordered,
        "defaultdict": defaultdict(int, {"a": tensor}),
        "named": Point(tensor, "y"),
    }
    large = {"text": "0123456789" * 1800, "list": list(range(6500))}
    return {**atoms, "containers": containers, "containers of tensors": with_tensors, "large": large}


def every_object() -> dict[str, Any]:
    """What only pickle can hold, small and large."""
    return {"small": Fraction(1, 3), "large": ChainMap({index: str(index) for index in range(2000)})}


def kinds() -> dict[str, Any]:
    """The app_state of the snapshot ``kinds``."""
    return {
        "dtypes": every_dtype(),
        "shapes": every_shape(),
        "arrays": every_array(),
        "values": every_value(),
        "objects": every_object(),
        "a/b %": {"key": "an app_state key with a slash"},
    }


def training(step: int) -> dict[str, Any]:
    """A model's and an optimizer's state: most of it changes a little with each step, some of it never."""
    numel = 6000
    first = torch.frombuffer(noise("weights", 2 * numel), dtype=torch.int16).to(torch.float32) / 32768
    push = torch.frombuffer(noise("pushes", 2 * numel), dtype=torch.int16).to(torch.float32) / 2**27
    weights = first + step * push
    return {
        "model": {
            "embedding": tensor_of(torch.float16, 3000, "embedding"),
            "fp32": weights,
            "bf16": weights.to(torch.bfloat16),
            "head": torch.full((2000,), float(step)),
        },
        "optimizer": {
            "state": {
                index: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(400), "exp_avg_sq": push[:400] * step}
                for index in range(3)
            },
            "param_groups": [{"lr": 0.1 / (step + 1), "betas": (0.9, 0.999), "params": [0, 1, 2]}],
        },
        "progress": {"step": step, "losses": [1 / (index + 1) for index in range(step * 100)]},
    }


def moments() -> dict[str, Any]:
    """An optimizer's second moments: about a factor of the row times one of the column."""
    numel = 128 * 64
    values = torch.frombuffer(noise("moments", 2 * numel), dtype=torch.int16).to(torch.float32).square().view(128, 64)
    rows = torch.tensor([2.0 ** (7 * row % 17) for row in range(128)]).view(128, 1)
    columns = torch.tensor([2.0 ** (5 * column % 13 - 60) for column in range(64)])
    fp32 = values * rows * columns
    return {"optimizer": {"fp32": fp32, "bf16": fp32.to(torch.bfloat16)}}


def quantized() -> dict[str, Any]:
    """Quantized tensors, which torch is about to drop."""
    values = torch.arange(-300, 300, dtype=torch.float32) / 7
    return {
        "quantized": {
            "qint8": torch.quantize_per_tensor(values, 0.25, 3, torch.qint8),
            "quint8": torch.quantize_per_tensor(values, 0.5, 100, torch.quint8),
            "qint32": torch.quantize_per_tensor(values, 1e-3, 0, torch.qint32),
            "per channel": torch.quantize_per_channel(
                values.reshape(3, 200), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.qint8
            ),
        }
    }


NUM_RANKS = 2
SHARDED_SHAPE = (31, 40)


def sharded() -> torch.Tensor:
    """The whole of the tensor that is spread over the ranks."""
    return torch.arange(31 * 40, dtype=torch.float32).reshape(SHARDED_SHAPE)


def of_rank(rank: int) -> dict[str, Any]:
    """What is a rank's own, and what all ranks have, beside the sharded tensor."""
    return {
        "own": tensor_of(torch.int32, 500, f"rank {rank}"),
        "common": tensor_of(torch.float64, 500, "common"),
        "name": f"rank {rank}",
        "same": [1, "x"],
    }


USER_METADATA = {"note": "made to be read for ever", "numbers": [1, 2.5, None, True]}
LARGE_USER_METADATA = {"text": "y" * 5000}
