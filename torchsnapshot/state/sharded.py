"""Tensors that are spread over ranks: the only module that knows ``DTensor`` and ``ShardedTensor``.

What lives here: what such a tensor is (``describe``), this rank's parts of it as memory to be staged or scattered
into, and making new ones. What doesn't: the rules of placements (``geometry.placements``), the bytes of a part
(``host_views``), which chunks go where (``resharding``), anything that talks to another rank.

Invariants: nothing here is a collective or waits for another rank; a part's device is that of its local tensor, which
need not be the mesh's (FSDP2 with CPU offload has a CUDA mesh and local tensors on the CPU). Torch's modules for these
tensors are looked up, not imported: where nobody imported them there are no such tensors.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from torchsnapshot.format.entry_kinds import ShardedTensorEntry, Span, span_columns
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.geometry.mesh_cells import cell_for
from torchsnapshot.geometry.placements import (
    REPLICATE,
    Placement,
    Sharding,
    is_nesting_the_same,
    nested_order,
)
from torchsnapshot.state import dtypes
from torchsnapshot.state.host_views import HostView, target_view
from torchsnapshot.state.resharding import wanted_in_memory_order
from torchsnapshot.state.tensors import bump_version, can_write_in_place, why_unreadable

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True, eq=False)
class ShardedSource:
    """What a sharded tensor is, and what of it is on this rank.

    ``dtype`` is a name on disk, ``shape`` the global shape. ``position`` is this rank's in the mesh, None where it is
    not in it. ``boxes`` are this rank's in global coordinates, ``locals`` the memory of each: views of the local
    tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    sharding: Sharding
    position: int | None
    boxes: tuple[Box, ...]
    locals: tuple[torch.Tensor, ...]
    wrapper: str
    requires_grad: bool

    @property
    def identity(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """What tells sharded tensors of one path apart; equals that of the entry."""
        return self.sharding.mesh_ranks, self.shape, self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return dtypes.itemsize_of(self.dtype)

    @property
    def device(self) -> torch.device | None:
        """Where this rank's parts are; None where it has none."""
        return self.locals[0].device if self.locals else None

    @property
    def region(self) -> int | None:
        """The region that this rank holds; None where it is not in the mesh."""
        return None if self.position is None else self.sharding.region_of(self.position)

    def views(self, permutation: tuple[int, ...] | None = None) -> list[PlacedView]:
        """This rank's parts as memory, in the order of ``boxes``.

        Args:
            permutation: of the stored entry that is restored into them; None for the order of the shape, in which
                sharded tensors are stored.
        """
        boxes = wanted_in_memory_order(self.boxes, permutation)
        return [PlacedView(box, target_view(part, permutation)) for box, part in zip(boxes, self.locals, strict=True)]

    def cell(self, chunk_nbytes: int, kept: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The cell of its grid, the same on all ranks of the mesh. See ``mesh_cells.cell_for``."""
        return cell_for(self.shape, self.sharding, self.itemsize, chunk_nbytes, kept)

    def pieces(self, cell: tuple[int, ...]) -> list[tuple[PlacedView, Piece]]:
        """This rank's chunks, in the order of a span: each with where its bytes are.

        A piece's box is in global coordinates, its offset counts within the part that it is in.
        """
        return [(view, piece) for view in self.views() for piece in grid.cut(view.box, cell, self.itemsize)]

    def entry(self, cell: tuple[int, ...], spans: Iterable[Span | None]) -> ShardedTensorEntry:
        """The entry that all ranks of the mesh share.

        Args:
            cell: as they have cut it.
            spans: where the chunks of each region are, in the order of the regions; None for one without elements.
        """
        tables, firsts = span_columns(spans)
        nbytes = prod(self.shape) * self.itemsize
        return ShardedTensorEntry(
            self.dtype, self.shape, cell, self.sharding, tables, firsts, self.wrapper, self.requires_grad, nbytes
        )

    @property
    def is_writable(self) -> bool:
        """Whether a restore may write straight into all parts."""
        return all(can_write_in_place(part) for part in self.locals)


class PlacedView:
    """The host view of a part of a larger tensor, in the larger one's coordinates.

    Args:
        box: which part it is.
        view: of the part alone.
    """

    __slots__ = ("box", "view")

    def __init__(self, box: Box, view: HostView) -> None:
        self.box = box
        self.view = view

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.view.itemsize

    def extent(self, offset: int, nbytes: int) -> tuple[int, int] | None:
        """See ``HostView.extent``; the offset counts from the part's first byte."""
        return self.view.extent(offset, nbytes)

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """See ``HostView.live``; the offset counts from the part's first byte."""
        return self.view.live(offset, nbytes)

    def stage(self, box: Box, into: memoryview) -> None:
        """See ``HostView.stage``."""
        self.view.stage(box.relative_to(self.box), into)

    def scatter(self, box: Box, data: memoryview) -> None:
        """See ``HostView.scatter``."""
        self.view.scatter(box.relative_to(self.box), data)

    def scatter_part(self, chunk: Box, data: memoryview, part: Box) -> None:
        """See ``HostView.scatter_part``."""
        self.view.scatter_part(chunk.relative_to(self.box), data, part.relative_to(self.box))


def is_dtensor(value: object) -> bool:
    """Whether it is a ``DTensor``."""
    return type(value) not in _PLAIN_TYPES and _is_instance(value, "torch.distributed.tensor", "DTensor")


def is_sharded_tensor(value: object) -> bool:
    """Whether it is a ``ShardedTensor``."""
    return type(value) not in _PLAIN_TYPES and _is_instance(
        value, "torch.distributed._shard.sharded_tensor", "ShardedTensor"
    )


def _is_instance(value: object, module: str, name: str) -> bool:
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and isinstance(value, found)


def mesh_of(value: object) -> tuple[int, ...] | None:
    """The global ranks that a tensor is spread over; None for a value that is no sharded tensor."""
    tensor: Any = value
    if is_dtensor(value):
        return tuple(tensor.device_mesh.mesh.flatten().tolist())
    if is_sharded_tensor(value):
        return tuple(torch.distributed.get_process_group_ranks(tensor._process_group))
    return None


def describe(value: object) -> ShardedSource | str | None:
    """What a sharded tensor is.

    Returns:
        Its description; the reason why it cannot be stored; or None for a value that is no sharded tensor.
    """
    if is_dtensor(value):
        return _describe_dtensor(value)
    if is_sharded_tensor(value):
        return _describe_sharded_tensor(value)
    return None


def _describe_dtensor(value: Any) -> ShardedSource | str:
    mesh = value.device_mesh
    shape = tuple(int(size) for size in value.shape)
    placements: list[Placement] = []
    for placement in value.placements:
        if placement.is_partial():
            return (
                f"its placement {placement} says that its values are still to be summed up over ranks; redistribute it "
                "to Replicate or Shard"
            )
        if placement.is_replicate():
            placements.append(REPLICATE)
        elif isinstance(getattr(placement, "dim", None), int):
            dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
            placements.append(Placement(dim, int(getattr(placement, "split_factor", 1))))
        else:
            return f"this version does not know its placement {placement}"
    ranks = tuple(mesh.mesh.flatten().tolist())
    sharding = Sharding(tuple(mesh.mesh.shape), ranks, tuple(placements))
    position = sharding.position_of(_rank_of(mesh))
    with torch.no_grad():
        local = value.to_local()
        if hasattr(local, "wait"):
            # the result of a collective that is still running
            local = local.wait()
    obstacle = _obstacle(sharding, shape)
    if obstacle is None:
        sharding = dataclasses.replace(sharding, order=_order_of(value, sharding, position, local.shape))
    if obstacle is None and position is not None:
        expected = sharding.local_shape(shape, position)
        if tuple(local.shape) != expected:
            obstacle = f"its local tensor has the shape {list(local.shape)}, its placements give {list(expected)}"
        else:
            obstacle = why_unreadable(local)
    if obstacle is not None:
        return obstacle
    parts = [] if position is None else sharding.local_boxes(shape, position)
    return ShardedSource(
        dtypes.name_of(value.dtype),
        shape,
        sharding,
        position,
        tuple(box for box, _ in parts),
        tuple(_part(local, inner) for _, inner in parts),
        "parameter" if isinstance(value, torch.nn.Parameter) else "tensor",
        bool(value.requires_grad),
    )


def _rank_of(mesh: Any) -> int:
    # not the mesh's own coordinate: torch keeps meshes in caches, with that of a process group that was there before
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    coordinate = mesh.get_coordinate()
    return -1 if coordinate is None else int(mesh.mesh[tuple(coordinate)])


def _order_of(
    value: Any, sharding: Sharding, position: int | None, local_shape: Sequence[int]
) -> tuple[int, ...] | None:
    """The order in which the mesh's dimensions have cut the tensor, None where it is that of the placements.

    FSDP2 cuts what tensor parallelism left, and says so by split factors. Where sizes do not divide evenly, torch's own
    rule for split factors gives other pieces than those that FSDP2 has made; the local tensors are the truth.
    """
    shape, mesh_shape, placements = tuple(value.shape), sharding.mesh_shape, sharding.placements or ()
    if all(placement.split_factor == 1 for placement in placements):
        shard_order = getattr(value._spec, "shard_order", None) or ()
        orders = [list(entry.mesh_dims) for entry in shard_order]
        if all(order == sorted(order) for order in orders):
            return None
        return tuple(mesh_dim for order in orders for mesh_dim in order)
    nested = nested_order(mesh_shape, placements)
    if nested is None or is_nesting_the_same(shape, mesh_shape, placements, nested):
        return None
    if position is None:
        return nested
    nested_shape = dataclasses.replace(sharding, order=nested).local_shape(shape, position)
    return nested if nested_shape == tuple(local_shape) else None


def _describe_sharded_tensor(value: Any) -> ShardedSource | str:
    metadata = value.metadata()
    shape = tuple(int(size) for size in metadata.size)
    ranks = tuple(torch.distributed.get_process_group_ranks(value._process_group))
    me = torch.distributed.get_rank()
    held: dict[int, list[Box]] = {rank: [] for rank in ranks}
    for shard in metadata.shards_metadata:
        rank = None if shard.placement is None else shard.placement.rank()
        if rank not in held:
            return f"one of its shards is placed on {shard.placement}, which is no rank of its process group"
        box = Box(tuple(shard.shard_offsets), tuple(shard.shard_sizes))
        if box.numel:
            held[rank].append(box)
    sharding = Sharding((len(ranks),), ranks, None, None, tuple(tuple(held[rank]) for rank in ranks))
    obstacle = _obstacle(sharding, shape)
    if obstacle is not None:
        return obstacle
    position = sharding.position_of(me)
    mine = {}
    for shard in value.local_shards():
        obstacle = obstacle or why_unreadable(shard.tensor)
        mine[Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))] = shard.tensor.detach()
    boxes = tuple(held.get(me, ()))
    if obstacle is None and not mine.keys() >= set(boxes):
        obstacle = "its local shards are not those that its metadata gives this rank"
    if obstacle is not None:
        return obstacle
    return ShardedSource(
        dtypes.name_of(metadata.tensor_properties.dtype),
        shape,
        sharding,
        position,
        boxes,
        tuple(mine[box] for box in boxes),
        "parameter" if isinstance(value, torch.nn.Parameter) else "tensor",
        # asking the tensor itself would warn that its class is deprecated
        bool(metadata.tensor_properties.requires_grad),
    )


