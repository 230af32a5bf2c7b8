"""Which of the ranks that hold the same hashes what, and what it tells the others of that. Pure.

What lives here: what a process remembers of the last take of its group (``Sharing``), how the work of a take is divided
after it (``Shares``), the packed messages, and which of them rank 0 passes on to whom. What doesn't: leaves whose sums
every rank tells for itself (``agreement``), what is written by whom (``ownership``), the hashing itself
(``group_exchange``).

A *crew* is the ranks that are said to hold the same: all of them for a leaf that was declared replicated, the holders
of a region for a part of a sharded tensor. Leaves of one crew are divided in the order of their paths, in runs of a few
chunks that stand together: small ones become one pack, and yet what changes in one corner of the state is the work of
all. Each member hashes about equal bytes, and beside that a sample of what the others hash, another one in each take,
so that after ``SAMPLE_TAKES`` takes in a row every chunk was compared on every rank.

Invariants: what is divided was found equal on all members, in full, by an earlier take of this process and group, and
has the same paths, shapes, dtypes and cells as then; every member knows that of itself, and that all others do is said
in *exchange* before anything that was hashed for others counts. A chunk's digest and its place in the store come from
the rank that hashed it, or from this rank's memory of what that rank told in the last take.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from torchsnapshot.coordination.messages import pack, unpack
from torchsnapshot.errors import FormatError
from torchsnapshot.ranks import ownership
from torchsnapshot.ranks.agreement import Duty, identity_of, may_have_other_holders
from torchsnapshot.ranks.ownership import Content
from torchsnapshot.ranks.replicas import is_declared
from torchsnapshot.state.flatten import ShardedLeaf, TensorLeaf
from torchsnapshot.store.envelope import ChunkRef, ChunkTable, ChunkTableBuilder
from torchsnapshot.taking.plan import Chunk, Leaf

SAMPLE_TAKES = 16
"""In so many takes in a row every chunk is compared on every rank; each compares this part of what others hash."""

RUN_NBYTES = 4 << 20
"""So many bytes that stand together are hashed by one rank, or an eighth of a rank's share where that is less."""

_AS_BEFORE, _KNOWN, _NEW = 0, 1, 2
"""What a part says of a chunk: stored where all remember it, stored elsewhere, or still to be put."""

Members = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Crew:
    """Ranks that hold the same, ascending, and the paths of what they hold, in alphabetical order.

    ``refs`` says where all chunks of these leaves were stored by the last take, equal on every member; None where each
    may remember another place for the same content.
    """

    members: Members
    paths: tuple[str, ...]
    refs: Sequence[ChunkRef] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """What a process remembers of the last take of its group: replicas that were found equal in full.

    ``structure`` is of all leaves that might be shared, of whatever crew. ``num_takes`` counts takes since all was
    compared.
    """

    take_id: str
    global_ranks: tuple[int, ...]
    structure: bytes
    crews: tuple[Crew, ...]
    num_takes: int = 0


def candidates(leaves: Iterable[Leaf], globs: Sequence[str], global_ranks: Sequence[int]) -> dict[str, Members]:
    """The leaves whose hashing ranks may share, by path: tensors that are said to be held alike by several.

    Args:
        leaves: of this rank's plan.
        globs: those that all ranks gave.
        global_ranks: for each rank of the group its global rank.
    """
    found: dict[str, Members] = {}
    everybody = tuple(range(len(global_ranks)))
    rank_of = {global_rank: rank for rank, global_rank in enumerate(global_ranks)}
    holders: dict[object, Members] = {}
    for leaf in leaves:
        if not leaf.chunks:
            continue
        if isinstance(leaf.node, TensorLeaf) and is_declared(leaf.path, globs):
            found[leaf.path] = everybody
        elif isinstance(leaf.node, ShardedLeaf) and may_have_other_holders(leaf):
            sharding, region = leaf.node.source.sharding, leaf.node.source.region
            assert region is not None
            key = (sharding, region)
            if key not in holders:
                ranks = (rank_of.get(global_rank) for global_rank in sharding.ranks_of(region))
                holders[key] = tuple(sorted(rank for rank in ranks if rank is not None))
            if len(holders[key]) > 1:
                found[leaf.path] = holders[key]
    return found


