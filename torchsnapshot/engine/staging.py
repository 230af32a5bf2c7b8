"""How much memory a take may stage into, and memory that is ready before it is needed.

What lives here: the budget of a take's run, and the thread that makes the pool larger between takes. What doesn't: the
pool (``buffers``), the pipeline (``pipeline``), settings (``knobs``).

Touching fresh memory is slow (a page fault can cost ten times what copying into the page does), so an asynchronous
take stages only into memory that was touched before, and at least into as much as a synchronous take uses: what does
not fit in waits until a buffer is free again. As soon as a take has staged everything, a thread maps and touches what
was lacking, in the sizes that the take needed, up to what a take may stage; so the second or third take finds all of it
ready, also where takes follow one another without a pause.

Invariants: the thread never holds up anything: not ``wait`` (it runs beside it), not a take (which stops it), not the
interpreter's exit (it looks after each 2 MiB whether the main thread has ended). After a take the pool keeps no more
than the next one may stage.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torchsnapshot import knobs
from torchsnapshot.engine.buffers import BufferPool, shared_pool, size_class
from torchsnapshot.engine.pipeline import Job, Mode, Run, apart, submit
from torchsnapshot.engine.priority import lower_priority

_BUFFERS_PER_WORKER = 2
"""Finishing takes a buffer to encode into, and one for a base, beside the staged one."""


def staging_budget(allowed: int, at_least: int, warm: int) -> int:
    """The bytes that an asynchronous take may stage into.

    Args:
        allowed: what memory and settings allow.
        at_least: what it is given even if all of that has to be touched for the first time.
        warm: what the pool has mapped and touched.
    """
    return min(allowed, max(at_least, warm))


def submit_take(
    jobs: Sequence[Job],
    *,
    concurrency: int,
    in_background: bool,
    sizes: Iterable[int] | None = None,
    pool: BufferPool | None = None,
) -> Run:
    """Hand a take's jobs to the engine, with the memory that it should use.

    Args:
        jobs: in the order in which they are staged.
        concurrency: how many requests the store wants in flight.
        in_background: the caller waits only until everything is staged.
        sizes: the bytes of every buffer that may come to be needed, where jobs bring others; None: as jobs say.
        pool: where buffers come from; the process's own by default.
    """
    pool = pool or shared_pool()
    warming().stop()
    num_workers = knobs.get_num_workers(concurrency)
    budget = knobs.get_memory_budget_bytes()
    if in_background:
        # buffers are larger than what they hold, and one that does not fit would have to wait for a put
        sizes = [job.nbytes for job in jobs] if sizes is None else sizes
        wanted: Counter[int] = Counter()
        for nbytes, count in Counter(filter(None, sizes)).items():
            wanted[size_class(nbytes)] += count
        allowed = _allowed(wanted, pool)
        budget = staging_budget(allowed, budget, pool.warm_nbytes(wanted))
    mode = Mode.STAGE_FIRST if in_background else Mode.THROUGH
    staged, beside = apart(jobs)
    return submit(
        staged,
        beside=beside,
        num_workers=num_workers,
        num_staging=knobs.get_num_threads(),
        budget=budget,
        mode=mode,
        pool=pool,
    )


def wait_staged(run: Run, timeout: float | None = None) -> bool:
    """Return when the caller may change its tensors: all of them are staged, or the run has failed.

    Args:
        run: of an asynchronous take.
        timeout: seconds; None = for ever.

    Returns:
        False if the time ran out first.
    """
    try:
        return run.wait_staged(timeout)
    except Exception:
        # whether a put fails before or after the last tensor was staged is chance; commit raises it in both cases
        if not run.done:
            raise
        return True


def get_memory_ready(run: Run, *, pool: BufferPool | None = None) -> None:
    """Begin to touch what memory a background take has lacked, for the next one like it, once everything is staged."""
    pool = pool or shared_pool()
    used = run.staged_buffers
    if used:
        warming().start(pool, buffers_to_have(used, _allowed(used, pool)))


def warm_up(run: Run, *, pool: BufferPool | None = None) -> None:
    """The same after the commit of a background take; what it had beyond what the next one may use is given back."""
    pool = pool or shared_pool()
    if run.staged_buffers:
        pool.limit(knobs.get_staging_budget_bytes(sys.maxsize, pool.free_nbytes + pool.lent_nbytes))
        get_memory_ready(run, pool=pool)


def buffers_to_have(used: Mapping[int, int], allowed: int) -> dict[int, int]:
    """How many buffers of each size to have ready.

    Args:
        used: how many of each size the last take staged into.
        allowed: the most bytes that a take may stage into.

    Returns:
        All of them where they fit, else of each size the same share; and some of the largest size for finishing.
    """
    total = sum(size * count for size, count in used.items())
    if not total:
        return {}
    share = min(1.0, allowed / total)
    wanted = {size: int(count * share) for size, count in sorted(used.items(), reverse=True)}
    wanted[max(wanted)] += _BUFFERS_PER_WORKER * knobs.get_num_threads()
    return wanted


def _allowed(wanted: Mapping[int, int], pool: BufferPool) -> int:
    nbytes = sum(size * count for size, count in wanted.items())
    return knobs.get_staging_budget_bytes(nbytes, pool.free_nbytes + pool.lent_nbytes)


class Warming:
    """The thread that touches memory between takes; at most one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, pool: BufferPool, wanted: Mapping[int, int]) -> None:
        """Begin; what is going on already is stopped. Where no thread can be started nothing happens."""
        with self._lock:
            self._stopped.set()
            if not pool.lacks(wanted):
                return
            stopped = self._stopped = threading.Event()
            main = threading.main_thread()

            def work() -> None:
                lower_priority()
                try:
                    pool.prefault(wanted, lambda: not stopped.is_set() and main.is_alive())
                except (OSError, MemoryError, RuntimeError):
                    return  # memory is short, or this is a fork: the next take touches what it needs itself

            thread = threading.Thread(target=work, name="torchsnapshot-memory", daemon=False)
            try:
                thread.start()
            except RuntimeError:
                return
            self._thread = thread

    def stop(self) -> None:
        """Ask the thread to end; returns at once."""
        self._stopped.set()

    def wait_ended(self) -> None:
        """Return once nothing is going on; for tests and benchmarks."""
        thread = self._thread
        if thread is not None:
            thread.join()


_warming = Warming()


def warming() -> Warming:
    """That of this process."""
    return _warming


def _forget_parent() -> None:
    global _warming
    _warming = Warming()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
