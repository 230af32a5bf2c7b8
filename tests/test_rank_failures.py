"""What becomes of a take over several ranks when one of them fails, at any point: an error everywhere, and no harm."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from launch import launch, succeed

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.errors import SnapshotError, StoreFullError, StoreUnavailableError
from torchsnapshot.maintenance import collect
from torchsnapshot.ranks import group_take
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.locate import open_backend

State = dict[str, Any]


def state_of(rank: int, version: float = 0.0) -> State:
    """A replica, something of each rank's own, and a small value; all of it different in each version."""
    return {
        "model": StateDict(
            shared=torch.arange(300_000, dtype=torch.float32) + version,
            own=torch.full((200_000,), rank + version),
            step=int(version),
        )
    }


def told(function: Callable[[], Any]) -> tuple[str, list[int], str]:
    """The RankError that a function raises: its type, who failed, and its message."""
    try:
        function()
    except SnapshotError as error:
        return type(error).__name__, sorted(getattr(error, "failures", {})), str(error)
    return "nothing", [], ""


def take_works(root: str, name: str, version: float) -> None:
    """A take succeeds, in the group that has just seen a failure, and brings back what was taken."""
    rank = dist.get_rank()
    Snapshot.take(f"{root}/{name}", state_of(rank, version))
    target = state_of(rank, -1.0)
    Snapshot(f"{root}/{name}").restore(target)
    expected = state_of(rank, version)
    assert torch.equal(target["model"]["shared"], expected["model"]["shared"])
    assert torch.equal(target["model"]["own"], expected["model"]["own"])
    assert target["model"]["step"] == int(version)


def on_rank_0(root: str, function: Callable[[], Any]) -> Any:
    """What a function returns on rank 0, while the others wait."""
    found: list[Any] = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def names_in(root: str) -> list[str]:
    """The committed snapshots."""
    return [snapshot.name for snapshot in Snapshot.list(root)] if Path(root, ".torchsnapshot").exists() else []


@contextmanager
def puts_fail(on_rank: int, nth: int, error: Callable[[], Exception], prefix: str = "") -> Iterator[None]:
    """Puts of keys with this prefix fail on one rank, from the nth (0 = the first) on."""
    put, lock, left = LocalBackend.put, threading.Lock(), [nth]

    def failing(self: Backend, key: str, *args: Any, **options: Any) -> None:
        if dist.get_rank() == on_rank and key.startswith(prefix):
            with lock:
                left[0] -= 1
            if left[0] < 0:
                raise error()
        put(self, key, *args, **options)  # type: ignore[arg-type]

    LocalBackend.put = failing  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        LocalBackend.put = put  # type: ignore[method-assign]


@contextmanager
def own_disk(on_rank: int, root: str) -> Iterator[None]:
    """What is the job's folder to all other ranks is a folder of this rank's own machine."""

    def elsewhere(url: str, *args: Any, **options: Any) -> Backend:
        return open_backend(f"{root}-of-{on_rank}", *args, **options)

    with patch.object(group_take, "open_backend", elsewhere if dist.get_rank() == on_rank else open_backend):
        yield


class Raising(StateDict):
    """A Stateful that cannot give its state."""

    def state_dict(self) -> dict[str, Any]:
        """Fail."""
        raise ValueError("no state today")


SMALL_CHUNKS = {"TORCHSNAPSHOT_DISABLE_BATCHING": "1", "TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE": "200000"}
"""So that every rank puts several blobs."""

BLOBS = ".torchsnapshot/blobs"


def failures(root: str) -> dict[str, Any]:
    """One failure after the other in the same process group; after each the next take works."""
    rank = dist.get_rank()
    seen: dict[str, Any] = {}
    version = 0.0

    def fails(label: str, app_state: Callable[[float], State], take: Callable[..., Any]) -> None:
        nonlocal version
        version += 1.0
        path = f"{root}/failed-{label}"
        seen[label] = told(lambda: take(path, app_state(version)))
        version += 1.0
        take_works(root, f"after-{label}", version)

    def sync(path: str, state: State) -> None:
        Snapshot.take(path, state)

    def in_background(path: str, state: State) -> None:
        Snapshot.async_take(path, state).wait()

    def broken(value: Any) -> Callable[[float], State]:
        return lambda version: state_of(rank, version) | ({"broken": value} if rank == 1 else {})

    for name, take in (("sync", sync), ("async", in_background)):
        fails(f"{name} state_dict", broken(Raising()), take)
        fails(f"{name} value", broken(StateDict(x=(n for n in range(3)))), take)
        fails(f"{name} kind", broken(object()), take)
        for number in range(3):
            with puts_fail(number, 0, lambda: StoreFullError("disk full"), BLOBS):
                seen[f"{name} full {number}"] = told(lambda: take(f"{root}/full", state_of(rank, version + 0.5)))  # noqa: B023
        with puts_fail(2, 1, lambda: StoreUnavailableError("second put"), BLOBS):
            seen[f"{name} second put"] = told(lambda: take(f"{root}/second", state_of(rank, version + 0.7)))  # noqa: B023
        take_works(root, f"{name} after puts", version + 0.9)
        with own_disk(1, root):
            seen[f"{name} own disk"] = told(lambda: take(f"{root}/apart", state_of(rank, version + 0.8)))  # noqa: B023
        with puts_fail(0, 0, lambda: StoreFullError("no manifest"), f"failed-{name} manifest"):
            fails(f"{name} manifest", lambda version: state_of(rank, version), take)
    return seen


def committed_after_failures(root: str) -> list[str]:
    """What is committed, and that gc leaves exactly what the snapshots need."""

    def look() -> list[str]:
        report = collect(root)
        assert report.freed_blobs > 0, report
        again = collect(root)
        assert again.freed_blobs == 0
        assert all(not snapshot.verify() for snapshot in Snapshot.list(root))
        assert not list(Path(root, ".torchsnapshot", "leases").iterdir())
        return names_in(root)

    names: list[str] = on_rank_0(root, look)
    return names


def test_any_failure_ends_the_take_everywhere(tmp_path: Path) -> None:
    """Whatever fails on one rank, from state_dict to the manifest: every rank is told who, and nothing is left."""
    outcomes = succeed(
        launch(3, failures, committed_after_failures, args=[str(tmp_path / "root")], environment=SMALL_CHUNKS)
    )
    for outcome in outcomes:
        seen = outcome.result(0)
        for name in ("sync", "async"):
            for label, failed, text in [
                ("state_dict", 1, "ValueError: no state today"),
                ("value", 1, "generator"),
                ("kind", 1, "broken"),
                ("full 0", 0, "disk full"),
                ("full 1", 1, "disk full"),
                ("full 2", 2, "disk full"),
                ("second put", 2, "second put"),
                ("own disk", 1, "one folder or bucket for all ranks"),
                ("manifest", 0, "no manifest"),
            ]:
                kind, ranks, message = seen[f"{name} {label}"]
                assert (kind, ranks) == ("RankError", [failed]), (name, label, kind, ranks, message)
                assert text in message, (name, label, message)
                assert "Traceback" in message
        assert all(name.startswith("after-") or " after puts" in name for name in outcome.result(1))
