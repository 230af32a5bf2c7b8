"""Which stored tensor goes where: into the target's own memory, or into new memory. Reads and writes no stored bytes.

What doesn't live here: reading (``reads``, ``read_jobs``), what a tensor looks like in memory
(``state.tensors``).

Invariants: two restored tensors never share memory unless the application's own do *and* both get the same content;
memory of ours is never handed out; a target that cannot take raw bytes (expanded, overlapping, inference, another
dtype) gets its values through a new tensor. A shape that does not fit is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchsnapshot.format.entries import ShardedTensorEntry, TensorEntry
from torchsnapshot.geometry.grid import whole
from torchsnapshot.reading.spans import SortedSpans, Span
from torchsnapshot.state.dtypes import name_of, numpy_name
from torchsnapshot.state.host_views import memory_span, target_view
from torchsnapshot.state.sharded import PlacedView, bump_versions, describe, is_dtensor, is_sharded_tensor
from torchsnapshot.state.tensors import allocate, bump_version, can_write_in_place, convert_into, why_inconvertible


@dataclass(slots=True, eq=False)
class Target:
    """Where one stored tensor goes.

    ``value`` is what stands in the restored state; ``views`` is the memory that bytes are scattered into, one for each
    region of the tensor that is wanted here: that of ``value``, or that of staging tensors, which are converted into
    parts of ``value`` at the end. ``is_own``: ``value`` was the application's before.
    """

    value: Any
    views: list[PlacedView]
    is_own: bool = False
    staging: list[tuple[Any, Any]] = field(default_factory=list)
    """(staging tensor, part of ``value``)."""

    @property
    def is_written_in_place(self) -> bool:
        """Whether ``views`` are memory of the application."""
        return self.is_own and not self.staging

    def convert(self) -> None:
        """Convert from staging, where there is one; torch tells autograd of that itself."""
        for staging, part in self.staging:
            convert_into(part, staging)

    def note_write(self) -> None:
        """Tell autograd that the application's memory was written behind its back."""
        if is_dtensor(self.value) or is_sharded_tensor(self.value):
            bump_versions(self.value)
        else:
            bump_version(self.value)


