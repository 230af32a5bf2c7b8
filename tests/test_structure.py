"""Takes of a state that is made like the last one: less work, and not one byte of difference."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from folders import manifest, new_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_strategies import states, stepped

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.format.entries import pack_entries
from torchsnapshot.state.app_state import check_app_state
from torchsnapshot.state.flatten import flatten
from torchsnapshot.state.live_digests import Look
from torchsnapshot.state.skeleton import Skeleton
from torchsnapshot.state.watched_chunks import Extent
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.keys import new_id
from torchsnapshot.store.leases import TakeSession
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.processes import current_process
from torchsnapshot.store.records import PENDING_FOLDER, PendingSet
from torchsnapshot.taking import structure
from torchsnapshot.taking.expected import differing
from torchsnapshot.taking.history import Remembered, place_of
from torchsnapshot.taking.plan import Chunk, Leaf, TakePlan, build_entries, plan_take
from torchsnapshot.taking.structure import Structure
from torchsnapshot.taking.take import Take, TakeOptions, open_take

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


@given(states)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_short_way_gives_the_same(state: Any) -> None:
    """Whatever the state: the plan of a step later, its entries section and its table are those of the long way."""
    assert assert_same({"x": state}, {"x": stepped(state)})


@given(states, states)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


def test_numpy_states_take_the_short_way() -> None:
    """Arrays of numpy, inline and in chunks, of any order in memory; another dtype, shape or order is noticed."""
    numpy = pytest.importorskip("numpy")
    before = {"a": numpy.zeros(5), "b": numpy.zeros((40, 30)), "t": numpy.array(["x", "yy"])}
    assert assert_same(before, {"a": numpy.ones(5), "b": numpy.ones((40, 30)), "t": numpy.array(["zz", "y"])})
    transposed = {**before, "b": numpy.zeros((30, 40)).T, "a": numpy.zeros(10)[::2]}
    assert assert_same(transposed, {**transposed, "b": numpy.ones((30, 40)).T, "a": numpy.arange(10.0)[::2]})
    assert not assert_same(before, transposed)
    assert not assert_same(before, {**before, "a": numpy.zeros(5, "f4")})
    assert not assert_same(before, {**before, "t": numpy.array(["x", "yyy"])})
    assert not assert_same(before, {**before, "a": torch.zeros(5, dtype=torch.float64)})


def test_other_chunk_sizes_take_the_long_way() -> None:
    """A structure holds for the sizes that it was planned with."""
    plan = finished(plan_take(nodes_of(BEFORE), Previous(), CHUNK_NBYTES, SMALL_NBYTES))
    known = Structure.of(plan, CHUNK_NBYTES, SMALL_NBYTES)
    assert known is not None
    assert known.plan(nodes_of(BEFORE), Previous(plan), 2 * CHUNK_NBYTES, SMALL_NBYTES) is None
    assert known.plan(nodes_of(BEFORE), Previous(plan), CHUNK_NBYTES, 0) is None
    assert known.plan(nodes_of(BEFORE), Previous(), CHUNK_NBYTES, SMALL_NBYTES) is None


class Everything:
    """Knowledge of a store that holds all that was ever stored."""

    def __init__(self) -> None:
        self.origin: object = "a"
        self.answer = True

    def may_reuse(self, refs: Iterable[ChunkRef]) -> bool:
        """See ``Known``."""
        assert all(ref.key for ref in refs)
        return self.answer

    def look_for(self, refs: Iterable[ChunkRef]) -> None:
        """See ``Known``."""


class Knowing(Look):
    """Knows what stands at some places, chosen at random."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random

    def digests(self, extents: Sequence[Extent]) -> list[bytes | None]:
        """See ``Look``."""
        return [digest_at(extent) if self._random.random() < 0.5 else None for extent in extents]


