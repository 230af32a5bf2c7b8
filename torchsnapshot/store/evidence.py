"""What a take reads before it trusts anything: the condemned sets, and the sweeps around them.

What lives here: step 2 of a take. What doesn't: the lease that comes before it (``leases``), the index (``known``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torchsnapshot.errors import KeyAbsentError, SnapshotError
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.parallel import parallel
from torchsnapshot.store.records import DAMAGED_FOLDER, PENDING_FOLDER, SWEEPS_FOLDER, DamagedSet, PendingSet
from torchsnapshot.store.repository import Repository

logger = logging.getLogger(__name__)

_MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a take read after its lease: what it may not reuse, and the sweeps that had finished by then.

    ``usable`` is False where a condemned set could not be read: then nothing may be reused. ``sets`` are the objects
    that were read, so that other ranks can read exactly these (``read_condemned``).
    """

    sweeps: frozenset[str]
    condemned: frozenset[str]
    usable: bool = True
    sets: tuple[str, ...] = ()


def read_condemned(repository: Repository, sets: Iterable[str]) -> frozenset[str]:
    """The keys of all these pending and damaged sets.

    Raises:
        KeyAbsentError: one of them has gone: whoever listed them must list again.
        SnapshotError: one of them is unreadable: nothing may be reused.
    """

    def read(key: str) -> frozenset[str]:
        data = repository.backend.read(key)
        return DamagedSet.unpack(data).keys if key.startswith(DAMAGED_FOLDER) else PendingSet.unpack(data).keys

    return frozenset().union(*parallel(read, sets, repository.backend.concurrency))


def read_evidence(repository: Repository) -> Evidence:
    """Step 2 of a take: every condemned set, and the sweeps before and after these. Only after the take's lease.

    The sweeps after the sets, so that no set goes unseen without its marker being seen. The same sweeps before them, so
    that the index may be tagged with these: a marker that came between may stand for a set that came between, too, and
    that set was read by nobody.
    """
    backend = repository.backend
    sets: tuple[str, ...] = ()
    for _ in range(_MAX_ROUNDS):
        sweeps = _sweeps(backend)
        sets = tuple(sorted(info.key for folder in (PENDING_FOLDER, DAMAGED_FOLDER) for info in backend.list(folder)))
        try:
            condemned = read_condemned(repository, sets)
        except KeyAbsentError:
            continue  # a collector has finished meanwhile
        except SnapshotError as error:
            logger.warning("a condemned set in %s is unreadable, this take reuses nothing: %s", repository.url, error)
            return Evidence(frozenset(), frozenset(), False, sets)
        if _sweeps(backend) == sweeps:
            return Evidence(sweeps, condemned, True, sets)
    logger.warning("the condemned sets in %s change all the time, this take reuses nothing", repository.url)
    return Evidence(frozenset(), frozenset(), False, sets)


def _sweeps(backend: Backend) -> frozenset[str]:
    return frozenset(info.key.rpartition("/")[2] for info in backend.list(SWEEPS_FOLDER))
