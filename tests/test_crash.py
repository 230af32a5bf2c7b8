"""A process that ends at any instant: what was committed stays, what wasn't is nothing, and the next one goes on.

The first part ends a simulated process before every single change of the store, with the real ``Snapshot`` code over a
history of takes, deletions and collections. The second part ends real processes with SIGKILL between the system calls
of the local store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Crash, Fuse
from folders import new_process, run_python
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from memory_states import same
from tiny_takes import keys_of

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.errors import SnapshotNotFoundError
from torchsnapshot.maintenance import collect, retain
from torchsnapshot.reading import opening
from torchsnapshot.store import gc, leases, locate
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.processes import Process, current_process
from torchsnapshot.store.repository import Repository
from torchsnapshot.verify import VerifyResult, verify_path

CHUNK_NBYTES = 4096

Committed = dict[str, int]
"""Name of each committed snapshot → number of the state that it holds."""


def state_of(number: int) -> dict[str, Any]:
    """A state for each number: two chunks that all share, one of its own, a pack, and values."""
    own = torch.Generator().manual_seed(number)
    return {
        "frozen": torch.arange(2048, dtype=torch.float32),
        "large": torch.rand(1024, generator=own),
        "small": [torch.rand(300, generator=own) for _ in range(2)],
        "step": number,
    }


def take(path: str, number: int) -> None:
    """Take ``state_of(number)``."""
    Snapshot.take(path, {"app": StateDict(**state_of(number))})


def take_in_background(path: str, number: int) -> None:
    """The same, asynchronously."""
    Snapshot.async_take(path, {"app": StateDict(**state_of(number))}).wait()


def number_at(path: str) -> int | None:
    """The number of the state that a snapshot holds, every bit of it; None where there is no snapshot."""
    target = StateDict()
    try:
        Snapshot(path).restore({"app": target})
    except SnapshotNotFoundError:
        return None
    number = target.data.get("step")
    assert isinstance(number, int)
    assert same(target.data, state_of(number)), f"{path} is neither one state nor the other"
    return number


@dataclass(frozen=True)
class Step:
    """One thing that a process does; ``after`` is what is committed when it is done."""

    name: str
    run: Callable[[str], object]
    after: Committed


HISTORY = [
    Step("first take", lambda root: take(f"{root}/step_1", 1), {"step_1": 1}),
    Step("changed take", lambda root: take(f"{root}/step_2", 2), {"step_1": 1, "step_2": 2}),
    Step("take again", lambda root: take(f"{root}/step_1", 3), {"step_1": 3, "step_2": 2}),
    Step(
        "async take",
        lambda root: take_in_background(f"{root}/step_3", 4),
        {"step_1": 3, "step_2": 2, "step_3": 4},
    ),
    Step("delete", lambda root: Snapshot(f"{root}/step_2").delete(), {"step_1": 3, "step_3": 4}),
    Step("unchanged take", lambda root: take(f"{root}/step_4", 4), {"step_1": 3, "step_3": 4, "step_4": 4}),
    Step("retain", lambda root: retain(root, last=1), {"step_4": 4}),
    Step("gc", lambda root: collect(root, wait=0), {"step_4": 4}),
    Step("take after gc", lambda root: take(f"{root}/step_5", 5), {"step_4": 4, "step_5": 5}),
]


class World:
    """A place for snapshots whose content can be kept and brought back."""

    root: str
    kept: list[Any]

    def keep(self) -> None:
        """Keep what is there now as the next of ``kept``."""
        raise NotImplementedError

    def bring_back(self, kept: Any) -> None:
        """Make it what it was."""
        raise NotImplementedError


class LocalWorld(World):
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder / "runs")
        self._folder = folder
        self.kept = []

    def keep(self) -> None:
        """See ``World.keep``."""
        copy = self._folder / f"kept {len(self.kept)}"
        shutil.copytree(self.root, copy) if Path(self.root).exists() else copy.mkdir()
        for path in sorted(copy.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()  # 256 empty folders for blobs take long to copy
        self.kept.append(copy)

    def bring_back(self, kept: Any) -> None:
        """See ``World.bring_back``."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(kept, self.root)


