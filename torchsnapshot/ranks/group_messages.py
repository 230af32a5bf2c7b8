"""The messages of a take over several ranks, as bytes, and lists that are sent once though many ranks have them. Pure.

What doesn't live here: what the parts of a message mean (``ownership``, ``agreement``, ``sharing``, ``assembly``), how
messages travel (``coordination.distributed``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.coordination.messages import pack, squeeze, unsqueeze
from torchsnapshot.ranks import assembly, ownership
from torchsnapshot.ranks.agreement import Answer
from torchsnapshot.store.envelope import ChunkRef, ChunkTableBuilder

K = TypeVar("K", bound=Hashable)

FIGURES = ("state_nbytes", "new_nbytes", "stored_nbytes", "num_chunks", "num_new_chunks", "num_blobs")
"""What ranks report of themselves and rank 0 adds up; their names are those in the manifest's head."""

MAX_LIST_NBYTES = 4096
"""A longer list is sent only when rank 0 has asked for it, by one of the ranks that have the same."""

MAX_SHARED_LIST_NBYTES = 32 << 10
"""The same for lists of what is new where ranks hash for one another: each has its own, so that all would be asked."""


class Lists:
    """One list of every rank, of which equal ones come once.

    Args:
        known: lists that need not come, by digest.
    """

    def __init__(self, known: dict[bytes, bytes] | None = None) -> None:
        self.digests: list[bytes] = []
        self._found: dict[bytes, bytes] = known or {}

    def hear(self, digests: list[bytes], lists: Sequence[bytes | memoryview]) -> None:
        """Take in what every rank has sent: nothing, or its list, squeezed."""
        self.digests = digests
        for digest, data in zip(digests, lists, strict=True):
            if len(data) and digest not in self._found:
                self._found[digest] = unsqueeze(data)

    def missing(self) -> set[int]:
        """The ranks that are to send theirs: the first of those that have the same."""
        first = {digest: rank for rank, digest in reversed(list(enumerate(self.digests)))}
        return {rank for digest, rank in first.items() if digest not in self._found}

    def all(self) -> list[bytes]:
        """The list of every rank."""
        return [self._found[digest] for digest in self.digests]

    def of_this_take(self, max_nbytes: int) -> dict[bytes, bytes]:
        """The different lists by digest; none where they are larger together."""
        found = {digest: self._found[digest] for digest in self.digests}
        return found if sum(map(len, found.values())) <= max_nbytes else {}


class Once(Generic[K]):
    """A function whose results are kept: many ranks get the same."""

    def __init__(self, function: Callable[[K], bytes]) -> None:
        self._function = function
        self._results: dict[K, bytes] = {}

    def __call__(self, argument: K) -> bytes:
        """The function's result, computed once."""
        found = self._results.get(argument)
        if found is None:
            found = self._results[argument] = self._function(argument)
        return found


def pack_counts(answer: Answer) -> bytes:
    """How many ranks hold each leaf, 4 bytes each."""
    return array("I", answer.num_holders).tobytes()


def pack_exchange(announcement: bytes, sums: bytes, after: str | None = None, told: bytes = b"") -> bytes:
    """A rank's message for *exchange*: of a long list, which other ranks may have too, only its digest.

    Args:
        announcement: what is new to it.
        sums: of its leaves.
        after: the take by which ranks have divided their hashing; None where this one has hashed all for itself.
        told: what it tells of chunks that it has hashed for others.
    """
    contents, squeezed = squeeze(announcement), squeeze(sums)
    limit = MAX_LIST_NBYTES if after is None else MAX_SHARED_LIST_NBYTES
    return pack(
        [digest_of(memoryview(announcement)), digest_of(memoryview(sums)), after],
        [
            contents if len(contents) <= limit else b"",
            squeezed if len(squeezed) <= MAX_LIST_NBYTES else b"",
            squeeze(told, announcement),
        ],
    )


def pack_lists(announcement: bytes, sums: bytes, asked: Sequence[bool]) -> bytes:
    """A rank's message for *lists*: those that rank 0 has asked for."""
    return pack(
        None, [squeeze(each) if is_asked else b"" for each, is_asked in zip((announcement, sums), asked, strict=True)]
    )


def pack_report(
    figures: Sequence[int],
    chunk_nbytes: int,
    report: assembly.Report,
    announcement: bytes,
    known: Collection[bytes],
    last: tuple[str, bytes] | None = None,
) -> bytes:
    """A rank's message for *durable*.

    Args:
        figures: in the order of ``FIGURES``.
        chunk_nbytes: raw bytes of the chunks that count for this rank.
        report: its tree and its chunks.
        announcement: what it told in *exchange*: rank 0 knows these digests.
        known: digests of trees that rank 0 knows.
        last: a take of which rank 0 knows this rank's chunk table, and that table.
    """
    after, last_table = (None, b"") if last is None else last
    tree = b"" if report.tree_digest in known else squeeze(report.tree)
    control = [list(figures), chunk_nbytes, dict(report.private), report.tree_digest, after]
    return pack(control, [squeeze(report.table, announcement + last_table), tree, squeeze(report.rows)])


def contents_of(announcement: bytes, duty: ownership.Duty) -> Iterator[tuple[ownership.Content, bool]]:
    """A rank's contents, each with whether it writes it."""
    return zip(ownership.unpack_contents(announcement), duty.writes, strict=True)


def pack_refs(refs: Iterable[ChunkRef]) -> bytes:
    """Where contents are, as a chunk table."""
    table = ChunkTableBuilder()
    table.add(list(refs))
    return table.build().pack()
