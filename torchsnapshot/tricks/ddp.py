"""See ``torchsnapshot.adapters.ddp``."""

from __future__ import annotations

from torchsnapshot.adapters.ddp import DDP_STATE_DICT_PREFIX, DistributedDataParallelAdapter

__all__ = ["DDP_STATE_DICT_PREFIX", "DistributedDataParallelAdapter"]
