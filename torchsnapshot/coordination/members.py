"""A session over the process group's store: what all ranks share, and the part of every rank but 0.

What lives here: the keys, entering, reporting and waiting for the answer. What doesn't: rank 0's part
(``coordinator``), requests and threads (``links``).

The keys, of which a session's own all carry a random name that rank 0 draws, so that nothing that an earlier session,
process group or process left behind can be taken for this one's:

=================================  ==================================================================================
ts/GROUP/door/RANK                 a random number by which a rank asks to be let in, else a dash; these stay
ts/GROUP/welcome/NUMBER            rank 0's answer: the session's name. A number of an earlier attempt is answered to
                                   nobody, and does no harm
ts/SESSION/s/RANK                  the rank's status, rewritten with every beat
ts/SESSION/p/ROUND/RANK/PART       what the rank sends in a round
ts/SESSION/v/ROUND[/RANK]/PART     rank 0's answer
ts/SESSION/e/RANK/PART             the traceback of a rank that failed
ts/SESSION/f/PART                  rank 0's verdict that the session failed, and where
=================================  ==================================================================================

A rank reads one small key while it waits, rank 0's status: it says that rank 0 lives, which round is answered, whether
the session failed.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, TypeVar

from torchsnapshot.coordination.links import Client, Connections, Link, part_keys, parts
from torchsnapshot.coordination.messages import (
    CoordinationLost,
    Stage,
    Status,
    pack,
    rank_error,
    traceback_text,
    unpack_failures,
)
from torchsnapshot.coordination.sessions import Decide, Limits, Pace, Session, is_own_error

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

CLOSED_DOOR = b"-"
"""What a door holds while its rank does not ask to be let in: many keys can only be read at once if all exist."""

MAX_KEPT_BEATS = 2
"""Of a longer time in which this process itself did not look, only so many beats count as silence of the others."""


@dataclass(slots=True)
class Peer:
    """What a rank has seen of another one's status."""

    status: Status | None = None
    silent: float = 0.0
    """Seconds without a change."""
    looked: float = 0.0
    """When it was looked at last, monotonic."""
    nonce: bytes = b""
    """The number that the rank was let in by, or asked by last."""

    def see(self, status: Status | None, beat: float) -> None:
        """Take note of what its status is now."""
        now = time.monotonic()
        if status != self.status:
            self.silent = 0.0
        else:
            # this process may have been stopped for a while, and not the other
            self.silent += min(now - self.looked, MAX_KEPT_BEATS * beat)
        self.status, self.looked = status, now


