"""What this machine could do at best, measured beside the library in the same run: memory, disk, small files.

Every buffer is made and touched beforehand and then used again: the first touch of fresh memory can cost more than the
work itself, and no limit should pay for it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import xxhash

from benchmarks.part import cores
from torchsnapshot.chunks.codecs import Effort, borrow_scratch, choose, encode

PIECE_NBYTES = 4 << 20
BLOCK_NBYTES = 16 << 20
_PAGE_NBYTES = 4096

_Job = TypeVar("_Job")


def pieces_of(tensors: Iterable[torch.Tensor]) -> list[memoryview]:
    """The memory of contiguous CPU tensors, cut into pieces of at most 4 MiB."""
    pieces = []
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError("a limit is measured over contiguous tensors")
        whole = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        pieces += [whole[start : start + PIECE_NBYTES] for start in range(0, tensor.nbytes, PIECE_NBYTES)]
    return pieces


class Limits:
    """Measures limits in ``folder``; every method returns seconds."""

    def __init__(self, folder: Path, workers: int | None = None) -> None:
        self._folder = folder
        self._workers = workers or cores()
        self._pool = ThreadPoolExecutor(self._workers)
        self._blocks = [_mapped(BLOCK_NBYTES) for _ in range(self._workers)]
        self._copy = bytearray()
        for block in self._blocks:
            block[:] = os.urandom(1 << 20) * (BLOCK_NBYTES >> 20)

    def digest(self, pieces: Sequence[memoryview]) -> float:
        """One pass of the library's hash over ``pieces``, with all cores."""
        return self._share(pieces, lambda _, piece: xxhash.xxh3_128_digest(piece))

    def digests(self, pieces: Sequence[memoryview]) -> list[bytes]:
        """The digests themselves, to compare states."""
        return list(self._pool.map(xxhash.xxh3_128_digest, pieces))

    def copy(self, pieces: Sequence[memoryview]) -> float:
        """One copy of ``pieces`` into memory that was used before, with all cores."""
        nbytes = sum(map(len, pieces))
        if not nbytes:
            return 0.0
        if len(self._copy) < nbytes:
            self._copy = bytearray(nbytes)
            self.copy(pieces)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._copy))
        jobs, offset = [], 0
        for piece in pieces:
            jobs.append((base + offset, ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece)))
            offset += len(piece)
        return self._share(jobs, lambda _, job: ctypes.memmove(*job))

    def code(self, pieces: Sequence[memoryview]) -> float:
        """Encode fp32 ``pieces`` as ``"auto"`` does where it encodes all, into memory that was used before: no limit of
        the machine, but what says whether encoding outruns a disk.
        """

        def encode_piece(worker: int, piece: memoryview) -> None:
            with borrow_scratch() as scratch:
                encode(piece, choose(piece, 4, Effort.AUTO, scratch), memoryview(self._blocks[worker]), scratch)

        return self._share([piece for piece in pieces if len(piece) % 4 == 0], encode_piece)

    def direct_write(self, nbytes: int, name: str = "raw") -> float:
        """Write a new file of ``nbytes`` bytes past the page cache, and make it durable. The file stays."""
        return self._write(name, nbytes, getattr(os, "O_DIRECT", 0))

    def buffered_write(self, nbytes: int, name: str = "raw-buffered") -> float:
        """Write a new file of ``nbytes`` bytes through the page cache, and make it durable. The file stays."""
        return self._write(name, nbytes, 0)

    def read(self, nbytes: int, name: str = "raw") -> float:
        """Read the file that a write of that name has left, past the page cache, into memory that was used before."""
        file = self._folder / name
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            return self._share(_spans(nbytes), lambda worker, at: _read_block(handle, self._blocks[worker], *at))
        finally:
            os.close(handle)

    def small_puts(self, count: int = 5) -> float:
        """Make ``count`` small files durable, one after the other: write, fsync, rename, fsync of the folder."""
        folder = self._folder / "small"
        folder.mkdir(exist_ok=True)
        parent = os.open(folder, os.O_RDONLY)
        try:
            begin = time.perf_counter()
            for number in range(count):
                handle = os.open(folder / "temporary", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.write(handle, bytes(2000))
                os.fsync(handle)
                os.close(handle)
                os.rename(folder / "temporary", folder / str(number))
                os.fsync(parent)
            return time.perf_counter() - begin
        finally:
            os.close(parent)

    def remove(self, name: str = "raw") -> None:
        """Remove a file that a write has left."""
        (self._folder / name).unlink(missing_ok=True)

    def _write(self, name: str, nbytes: int, flags: int) -> float:
        file = self._folder / name
        file.unlink(missing_ok=True)
        begin = time.perf_counter()
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
        try:
            self._share(_spans(nbytes), lambda worker, at: _write_block(handle, self._blocks[worker], *at))
            os.fsync(handle)
            seconds = time.perf_counter() - begin
        finally:
            os.close(handle)
        return seconds

    def _share(self, jobs: Sequence[_Job], work: Callable[[int, _Job], object]) -> float:
        """Spread ``jobs`` over the workers, each taking the next when it is free; returns seconds."""
        queue = iter(jobs)

        def run(worker: int) -> None:
            # next() of one list iterator is atomic under the GIL
            for job in queue:
                work(worker, job)

        begin = time.perf_counter()
        for done in [self._pool.submit(run, worker) for worker in range(self._workers)]:
            done.result()
        return time.perf_counter() - begin


def _mapped(nbytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_DONTFORK)
    return block


def _spans(nbytes: int) -> list[tuple[int, int]]:
    """(offset, size) of the blocks of a file of about ``nbytes`` bytes: whole pages, as ``O_DIRECT`` wants it."""
    nbytes = -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
    return [(start, min(BLOCK_NBYTES, nbytes - start)) for start in range(0, nbytes, BLOCK_NBYTES)]


def _write_block(handle: int, block: mmap.mmap, offset: int, nbytes: int) -> None:
    written = 0
    while written < nbytes:
        written += os.pwrite(handle, memoryview(block)[written:nbytes], offset + written)


def _read_block(handle: int, block: mmap.mmap, offset: int, nbytes: int) -> None:
    done = 0
    while done < nbytes:
        found = os.preadv(handle, [memoryview(block)[done:nbytes]], offset + done)
        if not found:
            raise EOFError("the file is shorter than it was written")
        done += found
