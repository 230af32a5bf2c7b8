"""One session's own connection to the process group's store, and the thread that it lives in.

What lives here: the thread that does every request of a session and beats in between, the requests themselves with
their counts and limits. What doesn't: what is said (``members``, ``coordinator``), which store it is
(``distributed``).

Invariants:

- Only a link's thread touches its client. Callers wait for the thread, never for a socket: a store that stopped
  answering makes ``call`` raise ``CoordinationLost`` after a bounded time, and Ctrl-C works at any moment.
- Nothing here waits inside the store: keys are read only where they are known to exist. (A ``wait`` that times out
  also prints two warnings each time.)
- The thread is a daemon: it beats as long as some thread of the caller works, and never keeps a process alive.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, ParamSpec, Protocol, TypeVar, cast

from torchsnapshot.coordination.messages import CoordinationLost

P = ParamSpec("P")
T = TypeVar("T")

MAX_PART_NBYTES = 1 << 20
"""Values are stored in parts of this size: a TCPStore refuses 8 MiB, and between two parts the link can beat."""
MAX_KEYS_PER_REQUEST = 512
"""A TCPStore parses a request again from its start with every packet that arrives."""

_NUM_PARTS = struct.Struct("<I")


class KeyValueStore(Protocol):
    """What is used of a ``torch.distributed.Store``."""

    def set(self, key: str, value: bytes) -> None: ...  # noqa: D102
    def check(self, keys: list[str]) -> bool: ...  # noqa: D102
    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...  # noqa: D102
    def delete_key(self, key: str) -> bool: ...  # noqa: D102
    def multi_get(self, keys: list[str]) -> list[bytes]: ...  # noqa: D102
    def multi_set(self, keys: list[str], values: list[bytes]) -> None: ...  # noqa: D102


@dataclass(slots=True)
class CoordinationStats:
    """What one rank exchanged in one session: requests, and the bytes of their keys and values."""

    num_messages: int = 0
    sent_nbytes: int = 0
    received_nbytes: int = 0


class Client:
    """The requests of one session, counted. Any error of the store is a ``CoordinationLost``."""

    def __init__(self, store: KeyValueStore, stats: CoordinationStats) -> None:
        self._store = store
        self._stats = stats

    def set(self, key: str, value: bytes) -> None:
        """Store a value under a key."""
        self._request(self._store.set, key, value)

    def set_many(self, values: Mapping[str, bytes]) -> None:
        """Store many small values."""
        for keys in _batches(list(values)):
            self._request(self._store.multi_set, keys, [values[key] for key in keys])

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that exist."""
        found: list[bytes] = []
        for batch in _batches(keys):
            values = self._request(self._store.multi_get, batch)
            self._stats.received_nbytes += sum(map(len, values))
            found.extend(bytes(value) for value in values)
        return found

    def has_all(self, keys: Sequence[str]) -> bool:
        """Whether every one of the keys exists."""
        return all(self._request(self._store.check, batch) for batch in _batches(keys))

    def create(self, key: str, value: str) -> None:
        """Store a value unless the key exists."""
        self._request(self._store.compare_set, key, "", value)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys; absent ones are no error."""
        for key in keys:
            self._request(self._store.delete_key, key)

    def get_values(self, keys: Sequence[str]) -> list[bytes]:
        """The values whose ``parts`` were stored under these keys."""
        first = self.get_many([f"{key}/0" for key in keys])
        counts = [_NUM_PARTS.unpack_from(part)[0] for part in first]
        rest = iter(
            self.get_many(
                [f"{key}/{part}" for key, count in zip(keys, counts, strict=True) for part in range(1, count)]
            )
        )
        return [
            b"".join([part[_NUM_PARTS.size :], *(next(rest) for _ in range(1, count))])
            for part, count in zip(first, counts, strict=True)
        ]

    def _request(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._stats.num_messages += 1
        self._stats.sent_nbytes += sum(_nbytes(argument) for argument in args)
        try:
            return function(*args, **kwargs)
        except Exception as error:  # stores raise RuntimeErrors of many kinds
            reason = str(error).partition("\n")[0]
            raise CoordinationLost(f"the process group's store did not answer: {reason}") from error


def _nbytes(argument: object) -> int:
    if isinstance(argument, list):
        return sum(map(len, argument))
    return len(argument) if isinstance(argument, str | bytes) else 0


def parts(key: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The keys and values that hold ``data``, the first of them last: it says how many there are."""
    count = max(1, -(-len(data) // MAX_PART_NBYTES))
    for part in range(count - 1, 0, -1):
        yield f"{key}/{part}", data[part * MAX_PART_NBYTES : (part + 1) * MAX_PART_NBYTES]
    yield f"{key}/0", _NUM_PARTS.pack(count) + data[:MAX_PART_NBYTES]


def part_keys(key: str, nbytes: int) -> list[str]:
    """The keys of a value of so many bytes."""
    return [f"{key}/{part}" for part in range(max(1, -(-nbytes // MAX_PART_NBYTES)))]


def _batches(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), MAX_KEYS_PER_REQUEST):
        yield list(keys[start : start + MAX_KEYS_PER_REQUEST])


class Connections:
    """Connections to one store, kept from session to session.

    A new one costs a reverse name lookup at both ends, at the server's in the thread that serves every rank: where
    names resolve slowly, connecting for each take would hold up the whole job.

    Args:
        connect: makes a connection; it may block.
    """

    def __init__(self, connect: Callable[[], KeyValueStore]) -> None:
        self._connect = connect
        self._idle: list[KeyValueStore] = []
        self._pid = os.getpid()

    def take(self) -> KeyValueStore:
        """A connection that nobody else uses."""
        while self._idle and self._pid == os.getpid():
            store = self._idle.pop()
            try:
                store.check(["ts"])
            except Exception:
                continue  # it broke while it was idle
            return store
        return self._connect()

    def give_back(self, store: KeyValueStore) -> None:
        """Keep a connection for the next session."""
        if self._pid == os.getpid():
            self._idle.append(store)


# ------------------------------------------------------------------ the thread


class _Request(Generic[T]):
    """One function for the link's thread, and its outcome."""

    def __init__(self, function: Callable[[Client], T]) -> None:
        self.function = function
        self.ended = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self, client: Client) -> None:
        try:
            self.result = self.function(client)
        except BaseException as error:  # whoever waits raises it
            self.error = error
        finally:
            self.ended.set()


class Link:
    """A client of the store in a thread of its own, which also beats.

    Args:
        connections: where the connection comes from.
        name: the thread's name.
    """

    def __init__(self, connections: Connections, name: str) -> None:
        self.stats = CoordinationStats()
        self._connections = connections
        self._requests: queue.SimpleQueue[_Request[object] | None] = queue.SimpleQueue()
        self._lost: CoordinationLost | None = None
        self._closed = False
        self._beat: Callable[[Client], None] | None = None
        self._beat_seconds = 0.0
        self._due = float("inf")
        # started here, in the foreground: an interpreter that is shutting down starts no more threads
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Client], T], timeout: float) -> T:
        """Run a function in the link's thread, between two beats.

        Args:
            function: gets the client.
            timeout: seconds after which the store counts as lost.

        Raises:
            CoordinationLost: the store did not answer, now or earlier.
        """
        if self._closed:
            raise CoordinationLost("this session is over")
        request = _Request(function)
        self._requests.put(cast("_Request[object]", request))
        if not request.ended.wait(timeout):
            raise CoordinationLost(f"the process group's store did not answer for {timeout:g} s")
        if request.error is not None:
            raise request.error
        return cast(T, request.result)

    def start_beating(self, beat: Callable[[Client], None], seconds: float, timeout: float) -> None:
        """Call ``beat`` in the link's thread now, and then every so many seconds until the link is closed.

        Raises:
            CoordinationLost: the store did not answer within ``timeout`` seconds.
        """

        def start(client: Client) -> None:
            self._beat, self._beat_seconds = beat, seconds
            self._do_beat(client)

        self.call(start, timeout)

    def close(self) -> None:
        """End the thread once its requests are done. Returns at once."""
        if not self._closed:
            self._closed = True
            self._requests.put(None)

    def wait_closed(self, timeout: float) -> bool:
        """Whether the thread has ended within so many seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _do_beat(self, client: Client) -> None:
        assert self._beat is not None
        self._beat(client)
        self._due = time.monotonic() + self._beat_seconds

    def _run(self) -> None:
        client = None
        try:
            store = self._connections.take()
            client = Client(store, self.stats)
        except Exception as error:
            self._lost = CoordinationLost(f"the process group's store cannot be reached: {error}")
            self._lost.__cause__ = error
        while True:
            try:
                request = self._requests.get(timeout=self._seconds_to_beat())
            except queue.Empty:
                pass
            else:
                if request is None:
                    break
                self._serve(request, client)
                request = None  # what the request holds must not live until the next one comes
            if client is not None and self._lost is None and time.monotonic() >= self._due:
                self._beat_or_lose(client)
        if client is not None and self._lost is None:
            self._connections.give_back(store)

    def _seconds_to_beat(self) -> float | None:
        if self._due == float("inf") or self._lost is not None:
            return None
        return max(0.0, self._due - time.monotonic())

    def _beat_or_lose(self, client: Client) -> None:
        """Beat; what goes wrong is raised by the next call."""
        try:
            self._do_beat(client)
        except CoordinationLost as lost:
            self._lost = lost
        except Exception as error:
            self._lost = CoordinationLost(f"the ranks do not understand one another: {error}")
            self._lost.__cause__ = error

    def _serve(self, request: _Request[object], client: Client | None) -> None:
        if client is None or self._lost is not None:
            request.error = self._lost
            request.ended.set()
            return
        request.run(client)
        if isinstance(request.error, CoordinationLost):
            self._lost = request.error
