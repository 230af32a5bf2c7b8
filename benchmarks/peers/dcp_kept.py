"""``torch.distributed.checkpoint`` with a stager that is kept from save to save; see ``dcp``."""

from __future__ import annotations

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.peers.dcp import Dcp
from benchmarks.states import State


def make(state: State) -> Dcp:
    """The contender for ``state``."""
    # what the other options offer needs a GPU
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return Dcp(state, DefaultStager(options))
