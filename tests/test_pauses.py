"""Pausing the cycle collector: for the length of a block, and never longer."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from torchsnapshot.pauses import collector_paused


@pytest.fixture(autouse=True)
def _collector_on() -> Iterator[None]:
    """Tests begin and end with the collector on."""
    gc.enable()
    yield
    assert gc.isenabled()


def test_pause_ends_with_the_block() -> None:
    """Pauses nest, and end with the outermost one, also with an error."""
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    pause = collector_paused()
    pause.__enter__()
    assert not gc.isenabled()
    assert not pause.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert gc.isenabled()


def test_pauses_do_not_prolong_each_other_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pauses of several threads overlap, the collector gets its turn: a long one is not prolonged by the next."""
    monkeypatch.setattr("torchsnapshot.pauses._MAX_SECONDS", 0.0)
    one, other = collector_paused(), collector_paused()
    one.__enter__()
    other.__enter__()
    assert not gc.isenabled()
    one.__exit__(None, None, None)
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
        other.__exit__(None, None, None)
        assert not gc.isenabled()


def test_what_is_off_stays_off() -> None:
    """An application that collects when it wants keeps its choice."""
    gc.disable()
    with collector_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()
    gc.enable()


def test_decorated_function_is_paused_each_time() -> None:
    """It may decorate a function."""

    @collector_paused()
    def is_on() -> bool:
        return gc.isenabled()

    assert [is_on(), is_on(), gc.isenabled()] == [False, False, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_collects() -> None:
    """A process that is forked during a pause begins with the collector on."""
    with collector_paused():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
