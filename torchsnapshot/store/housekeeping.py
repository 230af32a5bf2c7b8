"""What a collector does besides sweeping: calling leases dead, taking over from dead collectors, throwing away debris.

What lives here: each of these as one function on the store. What doesn't: their order (``gc``).

Invariant: a pending set goes only after a marker in ``gc/sweeps`` stands for it, whoever removes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torchsnapshot.errors import CollectorStoppedError, FormatError, KeyAbsentError, SnapshotError
from torchsnapshot.store.backend import Backend, ObjectInfo
from torchsnapshot.store.clock import Clock
from torchsnapshot.store.keys import is_id, new_id
from torchsnapshot.store.liveness import (
    LEASE_SECONDS,
    StoreClock,
    call_dead,
    lease_ids,
    may_be_called_dead,
    read_leases,
)
from torchsnapshot.store.processes import current_process, is_gone
from torchsnapshot.store.records import (
    DAMAGED_FOLDER,
    PENDING_FOLDER,
    REMOVED_FOLDER,
    SWEEPS_FOLDER,
    TEMPORARY_FOLDER,
    DamagedSet,
    PendingSet,
    Removed,
    Root,
    Sweep,
)
from torchsnapshot.store.temporary_names import ANONYMOUS

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 30 * 24 * 3600.0
"""How long a sweep marker explains what was deleted."""


@dataclass(frozen=True, slots=True)
class DeadSet:
    """A pending set whose collector is dead. ``keys`` is what it may have deleted."""

    object: str
    keys: frozenset[str]


def bury_dead(backend: Backend, store_clock: StoreClock, clock: Clock) -> list[str]:
    """Call every lease dead that may be. Returns whom."""
    buried = []
    for held in read_leases(backend):
        if may_be_called_dead(held, store_clock):
            call_dead(backend, held, clock)
            buried.append(str(held))
    return buried


def dead_pending_sets(backend: Backend, store_clock: StoreClock) -> list[DeadSet]:
    """The pending sets of collectors that are no more, or older than a lease may be."""
    found = []
    for info in backend.list(PENDING_FOLDER):
        pending = None
        try:
            pending = PendingSet.unpack(backend.read(info.key))
        except KeyAbsentError:
            continue
        except FormatError as error:
            logger.warning("unreadable pending set %s in %s: %s", info.key, backend.url, error)
        if (pending is not None and is_gone(pending.process)) or store_clock.now() - info.modified > LEASE_SECONDS:
            found.append(DeadSet(info.key, frozenset() if pending is None else pending.keys))
    return found


def put_marker(backend: Backend, outcome: str, keys: frozenset[str], roots: Iterable[Root] | None, clock: Clock) -> str:
    """Put one sweep marker. Returns its object."""
    key = f"{SWEEPS_FOLDER}/{new_id()}"
    sweep = Sweep(outcome, current_process(), clock.now(), keys, None if roots is None else tuple(roots))
    backend.put(key, sweep.pack())
    return key


def newest_roots(backend: Backend) -> tuple[Root, ...]:
    """The roots that the newest sweep marker names; those of collectors who read no manifest are passed over.

    Raises:
        CollectorStoppedError: the marker is unreadable.
    """
    for info in sorted(backend.list(SWEEPS_FOLDER), key=lambda info: (info.modified, info.key), reverse=True):
        try:
            roots = Sweep.unpack(backend.read(info.key)).roots
        except KeyAbsentError:
            continue  # another collector found it too old
        except FormatError as error:
            raise CollectorStoppedError(
                f"gc stopped: the sweep marker {info.key} in {backend.url}, which says what was there last time, is "
                f"unreadable ({error}). Check that every disk below it is mounted, then run gc with --force"
            ) from error
        if roots is not None:
            return roots
    return ()


def read_removed(backend: Backend) -> dict[str, tuple[Root, ...]]:
    """What ``gc/removed`` explains, by object. An unreadable note explains nothing."""
    notes = {}
    for info in backend.list(REMOVED_FOLDER):
        try:
            notes[info.key] = Removed.unpack(backend.read(info.key)).roots
        except KeyAbsentError:
            continue
        except FormatError as error:
            logger.warning("unreadable note %s in %s: %s", info.key, backend.url, error)
            notes[info.key] = ()
    return notes


def read_damaged(backend: Backend) -> dict[str, frozenset[str]]:
    """The damaged sets, by object. An unreadable one is left out, so it stays."""
    found = {}
    for info in backend.list(DAMAGED_FOLDER):
        try:
            found[info.key] = DamagedSet.unpack(backend.read(info.key)).keys
        except (KeyAbsentError, FormatError) as error:
            logger.warning("unreadable damaged set %s in %s: %s", info.key, backend.url, error)
    return found


def old_markers(backend: Backend, newest: str) -> list[str]:
    """The sweep markers that are more than 30 days older, by the store's clock, than the one just written."""
    limit = backend.stat(newest).modified - SWEEP_SECONDS
    return [info.key for info in backend.list(SWEEPS_FOLDER) if info.key != newest and info.modified < limit]


def temporary_debris(backend: Backend, store_clock: StoreClock) -> list[str]:
    """Temporary files of takes without a lease, and those of nobody that are older than a lease may be."""
    # the files first: a take whose file is seen had its lease before that
    infos: list[ObjectInfo] = list(backend.list(TEMPORARY_FOLDER))
    if not infos:
        return []
    leases = lease_ids(backend)
    debris = []
    for info in infos:
        base = info.key.rpartition("/")[2]
        owner = base.partition("-")[0]
        if is_id(owner):
            is_debris = owner not in leases
        else:
            is_debris = base.startswith(ANONYMOUS) and store_clock.now() - info.modified > LEASE_SECONDS
        if is_debris:
            debris.append(info.key)
    return debris


def throw_away(backend: Backend, keys: Iterable[str]) -> int:
    """Delete what is of no use; a failure is logged and left to the next collector. Returns how many went."""
    wanted = list(keys)
    if not wanted:
        return 0
    try:
        failures = backend.delete(wanted)
    except SnapshotError as error:
        logger.info("could not clean up in %s: %s", backend.url, error)
        return 0
    for key, reason in failures.items():
        logger.info("could not clean up %s in %s: %s", key, backend.url, reason)
    return len(wanted) - len(failures)