@dataclass(slots=True)
class TargetFinder:
    """Finds the target of each stored tensor, and collects what does not fit.

    Args:
        device: where tensors are allocated whose target is on the meta device.
        content: what a stored tensor holds, in a form that compares: targets that share memory must hold the same.
    """

    device: torch.device
    content: Callable[[TensorEntry | ShardedTensorEntry], object]
    mismatches: list[str] = field(default_factory=list)
    converted: dict[str, tuple[str, str]] = field(default_factory=dict)
    _spans: SortedSpans = field(default_factory=SortedSpans)
    _holders: dict[Span, tuple[Any, TensorEntry | ShardedTensorEntry]] = field(default_factory=dict)
    """Whose memory a span is: the tensor's, and what it gets."""

    def find(self, path: str, entry: TensorEntry | ShardedTensorEntry, current: Any) -> Target | None:
        """The target for ``entry``, where the application has ``current`` at the path (None: nothing).

        Returns None where it does not fit, and notes that in ``mismatches``.
        """
        if current is None:
            return self._new(entry)
        if isinstance(current, torch.Tensor) and is_lazy(current):
            # a module that has not seen its input yet takes its parameters' shapes from what it is given
            return self._new(entry, self.device if current.is_meta else current.device)
        if tuple(current.shape) != entry.shape:
            self.mismatches.append(f"{path}: stored {list(entry.shape)}, target {list(current.shape)}")
            return None
        if is_dtensor(current) or is_sharded_tensor(current):
            return self._find_sharded(path, entry, current)
        is_tensor = isinstance(current, torch.Tensor)
        name = name_of(current.dtype) if is_tensor else numpy_name(current.dtype)
        if name == entry.dtype and can_write_in_place(current) and self._claims(current, entry):
            return Target(current, [_whole_view(current, entry)], is_own=True)
        device = None if not is_tensor else self.device if current.is_meta else current.device
        if name == entry.dtype:
            return self._new(entry, device)
        obstacle = why_inconvertible(entry.dtype, current)
        if obstacle is not None:
            self.mismatches.append(f"{path}: {obstacle}")
            return None
        self.converted[path] = (entry.dtype, str(name))
        staging = self._new(entry)
        if _can_convert_in_place(current) and self._claims(current, entry):
            return Target(current, staging.views, is_own=True, staging=[(staging.value, current)])
        value = torch.empty_like(current, device=device) if is_tensor else current.copy()
        return Target(value, staging.views, staging=[(staging.value, value)])

    def _find_sharded(self, path: str, entry: TensorEntry | ShardedTensorEntry, current: Any) -> Target | None:
        """The target where the application has a tensor that is spread over ranks: this rank's parts of it."""
        source = describe(current)
        if source is None or isinstance(source, str):
            self.mismatches.append(f"{path}: {source}")
            return None
        permutation = _permutation(entry)
        if source.dtype == entry.dtype:
            if source.is_writable and all(self._claims(part, entry) for part in source.locals):
                return Target(current, source.views(permutation), is_own=True)
            self.mismatches.append(f"{path}: this rank's part cannot be written (expanded, or an inference tensor)")
            return None
        obstacle = next(filter(None, (why_inconvertible(entry.dtype, part) for part in source.locals)), None)
        if obstacle is not None:
            self.mismatches.append(f"{path}: {obstacle}")
            return None
        self.converted[path] = (entry.dtype, source.dtype)
        pairs = [(allocate(entry.dtype, part.shape), part) for part in source.locals]
        boxes = [view.box for view in source.views(permutation)]
        views = [
            PlacedView(box, target_view(staging, permutation)) for box, (staging, _) in zip(boxes, pairs, strict=True)
        ]
        return Target(current, views, is_own=True, staging=pairs)

    def _new(self, entry: TensorEntry | ShardedTensorEntry, device: torch.device | None = None) -> Target:
        as_array = entry.wrapper == "numpy"
        value = allocate(entry.dtype, entry.shape, _permutation(entry), device, as_array=as_array)
        return Target(value, [_whole_view(value, entry)])

    def _claims(self, current: Any, entry: TensorEntry | ShardedTensorEntry) -> bool:
        """Whether the memory is free for this tensor: nobody else's, or that of one with the very same content."""
        is_elsewhere = isinstance(current, torch.Tensor) and not current.is_cpu
        span = (str(current.device) if is_elsewhere else "cpu", *memory_span(current))
        if span[1] == span[2]:
            return True
        holder = self._holders.get(span)
        if holder is not None:
            return self._described(*holder) == self._described(current, entry)
        before, after = self._spans.around(span)
        if before is not None and before[0] == span[0] and before[2] > span[1]:
            return False
        if after is not None and after[0] == span[0] and after[1] < span[2]:
            return False
        self._spans.add(span)
        self._holders[span] = current, entry
        return True

    def _described(self, current: Any, entry: TensorEntry | ShardedTensorEntry) -> object:
        """Everything that decides on which bytes are written where in a span of memory."""
        # the same memory in another order would be other elements
        strides = current.stride() if isinstance(current, torch.Tensor) else current.strides
        return entry.dtype, entry.shape, _permutation(entry), strides, self.content(entry)


def _permutation(entry: TensorEntry | ShardedTensorEntry) -> tuple[int, ...] | None:
    return entry.permutation if isinstance(entry, TensorEntry) else None


def _whole_view(value: Any, entry: TensorEntry | ShardedTensorEntry) -> PlacedView:
    view = target_view(value, _permutation(entry))
    return PlacedView(whole(view.memory_shape), view)


def _can_convert_in_place(current: Any) -> bool:
    # torch quantizes into memory that raw bytes could not be scattered into
    return can_write_in_place(current) or (isinstance(current, torch.Tensor) and current.is_quantized)
