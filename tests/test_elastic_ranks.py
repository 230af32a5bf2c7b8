"""Whatever ranks hold comes back on any other number of ranks, spread in any other way.

Real processes, 2, 4 and 8 of them over gloo, take and restore what ``hypothesis`` makes up; a plain tensor is the
reference. A world of one is this process, without a group. All examples share one launch for each size of the world.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import elastic_cases
import pytest
import torch
from crew import Crew, crew
from elastic_cases import BEFORE, Boxed, Kept, Meshed, Own, Spread, Whole
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rank_states import same

from torchsnapshot import Snapshot, StateDict

WORLD_SIZES = st.sampled_from([1, 2, 4, 8])
SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 12, 17, 33])
MESHES = {1: [(1,)], 2: [(2,), (1, 2)], 4: [(4,), (2, 2), (4, 1)], 8: [(8,), (2, 4), (4, 2), (2, 2, 2)]}
MESHES |= {3: [(3,)], 5: [(5,)], 6: [(6,), (2, 3), (3, 2)], 7: [(7,)]}

thorough = settings(deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.too_slow])


class World:
    """Any number of ranks that do what they are told, each at its first use."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._crews: dict[int, Crew] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returns on each rank."""
        if world_size == 1:
            return [function(*args)]
        if world_size not in self._crews or not self._crews[world_size].is_whole:
            self._crews[world_size] = self._stack.enter_context(crew(world_size))
        return self._crews[world_size].run(function, *args)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Ranks for all tests here."""
    with ExitStack() as stack:
        yield World(stack)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[str]]:
    """Paths of snapshots, each in a store of its own; in memory where that can be: an fsync costs nothing there."""
    in_memory = os.access("/dev/shm", os.W_OK)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if in_memory else tmp_path_factory.mktemp("elastic")) as folder:
        yield (f"{folder}/{number}/snapshot" for number in itertools.count())


# ------------------------------------------------------------------ tensors


@dataclass(frozen=True)
class Case:
    """Tensors, taken by some ranks and restored by others."""

    taken_by: int
    restored_by: int
    tensors: tuple[Kept, ...]
    chunk_nbytes: int


@st.composite
def meshed(draw: st.DrawFn, shape: tuple[int, ...], world_size: int) -> Meshed:
    """A mesh of all ranks in any order, or of some; each dimension of it cuts any one of the tensor, or none."""
    num_ranks = draw(st.just(world_size) | st.integers(1, world_size))
    ranks = draw(st.permutations(range(world_size)))[:num_ranks]
    mesh_shape = draw(st.sampled_from(MESHES[num_ranks]))
    dims = tuple(draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh_shape)
    order = draw(st.permutations([mesh_dim for mesh_dim, dim in enumerate(dims) if dim is not None]))
    return Meshed(tuple(ranks), mesh_shape, dims, tuple(order))


def replaced(numbers: tuple[int, ...], dim: int, number: int) -> tuple[int, ...]:
    """The same numbers with another one at a place."""
    return (*numbers[:dim], number, *numbers[dim + 1 :])


@st.composite
def boxed(draw: st.DrawFn, shape: tuple[int, ...], world_size: int) -> Boxed:
    """The tensor, cut in two again and again; each part on any rank."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[dim]))
        for start, size in ((offsets[dim], at), (offsets[dim] + at, sizes[dim] - at)):
            if size:
                boxes.append((replaced(offsets, dim, start), replaced(sizes, dim, size)))
    return Boxed(tuple(boxes), tuple(draw(st.integers(0, world_size - 1)) for _ in boxes))


