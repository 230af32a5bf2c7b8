"""What a restore brings back, where it puts it, and what it refuses."""

from __future__ import annotations

import collections
import copy
import enum
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from folders import blobs, new_process, refs
from torch import nn

from torchsnapshot import RNGState, Snapshot, StateDict, knobs
from torchsnapshot.errors import (
    AbsentStateError,
    CorruptionError,
    MismatchError,
    MissingBlobError,
    PartialRestoreError,
    PickleRefusedError,
    SnapshotError,
)
from torchsnapshot.stats import Stats
from torchsnapshot.test_utils import check_state_dict_eq

CHUNK_NBYTES = 64 << 10
NUMEL = CHUNK_NBYTES // 4
"""float32 elements in one chunk."""


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB and reproducible tensors."""
    new_process()
    torch.manual_seed(0)
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for snapshots that nothing else uses."""
    return tmp_path / "run"


@pytest.fixture
def path(root: Path) -> str:
    """Where one snapshot goes."""
    return str(root / "step_0")


def take(path: str, **state: Any) -> Snapshot:
    """Take a snapshot of one ``StateDict`` under the key ``s``."""
    return Snapshot.take(path, {"s": StateDict(**state)})


def restored(path: str, **options: Any) -> dict[str, Any]:
    """What a snapshot holds, restored into nothing."""
    target = StateDict()
    Snapshot(path).restore({"s": target}, **options)
    return target.data


def restore_into(path: str, target: Any, key: str = "s", **options: Any) -> Stats:
    """Restore one object; returns the figures."""
    snapshot = Snapshot(path)
    snapshot.restore({key: StateDict(**target) if type(target) is dict else target}, **options)
    assert snapshot.stats is not None
    return snapshot.stats


# every size class: inline, packed, alone, several chunks
SIZES = {"inline": (3,), "small": (30, 7), "chunk": (NUMEL,), "chunks": (5, NUMEL - 100)}


# ------------------------------------------------------------------ in place


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_restore_writes_into_the_targets_own_memory(path: str, shape: tuple[int, ...]) -> None:
    """Tensors keep their identity and their memory, whatever their size and layout."""
    source = torch.rand(shape)
    take(path, plain=source, parameter=nn.Parameter(source + 1), strided=source + 2, other=source + 3)
    targets = {
        "plain": torch.zeros(shape),
        "parameter": nn.Parameter(torch.zeros(shape)),
        "strided": torch.zeros(*shape, 2)[..., 0],
        "other": torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1]),
    }
    addresses = {name: tensor.data_ptr() for name, tensor in targets.items()}
    state = StateDict(**targets)
    Snapshot(path).restore({"s": state})
    for number, (name, tensor) in enumerate(targets.items()):
        assert state[name] is tensor
        assert tensor.data_ptr() == addresses[name]
        assert torch.equal(tensor, source + number)


def test_views_into_one_buffer_are_written_in_place(path: str) -> None:
    """Disjoint parts of one flat buffer each get their content, and the rest of the buffer stays."""
    take(path, a=torch.ones(100), b=torch.full((100,), 2.0))
    flat = torch.zeros(300)
    restore_into(path, {"b": flat[150:250], "a": flat[:100]})
    assert torch.equal(flat, torch.cat([torch.ones(100), torch.zeros(50), torch.full((100,), 2.0), torch.zeros(50)]))


def test_numpy_arrays_are_written_in_place(path: str) -> None:
    """Arrays come back as arrays, into the target's own memory where it has one; read-only ones are replaced."""
    arrays = {"small": numpy.arange(12.0).reshape(3, 4), "large": numpy.arange(5 * NUMEL), "text": numpy.array(["é"])}
    take(path, **arrays)
    fresh = restored(path)
    targets = {name: numpy.zeros_like(array) for name, array in arrays.items()}
    frozen = {name: numpy.zeros_like(array) for name, array in arrays.items()}
    for array in frozen.values():
        array.flags.writeable = False
    kept, replaced = StateDict(**targets), StateDict(**frozen)
    Snapshot(path).restore({"s": kept})
    Snapshot(path).restore({"s": replaced})
    for name, array in arrays.items():
        assert kept[name] is targets[name]
        for found in (fresh[name], kept[name], replaced[name]):
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert (found == array).all()
        assert not (frozen[name] == array).all()


def test_array_and_tensor_stand_in_for_each_other(path: str) -> None:
    """A stored array fills a tensor of its dtype, and the other way round; the target keeps its kind."""
    take(path, array=numpy.arange(1000.0), tensor=torch.arange(1000.0, dtype=torch.float64))
    state = StateDict(array=torch.zeros(1000, dtype=torch.float64), tensor=numpy.zeros(1000))
    array, tensor = state["tensor"], state["array"]
    Snapshot(path).restore({"s": state})
    assert state["array"] is tensor
    assert state["tensor"] is array
    assert (array == numpy.arange(1000.0)).all()
    assert torch.equal(tensor, torch.arange(1000.0, dtype=torch.float64))


def test_structure_comes_from_the_snapshot(path: str) -> None:
    """Containers are those that were taken: longer, shorter, of another kind, and with another order of keys."""
    state = {
        "list": [torch.ones(100), (torch.zeros(2), {"x": 1})],
        "ordered": collections.OrderedDict(b=torch.ones(3), a=2),
        "shorter": [torch.ones(1)],
        "was_tensor": {"now": "dict"},
        "was_dict": torch.arange(300),
        "mixed": {2: torch.ones(1), "2": torch.zeros(1)},
    }
    take(path, **state)
    target = {
        "list": (torch.zeros(100),),
        "ordered": {"a": torch.zeros(4), "b": torch.zeros(3)},
        "shorter": [torch.zeros(1)] * 5,
        "was_tensor": torch.zeros(3),
        "was_dict": {"x": torch.zeros(300)},
        "kept": 7,
    }
    first = target["list"][0]
    wrapped = StateDict(**target)
    Snapshot(path).restore({"s": wrapped})
    assert wrapped.data.pop("kept") == 7
    assert check_state_dict_eq(wrapped.data, state)
    assert type(wrapped["ordered"]) is collections.OrderedDict
    assert list(wrapped["ordered"]) == ["b", "a"]
    assert wrapped["list"][0] is first


class Colour(enum.Enum):
    """A class that comes back from the target."""

    RED = 1
    BLUE = 2


class Point(NamedTuple):
    """A class that comes back from the target."""

    x: Any
    y: Any


