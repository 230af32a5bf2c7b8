"""A snapshot of a module inside ``DistributedDataParallel``, restored into one outside of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from torchsnapshot.restoring.loading import load_module

DDP_STATE_DICT_PREFIX = "module."


class DistributedDataParallelAdapter:
    """Stands for ``module`` in an ``app_state`` when the snapshot was taken of that module inside of DDP.

    On loading, the ``module.`` that DDP puts before every name is taken off where the module itself doesn't have the
    name; so a snapshot that was taken without DDP loads as well.

    Args:
        module: a module, inside of DDP or not.
    """

    def __init__(self, module: Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """The module's own state."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load what ``state_dict`` holds into the module; the mapping itself is left as it is.

        Args:
            state_dict: names with or without ``module.`` before them.
            strict: whether the names must be exactly the module's.

        Raises:
            RuntimeError: they are not.
        """
        own = self.module.state_dict().keys()
        renamed: OrderedDict[str, Any] = OrderedDict()
        for name, value in state_dict.items():
            renamed[name if name in own else name.removeprefix(DDP_STATE_DICT_PREFIX)] = value
        versions = getattr(state_dict, "_metadata", None)
        if versions is not None:
            # torch keeps the version of each submodule's state beside the state, under the same names
            bare = {
                (path + ".").removeprefix(DDP_STATE_DICT_PREFIX)[:-1]: version for path, version in versions.items()
            }
            renamed._metadata = bare if renamed.keys() != state_dict.keys() else versions  # type: ignore[attr-defined]
        load_module(self.module, renamed, strict)
