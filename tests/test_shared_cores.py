"""Timing work that threads share cores for: each piece costs what it would cost alone."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from torchsnapshot.engine.shared_cores import SharedCores, Work


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Read it."""
        return self.now


@pytest.mark.parametrize(
    ("num_pieces", "num_cores", "share"), [(1, 2, 1), (2, 2, 1), (8, 2, 4), (3, 2, 1.5), (4, 1, 4)]
)
def test_work_that_shares_cores_counts_for_its_share(num_pieces: int, num_cores: int, share: float) -> None:
    """Pieces of work that are done at once take longer on the wall, and are counted as if each had been alone."""
    clock = Clock()
    cores = SharedCores(num_cores, clock)
    running = [cores.work() for _ in range(num_pieces)]
    found: list[Work] = []
    with ExitStack() as stack:
        found += [stack.enter_context(each) for each in running]
        clock.now += 6 * share
    assert [work.seconds for work in found] == [pytest.approx(6)] * num_pieces
    with cores.work() as alone:
        clock.now += 6
    assert alone.seconds == 6


def test_pieces_that_come_and_go() -> None:
    """Only the time that a piece has shared is divided: here the first is alone, then one of two, then alone again."""
    clock = Clock()
    cores = SharedCores(1, clock)
    with cores.work() as first:
        clock.now += 10
        with cores.work() as second:
            clock.now += 8
        clock.now += 10
    assert (first.seconds, second.seconds) == (24, 4)


def test_what_others_take_counts() -> None:
    """Where the application has the cores, the same work takes longer, and that is what it costs."""
    clock = Clock()
    cores = SharedCores(2, clock)
    with cores.work() as work:
        clock.now += 100
    assert work.seconds == 100


def test_without_a_number_of_cores_the_clock_counts() -> None:
    """Where what threads take from each other is taken from others too, it is not taken out."""
    clock = Clock()
    cores = SharedCores(None, clock)
    with cores.work() as one, cores.work() as other:
        clock.now += 10
    assert (one.seconds, other.seconds) == (10, 10)


def test_work_that_fails_is_no_longer_counted() -> None:
    """An error ends a piece of work like any other end."""
    clock = Clock()
    cores = SharedCores(1, clock)
    with pytest.raises(ValueError, match="x"), cores.work():
        raise ValueError("x")
    with cores.work() as work:
        clock.now += 5
    assert work.seconds == 5
