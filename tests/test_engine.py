"""Runs: order, budget, what is staged when, errors, cancelling, Ctrl-C, forks and the end of the interpreter."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsnapshot.engine.buffers import Buffer, BufferPool, size_class
from torchsnapshot.engine.pipeline import Job, Mode, Run, submit

PAGE = 4096


class Record:
    """What jobs did, in order, and how much was on loan at most."""

    def __init__(self, pool: BufferPool) -> None:
        self._lock = threading.Lock()
        self.pool = pool
        self.staged: list[int] = []
        self.finished: list[int] = []
        self.steps: list[str] = []
        self.most_lent = 0

    def note(self, step: str, number: int) -> None:
        """A step runs."""
        with self._lock:
            self.most_lent = max(self.most_lent, self.pool.lent_nbytes)
            self.steps.append(f"{step}{number}")
            (self.staged if step == "s" else self.finished).append(number)


class Numbered:
    """A job that notes its steps and does what it is told in them."""

    def __init__(
        self,
        record: Record,
        number: int,
        nbytes: int = PAGE,
        *,
        needs_finish: bool = True,
        in_stage: Callable[[], object] = lambda: None,
        in_finish: Callable[[], object] = lambda: None,
    ) -> None:
        self.nbytes = nbytes
        self._record = record
        self._number = number
        self._needs_finish = needs_finish
        self._in_stage = in_stage
        self._in_finish = in_finish

    def stage(self, buffer: Buffer | None) -> bool:
        """First step: marks the buffer."""
        self._record.note("s", self._number)
        if self.nbytes:
            assert buffer is not None
            buffer.memory(self.nbytes)[:8] = self._number.to_bytes(8, "little")
        else:
            assert buffer is None
        self._in_stage()
        return self._needs_finish

    def finish(self, buffer: Buffer | None) -> None:
        """Second step: finds the mark."""
        self._record.note("f", self._number)
        if buffer is not None:
            assert buffer.memory(8) == self._number.to_bytes(8, "little")
        self._in_finish()


@pytest.fixture
def pool() -> Iterator[BufferPool]:
    """A pool that has to have everything back in the end."""
    pool = BufferPool()
    yield pool
    assert pool.lent_nbytes == 0


@pytest.fixture
def record(pool: BufferPool) -> Record:
    """An empty record."""
    return Record(pool)


def fail() -> None:
    """A step that goes wrong."""
    raise OSError("broken")


class Plan(NamedTuple):
    """A job to be made: pages of buffer, whether it needs ``finish``, how long its steps sleep, what it finds."""

    num_pages: int
    needs_finish: bool
    seconds: tuple[float, float]
    found: tuple[Plan, ...] = ()


class Planned:
    """A job that sleeps in its steps and may find others."""

    def __init__(self, plan: Plan, carried: list[str]) -> None:
        self.nbytes = plan.num_pages * PAGE
        self._plan = plan
        self._carried = carried

    def stage(self, buffer: Buffer | None) -> bool | list[Job]:
        """First step."""
        time.sleep(self._plan.seconds[0])
        self._carried.append("staged")
        if self._plan.found:
            return [Planned(plan, self._carried) for plan in self._plan.found]
        return self._plan.needs_finish

    def finish(self, buffer: Buffer | None) -> None:
        """Second step."""
        time.sleep(self._plan.seconds[1])
        self._carried.append("finished")


PAUSES = st.sampled_from([0.0, 0.0, 0.0002, 0.001])
SHAPES = (st.integers(0, 4), st.booleans(), st.tuples(PAUSES, PAUSES))
LEAVES = st.builds(Plan, *SHAPES, st.just(()))
PLANS = st.builds(Plan, *SHAPES, st.lists(LEAVES, max_size=4).map(tuple))


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(PLANS, max_size=12),
    beside=st.lists(PLANS.map(lambda plan: plan._replace(num_pages=0)), max_size=4),
    num_workers=st.integers(1, 6),
    num_staging=st.none() | st.integers(1, 6),
    budget=st.integers(1, 8),
    mode=st.sampled_from(Mode),
)
def test_every_run_comes_to_its_end(
    jobs: list[Plan], beside: list[Plan], num_workers: int, num_staging: int | None, budget: int, mode: Mode
) -> None:
    """No worker sleeps while there is a step for it: whatever jobs there are, all steps are carried, once each."""
    pool, carried = BufferPool(), []
    run = submit(
        [Planned(plan, carried) for plan in jobs],
        beside=[Planned(plan, carried) for plan in beside],
        num_workers=num_workers,
        num_staging=num_staging,
        budget=budget * PAGE,
        mode=mode,
        pool=pool,
    )
    assert run.wait(timeout=20), "workers wait for each other"
    every = [each for plan in (*jobs, *beside) for each in (plan, *plan.found)]
    assert carried.count("staged") == len(every)
    assert carried.count("finished") == sum(plan.needs_finish and not plan.found for plan in every)
    assert pool.lent_nbytes == 0


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("lazily", [True, False])
def test_every_job_is_carried_once(record: Record, mode: Mode, num_workers: int, lazily: bool) -> None:
    """Each job is staged and finished exactly once, in any mode, with any number of workers."""
    jobs = [Numbered(record, number) for number in range(50)]
    run = submit(iter(jobs) if lazily else jobs, num_workers=num_workers, mode=mode, pool=record.pool)
    assert run.wait()
    assert run.done
    assert run.error is None
    assert sorted(record.staged) == sorted(record.finished) == list(range(50))


@pytest.mark.parametrize("mode", Mode)
def test_workers_join_when_others_go_on_to_finish(record: Record, mode: Mode) -> None:
    """A run that begins with one worker has as many as it may have once that many finish at once."""
    together = threading.Barrier(4)
    jobs = [Numbered(record, number, in_finish=together.wait) for number in range(8)]
    assert submit(jobs, num_workers=4, num_staging=1, mode=mode, pool=record.pool).wait()
    assert sorted(record.finished) == list(range(8))


def test_jobs_that_need_no_finish_bring_no_workers(record: Record) -> None:
    """Jobs that only compute are carried by the first workers alone."""
    threads: set[int] = set()
    jobs = [
        Numbered(record, number, needs_finish=False, in_stage=lambda: threads.add(threading.get_ident()))
        for number in range(50)
    ]
    assert submit(jobs, num_workers=8, num_staging=1, pool=record.pool).wait()
    assert len(threads) == 1


def test_no_jobs_is_done_at_once(pool: BufferPool) -> None:
    """A run of nothing ends."""
    assert submit([], num_workers=2, pool=pool).wait()
    assert submit(iter(()), num_workers=2, pool=pool).wait_staged()


@pytest.mark.parametrize("mode", Mode)
def test_order_is_the_order_of_the_jobs(record: Record, mode: Mode) -> None:
    """One worker stages, and finishes, in the order given."""
    submit([Numbered(record, number) for number in range(20)], num_workers=1, mode=mode, pool=record.pool).wait()
    assert record.staged == record.finished == list(range(20))


def test_through_carries_one_job_at_a_time(record: Record) -> None:
    """In "through" mode a worker finishes a job before it takes the next."""
    submit([Numbered(record, number) for number in range(3)], num_workers=1, pool=record.pool).wait()
    assert record.steps == ["s0", "f0", "s1", "f1", "s2", "f2"]


def test_stage_first_stages_everything_first(record: Record) -> None:
    """With room for all, nothing is finished before all is staged."""
    jobs = [Numbered(record, number) for number in range(3)]
    submit(jobs, num_workers=1, mode=Mode.STAGE_FIRST, pool=record.pool).wait()
    assert record.steps == ["s0", "s1", "s2", "f0", "f1", "f2"]


def test_stage_first_finishes_when_no_buffer_is_free(record: Record) -> None:
    """With room for two, the third is staged when the first is finished; a job without buffer needs no room."""
    jobs = [Numbered(record, number, 0 if number == 3 else PAGE) for number in range(5)]
    submit(jobs, num_workers=1, budget=2 * PAGE, mode=Mode.STAGE_FIRST, pool=record.pool).wait()
    assert record.steps == ["s0", "s1", "f0", "s2", "s3", "f1", "s4", "f2", "f3", "f4"]


def test_wait_staged_returns_before_anything_is_finished(record: Record) -> None:
    """``wait_staged`` returns while finishing has not been allowed to begin."""
    gate = threading.Event()
    jobs = [Numbered(record, number, in_finish=gate.wait) for number in range(4)]
    run = submit(jobs, num_workers=2, mode=Mode.STAGE_FIRST, pool=record.pool)
    assert run.wait_staged()
    assert sorted(record.staged) == [0, 1, 2, 3]
    assert not run.done
    assert not run.wait(timeout=0)
    gate.set()
    assert run.wait()


class Finding:
    """A job without a buffer that finds other jobs."""

    nbytes = 0

    def __init__(self, record: Record, number: int, found: list[Job]) -> None:
        self._record = record
        self._number = number
        self._found = found

    def stage(self, buffer: Buffer | None) -> list[Job]:
        """Finds them."""
        assert buffer is None
        self._record.note("s", self._number)
        return self._found

    def finish(self, buffer: Buffer | None) -> None:
        """Never called."""
        raise AssertionError


@pytest.mark.parametrize("mode", Mode)
def test_jobs_that_are_found_come_next(record: Record, mode: Mode) -> None:
    """What a job finds is carried before what was there, also what that finds in its turn."""
    inner = Finding(record, 1, [Numbered(record, 2)])
    jobs: list[Job] = [Finding(record, 0, [inner]), Numbered(record, 3), Finding(record, 4, [])]
    submit(jobs, num_workers=1, mode=mode, pool=record.pool).wait()
    assert record.staged == [0, 1, 2, 3, 4]
    assert record.finished == [2, 3]


def test_all_is_staged_when_what_was_found_is(record: Record) -> None:
    """``wait_staged`` waits for jobs that the last one finds, and not for their end."""
    gate = threading.Event()
    found: list[Job] = [Numbered(record, number, in_finish=gate.wait) for number in range(1, 9)]
    run = submit([Finding(record, 0, found)], num_workers=3, mode=Mode.STAGE_FIRST, pool=record.pool)
    assert run.wait_staged()
    assert sorted(record.staged) == list(range(9))
    gate.set()
    assert run.wait()
    assert sorted(record.finished) == list(range(1, 9))


def test_nothing_is_finished_before_all_is_staged(record: Record) -> None:
    """A worker that has nothing left to stage waits for those that do, and what is kept is counted by then."""
    jobs: list[Job] = [Numbered(record, number) for number in range(7)]
    jobs.append(Numbered(record, 7, in_stage=lambda: time.sleep(0.05)))
    run = submit(jobs, num_workers=4, mode=Mode.STAGE_FIRST, pool=record.pool)
    assert run.wait_staged()
    assert dict(run.staged_buffers) == {PAGE: 8}
    assert run.wait()
    assert [step[0] for step in record.steps] == ["s"] * 8 + ["f"] * 8


def test_who_could_not_stage_leaves_the_cores_to_those_who_do(record: Record) -> None:
    """With more workers than may stage, none of them finishes anything while there is something to stage."""
    found: list[Job] = [Numbered(record, number, in_stage=lambda: time.sleep(0.005)) for number in range(1, 9)]
    jobs: list[Job] = [Finding(record, 0, found)]
    beside: list[Job] = [Finding(record, 10 + number, []) for number in range(4)]
    run = submit(jobs, beside=beside, num_workers=6, num_staging=2, mode=Mode.STAGE_FIRST, pool=record.pool)
    assert run.wait()
    assert "".join(step[0] for step in record.steps) == "s" * 13 + "f" * 8


def test_who_could_not_stage_frees_memory_for_those_who_wait_for_it(record: Record) -> None:
    """Where what comes next has to wait for memory, others finish, however long something is being staged."""
    freed, waited = threading.Event(), list[bool]()
    jobs: list[Job] = [
        Numbered(record, 0),
        Numbered(record, 1, in_finish=freed.set),
        Numbered(record, 2, in_stage=lambda: waited.append(freed.wait(60))),
        Numbered(record, 3),
    ]
    run = submit(jobs, num_workers=3, num_staging=1, budget=2 * PAGE, mode=Mode.STAGE_FIRST, pool=record.pool)
    assert run.wait()
    assert waited == [True]
    assert sorted(record.finished) == [0, 1, 2, 3]


def test_what_was_found_is_carried_by_several(record: Record) -> None:
    """Jobs that the only job of a run finds are carried side by side."""
    together = threading.Barrier(2)
    found: list[Job] = [Numbered(record, number, in_stage=together.wait) for number in range(1, 3)]
    assert submit([Finding(record, 0, found)], num_workers=4, num_staging=2, pool=record.pool).wait()
    assert sorted(record.finished) == [1, 2]


def test_what_was_found_is_dropped_after_an_error(record: Record) -> None:
    """A run that has failed stages nothing that is found afterwards."""
    failed = threading.Event()

    def wait_for_failure() -> list[Job]:
        failed.wait()
        while run.error is None:
            time.sleep(0.001)
        return [Numbered(record, 2)]

    def fail_after_all_began() -> None:
        failed.set()
        fail()

    late = Finding(record, 0, [])
    late.stage = lambda buffer: wait_for_failure()  # type: ignore[method-assign]
    run = submit([late, Numbered(record, 1, in_stage=fail_after_all_began)], num_workers=2, pool=record.pool)
    with pytest.raises(OSError, match="broken"):
        run.wait()
    assert record.staged == [1]


@pytest.mark.parametrize("mode", Mode)
def test_memory_that_comes_back_wakes_all_for_whom_it_is_enough(record: Record, mode: Mode) -> None:
    """Workers that wait for one large job's memory all go on when it comes back, although that job wakes only one."""
    together = threading.Barrier(4)

    def meet() -> None:
        together.wait(timeout=60)

    large = Numbered(record, 0, 4 * PAGE, needs_finish=False, in_stage=lambda: time.sleep(0.05))
    small = [Numbered(record, number, needs_finish=False, in_stage=meet) for number in range(1, 5)]
    submit([large, *small], num_workers=4, budget=4 * PAGE, mode=mode, pool=record.pool).wait()
    assert len(record.staged) == 5


