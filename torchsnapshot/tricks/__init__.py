"""The old torchsnapshot's name for ``adapters``; each module is imported on its own, as is ``ModelState``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchsnapshot.adapters.model_state import ModelState

__all__ = ["ModelState"]


def __getattr__(name: str) -> Any:
    # on first use: it imports much of torch.distributed
    if name == "ModelState":
        return importlib.import_module("torchsnapshot.adapters.model_state").ModelState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
