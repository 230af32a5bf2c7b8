"""What is said of live memory without reading it: always what stands there, and only where that pays."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import random
import signal
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_watch import PRIVATE, map_anew, needs_page_watch

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.engine.page_watch import PageWatch, Range
from torchsnapshot.errors import SnapshotError
from torchsnapshot.state import live_digests as module
from torchsnapshot.state import unseen_writers
from torchsnapshot.state.live_digests import AUDIT_EVERY, MIN_NBYTES, LiveDigests, Look
from torchsnapshot.state.watched_chunks import Extent, Run

NBYTES = 2 * MIN_NBYTES
NUM_CHUNKS = 6


class Chunks:
    """Chunks of memory side by side, which begin and end in the middle of pages."""

    def __init__(self, num_chunks: int = NUM_CHUNKS) -> None:
        # nothing else lies in its pages
        self.memory = torch.frombuffer(mmap.mmap(-1, num_chunks * NBYTES + 4096, flags=PRIVATE), dtype=torch.uint8)
        self.start = self.memory.data_ptr() + 100
        self.extents: list[Extent] = [(self.start + number * NBYTES, NBYTES) for number in range(num_chunks)]

    def view(self, number: int) -> memoryview:
        """The memory of a chunk."""
        address, nbytes = self.extents[number]
        return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")

    def digest(self, number: int) -> bytes:
        """Of what stands there now."""
        return digest_of(self.view(number))

    def write(self, number: int, offset: int = NBYTES // 2) -> None:
        """Change a byte of a chunk."""
        self.memory[100 + number * NBYTES + offset] += 1


def read_all(digests: LiveDigests, chunks: Chunks) -> list[int]:
    """What a take does: look, believe what is known, hash the rest; the numbers of the chunks that had to be hashed."""
    look = digests.look()
    hashed = []
    for number, known in enumerate(look.digests(chunks.extents)):
        actual = chunks.digest(number)
        if known is None:
            hashed.append(number)
            assert look.hash(chunks.extents[number], chunks.view(number)) == actual
        else:
            assert known == actual
    return hashed


@pytest.fixture
def digests() -> Iterator[LiveDigests]:
    """Knows nothing yet."""
    digests = LiveDigests()
    yield digests
    digests.forget()


def look_until_known(digests: LiveDigests, chunks: Chunks) -> None:
    """Look so often that all that lies still is watched, and known."""
    for _ in range(4):
        read_all(digests, chunks)


@needs_page_watch
def test_what_lies_still_is_hashed_no_more(digests: LiveDigests) -> None:
    """A chunk that was found unchanged once is hashed once more, and then only to check on the kernel."""
    chunks = Chunks(64)
    everything = list(range(64))
    assert [read_all(digests, chunks) for _ in range(3)] == [everything] * 3
    hashed = [number for _ in range(AUDIT_EVERY) for number in read_all(digests, chunks)]
    assert sorted(hashed) == everything


@needs_page_watch
def test_a_written_chunk_is_not_known_and_its_neighbours_are(
    digests: LiveDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte makes its chunk unknown, but not a chunk that shares the byte's page; then it is known again."""
    monkeypatch.setattr(module, "AUDIT_EVERY", 1 << 60)
    chunks = Chunks()
    look_until_known(digests, chunks)
    chunks.write(2)
    look = digests.look()
    assert [number for number, known in enumerate(look.digests(chunks.extents)) if known is None] == [2]
    chunks.write(4, offset=NBYTES - 1)
    look = digests.look()
    assert [number for number, known in enumerate(look.digests(chunks.extents)) if known is None] == [2, 4]
    assert read_all(digests, chunks) == [2, 4]
    assert read_all(digests, chunks) == []


@needs_page_watch
def test_what_changes_each_time_is_never_watched(digests: LiveDigests) -> None:
    """A state that every step changes: the kernel is never asked, so no write costs more than it always did."""
    chunks = Chunks()
    for _ in range(10):
        assert read_all(digests, chunks) == list(range(NUM_CHUNKS))
        chunks.memory += 1
    assert digests._watch is None


