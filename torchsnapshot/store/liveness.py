"""Who holds a lease, and whether that somebody may be called dead.

What lives here: reading the leases, the store's clock, the two rules by which a lease is called dead, and how that is
done. What doesn't: making and keeping leases (``leases``), waiting for them (``gc``).

Rules: a lease may be called dead if its process, of this very host, boot and pid namespace, is no more; or if it is
older than ``LEASE_SECONDS`` by the store's clock. Whoever calls a take dead puts the mark first, then deletes the
lease: the take looks for the mark after its commit. A read lease gets no mark. Safety rests on none of this being
right: a live take that is called dead fails with a clear error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchsnapshot.errors import FormatError, KeyAbsentError
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.clock import Clock
from torchsnapshot.store.keys import is_id, new_id
from torchsnapshot.store.parallel import parallel
from torchsnapshot.store.processes import current_process, is_gone
from torchsnapshot.store.records import DEAD_FOLDER, LEASES_FOLDER, TEMPORARY_FOLDER, Lease, pack_dead_mark
from torchsnapshot.store.temporary_names import ANONYMOUS
from torchsnapshot.store.walk import ManifestRef

LEASE_SECONDS = 3600.0
"""After this long without a heartbeat, by the store's clock, anybody may call a lease dead."""

_PROBE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class HeldLease:
    """One lease that a listing showed. ``lease`` is None where it could not be read: then it counts as a take."""

    id: str
    modified: float
    lease: Lease | None

    @property
    def is_take(self) -> bool:
        """Whether it may belong to a take."""
        return self.lease is None or self.lease.kind == "take"

    def __str__(self) -> str:
        if self.lease is None:
            return f"{self.id} (unreadable lease)"
        what = "take" if self.lease.kind == "take" else "restore"
        return f"{what} {self.id} of {self.lease.name or 'ROOT'!r} by {self.lease.process}"


def lease_ids(backend: Backend) -> frozenset[str]:
    """The ids of all leases there are now."""
    names = (info.key.rpartition("/")[2] for info in backend.list(LEASES_FOLDER))
    return frozenset(name for name in names if is_id(name))


def without_takes_in_flight(backend: Backend, listed: Callable[[], Sequence[ManifestRef]]) -> list[ManifestRef]:
    """The manifests of a snapshot that are committed, or never will be.

    A take that has put its manifest and not yet its ``.ok`` holds a lease from before the one until after the other.
    So a manifest that is not committed in a listing, of a take without a lease after that, is a dead one's, unless it
    is committed in a listing after that.

    Args:
        backend: of the store.
        listed: lists the manifests.
    """
    refs = listed()
    if all(ref.committed for ref in refs):
        return list(refs)
    leases = lease_ids(backend)
    committed = {ref.manifest for ref in listed() if ref.committed}
    is_over = [ref.manifest.take_id not in leases and ref.manifest not in committed for ref in refs]
    return [ref for ref, dead in zip(refs, is_over, strict=True) if ref.committed or dead]


def read_leases(backend: Backend) -> list[HeldLease]:
    """All leases there are now. One that goes between the listing and its reading is left out."""
    infos = [info for info in backend.list(LEASES_FOLDER) if is_id(info.key.rpartition("/")[2])]

    def read(index: int) -> HeldLease | None:
        info = infos[index]
        try:
            lease = Lease.unpack(backend.read(info.key))
        except KeyAbsentError:
            return None
        except FormatError:
            lease = None
        return HeldLease(info.key.rpartition("/")[2], info.modified, lease)

    found = parallel(read, range(len(infos)), backend.concurrency)
    return sorted((held for held in found if held is not None), key=lambda held: held.id)


class StoreClock:
    """The time by the store's own clock: the modification time of an object just written, and what passed since."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._probed: tuple[float, float] | None = None

    def now(self) -> float:
        """Seconds since the epoch, by the store."""
        here = self._clock.monotonic()
        if self._probed is None or here - self._probed[1] > _PROBE_SECONDS:
            # named like other temporary files of nobody, so that a collector takes it if this process dies here
            key = f"{TEMPORARY_FOLDER}/{ANONYMOUS}{new_id()}"
            self._backend.put(key, b"")
            self._probed = self._backend.stat(key).modified, here
            self._backend.delete([key])
        return self._probed[0] + here - self._probed[1]


def may_be_called_dead(held: HeldLease, store_clock: StoreClock) -> bool:
    """Whether the rules in the module's docstring allow it."""
    if held.lease is not None and is_gone(held.lease.process):
        return True
    return store_clock.now() - held.modified > LEASE_SECONDS


def call_dead(backend: Backend, held: HeldLease, clock: Clock) -> None:
    """Put the mark, if it may be a take, then delete the lease.

    Raises:
        StoreError: the mark could not be put (the lease is untouched), or the lease could not be deleted.
    """
    if held.is_take:
        backend.put(f"{DEAD_FOLDER}/{held.id}", pack_dead_mark(current_process(), clock.now()))
    for reason in backend.delete([f"{LEASES_FOLDER}/{held.id}"]).values():
        raise reason


def is_marked_dead(backend: Backend, take_id: str) -> bool:
    """Whether somebody has called this take dead.

    Raises:
        StoreError: the store gave no clear answer.
    """
    try:
        backend.stat(f"{DEAD_FOLDER}/{take_id}")
    except KeyAbsentError:
        return False
    return True
