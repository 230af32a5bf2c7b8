"""Which dense tensors and arrays can be read, written in place, allocated and converted.

Bytes are read only from exactly ``Tensor``, ``Parameter`` and ``Buffer``, and from numpy arrays without objects. How
their memory is read and written stands in ``host_views`` (exported from here too); tensors made of several tensors are
taken apart in ``composites``.

Invariants: whoever scatters into a target calls ``bump_version`` once; nothing that is allocated here aliases
anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchsnapshot.errors import FormatError, MismatchError
from torchsnapshot.geometry.layout import inverse, may_overlap
from torchsnapshot.state import dtypes
from torchsnapshot.state.host_views import HostView, host_view, memory_span, reach_of, target_view

__all__ = [
    "HostView",
    "allocate",
    "bump_version",
    "can_write_in_place",
    "convert_into",
    "host_view",
    "is_array",
    "memory_span",
    "name_of",
    "target_view",
    "why_inconvertible",
    "why_unreadable",
    "wrap",
    "wrapper_of",
]

_MAX_DTYPE_NAME_NCHARS = 256


def is_array(value: object) -> bool:
    """Whether it is a numpy array whose elements are plain bytes: exactly ``ndarray``, or a memory map of one."""
    numpy = dtypes.numpy_module()
    if numpy is None or type(value) not in (numpy.ndarray, numpy.memmap):
        return False
    array: Any = value
    name = dtypes.numpy_name(array.dtype)
    return name is not None and len(name) <= _MAX_DTYPE_NAME_NCHARS


def name_of(tensor: Any) -> str:
    """The name on disk of the dtype of a tensor or array.

    Raises:
        FormatError: the table does not hold it.
    """
    if isinstance(tensor, torch.Tensor):
        return dtypes.name_of(tensor.dtype)
    name = dtypes.numpy_name(tensor.dtype)
    if name is None:
        raise FormatError(f"numpy dtype {tensor.dtype} is not made of plain bytes")
    return name


def why_unreadable(tensor: torch.Tensor) -> str | None:
    """Why the bytes of a tensor cannot be read as those of a dense one, or None. The message says what to do."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return "it is a tensor subclass that this version cannot store; convert it to a plain tensor"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"tensors of layout {'nested' if tensor.is_nested else tensor.layout} cannot be stored; make it dense"
    if tensor.is_meta:
        return "it is on the meta device and has no data; materialize it, or leave it out of the state"
    if tensor._is_zerotensor():
        return "it is a zero tensor of autograd's and has no memory; clone it, or leave it out of the state"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "it belongs to a function transform that is still running; take the snapshot outside of it"
    if tensor.dtype not in dtypes._NAMES:
        return f"its dtype {tensor.dtype} is not in this version's table"
    needed = tensor.storage_offset() * tensor.itemsize + reach_of(tensor)
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        return "its memory has been freed (a sharded parameter between steps?); take the full or sharded state dict"
    return None


def wrapper_of(tensor: torch.Tensor) -> str:
    """What a tensor is wrapped in: ``"parameter"``, ``"buffer"`` or ``"tensor"``."""
    if type(tensor) is torch.nn.Parameter:
        return "parameter"
    return "buffer" if getattr(tensor, "_is_buffer", False) else "tensor"


def wrap(tensor: Any, wrapper: str, requires_grad: bool) -> Any:
    """Give a newly allocated tensor the wrapper and ``requires_grad`` that its entry names."""
    if not isinstance(tensor, torch.Tensor) or wrapper == "numpy":
        return tensor
    # only these can require a gradient
    requires_grad = requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    if wrapper == "parameter":
        if type(tensor) is torch.nn.Parameter:
            return tensor.requires_grad_(requires_grad)
        return torch.nn.Parameter(tensor, requires_grad)
    if wrapper == "buffer":
        tensor = torch.nn.Buffer(tensor)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


def can_write_in_place(target: Any) -> bool:
    """Whether a restore may write straight into the memory of a tensor or array."""
    if not isinstance(target, torch.Tensor):
        if not is_array(target) or not target.flags.writeable:
            return False
        return not may_overlap(target.shape, target.strides)
    if why_unreadable(target) is not None or target.is_inference() or target.is_conj() or target.is_neg():
        return False
    return not target.is_quantized and (target.is_contiguous() or not may_overlap(target.shape, target.stride()))


def bump_version(target: Any) -> None:
    """Tell autograd that a tensor was written behind its back, so that a stale backward fails instead of lying."""
    if isinstance(target, torch.Tensor) and not target.is_inference():
        torch.autograd.graph.increment_version(target)


