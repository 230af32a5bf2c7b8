"""Where a chunk becomes stored bytes: the choice between raw and encoded, packs, the keys of blobs.

What doesn't live here: the way back (``chunk_reader``, whose names stand here too), which chunks are new (``take``),
where blobs lie (the repository), how bytes are coded (``codecs``).

Invariants:

- A blob's key carries the digest that the caller computed over the very buffer that is handed in; a pack's key the
  digest of the pack's stored bytes. A key is put at most once: within one writer the same content is stored once, and
  whoever brings it again, or at the same time, gets the first one's reference.
- The first encoded chunk of each element width and one in 64 after it is decoded and compared before it is put. One
  that does not come back right is a bug of ours: it is reported and the take goes on without encoding.
- Memory: beside the caller's buffer, storing takes one pooled buffer of the chunk's or the pack's size until the put is
  done, unless a chunk is stored raw.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final, Literal

from torchsnapshot.buffers import BufferPool, is_page_memory, shared_pool
from torchsnapshot.chunk_reader import MAX_BLOB_NBYTES, BlobStore, digest_of
from torchsnapshot.chunk_reader import ChunkReader as ChunkReader
from torchsnapshot.codecs import WORTHWHILE, Effort, Scheme, borrow_scratch, choose, decode_into, encode
from torchsnapshot.encoded import WIDTHS
from torchsnapshot.errors import CorruptionError, FormatError
from torchsnapshot.meter import EncodingMeter
from torchsnapshot.store.envelope import ChunkRef, Form
from torchsnapshot.store.keys import BlobKey

logger = logging.getLogger(__name__)

Encoding = Literal["raw", "auto", "smallest"]
"""How chunks are stored: as they are; encoded where that costs no time; encoded wherever it saves bytes."""

CHECK_EVERY: Final = 64
"""One encoded chunk in so many is decoded before it is put."""

# below this, looking at a sample costs more time than the bytes are worth
_MIN_ENCODED_NBYTES = {"auto": 32 << 10, "smallest": 1 << 10}
# what shrinks to this (zeros, constants, counters) is encoded however fast the store is
_ALWAYS_WORTHWHILE = 0.25
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
        clock: seconds, for the meter.
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
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._store = store
        self._take_id = take_id
        self._rank = rank
        self._encoding = encoding
        self._effort = Effort.SMALLEST if encoding == "smallest" else Effort.AUTO
        self._pool = pool or shared_pool()
        self._meter = meter or EncodingMeter()
        self._clock = clock
        self._settled = threading.Condition(threading.Lock())
        # None: on its way; an error: it failed, and so will the take
        self._contents: dict[Content, ChunkRef | BaseException | None] = {}
        self._num_encoded: dict[int, int] = {}
        self._codec_is_broken = False
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
    def refs(self) -> list[ChunkRef]:
        """The chunks stored so far, each content once."""
        with self._settled:
            return [outcome for outcome in self._contents.values() if isinstance(outcome, ChunkRef)]

    def put_chunk(self, raw: memoryview, digest: bytes, width: int) -> ChunkRef:
        """Store one chunk as a blob of its own.

        Args:
            raw: the chunk, at most ``MAX_BLOB_NBYTES``; it must not change until the call returns.
            digest: ``digest_of(raw)``.
            width: element size in bytes.

        Raises:
            StoreError: the store refused it.
        """
        if not 0 < raw.nbytes <= MAX_BLOB_NBYTES:
            raise ValueError(f"a chunk of {raw.nbytes} bytes; allowed are 1 to {MAX_BLOB_NBYTES}")
        content = (digest, raw.nbytes)
        if self._claim([content]):
            try:
                self._settle(content, self._put_alone(raw, digest, width))
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

    def _put_alone(self, raw: memoryview, digest: bytes, width: int) -> ChunkRef:
        if self._may_encode(raw.nbytes):
            buffer = self._pool.acquire(raw.nbytes)
            try:
                size = self._encode(raw, digest, width, buffer.memory(int(raw.nbytes * WORTHWHILE)))
                if size is not None:
                    key = str(BlobKey(digest, self._take_id, self._rank, ".z"))
                    self._put(key, buffer.memory(size))
                    width = _codec_width(width, raw.nbytes)
                    return ChunkRef(digest, raw.nbytes, key, size, 0, size, Form.ENCODED, width)
            finally:
                buffer.release()
        key = str(BlobKey(digest, self._take_id, self._rank))
        self._put(key, raw)
        return ChunkRef(digest, raw.nbytes, key, raw.nbytes, 0, raw.nbytes)

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
                size = None
                if self._may_encode(raw.nbytes):
                    size = self._encode(raw, digest, width, memory[start : start + int(raw.nbytes * WORTHWHILE)])
                if size is None:
                    memory[start : start + raw.nbytes] = raw
                end = start + (raw.nbytes if size is None else size)
                places.append((start, end - start, Form.RAW if size is None else Form.ENCODED))
            pack = memory[:end]
            key = str(BlobKey(digest_of(pack), self._take_id, self._rank, ".p"))
            self._put(key, pack)
        finally:
            buffer.release()
        refs = []
        for (digest, raw, width), (start, size, form) in zip(members, places, strict=True):
            width = 1 if form is Form.RAW else _codec_width(width, raw.nbytes)
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

    def _may_encode(self, nbytes: int) -> bool:
        return self._encoding != "raw" and not self._codec_is_broken and nbytes >= _MIN_ENCODED_NBYTES[self._encoding]

    def _encode(self, raw: memoryview, digest: bytes, width: int, out: memoryview) -> int | None:
        """Encode into ``out``; the encoded size, or None where the chunk is to be stored raw."""
        width = _codec_width(width, raw.nbytes)
        with borrow_scratch() as scratch:
            scheme = choose(raw, width, self._effort, scratch)
            if scheme.fraction > WORTHWHILE or not self._is_wanted(scheme):
                return None
            begin = self._clock()
            size = encode(raw, scheme, out, scratch)
            seconds = self._clock() - begin
        if size is None:
            self._meter.record_encode(width, raw.nbytes, raw.nbytes, seconds)
            return None
        self._meter.record_encode(width, raw.nbytes, size, seconds)
        if self._is_due_for_check(width) and not self._comes_back(out[:size], raw.nbytes, digest):
            self._codec_is_broken = True
            logger.error(
                "an encoded chunk of %d bytes (width %d) does not decode to what it was: it and the rest of this take "
                "are stored raw. Nothing is lost; please report this as a bug of torchsnapshot",
                raw.nbytes,
                width,
            )
            return None
        return size

    def _is_wanted(self, scheme: Scheme) -> bool:
        if self._encoding == "smallest" or scheme.fraction <= _ALWAYS_WORTHWHILE:
            return True
        return self._meter.wants_encoding(scheme.width)

    def _is_due_for_check(self, width: int) -> bool:
        with self._settled:
            count = self._num_encoded.get(width, 0)
            self._num_encoded[width] = count + 1
        return count % CHECK_EVERY == 0

    def _comes_back(self, stored: memoryview, nbytes: int, digest: bytes) -> bool:
        buffer = self._pool.acquire(nbytes)
        try:
            raw = buffer.memory(nbytes)
            decode_into(stored, raw)
            return digest_of(raw) == digest
        except (FormatError, CorruptionError):
            return False
        finally:
            buffer.release()


def _codec_width(width: int, nbytes: int) -> int:
    """The width that the codec uses: complex128 comes as pairs of float64, what has no whole elements as bytes."""
    if width not in WIDTHS:
        width = 8 if width % 8 == 0 else 1
    return width if nbytes % width == 0 else 1