@needs_page_watch
def test_what_changes_often_is_given_up(digests: LiveDigests) -> None:
    """A chunk that is written at every other look is soon watched no more, and less often from time to time."""
    chunks = Chunks(1)
    watched = []
    for step in range(100):
        read_all(digests, chunks)
        watched.append(bool(digests._runs))
        if step % 4 == 3:
            chunks.write(0)
    assert sum(watched[:50]) > sum(watched[50:])


@needs_page_watch
def test_what_changes_rarely_stays_watched(digests: LiveDigests) -> None:
    """A chunk that is written at one look in ten is known at most of the others."""
    chunks = Chunks(1)
    num_hashed = 0
    for step in range(100):
        num_hashed += len(read_all(digests, chunks))
        if step % 10 == 9:
            chunks.write(0)
    assert num_hashed < 100 // 10 + 100 // AUDIT_EVERY + 6


@needs_page_watch
def test_a_digest_of_before_a_write_is_not_taken_in(digests: LiveDigests) -> None:
    """What a slow reader notes after a later look has found its chunk written says nothing of what stands there now."""
    chunks = Chunks()
    look_until_known(digests, chunks)
    slow = digests.look()
    copy = memoryview(bytes(chunks.view(1)))
    chunks.write(1)
    assert digests.look().digest(chunks.extents[1]) is None
    slow.note(chunks.extents[1], digest_of(copy), copy)
    assert digests.look().digest(chunks.extents[1]) is None


@needs_page_watch
def test_a_digest_of_before_the_watch_began_is_not_taken_in(digests: LiveDigests) -> None:
    """A reader that began before its chunk was watched cannot vouch for it."""
    chunks = Chunks(1)
    read_all(digests, chunks)
    slow = digests.look()
    copy = memoryview(bytes(chunks.view(0)))
    slow.note(chunks.extents[0], digest_of(copy), copy)
    chunks.write(0)
    now = digests.look()
    assert digests._runs
    slow.note(chunks.extents[0], digest_of(copy), copy)
    assert now.digest(chunks.extents[0]) is None


@needs_page_watch
def test_memory_that_went_and_came_again(digests: LiveDigests) -> None:
    """Tensors that are freed and made anew, often at the same addresses: what is known is what stands there now."""
    for step in range(60):
        chunks = Chunks(8)
        chunks.memory.fill_(step % 2)
        read_all(digests, chunks)
        read_all(digests, chunks)
        if step % 3 == 0:
            del chunks
            gc.collect()
    assert len(digests._chunks) <= (module._FORGET_AFTER + 1) * 8


@needs_page_watch
def test_what_nobody_asks_about_is_forgotten(digests: LiveDigests) -> None:
    """Chunks that no look asks about any more are given up after a while."""
    chunks, others = Chunks(), Chunks(2)
    look_until_known(digests, chunks)
    for _ in range(2 * module._FORGET_AFTER):
        read_all(digests, others)
    assert {extent for run in digests._runs for extent in (chunk.extent for chunk in run.chunks)} == set(others.extents)


@needs_page_watch
def test_shared_memory_is_never_watched(digests: LiveDigests) -> None:
    """Other processes may write to it, so it is hashed each time."""
    chunks = Chunks()
    chunks.memory.share_memory_()
    chunks.start = chunks.memory.data_ptr()
    chunks.extents = [(chunks.start + number * NBYTES, NBYTES) for number in range(NUM_CHUNKS)]
    for _ in range(8):
        look = digests.look()
        assert look.digests(chunks.extents) == [None] * NUM_CHUNKS
        look.hash_all(chunks.extents, [chunks.view(number) for number in range(NUM_CHUNKS)])
    assert digests._runs == []


class _Blind(PageWatch):
    """A kernel that sees no write."""

    def written(self, start: int, end: int) -> list[Range]:
        """Nothing."""
        return []


