"""Reading a state into the frame of the last one: the nodes that flattening gives, or none at all."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_strategies import states, stepped

from torchsnapshot.errors import UnsupportedValueError
from torchsnapshot.state.app_state import flatten_states
from torchsnapshot.state.flatten import Node, TensorLeaf
from torchsnapshot.state.skeleton import Reading, Skeleton


def skeleton_of(state: Any) -> Skeleton:
    """The skeleton of a state under one key."""
    return Skeleton({"k/y": state}, flatten_states({"k/y": state}))


def read(skeleton: Skeleton, state: Any) -> Reading | None:
    """Read another state into it."""
    return skeleton.read({"k/y": state}, lambda path, name: None)


def fact(node: Node) -> Any:
    """All that a node says, the very tensor included."""
    return (id(node.tensor), node.wrapper, node.requires_grad) if isinstance(node, TensorLeaf) else node


def facts(nodes: dict[str, Node]) -> list[Any]:
    """All nodes in their order."""
    return [(path, fact(node), [type(key) for key in getattr(node, "keys", ())]) for path, node in nodes.items()]


def is_read_alike(state: Any, later: Any) -> bool:
    """Whether ``later`` was read into the skeleton of ``state``; if so, it gave what flattening gives."""
    found = read(skeleton_of(state), later)
    if found is None:
        return False
    assert facts(found.nodes()) == facts(flatten_states({"k/y": later}))
    return True


@given(states)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_state_is_read_into_its_own_skeleton(state: Any) -> None:
    """Whatever the state: it fits, a step later too."""
    assert is_read_alike(state, state)
    assert is_read_alike(state, stepped(state))


@given(states, states)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_another_state_is_read_right_or_not_at_all(state: Any, later: Any) -> None:
    """Two states that have nothing to do with each other: what is read is what flattening gives."""
    is_read_alike(state, later)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_one_other_child_is_read_right_or_not_at_all(data: st.DataObject) -> None:
    """A state in which one thing was put in place of another."""
    children = data.draw(st.dictionaries(st.sampled_from("abcd"), states, min_size=1))
    later = {**children, data.draw(st.sampled_from(sorted(children))): data.draw(states)}
    is_read_alike(children, later)
    is_read_alike([children, torch.zeros(2)], [later, torch.zeros(2)])


def buffer() -> torch.Tensor:
    """A tensor that a module holds as a buffer."""
    return torch.nn.Buffer(torch.zeros(6))


BEFORE = {"t": torch.zeros(6), "c": {1: torch.zeros(2)}, "n": 5, "o": OrderedDict(a=torch.zeros(3))}


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(7),
        torch.zeros(2, 3),
        torch.zeros(6, dtype=torch.float64),
        torch.zeros(12)[::2],
        torch.zeros(6, requires_grad=True),
        torch.nn.Parameter(torch.zeros(6)),
        torch.nn.Parameter(torch.zeros(6), requires_grad=False),
        buffer(),
        torch.zeros(6, device="meta"),
        torch.zeros(6).to_sparse(),
        torch.zeros(6, dtype=torch.complex64).conj(),
        torch.zeros(6, dtype=torch.complex64).conj().imag,
        torch.nested.nested_tensor([torch.zeros(6)], layout=torch.jagged),
        "text",
        [torch.zeros(6)],
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_every_other_tensor_is_noticed(other: Any) -> None:
    """Another shape, dtype, layout, device, wrapper, pending operation or class: the state is flattened anew."""
    skeleton = skeleton_of(BEFORE)
    assert read(skeleton, BEFORE) is not None
    assert read(skeleton, {**BEFORE, "t": other}) is None


def test_wrapped_tensors_are_noticed() -> None:
    """A tensor of a function transform looks like one of the host, and has no memory."""
    kept = []
    torch.func.vmap(lambda tensor: kept.append(tensor) or tensor)(torch.zeros(2, 6))
    torch.func.grad(lambda tensor: kept.append(tensor) or tensor.sum())(torch.zeros(6))
    for wrapped in kept:
        assert read(skeleton_of(BEFORE), {**BEFORE, "t": wrapped}) is None


@pytest.mark.parametrize("offset", [0, 2])
def test_freed_memory_is_noticed(offset: int) -> None:
    """A tensor whose storage has become too small for it is not read."""
    tensor = torch.zeros(8)[offset : offset + 6]
    skeleton = skeleton_of({"t": tensor})
    assert read(skeleton, {"t": tensor}) is not None
    tensor.untyped_storage().resize_(4 * (offset + 5))
    assert read(skeleton, {"t": tensor}) is None
    tensor.untyped_storage().resize_(0)
    assert read(skeleton, {"t": tensor}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"c": {True: torch.zeros(2)}},
        {"c": {"1": torch.zeros(2)}},
        {"c": {1: torch.zeros(2), 2: torch.zeros(2)}},
        {"c": OrderedDict({1: torch.zeros(2)})},
        {"c": defaultdict(list, {1: torch.zeros(2)})},
        {"c": [torch.zeros(2)]},
        {"c": {1: 5}},
        {"n": torch.zeros(2)},
        {"n": [torch.zeros(2)]},
        {"more": 1},
    ],
)
def test_every_other_container_is_noticed(change: dict[str, Any]) -> None:
    """Other keys, other classes of keys, another class of container, more or fewer of them."""
    assert not is_read_alike(BEFORE, {**BEFORE, **change})


def test_values_may_be_any_others() -> None:
    """A plain value may become any other plain value, of another class, too."""
    for other in (6, 0.5, "text", None, [1, {"a": (2,)}], b"x" * 100_000):
        assert is_read_alike(BEFORE, {**BEFORE, "n": other})


def test_attributes_are_compared() -> None:
    """What a module's state says of its versions is part of it."""
    module = torch.nn.BatchNorm1d(3)
    assert is_read_alike(module.state_dict(), module.state_dict())
    changed = module.state_dict()
    changed._metadata[""]["version"] = 1
    assert not is_read_alike(module.state_dict(), changed)


