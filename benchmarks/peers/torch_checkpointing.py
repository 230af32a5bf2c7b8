"""Meta's ``torch_checkpointing``. It does not make its files durable.

``use_direct_io`` is off: from ordinary memory its writes past the page cache fail (0.1.1: EINVAL).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.states import State


class TorchCheckpointing:
    """A folder with a ``torch.save`` archive per item, written by a process of its own when in the background."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._library = importlib.import_module("torch_checkpointing")
        self._config = importlib.import_module("torch_checkpointing.config")
        self._storage = importlib.import_module("torch_checkpointing.storage.filesystem")
        self._managers: dict[str, Any] = {}

    def _manager(self, config: str) -> Any:
        if config not in self._managers:
            self._managers[config] = self._library.CheckpointManager.Config(
                save=getattr(self._config, config)(),
                storage_config=self._storage.LocalFileSystemStorageConfig(use_direct_io=False),
            ).build()
        return self._managers[config]

    def save(self, folder: Path) -> None:
        """See ``Contender.save``."""
        self._manager("SyncCheckpointSaverConfig").save(str(folder / "snapshot"), self._state.nested())

    def load(self, folder: Path) -> None:
        """See ``Contender.load``."""
        self._manager("SyncCheckpointSaverConfig").load(str(folder / "snapshot"), into=self._state.nested())

    def begin(self, folder: Path) -> Callable[[], None]:
        """See ``Contender.begin``. The state may change once its staging lets go of the lock."""
        manager = self._manager("AsyncCheckpointSaverConfig")
        written = manager.save(str(folder / "snapshot"), self._state.nested())
        with manager.lock():
            pass
        return lambda: written.result()


def make(state: State) -> TorchCheckpointing:
    """The contender for ``state``."""
    return TorchCheckpointing(state)
