"""``torch.save``; ``torch.load`` with ``mmap=True`` and a copy into the state's tensors, which is its fastest way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.states import State


class TorchFile:
    """One file with everything."""

    def __init__(self, state: State) -> None:
        self._state = state

    def save(self, folder: Path) -> None:
        """See ``Contender.save``."""
        torch.save(self._state.nested(), folder / "state.pt")

    def load(self, folder: Path) -> None:
        """See ``Contender.load``."""
        loaded = torch.load(folder / "state.pt", mmap=True, weights_only=True)
        mine = self._state.flat()
        for name, tensor in loaded["model"].items():
            mine[f"model.{name}"].copy_(tensor)
        for index, values in loaded["optim"]["state"].items():
            for name, tensor in values.items():
                mine[f"optim.{index}.{name}"].copy_(tensor)

    def begin(self, folder: Path) -> Callable[[], None]:
        """See ``Contender.begin``."""
        raise NotImplementedError("torch.save has no background")


def make(state: State) -> TorchFile:
    """The contender for ``state``."""
    return TorchFile(state)
