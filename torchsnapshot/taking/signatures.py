"""What must be equal for two nodes in one place of a state to be planned and packed alike, their content aside.

What doesn't live here: what follows from it (``structure``), the same for many tensors at once (``state.columns``).
"""

from __future__ import annotations

from typing import Any

import torch

from torchsnapshot.format.entries import ContainerEntry
from torchsnapshot.state.flatten import Node, OpaqueLeaf, TensorLeaf, ValueLeaf
from torchsnapshot.state.tensors import name_of
from torchsnapshot.taking.plan import INLINE_VALUE_NBYTES

Signature = tuple[Any, ...]


def signature_of(node: Node) -> Signature | None:
    """The signature of a node; None for sharded tensors, which are always planned anew."""
    if type(node) is TensorLeaf:
        tensor = node.tensor
        if not isinstance(tensor, torch.Tensor):
            return type(tensor), name_of(tensor), tensor.dtype, tensor.shape, tensor.strides, node.wrapper
        return (
            tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.is_conj(), tensor.is_neg(),
            type(tensor), node.wrapper, node.requires_grad,
        )  # fmt: skip
    if type(node) is ContainerEntry:
        # 1, 1.0 and True are equal to Python
        return node.kind, node.keys, tuple(map(type, node.keys)), node.extra
    if type(node) is ValueLeaf:
        return ValueLeaf, max(len(node.data), INLINE_VALUE_NBYTES)
    if type(node) is OpaqueLeaf:
        return OpaqueLeaf, node.type_name, max(len(node.data), INLINE_VALUE_NBYTES)
    return None
