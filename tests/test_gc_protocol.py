"""The gc protocol, by running the real takes and collectors in interleavings of single store operations."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
from faults import Crash, CrashAt, WrappingBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_takes import (
    Time,
    blobs_of,
    manifest_of,
    missing_blobs,
    new_store,
    protocol_objects,
    reopened,
    take,
    write_blobs,
)

from torchsnapshot.errors import SnapshotError
from torchsnapshot.store import known
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.gc import collect
from torchsnapshot.store.keys import STORE_FOLDER
from torchsnapshot.store.leases import TakeSession, start_take
from torchsnapshot.store.repository import Repository

HOURS = 3600.0


class Stopped(BaseException):
    """The run is over; whoever still waits ends here."""


class Actor:
    """One process: a thread that the scheduler lets do one store operation at a time."""

    def __init__(self, world: World, name: str, run: Callable[[Actor], None]) -> None:
        self.world = world
        self.name = name
        self.process = name
        self.backend = GatedBackend(world.backend, self)
        self.repository = reopened(world.repository, self.backend)
        self.go = threading.Semaphore(0)
        self.is_done = False
        self.is_dead = False
        self._run = run
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)

    def _main(self) -> None:
        self.world.local.actor = self
        try:
            self.pause()
            self._run(self)
        except (Crash, Stopped, SnapshotError):
            pass
        except BaseException as error:
            self.world.errors.append(error)
        finally:
            self.is_done = True
            self.world.turn.release()

    def pause(self) -> None:
        """Wait to be let on."""
        self.world.turn.release()
        self.go.acquire()
        if self.world.is_over:
            raise Stopped
        if self.is_dead:
            raise Crash

    def sleep(self, seconds: float) -> None:
        """As a clock: others act meanwhile."""
        self.pause()
        self.world.time.seconds += seconds

    def now(self) -> float:
        """As a clock."""
        return self.world.time.seconds

    def monotonic(self) -> float:
        """As a clock."""
        return self.world.time.seconds


class GatedBackend(WrappingBackend):
    """Waits for the scheduler before each operation; a deleted blob is deleted once more at any time later."""

    def __init__(self, inner: Backend, actor: Actor) -> None:
        super().__init__(inner)
        self._actor = actor

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Wait, then do it."""
        self._actor.pause()
        if operation == "delete" and "/blobs/" in key:
            self._actor.world.late_deletes.append(key)
        return call()


class World:
    """A store, its actors, and the scheduler that picks who goes on."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.time = Time()
        self.repository = new_store(self.time)
        self.backend = self.repository.backend
        self.turn = threading.Semaphore(0)
        self.local = threading.local()
        self.errors: list[BaseException] = []
        self.late_deletes: list[str] = []
        self.is_over = False
        self.actors: list[Actor] = []
        self.successes: list[tuple[str, frozenset[str], str]] = []
        self.caches: dict[str, dict[str, known.Filled]] = {}

    def add(self, name: str, run: Callable[[Actor], None]) -> Actor:
        actor = Actor(self, name, run)
        self.actors.append(actor)
        return actor

    def start(self) -> None:
        for actor in self.actors:
            actor.thread.start()
            self.turn.acquire()

    def step(self, actor: Actor) -> None:
        """Let one actor do one operation."""
        actor.go.release()
        self.turn.acquire()

    def run(self, *, jumps: int, crashes: int, max_steps: int = 3000) -> None:
        """Let the actors run, in an order that ``choose`` picks, until all are done."""
        self.start()
        for _ in range(max_steps):
            live = [actor for actor in self.actors if not actor.is_done]
            if not live:
                break
            event = self.choose(40)
            if event == 0 and jumps:
                jumps -= 1
                self.time.seconds += 2 * HOURS
            elif event == 1 and crashes:
                crashes -= 1
                live[self.choose(len(live))].is_dead = True
            elif event == 2 and self.late_deletes:
                self.backend.delete([self.late_deletes[self.choose(len(self.late_deletes))]])
            else:
                self.step(live[self.choose(len(live))])
        self.is_over = True
        for actor in self.actors:
            while not actor.is_done:
                self.step(actor)
            actor.thread.join()
        if self.errors:
            raise self.errors[0]


class CacheOfProcess(dict[str, known.Filled]):
    """In place of the process-wide cache of ``known``: one for each simulated process."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def _mine(self) -> dict[str, known.Filled]:
        actor: Actor = self._world.local.actor
        return self._world.caches.setdefault(actor.process, {})

    def get(self, key: str, default: known.Filled | None = None) -> known.Filled | None:  # type: ignore[override]
        return self._mine().get(key, default)

    def __setitem__(self, key: str, value: known.Filled) -> None:
        self._mine()[key] = value


