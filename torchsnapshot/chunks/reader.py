"""How stored bytes come back as a chunk that is proved to be what it was.

What lives here: the digest, reading, decoding by way of bases, and the check. What doesn't: storing (``writer``), how
bytes are coded (``codecs``), what is read for which target (``restoring.restore``).

Invariants:

- Nothing that was read is called good before its digest has been checked. What is wrong is read once more (a bit may
  flip on the way), then it is a ``CorruptionError``.
- Memory: beside the caller's, a read of an encoded chunk takes one pooled buffer of its stored size; a delta is decoded
  in place of its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import xxhash

from torchsnapshot.chunks.codecs import decode_into
from torchsnapshot.engine.buffers import Buffer, BufferPool, is_page_memory, shared_pool
from torchsnapshot.errors import (
    CorruptionError,
    FormatError,
    MissingBlobError,
    NewerFormatError,
    SnapshotError,
    StoreError,
)
from torchsnapshot.store.backend import PAGE_NBYTES
from torchsnapshot.store.envelope import ChunkRef, Form

MAX_BLOB_NBYTES: Final = 64 << 20
MAX_BASE_DEPTH: Final = 8

_CURE = (
    "Restore another snapshot, or copy this one again from where it is whole; "
    "`torchsnapshot verify` lists all that is damaged"
)


class BlobStore(Protocol):
    """What the repository does for this module."""

    def put_blob(self, key: str, data: memoryview, *, aligned: bool = False) -> None:
        """Put a blob; durable when it returns."""
        ...

    def blob_nbytes(self, key: str) -> int | None:
        """Size of a blob; None where it is not there."""
        ...

    def read_blob_into(
        self, key: str, start: int, buffer: memoryview, *, aligned: bool = False, at_hand: bool | None = None
    ) -> bool:
        """Fill ``buffer`` from the blob's bytes; ``StoreError`` where it ends too soon.

        ``at_hand``: see ``Backend.read_into``. Returns whether it was filled.
        """
        ...


def digest_of(memory: memoryview) -> bytes:
    """The digest that names these bytes: canonical xxh3_128, 16 bytes. Runs at about memory speed, without the GIL."""
    return xxhash.xxh3_128_digest(memory)


class _NotAtHandError(Exception):
    """Stored bytes would have to be waited for."""


class ChunkReader:
    """Reads chunks and proves them. Any thread may call it.

    Args:
        store: where blobs are.
        pool: where buffers come from; the process's own by default.
        is_alone: no other process of this host is likely to want the same bytes; else they are read by way of the page
            cache, so that the disk is asked once for all.
    """

    def __init__(self, store: BlobStore, *, pool: BufferPool | None = None, is_alone: bool = True) -> None:
        self._store = store
        self._pool = pool or shared_pool()
        self._is_alone = is_alone

    def read_into(
        self, ref: ChunkRef, out: memoryview, *, path: str = "", aligned: bool = False, at_hand: bool | None = None
    ) -> None:
        """Fill ``out`` with the chunk's raw bytes.

        Args:
            ref: the chunk.
            out: writable memory of ``ref.nbytes`` bytes that is no live tensor's: it holds anything after an error.
            path: place in the state, for messages.
            aligned: ``out`` is memory of a pool's buffer from its beginning, and the rest of its last page is free too.
            at_hand: False: ``read_at_hand`` has just said so.

        Raises:
            CorruptionError: the stored bytes are damaged, also on a second reading.
            MissingBlobError: the blob is not there.
            FormatError: the reference itself cannot be.
            StoreError: the store refused or could not be reached.
        """
        if out.nbytes != ref.nbytes:
            raise ValueError(f"a chunk of {ref.nbytes} bytes cannot be read into {out.nbytes} bytes")
        aligned = self._is_alone and (aligned or _may_be_direct(out))
        chain = _chain(ref)
        problem = self._read_chain(chain, out, aligned, at_hand) and self._read_chain(chain, out, aligned)
        if problem:
            where = f"{path}: " if path else ""
            raise type(problem)(f"{where}stored bytes cannot be used, read twice: {problem}. {_CURE}")

    def read_at_hand(self, ref: ChunkRef, out: memoryview) -> bool:
        """``read_into``, unless the store would have to be waited for.

        Returns:
            Whether ``out`` holds the chunk's raw bytes. Also False where something is wrong with what is at hand:
            ``read_into`` reads it again and says what.
        """
        try:
            return self._read_chain(_chain(ref), out, aligned=False, at_hand=True) is None
        except _NotAtHandError:
            return False

    def read_range(self, ref: ChunkRef, start: int, buffer: memoryview, *, at_hand: bool | None = None) -> bool:
        """Fill ``buffer`` from ``start`` on in the blob that holds ``ref``: several members of a pack at once.

        Args:
            ref: one of the members.
            start: in bytes.
            buffer: writable.
            at_hand: see ``Backend.read_into``.

        Returns:
            Whether it was filled.

        Raises:
            What ``read_into`` raises; nothing is checked yet.
        """
        aligned = self._is_alone and _may_be_direct(buffer)
        try:
            return self._store.read_blob_into(ref.key, start, buffer, aligned=aligned, at_hand=at_hand)
        except StoreError as error:
            raise self._explain(ref.key, start + buffer.nbytes, error) from error

    def decode(self, ref: ChunkRef, stored: memoryview, out: memoryview, *, path: str = "") -> memoryview:
        """The chunk's raw bytes, proved, from its stored ones, which were read before.

        What turns out to be damaged, and what needs a base, is read again. See ``read_into`` for the rest.

        Args:
            ref: the chunk.
            stored: its stored bytes.
            out: memory for its raw bytes.
            path: place in the state, for messages.

        Returns:
            ``out``; or ``stored`` itself, where it is what is wanted.
        """
        if out.nbytes != ref.nbytes or stored.nbytes != ref.stored_nbytes:
            raise ValueError(f"{stored.nbytes} and {out.nbytes} bytes for {ref.stored_nbytes} stored, {ref.nbytes} raw")
        _chain(ref)
        if ref.form is Form.RAW:
            if digest_of(stored) == ref.digest:
                return stored
        elif ref.base is None and _unpack(ref, stored, out, has_base=False) is None:
            return out
        self.read_into(ref, out, path=path)
        return out

    def _read_chain(
        self, chain: Sequence[ChunkRef], out: memoryview, aligned: bool, at_hand: bool | None = None
    ) -> SnapshotError | None:
        """Read a chunk by way of its bases, each decoded in place of its own base; returns what is wrong."""
        for depth, ref in enumerate(chain):
            buffer: Buffer | None = None
            try:
                if ref.form is Form.RAW:
                    stored = out
                else:
                    buffer = self._pool.acquire(ref.stored_nbytes)
                    stored = buffer.memory(ref.stored_nbytes)
                try:
                    may_be_direct = aligned if buffer is None else self._is_alone
                    if not self._store.read_blob_into(
                        ref.key, ref.offset, stored, aligned=may_be_direct, at_hand=at_hand
                    ):
                        raise _NotAtHandError
                except StoreError as error:
                    return self._explain(ref.key, ref.offset + ref.stored_nbytes, error)
                problem = _unpack(ref, stored, out, has_base=depth > 0)
                if problem:
                    return problem
            finally:
                if buffer is not None:
                    buffer.release()
        return None

    def _explain(self, key: str, end: int, error: StoreError) -> SnapshotError:
        """What is wrong with a blob that could not be read as far as ``end``; raises where it isn't the blob."""
        nbytes = self._store.blob_nbytes(key)
        if nbytes is None:
            raise MissingBlobError(f"blob {key} is not in the store. {_CURE}") from error
        if nbytes < end:
            return CorruptionError(f"blob {key} ends after {nbytes} bytes and should have at least {end}")
        raise error


