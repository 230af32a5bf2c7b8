"""Dense tensors and arrays as bytes: the module that reads and writes their memory, one by one.

A ``HostView`` shows a dense tensor in *memory order* (its shape permuted so that its memory is contiguous, where that
is possible) and moves boxes of it to and from host buffers. Which tensors may be shown is decided in ``tensors``.

Invariants: a view that ``live`` gave out keeps its tensor's memory alive; conjugate and negative views are resolved
when they are staged; ``scatter`` changes nothing but the elements of its box and leaves the autograd version alone.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch

from torchsnapshot.engine.buffers import address_of
from torchsnapshot.errors import UnsupportedValueError
from torchsnapshot.geometry.grid import Box, whole
from torchsnapshot.geometry.layout import contiguous_offset, element_span, permutation_of
from torchsnapshot.state import dtypes
from torchsnapshot.state.moves import move

Order = tuple[int, ...] | Literal["own"] | None
"""A permutation, None for C order, or ``"own"``: that of the tensor's memory where it is dense."""


class HostView:
    """A dense tensor or array as bytes in memory order.

    ``dtype`` is the name on disk, ``shape`` the logical shape, ``permutation`` None where memory order is the logical
    order, ``itemsize`` in bytes. ``memory_shape`` has no dimension for a 0-d tensor; its boxes are those of ``(1,)``.
    """

    __slots__ = (
        "_contiguous",
        "_dims",
        "_memory",
        "dtype",
        "itemsize",
        "memory_shape",
        "nbytes",
        "permutation",
        "shape",
    )

    dtype: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None
    memory_shape: tuple[int, ...]
    itemsize: int
    nbytes: int
    # the tensor in memory order, with at least one dimension, and its shape
    _memory: Any
    _dims: tuple[int, ...]
    # whether bytes in memory are the bytes to store, in this order, readable by the host
    _contiguous: bool

    @property
    def is_plain(self) -> bool:
        """Whether the host can read the bytes to store where they lie, one after the other."""
        return self._contiguous

    def bare(self) -> HostView:
        """The same view without memory: what it says of the layout, and ``bind``."""
        bare = object.__new__(type(self))
        for name in ("dtype", "shape", "permutation", "memory_shape", "itemsize", "nbytes", "_dims", "_contiguous"):
            setattr(bare, name, getattr(self, name))
        return bare

    def bind(self, tensor: Any) -> HostView:
        """What ``host_view`` would make of a tensor that is like this view's in all but its address.

        Args:
            tensor: of the same class, dtype, shape, strides and device, as physical as the other one.
        """
        raise NotImplementedError

    def extent(self, offset: int, nbytes: int) -> tuple[int, int] | None:
        """Address and size of what ``live`` would show, None for nothing."""
        return (self._pointer() + offset, nbytes) if self._contiguous and nbytes else None

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """The bytes where they lie, without a copy: writing to them writes the tensor.

        Args:
            offset: where the range begins, in bytes of the memory order.
            nbytes: its length.

        Returns:
            A view that keeps the memory alive, or None where the bytes cannot be had so (other device, strides).
        """
        if not self._contiguous:
            return None
        if not nbytes:
            return memoryview(b"")
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} of {self.nbytes}")
        array = (ctypes.c_char * nbytes).from_address(self._pointer() + offset)
        array.owner = self._memory  # type: ignore[attr-defined]
        return memoryview(array).cast("B")

    def stage(self, box: Box, into: memoryview) -> None:
        """Copy a box as C-contiguous bytes into a buffer of exactly its size.

        Args:
            box: in coordinates of the memory order.
            into: a writable buffer.
        """
        nbytes = self._check(box, into)
        if not nbytes:
            return
        start: int | None = 0
        if nbytes != self.nbytes or not self._contiguous:
            start = contiguous_offset(box, self._dims) if self._contiguous else None
        if start is None:
            self._copy_out(box, into)
        else:
            move(address_of(into), self._pointer() + start * self.itemsize, nbytes)

    def scatter(self, box: Box, data: memoryview) -> None:
        """Copy C-contiguous bytes into a box of the tensor: the inverse of ``stage``.

        Args:
            box: in coordinates of the memory order.
            data: exactly the box's bytes.
        """
        nbytes = self._check(box, data)
        if not nbytes:
            return
        start = contiguous_offset(box, self._dims) if self._contiguous else None
        if start is None:
            self._copy_in(box, memoryview(bytearray(data)) if data.readonly else data)
        elif data.readonly:
            # a read-only buffer has no address for ctypes
            view = self.live(start * self.itemsize, nbytes)
            assert view is not None
            view[:] = data
        else:
            move(self._pointer() + start * self.itemsize, address_of(data), nbytes)

    def scatter_part(self, chunk: Box, data: memoryview, part: Box) -> None:
        """Copy a part of C-contiguous bytes into the tensor.

        Args:
            chunk: which box the data are; it may reach out of the tensor.
            data: exactly its bytes.
            part: the box to be written, inside the chunk and inside the tensor.
        """
        inner = part.relative_to(chunk)
        if data.nbytes != chunk.numel * self.itemsize or inner.intersect(whole(chunk.sizes)) != inner:
            raise ValueError(
                f"{data.nbytes} bytes of box {chunk.offsets}+{chunk.sizes} for {part.offsets}+{part.sizes}"
            )
        start = contiguous_offset(inner, chunk.sizes)
        if start is not None:
            start *= self.itemsize
            self.scatter(part, data[start : start + part.numel * self.itemsize])
            return
        self._check_box(part)
        self._copy_part_in(part, memoryview(bytearray(data)) if data.readonly else data, chunk.sizes, inner)

    def read(self) -> bytes:
        """All bytes, in memory order."""
        data = bytearray(self.nbytes)
        self.stage(whole(self.memory_shape), memoryview(data))
        return bytes(data)

    def _check(self, box: Box, buffer: memoryview) -> int:
        nbytes = box.numel * self.itemsize
        if buffer.nbytes != nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes for a box of {nbytes}")
        self._check_box(box)
        return nbytes

    def _check_box(self, box: Box) -> None:
        for offset, size, dim in zip(box.offsets, box.sizes, self._dims, strict=True):
            if offset < 0 or size < 0 or offset + size > dim:
                raise ValueError(f"box {box.offsets}+{box.sizes} is not inside {self._dims}")

    def _set_layout(self, shape: tuple[int, ...], permutation: tuple[int, ...] | None) -> None:
        self.shape = shape
        self.permutation = permutation
        self.memory_shape = shape if permutation is None else tuple(shape[dim] for dim in permutation)
        self._dims = self.memory_shape or (1,)

    def _pointer(self) -> int:
        raise NotImplementedError

    def _copy_out(self, box: Box, into: memoryview) -> None:
        raise NotImplementedError

    def _copy_in(self, box: Box, data: memoryview) -> None:
        raise NotImplementedError

    def _copy_part_in(self, box: Box, data: memoryview, sizes: tuple[int, ...], inner: Box) -> None:
        """Write to ``box`` what stands at ``inner`` in data of these sizes."""
        raise NotImplementedError


