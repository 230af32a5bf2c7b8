"""Ranks that are killed at each point of a take, and stores of process groups that die around the commit."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import launch

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.coordination import distributed
from torchsnapshot.coordination.sessions import Limits
from torchsnapshot.errors import SnapshotError, StoreFullError
from torchsnapshot.maintenance import collect
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.local import LocalBackend

BLOBS = ".torchsnapshot/blobs/"


def be_impatient() -> None:
    """A rank counts as lost sooner."""
    distributed.Limits = functools.partial(Limits, silence=8.0, acknowledgement=8.0)  # type: ignore[misc,assignment]
    distributed.ENTRY_SECONDS = 8.0


def state_of(version: float) -> dict[str, Any]:
    """A replica and something of each process's own."""
    own = torch.full((100_000,), float(os.getpid())) + version
    return {"model": StateDict(shared=torch.arange(100_000.0) + version, own=own)}


def outcome_of(function: Callable[[], object]) -> list[Any]:
    """What a take came to: the error's type, which ranks failed, its message, and the seconds that it took."""
    start = time.monotonic()
    try:
        function()
    except SnapshotError as error:
        return [type(error).__name__, sorted(getattr(error, "failures", {})), str(error), time.monotonic() - start]
    return ["committed", [], "", time.monotonic() - start]


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


def deaths(root: str, told: str) -> None:
    """Groups that lose a member each: the ones before are always without those that died."""
    be_impatient()
    groups = {
        members: dist.new_group(list(members)) for members in [(0, 1, 2, 3), (0, 1, 2), (0, 1), (1, 4, 5), (4, 5)]
    }
    rank = dist.get_rank()
    seen: dict[str, list[Any]] = {}

    def take(name: str, members: tuple[int, ...], state: dict[str, Any], *, in_background: bool = False) -> None:
        if rank not in members:
            return
        path, group = f"{root}/{name}", groups[members]

        def work() -> None:
            if in_background:
                Snapshot.async_take(path, state, group).wait()
            else:
                Snapshot.take(path, state, group)

        seen[name] = outcome_of(work)

    dist.barrier()
    if rank == 3:
        die()
    take("before agree", (0, 1, 2, 3), state_of(1))
    take("in state_dict", (0, 1, 2), {"model": Deadly()} if rank == 2 else state_of(2))
    if rank == 0:
        around_puts(lambda key: key.startswith(BLOBS), die)
    take("in a put", (0, 1), state_of(3), in_background=True)
    ready = Path(told, "ready")
    if rank == 1:
        ready.touch()
    while rank in (4, 5) and not ready.exists():
        time.sleep(0.01)
    if rank == 1:
        around_puts(lambda key: key.startswith("before commit/.manifests"), die)
    take("before commit", (1, 4, 5), state_of(4))
    if rank == 4:
        around_puts(lambda key: key.endswith(".ok"), die, after=True)
    take("after commit", (4, 5), state_of(5), in_background=True)
    if rank == 5:
        names = sorted(snapshot.name for snapshot in Snapshot.list(root))
        report = collect(root)
        # the manifest without .ok stays, by the rules of gc
        seen["gc"] = [names, report.freed_blobs, collect(root).freed_blobs, len(report.called_dead)]
        seen["verify"] = [len(snapshot.verify()) for snapshot in Snapshot.list(root)]
    Path(told, str(rank)).write_text(json.dumps(seen))
    os._exit(0)


def test_killed_ranks(tmp_path: Path) -> None:
    """Whoever survives is told soon and whom; what was committed stays, the rest is debris that gc takes."""
    told = tmp_path / "told"
    told.mkdir()
    outcomes = launch(6, deaths, args=[str(tmp_path / "root"), str(told)])
    killed = {outcome.rank for outcome in outcomes if outcome.exit_code == -signal.SIGKILL}
    assert killed == {0, 1, 2, 3, 4}, [(outcome.exit_code, outcome.output) for outcome in outcomes]
    seen = json.loads((told / "5").read_text())
    kind, _, message, seconds = seen["before commit"]
    assert kind == "CommitUnknownError", (kind, message)
    assert seconds < 60
    kind, _, message, seconds = seen["after commit"]
    assert kind == "committed", (kind, message)
    names, freed, freed_again, called_dead = seen["gc"]
    assert names == ["after commit"]
    assert freed > 0
    assert freed_again == 0
    assert called_dead >= 2
    assert seen["verify"] == [0]


def first_deaths(root: str, told: str) -> None:
    """As ``deaths``, up to where ranks are left that can tell."""
    be_impatient()
    groups = [dist.new_group(list(range(size))) for size in (4, 3, 2)]
    rank = dist.get_rank()
    seen: dict[str, list[Any]] = {}
    dist.barrier()
    if rank == 3:
        die()
    seen["before agree"] = outcome_of(lambda: Snapshot.take(f"{root}/a", state_of(1), groups[0]))
    state = {"model": Deadly()} if rank == 2 else state_of(2)
    seen["in state_dict"] = outcome_of(lambda: Snapshot.async_take(f"{root}/b", state, groups[1]).wait())
    if rank == 1:
        around_puts(lambda key: key.startswith(BLOBS), die)
    seen["in a put"] = outcome_of(lambda: Snapshot.async_take(f"{root}/c", state_of(3), groups[2]).wait())
    Path(told, str(rank)).write_text(json.dumps(seen))
    os._exit(0)


def test_killed_ranks_are_named(tmp_path: Path) -> None:
    """Before the first round, between rounds, and while blobs are put: every survivor names the rank that is gone."""
    outcomes = launch(4, first_deaths, args=[str(tmp_path / "root"), str(tmp_path)])
    assert [outcome.exit_code for outcome in outcomes] == [0, -9, -9, -9], outcomes
    seen = json.loads((tmp_path / "0").read_text())
    for label, rank in (("before agree", 3), ("in state_dict", 2), ("in a put", 1)):
        kind, failed, message, seconds = seen[label]
        assert (kind, failed) == ("RankError", [rank]), (label, message)
        assert "lost" in message
        assert seconds < 60
    assert not Snapshot.list(str(tmp_path / "root"))


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
            kind, _, message, _ = seen[rank][f"after {in_background}"]
            assert kind == "committed", message
        kind, failed, message, _ = seen[0][f"before {in_background}"]
        assert (kind, failed) == ("RankError", [0]), message
        assert "no manifest" in message
        kind, _, message, seconds = seen[1][f"before {in_background}"]
        assert kind == "CommitUnknownError", message
        assert seconds < 60
    assert sorted(snapshot.name for snapshot in Snapshot.list(str(tmp_path / "root"))) == ["1", "3"]