def test_classes_come_from_the_target(path: str) -> None:
    """An enum member or a namedtuple is rebuilt where the target has one of that class; else its plain base."""
    take(path, colour=Colour.BLUE, point=Point(1, torch.ones(3)), plain=[Colour.RED, Point(1, 2)])
    target = restored_into = StateDict(colour=Colour.RED, point=Point(0, torch.zeros(3)), plain=[])
    Snapshot(path).restore({"s": restored_into})
    assert target["colour"] is Colour.BLUE
    assert type(target["point"]) is Point
    assert target["plain"] == [Colour.RED, Point(1, 2)]
    bare = restored(path)
    assert bare["colour"] == 2
    assert type(bare["point"]) is tuple


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_parameters_buffers_and_flags_come_back_where_there_is_nothing(
    path: str, shape: tuple[int, ...], requires_grad: bool
) -> None:
    """Without a target, a ``Parameter`` is one again, a ``Buffer`` too, and ``requires_grad`` is as it was."""
    state = {
        "parameter": nn.Parameter(torch.rand(shape), requires_grad=requires_grad),
        "buffer": nn.Buffer(torch.rand(shape)),
        "tensor": torch.rand(shape, requires_grad=requires_grad),
        "numbers": nn.Parameter(torch.ones(shape, dtype=torch.int64), requires_grad=False),
    }
    take(path, **state)
    found = restored(path)
    for name, tensor in state.items():
        assert type(found[name]) is type(tensor)
        assert isinstance(found[name], nn.Buffer) == isinstance(tensor, nn.Buffer)
        assert found[name].requires_grad == tensor.requires_grad
        assert found[name].is_leaf
        assert torch.equal(found[name], tensor)
    assert isinstance(Snapshot(path).read_object("0/s/parameter"), nn.Parameter)


def test_restored_parameter_takes_part_in_training(path: str) -> None:
    """A parameter that a restore has made gets gradients, and can be written."""
    take(path, weight=nn.Parameter(torch.ones(1000)))
    weight = restored(path)["weight"]
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight, torch.zeros(1000))


# ------------------------------------------------------------------ shapes and dtypes


CONVERSIONS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),
    (torch.int64, torch.float32),
    (torch.float32, torch.int32),
    (torch.float32, torch.float8_e4m3fn),
    (torch.bool, torch.uint8),
    (torch.float32, torch.complex64),
]


@pytest.mark.parametrize(("stored", "wanted"), CONVERSIONS, ids=str)
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_another_dtype_converts(path: str, shape: tuple[int, ...], stored: torch.dtype, wanted: torch.dtype) -> None:
    """The target's dtype and memory stay, the values convert as torch does it, and the figures say so."""
    source = (torch.rand(shape) * 4).to(stored)
    take(path, t=source)
    target = torch.zeros(shape).to(wanted)
    version = target._version
    stats = restore_into(path, {"t": target})
    assert torch.equal(target.view(torch.uint8), source.to(wanted).view(torch.uint8))
    assert stats.converted == {"s/t": (str(stored)[6:], str(wanted)[6:])}
    assert target._version > version


def test_same_dtype_is_no_conversion(path: str) -> None:
    """Nothing is told of tensors that keep their dtype, and nothing is left over from an earlier restore."""
    take(path, t=torch.rand(100), u=torch.rand(100))
    snapshot = Snapshot(path)
    snapshot.restore({"s": StateDict(t=torch.zeros(100).half(), u=torch.zeros(100))})
    assert snapshot.stats is not None
    assert list(snapshot.stats.converted) == ["s/t"]
    snapshot.restore({"s": StateDict(t=torch.zeros(100), u=torch.zeros(100))})
    assert snapshot.stats.converted == {}


def test_arrays_convert_too(path: str) -> None:
    """An array of another dtype keeps it."""
    take(path, a=numpy.arange(1000), b=torch.arange(1000))
    state = StateDict(a=numpy.zeros(1000, dtype="float32"), b=numpy.zeros(1000, dtype="int16"))
    Snapshot(path).restore({"s": state})
    assert (state["a"].dtype, state["b"].dtype) == (numpy.float32, numpy.int16)
    assert (state["a"] == numpy.arange(1000)).all()
    assert (state["b"] == numpy.arange(1000)).all()


def test_everything_that_does_not_fit_is_told_at_once_and_nothing_changes(path: str) -> None:
    """Other shapes, and dtypes that lose something, are one error that names each path; no tensor is written."""
    take(path, a=torch.ones(100), b=torch.ones(2, 3), c=torch.ones(4, dtype=torch.complex64), d=torch.ones(3 * NUMEL))
    targets = {"a": torch.zeros(100), "b": torch.zeros(3, 2), "c": torch.zeros(4), "d": torch.zeros(3 * NUMEL + 1)}
    with pytest.raises(MismatchError) as caught:
        restore_into(path, targets)
    message = str(caught.value)
    assert "s/a" not in message
    assert "s/b: stored [2, 3], target [3, 2]" in message
    assert "s/c" in message
    assert "s/d" in message
    assert all(not tensor.any() for tensor in targets.values())


# ------------------------------------------------------------------ the meta device


def test_meta_targets_are_allocated(path: str) -> None:
    """What stands on the meta device comes back on the CPU, or where ``device`` says, in the target's dtype."""
    base = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    take(path, a=torch.rand(1000), b=base, c=torch.rand(100))
    for options in ({}, {"device": "cpu"}, {"device": torch.device("cpu")}):
        state = StateDict(
            a=torch.empty(1000, device="meta"),
            b=torch.empty(2, 3, 4, 5, device="meta"),
            c=nn.Parameter(torch.empty(100, device="meta", dtype=torch.float16)),
        )
        stats = restore_into(path, state, **options)
        assert {tensor.device.type for tensor in state.values()} == {"cpu"}
        assert torch.equal(state["b"], base)
        assert state["c"].dtype is torch.float16
        assert stats.converted == {"s/c": ("float32", "float16")}


class Tied(nn.Module):
    """A module with tied weights, a buffer, and one that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.rand(100), requires_grad=False)


def test_module_on_the_meta_device_becomes_real(path: str) -> None:
    """Parameters and buffers are assigned; gradient flags are the module's own; what is tied stays tied."""
    source = Tied()
    Snapshot.take(path, {"m": source})
    with torch.device("meta"):
        target = Tied()
    Snapshot(path).restore({"m": target})
    assert check_state_dict_eq(target.state_dict(), source.state_dict())
    assert all(not tensor.is_meta for tensor in (*target.parameters(), *target.buffers()))
    assert target.head.weight is target.embedding.weight
    assert isinstance(target.embedding.weight, nn.Parameter)
    assert (target.embedding.weight.requires_grad, target.frozen.requires_grad) == (True, False)
    target.head(target.embedding(torch.tensor([1, 2]))).sum().backward()
    assert target.embedding.weight.grad is not None


def test_module_that_is_partly_on_the_meta_device_keeps_what_is_real(path: str) -> None:
    """The real parameters keep their identity and memory, so that an optimizer still holds the right ones."""
    source = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.BatchNorm1d(20))
    Snapshot.take(path, {"m": source})
    target = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20, device="meta"), nn.BatchNorm1d(20))
    weight, address = target[0].weight, target[0].weight.data_ptr()
    mean = target[2].running_mean
    Snapshot(path).restore({"m": target})
    assert target[0].weight is weight
    assert weight.data_ptr() == address
    assert target[2].running_mean is mean
    assert check_state_dict_eq(target.state_dict(), source.state_dict())


