"""Which pages the kernel says were written: all of those that were, however, and no others."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_watch import map_anew, needs_page_watch

from torchsnapshot.engine import page_watch
from torchsnapshot.engine.page_watch import PAGE_NBYTES, PageWatch, pages_of

pytestmark = needs_page_watch

NUM_PAGES = 64
LIBC = ctypes.CDLL(None, use_errno=True)


class Memory:
    """Private memory of some pages, all of them written."""

    def __init__(self, num_pages: int = NUM_PAGES, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) -> None:
        self.map = mmap.mmap(-1, num_pages * PAGE_NBYTES, flags=flags)
        self.map[:] = b"x" * len(self.map)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.end = self.start + len(self.map)

    def page(self, number: int) -> memoryview:
        """One page."""
        return memoryview(self.map)[number * PAGE_NBYTES : (number + 1) * PAGE_NBYTES]


@pytest.fixture
def memory() -> Memory:
    """Fresh memory."""
    return Memory()


@pytest.fixture
def watch(memory: Memory) -> Iterator[PageWatch]:
    """A watch on the memory, which nobody has written since it began."""
    watch = PageWatch()
    assert watch.add([(memory.start, memory.end)]) == [True]
    assert watch.written(memory.start, memory.end) == [(memory.start, memory.end)]
    yield watch
    watch.close()


def pages(memory: Memory, found: list[tuple[int, int]]) -> set[int]:
    """The numbers of the pages in an answer."""
    numbers = [
        (address - memory.start) // PAGE_NBYTES for start, end in found for address in range(start, end, PAGE_NBYTES)
    ]
    assert len(numbers) == len(set(numbers))
    return set(numbers)


def _store(memory: Memory, path: Path) -> None:
    memory.page(5)[7] = 1


def _memmove(memory: Memory, path: Path) -> None:
    ctypes.memmove(memory.start + 5 * PAGE_NBYTES + 1, b"abc", 3)


def _read(memory: Memory, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        assert file.readinto(memory.page(5)) == PAGE_NBYTES


def _read_direct(memory: Memory, path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.preadv(handle, [memory.page(5)], 0) == PAGE_NBYTES
    finally:
        os.close(handle)


def _write_through_proc(memory: Memory, path: Path) -> None:
    with open("/proc/self/mem", "r+b", buffering=0) as file:
        file.seek(memory.start + 5 * PAGE_NBYTES)
        file.write(b"abc")


def _pipe(memory: Memory, path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    assert os.readv(reader, [memory.page(5)[:3]]) == 3
    os.close(reader)
    os.close(writer)


def _drop(memory: Memory, path: Path) -> None:
    memory.map.madvise(mmap.MADV_DONTNEED, 5 * PAGE_NBYTES, PAGE_NBYTES)
    assert bytes(memory.page(5)) == bytes(PAGE_NBYTES)


def _store_after_fork(memory: Memory, path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    memory.page(5)[7] = 1
    os.waitpid(child, 0)


def _protect_and_store(memory: Memory, path: Path) -> None:
    for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
        assert LIBC.mprotect(ctypes.c_void_p(memory.start), ctypes.c_size_t(len(memory.map)), protection) == 0
    memory.page(5)[7] = 1


@pytest.mark.parametrize(
    "write",
    [
        _store,
        _memmove,
        _read,
        _read_direct,
        _write_through_proc,
        _pipe,
        _drop,
        _store_after_fork,
        _protect_and_store,
    ],
)
def test_a_write_is_seen_however_it_is_done(
    memory: Memory, watch: PageWatch, tmp_path: Path, write: Callable[[Memory, Path], None]
) -> None:
    """Stores, system calls that fill memory, direct I/O, /proc, dropped pages: the page is told, and told once."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGE_NBYTES))
    write(memory, path)
    assert pages(memory, watch.written(memory.start, memory.end)) == {5}
    assert watch.written(memory.start, memory.end) == []


