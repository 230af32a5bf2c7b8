"""The units of work of a restore: what is looked at, what is read without waiting, and what is waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from torchsnapshot.chunks.reader import ChunkReader, digest_of
from torchsnapshot.engine.buffers import Buffer, BufferPool
from torchsnapshot.engine.job import Job
from torchsnapshot.errors import CorruptionError
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.reading.read_jobs import Counters, Looking, Share, Sink, Wanted, read_jobs
from torchsnapshot.state.live_digests import Look
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef

NBYTES = 4096
POOL = BufferPool()


class Bytes:
    """Memory of a target."""

    def __init__(self, content: bytes) -> None:
        self.data = bytearray(content)

    def extent(self, offset: int, nbytes: int) -> None:
        """It is not to be found again."""

    def live(self, offset: int, nbytes: int) -> memoryview:
        """The bytes where they lie."""
        return memoryview(self.data)[offset : offset + nbytes]

    def scatter(self, box: Box, data: memoryview) -> None:
        """Write a region."""
        self.data[box.offsets[0] : box.offsets[0] + box.sizes[0]] = data

    def scatter_part(self, chunk: Box, data: memoryview, part: Box) -> None:
        """No test needs it."""
        raise AssertionError


class Store:
    """A store that has some blobs at hand and must be waited for to get the others."""

    def __init__(self, blobs: dict[str, bytes], at_hand: set[str]) -> None:
        self.blobs = blobs
        self.at_hand = at_hand
        self.waits: list[str] = []

    def put_blob(self, key: str, data: memoryview, *, aligned: bool = False) -> None:
        """No test needs it."""
        raise AssertionError

    def blob_nbytes(self, key: str) -> int | None:
        """As the repository's."""
        return len(self.blobs[key])

    def read_blob_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """As the repository's."""
        if key not in self.at_hand and at_hand:
            return False
        if key not in self.at_hand:
            self.waits.append(key)
        buffer[:] = self.blobs[key][start : start + buffer.nbytes]
        return True


