"""Adapters between modules inside and outside of DDP, and for optimizers of FSDP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from torchsnapshot import Snapshot, adapters, tricks
from torchsnapshot.test_utils import check_state_dict_eq
from torchsnapshot.tricks.ddp import DDP_STATE_DICT_PREFIX, DistributedDataParallelAdapter
from torchsnapshot.tricks.fsdp import FSDPOptimizerAdapter


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def network() -> torch.nn.Sequential:
    """A small module with buffers."""
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def test_old_names() -> None:
    """The names of the old torchsnapshot are there, and are the adapters'."""
    assert DDP_STATE_DICT_PREFIX == "module."
    assert adapters.__doc__
    assert tricks.__doc__


def test_state_of_a_ddp_module_loads_outside_of_ddp(process_group: None) -> None:
    """Names lose DDP's prefix, also those of the versions, and the given state is left as it is."""
    source, target = DistributedDataParallel(network()), network()
    state = source.state_dict()
    before = copy.deepcopy(state)
    DistributedDataParallelAdapter(target).load_state_dict(state)
    assert check_state_dict_eq(target.state_dict(), source.module.state_dict())
    assert state.keys() == before.keys()
    assert state._metadata == before._metadata


def test_state_of_a_ddp_module_loads_into_a_ddp_module(process_group: None) -> None:
    """An adapter around a module that is itself inside of DDP keeps the names."""
    source, target = DistributedDataParallel(network()), DistributedDataParallel(network())
    DistributedDataParallelAdapter(target).load_state_dict(source.state_dict())
    assert check_state_dict_eq(target.state_dict(), source.state_dict())


def test_state_without_prefix_loads() -> None:
    """A state that was taken without DDP loads too, and a plain dict will do."""
    source, target = network(), network()
    DistributedDataParallelAdapter(target).load_state_dict(dict(source.state_dict()))
    assert check_state_dict_eq(target.state_dict(), source.state_dict())


def test_submodule_called_module_keeps_its_name() -> None:
    """A prefix that is the module's own is not taken off."""
    source, target = (torch.nn.Sequential() for _ in range(2))
    source.add_module("module", torch.nn.Linear(2, 2))
    target.add_module("module", torch.nn.Linear(2, 2))
    adapter = DistributedDataParallelAdapter(target)
    adapter.load_state_dict(source.state_dict())
    assert check_state_dict_eq(adapter.state_dict(), source.state_dict())


def test_names_must_fit_unless_told_otherwise() -> None:
    """Missing names raise, but not with ``strict=False``."""
    adapter = DistributedDataParallelAdapter(network())
    with pytest.raises(RuntimeError, match="Missing key"):
        adapter.load_state_dict({})
    adapter.load_state_dict({}, strict=False)


def test_version_of_batch_norm_survives(process_group: None) -> None:
    """The versions of submodules reach torch: a state that has them needs no upgrade of old batch norms."""
    seen: list[object] = []
    target = network()
    target[1].register_load_state_dict_pre_hook(
        lambda module, state, prefix, metadata, *rest: seen.append(dict(metadata))
    )
    DistributedDataParallelAdapter(target).load_state_dict(DistributedDataParallel(network()).state_dict())
    assert seen == [{"version": 2}]


# one rank has nothing to spread, which FSDP remarks
@pytest.mark.filterwarnings("ignore:FSDP", "ignore:.*FSDP", "ignore::FutureWarning:torch.*")
def test_fsdp_optimizer_state_goes_round(process_group: None) -> None:
    """What the adapter gives is keyed by parameter names and loads into another optimizer's adapter."""
    module = FullyShardedDataParallel(torch.nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = FSDPOptimizerAdapter(module, optimizer).state_dict()
    assert set(state["state"]) == {"weight", "bias"}

    other = torch.optim.AdamW(module.parameters(), lr=0.5)
    FSDPOptimizerAdapter(module, other).load_state_dict(state)
    assert check_state_dict_eq(other.state_dict(), optimizer.state_dict())


def test_a_model_on_the_meta_device_gets_memory(tmp_path: Path) -> None:
    """Under both kinds of names a model that has no memory yet is restored, as a bare module is."""
    source = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    path = str(tmp_path / "run" / "step")
    Snapshot.take(path, {"whole": tricks.ModelState(source), "ddp": source})
    with torch.device("meta"):
        models = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)) for _ in range(3)]
    Snapshot(path).restore({"whole": tricks.ModelState(models[0])})
    Snapshot(path).restore({"ddp": DistributedDataParallelAdapter(models[1])})
    for model in models[:2]:
        assert check_state_dict_eq(dict(model.state_dict()), dict(source.state_dict()))
    optimizer = torch.optim.SGD(models[2].parameters(), 0.1)
    with pytest.raises(ValueError, match="to_empty"):
        Snapshot(path).restore({"whole": tricks.ModelState(models[2], optimizer)})


def test_a_buffer_without_memory_that_is_in_no_state_is_nobodys_business(tmp_path: Path) -> None:
    """A model whose scratch buffer is on the meta device is restored in place, beside its optimizer."""
    models = [torch.nn.Linear(8, 8) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for model in models:
        model.register_buffer("scratch", torch.empty(3, device="meta"), persistent=False)
    path = str(tmp_path / "run" / "step")
    Snapshot.take(path, {"t": tricks.ModelState(models[0], optimizers[0])})
    Snapshot(path).restore({"t": tricks.ModelState(models[1], optimizers[1])})
    assert torch.equal(models[1].weight, models[0].weight)