@pytest.mark.parametrize("mode", Mode)
def test_jobs_beside_pass_those_that_wait_for_memory(record: Record, mode: Mode) -> None:
    """With memory for one buffer, what needs none goes on while that one is in use."""
    gate = threading.Event()
    beside: list[Job] = [Finding(record, 10 + number, []) for number in range(5)]
    beside.append(Numbered(record, 15, 0, needs_finish=False, in_stage=gate.set))
    jobs: list[Job] = [Numbered(record, number, in_finish=gate.wait) for number in range(3)]
    run = submit(jobs, beside=beside, num_workers=2, num_staging=1, budget=PAGE, mode=mode, pool=record.pool)
    assert run.wait()
    assert record.staged == [0, *range(10, 16), 1, 2]
    assert record.finished == [0, 1, 2]


def test_cores_go_on_while_as_many_finish_as_may(record: Record) -> None:
    """With all workers finishing, others stage what there are cores for, and no more: that would only take memory."""
    gate = threading.Event()
    beside = [Numbered(record, 20, 0, needs_finish=False, in_stage=gate.set)]
    jobs = [Numbered(record, number, in_finish=gate.wait) for number in range(20)]
    run = submit(jobs, beside=beside, num_workers=3, num_staging=2, pool=record.pool)
    assert run.wait()
    # three finish, two wait for that, two that were being staged beside one another may wait with them
    assert len(record.staged[: record.staged.index(20)]) in range(5, 8)
    assert record.most_lent <= 7 * PAGE
    assert sorted(record.finished) == list(range(20))


