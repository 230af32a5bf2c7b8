"""Chunks in a store: what is put under which key, and that nothing comes back unless it is what it was."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsnapshot.chunks import coder
from torchsnapshot.chunks.codecs import Effort, encode_bytes
from torchsnapshot.chunks.encoded import read_header
from torchsnapshot.chunks.writer import ChunkReader, ChunkWriter, Encoding, Member, digest_of
from torchsnapshot.engine.buffers import BufferPool, is_page_memory
from torchsnapshot.errors import (
    CorruptionError,
    FormatError,
    MissingBlobError,
    NewerFormatError,
    StoreError,
    StoreUnavailableError,
)
from torchsnapshot.store.envelope import ChunkRef, Form
from torchsnapshot.store.keys import BlobKey, parse_blob_key

TAKE = "0123456789abcdef01234567"


class FakeStore:
    """Blobs in a dict; refuses a second put of a key and a misaligned promise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.blobs: dict[str, bytes] = {}
        self.num_reads = 0
        self.num_aligned = 0
        self.before_put: Callable[[], object] = lambda: None
        self.after_read: Callable[[str, memoryview], object] = lambda key, buffer: None

    def put_blob(self, key: str, data: memoryview, *, aligned: bool = False) -> None:
        """As the repository's."""
        self.before_put()
        with self._lock:
            assert key not in self.blobs
            assert is_page_memory(data) or not aligned
            self.num_aligned += aligned
            self.blobs[key] = bytes(data)

    def blob_nbytes(self, key: str) -> int | None:
        """As the repository's."""
        return len(self.blobs[key]) if key in self.blobs else None

    def read_blob_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """As the repository's."""
        with self._lock:
            self.num_reads += 1
        if key not in self.blobs:
            raise MissingBlobError(f"blob {key} was deleted by a sweep")
        data = self.blobs[key][start : start + buffer.nbytes]
        if len(data) < buffer.nbytes:
            raise StoreError(f"{key}: short read")
        assert is_page_memory(buffer) or not aligned
        buffer[:] = data
        self.after_read(key, buffer)
        return True


@pytest.fixture
def store() -> FakeStore:
    """An empty store."""
    return FakeStore()


@pytest.fixture
def pool() -> Iterator[BufferPool]:
    """A pool that has to have everything back in the end."""
    pool = BufferPool()
    yield pool
    assert pool.lent_nbytes == 0


def writer(store: FakeStore, pool: BufferPool | None = None, encoding: Encoding = "smallest") -> ChunkWriter:
    """A writer of rank 3."""
    return ChunkWriter(store, TAKE, 3, encoding, pool=pool)


def floats(num_elements: int = 20_000, seed: int = 0) -> memoryview:
    """fp32 weights."""
    values = 0.02 * torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))
    return memoryview(bytearray(values.view(torch.uint8).numpy().tobytes()))


def noise(nbytes: int = 50_000, seed: int = 0) -> memoryview:
    """Bytes that no codec makes smaller."""
    generator = torch.Generator().manual_seed(seed)
    return memoryview(bytearray(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).tolist()))


def read(store: FakeStore, ref: ChunkRef, path: str = "") -> bytes:
    """What a reader says that the chunk is."""
    out = memoryview(bytearray(ref.nbytes))
    ChunkReader(store).read_into(ref, out, path=path)
    return bytes(out)


def flip(store: FakeStore, key: str, place: int) -> None:
    """Change one byte of a blob."""
    data = bytearray(store.blobs[key])
    data[place] ^= 0xFF
    store.blobs[key] = bytes(data)


def test_digest_is_canonical_xxh3_128() -> None:
    """The digest is the big-endian form that other tools print."""
    assert (
        digest_of(memoryview(b"abc")).hex() == xxhash.xxh3_128_hexdigest(b"abc") == "06b05ab6733a618578af5f94892f3950"
    )


