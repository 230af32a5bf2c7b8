"""States of real training runs and stranger ones: taken apart, packed as entries, and put together as they were."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import random
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_states import entry_of, load, same, store, there_and_back

from torchsnapshot.errors import FormatError, MismatchError, UnsupportedValueError
from torchsnapshot.format.entries import ContainerEntry, unpack_entries
from torchsnapshot.state import values
from torchsnapshot.state.flatten import (
    ExpandedValue,
    Node,
    OpaqueLeaf,
    TensorLeaf,
    ValueLeaf,
    expand,
    find_targets,
    flatten,
    inflate,
)

quantized_warnings = pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*Quantized")
sparse_warnings = pytest.mark.filterwarnings("ignore:Sparse")


def nodes_of(state: Any) -> dict[str, Node]:
    """The nodes of a state that holds nothing opaque."""

    def refuse(path: str, name: str) -> None:
        raise AssertionError(f"{path}: {name} is opaque")

    return flatten("key", state, on_opaque=refuse)


@dataclasses.dataclass
class Batch:
    inputs: torch.Tensor
    weight: float


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


class Bag(dict):  # type: ignore[type-arg]
    pass


class Opaque:
    """An object that only pickle can hold."""

    def __init__(self, content: object) -> None:
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.content == other.content

    __hash__ = object.__hash__


class TwoTensors(torch.Tensor):
    """A wrapper subclass that knows how to flatten itself."""

    left: torch.Tensor
    right: torch.Tensor
    note: str

    @staticmethod
    def __new__(cls, left: torch.Tensor, right: torch.Tensor, note: str) -> TwoTensors:
        """Torch wants the shape before ``__init__`` runs."""
        made: TwoTensors = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, left.shape, dtype=left.dtype, requires_grad=False
        )
        return made

    def __init__(self, left: torch.Tensor, right: torch.Tensor, note: str) -> None:
        self.left, self.right, self.note = left, right, note

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["left", "right"], {"note": self.note}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> TwoTensors:
        return TwoTensors(inner["left"], inner["right"], context["note"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"{function} must not run while a snapshot is taken")


def small_model() -> torch.nn.Module:
    """Weights, tied weights, buffers and a module without any."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model.append(torch.nn.Linear(4, 4))
    model[4].weight = model[3].weight
    return model


