"""Rank 0's part of a session over the process group's store: it lets ranks in, collects, decides, and cleans up.

What doesn't live here: the keys and the other ranks' part (``members``). Invariants: an answer stands under its keys
before rank 0's status says so; a failure is published as soon as it is seen, by the link's thread where the caller is
busy; the keys that a rank may still be reading are not removed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from torchsnapshot.coordination.links import MAX_PART_NBYTES, Client, Connections, part_keys, parts
from torchsnapshot.coordination.members import CLOSED_DOOR, Peer, StoreSession
from torchsnapshot.coordination.messages import (
    CoordinationLost,
    Stage,
    Status,
    pack_failures,
    traceback_text,
    unpack,
)
from torchsnapshot.coordination.sessions import Decide, Limits, Pace, answers_of
from torchsnapshot.errors import FormatError

logger = logging.getLogger(__name__)

VALUES_PER_REQUEST = 16
KEYS_PER_CALL = 256
"""So many keys are removed between two chances to beat."""
MAX_NAMED = 16
"""So many absent ranks are named in the log."""


class CoordinatorSession(StoreSession):
    """The part of rank 0. Making one does not wait for the others.

    Raises:
        RankError: the store cannot be reached.
    """

    def __init__(
        self,
        global_ranks: Sequence[int],
        connections: Connections,
        group_name: str,
        limits: Limits,
    ) -> None:
        super().__init__(0, global_ranks, connections, group_name, limits)
        self._base = f"ts/{os.urandom(9).hex()}"
        self._peers = {rank: Peer(looked=time.monotonic()) for rank in range(1, self.world_size)}
        self._open_welcomes: set[str] = set()
        self._answer_keys: list[str] = []
        self._verdict_keys: list[str] = []
        self._has_named_absent = False
        self._settled = False  # all have reported in the last round: what happens to them now changes nothing
        try:
            self._call(self._open)
            self._link.start_beating(self._beat, limits.beat, limits.silence)
        except CoordinationLost as lost:
            raise self._lose(lost) from lost
        except BaseException:
            self._close()
            raise

    def _open(self, client: Client) -> None:
        doors = [self._door_key(rank) for rank in self._peers]
        if not client.has_all(doors):
            for door in doors:
                client.create(door, CLOSED_DOOR.decode())
        client.set_many({self._status_key(rank): b"" for rank in self._peers})

    # -------------------------------------------------------------- seeing (in the link's thread)

    def _beat(self, client: Client) -> None:
        self._set_status(client, self._status)
        if not self._settled:
            self._judge(client, list(self._peers))

    def _look(self, client: Client, ranks: Sequence[int]) -> None:
        """See what these ranks say, and let in those that ask."""
        found = client.get_many([self._status_key(rank) for rank in ranks])
        for rank, data in zip(ranks, found, strict=True):
            peer = self._peers[rank]
            if data and peer.status is None:
                self._open_welcomes.discard(self._welcome_key(peer.nonce.decode()))
            peer.see(Status.unpack(data) if data else None, self._limits.beat)
        outside = [rank for rank in ranks if self._peers[rank].status is None]
        welcomes: dict[str, bytes] = {}
        nonces = client.get_many([self._door_key(rank) for rank in outside])
        for rank, nonce in zip(outside, nonces, strict=True):
            if nonce not in (self._peers[rank].nonce, CLOSED_DOOR):
                self._peers[rank].nonce = nonce
                welcomes[self._welcome_key(nonce.decode())] = self._base.removeprefix("ts/").encode()
        client.set_many(welcomes)
        self._open_welcomes.update(welcomes)

    def _judge(self, client: Client, ranks: Sequence[int], number: int = 0, name: str = "") -> None:
        """Look at these ranks and publish what failed, where ``number`` > 0 also who cannot take part in that round."""
        if self._failures is not None:
            return
        self._look(client, ranks)
        self._name_absent()
        failures: dict[int, str] = {}
        broken = []
        for rank in ranks:
            peer = self._peers[rank]
            if peer.status is None:
                if self._is_lost(peer):
                    failures[rank] = f"lost: it has not entered within {self._limits.entering:g} s"
            elif peer.status.stage is Stage.FAILED:
                broken.append(rank)
            elif self._is_lost(peer) and peer.status.stage is Stage.JOINED:
                failures[rank] = f"lost: no sign of life for {peer.silent:.0f} s"
            elif number and peer.status.stage is Stage.LEFT:
                failures[rank] = f"it left before round {name!r}"
            elif number and peer.status.round >= number and (peer.status.round, peer.status.name) != (number, name):
                failures[rank] = f"it is in round {peer.status.name!r} while rank 0 is in round {name!r}"
        for start in range(0, len(broken), VALUES_PER_REQUEST):
            batch = broken[start : start + VALUES_PER_REQUEST]
            texts = client.get_values([f"{self._base}/e/{rank}" for rank in batch])
            failures.update((rank, _traceback_of(text)) for rank, text in zip(batch, texts, strict=True))
        if failures:
            self._publish_failure(client, failures)

    def _name_absent(self) -> None:
        """Say once whom all wait for: a rank that died before it entered cannot be told from one that is late."""
        notice, entering = self._limits.notice, self._limits.entering
        absent = [rank for rank, peer in self._peers.items() if peer.status is None and peer.silent > notice]
        if absent and not self._has_named_absent and notice < entering:
            self._has_named_absent = True
            logger.warning(
                "A snapshot has been waiting for %.0f s for ranks %s: they have not begun it, or are no more; they "
                "count as lost after %.0f s",
                notice,
                _names_of([self.global_ranks[rank] for rank in absent]),
                entering,
            )

    def _is_lost(self, peer: Peer) -> bool:
        return peer.silent > (self._limits.entering if peer.status is None else self._limits.silence)

    def _publish_failure(self, client: Client, failures: dict[int, str]) -> None:
        for key, part in parts(f"{self._base}/f", pack_failures(failures)):
            client.set(key, part)
            self._verdict_keys.append(key)
        self._set_status(client, replace(self._status, stage=Stage.FAILED))
        self._failures = failures

    # -------------------------------------------------------------- rounds

    def _round(self, name: str, value: bytes, decide: Decide) -> bytes:
        number = self._status.round + 1
        values = self._collect(number, name, value)
        answer = self._decide(decide, values)
        self._publish(number, name, answer)
        return answer if isinstance(answer, bytes) else answer[0]

    def _decide(self, decide: Decide, values: list[bytes]) -> bytes | list[bytes]:
        try:
            return answers_of(decide(values), self.world_size)
        except Exception as error:
            raise self.fail(error) from error

    def _collect(self, number: int, name: str, value: bytes) -> list[bytes]:
        values: dict[int, bytes] = {0: value}
        pace = Pace(self.world_size)
        while pending := [rank for rank in self._peers if rank not in values]:
            self._call(self._judge, pending, number, name)
            self.check()
            arrived = [rank for rank in pending if self._has_reported(rank, number)]
            for start in range(0, len(arrived), VALUES_PER_REQUEST):
                batch = arrived[start : start + VALUES_PER_REQUEST]
                found = self._call(self._fetch, number, batch)
                values.update(zip(batch, found, strict=False))
            self.check()
            if len(arrived) < len(pending):
                pace.pause()
        return [values[rank] for rank in range(self.world_size)]

    def _fetch(self, client: Client, number: int, ranks: Sequence[int]) -> list[bytes]:
        # a rank that has seen the verdict removes what it sent, and reading what isn't there would never end
        if self._failures is not None:
            return []
        return client.get_values([f"{self._base}/p/{number}/{rank}" for rank in ranks])

    def _has_reported(self, rank: int, number: int) -> bool:
        status = self._peers[rank].status
        return status is not None and status.round >= number

    def _publish(self, number: int, name: str, answer: bytes | list[bytes]) -> None:
        # every rank has reported in this round, and so has read the answer of the last one
        self._remove(self._answer_keys)
        self._answer_keys = []
        individual = not isinstance(answer, bytes)
        answers = {"": answer} if isinstance(answer, bytes) else {f"/{r}": data for r, data in enumerate(answer) if r}
        small: dict[str, bytes] = {}
        for suffix, data in answers.items():
            for key, part in parts(f"{self._base}/v/{number}{suffix}", data):
                self._answer_keys.append(key)
                small[key] = part
                if sum(map(len, small.values())) + len(small) * 64 > MAX_PART_NBYTES // 2:
                    self._store(small)
                    small = {}
        self._store(small)
        self._call(self._set_answered, number, name, individual)

    def _set_answered(self, client: Client, number: int, name: str, individual: bool) -> None:
        self._set_status(client, replace(self._status, round=number, name=name, individual=individual))

    def _store(self, values: dict[str, bytes]) -> None:
        self._call(Client.set_many, values)

    # -------------------------------------------------------------- ends

    def finish(self, value: bytes, decide: Decide, name: str = "finish") -> bytes:
        """The last round."""
        self.check()
        done: list[bytes | list[bytes]] = []
        try:
            number = self._status.round + 1
            values = self._collect(number, name, value)
            self._call(self._settle)
            self.check()
            done.append(self._decide(decide, values))
            self._publish(number, name, done[0])
        except CoordinationLost as lost:
            if not done:
                raise self._lose(lost) from lost
            logger.warning("The other ranks could not be told that all went well: %s", lost)
        self._depart()
        return done[0] if isinstance(done[0], bytes) else done[0][0]

    def _settle(self, client: Client) -> None:
        """From here on no rank can make the session fail but this one. Runs in the link's thread, which judges."""
        self._settled = True

    def fail(self, error: BaseException) -> BaseException:
        """End the session on every rank because of this rank's error."""
        raised = self._own_error(error)
        if not self._over:
            failures = {**(self._failures or {}), 0: traceback_text(error)}
            try:
                self._call(self._publish_failure, failures)
            except CoordinationLost:
                pass  # then the others have lost the store as well
            self._depart()
        return raised

    def leave(self) -> None:
        """End the session without a last round."""
        if not self._over:
            self._depart()

    def _end_failed(self) -> None:
        self._depart()

    def _depart(self) -> None:
        """Wait a bounded time until the others know how it ended, and remove the keys."""
        if self._over:
            return
        self._over = True
        try:
            if self._failures is None:
                self._call(self._settle)
                self._call(self._set_stage, Stage.LEFT)
            staying = self._wait_acknowledged()
            self._clean_up(staying)
        except (CoordinationLost, FormatError) as error:
            logger.debug("Keys of a session may be left in the process group's store: %s", error)
        finally:
            self._close()

    def _wait_acknowledged(self) -> set[int]:
        """Wait until the others know; returns those that may still be reading."""
        pace, start = Pace(self.world_size), time.monotonic()
        while True:
            staying = {rank for rank, peer in self._peers.items() if not _has_gone(peer) and not self._is_lost(peer)}
            if not staying or time.monotonic() - start > self._limits.acknowledgement:
                return staying
            self._call(self._look, sorted(staying))
            pace.pause()

    def _clean_up(self, staying: Collection[int]) -> None:
        self._remove(self._open_welcomes)
        if self._failures is not None:
            self._call(self._remove_left_behind)
        # a rank that may still be reading finds rank 0's status, and what it leads to
        self._remove([self._status_key(rank) for rank in self._peers if rank not in staying])
        if not staying:
            self._remove([*self._answer_keys, *self._verdict_keys, self._status_key(0)])

    def _remove_left_behind(self, client: Client) -> None:
        """Remove what the failed ranks themselves no longer remove."""
        keys = []
        for rank in self._failures or ():
            status = self._peers[rank].status if rank else None
            if status is None:
                continue
            if status.stage is Stage.FAILED:
                keys.append(f"{self._base}/e/{rank}/0")
            if status.round > self._status.round and status.stage is not Stage.LEFT:
                payload = f"{self._base}/p/{status.round}/{rank}"
                (value,) = client.get_values([payload])
                keys += part_keys(payload, len(value))
        client.delete(keys)

    def _remove(self, keys: Iterable[str]) -> None:
        names = list(keys)
        for start in range(0, len(names), KEYS_PER_CALL):
            self._call(Client.delete, names[start : start + KEYS_PER_CALL])


def _names_of(ranks: Sequence[int]) -> str:
    """Global ranks as text; of very many the first ones."""
    more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
    return ", ".join(map(str, ranks[:MAX_NAMED])) + more


def _has_gone(peer: Peer) -> bool:
    return peer.status is not None and peer.status.stage is not Stage.JOINED


def _traceback_of(data: bytes) -> str:
    text, _ = unpack(data, num_arrays=0)
    if not isinstance(text, str):
        raise FormatError("a rank's traceback is not a text")
    return text
