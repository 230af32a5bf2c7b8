"""What every kind of session of a group has in common: rounds, one verdict, and an end on every rank.

What lives here: the interface, its context manager, the limits, the session of a single process. What doesn't:
sessions over a store (``members`` for every rank but 0, ``coordinator`` for rank 0), over collectives
(``collectives``).

A session is a series of rounds that every rank of the group goes through in one order. In a round every rank sends
one value; rank 0 decides, and every rank gets the answer. The first failure, on whatever rank, is the end of the
session on every rank.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from torchsnapshot.coordination.links import CoordinationStats
from torchsnapshot.coordination.messages import CoordinationLost
from torchsnapshot.errors import RankError

Decide = Callable[[list[bytes]], "bytes | Sequence[bytes]"]
"""Runs on rank 0: from every rank's value, in the order of ranks, one answer for all or a list of one for each rank."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long ranks wait for one another, in seconds."""

    silence: float = 60.0
    """A rank that gives no sign of life for so long is lost; so is a store that does not answer."""
    entry: float | None = None
    """How long a rank waits for others that have not entered the session yet; None: as long as ``silence``."""
    notice: float = 60.0
    """After so long the log names the ranks that have not entered yet."""
    acknowledgement: float = 10.0
    """How long rank 0 stays after the verdict until every rank has read it: it may be the one that hosts the store."""

    @property
    def beat(self) -> float:
        """Seconds between two signs of life."""
        return self.silence / 12

    @property
    def entering(self) -> float:
        """``entry``, or its default."""
        return self.silence if self.entry is None else self.entry


class Session(ABC):
    """One take's, or one restore's, coordination. Use it as a context manager, or end it by one of its three ends.

    ``finish`` (a last round), ``leave`` (no more rounds) and ``fail`` are the ends; after one of them the others do
    nothing. A session may be used from several threads, by one at a time.
    """

    rank: int
    world_size: int
    stats: CoordinationStats

    @abstractmethod
    def round(self, name: str, value: bytes, decide: Decide) -> bytes:
        """Send this rank's value, get rank 0's answer.

        Args:
            name: says which round this is; every rank must be in the same one.
            value: this rank's packed value.
            decide: called on rank 0 only, with every rank's value.

        Raises:
            RankError: some rank failed, or was lost; the session is over on every rank.
        """

    @abstractmethod
    def finish(self, value: bytes, decide: Decide, name: str = "finish") -> bytes:
        """The last round: ``decide`` does the deed, its answer is the verdict.

        Raises:
            RankError: some rank failed, or was lost before it could matter; rank 0 has not done the deed.
            CoordinationLost: never on rank 0. The verdict cannot be heard any more, but this rank's report may have
                been, so that rank 0 may do the deed: the caller must look for the deed itself.
        """

    @abstractmethod
    def fail(self, error: BaseException) -> BaseException:
        """End the session on every rank because of this rank's error; returns what this rank is to raise.

        That is a ``RankError`` whose cause is ``error``; an error that is already the session's own comes back as it
        is. It never raises and never waits long.
        """

    @abstractmethod
    def leave(self) -> None:
        """End the session without a last round."""

    @abstractmethod
    def check(self) -> None:
        """Raise if the session is already known to have failed elsewhere. Costs nothing: ask between pieces of work.

        Raises:
            RankError: it has.
        """

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
            return
        raised = self.fail(error)
        # an interrupt is reported to the others, but remains an interrupt here
        if raised is not error and isinstance(error, Exception):
            raise raised


class SoloSession(Session):
    """The session of a process that is alone: it decides, and its errors stay what they are."""

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        self.stats = CoordinationStats()

    def round(self, name: str, value: bytes, decide: Decide) -> bytes:
        """Decide at once."""
        answer = decide([value])
        return bytes(answer) if isinstance(answer, bytes | bytearray | memoryview) else answer[0]

    def finish(self, value: bytes, decide: Decide, name: str = "finish") -> bytes:
        """Decide at once."""
        return self.round(name, value, decide)

    def fail(self, error: BaseException) -> BaseException:
        """Nobody else has to know."""
        return error

    def leave(self) -> None:
        """Nobody else has to know."""

    def check(self) -> None:
        """Nobody else can have failed."""


class Pace:
    """How often to look while waiting: often at first, then each time after a tenth of the time waited so far.

    Args:
        world_size: how many ranks look at the same time: the store must serve them all.
    """

    def __init__(self, world_size: int) -> None:
        self._start = time.monotonic()
        self._shortest = 0.001 + world_size / 50_000
        self._longest = 0.05 + world_size / 4000

    def pause(self) -> None:
        """Wait a little. Ctrl-C interrupts it."""
        waited = time.monotonic() - self._start
        time.sleep(min(self._longest, max(self._shortest, waited / 10)))


def is_own_error(error: BaseException) -> bool:
    """Whether the error is a session's, so that the other ranks know it."""
    return isinstance(error, RankError | CoordinationLost)


def answers_of(answer: bytes | Sequence[bytes], world_size: int) -> bytes | list[bytes]:
    """What ``decide`` returned, checked.

    Raises:
        ValueError: it is a list, but not of one answer for each rank.
    """
    if isinstance(answer, bytes | bytearray | memoryview):
        return bytes(answer)
    if len(answer) != world_size:
        raise ValueError(f"{len(answer)} answers were decided for {world_size} ranks")
    return list(answer)
