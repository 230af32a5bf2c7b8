"""Who hashes what among ranks that hold the same, what they tell of it, and what rank 0 makes of sums of leaves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot.coordination.messages import squeeze, unpack, unsqueeze
from torchsnapshot.errors import FormatError
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.ranks import assembly
from torchsnapshot.ranks.agreement import Answer, Duty, Holding, LeafSum, decide, pack_sums, unpack_sums
from torchsnapshot.ranks.group_decisions import Decisions
from torchsnapshot.ranks.group_messages import FIGURES, pack_exchange, pack_refs, pack_report
from torchsnapshot.ranks.sharing import SAMPLE_TAKES, Crew, PassedOn, Shares, Sharing, divide, hand_out, id_of
from torchsnapshot.state.flatten import ValueLeaf
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.taking.plan import Chunk, Leaf

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


def digest_of(text: str) -> bytes:
    """Of a chunk's made-up content."""
    return xxhash.xxh3_128_digest(text.encode())


def ref_of(digest: bytes, nbytes: int, take: str = "0") -> ChunkRef:
    """Where a take has put a content."""
    return ChunkRef(digest, nbytes, f"{digest.hex()}-{take * 24}-0", nbytes, 0, nbytes)


def leaf_of(path: str, nbytes: Sequence[int]) -> Leaf:
    """A leaf with chunks of these sizes."""
    pieces = [Piece(Box((0,), (each,)), 0, each) for each in nbytes]
    return Leaf(path, ValueLeaf(b""), chunks=[Chunk(path, cast(Any, None), piece, 1, None) for piece in pieces])


def leaves_of(nbytes: Sequence[int]) -> dict[str, Leaf]:
    """Two leaves that share these chunks."""
    return {"b": leaf_of("b", nbytes[::2]), "a": leaf_of("a", nbytes[1::2])}


def sharing_of(members: tuple[int, ...], *, number: int = 0, refs: Sequence[ChunkRef] | None = None) -> Sharing:
    """What each of these ranks remembers."""
    return Sharing("0" * 24, members, b"", (Crew(members, ("a", "b"), refs),), number)


@given(sizes, st.integers(1, 9))
def test_stretches_are_even(nbytes: list[int], count: int) -> None:
    """Stretches follow one another, and none is larger than its part by more than one chunk."""
    numbers = divide(nbytes, count)
    assert numbers == sorted(numbers)
    assert set(numbers) <= set(range(count))
    for number in range(count):
        load = sum(size for size, each in zip(nbytes, numbers, strict=True) if each == number)
        assert load <= sum(nbytes) / count + max(nbytes)


@given(sizes, st.integers(1, 9))
def test_shares_are_even(nbytes: list[int], count: int) -> None:
    """No rank is given more than its part by more than one run and one chunk."""
    numbers = hand_out(nbytes, count)
    assert set(numbers) <= set(range(count))
    for number in range(count):
        load = sum(size for size, each in zip(nbytes, numbers, strict=True) if each == number)
        assert load <= sum(nbytes) / count * 1.125 + max(nbytes)


def test_work_in_one_corner_is_shared() -> None:
    """What stands together is hashed by one rank only up to a few MiB: any 64 MiB are the work of all."""
    numbers = hand_out([1 << 20] * 1000, 4)
    assert all(set(numbers[start : start + 64]) == {0, 1, 2, 3} for start in range(0, 900, 50))
    assert sum(one != other for one, other in itertools.pairwise(numbers)) < 1000 / 4


@given(sizes, st.sets(st.integers(0, 20), min_size=2, max_size=5))
def test_every_chunk_is_compared_on_every_rank(nbytes: list[int], ranks: set[int]) -> None:
    """One member hashes each chunk; within the promised number of takes in a row every other one samples it, once."""
    members = tuple(sorted(ranks))
    leaves = leaves_of(nbytes)
    chunks = [chunk for leaf in leaves.values() for chunk in leaf.chunks]
    owners = [chunk for rank in members for chunk in Shares(sharing_of(members), leaves, rank, samples=True).mine]
    assert sorted(map(id, owners)) == sorted(map(id, chunks))
    for rank in members:
        shares = [
            Shares(sharing_of(members, number=7 + take), leaves, rank, samples=True) for take in range(SAMPLE_TAKES)
        ]
        seen = [id(chunk) for each in shares for chunk in each.sampled]
        assert sorted(seen + [id(chunk) for chunk in shares[0].mine]) == sorted(map(id, chunks))
        assert not Shares(sharing_of(members), leaves, rank, samples=False).sampled