class TestPutChunk:
    def test_raw(self, store: FakeStore, pool: BufferPool) -> None:
        """A raw blob holds the chunk's bytes and nothing else, under a key that tells digest, take and rank."""
        raw = floats()
        ref = writer(store, pool, "raw").put_chunk(raw, digest_of(raw), 4)
        assert store.blobs == {ref.key: bytes(raw)}
        assert ref.key == f"{digest_of(raw).hex()}-{TAKE}-3"
        assert ref == ChunkRef(digest_of(raw), raw.nbytes, ref.key, raw.nbytes, 0, raw.nbytes, Form.RAW, 1)
        assert read(store, ref) == raw

    @pytest.mark.parametrize("encoding", ["auto", "smallest"])
    def test_encoded(self, store: FakeStore, pool: BufferPool, encoding: Encoding) -> None:
        """An encoded blob is smaller, says so in its reference and its key's suffix, and was put from page memory."""
        raw = floats()
        ref = writer(store, pool, encoding).put_chunk(raw, digest_of(raw), 4)
        assert parse_blob_key(ref.key) == BlobKey(digest_of(raw), TAKE, 3, ".z")
        assert (ref.form, ref.width, ref.offset, ref.nbytes) == (Form.ENCODED, 4, 0, raw.nbytes)
        assert ref.stored_nbytes == ref.blob_nbytes == len(store.blobs[ref.key]) < 0.9 * raw.nbytes
        assert store.num_aligned == 1
        assert read(store, ref) == raw

    def test_noise_stays_raw(self, store: FakeStore, pool: BufferPool) -> None:
        """What does not shrink is stored as it is."""
        raw = noise()
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), 4)
        assert ref.form is Form.RAW
        assert read(store, ref) == raw

    def test_pool_memory_is_put_aligned(self, store: FakeStore, pool: BufferPool) -> None:
        """A chunk that lies at the beginning of a pool's buffer may go to the disk directly."""
        buffer = pool.acquire(10_000)
        raw = buffer.memory(10_000)
        raw[:] = noise(10_000)
        writer(store, pool, "raw").put_chunk(raw, digest_of(raw), 1)
        assert store.num_aligned == 1
        buffer.release()

    @pytest.mark.parametrize(("width", "expected"), [(16, 8), (3, 1), (8, 1)])
    def test_any_width_is_taken(self, store: FakeStore, pool: BufferPool, width: int, expected: int) -> None:
        """Widths that the codec doesn't have become ones that it has, also where the size is no multiple of them."""
        raw = memoryview(bytearray(80_000 if width == 16 else 80_001))
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), width)
        assert ref.width == expected
        assert read(store, ref) == raw

    def test_same_content_is_put_once(self, store: FakeStore, pool: BufferPool) -> None:
        """The second time a content comes, its reference is that of the first."""
        chunk_writer, raw = writer(store, pool), floats()
        first = chunk_writer.put_chunk(raw, digest_of(raw), 4)
        assert chunk_writer.put_chunk(floats(), digest_of(raw), 4) is first
        assert chunk_writer.put_pack([(digest_of(raw), raw, 4)]) == [first]
        assert (chunk_writer.num_blobs, chunk_writer.stored_nbytes) == (1, first.stored_nbytes)

    def test_same_content_in_flight_is_waited_for(self, store: FakeStore, pool: BufferPool) -> None:
        """Workers that bring one content at the same time get one reference, and one put happens."""
        raw, chunk_writer = floats(), writer(store, pool)
        refs: list[ChunkRef] = []
        others = [
            threading.Thread(target=lambda: refs.append(chunk_writer.put_chunk(raw, digest_of(raw), 4)))
            for _ in range(3)
        ]

        def start_others() -> None:
            store.before_put = lambda: None
            for thread in others:
                thread.start()

        store.before_put = start_others
        refs.append(chunk_writer.put_chunk(raw, digest_of(raw), 4))
        for thread in others:
            thread.join()
        assert len(store.blobs) == 1
        assert refs == [refs[0]] * 4

    def test_failed_put_fails_all_who_wait(self, store: FakeStore, pool: BufferPool) -> None:
        """Nobody gets a reference to a blob that was not put; the memory comes back."""

        def fail() -> None:
            raise StoreUnavailableError("no answer")

        store.before_put = fail
        chunk_writer, raw = writer(store, pool), floats()
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                chunk_writer.put_chunk(raw, digest_of(raw), 4)
            with pytest.raises(StoreUnavailableError):
                chunk_writer.put_pack([(digest_of(raw), raw, 4)])
        assert chunk_writer.num_blobs == 0

    def test_impossible_sizes_are_refused(self, store: FakeStore, pool: BufferPool) -> None:
        """An empty chunk, or one beyond the size of a blob, is a ``ValueError``."""
        for raw in (memoryview(b""), memoryview(bytes(64 << 20) + b"x")):
            with pytest.raises(ValueError, match="a chunk of"):
                writer(store, pool).put_chunk(raw, bytes(16), 4)

    def test_broken_codec_costs_nothing_but_bytes(
        self, store: FakeStore, pool: BufferPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An encoded chunk that does not decode to what it was is never put: it and the rest go raw, loudly."""
        real_encode = coder.encode

        def encode_wrongly(raw: memoryview, scheme: object, out: memoryview, scratch: object) -> int | None:
            size = real_encode(raw, scheme, out, scratch)  # type: ignore[arg-type]
            assert size is not None
            out[size - 1] ^= 1
            return size

        monkeypatch.setattr(coder, "encode", encode_wrongly)
        chunk_writer = writer(store, pool)
        with caplog.at_level(logging.ERROR):
            refs = [chunk_writer.put_chunk(raw, digest_of(raw), 4) for raw in (floats(seed=1), floats(seed=2))]
        assert [ref.form for ref in refs] == [Form.RAW, Form.RAW]
        assert len(caplog.records) == 1
        assert read(store, refs[1]) == floats(seed=2)

    def test_first_and_every_64th_of_a_kind_is_checked(
        self, store: FakeStore, pool: BufferPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check is made for the first encoded chunk of each width and then for one in 64."""
        checked: list[int] = []
        real_decode = coder.decode_into

        def decode(stored: memoryview, out: memoryview, base: memoryview | None) -> None:
            checked.append(len(store.blobs))
            real_decode(stored, out, base)

        monkeypatch.setattr(coder, "decode_into", decode)
        chunk_writer = writer(store, pool)
        for number in range(70):
            raw = memoryview(bytearray(number.to_bytes(8, "little") * 500))
            assert chunk_writer.put_chunk(raw, digest_of(raw), 8 if number else 4).form is Form.ENCODED
        assert checked == [0, 1, 65]

    def test_levelled_chunks_are_a_kind_of_their_own(
        self, store: FakeStore, pool: BufferPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first chunk with levels is checked, though one of the same width without them came back before."""
        checked: list[int] = []
        real_decode = coder.decode_into

        def decode(stored: memoryview, out: memoryview, base: memoryview | None) -> None:
            checked.append(read_header(stored).row_length)
            real_decode(stored, out, base)

        monkeypatch.setattr(coder, "decode_into", decode)
        chunk_writer = writer(store, pool)
        refs = []
        for seed in range(4):
            raw = floats(seed=seed)
            torch.frombuffer(raw, dtype=torch.float32).view(100, 200).mul_(torch.linspace(-10, 10, 200).exp())
            refs.append(chunk_writer.put_chunk(raw, digest_of(raw), 4, row_length=200 if seed % 2 else 0))
            assert read(store, refs[-1]) == raw
        assert checked == [0, 200]
        assert refs[1].stored_nbytes < refs[0].stored_nbytes


class TestAuto:
    def test_fast_store_gets_raw_chunks(self, store: FakeStore, pool: BufferPool) -> None:
        """Where the store takes no time, "auto" stops encoding floats, but zeros collapse all the same."""
        time = iter(range(1_000_000))
        # by this clock encoding and putting take the same time, whatever the size: encoding never pays
        chunk_writer = ChunkWriter(store, TAKE, 0, "auto", pool=pool, clock=lambda: float(next(time)))
        forms = []
        for seed in range(30):
            raw = floats(seed=seed)
            forms.append(chunk_writer.put_chunk(raw, digest_of(raw), 4).form)
        assert forms[0] is Form.ENCODED
        assert forms[-15:].count(Form.RAW) >= 14
        zeros = memoryview(bytearray(80_000))
        assert chunk_writer.put_chunk(zeros, digest_of(zeros), 4).stored_nbytes < 500

    def test_small_chunks_are_not_looked_at(self, store: FakeStore, pool: BufferPool) -> None:
        """Some kilobytes are not worth a sample, unless every byte counts."""
        raw = memoryview(bytearray(8000))
        assert writer(store, pool, "auto").put_chunk(raw, digest_of(raw), 4).form is Form.RAW
        assert writer(FakeStore(), pool, "smallest").put_chunk(raw, digest_of(raw), 4).form is Form.ENCODED


def members_of(*raws: memoryview, width: int = 4) -> list[Member]:
    """Members of a pack."""
    return [(digest_of(raw), raw, width) for raw in raws]


class TestPacks:
    @given(
        sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=12),
        encoding=st.sampled_from(["raw", "auto", "smallest"]),
    )
    @settings(max_examples=40, deadline=None)
    def test_every_member_comes_back(self, sizes: list[int], encoding: Encoding) -> None:
        """Members of any size, some equal, come back from where their references say; the key is the pack's digest."""
        store = FakeStore()
        raws = [memoryview(bytearray(size)) if size % 2 else noise(size) for size in sizes]
        refs = writer(store, encoding=encoding).put_pack(members_of(*raws))
        assert [(ref.digest, ref.nbytes) for ref in refs] == [(digest_of(raw), raw.nbytes) for raw in raws]
        assert [read(store, ref) for ref in refs] == raws
        (key,) = store.blobs
        assert parse_blob_key(key) == BlobKey(digest_of(memoryview(store.blobs[key])), TAKE, 3, ".p")
        assert all(ref.key == key and ref.blob_nbytes == len(store.blobs[key]) for ref in refs)
        places = sorted({(ref.offset, ref.stored_nbytes) for ref in refs})
        assert len(places) == len(set(map(bytes, raws)))
        assert all(start + size <= next_start for (start, size), (next_start, _) in itertools.pairwise(places))
        assert places[-1][0] + places[-1][1] == len(store.blobs[key])

    def test_members_already_stored_are_left_out(self, store: FakeStore, pool: BufferPool) -> None:
        """A pack of known members is no blob at all; one of some holds the others."""
        chunk_writer = writer(store, pool, "raw")
        first = chunk_writer.put_pack(members_of(noise(100), noise(200)))
        assert chunk_writer.put_pack(members_of(noise(200), noise(100))) == first[::-1]
        again = chunk_writer.put_pack(members_of(noise(300), noise(100)))
        assert again[1] == first[0]
        assert [len(blob) for blob in store.blobs.values()] == [304, 300]
        assert (chunk_writer.num_blobs, chunk_writer.stored_nbytes) == (2, 604)

    def test_packs_that_share_members_do_not_wait_for_each_other_for_ever(
        self, store: FakeStore, pool: BufferPool
    ) -> None:
        """Two workers whose packs overlap, in opposite order, both end."""
        chunk_writer = writer(store, pool, "raw")
        meet = threading.Barrier(2)
        results: list[list[ChunkRef]] = []

        def work(raws: list[memoryview]) -> None:
            meet.wait()
            results.append(chunk_writer.put_pack(members_of(*raws)))

        for seed in range(20):
            a, b, c = noise(100, seed), noise(200, seed), noise(300, seed)
            threads = [threading.Thread(target=work, args=(raws,)) for raws in ([a, b], [b, a, c])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(results) == 40
        stored = sum(len(blob) for blob in store.blobs.values())
        assert 20 * 600 <= stored <= 20 * 624

    def test_too_large_packs_are_refused(self, store: FakeStore, pool: BufferPool) -> None:
        """More than a blob may hold, or an empty member, is a ``ValueError``."""
        half = memoryview(bytes(32 << 20))
        with pytest.raises(ValueError, match="too much for a pack"):
            writer(store, pool).put_pack([(bytes(16), half, 1), (bytes(15) + b"1", half, 1)])
        with pytest.raises(ValueError, match="empty chunk"):
            writer(store, pool).put_pack([(bytes(16), memoryview(b""), 1)])

    def test_members_are_decoded_from_one_read(self, store: FakeStore, pool: BufferPool) -> None:
        """A range of the pack, read once, gives each member; a damaged one is read again before it is an error."""
        raws = [noise(3000), memoryview(bytearray(5000)), floats(2000)]
        refs = writer(store, pool).put_pack(members_of(*raws))
        reader = ChunkReader(store, pool=pool)
        buffer = pool.acquire(refs[0].blob_nbytes)
        stored = buffer.memory(refs[0].blob_nbytes)
        reader.read_range(refs[0], 0, stored)
        assert store.num_reads == 1
        for ref, raw in zip(refs, raws, strict=True):
            out = memoryview(bytearray(ref.nbytes))
            assert reader.decode(ref, stored[ref.offset : ref.offset + ref.stored_nbytes], out) == raw
        assert store.num_reads == 1
        stored[refs[2].offset + 100] ^= 1
        out = memoryview(bytearray(refs[2].nbytes))
        assert reader.decode(refs[2], stored[refs[2].offset : refs[2].offset + refs[2].stored_nbytes], out) == raws[2]
        assert store.num_reads == 2
        buffer.release()

    def test_short_and_missing_packs_are_told_apart(self, store: FakeStore, pool: BufferPool) -> None:
        """A range beyond a pack's end is corruption; a pack that is not there is missing."""
        (ref,) = writer(store, pool).put_pack(members_of(noise(3000)))
        reader, out = ChunkReader(store, pool=pool), memoryview(bytearray(3000))
        store.blobs[ref.key] = store.blobs[ref.key][:-1]
        with pytest.raises(CorruptionError, match="ends after 2999 bytes"):
            reader.read_range(ref, 0, out)
        del store.blobs[ref.key]
        with pytest.raises(MissingBlobError, match="sweep"):
            reader.read_range(ref, 0, out)


class TestDamage:
    @pytest.mark.parametrize("encoding", ["raw", "smallest"])
    @pytest.mark.parametrize("place", [0, 5, 30, 1000, -1])
    def test_flipped_byte_is_an_error_that_names_everything(
        self, store: FakeStore, pool: BufferPool, encoding: Encoding, place: int
    ) -> None:
        """A changed byte anywhere is found; the message has the place in the state, the blob and what to do."""
        raw = floats()
        ref = writer(store, pool, encoding).put_chunk(raw, digest_of(raw), 4)
        flip(store, ref.key, place)
        with pytest.raises((CorruptionError, NewerFormatError)) as caught:
            read(store, ref, path="0/model/weight")
        assert store.num_reads == 2
        for word in ("0/model/weight", ref.key, "at byte 0", "torchsnapshot verify"):
            assert word in str(caught.value)

    @pytest.mark.parametrize("encoding", ["raw", "smallest"])
    def test_bit_that_flipped_on_the_way_is_read_again(
        self, store: FakeStore, pool: BufferPool, encoding: Encoding
    ) -> None:
        """Damage that a second reading does not show is nobody's concern."""
        raw = floats()
        ref = writer(store, pool, encoding).put_chunk(raw, digest_of(raw), 4)

        def flip_once(key: str, buffer: memoryview) -> None:
            buffer[2000] ^= 1
            store.after_read = lambda key, buffer: None

        store.after_read = flip_once
        assert read(store, ref) == raw
        assert store.num_reads == 2

    def test_short_blob_is_corruption(self, store: FakeStore, pool: BufferPool) -> None:
        """A blob that ends too soon is damaged, not unreachable."""
        raw = floats()
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), 4)
        store.blobs[ref.key] = store.blobs[ref.key][:-10]
        with pytest.raises(CorruptionError, match="ends after"):
            read(store, ref)

    def test_missing_blob_is_told_by_the_store(self, store: FakeStore, pool: BufferPool) -> None:
        """What the store says about a blob that is gone goes on to the caller at once."""
        raw = floats()
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), 4)
        del store.blobs[ref.key]
        with pytest.raises(MissingBlobError, match="sweep"):
            read(store, ref)
        assert store.num_reads == 1

    def test_absent_key_is_a_missing_blob(self, store: FakeStore, pool: BufferPool) -> None:
        """A store that only says "no such key" is understood too."""
        raw = floats()
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), 4)

        def vanish(key: str, buffer: memoryview) -> None:
            store.blobs.pop(key)
            raise StoreError("no such key")

        store.after_read = vanish
        with pytest.raises(MissingBlobError, match="not in the store"):
            read(store, ref)

    def test_unreachable_store_stays_a_store_error(self, store: FakeStore, pool: BufferPool) -> None:
        """A store that does not answer has not damaged anything."""
        raw = floats()
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), 4)

        def refuse(key: str, buffer: memoryview) -> None:
            raise StoreUnavailableError("no answer")

        store.after_read = refuse
        with pytest.raises(StoreUnavailableError):
            read(store, ref)

    def test_wrong_references_are_refused_unread(self, store: FakeStore, pool: BufferPool) -> None:
        """Sizes that cannot be, forms that do not fit, and too many bases: no byte is read."""
        raw = floats()
        ref = writer(store, pool).put_chunk(raw, digest_of(raw), 4)
        endless = ref
        for _ in range(9):
            endless = ref._replace(form=Form.DELTA, base=endless)
        for wrong in (
            ref._replace(stored_nbytes=ref.nbytes + 1),
            ref._replace(stored_nbytes=0),
            ref._replace(form=Form.RAW),
            ref._replace(form=Form.DELTA),
            ref._replace(base=ref),
            endless,
        ):
            with pytest.raises(FormatError):
                read(store, wrong)
        with pytest.raises(ValueError, match="cannot be read into"):
            ChunkReader(store).read_into(ref, memoryview(bytearray(8)))
        assert store.num_reads == 0


