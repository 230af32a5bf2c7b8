"""What became of a take whose coordinating rank can no longer be heard: the store says.

What lives here: the wait of a rank that has reported that its blobs are durable and has heard nothing since. What
doesn't: hearing (``coordination.sessions``), the commit itself (``store.commit``), when one has to look
(``group_take``).

A take is committed by its ``.ok`` and ended when its lease is gone; nothing is committed afterwards. So a rank looks
for both until one of them decides. A lease of a process that is no more stays behind: it counts as gone once that
process is known to be gone, or once nobody has renewed it for several heartbeats.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torchsnapshot.errors import KeyAbsentError, SnapshotError
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.clock import SYSTEM_CLOCK, Clock
from torchsnapshot.store.leases import HEARTBEAT_SECONDS
from torchsnapshot.store.processes import Process, is_gone
from torchsnapshot.store.records import LEASES_FOLDER, Lease
from torchsnapshot.store.repository import Repository

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How long to wait between two looks."""

SILENCE_SECONDS = 5 * HEARTBEAT_SECONDS
"""A lease that nobody renewed for so long, while it was watched, is not waited for."""


@dataclass(slots=True)
class _LeaseWatch:
    """One lease, looked at again and again."""

    backend: Backend
    take_id: str
    clock: Clock
    holder: Process | None = None
    modified: float | None = None
    since: float = 0.0
    """When its time was seen to change last, monotonic."""

    def is_over(self) -> bool:
        """Whether the take can no longer be expected to commit anything.

        Raises:
            SnapshotError: the store gave no clear answer.
        """
        key = f"{LEASES_FOLDER}/{self.take_id}"
        try:
            modified = self.backend.stat(key).modified
            if self.holder is None:
                self.holder = Lease.unpack(self.backend.read(key)).process
        except KeyAbsentError:
            return True
        if modified != self.modified:
            self.modified, self.since = modified, self.clock.monotonic()
        return is_gone(self.holder) or self.clock.monotonic() - self.since > SILENCE_SECONDS


def wait_for_verdict(repository: Repository, name: str, take_id: str, clock: Clock = SYSTEM_CLOCK) -> bool:
    """Wait until it is clear whether a take was committed, or no more is to be expected.

    Args:
        repository: the take's.
        name: the snapshot's folder below ROOT.
        take_id: the take's.
        clock: monotonic, and sleeps.

    Returns:
        True: it is committed. False: it was not when the wait was over, and if the process that coordinated it lives
        without being able to renew its lease, nobody can say.
    """
    lease = _LeaseWatch(repository.backend, take_id, clock)
    answered = clock.monotonic()
    while True:
        try:
            is_over = lease.is_over()
            # after the lease was seen to be gone nothing is committed any more, so this look is the last word
            if _is_committed(repository, name, take_id):
                return True
            answered = clock.monotonic()
        except SnapshotError as error:
            logger.info("no clear answer whether the take %s is committed, asking again: %s", take_id, error)
            is_over = clock.monotonic() - answered > SILENCE_SECONDS
        if is_over:
            return False
        clock.sleep(LOOK_SECONDS)


def _is_committed(repository: Repository, name: str, take_id: str) -> bool:
    return any(ref.committed and ref.manifest.take_id == take_id for ref in repository.manifests_of(name))