def test_no_more_are_staged_at_once_than_there_are_cores(record: Record) -> None:
    """However many workers have joined to finish, only as many stage as were asked for."""
    lock, now, most = threading.Lock(), [0], [0]

    def stage() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.001)
        with lock:
            now[0] -= 1

    jobs = [Numbered(record, number, in_stage=stage, in_finish=lambda: time.sleep(0.002)) for number in range(60)]
    assert submit(jobs, num_workers=8, num_staging=2, pool=record.pool).wait()
    assert most[0] == 2
    assert sorted(record.finished) == list(range(60))


def test_job_that_needs_no_finish_is_not_finished(record: Record) -> None:
    """``stage`` returning False ends the job and frees its buffer."""
    jobs = [Numbered(record, number, needs_finish=False) for number in range(10)]
    submit(jobs, num_workers=1, budget=PAGE, mode=Mode.STAGE_FIRST, pool=record.pool).wait()
    assert record.finished == []
    assert record.most_lent == PAGE


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_budget_is_never_exceeded(record: Record, mode: Mode, num_workers: int) -> None:
    """The buffers on loan never add up to more than the budget."""
    sizes = itertools.cycle([PAGE, 3 * PAGE, 2 * PAGE + 1, 10])
    jobs = [Numbered(record, number, next(sizes)) for number in range(60)]
    submit(jobs, num_workers=num_workers, budget=5 * PAGE, mode=mode, pool=record.pool).wait()
    assert 0 < record.most_lent <= 5 * PAGE
    assert len(record.finished) == 60