# ------------------------------------------------------------------ memory that is shared, or may not be written


def share_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one storage."""
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_equal_content_is_restored_into_separate_memory(path: str, shape: tuple[int, ...]) -> None:
    """Moments that are all zero, and tensors that were tied when taken, are separate where the target's are."""
    zeros = torch.zeros(shape)
    take(path, first=zeros, second=zeros.clone(), tied=zeros)
    for state in (StateDict(), StateDict(**{name: torch.ones(shape) for name in ("first", "second", "tied")})):
        Snapshot(path).restore({"s": state})
        tensors = list(state.values())
        assert not any(share_memory(a, b) for a in tensors for b in tensors if a is not b)
        tensors[0].fill_(5)
        assert not tensors[1].any()
        assert not tensors[2].any()


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_tied_target_of_separate_content_is_untied_and_right(path: str, shape: tuple[int, ...]) -> None:
    """Where the target shares memory but the snapshot's tensors differ, each gets its own content."""
    first, second = torch.rand(shape), torch.rand(shape)
    take(path, first=first, second=second)
    shared = torch.zeros(shape)
    state = StateDict(first=shared, second=shared)
    Snapshot(path).restore({"s": state})
    assert torch.equal(state["first"], first)
    assert torch.equal(state["second"], second)
    assert not share_memory(state["first"], state["second"])


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_tied_target_of_equal_content_stays_tied(path: str, shape: tuple[int, ...]) -> None:
    """What is tied in the target and equal in the snapshot is written in place, and stays tied."""
    source = torch.rand(shape)
    take(path, first=source, second=source.clone())
    shared = torch.zeros(shape)
    state = StateDict(first=shared, second=shared)
    Snapshot(path).restore({"s": state})
    assert state["first"] is state["second"] is shared
    assert torch.equal(shared, source)


def test_target_that_shares_memory_in_another_order_is_right(path: str) -> None:
    """Two views of one memory with other strides cannot both hold the same matrix: one gets memory of its own."""
    source = torch.rand(40, 40)
    take(path, a=source, b=source.clone())
    base = torch.zeros(40, 40)
    state = StateDict(a=base, b=base.t())
    Snapshot(path).restore({"s": state})
    assert torch.equal(state["a"], source)
    assert torch.equal(state["b"], source)


def test_target_whose_parts_overlap_is_right(path: str) -> None:
    """Overlapping slices of one buffer get their own content each."""
    a, b = torch.rand(100), torch.rand(100)
    take(path, a=a, b=b)
    flat = torch.zeros(150)
    state = StateDict(a=flat[:100], b=flat[50:])
    Snapshot(path).restore({"s": state})
    assert torch.equal(state["a"], a)
    assert torch.equal(state["b"], b)


