"""Tensors that ranks hold in any way there is, and what each rank does with them. Run by ``crew``.

What a rank holds is cut out of the whole tensor with ``torch.chunk``, dimension of the mesh by dimension, in the order
of the cuts: neither the library's geometry nor torch's own ``distribute_tensor`` is asked. The descriptions are plain
values, so that an example that fails can be read and written down.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_states import content, same
from torch.distributed._shard.sharded_tensor import Shard as TensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.errors import MismatchError


@dataclass(frozen=True)
class Whole:
    """A plain tensor on every rank."""


@dataclass(frozen=True)
class Meshed:
    """A ``DTensor``.

    Args:
        ranks: of the mesh, in the order in which they stand there; not all of the job need be among them.
        mesh_shape: of the mesh.
        dims: for each dimension of the mesh the one of the tensor that it cuts; None: it replicates.
        order: the dimensions of the mesh that cut, in the order in which they do. FSDP2 cuts what tensor parallelism
            has cut, though it stands before it in the mesh.
    """

    ranks: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    order: tuple[int, ...]

    def placements(self) -> list[Placement]:
        """As torch writes this order of cuts down."""
        placements: list[Placement] = []
        for mesh_dim, dim in enumerate(self.dims):
            if dim is None:
                placements.append(Replicate())
                continue
            before = self.order[: self.order.index(mesh_dim)]
            factor = prod(self.mesh_shape[each] for each in before if each > mesh_dim and self.dims[each] == dim)
            placements.append(Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor))
        return placements

    def part(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """What a rank of the mesh holds."""
        index = self.ranks.index(rank)
        at = [index // prod(self.mesh_shape[dim + 1 :]) % size for dim, size in enumerate(self.mesh_shape)]
        for mesh_dim in self.order:
            dim = self.dims[mesh_dim]
            assert dim is not None
            parts = torch.chunk(full, self.mesh_shape[mesh_dim], dim)
            full = parts[at[mesh_dim]] if at[mesh_dim] < len(parts) else full.narrow(dim, 0, 0)
        return full


@dataclass(frozen=True)
class Boxed:
    """A ``ShardedTensor``: boxes, and which rank has each; a rank may have none."""

    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Offsets and sizes."""
    owners: tuple[int, ...]


Spread = Whole | Meshed | Boxed


