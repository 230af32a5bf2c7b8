"""Helps tests of programs that take snapshots: states compared, random tensors made, tests run on several ranks.

What lives here: the public names of the old torchsnapshot's module. What doesn't: anything the library needs.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import tempfile
import unittest
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)


# ------------------------------------------------------------------ comparing


def tensor_eq(lhs: torch.Tensor, rhs: torch.Tensor) -> bool:
    """Whether two tensors are the same: kind, dtype, shape and every value; NaN equals NaN, the device doesn't count.

    A ``Parameter`` and a plain tensor are of one kind, as a state dict makes the one the other. Of a ``ShardedTensor``
    or a ``DTensor`` this rank's part is compared.
    """
    kind = _kind(lhs)
    if kind != _kind(rhs) or lhs.dtype != rhs.dtype or lhs.shape != rhs.shape:
        return False
    if kind is not torch.Tensor:
        ours, theirs = _local_tensors(lhs), _local_tensors(rhs)
        return len(ours) == len(theirs) and all(map(tensor_eq, ours, theirs))
    return torch.equal(*(_comparable(tensor) for tensor in (lhs, rhs)))


def check_state_dict_eq(lhs: Mapping[Any, Any], rhs: Mapping[Any, Any]) -> bool:
    """Whether two states are equal, tensors at any depth in them by ``tensor_eq``."""
    return _first_difference(lhs, rhs, "") is None


def assert_state_dict_eq(tc: unittest.TestCase, lhs: Mapping[Any, Any], rhs: Mapping[Any, Any]) -> None:
    """Fail the test ``tc``, naming the first place that differs, unless two states are equal."""
    difference = _first_difference(lhs, rhs, "")
    if difference is not None:
        tc.fail(difference)


def _first_difference(lhs: Any, rhs: Any, path: str) -> str | None:
    """What differs first, for people; None where nothing does."""
    place = path or "the state"
    if isinstance(lhs, torch.Tensor) and isinstance(rhs, torch.Tensor):
        return None if tensor_eq(lhs, rhs) else f"{place}: {_describe(lhs)} != {_describe(rhs)}"
    if isinstance(lhs, Mapping) and isinstance(rhs, Mapping):
        if lhs.keys() != rhs.keys():
            return f"{place}: only on one side: {sorted(map(repr, lhs.keys() ^ rhs.keys()))}"
        pairs = [(key, lhs[key], rhs[key]) for key in lhs]
    elif isinstance(lhs, (list, tuple)) and type(lhs) is type(rhs):
        if len(lhs) != len(rhs):
            return f"{place}: {len(lhs)} elements != {len(rhs)}"
        pairs = [(index, *values) for index, values in enumerate(zip(lhs, rhs, strict=True))]
    else:
        return None if type(lhs) is type(rhs) and _plainly_equal(lhs, rhs) else f"{place}: {lhs!r} != {rhs!r}"
    found = (_first_difference(left, right, f"{path}/{key}") for key, left, right in pairs)
    return next((difference for difference in found if difference is not None), None)


def _plainly_equal(lhs: Any, rhs: Any) -> bool:
    equal = lhs == rhs
    # numpy compares element by element
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def _describe(tensor: torch.Tensor) -> str:
    return f"{type(tensor).__name__}({tensor.dtype}, {tuple(tensor.shape)}, {tensor.device})"


def _kind(tensor: torch.Tensor) -> type:
    plain = isinstance(tensor, torch.nn.Parameter) or type(tensor) is torch.Tensor
    return torch.Tensor if plain and not hasattr(tensor, "to_local") else type(tensor)


def _local_tensors(tensor: Any) -> list[torch.Tensor]:
    """What this rank holds of a tensor that is spread over ranks."""
    if hasattr(tensor, "local_shards"):
        return [shard.tensor for shard in tensor.local_shards()]
    if hasattr(tensor, "to_local"):
        return [tensor.to_local()]
    raise AssertionError(f"expected a Tensor, a ShardedTensor or a DTensor, got {type(tensor)}")


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor of a dtype that torch can compare, equal exactly where the given ones are, NaN included."""
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        # float64 holds every value of the smaller kinds; a NaN takes a value that is then beside the number
        tensor = tensor.to(torch.float64)
        is_nan = tensor.isnan()
        return torch.stack([tensor.masked_fill(is_nan, 0.0), is_nan.double()])
    return tensor


# ------------------------------------------------------------------ making


