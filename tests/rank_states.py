"""States of every kind that ranks can hold, and what each process does with them. Run by ``launch``.

A tensor's content follows from its name, so every process knows what has to come back, whatever has become of meshes
and ranks meanwhile. Each function is one scenario; all of a launch get the same arguments.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchsnapshot import RNGState, Snapshot, StateDict


def here() -> tuple[int, int]:
    """Rank and world size."""
    return dist.get_rank(), dist.get_world_size()


def content(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tensor of that name."""
    seed = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=6).digest(), "big")
    return torch.randint(-99, 99, tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in every bit that counts, and in dtype and shape."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def spread(full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A ``DTensor`` without any communication."""
    return distribute_tensor(full, mesh, list(placements), src_data_rank=None)


def is_whole(tensor: DTensor, full: torch.Tensor) -> bool:
    """Whether this rank's part of a tensor is that of ``full``."""
    return same(tensor.to_local(), spread(full, tensor.device_mesh, tensor.placements).to_local())


# ------------------------------------------------------------------ replicas


class Net(torch.nn.Module):
    """Two layers, of sizes that seldom divide evenly; tensor parallelism of torch wants the width even."""

    def __init__(self, name: str = "net", width: int = 38, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = torch.nn.Linear(19, width, dtype=dtype)
        self.b = torch.nn.Linear(width, 11, dtype=dtype)
        self.fill(name)

    def fill(self, name: str) -> None:
        """Parameters whose content follows from the name; only before they are spread."""
        with torch.no_grad():
            for each, parameter in self.named_parameters():
                parameter.copy_(content(f"{name}.{each}", parameter.shape, parameter.dtype) / 99)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through both."""
        return self.b(torch.relu(self.a(x)))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, start: int = 0) -> None:
    """Steps that are the same on every rank."""
    dtype = next(model.parameters()).dtype
    for step in range(start, start + num_steps):
        model(content(f"batch {step}", (4, 19), dtype) / 99).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values_of(state: Any) -> dict[str, Any]:
    """Every leaf of a nested state by path, tensors whole and copied."""
    found: dict[str, Any] = {}
    pending = [("", state)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{path}/{key}", each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{path}/{number}", each) for number, each in enumerate(value)]
        elif isinstance(value, DTensor):
            found[path] = value.full_tensor().detach().clone()
        else:
            found[path] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return found


def differences(one: Any, other: Any) -> list[str]:
    """The paths at which two states differ."""
    left, right = values_of(one), values_of(other)
    return sorted(
        path
        for path in left.keys() | right.keys()
        if path not in left
        or path not in right
        or not (same(left[path], right[path]) if isinstance(left[path], torch.Tensor) else left[path] == right[path])
    )


def ddp_state() -> dict[str, Any]:
    """A model in DDP with its optimizer, some steps in, and something of each rank's own."""
    rank, _ = here()
    model = torch.nn.parallel.DistributedDataParallel(Net("ddp", 3000))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    return {"model": model, "optim": optimizer, "mine": StateDict(t=content(f"mine {rank}", (5000,)), rank=rank)}


def take_ddp(root: str) -> tuple[int, int, list[str]]:
    """A snapshot of DDP, restored: bytes of the head, those of this rank, what is wrong."""
    rank, _ = here()
    state = ddp_state()
    snapshot = Snapshot.take(f"{root}/ddp", state)
    assert snapshot.stats is not None
    before = {key: values_of(state[key].state_dict()) for key in ("model", "optim")}
    train(state["model"], state["optim"], 1)
    state["mine"].update(t=torch.zeros(5000), rank=-1)
    Snapshot(f"{root}/ddp").restore(state)
    wrong = [
        path for key, values in before.items() for path in differences(state[key].state_dict(), values_tree(values))
    ]
    if not same(state["mine"]["t"], content(f"mine {rank}", (5000,))) or state["mine"]["rank"] != rank:
        wrong.append("mine")
    return Snapshot(f"{root}/ddp").head.new_nbytes, snapshot.stats.new_nbytes, wrong


def values_tree(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``values_of``, up to the kinds of containers."""
    root: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split("/")[1:]
        here_: dict[str, Any] = root
        for parent in parents:
            here_ = here_.setdefault(parent, {})
        here_[name] = value
    return root


def unequal_replicas(root: str) -> str:
    """Declared replicas that are not equal; then a take that works."""
    rank, _ = here()
    state = {"s": StateDict(same=content("same", (5000,)), other=content(f"other {rank == 2}", (5000,)))}
    try:
        Snapshot.take(f"{root}/unequal", state, replicated=["s/*"])
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    Snapshot.take(f"{root}/equal", state, replicated=["s/same"])
    return message


def unequal_holders(root: str) -> str:
    """Two holders of one region that differ."""
    rank, world_size = here()
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    tensor = spread(content("held", (64, 32)), mesh, [Replicate(), Shard(0)])
    if rank == world_size - 1:
        tensor.to_local().add_(1)
    try:
        Snapshot.take(f"{root}/holders", {"s": {"x": {"t": tensor}}})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def undeclared_replicas(root: str) -> tuple[int, list[str]]:
    """What all ranks hold, though nobody said so; and what the manifest shows."""
    rank, _ = here()
    state = StateDict(t=content("t", (70_000,)), n=7, mine=content(f"mine {rank}", (50,)), word=f"rank {rank}")
    state["nested"] = {"u": content("u", (9000,)), "l": [1, 2]}
    metadata = {"long": "x" * 5000, "step": 3}
    Snapshot.take(f"{root}/undeclared", {"s": state}, user_metadata=metadata)
    snapshot = Snapshot(f"{root}/undeclared")
    assert snapshot.user_metadata == metadata
    shown = [f"{path}:{getattr(entry, 'replicated', '')}" for path, entry in snapshot.get_manifest().items()]
    return snapshot.head.new_nbytes, shown


# ------------------------------------------------------------------ FSDP2, tensor parallelism, HSDP


def sharded_net(kind: str, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model that is spread in one of several ways."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    _, world_size = here()
    model = Net(name, dtype=dtype)
    if kind == "plain":
        return model
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    elif kind == "tp":
        whole = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("fsdp", "tp"))
        parallelize_module(model, whole["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        mesh = whole["fsdp"]
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if kind == "offload" else {}
    for layer in (model.a, model.b):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


KINDS = ["fsdp", "hsdp", "tp", "offload"]


def kinds_here() -> list[str]:
    """The kinds that need no more ranks than there are."""
    _, world_size = here()
    return [kind for kind in KINDS if world_size > 1 and (kind not in ("hsdp", "tp") or world_size % 2 == 0)]


def take_nets(root: str) -> list[str]:
    """Snapshots of sharded models and optimizers, restored into what has not stepped; what is wrong."""
    wrong = []
    for kind in kinds_here():
        for dtype in (torch.float32, torch.bfloat16):
            path = f"{root}/net-{kind}-{str(dtype)[6:]}"
            model = sharded_net(kind, "net", dtype)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            train(model, optimizer, 2)
            if dtype is torch.bfloat16:
                for state in optimizer.state.values():
                    state["exp_avg"] = state["exp_avg"].float() + 1e-5
            before = values_of({"model": model.state_dict(), "optim": optimizer.state_dict()})
            Snapshot.take(path, {"model": model, "optim": optimizer})
            wrong += restored_net(path, kind, dtype, before)
    return wrong


def restored_net(
    path: str, kind: str, dtype: torch.dtype, before: dict[str, Any], gradients: Sequence[bool] = (False, True)
) -> list[str]:
    """Restore into a fresh model, and an optimizer that has not stepped, with and without gradients; what is wrong."""
    wrong = []
    for has_gradients in gradients:
        model = sharded_net(kind, "other", dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        if has_gradients:
            model(content("x", (4, 19), dtype)).square().mean().backward()
        Snapshot(path).restore({"model": model, "optim": optimizer})
        optimizer.zero_grad()
        state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        wrong += [f"{path} {kind} {has_gradients} {each}" for each in differences(values_tree(before), state)]
        if dtype is torch.float32:
            # torch's own AdamW takes no fp32 state for bf16 parameters; others do
            train(model, optimizer, 1, start=2)
    return wrong


def reference_of(path: str) -> dict[str, Any]:
    """The whole content of a snapshot as plain tensors, read by one process."""
    snapshot = Snapshot(path)
    return {key: snapshot.get_state_dict_for_key(key, replicate_from_rank0=True) for key in ("model", "optim")}


def restore_nets(root: str) -> list[str]:
    """Restore the snapshots of sharded models into models that are spread in any other way, and into a plain one."""
    wrong = []
    for name in sorted(os.listdir(root)):
        if name.startswith("net-"):
            path, dtype = f"{root}/{name}", getattr(torch, name.rpartition("-")[2])
            reference = values_of(reference_of(path))
            for number, kind in enumerate([*kinds_here(), "plain"]):
                wrong += restored_net(path, kind, dtype, reference, [number % 2 == 0])
    return wrong


def wrapped_names(root: str) -> str:
    """A plain model from a snapshot of one in DDP: names that a known prefix explains; then the cure."""
    state = {"model": torch.nn.parallel.DistributedDataParallel(Net("wrapped"))}
    Snapshot.take(f"{root}/wrapped", state)
    model = Net("other")
    before = values_of(model.state_dict())
    try:
        Snapshot(f"{root}/wrapped").restore({"model": model})
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    assert differences(values_tree(before), model.state_dict()) == []
    Snapshot(f"{root}/wrapped").restore(
        {"model": model}, rename=lambda path: path.replace("model/module.", "model/", 1)
    )
    assert differences(Net("wrapped").state_dict(), model.state_dict()) == []
    return message


# ------------------------------------------------------------------ pipelines


class Stage(torch.nn.Module):
    """Some layers of a model of four, under the names that they have in the whole of it."""

    def __init__(self, numbers: Sequence[int], name: str, *, is_bare: bool = False) -> None:
        super().__init__()
        # bare names begin anew on every stage
        start = numbers[0] if is_bare else 0
        self.layers = torch.nn.ModuleDict({str(number - start): torch.nn.Linear(13, 13) for number in numbers})
        with torch.no_grad():
            for number in numbers:
                for each, parameter in self.layers[str(number - start)].named_parameters():
                    parameter.copy_(content(f"{name}.{number}.{each}", parameter.shape) / 99)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through all of its layers."""
        for layer in self.layers.values():
            x = layer(x)
        return x


def pipeline(num_stages: int, name: str, *, is_bare: bool = False) -> tuple[Stage, list[int]]:
    """This rank's stage, in FSDP2 over the ranks of the stage, and the numbers of its layers."""
    from torch.distributed.fsdp import fully_shard

    rank, world_size = here()
    mesh = init_device_mesh("cpu", (num_stages, world_size // num_stages), mesh_dim_names=("pp", "fsdp"))
    stage = rank // (world_size // num_stages)
    numbers = list(range(4))[stage * 4 // num_stages : (stage + 1) * 4 // num_stages]
    model = Stage(numbers, name, is_bare=is_bare)
    fully_shard(model, mesh=mesh["fsdp"])
    return model, numbers


def stepped(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    """An optimizer whose state follows from nothing but parameters and gradients that are like them."""
    optimizer = optimizer_of(model, kind)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def optimizer_of(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    """One with state, or one without."""
    return (
        torch.optim.AdamW(model.parameters(), lr=0.25) if kind == "adamw" else torch.optim.SGD(model.parameters(), 0.25)
    )


def check_stage(model: Stage, optimizer: torch.optim.Optimizer, numbers: Sequence[int], kind: str) -> list[str]:
    """Hold a stage and its optimizer against a whole model that did the same in one process."""
    whole = Stage(range(4), "pp")
    expected = stepped(whole, kind)
    wrong = []
    for number, layer in zip(numbers, model.layers.values(), strict=True):
        for each, parameter in layer.named_parameters():
            reference = whole.layers[str(number)].get_parameter(each)
            if not is_part(parameter, reference):
                wrong.append(f"layer {number} {each}")
            if optimizer.state.get(parameter, {}).keys() != expected.state.get(reference, {}).keys():
                wrong.append(f"state {number} {each}")
            for name, value in optimizer.state.get(parameter, {}).items():
                if not is_part(value, expected.state[reference][name]):
                    wrong.append(f"state {number} {each} {name}")
    return wrong + [f"lr {group['lr']}" for group in optimizer.param_groups if group["lr"] != 0.25]


def is_part(value: torch.Tensor, full: torch.Tensor) -> bool:
    """Whether a tensor, spread or not, is right."""
    return is_whole(value, full.detach()) if isinstance(value, DTensor) else same(value.detach(), full.detach())


def take_pipeline(root: str) -> list[str]:
    """Two stages, plain and by ``ModelState``, restored on the same ranks."""
    from torchsnapshot.tricks import ModelState

    wrong = []
    for is_bare in (True, False):
        model, numbers = pipeline(2, "pp", is_bare=is_bare)
        optimizer = stepped(model, "adamw")
        path = f"{root}/pp-bare" if is_bare else f"{root}/pp-plain"
        Snapshot.take(path, {"model": model, "optim": optimizer})
        other, _ = pipeline(2, "other", is_bare=is_bare)
        fresh = torch.optim.AdamW(other.parameters(), lr=9.0)
        Snapshot(path).restore({"model": other, "optim": fresh})
        wrong += check_stage(other, fresh, numbers, "adamw")
    for kind in ("adamw", "sgd"):
        model, numbers = pipeline(2, "pp")
        Snapshot.take(f"{root}/pp-{kind}", {"train": ModelState(model, stepped(model, kind))})
    return wrong


def take_tensor_parallel(root: str) -> None:
    """Tensor parallelism twice over: two meshes that share no rank hold the very same tensors."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Net("tp"), whole["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    Snapshot.take(f"{root}/tp", {"model": model, "optim": stepped(model, "adamw")})


def restore_pipeline(root: str) -> list[str]:
    """Any number of stages that there can be here, from two: plain ones only if they are as many, others always."""
    from torchsnapshot.tricks import ModelState

    wrong = []
    _, world_size = here()
    for num_stages in [each for each in (1, 2, 4) if each <= world_size]:
        for kind in ("adamw", "sgd"):
            model, numbers = pipeline(num_stages, "other")
            optimizer = optimizer_of(model, kind)
            optimizer.param_groups[0]["lr"] = 9.0
            if kind == "adamw":
                # gradients must not matter
                for parameter in model.parameters():
                    parameter.grad = parameter.detach().clone()
            Snapshot(f"{root}/pp-{kind}").restore({"train": ModelState(model, optimizer)})
            wrong += [f"{num_stages} {kind}: {each}" for each in check_stage(model, optimizer, numbers, kind)]
        for path, is_bare in ((f"{root}/pp-bare", True), (f"{root}/pp-plain", False)):
            model, numbers = pipeline(num_stages, "other", is_bare=is_bare)
            optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
            state = {"model": model, "optim": optimizer}
            try:
                Snapshot(path).restore(state)
            except Exception as error:
                if num_stages == 2 or "MismatchError" not in type(error).__name__ or "ModelState" not in str(error):
                    wrong.append(f"{num_stages} {path}: {error!r}")
                if differences(pipeline(num_stages, "other", is_bare=is_bare)[0].state_dict(), model.state_dict()):
                    wrong.append(f"{num_stages} {path}: it was changed")
            else:
                wrong += [f"{num_stages} {path}: {each}" for each in check_stage(model, optimizer, numbers, "adamw")]
                if num_stages != 2:
                    wrong.append(f"{num_stages} {path}: no error")
    return wrong


# ------------------------------------------------------------------ other ways to give state


def fully_sharded_1(root: str) -> list[str]:
    """FSDP1 gives full state dicts; they are replicas."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp import StateDictType

    from torchsnapshot.tricks.fsdp import FSDPOptimizerAdapter

    def made(name: str) -> tuple[Fsdp, torch.optim.Optimizer, dict[str, Any]]:
        model = Fsdp(Net(name), device_id=torch.device("cpu"))
        Fsdp.set_state_dict_type(model, StateDictType.FULL_STATE_DICT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, {"model": model, "optim": FSDPOptimizerAdapter(model, optimizer)}

    model, optimizer, state = made("fsdp1")
    train(model, optimizer, 2)
    Snapshot.take(f"{root}/fsdp1", state)
    _, _, target = made("other")
    Snapshot(f"{root}/fsdp1").restore(target)
    wrong = [path for key in state for path in differences(state[key].state_dict(), target[key].state_dict())]
    nbytes = sum(each.nbytes for each in values_of(model.state_dict()).values())
    if Snapshot(f"{root}/fsdp1").head.new_nbytes > 3.1 * nbytes:
        wrong.append("it was written more than once")
    return wrong


class OfTorch:
    """A ``Stateful`` over torch's ``get_state_dict``, as torch's tutorials write it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into both."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


def state_dicts_of_torch(root: str) -> list[str]:
    """FSDP2 through torch's own functions."""
    wrong = []
    for kind in ("fsdp", "tp"):
        model = sharded_net(kind, "torch")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train(model, optimizer, 2)
        before = values_of(OfTorch(model, optimizer).state_dict())
        Snapshot.take(f"{root}/torch-{kind}", {"train": OfTorch(model, optimizer)})
        for other_kind in ("fsdp", "tp"):
            other = sharded_net(other_kind, "other")
            target = OfTorch(other, torch.optim.AdamW(other.parameters(), lr=9.0))
            Snapshot(f"{root}/torch-{kind}").restore({"train": target})
            wrong += [f"{kind} {each}" for each in differences(values_tree(before), target.state_dict())]
    return wrong


SUB_MESHES: list[tuple[str, list[int]]] = [
    ("low", [0, 1]),
    ("high", [3, 2]),
    ("one", [1]),
    ("all", [0, 1, 2, 3]),
    ("too", [0, 1, 2, 3]),
]


def sub_mesh_state(*, zero: bool) -> StateDict:
    """Tensors that only some ranks have."""
    rank, world_size = here()
    state: StateDict = StateDict(n=3)
    for name, ranks in SUB_MESHES:
        ranks = [each for each in ranks if each < world_size] or [world_size - 1]
        if rank in ranks:
            full = content(name, (21, 5))
            mesh = DeviceMesh("cpu", torch.tensor(ranks), _init_backend=False)
            state[name] = spread(torch.zeros_like(full) if zero else full, mesh, [Shard(0)])
    return state


def sub_meshes(root: str) -> list[str]:
    """Taken, and restored on the same ranks."""
    Snapshot.take(f"{root}/sub", {"s": sub_mesh_state(zero=False)})
    return restore_sub_meshes(root)


def restore_sub_meshes(root: str) -> list[str]:
    """Each rank gets what it has a place for; what all ranks had needs a place on every rank."""
    homeless = sub_mesh_state(zero=True)
    del homeless["all"]
    try:
        Snapshot(f"{root}/sub").restore({"s": homeless})
    except Exception as error:
        if type(error).__name__ != "MismatchError" or "s/all: it is spread over ranks" not in str(error):
            return [repr(error)]
    else:
        return ["no error"]
    state = sub_mesh_state(zero=True)
    Snapshot(f"{root}/sub").restore({"s": state})
    return [name for name, _ in SUB_MESHES if name in state and not is_whole(state[name], content(name, (21, 5)))]


def take_private(root: str) -> None:
    """What ranks have for themselves, beside what they share."""
    rank, _ = here()
    torch.manual_seed(rank)
    state: dict[str, Any] = {
        "s": StateDict(t=content("t", (900,)), n=7, mine=content(f"mine {rank}", (900,)), word=f"of {rank}"),
        "l": StateDict(l=[content("t", (900,)), content(f"mine {rank}", (900,))]),
        "v": StateDict(epoch=3, rank=rank),
        "rng": RNGState(),
    }
    if rank == 1:
        state["only"] = StateDict(t=content("only", (900,)))
    Snapshot.take(f"{root}/private", state)
