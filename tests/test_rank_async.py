"""Asynchronous takes of several ranks, and what happens beside them: collectives, other takes, collectors, exits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import launch, succeed

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.coordination import distributed
from torchsnapshot.errors import SnapshotError
from torchsnapshot.maintenance import collect, retain
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.clock import SYSTEM_CLOCK
from torchsnapshot.store.liveness import call_dead, read_leases
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.locate import open_root

BLOBS = ".torchsnapshot/blobs/"


def state_of(version: float) -> dict[str, Any]:
    """A replica and something of each rank's own."""
    own = torch.full((100_000,), float(dist.get_rank())) + version
    return {"model": StateDict(shared=torch.arange(100_000.0) + version, own=own)}


@contextmanager
def puts_held_up() -> Iterator[threading.Event]:
    """No blob of this process is put before the event is set; it is at the end."""
    put, go = LocalBackend.put, threading.Event()

    def waiting(self: Backend, key: str, *args: Any, **options: Any) -> None:
        if key.startswith(BLOBS):
            go.wait()
        put(self, key, *args, **options)  # type: ignore[arg-type]

    LocalBackend.put = waiting  # type: ignore[method-assign,assignment]
    try:
        yield go
    finally:
        go.set()
        LocalBackend.put = put  # type: ignore[method-assign]


class Watcher:
    """Knows when a collector has begun to wait for the leases that it found."""

    def __init__(self) -> None:
        self.waits = threading.Event()

    def start(self, label: str, total_nbytes: int | None = None) -> None:
        """A piece of work begins."""
        if label.startswith("waiting"):
            self.waits.set()

    def advance(self, nbytes: int, items: int = 1) -> None:
        """Not of interest."""

    def finish(self) -> None:
        """Not of interest."""


def told(function: Any) -> list[Any]:
    """The error that a function raises: its type, which ranks failed, its message."""
    try:
        function()
    except (SnapshotError, TimeoutError) as error:
        return [type(error).__name__, sorted(getattr(error, "failures", {})), str(error)]
    return ["nothing", [], ""]


def beside_training(root: str) -> dict[str, Any]:
    """While a take is in flight: collectives run, waiting can time out, and ``busy`` means the same on every rank."""
    rank, seen = dist.get_rank(), {}
    with puts_held_up() as go:
        state = state_of(1)
        pending = Snapshot.async_take(f"{root}/first", state)
        state["model"]["own"].zero_()
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total[0] == dist.get_world_size()
        seen["timeout"] = told(lambda: pending.wait(timeout=0))
        assert not pending.done()
        if rank == 0:
            # this rank has put all its blobs, the others have not
            go.set()
        skipped = Snapshot.async_take(f"{root}/second", state_of(2), busy="skip")
        seen["skipped"] = skipped is pending
        seen["skipped take"] = Snapshot.take(f"{root}/second", state_of(2), busy="skip").path
        go.set()
    pending.wait()
    overlapping = [
        Snapshot.async_take(f"{root}/overlap-{number}", state_of(3 + number), busy="overlap") for number in range(2)
    ]
    after = Snapshot.async_take(f"{root}/wait", state_of(5), busy="wait")
    seen["waited"] = all(other.done() for other in overlapping)
    for other in (*overlapping, after):
        other.wait()
    dist.barrier()
    target = state_of(0)
    Snapshot(f"{root}/first").restore(target)
    seen["kept"] = bool((target["model"]["own"] == rank + 1).all())
    seen["names"] = sorted(snapshot.name for snapshot in Snapshot.list(root))
    return seen