def content(number: int) -> bytes:
    """The bytes of one chunk."""
    return (number + 1).to_bytes(4, "little") * (NBYTES // 4)


def ref_to(number: int, *, pack: str = "") -> ChunkRef:
    """A chunk in a blob of its own, or the one in its place in a pack of four."""
    digest = digest_of(memoryview(content(number)))
    if pack:
        return ChunkRef(digest, NBYTES, pack, 4 * NBYTES, number % 4 * NBYTES, NBYTES)
    return ChunkRef(digest, NBYTES, f"blob-{number}", NBYTES, 0, NBYTES)


def wanted_by(memory: Bytes, *, looks: bool = True) -> Wanted:
    """One target of the size of a chunk."""
    return [(Sink("path", memory, looks=looks), Share.whole(Piece(Box((0,), (NBYTES,)), 0, NBYTES)))]


def all_jobs(jobs: Sequence[Job]) -> Iterator[tuple[Job, Buffer | None, bool]]:
    """Stage these jobs and all that they bring: those that read, each with its buffer and whether it is to finish."""
    for job in jobs:
        buffer = POOL.acquire(job.nbytes) if job.nbytes else None
        outcome = job.stage(buffer)
        if isinstance(outcome, bool):
            yield job, buffer, outcome
        else:
            yield from all_jobs(outcome)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_at_hand_is_not_waited_for(packed: bool, looks: bool) -> None:
    """Staging brings what the store has at hand, and only the rest is left to finish; whether targets are looked at or
    not.
    """
    targets = [Bytes(bytes(NBYTES)) for _ in range(8)]
    if packed:
        refs = [ref_to(number, pack="near" if number < 4 else "far") for number in range(8)]
        blobs = {"near": b"".join(map(content, range(4))), "far": b"".join(map(content, range(4, 8)))}
        near = {"near"}
    else:
        refs = [ref_to(number) for number in range(8)]
        blobs = {f"blob-{number}": content(number) for number in range(8)}
        near = {f"blob-{number}" for number in range(4)}
    store, stats = Store(blobs, near), Stats()
    wanted = [(ref, wanted_by(target, looks=looks)) for ref, target in zip(refs, targets, strict=True)]
    jobs = read_jobs(wanted, ChunkReader(store, pool=POOL), Counters(stats))
    left = [(job, buffer) for job, buffer, is_left in all_jobs(jobs) if is_left]
    assert [bytes(target.data) for target in targets[:4]] == [content(number) for number in range(4)]
    assert [bytes(target.data) for target in targets[4:]] == [bytes(NBYTES)] * 4
    assert store.waits == []
    for job, buffer in left:
        job.finish(buffer)
    assert [bytes(target.data) for target in targets] == [content(number) for number in range(8)]
    assert set(store.waits) == blobs.keys() - near
    assert (stats.num_new_chunks, stats.new_nbytes, stats.reused_nbytes) == (8, 8 * NBYTES, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_what_targets_hold_is_not_read(packed: bool) -> None:
    """A look brings jobs for what is missing only; of a pack, members that are held between others cost no request."""
    targets = [Bytes(content(number) if number % 4 in (1, 2) else bytes(NBYTES)) for number in range(4)]
    refs = [ref_to(number, pack="pack" if packed else "") for number in range(4)]
    blobs = {"pack": b"".join(map(content, range(4)))} if packed else {f"blob-{i}": content(i) for i in range(4)}
    store, stats = Store(blobs, set()), Stats()
    wanted = [(ref, wanted_by(target)) for ref, target in zip(refs, targets, strict=True)]
    jobs = read_jobs(wanted, ChunkReader(store, pool=POOL), Counters(stats))
    assert [job.nbytes for job in jobs] == [0]
    left = [(job, buffer) for job, buffer, is_left in all_jobs(jobs) if is_left]
    for job, buffer in left:
        job.finish(buffer)
    assert [bytes(target.data) for target in targets] == [content(number) for number in range(4)]
    assert store.waits == (["pack"] if packed else ["blob-0", "blob-3"])
    assert (stats.num_new_chunks, stats.new_nbytes, stats.reused_nbytes) == (2, 2 * NBYTES, 2 * NBYTES)


def test_looks_are_cut_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are looked at in their order, by so many bytes at once, so that several threads share a large state."""
    monkeypatch.setattr("torchsnapshot.reading.read_jobs.LOOK_NBYTES", 3 * NBYTES)
    wanted = [(ref_to(number), wanted_by(Bytes(bytes(NBYTES)))) for number in range(8)]
    store = Store({f"blob-{number}": content(number) for number in range(8)}, set())
    jobs = read_jobs(wanted, ChunkReader(store, pool=POOL), Counters(Stats()))
    found = [job.stage(None) for job in jobs]
    assert [len(each) for each in found if not isinstance(each, bool)] == [3, 3, 2]


def test_damage_at_hand_never_reaches_the_target() -> None:
    """What is read without waiting is proved too: damaged bytes are read again, and then they are an error."""
    target, store = Bytes(bytes(NBYTES)), Store({"blob-1": content(2)}, {"blob-1"})
    jobs = read_jobs([(ref_to(1), wanted_by(target))], ChunkReader(store, pool=POOL), Counters(Stats()))
    ((job, buffer, is_left),) = all_jobs(jobs)
    assert is_left
    with pytest.raises(CorruptionError, match="path: "):
        job.finish(buffer)
    assert bytes(target.data) == bytes(NBYTES)


class TestLooking:
    def looks(self, looking: Looking, held: bool) -> bool:
        """Offer one chunk to a target of its own; whether that was looked at."""
        asked: list[Any] = []
        memory = Bytes(content(1 if held else 2))
        sink, share = wanted_by(memory)[0]
        live = memory.live
        memory.live = lambda offset, nbytes: asked.append(1) or live(offset, nbytes)  # type: ignore[method-assign]
        still = looking.still_wanted(ref_to(1), [(sink, share)])
        assert still == ([] if asked and held else [(sink, share)])
        return bool(asked)

    def test_it_stops_where_nothing_is_found(self) -> None:
        """After so many looks in vain only one chunk in so many is looked at; what is found brings it back."""
        looking = Looking(Look())
        assert all(self.looks(looking, held=False) for _ in range(Looking.PATIENCE))
        assert sum(self.looks(looking, held=False) for _ in range(80)) == 80 // Looking.EVERY
        while not self.looks(looking, held=True):
            pass
        assert all(self.looks(looking, held=True) for _ in range(100))
        assert all(self.looks(looking, held=False) for _ in range(Looking.PATIENCE))
        assert not self.looks(looking, held=False)

    def test_a_tensor_that_held_something_is_looked_at(self) -> None:
        """However many looks were in vain elsewhere."""
        looking = Looking(Look())
        memory = Bytes(content(1) + content(2))
        sink = Sink("path", memory, looks=True)
        first = Share.whole(Piece(Box((0,), (NBYTES,)), 0, NBYTES))
        second = Share.whole(Piece(Box((NBYTES,), (NBYTES,)), NBYTES, NBYTES))
        assert looking.still_wanted(ref_to(1), [(sink, first)]) == []
        for _ in range(2 * Looking.PATIENCE):
            self.looks(looking, held=False)
        assert looking.still_wanted(ref_to(2), [(sink, second)]) == []

    def test_new_memory_is_never_looked_at(self) -> None:
        """A target that was allocated for this restore holds nothing, and says nothing about the others."""
        looking = Looking(Look())
        for _ in range(2 * Looking.PATIENCE):
            wanted = wanted_by(Bytes(content(1)), looks=False)
            assert looking.still_wanted(ref_to(1), wanted) == wanted
        assert self.looks(looking, held=True)
