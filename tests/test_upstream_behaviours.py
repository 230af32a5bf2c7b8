"""What programs written for the old torchsnapshot rely on, and what was wrong there and must be right here.

All through the public names, on a local folder, in one process.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fsspec
import numpy
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import torchsnapshot
from torchsnapshot import RNGState, Snapshot, StateDict, Stateful
from torchsnapshot.cli import main
from torchsnapshot.errors import CorruptionError, PartialRestoreError, PickleRefusedError
from torchsnapshot.event import Event
from torchsnapshot.event_handlers import register_event_handler, unregister_event_handler
from torchsnapshot.knobs import override_max_chunk_size_bytes, override_max_per_rank_io_concurrency
from torchsnapshot.manifest import PrimitiveEntry
from torchsnapshot.manifest_utils import is_container_entry, is_dict_entry, is_fully_replicated_entry
from torchsnapshot.snapshot import SNAPSHOT_METADATA_FNAME, PendingSnapshot
from torchsnapshot.stateful import AppState
from torchsnapshot.test_utils import check_state_dict_eq, rand_tensor, tensor_eq
from torchsnapshot.tricks.ddp import DistributedDataParallelAdapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for snapshots that nothing else uses."""
    return tmp_path / "run"


@pytest.fixture
def path(root: Path) -> str:
    """Where one snapshot goes."""
    return str(root / "step_0")


def blobs(root: Path) -> list[Path]:
    """Every blob in the store of a root."""
    return [found for found in (root / ".torchsnapshot" / "blobs").rglob("*") if found.is_file()]


def round_trip(path: str, **state: Any) -> dict[str, Any]:
    """The state after it was taken and restored into an empty target."""
    Snapshot.take(path, {"s": StateDict(**state)})
    target = StateDict()
    Snapshot(path).restore({"s": target})
    return dict(target)


def network() -> torch.nn.Sequential:
    """A small network with parameters and buffers."""
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))


