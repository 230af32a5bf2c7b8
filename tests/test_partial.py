"""Restoring a part: what is stored goes where its own key leads, or the restore says that it cannot."""

from __future__ import annotations

import copy
import enum
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_strategies import keys, plain, stepped, tensors

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.errors import AbsentStateError, MismatchError


class Phase(enum.IntEnum):
    """Keys that are ints, and no plain ones."""

    TRAIN = 1
    EVAL = 0


class Split(str, enum.Enum):
    """Keys that are text, and no plain one."""

    TRAIN = "train"
    EVAL = "eval"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a snapshot goes."""
    return str(tmp_path / "run" / "step_0")


ODD_KEYS = [
    list(Phase),
    list(Split),
    [(1, 2), (2, 1)],
    [None, 0.5],
    [b"a", b"b"],
    [2**70, -(2**70)],
    ["x" * 2000, "y" * 2000],
    ["\ud800", "\udfff"],
    [1, 1.5],
    [0, "0", True],
]


@pytest.mark.parametrize("odd", ODD_KEYS)
@pytest.mark.parametrize("paths", [["s/*"], ["s"], ["s/v/*"], ["s/v"]])
def test_keys_that_cannot_stand_in_a_path(path: str, odd: list[Any], paths: list[str]) -> None:
    """Tensors and values come back under the very keys that they were stored under, in whatever order those stand."""
    source = {key: (torch.full((300,), float(number)), number) for number, key in enumerate(odd)}
    Snapshot.take(path, {"s": StateDict(v=source)})
    target = StateDict(v={key: (torch.full((300,), -1.0), -1) for key in reversed(odd)})
    Snapshot(path).restore({"s": target}, paths=paths)
    assert list(target["v"]) == list(reversed(odd))
    for key, (tensor, number) in source.items():
        assert torch.equal(target["v"][key][0], tensor)
        assert target["v"][key][1] == number


@pytest.mark.parametrize("odd", ODD_KEYS[2:])
def test_keys_that_are_not_there_are_added(path: str, odd: list[Any]) -> None:
    """A new key is the one that was stored: neither its place in a path, nor its text."""
    source = {key: torch.full((300,), float(number)) for number, key in enumerate(odd)}
    Snapshot.take(path, {"s": StateDict(v=source)})
    target = StateDict(v={})
    Snapshot(path).restore({"s": target}, paths=["s/*"])
    assert list(map(type, target["v"])) == list(map(type, odd))
    assert all(torch.equal(target["v"][key], tensor) for key, tensor in source.items())


def test_an_int_is_not_its_text(path: str) -> None:
    """The int 0 and the text "0" have one name where they stand alone, and are two keys all the same."""
    Snapshot.take(path, {"s": StateDict(v={0: torch.zeros(300), 1: torch.ones(300)})})
    target = StateDict(v={0: torch.full((300,), 7.0), "0": torch.full((300,), 7.0)})
    Snapshot(path).restore({"s": target}, paths=["s/*"])
    assert [(key, float(tensor[0])) for key, tensor in target["v"].items()] == [(0, 0.0), ("0", 7.0), (1, 1.0)]


def test_a_counted_place_is_no_key(path: str) -> None:
    """What stood under a tuple does not go to the int that counts it in the path."""
    Snapshot.take(path, {"s": StateDict(v={(5, 5): torch.ones(300)})})
    target = StateDict(v={0: torch.zeros(300)})
    Snapshot(path).restore({"s": target}, paths=["s/*"])
    assert not target["v"][0].any()
    assert torch.equal(target["v"][5, 5], torch.ones(300))


def test_renamed_paths_keep_their_keys(path: str) -> None:
    """``rename`` changes the part of a path that it changes; the keys of the rest stay what they are."""
    Snapshot.take(path, {"s": StateDict(a={7: {(1, 2): torch.ones(300)}})})
    target = StateDict(b={7: {(0, 0): torch.zeros(300), (1, 2): torch.zeros(300)}})
    Snapshot(path).restore({"t": target}, rename=lambda stored: stored.replace("s/a/", "t/b/"))
    assert not target["b"][7][0, 0].any()
    assert torch.equal(target["b"][7][1, 2], torch.ones(300))


odd_keys = st.one_of(
    keys, st.none(), st.binary(max_size=3), st.floats(allow_nan=False), st.tuples(st.integers(0, 2), st.integers(0, 2))
)
states = st.recursive(
    st.one_of(tensors(), plain),
    lambda inner: st.one_of(
        st.dictionaries(odd_keys, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
    ),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    """The same state with the keys of all dicts in reverse order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return type(value)(map(reordered, value)) if isinstance(value, (list, tuple)) else value


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, keys' and values' types included, whatever the order of keys."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        types = {key: type(key) for key in one}
        return types == {key: type(key) for key in other} and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


@given(st.dictionaries(st.sampled_from("abc"), states, min_size=1))
def test_all_parts_make_the_whole(state: dict[str, Any]) -> None:
    """Restoring every path of a state gives the state, whatever its keys are and whatever order the target has."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/run/step_0"
        Snapshot.take(path, {"s": StateDict(**state)})
        target = StateDict(**reordered(stepped(copy.deepcopy(state))))
        Snapshot(path).restore({"s": target}, paths=["s/*"])
    assert same(target.data, state)


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, torch.optim.Adagrad, lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)]
)
def test_an_optimizer_that_has_not_stepped(path: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The state of an optimizer is restored into a fresh one, beside a model that was wrapped meanwhile."""
    model = torch.nn.Linear(3, 3)
    optimizer = make(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    Snapshot.take(path, {"model": model, "optim": optimizer})
    wrapped = torch.compile(torch.nn.Linear(3, 3), backend="eager")
    fresh = make(wrapped.parameters())
    rename = lambda stored: stored.replace("model/", "model/_orig_mod.", 1)  # noqa: E731
    Snapshot(path).restore({"model": wrapped, "optim": fresh}, rename=rename)
    assert torch.equal(wrapped.weight, model.weight)
    assert same(fresh.state_dict(), optimizer.state_dict())
    fresh = make(wrapped.parameters())
    Snapshot(path).restore({"optim": fresh}, paths=["optim/*"])
    assert same(fresh.state_dict(), optimizer.state_dict())


def test_a_selection_of_nothing_is_an_error(path: str) -> None:
    """Where a restore would leave everything as it is, it says so: a key was mistyped, or a name."""
    Snapshot.take(path, {"p": StateDict(step=3), "m": torch.nn.Linear(2, 2)})
    target = StateDict(step=0)
    with pytest.raises(MismatchError, match="nothing belongs to 'p'"):
        Snapshot(path).restore({"p": target}, rename=lambda stored: stored.replace("p/", "pp/"))
    with pytest.raises(MismatchError, match="nothing belongs to 'p'"):
        Snapshot(path).restore({"p": target}, paths=["m/*"])
    with pytest.raises(AbsentStateError, match="zz is absent"):
        Snapshot(path).restore({"zz": target}, paths=["p/*"])
    assert target["step"] == 0
    Snapshot(path).restore({"p": target, "zz": StateDict()}, paths=["p/*"])
    assert target["step"] == 3
