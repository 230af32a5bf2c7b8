"""Who writes what: each content that several ranks hold is written by one of them, balanced by bytes. Pure.

What lives here: the packed messages of the *exchange* round, and rank 0's decision. What doesn't: how they travel
(``coordination.distributed``), and what ranks do with the answer (``group_take``).

Invariants: every content that was announced has exactly one owner, and that rank announced it; the decision depends on
nothing but the announcements, in the order of the ranks. Ranks with the very same list (replicas) are looked at
together, so that the work grows with what is different, not with the number of ranks.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torchsnapshot.errors import FormatError

Content = tuple[bytes, int]
"""A digest and the raw size in bytes."""

_DIGEST_NBYTES = 16
_ROW_NBYTES = 20


@dataclass(frozen=True, slots=True)
class Duty:
    """Rank 0's answer to one rank, in the order of its announcement.

    ``writes``: the rank is the owner. ``is_shared``: others hold the content too, so they need to be told where it is.
    """

    writes: Sequence[bool]
    is_shared: Sequence[bool]


def pack_contents(contents: Iterable[Content]) -> bytes:
    """An announcement: 20 bytes for each content that is new to a rank, in its own order, each content once.

    All digests come first, then all sizes.
    """
    contents = list(contents)
    sizes = array("I", (nbytes for _, nbytes in contents))
    return b"".join(digest for digest, _ in contents) + sizes.tobytes()


def unpack_contents(data: bytes) -> list[Content]:
    """The inverse of ``pack_contents``. Raises ``FormatError`` where ``data`` is no announcement."""
    count, rest = divmod(len(data), _ROW_NBYTES)
    if rest:
        raise FormatError(f"an announcement of {len(data)} bytes is cut off")
    end = count * _DIGEST_NBYTES
    digests = [data[start : start + _DIGEST_NBYTES] for start in range(0, end, _DIGEST_NBYTES)]
    return list(zip(digests, array("I", data[end:]), strict=True))


def pack_duty(duty: Duty) -> bytes:
    """An answer: two bits for each content."""
    return _pack_bits(duty.writes) + _pack_bits(duty.is_shared)


def unpack_duty(data: bytes, num_contents: int) -> Duty:
    """The inverse of ``pack_duty``. Raises ``FormatError`` where ``data`` is no answer to that many contents."""
    num_bytes = (num_contents + 7) // 8
    if len(data) != 2 * num_bytes:
        raise FormatError(f"an answer of {len(data)} bytes to {num_contents} contents")
    return Duty(_unpack_bits(data[:num_bytes], num_contents), _unpack_bits(data[num_bytes:], num_contents))


def assign(announcements: Sequence[bytes]) -> list[Duty]:
    """Decide for every rank what it writes.

    Args:
        announcements: what ``pack_contents`` made on each rank.

    Returns:
        One duty for each rank.
    """
    crews: dict[bytes, list[int]] = {}
    for rank, announcement in enumerate(announcements):
        crews.setdefault(announcement, []).append(rank)
    members = list(crews.values())
    lists = [unpack_contents(announcement) for announcement in crews]
    common = _held_by_several(lists)
    holders: dict[Content, list[int]] = {}
    for crew, contents in enumerate(lists):
        for content in contents if len(members[crew]) > 1 else common.intersection(contents):
            holders.setdefault(content, []).append(crew)
    loads = [0] * len(announcements)
    owners: dict[Content, int] = {}
    for crew, contents in enumerate(lists):
        if len(members[crew]) == 1:
            loads[members[crew][0]] = sum(content[1] for content in contents if content not in holders)
    heaps = [[(loads[rank], rank) for rank in crew] for crew in members]
    for heap in heaps:
        heapq.heapify(heap)
    # large ones first: what comes last evens out the rest; digests make the order the same whatever came first
    for content in sorted(holders, key=lambda content: (-content[1], content[0])):
        crew = min(holders[content], key=lambda crew: heaps[crew][0])
        load, rank = heaps[crew][0]
        heapq.heapreplace(heaps[crew], (load + content[1], rank))
        owners[content] = rank
    duties: dict[int, Duty] = {}
    for crew, contents in enumerate(lists):
        if holders.keys().isdisjoint(contents):
            duties.update((rank, Duty([True] * len(contents), [False] * len(contents))) for rank in members[crew])
            continue
        flags = [content in holders for content in contents]
        for rank in members[crew]:
            duties[rank] = Duty([owners.get(content, rank) == rank for content in contents], flags)
    return [duties[rank] for rank in range(len(announcements))]


def _held_by_several(lists: Sequence[Sequence[Content]]) -> set[Content]:
    """What stands in more than one list."""
    seen: set[Content] = set()
    common: set[Content] = set()
    for contents in lists:
        if not seen.isdisjoint(contents):
            common.update(seen.intersection(contents))
        seen.update(contents)
    return common


def _pack_bits(flags: Sequence[bool]) -> bytes:
    packed = bytearray((len(flags) + 7) // 8)
    for index, flag in enumerate(flags):
        if flag:
            packed[index >> 3] |= 1 << (index & 7)
    return bytes(packed)


def _unpack_bits(data: bytes, count: int) -> list[bool]:
    return list(_bits(data))[:count]


def _bits(data: bytes) -> Iterator[bool]:
    for byte in data:
        for bit in range(8):
            yield bool(byte >> bit & 1)
