"""A session by collectives on the process group itself, for stores that give no client of our own.

What doesn't live here: when that is (``distributed``). Less good than a store in three ways, and only used where there
is no other: everything must happen in the thread that does the job's other collectives, so takes are synchronous; a
dead rank is noticed when the group's own time-out passes; each value goes to every rank.

Invariant: whatever happens, every rank goes through the same series of collectives: in each round one for the reports
and, if none of these is a failure, one for the answers; to leave or to fail is a report.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.distributed as dist

from torchsnapshot.coordination.links import CoordinationStats
from torchsnapshot.coordination.messages import pack, rank_error, traceback_text, unpack
from torchsnapshot.coordination.sessions import Decide, Session, answers_of, is_own_error

_GOOD = b"+"
_FAILED = b"-"


class CollectiveSession(Session):
    """A session over ``all_gather``.

    Args:
        group: the process group.
        global_ranks: the global rank of each of its ranks.
        device: where its backend wants tensors to be.
    """

    def __init__(self, group: dist.ProcessGroup, global_ranks: Sequence[int], device: torch.device) -> None:
        self.rank = group.rank()
        self.world_size = group.size()
        self.stats = CoordinationStats()
        self._group = group
        self._global_ranks = tuple(global_ranks)
        self._device = device
        self._over = False

    def round(self, name: str, value: bytes, decide: Decide) -> bytes:
        """Send this rank's value, get rank 0's answer."""
        self.check()
        values = self._exchange(_GOOD + pack(name, [value]))
        answers = b""
        error: Exception | None = None
        if self.rank == 0:
            try:
                answers = self._decide(name, values, decide)
            except Exception as caught:
                error = caught
        report = _GOOD + answers if error is None else _FAILED + traceback_text(error).encode()
        answers = self._exchange(report, error)[0]
        individual, parts = unpack(answers)
        return bytes(parts[self.rank if individual else 0])

    def _decide(self, name: str, values: list[bytes], decide: Decide) -> bytes:
        contents = []
        for rank, value in enumerate(values):
            other, (content,) = unpack(value, num_arrays=1)
            if other != name:
                raise RuntimeError(f"rank {rank} is in round {other!r} while rank 0 is in round {name!r}")
            contents.append(bytes(content))
        answer = answers_of(decide(contents), self.world_size)
        return pack(False, [answer]) if isinstance(answer, bytes) else pack(True, answer)

    def finish(self, value: bytes, decide: Decide, name: str = "finish") -> bytes:
        """The last round."""
        answer = self.round(name, value, decide)
        self._over = True
        return answer

    def fail(self, error: BaseException) -> BaseException:
        """End the session on every rank because of this rank's error."""
        if is_own_error(error):
            return error
        text = traceback_text(error)
        if not self._over:
            self._over = True
            try:
                self._gather(_FAILED + text.encode())
            except RuntimeError:
                pass  # the group is broken: the others notice as well
        return rank_error({self.rank: text}, self._global_ranks, error)

    def leave(self) -> None:
        """End the session without a last round. Raises what ends it for another rank."""
        if not self._over:
            self._exchange(_GOOD)
            self._over = True

    def check(self) -> None:
        """Only a round tells what became of the others."""
        if self._over:
            raise RuntimeError("this session has ended")

    def _exchange(self, report: bytes, error: Exception | None = None) -> list[bytes]:
        """Every rank's report.

        Raises:
            RankError: one of them is a failure.
        """
        reports = self._gather(report)
        failures = {rank: text[1:].decode(errors="replace") for rank, text in enumerate(reports) if text[:1] == _FAILED}
        if failures:
            self._over = True
            raise rank_error(failures, self._global_ranks, error) from error
        return [text[1:] for text in reports]

    def _gather(self, data: bytes) -> list[bytes]:
        nbytes = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        sizes = [torch.empty_like(nbytes) for _ in range(self.world_size)]
        dist.all_gather(sizes, nbytes, group=self._group)
        counts = [int(size.item()) for size in sizes]
        padded = torch.zeros(max(counts), dtype=torch.uint8, device="cpu")  # whatever torch's default device is
        ctypes.memmove(padded.data_ptr(), data, len(data))
        mine = padded.to(self._device)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine, group=self._group)
        self.stats.num_messages += 2
        self.stats.sent_nbytes += 8 + mine.nbytes
        self.stats.received_nbytes += self.world_size * (8 + mine.nbytes)
        on_host = [tensor.cpu() for tensor in gathered]
        return [ctypes.string_at(tensor.data_ptr(), count) for tensor, count in zip(on_host, counts, strict=True)]
