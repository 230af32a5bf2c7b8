"""The helpers for tests of other programs compare, make and launch what they say."""

from __future__ import annotations

import os
import unittest
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from torchsnapshot.test_utils import (
    assert_state_dict_eq,
    async_test,
    check_state_dict_eq,
    get_pet_launch_config,
    rand_tensor,
    run_with_pet,
    run_with_pet_async,
    tensor_eq,
    tensor_local_sz_bytes,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.complex64, torch.complex128, torch.complex32, torch.bool, torch.qint8, torch.quint8, torch.qint32),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_tensors_of_every_dtype_compare(dtype: torch.dtype) -> None:
    """A random tensor has the shape and dtype asked for, equals its clone and differs from another one."""
    tensor = rand_tensor((40, 7), dtype)
    assert tensor.shape == (40, 7)
    assert tensor.dtype == dtype
    assert tensor_eq(tensor, tensor.clone())
    assert not tensor_eq(tensor, rand_tensor((40, 7), dtype))
    assert tensor_local_sz_bytes(tensor) == 280 * tensor.element_size()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_random_tensor_quantized_per_channel() -> None:
    """A tensor quantized per channel has a scale for each of them; an unknown scheme is refused."""
    tensor = rand_tensor((4, 3), torch.qint8, torch.per_channel_affine, channel_axis=1)
    assert tensor.q_per_channel_scales().shape == (3,)
    assert tensor_eq(tensor, tensor.clone())
    with pytest.raises(ValueError, match="qscheme"):
        rand_tensor((4, 3), torch.qint8, None)


def test_what_makes_tensors_differ() -> None:
    """Dtype, shape and any value do; NaN, being a parameter, and the layout in memory don't."""
    tensor = torch.tensor([[0.0, float("nan")], [float("inf"), 3.0]])
    assert tensor_eq(tensor, tensor.clone())
    assert tensor_eq(tensor, torch.nn.Parameter(tensor))
    assert tensor_eq(tensor, tensor.t().contiguous().t())
    assert not tensor_eq(tensor, tensor.double())
    assert not tensor_eq(tensor, tensor.reshape(4))
    assert not tensor_eq(tensor, torch.tensor([[0.0, 0.0], [float("inf"), 3.0]]))
    assert not tensor_eq(tensor, torch.tensor([[0.0, float("nan")], [float("-inf"), 3.0]]))
    assert tensor_eq(torch.eye(3).to_sparse(), torch.eye(3).to_sparse())
    assert not tensor_eq(torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse())


STATE: dict[Any, Any] = {"a": torch.arange(3), "b": [1, ("x", torch.ones(2))], 3: {"c": None, "d": 0.5}}


def changed(**change: Any) -> dict[Any, Any]:
    """The state with some keys replaced."""
    return {**STATE, **change}


@pytest.mark.parametrize(
    ("other", "place"),
    [
        (changed(a=torch.arange(1, 4)), "/a: Tensor"),
        (changed(b=[1, ("x", torch.zeros(2))]), "/b/1/1: Tensor"),
        (changed(b=[1]), "/b: 2 elements != 1"),
        (changed(b=[True, ("x", torch.ones(2))]), "/b/0: 1 != True"),
        (changed(b=(1, ("x", torch.ones(2)))), "/b: "),
        (changed(e=1), "the state: only on one side: \\[\"'e'\"\\]"),
        (changed(a=0), "/a: "),
    ],
    ids=range(7),
)
def test_different_states_differ(other: dict[Any, Any], place: str) -> None:
    """Any difference at any depth counts, and the assertion names its place."""
    assert not check_state_dict_eq(STATE, other)
    with pytest.raises(AssertionError, match=place):
        assert_state_dict_eq(unittest.TestCase(), STATE, other)


def test_equal_states_are_equal() -> None:
    """Copies are equal, and so are a dict and an OrderedDict of the same items."""
    other = OrderedDict(changed(a=torch.arange(3), b=[1, ("x", torch.ones(2))]))
    assert check_state_dict_eq(STATE, other)
    assert_state_dict_eq(unittest.TestCase(), STATE, other)


def test_launch_config() -> None:
    """The configuration runs the ranks on one machine, once, and no two share an id."""
    config = get_pet_launch_config(3)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 1, 3, 0)
    assert config.run_id != get_pet_launch_config(3).run_id


@run_with_pet(nproc=2)
def leave_mark(folder: str, name: str = "rank") -> None:
    """Each rank leaves a file with its number."""
    Path(folder, f"{name}-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()


@run_with_pet_async(nproc=1)
async def leave_mark_async(folder: str) -> None:
    """The rank leaves a file."""
    Path(folder, "async").touch()


@run_with_pet(nproc=1)
def fail() -> None:
    """The rank fails."""
    raise ValueError("on purpose")


def test_function_runs_on_every_rank(tmp_path: Path) -> None:
    """A decorated function runs once on each rank, with its arguments."""
    leave_mark(str(tmp_path), name="mark")
    assert {path.name for path in tmp_path.iterdir()} == {"mark-0-of-2", "mark-1-of-2"}


def test_coroutine_function_runs_on_a_rank(tmp_path: Path) -> None:
    """A decorated coroutine function is run to its end."""
    leave_mark_async(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["async"]


def test_failing_rank_fails_the_test() -> None:
    """What a rank raises reaches the caller."""
    with pytest.raises(Exception, match="on purpose"):
        fail()


class TestMethod(unittest.TestCase):
    """A test case whose method runs on a rank."""

    def setUp(self) -> None:
        """What the rank's copy must have too."""
        self.greeting = "hello"

    @run_with_pet(nproc=1)
    def test_method_runs_with_its_test_case(self) -> None:
        """The rank's copy of the test case holds what setUp left."""
        assert self.greeting == "hello"
        assert os.environ["WORLD_SIZE"] == "1"


@async_test
async def test_async_test_runs_the_coroutine() -> None:
    """A decorated test is an ordinary function whose coroutine has run when it returns."""
    assert isinstance(test_async_test_runs_the_coroutine, type(leave_mark))