def test_tied_module_restores(path: str) -> None:
    """A module with tied weights gets them back tied."""
    source, target = Tied(), Tied()
    Snapshot.take(path, {"m": source})
    weight = target.head.weight
    Snapshot(path).restore({"m": target})
    assert target.head.weight is target.embedding.weight is weight
    assert check_state_dict_eq(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_targets_that_cannot_be_written_are_replaced(path: str, shape: tuple[int, ...]) -> None:
    """Expanded, overlapping and inference tensors, and lazy conjugates, get a new tensor; theirs stays as it was."""
    source = torch.rand(shape)
    names = ("expanded", "overlapping", "inference", "converted")
    take(path, **{name: source + number for number, name in enumerate(names)}, conjugate=source + 0j)
    with torch.inference_mode():
        inference = torch.zeros(shape)
    targets = {
        "expanded": torch.zeros(1).expand(shape),
        "overlapping": torch.zeros(source.numel()).as_strided(shape, (1, 1) if len(shape) == 2 else (0,)),
        "inference": inference,
        "converted": torch.zeros(1, dtype=torch.float64).expand(shape),
        "conjugate": torch.zeros(shape, dtype=torch.complex64).conj(),
    }
    state = StateDict(**targets)
    Snapshot(path).restore({"s": state})
    for number, name in enumerate(names):
        assert torch.equal(state[name].float(), source + number)
        assert not targets[name].any()
    assert torch.equal(state["conjugate"], source + 0j)
    assert state["converted"].dtype is torch.float64
    assert not state["inference"].is_inference()


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())
def test_stale_backward_raises(path: str, shape: tuple[int, ...]) -> None:
    """A graph that was built before a restore does not compute with the new values as if they were the old ones."""
    weight = nn.Parameter(torch.rand(shape))
    take(path, weight=weight.detach().clone())
    with torch.no_grad():
        weight.add_(1)
    loss = (weight * weight).sum()
    restore_into(path, {"weight": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_graph_of_a_tensor_that_was_right_already_stays_valid(path: str) -> None:
    """A restore that finds every byte in place has written nothing, and says nothing to autograd."""
    weight = nn.Parameter(torch.rand(NUMEL))
    take(path, weight=weight)
    loss = (weight * weight).sum()
    restore_into(path, {"weight": weight})
    loss.backward()


def test_stale_backward_raises_after_a_restore_that_failed(path: str, root: Path) -> None:
    """What a failing restore has written counts as written."""
    weight, other = nn.Parameter(torch.rand(10)), torch.zeros(2 * NUMEL)
    take(path, weight=weight.detach() + 1, other=torch.rand(2 * NUMEL))
    loss = (weight * weight).sum()
    for blob in blobs(root).values():
        blob.unlink()
    with pytest.raises(PartialRestoreError):
        restore_into(path, {"weight": weight, "other": other})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------ optimizers


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small network."""
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What computes loss and gradients."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(data).float().pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    """Some steps on random data that the seed decides; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        data = torch.rand(8, 16, generator=generator).to(next(model.parameters()).dtype)
        if isinstance(optimizer, torch.optim.SparseAdam):
            closure_of(model, optimizer, data)()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad.to_sparse()
            optimizer.step()
            losses.append(float(model(data).pow(2).mean().detach()))
        else:
            loss: Any = optimizer.step(closure_of(model, optimizer, data))  # type: ignore[arg-type]
            losses.append(float(loss.detach()))
    return losses


def make_optimizer(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with as much state as its kind can have."""
    options: dict[str, dict[str, Any]] = {
        "SGD": {"momentum": 0.9},
        "Adam": {"amsgrad": True},
        "AdamW": {"amsgrad": True},
        "RMSprop": {"momentum": 0.9, "centered": True},
        "LBFGS": {"history_size": 3, "line_search_fn": "strong_wolfe"},
    }
    # Muon takes matrices only
    parameters = [parameter for parameter in model.parameters() if kind.__name__ != "Muon" or parameter.dim() == 2]
    return kind(parameters, lr=0.01, **options.get(kind.__name__, {}))


OPTIMIZERS = sorted(
    (
        found
        for found in vars(torch.optim).values()
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
    ),
    key=lambda found: found.__name__,
)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_goes_on_bit_for_bit(path: str, kind: type[torch.optim.Optimizer]) -> None:
    """Training on from a restored model and a fresh optimizer repeats the losses, weights and state exactly."""
    model = make_model()
    optimizer = make_optimizer(kind, model)
    train(model, optimizer, 3, seed=1)
    Snapshot.take(path, {"model": model, "optimizer": optimizer})
    losses = train(model, optimizer, 4, seed=2)
    other = make_model()
    fresh = make_optimizer(kind, other)
    Snapshot(path).restore({"model": other, "optimizer": fresh})
    assert train(other, fresh, 4, seed=2) == losses
    assert check_state_dict_eq(other.state_dict(), model.state_dict())
    assert check_state_dict_eq(fresh.state_dict(), optimizer.state_dict())
    # into objects that have gone on, too: everything in place
    Snapshot(path).restore({"model": model, "optimizer": optimizer})
    assert train(model, optimizer, 4, seed=2) == losses


def test_list_of_optimizers_is_not_empty() -> None:
    """The list that the test above goes through holds what torch has."""
    assert {"Adam", "AdamW", "SGD", "LBFGS", "Adafactor", "SparseAdam"} <= {kind.__name__ for kind in OPTIMIZERS}


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, Halving()),
    "MultiplicativeLR": lambda optimizer: torch.optim.lr_scheduler.MultiplicativeLR(optimizer, Halving()),
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    "MultiStepLR": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4]),
    "ConstantLR": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 3),
    "LinearLR": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6),
    "ExponentialLR": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "CosineAnnealingWarmRestarts": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "PolynomialLR": lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, 6),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 3),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [3],
    ),
    "ChainedScheduler": lambda optimizer: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.05, 4),
}


class Halving:
    """A function with state, as some schedulers take it."""

    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, epoch: int) -> float:
        """The factor."""
        return self.factor**epoch


def test_list_of_schedulers_is_complete() -> None:
    """Every scheduler that torch has is in the list."""
    known = {
        name
        for name, found in vars(torch.optim.lr_scheduler).items()
        if isinstance(found, type) and issubclass(found, torch.optim.lr_scheduler.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler", "ignore:.*epoch parameter", "ignore:To get the last learning rate")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(path: str, name: str) -> None:
    """A fresh scheduler that was restored gives the same learning rates, without any pickle."""

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
        found = []
        for step in range(5):
            optimizer.step()
            scheduler.step(*([1.0 + step] if name == "ReduceLROnPlateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    def make() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.3, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    optimizer, scheduler = make()
    rates(optimizer, scheduler)
    Snapshot.take(path, {"optimizer": optimizer, "scheduler": scheduler})
    expected = rates(optimizer, scheduler)
    fresh, other = make()
    Snapshot(path).restore({"optimizer": fresh, "scheduler": other})
    assert rates(fresh, other) == expected


def test_grad_scaler_swa_and_ema(path: str) -> None:
    """A ``GradScaler`` and averaged models come back."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
    scaler.scale(torch.ones(()))
    scaler.update(5.0)
    model = make_model()
    swa = torch.optim.swa_utils.AveragedModel(model)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for averaged in (swa, ema):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, seed=1)
        averaged.update_parameters(model)
    Snapshot.take(path, {"scaler": scaler, "swa": swa, "ema": ema})
    other = torch.amp.GradScaler("cpu")
    fresh = {
        "swa": torch.optim.swa_utils.AveragedModel(make_model()),
        "ema": torch.optim.swa_utils.AveragedModel(make_model()),
    }
    Snapshot(path).restore({"scaler": other, **fresh})
    assert other.state_dict() == scaler.state_dict()
    assert check_state_dict_eq(fresh["swa"].state_dict(), swa.state_dict())
    assert check_state_dict_eq(fresh["ema"].state_dict(), ema.state_dict())


class MasterWeights(torch.optim.Optimizer):
    """An optimizer that keeps fp32 state for parameters of another dtype, some of it nested."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fill the state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["master"] = parameter.detach().float() + 1e-5
                state["nested"] = {"list": [torch.rand(500, dtype=torch.float64)], "count": torch.tensor(3)}


@pytest.mark.parametrize("fresh", [False, True])
def test_full_precision_state_of_half_precision_parameters_is_put_back(path: str, fresh: bool) -> None:
    """What ``Optimizer.load_state_dict`` casts to bf16 comes back in the dtype and with the bits that were taken."""
    model = make_model(torch.bfloat16)
    optimizer = MasterWeights(model.parameters())
    optimizer.step()
    Snapshot.take(path, {"optimizer": optimizer})
    expected = copy.deepcopy(optimizer.state_dict())
    target = MasterWeights(make_model(torch.bfloat16).parameters())
    if not fresh:
        target.step()
    Snapshot(path).restore({"optimizer": target})
    assert check_state_dict_eq(target.state_dict(), expected)
    for state in target.state.values():
        assert state["master"].dtype is torch.float32
        assert state["nested"]["list"][0].dtype is torch.float64
        assert state["nested"]["count"].dtype is torch.int64


# ------------------------------------------------------------------ keys, policies


def test_subset_of_keys(path: str) -> None:
    """Any selection of the stored keys can be restored, the others stay unread."""
    Snapshot.take(path, {"a": StateDict(t=torch.ones(300)), "b": StateDict(t=torch.ones(NUMEL)), "c/d": StateDict(x=1)})
    b, c = StateDict(), StateDict()
    stats = restore_into(path, b, "b")
    assert stats.state_nbytes == CHUNK_NBYTES
    restore_into(path, c, "c/d")
    assert c.data == {"x": 1}


def test_absent_key_is_an_error_before_anything_changes(path: str) -> None:
    """The error names the key and those that exist; the other objects are untouched."""
    Snapshot.take(path, {"a": StateDict(t=torch.ones(300)), "c/d": StateDict(x=1)}, user_metadata={"x": "y" * 5000})
    target = StateDict(t=torch.zeros(300))
    with pytest.raises(AbsentStateError, match=r"missing is absent.*The snapshot has: a, c/d\.") as caught:
        Snapshot(path).restore({"a": target, "missing": StateDict()})
    assert isinstance(caught.value, (AssertionError, KeyError))
    assert not target["t"].any()


class Odd:
    """A class that only pickle can hold."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_pickles_are_refused_and_all_else_is_restored(path: str) -> None:
    """One error names every path and type; keys without pickles are restored; the caller's word lets them in."""
    Snapshot.take(
        path,
        {
            "plain": StateDict(t=torch.ones(300)),
            "odd": StateDict(t=torch.ones(300), one=Odd(1)),
            "odder": StateDict(deep=[{"two": Odd(2)}, torch.ones(1)], three=Odd(3)),
        },
    )
    plain, odd, odder = StateDict(), StateDict(t=torch.zeros(300)), StateDict()
    with pytest.raises(PickleRefusedError) as caught:
        Snapshot(path).restore({"odd": odd, "odder": odder, "plain": plain})
    message = str(caught.value)
    for place in ("odd/one", "odder/deep/0/two", "odder/three"):
        assert f"{place}: {Odd.__module__}.Odd" in message
    assert "Restored all the same: plain." in message
    assert "allow_pickle=True" in message
    assert torch.equal(plain["t"], torch.ones(300))
    assert not odd["t"].any()
    assert odder.data == {}
    Snapshot(path).restore({"odd": odd, "odder": odder}, allow_pickle=True)
    assert (odd["one"].value, odder["deep"][0]["two"].value, odder["three"].value) == (1, 2, 3)
    for read in (
        lambda snapshot: snapshot.read_object("0/odd/one"),
        lambda snapshot: snapshot.get_state_dict_for_key("odd"),
        lambda snapshot: snapshot.restore({"odd": odd}, paths=["odd/*"]),
    ):
        with pytest.raises(PickleRefusedError):
            read(Snapshot(path))
    assert Snapshot(path).read_object("0/odd/one", allow_pickle=True).value == 1


def test_pickles_are_allowed_by_the_environment(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable stands in for the argument where that is not given, and only there."""
    take(path, odd=Odd(1))
    monkeypatch.setenv("TORCHSNAPSHOT_ALLOW_PICKLE", "1")
    assert restored(path)["odd"].value == 1
    with pytest.raises(PickleRefusedError):
        restored(path, allow_pickle=False)


def test_pickle_of_a_class_that_is_gone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the path and the type."""
    take(path, odd=Odd(1))
    monkeypatch.delattr(f"{Odd.__module__}.Odd") if "." in Odd.__module__ else monkeypatch.delitem(globals(), "Odd")
    with pytest.raises(SnapshotError, match=r"s/odd: the pickle of a .*Odd cannot be loaded"):
        restored(path, allow_pickle=True)


@pytest.mark.parametrize("paths", [None, ["*"]])
def test_a_pickle_that_fails_after_tensors_were_written_says_that_the_target_is_a_mix(
    path: str, monkeypatch: pytest.MonkeyPatch, paths: list[str] | None
) -> None:
    """The other keys' values are not loaded either, so that as little as possible is mixed."""
    Snapshot.take(path, {"a": StateDict(step=7), "b": StateDict(t=torch.ones(300)), "c": StateDict(odd=Odd(1))})
    monkeypatch.delattr(f"{Odd.__module__}.Odd") if "." in Odd.__module__ else monkeypatch.delitem(globals(), "Odd")
    states = {"a": StateDict(step=0), "b": StateDict(t=torch.zeros(300)), "c": StateDict(odd=None)}
    with pytest.raises(PartialRestoreError, match=r"a mix of old and new values\. c/odd: the pickle of a .*Odd"):
        Snapshot(path).restore(states, paths=paths, allow_pickle=True)
    assert states["b"]["t"].all()
    assert states["a"]["step"] == 0


@pytest.mark.parametrize("key", ["aaa", "zzz"])
def test_random_state_after_a_restore_is_that_after_the_take(path: str, key: str) -> None:
    """Whatever the objects do while they are asked and loaded, numbers drawn next are those drawn after the take."""

    class Drawing:
        def state_dict(self) -> dict[str, Any]:
            return {"drawn": torch.rand(3)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            torch.rand(7)

    app_state = {"m": Drawing(), key: RNGState()}
    snapshot = Snapshot.take(path, app_state)
    expected = torch.rand(5)
    torch.rand(11)
    snapshot.restore(app_state)
    assert torch.equal(torch.rand(5), expected)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    snapshot.restore({"m": StateDict()})
    assert torch.equal(torch.get_rng_state(), before)


def test_strict_is_passed_to_modules(path: str) -> None:
    """Missing and unexpected keys are errors before anything is written, unless ``strict=False``."""
    source = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    Snapshot.take(path, {"m": source})
    more = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    fewer = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    for target, said in ((more, "Missing .*: '2.bias', '2.weight'"), (fewer, "Unexpected .*: '0.bias'")):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(MismatchError, match=f"m: {said}.*Nothing was restored"):
            Snapshot(path).restore({"m": target})
        assert check_state_dict_eq(dict(target.state_dict()), dict(before))
        Snapshot(path).restore({"m": target}, strict=False)
        assert torch.equal(target[0].weight, source[0].weight)


def test_modules_that_read_a_state_in_their_own_way_are_asked(path: str) -> None:
    """A hook may add or drop names; where one does not, torch's error says that the target is a mix."""
    Snapshot.take(path, {"m": nn.Sequential(nn.Linear(3, 3))})
    target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    target.register_load_state_dict_pre_hook(lambda module, state, *rest: None)
    with pytest.raises(PartialRestoreError, match=r"m: Sequential\.load_state_dict failed.*mix of old and new"):
        Snapshot(path).restore({"m": target})

    target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def fill(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        for name, tensor in module.state_dict().items():
            state.setdefault(name, tensor)

    target.register_load_state_dict_pre_hook(fill)
    Snapshot(path).restore({"m": target})


class Extra(nn.Linear):
    """A module that reads more than it has written, or writes it in its own way."""

    extra: Any = None

    def set_extra_state(self, state: Any) -> None:
        """Keep it."""
        self.extra = state

    def get_extra_state(self) -> Any:
        """Something."""
        return {"more": 1}


class Saving(nn.Linear):
    """A module that adds to its state by overriding what writes it."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}more"] = torch.zeros(1)


def without_head(model: nn.Sequential) -> nn.Sequential:
    """The model, whose second module has been taken out."""
    model[1] = None  # type: ignore[assignment]
    return model


def patched(model: nn.Sequential) -> nn.Sequential:
    """The model, with a ``load_state_dict`` of its own as an attribute."""
    load = model.load_state_dict
    model.load_state_dict = lambda state, strict=True: load(state, strict=False)  # type: ignore[method-assign, assignment, misc]
    return model


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (
            nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
            without_head(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))),
        ),
        (nn.Sequential(Extra(3, 3)), nn.Sequential(Extra(3, 3))),
        (nn.Sequential(nn.Linear(3, 3)), nn.Sequential(Saving(3, 3))),
        (nn.Sequential(nn.Linear(3, 3)), patched(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))),
    ],
)
def test_what_torch_would_take_is_not_refused(path: str, source: nn.Sequential, target: nn.Sequential) -> None:
    """Names that a module reads in another way than most are no mismatch."""
    Snapshot.take(path, {"m": source})
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    with torch.no_grad():
        target[0].weight.zero_()
    Snapshot(path).restore({"m": target})
    assert torch.equal(target[0].weight, source[0].weight)


def test_module_with_a_load_state_dict_of_its_own(path: str) -> None:
    """A module that overrides the method without torch's newer arguments is restored by it."""

    class Own(nn.Linear):
        loaded = 0

        def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
            self.loaded += 1
            return super().load_state_dict(state_dict)

    source, target = Own(3, 3), Own(3, 3)
    Snapshot.take(path, {"m": source})
    Snapshot(path).restore({"m": target})
    assert target.loaded == 1
    assert torch.equal(target.weight, source.weight)


def test_object_that_fails_to_load(path: str) -> None:
    """Whatever ``load_state_dict`` raises is the cause of an error that names the key and says that it is a mix."""

    class Failing(StateDict):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("sorry")

    Snapshot.take(path, {"a": StateDict(t=torch.ones(300)), "b": StateDict(t=torch.ones(300))})
    with pytest.raises(PartialRestoreError, match=r"b: Failing\.load_state_dict failed.*mix.*ValueError: sorry"):
        Snapshot(path).restore({"a": StateDict(), "b": Failing(t=torch.zeros(300))})


# ------------------------------------------------------------------ parts of a state


def test_paths_select_what_is_restored(path: str) -> None:
    """Only what matches a glob changes; values and tensors alike."""
    source, target = make_model(), make_model()
    before = copy.deepcopy(target.state_dict())
    Snapshot.take(path, {"m": source, "s": StateDict(step=7, lr=0.1, deep={"a": 1, "b": [1, 2]})})
    progress = StateDict(step=0, lr=0.5, deep={"a": 0, "b": [0, 0]})
    Snapshot(path).restore({"m": target, "s": progress}, paths=["m/0.*", "s/step", "s/deep/b/1"])
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[2].weight, before["2.weight"])
    assert progress.data == {"step": 7, "lr": 0.5, "deep": {"a": 0, "b": [0, 2]}}


@pytest.mark.parametrize("direction", ["add", "strip"])
def test_rename_bridges_a_module_prefix(path: str, direction: str) -> None:
    """Weights taken inside of a wrapper restore outside of it, and the other way round."""
    model, other = make_model(), make_model()
    source: Any = StateDict(**{f"module.{name}": tensor for name, tensor in model.state_dict().items()})
    target: Any = other
    rename = lambda stored: stored.replace("m/module.", "m/")  # noqa: E731
    if direction == "add":
        source, target = model, StateDict(**{f"module.{k}": torch.zeros_like(v) for k, v in model.state_dict().items()})
        rename = lambda stored: stored.replace("m/", "m/module.")  # noqa: E731
    Snapshot.take(path, {"m": source})
    Snapshot(path).restore({"m": target}, rename=rename)
    found = {name.removeprefix("module."): tensor for name, tensor in target.state_dict().items()}
    assert check_state_dict_eq(found, dict(model.state_dict()))


def test_rename_moves_between_keys(path: str) -> None:
    """A stored part may go to another object; what is not selected stays unread."""
    Snapshot.take(path, {"ema": make_model(), "other": StateDict(t=torch.ones(NUMEL))})
    target = make_model()
    stats = restore_into(path, target, "model", paths=["ema/*"], rename=lambda stored: stored.replace("ema/", "model/"))
    assert check_state_dict_eq(dict(target.state_dict()), Snapshot(path).get_state_dict_for_key("ema"))
    assert stats.state_nbytes < CHUNK_NBYTES


def test_new_keys_are_added_to_dicts(path: str) -> None:
    """A selected leaf that the target has no key for becomes a new one, in a dict that is there, with the right key."""
    take(path, deep={"a/b": torch.ones(300), "x": 1}, numbers={3: torch.ones(1), 4: "four"}, fresh=torch.ones(2))
    state = StateDict(deep={}, numbers={1: "one"})
    Snapshot(path).restore({"s": state}, paths=["s/*"])
    expected = {
        "deep": {"a/b": torch.ones(300), "x": 1},
        "numbers": {1: "one", 3: torch.ones(1), 4: "four"},
        "fresh": torch.ones(2),
    }
    assert check_state_dict_eq(state.data, expected)


def test_leaves_without_a_place_are_told_at_once_and_nothing_changes(path: str) -> None:
    """A list that is too short, or one that isn't there, is an error that names every such path."""
    take(path, list=[torch.ones(300), torch.ones(300)], deep={"a": [1]}, fits=torch.ones(300))
    state = StateDict(list=[torch.zeros(300)], fits=torch.zeros(300))
    with pytest.raises(MismatchError) as caught:
        Snapshot(path).restore({"s": state}, paths=["s/*"])
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == ["s/deep/a/0", "s/list/1"]
    assert not state["fits"].any()
    assert not state["list"][0].any()


def test_glob_that_matches_nothing_is_an_error(path: str) -> None:
    """A typing error is told instead of restoring nothing."""
    take(path, t=torch.ones(300))
    with pytest.raises(MismatchError, match=r"no stored path matches 's/u\*'"):
        restored(path, paths=["s/t", "s/u*"])
    with pytest.raises(TypeError, match="list of globs"):
        restored(path, paths="s/t")


def test_rename_that_puts_two_paths_in_one_place_is_an_error(path: str) -> None:
    """Both paths are named; a result that is no path is an error too."""
    take(path, a=torch.ones(300), b=torch.ones(300))
    with pytest.raises(MismatchError, match=r"'s/a' and 's/b' at 's/c'"):
        restored(path, rename=lambda stored: "s/c")
    with pytest.raises(TypeError, match="must return a path"):
        restored(path, rename=lambda stored: None)  # type: ignore[arg-type, return-value]


def test_mismatch_of_a_part_changes_nothing(path: str) -> None:
    """A shape that does not fit is told before anything is written, also for a part."""
    take(path, a=torch.ones(300), b=torch.ones(300))
    state = {"a": torch.zeros(300), "b": torch.zeros(3)}
    with pytest.raises(MismatchError, match="s/b: stored"):
        restore_into(path, state, paths=["s/*"])
    assert not state["a"].any()


class Labels(dict):  # type: ignore[type-arg]
    """A dict with a class of its own."""


def test_part_keeps_the_targets_classes(path: str) -> None:
    """Around what is restored, the target's containers keep their kind; restored values have the target's classes."""
    take(path, point=Point(1, torch.ones(300)), labels={"x": Colour.BLUE}, queue=collections.deque([1, 2]), t=(1, [2]))
    state = StateDict(
        point=Point(0, torch.zeros(300)),
        labels=Labels(x=Colour.RED, y=Colour.RED),
        queue=collections.deque([0, 0], 5),
        t=(0, [0]),
    )
    Snapshot(path).restore({"s": state}, paths=["s/point/*", "s/labels/x", "s/queue/1", "s/t/1/0"])
    assert type(state["point"]) is Point
    assert torch.equal(state["point"].y, torch.ones(300))
    assert type(state["labels"]) is Labels
    assert state["labels"] == {"x": Colour.BLUE, "y": Colour.RED}
    assert (list(state["queue"]), state["queue"].maxlen) == ([0, 2], 5)
    assert state["t"] == (0, [2])


def test_part_of_an_optimizer(path: str) -> None:
    """The moments alone can be restored into an optimizer that has made steps of its own."""
    model, other = make_model(), make_model()
    source, target = torch.optim.Adam(model.parameters(), lr=0.1), torch.optim.Adam(other.parameters(), lr=0.2)
    train(model, source, 3, seed=1)
    train(other, target, 1, seed=2)
    Snapshot.take(path, {"o": source})
    Snapshot(path).restore({"o": target}, paths=["o/state/*/exp_avg*"])
    for ours, theirs in zip(target.state.values(), source.state.values(), strict=True):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
        assert torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"])
        assert float(ours["step"]) == 1
    assert target.param_groups[0]["lr"] == 0.2


def test_part_of_many_leaves_takes_no_quadratic_time() -> None:
    """Laying thousands of leaves over a state asks for each container's children once."""
    from torchsnapshot.restoring import live_state

    count = 4000
    state = {"d": {f"k{number}": [number] for number in range(count)}}
    calls = 0
    children_of = live_state.children_of

    def counted(value: object) -> Any:
        nonlocal calls
        calls += 1
        return children_of(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_state, "children_of", counted)
        leaves = [(live_state.route_along(f"s/d/k{number}/0"), -1) for number in range(count)]
        laid, placed = live_state.lay_over(state, leaves)
    assert len(placed) == count
    assert laid == {"d": {f"k{number}": [-1] for number in range(count)}}
    assert calls <= count + 2


# ------------------------------------------------------------------ single values


def test_read_object_reads_into_a_given_tensor(path: str) -> None:
    """A tensor of the stored shape is filled in place and returned, also one of another dtype, sparse or quantized."""
    source = torch.rand(3 * NUMEL)
    take(path, t=source, sparse=torch.eye(30).to_sparse(), nested={"deep": [torch.ones(2)]})
    for out in (torch.zeros(3 * NUMEL), torch.zeros(3 * NUMEL, dtype=torch.float64), torch.zeros(6 * NUMEL)[::2]):
        version = out._version
        assert Snapshot(path).read_object("0/s/t", out) is out
        assert torch.equal(out.float(), source)
        assert out._version > version
    out = torch.zeros(30, 30).to_sparse()
    assert Snapshot(path).read_object("0/s/sparse", out) is out
    assert torch.equal(out.to_dense(), torch.eye(30))
    with pytest.raises(MismatchError, match="s/t: stored"):
        Snapshot(path).read_object("0/s/t", torch.zeros(5))


@pytest.mark.parametrize("budget", [1, CHUNK_NBYTES, 1 << 30])
def test_read_object_within_a_budget(path: str, budget: int) -> None:
    """However small the budget, the value is whole."""
    source = torch.rand(7, NUMEL)
    take(path, t=source, small=torch.rand(300))
    assert torch.equal(Snapshot(path).read_object("0/s/t", memory_budget_bytes=budget), source)
    assert Snapshot(path).read_object("0/s/small", memory_budget_bytes=budget).shape == (300,)


def test_read_object_finds_what_is_inside_of_values(path: str) -> None:
    """Containers, values, what is inside of them, and large ones can be read; what isn't there is an error."""
    values = {"list": [1, {"deep": (2, "x")}], "a/b": {1: "int", "1": "str"}}
    state = {"value": values, "large": {"l": list(range(50_000))}, "tensors": {"t": torch.ones(300), "n": 1}}
    take(path, **state)
    snapshot = Snapshot(path)
    assert snapshot.read_object("0/s/value") == values
    assert snapshot.read_object("0/s/value/list/1/deep/1") == "x"
    assert snapshot.read_object("0/s/value/a%2Fb/1") == "str"
    assert snapshot.read_object("0/s/value/a%2Fb/%i1") == "int"
    assert snapshot.read_object("0/s/large/l/49999") == 49_999
    assert check_state_dict_eq(snapshot.read_object("0/s/tensors"), state["tensors"])
    assert check_state_dict_eq(snapshot.read_object("0/s"), state)
    for missing in ("0/s/x", "0/s/value/list/2", "0/s/tensors/t/0", "s/value", "1/s/value", "", "0", "0/s/value/"):
        with pytest.raises(SnapshotError, match="does not exist in the snapshot's manifest"):
            snapshot.read_object(missing)


def test_state_dict_for_key(path: str) -> None:
    """The whole state comes back in new memory, also under a key with slashes; an unknown key is an error."""
    model = make_model()
    Snapshot.take(path, {"a/b%c": model, "": StateDict(x=1)})
    state = Snapshot(path).get_state_dict_for_key("a/b%c")
    assert check_state_dict_eq(state, model.state_dict())
    assert not any(share_memory(tensor, ours) for tensor in state.values() for ours in model.state_dict().values())
    assert Snapshot(path).get_state_dict_for_key("") == {"x": 1}
    with pytest.raises(AbsentStateError):
        Snapshot(path).get_state_dict_for_key("a")


# ------------------------------------------------------------------ what is read


def test_rolling_back_one_step_reads_what_differs(root: Path) -> None:
    """Chunks that the target already holds are neither read nor written."""
    state = {
        "frozen": torch.rand(10 * NUMEL),
        "embedding": torch.rand(20 * NUMEL),
        "weights": torch.rand(5 * NUMEL),
        **{f"small{number}": torch.rand(1000) for number in range(10)},
    }
    take(str(root / "step_1"), **state)
    state["embedding"].view(20, NUMEL)[[0, 1, 7, 19], 5] += 1
    state["weights"].add_(1)
    state["small3"].add_(1)
    take(str(root / "step_2"), **state)
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    stats = restore_into(str(root / "step_1"), state)
    assert stats.num_new_chunks == 4 + 5 + 1
    assert stats.new_nbytes == 9 * CHUNK_NBYTES + 4000
    assert stats.new_nbytes + stats.reused_nbytes == stats.state_nbytes
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == addresses
    found = restored(str(root / "step_1"))
    for name, tensor in state.items():
        assert torch.equal(tensor, found[name])


def test_restoring_what_is_there_reads_nothing(root: Path) -> None:
    """A restore of the present state reads no blob at all, so it works without them."""
    state = {"t": torch.rand(5 * NUMEL), "small": torch.rand(300), "permuted": torch.rand(300, 30).t()}
    take(str(root / "step_1"), **state)
    for blob in blobs(root).values():
        blob.unlink()
    stats = restore_into(str(root / "step_1"), state)
    assert (stats.num_new_chunks, stats.new_nbytes, stats.stored_nbytes) == (0, 0, 0)


def test_content_that_many_tensors_share_is_read_once(path: str) -> None:
    """Equal chunks cost one read, however many tensors hold them."""
    take(path, **{f"t{number}": torch.zeros(4, NUMEL) for number in range(10)})
    stats = Snapshot(path)
    target = StateDict()
    stats.restore({"s": target})
    assert stats.stats is not None
    assert stats.stats.num_new_chunks == 1
    assert all(not tensor.any() for tensor in target.values())


# ------------------------------------------------------------------ damage


def damage(path: str, root: Path, name: str, how: str) -> str:
    """Damage the middle of the blob that holds one tensor; returns its key."""
    ref = refs(path, f"s/{name}")[0]
    blob = blobs(root)[ref.key]
    if how == "missing":
        blob.unlink()
    else:
        content = bytearray(blob.read_bytes())
        content[ref.offset + ref.stored_nbytes // 2] ^= 4
        blob.write_bytes(content[: ref.offset + 10] if how == "truncated" else content)
    return ref.key


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated"])
@pytest.mark.parametrize("numel", [1000, 2 * NUMEL], ids=["packed", "alone"])
def test_damage_names_path_and_blob_and_never_reaches_a_target(path: str, root: Path, numel: int, how: str) -> None:
    """The error says which tensor and which blob; tensors hold their old values or the right ones, nothing else."""
    state = {f"t{number}": torch.rand(numel) + 1 for number in range(8)}
    take(path, **state)
    key = damage(path, root, "t3", how)
    targets = {name: torch.zeros(numel) for name in state}
    with pytest.raises((CorruptionError, PartialRestoreError)) as caught:
        restore_into(path, targets)
    assert key in str(caught.value)
    if how == "flipped" or numel > 1000:
        assert "s/t3" in str(caught.value)
    for name, tensor in targets.items():
        assert ((tensor == 0) | (tensor == state[name])).all()
    if how == "flipped" or numel > 1000:
        assert torch.equal(Snapshot(path).read_object("0/s/t2"), state["t2"])
    with pytest.raises(MissingBlobError if how == "missing" else CorruptionError, match=key):
        Snapshot(path).read_object("0/s/t3")


def test_damage_before_the_first_write_leaves_the_target_as_it_was(path: str, root: Path) -> None:
    """Where nothing was written, the error is the damage itself, and not that of a mix."""
    take(path, only=torch.rand(NUMEL))
    damage(path, root, "only", "flipped")
    target = torch.zeros(NUMEL)
    with pytest.raises(CorruptionError):
        restore_into(path, {"only": target})
    assert not target.any()


def test_failure_half_way_says_that_the_target_is_a_mix(path: str, root: Path) -> None:
    """The error says how many tensors were written, and carries the damage as its cause."""
    take(path, inline=torch.ones(3), large=torch.rand(NUMEL))
    damage(path, root, "large", "missing")
    targets = {"inline": torch.zeros(3), "large": torch.zeros(NUMEL)}
    with pytest.raises(PartialRestoreError, match=r"written to 1 of 2 tensors: the target is now a mix") as caught:
        restore_into(path, targets)
    assert isinstance(caught.value.__cause__, MissingBlobError)
    assert torch.equal(targets["inline"], torch.ones(3))


def test_damage_to_what_is_not_wanted_is_no_obstacle(path: str, root: Path) -> None:
    """Parts, keys and values that do not need a damaged blob can be restored."""
    take(path, good=torch.rand(NUMEL), bad=torch.rand(NUMEL), value=list(range(100)))
    damage(path, root, "bad", "missing")
    state = StateDict(good=torch.zeros(NUMEL), bad=torch.zeros(NUMEL), value=[0])
    Snapshot(path).restore({"s": state}, paths=["s/good"])
    assert state["good"].any()
    assert Snapshot(path).read_object("0/s/value/99") == 99


def test_buffers_of_ours_are_never_handed_out(path: str) -> None:
    """What was restored does not change when other snapshots are taken and restored later."""
    source = {"large": torch.rand(5 * NUMEL), "small": torch.rand(300), "bytes": io.BytesIO(b"x" * 100_000)}
    take(path, **source)
    found = restored(path)
    for number in range(5):
        take(f"{path}_{number}", large=torch.rand(5 * NUMEL), small=torch.rand(300), bytes=io.BytesIO(b"y" * 100_000))
        restored(f"{path}_{number}")
    assert torch.equal(found["large"], source["large"])
    assert torch.equal(found["small"], source["small"])
    assert found["bytes"].getvalue() == b"x" * 100_000


# ------------------------------------------------------------------ targets without memory of their own


def test_a_lazy_module_takes_the_stored_shapes(path: str) -> None:
    """A module that has seen no input yet is restored, as by its own ``load_state_dict``."""
    source = torch.nn.Sequential(torch.nn.LazyLinear(3))
    source(torch.randn(2, 5))
    Snapshot.take(path, {"m": source})
    target = torch.nn.Sequential(torch.nn.LazyLinear(3))
    Snapshot(path).restore({"m": target})
    assert check_state_dict_eq(dict(target.state_dict()), dict(source.state_dict()))


def test_the_meta_device_is_no_place_to_restore_to(path: str) -> None:
    """Tensors that would stay without data are refused."""
    take(path, t=torch.ones(300))
    with pytest.raises(ValueError, match="no memory on it"):
        Snapshot(path).restore({"s": StateDict(t=torch.empty(300, device="meta"))}, device="meta")
    with pytest.raises(MismatchError, match="meta device"):
        Snapshot(path).read_object("0/s/t", torch.empty(300, device="meta"))


def test_read_object_fills_what_it_is_given_or_says_that_it_cannot(path: str) -> None:
    """An inference tensor is filled too; one whose elements share memory is refused."""
    take(path, t=torch.arange(300.0))
    with torch.inference_mode():
        out = torch.zeros(300)
    assert Snapshot(path).read_object("0/s/t", out) is out
    assert torch.equal(out, torch.arange(300.0))
    with pytest.raises(MismatchError, match="obj_out cannot be read into"):
        Snapshot(path).read_object("0/s/t", torch.zeros(1).expand(300))


@pytest.mark.parametrize(("has_tensors", "said"), [(True, "is now a mix"), (False, "nothing else had been written")])
def test_a_failing_load_state_dict_says_what_was_written(path: str, has_tensors: bool, said: str) -> None:
    """The target is called a mix where tensors were written, and only there."""

    class Failing:
        def state_dict(self) -> dict[str, Any]:
            return {"t": torch.zeros(300)} if has_tensors else {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise RuntimeError("no")

    take(path, t=torch.ones(300))
    with pytest.raises(PartialRestoreError, match=said):
        Snapshot(path).restore({"s": Failing()})


def test_a_snapshot_can_be_pickled_and_copied_at_any_time(path: str) -> None:
    """It is a path and options; the open store stays where it is."""
    taken = Snapshot.take(path, {"s": StateDict(t=torch.ones(300))})
    for snapshot in (taken, pickle.loads(pickle.dumps(taken)), copy.deepcopy(taken)):
        assert snapshot.path == path
        assert torch.equal(snapshot.read_object("0/s/t"), torch.ones(300))
