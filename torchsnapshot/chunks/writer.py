"""Where a chunk becomes stored bytes: blobs of one chunk, packs, the keys of blobs, and where a base comes from.

What doesn't live here: the way back (``reader``, whose names stand here too), which chunks are new (``taking.take``),
where blobs lie (the repository), how a chunk is coded (``coder``), what is known of bases (``bases``).

Invariants:

- A blob's key carries the digest that the caller computed over the very buffer that is handed in; a pack's key the
  digest of the pack's stored bytes. A key is put at most once: within one writer the same content is stored once, and
  whoever brings it again, or at the same time, gets the first one's reference.
- A base that cannot be had (its blob is gone or damaged) costs bytes, never the take: the chunk is stored alone.
- Memory: beside the caller's buffer, storing takes one pooled buffer of the chunk's or the pack's size until the put is
  done, unless a chunk is stored raw; a base that has to be read takes two more while it is read, one while it is used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from time import perf_counter

from torchsnapshot.chunks.bases import GAINLESS, Bases, base_of
from torchsnapshot.chunks.codecs import WORTHWHILE
from torchsnapshot.chunks.coder import Against, ChunkCoder, codec_width
from torchsnapshot.chunks.coder import Encoding as Encoding
from torchsnapshot.chunks.reader import MAX_BLOB_NBYTES, BlobStore, digest_of
from torchsnapshot.chunks.reader import ChunkReader as ChunkReader
from torchsnapshot.engine.buffers import BufferPool, is_page_memory, shared_pool
from torchsnapshot.engine.meter import EncodingMeter
from torchsnapshot.engine.shared_cores import SharedCores
from torchsnapshot.errors import SnapshotError
from torchsnapshot.store.envelope import ChunkRef, Form
from torchsnapshot.store.keys import BlobKey

logger = logging.getLogger(__name__)

_MEMBER_ALIGNMENT = 8

Member = tuple[bytes, memoryview, int]
"""A chunk on its way into a pack: digest, raw bytes, element width."""

Content = tuple[bytes, int]


class ChunkWriter:
    """Stores the new chunks of one take of one rank. Any thread may call it.

    Args:
        store: where blobs go.
        take_id: the take's id, part of every key.
        rank: the writing rank, part of every key.
        encoding: see ``Encoding``.
        pool: where buffers come from; the process's own by default.
        meter: decides for "auto"; by default its own.
        bases: what is known of bases; without it no deltas are written.
        reads_bases: whether reading a base from the store is cheap enough for "auto".
        clock: seconds, for the meter.
        num_cores: among how many cores the threads of a take share their work, for the meter. None: what they take from
            each other counts as what the application takes from them.
    """

    def __init__(
        self,
        store: BlobStore,
        take_id: str,
        rank: int,
        encoding: Encoding,
        *,
        pool: BufferPool | None = None,
        meter: EncodingMeter | None = None,
        bases: Bases | None = None,
        reads_bases: bool = True,
        clock: Callable[[], float] = perf_counter,
        num_cores: int | None = None,
    ) -> None:
        self._store = store
        self._take_id = take_id
        self._rank = rank
        self._encoding = encoding
        self._pool = pool or shared_pool()
        self._meter = meter or EncodingMeter()
        self._clock = clock
        self._cores = SharedCores(num_cores, clock)
        self._coder = ChunkCoder(encoding, self._pool, self._meter, self._cores)
        self._bases = bases if encoding != "raw" else None
        self._reads_bases = reads_bases
        self._reader = ChunkReader(store, pool=self._pool)
        self._settled = threading.Condition(threading.Lock())
        # None: on its way; an error: it failed, and so will the take
        self._contents: dict[Content, ChunkRef | BaseException | None] = {}
        self._num_blobs = 0
        self._stored_nbytes = 0

    @property
    def num_blobs(self) -> int:
        """Blobs put so far."""
        return self._num_blobs

    @property
    def stored_nbytes(self) -> int:
        """Bytes of these blobs."""
        return self._stored_nbytes

    @property
    def wants_bases(self) -> bool:
        """Whether ``put_chunk`` has a use for ``previous``."""
        return self._bases is not None

    @property
    def refs(self) -> list[ChunkRef]:
        """The chunks stored so far, each content once."""
        with self._settled:
            return [outcome for outcome in self._contents.values() if isinstance(outcome, ChunkRef)]

    def put_chunk(
        self,
        raw: memoryview,
        digest: bytes,
        width: int,
        *,
        path: str = "",
        previous: ChunkRef | None = None,
        row_length: int = 0,
    ) -> ChunkRef:
        """Store one chunk as a blob of its own.

        Args:
            raw: the chunk, at most ``MAX_BLOB_NBYTES``; it must not change until the call returns.
            digest: ``digest_of(raw)``.
            width: element size in bytes.
            path: place in the state; what is learned about deltas is learned for it.
            previous: what stood at this place last time, if this take may reuse it: a delta's base comes from it.
            row_length: how many elements probably make a row of the tensor, for the codec; 0 where there are none.

        Raises:
            StoreError: the store refused it.
        """
        if not 0 < raw.nbytes <= MAX_BLOB_NBYTES:
            raise ValueError(f"a chunk of {raw.nbytes} bytes; allowed are 1 to {MAX_BLOB_NBYTES}")
        content = (digest, raw.nbytes)
        if self._claim([content]):
            try:
                self._settle(content, self._put_one(raw, digest, width, path, base_of(previous), row_length))
            except BaseException as error:
                self._settle(content, error)
                raise
        return self._await(content)

    def put_pack(self, members: Sequence[Member]) -> list[ChunkRef]:
        """Store small chunks together in one blob of at most ``MAX_BLOB_NBYTES``.

        Args:
            members: see ``Member``; their bytes must not change until the call returns.

        Returns:
            Their references, in order. A member whose content this writer has already stored is not stored again.

        Raises:
            StoreError: the store refused it.
        """
        if any(not raw.nbytes for _, raw, _ in members):
            raise ValueError("a pack cannot hold an empty chunk")
        if sum(raw.nbytes + _MEMBER_ALIGNMENT for _, raw, _ in members) > MAX_BLOB_NBYTES:
            raise ValueError(f"{len(members)} chunks are too much for a pack of {MAX_BLOB_NBYTES} bytes")
        by_content = {(digest, raw.nbytes): (digest, raw, width) for digest, raw, width in members}
        mine = self._claim(list(by_content))
        if mine:
            try:
                refs = self._put_together([by_content[content] for content in mine])
            except BaseException as error:
                for content in mine:
                    self._settle(content, error)
                raise
            for content, ref in zip(mine, refs, strict=True):
                self._settle(content, ref)
        # what others store is waited for only now that nobody can be waiting for what is ours
        return [self._await((digest, raw.nbytes)) for digest, raw, _ in members]

    def _claim(self, contents: list[Content]) -> list[Content]:
        """Those of ``contents`` that nobody has claimed; from now on they are the caller's to settle."""
        with self._settled:
            mine = [content for content in contents if content not in self._contents]
            self._contents.update(dict.fromkeys(mine))
        return mine

    def _settle(self, content: Content, outcome: ChunkRef | BaseException) -> None:
        with self._settled:
            self._contents[content] = outcome
            self._settled.notify_all()

    def _await(self, content: Content) -> ChunkRef:
        with self._settled:
            while (outcome := self._contents[content]) is None:
                self._settled.wait()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _put_one(
        self, raw: memoryview, digest: bytes, width: int, path: str, base: ChunkRef | None, row_length: int
    ) -> ChunkRef:
        if base is not None and base.nbytes != raw.nbytes:
            base = None
        ref = self._put_coded(raw, digest, width, path, base, row_length)
        if ref is None:
            key = str(BlobKey(digest, self._take_id, self._rank))
            self._put(key, raw)
            ref = ChunkRef(digest, raw.nbytes, key, raw.nbytes, 0, raw.nbytes)
        if self._bases is not None and ref.base is None:
            if base is not None:
                self._bases.replace(base)
            self._keep(ref, raw, path)
        return ref

    def _put_coded(
        self, raw: memoryview, digest: bytes, width: int, path: str, base: ChunkRef | None, row_length: int
    ) -> ChunkRef | None:
        """Encode and put, against the base if that is smaller; None where the chunk is to be stored raw."""
        if not self._coder.may_code(raw.nbytes):
            return None
        buffer = self._pool.acquire(raw.nbytes)
        try:
            out = buffer.memory(int(raw.nbytes * WORTHWHILE))
            with self._base_at_hand(base, path) as against:
                coded = self._coder.code(raw, digest, width, out, against, row_length)
                if base is not None and against is not None and coded.form is Form.DELTA:
                    self._keep(base, against.raw, path)
            if self._bases is not None and coded.gain is not None:
                self._bases.record_gain(path, coded.gain)
            if coded.form is Form.RAW:
                return None
            is_delta = coded.form is Form.DELTA
            key = str(BlobKey(digest, self._take_id, self._rank, ".d" if is_delta else ".z"))
            self._put(key, out[: coded.nbytes])
        finally:
            buffer.release()
        if is_delta and self._bases is not None and base is not None:
            self._bases.record_delta(base, coded.nbytes)
        base = base if is_delta else None
        return ChunkRef(digest, raw.nbytes, key, coded.nbytes, 0, coded.nbytes, coded.form, coded.width, base)

    @contextmanager
    def _base_at_hand(self, base: ChunkRef | None, path: str) -> Generator[Against | None, None, None]:
        """The base's raw bytes, from memory or from the store; None where there is none or it costs too much."""
        if self._bases is None or base is None:
            yield None
            return
        average = self._bases.average(base)
        with self._bases.borrow(base) as raw:
            if raw is not None:
                yield Against(raw, average)
                return
        if self._encoding == "auto" and not (self._reads_bases and self._meter.wants_base(self._bases.gain(path))):
            yield None
            return
        buffer = self._pool.acquire(base.nbytes)
        try:
            raw = buffer.memory(base.nbytes)
            yield Against(raw, average) if self._read_base(base, raw, path) else None
        finally:
            buffer.release()

    def _read_base(self, base: ChunkRef, raw: memoryview, path: str) -> bool:
        begin = self._clock()
        try:
            self._reader.read_into(base, raw, path=path, aligned=True)
        except SnapshotError as error:
            logger.info("the base %s cannot be used, so the chunk is stored without it: %s", base.key, error)
            return False
        self._meter.record_base_read(base.nbytes, self._clock() - begin)
        return True

    def _keep(self, ref: ChunkRef, raw: memoryview, path: str) -> None:
        """Keep a copy of a chunk that stands alone for later takes, where that pays."""
        if self._bases is None or self._bases.holds(ref):
            return
        gain = self._bases.gain(path)
        if gain is not None and gain < GAINLESS:
            return
        if self._encoding == "auto" and not self._meter.wants_copy(gain):
            return
        with self._cores.work() as work:
            is_new = self._bases.keep(ref, raw)
        if is_new:
            self._meter.record_copy(raw.nbytes, work.seconds)

    def _put_together(self, members: Sequence[Member]) -> list[ChunkRef]:
        buffer = self._pool.acquire(sum(raw.nbytes + _MEMBER_ALIGNMENT for _, raw, _ in members))
        try:
            memory = buffer.memory()
            end = 0
            places: list[tuple[int, int, Form]] = []
            for digest, raw, width in members:
                # the codec writes arrays of up to 8 bytes an element
                start = -(-end // _MEMBER_ALIGNMENT) * _MEMBER_ALIGNMENT
                memory[end:start] = bytes(start - end)
                form = Form.RAW
                if self._coder.may_code(raw.nbytes):
                    room = memory[start : start + int(raw.nbytes * WORTHWHILE)]
                    coded = self._coder.code(raw, digest, width, room)
                    form, end = coded.form, start + coded.nbytes
                if form is Form.RAW:
                    end = start + raw.nbytes
                    memory[start:end] = raw
                places.append((start, end - start, form))
            pack = memory[:end]
            key = str(BlobKey(digest_of(pack), self._take_id, self._rank, ".p"))
            self._put(key, pack)
        finally:
            buffer.release()
        refs = []
        for (digest, raw, width), (start, size, form) in zip(members, places, strict=True):
            width = 1 if form is Form.RAW else codec_width(width, raw.nbytes)
            refs.append(ChunkRef(digest, raw.nbytes, key, end, start, size, form, width))
        return refs

    def _put(self, key: str, data: memoryview) -> None:
        begin = self._clock()
        self._store.put_blob(key, data, aligned=is_page_memory(data))
        seconds = self._clock() - begin
        self._meter.record_put(data.nbytes, seconds)
        with self._settled:
            self._num_blobs += 1
            self._stored_nbytes += data.nbytes
