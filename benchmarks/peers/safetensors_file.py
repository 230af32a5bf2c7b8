"""``safetensors.torch``: ``save_file``, and ``load_file`` with a copy into the state's tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from benchmarks.states import State


class SafetensorsFile:
    """One file with every tensor; the optimizer's settings are left out, which is in its favour."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._library = importlib.import_module("safetensors.torch")

    def save(self, folder: Path) -> None:
        """See ``Contender.save``."""
        self._library.save_file(self._state.flat(), folder / "state.safetensors")

    def load(self, folder: Path) -> None:
        """See ``Contender.load``."""
        mine = self._state.flat()
        for name, tensor in self._library.load_file(folder / "state.safetensors").items():
            mine[name].copy_(tensor)

    def begin(self, folder: Path) -> Callable[[], None]:
        """See ``Contender.begin``."""
        raise NotImplementedError("safetensors has no background")


def make(state: State) -> SafetensorsFile:
    """The contender for ``state``."""
    return SafetensorsFile(state)
