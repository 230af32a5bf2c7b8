"""``Snapshot`` and ``PendingSnapshot``: arguments, defaults and checks, nothing else.

What doesn't live here: how a take runs (``taking.take``), how a restore runs (``restoring.restore``), where a store is
(``store.locate``), how a path is opened (``reading.opening``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup

from torchsnapshot import knobs
from torchsnapshot.chunks.writer import Encoding
from torchsnapshot.coordination.distributed import group_of
from torchsnapshot.engine import background
from torchsnapshot.errors import SnapshotError, SnapshotNotFoundError
from torchsnapshot.event_handlers import logged_action
from torchsnapshot.in_flight import Busy, InFlight, begin_take, note_in_flight
from torchsnapshot.manifest import Entry, SnapshotMetadata
from torchsnapshot.manifest_view import view_of_manifest
from torchsnapshot.reading.large_values import large_value_reader
from torchsnapshot.reading.opening import Opened, list_below, open_snapshot, user_metadata_beside_head
from torchsnapshot.restoring.elastic import MissingRank
from torchsnapshot.restoring.options import RestoreOptions
from torchsnapshot.restoring.read_object import read_object, read_state_dict
from torchsnapshot.restoring.restore import restore
from torchsnapshot.state.app_state import PrepareTensor, check_app_state
from torchsnapshot.stats import Stats
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.check import Problem
from torchsnapshot.store.envelope import Head
from torchsnapshot.store.keys import SIGNPOST
from torchsnapshot.store.repository import SnapshotInfo
from torchsnapshot.taking.take import TakeOptions, VerifyReplicas
from torchsnapshot.verify import Depth, verify_snapshot

logger = logging.getLogger(__name__)

SNAPSHOT_METADATA_FNAME = SIGNPOST

T = TypeVar("T")
Rename = Callable[[str], str]


class Snapshot:
    """A committed state at a path: ``take`` makes one, ``restore`` brings it back.

    Creating the object does no I/O and does not check that anything is there; the first use does.

    Args:
        path: a local folder, or a URL of any protocol that fsspec knows (``s3://``, ``gs://``, ``gcs://``, ...).
        pg: the process group of the job; kept for compatibility.
        storage_options: passed to the filesystem (endpoint, keys, project).
    """

    def __init__(
        self, path: str, pg: ProcessGroup | None = None, storage_options: StorageOptions | None = None
    ) -> None:
        self.path = path
        self.pg = pg
        self.stats: Stats | None = None
        self._storage_options = storage_options
        self._opened: Opened | None = None
        self._info: SnapshotInfo | None = None

    def __repr__(self) -> str:
        return f"Snapshot({self.path!r})"

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: not the open store, which belongs to this process."""
        return {**self.__dict__, "_opened": None}

    # ------------------------------------------------------------------ taking

    @classmethod
    def take(
        cls,
        path: str,
        app_state: Mapping[str, Any],
        pg: ProcessGroup | None = None,
        replicated: list[str] | None = None,
        storage_options: StorageOptions | None = None,
        _custom_tensor_prepare_func: PrepareTensor | None = None,
        *,
        encoding: Encoding = "auto",
        store: str | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        busy: Busy = "wait",
        verify_replicas: VerifyReplicas = "sample",
    ) -> Snapshot:
        """Take a snapshot of the state and return when it is committed.

        What the store holds already is not written again. Taking a path again replaces its snapshot once the new one
        is committed.

        Args:
            path: where the snapshot will be; its store is found or made beside it, see ``docs/design.md``.
            app_state: objects with ``state_dict`` and ``load_state_dict``, or plain dicts, by key.
            pg: process group of the job.
            replicated: globs of paths that every rank holds alike; without meaning for one process.
            storage_options: passed to the filesystem.
            _custom_tensor_prepare_func: ``(path, tensor, tracing) -> tensor``; what it returns is stored.
            encoding: ``"raw"`` never compresses, ``"auto"`` where that is cheap, ``"smallest"`` spends CPU.
            store: the folder of the store: the path or a folder above it.
            user_metadata: plain values that ``Snapshot.user_metadata`` gives back.
            busy: what to do while an earlier asynchronous take is in flight: ``"wait"`` for it, ``"skip"`` this one
                (the result is the one in flight), or ``"overlap"`` with it.
            verify_replicas: what ranks are said to hold alike is compared in full at a process's first take, then by a
                ``"sample"`` that rotates, or always in ``"full"``, or (``"off"``) no more. Rank 0's value counts.

        Raises:
            TypeError: a value of ``app_state`` is neither a Stateful nor a dict.
            UnsupportedValueError: values that no snapshot can hold, all of them at once.
            ValueError: path, store or an option does not make sense.
            StoreError: the store refused. Whatever was committed before is unharmed.
        """
        prepare = _custom_tensor_prepare_func
        given = (replicated, storage_options, prepare, encoding, store, user_metadata, verify_replicas)
        with logged_action("take"):
            take = begin_take(path, app_state, lambda: TakeOptions(*given), pg, busy, in_background=False)
            if isinstance(take, InFlight):
                return cls(take.handle.path, pg, storage_options)
            with take:
                opened = take.commit()
        return cls._of(path, pg, storage_options, opened, take.stats)

    @classmethod
    def async_take(
        cls,
        path: str,
        app_state: Mapping[str, Any],
        pg: ProcessGroup | None = None,
        replicated: list[str] | None = None,
        storage_options: StorageOptions | None = None,
        _custom_tensor_prepare_func: PrepareTensor | None = None,
        *,
        encoding: Encoding = "auto",
        store: str | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        busy: Busy = "wait",
        verify_replicas: VerifyReplicas = "sample",
    ) -> PendingSnapshot:
        """Take a snapshot in the background; return as soon as the caller may change its tensors.

        Arguments and errors are those of ``take``; what goes wrong after the return is raised by
        ``PendingSnapshot.wait``.
        """
        prepare = _custom_tensor_prepare_func
        given = (replicated, storage_options, prepare, encoding, store, user_metadata, verify_replicas)
        with logged_action("async_take"):
            take = begin_take(path, app_state, lambda: TakeOptions(*given), pg, busy, in_background=True)
        if isinstance(take, InFlight):
            earlier: PendingSnapshot = take.handle
            return earlier

        def finish() -> Snapshot:
            with take:
                opened = take.commit()
            return cls._of(path, pg, storage_options, opened, take.stats)

        try:
            task = background.Task(finish, f"async_take of {path}")
        except BaseException:
            take.close()
            raise
        pending = PendingSnapshot(path, pg, take.stats, task)
        note_in_flight(pending, task, group_of(pg).global_ranks)
        return pending

    @classmethod
    def _of(
        cls,
        path: str,
        pg: ProcessGroup | None,
        storage_options: StorageOptions | None,
        opened: Opened | None,
        stats: Stats,
    ) -> Snapshot:
        snapshot = cls(path, pg, storage_options)
        snapshot._opened, snapshot.stats = opened, stats
        return snapshot

    # ------------------------------------------------------------------ restoring and reading

    def restore(
        self,
        app_state: Mapping[str, Any],
        strict: bool = True,
        *,
        paths: Sequence[str] | None = None,
        rename: Rename | None = None,
        allow_pickle: bool | None = None,
        device: torch.device | str | None = None,
        missing_rank: MissingRank | None = None,
    ) -> None:
        """Bring the state back: tensors in place where their shape matches, structure from the snapshot.

        Args:
            app_state: the objects to restore, by the keys that they were taken under.
            strict: passed to ``nn.Module.load_state_dict``.
            paths: globs of paths (``"model/layers.0.*"``); only what matches, and what is below it, is restored.
            rename: stored path -> path in the target; then the target's structure leads, as with ``paths``.
            allow_pickle: rebuild values that only pickle can hold. This runs code from the snapshot: only for
                snapshots that you trust. None: what TORCHSNAPSHOT_ALLOW_PICKLE says.
            device: where tensors are allocated whose target is on the meta device; None means the CPU.
            missing_rank: where another number of ranks took the snapshot: what becomes of values that one rank had for
                itself. ``"drop"``: new ranks go without; ``"rank0"``: they get rank 0's; None: that is an error.

        Raises:
            SnapshotNotFoundError: nothing committed is at the path.
            AbsentStateError: a key of ``app_state`` is not in the snapshot.
            MismatchError: tensors of another shape, all of them at once; names that a module refuses; a selection of
                nothing. Nothing was changed.
            ValueError: ``device`` cannot be used.
            PickleRefusedError: values are stored as pickles, all of them at once; all other keys were restored.
            CorruptionError: stored bytes are damaged or missing; they never reach the target.
            PartialRestoreError: it failed after some tensors had been written.
        """
        statefuls = check_app_state(app_state)
        with logged_action("restore"):
            group = group_of(self.pg)
            allows_pickle = self._allows_pickle(allow_pickle)
            ranks = (group.rank, group.world_size, group.global_ranks)
            options = RestoreOptions(strict, paths, rename, allows_pickle, device, missing_rank, *ranks)
            self.stats = restore(self._fresh(), statefuls, options)

    def read_object(
        self,
        path: str,
        obj_out: T | None = None,
        memory_budget_bytes: int | None = None,
        *,
        allow_pickle: bool | None = None,
    ) -> T:
        """Read one value.

        Args:
            path: its key in the manifest: ``"<rank>/<key>/<path>"``. What was replicated or sharded is there for every
                rank, also for those that the take did not have.
            obj_out: a tensor of the stored shape to read into; it is what is returned then. A tensor that is spread
                over ranks is read into this rank's part of a ``DTensor``, or whole.
            memory_budget_bytes: bytes of buffers to use at most.
            allow_pickle: see ``restore``.

        Raises:
            SnapshotError: the path is not in the manifest.
            MismatchError: ``obj_out`` has another shape, or cannot be read into.
        """
        with logged_action("read_object"):
            value: T = read_object(self._fresh(), path, obj_out, memory_budget_bytes, self._allows_pickle(allow_pickle))
            return value

    def get_state_dict_for_key(
        self, key: str, replicate_from_rank0: bool = False, *, allow_pickle: bool | None = None
    ) -> dict[Any, Any]:
        """The whole state that was taken under ``key``, with its tensors in new memory on the CPU.

        Args:
            key: a key of the ``app_state`` that was taken.
            replicate_from_rank0: read rank 0's state on every rank. Else each rank reads its own; a rank that the take
                did not have reads what was replicated or sharded.
            allow_pickle: see ``restore``.
        """
        rank = 0 if replicate_from_rank0 else group_of(self.pg).rank
        state: dict[Any, Any] = read_state_dict(self._fresh(), key, rank, self._allows_pickle(allow_pickle))
        return state

    @staticmethod
    def _allows_pickle(allow_pickle: bool | None) -> bool:
        return knobs.is_pickle_allowed() if allow_pickle is None else allow_pickle

    def get_manifest(self) -> dict[str, Entry]:
        """Every container and leaf by its key ``"<rank>/<key>/<path>"``, as the old torchsnapshot shows them."""
        return dict(self.metadata.manifest)

    @property
    def metadata(self) -> SnapshotMetadata:
        """Version, world size and manifest, as the old torchsnapshot shows them; large values are read for it."""
        opened = self._open()
        head, shown = opened.manifest.head, view_of_manifest(opened.manifest, large_value_reader(opened))
        return SnapshotMetadata(head.library, head.world_size, shown)

    @property
    def head(self) -> Head:
        """The snapshot's ids, times and sizes; for a snapshot from ``list`` without further I/O."""
        return self._open().manifest.head if self._info is None else self._info.head

    @property
    def name(self) -> str:
        """The snapshot's place below its ROOT."""
        return self._open().name if self._info is None else self._info.name

    @property
    def user_metadata(self) -> dict[str, Any]:
        """What was given to ``take``."""
        return dict(self.head.user_metadata) or user_metadata_beside_head(self._open().manifest)

    def _open(self) -> Opened:
        return self._opened or self._fresh()

    def _fresh(self) -> Opened:
        """The snapshot as it is now: a path may have been taken again since this object saw it."""
        self._opened = open_snapshot(self.path, self._storage_options)
        return self._opened

    # ------------------------------------------------------------------ looking after snapshots

    @classmethod
    def list(cls, root: str, storage_options: StorageOptions | None = None) -> list[Snapshot]:
        """The committed snapshots at and below ``root``, oldest commit first; their store is there or above it.

        Raises:
            SnapshotNotFoundError: neither ``root`` nor a folder above it holds a store.
        """
        snapshots = []
        for path, info in list_below(root, storage_options)[1]:
            snapshot = cls(path, None, storage_options)
            snapshot._info = info
            snapshots.append(snapshot)
        return snapshots

    @classmethod
    def latest(cls, root: str, storage_options: StorageOptions | None = None) -> Snapshot | None:
        """The snapshot at or below ``root`` that was committed last, or None where there is none yet."""
        try:
            snapshots = cls.list(root, storage_options)
        except SnapshotNotFoundError:
            return None
        return snapshots[-1] if snapshots else None

    def delete(self) -> None:
        """Delete the snapshot. Its bytes become free with the next gc, unless another snapshot shares them."""
        opened = self._fresh()
        opened.repository.delete_snapshot(opened.name)
        self._opened = self._info = None

    def verify(self, depth: Depth = "bytes") -> Sequence[Problem]:
        """Check the snapshot.

        Args:
            depth: ``"manifests"`` reads the manifest, ``"blobs"`` looks that every blob is there with its size,
                ``"bytes"`` reads and hashes every byte.

        Returns:
            What is wrong; empty if nothing is.
        """
        return verify_snapshot(self._fresh(), depth)


class PendingSnapshot:
    """An asynchronous take that may still be in flight.

    Attributes:
        path: the path as it was given.
        pg: the process group as it was given.
        stats: its figures; complete once ``wait`` has returned.
    """

    def __init__(self, path: str, pg: ProcessGroup | None, stats: Stats, task: background.Task[Snapshot]) -> None:
        self.path = path
        self.pg = pg
        self.stats = stats
        self._task = task

    def __repr__(self) -> str:
        return f"PendingSnapshot({self.path!r}, done={self.done()})"

    def wait(self, timeout: float | None = None) -> Snapshot:
        """Wait until the snapshot is committed, and return it.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            TimeoutError: it is not committed yet; it goes on.
            SnapshotError: the take failed and committed nothing.
        """
        try:
            return self._task.wait(timeout)
        except SnapshotError:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and error is not self._task.error():
                raise
            raise SnapshotError(f"Encountered exception while taking snapshot asynchronously: {error!r}") from error

    def wait_staged(self) -> None:
        """Return once the caller may change its tensors; ``async_take`` has already waited for that."""

    def done(self) -> bool:
        """Whether the take has ended, with a snapshot or an error."""
        return self._task.done()
