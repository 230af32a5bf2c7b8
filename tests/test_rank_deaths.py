"""Ranks that are killed at each point of a take, and stores of process groups that die around the commit."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import launch, side_by_side

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.coordination import distributed
from torchsnapshot.coordination.sessions import Limits
from torchsnapshot.errors import SnapshotError, StoreFullError
from torchsnapshot.maintenance import collect
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.local import LocalBackend

BLOBS = ".torchsnapshot/blobs/"

SILENCE = 15.0
"""Seconds. Long enough for a living process on a busy machine to beat; all deaths wait for it at the same time."""


def be_impatient() -> None:
    """A rank counts as lost sooner."""
    distributed.Limits = functools.partial(Limits, silence=SILENCE, acknowledgement=SILENCE)  # type: ignore[misc,assignment]
    distributed.ENTRY_SECONDS = SILENCE


def state_of(version: float) -> dict[str, Any]:
    """A replica and something of each process's own."""
    own = torch.full((100_000,), float(os.getpid())) + version
    return {"model": StateDict(shared=torch.arange(100_000.0) + version, own=own)}


def outcome_of(function: Callable[[], object]) -> list[Any]:
    """What a take came to: the error's type, which ranks failed, and its message."""
    try:
        function()
    except SnapshotError as error:
        return [type(error).__name__, sorted(getattr(error, "failures", {})), str(error)]
    return ["committed", [], ""]


def around_puts(matches: Callable[[str], bool], act: Callable[[], None], *, after: bool = False) -> None:
    """Do something before, or after, this process puts a key that matches."""
    put = LocalBackend.put

    def acting(self: Backend, key: str, *args: Any, **options: Any) -> None:
        if matches(key) and not after:
            act()
        put(self, key, *args, **options)  # type: ignore[arg-type]
        if matches(key) and after:
            act()

    LocalBackend.put = acting  # type: ignore[method-assign,assignment]


def die() -> None:
    """End as a process does for which the machine has no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(StateDict):
    """Its state cannot be asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Be killed."""
        die()
        return {}


@dataclass(frozen=True)
class Death:
    """One rank is killed at one point of a take.

    Args:
        name: of the snapshot.
        world_size: how many ranks take it.
        rank: which one is killed.
        in_background: the take is asynchronous.
        told: what the survivors are told.
    """

    name: str
    world_size: int
    rank: int
    in_background: bool
    told: str


DEATHS = [
    Death("before agree", 4, 3, False, "RankError"),
    Death("in state_dict", 3, 2, True, "RankError"),
    Death("in a put", 2, 1, True, "RankError"),
    Death("in a put of rank 0", 2, 0, True, "RankError"),
    Death("before commit", 3, 0, False, "CommitUnknownError"),
    Death("after commit", 2, 0, True, "committed"),
]


def take_and_die(root: str, folder: str, death: Death) -> None:
    """A take in which one rank is killed; the others write down what they are told."""
    be_impatient()
    rank = dist.get_rank()
    path, state = f"{root}/{death.name}", state_of(1)
    # nobody is killed before all have a group
    dist.barrier()
    if rank == death.rank:
        if death.name == "before agree":
            die()
        elif death.name == "in state_dict":
            state = {"model": Deadly()}
        elif death.name.startswith("in a put"):
            around_puts(lambda key: key.startswith(BLOBS), die)
        elif death.name == "before commit":
            around_puts(lambda key: key.startswith("before commit/.manifests"), die)
        else:
            around_puts(lambda key: key.endswith(".ok"), die, after=True)

    def work() -> None:
        if death.in_background:
            Snapshot.async_take(path, state).wait()
        else:
            Snapshot.take(path, state)

    told = outcome_of(work)
    Path(folder, f"{death.name} {rank}").write_text(json.dumps(told))
    # the survivors of a group can no longer leave it in an orderly way
    os._exit(0)


def test_killed_ranks(tmp_path: Path) -> None:
    """Whoever survives is told whom it lost; what was committed stays, the rest is debris that gc takes."""
    root, folder = str(tmp_path / "root"), tmp_path / "told"
    folder.mkdir()
    # they mostly wait for the silence to be long enough
    launched = side_by_side(
        *(functools.partial(launch, each.world_size, take_and_die, args=[root, str(folder), each]) for each in DEATHS)
    )
    for death, outcomes in zip(DEATHS, launched, strict=True):
        codes = [-signal.SIGKILL if rank == death.rank else 0 for rank in range(death.world_size)]
        assert [outcome.exit_code for outcome in outcomes] == codes, (death, outcomes)
        for rank in set(range(death.world_size)) - {death.rank}:
            kind, failed, message = json.loads((folder / f"{death.name} {rank}").read_text())
            assert kind == death.told, (death, message)
            if kind == "RankError":
                assert failed == [death.rank], (death, message)
                assert "lost" in message, death
    assert [snapshot.name for snapshot in Snapshot.list(root)] == ["after commit"]
    report = collect(root)
    assert report.freed_blobs > 0
    # one of each take that lost its rank 0
    assert len(report.called_dead) >= 2
    # the manifest without .ok stays, by the rules of gc
    assert collect(root).freed_blobs == 0
    assert not Snapshot(f"{root}/after commit").verify()


# ------------------------------------------------------------------ the process that hosts the group's store


def host_store(folder: str, number: int) -> int:
    """Start a process that hosts a TCPStore; returns its id. Only while this one has no other threads."""
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        unfinished = Path(folder, f"port-{number}.unfinished")
        unfinished.write_text(f"{store.port} {os.getpid()}")
        unfinished.rename(Path(folder, f"port-{number}"))
        while True:
            signal.pause()
    return pid


def by_hand(folder: str, number: int) -> tuple[dist.ProcessGroup, int]:
    """A group of two over that store, with no default group and no IPv6; and the host's process id."""
    place = Path(folder, f"port-{number}")
    while not place.exists():
        time.sleep(0.01)
    port, pid = map(int, place.read_text().split())
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return dist.ProcessGroup(dist.PrefixStore("by hand", store), int(os.environ["RANK"]), 2), pid


