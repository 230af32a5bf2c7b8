"""The one bounded pipeline: jobs carried by worker threads under a byte budget, in pooled buffers.

What lives here: ``submit``. What doesn't: how a run goes on (``run``), what a job is (``job``) and does
(``taking.take_jobs``, ``reading.read_jobs``, ``verify`` and ``copy`` bring their own), the buffers themselves
(``buffers``), how a chunk is stored (``chunks.writer``).

A job has two steps, ``stage`` and ``finish``, and says how many bytes of buffer it needs. Jobs are staged in the order
in which they were given; a job may find out while it is staged which other jobs there are to do, and these come next.
Two modes:

- ``Mode.THROUGH``: a worker carries one job through both steps while it is hot in cache (take, restore). Where as many
  finish as may at once, others stage what comes next, so that the cores go on while the store is waited for.
- ``Mode.STAGE_FIRST``: what matters is how soon everything is staged (async take). Workers stage as long as there is a
  job that fits into the budget, and finish staged jobs when there is none.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchsnapshot.engine.backlog import Backlog
from torchsnapshot.engine.buffers import BufferPool, shared_pool
from torchsnapshot.engine.job import Job as Job
from torchsnapshot.engine.job import Mode as Mode
from torchsnapshot.engine.run import Run as Run

DEFAULT_BUDGET_NBYTES = 256 << 20
"""Buffer bytes of a run whose caller names no budget."""


def apart(jobs: Iterable[Job]) -> tuple[list[Job], list[Job]]:
    """Those that need a buffer, and those that don't, which ``submit`` takes as ``beside``: as long as others wait for
    the store, the cores have something to do.
    """
    every = list(jobs)
    return [job for job in every if job.nbytes], [job for job in every if not job.nbytes]


def submit(
    jobs: Iterable[Job],
    *,
    num_workers: int,
    beside: Iterable[Job] = (),
    num_staging: int | None = None,
    budget: int = DEFAULT_BUDGET_NBYTES,
    mode: Mode = Mode.THROUGH,
    pool: BufferPool | None = None,
) -> Run:
    """Begin to carry out ``jobs`` on worker threads.

    Args:
        jobs: taken one after the other, while the run's lock is held; an error of the iterator fails the run.
        num_workers: how many jobs may be carried at once: as many as there are CPUs for local work; as many as a remote
            store wants requests in flight.
        beside: more jobs, which need no buffer: they are staged whenever none of the others can be.
        num_staging: how many may be staged at once, beside so many that finish; None: all workers do whatever comes.
        budget: bytes of buffers that the run may hold at once. The pool keeps as much for the next run.
        mode: see the module's docstring.
        pool: where buffers come from; the process's own by default.

    Raises:
        RuntimeError: no thread can be started (the interpreter is shutting down).
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    if num_staging is not None and num_staging < 1:
        raise ValueError(f"num_staging must be at least 1, not {num_staging}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 byte, not {budget}")
    pool = pool or shared_pool()
    pool.keep(budget)
    num_staging = min(num_workers, num_staging or num_workers)
    beside = tuple(beside)
    run = Run(Backlog(jobs, beside), budget, mode, pool, num_staging, num_workers)
    run.start(min(num_staging, len(jobs) + len(beside)) if isinstance(jobs, (list, tuple)) else num_staging)
    return run
