"""Pooled memory: aligned, reused, bounded, and never touched in a fork."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot.engine import buffers
from torchsnapshot.engine.buffers import (
    HUGE_PAGE_NBYTES,
    BufferPool,
    address_of,
    is_page_memory,
    map_pages,
    shared_pool,
    size_class,
)

PAGE = 4096


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 1 << 20, HUGE_PAGE_NBYTES, 5 << 20])
def test_mapped_memory_is_aligned_and_whole_pages(nbytes: int) -> None:
    """Memory begins on a page, large memory on a huge page, and every byte up to the last page's end can be written."""
    memory = map_pages(nbytes)
    assert memory.nbytes % PAGE == 0
    assert memory.nbytes >= nbytes
    assert address_of(memory) % (HUGE_PAGE_NBYTES if nbytes >= HUGE_PAGE_NBYTES else PAGE) == 0
    memory[-1] = 1
    assert is_page_memory(memory)
    assert is_page_memory(memory[:100])
    assert not is_page_memory(memory[1:])
    assert not is_page_memory(memoryview(bytearray(PAGE)))


def test_mapped_memory_is_left_out_of_forks() -> None:
    """The kernel says that the mapping is not copied into children."""
    memory = map_pages(64 << 10)
    address = f"{address_of(memory):x}"
    with open("/proc/self/smaps") as lines:
        text = lines.read()
    start = max(
        int(line.split("-")[0], 16)
        for line in text.splitlines()
        if "-" in line.split(" ")[0] and int(line.split("-")[0], 16) <= int(address, 16)
    )
    entry = text[text.index(f"{start:x}-") :]
    flags = entry[entry.index("VmFlags:") :].splitlines()[0].split()
    assert "dc" in flags  # "do not copy area on fork"


def test_memory_is_unmapped_with_its_last_view() -> None:
    """Nothing here keeps a mapping alive that nobody uses."""
    memory = map_pages(PAGE)
    mapping = weakref.ref(memory.obj)
    view = memory[10:20]
    del memory
    gc.collect()
    assert mapping() is not None
    del view
    gc.collect()
    assert mapping() is None


@given(nbytes=st.integers(1, 1 << 30))
def test_size_classes(nbytes: int) -> None:
    """A class is whole pages, holds what was asked for, wastes at most a quarter and is a class of itself."""
    size = size_class(nbytes)
    assert size >= nbytes
    assert size % PAGE == 0
    assert size <= max(1.25 * nbytes, nbytes + PAGE)
    assert size_class(size) == size


