"""The gc protocol, by running the real takes and collectors in interleavings of single store operations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaving import HOURS, Actor, CacheOfProcess, World
from tiny_takes import (
    blobs_of,
    keys_of,
    manifest_of,
    missing_blobs,
    protocol_objects,
    take,
    write_blobs,
)

from torchsnapshot.errors import SnapshotError
from torchsnapshot.store import known
from torchsnapshot.store.gc import collect
from torchsnapshot.store.leases import TakeSession, start_take
from torchsnapshot.store.repository import Repository


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
                    refs = write_blobs(session, wanted, known_now)
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
    named: set[str] = set()
    for ref in repository.walk().refs:
        named |= keys_of(repository, ref)
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


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A store with one snapshot, "old", which the process "w1" has taken; a test says who goes on when."""
    found = World(lambda limit: 0)
    monkeypatch.setattr(known, "_filled", CacheOfProcess(found))
    found.local.actor = Actor(found, "w1", lambda actor: None)
    take(found.repository, "old", b"wanted", time=found.time)
    yield found
    found.end()
    check_world(found)


def wants(world: World, process: str, name: str) -> Actor:
    """A training process that is about to take the content of "old" once more."""
    return world.add(process, take_several(name, [[b"wanted"]], []))


def delete_now(world: World, name: str) -> None:
    """A user deletes a snapshot, in one go."""
    world.backend.delete([info.key for info in world.backend.list(name)])


def test_a_take_that_is_called_dead_between_its_checks_and_its_ok_does_not_succeed(world: World) -> None:
    """The mark that came after the first check is found by the second one; the manifest goes again."""
    taker, collector = wants(world, "w1", "new"), world.add("gc", run_gc(1))
    world.start()
    world.until(taker, "put", "new_0/.manifests/")
    delete_now(world, "old")
    world.time.seconds += 2 * HOURS
    world.finish(collector)
    assert blobs_of(world.backend) == set()
    world.finish(taker)
    assert world.successes == []
    assert world.repository.manifests_of("new_0") == []


def test_a_collector_that_was_taken_over_deletes_nothing(world: World) -> None:
    """A take that began after the takeover saw nothing condemned, and the old collector never looked for its lease."""
    first, second = wants(world, "w1", "first"), wants(world, "w2", "second")
    slow, other = world.add("gc1", run_gc(1)), world.add("gc2", run_gc(1))
    world.start()
    world.until(first, "put", "first_0/.manifests/")
    delete_now(world, "old")
    world.until(slow, "list", "leases")
    world.until(slow, "put", "gc/pending")
    world.until(slow, "list", "leases")
    for _ in range(3):
        world.step(slow)
    world.finish(first)
    assert len(world.successes) == 1
    # the slow collector sees that the lease has gone, and stalls before it reads the manifests again
    while slow.next != ("list", ""):
        world.step(slow)
    world.time.seconds += 2 * HOURS
    world.finish(other)
    world.until(second, "put", "second_0/.manifests/")
    delete_now(world, "first_0")
    world.finish(slow)
    world.finish(second)
    assert [path for path, _, _ in world.successes] == ["first_0", "second_0"]
    check_world(world)


def test_whoever_takes_over_a_pending_set_leaves_a_marker(world: World) -> None:
    """The deletes of a dead collector may still land: no index from before may be trusted once its set has gone."""
    dead, other, taker = world.add("gc1", run_gc(1)), world.add("gc2", run_gc(1)), wants(world, "w1", "new")
    delete_now(world, "old")
    dead.holds_deletes = True
    world.start()
    world.until(dead, "delete", "/blobs/")
    world.step(dead)
    dead.is_dead = True
    world.finish(dead)
    world.time.seconds += 2 * HOURS
    world.backend.put(f"broken/.manifests/000001-{'0' * 24}", b"this stops the other collector after its takeover")
    world.finish(other)
    assert protocol_objects(world.backend) == []
    assert blobs_of(world.backend) != set()
    world.finish(taker)
    world.land()
    assert len(world.successes) == 1
    check_world(world)
    delete_now(world, "broken")


