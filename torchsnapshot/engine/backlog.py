"""Jobs that nobody has begun, and which of them comes next.

What doesn't live here: locks, threads, memory (``run``): whoever calls holds the run's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from torchsnapshot.engine.job import Job


class Backlog:
    """The jobs of one run that are still to be staged.

    Args:
        jobs: taken one after the other, as they are asked for.
        beside: jobs without a buffer, which come whenever none of the others may.
    """

    def __init__(self, jobs: Iterable[Job], beside: Iterable[Job]) -> None:
        self._jobs: Iterator[Job] = iter(jobs)
        self._beside = deque(beside)
        self._found: deque[Job] = deque()
        self._head: Job | None = None
        self._exhausted = False

    @property
    def is_empty(self) -> bool:
        """Whether there is none; that the iterator has ended is known only once it was asked."""
        return self._exhausted and self._head is None and not self._found and not self._beside

    def add(self, found: Iterable[Job]) -> None:
        """Put in jobs that come before all others."""
        self._found.extend(found)

    def clear(self) -> None:
        """Drop all of them."""
        self._jobs, self._head = iter(()), None
        self._found.clear()
        self._beside.clear()

    def take(self, may: Callable[[Job], bool]) -> Job | None:
        """The next job, which is the caller's now; None where there is none that may be staged.

        Args:
            may: whether there is memory for a job; the next one waits for it, and lets pass only those beside.
        """
        job = self._next()
        if job is not None and may(job):
            self._head = None
            return job
        return self._beside.popleft() if self._beside else None

    def has_one(self, may: Callable[[Job], bool]) -> bool:
        """Whether ``take`` would give a job; yes also where only the iterator knows: it may raise, and isn't asked."""
        if self._beside:
            return True
        if self._head is None:
            return bool(self._found) or not self._exhausted
        return may(self._head)

    def _next(self) -> Job | None:
        if self._head is None and self._found:
            self._head = self._found.popleft()
        if self._head is None and not self._exhausted:
            self._head = next(self._jobs, None)
            self._exhausted = self._head is None
        return self._head
