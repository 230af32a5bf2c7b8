"""See ``torchsnapshot.adapters.fsdp``."""

from __future__ import annotations

from torchsnapshot.adapters.fsdp import FSDPOptimizerAdapter

__all__ = ["FSDPOptimizerAdapter"]