def _obstacle(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    try:
        sharding.check(shape)
    except ValueError as error:
        return str(error)
    return None


def _part(local: torch.Tensor, box: Box) -> torch.Tensor:
    """A box of a local tensor, sharing its memory."""
    if box.sizes == (tuple(local.shape) or (1,)):
        return local
    return local[tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))]


def bump_versions(value: Any) -> None:
    """Tell autograd that this rank's parts of a sharded tensor were written behind its back."""
    for part in _locals_of(value):
        bump_version(part)
    if is_dtensor(value):
        bump_version(value)


def _locals_of(value: Any) -> Iterator[torch.Tensor]:
    if is_dtensor(value):
        with torch.no_grad():
            yield value.to_local()
    else:
        for shard in value.local_shards():
            yield shard.tensor


def allocate_like(parameter: Any, dtype: str | None = None) -> Any:
    """An uninitialized ``DTensor`` with the mesh, placements, shape and device of another.

    It is made as optimizers make their state, so it is on the device of the local tensor, not on that of the mesh.

    Args:
        parameter: a ``DTensor``.
        dtype: a name on disk; that of ``parameter`` where None.

    Raises:
        FormatError: the dtype is unknown here.
    """
    element_type = parameter.dtype if dtype is None else dtypes.torch_dtype(dtype)
    with torch.no_grad():
        return torch.empty_like(parameter.detach(), dtype=element_type, requires_grad=False)


def distribute_local(local: torch.Tensor, like: Any) -> Any:
    """The ``DTensor`` with the mesh, placements and global shape of another, around a local tensor of any dtype.

    Args:
        local: this rank's part, with the shape of that of ``like``. Its memory is shared.
        like: a ``DTensor``.
    """
    from torch.distributed.tensor import DTensor

    if local.device.type == like.device_mesh.device_type:
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    # from_local would move it to the mesh's device
    spec = like._spec
    meta = spec.tensor_meta._replace(dtype=local.dtype)
    make: Any = DTensor
    return make(local, dataclasses.replace(spec, tensor_meta=meta), requires_grad=local.requires_grad)
