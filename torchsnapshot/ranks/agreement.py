"""What the ranks of a take tell each other about their leaves, and what rank 0 makes of it. Pure.

What lives here: the sums of leaves in the *exchange* round, and the decision which rank reports which leaf. What
doesn't: who writes which content (``ownership``), leaves that ranks hash for one another (``sharing``: nobody tells
sums of these), how messages travel (``coordination.distributed``).

A leaf's *sum* is one digest over everything that its entry will say. Ranks whose leaves at one path have equal sums
hold a replica, whether or not anybody said so: rank 0 reports it for all. Holders of one region of a sharded tensor
must have equal sums; the first of them reports it. Leaves that were declared replicated must be equal on all ranks.

Invariant: every leaf is reported by exactly one rank, or by every rank that has it for itself, or it is a conflict.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from torchsnapshot.errors import FormatError
from torchsnapshot.state.flatten import OpaqueLeaf, ShardedLeaf, TensorLeaf
from torchsnapshot.taking.plan import Leaf

_ROW = struct.Struct("<8s16sB")


class Holding(IntEnum):
    """How a leaf is held; the number stands in messages."""

    PRIVATE = 0
    DECLARED = 1
    SHARDED = 2


class Duty(IntEnum):
    """What a rank does about one of its leaves; the number stands in messages."""

    OWN = 0
    """It reports the leaf as its own: other ranks lack it, or hold something else there."""
    REPLICATED = 1
    """All ranks hold the same; rank 0 reports it."""
    ELSEWHERE = 2
    """Another holder of the same region reports it."""
    CONFLICT = 3
    """Another rank holds something else where both must hold the same."""


@dataclass(frozen=True, slots=True)
class LeafSum:
    """One leaf in a message: ``key`` tells the place (a region of a tensor is a place), ``digest`` the content."""

    key: bytes
    digest: bytes
    holding: Holding


def sum_of(leaf: Leaf, *, declared: bool) -> LeafSum:
    """The sum of one leaf.

    Args:
        leaf: of a plan whose chunks have their digests; no container.
        declared: whether it is said to be replicated.
    """
    holding = Holding.DECLARED if declared else Holding.PRIVATE
    if isinstance(leaf.node, ShardedLeaf):
        holding = Holding.SHARDED
    place, what = identity_of(leaf)
    content = xxhash.xxh3_128(repr(what).encode())
    content.update(leaf.inline or b"")
    for chunk in leaf.chunks:
        content.update(chunk.digest)
    return LeafSum(xxhash.xxh3_64_digest(repr(place).encode()), content.digest(), holding)


def identity_of(leaf: Leaf) -> tuple[object, object]:
    """The place that a leaf holds among ranks, and what its entry says beside the content. Both have a telling repr."""
    node = leaf.node
    if isinstance(node, ShardedLeaf):
        source = node.source
        return (leaf.path, source.identity, source.region), (source.sharding, leaf.cell)
    if isinstance(node, TensorLeaf) and leaf.view is not None:
        view = leaf.view
        return leaf.path, (view.dtype, view.shape, view.permutation, leaf.cell, node.wrapper, node.requires_grad)
    return leaf.path, node.type_name if isinstance(node, OpaqueLeaf) else None


def may_have_other_holders(leaf: Leaf) -> bool:
    """Whether another rank may hold the same leaf, so that its sum has to be told.

    A part of a tensor that no dimension of its mesh replicates is on this rank only.
    """
    if not isinstance(leaf.node, ShardedLeaf):
        return True
    sharding = leaf.node.source.sharding
    return sharding.num_regions < sharding.num_positions


def pack_sums(sums: Iterable[LeafSum]) -> bytes:
    """25 bytes for each leaf, in the rank's own order."""
    return b"".join(_ROW.pack(each.key, each.digest, each.holding) for each in sums)


def unpack_sums(data: bytes | memoryview) -> list[LeafSum]:
    """The inverse of ``pack_sums``. Raises ``FormatError`` where ``data`` is no such message."""
    if len(data) % _ROW.size:
        raise FormatError(f"a message of {len(data)} bytes about leaves is cut off")
    return [LeafSum(key, digest, Holding(holding)) for key, digest, holding in _ROW.iter_unpack(data)]


@dataclass(frozen=True, slots=True)
class Answer:
    """Rank 0's decision for one rank, in the order of its leaves.

    ``duties`` has one for each, ``num_holders`` says how many ranks have told a sum for its place, ``conflicts`` are
    (leaf, other rank).
    """

    duties: bytes
    num_holders: Sequence[int]
    conflicts: list[tuple[int, int]]


def decide(messages: Sequence[bytes | memoryview]) -> list[Answer]:
    """Decide for every rank which leaves it reports. Ranks with the very same message are looked at together.

    Args:
        messages: what ``pack_sums`` made on each rank.
    """
    crews: dict[bytes, list[int]] = {}
    for rank, message in enumerate(messages):
        crews.setdefault(bytes(message), []).append(rank)
    lists = [unpack_sums(message) for message in crews]
    places: dict[bytes, _Place] = {}
    for sums, ranks in zip(lists, crews.values(), strict=True):
        for each in sums:
            place = places.get(each.key)
            if place is None:
                places[each.key] = _Place(ranks[0], each.digest, len(ranks))
                continue
            place.num_holders += len(ranks)
            if place.other is None and place.digest != each.digest:
                place.other = ranks[0]
    answers: dict[int, Answer] = {}
    for sums, ranks in zip(lists, crews.values(), strict=True):
        answers[ranks[0]] = _answer(ranks[0], sums, places, len(messages))
        if len(ranks) > 1:
            answers.update(dict.fromkeys(ranks[1:], _answer(ranks[1], sums, places, len(messages))))
    return [answers[rank] for rank in range(len(messages))]


@dataclass(slots=True)
class _Place:
    """Who holds something at one place: the first rank, with what, and the first one that holds something else."""

    first: int
    digest: bytes
    num_holders: int
    other: int | None = None


def _answer(rank: int, sums: Sequence[LeafSum], places: Mapping[bytes, _Place], world_size: int) -> Answer:
    duties = bytearray()
    num_holders = array("I")
    conflicts: list[tuple[int, int]] = []
    for index, each in enumerate(sums):
        place = places[each.key]
        num_holders.append(place.num_holders)
        is_on_all = place.num_holders == world_size
        must_be_equal = each.holding is Holding.SHARDED or (each.holding is Holding.DECLARED and is_on_all)
        if place.other is not None and must_be_equal:
            duties.append(Duty.CONFLICT)
            conflicts.append((index, place.other if place.digest == each.digest else place.first))
        elif each.holding is Holding.SHARDED:
            duties.append(Duty.OWN if rank == place.first else Duty.ELSEWHERE)
        elif is_on_all and place.other is None:
            duties.append(Duty.REPLICATED)
        else:
            duties.append(Duty.OWN)
    return Answer(bytes(duties), num_holders, conflicts)
