"""What a process keeps of bases: the right ones, within the budget, never freed while somebody reads them."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsnapshot.chunks import bases
from torchsnapshot.chunks.bases import Bases, base_of, bases_of
from torchsnapshot.store.envelope import ChunkRef, Form

MIB = 1 << 20
TAKE = "0123456789abcdef01234567"


def chunk(number: int, nbytes: int = MIB, stored: int | None = None) -> ChunkRef:
    """A chunk that stands alone."""
    digest = number.to_bytes(16, "big")
    form = Form.RAW if stored is None else Form.ENCODED
    stored = nbytes if stored is None else stored
    return ChunkRef(digest, nbytes, f"{digest.hex()}-{TAKE}-0", stored, 0, stored, form, 1)


def content(number: int, nbytes: int = MIB) -> memoryview:
    """Bytes that tell the chunk's number."""
    return memoryview(bytearray([number % 251]) * nbytes)


def held(kept: Bases, ref: ChunkRef) -> bytes | None:
    """The first byte of the copy of a chunk."""
    with kept.borrow(ref) as raw:
        return None if raw is None else bytes(raw[:1])


class TestBaseOf:
    def test_what_stands_alone_is_a_base_itself(self) -> None:
        """Raw and encoded chunks that fill their blobs are."""
        for ref in (chunk(1), chunk(2, stored=1000)):
            assert base_of(ref) is ref

    def test_base_of_a_delta_is_taken(self) -> None:
        """A delta against a delta would be two deep: its own base is the base."""
        base = chunk(1)
        delta = ChunkRef(b"d" * 16, MIB, "k", 10, 0, 10, Form.DELTA, 4, base)
        assert base_of(delta) is base

    def test_deeper_chains_give_no_base(self) -> None:
        """What another version has written two deep isn't built upon."""
        first = ChunkRef(b"d" * 16, MIB, "k", 10, 0, 10, Form.DELTA, 4, chunk(1))
        second = ChunkRef(b"e" * 16, MIB, "l", 10, 0, 10, Form.DELTA, 4, first)
        assert base_of(second) is None

    def test_members_of_packs_are_no_bases(self) -> None:
        """Neither one among others nor one that is alone in its pack."""
        key = f"{bytes(16).hex()}-{TAKE}-0.p"
        assert base_of(ChunkRef(bytes(16), 100, key, 300, 100, 100)) is None
        assert base_of(ChunkRef(bytes(16), 100, key, 300, 0, 100)) is None
        assert base_of(ChunkRef(bytes(16), 100, key, 100, 0, 100)) is None
        assert base_of(None) is None


