"""Many tensors at once: whether each still says of itself what it said before, and the bytes of the small ones.

What lives here: the attributes of many tensors on the host, kept and compared column by column, and buffers over their
memory. What doesn't: tensors one by one (``host_views``, ``tensors``), and which tensors a state has (``skeleton``).

A column is read by one call of ``map``, without a line of Python for each tensor: that, and not the work itself, is
what small tensors cost.

Invariants: what is compared is all that decides how a tensor is stored, except for its address and content; nothing
here keeps a tensor alive. Memory is read only through a storage that is held, and that is as large as it has to be.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchsnapshot.state.host_views import reach_of

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")
_LAYOUT = operator.attrgetter("layout")
_IS_CPU = operator.attrgetter("is_cpu")
_IS_NESTED = operator.attrgetter("is_nested")
_REQUIRES_GRAD = operator.attrgetter("requires_grad")


def fits_columns(tensor: Any) -> bool:
    """Whether a tensor that can be read may stand in columns: it is the host's, and its bits are its elements."""
    return type(tensor) in _PLAIN_TYPES and tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()


@dataclass(frozen=True, slots=True, eq=False)
class TensorMemory:
    """The memory of many tensors, which it keeps alive: their storages, and where in these they begin, in bytes."""

    storages: Sequence[torch.UntypedStorage]
    offsets: Sequence[int]


class BufferColumn:
    """Buffers over the memory of some of the tensors of a state, made anew each time.

    Args:
        numbers: which tensors: places in the columns, one for each buffer. All are contiguous, in C order of their
            memory, and not empty.
        sizes: the bytes of each buffer.
        offsets: where in its tensor each buffer begins, in bytes; None: at its beginning.
    """

    __slots__ = ("_makers", "_numbers", "_offsets")

    def __init__(self, numbers: Sequence[int], sizes: Sequence[int], offsets: Sequence[int] | None = None) -> None:
        self._numbers = numbers
        self._offsets = offsets
        self._makers = [(ctypes.c_char * nbytes).from_address for nbytes in sizes]

    def over(self, memory: TensorMemory) -> list[Any] | None:
        """One buffer for each; good for as long as ``memory`` is held. None where one has no memory."""
        starts = self.addresses(memory)
        return None if starts is None else [make(start) for make, start in zip(self._makers, starts, strict=True)]

    def addresses(self, memory: TensorMemory) -> list[int] | None:
        """Where each begins. None where one has no memory."""
        storages, offsets = memory.storages, memory.offsets
        starts = list(map(torch.UntypedStorage.data_ptr, [storages[number] for number in self._numbers]))
        if not all(starts):
            return None
        if any(offsets):
            starts = list(map(operator.add, starts, [offsets[number] for number in self._numbers]))
        if self._offsets is not None:
            starts = list(map(operator.add, starts, self._offsets))
        return starts

    def at(self, index: int, address: int) -> Any:
        """One buffer, at the address that ``addresses`` has given for it."""
        return self._makers[index](address)


class TensorColumns:
    """What tensors said of themselves.

    Args:
        tensors: all of them ``fits_columns`` takes.
    """

    __slots__ = ("_are_buffers", "_dtypes", "_itemsizes", "_need_grad", "_reaches", "_shapes", "_strides")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._dtypes = list(map(_DTYPE, tensors))
        self._shapes = list(map(_SHAPE, tensors))
        self._strides = list(map(torch.Tensor.stride, tensors))
        self._need_grad = list(map(_REQUIRES_GRAD, tensors))
        self._are_buffers = list(map(_is_buffer, tensors))
        # an empty tensor reaches nothing, wherever it begins
        self._itemsizes = [tensor.itemsize if tensor.numel() else 0 for tensor in tensors]
        self._reaches = list(map(reach_of, tensors))

    def memory(self, tensors: Sequence[torch.Tensor]) -> TensorMemory | None:
        """The memory of other tensors, if they say the same of themselves.

        Args:
            tensors: one for each column, of the same classes.

        Returns:
            None where a tensor differs in dtype, shape, strides, device, layout, ``requires_grad``, a pending
            conjugation or negation, or in being a buffer; where its memory has been freed, or is none that can be read.
        """
        try:
            if not self._are_like(tensors):
                return None
            storages = list(map(torch.Tensor.untyped_storage, tensors))
            offsets = list(map(int, map(torch.Tensor.storage_offset, tensors)))
            sizes = list(map(torch.UntypedStorage.nbytes, storages))
        except RuntimeError:
            # nested tensors, and those of function transforms, refuse some of these questions
            return None
        if any(offsets):
            offsets = list(map(operator.mul, offsets, self._itemsizes))
        ends = map(operator.add, offsets, self._reaches)
        return TensorMemory(storages, offsets) if all(map(operator.le, ends, sizes)) else None

    def held(self, number: int, memory: TensorMemory) -> torch.Tensor:
        """The tensor in a column as it was when its memory was read, whatever has become of the application's own."""
        dtype, itemsize = self._dtypes[number], self._itemsizes[number]
        offset = memory.offsets[number] // itemsize if itemsize else 0
        empty = torch.empty(0, dtype=dtype, device="cpu")
        return empty.set_(memory.storages[number], offset, self._shapes[number], self._strides[number])

    def _are_like(self, tensors: Sequence[torch.Tensor]) -> bool:
        return (
            all(map(_IS_CPU, tensors))
            and not any(map(_IS_NESTED, tensors))
            and {torch.strided}.issuperset(map(_LAYOUT, tensors))
            and list(map(_DTYPE, tensors)) == self._dtypes
            and list(map(_SHAPE, tensors)) == self._shapes
            and list(map(torch.Tensor.stride, tensors)) == self._strides
            and list(map(_REQUIRES_GRAD, tensors)) == self._need_grad
            and list(map(_is_buffer, tensors)) == self._are_buffers
            and not any(map(torch.Tensor.is_conj, tensors))
            and not any(map(torch.Tensor.is_neg, tensors))
        )


def _is_buffer(tensor: torch.Tensor) -> bool:
    return bool(getattr(tensor, "_is_buffer", False))