class _TorchView(HostView):
    __slots__ = ("_physical", "_ready")

    # whether raw bits are the elements: no pending conjugation or negation
    _physical: bool
    # reached when the work is done that the stream on the tensor's device had been given before this view was made
    _ready: Any

    def __init__(self, tensor: torch.Tensor, order: Order) -> None:
        # an alias of its own: it keeps the memory if the caller's tensor gets another
        tensor = tensor.detach()
        shape = tuple(tensor.shape)
        self.dtype = dtypes.name_of(tensor.dtype)
        self.itemsize = tensor.element_size()
        self.nbytes = tensor.numel() * self.itemsize
        contiguous = tensor.is_contiguous()
        if order == "own":
            order = None if contiguous or not self.nbytes else permutation_of(shape, tensor.stride())
        self._set_layout(shape, order)
        if order is not None:
            tensor = tensor.permute(order)
            contiguous = tensor.is_contiguous()
        self._physical = not (tensor.is_conj() or tensor.is_neg())
        self._contiguous = contiguous and self._physical and tensor.is_cpu
        self._memory = tensor if shape else tensor.unsqueeze(0)
        self._ready = _device_event(tensor)

    def bare(self) -> HostView:
        """See ``HostView``."""
        bare = super().bare()
        assert isinstance(bare, _TorchView)
        bare._physical = self._physical
        return bare

    def bind(self, tensor: torch.Tensor) -> HostView:
        """See ``HostView``."""
        view = object.__new__(_TorchView)
        view.dtype, view.shape, view.permutation = self.dtype, self.shape, self.permutation
        view.memory_shape, view.itemsize, view.nbytes = self.memory_shape, self.itemsize, self.nbytes
        view._dims, view._contiguous, view._physical = self._dims, self._contiguous, self._physical
        tensor = tensor.detach()
        if self.permutation is not None:
            tensor = tensor.permute(self.permutation)
        view._memory = tensor if self.shape else tensor.unsqueeze(0)
        view._ready = _device_event(tensor)
        return view

    def _pointer(self) -> int:
        pointer = self._memory.data_ptr()
        if not pointer:
            raise UnsupportedValueError([f"a tensor of shape {self.shape}: its memory was freed while it was in use"])
        return int(pointer)

    def _copy_out(self, box: Box, into: memoryview) -> None:
        source = self._box(box)
        self._wait()
        if self._physical:
            # raw bits through a plain type: not every dtype has copy kernels
            source = source.view(dtypes.RAW_TYPES[self.itemsize])
        torch.frombuffer(into, dtype=source.dtype).view(box.sizes).copy_(source)

    def _copy_in(self, box: Box, data: memoryview) -> None:
        self._copy_part_in(box, data, box.sizes, whole(box.sizes))

    def _copy_part_in(self, box: Box, data: memoryview, sizes: tuple[int, ...], inner: Box) -> None:
        target = self._box(box)
        self._wait()
        if self._physical:
            target = target.view(dtypes.RAW_TYPES[self.itemsize])
        target.copy_(torch.frombuffer(data, dtype=target.dtype).view(sizes)[_slices(inner)])

    def _box(self, box: Box) -> torch.Tensor:
        found: torch.Tensor = self._memory if box.sizes == self._dims else self._memory[_slices(box)]
        return found

    def _wait(self) -> None:
        if self._ready is not None:
            # a worker thread has a current stream of its own, which knows nothing of the caller's
            torch.cuda.current_stream(self._memory.device).wait_event(self._ready)