class MemoryWorld(World):
    """fsspec's filesystem in memory, which is one for the whole process."""

    root = "memory://crashes/runs"

    def __init__(self) -> None:
        self.kept = []
        self._files = MemoryFileSystem()

    def keep(self) -> None:
        """See ``World.keep``."""
        store = self._files.store
        self.kept.append({path: file.getvalue() for path, file in store.items() if path.startswith("/crashes/")})

    def bring_back(self, kept: Any) -> None:
        """See ``World.bring_back``."""
        store = self._files.store
        for path in [path for path in store if path.startswith("/crashes/")]:
            del store[path]
        store.update((path, MemoryFile(self._files, path, data)) for path, data in kept.items())


def processes() -> Iterator[Process]:
    """The identities of processes that all are no more."""
    number = 1 << 30
    while True:
        number += 1
        yield replace(current_process(), pid=number, start_time=1)


@pytest.fixture(scope="module")
def _short_lives() -> Iterator[None]:
    """Chunks of 4 KiB, no waiting for disks, and every lease is that of a process that is no more when it is found."""
    dead = processes()
    real = locate.open_backend

    def open_without_waiting(url: Any, storage_options: Any = None, *, durable: bool = True) -> Backend:
        return real(url, storage_options, durable=False)

    with pytest.MonkeyPatch.context() as patch, knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        for module in (leases, gc):
            patch.setattr(module, "current_process", lambda: next(dead))
        for module in (locate, opening):
            patch.setattr(module, "open_backend", open_without_waiting)
        yield


