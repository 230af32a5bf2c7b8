"""How dense memory is laid out: permutations, overlaps, contiguous boxes. Integers only, no tensors.

Strides are in elements. A permutation lists the dimensions from the outermost to the innermost in memory:
``memory_shape[i] == shape[permutation[i]]``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchsnapshot.geometry.grid import Box


def permutation_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The order of dimensions in which a tensor's memory is contiguous, or None if there is none.

    Args:
        shape: without zeros.
        strides: in elements.
    """
    # dimensions of size 1 have strides that mean nothing, but torch gives them those of their place in the order
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1:
            if strides[dim] != expected:
                return None
            expected *= shape[dim]
    return tuple(order)


def inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes this one."""
    result = [0] * len(permutation)
    for position, dim in enumerate(permutation):
        result[dim] = position
    return tuple(result)


def may_overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements may share memory: yes also for a few exotic layouts without overlap, never a wrong no."""
    if 0 in shape:
        return False
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def element_span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie between the first and the last one that a tensor reaches, both included."""
    if 0 in shape:
        return 0
    return 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))


def contiguous_offset(box: Box, shape: Sequence[int]) -> int | None:
    """Where a box begins in C-contiguous memory of that shape, in elements; None if it is not one range.

    Args:
        box: a region that is not empty.
        shape: the shape in memory order, with at least one dimension.
    """
    offset = 0
    stride = 1
    partial = False
    for start, size, dim in zip(reversed(box.offsets), reversed(box.sizes), reversed(shape), strict=True):
        if partial and size != 1:
            return None
        partial = partial or size != dim
        offset += start * stride
        stride *= dim
    return offset
