"""Takes of a state that is made like the last one: less work, and not one byte of difference."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import manifest, new_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.format.entries import pack_entries
from torchsnapshot.state.flatten import flatten
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.taking import structure
from torchsnapshot.taking.plan import Leaf, TakePlan, build_entries, plan_take
from torchsnapshot.taking.structure import Structure

CHUNK_NBYTES = 4096
SMALL_NBYTES = 1024


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """Every test begins as a new process would."""
    new_process()
    torch.manual_seed(0)
    yield
    structure.forget()


class Place:
    """What stood at a path, as ``plan`` wants it."""

    def __init__(self, leaf: Leaf) -> None:
        self.dtype = "" if leaf.view is None else leaf.view.dtype
        self.shape = () if leaf.view is None else leaf.view.shape
        self.cell = leaf.cell if leaf.view is not None else ()
        self.digests = [bytes([index % 251]) * 16 for index, _ in enumerate(leaf.chunks)]
        self.changed = frozenset({0})


class Previous:
    """The places of a plan."""

    def __init__(self, plan: TakePlan | None = None) -> None:
        self.places = {} if plan is None else {leaf.path: Place(leaf) for leaf in plan.leaves if leaf.chunks}

    def at(self, path: str) -> Place | None:
        """See ``plan.Previous``."""
        return self.places.get(path)


def nodes_of(state: Any) -> Any:
    """The state, flattened."""
    return flatten("s", state, on_opaque=lambda path, name: None)


def finished(plan: TakePlan) -> TakePlan:
    """The plan with every chunk stored somewhere."""
    for number, chunk in enumerate(plan.chunks()):
        digest = number.to_bytes(16, "big")
        key = f"{digest.hex()}-{'0' * 24}-0"
        chunk.ref = ChunkRef(digest, chunk.nbytes, key, chunk.nbytes, 0, chunk.nbytes)
    return plan


def facts(leaf: Leaf) -> tuple[Any, ...]:
    """All that a planned leaf says."""
    view = None
    if leaf.view is not None:
        view = (leaf.view.dtype, leaf.view.shape, leaf.view.permutation, leaf.view.memory_shape, leaf.view.nbytes)
    chunks = []
    for chunk in leaf.chunks:
        content = bytearray(chunk.nbytes)
        chunk.source.stage(chunk.piece.box, memoryview(content))
        live = chunk.source.live(chunk.piece.offset, chunk.nbytes)
        where = (chunk.path, chunk.piece, chunk.width, chunk.previous, chunk.changed_last_time)
        chunks.append((*where, bytes(content), None if live is None else bytes(live)))
    return leaf.path, view, leaf.cell, leaf.inline, chunks


def assert_same(state: Any, later: Any) -> bool:
    """Plan and pack ``later`` after ``state`` in both ways; whether the short one was open."""
    plan = finished(plan_take(nodes_of(state), Previous(), CHUNK_NBYTES, SMALL_NBYTES))
    known = Structure.of(plan, CHUNK_NBYTES, SMALL_NBYTES)
    if known is None:
        return False
    data, table = known.pack(plan)
    entries, expected_table = build_entries(plan, rank=0)
    assert (data, table.pack()) == (pack_entries(entries), expected_table.pack())
    nodes, previous = nodes_of(later), Previous(plan)
    short = known.plan(nodes, previous, CHUNK_NBYTES, SMALL_NBYTES)
    long = plan_take(nodes, previous, CHUNK_NBYTES, SMALL_NBYTES)
    if short is None:
        return False
    assert list(map(facts, short.leaves)) == list(map(facts, long.leaves))
    assert short.state_nbytes == long.state_nbytes
    assert [facts_of_chunks(group) for group in short.groups] == [facts_of_chunks(group) for group in long.groups]
    assert facts_of_chunks(short.large) == facts_of_chunks(long.large)
    data, table = known.pack(finished(short))
    entries, expected_table = build_entries(finished(long), rank=0)
    assert data == pack_entries(entries)
    assert table.pack() == expected_table.pack()
    return True


def facts_of_chunks(chunks: list[Any]) -> list[Any]:
    """Which chunks these are."""
    return [(chunk.path, chunk.piece) for chunk in chunks]


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Dense tensors of any dtype and layout, small and large."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 40]), max_size=3))
    tensor = torch.randint(0, 2, shape).to(dtype)
    how = draw(st.sampled_from(["own", "transposed", "strided", "parameter", "conjugated", "expanded"]))
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1)
    if how == "strided" and tensor.dim():
        return tensor[::2]
    if how == "parameter" and dtype in (torch.float32, torch.bfloat16):
        return torch.nn.Parameter(tensor)
    if how == "conjugated" and dtype.is_complex:
        return tensor.conj()
    if how == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


keys = st.one_of(st.text("ab/%", max_size=3), st.integers(0, 3), st.booleans())
plain = st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=300), st.none())
states = st.recursive(
    st.one_of(tensors(), plain),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=4),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("ab", max_size=2), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


def stepped(value: Any) -> Any:
    """The same structure with other content."""
    if isinstance(value, torch.Tensor):
        if value.is_conj():
            return (value.conj() + 1).conj()
        other = copy.deepcopy(value.detach())
        if other.numel() and value.stride() == other.stride():
            other = other.logical_not() if value.dtype is torch.bool else other + 1
        result = other if value.stride() == other.stride() else value
        return torch.nn.Parameter(result) if isinstance(value, torch.nn.Parameter) else result
    if isinstance(value, dict):
        return type(value)((key, stepped(child)) for key, child in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(stepped, value))
    return value


@given(states)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_short_way_gives_the_same(state: Any) -> None:
    """Whatever the state: the plan of a step later, its entries section and its table are those of the long way."""
    assert assert_same({"x": state}, {"x": stepped(state)})


@given(states, states)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_other_structures_are_noticed(state: Any, later: Any) -> None:
    """Two states that have nothing to do with each other: the short way gives the same, or says that it is closed."""
    assert_same({"x": state}, {"x": later})


BEFORE = {"w": torch.zeros(2000), "b": torch.zeros(3), "n": 5, "t": "text", "c": {1: torch.zeros(2)}}


@pytest.mark.parametrize(
    "change",
    [
        {"w": torch.zeros(2001)},
        {"w": torch.zeros(2000, dtype=torch.bfloat16)},
        {"w": torch.zeros(40, 50)},
        {"w": torch.zeros(4000)[::2]},
        {"b": torch.nn.Parameter(torch.zeros(3))},
        {"b": torch.zeros(3, requires_grad=True)},
        {"b": torch.nn.Buffer(torch.zeros(3))},
        {"b": torch.zeros(300)},
        {"b": 7},
        {"n": torch.zeros(())},
        {"n": list(range(20_000))},
        {"c": {True: torch.zeros(2)}},
        {"c": [torch.zeros(2)]},
        {"c": OrderedDict({1: torch.zeros(2)})},
        {"more": 1},
    ],
)
def test_every_change_of_structure_is_noticed(change: dict[str, Any]) -> None:
    """Another shape, dtype, layout, wrapper, container, type of key, or one more of them: the long way is taken."""
    assert assert_same(BEFORE, BEFORE)
    assert not assert_same(BEFORE, {**BEFORE, **change})


def test_values_of_another_length_are_packed_anew() -> None:
    """Inline values may grow: the plan is the short one, and the section is packed and checked again."""
    assert assert_same(BEFORE, {**BEFORE, "n": 1 << 40, "t": "a longer text"})


def test_large_values_take_the_short_way() -> None:
    """Values that stand in chunks are cut after the last ones, where they are as long."""
    before = {"params": list(range(20_000)), "w": torch.zeros(5)}
    assert assert_same(before, {**before, "params": list(range(20_000))[::-1]})


def test_sharded_and_numpy_states_take_the_long_way() -> None:
    """Kinds that have no signature here are planned as if nothing were known."""
    numpy = pytest.importorskip("numpy")
    assert not assert_same({"a": numpy.zeros(5)}, {"a": numpy.zeros(5)})


def test_other_chunk_sizes_take_the_long_way() -> None:
    """A structure holds for the sizes that it was planned with."""
    plan = finished(plan_take(nodes_of(BEFORE), Previous(), CHUNK_NBYTES, SMALL_NBYTES))
    known = Structure.of(plan, CHUNK_NBYTES, SMALL_NBYTES)
    assert known is not None
    assert known.plan(nodes_of(BEFORE), Previous(plan), 2 * CHUNK_NBYTES, SMALL_NBYTES) is None
    assert known.plan(nodes_of(BEFORE), Previous(plan), CHUNK_NBYTES, 0) is None
    assert known.plan(nodes_of(BEFORE), Previous(), CHUNK_NBYTES, SMALL_NBYTES) is None


def test_nothing_keeps_tensors_alive(tmp_path: Path) -> None:
    """After a take the memory of its tensors is free as soon as the application drops them."""
    tensors = [torch.zeros(10), torch.zeros(10_000)]
    gone = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    addresses = [weakref.ref(tensor) for tensor in tensors]
    Snapshot.take(str(tmp_path / "step_0"), {"s": StateDict(a=tensors[0], b=tensors[1])})
    assert structure._structures
    tensors.clear()
    gc.collect()
    assert [reference() for reference in addresses] == [None, None]
    assert [reference() for reference in gone] == [None, None]


def test_manifests_are_the_same_with_and_without_memory(tmp_path: Path) -> None:
    """Several takes of a model in training: entries and values read back are those of processes that knew nothing."""
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 3))
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 30)).square().sum().backward()
        optimizer.step()
        app_state = {"model": model, "optimizer": optimizer}
        Snapshot.take(str(tmp_path / "knows" / f"step_{step}"), app_state)
        known = dict(structure._structures)
        structure.forget()
        Snapshot.take(str(tmp_path / "forgets" / f"step_{step}"), app_state)
        structure._structures.update(known)
        one, other = (manifest(tmp_path / name / f"step_{step}") for name in ("knows", "forgets"))
        assert one.entries == other.entries
        restored = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 3))
        Snapshot(str(tmp_path / "knows" / f"step_{step}")).restore({"model": restored})
        for name, tensor in model.state_dict().items():
            assert torch.equal(restored.state_dict()[name], tensor)


def test_short_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second take of a state plans nothing anew and packs no entry again."""
    state = StateDict(**{f"t{number}": torch.rand(100) for number in range(50)}, lr=0.1)
    with knobs.override_max_chunk_size_bytes(1 << 20):
        Snapshot.take(str(tmp_path / "step_0"), {"s": state})

        def refuse(*arguments: object) -> None:
            raise AssertionError("the long way")

        monkeypatch.setattr("torchsnapshot.taking.take.plan_take", refuse)
        monkeypatch.setattr("torchsnapshot.taking.structure.pack_entries", refuse)
        state["t7"] += 1
        state["lr"] = 0.2
        Snapshot.take(str(tmp_path / "step_1"), {"s": state})
    target = StateDict()
    Snapshot(str(tmp_path / "step_1")).restore({"s": target})
    assert target["lr"] == 0.2
    assert all(torch.equal(target[f"t{number}"], state[f"t{number}"]) for number in range(50))
