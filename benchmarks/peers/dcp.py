"""``torch.distributed.checkpoint``, for one process: ``save``, which makes its files durable, ``load``, ``async_save``.

In the background it is run twice: as it comes, and as ``dcp_kept`` with a stager that lives on and reuses its memory,
which is the fastest that it has without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.states import State


class Dcp:
    """A folder of ``.distcp`` files."""

    def __init__(self, state: State, stager: Any = None) -> None:
        self._state = state
        self._stager = stager

    def save(self, folder: Path) -> None:
        """See ``Contender.save``."""
        save(self._state.nested(), checkpoint_id=folder, no_dist=True)

    def load(self, folder: Path) -> None:
        """See ``Contender.load``."""
        load(self._state.nested(), checkpoint_id=folder, no_dist=True)

    def begin(self, folder: Path) -> Callable[[], None]:
        """See ``Contender.begin``."""
        begun: Any = async_save(self._state.nested(), checkpoint_id=folder, no_dist=True, async_stager=self._stager)
        if hasattr(begun, "staging_completion"):
            begun.staging_completion.result()
            begun = begun.upload_completion
        return lambda: begun.result()


def make(state: State) -> Dcp:
    """The contender for ``state``."""
    return Dcp(state)