def test_a_manifest_without_its_ok_is_no_evidence(world: World) -> None:
    """The take that put it may have been called dead, and its blobs deleted, though not yet out of sight."""
    lost, collector, taker = wants(world, "w1", "lost"), world.add("gc", run_gc(1)), wants(world, "w2", "new")
    world.start()
    world.until(lost, "put", "lost_0/.manifests/")
    delete_now(world, "old")
    world.time.seconds += 2 * HOURS
    collector.holds_deletes = True
    world.finish(collector)
    world.step(lost)
    assert len(world.repository.manifests_of("lost_0")) == 1
    world.finish(taker)
    world.finish(lost)
    world.land()
    assert [path for path, _, _ in world.successes] == ["new_0"]
    check_world(world)


def test_the_sweeps_are_listed_after_the_condemned_sets(world: World) -> None:
    """Whatever sweep ends between the two readings is seen by the second one."""
    collector, taker = world.add("gc", run_gc(1)), wants(world, "w1", "new")
    delete_now(world, "old")
    world.start()
    world.until(collector, "delete", "/blobs/")
    world.until(taker, "list", "gc/pending")
    world.finish(collector)
    world.finish(taker)
    assert len(world.successes) == 1
    check_world(world)


def beat_now(world: World, actor: Actor) -> None:
    """A heartbeat of whatever this actor is doing."""
    for info in world.backend.list(".torchsnapshot/leases"):
        if info.key in actor.keys:
            world.backend.put(info.key, world.backend.read(info.key))


def wait_for(world: World, collector: Actor) -> None:
    """Let a collector publish its set, list the leases, and find that it must wait."""
    world.until(collector, "put", "gc/pending")
    world.until(collector, "list", "leases")
    while collector.next != ("sleep", ""):
        world.step(collector)


def test_what_was_condemned_once_stays_out_of_the_index(world: World) -> None:
    """A set that is being taken over vanishes behind its marker: a later take that trusts that marker must not trust
    what an earlier one had read while the set was there.
    """
    other_taker = wants(world, "u", "m")
    slow, hasty = world.add("gc1", run_gc(1)), world.add("gc2", run_gc(1))
    taker = world.add("w", take_several("w", [[b"something else"], [b"wanted"]], []))
    world.start()
    world.until(other_taker, "put", "m_0/.manifests/")
    delete_now(world, "old")
    wait_for(world, slow)
    world.finish(other_taker)
    world.until(slow, "list", "")
    while slow.next != ("list", ""):
        world.step(slow)
    world.time.seconds += 2 * HOURS
    world.until(hasty, "delete", "gc/pending")
    world.until(taker, "put", "leases")
    world.step(taker)
    world.until(taker, "put", "leases")
    delete_now(world, "m_0")
    world.until(slow, "delete", "/blobs/")
    world.step(hasty)
    world.until(taker, "put", "w_1/.manifests/")
    world.finish(slow)
    world.finish(taker)
    assert [path for path, _, _ in world.successes] == ["m_0", "w_0", "w_1"]
    check_world(world)


def test_an_index_is_not_tagged_with_the_marker_of_a_set_that_was_not_read(world: World) -> None:
    """A set that is published after a take has listed the sets, and marked before it has listed the sweeps, is seen
    under neither name: the take must notice that the sweeps have changed meanwhile.
    """
    other_taker = wants(world, "u", "m")
    slow, hasty = world.add("gc1", run_gc(1)), world.add("gc2", run_gc(1))
    taker = world.add("w", take_several("w", [[b"wanted"], [b"wanted"]], []))
    world.start()
    world.until(other_taker, "put", "m_0/.manifests/")
    delete_now(world, "old")
    world.until(taker, "list", "gc/damaged")
    wait_for(world, slow)
    world.finish(other_taker)
    world.time.seconds += 2 * HOURS
    beat_now(world, taker)
    world.until(hasty, "delete", "gc/pending")
    world.until(taker, "put", "leases")
    delete_now(world, "m_0")
    delete_now(world, "w_0")
    world.until(slow, "delete", "/blobs/")
    world.step(hasty)
    world.until(taker, "put", "w_1/.manifests/")
    world.finish(slow)
    world.finish(taker)
    assert [path for path, _, _ in world.successes] == ["m_0", "w_0", "w_1"]
    check_world(world)