@pytest.fixture(scope="module", params=["local", "memory"])
def world(request: pytest.FixtureRequest, _short_lives: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world in which the history has happened; what was there before each of its steps is kept."""
    world: World = LocalWorld(tmp_path_factory.mktemp("crashes")) if request.param == "local" else MemoryWorld()
    world.keep()
    for step in HISTORY:
        new_process()
        step.run(world.root)
        world.keep()
    return world


@pytest.mark.parametrize("number", range(len(HISTORY)), ids=[step.name for step in HISTORY])
def test_end_before_every_change(world: World, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a process ends, every snapshot is what it was or what it was to become, and the next process goes on."""
    step, before = HISTORY[number], HISTORY[number - 1].after if number else {}
    nth = 0
    while True:
        world.bring_back(world.kept[number])
        new_process()
        if number and nth % 2:
            number_at(f"{world.root}/{list(before)[-1]}")  # a process that has just resumed
        fuse = Fuse(nth)
        with monkeypatch.context() as patch:
            burn(patch, fuse)
            with contextlib.suppress(Crash):
                step.run(world.root)
        if not fuse.blown:
            break
        try:
            check_after_end(world.root, before, step.after)
        except BaseException as error:
            raise AssertionError(f"after the end behind {nth} changes: {fuse.changes[-1:]}") from error
        nth += 1
    assert nth > 3


def burn(patch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    """Put the fuse between the process and every store that it opens."""
    real = locate.open_backend
    for module in (locate, opening):
        patch.setattr(module, "open_backend", lambda *args, **options: fuse.backend(real(*args, **options)))


def check_after_end(root: str, before: Committed, after: Committed) -> None:
    """What must be true wherever the process has ended."""
    new_process()
    committed = {}
    for name in before | after:
        number = number_at(f"{root}/{name}")
        assert number in (before.get(name), after.get(name)), name
        if number is not None:
            committed[name] = number
    if committed:
        assert {snapshot.name for snapshot in Snapshot.list(root)} == committed.keys()
    # what the process was about is done once more, or something new
    new_process()
    for name in [name for name in before | after if before.get(name) != after.get(name)] or ["step_9"]:
        take(f"{root}/{name}", 9)
        committed[name] = 9
    new_process()
    report = collect(root, wait=0)
    assert (report.failed, report.uncommitted) == ({}, ())
    assert {name: number_at(f"{root}/{name}") for name in committed} == committed
    assert verify_path(root, "bytes") == VerifyResult(sorted(committed), [])
    assert_nothing_left(root)


def assert_nothing_left(root: str) -> None:
    """Beside what snapshots need, the store holds nothing but config, marks and notes."""
    repository = Repository.open(locate.open_root(root))
    needed: set[str] = set()
    for ref in repository.walk().roots:
        needed |= keys_of(repository, ref)
    assert {key for key, _ in repository.list_blobs()} == needed
    for folder in ("leases", "gc/pending", "tmp"):
        assert [info.key for info in repository.backend.list(f".torchsnapshot/{folder}")] == []


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a filesystem in memory, where there is one: an fsync costs nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


KILLED = """
import os, shutil, signal, sys, traceback
import torch
from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.maintenance import collect

root = sys.argv[1]
gone = root + " gone"
CHANGES = ["open", "pwrite", "pwritev", "rename", "link", "unlink", "mkdir", "rmdir"]


def state_of(number):
    return StateDict(frozen=torch.arange(2048.0), large=torch.full((1024,), float(number)), step=number)


def take(path, number):
    Snapshot.take(path, {"app": state_of(number)}, encoding="raw")


def number_at(path):
    target = StateDict()
    Snapshot(path).restore({"app": target})
    number = target["step"]
    assert torch.equal(target["large"], state_of(number)["large"]), path
    assert torch.equal(target["frozen"], state_of(number)["frozen"]), path
    return number


def in_child(run, *arguments):
    # the parent never starts a thread, so that every child is a whole process of its own
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        with knobs.override_max_chunk_size_bytes(4096):
            run(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def arm(nth):
    left = [nth]

    def armed(real):
        def call(*arguments, **options):
            # opening for reading changes nothing
            if real is not real_open or arguments[1] & os.O_CREAT:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return real(*arguments, **options)
        return call

    real_open = os.open
    for name in CHANGES:
        setattr(os, name, armed(getattr(os, name)))


def step(what, nth):
    if what == "gc":
        os.rename(f"{root}/step_2", gone)
    arm(nth)
    if what == "gc":
        collect(root, wait=0)
    else:
        take(f"{root}/step_1", 3)


def check(what):
    assert number_at(f"{root}/step_1") in ((1,) if what == "gc" else (1, 3))
    if what != "gc":
        assert number_at(f"{root}/step_2") == 2
    take(f"{root}/step_1", 4)
    assert collect(root, wait=0).failed == {}
    assert number_at(f"{root}/step_1") == 4
    for snapshot in Snapshot.list(root):
        assert list(snapshot.verify()) == [], snapshot
    for folder in ("leases", "gc/pending", "tmp"):
        there = os.path.join(root, ".torchsnapshot", folder)
        left = os.listdir(there) if os.path.exists(there) else []
        # temporary files of no take stay for an hour
        assert all(name.startswith("anon-") for name in left), (folder, left)


def begin():
    take(f"{root}/step_1", 1)
    take(f"{root}/step_2", 2)


what = sys.argv[2]
nth = 0
while True:
    for folder in (root, gone):
        shutil.rmtree(folder, ignore_errors=True)
    assert in_child(begin) == 0
    status = in_child(step, what, nth)
    if status == 0:
        break
    assert status == signal.SIGKILL, (what, nth, status)
    assert in_child(check, what) == 0, (what, nth)
    nth += 1
print(nth)
"""


@pytest.mark.parametrize("what", ["take", "gc"])
def test_sigkill_before_every_system_call(in_memory: Path, what: str) -> None:
    """A real process that is killed between any two changes of the filesystem leaves nothing that hurts."""
    done = run_python(KILLED, str(in_memory / "runs"), what)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
