"""The state of an optimizer whose parameters ``FullyShardedDataParallel`` has flattened and spread."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer


class FSDPOptimizerAdapter:
    """Stands for ``optimizer`` in an ``app_state``: its state is keyed by parameter names, as the module's own is.

    What kind of state it is (full or sharded) follows from the module's ``FullyShardedDataParallel.state_dict_type``.

    Args:
        module: the FSDP module.
        optimizer: an optimizer of its parameters.
    """

    def __init__(self, module: FullyShardedDataParallel, optimizer: Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state under the names of the unflattened parameters."""
        return FullyShardedDataParallel.optim_state_dict(self.module, self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, also under another number of ranks."""
        # by keyword: torch has changed the order of these arguments
        flattened = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.module, optim=self.optimizer, optim_state_dict=state_dict
        )
        self.optimizer.load_state_dict(flattened)
