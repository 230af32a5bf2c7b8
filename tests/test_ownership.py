"""Who writes what among ranks: every content once, by a rank that holds it, balanced by bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot.errors import FormatError
from torchsnapshot.ranks.ownership import Duty, assign, pack_contents, pack_duty, unpack_contents, unpack_duty

contents = st.integers(0, 30).map(lambda number: (number.to_bytes(16, "little"), 1 + number * 1000))
announcements = st.lists(st.lists(contents, unique=True, max_size=20), min_size=1, max_size=9)


@given(announcements)
def test_every_content_has_one_owner_that_holds_it(lists: list[list[tuple[bytes, int]]]) -> None:
    """Each announced content is written by exactly one of the ranks that announced it."""
    duties = assign([pack_contents(each) for each in lists])
    writers: dict[tuple[bytes, int], list[int]] = {}
    for rank, (each, duty) in enumerate(zip(lists, duties, strict=True)):
        for content, writes in zip(each, duty.writes, strict=True):
            if writes:
                writers.setdefault(content, []).append(rank)

    assert {content for each in lists for content in each} == writers.keys()
    assert all(len(ranks) == 1 for ranks in writers.values())


@given(announcements)
def test_shared_says_that_another_rank_holds_it(lists: list[list[tuple[bytes, int]]]) -> None:
    """A content is called shared exactly where two ranks or more announced it."""
    duties = assign([pack_contents(each) for each in lists])
    for each, duty in zip(lists, duties, strict=True):
        for content, is_shared in zip(each, duty.is_shared, strict=True):
            assert is_shared == (sum(content in other for other in lists) > 1)


def test_replicas_share_the_work() -> None:
    """Ranks that hold the same contents write about equal bytes each."""
    same = pack_contents((number.to_bytes(16, "big"), 4 << 20) for number in range(64))
    duties = assign([same] * 4)
    assert [sum(duty.writes) for duty in duties] == [16] * 4


def test_who_has_more_of_its_own_writes_less_of_what_is_shared() -> None:
    """What a rank writes alone counts towards its share."""
    shared = [(number.to_bytes(16, "big"), 1 << 20) for number in range(8)]
    own = [((100 + number).to_bytes(16, "big"), 1 << 20) for number in range(8)]
    duties = assign([pack_contents(shared + own), pack_contents(shared)])
    assert sum(duties[0].writes) == 8
    assert sum(duties[1].writes) == 8


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_answers_survive_packing(flags: list[tuple[bool, bool]]) -> None:
    """A duty that is packed and unpacked is the same."""
    duty = Duty([writes for writes, _ in flags], [is_shared for _, is_shared in flags])
    assert unpack_duty(pack_duty(duty), len(flags)) == duty


def test_messages_that_are_cut_off_are_refused() -> None:
    """An announcement or answer of a wrong length is an error."""
    with pytest.raises(FormatError):
        unpack_contents(b"x" * 21)
    with pytest.raises(FormatError):
        unpack_duty(b"x", 9)
