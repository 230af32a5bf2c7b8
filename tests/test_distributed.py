"""Sessions of several ranks: rounds, verdicts, failures and deaths, in threads and in real processes.

The functions without ``test_`` run inside the processes that ``launch`` starts.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from launch import Outcome, launch, succeed

from torchsnapshot.coordination import distributed, links, messages
from torchsnapshot.coordination.coordinator import CoordinatorSession
from torchsnapshot.coordination.distributed import connector, group_of
from torchsnapshot.coordination.links import Connections, KeyValueStore, Link
from torchsnapshot.coordination.members import MemberSession, Peer, StoreSession
from torchsnapshot.coordination.messages import CoordinationLost, Stage, Status
from torchsnapshot.coordination.sessions import Limits, Session, SoloSession
from torchsnapshot.engine.background import Task
from torchsnapshot.errors import FormatError, RankError

T = TypeVar("T")

PATIENT = Limits(silence=100.0)
SHORT = Limits(silence=5.0, acknowledgement=5.0)
"""For tests in which somebody dies. On a busy machine a living process may not get to beat for seconds."""


# ------------------------------------------------------------------ ranks as threads


class PlainStore:
    """A store in a dict, which takes reading an absent key (a real store would wait for it) for a bug."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False
        self._lock = threading.Lock()

    @contextmanager
    def _working(self) -> Iterator[dict[str, bytes]]:
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        with self._lock:
            yield self.values

    def set(self, key: str, value: bytes) -> None:
        """As a c10d store does."""
        with self._working() as values:
            values[key] = value

    def check(self, keys: list[str]) -> bool:
        """As a c10d store does."""
        with self._working() as values:
            return all(key in values for key in keys)

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """As a c10d store does."""
        with self._working() as values:
            if key not in values and not expected_value:
                values[key] = desired_value.encode()
            return values.get(key, expected_value.encode())

    def delete_key(self, key: str) -> bool:
        """As a c10d store does."""
        with self._working() as values:
            return values.pop(key, None) is not None

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """As a c10d store does."""
        with self._working() as values:
            assert not (absent := [key for key in keys if key not in values]), f"reading {absent} would never end"
            return [values[key] for key in keys]

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        """As a c10d store does."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)


def enter(store: PlainStore, rank: int, world_size: int, limits: Limits = PATIENT) -> StoreSession:
    """A session of this rank over the store."""
    ranks, connections = range(world_size), Connections(lambda: store)
    if rank == 0:
        return CoordinatorSession(ranks, connections, "group", limits)
    return MemberSession(rank, ranks, connections, "group", limits)


def in_threads(world_size: int, function: Callable[[int], T]) -> list[T | BaseException]:
    """Run a function for each rank in a thread of its own; what they return or raise."""
    results: list[T | BaseException] = [RuntimeError("did not run")] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def one_take(session: Session) -> bytes:
    """Three rounds, the second with an answer of its own for each rank."""
    with session:
        number = str(session.rank).encode()
        gathered = session.round("agree", number, b",".join)
        mine = session.round("exchange", number, lambda values: [value * 2 for value in values])
        return gathered + b" " + mine + b" " + session.finish(number, lambda values: b"done")


def expected_of_take(rank: int, world_size: int) -> bytes:
    """What ``one_take`` returns."""
    return f"{','.join(map(str, range(world_size)))} {rank}{rank} done".encode()


def session_keys(store: PlainStore) -> list[str]:
    """The keys of which no session needs to leave any."""
    return [key for key in store.values if "/door/" not in key]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_rounds_in_threads(world_size: int) -> None:
    """Every rank gets the answers; nothing stays in the store but one small key for each rank."""
    store = PlainStore()
    for _ in range(3):
        results = in_threads(world_size, lambda rank: one_take(enter(store, rank, world_size)))
        assert results == [expected_of_take(rank, world_size) for rank in range(world_size)]
        assert session_keys(store) == []
    assert len(store.values) == world_size - 1
    assert set(store.values.values()) == {b"-"}


def test_what_a_crash_left_behind_is_not_taken_for_new() -> None:
    """Doors at which somebody asked long ago, and sessions that nobody ended, change nothing."""
    store = PlainStore()
    enter(store, 0, 3)._link.close()
    store.values |= {"ts/group/door/1": b"asked-long-ago", "ts/group/welcome/asked-long-ago": b"session-of-old"}
    results = in_threads(3, lambda rank: one_take(enter(store, rank, 3)))
    assert results == [expected_of_take(rank, 3) for rank in range(3)]


def test_large_values_are_cut_in_parts() -> None:
    """A value has no limit, and its parts are removed like the rest."""
    store = PlainStore()
    size = 2 * links.MAX_PART_NBYTES + 12345

    def take(rank: int) -> bytes:
        with enter(store, rank, 3) as session:
            value = bytes([rank]) * size
            shared = session.round("shared", value, lambda values: values[2])
            assert shared == bytes([2]) * size
            return session.finish(value, lambda values: values[::-1])

    assert in_threads(3, take) == [bytes([2 - rank]) * size for rank in range(3)]
    assert session_keys(store) == []
    assert max(map(len, store.values.values())) <= links.MAX_PART_NBYTES + 4


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("step", ["before", "between", "decide"])
def test_an_error_ends_the_session_everywhere(failing: int, step: str) -> None:
    """Whoever fails, and when, every rank raises a RankError with that traceback; the next session works."""
    store = PlainStore()

    def fail(rank: int, here: str) -> None:
        if (rank, here) == (failing, step):
            raise OSError("disk full")

    def decide(values: list[bytes]) -> bytes:
        fail(failing, "decide")
        return b""

    def take(rank: int) -> None:
        with enter(store, rank, 3) as session:
            fail(rank, "before")
            session.round("agree", bytes(2_500_000), decide)
            fail(rank, "between")
            session.finish(b"", decide)

    at = 0 if step == "decide" else failing
    for rank, error in enumerate(in_threads(3, take)):
        assert isinstance(error, RankError), error
        assert f"Failed on rank {at}: OSError: disk full" in str(error)
        assert 'raise OSError("disk full")' in error.failures[at]
        assert isinstance(error.__cause__, OSError) == (rank == at)
    assert session_keys(store) == []
    assert in_threads(3, lambda rank: one_take(enter(store, rank, 3))) == [expected_of_take(r, 3) for r in range(3)]


def test_an_error_does_not_wait_for_slow_ranks() -> None:
    """Two ranks have the verdict while the third has not even entered; when it comes it waits for the next session."""
    store = PlainStore()
    failed = threading.Event()

    def fail(rank: int) -> None:
        with enter(store, rank, 3, Limits(acknowledgement=0.2)) as session:
            if rank == 2:
                raise RuntimeError("sorry")
            session.round("agree", b"", lambda values: b"")

    def take(rank: int) -> bytes:
        if rank == 1:
            failed.wait()
        else:
            with pytest.raises(RankError, match="sorry"):
                fail(rank)
            if rank == 0:
                failed.set()
        return one_take(enter(store, rank, 3))

    assert in_threads(3, take) == [expected_of_take(rank, 3) for rank in range(3)]


def test_interrupt_is_told_but_stays_an_interrupt() -> None:
    """Ctrl-C in one rank ends the others with a RankError, and this one with KeyboardInterrupt."""
    store = PlainStore()

    def take(rank: int) -> None:
        with enter(store, rank, 2) as session:
            if rank == 1:
                raise KeyboardInterrupt
            session.finish(b"", lambda values: b"")

    coordinator, member = in_threads(2, take)
    assert isinstance(member, KeyboardInterrupt)
    assert isinstance(coordinator, RankError)
    assert "KeyboardInterrupt" in coordinator.failures[1]


def test_check_tells_of_failures_between_rounds() -> None:
    """A rank that is busy learns from ``check`` that the session is lost, through rank 0 though that is busy too."""
    store = PlainStore()
    limits = Limits(silence=1.0, entry=100.0)
    told = threading.Barrier(2)

    def take(rank: int) -> None:
        with enter(store, rank, 3, limits) as session:
            session.round("agree", b"", lambda values: b"")
            if rank == 2:
                raise RuntimeError("sorry")
            while True:
                try:
                    session.check()
                except RankError:
                    told.wait()
                    raise
                threading.Event().wait(0.01)

    errors = in_threads(3, take)
    assert [type(error) for error in errors] == [RankError] * 3
    assert all("RuntimeError: sorry" in str(error) for error in errors)


def test_ranks_in_different_rounds() -> None:
    """Ranks that lost step are told so, each with the name of its round."""
    store = PlainStore()

    def take(rank: int) -> None:
        with enter(store, rank, 2) as session:
            session.round("agree" if rank else "exchange", b"", lambda values: b"")

    for error in in_threads(2, take):
        assert isinstance(error, RankError)
        assert "'agree'" in str(error)
        assert "'exchange'" in str(error)


def test_a_rank_that_leaves_early_fails_the_next_round() -> None:
    """Nobody waits for a rank that is not coming any more, be it rank 0."""
    for leaver in (0, 1):
        store, agreed = PlainStore(), threading.Barrier(3)

        def take(
            rank: int, leaver: int = leaver, store: PlainStore = store, agreed: threading.Barrier = agreed
        ) -> None:
            with enter(store, rank, 3) as session:
                session.round("agree", b"", lambda values: b"")
                # a rank that has not read the answer yet may be told of the failure instead
                agreed.wait()
                if rank == leaver or rank == 2:
                    return
                session.round("exchange", b"", lambda values: b"")

        results = in_threads(3, take)
        assert [type(result) for result in results] == [
            type(None) if rank in (leaver, 2) else RankError for rank in range(3)
        ]


def test_wrong_number_of_answers() -> None:
    """A decision with too few answers is an error on every rank, not a hang."""
    store = PlainStore()
    errors = in_threads(3, lambda rank: enter(store, rank, 3).finish(b"", lambda values: values[:2]))
    assert all("2 answers were decided for 3 ranks" in str(error) for error in errors)


def test_a_silent_rank_is_lost() -> None:
    """A rank whose signs of life end is named to all others within the limit."""
    store = PlainStore()
    limits = Limits(silence=0.5, entry=100.0)

    def take(rank: int) -> None:
        with enter(store, rank, 3, limits) as session:
            session.round("agree", b"", lambda values: b"")
            if rank == 2:
                session._link.close()
                raise CoordinationLost("this rank is dead")
            session.finish(b"", lambda values: b"")

    for error in in_threads(3, take)[:2]:
        assert isinstance(error, RankError)
        assert "Failed on rank 2: lost: no sign of life for" in str(error)


def test_a_silent_coordinator_is_lost() -> None:
    """Rank 0's silence is a RankError, and in the last round, where it may have acted, a CoordinationLost."""
    for last in (False, True):
        store = PlainStore()

        def take(rank: int, last: bool = last, store: PlainStore = store) -> None:
            session = enter(store, rank, 2, Limits(silence=0.5, entry=100.0))
            session.round("agree", b"", lambda values: b"")
            if rank == 0:
                session._link.close()
            elif last:
                session.finish(b"", lambda values: b"")
            else:
                session.round("exchange", b"", lambda values: b"")

        error = in_threads(2, take)[1]
        assert "no sign of life" in str(error)
        if last:
            assert isinstance(error, CoordinationLost)
            assert error.reported
        else:
            assert isinstance(error, RankError)
            assert list(error.failures) == [0]


