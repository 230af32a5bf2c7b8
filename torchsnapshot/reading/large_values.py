"""The bytes of values that are too large to stand in a manifest, for whoever looks at it."""

from __future__ import annotations

from collections.abc import Callable

from torchsnapshot.errors import SnapshotError
from torchsnapshot.format.entries import Span, ValueEntry
from torchsnapshot.reading.opening import Opened
from torchsnapshot.reading.reads import Reading
from torchsnapshot.stats import Stats
from torchsnapshot.store.leases import reading


def large_value_reader(opened: Opened) -> Callable[[ValueEntry], bytes | None]:
    """What reads them. It gives None where the store no longer has them whole: looking goes on, restoring says so."""
    found: dict[Span, bytes | None] = {}

    def read(entry: ValueEntry) -> bytes | None:
        assert entry.span is not None
        if entry.span not in found:
            try:
                with reading(opened.repository, opened.name):
                    work = Reading(opened.repository, opened.manifest, Stats())
                    data = work.add_bytes("a large value", entry)
                    work.run()
                    found[entry.span] = bytes(data)
            except SnapshotError:
                found[entry.span] = None
        return found[entry.span]

    return read