def test_job_beyond_the_budget_runs_alone(record: Record) -> None:
    """A job larger than the budget is carried when nothing else is on loan."""
    large = size_class(10 * PAGE)
    jobs = [Numbered(record, number, 10 * PAGE if number == 2 else PAGE) for number in range(5)]
    submit(jobs, num_workers=4, budget=2 * PAGE, pool=record.pool).wait()
    assert record.most_lent <= large
    assert len(record.finished) == 5


def test_pool_keeps_the_memory_of_a_run(record: Record) -> None:
    """The next run of the same size finds its buffers in the pool."""
    gate = threading.Barrier(3)
    for _ in range(2):
        jobs = [Numbered(record, number, 1 << 20, in_stage=gate.wait) for number in range(3)]
        submit(jobs, num_workers=3, pool=record.pool).wait()
        assert record.pool.free_nbytes == 3 << 20


class TestErrors:
    @pytest.mark.parametrize("mode", Mode)
    @pytest.mark.parametrize("step", ["in_stage", "in_finish"])
    def test_first_error_is_raised(self, record: Record, mode: Mode, step: str) -> None:
        """An error in either step ends the run and reaches whoever waits, every time."""
        jobs: list[Job] = [Numbered(record, number) for number in range(5)]
        jobs.append(Numbered(record, 5, **{step: fail}))  # type: ignore[arg-type]
        jobs.extend(Numbered(record, number) for number in range(6, 1000))
        run = submit(jobs, num_workers=2, budget=8 * PAGE, mode=mode, pool=record.pool)
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                run.wait()
        assert run.done
        assert isinstance(run.error, OSError)
        assert len(record.finished) < 1000

    def test_wait_staged_raises_too(self, record: Record) -> None:
        """A failed staging does not look like a staged state."""
        jobs = [Numbered(record, 0, in_stage=fail)]
        with pytest.raises(OSError, match="broken"):
            submit(jobs, num_workers=1, mode=Mode.STAGE_FIRST, pool=record.pool).wait_staged()

    def test_running_steps_come_to_their_end(self, record: Record) -> None:
        """An error leaves a step that runs in another worker alone, and ``wait`` waits for it."""
        failed, both_run = threading.Event(), threading.Barrier(2)
        run: list[Run] = []

        def wait_for_failure() -> None:
            both_run.wait()
            while run[0].error is None:
                failed.wait(0.001)

        def fail_when_both_run() -> None:
            both_run.wait()
            fail()

        jobs = [
            Numbered(record, 0, in_stage=wait_for_failure, needs_finish=False),
            Numbered(record, 1, in_stage=fail_when_both_run),
        ]

        def jobs_after_start() -> Iterator[Job]:
            while not run:
                failed.wait(0.001)
            yield from jobs

        run.append(submit(jobs_after_start(), num_workers=2, pool=record.pool))
        with pytest.raises(OSError, match="broken"):
            run[0].wait()
        assert record.staged in ([0, 1], [1, 0])

    def test_error_of_the_iterator_fails_the_run(self, record: Record) -> None:
        """Jobs may be made as they are needed; where that fails, the run does."""

        def jobs() -> Iterator[Job]:
            yield Numbered(record, 0)
            fail()

        with pytest.raises(OSError, match="broken"):
            submit(jobs(), num_workers=2, pool=record.pool).wait()

    def test_error_of_the_iterator_leaves_no_buffer_on_loan(self, pool: BufferPool) -> None:
        """Whenever it comes, and whoever asks for the next job then."""

        def jobs(count: int) -> Iterator[Job]:
            yield from (Planned(Plan(1, True, (0.0005, 0.0005)), []) for _ in range(count))
            fail()

        for mode, num_staging, count in itertools.product(Mode, (None, 2), range(16)):
            run = submit(jobs(count), num_workers=4, num_staging=num_staging, budget=3 * PAGE, mode=mode, pool=pool)
            with pytest.raises(OSError, match="broken"):
                run.wait()
            assert pool.lent_nbytes == 0

    def test_no_memory_fails_the_run(self, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        """A buffer that cannot be had is an error of the run."""

        def fail_to_acquire(nbytes: int) -> Buffer:
            raise MemoryError("no memory")

        monkeypatch.setattr(record.pool, "acquire", fail_to_acquire)
        with pytest.raises(MemoryError, match="no memory"):
            submit([Numbered(record, 0)], num_workers=1, pool=record.pool).wait()

    def test_impossible_arguments_are_refused(self, pool: BufferPool) -> None:
        """No workers, or no budget, is a ``ValueError``."""
        with pytest.raises(ValueError, match="num_workers"):
            submit([], num_workers=0, pool=pool)
        with pytest.raises(ValueError, match="budget"):
            submit([], num_workers=1, budget=0, pool=pool)

    def test_fewer_threads_than_wanted_carry_the_run(self, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where only one thread can be started, it does all; where none can, ``submit`` raises."""
        real_start = threading.Thread.start
        allowed = [1]

        def start(thread: threading.Thread) -> None:
            if not allowed:
                raise RuntimeError("can't start new thread")
            allowed.pop()
            real_start(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        jobs = [Numbered(record, number) for number in range(10)]
        assert submit(jobs, num_workers=4, pool=record.pool).wait()
        assert len(record.finished) == 10
        with pytest.raises(RuntimeError, match="can't start"):
            submit(jobs, num_workers=4, pool=record.pool)


class TestCancel:
    @pytest.mark.parametrize("mode", Mode)
    def test_cancelled_run_begins_nothing_more(self, record: Record, mode: Mode) -> None:
        """After ``cancel`` no step begins; staged buffers come back; ``wait`` says what happened."""
        gate, entered = threading.Event(), threading.Event()

        def block() -> None:
            entered.set()
            gate.wait()

        jobs: list[Job] = [Numbered(record, 0), Numbered(record, 1, in_stage=block), Numbered(record, 2)]
        run = submit(jobs, num_workers=1, mode=mode, pool=record.pool)
        entered.wait()
        run.cancel()
        gate.set()
        with pytest.raises(CancelledError):
            run.wait()
        assert record.staged == [0, 1]
        assert run.done

    def test_cancel_after_the_end_changes_nothing(self, record: Record) -> None:
        """A run that is done stays a success."""
        run = submit([Numbered(record, 0)], num_workers=1, pool=record.pool)
        run.wait()
        run.cancel()
        assert run.wait()

    def test_ctrl_c_cancels_and_goes_on_to_the_caller(self, record: Record) -> None:
        """A ``KeyboardInterrupt`` in ``wait`` ends an endless run, waits for its steps, and is raised."""
        main = threading.main_thread().ident
        interrupted: list[bool] = []

        def interrupt_when_waiting() -> None:
            frame = sys._current_frames()[main] if main is not None else None
            names = []
            while frame is not None:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            if main is not None and names[:2] == ["wait", "_wait"] and not interrupted:
                interrupted.append(True)
                signal.pthread_kill(main, signal.SIGINT)

        endless = (Numbered(record, number, in_stage=interrupt_when_waiting) for number in itertools.count())
        run = submit(endless, num_workers=2, pool=record.pool)
        with pytest.raises(KeyboardInterrupt):
            run.wait()
        assert run.done
        with pytest.raises(CancelledError):
            run.wait()

    def test_ctrl_c_while_threads_start_leaves_nothing_running(
        self, record: Record, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A ``KeyboardInterrupt`` out of ``submit`` stops the threads that it had started."""
        real_start = threading.Thread.start
        started: list[threading.Thread] = []

        def start(thread: threading.Thread) -> None:
            real_start(thread)
            started.append(thread)
            if len(started) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            submit((Numbered(record, number) for number in itertools.count()), num_workers=4, pool=record.pool)
        for thread in started:
            thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
def test_background_phase_has_lower_priority(record: Record) -> None:
    """Workers are nicer once everything is staged, and the process itself is not."""

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = niceness()
    while_staging: list[int] = []
    while_finishing: list[int] = []
    jobs = [
        Numbered(
            record,
            number,
            in_stage=lambda: while_staging.append(niceness()),
            in_finish=lambda: while_finishing.append(niceness()),
        )
        for number in range(4)
    ]
    submit(jobs, num_workers=1, mode=Mode.STAGE_FIRST, pool=record.pool).wait()
    assert set(while_staging) == {own}
    assert set(while_finishing) == {min(own + 10, 19)}
    assert niceness() == own


def run_script(text: str, *arguments: str) -> str:
    """What a script prints; it has to end well."""
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


JOB = """
import os, sys, threading
from torchsnapshot.engine.buffers import shared_pool
from torchsnapshot.engine.pipeline import Mode, submit

class Job:
    nbytes = 1 << 20
    def __init__(self, work): self.work = work
    def stage(self, buffer):
        buffer.memory()[:8] = b"contents"
        return True
    def finish(self, buffer):
        self.work(buffer)
"""


def test_run_nobody_waits_for_is_finished_at_exit(tmp_path: Path) -> None:
    """The interpreter ends only when a run in flight has ended, though the main thread is long gone."""
    script = """
folder = sys.argv[1]
def work(number):
    def write(buffer):
        threading.main_thread().join()
        with open(os.path.join(folder, str(number)), "wb") as file:
            file.write(buffer.memory(8))
    return write
run = submit([Job(work(n)) for n in range(6)], num_workers=2, mode=Mode.STAGE_FIRST)
run.wait_staged()
"""
    run_script(JOB + script, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4", "5"]
    assert all(path.read_bytes() == b"contents" for path in tmp_path.iterdir())


def test_idle_process_has_no_threads_and_exits() -> None:
    """After a run has ended none of its threads is left."""
    script = """
submit([Job(lambda buffer: None)], num_workers=2).wait()
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
print(threading.active_count())
"""
    assert run_script(JOB + script).strip() == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_a_run_is_active() -> None:
    """The child has no run but a working engine, whatever locks the parent's threads held; the parent goes on."""
    script = """
gate = threading.Event()
lent = []
def block(buffer):
    lent.append(buffer)
    gate.wait()
run = submit([Job(block) for _ in range(4)], num_workers=4, mode=Mode.STAGE_FIRST)
run.wait_staged()
churn = threading.Event()
def keep_locks_busy():
    while not churn.is_set():
        shared_pool().acquire(4096).release()
busy = threading.Thread(target=keep_locks_busy)
busy.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for inherited in (run.wait, run.wait_staged, run.cancel, *(buffer.memory for buffer in lent)):
                try:
                    inherited()
                except RuntimeError:
                    continue
                os._exit(2)
            seen = []
            own = submit([Job(lambda buffer: seen.append(bytes(buffer.memory(8)))) for _ in range(4)], num_workers=2)
            own.wait()
            code = 0 if seen == [b"contents"] * 4 else 3
        finally:
            os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
churn.set()
busy.join()
gate.set()
run.wait()
print(codes, shared_pool().lent_nbytes)
"""
    assert run_script(JOB + script).strip() == f"{[0] * 20} 0"
