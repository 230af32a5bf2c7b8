"""Sessions of takes and restores: the lease, its heartbeat, what a take may trust, and the end of it all.

What lives here: section "A take" of docs/gc.md, steps 1, 2, 5 (through ``commit``) and 6. What doesn't: reading the
evidence (``evidence``), building the index (``known``), calling other leases dead (``liveness``).

Invariants:

- The lease is durable before anything that a take relies on is read: nothing seen before it is evidence.
- The condemned sets are read whole between two equal listings of the sweeps; if not, all is read again.
- A lease goes when its session ends, also with an error, but not while a write of the session may still be under way:
  then it stays, without a heartbeat, until somebody calls it dead.
- A session belongs to the process that opened it. In a forked child its commit refuses and its end does nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from torchsnapshot.errors import (
    CredentialsError,
    KeyAbsentError,
    LeaseLostError,
    ReadOnlyError,
    SnapshotError,
    StoreError,
)
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.clock import SYSTEM_CLOCK, Clock
from torchsnapshot.store.commit import Requests, commit_manifest
from torchsnapshot.store.evidence import Evidence, read_condemned, read_evidence
from torchsnapshot.store.keys import new_id
from torchsnapshot.store.liveness import is_marked_dead
from torchsnapshot.store.processes import current_process
from torchsnapshot.store.records import (
    LEASES_FOLDER,
    Lease,
)
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.turns import Turn
from torchsnapshot.store.walk import ManifestRef, check_name

__all__ = [
    "Evidence",
    "ReadSession",
    "TakeSession",
    "check_lease_is_there",
    "read_condemned",
    "read_evidence",
    "reading",
    "start_take",
    "writing",
]

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0

_EXIT_SECONDS = 5.0

S = TypeVar("S", bound="_Session")


class _Beat:
    """The lease of one session and its heartbeat. Apart from the session, so that a forgotten session can end."""

    def __init__(self, repository: Repository, lease_id: str, lease: Lease, seconds: float | None) -> None:
        self.backend = repository.backend
        self.lease_id = lease_id
        self.requests = Requests(repository)
        self.lost = False
        self.committing = threading.Lock()
        self._is_take = lease.kind == "take"
        self._data = lease.pack()
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._forgotten = False
        self._dropped = False
        self._seconds = seconds
        self._thread: threading.Thread | None = None

    @property
    def key(self) -> str:
        return f"{LEASES_FOLDER}/{self.lease_id}"

    def start(self) -> None:
        self.requests.put(self.key, self._data)
        if self._seconds is not None:
            # a daemon, so that a session that nobody ends holds up no exit; threads of a take that still runs are
            # joined before daemons stop, so its lease is kept alive until then
            self._thread = threading.Thread(target=self._run, name="torchsnapshot-lease", daemon=True)
            try:
                self._thread.start()
            except BaseException:
                # nobody would end the session; where Ctrl-C came while the thread was starting, it runs all the same
                # and would bring the lease back for ever
                self._stop.set()
                self._thread = None
                self._drop()
                raise

    def beat(self) -> None:
        """One heartbeat."""
        if self._is_take and is_marked_dead(self.backend, self.lease_id):
            self.lost = True
            return
        if not self.backend.is_local:
            self.backend.put(self.key, self._data)
            return
        try:
            self.backend.touch(self.key)
        except KeyAbsentError:
            self.backend.put(self.key, self._data)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds) and not self.lost:
            try:
                self.beat()
            except Exception as error:
                # the next one may do better; only an hour without any is a reason to be called dead
                logger.info("a heartbeat of the lease %s failed: %s", self.lease_id, error)
        if self._forgotten:
            self._drop()

    def end(self, seconds: float | None = None) -> None:
        """Stop the heartbeat, then delete the lease.

        Args:
            seconds: how long to wait for a heartbeat that is under way; None = to its end, so that it brings no lease
                back.
        """
        if not self.is_ours:
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(seconds)
        self._drop()

    def forget(self) -> None:
        """Nobody holds the session any more; the heartbeat's thread does the rest, as this may run inside anything."""
        if self.is_ours:
            self._forgotten = True
            self._stop.set()

    @property
    def is_ours(self) -> bool:
        return os.getpid() == self._pid

    def _drop(self) -> None:
        if self._dropped or self.requests.unanswered:
            return
        # while a commit runs in a thread that the exit has left behind, its lease must stay
        if not self.committing.acquire(blocking=False):
            return
        try:
            self._dropped = True
            for reason in self.backend.delete([self.key]).values():
                raise reason
        except Exception as error:
            logger.info("the lease %s could not be deleted, it ends within the hour: %s", self.lease_id, error)
        finally:
            self.committing.release()

    @property
    def is_ended(self) -> bool:
        return self._stop.is_set()


class _Session:
    """What takes and restores have in common."""

    def __init__(self, repository: Repository, name: str, clock: Clock) -> None:
        self.repository = repository
        self.name = name
        self._clock = clock
        self._beat: _Beat | None = None

    def _open(self, kind: str, lease_id: str, heartbeat_seconds: float | None) -> None:
        beat = _Beat(self.repository, lease_id, Lease(kind, current_process(), self.name), heartbeat_seconds)
        try:
            beat.start()
            weakref.finalize(self, beat.forget).atexit = False
            _open_beats.add(beat)
            self._beat = beat
        except Exception:
            raise
        except BaseException:
            # Ctrl-C: whoever opens the session will not get hold of it
            beat.end()
            raise

    def beat(self) -> None:
        """Renew the lease now, as its thread does every ``HEARTBEAT_SECONDS``."""
        if self._beat is not None:
            self._beat.beat()

    def close(self) -> None:
        """End the session: the lease goes, unless a write may still be under way. May be called twice."""
        if self._beat is not None:
            _open_beats.discard(self._beat)
            self._beat.end()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ReadSession(_Session):
    """A restore, or anything else that reads blobs. ``lease_id`` is None where the store could not be written."""

    lease_id: str | None = None