def structure_of(leaves: Iterable[Leaf], found: Mapping[str, Members]) -> bytes:
    """A digest of all that must be as it was when these leaves were found equal, but for their content."""
    content = xxhash.xxh3_128()
    for leaf in leaves:
        if leaf.path in found:
            content.update(repr((identity_of(leaf), found[leaf.path])).encode())
    return content.digest()


def crews_of(leaves: Iterable[Leaf], found: Mapping[str, Members], holders: Mapping[str, int]) -> tuple[Crew, ...]:
    """What can be shared from now on.

    Args:
        leaves: of this rank's plan.
        found: the candidates.
        holders: how many ranks have told the same sum for a leaf, by path, for those of which no other sum was told.
    """
    paths: dict[Members, list[str]] = {}
    for leaf in leaves:
        members = found.get(leaf.path)
        if members is not None and holders.get(leaf.path) == len(members):
            paths.setdefault(members, []).append(leaf.path)
    return tuple(Crew(members, tuple(sorted(each))) for members, each in sorted(paths.items()))


def hand_out(sizes: Sequence[int], count: int) -> list[int]:
    """Give the chunks of a row to so many ranks, in runs, balanced by bytes; for each chunk the number of its rank."""
    run_nbytes = min(RUN_NBYTES, sum(sizes) // (8 * count))
    others = [(0, number) for number in range(1, count)]
    load, number, run, numbers = 0, 0, 0, []
    for nbytes in sizes:
        if run > run_nbytes:
            load, number = heapq.heappushpop(others, (load, number))
            run = 0
        numbers.append(number)
        load += nbytes
        run += nbytes
    return numbers


def divide(sizes: Sequence[int], count: int) -> list[int]:
    """Cut a row of chunks into stretches of about equal bytes; for each chunk the number of its stretch."""
    total, passed, numbers = sum(sizes), 0, []
    for nbytes in sizes:
        # where the middle of the chunk lies
        numbers.append((2 * passed + nbytes) * count // (2 * total))
        passed += nbytes
    return numbers


# ------------------------------------------------------------------ one take


@dataclass(slots=True, eq=False)
class _Share:
    """One crew in one take: its chunks in order, and the rank that hashes each of them."""

    crew: Crew
    chunks: list[Chunk]
    hashers: list[int]

    @classmethod
    def of(cls, crew: Crew, leaves: Mapping[str, Leaf]) -> _Share:
        chunks = [chunk for path in crew.paths for chunk in leaves[path].chunks]
        numbers = hand_out([chunk.nbytes for chunk in chunks], len(crew.members))
        return cls(crew, chunks, [crew.members[number] for number in numbers])

    def by(self, rank: int) -> list[int]:
        """The chunks that a rank hashes."""
        return [index for index, hasher in enumerate(self.hashers) if hasher == rank]

    def sample(self, rank: int, number: int) -> Iterator[Chunk]:
        """What a rank compares of what the others hash, in the take of that number."""
        mine = self.crew.members.index(rank)
        for theirs, hasher in enumerate(self.crew.members):
            if hasher == rank:
                continue
            chunks = [self.chunks[index] for index in self.by(hasher)]
            slots = divide([chunk.nbytes for chunk in chunks], SAMPLE_TAKES)
            for chunk, slot in zip(chunks, slots, strict=True):
                # ranks look at different parts at a time
                if (slot + mine + theirs - number) % SAMPLE_TAKES == 0:
                    yield chunk


class Shares:
    """How one rank's work of one take is divided with others.

    Args:
        sharing: of a structure that the leaves still have.
        leaves: of this rank's plan, by path.
        rank: this one.
        samples: whether to compare a sample of what the others hash.

    Attributes:
        mine: chunks that this rank hashes for all.
        sampled: chunks that it hashes only to compare.
        paths: of all leaves that are shared.
    """

    def __init__(self, sharing: Sharing, leaves: Mapping[str, Leaf], rank: int, *, samples: bool) -> None:
        self._sharing = sharing
        self._leaves = leaves
        self._rank = rank
        self._shares = {id_of(crew.members): _Share.of(crew, leaves) for crew in sharing.crews}
        self.mine = [share.chunks[index] for share in self._shares.values() for index in share.by(rank)]
        self.sampled = [
            chunk for share in self._shares.values() if samples for chunk in share.sample(rank, sharing.num_takes)
        ]
        self.paths = frozenset(path for crew in sharing.crews for path in crew.paths)

    def duties(self) -> dict[str, Duty]:
        """Who reports what is shared: rank 0 replicas, the first member of its crew a part of a sharded tensor."""
        found: dict[str, Duty] = {}
        for crew in self._sharing.crews:
            part = Duty.OWN if self._rank == crew.members[0] else Duty.ELSEWHERE
            for path in crew.paths:
                found[path] = part if isinstance(self._leaves[path].node, ShardedLeaf) else Duty.REPLICATED
        return found

    @property
    def take_id(self) -> str:
        """The take after which this is divided: where it is the same for all ranks, they remember the same."""
        return self._sharing.take_id

    def told(self) -> bytes:
        """What this rank tells of the chunks that it has hashed: nothing where all is as it was."""
        parts = []
        for share in self._shares.values():
            indices, refs = share.by(self._rank), share.crew.refs
            known = None if refs is None else [refs[index] for index in indices]
            data = _pack_part([share.chunks[index] for index in indices], known)
            if data:
                parts.append((share.crew.members, data))
        return pack([array("I", members).tobytes() for members, _ in parts], [data for _, data in parts])

    def learn(self, passed_on: bytes | memoryview) -> list[tuple[str, int]]:
        """Take in what the others have told.

        Args:
            passed_on: what rank 0 had for this rank.

        Returns:
            The leaves of which a sample differs from what the rank that hashed it has: path and rank.

        Raises:
            FormatError: it does not fit what is shared.
        """
        parts: dict[tuple[int, bytes], memoryview] = {}
        senders, contents = unpack(passed_on)
        for (sender, crew_id), data in zip(senders, contents, strict=True):
            parts[sender, crew_id] = data
        unequal: dict[str, int] = {}
        for crew_id, share in self._shares.items():
            for hasher in share.crew.members:
                data = parts.pop((hasher, crew_id), memoryview(b""))
                if hasher == self._rank:
                    continue
                refs = share.crew.refs
                indices = share.by(hasher)
                known = None if refs is None else [refs[index] for index in indices]
                chunks = [share.chunks[index] for index in indices]
                for chunk, digest, ref in _unpack_part(hasher, data, chunks, known):
                    if chunk.digest not in (b"", digest):
                        unequal.setdefault(chunk.path, hasher)
                    chunk.digest, chunk.ref = digest, ref
        if parts:
            raise FormatError(f"ranks {sorted({rank for rank, _ in parts})} tell of what this rank does not hold")
        return list(unequal.items())

    def after(self, take_id: str) -> Sharing:
        """What to remember once the take is committed, every chunk having its place."""
        crews = []
        for share in self._shares.values():
            refs = [chunk.ref for chunk in share.chunks if chunk.ref is not None]
            crews.append(Crew(share.crew.members, share.crew.paths, refs))
        last = self._sharing
        return Sharing(take_id, last.global_ranks, last.structure, tuple(crews), last.num_takes + 1)


# ------------------------------------------------------------------ messages


def id_of(members: Members) -> bytes:
    """A short name of a crew."""
    return xxhash.xxh3_64_digest(array("I", members).tobytes())


def _pack_part(chunks: Sequence[Chunk], known: Sequence[ChunkRef] | None) -> bytes:
    """Where these chunks are, or what they are; b"" where that is known of all of them."""
    says = bytearray()
    refs: list[ChunkRef] = []
    for index, chunk in enumerate(chunks):
        ref = chunk.ref
        if ref is None:
            says.append(_NEW)
        elif known is not None and ref == known[index]:
            says.append(_AS_BEFORE)
        else:
            says.append(_KNOWN)
            refs.append(ref)
    if not any(says):
        return b""
    table = ChunkTableBuilder()
    table.add(refs)
    new = [(chunk.digest, chunk.nbytes) for chunk in chunks if chunk.ref is None]
    return pack(None, [says, table.build().pack() if refs else b"", ownership.pack_contents(new)])


def _unpack_part(
    hasher: int, data: memoryview, chunks: Sequence[Chunk], known: Sequence[ChunkRef] | None
) -> Iterator[tuple[Chunk, bytes, ChunkRef | None]]:
    """For each chunk its digest, and where it is if it need not be put."""
    says: Sequence[int] = bytes(len(chunks))
    rows: Iterator[ChunkRef] = iter(())
    new: Iterator[Content] = iter(())
    if len(data):
        _, (says, table, contents) = unpack(data, 3)
        # behind the chunks' own rows stand those of bases
        rows = ChunkTable.unpack(table).iter_refs() if len(table) else rows
        new = iter(ownership.unpack_contents(bytes(contents)))
    if len(says) != len(chunks):
        raise FormatError(f"rank {hasher} tells of {len(says)} chunks where {len(chunks)} are")
    for index, (chunk, kind) in enumerate(zip(chunks, says, strict=True)):
        if kind == _NEW:
            digest, nbytes = next(new, (b"", -1))
            ref = None
        else:
            ref = next(rows, None) if kind == _KNOWN else None if known is None else known[index]
            digest, nbytes = (b"", -1) if ref is None else (ref.digest, ref.nbytes)
        if nbytes != chunk.nbytes:
            raise FormatError(f"rank {hasher} does not say what {chunk.path} is")
        yield chunk, digest, ref


@dataclass(slots=True, eq=False)
class PassedOn:
    """What rank 0 passes on: who has told what, and who is to hear it.

    Args:
        told: what ``Shares.told`` made on each rank.

    Raises:
        FormatError: it is not that.
    """

    told: Sequence[bytes | memoryview]
    _for: list[list[int]] = field(init=False)
    _parts: list[tuple[int, bytes, memoryview]] = field(init=False)

    def __post_init__(self) -> None:
        self._for = [[] for _ in self.told]
        self._parts = []
        for sender, message in enumerate(self.told):
            crews, contents = unpack(message)
            for packed, data in zip(crews, contents, strict=True):
                for member in array("I", packed):
                    if member >= len(self.told):
                        raise FormatError(f"rank {sender} shares with a rank {member}, which there isn't")
                    self._for[member].append(len(self._parts))
                self._parts.append((sender, xxhash.xxh3_64_digest(packed), data))

    def to(self, rank: int) -> tuple[int, ...]:
        """The parts that a rank is to hear: their numbers. Ranks of the same crews hear the same."""
        return tuple(self._for[rank])

    def packed(self, numbers: Sequence[int]) -> bytes:
        """These parts, as ``Shares.learn`` takes them."""
        parts = [self._parts[number] for number in numbers]
        return pack([[sender, crew_id] for sender, crew_id, _ in parts], [data for *_, data in parts])

    @property
    def has_new(self) -> bool:
        """Whether anything that was told of is still to be put."""
        return bool(self.new_in(range(len(self._parts))))

    def new_in(self, numbers: Sequence[int]) -> list[Content]:
        """What is still to be put of what these parts tell, each content once."""
        found: dict[Content, None] = {}
        for number in numbers:
            _, (_, _, contents) = unpack(self._parts[number][2], 3)
            found.update(dict.fromkeys(ownership.unpack_contents(bytes(contents))))
        return list(found)