def test_ranks_that_never_enter() -> None:
    """Whoever waits for a rank that does not come is told which after the limit."""
    limits = Limits(silence=100.0, entry=0.3)
    with pytest.raises(RankError, match="Failed on rank 0: lost: has not entered within") as missing:
        enter(PlainStore(), 1, 2, limits)
    assert list(missing.value.failures) == [0]
    with (
        pytest.raises(RankError, match=r"Failed on rank 1 \(and on 1 more\): lost: it has not") as late,
        enter(PlainStore(), 0, 3, limits) as session,
    ):
        session.round("agree", b"", lambda values: b"")
    assert list(late.value.failures) == [1, 2]


def test_who_is_waited_for_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Long before the limit, the log says once which ranks have not entered."""
    limits = Limits(silence=100.0, entry=0.3, notice=0.0)
    with pytest.raises(RankError), enter(PlainStore(), 0, 3, limits) as session:
        session.round("agree", b"", lambda values: b"")
    with pytest.raises(RankError):
        enter(PlainStore(), 1, 2, limits)
    named = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert len(named) == 2
    assert named[0].endswith("for ranks 1, 2")
    assert named[1].endswith("for rank 0, which coordinates it")


def test_a_process_that_was_stopped_does_not_take_the_others_for_silent() -> None:
    """The time in which a process did not look counts as silence of the others only up to two beats."""
    peer = Peer(Status(), looked=time.monotonic() - 3600.0)
    peer.see(Status(), beat=5.0)
    assert peer.silent == 10.0
    peer.see(Status(beat=1), beat=5.0)
    assert peer.silent == 0.0


def test_lost_store() -> None:
    """A store that breaks is a RankError on all, and no success of rank 0's is taken back by it."""
    store = PlainStore()

    def take(rank: int) -> bytes:
        with enter(store, rank, 2) as session:
            session.round("agree", b"", lambda values: b"")
            return session.finish(b"", commit)

    def commit(values: list[bytes]) -> bytes:
        store.broken = True
        return b"committed"

    coordinator, member = in_threads(2, take)
    assert coordinator == b"committed"
    assert isinstance(member, CoordinationLost)
    assert member.reported

    for error in in_threads(2, take):
        assert isinstance(error, RankError)
        assert "Connection reset by peer" in str(error)