class StoreSession(Session):
    """What rank 0 and the others share.

    Args:
        rank: this process's rank in the group.
        global_ranks: the global rank of each rank of the group.
        connections: to the store; one is this session's alone while it lasts.
        group_name: the same on every rank of the group, and no other group's on this store.
        limits: how long to wait.
    """

    def __init__(
        self,
        rank: int,
        global_ranks: Sequence[int],
        connections: Connections,
        group_name: str,
        limits: Limits,
    ) -> None:
        self.rank = rank
        self.world_size = len(global_ranks)
        self.global_ranks = tuple(global_ranks)
        self._limits = limits
        self._group = f"ts/{group_name}"
        self._base = ""
        self._status = Status()
        self._over = False
        self._failures: dict[int, str] | None = None  # set by the link's thread
        self._link = Link(connections, name=f"torchsnapshot-link-{rank}")
        self.stats = self._link.stats

    def round(self, name: str, value: bytes, decide: Decide) -> bytes:
        """Send this rank's value, get rank 0's answer."""
        self.check()
        try:
            return self._round(name, value, decide)
        except CoordinationLost as lost:
            raise self._lose(lost) from lost

    def check(self) -> None:
        """Raise if the session has failed."""
        if self._failures is not None:
            error = rank_error(self._failures, self.global_ranks, None)
            self._end_failed()
            raise error
        if self._over:
            raise RuntimeError("this session has ended")

    @abstractmethod
    def _round(self, name: str, value: bytes, decide: Decide) -> bytes:
        """``round``, where a lost store or peer is a ``CoordinationLost``."""

    @abstractmethod
    def _end_failed(self) -> None:
        """Leave a session that is known to have failed."""

    def _lose(self, lost: CoordinationLost) -> BaseException:
        """End the session on this rank because nothing can be heard any more; returns what to raise."""
        self._close()
        return rank_error(self._failures or {0: f"lost: {lost}"}, self.global_ranks, None)

    def _own_error(self, error: BaseException) -> BaseException:
        """What this rank raises for an error of its own."""
        if is_own_error(error):
            return error
        return rank_error({self.rank: traceback_text(error)}, self.global_ranks, error)

    def _call(self, function: Callable[Concatenate[Client, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the link's thread."""
        return self._link.call(lambda client: function(client, *args, **kwargs), self._limits.silence)

    def _put(self, key: str, data: bytes) -> None:
        """Store a value of any size, with beats in between."""
        for name, part in parts(key, data):
            self._call(Client.set, name, part)

    def _set_status(self, client: Client, status: Status) -> None:
        """Runs in the link's thread, like all that changes the status."""
        self._status = replace(status, beat=self._status.beat + 1)
        client.set(self._status_key(self.rank), self._status.pack())

    def _set_stage(self, client: Client, stage: Stage) -> None:
        self._set_status(client, replace(self._status, stage=stage))

    def _status_key(self, rank: int) -> str:
        return f"{self._base}/s/{rank}"

    def _door_key(self, rank: int) -> str:
        return f"{self._group}/door/{rank}"

    def _welcome_key(self, nonce: str) -> str:
        return f"{self._group}/welcome/{nonce}"

    def _close(self) -> None:
        self._over = True
        self._link.close()


class MemberSession(StoreSession):
    """The part of every rank but 0. Making one waits until rank 0 has entered its session of the same group.

    In one process, a group's sessions are entered one after the other; once the first round is over, the next one may
    be entered while this one goes on.

    Raises:
        RankError: rank 0 did not come.
    """

    def __init__(
        self,
        rank: int,
        global_ranks: Sequence[int],
        connections: Connections,
        group_name: str,
        limits: Limits,
    ) -> None:
        super().__init__(rank, global_ranks, connections, group_name, limits)
        self._coordinator = Peer(looked=time.monotonic())
        self._reported = False
        self._payload_keys: list[str] = []
        try:
            self._enter()
        except CoordinationLost as lost:
            raise self._lose(lost) from lost
        except BaseException:
            self._close()
            raise

    def _enter(self) -> None:
        nonce = os.urandom(12).hex()
        self._call(Client.set, self._door_key(self.rank), nonce.encode())
        pace, start, has_told = Pace(self.world_size), time.monotonic(), False
        while (name := self._call(self._read_welcome, nonce)) is None:
            waited = time.monotonic() - start
            if waited > self._limits.notice and not has_told and self._limits.notice < self._limits.entering:
                has_told = True
                logger.warning(
                    "A snapshot has been waiting for %.0f s for rank %d, which coordinates it: it has not begun it, or "
                    "is no more; it counts as lost after %.0f s",
                    waited,
                    self.global_ranks[0],
                    self._limits.entering,
                )
            if waited > self._limits.entering:
                raise CoordinationLost(f"has not entered within {self._limits.entering:g} s")
            pace.pause()
        self._base = f"ts/{name}"
        self._link.start_beating(self._beat, self._limits.beat, self._limits.silence)

    def _read_welcome(self, client: Client, nonce: str) -> str | None:
        key = self._welcome_key(nonce)
        if not client.has_all([key]):
            return None
        (name,) = client.get_many([key])
        client.delete([key])
        client.set(self._door_key(self.rank), CLOSED_DOOR)
        return name.decode()

    def _beat(self, client: Client) -> None:
        if self._failures is None:
            self._set_status(client, self._status)
            self._look(client)

    def _look(self, client: Client) -> None:
        """See what rank 0 says. Runs in the link's thread."""
        if self._failures is not None:
            return
        (data,) = client.get_many([self._status_key(0)])
        status = Status.unpack(data)
        self._coordinator.see(status, self._limits.beat)
        if status.stage is Stage.FAILED:
            (verdict,) = client.get_values([f"{self._base}/f"])
            failures = unpack_failures(verdict)
            self._set_stage(client, Stage.LEFT)
            self._failures = failures

    def _round(self, name: str, value: bytes, decide: Decide) -> bytes:
        number = self._status.round + 1
        key = f"{self._base}/p/{number}/{self.rank}"
        self._payload_keys = part_keys(key, len(value))
        self._put(key, value)
        self._reported = True  # from here on, whether rank 0 has heard it or not
        self._call(self._set_status, replace(self._status, round=number, name=name))
        status = self._wait_answer(number)
        answer_key = f"{self._base}/v/{number}" + (f"/{self.rank}" if status.individual else "")
        (answer,) = self._call(Client.get_values, [answer_key])
        self._reported = False
        self._remove_payload()
        return answer

    def _wait_answer(self, number: int) -> Status:
        pace = Pace(self.world_size)
        while True:
            self._call(self._look)
            self.check()
            status = self._coordinator.status
            if status is not None and status.round >= number:
                return status
            if status is not None and status.stage is Stage.LEFT:
                raise self._give_up("it left before this round")
            if self._coordinator.silent > self._limits.silence:
                raise self._give_up(f"no sign of life for {self._coordinator.silent:.0f} s")
            pace.pause()

    def _give_up(self, reason: str) -> CoordinationLost:
        """Tell rank 0, should it wake up again, that this rank waits no longer."""
        self._tell(f"gave up on rank 0: {reason}")
        return CoordinationLost(reason)

    def finish(self, value: bytes, decide: Decide, name: str = "finish") -> bytes:
        """The last round."""
        self.check()
        try:
            answer = self._round(name, value, decide)
        except CoordinationLost as lost:
            if not self._reported or self._failures is not None:
                raise self._lose(lost) from lost
            self._close()
            raise CoordinationLost(f"rank 0: {lost}", reported=True) from lost
        self._depart()
        return answer

    def fail(self, error: BaseException) -> BaseException:
        """End the session on every rank because of this rank's error."""
        raised = self._own_error(error)
        if not self._over:
            try:
                self._tell(traceback_text(error))
            except CoordinationLost:
                pass  # then the others have lost rank 0 or the store as well
            self._close()
        return raised

    def _tell(self, failure: str) -> None:
        self._put(f"{self._base}/e/{self.rank}", pack(failure))
        self._call(self._set_stage, Stage.FAILED)

    def leave(self) -> None:
        """End the session without a last round."""
        if not self._over:
            self._depart()

    def _end_failed(self) -> None:
        # the link has told rank 0 that this rank knows, and rank 0 reads nothing more of this session's
        if not self._over:
            try:
                self._remove_payload()
            except CoordinationLost:
                pass  # a few keys stay
        self._close()

    def _remove_payload(self) -> None:
        keys, self._payload_keys = self._payload_keys, []
        self._call(Client.delete, keys)

    def _depart(self) -> None:
        try:
            self._call(self._set_stage, Stage.LEFT)
        except CoordinationLost:
            pass  # rank 0 has gone already, without waiting for this acknowledgement
        self._close()
