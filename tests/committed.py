"""Small states, and what every test of trouble asks at its end: does a snapshot still hold exactly what was taken?"""

from __future__ import annotations

from typing import Any

import torch
from folders import new_process
from memory_states import same

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.store.backend import StorageOptions

CHUNK_NBYTES = 64 << 10
"""For tests whose states should have several chunks and yet be small."""

NUMEL = CHUNK_NBYTES // 4
"""float32 elements in one chunk."""


def state_of(number: int) -> dict[str, Any]:
    """A state for each number: a part that all share, large and small tensors, values of all sizes."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number + 1)
    return {
        "frozen": torch.rand(2 * NUMEL, generator=shared),
        "large": torch.rand(3 * NUMEL, generator=own),
        "smooth": torch.arange(2 * NUMEL, dtype=torch.float32) + number,
        "small": [torch.rand(1000, generator=own) for _ in range(4)],
        "tiny": torch.tensor([number]),
        "text": f"{number} " * 20_000,
        "step": number,
    }


def take(path: object, number: int, **options: Any) -> Snapshot:
    """Take a snapshot of ``state_of(number)``."""
    return Snapshot.take(str(path), {"app": StateDict(**state_of(number))}, **options)


def restored(path: object, storage_options: StorageOptions | None = None) -> dict[str, Any]:
    """What a snapshot holds, restored into nothing."""
    target = StateDict()
    Snapshot(str(path), storage_options=storage_options).restore({"app": target})
    return target.data


def assert_holds(path: object, number: int, storage_options: StorageOptions | None = None) -> None:
    """A new process restores exactly ``state_of(number)``, and finds nothing wrong with the stored bytes."""
    new_process()
    assert same(restored(path, storage_options), state_of(number)), f"{path} is not what was taken"
    assert Snapshot(str(path), storage_options=storage_options).verify() == []
