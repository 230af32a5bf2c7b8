"""What coding needs beside its input and output: work areas and compressors, kept for the next user.

What lives here: their making and lending. What doesn't: what is done with them (``codecs``, ``choice``).
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import zstandard

from torchsnapshot.chunks import planes
from torchsnapshot.engine.buffers import map_pages

_MAX_WINDOW_NBYTES = 1 << 23


class Scratch:
    """What one thread needs while it encodes or decodes: room for planes, and the compressors. Not thread-safe."""

    def __init__(self) -> None:
        self._room = memoryview(bytearray())
        self.tiles = planes.Tiles()
        # the window is small, so that decoders need little memory; a block of zstd is no longer than it in any case
        self.entropy = _compressor(1, window_log=17, hash_log=6, chain_log=6, min_match=7, target_length=0)
        self.search = _compressor(5, window_log=22)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES)

    def room(self, nbytes: int) -> memoryview:
        """Memory of ``nbytes`` bytes; holds anything."""
        if self._room.nbytes < nbytes:
            self._room = map_pages(nbytes)
        return self._room[:nbytes]


def _compressor(level: int, **parameters: int) -> zstandard.ZstdCompressor:
    chosen = zstandard.ZstdCompressionParameters.from_level(
        level, **parameters, write_content_size=True, write_checksum=False, write_dict_id=False
    )
    return zstandard.ZstdCompressor(compression_params=chosen)


_free_scratches: list[Scratch] = []


@contextmanager
def borrow_scratch() -> Generator[Scratch, None, None]:
    """A scratch of this process's own, kept for the next user."""
    try:
        scratch = _free_scratches.pop()
    except IndexError:
        scratch = Scratch()
    process = os.getpid()
    try:
        yield scratch
    finally:
        if os.getpid() == process:
            _free_scratches.append(scratch)


if hasattr(os, "register_at_fork"):
    # their memory is not mapped in the child
    os.register_at_fork(after_in_child=_free_scratches.clear)