def take_several(name: str, contents: list[list[bytes]], sessions: list[TakeSession]) -> Callable[[Actor], None]:
    """A training process: one take after the other; a failed one does not end it."""

    def run(actor: Actor) -> None:
        repository = actor.repository
        for number, wanted in enumerate(contents):
            path = f"{name}_{number}"
            try:
                with start_take(repository, path, clock=actor, heartbeat_seconds=None) as session:
                    sessions.append(session)
                    known_now = known.known_for_take(repository, session.evidence, None, actor.monotonic)
                    refs = write_blobs(session, wanted)
                    manifest = manifest_of(repository, session.take_id, refs, session.commit_time_ms())
                    session.commit(manifest)
                    keys = frozenset(ref.key for ref in refs)
                    actor.world.successes.append((path, keys, session.take_id))
                    known_now.learn(refs)
            except SnapshotError:
                continue

    return run


def run_gc(times: int) -> Callable[[Actor], None]:
    """A process that collects."""

    def run(actor: Actor) -> None:
        for _ in range(times):
            try:
                collect(actor.repository, wait=20.0, force=True, clock=actor)
            except SnapshotError:
                continue

    return run


def remove(name: str) -> Callable[[Actor], None]:
    """A user who deletes one snapshot with everything in its folder."""

    def run(actor: Actor) -> None:
        for _ in range(3):
            keys = [info.key for info in actor.backend.list(name)]
            actor.backend.delete(keys)

    return run


def beat(sessions: list[TakeSession]) -> Callable[[Actor], None]:
    """The heartbeats of whatever takes run, which may land at any time."""

    def run(actor: Actor) -> None:
        for _ in range(6):
            actor.pause()
            if sessions and sessions[-1]._beat is not None:
                held = sessions[-1]._beat
                if not held.is_ended:
                    actor.backend.touch(held.key) if actor.backend.is_local else actor.backend.put(held.key, held._data)

    return run


def check_world(world: World) -> None:
    """Every take that reported success, and that nobody has removed, has all its blobs."""
    there = blobs_of(world.backend)
    manifests = {ref.manifest.take_id for ref in world.repository.walk().refs if ref.committed}
    for path, keys, take_id in world.successes:
        if take_id in manifests:
            assert keys <= there, f"{path} of take {take_id} lacks {sorted(keys - there)}"


def play(choose: Callable[[int], int], patch: pytest.MonkeyPatch) -> World:
    """One run: a snapshot from before, two training processes that want its content, a user, and two collectors."""
    world = World(choose)
    sessions: list[TakeSession] = []
    patch.setattr(known, "_filled", CacheOfProcess(world))
    old = Actor(world, "w1", lambda actor: None)  # what the process of w1 did before: its index knows the old snapshot
    world.local.actor = old
    take(world.repository, "old", b"wanted", b"other", time=world.time)
    world.add("w1", take_several("a", [[b"wanted", b"a"], [b"wanted", b"a"], [b"other", b"a"]], sessions))
    world.add("w2", take_several("b", [[b"wanted", b"b"], [b"other", b"wanted"]], sessions))
    world.add("user", remove("old"))
    world.add("user2", remove("a_0"))
    world.add("gc1", run_gc(2))
    world.add("gc2", run_gc(2))
    world.add("beat", beat(sessions))
    world.run(jumps=choose(3), crashes=choose(3))
    check_world(world)
    return world


def finish(world: World) -> None:
    """After any run: gc goes through, frees what nothing names, and leaves nothing of the protocol behind."""
    for key in world.late_deletes:
        world.backend.delete([key])
    check_world(world)
    world.time.seconds += 3 * HOURS
    repository = Repository.open(world.backend)
    collect(repository, force=True, clock=world.time)
    world.time.seconds += 3 * HOURS
    collect(repository, force=True, clock=world.time)
    check_world(world)
    assert not missing_blobs(repository)
    assert protocol_objects(world.backend) == []
    referenced = {key for _, keys, take_id in world.successes for key in keys}
    named = set()
    for ref in repository.walk().refs:
        named |= set(known.ManifestFile(repository.backend.read(ref.object)).envelope.all_keys(repository.read_table))
    assert blobs_of(world.backend) <= named | referenced
    assert blobs_of(world.backend) == named