class TestDeltas:
    def delta(self, store: FakeStore, raw: memoryview, base_raw: memoryview, base: ChunkRef) -> ChunkRef:
        """Store ``raw`` as an XOR delta by hand: writing deltas is a policy of its own."""
        stored = encode_bytes(raw, 4, Effort.SMALLEST, base_raw)
        assert stored is not None
        key = str(BlobKey(digest_of(raw), TAKE, 3, ".d"))
        store.blobs[key] = stored
        return ChunkRef(digest_of(raw), raw.nbytes, key, len(stored), 0, len(stored), Form.DELTA, 4, base)

    def chain(self, store: FakeStore, depth: int) -> tuple[list[memoryview], ChunkRef]:
        """A chunk that stands alone and ``depth`` deltas on top of one another."""
        raws = [floats()]
        ref = writer(store).put_chunk(raws[0], digest_of(raws[0]), 4)
        for step in range(depth):
            raws.append(memoryview(bytearray(raws[-1])))
            raws[-1][4 * step] ^= 0x5A
            ref = self.delta(store, raws[-1], raws[-2], ref)
        return raws, ref

    @pytest.mark.parametrize("depth", [1, 2, 8])
    def test_chunk_comes_back_by_way_of_its_bases(self, store: FakeStore, depth: int) -> None:
        """Deltas up to the format's depth are decoded, reading each blob once."""
        raws, ref = self.chain(store, depth)
        assert read(store, ref) == raws[-1]
        assert store.num_reads == depth + 1

    def test_stored_bytes_of_a_delta_can_be_handed_in(self, store: FakeStore) -> None:
        """``decode_into`` finds the base of a delta by itself."""
        raws, ref = self.chain(store, 1)
        out = memoryview(bytearray(ref.nbytes))
        ChunkReader(store).decode(ref, memoryview(bytearray(store.blobs[ref.key])), out)
        assert out == raws[-1]

    def test_damaged_base_is_named(self, store: FakeStore) -> None:
        """The error names the blob that is damaged, not the one that was asked for."""
        _, ref = self.chain(store, 2)
        assert ref.base is not None
        assert ref.base.base is not None
        flip(store, ref.base.base.key, 100)
        with pytest.raises(CorruptionError, match=ref.base.base.key):
            read(store, ref)