@given(sizes, st.lists(st.sampled_from(["as before", "known", "new"]), min_size=60, max_size=60), st.booleans())
def test_what_is_told_is_learned(nbytes: list[int], kinds: list[str], remembers: bool) -> None:
    """After an exchange every rank knows what each rank knows of its own share, whatever they remembered."""
    members = (0, 1, 2)
    every = [leaves_of(nbytes) for _ in members]
    order = [(path, index) for path in ("a", "b") for index in range(len(every[0][path].chunks))]
    before = [ref_of(digest_of(f"{path} {index}"), every[0][path].chunks[index].nbytes) for path, index in order]
    sharing = sharing_of(members, refs=before if remembers else None)
    shares = [Shares(sharing, leaves, rank, samples=False) for rank, leaves in enumerate(every)]
    said = dict(zip(order, zip(before, kinds, strict=False), strict=True))
    for rank, leaves in enumerate(every):
        mine = set(map(id, shares[rank].mine))
        for (path, index), (ref, kind) in said.items():
            chunk = leaves[path].chunks[index]
            if id(chunk) in mine:
                chunk.digest = ref.digest if kind == "as before" else digest_of(f"now {path} {index}")
                chunk.ref = (
                    None if kind == "new" else ref_of(chunk.digest, chunk.nbytes, "0" if kind == "as before" else "1")
                )
    passed_on = PassedOn([each.told() for each in shares])
    new = {(digest_of(f"now {path} {i}"), ref.nbytes) for (path, i), (ref, kind) in said.items() if kind == "new"}
    assert passed_on.has_new == bool(new)
    for rank, each in enumerate(shares):
        numbers = passed_on.to(rank)
        assert set(passed_on.new_in(numbers)) == new
        assert each.learn(passed_on.packed(numbers)) == []
    for path, index in order:
        digests = {leaves[path].chunks[index].digest for leaves in every}
        refs = {leaves[path].chunks[index].ref for leaves in every}
        assert len(digests) == len(refs) == 1
        assert digests != {b""}
    if remembers and set(kinds[: len(order)]) == {"as before"}:
        assert all(len(each.told()) < 20 for each in shares)


def test_a_sample_that_differs_names_who_hashed_it() -> None:
    """What a rank has sampled, and another one has hashed otherwise, is told by path and rank."""
    every = [leaves_of([100] * 64) for _ in range(2)]
    shares = [Shares(sharing_of((0, 1)), leaves, rank, samples=True) for rank, leaves in enumerate(every)]
    for each in shares:
        for chunk in [*each.mine, *each.sampled]:
            chunk.digest = digest_of("same")
    assert shares[1].sampled
    shares[1].sampled[0].digest = digest_of("other")
    passed_on = PassedOn([each.told() for each in shares])
    assert shares[0].learn(passed_on.packed(passed_on.to(0))) == []
    assert shares[1].learn(passed_on.packed(passed_on.to(1))) == [(shares[1].sampled[0].path, 0)]


def test_what_does_not_fit_is_refused() -> None:
    """A part for a crew that this rank is not of, of other chunks, or that is missing where nothing is remembered."""
    shares = Shares(sharing_of((0, 1)), leaves_of([100] * 4), 0, samples=False)
    mine = Shares(sharing_of((0, 1)), leaves_of([100] * 4), 0, samples=False).told()
    with pytest.raises(FormatError, match="rank 1 does not say"):
        shares.learn(PassedOn([]).packed(()))
    for other in ([100] * 8, [90] * 4):
        theirs = Shares(sharing_of((0, 1)), leaves_of(other), 1, samples=False)
        passed_on = PassedOn([mine, theirs.told()])
        with pytest.raises(FormatError):
            shares.learn(passed_on.packed(passed_on.to(0)))
    strangers = Shares(sharing_of((0, 2)), leaves_of([100] * 4), 2, samples=False)
    passed_on = PassedOn([mine, mine, strangers.told()])
    with pytest.raises(FormatError):
        shares.learn(passed_on.packed(passed_on.to(0)))
    with pytest.raises(FormatError, match="which there isn't"):
        PassedOn([strangers.told()])
    assert id_of((0, 1)) != id_of((0, 2))