@dataclass(frozen=True)
class Kept:
    """A tensor, how it was spread when it was taken, and how it is when it is restored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    taken: Spread
    restored: Spread

    @property
    def full(self) -> torch.Tensor:
        """The whole tensor; its content follows from its name."""
        return content(f"elastic {self.name}", self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def held(full: torch.Tensor, spread: Spread) -> Any:
    """What this rank has of a tensor; None: nothing. On all ranks at once, as a ``ShardedTensor`` says who has what."""
    if isinstance(spread, Whole):
        return full.clone()
    rank = dist.get_rank()
    if isinstance(spread, Meshed):
        mesh = DeviceMesh("cpu", torch.tensor(spread.ranks).reshape(spread.mesh_shape), _init_backend=False)
        if rank not in spread.ranks:
            return None
        return DTensor.from_local(
            spread.part(full, rank).contiguous().clone(),
            mesh,
            spread.placements(),
            run_check=False,
            shape=full.shape,
            stride=full.stride(),
        )
    shards = [
        TensorShard.from_tensor_and_offsets(cut(full, offsets, sizes).clone(), list(offsets), rank)
        for (offsets, sizes), owner in zip(spread.boxes, spread.owners, strict=True)
        if owner == rank
    ]
    return init_from_local_shards(shards, *full.shape)


def cut(full: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """A box of a tensor."""
    return full[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]


def is_right(value: Any, full: torch.Tensor, spread: Spread) -> bool:
    """Whether what this rank has is what it should have."""
    if isinstance(value, DTensor):
        assert isinstance(spread, Meshed)
        return same(value.to_local(), spread.part(full, dist.get_rank()))
    if isinstance(value, ShardedTensor):
        return all(
            same(shard.tensor, cut(full, shard.metadata.shard_offsets, shard.metadata.shard_sizes))
            for shard in value.local_shards()
        )
    return same(value, full)


@contextmanager
def chunks_of(nbytes: int) -> Iterator[None]:
    """Chunks of this size, here."""
    with knobs.override_max_chunk_size_bytes(nbytes):
        yield


def take(path: str, tensors: Sequence[Kept], chunk_nbytes: int) -> None:
    """Take a snapshot."""
    state = {kept.name: held(kept.full, kept.taken) for kept in tensors}
    with chunks_of(chunk_nbytes):
        Snapshot.take(path, {"s": StateDict({name: value for name, value in state.items() if value is not None})})


def restore(path: str, tensors: Sequence[Kept]) -> list[str]:
    """Restore into tensors that are spread in another way; what is wrong.

    A rank outside of a tensor's mesh wants the whole of it.
    """
    state = targets(tensors)
    snapshot = Snapshot(path)
    snapshot.restore({"s": state})
    wrong = [kept.name for kept in tensors if not is_right(state[kept.name], kept.full, kept.restored)]
    # every chunk is read once at most
    assert snapshot.stats is not None
    if snapshot.stats.new_nbytes > sum(kept.nbytes for kept in tensors):
        wrong.append(f"{snapshot.stats.new_nbytes} bytes were read")
    return wrong


def targets(tensors: Sequence[Kept]) -> StateDict:
    """Zeros in place of everything."""
    state: StateDict = StateDict()
    for kept in tensors:
        zeros = torch.zeros_like(kept.full)
        value = held(zeros, kept.restored)
        state[kept.name] = zeros if value is None else value
    return state


def read(path: str, tensors: Sequence[Kept], numbers: Sequence[int]) -> list[str]:
    """Read each tensor by itself, under a rank's number: whole, into a plain one, into its place; what is wrong."""
    snapshot = Snapshot(path)
    into = targets(tensors)
    wrong = []
    for kept, number in zip(tensors, numbers, strict=True):
        place, full = f"{number}/s/{kept.name}", kept.full
        if not same(snapshot.read_object(place), full):
            wrong.append(f"{kept.name} whole")
        for target in (torch.zeros_like(full), into[kept.name]):
            if snapshot.read_object(place, obj_out=target) is not target:
                wrong.append(f"{kept.name} is another object")
            if not is_right(target, full, kept.restored):
                wrong.append(f"{kept.name} into {type(target).__name__}")
    return wrong


# ------------------------------------------------------------------ what ranks have for themselves

BEFORE = -1
"""In place of every content, before a restore."""


@dataclass(frozen=True)
class Own:
    """A value that every rank has, equal or not.

    Args:
        name: its key.
        contents: a number for each rank of the take.
        is_tensor: a tensor with that number, else the number itself.
    """

    name: str
    contents: tuple[int, ...]
    is_tensor: bool

    @property
    def is_shared(self) -> bool:
        """Whether all ranks have the same."""
        return len(set(self.contents)) == 1

    def value(self, number: int) -> Any:
        """What stands for a number."""
        return torch.full((3,), number) if self.is_tensor else number


def take_own(path: str, values: Sequence[Own]) -> None:
    """Take a snapshot of what each rank has."""
    rank = rank_here()
    Snapshot.take(path, {"s": StateDict({own.name: own.value(own.contents[rank]) for own in values})})


def restore_own(path: str, values: Sequence[Own], missing_rank: Any) -> tuple[dict[str, int], str]:
    """What this rank has after a restore, and the error if there was one."""
    state = StateDict({own.name: own.value(BEFORE) for own in values})
    error = ""
    try:
        Snapshot(path).restore({"s": state}, missing_rank=missing_rank)
    except MismatchError as mismatch:
        error = str(mismatch)
    return {name: int(value.max()) if torch.is_tensor(value) else value for name, value in state.items()}, error


def rank_here() -> int:
    """This rank, also where there is no group."""
    return dist.get_rank() if dist.is_initialized() else 0


def remove(path: str) -> None:
    """Nothing is left of an example: the store is the folder above."""
    shutil.rmtree(Path(path).parent, ignore_errors=True)
