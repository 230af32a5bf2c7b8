"""The ``torchsnapshot`` 0.1.0 that is on PyPI. It does not make its files durable."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from benchmarks.states import State


class OldTorchsnapshot:
    """A folder with a file per tensor or slab."""

    def __init__(self, state: State) -> None:
        self._state = state
        library = importlib.import_module("torchsnapshot")
        if "storage_plugin" not in dir(importlib.import_module("torchsnapshot.snapshot")) and hasattr(library, "Stats"):
            raise ImportError("this environment has the new torchsnapshot, not the old one")
        self._snapshot = library.Snapshot

    def save(self, folder: Path) -> None:
        """See ``Contender.save``."""
        self._snapshot.take(str(folder), self._state.app_state)

    def load(self, folder: Path) -> None:
        """See ``Contender.load``."""
        self._snapshot(str(folder)).restore(self._state.app_state)

    def begin(self, folder: Path) -> Callable[[], None]:
        """See ``Contender.begin``."""
        pending = self._snapshot.async_take(str(folder), self._state.app_state)
        return lambda: pending.wait()


def make(state: State) -> OldTorchsnapshot:
    """The contender for ``state``."""
    return OldTorchsnapshot(state)