def test_a_store_that_does_not_answer() -> None:
    """A request that never returns holds nobody longer than the limit, also if the store cannot be reached at all."""
    never = threading.Event()

    def connect() -> KeyValueStore:
        never.wait()
        raise RuntimeError

    with pytest.raises(RankError, match=r"did not answer for 0\.2 s"):
        CoordinatorSession(range(2), Connections(connect), "group", Limits(silence=0.2))
    never.set()

    def refuse() -> KeyValueStore:
        raise RuntimeError("no route to host")

    with pytest.raises(RankError, match="no route to host"):
        MemberSession(1, range(2), Connections(refuse), "group", PATIENT)


def test_what_a_rank_cannot_read_is_an_error() -> None:
    """Junk under a status key, as a foreign version might write it, ends the session on all ranks that are sane."""
    store = PlainStore()

    def take(rank: int) -> None:
        with enter(store, rank, 2, Limits(silence=100.0, acknowledgement=0.1)) as session:
            session.round("agree", b"", lambda values: b"")
            if rank == 1:
                session._link.close()
                store.set(session._status_key(1), b"\xc1")
                raise CoordinationLost("this rank is not sane")
            session.finish(b"", lambda values: b"")

    coordinator = in_threads(2, take)[0]
    assert isinstance(coordinator, RankError)
    assert "cannot be parsed" in str(coordinator)


