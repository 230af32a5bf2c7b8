"""What one take or restore did, in numbers: the value behind ``.stats``. No behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(slots=True)
class Stats:
    """Figures of one take or restore.

    Sizes are in bytes of raw content unless their name says ``stored``; ``seconds`` maps a phase to wall-clock seconds.

    Attributes:
        state_nbytes: the whole state.
        new_nbytes: a take: content that the store did not hold; a restore: content that was read.
        reused_nbytes: a take: content that the store held already; a restore: content that the target held already.
        hashed_nbytes: a take: content that this process hashed to compare it with what the store holds; less than the
            state where other ranks hash their share of it, and where nobody has written since it was hashed last. What
            is put is hashed once more.
        stored_nbytes: a take: bytes put into blobs; a restore: bytes read from blobs.
        manifest_nbytes: size of the manifest.
        num_chunks: chunks in the state.
        num_new_chunks: chunks behind ``new_nbytes``.
        num_blobs: blobs put by a take.
        converted: a restore: path -> (stored dtype, target dtype) where they differ.
        seconds: wall-clock seconds by phase.
    """

    state_nbytes: int = 0
    new_nbytes: int = 0
    reused_nbytes: int = 0
    hashed_nbytes: int = 0
    stored_nbytes: int = 0
    manifest_nbytes: int = 0
    num_chunks: int = 0
    num_new_chunks: int = 0
    num_blobs: int = 0
    converted: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of the block to the phase ``name``."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