class TakeSession(_Session):
    """A take, from its lease to its commit. Made by ``start_take`` or ``writing``."""

    take_id: str
    evidence: Evidence

    def __init__(self, repository: Repository, name: str, clock: Clock, heartbeat_seconds: float | None) -> None:
        super().__init__(repository, check_name(name), clock)
        self.take_id = new_id()
        self._turn = Turn((repository.url, name))
        self._committed = False
        try:
            self._open("take", self.take_id, heartbeat_seconds)
            repository.reload_config()
            self.evidence = read_evidence(repository)
        except BaseException:
            self.close()
            raise

    @property
    def requests(self) -> Requests:
        """What says whether a write may still be under way; a taker sets ``unanswered`` for writes of its own."""
        assert self._beat is not None
        return self._beat.requests

    def check_alive(self) -> None:
        """Raise ``LeaseLostError`` where a heartbeat has found that the take was called dead: no use in going on."""
        if self._beat is not None and self._beat.lost:
            raise LeaseLostError(
                f"a collector called the take {self.take_id} of {self.name or 'ROOT'!r} dead while it ran"
            )

    def wait_turn(self) -> None:
        """Wait until every earlier take of this path in this process has ended. ``commit`` does it too."""
        self._turn.wait()

    def commit_time_ms(self) -> int:
        """The commit time for the head, in milliseconds since the epoch: after every commit that was read so far."""
        return self.repository.next_commit_time(int(self._clock.now() * 1000))

    def commit(self, manifest: bytes) -> ManifestRef:
        """Commit. Every blob that the manifest names must be durable by now.

        Raises:
            LeaseLostError: the take was called dead; nothing was committed.
            CommitUnknownError: the store gave no clear answer.
            StoreError: nothing was committed.
        """
        beat = self._beat
        assert beat is not None
        if not beat.is_ours:
            raise SnapshotError("a take cannot be committed by a forked child of the process that started it")
        self.wait_turn()
        with beat.committing:
            if beat.is_ended or self._committed:
                raise SnapshotError(f"the take {self.take_id} of {self.name or 'ROOT'!r} has ended already")
            ref = commit_manifest(self.repository, self.name, self.take_id, manifest, beat.requests, self._clock)
            self._committed = True
        self._turn.leave()
        return ref

    def close(self) -> None:
        """End the take: later ones of this path may commit, and the lease goes."""
        try:
            super().close()
        finally:
            self._turn.leave()


def start_take(
    repository: Repository,
    name: str,
    *,
    clock: Clock = SYSTEM_CLOCK,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> TakeSession:
    """Steps 1 and 2 of a take. The caller must ``close`` the session, whatever happens.

    Args:
        repository: where to.
        name: the snapshot's folder below ROOT; "" = ROOT itself.
        clock: what commit times come from.
        heartbeat_seconds: how often the lease is renewed; None = only by ``beat``.

    Raises:
        ValueError: gc would not find a snapshot of this name.
        StoreError: the store cannot be written.
    """
    return TakeSession(repository, name, clock, heartbeat_seconds)


def writing(
    repository: Repository,
    name: str,
    *,
    clock: Clock = SYSTEM_CLOCK,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> TakeSession:
    """``start_take``, for a ``with`` block."""
    return start_take(repository, name, clock=clock, heartbeat_seconds=heartbeat_seconds)


def reading(
    repository: Repository,
    name: str,
    *,
    clock: Clock = SYSTEM_CLOCK,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> ReadSession:
    """A read lease, for a ``with`` block: a collector that starts now waits for it. Read the manifest only inside.

    Where the store cannot be written it goes without a lease: a collector may then delete what a removed snapshot held
    while it is being read.
    """
    session = ReadSession(repository, name, clock)
    lease_id = new_id()
    try:
        session._open("read", lease_id, heartbeat_seconds)
    except (ReadOnlyError, CredentialsError) as error:
        logger.debug("reading %r in %s without a lease: %s", name, repository.url, error)
    except StoreError as error:
        logger.warning("reading %r in %s without a lease: %s", name, repository.url, error)
    else:
        session.lease_id = lease_id
    return session


def check_lease_is_there(backend: Backend, take_id: str) -> None:
    """See that a rank which is about to put blobs looks at the very store that the lease of its take was put into.

    Raises:
        SnapshotError: it doesn't: what it puts there could not be found by anybody else.
    """
    try:
        backend.stat(f"{LEASES_FOLDER}/{take_id}")
    except KeyAbsentError as error:
        raise SnapshotError(
            f"{backend.url} is another place for this rank than for rank 0: what rank 0 has just put is not there. The "
            "path must lead to one folder or bucket for all ranks, not to a disk of each machine's own"
        ) from error


_open_beats: weakref.WeakSet[_Beat] = weakref.WeakSet()


def _end_all(end: Callable[[_Beat], None] = lambda beat: beat.end(_EXIT_SECONDS)) -> None:
    """At exit: no lease of this process stays behind, other than those of commits that are cut off."""
    for beat in list(_open_beats):
        end(beat)


def _forget_all() -> None:
    # a forked child must neither renew nor delete its parent's leases
    _open_beats.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)