def test_ended_sessions_refuse_more() -> None:
    """After the end there are no rounds, and the ends may be repeated."""
    store = PlainStore()

    def take(rank: int) -> Session:
        session = enter(store, rank, 2)
        session.finish(b"", lambda values: b"")
        return session

    for session in in_threads(2, take):
        assert isinstance(session, StoreSession)
        with pytest.raises(RuntimeError, match="has ended"):
            session.round("more", b"", lambda values: b"")
        session.leave()
        error = ValueError("late")
        assert session.fail(error).__cause__ is error
        assert session._link.wait_closed(100.0)


class ThreadlessLink(Link):
    """A link that does its requests in the caller's thread, and does not beat after the first time."""

    def __init__(self, connections: Connections, name: str) -> None:
        self.stats = links.CoordinationStats()
        self._client = links.Client(connections.take(), self.stats)

    def call(self, function: Callable[[links.Client], T], timeout: float) -> T:
        """Do the request."""
        return function(self._client)

    def start_beating(self, beat: Callable[[links.Client], None], seconds: float, timeout: float) -> None:
        """Beat once."""
        beat(self._client)

    def close(self) -> None:
        """There is nothing to close."""


def test_a_thousand_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1,000 ranks of the real code, what coordination itself costs stays at a few KB for each rank."""
    world_size = 1000
    store = PlainStore()
    coordinator = enter(store, 0, world_size)
    # two threads for each of a thousand ranks are too many for a small machine
    monkeypatch.setattr("torchsnapshot.coordination.members.Link", ThreadlessLink)

    def take(rank: int) -> links.CoordinationStats:
        with enter(store, rank, world_size) if rank else coordinator as session:
            session.round("agree", bytes(100), lambda values: bytes(100))
            session.round("exchange", bytes(1000), lambda values: [bytes(500)] * world_size)
            session.finish(bytes(1000), lambda values: bytes(100))
        return session.stats

    first, *others = in_threads(world_size, take)
    assert isinstance(first, links.CoordinationStats)
    assert session_keys(store) == []
    print(f"rank 0 of 1,000: {first}")
    # the values: 2,100 bytes out and 700 in for each rank, and that much for rank 0 from everybody
    assert first.sent_nbytes < world_size * (500 + 4000)
    assert first.received_nbytes < world_size * (2100 + 4000)
    for stats in others:
        assert isinstance(stats, links.CoordinationStats), stats
        assert stats.sent_nbytes < 2100 + 10_000
        assert stats.received_nbytes < 700 + 10_000


# ------------------------------------------------------------------ values, one process, kinds of stores


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4),
        max_leaves=12,
    ),
    st.lists(st.binary(max_size=50), max_size=4),
)
def test_packed_values_return(control: object, arrays: list[bytes]) -> None:
    """Control and arrays come back, the arrays as views."""
    returned, views = messages.unpack(messages.pack(control, arrays), num_arrays=len(arrays))
    assert returned == control
    assert [bytes(view) for view in views] == arrays


@given(st.data())
def test_damaged_values_are_format_errors(data: st.DataObject) -> None:
    """Whatever is cut off or changed, unpacking returns a value of the same shape or raises FormatError."""
    packed = bytearray(messages.pack({"a": [1, 2]}, [b"xyz", b""]))
    if data.draw(st.booleans()):
        packed = packed[: data.draw(st.integers(0, len(packed) - 1))]
    else:
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        _, arrays = messages.unpack(bytes(packed), num_arrays=2)
    except FormatError:
        return
    assert sum(len(array) for array in arrays) == 3


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x90", b"\xdd\xff\xff\xff\xff", messages.msgpack.packb([1, 7, 1, "", False])]
)
def test_bad_statuses_and_verdicts_are_format_errors(data: bytes) -> None:
    """Junk in place of a status or a verdict is a FormatError."""
    with pytest.raises(FormatError):
        Status.unpack(data)
    with pytest.raises(FormatError):
        messages.unpack_failures(data)
    with pytest.raises(FormatError):
        messages.unpack_failures(messages.pack([[1, 2]]))


def test_status_returns() -> None:
    """A status comes back as it was."""
    status = Status(5, Stage.FAILED, 2, "exchange", True)
    assert Status.unpack(status.pack()) == status


def test_verdicts_of_many_failures_stay_small() -> None:
    """When every rank of many fails, some tracebacks and the last line of the others are told, with global ranks."""
    text = "Traceback:\n" + "x" * 1000 + "\nValueError: " + "why " * 1000
    failures = messages.unpack_failures(messages.pack_failures(dict.fromkeys(range(1000), text)))
    assert len(failures) == 1000
    assert failures[7] == text
    assert failures[8].startswith("ValueError: why")
    assert len(messages.pack_failures(failures)) < 1_000_000
    message = str(messages.rank_error(failures, range(1000, 2000), None))
    assert "Failed on rank 0 (global rank 1000) (and on 999 more): ValueError" in message
    assert len(message) < 100_000
    assert len(messages.traceback_text(ValueError("y" * 100_000))) < messages.MAX_TRACEBACK_CHARACTERS + 100


def test_one_process_needs_no_store() -> None:
    """Without torch.distributed a session decides at once, and errors stay what they are."""
    group = group_of()
    assert (group.rank, group.world_size, group.global_ranks, group.background) == (0, 1, (0,), True)
    with group.session() as session:
        assert isinstance(session, SoloSession)
        assert session.round("agree", b"a", lambda values: values[0] * 2) == b"aa"
        assert session.round("exchange", b"a", lambda values: values) == b"a"
        session.check()
        assert session.finish(b"b", lambda values: b"c") == b"c"
    with pytest.raises(OSError, match="disk full"), group.session():
        raise OSError("disk full")


def test_which_stores_connect_again(tmp_path: Path) -> None:
    """Any nesting of prefixes over a TCP, file or hash store does; a store of one's own does not, or says it cannot."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nested = dist.PrefixStore("a", dist.PrefixStore("b", server))
    connect = connector(nested)
    assert connect is not None
    client = connect()
    client.set("k", b"\xff\x00")
    assert nested.get("k") == b"\xff\x00"
    assert client is not nested
    assert connector(dist.FileStore(str(tmp_path / "file"), 1)) is not None
    assert connector(dist.HashStore()) is not None

    class Own(dist.Store):
        pass

    assert connector(dist.PrefixStore("a", Own())) is None
    assert connector(object()) is None
    assert connector(None) is None