def deaths_of_stores(root: str, folder: str) -> dict[str, list[Any]]:
    """The store dies right before and right after the commit, in takes and asynchronous takes."""
    rank = int(os.environ["RANK"])
    if rank == 0:
        for number in range(4):
            host_store(folder, number)
    be_impatient()
    groups = [by_hand(folder, number) for number in range(4)]
    point: list[Any] = ["", 0]

    def kill_and_refuse() -> None:
        os.kill(point[1], signal.SIGKILL)
        os.waitpid(point[1], 0)
        raise StoreFullError("no manifest")

    def kill() -> None:
        os.kill(point[1], signal.SIGKILL)
        os.waitpid(point[1], 0)

    around_puts(lambda key: point[0] == "before" and "/.manifests/" in key, kill_and_refuse)
    around_puts(lambda key: point[0] == "after" and key.endswith(".ok"), kill, after=True)
    seen = {}
    for number, (when, in_background) in enumerate(
        [("before", False), ("after", False), ("before", True), ("after", True)]
    ):
        group, pid = groups[number]
        point[:] = [when, pid]
        path, state = f"{root}/{number}", state_of(number)

        def work() -> None:
            if in_background:  # noqa: B023
                Snapshot.async_take(path, state, group).wait()  # noqa: B023
            else:
                Snapshot.take(path, state, group)  # noqa: B023

        seen[f"{when} {in_background}"] = outcome_of(work)
    return seen


def test_the_ok_is_the_verdict(tmp_path: Path) -> None:
    """A rank that loses the others after it reported durable learns from the store what became of the take."""
    outcomes = launch(
        2, deaths_of_stores, args=[str(tmp_path / "root"), str(tmp_path)], backend=None, agent_store=False
    )
    seen = [outcome.result() for outcome in outcomes]
    for in_background in (False, True):
        for rank in (0, 1):
            kind, _, message = seen[rank][f"after {in_background}"]
            assert kind == "committed", message
        kind, failed, message = seen[0][f"before {in_background}"]
        assert (kind, failed) == ("RankError", [0]), message
        assert "no manifest" in message
        kind, _, message = seen[1][f"before {in_background}"]
        assert kind == "CommitUnknownError", message
    assert sorted(snapshot.name for snapshot in Snapshot.list(str(tmp_path / "root"))) == ["1", "3"]
