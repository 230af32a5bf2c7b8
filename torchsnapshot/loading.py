"""Handing a restored state to its object: ``load_state_dict``, and what torch's own ones get wrong for us.

What doesn't live here: how the state was brought back (``restore``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchsnapshot.entries import ShardedTensorEntry
from torchsnapshot.errors import PartialRestoreError
from torchsnapshot.sharded import allocate_like, is_dtensor
from torchsnapshot.stateful import Stateful


def allocator(stateful: Stateful, path: str) -> Callable[[str, ShardedTensorEntry], Any]:
    """What makes the target of a sharded tensor that the object does not have yet.

    An optimizer that has not stepped has no state; what belongs to a parameter is spread like the parameter. For any
    other object nothing can be made: the function returns None.

    Args:
        stateful: the object that is restored.
        path: of its key.
    """
    parameters: list[Any] = []
    if isinstance(stateful, torch.optim.Optimizer):
        parameters = [parameter for group in stateful.param_groups for parameter in group["params"]]

    def allocate(where: str, entry: ShardedTensorEntry) -> Any:
        kind, _, rest = where[len(path) + 1 :].partition("/")
        number = rest.partition("/")[0]
        if kind != "state" or not number.isdecimal() or int(number) >= len(parameters):
            return None
        parameter = parameters[int(number)]
        if not is_dtensor(parameter) or tuple(parameter.shape) != entry.shape:
            return None
        return allocate_like(parameter, entry.dtype)

    return allocate


def load(key: str, stateful: Stateful, state: Any, strict: bool) -> None:
    """Hand the state to its object.

    Args:
        key: where the object stands in the application's state, for messages.
        stateful: the object.
        state: what was restored, tensors of the object itself where they could be written in place.
        strict: for modules.

    Raises:
        PartialRestoreError: the object refused it; its tensors have been written by then.
    """
    try:
        if isinstance(stateful, torch.nn.Module):
            _load_module(stateful, state, strict)
        else:
            stateful.load_state_dict(state)
        if isinstance(stateful, torch.optim.Optimizer):
            _put_back_casts(stateful, state)
    except Exception as error:
        raise PartialRestoreError(
            f"{key}: {type(stateful).__name__}.load_state_dict failed, after tensors had been written: the target is "
            f"now a mix of old and new values. {type(error).__name__}: {error}"
        ) from error


def _load_module(module: torch.nn.Module, state: Any, strict: bool) -> None:
    # a module's own load_state_dict may know neither of these arguments
    options = {} if strict else {"strict": False}
    if not any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        module.load_state_dict(state, **options)
    else:
        # what is on the meta device has no memory to copy into
        module.load_state_dict(_to_assign(module, state), assign=True, **options)


def _to_assign(module: torch.nn.Module, state: Any) -> Any:
    """The state with one tensor for each of the module's: ``assign`` would untie, and replace those with memory."""
    owners = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
    assigned = copy.copy(state)
    made: dict[torch.Tensor, torch.Tensor] = {}
    for name, owner in owners.items():
        value = state.get(name)
        if not isinstance(value, torch.Tensor) or is_lazy(owner):
            continue
        if owner.is_meta:
            is_bare = isinstance(owner, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter)
            # of tied tensors the last one counts, as where they have memory
            made[owner] = torch.nn.Parameter(value, owner.requires_grad) if is_bare else value
        else:
            if value.data_ptr() != owner.data_ptr():
                with torch.no_grad():
                    owner.copy_(value)
            made[owner] = owner
    for name, owner in owners.items():
        if owner in made and name in assigned:
            assigned[name] = made[owner]
    return assigned


def _put_back_casts(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Put back what ``Optimizer.load_state_dict`` casts to its parameter's dtype: fp32 state of bf16 parameters."""
    if not isinstance(state, Mapping) or not {"param_groups", "state"} <= state.keys():
        return  # an optimizer with a format of its own
    for saved_group, group in zip(state["param_groups"], optimizer.param_groups, strict=False):
        for saved, parameter in zip(saved_group["params"], group["params"], strict=False):
            current = optimizer.state.get(parameter, {})
            for name, value in state["state"].get(saved, {}).items():
                if name in current:
                    current[name] = _uncast(value, current[name])


def _uncast(value: Any, cast: Any) -> Any:
    """``cast`` with every tensor in the dtype that it has in ``value``."""
    if isinstance(value, torch.Tensor) and isinstance(cast, torch.Tensor):
        return cast if cast.dtype == value.dtype else value.to(cast.device)
    if isinstance(value, dict) and isinstance(cast, dict):
        return {name: _uncast(value[name], item) if name in value else item for name, item in cast.items()}
    if isinstance(value, (list, tuple)) and type(value) is type(cast) and len(value) == len(cast):
        return type(cast)(map(_uncast, value, cast))
    return cast