class TestCopies:
    def test_copy_is_one(self) -> None:
        """What was kept is given back, whatever becomes of the memory that it was copied from."""
        kept = Bases()
        kept.begin_take(10 * MIB)
        raw = content(7)
        assert kept.keep(chunk(1), raw)
        raw[:1] = b"\0"
        assert held(kept, chunk(1)) == bytes([7])
        assert held(kept, chunk(2)) is None

    def test_no_budget_keeps_nothing(self) -> None:
        """Before the first take, and with a budget of 0, there are no copies."""
        kept = Bases()
        assert not kept.keep(chunk(1), content(1))
        kept.begin_take(0)
        assert not kept.keep(chunk(1), content(1))
        assert kept.held_nbytes == 0

    def test_large_state_keeps_what_it_has(self) -> None:
        """What two takes in a row use is not pushed out by what does not fit in."""
        kept = Bases()
        for _ in range(3):
            kept.begin_take(3 * MIB)
            for number in range(10):
                with kept.borrow(chunk(number)) as raw:
                    if raw is None:
                        kept.keep(chunk(number), content(number))
            assert [held(kept, chunk(number)) for number in range(4)] == [b"\0", b"\1", b"\2", None]

    def test_what_no_recent_take_used_makes_room(self) -> None:
        """A copy that two takes did not need goes when another one wants its place, the oldest first."""
        kept = Bases()
        kept.begin_take(2 * MIB)
        kept.keep(chunk(1), content(1))
        kept.keep(chunk(2), content(2))
        kept.begin_take(2 * MIB)
        held(kept, chunk(1))
        assert not kept.keep(chunk(3), content(3))
        kept.begin_take(2 * MIB)
        assert kept.keep(chunk(3), content(3))
        assert [held(kept, chunk(number)) for number in (1, 2, 3)] == [b"\1", None, b"\3"]

    def test_smaller_budget_frees_at_once(self) -> None:
        """A take that is given less memory begins by giving back."""
        kept = Bases()
        kept.begin_take(4 * MIB)
        for number in range(4):
            kept.keep(chunk(number), content(number))
        kept.begin_take(2 * MIB)
        assert kept.held_nbytes == 2 * MIB
        assert [held(kept, chunk(number)) is None for number in range(4)] == [True, True, False, False]

    def test_renewed_base_is_freed(self) -> None:
        """A base that another chunk replaces takes no memory any more, and forgets its deltas."""
        kept = Bases()
        kept.begin_take(4 * MIB)
        kept.keep(chunk(1), content(1))
        kept.record_delta(chunk(1), MIB // 2)
        kept.replace(chunk(1))
        assert kept.held_nbytes == 0
        assert kept.average(chunk(1)) == 1

    def test_copy_in_use_is_freed_by_its_last_user(self) -> None:
        """Readers of a copy that is dropped meanwhile read on; then its memory is given back."""
        kept = Bases()
        kept.begin_take(4 * MIB)
        kept.keep(chunk(1), content(1))
        with kept.borrow(chunk(1)) as first:
            with kept.borrow(chunk(1)):
                kept.replace(chunk(1))
                assert held(kept, chunk(1)) is None
            assert kept.held_nbytes == MIB
            assert first is not None
            assert bytes(first) == bytes(content(1))
        assert kept.held_nbytes == 0

    @given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["keep", "use", "replace", "take"])), max_size=60))
    @settings(max_examples=50, deadline=None)
    def test_budget_holds(self, steps: list[tuple[int, str]]) -> None:
        """Whatever happens in which order, the copies stay within the budget and hold what they should."""
        kept = Bases()
        kept.begin_take(20_000)
        for number, step in steps:
            ref = chunk(number, 4096)
            if step == "keep":
                kept.keep(ref, content(number, 4096))
            elif step == "replace":
                kept.replace(ref)
            elif step == "take":
                kept.begin_take(4096 * number)
            assert held(kept, ref) in (None, bytes([number]))
            assert 0 <= kept.held_nbytes <= 4096 * 12

    def test_threads(self) -> None:
        """Many threads keep, read and drop; nobody reads another chunk's bytes and nothing is lost."""
        kept = Bases()
        kept.begin_take(4 * MIB)
        wrong: list[int] = []

        def work(seed: int) -> None:
            for step in range(200):
                number = (seed * 7 + step) % 8
                kept.keep(chunk(number, 65536), content(number, 65536))
                with kept.borrow(chunk(number, 65536)) as raw:
                    if raw is not None and bytes(raw) != bytes(content(number, 65536)):
                        wrong.append(number)
                if step % 3 == 0:
                    kept.replace(chunk(number, 65536))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        for number in range(8):
            kept.replace(chunk(number, 65536))
        assert kept.held_nbytes == 0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
    def test_child_holds_nothing(self) -> None:
        """A forked child begins without copies: their memory is not mapped there."""
        parent = bases_of("a store")
        parent.begin_take(4 * MIB)
        parent.keep(chunk(1), content(1))
        child = os.fork()
        if child == 0:
            os._exit(0 if bases_of("a store") is not parent and bases_of("a store").held_nbytes == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert held(parent, chunk(1)) == b"\1"
        bases.forget()


def test_one_store_at_a_time_has_copies() -> None:
    """The budget is the process's: turning to another store frees the copies for the first."""
    first = bases_of("first")
    first.begin_take(4 * MIB)
    first.keep(chunk(1), content(1))
    first.record_gain("w", 0.5)
    assert bases_of("first") is first
    assert first.held_nbytes == MIB
    assert bases_of("second") is not first
    assert first.held_nbytes == 0
    assert bases_of("first").gain("w") == 0.5
    bases.forget()


class TestLearning:
    def test_average_of_a_base_and_its_deltas(self) -> None:
        """The average counts the base and every delta once; without a memory it is the base alone."""
        kept = Bases()
        base = chunk(1, 1000, stored=800)
        assert kept.average(base) == 0.8
        kept.record_delta(base, 200)
        assert kept.average(base) == 0.5
        kept.record_delta(base, 500)
        assert kept.average(base) == 0.5

    def test_gain_follows_what_samples_show(self) -> None:
        """The first sample counts at once, later ones move the value half of the way."""
        kept = Bases()
        assert kept.gain("w") is None
        kept.record_gain("w", 0.4)
        assert kept.gain("w") == pytest.approx(0.4)
        kept.record_gain("w", 0.0)
        assert kept.gain("w") == pytest.approx(0.2)

    def test_gain_of_the_same_name_stands_in(self) -> None:
        """Of a place without samples, the last name's are believed; its own count as soon as there are any."""
        kept = Bases()
        kept.record_gain("model/layers.0.weight", 0.4)
        kept.record_gain("optim/state/0/exp_avg", 0.0)
        assert kept.gain("model/layers.1.weight") == kept.gain("other/weight") == pytest.approx(0.4)
        assert kept.gain("optim/state/1/exp_avg") == 0.0
        assert kept.gain("model/layers.1.bias") is None
        kept.record_gain("list/0", 0.3)
        assert kept.gain("list/0") == pytest.approx(0.3)
        assert kept.gain("another/0") is None
        kept.record_gain("model/layers.1.weight", 0.1)
        assert kept.gain("model/layers.1.weight") == pytest.approx(0.1)
        assert kept.gain("model/layers.0.weight") == pytest.approx(0.4)
