"""The meter: encoding is chosen where it saves more time than it costs, and the choice does not swing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot.meter import MARGIN, MIN_PUTS, PROBE_EVERY, EncodingMeter

MIB = 1 << 20


def ask(meter: EncodingMeter, count: int = PROBE_EVERY, width: int = 4) -> int:
    """How often the meter wants the next chunks encoded."""
    return sum(meter.wants_encoding(width) for _ in range(count))


def feed(meter: EncodingMeter, count: int, *, encode: float, put: float, ratio: float = 0.5, width: int = 4) -> None:
    """So many chunks of 1 MiB, encoded in ``encode`` seconds, put at ``put`` seconds a MiB."""
    for _ in range(count):
        meter.record_encode(width, MIB, int(ratio * MIB), encode)
        meter.record_put(int(ratio * MIB), ratio * put)


def test_encoding_is_tried_first() -> None:
    """Nothing measured, or too little: encode."""
    meter = EncodingMeter()
    assert ask(meter) == PROBE_EVERY
    feed(meter, MIN_PUTS - 1, encode=1.0, put=0.001)
    assert ask(meter) == PROBE_EVERY


def test_slow_store_keeps_encoding() -> None:
    """Where a put takes longer than encoding saves, encoding goes on."""
    meter = EncodingMeter()
    feed(meter, 100, encode=0.001, put=0.1)
    assert ask(meter) == PROBE_EVERY


def test_fast_store_gets_raw_chunks_and_probes() -> None:
    """Where encoding is what the take waits for, chunks go raw, but for one in ``PROBE_EVERY``."""
    meter = EncodingMeter()
    feed(meter, MIN_PUTS, encode=0.1, put=0.001)
    assert ask(meter, 4 * PROBE_EVERY) in (4, 5)


def test_store_that_becomes_slow_is_noticed() -> None:
    """Raw puts that take long bring encoding back."""
    meter = EncodingMeter()
    feed(meter, MIN_PUTS, encode=0.1, put=0.001)
    assert ask(meter) <= 1
    for _ in range(50):
        meter.record_put(MIB, 1.0)
    assert ask(meter) == PROBE_EVERY


def test_widths_are_judged_apart() -> None:
    """What does not pay for one width may pay for another."""
    meter = EncodingMeter()
    feed(meter, 50, encode=0.02, put=0.03, ratio=0.2, width=2)
    feed(meter, 50, encode=0.02, put=0.03, ratio=0.95, width=4)
    assert ask(meter, width=2) == PROBE_EVERY
    assert ask(meter, width=4) <= 1


@given(put=st.floats(1 / MARGIN + 0.01, MARGIN - 0.01))
def test_near_the_break_even_nothing_changes(put: float) -> None:
    """Within the margin either choice stays as it is."""
    meter = EncodingMeter()
    feed(meter, 50, encode=0.5, put=put)
    assert ask(meter) == PROBE_EVERY
    feed(meter, 50, encode=10.0, put=0.5)
    assert ask(meter) <= 1
    feed(meter, 200, encode=0.5, put=put)
    assert ask(meter) <= 1


def test_choice_is_kept_for_some_puts() -> None:
    """Right after a switch the meter waits for ``MIN_PUTS`` more puts, whatever they say."""
    meter = EncodingMeter()
    feed(meter, MIN_PUTS, encode=0.1, put=0.001)
    assert ask(meter, 1) == 0
    for _ in range(MIN_PUTS - 1):
        meter.record_put(MIB, 10.0)
        assert ask(meter, 1) == 0
    meter.record_put(MIB, 10.0)
    assert ask(meter, 1) == 1
