"""Tensors made of several tensors: quantized, sparse, and subclasses that know how to flatten themselves.

Each is taken apart into inner tensors by name and a plain context, and put together again from them; ``flatten``
stores it as a container. A subclass is rebuilt by its own ``__tensor_unflatten__``, and its class comes from the
restore's target or torch's safe globals, never from an import. Any other tensor is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchsnapshot.errors import FormatError, MismatchError
from torchsnapshot.state import dtypes
from torchsnapshot.state.kinds import Context, Resolve, class_name
from torchsnapshot.state.tensors import why_unreadable, wrap, wrapper_of

QUANTIZED = "quantized"
SUBCLASS = "subclass"

_COORDINATES = "sparse_coo"
_COMPRESSED: Mapping[str, tuple[torch.layout, str, str]] = {
    "sparse_csr": (torch.sparse_csr, "crow_indices", "col_indices"),
    "sparse_bsr": (torch.sparse_bsr, "crow_indices", "col_indices"),
    "sparse_csc": (torch.sparse_csc, "ccol_indices", "row_indices"),
    "sparse_bsc": (torch.sparse_bsc, "ccol_indices", "row_indices"),
}
COMPOSITE_KINDS = frozenset({QUANTIZED, SUBCLASS, _COORDINATES, *_COMPRESSED})

_QUANTIZED_STORAGE: Mapping[str, torch.dtype] = {
    "qint8": torch.int8,
    "quint8": torch.uint8,
    "qint32": torch.int32,
    "quint4x2": torch.uint8,
    "quint2x4": torch.uint8,
}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
# these know how to flatten themselves, but their parts belong to several processes
_DISTRIBUTED_MODULES = ("torch.distributed.",)


@dataclass(frozen=True, slots=True)
class Composite:
    """A tensor taken apart: its kind, inner tensors by name, and a context."""

    kind: str
    children: Mapping[str, torch.Tensor]
    context: Context


def take_tensor_apart(tensor: torch.Tensor) -> Composite | str | None:
    """Take a composite tensor apart.

    Returns:
        Its parts; None for a dense tensor, which is a leaf; or the reason why it cannot be stored.
    """
    kind = type(tensor)
    if kind not in _PLAIN_TYPES:
        if not hasattr(kind, "__tensor_flatten__") or kind.__module__.startswith(_DISTRIBUTED_MODULES):
            return "tensors of this class cannot be stored; convert it to a plain tensor"
        return _take_subclass_apart(tensor)
    if tensor.layout is torch.strided and not tensor.is_quantized:
        return why_unreadable(tensor)
    if not tensor.is_meta:
        if tensor.is_quantized:
            return _take_quantized_apart(tensor)
        if tensor.layout is torch.sparse_coo:
            plain = tensor.detach()
            children = {"indices": plain._indices(), "values": plain._values()}
            return _sparse(tensor, _COORDINATES, children, coalesced=plain.is_coalesced())
        for name, (layout, compressed, other) in _COMPRESSED.items():
            if tensor.layout is layout:
                plain = tensor.detach()
                children = {part: getattr(plain, part)() for part in (compressed, other, "values")}
                return _sparse(tensor, name, children)
    return why_unreadable(tensor)


def put_tensor_together(
    kind: str, children: Mapping[str, Any], context: Mapping[str, Any], resolve: Resolve, target: object
) -> Any:
    """The inverse of :func:`take_tensor_apart`.

    Args:
        kind: of ``COMPOSITE_KINDS``.
        children: the restored inner tensors.
        context: as it was stored.
        resolve: gives the class of a subclass.
        target: what stands at this place in the restore's target. Where it is of the same kind, shape and dtype it is
            written and returned.

    Raises:
        MismatchError: the class of a subclass is not known to this process.
        FormatError: the parts make no such tensor.
    """
    if kind == SUBCLASS:
        return _put_subclass_together(children, context, resolve, target)
    try:
        with torch.no_grad():
            tensor = _build(kind, children, context)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"the stored parts make no {kind} tensor: {error}") from error
    return _settle(wrap(tensor, context["wrapper"], context["requires_grad"]), target)


def _build(kind: str, children: Mapping[str, Any], context: Mapping[str, Any]) -> torch.Tensor:
    if kind == QUANTIZED:
        return _build_quantized(children, context)
    if kind == _COORDINATES:
        return torch.sparse_coo_tensor(
            children["indices"],
            children["values"],
            torch.Size(context["shape"]),
            check_invariants=True,
            is_coalesced=bool(context["coalesced"]),
        )
    layout, compressed, other = _COMPRESSED[kind]
    return torch.sparse_compressed_tensor(
        children[compressed],
        children[other],
        children["values"],
        torch.Size(context["shape"]),
        layout=layout,
        check_invariants=True,
    )


def _settle(tensor: torch.Tensor, target: object) -> Any:
    """Write a rebuilt tensor into the target where that is of the same make; otherwise return it."""
    if type(target) not in _PLAIN_TYPES or not isinstance(target, torch.Tensor) or target.shape != tensor.shape:
        return tensor
    if target.is_meta or target.is_inference():
        return tensor
    same_make = target.layout is tensor.layout and target.is_quantized == tensor.is_quantized
    source = tensor.detach()
    if tensor.is_quantized and target.layout is torch.strided and target.dtype.is_floating_point:
        source = source.dequantize()
    elif (
        not same_make or target.dtype != tensor.dtype or (target.is_quantized and _qscheme(target) != _qscheme(tensor))
    ):
        return tensor
    try:
        with torch.no_grad():
            target.copy_(source)
    except RuntimeError:
        # expanded, or otherwise not to be written: the new tensor takes its place
        return tensor
    return target


def _qscheme(tensor: torch.Tensor) -> torch.qscheme:
    scheme: torch.qscheme = tensor.qscheme()
    return scheme


def _sparse(tensor: torch.Tensor, kind: str, children: Mapping[str, torch.Tensor], **context: Any) -> Composite:
    return Composite(kind, children, {"shape": list(tensor.shape), **context, **_wrapping(tensor)})


def _wrapping(tensor: torch.Tensor) -> dict[str, Any]:
    return {"wrapper": wrapper_of(tensor), "requires_grad": tensor.requires_grad}


def _storage_view(tensor: torch.Tensor) -> torch.Tensor:
    """A quantized tensor's stored integers as a plain tensor over the same memory; packed types as their bytes."""
    entry = dtypes.DTYPES[dtypes.name_of(tensor.dtype)]
    plain = torch.empty(0, dtype=_QUANTIZED_STORAGE[entry.name], device=tensor.device)
    storage = tensor.untyped_storage()
    if entry.per_byte > 1:
        plain.set_(storage, 0, (entry.nbytes(tensor.numel()),), (1,))
    else:
        plain.set_(storage, int(tensor.storage_offset()), tensor.shape, tensor.stride())
    return plain


