"""The state of a model and its optimizer under names that are the same however the model is spread, wrapped or cut.

An optimizer's own ``state_dict`` numbers its parameters, anew on every stage of a pipeline, so that the same number is
another parameter on another rank. Here every tensor has the parameter's name in the whole model, without what wrappers
add to it. So a job may be resumed with another number of ranks or stages, with other meshes, and without wrappers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as names_of_torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from torchsnapshot.restoring.loading import load_module, put_back_casts

logger = logging.getLogger(__name__)

_STATE = "state"
_GROUP = "group"

_torch: Any = names_of_torch


class ModelState:
    """Stands for a model and its optimizer in an ``app_state``: ``{"train": ModelState(model, optimizer)}``.

    The way to take snapshots under FSDP2, tensor parallelism and pipeline parallelism; it is good for any other model,
    too. With pipeline parallelism every rank gives its own stage, whose submodules must have the names that they have
    in the whole model. Restoring needs no optimizer that has stepped: its state is made like the parameters that it
    belongs to. One that has not stepped is stored as such, where torch's ``get_optimizer_state_dict`` would step it.

    Args:
        model: plain, or in ``DistributedDataParallel``, FSDP2, ``torch.compile``, activation checkpointing.
        optimizer: of parameters of that model; None for the model alone.

    Raises:
        TypeError: the model is in ``FullyShardedDataParallel``; give the module itself, and ``FSDPOptimizerAdapter``.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise TypeError(
                "ModelState does not know FullyShardedDataParallel, which flattens parameters: put the module itself "
                "and tricks.fsdp.FSDPOptimizerAdapter(module, optimizer) into the app_state, or use fully_shard (FSDP2)"
            )
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optim": {name: {"state": {...}, "group": {...}}}}``, of live tensors.

        Raises:
            ValueError: the model is on the meta device, and has an optimizer.
        """
        if self.optimizer is not None and any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError(
                "ModelState: the model is on the meta device, and its optimizer holds the parameters that a restore "
                "would replace: call model.to_empty(device=…) first"
            )
        state: dict[str, Any] = {"model": get_model_state_dict(self.model)}
        if self.optimizer is not None:
            state["optim"] = {
                name: {
                    _GROUP: {key: value for key, value in group.items() if key != "params"},
                    _STATE: dict(self.optimizer.state.get(parameter, {})),
                }
                for name, parameter, group in self._parameters(self.optimizer)
            }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, here or on other ranks; the mapping itself is left as it is.

        Raises:
            RuntimeError: names of the model are missing, or there are others.
        """
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in self.model.state_dict().values()):
            self._load_meta_model(state_dict["model"])
        else:
            set_model_state_dict(self.model, dict(state_dict["model"]), options=StateDictOptions(strict=True))
        if self.optimizer is not None:
            self._load_optimizer(self.optimizer, state_dict.get("optim", {}))

    def _load_meta_model(self, saved: Mapping[str, Any]) -> None:
        """Load a model that has no memory yet: torch's function would change nothing, and say nothing."""
        own = {fqn: name for name in self.model.state_dict() for fqn in _torch._get_fqns(self.model, name)}
        load_module(self.model, {own.get(fqn, fqn): value for fqn, value in saved.items()}, strict=True)

    def parameter_of(self, components: Sequence[str]) -> torch.Tensor | None:
        """The parameter like which a tensor of the optimizer's state is spread.

        Args:
            components: of the tensor's path below this object's key.
        """
        if self.optimizer is None or len(components) < 4 or (components[0], components[2]) != ("optim", _STATE):
            return None
        found = {name: parameter for name, parameter, _ in self._parameters(self.optimizer)}
        return found.get(components[1])

    def _parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor, dict[str, Any]]]:
        """The optimizer's parameters in its order, each with its name and its group."""
        names: dict[torch.Tensor, str] = {}
        for name, parameter in self.model.named_parameters():
            (names[parameter],) = _torch._get_fqns(self.model, name)
        found = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError("ModelState: the optimizer has a parameter that is not the model's")
                found.append((names[parameter], parameter, group))
        return found

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        parameters = self._parameters(optimizer)
        lost = [name for name, _, _ in parameters if name not in saved]
        if lost:
            logger.warning(
                "the snapshot has nothing of the optimizer for %s and %d more parameters: they begin anew with the "
                "settings that they have",
                lost[0],
                len(lost) - 1,
            )
        # in the optimizer's own form, for its own rules and hooks
        numbers = {parameter: number for number, (_, parameter, _) in enumerate(parameters)}
        groups = []
        for group in optimizer.param_groups:
            own = [name for name, parameter, _ in parameters if any(parameter is each for each in group["params"])]
            settings: Mapping[str, Any] = next((saved[name][_GROUP] for name in own if name in saved), {})
            merged = {key: value for key, value in group.items() if key != "params"} | dict(settings)
            groups.append({**merged, "params": [numbers[parameter] for parameter in group["params"]]})
        states = {
            numbers[parameter]: dict(saved[name][_STATE])
            for name, parameter, _ in parameters
            if name in saved and saved[name][_STATE]
        }
        state = {"state": states, "param_groups": groups}
        optimizer.load_state_dict(state)
        put_back_casts(optimizer, state)