class _ArrayView(HostView):
    """The same for numpy arrays; numpy is reached through the array's own process."""

    __slots__ = ()

    def __init__(self, array: Any, order: Order) -> None:
        name = dtypes.numpy_name(array.dtype)
        if name is None:
            raise UnsupportedValueError([f"a numpy array of dtype {array.dtype}: it is not made of plain bytes"])
        shape = tuple(int(size) for size in array.shape)
        self.dtype = name
        self.itemsize = int(array.dtype.itemsize)
        self.nbytes = int(array.size) * self.itemsize
        contiguous = bool(array.flags.c_contiguous)
        if order == "own":
            order = None
            if not contiguous and self.nbytes and all(stride % self.itemsize == 0 for stride in array.strides):
                order = permutation_of(shape, [stride // self.itemsize for stride in array.strides])
        self._set_layout(shape, order)
        if order is not None:
            array = array.transpose(order)
            contiguous = bool(array.flags.c_contiguous)
        self._contiguous = contiguous
        self._memory = array if shape else array.reshape(1)

    def bind(self, tensor: Any) -> HostView:
        """See ``HostView``."""
        return _ArrayView(tensor, self.permutation)

    def live(self, offset: int, nbytes: int) -> memoryview | None:
        """See ``HostView``; the view of a read-only array is read-only."""
        view = super().live(offset, nbytes)
        return view.toreadonly() if view is not None and not self._memory.flags.writeable else view

    def scatter(self, box: Box, data: memoryview) -> None:
        """See ``HostView``."""
        if not self._memory.flags.writeable:
            raise ValueError("the array is read-only")
        super().scatter(box, data)

    def _pointer(self) -> int:
        return int(self._memory.__array_interface__["data"][0])

    def _copy_out(self, box: Box, into: memoryview) -> None:
        if self._memory.dtype.names is not None:
            # padding between fields is not copied, and what the buffer held before must not be stored
            into[:] = bytes(into.nbytes)
        numpy = dtypes.numpy_module()
        assert numpy is not None
        numpy.frombuffer(into, self._memory.dtype).reshape(box.sizes)[...] = self._box(box)

    def _copy_in(self, box: Box, data: memoryview) -> None:
        self._copy_part_in(box, data, box.sizes, whole(box.sizes))

    def _copy_part_in(self, box: Box, data: memoryview, sizes: tuple[int, ...], inner: Box) -> None:
        numpy = dtypes.numpy_module()
        assert numpy is not None
        self._box(box)[...] = numpy.frombuffer(data, self._memory.dtype).reshape(sizes)[_slices(inner)]

    def _box(self, box: Box) -> Any:
        return self._memory[_slices(box)]


def host_view(tensor: Any) -> HostView:
    """Show a dense tensor or a numpy array in the order of its own memory.

    Args:
        tensor: one for which ``why_unreadable`` knows no reason.

    Raises:
        FormatError: its dtype is not in the table.
        UnsupportedValueError: an array that holds objects.
    """
    return _TorchView(tensor, "own") if isinstance(tensor, torch.Tensor) else _ArrayView(tensor, "own")


def target_view(tensor: Any, permutation: tuple[int, ...] | None) -> HostView:
    """Show a tensor or array in the order in which a stored one lay in memory, whatever its own order is.

    Args:
        tensor: one that ``can_write_in_place`` accepts.
        permutation: the stored entry's.
    """
    return _TorchView(tensor, permutation) if isinstance(tensor, torch.Tensor) else _ArrayView(tensor, permutation)


def reach_of(tensor: torch.Tensor) -> int:
    """How many bytes from its first element on a tensor reaches."""
    numel = tensor.numel()
    reach = numel if not numel or tensor.is_contiguous() else element_span(tensor.shape, tensor.stride())
    return int(reach * tensor.itemsize)


def memory_span(tensor: Any) -> tuple[int, int]:
    """The range of addresses that a dense tensor or an array reaches: first byte, and one behind the last.

    Addresses of different devices may look alike. An empty one has an empty range.
    """
    if isinstance(tensor, torch.Tensor):
        start = tensor.data_ptr() if tensor.numel() else 0
        return start, start + reach_of(tensor)
    if not tensor.size:
        return 0, 0
    start, itemsize = int(tensor.__array_interface__["data"][0]), int(tensor.itemsize)
    steps = [stride * (size - 1) for stride, size in zip(tensor.strides, tensor.shape, strict=True)]
    return start + sum(step for step in steps if step < 0), start + sum(step for step in steps if step > 0) + itemsize


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


def _device_event(tensor: torch.Tensor) -> Any:
    """An event behind all work that this thread's stream on the tensor's device has been given; None for the host's."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event