@needs_page_watch
def test_a_write_that_the_kernel_did_not_see_is_an_error_and_the_end_of_watching(
    digests: LiveDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk is hashed from time to time all the same; where that differs, nothing is believed any more."""
    monkeypatch.setattr(module, "PageWatch", _Blind)
    chunks = Chunks(1)
    for _ in range(4):
        look = digests.look()
        look.hash(chunks.extents[0], chunks.view(0))
    chunks.write(0)
    looks = (digests.look() for _ in range(AUDIT_EVERY))
    audit = next(look for look in looks if look.digest(chunks.extents[0]) is None)
    with pytest.raises(SnapshotError, match=r"TORCHSNAPSHOT_WATCH_MEMORY=0"):
        audit.hash(chunks.extents[0], chunks.view(0))
    for _ in range(8):
        assert read_all(digests, chunks) == [0]


@needs_page_watch
def test_somebody_who_writes_meanwhile_is_no_lying_kernel(
    digests: LiveDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that is written between a look and its reading differs from what was known, and that is no error."""
    monkeypatch.setattr(module, "AUDIT_EVERY", 1 << 60)
    chunks = Chunks(2)
    look_until_known(digests, chunks)
    look = digests.look()
    copy = memoryview(bytes(chunks.view(1)))
    chunks.write(0)
    chunks.write(1)
    look.hash(chunks.extents[0], chunks.view(0))
    # what was read before that question, but is noted after it, is not believed
    look.note(chunks.extents[1], digest_of(copy), copy)
    assert digests.look().digests(chunks.extents) == [None, None]
    read_all(digests, chunks)
    assert read_all(digests, chunks) == []


@needs_page_watch
def test_what_is_read_twice_at_one_look_has_not_lain_still(digests: LiveDigests) -> None:
    """A chunk is watched when two looks have found the same bytes, not when one has read them twice."""
    chunks = Chunks(1)
    for _ in range(4):
        look = digests.look()
        for _ in range(3):
            look.hash(chunks.extents[0], chunks.view(0))
        chunks.write(0)
    assert digests._watch is None


@needs_page_watch
def test_memory_that_is_mapped_anew_beside_what_was_written(
    digests: LiveDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a question fails in the middle, what it would have told is not lost: all that it was about is unknown."""
    monkeypatch.setattr(module, "AUDIT_EVERY", 1 << 60)
    chunks = Chunks()
    look_until_known(digests, chunks)
    assert None not in digests.look().digests(chunks.extents)
    chunks.write(1)
    address = chunks.extents[4][0] + NBYTES // 2
    map_anew(address - address % mmap.PAGESIZE)
    assert digests.look().digests(chunks.extents) == [None] * NUM_CHUNKS
    for _ in range(5):
        read_all(digests, chunks)
    assert read_all(digests, chunks) == []


def test_a_system_that_cannot_watch(
    digests: LiveDigests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the kernel refuses, everything is hashed, a debug line says why, and it is not asked again."""
    calls = []

    def refuse() -> PageWatch:
        calls.append(1)
        raise PermissionError("not in this container")

    monkeypatch.setattr(module, "PageWatch", refuse)
    chunks = Chunks()
    with caplog.at_level(logging.DEBUG, logger="torchsnapshot"):
        for _ in range(8):
            assert read_all(digests, chunks) == list(range(NUM_CHUNKS))
    assert len(calls) == 1
    assert "not in this container" in caplog.text


@needs_page_watch
def test_small_chunks_are_not_looked_after(digests: LiveDigests) -> None:
    """Below a size it is quicker to hash."""
    memory = torch.zeros(MIN_NBYTES - 1, dtype=torch.uint8)
    for _ in range(6):
        look = digests.look()
        look.hash((memory.data_ptr(), memory.nbytes), memoryview(memory.numpy()))
    assert digests._chunks == {}


def _with_accelerator(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


def _with_unknown_accelerator(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(torch, "npu", SimpleNamespace(), raising=False)


def _with_network_card(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "mlx5_0").mkdir()
    monkeypatch.setattr(unseen_writers, "_INFINIBAND", folder)
    unseen_writers._has_rdma.cache_clear()


def _with_pinned_memory(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "status").write_text("VmLck:\t       0 kB\nVmPin:\t      64 kB\nVmHWM:\t    1948 kB\n")
    monkeypatch.setattr(unseen_writers, "_STATUS", folder / "status")


def _with_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(unseen_writers, "_STATUS", folder / "absent")


@needs_page_watch
@pytest.mark.parametrize(
    "arrange",
    [
        _with_accelerator,
        _with_unknown_accelerator,
        _with_network_card,
        _with_pinned_memory,
        _with_a_system_that_does_not_say,
    ],
)
def test_devices_that_might_write_unseen(
    digests: LiveDigests, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrange: object
) -> None:
    """With an accelerator in use, or a card that writes to memory, everything is hashed, unless one asks for it."""
    assert callable(arrange)
    try:
        arrange(monkeypatch, tmp_path)
        chunks = Chunks()
        for _ in range(6):
            assert read_all(digests, chunks) == list(range(NUM_CHUNKS))
        monkeypatch.setenv("TORCHSNAPSHOT_WATCH_MEMORY", "1")
        look_until_known(digests, chunks)
        assert len(read_all(digests, chunks)) < NUM_CHUNKS
    finally:
        monkeypatch.undo()
        unseen_writers._has_rdma.cache_clear()


@needs_page_watch
def test_memory_that_was_registered_with_the_kernel(digests: LiveDigests) -> None:
    """While an io_uring has buffers, which the kernel fills unseen, nothing is known; afterwards it begins anew."""
    chunks = Chunks()
    look_until_known(digests, chunks)
    libc, parameters = ctypes.CDLL(None, use_errno=True), bytearray(120)
    ring = libc.syscall(425, 1, (ctypes.c_char * 120).from_buffer(parameters))
    if ring < 0:
        pytest.skip("io_uring is not allowed here")
    buffer = mmap.mmap(-1, mmap.PAGESIZE, flags=PRIVATE)
    vector = struct.pack("QQ", ctypes.addressof(ctypes.c_char.from_buffer(buffer)), mmap.PAGESIZE)
    assert libc.syscall(427, ring, 0, vector, 1) == 0
    assert read_all(digests, chunks) == list(range(NUM_CHUNKS))
    assert digests._chunks == {}
    # no buffers any more
    assert libc.syscall(427, ring, 1, None, 0) == 0
    os.close(ring)
    look_until_known(digests, chunks)


@needs_page_watch
def test_a_signal_handler_that_comes_between(digests: LiveDigests, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that looks while its thread does finds nothing known, does not wait, and costs its thread nothing."""
    chunks = Chunks()
    look_until_known(digests, chunks)
    found: list[Look] = []
    ask = LiveDigests._ask

    def interrupted(self: LiveDigests, runs: Sequence[Run]) -> None:
        signal.raise_signal(signal.SIGUSR1)
        ask(self, runs)

    before = signal.signal(signal.SIGUSR1, lambda *_: found.append(digests.look()))
    try:
        monkeypatch.setattr(LiveDigests, "_ask", interrupted)
        assert len(read_all(digests, chunks)) < NUM_CHUNKS
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [look.digests(chunks.extents) for look in found] == [[None] * NUM_CHUNKS]


def test_watching_can_be_turned_off(digests: LiveDigests, monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCHSNAPSHOT_WATCH_MEMORY=0: everything is hashed each time; another value is refused by name."""
    monkeypatch.setenv("TORCHSNAPSHOT_WATCH_MEMORY", "0")
    chunks = Chunks()
    for _ in range(6):
        assert read_all(digests, chunks) == list(range(NUM_CHUNKS))
    monkeypatch.setenv("TORCHSNAPSHOT_WATCH_MEMORY", "maybe")
    with pytest.raises(ValueError, match="TORCHSNAPSHOT_WATCH_MEMORY='maybe'"):
        digests.look()


@needs_page_watch
def test_a_fork_begins_anew_and_its_parent_goes_on() -> None:
    """A child knows nothing, and can watch memory of its own; what it does changes nothing for its parent."""
    module.live_digests().forget()
    chunks = Chunks()
    look_until_known(module.live_digests(), chunks)
    child = os.fork()
    if not child:
        code = 1
        try:
            mine = module.live_digests()
            hashed = [len(read_all(mine, chunks)) for _ in range(5)]
            chunks.write(1)
            hashed.append(len(read_all(mine, chunks)))
            code = 0 if hashed[:3] == [NUM_CHUNKS] * 3 and hashed[4] < NUM_CHUNKS else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(read_all(module.live_digests(), chunks)) < NUM_CHUNKS
    chunks.write(3)
    assert 3 in read_all(module.live_digests(), chunks)
    module.live_digests().forget()


@needs_page_watch
def test_what_others_write_during_takes_is_seen_by_the_next_one(digests: LiveDigests) -> None:
    """A thread writes while looks are made and chunks are read: once it rests, nothing that is known is wrong."""
    chunks, chance = Chunks(8), random.Random(0)
    may_write, rests, stop = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            if not may_write.is_set():
                rests.set()
                may_write.wait(0.01)
                continue
            for _ in range(chance.randrange(4)):
                start = chance.randrange(chunks.memory.numel() // 4)
                chunks.memory[start : start + chance.choice((1, 100, 9000))] += 1

    thread = threading.Thread(target=write)
    thread.start()
    num_known = 0
    try:
        for step in range(150):
            if step % 3 == 0:
                may_write.set()
                for _ in range(chance.randrange(1, 5)):
                    look = digests.look()
                    numbers = [n for n, known in enumerate(look.digests(chunks.extents)) if known is None]
                    look.hash_all([chunks.extents[n] for n in numbers], [chunks.view(n) for n in numbers])
                rests.clear()
                may_write.clear()
                assert rests.wait(10)
                rests.clear()
                assert rests.wait(10)
            num_known += 8 - len(read_all(digests, chunks))
    finally:
        stop.set()
        thread.join()
    assert num_known > 200


class Watching(RuleBasedStateMachine):
    """Memory that is written, freed, and read by takes that overlap, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.digests = LiveDigests()
        self.chunks = Chunks()
        self.late: list[tuple[Look, Extent, memoryview]] = []

    @initialize(still=st.booleans())
    def begin(self, still: bool) -> None:
        """With memory that is watched already, or new."""
        if still:
            look_until_known(self.digests, self.chunks)

    @rule(number=st.integers(0, NUM_CHUNKS - 1), offset=st.integers(0, NBYTES - 1))
    def write(self, number: int, offset: int) -> None:
        """Anybody writes anywhere."""
        self.chunks.write(number, offset)

    @rule(number=st.integers(0, NUM_CHUNKS - 1))
    def write_all(self, number: int) -> None:
        """A whole chunk."""
        self.chunks.memory[100 + number * NBYTES : 100 + (number + 1) * NBYTES] += 1

    @rule()
    def look(self) -> None:
        """A take."""
        read_all(self.digests, self.chunks)

    @rule()
    def take_often(self) -> None:
        """Some takes without a write between them."""
        for _ in range(3):
            read_all(self.digests, self.chunks)

    @rule(number=st.integers(0, NUM_CHUNKS - 1))
    def read_now_note_later(self, number: int) -> None:
        """A take in the background: what it has copied is hashed at some time."""
        look = self.digests.look()
        self.late.append((look, self.chunks.extents[number], memoryview(bytes(self.chunks.view(number)))))

    @precondition(lambda self: self.late)
    @rule(index=st.integers(0, 100))
    def note(self, index: int) -> None:
        """It has come to it."""
        look, extent, copy = self.late.pop(index % len(self.late))
        look.note(extent, digest_of(copy), copy)

    @rule()
    def allocate_anew(self) -> None:
        """Other memory, maybe where the old one was."""
        content = self.chunks.memory.clone()
        self.late.clear()
        self.chunks = Chunks()
        self.chunks.memory.copy_(content)

    @invariant()
    def nothing_known_is_wrong(self) -> None:
        """A look never says anything but what stands there."""
        known = self.digests.look().digests(self.chunks.extents)
        for number, digest in enumerate(known):
            assert digest in (None, self.chunks.digest(number))

    def teardown(self) -> None:
        """Let go of the memory."""
        self.digests.forget()


TestWatching = needs_page_watch(Watching.TestCase)
TestWatching.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@needs_page_watch
def test_many_looks_at_random(digests: LiveDigests) -> None:
    """Over hundreds of looks, with writes of all sizes between them, nothing that is known is wrong."""
    chunks, chance = Chunks(16), random.Random(0)
    num_known = 0
    for _ in range(400):
        num_known += 16 - len(read_all(digests, chunks))
        if chance.random() < 0.3:
            start = chance.randrange(chunks.memory.numel())
            chunks.memory[start : start + chance.choice((1, 5000, NBYTES))] += 1
    assert num_known > 1000