def test_a_tcp_store_without_clone_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of torch whose stores have no clone() still give a connection of our own."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    class WithoutClone:
        underlying_store = server

    monkeypatch.setattr(dist, "PrefixStore", WithoutClone)
    connect = connector(WithoutClone())
    assert connect is not None
    connect().set("k", b"v")
    assert server.get("k") == b"v"


@pytest.mark.parametrize("kind", ["tcp", "file", "hash"])
def test_real_stores(kind: str, tmp_path: Path) -> None:
    """The same rounds work over each of torch's stores."""
    store: dist.Store
    if kind == "tcp":
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    else:
        store = dist.HashStore() if kind == "hash" else dist.FileStore(str(tmp_path / "file"), 3)
    connect = connector(dist.PrefixStore("group", store))
    assert connect is not None

    def take(rank: int) -> bytes:
        if rank == 0:
            return one_take(CoordinatorSession(range(3), Connections(connect), "group", PATIENT))
        return one_take(MemberSession(rank, range(3), Connections(connect), "group", PATIENT))

    for _ in range(2):
        assert in_threads(3, take) == [expected_of_take(rank, 3) for rank in range(3)]
        # two doors; a FileStore has up to three keys of its own
        assert store.num_keys() <= 5


def test_connections_are_kept() -> None:
    """A session that went well leaves its connection to the next; broken ones are replaced; a child takes none."""
    made: list[PlainStore] = []

    def connect() -> KeyValueStore:
        made.append(PlainStore())
        return made[-1]

    connections = Connections(connect)
    for _ in range(2):
        link = Link(connections, "link")
        link.call(lambda client: client.set("k", b""), timeout=100.0)
        link.close()
        assert link.wait_closed(100.0)
    assert len(made) == 1

    made[0].broken = True
    link = Link(connections, "link")
    link.call(lambda client: client.set("k", b""), timeout=100.0)
    made[1].broken = True
    with pytest.raises(CoordinationLost):
        link.call(lambda client: client.set("k", b""), timeout=100.0)
    link.close()
    assert link.wait_closed(100.0)
    made[1].broken = False
    connections.give_back(connections.take())
    assert len(made) == 3
    connections._pid = -1
    assert connections.take() is made[3]


