"""Memory is measured while a block runs."""

from __future__ import annotations

import builtins
from datetime import timedelta
from typing import Any

import pytest

from torchsnapshot import rss_profiler
from torchsnapshot.rss_profiler import measure_rss_deltas, resident_nbytes


def test_growth_is_seen() -> None:
    """The last figure shows memory that was filled in the block and is still held."""
    deltas: list[int] = []
    nbytes = 64 << 20
    with measure_rss_deltas(deltas, interval=timedelta(seconds=60)):
        held = bytearray(b"x") * nbytes
    assert len(held) == nbytes
    assert len(deltas) == 2
    assert deltas[-1] > nbytes // 2


def test_figures_are_kept_when_the_block_raises() -> None:
    """The thread ends and the figures stay when the block raises."""
    deltas: list[int] = []

    def fail() -> None:
        with measure_rss_deltas(deltas):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(deltas) >= 2


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without ``/proc`` gives the peak instead, in bytes."""
    real = builtins.open

    def no_proc(name: Any, *args: Any) -> Any:
        if name == "/proc/self/statm":
            raise FileNotFoundError(name)
        return real(name, *args)

    now = resident_nbytes()
    monkeypatch.setattr(rss_profiler, "open", no_proc, raising=False)
    assert resident_nbytes() >= now // 2