def _take_quantized_apart(tensor: torch.Tensor) -> Composite:
    tensor_plain = tensor.detach()
    packed = dtypes.DTYPES[dtypes.name_of(tensor.dtype)].per_byte > 1
    if packed and (tensor_plain.storage_offset() or not tensor_plain.is_contiguous()):
        tensor_plain = tensor_plain.clone(memory_format=torch.contiguous_format)
    scheme = str(tensor_plain.qscheme()).removeprefix("torch.")
    context: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": dtypes.name_of(tensor.dtype),
        "scheme": scheme,
        **_wrapping(tensor),
    }
    children = {"values": _storage_view(tensor_plain)}
    if scheme.startswith("per_tensor"):
        context["scale"] = float(tensor_plain.q_scale())
        context["zero_point"] = int(tensor_plain.q_zero_point())
    else:
        context["axis"] = int(tensor_plain.q_per_channel_axis())
        children["scales"] = tensor_plain.q_per_channel_scales()
        children["zero_points"] = tensor_plain.q_per_channel_zero_points()
    return Composite(QUANTIZED, children, context)


def _build_quantized(children: Mapping[str, Any], context: Mapping[str, Any]) -> torch.Tensor:
    values = children["values"]
    options: dict[str, Any] = {"dtype": dtypes.torch_dtype(context["dtype"]), "device": values.device}
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        options["memory_format"] = torch.channels_last
    if context["scheme"].startswith("per_tensor"):
        tensor = torch._empty_affine_quantized(
            context["shape"], scale=context["scale"], zero_point=context["zero_point"], **options
        )
    else:
        tensor = torch._empty_per_channel_affine_quantized(
            context["shape"],
            scales=children["scales"],
            zero_points=children["zero_points"],
            axis=context["axis"],
            **options,
        )
    storage = _storage_view(tensor)
    if storage.shape != values.shape or storage.dtype != values.dtype:
        raise ValueError(f"{values.dtype} of {tuple(values.shape)} for {context['dtype']} of {context['shape']}")
    storage.copy_(values)
    return tensor


def _take_subclass_apart(tensor: Any) -> Composite | str:
    try:
        names, inner_context = tensor.__tensor_flatten__()
        children = {str(name): getattr(tensor, name) for name in names}
        size, stride = [int(size) for size in tensor.size()], [int(stride) for stride in tensor.stride()]
    except Exception as error:
        return f"its __tensor_flatten__ failed: {error}"
    not_tensors = [name for name, child in children.items() if not isinstance(child, torch.Tensor)]
    if not_tensors:
        return f"its __tensor_flatten__ names {not_tensors}, which are no tensors"
    context = {
        "class": class_name(type(tensor)),
        "context": inner_context,
        "size": size,
        "stride": stride,
        "parameter": isinstance(tensor, torch.nn.Parameter),
        "requires_grad": tensor.requires_grad,
    }
    return Composite(SUBCLASS, children, context)


def _put_subclass_together(
    children: Mapping[str, Any], context: Mapping[str, Any], resolve: Resolve, target: object
) -> Any:
    name = context["class"]
    found: Any = resolve(name)
    if not (isinstance(found, type) and issubclass(found, torch.Tensor) and hasattr(found, "__tensor_unflatten__")):
        raise MismatchError(
            f"a tensor of class {name} is stored, and the target has no tensor of that class; restore into one "
            f"that has, or name the class by torch.serialization.add_safe_globals"
        )
    if type(target) is found and isinstance(target, torch.Tensor):
        names, inner_context = target.__tensor_flatten__()  # type: ignore[attr-defined]
        in_place = set(names) == children.keys() and all(getattr(target, each) is children[each] for each in names)
        if in_place and inner_context == context["context"]:
            return target
    try:
        tensor = found.__tensor_unflatten__(
            dict(children), context["context"], torch.Size(context["size"]), tuple(context["stride"])
        )
    except Exception as error:
        raise FormatError(f"{name}.__tensor_unflatten__ failed: {type(error).__name__}: {error}") from error
    if context["parameter"] and not isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, bool(context["requires_grad"]))
    if context["requires_grad"] and not tensor.requires_grad and tensor.is_leaf:
        tensor.requires_grad_()
    return tensor