def test_groups_made_by_hand_need_no_default_group() -> None:
    """A process group that nobody registered, with no backend and no default group beside it, is enough."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups = [dist.ProcessGroup(dist.PrefixStore("by hand", server), rank, 3) for rank in range(3)]
    assert not dist.is_initialized()
    taken = in_threads(3, lambda rank: one_take(group_of(groups[rank], PATIENT).session()))
    assert taken == [expected_of_take(rank, 3) for rank in range(3)]


def test_link_closes_and_serves_errors() -> None:
    """What a function raises comes back; a closed link refuses; a beat that fails is told by the next call."""
    store = PlainStore()
    link = Link(Connections(lambda: store), "link")
    with pytest.raises(ZeroDivisionError):
        link.call(lambda client: 1 // 0, timeout=100.0)
    beats: list[int] = []

    def beat(client: links.Client) -> None:
        beats.append(1)
        if len(beats) == 3:
            raise FormatError("junk")

    link.start_beating(beat, seconds=0.01, timeout=100.0)

    def call_for_ever() -> None:
        while True:
            link.call(lambda client: client.set("k", b""), timeout=100.0)

    with pytest.raises(CoordinationLost, match="junk"):
        call_for_ever()
    assert len(beats) == 3
    link.close()
    with pytest.raises(CoordinationLost, match="is over"):
        link.call(lambda client: None, timeout=100.0)
    assert link.wait_closed(100.0)


# ------------------------------------------------------------------ ranks as processes


def takes() -> list[Any]:
    """Two sessions one after the other, and what the second one cost."""
    group = group_of(limits=PATIENT)
    one_take(group.session())
    session = group.session()
    return [one_take(session), pickle.loads(pickle.dumps(session.stats))]


def failing_take() -> None:
    """The last rank cannot; the others are inside a round, or on their way to it."""
    group = group_of(limits=PATIENT)
    with group.session() as session:
        if session.rank == session.world_size - 1:
            raise OSError("disk full")
        session.finish(b"", lambda values: b"")


def takes_of_halves() -> list[Any]:
    """Odd and even ranks form groups, of which one is without global rank 0, and take at the same time."""
    world_size = dist.get_world_size()
    halves = [dist.new_group(list(range(start, world_size, 2))) for start in (0, 1)]
    mine = group_of(halves[dist.get_rank() % 2], limits=PATIENT)
    taken = [one_take(mine.session()), list(mine.global_ranks)]
    try:
        group_of(halves[1 - dist.get_rank() % 2])
    except ValueError as error:
        taken.append(str(error))
    return taken


def take_in_background() -> bytes:
    """The process group is destroyed while a thread is in the last round, and the next session runs beside it."""
    group = group_of(limits=PATIENT)
    session = group.session()
    session.round("agree", b"", lambda values: b"")
    destroyed = threading.Event()

    def work() -> bytes:
        destroyed.wait()
        return session.finish(str(session.rank).encode(), b"".join)

    task = Task(work, "background")
    one_take(group.session())
    dist.destroy_process_group()
    destroyed.set()
    return task.wait()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_processes(world_size: int) -> None:
    """Rounds, an error, sub-groups and a background thread, each with real processes over gloo."""
    functions = (takes, failing_take, takes_of_halves, take_in_background)
    outcomes = succeed(launch(world_size, *functions, fresh=world_size == 2))
    for outcome in outcomes:
        taken, stats = outcome.result(0)
        assert taken == expected_of_take(outcome.rank, world_size)
        print(f"{world_size} ranks, rank {outcome.rank}: {stats}")
        assert stats.sent_nbytes < 200_000

        raised = outcome.raised(1)
        assert raised.type_name == "RankError"
        assert f"Failed on rank {world_size - 1}: OSError: disk full" in raised.message
        assert list(raised.failures) == [world_size - 1]
        assert raised.cause == ("OSError" if outcome.rank == world_size - 1 else "")

        half, global_ranks, refusal = outcome.result(2)
        assert global_ranks == list(range(outcome.rank % 2, world_size, 2))
        # a group of one rank knows its global rank too, and needs nobody
        assert half == expected_of_take(outcome.rank // 2, world_size // 2)
        assert "not a member" in refusal

        assert outcome.result(3) == "".join(map(str, range(world_size))).encode()


def die() -> None:
    """End as a process does for which the machine has no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_deciding(values: list[bytes]) -> bytes:
    """Rank 0 has everything, and dies."""
    die()
    return b""