def test_reading_is_no_writing(memory: Memory, watch: PageWatch, tmp_path: Path) -> None:
    """Who reads memory, writes it to a file, or forks, has not written to it; nor has a child that does."""
    (tmp_path / "file").write_bytes(memory.map)
    child = os.fork()
    if not child:
        memory.page(3)[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert bytes(memory.map) == b"x" * len(memory.map)
    assert watch.written(memory.start, memory.end) == []


WATCHED = Memory(2 * NUM_PAGES)


@given(writes=st.lists(st.lists(st.integers(0, len(WATCHED.map) - 1), max_size=40), max_size=4))
@settings(max_examples=60, deadline=None)
def test_exactly_the_pages_that_were_written_are_told(writes: list[list[int]]) -> None:
    """Between any two questions, the pages that were written are told, and no others."""
    watch = PageWatch()
    assert watch.add([(WATCHED.start, WATCHED.end)]) == [True]
    watch.written(WATCHED.start, WATCHED.end)
    for offsets in writes:
        for offset in offsets:
            WATCHED.map[offset] ^= 1
        told = pages(WATCHED, watch.written(WATCHED.start, WATCHED.end))
        assert told == {offset // PAGE_NBYTES for offset in offsets}
    watch.close()


def test_memory_in_huge_pages() -> None:
    """The kernel may back memory with huge pages, also beyond what is watched: the same pages are told."""
    memory, watch = Memory(4096), PageWatch()
    memory.map.madvise(mmap.MADV_HUGEPAGE)
    memory.map[:] = b"y" * len(memory.map)
    start, end = memory.start + 3 * PAGE_NBYTES, memory.end - 5 * PAGE_NBYTES
    assert watch.add([(start, end)]) == [True]
    assert watch.written(start, end) == [(start, end)]
    for step in range(50):
        numbers = {(step * 997 + 31 * index) % 4088 + 3 for index in range(step % 4)}
        for number in numbers:
            memory.page(number)[step] = 1
        assert pages(memory, watch.written(start, end)) == numbers
    watch.close()


def test_more_regions_than_one_answer_holds() -> None:
    """Every other page of many: all of them are told."""
    memory, watch = Memory(5000), PageWatch()
    watch.add([(memory.start, memory.end)])
    watch.written(memory.start, memory.end)
    for number in range(0, 5000, 2):
        memory.page(number)[0] = 1
    assert pages(memory, watch.written(memory.start, memory.end)) == set(range(0, 5000, 2))
    assert watch.written(memory.start, memory.end) == []
    watch.close()


def test_memory_that_others_may_write_is_refused(memory: Memory, tmp_path: Path) -> None:
    """Shared memory and mapped files are not watched, private memory beside them is; nor is what is not there."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE_NBYTES))
    shared = Memory(4, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    watch = PageWatch()
    ranges = [
        (shared.start, shared.end),
        (address, address + len(mapped)),
        (memory.start, memory.end),
        (0, PAGE_NBYTES),
    ]
    assert watch.add(ranges) == [False, False, True, False]
    with pytest.raises(OSError, match="not permitted"):
        watch.written(shared.start, shared.end)
    watch.close()


def test_names_of_mapped_files_do_not_matter(memory: Memory, tmp_path: Path) -> None:
    """A carriage return in one, which the kernel shows as it is, is no end of a line."""
    file = tmp_path / "data\rset"
    file.write_bytes(bytes(PAGE_NBYTES))
    with file.open("r+b") as handle, mmap.mmap(handle.fileno(), 0):
        watch = PageWatch()
        assert watch.add([(memory.start, memory.end)]) == [True]
        watch.close()


def test_mappings_are_left_to_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many ranges with gaps between them as many are watched, the largest first, as mappings may be made for."""
    memory, watch = Memory(1024), PageWatch()
    first = memory.start // PAGE_NBYTES
    sizes = [3 if number % 4 == 0 else 1 for number in range(200)]
    ranges = [((first + 5 * i) * PAGE_NBYTES, (first + 5 * i + size) * PAGE_NBYTES) for i, size in enumerate(sizes)]
    before = _num_mappings()
    monkeypatch.setattr(page_watch, "_max_mappings", lambda: 2 * (before + 140))
    watched = watch.add(ranges)
    assert 60 <= sum(watched) <= 70
    assert all(is_watched for is_watched, size in zip(watched, sizes, strict=True) if size == 3)
    assert _num_mappings() <= before + 140
    assert not any(PageWatch().add(ranges[1:2]))
    watch.close()


def test_neighbours_are_one_mapping(memory: Memory) -> None:
    """Ranges that touch or overlap are watched, however many, at the cost of one."""
    watch, before = PageWatch(), _num_mappings()
    starts = range(memory.start, memory.end - PAGE_NBYTES, PAGE_NBYTES)
    assert all(watch.add([(start, start + 2 * PAGE_NBYTES) for start in starts]))
    assert _num_mappings() <= before + 2
    watch.close()


def test_what_a_neighbour_cannot_have_is_no_loss(memory: Memory) -> None:
    """Where a part of memory is watched by somebody else, what lies beside it can be watched all the same."""
    other, watch = PageWatch(), PageWatch()
    middle = memory.start + 8 * PAGE_NBYTES, memory.start + 16 * PAGE_NBYTES
    assert other.add([middle]) == [True]
    parts = [(memory.start, middle[0]), middle, (middle[1], memory.end)]
    assert watch.add(parts) == [True, False, True]
    other.close()
    watch.close()


def _num_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_memory_that_is_mapped_anew_never_counts_as_unwritten(memory: Memory, watch: PageWatch) -> None:
    """Where other memory has come to lie, the question fails: nobody has watched that."""
    map_anew(memory.start + PAGE_NBYTES)
    with pytest.raises(OSError, match="not permitted"):
        watch.written(memory.start, memory.end)


def test_two_watches_on_one_memory(memory: Memory, watch: PageWatch) -> None:
    """Memory that somebody else watches is refused, and the first watch goes on."""
    other = PageWatch()
    assert other.add([(memory.start, memory.end)]) == [False]
    other.close()
    memory.page(9)[0] = 1
    assert pages(memory, watch.written(memory.start, memory.end)) == {9}


def test_the_end_of_a_watch_leaves_memory_as_it_was(memory: Memory, watch: PageWatch) -> None:
    """Once it is closed nothing is watched, memory can be written, and another watch may begin."""
    watch.close()
    watch.close()
    memory.map[:] = b"y" * len(memory.map)
    other = PageWatch()
    assert other.add([(memory.start, memory.end)]) == [True]
    other.close()


def test_no_handle_is_left_where_watching_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that lacks a part of it: an error, and nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("torchsnapshot.engine.page_watch._UFFDIO_API", 0)
    for _ in range(3):
        with pytest.raises(OSError, match="Invalid argument"):
            PageWatch()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("start", "end", "whole"),
    [
        (0, 1, (0, 1)),
        (1, 2, (0, 1)),
        (PAGE_NBYTES - 1, PAGE_NBYTES + 1, (0, 2)),
        (PAGE_NBYTES, 2 * PAGE_NBYTES, (1, 2)),
    ],
)
def test_pages_around_a_range(start: int, end: int, whole: tuple[int, int]) -> None:
    """The pages of a range are those that hold any byte of it."""
    assert pages_of(start, end) == tuple(number * PAGE_NBYTES for number in whole)
