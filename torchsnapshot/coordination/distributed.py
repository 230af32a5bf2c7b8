"""The ranks that take or restore a snapshot together, and how they get a session.

What lives here: everything that knows ``torch.distributed``'s groups and stores. What doesn't: what a session says and
how (``sessions`` and below), tensors, snapshots.

A group coordinates through its process group's own c10d store, with connections of its own: no collective runs, no
group is made, the connection that training waits on is not touched, and the backend does not matter. A store that
gives no second connection leaves only collectives (``collectives``).

Why no counter of takes and no restart count stand in the keys: a rank whose take failed before it asked anybody would
count differently for ever after, and torchrun's agents count restarts each for itself. Instead rank 0 draws a name for
each session, and hands it to whoever knocks with a number that is new (``members``).
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from torchsnapshot.coordination.collectives import CollectiveSession
from torchsnapshot.coordination.coordinator import CoordinatorSession
from torchsnapshot.coordination.links import Connections, KeyValueStore
from torchsnapshot.coordination.members import MemberSession
from torchsnapshot.coordination.sessions import Limits, Session, SoloSession
from torchsnapshot.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

ENTRY_SECONDS = 600.0
"""How long a take waits for ranks that have not called it yet: one may still be evaluating. Once in, ranks give signs
of life, and ``Limits.silence`` counts."""

_c10d: Any = dist
"""Its types name no stores, and some builds of torch have none."""

_connections: WeakKeyDictionary[ProcessGroup, Connections | None] = WeakKeyDictionary()
_lock = threading.Lock()
_warned = False


def _reset_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_in_child)


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of one process group, or a single process."""

    rank: int
    """This process's rank in the group. Rank 0 coordinates."""
    world_size: int
    global_ranks: tuple[int, ...]
    """For each rank of the group its global rank."""
    background: bool
    """Whether a session's rounds may run in a thread of their own, also after the process group is destroyed."""
    _open: Callable[[], Session]

    def session(self) -> Session:
        """Enter a session: one take, or one restore. Every rank of the group has to.

        It waits until rank 0 has entered too. Only the first round has to be gone through where sessions are entered:
        the next session may begin while a thread goes on with this one.

        Raises:
            RankError: rank 0 did not come, or the store cannot be reached.
        """
        return self._open()

    def fail(self, error: Exception) -> BaseException:
        """Enter a session only to end it on every rank, because this rank cannot take part; returns what to raise."""
        try:
            return self.session().fail(error)
        except RankError as other:
            return other


def group_of(pg: ProcessGroup | None = None, limits: Limits | None = None) -> Group:
    """The group that a process group's ranks form.

    Args:
        pg: None is the default group, or this process alone where there is none.
        limits: how long ranks wait for one another.

    Raises:
        ValueError: this process is not in the group.
    """
    if not dist.is_available():
        return _alone()
    if pg is None:
        if not dist.is_initialized():
            return _alone()
        pg = dist.group.WORLD
    if not isinstance(pg, dist.ProcessGroup) or pg.rank() < 0:
        raise ValueError(f"this process is not a member of the process group {pg!r}")
    if pg.size() == 1:
        return _alone(_global_ranks(pg))
    return _several(pg, limits or Limits(entry=ENTRY_SECONDS))


def _alone(global_ranks: tuple[int, ...] = (0,)) -> Group:
    return Group(0, 1, global_ranks, background=True, _open=SoloSession)


def _several(pg: ProcessGroup, limits: Limits) -> Group:
    rank, world_size, global_ranks = pg.rank(), pg.size(), _global_ranks(pg)
    connections = _connections_of(pg)
    if connections is None:
        _warn_once(rank)
        device = _device_of(pg)
        return Group(
            rank, world_size, global_ranks, background=False, _open=lambda: CollectiveSession(pg, global_ranks, device)
        )
    name = _name_of(pg, global_ranks)
    if rank == 0:
        return Group(
            rank,
            world_size,
            global_ranks,
            background=True,
            _open=lambda: CoordinatorSession(global_ranks, connections, name, limits),
        )
    return Group(
        rank,
        world_size,
        global_ranks,
        background=True,
        _open=lambda: MemberSession(rank, global_ranks, connections, name, limits),
    )


def _connections_of(pg: ProcessGroup) -> Connections | None:
    with _lock:
        if pg not in _connections:
            connect = connector(store_of(pg))
            _connections[pg] = None if connect is None else Connections(connect)
        return _connections[pg]


def _warn_once(rank: int) -> None:
    global _warned
    if rank == 0 and not _warned:
        logger.warning(
            "The process group's store allows no second connection: snapshots are coordinated by collectives on the "
            "group, async_take waits until everything is written, and a rank that dies is noticed only when the "
            "group's time-out passes."
        )
    _warned = True


def _global_ranks(pg: ProcessGroup) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(pg))
    except (KeyError, ValueError, RuntimeError):  # a group that was made by hand and never registered
        return tuple(range(pg.size()))


def _name_of(pg: ProcessGroup, global_ranks: tuple[int, ...]) -> str:
    """The same on every rank, and different for every group that uses the same store."""
    try:
        group_name = str(pg.group_name)
    except RuntimeError:  # made by hand
        group_name = ""
    identity = repr((os.environ.get("TORCHELASTIC_RUN_ID", ""), group_name, global_ranks))
    return hashlib.blake2s(identity.encode(), digest_size=6).hexdigest()


def _device_of(pg: ProcessGroup) -> torch.device:
    find = getattr(_c10d.distributed_c10d, "_get_object_coll_device", None)
    device = torch.device("cpu" if find is None else find(pg))
    return torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device


# ------------------------------------------------------------------ stores


def store_of(pg: ProcessGroup) -> object | None:
    """The c10d store that the group met at; None if it shows none."""
    get: Callable[[], object] | None = getattr(pg, "get_group_store", None)
    try:
        if get is not None:
            return get()
        found: object = _c10d.distributed_c10d._get_process_group_store(pg)
        return found
    except (AttributeError, KeyError, RuntimeError):
        return None


def connector(store: object | None) -> Callable[[], KeyValueStore] | None:
    """A function that connects to the store once more; None if this kind of store can be used over one connection only.

    It does not connect by itself: every rank must come to the same answer, also when the network is down for one.
    """
    bottom = _bottom(store)
    if hasattr(store, "clone") and _clones(bottom):
        return lambda: cast(KeyValueStore, cast(Any, store).clone())
    if isinstance(bottom, _c10d.TCPStore):  # older versions of torch have no clone()
        host, port, timeout = bottom.host, bottom.port, bottom.timeout
        return lambda: cast(
            KeyValueStore, _c10d.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        )
    return None


def _bottom(store: object | None) -> object | None:
    while isinstance(store, _c10d.PrefixStore):
        store = store.underlying_store
    return store


def _clones(bottom: object | None) -> bool:
    """Whether stores of this kind can be cloned."""
    if type(bottom) in (_c10d.TCPStore, _c10d.FileStore):
        return True
    try:
        clone = cast(Any, bottom).clone()
    except Exception:  # whatever a foreign store raises
        return False
    # a HashStore is in one process only; a "clone" of it, or of what is like it, is the store itself
    return clone is not bottom or isinstance(bottom, _c10d.HashStore)
