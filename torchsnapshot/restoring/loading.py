"""What is asked of an application's objects: their states, whose tensor is whose, which names they would refuse; and
``load_state_dict``, with what torch's own ones get wrong for us.

What doesn't live here: how the state was brought back (``restore``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchsnapshot.errors import PartialRestoreError
from torchsnapshot.format.entries import ShardedTensorEntry, TensorEntry, unescape
from torchsnapshot.restoring.parts import AllocateTensor
from torchsnapshot.state.app_state import random_state_kept
from torchsnapshot.state.dtypes import torch_dtype
from torchsnapshot.state.sharded import allocate_like, is_dtensor
from torchsnapshot.stateful import HasParameters, Stateful
from torchsnapshot.stats import Stats

ParameterOf = Callable[[str], Any]
"""The parameter that the tensor at a path belongs to; None where it belongs to none."""


def parameter_finder(stateful: Stateful, path: str) -> ParameterOf:
    """What says to which parameter a tensor belongs: optimizers, and objects with ``parameter_of``, know that.

    Args:
        stateful: the object that is restored.
        path: of its key.
    """
    start = len(path) + 1
    if isinstance(stateful, torch.optim.Optimizer):
        parameters = [parameter for group in stateful.param_groups for parameter in group["params"]]

        def of_number(where: str) -> Any:
            kind, _, rest = where[start:].partition("/")
            number = rest.partition("/")[0]
            is_known = kind == "state" and number.isdecimal() and int(number) < len(parameters)
            return parameters[int(number)] if is_known else None

        return of_number
    if isinstance(stateful, HasParameters):
        return lambda where: stateful.parameter_of([unescape(each) for each in where[start:].split("/")])
    return lambda where: None


def allocator(stateful: Stateful, path: str) -> AllocateTensor:
    """What makes the target of a tensor that the object does not have yet.

    An optimizer that has not stepped has no state; what belongs to a parameter is spread like the parameter. For
    anything else nothing can be made: the function returns None. It does so for plain tensors that become plain
    tensors, too, which need nobody to say how.

    Args:
        stateful: the object that is restored.
        path: of its key.
    """
    parameter_of = parameter_finder(stateful, path)

    def allocate(where: str, entry: TensorEntry | ShardedTensorEntry) -> Any:
        parameter = parameter_of(where)
        if parameter is None or tuple(parameter.shape) != entry.shape:
            return None
        if is_dtensor(parameter):
            return allocate_like(parameter, entry.dtype)
        if isinstance(entry, TensorEntry):
            return None
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=parameter.device)

    return allocate


def allocator_for(stateful: Stateful, path: str, world_size: int) -> AllocateTensor | None:
    """The ``allocator`` of an object that says how its tensors are spread; None where any tensor can be had whole."""
    knows = isinstance(stateful, (torch.optim.Optimizer, HasParameters))
    return allocator(stateful, path) if knows or world_size > 1 else None


def read_states(statefuls: Mapping[str, Stateful], stats: Stats) -> dict[str, Any]:
    """Ask every object for its state."""
    with stats.phase("state_dict"), random_state_kept(statefuls):
        return {key: stateful.state_dict() for key, stateful in statefuls.items()}


def load(key: str, stateful: Stateful, state: Any, strict: bool, *, has_written: bool) -> None:
    """Hand the state to its object.

    Args:
        key: where the object stands in the application's state, for messages.
        stateful: the object.
        state: what was restored, tensors of the object itself where they could be written in place.
        strict: for modules.
        has_written: something of the target is another by now.

    Raises:
        PartialRestoreError: the object refused it.
    """
    try:
        if isinstance(stateful, torch.nn.Module):
            load_module(stateful, state, strict)
        else:
            stateful.load_state_dict(state)
        if isinstance(stateful, torch.optim.Optimizer):
            put_back_casts(stateful, state)
    except Exception as error:
        what = (
            "after tensors had been written: the target is now a mix of old and new values"
            if has_written
            else "and may have taken in a part of the state; nothing else had been written"
        )
        raise PartialRestoreError(
            f"{key}: {type(stateful).__name__}.load_state_dict failed, {what}. {type(error).__name__}: {error}"
        ) from error


def load_module(module: torch.nn.Module, state: Any, strict: bool) -> None:
    """``module.load_state_dict``, also where parameters or buffers are on the meta device."""
    # a module's own load_state_dict may know neither of these arguments
    options = {} if strict else {"strict": False}
    if not any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        module.load_state_dict(state, **options)
    else:
        # what is on the meta device has no memory to copy into
        module.load_state_dict(_to_assign(module, state), assign=True, **options)


def names_refused(module: torch.nn.Module, own: Collection[str], stored: Collection[str]) -> str:
    """What ``module.load_state_dict`` with ``strict=True`` would have against a state; "" for nothing.

    Only what is sure: modules that read or write a state in their own way are asked when everything has been read.

    Args:
        module: the module.
        own: the names in its state.
        stored: the names in the other one.
    """
    empty: list[str] = []
    for name, each in module.named_modules(remove_duplicate=False):
        if not _reads_like_torch(each):
            return ""
        below = f"{name}." if name else ""
        empty += [f"{below}{child}." for child, inner in each._modules.items() if inner is None]
    missing = [name for name in own if name not in stored and not name.endswith("num_batches_tracked")]
    # whatever was stored of a child that has been taken out is passed over
    unexpected = [name for name in stored if name not in own and not any(map(name.startswith, empty))]
    # as torch says it, which people know
    told = {"Missing key(s) in state_dict": missing, "Unexpected key(s) in state_dict": unexpected}
    wrong = {what: [name for name in names if not name.endswith("_extra_state")] for what, names in told.items()}
    return "; ".join(f"{what}: {', '.join(map(repr, sorted(names)))}" for what, names in wrong.items() if names)


_STATE_METHODS = ("state_dict", "_save_to_state_dict", "load_state_dict", "_load_from_state_dict")


def _reads_like_torch(module: torch.nn.Module) -> bool:
    """Whether a module's names in a state are those of its parameters and buffers, and neither more nor less do."""
    plain, norm = torch.nn.Module, torch.nn.modules.batchnorm._NormBase
    if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks or module._state_dict_hooks:
        return False
    for name in _STATE_METHODS:
        # the norms read states of before they counted batches
        method, known = getattr(type(module), name), (getattr(plain, name), getattr(norm, name))
        if name in vars(module) or all(method is not each for each in known):
            return False
    return True


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


def put_back_casts(optimizer: torch.optim.Optimizer, state: Any) -> None:
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