def deaths(folder: str) -> str:
    """Four pairs of ranks, in each of which one is killed at another moment."""
    pairs = [dist.new_group([first, first + 1]) for first in range(0, 8, 2)]
    rank = dist.get_rank()
    group = group_of(pairs[rank // 2], limits=SHORT)
    dist.barrier()
    if rank == 1:
        die()
    try:
        with group.session() as session:
            session.round("agree", b"", lambda values: b"")
            if rank in (3, 4):
                die()
            session.round("exchange", b"", lambda values: b"")
            session.finish(b"", die_deciding)
    except (RankError, CoordinationLost) as error:
        # the survivors of the default group can no longer leave it in an orderly way
        Path(folder, str(rank)).write_text(f"{type(error).__name__} {error}")
        os._exit(0)
    return "went well"


def test_killed_ranks(tmp_path: Path) -> None:
    """The survivor of each pair is told soon whom it lost; where the deed may have been done, it has to look itself."""
    outcomes = launch(8, deaths, args=[str(tmp_path)])
    killed = {1, 3, 4, 6}
    assert {outcome.rank for outcome in outcomes if outcome.exit_code == -signal.SIGKILL} == killed, outcomes
    told = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert told.keys() == set(range(8)) - killed
    assert told[0].startswith("RankError Failed on rank 1: lost: it has not entered")
    assert told[2].startswith("RankError Failed on rank 1 (global rank 3): lost: no sign of life")
    assert told[5].startswith("RankError Failed on rank 0 (global rank 4): lost: no sign of life")
    assert told[7].startswith("CoordinationLost rank 0: no sign of life")


def death_of_the_store() -> None:
    """Rank 0, which holds the store, is killed between two rounds."""
    with group_of(limits=SHORT).session() as session:
        session.round("agree", b"", lambda values: b"")
        if session.rank == 0:
            die()
        session.finish(b"", lambda values: b"")


def test_killed_store() -> None:
    """Where rank 0 holds the store, all others are told as soon as it is dead."""
    outcomes = launch(3, death_of_the_store, agent_store=False)
    assert outcomes[0].exit_code == -signal.SIGKILL
    for outcome in outcomes[1:]:
        raised = outcome.raised()
        assert raised.type_name in ("RankError", "CoordinationLost")
        assert "rank 0" in raised.message
        assert "did not answer" in raised.message


def nobody_waits(folder: str) -> None:
    """A background session that is still running when the interpreter is told to exit."""
    main_is_over = threading.Event()
    session = group_of(limits=PATIENT).session()
    session.round("agree", b"", lambda values: b"")
    # hooks run last in, first out: this one before background's, which waits for the task
    threading._register_atexit(main_is_over.set)  # type: ignore[attr-defined]

    def work() -> bytes:
        main_is_over.wait()
        answer = session.finish(b"", lambda values: b"done")
        Path(folder, str(session.rank)).write_bytes(answer)
        return answer

    Task(work, "background")


def test_interpreter_exit_waits_for_the_verdict(tmp_path: Path) -> None:
    """An un-waited background session ends well after the main thread has, in a process that then exits."""
    succeed(launch(2, nobody_waits, args=[str(tmp_path)]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"0": b"done", "1": b"done"}


# ------------------------------------------------------------------ stores without a second connection


class OneConnection:
    """A store that cannot be cloned."""

    def clone(self) -> object:
        """As stores do that do not support it."""
        raise NotImplementedError


def takes_by_collectives() -> list[Any]:
    """Rounds and failures of each kind, without a store; and what was logged."""
    distributed.store_of = lambda pg: OneConnection()  # type: ignore[assignment]
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchsnapshot").addHandler(handler)
    groups = [group_of(), group_of()]
    assert not groups[0].background
    taken: list[Any] = [one_take(groups[0].session())]
    for step in ("before", "decide", "leaving", "name", "number"):
        try:
            with groups[1].session() as session:
                _one_failing(session, step)
            taken.append(None)
        except RankError as error:
            taken.append((sorted(error.failures), str(error), type(error.__cause__).__name__))
    with groups[0].session() as session:
        taken.append(session.round("only", b"", lambda values: b"1"))
    taken.append(one_take(group_of().session()))
    return [*taken, logged, [session.stats.num_messages]]


def _one_failing(session: Session, step: str) -> None:
    if step == "before" and session.rank == 1:
        raise OSError("disk full")
    decide: Callable[[list[bytes]], Any] = {
        "decide": lambda values: 1 // 0,
        "number": lambda values: [b""],
    }.get(step, lambda values: b"")
    session.round("agree" if step == "name" and session.rank == 1 else "exchange", b"", decide)
    if step == "leaving" and session.rank == 2:
        raise OSError("too late")


def test_collectives_where_the_store_has_no_second_connection() -> None:
    """The fallback does the same rounds, fails on every rank alike, says once that it is one, and works again after."""
    for outcome in succeed(launch(3, takes_by_collectives)):
        first, before, decide, leaving, name, number, only, again, logged, (num_messages,) = outcome.result()
        assert first == again == expected_of_take(outcome.rank, 3)
        assert before[0] == [1]
        assert "Failed on rank 1: OSError: disk full" in before[1]
        assert before[2] == ("OSError" if outcome.rank == 1 else "NoneType")
        assert decide[0] == [0]
        assert "ZeroDivisionError" in decide[1]
        assert decide[2] == ("ZeroDivisionError" if outcome.rank == 0 else "NoneType")
        assert leaving[0] == [2]
        assert "rank 1 is in round 'agree'" in name[1]
        assert "1 answers were decided for 3 ranks" in number[1]
        assert only == b"1"
        assert [message.partition(":")[0] for message in logged] == (
            ["The process group's store allows no second connection"] if outcome.rank == 0 else []
        )
        assert num_messages > 0


# ------------------------------------------------------------------ the harness itself


def one_raises() -> int:
    """Rank 1 raises, the others return their rank."""
    if os.environ["RANK"] == "1":
        raise KeyError("sorry")
    return int(os.environ["LOCAL_RANK"])


@pytest.mark.parametrize("fresh", [False, True])
def test_launch_collects(fresh: bool) -> None:
    """Results, exceptions and output of every process come back; without a group nothing else is started."""
    outcomes: list[Outcome] = succeed(launch(2, one_raises, backend=None, fresh=fresh))
    assert outcomes[0].result() == 0
    assert outcomes[1].raised().type_name == "KeyError"
    with pytest.raises(AssertionError, match="sorry"):
        outcomes[1].result()


def dies() -> None:
    """Rank 0 prints and is killed, the other one leaves at once with a status of its own."""
    print("printed", flush=True)
    if os.environ["RANK"] == "0":
        die()
    os._exit(7)


@pytest.mark.parametrize("fresh", [False, True])
def test_launch_tells_how_processes_end(fresh: bool) -> None:
    """A signal and a status are told as they are, with what was printed before."""
    outcomes = launch(2, dies, backend=None, fresh=fresh)
    assert [outcome.exit_code for outcome in outcomes] == [-signal.SIGKILL, 7]
    assert [outcome.output for outcome in outcomes] == ["printed\n"] * 2