def without_rank_0(root: str) -> str:
    """A sub-group takes in the background while the rest of the ranks know nothing of it."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return ""
    return Snapshot.async_take(f"{root}/part", state_of(6), group).wait().path


def changed_meanwhile(root: str) -> list[Any]:
    """Another thread of one rank writes to a tensor all the time."""
    seen: list[Any] = []
    for in_background in (False, True):
        state, stop = state_of(7), threading.Event()

        def write() -> None:
            while not stop.is_set():  # noqa: B023
                state["model"]["own"].add_(1)  # noqa: B023

        writer = threading.Thread(target=write)
        if dist.get_rank() == 1:
            writer.start()
        path = f"{root}/changed-{in_background}"
        if in_background:
            seen.append(told(lambda: Snapshot.async_take(path, state).wait()))  # noqa: B023
        else:
            seen.append(told(lambda: Snapshot.take(path, state)))  # noqa: B023
        stop.set()
        if dist.get_rank() == 1:
            writer.join()
        Snapshot.take(f"{root}/after-{in_background}", state_of(8))
    return seen


def beside_a_collector(root: str) -> dict[str, Any]:
    """A collector waits for the one lease of a take; a take whose lease is called dead fails; retention goes on."""
    rank, seen = dist.get_rank(), {}
    # contents that no other snapshot holds: something to collect, for which the collector has to wait
    Snapshot.take(f"{root}/unwanted", state_of(100))
    with puts_held_up() as go:
        pending = Snapshot.async_take(f"{root}/collected", state_of(9))
        # whether a lease is there must not depend on how far the others are
        dist.barrier()
        backend = open_root(root)
        seen["leases"] = [held.lease.name for held in read_leases(backend) if held.lease is not None]
        watcher = Watcher()
        with ThreadPoolExecutor(1) as pool:
            if rank == 2:
                Snapshot(f"{root}/unwanted").delete()
                collection = pool.submit(collect, root, wait=120, progress=watcher)
                # a collector that fails, or finds nothing to wait for, is told of at once
                collection.add_done_callback(lambda _: watcher.waits.set())
                watcher.waits.wait()
                seen["waits"] = not collection.done() or str(collection.exception() or collection.result())
            dist.barrier()
            go.set()
            pending.wait()
        if rank == 2:
            report = collection.result()
            seen["freed"] = [report.freed_blobs, len(report.waited_for)]
    dist.barrier()
    seen["problems"] = [str(problem) for problem in Snapshot(f"{root}/collected").verify()]

    with puts_held_up() as go:
        pending = Snapshot.async_take(f"{root}/dead", state_of(10))
        dist.barrier()
        if rank == 1:
            for held in read_leases(backend):
                call_dead(backend, held, SYSTEM_CLOCK)
        dist.barrier()
        go.set()
        seen["dead"] = told(pending.wait)
    Snapshot.take(f"{root}/alive", state_of(11))
    if rank == 0:
        plan = retain(root, last=1)
        seen["retained"] = [info.name for info, _ in plan.keep]
        collect(root)
    dist.barrier()
    seen["alive"] = [str(problem) for problem in Snapshot(f"{root}/alive").verify()]
    return seen


class OneConnection:
    """A store that cannot be cloned."""

    def clone(self) -> object:
        """As stores do that do not support it."""
        raise NotImplementedError


def by_collectives(root: str) -> dict[str, Any]:
    """Where the store cannot be cloned an asynchronous take is done when it returns, and failures are told as well."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchsnapshot.coordination.distributed").addHandler(handler)
    store_of = distributed.store_of
    distributed.store_of = lambda pg: OneConnection()  # type: ignore[assignment]
    distributed._connections.clear()
    try:
        group = dist.new_group()
        pending = Snapshot.async_take(f"{root}/collectives", state_of(12), group)
        seen: dict[str, Any] = {"committed": Path(root, "collectives/.manifests").is_dir()}
        pending.wait()
        state = state_of(13)
        if dist.get_rank() == 1:
            state["model"]["lazy"] = (number for number in range(3))
        seen["failed"] = told(lambda: Snapshot.async_take(f"{root}/refused", state, group))
        Snapshot.take(f"{root}/collectives-again", state_of(14), group)
    finally:
        distributed.store_of = store_of
        distributed._connections.clear()
    return {**seen, "said": sum("no second connection" in text for text in logged)}


def leave_it(root: str) -> None:
    """The group is destroyed, nobody waits, and the interpreter exits while blobs are still to be put."""
    put, main_is_over = LocalBackend.put, threading.Event()

    def waiting(self: Backend, key: str, *args: Any, **options: Any) -> None:
        if key.startswith(BLOBS):
            main_is_over.wait()
        put(self, key, *args, **options)  # type: ignore[arg-type]

    LocalBackend.put = waiting  # type: ignore[method-assign,assignment]
    # hooks run last in, first out: this one before the library's, which waits for the take
    threading._register_atexit(main_is_over.set)  # type: ignore[attr-defined]
    Snapshot.async_take(f"{root}/left", state_of(15))
    dist.destroy_process_group()


def test_async_takes_of_several_ranks(tmp_path: Path) -> None:
    """What a take in the background may meet: each of it with real processes."""
    root = str(tmp_path / "root")
    functions = (beside_training, without_rank_0, changed_meanwhile, beside_a_collector, by_collectives, leave_it)
    outcomes = succeed(launch(3, *functions, args=[root]))
    for outcome in outcomes:
        seen = outcome.result(0)
        assert seen["timeout"][0] == "TimeoutError"
        assert seen["skipped"]
        assert seen["skipped take"] == f"{root}/first"
        assert seen["waited"]
        assert seen["kept"]
        assert seen["names"] == ["first", "overlap-0", "overlap-1", "wait"]

        assert outcome.result(1) == ("" if outcome.rank == 0 else f"{root}/part")

        for kind, failed, message in outcome.result(2):
            assert (kind, failed) == ("RankError", [1]), message
            assert "model/own changed while the snapshot was being taken" in message

        seen = outcome.result(3)
        assert seen["leases"] == ["collected"]
        assert seen["problems"] == seen["alive"] == []
        assert seen["dead"][0] == ("LeaseLostError" if outcome.rank == 0 else "RankError"), seen["dead"]
        if outcome.rank == 2:
            assert seen["waits"] is True, seen["waits"]
            # a pack of each rank at least
            assert seen["freed"][0] >= 3
            assert seen["freed"][1] == 1
        if outcome.rank == 0:
            assert seen["retained"] == ["alive"]

        seen = outcome.result(4)
        assert seen["committed"]
        assert seen["failed"][:2] == ["RankError", [1]]
        assert seen["said"] == (outcome.rank == 0)
        outcome.result(5)
    left = Snapshot(f"{root}/left")
    assert left.head.world_size == 3
    assert not left.verify()
