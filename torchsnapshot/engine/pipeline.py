"""The one bounded pipeline: jobs carried by worker threads under a byte budget, in pooled buffers.

What lives here: ``Job``, ``submit`` and ``Run``. What doesn't: the buffers themselves (``buffers``), what a job does
(``taking.take``, ``restoring.restore``, ``verify`` and ``copy`` bring their own jobs), how a chunk is stored
(``chunks.writer``).

A job has two steps, ``stage`` and ``finish``, and says how many bytes of buffer it needs. Jobs are staged in the order
in which they were given. Two modes:

- ``Mode.THROUGH``: a worker carries one job through both steps while it is hot in cache (take, restore).
- ``Mode.STAGE_FIRST``: what matters is how soon everything is staged (async take). Workers stage as long as there is a
  job that fits into the budget, and finish staged jobs when there is none.

Invariants:

- Buffers lent to a run never exceed its budget, except for one job that alone is larger than the budget.
- The first error wins: no further step of that run begins, steps that run already come to their end, every buffer
  goes back to the pool, and ``wait`` raises that error.
- A run whose jobs compute first and wait for the store then begins with few workers: those that only compute would
  take turns on the cores and at the interpreter's lock. When one goes on to ``finish``, another one joins.
- Whoever waits for a run is woken once, at its end or when all is staged, not by every job.
- Worker threads belong to one run, end with it, and are no daemons: an idle process has none of them, and an
  interpreter that exits joins them (a run that nobody waited for is carried to its end). A thread costs some 50 µs to
  start; what is worth keeping from run to run, the memory, is kept.
- In the background phase of a ``STAGE_FIRST`` run (everything staged, only finishing left) a worker lowers its own
  priority. Linux lets no ordinary thread raise it again, so the thread must end with the run; it does.
- After ``fork`` the child has neither the threads nor the memory: a run that it inherited raises when it is waited for.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from enum import Enum
from time import monotonic
from typing import Protocol

from torchsnapshot.engine.buffers import Buffer as Buffer
from torchsnapshot.engine.buffers import BufferPool, shared_pool, size_class

DEFAULT_BUDGET_NBYTES = 256 << 20
"""Buffer bytes of a run whose caller names no budget."""

BACKGROUND_NICENESS = 10
"""How much nicer than the process a worker is in the background phase."""


_WAIT_SECONDS = 0.5
"""How often a thread that waits for a run wakes up all the same."""


class Mode(Enum):
    """In which order a run's workers take steps; see the module's docstring."""

    THROUGH = "through"
    STAGE_FIRST = "stage_first"


class Job(Protocol):
    """One piece of work. Both steps run on worker threads; a job's ``stage`` returns before its ``finish`` begins."""

    @property
    def nbytes(self) -> int:
        """Bytes of buffer that the job needs from the beginning of ``stage`` to the end of ``finish``; 0 = none."""
        ...

    def stage(self, buffer: Buffer | None) -> bool:
        """Do the part after which the source may change. False: the job is done, its buffer is free at once."""
        ...

    def finish(self, buffer: Buffer | None) -> None:
        """Do the rest."""
        ...


