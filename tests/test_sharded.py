"""DTensors and ShardedTensors as they are described: on every rank the right boxes, over the right memory.

Most tests play all ranks in one process, over a process group that torch fakes: nothing is communicated, and FSDP2 and
``distribute_tensor`` make each rank's local tensors all the same. The last ones run real processes; the functions
without ``test_`` run inside of them.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from launch import launch, succeed
from test_placements import as_torch, cases, slices
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchsnapshot.errors import UnsupportedValueError
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.placements import REPLICATE, Placement, Sharding
from torchsnapshot.state.flatten import ShardedLeaf, TensorLeaf, flatten
from torchsnapshot.state.sharded import ShardedSource, allocate_like, bump_versions, describe, distribute_local


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process is one rank of many, and the others say nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def described(value: Any) -> ShardedSource:
    """The description of a tensor that has one."""
    source = describe(value)
    assert isinstance(source, ShardedSource), source
    return source


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of which every element is another."""
    return torch.arange(prod(shape), dtype=torch.float32).reshape(shape)


def check_parts(source: ShardedSource, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's parts are what the whole tensor has at its boxes; returns how often each element was seen."""
    seen = torch.zeros(source.shape, dtype=torch.int64)
    for box, part in zip(source.boxes, source.locals, strict=True):
        assert torch.equal(part.detach(), tensor[slices(box)] if source.shape else tensor)
        if source.shape:
            seen[slices(box)] += 1
        else:
            seen += 1
    if source.position is not None:
        assert source.boxes == source.sharding.boxes_at(source.shape, source.position)
    return seen


def on_all_ranks(world_size: int, make: Callable[[], dict[str, tuple[Any, torch.Tensor]]]) -> dict[str, ShardedSource]:
    """Check what ``make`` gives on every rank: sharded tensors, each with the tensor that it is as a whole.

    Together the ranks hold every element, and equally often; all agree on what the tensor is.
    """
    seen: dict[str, torch.Tensor] = {}
    first: dict[str, ShardedSource] = {}
    for rank in range(world_size):
        with as_rank(rank, world_size):
            for name, (value, tensor) in make().items():
                source = described(value)
                assert source.shape == tuple(tensor.shape)
                mine = check_parts(source, tensor)
                seen[name] = seen.get(name, torch.zeros_like(mine)) + mine
                assert first.setdefault(name, source).identity == source.identity
                assert first[name].sharding == source.sharding
    for name, source in first.items():
        assert bool((seen[name] == source.sharding.num_positions // source.sharding.num_regions).all()), name
    return first


# ------------------------------------------------------------------ DTensors of every kind


@given(cases(strided=False))
@settings(deadline=None, max_examples=25)
def test_distributed_tensors(case: tuple[tuple[int, ...], Sharding]) -> None:
    """Any mesh, any mix of Shard and Replicate, uneven and empty shards: each rank's boxes hold what they say."""
    shape, sharding = case
    tensor = numbered(shape)

    def make() -> dict[str, tuple[Any, torch.Tensor]]:
        mesh = init_device_mesh("cpu", sharding.mesh_shape)
        assert sharding.placements is not None
        placements = [as_torch(placement) for placement in sharding.placements]
        return {"x": (distribute_tensor(tensor, mesh, placements, src_data_rank=None), tensor)}

    assert on_all_ranks(sharding.num_positions, make)["x"].sharding == sharding


def model_of(sizes: tuple[int, int, int]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Two layers with numbered parameters, and these parameters as plain tensors."""
    model = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2]))
    whole_ones = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole_ones[name] = numbered(tuple(parameter.shape)) + len(whole_ones)
            parameter.copy_(whole_ones[name])
    return model, whole_ones


def parameters_of(model: nn.Module, whole_ones: dict[str, torch.Tensor]) -> dict[str, tuple[Any, torch.Tensor]]:
    """Each parameter with the tensor that it is as a whole."""
    return {name: (parameter, whole_ones[name]) for name, parameter in model.named_parameters()}


def test_fsdp2() -> None:
    """Parameters of fully_shard, also where a dimension does not divide, or has fewer rows than there are ranks."""

    def make() -> dict[str, tuple[Any, torch.Tensor]]:
        model, whole_ones = model_of((5, 7, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        return parameters_of(model, whole_ones)

    sources = on_all_ranks(4, make)
    assert all(source.sharding.placements == (Placement(0),) for source in sources.values())
    assert all(source.wrapper == "parameter" and source.requires_grad for source in sources.values())


def test_fsdp2_along_another_dimension() -> None:
    """fully_shard may cut another dimension than the first; the parts are not contiguous in the whole."""

    def make() -> dict[str, tuple[Any, torch.Tensor]]:
        model, whole_ones = model_of((6, 4, 8))
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
        return parameters_of(model, whole_ones)

    assert on_all_ranks(2, make)["0.weight"].sharding.placements == (Placement(1),)


def test_hybrid_sharding() -> None:
    """HSDP: rows are held by several ranks, and are one region each."""

    def make() -> dict[str, tuple[Any, torch.Tensor]]:
        model, whole_ones = model_of((5, 7, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard")))
        return parameters_of(model, whole_ones)

    source = on_all_ranks(6, make)["0.weight"]
    assert source.sharding.placements == (REPLICATE, Placement(0))
    assert source.sharding.holders() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("sizes", [(6, 8, 12), (5, 7, 5), (3, 50, 1), (4, 17, 2)])
@pytest.mark.parametrize("mesh_shape", [(2, 2), (3, 2), (2, 3)])
def test_fsdp2_over_tensor_parallelism(sizes: tuple[int, int, int], mesh_shape: tuple[int, int]) -> None:
    """Parameters cut by tensor parallelism and then by fully_shard, also where neither divides evenly.

    torch's own rule gives other boxes than FSDP2's memory for some of these; the memory is the truth.
    """

    def make() -> dict[str, tuple[Any, torch.Tensor]]:
        model, whole_ones = model_of(sizes)
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
        fully_shard(model, mesh=mesh["dp"])
        return parameters_of(model, whole_ones)

    sources = on_all_ranks(prod(mesh_shape), make)
    assert sources["0.weight"].sharding.placements == (Placement(0, mesh_shape[1]), Placement(0))
    assert sources["1.weight"].sharding.placements == (Placement(0), Placement(1))
    if (sizes, mesh_shape) == ((5, 7, 5), (3, 2)):
        assert sources["0.weight"].sharding.order == (1, 0)
    if sizes == (6, 8, 12) and mesh_shape == (2, 2):
        assert sources["0.weight"].sharding.order is None


def test_optimizer_state_of_fsdp2_over_tensor_parallelism() -> None:
    """What an optimizer makes for such a parameter is spread as the parameter is; so is what is allocated like it."""
    for rank in range(6):
        with as_rank(rank, 6):
            model, _ = model_of((5, 7, 5))
            mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()}, src_data_rank=None)
            fully_shard(model, mesh=mesh["dp"])
            parameter = next(model.parameters())
            source = described(parameter)
            for made in (torch.zeros_like(parameter), allocate_like(parameter), allocate_like(parameter, "float64")):
                state = described(made)
                assert (state.sharding, state.boxes) == (source.sharding, source.boxes)
                assert (state.wrapper, state.requires_grad) == ("tensor", False)
            assert allocate_like(parameter, "float64").dtype is torch.float64
            assert allocate_like(parameter).dtype is torch.float32


def test_meshes_of_some_ranks() -> None:
    """A tensor on a part of the ranks names these ranks; on the others it has no part and no position."""
    tensor = numbered((6, 2))
    for rank in range(4):
        with as_rank(rank, 4):
            mesh = dist.device_mesh.DeviceMesh("cpu", [3, 1])
            source = described(distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None))
            assert source.sharding.mesh_ranks == (3, 1)
            assert source.identity == ((3, 1), (6, 2), "float32")
            if rank in (0, 2):
                assert (source.position, source.region, source.boxes, source.device) == (None, None, (), None)
            else:
                assert (source.position, source.region) == ((3, 1).index(rank),) * 2
                assert source.boxes == (Box((0 if rank == 3 else 3, 0), (3, 2)),)
                assert source.device == torch.device("cpu")


def test_scalars_and_dtypes() -> None:
    """A replicated scalar is whole on every rank; dtypes have their names on disk."""
    tensor = torch.tensor(1.5, dtype=torch.bfloat16)

    def make() -> dict[str, tuple[Any, torch.Tensor]]:
        return {"x": (distribute_tensor(tensor, init_device_mesh("cpu", (2,)), [Replicate()]), tensor)}

    source = on_all_ranks(2, make)["x"]
    assert (source.dtype, source.itemsize, source.shape) == ("bfloat16", 2, ())


def test_the_device_is_that_of_the_local_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local tensors on the CPU over a mesh of another device, as with CPU offload: all parts are on the CPU."""
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        parameter = distribute_tensor(numbered((4, 3)), mesh, [Shard(0)], src_data_rank=None)
        monkeypatch.setattr(type(mesh), "device_type", "cuda")
        assert described(parameter).device == torch.device("cpu")
        local = torch.ones(2, 3, dtype=torch.float64)
        made = distribute_local(local, parameter)
        assert made.to_local().device == torch.device("cpu")
        assert made.to_local().data_ptr() == local.data_ptr()
        assert (made.dtype, made.shape, made.placements) == (torch.float64, (4, 3), parameter.placements)


def test_new_tensors_around_local_ones() -> None:
    """A DTensor around a local tensor shares its memory and has the other's global shape, also where it is uneven."""
    for rank in range(3):
        with as_rank(rank, 3):
            like = distribute_tensor(numbered((7, 2)), init_device_mesh("cpu", (3,)), [Shard(0)], src_data_rank=None)
            local = torch.zeros(like.to_local().shape, dtype=torch.int32)
            made = distribute_local(local, like)
            assert isinstance(made, DTensor)
            assert (tuple(made.shape), made.dtype) == ((7, 2), torch.int32)
            assert described(made).boxes == described(like).boxes
            assert made.to_local().data_ptr() == local.data_ptr()


# ------------------------------------------------------------------ memory


def test_views_are_in_global_coordinates() -> None:
    """A rank's parts are staged and written by global boxes, whatever the order of its memory."""
    tensor = numbered((6, 5))
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        value = distribute_tensor(tensor, mesh, [Shard(1)], src_data_rank=None)
        source = described(value)
        (view,) = source.views()
        assert view.box == Box((0, 3), (6, 2))
        box = Box((2, 3), (3, 1))
        data = bytearray(12)
        view.stage(box, memoryview(data))
        assert torch.equal(torch.frombuffer(data, dtype=torch.float32), tensor[2:5, 3])
        view.scatter(box, memoryview(bytearray(torch.tensor([-1.0, -2.0, -3.0]).numpy().tobytes())))
        chunk = torch.arange(100, 115, dtype=torch.float32)
        view.scatter_part(Box((0, 0), (3, 5)), memoryview(bytearray(chunk.numpy().tobytes())), Box((0, 3), (1, 2)))
        assert value.to_local()[2:5, 0].tolist() == [-1, -2, -3]
        assert value.to_local()[0].tolist() == [103, 104]
        live = view.live(0, 8)
        assert live is None or bytes(live) == torch.tensor([103.0, 104.0]).numpy().tobytes()
        # a stored tensor that lay transposed in memory
        (turned,) = source.views((1, 0))
        assert turned.box == Box((3, 0), (2, 6))


def test_pieces_are_the_chunks_of_the_grid() -> None:
    """Each rank's chunks are cut at global coordinates, and come with the memory that they are in."""
    tensor = numbered((10, 4))
    for rank in range(3):
        with as_rank(rank, 3):
            mesh = init_device_mesh("cpu", (3,))
            source = described(distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None))
            cell = source.cell(32)
            assert cell == (2, 4)
            for view, piece in source.pieces(cell):
                data = bytearray(piece.nbytes)
                view.stage(piece.box, memoryview(data))
                expected = tensor[slices(piece.box)].contiguous().numpy().tobytes()
                assert bytes(data) == expected
                live = view.live(piece.offset, piece.nbytes)
                assert live is not None
                assert bytes(live) == expected


def test_versions_are_bumped() -> None:
    """After a restore autograd knows that the tensor and its local part have changed."""
    with as_rank(0, 2):
        value = distribute_tensor(numbered((4,)), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        local = value.to_local()
        before = value._version, local._version
        bump_versions(value)
        assert value._version > before[0]
        assert local._version > before[1]


def test_writable() -> None:
    """Parts can be written where plain tensors of their kind can."""
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        assert described(distribute_tensor(numbered((4,)), mesh, [Shard(0)], src_data_rank=None)).is_writable
        expanded = DTensor.from_local(torch.zeros(1).expand(2), mesh, [Shard(0)], run_check=False)
        assert not described(expanded).is_writable


# ------------------------------------------------------------------ what cannot be stored


def test_what_is_none() -> None:
    """Plain tensors and other values are not described."""
    assert describe(torch.zeros(2)) is None
    assert describe(nn.Parameter(torch.zeros(2))) is None
    assert describe("x") is None


def test_partial_placements_are_refused() -> None:
    """Values that are still to be summed up have no single content; the message says what to do."""
    with as_rank(0, 2):
        value = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
        reason = describe(value)
        assert isinstance(reason, str)
        assert "redistribute" in reason


def test_wrong_local_tensors_are_refused() -> None:
    """A local tensor of another shape than its placements say is not stored at the wrong place."""
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        wrong = DTensor.from_local(torch.ones(1), mesh, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,))
        assert describe(wrong) == "its local tensor has the shape [1], its placements give [2]"
        meta = DTensor.from_local(torch.ones(2, device="meta"), mesh, [Shard(0)], run_check=False)
        assert "meta device" in str(describe(meta))


def test_flattening() -> None:
    """A state's sharded tensors become leaves of their own kind; what cannot be stored is named with its path."""
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        value = distribute_tensor(numbered((4,)), mesh, [Shard(0)], src_data_rank=None)
        nodes = flatten("m", {"a": value, "b": torch.ones(1)}, on_opaque=lambda path, name: None)
        assert isinstance(nodes["m/a"], ShardedLeaf)
        assert nodes["m/a"].source.boxes == (Box((0,), (2,)),)
        assert isinstance(nodes["m/b"], TensorLeaf)
        partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
        with pytest.raises(UnsupportedValueError, match=r"m/a: .*DTensor.*redistribute"):
            flatten("m", {"a": partial}, on_opaque=lambda path, name: None)


def test_entries() -> None:
    """The entry of a sharded tensor says what the tensor is, and where each region's chunks are."""
    with as_rank(1, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        value = nn.Parameter(distribute_tensor(numbered((4, 2)), mesh, [Replicate(), Shard(0)], src_data_rank=None))
        source = described(value)
        cell = source.cell(1 << 20)
        entry = source.entry(cell, [None, None])
        assert (entry.identity, entry.dtype, entry.nbytes) == (source.identity, "float32", 32)
        assert (entry.wrapper, entry.requires_grad, entry.cell) == ("parameter", True, cell)
        assert entry.sharding == Sharding((2, 2), (0, 1, 2, 3), (REPLICATE, Placement(0)))


# ------------------------------------------------------------------ real processes


def parts_of(value: Any) -> dict[str, Any]:
    """What a rank knows of a sharded tensor, to be compared with what the others know."""
    source = described(value)
    return {
        "identity": source.identity,
        "sharding": source.sharding,
        "parts": [(box, part.detach().clone()) for box, part in zip(source.boxes, source.locals, strict=True)],
    }


def run_training() -> dict[str, Any]:
    """FSDP2 over tensor parallelism, after a step: parameters and moments, and each of them whole."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model[0], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    values = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            values[f"{name}.{kind}"] = optimizer.state[parameter][kind]
    return {name: (parts_of(value), value.full_tensor().detach()) for name, value in values.items()}


def run_hybrid() -> dict[str, Any]:
    """HSDP, and a tensor on a mesh of two of the ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Linear(3, 7)
    fully_shard(model, mesh=mesh)
    found = {name: (parts_of(value), value.full_tensor().detach()) for name, value in model.state_dict().items()}
    stage = mesh["shard"]
    value = distribute_tensor(torch.arange(5.0), stage, [Shard(0)])
    found["stage"] = (parts_of(value), value.full_tensor())
    return found


def run_sharded_tensor() -> dict[str, Any]:
    """A ShardedTensor with two boxes on one rank and none on another."""
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard

    tensor = torch.arange(40.0).reshape(8, 5)
    held = {0: [((0, 0), (4, 2)), ((0, 2), (2, 3))], 1: [((2, 2), (2, 3))], 3: [((4, 0), (4, 5))]}
    rank = dist.get_rank()
    shards = []
    for offsets, sizes in held.get(rank, []):
        local = tensor[slices(Box(offsets, sizes))].clone()
        shards.append(LocalShard(local, ShardMetadata(list(offsets), list(sizes), f"rank:{rank}/cpu")))
    value = sharded_tensor.init_from_local_shards(shards, 8, 5)
    warnings.simplefilter("error")
    nodes = flatten("m", {"a": value}, on_opaque=lambda path, name: None)
    assert isinstance(nodes["m/a"], ShardedLeaf)
    before = [shard.tensor._version for shard in value.local_shards()]
    bump_versions(value)
    assert all(shard.tensor._version > old for shard, old in zip(value.local_shards(), before, strict=True))
    return {"table": (parts_of(value), tensor)}


def test_real_processes() -> None:
    """In real jobs of 4 processes all ranks agree on each tensor, and their parts are the whole tensor."""
    outcomes = succeed(launch(4, run_training, run_hybrid, run_sharded_tensor))
    for scenario in range(3):
        found = [outcome.result(scenario) for outcome in outcomes]
        for name in found[0]:
            ranks = {rank: found[rank][name] for rank in range(4)}
            meshes = {parts["identity"]: parts["sharding"] for parts, _ in ranks.values()}
            for sharding in meshes.values():
                held = [ranks[rank] for rank in sharding.mesh_ranks]
                tensor = held[0][1]
                seen = torch.zeros(tensor.shape)
                for position, (parts, whole_one) in enumerate(held):
                    assert torch.equal(whole_one, tensor)
                    assert tuple(box for box, _ in parts["parts"]) == sharding.boxes_at(tensor.shape, position)
                    for box, part in parts["parts"]:
                        assert torch.equal(part, tensor[slices(box)]), (name, box)
                        seen[slices(box)] += 1
                assert bool((seen == sharding.num_positions // _num_holders(sharding)).all())
    stages = {outcome.result(1)["stage"][0]["identity"] for outcome in outcomes}
    assert stages == {((0, 1), (5,), "float32"), ((2, 3), (5,), "float32")}
    boxes = outcomes[0].result(2)["table"][0]["sharding"].boxes
    assert boxes == (
        (Box((0, 0), (4, 2)), Box((0, 2), (2, 3))),
        (Box((2, 2), (2, 3)),),
        (),
        (Box((4, 0), (4, 5)),),
    )


def _num_holders(sharding: Sharding) -> int:
    return sharding.num_regions if sharding.placements is not None else sharding.num_positions


def test_nothing_is_imported_for_it() -> None:
    """Importing the library does not import torch's modules for sharded tensors, which take a second to load."""
    script = "import sys, torchsnapshot; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