def spreads(shape: tuple[int, ...], world_size: int) -> st.SearchStrategy[Spread]:
    """Every way in which ranks can hold a tensor."""
    if world_size == 1:
        return st.just(Whole())
    ways: list[st.SearchStrategy[Spread]] = [meshed(shape, world_size)] * 3 + [st.just(Whole())]
    if shape and prod(shape):
        ways.append(boxed(shape, world_size))
    return st.one_of(ways)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some tensors, and two worlds."""
    taken_by, restored_by = draw(WORLD_SIZES), draw(WORLD_SIZES)
    tensors = []
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(SIZES, max_size=3).map(tuple))
        tensors.append(
            Kept(
                f"t{number}",
                shape,
                draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int16, torch.float64])),
                draw(spreads(shape, taken_by)),
                draw(spreads(shape, restored_by)),
            )
        )
    return Case(taken_by, restored_by, tuple(tensors), draw(st.sampled_from([4096, 1 << 20])))


ONLY_ON_RANK_1 = Meshed(ranks=(1,), mesh_shape=(1,), dims=(0,), order=(0,))


@given(case=cases())
@example(case=Case(2, 1, (Kept("t0", (3,), torch.float32, ONLY_ON_RANK_1, Whole()),), 4096))
@settings(thorough, max_examples=60)
def test_any_spread_becomes_any_other(world: World, places: Iterator[str], case: Case) -> None:
    """Plain tensors, DTensors of any mesh and placements and ShardedTensors become one another, part by part."""
    path = next(places)
    world.run(case.taken_by, elastic_cases.take, path, case.tensors, case.chunk_nbytes)
    wrong = world.run(case.restored_by, elastic_cases.restore, path, case.tensors)
    assert not any(wrong)
    # one process that has a place for nothing gets everything
    everything: StateDict = StateDict()
    Snapshot(path).restore({"s": everything})
    assert everything.keys() == {kept.name for kept in case.tensors}
    assert all(same(everything[kept.name], kept.full) for kept in case.tensors)
    elastic_cases.remove(path)


@given(case=cases(), number=st.integers(0, 9))
@settings(thorough, max_examples=30)
def test_any_spread_is_read_one_by_one(world: World, places: Iterator[str], case: Case, number: int) -> None:
    """``read_object`` gives a tensor whole, into a plain tensor and into any other, under every rank's number."""
    path = next(places)
    world.run(case.taken_by, elastic_cases.take, path, case.tensors, case.chunk_nbytes)
    numbers = [number_of(kept, case.taken_by, number) for kept in case.tensors]
    assert not any(world.run(case.restored_by, elastic_cases.read, path, case.tensors, numbers))
    elastic_cases.remove(path)


def number_of(kept: Kept, taken_by: int, number: int) -> int:
    """A rank's number under which a tensor stands: any, unless some ranks only had it."""
    if taken_by == 1:
        return 0
    if isinstance(kept.taken, Meshed) and len(kept.taken.ranks) < taken_by:
        return kept.taken.ranks[number % len(kept.taken.ranks)]
    return number


# ------------------------------------------------------------------ what ranks have for themselves


@dataclass(frozen=True)
class OwnCase:
    """Values of each rank, taken by some ranks and restored by others."""

    taken_by: int
    restored_by: int
    values: tuple[Own, ...]
    missing_rank: str | None

    def expected(self, own: Own, rank: int) -> int:
        """The number that stands for what a rank has afterwards."""
        if self.refused:
            return BEFORE
        if rank < self.taken_by:
            return own.contents[rank]
        return own.contents[0] if own.is_shared or self.missing_rank == "rank0" else BEFORE

    @property
    def refused(self) -> list[str]:
        """The places of which the error must speak."""
        if self.taken_by == self.restored_by or self.missing_rank is not None:
            return []
        return [f"s/{own.name}:" for own in self.values if not own.is_shared]


@st.composite
def own_cases(draw: st.DrawFn) -> OwnCase:
    """Some values, equal on all ranks or not, and two worlds."""
    taken_by, restored_by = draw(WORLD_SIZES), draw(WORLD_SIZES)
    values = []
    for number in range(draw(st.integers(1, 5))):
        equal = st.integers(0, 1).map(lambda content: (content,) * taken_by)
        contents = draw(equal | st.tuples(*[st.integers(0, 1)] * taken_by))
        values.append(Own(f"v{number}", contents, draw(st.booleans())))
    return OwnCase(taken_by, restored_by, tuple(values), draw(st.sampled_from([None, "drop", "rank0"])))


@given(case=own_cases())
@settings(thorough, max_examples=40)
def test_what_ranks_have_for_themselves(world: World, places: Iterator[str], case: OwnCase) -> None:
    """As many ranks get their own; others what is equal on all, and for the rest the rule counts, or it is an error."""
    path = next(places)
    world.run(case.taken_by, elastic_cases.take_own, path, case.values)
    found = world.run(case.restored_by, elastic_cases.restore_own, path, case.values, case.missing_rank)
    for rank, (values, error) in enumerate(found):
        named = [f"s/{own.name}:" for own in case.values if f"s/{own.name}:" in error]
        assert named == case.refused, error
        assert values == {own.name: case.expected(own, rank) for own in case.values}
    elastic_cases.remove(path)
