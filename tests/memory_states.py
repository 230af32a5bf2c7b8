"""A state's way to entries and back without a store: every tensor stands inline."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch

from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    OpaqueEntry,
    TensorEntry,
    ValueEntry,
    pack_entries,
    unpack_entries,
)
from torchsnapshot.geometry import grid
from torchsnapshot.state import values
from torchsnapshot.state.flatten import (
    Node,
    OpaqueLeaf,
    TensorLeaf,
    ValueLeaf,
    find_targets,
    flatten,
    inflate,
    resolver,
)
from torchsnapshot.state.tensors import allocate, bump_version, can_write_in_place, host_view, name_of, target_view


def entry_of(node: Node) -> Entry:
    """The entry that a take would store for a node that is small enough to stand inline."""
    if isinstance(node, ValueLeaf):
        return ValueEntry(node.data, None, len(node.data))
    if isinstance(node, OpaqueLeaf):
        return OpaqueEntry(node.type_name, node.data, None, len(node.data))
    if isinstance(node, TensorLeaf):
        view = host_view(node.tensor)
        cell = grid.choose_cell(view.memory_shape, view.memory_shape, view.itemsize, 4096)
        return TensorEntry(
            view.dtype,
            view.shape,
            view.permutation,
            cell,
            (),
            view.read(),
            node.wrapper,
            node.requires_grad,
            view.nbytes,
        )
    assert isinstance(node, ContainerEntry)
    return node


def restore_tensor(entry: TensorEntry, target: Any = None) -> Any:
    """What a restore does with one tensor entry: in place where that is possible, else into new memory."""
    assert entry.inline is not None
    data = memoryview(bytearray(entry.inline))
    if can_write_in_place(target) and name_of(target) == entry.dtype and tuple(target.shape) == entry.shape:
        view = target_view(target, entry.permutation)
        view.scatter(grid.whole(view.memory_shape), data)
        bump_version(target)
        return target
    tensor = allocate(entry.dtype, entry.shape, entry.permutation, as_array=entry.wrapper == "numpy")
    view = target_view(tensor, entry.permutation)
    view.scatter(grid.whole(view.memory_shape), data)
    return tensor


def store(state: Any, on_opaque: Callable[[str, str], None] = lambda path, name: None) -> bytes:
    """The bytes of a state, as a manifest would hold them under rank 0 and key ``key``."""
    nodes = flatten("0/key", state, on_opaque=on_opaque)
    return pack_entries({path: entry_of(node) for path, node in nodes.items()})


def load(data: bytes, target: Any = None, offered: Any = None) -> Any:
    """The state that was stored; ``offered`` holds classes that may come back, beside those of the target."""
    entries = unpack_entries(data)
    targets = find_targets("0/key", entries, target)
    resolve = resolver(target, offered)

    def leaf(path: str, entry: Entry) -> Any:
        if isinstance(entry, TensorEntry):
            return restore_tensor(entry, targets.get(path))
        assert isinstance(entry, (ValueEntry, OpaqueEntry))
        assert entry.data is not None
        return values.decode(entry.data, resolve) if isinstance(entry, ValueEntry) else pickle.loads(entry.data)

    return inflate("0/key", entries, leaf, target, resolve)


def there_and_back(state: Any, target: Any = None, offered: Any = None) -> Any:
    """Store a state and load it."""
    return load(store(state), target, offered)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal in type, structure, dtype, order of keys, and every bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return same_tensor(left, right)
    if type(left).__module__ == "numpy":
        return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, dict):
        return (
            len(left) == len(right)
            and all(map(same, left.keys(), right.keys()))
            and all(map(same, left.values(), right.values()))
            and same(getattr(left, "__dict__", None), getattr(right, "__dict__", None))
            and getattr(left, "default_factory", None) is getattr(right, "default_factory", None)
        )
    if isinstance(left, (set, frozenset)):
        # a nan in a set is equal to nothing, and nested sets print in any order
        return values.encode(left) == values.encode(right)
    if hasattr(left, "maxlen") and left.maxlen != right.maxlen:
        return False
    if isinstance(left, (list, tuple)) or hasattr(left, "maxlen"):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "getvalue"):
        return bool(left.getvalue() == right.getvalue() and left.tell() == right.tell())
    if dataclasses.is_dataclass(left):
        return same(vars(left), vars(right))
    if isinstance(left, (decimal.Decimal, datetime.datetime, datetime.time)):
        # equality knows neither a fold nor a nan
        return repr(left) == repr(right)
    return bool(left == right)


def same_tensor(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, layout, gradient flag and every bit."""
    if (left.shape, left.dtype, left.layout, left.requires_grad) != (
        right.shape,
        right.dtype,
        right.layout,
        right.requires_grad,
    ):
        return False
    if left.layout is torch.sparse_coo:
        left, right = left.detach(), right.detach()
        return (
            left.is_coalesced() == right.is_coalesced()
            and same_tensor(left._indices(), right._indices())
            and same_tensor(left._values(), right._values())
        )
    if left.layout is not torch.strided:
        parts = ("crow_indices", "col_indices", "values")
        if left.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = ("ccol_indices", "row_indices", "values")
        left, right = left.detach(), right.detach()
        return all(same_tensor(getattr(left, part)(), getattr(right, part)()) for part in parts)
    if left.is_quantized:
        if left.qscheme() != right.qscheme() or not torch.equal(left.dequantize(), right.dequantize()):
            return False
        if left.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return left.q_scale() == right.q_scale() and left.q_zero_point() == right.q_zero_point()
        return torch.equal(left.q_per_channel_scales(), right.q_per_channel_scales())
    return bits(left) == bits(right)


def bits(tensor: torch.Tensor) -> bytes:
    """A dense tensor's logical elements as bytes in C order, by way of torch alone."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.numel():
        return b""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[plain.element_size()]
    flat = plain.view(raw).clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())
