"""Memory for asynchronous takes: only what was touched before is staged into, and the rest gets ready between takes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from folders import new_process
from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot import Snapshot, StateDict, knobs, machine
from torchsnapshot.engine import buffers, staging
from torchsnapshot.engine.buffers import Buffer, BufferPool
from torchsnapshot.engine.pipeline import Run
from torchsnapshot.engine.staging import (
    Warming,
    buffers_to_have,
    get_memory_ready,
    staging_budget,
    submit_take,
    wait_staged,
    warm_up,
)

MIB = 1 << 16
"""A small mebibyte: what holds for it holds for the real one, and touching it takes less time."""


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with two threads and 64 MiB for a synchronous take; a pool and a thread of this test's own."""
    new_process()
    monkeypatch.setenv(knobs.NUM_THREADS, "2")
    monkeypatch.setattr(knobs, "DEFAULT_MEMORY_BUDGET_NBYTES", 64 * MIB)
    monkeypatch.setattr(knobs, "MIN_STAGING_NBYTES", 16 * MIB)
    monkeypatch.setattr(buffers, "DEFAULT_KEEP_NBYTES", 64 * MIB)
    monkeypatch.setattr(staging, "_warming", Warming())
    yield
    staging.warming().stop()
    staging.warming().wait_ended()


class Copy:
    """A job that keeps its buffer until its end."""

    def __init__(self, nbytes: int, *, changed: bool = True, gate: threading.Event | None = None) -> None:
        self.nbytes = nbytes
        self._changed = changed
        self._gate = gate

    def stage(self, buffer: Buffer | None) -> bool:
        """Say whether anything is left to do."""
        return self._changed

    def finish(self, buffer: Buffer | None) -> None:
        """Nothing but to wait at the gate."""
        if self._gate is not None:
            self._gate.wait()


