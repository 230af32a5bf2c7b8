"""What the pipeline carries, and in which order.

What doesn't live here: the jobs themselves (``taking``, ``reading``, ``ranks``), who carries them (``run``).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from torchsnapshot.engine.buffers import Buffer


class Mode(Enum):
    """In which order a run's workers take steps; see ``pipeline``."""

    THROUGH = "through"
    STAGE_FIRST = "stage_first"


class Job(Protocol):
    """One piece of work. Both steps run on worker threads; a job's ``stage`` returns before its ``finish`` begins."""

    @property
    def nbytes(self) -> int:
        """Bytes of buffer that the job needs from the beginning of ``stage`` to the end of ``finish``; 0 = none."""
        ...

    def stage(self, buffer: Buffer | None) -> bool | Sequence[Job]:
        """Do the part after which the source may change.

        Returns:
            True: ``finish`` is to follow. False: the job is done, its buffer is free at once. Jobs: it is done, and
            these take its place; the source may change when they are staged too.
        """
        ...

    def finish(self, buffer: Buffer | None) -> None:
        """Do the rest."""
        ...