def trained(make: Callable[..., torch.optim.Optimizer], module: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has made a step."""
    optimizer = make(module.parameters(), lr=0.01)
    module(torch.rand(4, 8)).sum().backward()
    optimizer.step()
    return optimizer


# ------------------------------------------------------------------ names and arguments


def test_arguments_have_the_old_names_and_order() -> None:
    """What could be given by position still can, and all else that exists is keyword-only."""

    def positional(function: Callable[..., Any]) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [found.name for found in parameters if found.kind is found.POSITIONAL_OR_KEYWORD]

    take = ["path", "app_state", "pg", "replicated", "storage_options", "_custom_tensor_prepare_func"]
    assert positional(Snapshot.take) == take
    assert positional(Snapshot.async_take) == take
    assert positional(Snapshot) == ["path", "pg", "storage_options"]
    assert positional(Snapshot.restore) == ["self", "app_state", "strict"]
    assert positional(Snapshot.read_object) == ["self", "path", "obj_out", "memory_budget_bytes"]
    assert positional(Snapshot.get_state_dict_for_key) == ["self", "key", "replicate_from_rank0"]


def test_names_that_programs_reach_for() -> None:
    """The old public names exist, and the metadata file has its old name."""
    assert {"Snapshot", "StateDict", "Stateful", "RNGState", "__version__"} <= set(torchsnapshot.__all__)
    assert torchsnapshot.snapshot.SNAPSHOT_METADATA_FNAME == SNAPSHOT_METADATA_FNAME == ".snapshot_metadata"
    state: AppState = {"s": StateDict()}
    assert isinstance(state["s"], Stateful)
    assert not isinstance(object(), Stateful)
    assert isinstance(torch.nn.Linear(1, 1), Stateful)


def test_state_dict_is_its_own_data() -> None:
    """``StateDict.state_dict()`` is the very dict, of exact type dict, and loading keeps what the loaded one lacks."""
    state = StateDict(a=1, b=2)
    assert type(state.state_dict()) is dict
    assert state.state_dict() is state.data
    state.load_state_dict({"a": 3})
    assert state.data == {"a": 3, "b": 2}


def test_path_stays_as_it_was_given(root: Path) -> None:
    """Clients compare ``.path`` with the string they passed."""
    given = f"{root}/./a//b/"
    snapshot = Snapshot.take(given, {"s": StateDict(a=1)})
    pending = Snapshot.async_take(given, {"s": StateDict(a=1)})
    assert (snapshot.path, pending.path, pending.wait().path) == (given, given, given)
    assert snapshot.pg is None


def test_take_can_be_called_on_an_instance(path: str) -> None:
    """The class methods may be called on an instance, which then reads what is there."""
    snapshot = Snapshot(path)
    snapshot.take(path, {"s": StateDict(a=5)})
    assert snapshot.read_object("0/s/a") == 5


def test_values_must_be_stateful(path: str, tmp_path: Path) -> None:
    """Both directions refuse a value without ``state_dict``, before anything is read or written."""
    with pytest.raises(TypeError, match="Expected Stateful in app_state for key"):
        Snapshot.take(path, {"optim": 1})
    with pytest.raises(TypeError, match="Expected Stateful in app_state for key"):
        Snapshot(str(tmp_path)).restore({"optim": 1})
    assert not os.path.exists(path)


def test_app_state_is_not_changed(path: str) -> None:
    """The mapping and the objects in it are as they were, after take and restore."""
    tensor = torch.rand(3)
    app_state = {"b": StateDict(t=tensor), "a": StateDict(n=[1, (2, 3)])}
    Snapshot.take(path, app_state).restore(app_state)
    assert list(app_state) == ["b", "a"]
    assert app_state["b"].data["t"] is tensor
    assert app_state["a"].data == {"n": [1, (2, 3)]}


# ------------------------------------------------------------------ taking


def test_metadata_file_is_there_exactly_when_the_snapshot_is(root: Path, path: str) -> None:
    """The file that clients look for appears with the commit, and a take that fails leaves none."""

    class Failing:
        def state_dict(self) -> dict[str, Any]:
            raise ValueError("sorry")

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    with pytest.raises(ValueError, match="sorry"):
        Snapshot.take(path, {"a": StateDict(x=torch.rand(10)), "f": Failing()})
    assert not (Path(path) / SNAPSHOT_METADATA_FNAME).exists()
    Snapshot.take(path, {"a": StateDict(x=torch.rand(10))})
    assert (Path(path) / SNAPSHOT_METADATA_FNAME).exists()
    # a metadata file of ours is no text of the old kind
    assert (Path(path) / SNAPSHOT_METADATA_FNAME).read_bytes()[0] >= 0x80


def test_opening_does_no_io(tmp_path: Path) -> None:
    """A wrong path is an error on first use only, with the words of old."""
    snapshot = Snapshot(str(tmp_path / "nothing"))
    for use in (lambda: snapshot.metadata, snapshot.get_manifest, lambda: snapshot.restore({"s": StateDict()})):
        with pytest.raises(
            RuntimeError, match=r"Failed to read \.snapshot_metadata\. Ensure path to snapshot is correct"
        ):
            use()


@pytest.mark.parametrize("numel", [1, 100, 1 << 16, 3 << 20])
def test_async_take_keeps_what_was_there_when_it_returned(path: str, numel: int) -> None:
    """Tensors of every size may be changed as soon as ``async_take`` has returned."""
    tensor = torch.rand(numel)
    expected = tensor.clone()
    pending = Snapshot.async_take(path, {"s": StateDict(t=tensor, small=torch.zeros(()))})
    tensor.fill_(-1)
    pending.wait()
    assert tensor_eq(Snapshot(path).read_object("0/s/t"), expected)


def test_pending_snapshot(path: str) -> None:
    """``wait`` returns the snapshot, again and again, and then the take is done."""
    pending = Snapshot.async_take(path, {"s": StateDict(a=1, t=torch.rand(100))})
    assert isinstance(pending, PendingSnapshot)
    first, second = pending.wait(), pending.wait()
    assert pending.done()
    assert isinstance(first, Snapshot)
    assert first.path == second.path
    assert first.read_object("0/s/a") == 1


class FailingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem in memory that takes everything but blobs."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 - the base class has one for all of its instances
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        """Store ``value``, unless it is a blob."""
        if "/blobs/" in path:
            raise PermissionError("sorry")
        super().pipe_file(path, value, **options)


def test_async_failure_comes_from_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in the background is raised by ``wait``, with its own words; the take is done and left no metadata."""
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    pending = Snapshot.async_take("failing://root/run/step_0", {"s": StateDict(t=torch.rand(3 << 20))})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sorry"):
            pending.wait()
    assert pending.done()
    assert not any(name.endswith(SNAPSHOT_METADATA_FNAME) for name in FailingFileSystem.store)


def test_prepare_function_decides_what_is_stored(path: str) -> None:
    """Its result is what is stored, in its dtype; it is asked once to trace and once to stage, by logical path."""
    calls: list[tuple[str, bool]] = []

    def prepare(logical_path: str, tensor: torch.Tensor, tracing: bool) -> torch.Tensor:
        calls.append((logical_path, tracing))
        return (tensor * 2).to(torch.float16) if logical_path == "s/t" else tensor

    state = StateDict(t=torch.arange(100.0), u=torch.arange(100.0))
    Snapshot.take(path, {"s": state}, _custom_tensor_prepare_func=prepare)
    snapshot = Snapshot(path)
    assert calls == [("s/t", True), ("s/t", False), ("s/u", True), ("s/u", False)]
    assert snapshot.get_manifest()["0/s/t"].dtype == "torch.float16"
    assert tensor_eq(snapshot.read_object("0/s/t"), (torch.arange(100.0) * 2).half())
    assert tensor_eq(snapshot.read_object("0/s/u"), torch.arange(100.0))
    assert tensor_eq(state["t"], torch.arange(100.0))


def test_prepare_function_must_keep_the_shape(path: str) -> None:
    """Another shape is an error, and nothing is committed."""
    with pytest.raises(RuntimeError, match="shape"):
        Snapshot.take(
            path,
            {"s": StateDict(t=torch.rand(4))},
            _custom_tensor_prepare_func=lambda _path, tensor, _tracing: tensor[:2],
        )
    assert not (Path(path) / SNAPSHOT_METADATA_FNAME).exists()


def test_retaking_a_path_leaves_nothing_for_ever(root: Path, path: str) -> None:
    """Taking a path again writes what changed, and gc frees what only the replaced snapshot held."""
    state = StateDict(t=torch.rand(1 << 20))
    Snapshot.take(path, {"s": state})
    once = set(blobs(root))
    Snapshot.take(path, {"s": state})
    assert set(blobs(root)) == once
    for _ in range(3):
        state["t"] = torch.rand(1 << 20)
        Snapshot.take(path, {"s": state})
    assert not main(["gc", str(root)])
    assert len(blobs(root)) == len(once)
    assert not set(blobs(root)) & once
    assert tensor_eq(Snapshot(path).read_object("0/s/t"), state["t"])


def test_nones_and_numbers_cost_no_file(root: Path, path: str) -> None:
    """Hundreds of None, numbers and flags stand in the manifest."""
    state = {f"option_{number}": None for number in range(300)} | {"lr": 0.1, "nested": [None] * 300}
    assert round_trip(path, **state) == state
    assert blobs(root) == []


def test_global_random_is_not_drawn(path: str) -> None:
    """Python's, numpy's and torch's global generators are as they were after every call."""
    random.seed(1)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    snapshot = Snapshot.take(path, {"s": StateDict(t=torch.arange(10))})
    Snapshot.async_take(path, {"s": StateDict(t=torch.arange(10))}).wait()
    snapshot.restore({"s": StateDict()})
    snapshot.read_object("0/s/t")
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_chunk_size_override_is_honoured(root: Path, path: str) -> None:
    """A smaller chunk size gives a state in more pieces that restores as well."""
    tensor = torch.rand(1 << 20)
    with override_max_chunk_size_bytes(1 << 20):
        restored = round_trip(path, t=tensor)
    assert tensor_eq(restored["t"], tensor)
    with override_max_chunk_size_bytes(7):
        restored = round_trip(str(root / "step_1"), t=torch.arange(300))
    assert tensor_eq(restored["t"], torch.arange(300))


def test_handlers_hear_of_every_call(path: str) -> None:
    """Takes, restores and reads are told to event handlers, failures as such."""

    class Recorder:
        heard: list[Event] = []  # noqa: RUF012

        def handle_event(self, event: Event) -> None:
            self.heard.append(event)

    recorder = Recorder()
    register_event_handler(recorder)
    try:
        snapshot = Snapshot.take(path, {"s": StateDict(a=1)})
        Snapshot.async_take(path, {"s": StateDict(a=1)}).wait()
        snapshot.restore({"s": StateDict()})
        snapshot.read_object("0/s/a")
        with pytest.raises(RuntimeError):
            snapshot.read_object("0/s/b")
    finally:
        unregister_event_handler(recorder)
    ends = [(event.name, event.metadata["is_success"]) for event in recorder.heard if event.metadata["action"] == "end"]
    succeeded = [(name, True) for name in ("take", "async_take", "restore", "read_object")]
    assert ends == [*succeeded, ("read_object", False)]


# ------------------------------------------------------------------ restoring


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW], ids=lambda make: make.__name__
)
def test_module_and_optimizer(path: str, make: Callable[..., torch.optim.Optimizer], asynchronous: bool) -> None:
    """Another module, and an optimizer that has made no step yet, get exactly the state that was taken."""
    module, other = network(), network()
    optimizer, fresh = trained(make, module), make(other.parameters(), lr=0.5)
    app_state = {"module": module, "optimizer": optimizer}
    if asynchronous:
        Snapshot.async_take(path, app_state).wait()
    else:
        Snapshot.take(path, app_state)
    Snapshot(path).restore({"module": other, "optimizer": fresh})
    assert check_state_dict_eq(other.state_dict(), module.state_dict())
    assert check_state_dict_eq(fresh.state_dict(), optimizer.state_dict())


