"""A run: the jobs of one caller in flight, and the threads that carry them.

What doesn't live here: how a run is begun and what its modes mean (``pipeline``), which job comes next (``backlog``).

Invariants:

- Buffers lent to a run never exceed its budget, except for one job that alone is larger than the budget.
- The first error wins: no further step of that run begins, steps that run already come to their end, every buffer
  goes back to the pool, and ``wait`` raises that error.
- Where jobs are carried through, no more of them wait for their ``finish`` than are staged at once: memory that is used
  again soon is in the caches. Of jobs that compute first and wait for the store then, no more are staged at once than
  there are cores: more would take turns on these and then all wait together. The run begins with so many workers; when
  one goes on to ``finish``, another one joins.
- Nobody is woken in vain by every job: whoever waits for a run is woken at its end or when all is staged; a worker that
  has changed something looks for a step itself, and wakes one other worker if there is one more.
- Where everything is staged first, nothing is finished while the last jobs are staged and for a moment after that: who
  waited for it shall not have to fight for a core and the interpreter's lock.
- Worker threads belong to one run, end with it, and are no daemons: an idle process has none, and an interpreter that
  exits joins them (a run that nobody waited for is carried to its end). In the background phase of a ``STAGE_FIRST``
  run (everything staged, only finishing left) they lower their own priority, which Linux lets no ordinary thread
  raise again. A thread costs some 50 µs to start; what is worth keeping from run to run, the memory, is kept.
- After ``fork`` the child has neither the threads nor the memory: a run that it inherited raises when it is waited for.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from time import monotonic

from torchsnapshot.engine.backlog import Backlog
from torchsnapshot.engine.buffers import Buffer, BufferPool, size_class
from torchsnapshot.engine.job import Job, Mode
from torchsnapshot.engine.priority import lower_priority

_WAIT_SECONDS = 0.5
"""How often a thread that waits for a run wakes up all the same."""

_HEAD_START_SECONDS = 0.003
"""How long nothing is finished after all was staged: about what an asynchronous take needs to return to its caller."""

_Step = tuple[Job, Buffer | None, bool]
"""A job, its buffer, and whether it is to be finished."""

_run_numbers = itertools.count(1)


class Run:
    """Jobs in flight. Made by ``submit``."""

    def __init__(
        self,
        backlog: Backlog,
        budget: int,
        mode: Mode,
        pool: BufferPool,
        max_staging: int,
        max_finishing: int,
    ) -> None:
        self._backlog = backlog
        self._budget = budget
        self._mode = mode
        self._pool = pool
        self._max_staging = max_staging
        self._max_finishing = max_finishing
        self._max_workers = max_finishing + max_staging if max_staging < max_finishing else max_finishing
        self._number = next(_run_numbers)
        self._num_started = 0
        self._process = os.getpid()
        lock = threading.Lock()
        # one lock: what workers wait for, and what those who wait for the run do
        self._changed = threading.Condition(lock)
        self._settled = threading.Condition(lock)
        self._staged: deque[tuple[Job, Buffer | None]] = deque()
        self._num_staging = 0
        self._num_finishing = 0
        self._lent_nbytes = 0
        self._num_kept: Counter[int] = Counter()
        self._finishes_at: float | None = None
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
        """How many staged jobs have kept a buffer of each size class so far, in a ``STAGE_FIRST`` run."""
        with self._changed:
            return dict(self._num_kept)

    @property
    def is_staged(self) -> bool:
        """Whether ``wait_staged`` would return at once."""
        with self._changed:
            return self._live_workers == 0 or self._all_staged()

    @contextmanager
    def stopped_by_errors(self) -> Generator[None, None, None]:
        """A context for what whoever waits for the run does meanwhile.

        An exception (Ctrl-C) cancels the run, waits for the steps that are running and goes on to the caller; a second
        one goes to the caller at once.
        """
        try:
            yield
        except BaseException:
            self.cancel()
            with self._settled:
                while self._live_workers:
                    self._settled.wait()
            raise

    def cancel(self) -> None:
        """Begin no further step. Returns at once; steps that run already come to their end."""
        self._check_process()
        self._stop(CancelledError("the run was cancelled"))

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until every job is staged: the sources of all jobs may change. See ``wait``."""
        return self._wait(timeout, staged=True)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every job is finished.

        An exception that reaches the waiting thread is treated as ``stopped_by_errors`` says.

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
        with self.stopped_by_errors(), self._settled:
            while not (self._live_workers == 0 or (staged and self._all_staged())):
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    return False
                # in slices: a Ctrl-C that comes just before the lock is waited for would not be seen else
                self._settled.wait(_WAIT_SECONDS if left is None else min(left, _WAIT_SECONDS))
        if self._error is not None:
            raise self._error
        return True

    def _check_process(self) -> None:
        # before any lock is touched: another thread of the parent may have held it when the fork happened
        if os.getpid() != self._process:
            raise RuntimeError("this run belongs to the parent process; a fork has none of its threads")

    def _all_staged(self) -> bool:
        return self._backlog.is_empty and self._num_staging == 0 and not self._stopping

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            if self._live_workers == 0:
                return
            # what went wrong says more than that somebody cancelled
            if self._error is None or type(self._error) is CancelledError:
                self._error = error
            self._stopping = True
            self._backlog.clear()
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
            is_left = self._staged or not self._backlog.is_empty
            if self._stopping or not is_left or self._num_started >= self._max_workers:
                return
            index = self._num_started
            self._num_started += 1
            self._live_workers += 1
        try:
            self._thread(index).start()
        except BaseException as error:
            self._discount_workers(1)
            # no more threads: those that run carry the rest
            self._max_workers = 0
            if not isinstance(error, RuntimeError):
                raise

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
            if not lowered and self._mode is Mode.STAGE_FIRST and self._all_staged():
                lowered = True
                lower_priority()
            self._finish(job, buffer)

    def _finish(self, job: Job, buffer: Buffer | None) -> None:
        try:
            self._start_another()
            job.finish(buffer)
        finally:
            with self._changed:
                self._num_finishing -= 1
            self._free(buffer)

    def _stage(self, job: Job) -> None:
        buffer: Buffer | None = None
        outcome: bool | Sequence[Job] = False
        keeps = goes_on = False
        try:
            try:
                if job.nbytes:
                    buffer = self._pool.acquire(job.nbytes)
                outcome = job.stage(buffer)
            finally:
                with self._changed:
                    self._num_staging -= 1
                    if not self._stopping:
                        keeps, goes_on = self._take_in(job, buffer, outcome)
                    if goes_on:
                        self._wake_another()
                    self._tell_waiters()
            if goes_on:
                self._finish(job, buffer)
            elif not isinstance(outcome, bool) and outcome and self._num_started < self._max_staging:
                # what was found is work for more than one
                self._start_another()
        finally:
            if not keeps:
                self._free(buffer)

    def _take_in(self, job: Job, buffer: Buffer | None, outcome: bool | Sequence[Job]) -> tuple[bool, bool]:
        """With the lock held, what comes of a job after ``stage``: (it keeps its buffer, the worker finishes it)."""
        if not isinstance(outcome, bool):
            self._backlog.add(outcome)
            return False, False
        if not outcome:
            return False, False
        if self._mode is Mode.THROUGH and self._num_finishing < self._max_finishing:
            self._num_finishing += 1
            return True, True
        if buffer is not None and self._mode is Mode.STAGE_FIRST:
            self._num_kept[buffer.nbytes] += 1
        self._staged.append((job, buffer))
        return True, False

    def _next_step(self) -> _Step | None:
        """Wait for the next step and reserve what it needs; None = end."""
        with self._changed:
            while not self._stopping:
                step, seconds = self._choose_step()
                if step is not None:
                    self._wake_another()
                    return step
                # that nothing is left may have been found out only now
                self._tell_waiters()
                if self._backlog.is_empty and not self._num_staging and not self._staged:
                    return None
                self._changed.wait(seconds)
        return None

    def _choose_step(self) -> tuple[_Step | None, float | None]:
        """With the lock held: the next step, or that there is none before a change or before so many seconds pass."""
        if self._mode is Mode.THROUGH and self._may_finish():
            return self._next_staged(), None
        job = self._backlog.take(self._may_stage) if self._num_staging < self._max_staging else None
        if job is not None:
            self._num_staging += 1
            self._lent_nbytes += size_class(job.nbytes) if job.nbytes else 0
            return (job, None, False), None
        if self._mode is Mode.STAGE_FIRST and self._staged and self._backlog.is_empty:
            left = self._head_start()
            if left > 0:
                return None, left
        if self._may_finish() and not self._is_for_staging():
            return self._next_staged(), None
        return None, None

    def _wake_another(self) -> None:
        """With the lock held, before other work: wake one worker if there may be a step for it; it wakes the next.

        It asks what ``_choose_step`` asks, but never the iterator: an error here would lose the step that was chosen.
        """
        may_stage = self._num_staging < self._max_staging and self._backlog.has_one(self._may_stage)
        if may_stage or (self._may_finish() and not self._is_for_staging()):
            self._changed.notify()

    def _may_stage(self, job: Job) -> bool:
        """Whether there is memory for the job."""
        if not job.nbytes:
            return True
        if self._mode is Mode.THROUGH and len(self._staged) >= self._max_staging:
            return False
        return not self._lent_nbytes or self._lent_nbytes + size_class(job.nbytes) <= self._budget

    def _is_for_staging(self) -> bool:
        """Whether the cores are left to those who stage: as many do as may, and there is memory for what comes next."""
        if self._mode is Mode.THROUGH or self._num_staging < self._max_staging:
            return False
        return self._backlog.has_one(self._may_stage)

    def _head_start(self) -> float:
        """For how many seconds nothing is finished yet: the last jobs are being staged, or have just been."""
        if self._num_staging:
            return _WAIT_SECONDS
        if self._finishes_at is None:
            self._finishes_at = monotonic() + _HEAD_START_SECONDS
        return self._finishes_at - monotonic()

    def _may_finish(self) -> bool:
        return bool(self._staged) and self._num_finishing < self._max_finishing

    def _next_staged(self) -> _Step:
        self._num_finishing += 1
        return *self._staged.popleft(), True