def allocate(
    dtype: str,
    shape: Sequence[int],
    permutation: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    *,
    as_array: bool = False,
) -> Any:
    """Make an uninitialized dense tensor or numpy array.

    Args:
        dtype: a name on disk.
        shape: the logical shape.
        permutation: the order of its dimensions in memory, None for C order.
        device: for tensors; the host where None.
        as_array: make a numpy array, if numpy is imported or the dtype is one that only numpy has.

    Raises:
        FormatError: the dtype is unknown here, or needs numpy where it is not imported.
    """
    order = tuple(range(len(shape))) if permutation is None else tuple(permutation)
    memory_shape = [shape[dim] for dim in order]
    if dtype.startswith(dtypes.NUMPY_PREFIX) or (as_array and dtypes.numpy_module() is not None):
        numpy = dtypes.numpy_module()
        found = dtypes.numpy_dtype(dtype)
        assert numpy is not None
        return numpy.empty(memory_shape, found).transpose(inverse(order))
    torch_dtype = dtypes.torch_dtype(dtype)
    if device is None:
        device = "cpu"  # torch's own default may be another one, even meta
    if dtypes.DTYPES[dtype].quantized:
        raise FormatError(f"a tensor of {dtype} is not stored as one dense tensor")
    if dtype == "complex32":
        # torch warns when it makes one, though moving its bytes is safe
        tensor = torch.empty(memory_shape, dtype=torch.int32, device=device).view(torch_dtype)
    else:
        tensor = torch.empty(memory_shape, dtype=torch_dtype, device=device)
    return tensor.permute(inverse(order)) if permutation is not None else tensor


def why_inconvertible(dtype: str, target: Any) -> str | None:
    """Why what is stored with this dtype cannot be converted into the target's elements, or None.

    Args:
        dtype: the name on disk of the source.
        target: a tensor or array.
    """
    if not isinstance(target, torch.Tensor):
        if not dtypes.has_numpy_type(dtype):
            return f"numpy has no dtype {dtype}"
        source = dtypes.numpy_dtype(dtype)
        plain = source.kind in "biufc" and target.dtype.kind in "biufc"
        loses = source.kind == "c" and target.dtype.kind != "c"
        return None if plain and not loses else f"{dtype} does not convert to {target.dtype}"
    if dtype.startswith(dtypes.NUMPY_PREFIX):
        return f"torch has no dtype {dtype!r}"
    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout is not torch.strided:
        return f"{dtype} does not convert into a {type(target).__name__} of {target.dtype} and layout {target.layout}"
    if dtypes.torch_dtype(dtype) == target.dtype:
        return None
    source_dtype = dtypes.torch_dtype(dtype)
    if source_dtype.is_complex and not target.dtype.is_complex:
        return f"{dtype} would lose its imaginary part as {target.dtype}"
    if target.is_quantized and not source_dtype.is_floating_point:
        return f"{dtype} does not quantize to {target.dtype}"
    try:
        probe = torch.zeros(1, dtype=torch.float32 if target.is_quantized else target.dtype, device="cpu")
        probe.copy_(allocate(dtype, (1,)).zero_())
    except (RuntimeError, NotImplementedError):
        return f"torch cannot convert {dtype} to {target.dtype}"
    return None


def convert_into(target: Any, source: Any) -> None:
    """Copy with conversion of dtype and device into a tensor or array of the same shape.

    Quantized sources are dequantized, quantized targets quantized with their own parameters. The autograd version is
    bumped by torch itself.

    Raises:
        MismatchError: torch has no such conversion, or the shapes differ.
    """
    if tuple(source.shape) != tuple(target.shape):
        raise MismatchError(f"shape {tuple(source.shape)} does not fit the target's {tuple(target.shape)}")
    if not isinstance(target, torch.Tensor):
        target[...] = source.numpy() if isinstance(source, torch.Tensor) else source
        return
    tensor = source if isinstance(source, torch.Tensor) else torch.from_numpy(source)
    if tensor.is_quantized and not target.is_quantized:
        tensor = tensor.dequantize()
    elif target.is_quantized and not tensor.is_quantized:
        tensor = tensor.to(torch.float32)
    try:
        with torch.no_grad():
            target.detach().copy_(tensor)
    except (RuntimeError, NotImplementedError) as error:
        raise MismatchError(f"torch cannot convert {source.dtype} to {target.dtype}: {error}") from error
