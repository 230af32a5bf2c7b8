"""Ranges of memory in their order, of which there may be very many.

What doesn't live here: whose memory it is (``targets``).

Invariant: a span costs much the same whether there are ten or a million: one long list would have to move half of its
items for each that is put in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

Span = tuple[str, int, int]
"""A device, and the addresses of the first byte and of the one behind the last."""

_BLOCK_LENGTH = 1024


class SortedSpans:
    """Spans in order, in blocks. No span may be there twice."""

    def __init__(self) -> None:
        self._blocks: list[list[Span]] = [[]]
        self._firsts: list[Span] = [("", 0, 0)]

    def around(self, span: Span) -> tuple[Span | None, Span | None]:
        """The spans next to this one, which is not there: before it and after it; None where there is none."""
        number = self._block_of(span)
        block = self._blocks[number]
        place = bisect_left(block, span)
        before = block[place - 1] if place else self._blocks[number - 1][-1] if number else None
        if place < len(block):
            return before, block[place]
        return before, self._blocks[number + 1][0] if number + 1 < len(self._blocks) else None

    def add(self, span: Span) -> None:
        """Put a span in."""
        number = self._block_of(span)
        block = self._blocks[number]
        insort(block, span)
        if len(block) > _BLOCK_LENGTH:
            middle = len(block) // 2
            self._blocks[number : number + 1] = [block[:middle], block[middle:]]
            self._firsts.insert(number + 1, block[middle])

    def _block_of(self, span: Span) -> int:
        # what comes before every first is in the first block
        return max(0, bisect_right(self._firsts, span) - 1)