def digest_at(extent: Extent) -> bytes:
    """Of what stands there now."""
    address, nbytes = extent
    return digest_of(memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B"))


def stored(plan: TakePlan) -> TakePlan:
    """The plan with each chunk that has no place yet stored under the digest of its content."""
    for chunk in plan.chunks():
        if chunk.ref is None:
            content = bytearray(chunk.nbytes)
            chunk.source.stage(chunk.piece.box, memoryview(content))
            digest = digest_of(memoryview(content))
            key = f"{digest.hex()}-{'0' * 24}-0"
            chunk.ref = ChunkRef(digest, chunk.nbytes, key, chunk.nbytes, 0, chunk.nbytes)
    return plan


def partly_stepped(value: Any, random: Random) -> Any:
    """The same structure, with other content here and there."""
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update((key, partly_stepped(child, random)) for key, child in value.items())
        return changed
    if isinstance(value, (list, tuple)):
        return type(value)(partly_stepped(child, random) for child in value)
    return stepped(value) if random.random() < 0.3 else value


def name(chunk: Chunk) -> tuple[str, int]:
    """What tells a chunk from all others of its plan."""
    return chunk.path, chunk.piece.offset


def names(groups: list[list[Chunk]], wanted: set[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """The chunks of each group that are wanted, in their order."""
    return [[each for each in map(name, group) if each in wanted] for group in groups]


def places(leaves: list[Leaf]) -> dict[str, Any]:
    """What is remembered of a take, by path."""
    return {leaf.path: place_of(leaf) for leaf in leaves if leaf.chunks}


@given(states, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_settled_plans_are_those_of_the_long_way(state: Any, random: Random) -> None:
    """Steps in which some tensors change: what is put, packed and remembered is that of the long way, at every step."""
    state = {"x": state, "small": [torch.zeros(100), torch.zeros(3), torch.zeros(200)]}
    known: Any = Everything()
    nodes = nodes_of(state)
    plan = stored(plan_take(nodes, Previous(), CHUNK_NBYTES, SMALL_NBYTES))
    short_way = Structure.of(plan, CHUNK_NBYTES, SMALL_NBYTES)
    assert short_way is not None
    skeleton = short_way.skeleton = Skeleton({"s": state}, nodes)
    assert short_way.settle(plan, "0", known) is not None
    remembered = Remembered.of_plan("0", plan)
    for step in range(1, 4):
        state = partly_stepped(state, random)
        reading = skeleton.read({"s": state}, lambda path, name: None)
        assert reading is not None
        look = Knowing(random)
        found = short_way.plan_settled(reading, remembered.take_id, known, look, (CHUNK_NBYTES, SMALL_NBYTES))
        assert found is not None
        short, expected = found
        groups = [*short.groups, *(differing(group, known, look) for group in expected.groups)]
        large = [*short.large, *differing(expected.large, known, look)]
        stored(short)
        long = stored(plan_take(nodes_of(state), remembered, CHUNK_NBYTES, SMALL_NBYTES))
        looked_at = set(map(name, [*large, *itertools.chain(*groups)]))
        assert looked_at >= {name(chunk) for chunk in long.chunks() if chunk.ref and chunk.ref.digest != chunk.previous}
        assert sorted(map(name, large)) == sorted(each for each in map(name, long.large) if each in looked_at)
        assert sorted(filter(None, names(groups, looked_at))) == sorted(filter(None, names(long.groups, looked_at)))
        assert (short.state_nbytes, short.chunked_nbytes) == (long.state_nbytes, long.chunked_nbytes)
        entries, table = build_entries(long, rank=0)
        data, short_table = short_way.pack(short)
        assert (data, short_table.pack()) == (pack_entries(entries), table.pack())
        settled = short_way.settle(short, str(step), known)
        assert settled is not None
        remembered = Remembered.of_plan(str(step), long)
        assert places(settled) == {leaf.path: remembered.at(leaf.path) for leaf in long.leaves if leaf.chunks}


def test_settled_leaves_need_the_same_knowledge() -> None:
    """After a sweep, another take, with other sizes, or where a blob is gone, nothing that was settled is used."""
    state = {"a": torch.zeros(100), "b": torch.zeros(2000)}
    known: Any = Everything()
    nodes = nodes_of(state)
    plan = stored(plan_take(nodes, Previous(), CHUNK_NBYTES, SMALL_NBYTES))
    short_way = Structure.of(plan, CHUNK_NBYTES, SMALL_NBYTES)
    assert short_way is not None
    skeleton = short_way.skeleton = Skeleton({"s": state}, nodes)
    reading = skeleton.read({"s": state}, lambda path, name: None)
    assert reading is not None
    sizes = (CHUNK_NBYTES, SMALL_NBYTES)
    assert short_way.plan_settled(reading, "0", known, Look(), sizes) is None
    short_way.settle(plan, "0", known)
    short = short_way.plan_settled(reading, "0", known, Look(), sizes)
    assert short is not None
    settled, expected = short
    assert settled.is_settled
    assert differing([*expected.large, *itertools.chain(*expected.groups)], known, Look()) == []
    assert [leaf.is_settled for leaf in settled.leaves] == [True, True, True]
    assert short_way.plan_settled(reading, "1", known, Look(), sizes) is None
    assert short_way.plan_settled(reading, None, known, Look(), sizes) is None
    assert short_way.plan_settled(reading, "0", known, Look(), (CHUNK_NBYTES, 0)) is None
    other = Skeleton({"s": state}, nodes).read({"s": state}, lambda path, name: None)
    assert other is not None
    assert short_way.plan_settled(other, "0", known, Look(), sizes) is None
    known.answer = False
    assert short_way.plan_settled(reading, "0", known, Look(), sizes) is None
    known.answer, known.origin = True, "b"
    assert short_way.plan_settled(reading, "0", known, Look(), sizes) is None


def small_state() -> StateDict:
    """Many small tensors, inline and in a pack, and a large one."""
    tensors = {f"t{number}": torch.rand(number + 1) for number in range(200)}
    return StateDict(**tensors, large=torch.rand(10_000), lr=0.1)


def assert_restores(path: Path, state: StateDict) -> None:
    """The snapshot at the path holds this state, and every byte of it can be read."""
    target = StateDict()
    Snapshot(str(path)).restore({"s": target})
    assert target["lr"] == state["lr"]
    assert all(torch.equal(target[name], state[name]) for name in state if name != "lr")


def keys_of(path: Path) -> set[str]:
    """The blobs that a snapshot refers to."""
    return set(manifest(path).table(0).keys)


def test_changes_that_leave_no_trace_are_stored(tmp_path: Path) -> None:
    """Content that changes behind autograd's back, in place, is found in every small tensor."""
    state = small_state()
    Snapshot.take(str(tmp_path / "step_0"), {"s": state})
    for step, number in enumerate((0, 50, 63, 64, 65, 199), 1):
        tensor = state[f"t{number}"]
        version = tensor._version
        tensor.data[number] = step
        assert tensor._version == version
        Snapshot.take(str(tmp_path / f"step_{step}"), {"s": state})
        assert_restores(tmp_path / f"step_{step}", state)


def test_packs_that_are_gone_are_written_again(tmp_path: Path) -> None:
    """A blob that somebody removed is noticed before anything that was settled is trusted."""
    state = small_state()
    Snapshot.take(str(tmp_path / "step_0"), {"s": state})
    Snapshot.take(str(tmp_path / "step_1"), {"s": state})
    for blob in (tmp_path / ".torchsnapshot" / "blobs").rglob("*.p"):
        blob.unlink()
    Snapshot.take(str(tmp_path / "step_2"), {"s": state})
    assert_restores(tmp_path / "step_2", state)


def test_a_take_that_fails_settles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a take stored or moved that was never committed is not what the next one refers to."""
    state = small_state()
    Snapshot.take(str(tmp_path / "step_0"), {"s": state})
    for number in range(190):
        state[f"t{number}"] += 1
    with monkeypatch.context() as patch:

        def fail(*arguments: object) -> None:
            raise OSError("the disk is full")

        patch.setattr(TakeSession, "commit", fail)
        with pytest.raises(OSError, match="full"):
            Snapshot.take(str(tmp_path / "step_1"), {"s": state})
    committed = keys_of(tmp_path / "step_0")
    for blob in (tmp_path / ".torchsnapshot" / "blobs").rglob("*-*"):
        if blob.name not in committed:
            blob.unlink()
    Snapshot.take(str(tmp_path / "step_2"), {"s": state})
    assert_restores(tmp_path / "step_2", state)


def test_what_overlapping_takes_settle_is_looked_at_before_it_is_reused(tmp_path: Path) -> None:
    """A take in which nothing had changed, and which ends after a later one, does not pass that one's blobs for its."""
    state, other = small_state(), small_state()
    # what is large is looked at by itself, so that there is always something to do about it
    del state["large"], other["large"]
    for step in range(2):
        Snapshot.take(str(tmp_path / f"step_{step}"), {"s": state})
    with begun(tmp_path / "first", state) as first, begun(tmp_path / "second", other) as second:
        second.commit()
        first.commit()
    condemned = keys_of(tmp_path / "first")
    pending = PendingSet(current_process(), frozenset(condemned))
    LocalBackend(str(tmp_path)).put(f"{PENDING_FOLDER}/{new_id()}", pending.pack())
    Snapshot.take(str(tmp_path / "third"), {"s": state})
    assert keys_of(tmp_path / "third").isdisjoint(condemned)
    assert_restores(tmp_path / "third", state)


def begun(path: Path, state: StateDict) -> Take:
    """A take that has stored everything and not yet committed."""
    take = open_take(str(path), check_app_state({"s": state}), TakeOptions())
    take.begin(in_background=False)
    return take


def test_small_chunks_that_stand_still_move_out_of_dying_packs(tmp_path: Path) -> None:
    """Settled chunks of a pack that is hardly used any more are put into a new one, as others are."""
    state = small_state()
    Snapshot.take(str(tmp_path / "step_0"), {"s": state})
    for step in range(1, 4):
        for name in ["large", *(f"t{number}" for number in range(70, 200))]:
            state[name] += 1
        Snapshot.take(str(tmp_path / f"step_{step}"), {"s": state})
        assert_restores(tmp_path / f"step_{step}", state)
    shared = keys_of(tmp_path / "step_0") & keys_of(tmp_path / "step_3")
    assert not {key for key in shared if key.endswith(".p")}


def test_a_restore_between_takes(tmp_path: Path) -> None:
    """After a restore of an older snapshot takes go on from there."""
    state = small_state()
    Snapshot.take(str(tmp_path / "step_0"), {"s": state})
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            tensor += 1
    Snapshot.take(str(tmp_path / "step_1"), {"s": state})
    Snapshot(str(tmp_path / "step_0")).restore({"s": state})
    for step in (2, 3):
        snapshot = Snapshot.take(str(tmp_path / f"step_{step}"), {"s": state})
        assert snapshot.stats is not None
        assert snapshot.stats.new_nbytes == 0
        assert_restores(tmp_path / f"step_{step}", state)


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
        known = structure._structures.items()
        structure.forget()
        Snapshot.take(str(tmp_path / "forgets" / f"step_{step}"), app_state)
        for store_id, kept in known:
            structure.remember(store_id, kept)
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

        monkeypatch.setattr("torchsnapshot.taking.planning.plan_take", refuse)
        monkeypatch.setattr("torchsnapshot.taking.section.pack_entries", refuse)
        state["t7"] += 1
        state["lr"] = 0.2
        Snapshot.take(str(tmp_path / "step_1"), {"s": state})
    target = StateDict()
    Snapshot(str(tmp_path / "step_1")).restore({"s": target})
    assert target["lr"] == 0.2
    assert all(torch.equal(target[f"t{number}"], state[f"t{number}"]) for number in range(50))