class Run:
    """Jobs in flight. Made by ``submit``."""

    def __init__(self, jobs: Iterable[Job], budget: int, mode: Mode, pool: BufferPool, max_workers: int) -> None:
        self._jobs: Iterator[Job] = iter(jobs)
        self._budget = budget
        self._mode = mode
        self._pool = pool
        self._max_workers = max_workers
        self._number = next(_run_numbers)
        self._num_started = 0
        self._process = os.getpid()
        lock = threading.Lock()
        # one lock: what workers wait for, and what those who wait for the run do
        self._changed = threading.Condition(lock)
        self._settled = threading.Condition(lock)
        self._head: Job | None = None
        self._exhausted = False
        self._staged: deque[tuple[Job, Buffer | None]] = deque()
        self._num_staging = 0
        self._lent_nbytes = 0
        self._num_kept: Counter[int] = Counter()
        self._live_workers = 0
        self._stopping = False
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether no step runs or will run: finished, failed or cancelled."""
        return self._live_workers == 0

    @property
    def error(self) -> BaseException | None:
        """The first error so far; ``CancelledError`` where nothing but ``cancel`` stopped the run."""
        return self._error

    @property
    def staged_buffers(self) -> Mapping[int, int]:
        """How many staged jobs kept a buffer of each size class, in a ``STAGE_FIRST`` run."""
        return self._num_kept

    def cancel(self) -> None:
        """Begin no further step. Returns at once; steps that run already come to their end."""
        self._check_process()
        self._stop(CancelledError("the run was cancelled"))

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until every job is staged: the sources of all jobs may change. See ``wait``."""
        return self._wait(timeout, staged=True)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every job is finished.

        An exception that reaches the waiting thread (Ctrl-C) cancels the run, waits for the steps that are running and
        goes on to the caller; a second one goes to the caller at once.

        Args:
            timeout: seconds; None = for ever.

        Returns:
            False if the time ran out first.

        Raises:
            BaseException: the first error of any job.
            CancelledError: the run was cancelled before it was done.
            RuntimeError: the run belongs to the process that this one was forked from.
        """
        return self._wait(timeout, staged=False)

    def _wait(self, timeout: float | None, *, staged: bool) -> bool:
        self._check_process()
        deadline = None if timeout is None else monotonic() + timeout
        try:
            with self._settled:
                while not (self._live_workers == 0 or (staged and self._all_staged())):
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        return False
                    # in slices: a Ctrl-C that comes just before the lock is waited for would not be seen else
                    self._settled.wait(_WAIT_SECONDS if left is None else min(left, _WAIT_SECONDS))
        except BaseException:
            self.cancel()
            with self._settled:
                while self._live_workers:
                    self._settled.wait()
            raise
        if self._error is not None:
            raise self._error
        return True

    def _check_process(self) -> None:
        # before any lock is touched: another thread of the parent may have held it when the fork happened
        if os.getpid() != self._process:
            raise RuntimeError("this run belongs to the parent process; a fork has none of its threads")

    def _all_staged(self) -> bool:
        return self._exhausted and self._num_staging == 0 and not self._stopping

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            if self._live_workers == 0:
                return
            # what went wrong says more than that somebody cancelled
            if self._error is None or type(self._error) is CancelledError:
                self._error = error
            self._stopping = True
            self._head = None
            self._jobs = iter(())
            staged, self._staged = self._staged, deque()
            self._changed.notify_all()
        for _, buffer in staged:
            self._free(buffer)

    def _free(self, buffer: Buffer | None) -> None:
        if buffer is None:
            return
        nbytes = buffer.nbytes
        buffer.release()
        with self._changed:
            self._lent_nbytes -= nbytes
            self._changed.notify_all()

    # --- the workers' side

    def start(self, num_workers: int) -> None:
        """Start the first worker threads. ``submit`` calls it, once."""
        self._live_workers = self._num_started = num_workers
        for index in range(num_workers):
            thread = self._thread(index)
            try:
                thread.start()
            except RuntimeError as error:
                # no more threads: the ones that started carry the run alone; none at all is the caller's problem
                self._discount_workers(num_workers - index)
                if index == 0:
                    self._error = error
                    raise
                return
            except BaseException as error:
                # Ctrl-C while the thread was starting: it runs, and the caller will never get hold of this run
                self._discount_workers(num_workers - index - 1)
                self._stop(error)
                raise

    def _thread(self, index: int) -> threading.Thread:
        return threading.Thread(target=self._work, name=f"torchsnapshot-{self._number}-{index}", daemon=False)

    def _start_another(self) -> None:
        """A worker is about to wait for the store: where work is left, another one takes the core."""
        if self._num_started >= self._max_workers:
            return
        with self._changed:
            is_left = self._staged or self._head is not None or not self._exhausted
            if self._stopping or not is_left or self._num_started >= self._max_workers:
                return
            index = self._num_started
            self._num_started += 1
            self._live_workers += 1
        try:
            self._thread(index).start()
        except RuntimeError:
            # no more threads: those that run carry the rest
            self._max_workers = 0
            self._discount_workers(1)

    def _discount_workers(self, count: int) -> None:
        with self._changed:
            self._live_workers -= count
            self._changed.notify_all()
            self._tell_waiters()

    def _tell_waiters(self) -> None:
        """With the lock held: wake those who wait for the run, if what they wait for may have come."""
        if self._live_workers == 0 or self._all_staged():
            self._settled.notify_all()

    def _work(self) -> None:
        try:
            self._work_until_done()
        except BaseException as error:
            self._stop(error)
        finally:
            self._discount_workers(1)

    def _work_until_done(self) -> None:
        lowered = False
        while True:
            step = self._next_step()
            if step is None:
                return
            job, buffer, is_finish = step
            if not is_finish:
                self._stage(job)
                continue
            if not lowered and self._all_staged():
                lowered = True
                lower_priority()
            self._start_another()
            try:
                job.finish(buffer)
            finally:
                self._free(buffer)

    def _stage(self, job: Job) -> None:
        buffer: Buffer | None = None
        keeps = False
        try:
            try:
                if job.nbytes:
                    buffer = self._acquire(job.nbytes)
                more = job.stage(buffer)
            finally:
                with self._changed:
                    self._num_staging -= 1
                    self._changed.notify_all()
                    self._tell_waiters()
            if not more:
                return
            if self._mode is Mode.THROUGH:
                self._start_another()
                job.finish(buffer)
                return
            with self._changed:
                if not self._stopping:
                    keeps = True
                    if buffer is not None:
                        self._num_kept[buffer.nbytes] += 1
                    self._staged.append((job, buffer))
                    self._changed.notify_all()
        finally:
            if not keeps:
                self._free(buffer)

    def _acquire(self, nbytes: int) -> Buffer:
        try:
            return self._pool.acquire(nbytes)
        except BaseException:
            with self._changed:
                self._lent_nbytes -= size_class(nbytes)
            raise

    def _next_step(self) -> tuple[Job, Buffer | None, bool] | None:
        """Wait for the next step and reserve what it needs: (job, its buffer, whether to finish it); None = end."""
        with self._changed:
            while not self._stopping:
                if self._head is None and not self._exhausted:
                    self._head = next(self._jobs, None)
                    self._exhausted = self._head is None
                    self._tell_waiters()
                job = self._head
                if job is not None:
                    nbytes = size_class(job.nbytes) if job.nbytes else 0
                    if not nbytes or not self._lent_nbytes or self._lent_nbytes + nbytes <= self._budget:
                        self._head = None
                        self._lent_nbytes += nbytes
                        self._num_staging += 1
                        return job, None, False
                if self._staged:
                    return *self._staged.popleft(), True
                if job is None and (self._mode is Mode.THROUGH or self._num_staging == 0):
                    return None
                self._changed.wait()
        return None


def submit(
    jobs: Iterable[Job],
    *,
    num_workers: int,
    num_first: int | None = None,
    budget: int = DEFAULT_BUDGET_NBYTES,
    mode: Mode = Mode.THROUGH,
    pool: BufferPool | None = None,
) -> Run:
    """Begin to carry out ``jobs`` on worker threads.

    Args:
        jobs: taken one after the other, while the run's lock is held; an error of the iterator fails the run.
        num_workers: worker threads: as many as there are CPUs for local work; a remote store wants as many as it wants
            requests in flight.
        num_first: how many of them to begin with; each job that goes on to ``finish`` brings another one. None: all.
        budget: bytes of buffers that the run may hold at once. The pool keeps as much for the next run.
        mode: see the module's docstring.
        pool: where buffers come from; the process's own by default.

    Raises:
        RuntimeError: no thread can be started (the interpreter is shutting down).
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    if num_first is not None and num_first < 1:
        raise ValueError(f"num_first must be at least 1, not {num_first}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 byte, not {budget}")
    pool = pool or shared_pool()
    pool.keep(budget)
    if isinstance(jobs, (list, tuple)):
        num_workers = min(num_workers, len(jobs))
    run = Run(jobs, budget, mode, pool, num_workers)
    run.start(min(num_workers, num_first or num_workers))
    return run


_run_numbers = itertools.count(1)


def lower_priority() -> None:
    """Make the calling thread nicer by ``BACKGROUND_NICENESS``; it can't be undone."""
    # On Linux a thread has its own niceness, under its kernel id; elsewhere the call would name a process
    if sys.platform == "linux":
        thread = threading.get_native_id()
        try:
            niceness = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness + BACKGROUND_NICENESS, 19))
        except OSError:
            return