class TestPool:
    def test_memory_is_reused(self) -> None:
        """The next buffer of a size is the memory that came back last."""
        pool = BufferPool()
        buffer = pool.acquire(100_000)
        address = address_of(buffer.memory())
        assert pool.lent_nbytes == buffer.nbytes
        buffer.release()
        assert (pool.lent_nbytes, pool.free_nbytes) == (0, buffer.nbytes)
        again = pool.acquire(99_000)
        assert address_of(again.memory()) == address
        again.release()

    def test_use_after_release_is_refused(self) -> None:
        """A released buffer gives no memory; releasing it again changes nothing."""
        pool = BufferPool()
        buffer = pool.acquire(10)
        buffer.release()
        buffer.release()
        assert pool.lent_nbytes == 0
        with pytest.raises(RuntimeError, match="after its release"):
            buffer.memory()

    def test_more_than_the_buffer_holds_is_refused(self) -> None:
        """A view is at most as large as the buffer."""
        buffer = BufferPool().acquire(10)
        assert buffer.memory(10).nbytes == 10
        with pytest.raises(ValueError, match="wanted"):
            buffer.memory(buffer.nbytes + 1)

    def test_what_is_kept_is_bounded(self) -> None:
        """Beyond ``keep_nbytes`` memory is unmapped as it comes back; other sizes make room for the one in use."""
        pool = BufferPool(keep_nbytes=1 << 20)
        large = [pool.acquire(512 << 10) for _ in range(4)]
        for buffer in large:
            buffer.release()
        assert pool.free_nbytes == 1 << 20
        small = [pool.acquire(128 << 10) for _ in range(8)]
        assert pool.free_nbytes == 0
        pool.keep(4 << 20)
        for buffer in small:
            buffer.release()
        assert pool.free_nbytes == 1 << 20
        pool.trim()
        assert pool.free_nbytes == 0

    def test_prefault_leaves_free_buffers(self) -> None:
        """Prefaulted buffers wait in the pool, also if they are more than it kept before."""
        pool = BufferPool(keep_nbytes=1)
        wanted = {1 << 20: 3, 1 << 16: 2}
        assert pool.warm_nbytes(wanted) == 0
        pool.prefault(wanted)
        assert (pool.lent_nbytes, pool.free_nbytes) == (0, (3 << 20) + (2 << 16))
        assert pool.warm_nbytes(wanted) == pool.free_nbytes
        assert pool.warm_nbytes({1 << 20: 5, 1 << 16: 1}) == (3 << 20) + (1 << 16)

    def test_prefault_keeps_what_is_there_and_replaces_what_is_not_wanted(self) -> None:
        """Free buffers of a wanted size are left as they are; those of others make room."""
        pool = BufferPool(keep_nbytes=4 << 20)
        lent = [pool.acquire(nbytes) for nbytes in (1 << 20, 1 << 20, 2 << 20)]
        lent[0].memory()[:4] = b"here"
        for buffer in lent:
            buffer.release()
        pool.prefault({1 << 20: 4})
        assert pool.free_nbytes == 4 << 20
        assert pool.warm_nbytes({1 << 20: 9}) == 4 << 20
        assert b"here" in [bytes(pool.acquire(1 << 20).memory(4)) for _ in range(4)]

    def test_what_is_lent_counts_as_ready(self) -> None:
        """Buffers on loan come back: only what is lacking beside them is mapped, and all of it is kept then."""
        pool = BufferPool(keep_nbytes=1)
        lent = [pool.acquire(1 << 20) for _ in range(3)]
        assert pool.lacks({1 << 20: 5})
        assert not pool.lacks({1 << 20: 3})
        pool.prefault({1 << 20: 5})
        assert pool.free_nbytes == 2 << 20
        assert not pool.lacks({1 << 20: 5})
        for buffer in lent:
            buffer.release()
        assert pool.free_nbytes == 5 << 20

    def test_prefault_stops_when_told(self) -> None:
        """It asks before each 2 MiB; a buffer that was not touched to its end is not handed out as ready."""
        pool = BufferPool()
        answers = iter([True] * 4 + [False])
        pool.prefault({4 << 20: 10}, lambda: next(answers))
        assert pool.free_nbytes == 4 << 20

    def test_limit_frees_what_is_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pool may be told to hold on to less; it never goes below what every pool keeps."""
        monkeypatch.setattr(buffers, "DEFAULT_KEEP_NBYTES", 2 << 20)
        pool = BufferPool()
        pool.prefault({1 << 20: 6})
        pool.limit(3 << 20)
        assert pool.free_nbytes == 3 << 20
        pool.limit(0)
        assert pool.free_nbytes == 2 << 20

    def test_failed_mapping_counts_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the machine has no memory left, the pool's figures stay right."""

        def fail(nbytes: int) -> memoryview:
            raise OSError("no memory")

        monkeypatch.setattr(buffers, "map_pages", fail)
        pool = BufferPool()
        with pytest.raises(OSError, match="no memory"):
            pool.acquire(10)
        assert pool.lent_nbytes == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_has_a_pool_of_its_own() -> None:
    """A child's pool is empty, what it inherited refuses to be used, and dropping that unmaps nothing."""
    lent = shared_pool().acquire(1 << 20)
    shared_pool().acquire(1 << 20).release()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            lent.memory()
        except RuntimeError:
            fresh = shared_pool().acquire(1 << 20)
            fresh.memory()[:] = bytes(fresh.nbytes)
            lent.release()
            del lent
            gc.collect()
            code = 0 if shared_pool().lent_nbytes == fresh.nbytes and shared_pool().free_nbytes == 0 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lent.memory()[:] = bytes(lent.nbytes)
    lent.release()
