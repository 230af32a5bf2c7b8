"""What this process remembers of the snapshot that it last took or restored in each store.

What lives here: the digests and cells by path that a take compares live memory with, and the commit time it must
exceed. What doesn't: which blobs may be reused (``store.known`` decides, by evidence).

Invariant: everything here is a hint. A wrong or missing memory costs a copy, never content: a digest from here is
only ever compared with a digest of bytes that are read now. Memory is keyed by (path, chunk), never by a tensor's
identity, address or version counter: ``state_dict()`` may return fresh tensors each time, and fused optimizers and
``.data`` bypass version counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchsnapshot.entries import OpaqueEntry, StoredManifest, TensorEntry, ValueEntry
from torchsnapshot.plan import TakePlan

_NOTHING: frozenset[int] = frozenset()


class Remembered:
    """The snapshot that this process last took or restored, as ``plan.Previous`` wants it."""

    def __init__(
        self, manifest: StoredManifest | None, rank: int = 0, changed: Mapping[str, frozenset[int]] | None = None
    ) -> None:
        self._manifest = manifest
        self._rank = rank
        self._changed = changed or {}

    @property
    def take_id(self) -> str | None:
        """The take id of the remembered snapshot."""
        return None if self._manifest is None else self._manifest.head.take_id

    def cell(self, path: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The cell that the remembered manifest uses for this tensor."""
        entry = self._entry(path)
        if isinstance(entry, TensorEntry) and entry.dtype == dtype and entry.shape == shape:
            return entry.cell
        return None

    def digests(self, path: str, num_chunks: int) -> Sequence[bytes] | None:
        """The digests stored at this path, if there are exactly that many."""
        entry = self._entry(path)
        if isinstance(entry, TensorEntry) and len(entry.shards) == 1:
            span = entry.shards[0].span
        elif isinstance(entry, (ValueEntry, OpaqueEntry)) and entry.span is not None:
            span = entry.span
        else:
            return None
        if span.count != num_chunks or self._manifest is None:
            return None
        return self._manifest.digests(span)

    def changed(self, path: str) -> frozenset[int]:
        """Which chunks of the path the last take found changed."""
        return self._changed.get(path, _NOTHING)

    def _entry(self, path: str) -> object:
        return None if self._manifest is None else self._manifest.entries.get(f"{self._rank}/{path}")


def changed_chunks(plan: TakePlan) -> dict[str, frozenset[int]]:
    """Which chunks of a finished take differ from what was remembered before it, by path."""
    changed = {}
    for leaf in plan.leaves:
        indices = frozenset(
            index
            for index, chunk in enumerate(leaf.chunks)
            if chunk.previous is not None and chunk.ref is not None and chunk.ref.digest != chunk.previous
        )
        if indices:
            changed[leaf.path] = indices
    return changed


_remembered: dict[str, Remembered] = {}


def recall(store_id: str) -> Remembered:
    """What this process remembers for the store; empty at first."""
    return _remembered.get(store_id) or Remembered(None)


def remember(store_id: str, remembered: Remembered) -> None:
    """Keep the snapshot that was just taken or restored as the one to compare with."""
    _remembered[store_id] = remembered


def forget() -> None:
    """Drop all memory, as a new process would begin; used by tests and benchmarks."""
    _remembered.clear()