def trained(optimizer_class: Any, **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer after two steps."""
    model = torch.nn.Linear(3, 2)
    parameters = list(model.parameters())
    if optimizer_class is torch.optim.SparseAdam:
        embedding = torch.nn.Embedding(4, 3, sparse=True)
        optimizer = optimizer_class(list(embedding.parameters()), **options)
        for _ in range(2):
            optimizer.zero_grad()
            embedding(torch.tensor([0, 2])).sum().backward()
            optimizer.step()
        return embedding, optimizer
    if optimizer_class.__name__ == "Muon":
        parameters = [model.weight]
    optimizer = optimizer_class(parameters, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 3)) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return model, optimizer


OPTIMIZERS = sorted(
    (
        each
        for each in vars(torch.optim).values()
        if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    ),
    key=lambda each: each.__name__,
)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda each: each.__name__)
def test_every_optimizer_comes_back(optimizer_class: Any) -> None:
    """State and groups, typed keys included, and the optimizer loads what came back."""
    options = {"lr": 0.1} if "lr" in inspect.signature(optimizer_class).parameters else {}
    model, optimizer = trained(optimizer_class, **options)
    state = optimizer.state_dict()
    back = there_and_back(state)
    assert same(back, state)
    fresh = optimizer_class(list(model.parameters())[: len(state["param_groups"][0]["params"])], **options)
    fresh.load_state_dict(back)
    assert same(fresh.state_dict(), state)


def schedulers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One of every kind of learning rate scheduler that torch has."""
    module = torch.optim.lr_scheduler
    return {
        "LambdaLR": module.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        "MultiplicativeLR": module.MultiplicativeLR(optimizer, lambda epoch: 0.9),
        "StepLR": module.StepLR(optimizer, 2),
        "MultiStepLR": module.MultiStepLR(optimizer, [1, 3, 3]),
        "ConstantLR": module.ConstantLR(optimizer),
        "LinearLR": module.LinearLR(optimizer),
        "ExponentialLR": module.ExponentialLR(optimizer, 0.9),
        "PolynomialLR": module.PolynomialLR(optimizer),
        "CosineAnnealingLR": module.CosineAnnealingLR(optimizer, 5),
        "CosineAnnealingWarmRestarts": module.CosineAnnealingWarmRestarts(optimizer, 5),
        "CyclicLR": module.CyclicLR(optimizer, 0.01, 0.1),
        "OneCycleLR": module.OneCycleLR(optimizer, 0.1, total_steps=10),
        "ReduceLROnPlateau": module.ReduceLROnPlateau(optimizer),
        "SequentialLR": module.SequentialLR(
            optimizer, [module.ConstantLR(optimizer), module.ExponentialLR(optimizer, 0.9)], [2]
        ),
        "ChainedScheduler": module.ChainedScheduler([module.StepLR(optimizer, 1), module.ConstantLR(optimizer)]),
        "SWALR": torch.optim.swa_utils.SWALR(optimizer, 0.05),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_every_scheduler_comes_back() -> None:
    """None of torch's is missing here, and none needs a pickle."""
    _, optimizer = trained(torch.optim.SGD, lr=0.1)
    made = schedulers(optimizer)
    module = torch.optim.lr_scheduler
    known = {
        name
        for name, each in vars(module).items()
        if inspect.isclass(each) and issubclass(each, module.LRScheduler) and each.__module__ == module.__name__
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= made.keys()
    for name, scheduler in made.items():
        if name == "ReduceLROnPlateau":
            scheduler.step(1.0)
        state = scheduler.state_dict()
        nodes_of(state)
        back = there_and_back(state, scheduler.state_dict())
        assert same(back, state), name
        scheduler.load_state_dict(back)


def test_scalers_and_averaged_models_come_back() -> None:
    """GradScaler, SWA and EMA models, whose states hold counters as tensors."""
    model = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    moving = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for each in (averaged, moving):
        each.update_parameters(model)
        each.update_parameters(model)
    for state in (scaler.state_dict(), averaged.state_dict(), moving.state_dict()):
        nodes_of(state)
        assert same(there_and_back(state), state)
    scaler.load_state_dict(there_and_back(scaler.state_dict()))


def test_random_states_come_back() -> None:
    """Those of random, numpy (old and new) and torch: each gives the same numbers again."""
    generator = numpy.random.default_rng(5)
    generator.random(3)
    state = {
        "random": random.getstate(),
        "numpy": numpy.random.RandomState(3).get_state(),
        "generator": generator.bit_generator.state,
        "mt": numpy.random.Generator(numpy.random.MT19937(1)).bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    nodes_of(state)
    back = there_and_back(state)
    assert same(back, state)
    other = random.Random()
    other.setstate(back["random"])
    again = numpy.random.default_rng()
    again.bit_generator.state = back["generator"]
    assert again.random() == generator.random()
    legacy = numpy.random.RandomState()
    legacy.set_state(back["numpy"])
    assert legacy.rand() == numpy.random.RandomState(3).rand()


def test_a_dataloaders_state_comes_back() -> None:
    """Nested counters, queues of indices and a generator's state."""
    state = {
        "_index_sampler_state": {
            "permutation": list(range(100)),
            "yielded": 7,
            "generator": torch.Generator().get_state(),
        },
        "_num_yielded": 7,
        "_iterator_finished": False,
        "queue": collections.deque([(0, torch.tensor([1, 2]))], maxlen=4),
        "worker_snapshots": {"worker_0": {"fetcher_state": None, "rng": (3, (1, 2, 3), None)}},
    }
    nodes_of(state)
    assert same(there_and_back(state), state)


def test_a_modules_state_keeps_its_metadata() -> None:
    """OrderedDict, order and ``_metadata``: what load_state_dict needs for modules that have versions."""
    state = small_model().state_dict()
    back = there_and_back(state)
    assert same(back, state)
    assert back._metadata == state._metadata
    small_model().load_state_dict(back)


def test_a_subtree_without_tensors_is_one_value() -> None:
    """However many leaves it has, the manifest has one entry for it."""
    state = {"groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": list(range(1000))}], "w": torch.zeros(1)}
    nodes = nodes_of(state)
    assert list(nodes) == ["key", "key/groups", "key/w"]
    assert isinstance(nodes["key/groups"], ValueLeaf)
    assert nodes["key"] == ContainerEntry("dict", ("groups", "w"), b"")
    assert list(nodes_of({"a": 1, "b": [2, (3,)]})) == ["key"]


def test_nodes_come_depth_first() -> None:
    """Parents stand before their children, siblings in their own order."""
    state = {"b": [torch.zeros(1), {"x": torch.zeros(1), "a": 1}], "a": torch.zeros(1)}
    assert list(nodes_of(state)) == ["key", "key/b", "key/b/0", "key/b/1", "key/b/1/x", "key/b/1/a", "key/a"]


def test_keys_that_look_alike_stay_apart() -> None:
    """``"1"``, 1 and True, slashes, percents, emoji and the empty text: all come back with their types."""
    tensor = torch.zeros(1)
    keys: list[Any] = ["1", 1, "True", "a/b", "a%2Fb", "%", "", "🔥", "%i1", -5, "None", 1 << 63, "é"]
    state = {key: tensor + index for index, key in enumerate(keys)}
    flags = {True: tensor, "True": tensor, 0: tensor, "0": tensor, "False": tensor}
    assert same(there_and_back([state, flags]), [state, flags])
    assert "key/%i1" in nodes_of(state)
    assert "key/a%2Fb" in nodes_of(state)
    assert "key/a%252Fb" in nodes_of(state)


def test_keys_of_any_plain_kind_can_hold_tensors() -> None:
    """Tuples, None, floats, huge ints, lone surrogates and very long texts as keys beside tensors."""
    keys: list[Any] = [None, (1, "x"), 2.5, b"k", 1 << 80, "\ud800", "long" * 1000, torch.float32, 7]
    state = {key: torch.tensor(index) for index, key in enumerate(keys)}
    nodes_of(state)
    assert same(there_and_back(state), state)
    ordered = collections.OrderedDict(state)
    assert same(there_and_back(ordered), ordered)
    target = copy.deepcopy(state)
    assert there_and_back(state, target)[(1, "x")] is target[(1, "x")]


def test_every_kind_of_container_can_hold_tensors() -> None:
    """Sequences, mappings, sets, dataclasses, namedtuples and subclasses, nested in one another."""
    tensor = torch.arange(3)
    state = {
        "list": [tensor, [tensor, []]],
        "tuple": (tensor, (1, tensor), ()),
        "deque": collections.deque([tensor, 1], maxlen=3),
        "ordered": collections.OrderedDict(b=tensor, a=1),
        "default": collections.defaultdict(list, a=[tensor]),
        "counter": collections.Counter({"x": 2}),
        "batch": Batch(tensor, 0.5),
        "pair": Pair(tensor, 1),
        "bag": Bag(x=tensor),
        "array": numpy.arange(4).reshape(2, 2),
        "plain": {"set": {1, 2}},
    }
    back = there_and_back(state, offered=[Batch(tensor, 0.0), Pair(tensor, 0), Bag()])
    batch = back.pop("batch")
    assert (type(batch), batch.weight) == (Batch, 0.5)
    assert same(batch.inputs, tensor)
    del state["batch"]
    assert same(back, state)
    plain = there_and_back({"batch": Batch(tensor, 0.5), "pair": Pair(tensor, 1), "bag": Bag(x=tensor)})
    assert same(plain, {"batch": {"inputs": tensor, "weight": 0.5}, "pair": (tensor, 1), "bag": {"x": tensor}})
    (only,) = there_and_back({"set": {tensor}})["set"]
    assert same(only, tensor)


plain_leaves = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.floats(allow_nan=False), st.binary(max_size=5)
)
tensor_leaves = st.sampled_from(
    [torch.zeros(2, 3), torch.tensor(5), torch.zeros(0, 2), torch.ones(2, dtype=torch.bool).t()]
)
keys = st.one_of(
    st.text(st.characters(), max_size=4), st.integers(-3, 3), st.booleans(), st.sampled_from(["1", "True", "%i1"])
)
states = st.recursive(
    st.one_of(plain_leaves, tensor_leaves, st.sampled_from([numpy.arange(3), numpy.float32(1)])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
        st.lists(inner, max_size=3).map(collections.deque),
    ),
    max_leaves=20,
)


@given(states)
def test_any_state_comes_back_as_it_was(state: Any) -> None:
    """Whatever the nesting of containers, tensors, arrays and values."""
    data = store(state)
    assert same(load(data), state)
    assert same(load(data, copy.deepcopy(state)), state)


def test_tensors_are_restored_in_place() -> None:
    """The target's own tensors come back, at the same places, with the stored content."""
    state = {"a": torch.ones(2), "b": [torch.ones(3), numpy.ones(2)], "c": (torch.ones(1),)}
    target = {"a": torch.zeros(2), "b": [torch.zeros(3), numpy.zeros(2)], "c": (torch.zeros(1),)}
    back = there_and_back(state, target)
    assert same(back, state)
    assert back["a"] is target["a"]
    assert back["b"][0] is target["b"][0]
    assert back["b"][1] is target["b"][1]
    assert back["c"][0] is target["c"][0]
    grown = there_and_back({"b": [torch.ones(3), torch.ones(1)], "new": torch.ones(1)}, target)
    assert grown["b"][0] is target["b"][0]
    assert same(grown["b"][1], torch.ones(1))


def test_wrappers_come_back() -> None:
    """New tensors get the wrapper that was stored; the target's own keep theirs."""
    state = {"p": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Buffer(torch.ones(1)), "t": torch.ones(1)}
    state["g"] = torch.ones(1, requires_grad=True)
    back = there_and_back(state)
    assert same(back, state)
    assert isinstance(back["b"], torch.nn.Buffer)
    target = {"p": torch.zeros(2), "g": torch.nn.Parameter(torch.zeros(1))}
    back = there_and_back(state, target)
    assert back["p"] is target["p"]
    assert not back["p"].requires_grad
    assert back["g"] is target["g"]


def test_targets_are_found_by_typed_keys() -> None:
    """A key finds its own place, also where the target's keys are written otherwise in paths."""
    entries = unpack_entries(store({"1": torch.ones(1), 1: torch.ones(2)}))
    target = {1: torch.zeros(2)}
    assert find_targets("0/key", entries, target) == {"0/key/%i1": target[1]}
    assert find_targets("0/key", entries, [torch.zeros(1)]) == {}
    assert find_targets("0/key", entries, None) == {}


def test_what_only_pickle_holds_is_opaque() -> None:
    """Each is announced once, with path and type, and everything else is stored as usual."""
    seen: list[tuple[str, str]] = []
    state = {
        "w": torch.ones(1),
        "partial": functools.partial(max, 1),
        "deep": [1, {"own": Opaque([torch.ones(2)])}],
        "objects": numpy.array([None, "x"]),
        "default": collections.defaultdict(Opaque, a=1),
        "module": torch.nn.Linear(1, 1),
    }
    nodes = flatten("key", state, on_opaque=lambda path, name: seen.append((path, name)))
    assert seen == [
        ("key/partial", "functools.partial"),
        ("key/deep/1/own", f"{__name__}.Opaque"),
        ("key/objects", "numpy.ndarray"),
        ("key/default", "collections.defaultdict"),
        ("key/module", "torch.nn.modules.linear.Linear"),
    ]
    assert isinstance(nodes["key/partial"], OpaqueLeaf)
    back = there_and_back({"x": Opaque([1]), "y": torch.ones(1)})
    assert same(back["y"], torch.ones(1))
    assert back["x"] == Opaque([1])


def test_everything_that_cannot_be_stored_is_named_at_once() -> None:
    """Every path with its type, in one error: nobody fixes a state one run at a time."""

    class Own(torch.Tensor):
        pass

    cycle: list[Any] = [torch.zeros(1)]
    cycle.append(cycle)
    deep: Any = torch.zeros(1)
    for _ in range(300):
        deep = [deep]
    state = {
        "fine": torch.zeros(1),
        "lambda": lambda: None,
        "meta": [torch.zeros(1, device="meta")],
        "a/b": {"own": torch.zeros(1).as_subclass(Own)},
        "cycle": cycle,
        "deep": deep,
        "lock": Opaque(lambda: None),
        "uninitialized": torch.nn.UninitializedParameter(),
    }
    with pytest.raises(UnsupportedValueError) as caught:
        nodes_of(state)
    problems = caught.value.problems
    assert len(problems) == len(state) - 1
    text = str(caught.value)
    for part in ("key/lambda", "key/meta/0", "meta device", "key/a%2Fb/own", "Own", "key/cycle/1", "contains itself"):
        assert part in text
    for part in ("levels deep", "key/lock", "key/uninitialized", "UninitializedParameter"):
        assert part in text


def test_fake_tensors_are_refused() -> None:
    """A tensor that was traced has no data; it must not be read as a dense one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(2)
    with pytest.raises(UnsupportedValueError, match="FakeTensor"):
        nodes_of({"x": fake})


def sparse_tensors() -> dict[str, torch.Tensor]:
    """One of every sparse layout, with and without entries, coalesced and not."""
    dense = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4], [0, 0, 5, 0]])
    repeated = torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0]), (2, 3))
    return {
        "coalesced": dense.to_sparse(),
        "repeated": repeated,
        "hybrid": torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 5), (3, 5)),
        "empty": torch.sparse_coo_tensor(size=(3, 4)),
        "gradient": dense.to_sparse().requires_grad_(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((2, 2)),
        "bsc": dense.to_sparse_bsc((2, 2)),
        "small indices": torch.sparse_csr_tensor(
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([0], dtype=torch.int32),
            torch.ones(1, dtype=torch.float16),
        ),
    }


@sparse_warnings
@pytest.mark.parametrize(
    "kind",
    ["coalesced", "repeated", "hybrid", "empty", "gradient", "csr", "csc", "bsr", "bsc", "small indices"],
)
def test_sparse_tensors_come_back(kind: str) -> None:
    """Indices, values, the coalesced flag and the gradient flag; new, or in the target's place."""
    tensor = sparse_tensors()[kind]
    assert same(there_and_back([tensor])[0], tensor)
    target = torch.zeros_like(tensor.detach())
    back = there_and_back([tensor.detach()], [target])[0]
    assert back.layout is tensor.layout
    assert torch.equal(back.to_dense(), tensor.detach().to_dense())
    other = torch.sparse_coo_tensor(size=(9, 9))
    assert same(there_and_back([tensor], [other])[0], tensor)


@sparse_warnings
def test_hostile_sparse_tensors_are_refused() -> None:
    """Indices that reach out of the tensor never make one."""
    bad = torch.sparse_coo_tensor(torch.tensor([[5]]), torch.ones(1), (2,), check_invariants=False)
    with pytest.raises(FormatError, match="0/key/0"):
        there_and_back([bad])


def quantized_tensors() -> dict[str, torch.Tensor]:
    """Every quantized dtype and scheme, in plain and permuted memory."""
    data = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([0, 1, 2])
    packed = torch.quantize_per_channel(
        torch.rand(2, 7), torch.tensor([0.1, 0.2]), torch.tensor([0.0, 1.0]), 0, torch.quint4x2
    )
    return {
        "quint8": torch.quantize_per_tensor(data, 0.1, 10, torch.quint8),
        "qint8": torch.quantize_per_tensor(data, 0.1, 0, torch.qint8),
        "qint32": torch.quantize_per_tensor(data, 1e-5, 3, torch.qint32),
        "per channel": torch.quantize_per_channel(data, scales, zeros, 1, torch.quint8),
        "channels_last": torch.quantize_per_tensor(
            data.contiguous(memory_format=torch.channels_last), 0.1, 10, torch.quint8
        ),
        "slice": torch.quantize_per_tensor(data, 0.1, 10, torch.quint8)[1],
        "0-d": torch.quantize_per_tensor(torch.tensor(0.5), 0.1, 10, torch.quint8),
        "empty": torch.quantize_per_tensor(torch.zeros(0, 3), 0.1, 10, torch.quint8),
        "quint4x2": packed,
    }


@quantized_warnings
@pytest.mark.parametrize(
    "kind", ["quint8", "qint8", "qint32", "per channel", "channels_last", "slice", "0-d", "empty", "quint4x2"]
)
def test_quantized_tensors_come_back(kind: str) -> None:
    """Integers, scales, zero points, scheme and axis; into a quantized target, a float one, or new."""
    tensor = quantized_tensors()[kind]
    back = there_and_back([tensor])[0]
    assert same(back, tensor)
    if kind == "channels_last":
        assert back.stride() == tensor.stride()
    if kind != "quint4x2":
        target = torch.zeros_like(tensor.dequantize()).contiguous()
        assert there_and_back([tensor], [target])[0] is target
        assert torch.equal(target, tensor.dequantize())
        blank = tensor.clone()
        if blank.is_contiguous():
            blank.copy_(torch.zeros_like(tensor.dequantize()).contiguous())
        assert there_and_back([tensor], [blank])[0] is blank
        assert same(blank, tensor)


def test_subclasses_that_flatten_themselves_come_back() -> None:
    """Their inner tensors are stored, and the class is the target's or one of torch's safe globals."""
    tensor = TwoTensors(torch.ones(2), torch.full((2,), 2.0), "hello")
    nodes = nodes_of({"x": tensor})
    assert list(nodes) == ["key", "key/x", "key/x/left", "key/x/right"]
    data = store({"x": tensor})
    with pytest.raises(MismatchError, match=r"key/x.*TwoTensors.*add_safe_globals"):
        load(data)
    target = {"x": TwoTensors(torch.zeros(2), torch.zeros(2), "hello")}
    back = load(data, target)
    assert back["x"] is target["x"]
    assert target["x"].left.tolist() == [1, 1]
    other = {"x": TwoTensors(torch.zeros(2), torch.zeros(2), "bye")}
    assert load(data, other)["x"].note == "hello"
    with torch.serialization.safe_globals([TwoTensors]):
        assert load(data)["x"].right.tolist() == [2, 2]


def test_a_subclass_with_a_context_that_is_not_plain_is_refused() -> None:
    """There would be no way to read it back without a pickle."""
    tensor = TwoTensors(torch.ones(2), torch.ones(2), Opaque(1))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedValueError, match=r"key/x.*TwoTensors.*not plain"):
        nodes_of({"x": tensor})