def free_memory(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine have so much free memory."""
    monkeypatch.setattr(machine, "free_memory_nbytes", lambda: nbytes)


def budget_of(run: Run) -> int:
    """What a run was given."""
    return run._budget


class TestPolicy:
    def test_first_take_gets_what_a_synchronous_one_uses(self) -> None:
        """With a cold pool, 256 MiB of 1 GiB."""
        assert staging_budget(1024 * MIB, 256 * MIB, 0) == 256 * MIB

    def test_warm_memory_is_used(self) -> None:
        """What the pool has touched is staged into, up to what is allowed."""
        assert staging_budget(1024 * MIB, 256 * MIB, 600 * MIB) == 600 * MIB
        assert staging_budget(1024 * MIB, 256 * MIB, 4096 * MIB) == 1024 * MIB

    def test_small_states_need_little(self) -> None:
        """What is allowed is never exceeded, however little it is."""
        assert staging_budget(10 * MIB, 256 * MIB, 0) == 10 * MIB

    @given(
        st.dictionaries(st.sampled_from([1 << 16, 1 << 20, 4 << 20, 8 << 20]), st.integers(1, 500), max_size=4),
        st.integers(1, 1 << 33),
    )
    def test_what_to_have_fits(self, used: dict[int, int], allowed: int) -> None:
        """Never more than was used or is allowed, some buffers for finishing aside; all of it where it fits."""
        wanted = buffers_to_have(used, allowed)
        spare = 4 * max(used, default=0)
        total = sum(size * count for size, count in wanted.items())
        used_nbytes = sum(size * count for size, count in used.items())
        assert total <= min(used_nbytes, allowed) + spare
        if used_nbytes <= allowed and used:
            assert total == used_nbytes + spare


class TestTakes:
    def test_steady_from_the_second_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first take stages into 64 MiB; after it all that it needed is ready, and the second uses that."""
        free_memory(8192 * MIB, monkeypatch)
        pool = BufferPool(64 * MIB)
        jobs = [Copy(4 * MIB) for _ in range(40)]
        first = submit_take(jobs, concurrency=1, in_background=True, pool=pool)
        assert budget_of(first) == 64 * MIB
        first.wait()
        warm_up(first, pool=pool)
        staging.warming().wait_ended()
        assert pool.free_nbytes == (40 + 4) * 4 * MIB
        second = submit_take(jobs, concurrency=1, in_background=True, pool=pool)
        assert budget_of(second) == 160 * MIB
        second.wait()
        assert pool.free_nbytes == (40 + 4) * 4 * MIB

    def test_memory_gets_ready_while_the_take_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was lacking is there once everything is staged and some time has passed, before anything is put."""
        free_memory(8192 * MIB, monkeypatch)
        pool = BufferPool(64 * MIB)
        gate = threading.Event()
        jobs = [Copy(4 * MIB, gate=gate) for _ in range(16)]
        run = submit_take(jobs, concurrency=1, in_background=True, pool=pool)
        assert wait_staged(run)
        get_memory_ready(run, pool=pool)
        staging.warming().wait_ended()
        assert not run.done
        assert pool.lent_nbytes == 64 * MIB
        assert pool.free_nbytes == 4 * 4 * MIB
        gate.set()
        run.wait()

    def test_only_what_changed_gets_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was proved to be stored already needed no buffer of its own, and none gets ready for it."""
        free_memory(8192 * MIB, monkeypatch)
        pool = BufferPool(64 * MIB)
        jobs = [Copy(4 * MIB, changed=number < 5) for number in range(100)]
        run = submit_take(jobs, concurrency=1, in_background=True, pool=pool)
        run.wait()
        assert dict(run.staged_buffers) == {4 * MIB: 5}
        warm_up(run, pool=pool)
        staging.warming().wait_ended()
        assert pool.warm_nbytes({4 * MIB: 100}) <= (5 + 4) * 4 * MIB

    def test_memory_is_bounded_by_what_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where memory is short the budget stays what it is and the stall grows: takes never hold more."""
        free_memory(400 * MIB, monkeypatch)
        pool = BufferPool(64 * MIB)
        jobs = [Copy(4 * MIB) for _ in range(100)]
        for _ in range(4):
            run = submit_take(jobs, concurrency=1, in_background=True, pool=pool)
            assert budget_of(run) <= 256 * MIB
            run.wait()
            warm_up(run, pool=pool)
            staging.warming().wait_ended()
            assert pool.lent_nbytes + pool.free_nbytes <= 256 * MIB

    def test_synchronous_takes_use_their_budget(self) -> None:
        """They neither need nor make warm memory."""
        pool = BufferPool(64 * MIB)
        run = submit_take([Copy(4 * MIB)] * 40, concurrency=1, in_background=False, pool=pool)
        assert budget_of(run) == 64 * MIB
        run.wait()
        warm_up(run, pool=pool)
        staging.warming().wait_ended()
        assert pool.free_nbytes <= 64 * MIB

    def test_same_snapshot_whatever_the_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A take that had to wait for buffers stores what one with enough of them stores."""
        monkeypatch.setattr(knobs, "DEFAULT_MEMORY_BUDGET_NBYTES", 2 * MIB)
        torch.manual_seed(0)
        tensor = torch.randn(48 * MIB)
        for name, budget in (("little", 2 * MIB), ("enough", 64 * MIB)):
            monkeypatch.setattr(knobs, "DEFAULT_MEMORY_BUDGET_NBYTES", budget)
            with knobs.override_max_chunk_size_bytes(4 * MIB):
                Snapshot.async_take(str(tmp_path / name / "step_0"), {"s": StateDict(w=tensor)}).wait()
            target = StateDict()
            Snapshot(str(tmp_path / name / "step_0")).restore({"s": target})
            assert torch.equal(target["w"], tensor)


class TestThread:
    def test_a_take_stops_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What gets memory ready goes out of the way as soon as a take begins."""
        free_memory(8192 * MIB, monkeypatch)
        stopped = threading.Event()
        begun = threading.Event()

        class Slow(BufferPool):
            """A pool that touches memory until it is stopped."""

            def prefault(self, wanted: object, goes_on: Callable[[], bool] = lambda: True) -> None:
                """See ``BufferPool``."""
                begun.set()
                while goes_on():
                    pass
                stopped.set()

        pool = Slow()
        staging.warming().start(pool, {MIB: 5})
        assert begun.wait(60)
        submit_take([Copy(MIB)], concurrency=1, in_background=True, pool=BufferPool(64 * MIB)).wait()
        assert stopped.wait(60)

    def test_nothing_to_do_starts_no_thread(self) -> None:
        """Where all that is wanted is ready there is no thread."""
        pool = BufferPool(64 * MIB)
        pool.prefault({MIB: 3})
        before = threading.active_count()
        staging.warming().start(pool, {MIB: 3})
        assert threading.active_count() == before

    def test_exit_does_not_wait_for_it(self) -> None:
        """A process that ends while memory gets ready ends: the thread would go on for ever otherwise."""
        code = """
from torchsnapshot.engine import staging
from torchsnapshot.engine.buffers import BufferPool
class Endless(BufferPool):
    def prefault(self, wanted, goes_on=None):
        print("begun", flush=True)
        while goes_on():
            pass
        print("ended")
staging.warming().start(Endless(), {1 << 20: 5})
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.split() == ["begun", "ended"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_child_has_none(self) -> None:
        """A forked child begins without a thread, and may start its own."""
        parent = staging.warming()
        child = os.fork()
        if child == 0:
            os._exit(0 if staging.warming() is not parent else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