def _may_be_direct(memory: memoryview) -> bool:
    """Whether direct I/O may fill ``memory``: it ends where its last page ends."""
    return memory.nbytes % PAGE_NBYTES == 0 and is_page_memory(memory)


def _chain(ref: ChunkRef) -> list[ChunkRef]:
    """The reference and its bases, the deepest base first."""
    chain = [ref]
    while (base := chain[-1].base) is not None:
        chain.append(base)
        if len(chain) > MAX_BASE_DEPTH + 1:
            raise FormatError(f"blob {ref.key}: more than {MAX_BASE_DEPTH} bases deep")
    for link in chain:
        if link.nbytes != ref.nbytes or (link.form is Form.DELTA) != (link.base is not None):
            raise FormatError(f"blob {link.key}: a base that does not fit its delta")
        limit = MAX_BLOB_NBYTES if link.form is Form.RAW else link.nbytes
        if not 0 < link.stored_nbytes <= limit or (link.form is Form.RAW and link.stored_nbytes != link.nbytes):
            raise FormatError(f"blob {link.key}: {link.stored_nbytes} stored bytes for a chunk of {link.nbytes}")
    return chain[::-1]


def _unpack(ref: ChunkRef, stored: memoryview, out: memoryview, *, has_base: bool) -> SnapshotError | None:
    """Stored bytes → checked raw bytes in ``out``, which holds the base's if there is one. Returns what is wrong.

    Those of a raw chunk are in ``out`` already.
    """
    if ref.form is not Form.RAW:
        try:
            decode_into(stored, out, out if has_base else None)
        except NewerFormatError as error:
            return NewerFormatError(f"blob {ref.key} at byte {ref.offset}: {error}, or it is damaged")
        except (FormatError, CorruptionError) as error:
            return CorruptionError(f"blob {ref.key} at byte {ref.offset}: {error}")
    found = digest_of(out)
    if found == ref.digest:
        return None
    message = f"blob {ref.key} at byte {ref.offset}: its content's digest is {found.hex()}, not {ref.digest.hex()}"
    return CorruptionError(message)
