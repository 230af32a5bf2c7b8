"""States of any make, and the same states a step later, for hypothesis."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Dense tensors of any dtype and layout, small and large."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 40]), max_size=3))
    tensor = torch.randint(0, 2, shape).to(dtype)
    how = draw(st.sampled_from(["own", "transposed", "strided", "parameter", "conjugated", "expanded", "inside"]))
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1)
    if how == "strided" and tensor.dim():
        return tensor[::2]
    if how == "inside" and tensor.dim():
        return tensor[1:]
    if how == "parameter" and dtype in (torch.float32, torch.bfloat16):
        return torch.nn.Parameter(tensor)
    if how == "conjugated" and dtype.is_complex:
        return tensor.conj()
    if how == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


keys = st.one_of(st.text("ab/%", max_size=3), st.integers(0, 3), st.booleans())
plain = st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=300), st.none())


def with_attributes(items: dict[str, Any]) -> OrderedDict[str, Any]:
    """An OrderedDict like that of a module's ``state_dict``."""
    state = OrderedDict(items)
    state._metadata = {name: {"version": 1} for name in items}  # type: ignore[attr-defined]
    return state


states = st.recursive(
    st.one_of(tensors(), plain),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=4),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("ab", max_size=2), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text("ab", max_size=2), inner, max_size=3).map(with_attributes),
        st.dictionaries(st.text("ab", max_size=2), inner, max_size=2).map(lambda items: defaultdict(list, items)),
    ),
    max_leaves=12,
)


def stepped(value: Any) -> Any:
    """The same structure with other content."""
    if isinstance(value, torch.Tensor):
        if value.is_conj():
            return (value.conj() + 1).conj()
        other = copy.deepcopy(value.detach())
        if other.numel() and value.stride() == other.stride():
            other = other.logical_not() if value.dtype is torch.bool else other + 1
        result = other if value.stride() == other.stride() else value
        return torch.nn.Parameter(result) if isinstance(value, torch.nn.Parameter) else result
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update((key, stepped(child)) for key, child in value.items())
        return changed
    if isinstance(value, (list, tuple)):
        return type(value)(map(stepped, value))
    return value
