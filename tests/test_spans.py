"""Ranges of memory, in order, however many there are."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsnapshot.reading import spans
from torchsnapshot.reading.spans import SortedSpans

some_spans = st.tuples(st.sampled_from(["cpu", "cuda:0"]), st.integers(0, 300), st.integers(0, 300))


@given(st.lists(some_spans, unique=True))
@settings(max_examples=200, deadline=None)
def test_neighbours_are_those_of_a_sorted_list(items: list[tuple[str, int, int]]) -> None:
    """In whatever order they come, and however often a block is split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "_BLOCK_LENGTH", 3)
        found = SortedSpans()
        there: list[tuple[str, int, int]] = []
        for item in items:
            place = bisect_left(there, item)
            before = there[place - 1] if place else None
            assert found.around(item) == (before, there[place] if place < len(there) else None)
            found.add(item)
            there.insert(place, item)