def test_a_container_without_tensors_becomes_a_value() -> None:
    """Where nothing is left in it that is no plain value, flattening makes it one; so it is not read."""
    numpy = pytest.importorskip("numpy")
    assert is_read_alike({"a": {"x": numpy.zeros(3)}}, {"a": {"x": numpy.ones(5)}})
    assert not is_read_alike({"a": {"x": numpy.zeros(3)}}, {"a": {"x": 5}})


def test_cycles_and_depth_are_noticed() -> None:
    """A state that holds itself, or is nested too deep where it was not before, is refused by flattening alone."""
    later: dict[str, Any] = {**BEFORE, "n": []}
    later["n"].append(later)
    assert read(skeleton_of(BEFORE), later) is None
    deep: Any = 5
    for _ in range(100):
        deep = [deep]
    assert is_read_alike(BEFORE, {**BEFORE, "n": deep})
    with pytest.raises(UnsupportedValueError):
        flatten_states({"k/y": {**BEFORE, "n": [deep]}})
    assert read(skeleton_of(BEFORE), {**BEFORE, "n": [deep]}) is None


def test_pickled_values_are_told_once() -> None:
    """The user hears of each value that is pickled, in a state that is read and in one that isn't."""

    class Odd:
        pass

    state = {"t": torch.zeros(2), "odd": complex}
    skeleton = skeleton_of(state)
    told: list[str] = []
    assert skeleton.read({"k/y": state}, lambda path, name: told.append(path)) is not None
    assert told == ["k%2Fy/odd"]
    assert skeleton.read({"k/y": {**state, "t": 5}}, lambda path, name: told.append(path)) is None
    assert skeleton.read({"k/y": {**state, "odd": Odd()}}, lambda path, name: told.append(path)) is None
    assert len(told) == 1


def test_nothing_is_kept_alive() -> None:
    """A skeleton holds no tensor of the state that it was made of, nor of those that were read into it."""
    state = {"a": torch.zeros(5), "b": [torch.zeros(500), {"x": torch.nn.Parameter(torch.zeros(2))}]}
    gone = [weakref.ref(state["a"]), weakref.ref(state["b"][0]), weakref.ref(state["b"][1]["x"].untyped_storage())]
    skeleton = skeleton_of(state)
    assert read(skeleton, state) is not None
    state.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