def test_ranks_that_remember_different_takes_do_not_share() -> None:
    """Where a rank divides by another take than the others, or by none, everybody is asked to hash everything."""
    told = Shares(sharing_of((0, 1)), leaves_of([100] * 4), 0, samples=False).told()
    for after in ("take 2", None):
        group = SimpleNamespace(global_ranks=(0, 1), world_size=2, rank=0)
        decisions = Decisions(cast(Any, group), "", cast(Any, None), cast(Any, None))
        messages = [pack_exchange(b"", b"", "take 1", told), pack_exchange(b"", b"", after, told)]
        assert [unpack(answer)[0] for answer in decisions.exchange(messages)] == [["all"], ["all"]]


def test_whoever_knows_something_else_notices() -> None:
    """What is told by what is new to the other side is never put together with something else without an error."""
    known = Random(0).randbytes(4096)
    other = known[:2000] + bytes([known[2000] ^ 1]) + known[2001:]
    assert unsqueeze(squeeze(known, known), known) == known
    with pytest.raises(FormatError, match="checksum"):
        unsqueeze(squeeze(known, known), other)


def test_a_chunk_table_is_told_by_what_is_new() -> None:
    """Of a table that rank 0 knows from the last take hardly anything is sent; rank 0 refuses what it does not know."""
    refs = [ref_of(digest_of(f"{number}"), 1000) for number in range(500)]
    tables = [pack_refs(refs), pack_refs([*refs[:250], ref_of(digest_of("new"), 1000, "1"), *refs[251:]])]
    numbers = [0] * len(FIGURES)
    sizes = []
    for last in (None, ("take 1", tables[0])):
        for table in tables:
            report = assembly.Report(table, b"", b"t", {}, b"")
            sizes.append(len(pack_report(numbers, 0, report, b"", [b"t"], last)))
    assert min(sizes[:2]) > 500 * 16
    assert sizes[2] < 200
    assert sizes[3] < 500
    decisions = Decisions(cast(Any, SimpleNamespace(global_ranks=(0,))), "", cast(Any, None), cast(Any, None))
    decisions._announcements = [b""]
    with pytest.raises(FormatError, match="did not name"):
        decisions.assemble([pack_report(numbers, 0, report, b"", [b"t"], ("take 1", tables[0]))], None)


# ------------------------------------------------------------------ sums


def decided_one_by_one(messages: Sequence[bytes]) -> list[Answer]:
    """The rule, without any shortcut."""
    every = [unpack_sums(message) for message in messages]
    answers = []
    for rank, sums in enumerate(every):
        duties, counts, conflicts = bytearray(), [], []
        for index, each in enumerate(sums):
            holders = [(other, its.digest) for other, them in enumerate(every) for its in them if its.key == each.key]
            first = holders[0]
            others = [other for other, digest in holders if digest != first[1]]
            everywhere = len(holders) == len(messages)
            counts.append(len(holders))
            if others and (each.holding is Holding.SHARDED or (each.holding is Holding.DECLARED and everywhere)):
                duties.append(Duty.CONFLICT)
                conflicts.append((index, others[0] if each.digest == first[1] else first[0]))
            elif each.holding is Holding.SHARDED:
                duties.append(Duty.OWN if rank == first[0] else Duty.ELSEWHERE)
            else:
                duties.append(Duty.REPLICATED if everywhere and not others else Duty.OWN)
        answers.append(Answer(bytes(duties), counts, conflicts))
    return answers


@given(
    st.lists(
        st.dictionaries(st.integers(0, 6), st.integers(0, 1), max_size=7).map(
            lambda held: pack_sums(
                LeafSum(key.to_bytes(8, "little"), bytes([content] * 16), Holding(key % 3))
                for key, content in sorted(held.items())
            )
        ),
        min_size=1,
        max_size=6,
    )
)
def test_equal_lists_are_decided_together(messages: list[bytes]) -> None:
    """Looking at ranks with the same message together comes to the same as looking at every rank."""
    answers = [Answer(each.duties, list(each.num_holders), each.conflicts) for each in decide(messages)]
    assert answers == decided_one_by_one(messages)
