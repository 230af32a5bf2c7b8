"""The bytes of values that are too large to stand in a manifest, for whoever looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torchsnapshot.errors import CorruptionError, FormatError, MissingBlobError
from torchsnapshot.format.entries import Span, ValueEntry
from torchsnapshot.reading.opening import Opened
from torchsnapshot.reading.reads import Reading
from torchsnapshot.stats import Stats
from torchsnapshot.store.leases import reading


def large_value_reader(opened: Opened) -> Callable[[ValueEntry], bytes | None]:
    """What gives the bytes of such an entry: all of the snapshot's are read at once when it is first called.

    It gives None where the store no longer has them whole: looking goes on, restoring says so.

    Raises:
        StoreError: the store refused or could not be reached; so does what is returned.
    """
    found: dict[Span, bytes | None] = {}

    def read(entry: ValueEntry) -> bytes | None:
        assert entry.span is not None
        if entry.span not in found:
            manifest = opened.manifest
            every = (each for rank in manifest.ranks for each in manifest.entries_of(rank).values())
            large = {each.span: each for each in every if isinstance(each, ValueEntry) and each.span is not None}
            with reading(opened.repository, opened.name):
                try:
                    found.update(_bytes_of(opened, large.values()))
                except (CorruptionError, FormatError, MissingBlobError):
                    for span, each in large.items():
                        found[span] = _bytes_or_none(opened, each)
        return found[entry.span]

    return read


def _bytes_of(opened: Opened, entries: Iterable[ValueEntry]) -> dict[Span, bytes]:
    work = Reading(opened.repository, opened.manifest, Stats())
    memory = [(entry.span, work.add_bytes("a large value", entry)) for entry in entries]
    work.run()
    return {span: bytes(data) for span, data in memory if span is not None}


def _bytes_or_none(opened: Opened, entry: ValueEntry) -> bytes | None:
    assert entry.span is not None
    try:
        return _bytes_of(opened, [entry])[entry.span]
    except (CorruptionError, FormatError, MissingBlobError):
        return None
