"""What a restore is asked to do, checked when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from torchsnapshot.restoring.elastic import MissingRank, check_missing_rank


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What ``Snapshot.restore`` was asked to do beyond the state itself."""

    strict: bool = True
    paths: Sequence[str] | None = None
    rename: Callable[[str], str] | None = None
    allow_pickle: bool = False
    device: torch.device | str | None = None
    missing_rank: MissingRank | None = None
    rank: int = 0
    world_size: int = 1
    global_ranks: tuple[int, ...] = (0,)
    """For each reading rank its global rank: tensors that are spread speak of these."""

    def __post_init__(self) -> None:
        check_missing_rank(self.missing_rank)
        check_allow_pickle(self.allow_pickle)
        check_device(self.device)


def check_allow_pickle(allow_pickle: object) -> None:
    """Raise ``TypeError`` for what is no bool: ``allow_pickle="no"`` would allow it."""
    if not isinstance(allow_pickle, bool):
        raise TypeError(f"allow_pickle must be True, False or None, not {allow_pickle!r}")


def check_device(device: torch.device | str | None) -> None:
    """Raise ``ValueError`` for a device that torch cannot use here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # an AssertionError is what torch raises for a backend that it was built without
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}") from error
    if device is not None and torch.device(device).type == "meta":
        raise ValueError("device='meta' cannot be used: there is no memory on it to restore into")