def rand_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    qscheme: torch.qscheme | None = torch.per_tensor_affine,
    channel_axis: int | None = None,
) -> torch.Tensor:
    """A tensor of random values on the CPU.

    Args:
        shape: its shape.
        dtype: its dtype, quantized ones included.
        qscheme: of a quantized one, ``torch.per_tensor_affine`` or ``torch.per_channel_affine``.
        channel_axis: of one quantized per channel, the dimension of the channels (default 0).

    Raises:
        ValueError: another ``qscheme``.
    """
    if dtype in _QUANTIZED:
        axis = channel_axis or 0
        if qscheme == torch.per_tensor_affine:
            return torch.quantize_per_tensor(torch.rand(*shape), scale=0.1, zero_point=10, dtype=dtype)
        if qscheme == torch.per_channel_affine:
            scales, zero_points = torch.rand(shape[axis]) + 0.01, torch.randint(100, (shape[axis],))
            return torch.quantize_per_channel(torch.rand(*shape), scales, zero_points, axis, dtype)
        raise ValueError(f"qscheme={qscheme}: allowed is torch.per_tensor_affine or torch.per_channel_affine")
    if dtype.is_complex:
        return torch.complex(torch.rand(*shape), torch.rand(*shape)).to(dtype)
    if dtype.is_floating_point:
        # not every small kind has its own random numbers
        return torch.rand(*shape).to(dtype)
    highest = 2 if dtype is torch.bool else min(torch.iinfo(dtype).max, torch.iinfo(torch.int64).max)
    return torch.randint(highest, tuple(shape), dtype=torch.int64).to(dtype)


def tensor_local_sz_bytes(tensor: torch.Tensor) -> int:
    """The size in bytes of what this rank holds of ``tensor``."""
    if _kind(tensor) is torch.Tensor:
        return tensor.nelement() * tensor.element_size()
    return sum(map(tensor_local_sz_bytes, _local_tensors(tensor)))


# ------------------------------------------------------------------ several ranks


def get_pet_launch_config(nproc: int) -> LaunchConfig:
    """What torch's ``elastic_launch`` needs to run ``nproc`` ranks on this machine, without retries."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )


def run_with_pet(nproc: int) -> Callable[[Callable[Arguments, object]], Callable[Arguments, None]]:
    """Let a test run on ``nproc`` ranks, each a process of its own; it passes if every rank's run does.

    The test begins the process group itself. It must be found under its name in its module, and its arguments must be
    picklable; of a ``unittest.TestCase`` method the ranks get a copy of the test case.
    """
    return _on_ranks(nproc, _run_rank)


def run_with_pet_async(
    nproc: int,
) -> Callable[[Callable[Arguments, Coroutine[Any, Any, object]]], Callable[Arguments, None]]:
    """``run_with_pet`` for a test that is a coroutine function; each rank runs it in an event loop of its own."""
    return _on_ranks(nproc, _run_rank_async)


def async_test(coro: Callable[Arguments, Coroutine[Any, Any, Result]]) -> Callable[Arguments, Result]:
    """Let a test that is a coroutine function run in an event loop of its own."""

    @functools.wraps(coro)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return asyncio.run(coro(*args, **kwargs))

    return run


def _on_ranks(nproc: int, entry: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    def decorate(test: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                config = get_pet_launch_config(nproc)
                # a file needs neither a port nor a name service
                config.rdzv_endpoint = f"{folder}/rendezvous"
                config.rdzv_configs = {"store_type": "file", "timeout": 60}
                elastic_launch(config, entry)(test.__module__, test.__qualname__, tuple(map(_portable, args)), kwargs)

        return run

    return decorate


def _portable(argument: Any) -> Any:
    """The argument as it can be pickled: a running test case holds the runner's results."""
    if not isinstance(argument, unittest.TestCase):
        return argument
    clone = copy.copy(argument)
    vars(clone).update(_outcome=None, _cleanups=[])
    # pytest puts the running method, wrapped, on the instance
    vars(clone).pop(argument._testMethodName, None)
    return clone


def _undecorated(module: str, qualified_name: str) -> Callable[..., Any]:
    found: Any = import_module(module)
    for name in qualified_name.split("."):
        found = getattr(found, name)
    test: Callable[..., Any] = found.__wrapped__
    return test


def _run_rank(module: str, qualified_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _undecorated(module, qualified_name)(*args, **kwargs)


def _run_rank_async(module: str, qualified_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asyncio.run(_undecorated(module, qualified_name)(*args, **kwargs))