def test_restore_writes_into_the_targets_memory(path: str) -> None:
    """A tensor of the same shape is filled in place."""
    source, target = StateDict(t=torch.rand(1000), n=1), StateDict(t=torch.zeros(1000), n=0)
    Snapshot.take(path, {"s": source})
    memory = target["t"]
    Snapshot(path).restore({"s": target})
    assert target["t"].data_ptr() == memory.data_ptr()
    assert tensor_eq(memory, source["t"])


def test_structure_comes_from_the_snapshot(path: str) -> None:
    """Empty targets and shorter lists are filled; keys that the snapshot lacks survive in a StateDict."""
    content = {"list": [torch.rand(2), 1, torch.rand(3)], "deep": {"empty": {}, "none": None, "list": []}}
    Snapshot.take(path, {"s": StateDict(ckpt=content)})
    target = StateDict(ckpt={"list": [0]}, mine=7)
    Snapshot(path).restore({"s": target})
    assert check_state_dict_eq(target.data, {"ckpt": content, "mine": 7})


def test_strict_is_for_modules(path: str) -> None:
    """A module with other names raises, unless ``strict=False``; then what fits is loaded."""
    source = torch.nn.Sequential(torch.nn.Linear(3, 3))
    target = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    Snapshot.take(path, {"m": source})
    with pytest.raises(RuntimeError, match="Missing key"):
        Snapshot(path).restore({"m": target})
    Snapshot(path).restore({"m": target}, strict=False)
    assert check_state_dict_eq(target[0].state_dict(), source[0].state_dict())


