"""What a rank learns from the store when it can no longer hear the one that coordinates the take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Failing

from torchsnapshot.ranks.verdict import SILENCE_SECONDS, wait_for_verdict
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.leases import start_take
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.processes import Process
from torchsnapshot.store.records import LEASES_FOLDER, Lease
from torchsnapshot.store.repository import Repository

NAME = "step_1"


class Timer:
    """A clock that runs only while somebody sleeps; ``after`` happens once so much has passed."""

    def __init__(self, after: float = float("inf"), act: Callable[[], object] = lambda: None) -> None:
        self.passed = 0.0
        self._after = after
        self._act = act

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.passed

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        return self.passed

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.passed += seconds
        if self.passed >= self._after:
            self._after = float("inf")
            self._act()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty store."""
    return Repository.create_or_open(LocalBackend(str(tmp_path)))


def put_ok(repository: Repository, take_id: str) -> None:
    """What a commit leaves."""
    key = f"{NAME}/.manifests/{1:015d}-{take_id}"
    repository.backend.put(key, b"manifest")
    repository.backend.put(f"{key}.ok", b"")


def test_the_ok_decides_and_the_end_of_the_lease_does(repository: Repository) -> None:
    """While the lease is there it is waited for the ``.ok``; once it has gone, one more look is the last word."""
    for commits in (True, False):
        take = start_take(repository, NAME, heartbeat_seconds=None)

        def end(take: object = take, commits: bool = commits) -> None:
            if commits:
                put_ok(repository, take.take_id)  # type: ignore[attr-defined]
            take.close()  # type: ignore[attr-defined]

        timer = Timer(30.0, end)
        assert wait_for_verdict(repository, NAME, take.take_id, timer) is commits
        assert 30 <= timer.passed < 35


def test_a_holder_that_is_no_more_is_not_waited_for(repository: Repository) -> None:
    """The lease of a process that died stays behind, and counts as gone."""
    take = start_take(repository, NAME, heartbeat_seconds=None)
    here = Lease.unpack(repository.backend.read(f"{LEASES_FOLDER}/{take.take_id}")).process
    dead = Process(here.host, here.boot_id, here.pid_namespace, here.pid, here.start_time + 1)
    repository.backend.put(f"{LEASES_FOLDER}/{take.take_id}", Lease("take", dead, NAME).pack())
    timer = Timer()
    assert not wait_for_verdict(repository, NAME, take.take_id, timer)
    assert timer.passed == 0
    take.close()


def test_a_lease_that_nobody_renews_is_not_waited_for(repository: Repository) -> None:
    """Somebody on another host who does nothing any more is given several heartbeats."""
    take = start_take(repository, NAME, heartbeat_seconds=None)
    timer = Timer()
    assert not wait_for_verdict(repository, NAME, take.take_id, timer)
    assert SILENCE_SECONDS < timer.passed < SILENCE_SECONDS + 10
    take.close()


def test_a_store_without_answers_is_asked_again(tmp_path: Path) -> None:
    """Errors of the store do not decide; but a store that never answers is not asked for ever."""
    fails = [True]
    backend: Backend = LocalBackend(str(tmp_path))
    Repository.create_or_open(backend)
    repository = Repository.create_or_open(Failing(backend, lambda operation, key: fails[0] and operation == "stat"))
    take = start_take(Repository.create_or_open(backend), NAME, heartbeat_seconds=None)
    put_ok(repository, take.take_id)
    assert not wait_for_verdict(repository, NAME, take.take_id, Timer())
    assert wait_for_verdict(repository, NAME, take.take_id, Timer(20.0, lambda: fails.__setitem__(0, False)))
    take.close()
