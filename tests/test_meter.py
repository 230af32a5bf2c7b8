"""The meter: encoding is chosen where it saves more time than it costs, and the choice does not swing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchsnapshot.engine.meter import MARGIN, MIN_PUTS, PROBE_EVERY, EncodingMeter, forget, meter_of

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


# ------------------------------------------------------------------ deltas


def measured(put: float, *, in_background: bool = False, encode: float = 0.001, delta: float = 0.002) -> EncodingMeter:
    """A meter that knows what 1 MiB costs: to encode alone, to encode against a base, to put raw."""
    meter = EncodingMeter(in_background=in_background)
    for _ in range(MIN_PUTS):
        meter.record_encode(4, MIB, int(0.8 * MIB), encode)
        meter.record_encode(4, MIB, int(0.6 * MIB), delta, delta=True)
        meter.record_put(MIB, put)
    return meter


def test_delta_is_tried_first() -> None:
    """Nothing measured: a delta that is smaller is wanted."""
    assert EncodingMeter().wants_delta(4, 0.8, 0.6)


def test_delta_pays_for_what_it_costs_beyond_encoding() -> None:
    """It costs 1 ms a MiB more than encoding alone and saves a fifth of a put: it pays above 5 ms a MiB."""
    assert measured(put=0.0055).wants_delta(4, 0.8, 0.6)
    assert not measured(put=0.0045).wants_delta(4, 0.8, 0.6)
    assert measured(put=0.0045).wants_delta(4, 0.8, 0.5)


def test_delta_against_raw_pays_for_all_of_it() -> None:
    """Where chunks are stored raw, a delta costs its whole encoding and saves all that it is smaller than raw."""
    raw = measured(put=0.001, encode=0.01, delta=0.011)
    assert not raw.wants_encoding(4)
    assert not raw.wants_delta(4, 0.8, 0.2)
    for _ in range(100):
        raw.record_put(MIB, 0.02)
    assert raw.wants_delta(4, 0.8, 0.2)


def test_base_is_read_where_its_gain_pays_for_it() -> None:
    """What a read costs is found out; then it must cost less than the puts that it saves, but for probes."""
    meter = measured(put=0.01)
    assert meter.wants_base(0.0)
    meter.record_base_read(MIB, 0.004)
    assert meter.wants_base(0.5)
    assert not meter.wants_base(0.3)
    assert not meter.wants_base(None)
    meter.record_base_read(20 * MIB, 0.0)
    assert meter.wants_base(None)
    meter.record_base_read(MIB, 100.0)
    assert sum(meter.wants_base(0.0) for _ in range(2 * PROBE_EVERY)) == 2


def test_copy_is_kept_where_puts_are_slow() -> None:
    """A copy into memory is worth it where a put costs many times what the copy does."""
    assert not EncodingMeter().wants_copy(None)
    slow, fast = measured(put=0.02), measured(put=0.001)
    assert slow.wants_copy(None)
    assert not fast.wants_copy(None)
    assert fast.wants_copy(10.0)
    slow.record_copy(MIB, 0.01)
    assert not slow.wants_copy(None)


def test_background_takes_encode_more_readily() -> None:
    """Where nobody waits, encoding counts half; it still doesn't count for nothing."""
    for put, waiting, nobody in ((0.04, True, True), (0.02, False, True), (0.001, False, False)):
        meters = [EncodingMeter(in_background=background) for background in (False, True)]
        for meter in meters:
            feed(meter, MIN_PUTS, encode=0.015, put=put)
        assert [ask(meter, 1) == 1 for meter in meters] == [waiting, nobody]
        deltas = [measured(put / 10, in_background=background) for background in (False, True)]
        assert deltas[1].wants_delta(4, 0.8, 0.6) or not deltas[0].wants_delta(4, 0.8, 0.6)


# ------------------------------------------------------------------ what a process remembers


def test_local_stores_begin_raw() -> None:
    """On a disk nothing is encoded but probes, seldom and seldomer, until one was measured; then the rule decides."""
    meter = EncodingMeter(begins_raw=True)
    assert [number for number in range(1, 20) if meter.wants_encoding(4)] == [1, 2, 4, 8, 16]
    for _ in range(MIN_PUTS):
        meter.record_put(MIB, 0.1)
    assert ask(meter, 1) == 0
    meter.record_encode(4, MIB, MIB // 2, 0.001)
    assert ask(meter) == PROBE_EVERY


def test_what_was_measured_lasts_until_the_next_take() -> None:
    """Takes onto one disk share a meter; other disks and background takes have their own."""
    forget()
    mine = meter_of("disk", is_local=True, in_background=False)
    assert meter_of("disk", is_local=True, in_background=False) is mine
    assert meter_of("disk", is_local=True, in_background=True) is not mine
    assert meter_of("other", is_local=True, in_background=False) is not mine
    feed(mine, MIN_PUTS, encode=0.001, put=0.1)
    assert ask(meter_of("disk", is_local=True, in_background=False)) == PROBE_EVERY
    forget()
    assert meter_of("disk", is_local=True, in_background=False) is not mine