def test_plain_subtrees_expand_to_entries() -> None:
    """Every place in a value has a path of its own, as if it had been stored alone."""
    value = {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], 1: {2, 3}, "1": None}
    found = expand("0/optim", values.encode(value))
    assert list(found) == [
        "0/optim",
        "0/optim/groups",
        "0/optim/groups/0",
        "0/optim/groups/0/lr",
        "0/optim/groups/0/betas",
        "0/optim/groups/0/betas/0",
        "0/optim/groups/0/betas/1",
        "0/optim/%i1",
        "0/optim/1",
    ]
    assert found["0/optim/groups"] == ContainerEntry("list", (0,), b"")
    assert found["0/optim/groups/0/lr"] == ExpandedValue(0.1)
    assert found["0/optim/%i1"] == ExpandedValue({2, 3})
    assert expand("p", values.encode(5)) == {"p": ExpandedValue(5)}


def test_entries_that_make_no_state_name_their_path() -> None:
    """Unknown kinds, missing children and contexts of another kind are errors about the format."""
    leaf = entry_of(ValueLeaf(values.encode(1)))
    for nodes, message in (
        ({"k": ContainerEntry("hyperdict", ("a",), b""), "k/a": leaf}, "k: unknown kind"),
        ({"k": ContainerEntry("dict", ("a",), b"")}, "k/a: the snapshot has no such entry"),
        ({"k": ContainerEntry("dict", ("a",), values.encode([1])), "k/a": leaf}, "context of a dict is no dict"),
        ({"k": ContainerEntry("dict", ("a",), values.encode({"keys": [1, 2]})), "k/a": leaf}, "other keys"),
        ({"k": ContainerEntry("deque", (0,), b""), "k/0": leaf}, "k: a stored deque cannot be rebuilt"),
        ({"k": ContainerEntry("quantized", ("values",), b""), "k/values": leaf}, "k: "),
        ({"k": ContainerEntry("sparse_coo", (), b"")}, "k: "),
    ):
        with pytest.raises(FormatError, match=message):
            inflate("k", nodes, lambda path, entry: 1)


def test_a_state_need_not_be_a_dict() -> None:
    """A tensor, a list or a number alone."""
    for state in (torch.ones(2), [torch.ones(1)], 5, numpy.ones(2)):
        assert same(there_and_back(state), state)


def test_flattening_reads_nothing_twice_and_changes_nothing() -> None:
    """Leaves hold the state's own tensors: nothing is copied before it is staged."""
    tensor = torch.ones(3)
    state = {"x": tensor, "y": [1, 2]}
    nodes = nodes_of(state)
    leaf = nodes["key/x"]
    assert isinstance(leaf, TensorLeaf)
    assert leaf.tensor is tensor
    assert state == {"x": tensor, "y": [1, 2]}