@pytest.mark.parametrize("seed", range(60))
def test_random_interleavings_lose_no_blob(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes, collectors, deletions, crashes and time jumps in any order leave every successful take whole."""
    world = play(random.Random(seed).randrange, monkeypatch)
    finish(world)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chosen_interleavings_lose_no_blob(data: st.DataObject) -> None:
    """The same, with schedules that hypothesis searches and shrinks: long runs of one actor, then a switch."""
    bursts: Iterator[tuple[int, int]] = iter(
        data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), max_size=60))
    )
    state = {"actor": 0, "left": 0}

    def choose(limit: int) -> int:
        if limit in (3, 40):
            return 0 if limit == 3 else 39
        if state["left"] == 0:
            state["actor"], state["left"] = next(bursts, (state["actor"] + 1, 1000))
        state["left"] -= 1
        return state["actor"] % limit

    with pytest.MonkeyPatch.context() as patch:
        finish(play(choose, patch))


def prepared() -> tuple[Time, Repository]:
    """A store with two snapshots that share content, and with debris for gc."""
    time = Time()
    repository = new_store(time)
    known.forget()
    take(repository, "one", b"shared", b"first", time=time)
    take(repository, "two", b"shared", b"second", time=time)
    take(repository, "gone", b"shared", b"garbage", time=time)
    repository.delete_snapshot("gone")
    return time, repository


@pytest.mark.parametrize("after", [False, True])
def test_a_take_may_crash_at_every_store_operation(after: bool) -> None:
    """Wherever a take stops: the older snapshots are whole, it is either committed and whole or not there, gc cleans up."""
    nth = 0
    crashed = True
    while crashed:
        time, repository = prepared()
        take(repository, "again", b"shared", b"old generation", time=time)
        backend = CrashAt(repository.backend, nth, after=after)
        known.forget()
        reported = False
        try:
            take(reopened(repository, backend), "again", b"shared", b"second", b"new", time=time)
            reported = True
        except Crash:
            pass
        crashed = backend.crashed
        nth += 1
        assert reported or crashed
        assert not missing_blobs(repository)
        newest = repository.newest_committed("again")
        assert newest is not None
        assert newest.manifest.generation == 2 or not reported
        time.seconds += 2 * HOURS
        known.forget()
        take(repository, "next", b"shared", b"third", time=time)
        report = collect(repository, clock=time)
        assert report.failed == {}
        assert not missing_blobs(repository)
        assert {info.name for info in repository.list_snapshots()} == {"one", "two", "again", "next"}
        assert protocol_objects(repository.backend) == []
    assert nth > 15


@pytest.mark.parametrize("after", [False, True])
def test_a_collector_may_crash_at_every_store_operation(after: bool) -> None:
    """Wherever a collector stops: every snapshot is whole, takes go on, and the next collector finishes its work."""
    nth = 0
    crashed = True
    while crashed:
        time, repository = prepared()
        backend = CrashAt(repository.backend, nth, after=after)
        try:
            collect(reopened(repository, backend), clock=time)
        except Crash:
            pass
        crashed = backend.crashed
        nth += 1
        assert not missing_blobs(repository)
        # the same process, which remembers what it took, and a new one
        take(repository, "three", b"shared", b"garbage", time=time)
        known.forget()
        take(repository, "four", b"shared", b"garbage", time=time)
        assert not missing_blobs(repository)
        time.seconds += 2 * HOURS
        repository.delete_snapshot("four")
        collect(repository, clock=time)
        collect(repository, clock=time)
        assert not missing_blobs(repository)
        assert protocol_objects(repository.backend) == []
        named = set()
        for ref in repository.walk().refs:
            named |= known.ManifestFile(repository.backend.read(ref.object)).envelope.all_keys(repository.read_table)
        assert blobs_of(repository.backend) == named
    assert nth > 15


@pytest.mark.parametrize("after", [False, True])
def test_a_deletion_may_crash_at_every_store_operation(after: bool) -> None:
    """Wherever a deletion stops: the others are whole, no older generation comes back, and deleting again finishes it."""
    nth = 0
    crashed = True
    while crashed:
        time, repository = prepared()
        first = take(repository, "three", b"shared", b"old generation", time=time)
        repository.backend.put(f"three/.manifests/000002-{'0' * 24}", b"a take that never got its .ok")
        repository.backend.delete([f"three/.manifests/000002-{'0' * 24}"])
        backend = CrashAt(repository.backend, nth, after=after)
        try:
            reopened(repository, backend).delete_snapshot("three")
        except Crash:
            pass
        crashed = backend.crashed
        nth += 1
        left = repository.newest_committed("three")
        assert left is None or left.manifest == first.manifest
        if repository.manifests_of("three"):
            repository.delete_snapshot("three")
        collect(repository, clock=time)
        assert not missing_blobs(repository)
        assert {info.name for info in repository.list_snapshots()} == {"one", "two"}
    assert nth > 4
    assert STORE_FOLDER == ".torchsnapshot"