def test_key_that_is_not_in_the_snapshot(path: str) -> None:
    """Such a key raises the error of old; fewer keys than the snapshot has are fine."""
    Snapshot.take(path, {"a": StateDict(x=1), "b": StateDict(x=2)})
    snapshot, target = Snapshot(path), StateDict()
    with pytest.raises(AssertionError, match=r"module2 is absent in both manifest and flattened\."):
        snapshot.restore({"module2": StateDict()})
    snapshot.restore({"b": target})
    assert target.data == {"x": 2}


def test_nothing_is_said_at_warning(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Takes and restores that go well log nothing at WARNING or above."""
    with caplog.at_level(logging.WARNING):
        module = network()
        app_state = {"m": module, "o": trained(torch.optim.AdamW, module), "r": RNGState(), "s": StateDict(a=1)}
        Snapshot.take(path, app_state).restore(app_state)
        Snapshot.async_take(path, app_state).wait().restore(app_state)
    assert caplog.records == []


def test_random_state_after_take_is_that_after_restore(path: str) -> None:
    """With an ``RNGState``, numbers drawn after a take come again after a restore, even if states draw some."""

    class Drawing:
        def state_dict(self) -> dict[str, Any]:
            return {"drawn": torch.rand(1)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            torch.rand(5)

    app_state = {"z": Drawing(), "rng": RNGState(), "a": Drawing()}
    snapshot = Snapshot.take(path, app_state)
    after_take = torch.rand(3)
    snapshot.restore(app_state)
    assert torch.equal(torch.rand(3), after_take)


def test_only_one_random_state(path: str) -> None:
    """Two ``RNGState`` objects in one state are refused."""
    with pytest.raises(RuntimeError, match="RNGState"):
        Snapshot.take(path, {"a": RNGState(), "b": RNGState()})


def test_subclass_of_stateful(path: str) -> None:
    """A program's own class that derives from ``Stateful`` goes round."""

    class Counter(Stateful):
        def __init__(self, count: int) -> None:
            self.count = count

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    Snapshot.take(path, {"c": Counter(3)})
    target = Counter(0)
    Snapshot(path).restore({"c": target})
    assert target.count == 3
    assert Snapshot(path).get_state_dict_for_key("c") == {"count": 3}


def test_module_versions_survive(path: str) -> None:
    """The versions that torch keeps beside a module's state come back with it."""
    module = network()
    Snapshot.take(path, {"m": module})
    state = Snapshot(path).get_state_dict_for_key("m")
    assert type(state) is OrderedDict
    assert state._metadata == module.state_dict()._metadata


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_ddp_module(path: str, process_group: None) -> None:
    """A module inside of DDP restores into another one, and through the adapter into one outside of DDP."""
    source, inside, outside = DistributedDataParallel(network()), DistributedDataParallel(network()), network()
    snapshot = Snapshot.take(path, {"m": source})
    assert "0/m/module.0.weight" in snapshot.get_manifest()
    snapshot.restore({"m": inside})
    snapshot.restore({"m": DistributedDataParallelAdapter(outside)})
    assert check_state_dict_eq(inside.state_dict(), source.state_dict())
    assert check_state_dict_eq(outside.state_dict(), source.module.state_dict())


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("numel", [1000, 1 << 20], ids=["packed", "alone"])
def test_damaged_bytes_never_restore_silently(root: Path, path: str, numel: int, damage: str) -> None:
    """A blob that is shorter, changed or gone is an error that says so, and no wrong value ever reaches a target."""
    state = {f"t{number}": torch.rand(numel) + 1 for number in range(3)}
    Snapshot.take(path, {"s": StateDict(**state)})
    for blob in blobs(root):
        data = bytearray(blob.read_bytes())
        if damage == "remove":
            blob.unlink()
        else:
            data[len(data) // 2] ^= 1
            blob.write_bytes(data[:-100] if damage == "truncate" else data)
    target = StateDict(**{name: torch.zeros(numel) for name in state})
    with pytest.raises((CorruptionError, PartialRestoreError)):
        Snapshot(path).restore({"s": target})
    for name, tensor in state.items():
        untouched = target[name] == 0
        assert (untouched | (target[name] == tensor)).all()
    damaged = 0
    for name, tensor in state.items():
        try:
            assert tensor_eq(Snapshot(path).read_object(f"0/s/{name}"), tensor)
        except CorruptionError:
            damaged += 1
    assert damaged > 0


# ------------------------------------------------------------------ values


def test_objects_that_torch_refuses_to_load(path: str) -> None:
    """Times and numpy values, which ``torch.load`` refuses since 2.6, come back as they were."""
    state = {
        "when": datetime(2024, 2, 29, 12, tzinfo=timezone.utc),
        "scalar": numpy.float32(0.1),
        "array": numpy.arange(12).reshape(3, 4),
        "set": {1, "a"},
        "tuple": (1, (torch.float16, None)),
    }
    restored = round_trip(path, **state)
    array = restored.pop("array")
    assert (array == state.pop("array")).all()
    assert restored == state
    assert {key: type(value) for key, value in restored.items()} == {key: type(value) for key, value in state.items()}


class Opaque:
    """A class that no snapshot knows."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_pickled_objects_restore_when_allowed(path: str) -> None:
    """An object that only pickle can hold is taken, refused by name on restoring, and comes back where allowed."""
    Snapshot.take(path, {"s": StateDict(odd=Opaque(4)), "t": StateDict(plain=1)})
    plain, odd = StateDict(), StateDict()
    with pytest.raises(PickleRefusedError, match=r"s/odd.*Opaque"):
        Snapshot(path).restore({"s": odd, "t": plain})
    assert plain.data == {"plain": 1}
    Snapshot(path).restore({"s": odd}, allow_pickle=True)
    assert odd["odd"].value == 4


@pytest.mark.parametrize("text", ["😀", "a/b", "100%", "ключ", "", " ", "..", "a\nb"])
def test_any_text_in_keys_and_values(path: str, text: str) -> None:
    """Emoji, slashes and other unusual text is fine as a value, as a key of a dict and as a key of the state."""
    state = {"value": text, "dict": {text: 1, "tensors": {text: torch.arange(3)}}}
    assert check_state_dict_eq(round_trip(path, **state), state)
    Snapshot.take(path, {text or "empty": StateDict(t=torch.ones(2))})
    assert check_state_dict_eq(Snapshot(path).get_state_dict_for_key(text or "empty"), {"t": torch.ones(2)})


@pytest.mark.parametrize("leaf", [7, torch.arange(2)], ids=["plain", "tensors"])
def test_dict_keys_keep_their_types(path: str, leaf: Any) -> None:
    """Keys that look alike as text stay apart: flags, ints and strings."""
    state = {
        "d": {True: leaf, "1": leaf, 0: leaf, "True": leaf, "0": leaf, "%i1": leaf},
        "e": {False: leaf, 1: leaf, -3: leaf, "False": leaf, "1": leaf},
    }
    restored = round_trip(path, **state)
    for name in "de":
        assert [(type(key), key) for key in restored[name]] == [(type(key), key) for key in state[name]]
    assert check_state_dict_eq(restored, state)


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:torch.quantize_per_tensor", "ignore:Sparse")
@pytest.mark.parametrize(
    "dtype",
    [
        *(
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
        ),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex32, torch.complex64),
        *(torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.qint8, torch.quint8, torch.qint32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 7), (1,)], ids=str)
def test_every_dtype(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A tensor of every dtype comes back as it was."""
    tensor = rand_tensor(shape, dtype)
    assert tensor_eq(round_trip(path, t=tensor)["t"], tensor)


SPECIAL_TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.zeros(0),
    "empty-2d": lambda: torch.zeros(0, 3),
    "empty-inner": lambda: torch.zeros(3, 0, 2),
    "requires-grad": lambda: torch.rand(5, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.rand(5)),
    "transposed": lambda: torch.rand(30, 20).t(),
    "strided": lambda: torch.rand(30, 20)[::2, 1::3],
    "expanded": lambda: torch.rand(3, 1).expand(3, 4),
    "channels-last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugate": lambda: torch.rand(4, dtype=torch.complex64).conj(),
    "sparse-coo": lambda: torch.eye(4).to_sparse(),
    "nan": lambda: torch.tensor([math.nan, math.inf, -0.0]),
}


@pytest.mark.parametrize("name", SPECIAL_TENSORS)
def test_every_kind_of_tensor(path: str, name: str) -> None:
    """Tensors that the old torchsnapshot refused or bent come back equal, with their gradient flag."""
    tensor = SPECIAL_TENSORS[name]()
    restored = round_trip(path, t=tensor)["t"]
    assert tensor_eq(restored, tensor)
    assert restored.requires_grad == tensor.requires_grad
    assert restored.layout == tensor.layout


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_csr(path: str) -> None:
    """A tensor in compressed rows comes back in that layout."""
    tensor = torch.eye(4).to_sparse_csr()
    restored = round_trip(path, t=tensor)["t"]
    assert restored.layout == torch.sparse_csr
    assert torch.equal(restored.to_dense(), torch.eye(4))


# ------------------------------------------------------------------ manifest and single values


@pytest.fixture
def snapshot(path: str) -> Snapshot:
    """A snapshot of everyday values."""
    state = StateDict(
        int_key=42,
        str_key="text",
        bool_key=False,
        float_key=0.1,
        bytes_key=b"\0\xff",
        none_key=None,
        tensor=torch.arange(6, dtype=torch.float32).reshape(2, 3),
        nested={"list": [1, {"deep": torch.ones(2)}], "plain": {"a": [1.5, "x"]}, "empty": {}},
    )
    Snapshot.take(path, {"key": state, "m": torch.nn.Linear(2, 1), "a/b": StateDict(x=1)})
    return Snapshot(path)


def test_manifest_has_every_container_and_leaf(snapshot: Snapshot) -> None:
    """Keys are rank, key and path; containers stand before what they hold, values inside of values too."""
    keys = list(snapshot.get_manifest())
    nested = [f"0/key/nested{rest}" for rest in ("", "/list", "/list/0", "/list/1", "/list/1/deep")]
    plain = [f"0/key/nested/plain{rest}" for rest in ("", "/a", "/a/0", "/a/1")]
    leaves = [
        f"0/key/{name}" for name in ("int_key", "str_key", "bool_key", "float_key", "bytes_key", "none_key", "tensor")
    ]
    expected = [
        "0/key",
        *leaves,
        *nested,
        *plain,
        "0/key/nested/empty",
        "0/m",
        "0/m/weight",
        "0/m/bias",
        "0/a%2Fb",
        "0/a%2Fb/x",
    ]
    assert sorted(keys) == sorted(expected)
    for key in keys:
        parent = key.rpartition("/")[0]
        assert parent == "0" or keys.index(parent) < keys.index(key)


def test_manifest_entries_describe_values(snapshot: Snapshot) -> None:
    """Entries say type, dtype and shape as they did, and primitives give their value."""
    manifest = snapshot.metadata.manifest
    assert (manifest["0/key/int_key"].type, manifest["0/key/int_key"].get_value()) == ("int", 42)
    assert isinstance(manifest["0/key/float_key"], PrimitiveEntry)
    assert (manifest["0/key/float_key"].readable, manifest["0/key/float_key"].get_value()) == ("0.1", 0.1)
    values = [manifest[f"0/key/{name}_key"].get_value() for name in ("str", "bool", "bytes")]
    assert values == ["text", False, b"\0\xff"]
    tensor = manifest["0/key/tensor"]
    assert (tensor.type, tensor.dtype, tensor.shape, tensor.replicated) == ("Tensor", "torch.float32", [2, 3], False)
    assert not is_fully_replicated_entry(tensor)
    assert is_dict_entry(manifest["0/key"])
    assert manifest["0/key/nested"].keys == ["list", "plain", "empty"]
    assert (manifest["0/key/nested/list"].type, manifest["0/m"].type) == ("list", "OrderedDict")
    assert is_container_entry(manifest["0/key/nested/plain/a"])
    assert manifest["0/key/none_key"].type == "object"
    assert snapshot.metadata.world_size == 1


def test_manifest_is_a_copy(snapshot: Snapshot) -> None:
    """What a program does to the manifest it got changes nothing."""
    snapshot.get_manifest().clear()
    assert snapshot.read_object("0/key/int_key") == 42
    assert "0/key/int_key" in snapshot.get_manifest()


def test_read_object_gives_values(snapshot: Snapshot) -> None:
    """Each leaf can be read by its key in the manifest, also one inside of a stored value."""
    assert snapshot.read_object("0/key/int_key") == 42
    assert snapshot.read_object("0/key/none_key") is None
    assert snapshot.read_object("0/key/nested/plain/a/1") == "x"
    assert snapshot.read_object("0/a%2Fb/x") == 1
    assert tensor_eq(snapshot.read_object("0/key/nested/list/1/deep"), torch.ones(2))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_every_leaf_of_the_manifest_can_be_read(path: str) -> None:
    """Each key of the manifest that is no container is one that ``read_object`` knows, whatever the value's kind."""
    module = network()
    odd = StateDict(
        values={"tuple": (1, (2,)), "set": {1}, "when": datetime(2024, 1, 1), 1: {"a/b": [OrderedDict(x=1)]}},
        quantized=rand_tensor((3, 4), torch.qint8),
        sparse=torch.eye(3).to_sparse(),
        mixed=(torch.ones(2), {"x": [torch.zeros(3), None]}),
    )
    Snapshot.take(path, {"optimizer": trained(torch.optim.AdamW, module), "odd": odd})
    snapshot = Snapshot(path)
    leaves = {key: entry for key, entry in snapshot.get_manifest().items() if not is_container_entry(entry)}
    assert {
        "0/optimizer/param_groups/0/betas",
        "0/odd/values/tuple",
        "0/odd/quantized",
        "0/odd/sparse",
    } <= leaves.keys()
    for key, entry in leaves.items():
        value = snapshot.read_object(key)
        assert isinstance(value, torch.Tensor) == (entry.type == "Tensor"), key
    assert snapshot.read_object("0/optimizer/param_groups/0/betas") == (0.9, 0.999)
    assert tensor_eq(snapshot.read_object("0/odd/quantized"), odd["quantized"])


def test_read_object_fills_the_given_tensor(snapshot: Snapshot) -> None:
    """A tensor of the same dtype and shape is filled, and is what is returned."""
    out = torch.zeros(2, 3)
    assert snapshot.read_object("0/key/tensor", out) is out
    assert tensor_eq(out, torch.arange(6, dtype=torch.float32).reshape(2, 3))


def test_read_object_of_nothing(snapshot: Snapshot) -> None:
    """A path that isn't there, or that is a container, is an error."""
    with pytest.raises(RuntimeError, match="does not exist in the snapshot's manifest"):
        snapshot.read_object("0/key/nothing")
    for missing in ("0", "", "1/key/int_key", "0/key/int_key/0"):
        with pytest.raises(RuntimeError):
            snapshot.read_object(missing)


@pytest.mark.parametrize("budget", [1, 1000, 1 << 30])
@pytest.mark.parametrize("given", [False, True])
def test_read_object_with_a_budget_keeps_the_shape(path: str, budget: int, given: bool) -> None:
    """However small the budget, the tensor has its shape and its values."""
    tensor = torch.rand(300, 70)
    Snapshot.take(path, {"s": StateDict(t=tensor)})
    out = torch.zeros(300, 70) if given else None
    result = Snapshot(path).read_object("0/s/t", obj_out=out, memory_budget_bytes=budget)
    assert tensor_eq(result, tensor)
    assert (result is out) == given


def test_state_dict_for_key(snapshot: Snapshot) -> None:
    """The whole state under a key comes back, keys with slashes too; an unknown one is the error of old."""
    assert snapshot.get_state_dict_for_key("a/b") == {"x": 1}
    state = snapshot.get_state_dict_for_key(key="key", replicate_from_rank0=True)
    assert list(state) == [
        *("int_key", "str_key", "bool_key", "float_key", "bytes_key", "none_key", "tensor", "nested"),
    ]
    assert state["nested"]["list"][0] == 1
    with pytest.raises(AssertionError, match="is absent in both manifest and flattened"):
        snapshot.get_state_dict_for_key("nothing")


# ------------------------------------------------------------------ programs


class Client:
    """What a training framework's callback does: asynchronous checkpoints of which the last two are kept."""

    def __init__(self, folder: Path, app_state: dict[str, Any]) -> None:
        self.folder = folder
        self.app_state = app_state
        self.previous: PendingSnapshot | None = None
        self.kept: list[str] = []
        self.files = fsspec.filesystem("file")

    def save(self, name: str) -> None:
        """Begin a checkpoint, and delete what is too old while it runs."""
        if self.previous is not None and not self.previous.done():
            self.previous.wait()
        path = str(self.folder / name)
        with override_max_per_rank_io_concurrency(1):
            self.previous = Snapshot.async_take(
                path, app_state=self.app_state, pg=None, replicated=["**"], storage_options=None
            )
        self.kept.append(path)
        if len(self.kept) > 2:
            self.files.rm(self.kept.pop(0), recursive=True)

    def checkpoints(self) -> list[str]:
        """The folders that hold a checkpoint, as frameworks find them."""
        folders = [
            found["name"] for found in self.files.ls(str(self.folder), detail=True) if found["type"] == "directory"
        ]
        return sorted(found for found in folders if self.files.exists(f"{found}/{SNAPSHOT_METADATA_FNAME}"))


def test_framework_that_deletes_while_it_saves(root: Path) -> None:
    """Removing old checkpoints behind our back, during a take, harms none that is left, before and after gc."""
    module = network()
    optimizer = trained(torch.optim.AdamW, module)
    progress = StateDict(steps=0)
    client = Client(root, {"module": module, "optimizer": optimizer, "progress": progress, "rng": RNGState()})
    states = []
    for step in range(5):
        progress["steps"] = step
        module(torch.rand(4, 8)).sum().backward()
        optimizer.step()
        states.append(copy.deepcopy((module.state_dict(), optimizer.state_dict())))
        client.save(f"epoch_0_step_{step}")
    assert client.previous is not None
    client.previous.wait()
    assert client.checkpoints() == [str(root / "epoch_0_step_3"), str(root / "epoch_0_step_4")]
    for collected in (False, True):
        if collected:
            assert not main(["gc", str(root)])
        for step in (3, 4):
            module, steps = network(), StateDict(steps=-1)
            optimizer = torch.optim.AdamW(module.parameters())
            snapshot = Snapshot(str(root / f"epoch_0_step_{step}"), pg=None, storage_options=None)
            snapshot.restore({"module": module, "optimizer": optimizer, "progress": steps}, strict=True)
            assert check_state_dict_eq(module.state_dict(), states[step][0])
            assert check_state_dict_eq(optimizer.state_dict(), states[step][1])
            assert steps.data == {"steps": step}


def test_framework_that_looks_into_the_manifest(path: str) -> None:
    """Frameworks search the manifest's keys for the states that are in it, also for states without any tensor."""
    Snapshot.take(path, {"module": network(), "train_dataloader": StateDict(position=3, shuffle={"seed": 1})})
    keys = Snapshot(path).get_manifest().keys()
    assert any("train_dataloader" in key for key in keys)
    for present, stateful in ((True, "module"), (True, "train_dataloader"), (False, "optimizer")):
        assert any(f"/{stateful}/" in key for key in keys) == present


def test_program_that_reads_every_tensor_by_its_key(path: str) -> None:
    """Walking over the manifest and reading each tensor gives the state."""
    module = network()
    Snapshot.take(path, {"module": module})
    snapshot = Snapshot(path)
    state = module.state_dict()
    found = {
        key.removeprefix("0/module/"): snapshot.read_object(key)
        for key, entry in snapshot.get_manifest().items()
        if entry.type == "Tensor"
    }
    assert check_state_dict_eq(found, dict(state))


def test_program_that_moves_and_removes_folders(root: Path) -> None:
    """A snapshot may be renamed beside the others, and removing one leaves the rest as it was."""
    state = StateDict(t=torch.rand(1 << 20), n=0)
    for step in range(3):
        state["n"] = step
        Snapshot.take(str(root / f"{step}"), {"s": state})
    os.rename(root / "1", root / "best")
    shutil.rmtree(root / "0")
    assert not main(["gc", str(root)])
    for name, step in (("best", 1), ("2", 2)):
        target = StateDict()
        Snapshot(str(root / name)).restore({"s": target})
        assert target["n"] == step
        assert tensor_eq(target["t"], state["t"])
