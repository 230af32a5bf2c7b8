"""Snapshots of PyTorch training jobs that cost what changed.

    from torchsnapshot import Snapshot

    Snapshot.take("/checkpoints/run/step_100", {"model": model, "optim": optimizer})
    Snapshot("/checkpoints/run/step_100").restore({"model": model, "optim": optimizer})

See ``docs/design.md`` for how it works and ``torchsnapshot --help`` for the command line.
"""

import warnings

with warnings.catch_warnings():
    # numpy is optional here; torch's remark that it isn't there would greet every user of the command line
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from torchsnapshot import errors
from torchsnapshot.errors import SnapshotError
from torchsnapshot.maintenance import collect, retain
from torchsnapshot.snapshot import PendingSnapshot, Snapshot
from torchsnapshot.stateful import RNGState, StateDict, Stateful
from torchsnapshot.stats import Stats
from torchsnapshot.version import __version__

__all__ = [
    "PendingSnapshot",
    "RNGState",
    "Snapshot",
    "SnapshotError",
    "StateDict",
    "Stateful",
    "Stats",
    "__version__",
    "collect",
    "errors",
    "retain",
]
