"""The codec: every chunk comes back bit for bit, hostile ones are refused, and realistic data shrinks as promised."""

from __future__ import annotations

import os
import random
import struct
import sys
import threading

import pytest
import torch
import zstandard
from folders import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from read_format import decode_chunk

from torchsnapshot.chunks import encoded, planes
from torchsnapshot.chunks.codecs import (
    WORTHWHILE,
    Effort,
    Scheme,
    borrow_scratch,
    choose,
    decode_into,
    encode,
    encode_bytes,
    is_varied,
)
from torchsnapshot.chunks.encoded import FLAG_LEVELLED, METHOD_RAW, METHOD_ZSTD, Lane
from torchsnapshot.engine.buffers import map_pages
from torchsnapshot.errors import CorruptionError, FormatError, NewerFormatError

TILE = 32256


def memory_of(data: bytes | torch.Tensor) -> memoryview:
    """Writable bytes with this content."""
    if isinstance(data, torch.Tensor):
        data = bytes(data.contiguous().flatten().view(torch.uint8).numpy())
    return memoryview(bytearray(data))


def decoded(stored: bytes, nbytes: int, base: memoryview | None = None) -> bytes:
    """What an encoded chunk decodes to."""
    out = memoryview(bytearray(nbytes))
    decode_into(memoryview(bytearray(stored)), out, base)
    return bytes(out)


def encode_with(raw: memoryview, scheme: Scheme, base: memoryview | None = None) -> bytes:
    """Encode as told, with room enough for anything."""
    out = memoryview(bytearray(2 * raw.nbytes + 4096))
    with borrow_scratch() as scratch:
        size = encode(raw, scheme, out, scratch, base)
    assert size is not None
    return bytes(out[:size])


def levels_of(num_rows: int, row_length: int, rotation: int, seed: int = 0) -> planes.Levels:
    """Levels that have nothing to do with what they are subtracted from."""
    numbers = memoryview(bytearray(random.Random(seed).randbytes(2 * (row_length + num_rows))))
    return planes.Levels(row_length, rotation, numbers)


def moments(
    num_rows: int, row_length: int, dtype: torch.dtype = torch.float32, *, signed: bool = False
) -> torch.Tensor:
    """Numbers whose size is the product of a factor for their row, one for their column, and noise."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, 1, generator=generator).mul(2).exp()
    columns = torch.randn(row_length, generator=generator).mul(2).exp()
    noise = torch.randn(num_rows, row_length, generator=generator)
    found = 1e-3 * rows * columns * (noise if signed else noise.square())
    return found.to(dtype)


def content(kind: str, nbytes: int, seed: int) -> bytes:
    """Bytes of a kind."""
    source = random.Random(seed)
    if kind == "zeros":
        return bytes(nbytes)
    if kind == "noise":
        return source.randbytes(nbytes)
    if kind == "counter":
        return b"".join(struct.pack("<q", i) for i in range(nbytes // 8 + 1))[:nbytes]
    if kind == "sparse":
        data = bytearray(nbytes)
        for _ in range(min(nbytes, 20)):
            data[source.randrange(nbytes)] = source.randrange(256)
        return bytes(data)
    floats = b"".join(struct.pack("<f", source.gauss(0, 0.02)) for _ in range(nbytes // 4 + 1))
    return floats[:nbytes]


sizes = st.one_of(
    st.integers(1, 5000),
    st.sampled_from([8 * TILE - 8, 8 * TILE, 8 * TILE + 8, 16 * TILE + 1, 2 * TILE + 2, 300_000]),
)
kinds = st.sampled_from(["zeros", "noise", "counter", "sparse", "floats"])


def all_lane_sets(width: int) -> list[tuple[Lane, ...]]:
    """Ways to cut an element: every plane coded, none, a mixture, one lane of everything."""
    coded = tuple(Lane(start, 1, METHOD_ZSTD) for start in range(width))
    plain = tuple(Lane(start, 1, METHOD_RAW) for start in range(width))
    sets = [coded, plain, (Lane(0, width, METHOD_ZSTD, strong=True),), (Lane(0, width, METHOD_RAW),)]
    if width > 2:
        half = width // 2
        sets.append((Lane(half, half, METHOD_ZSTD), Lane(0, half, METHOD_RAW)))
    return sets


class TestRoundTrip:
    @given(kind=kinds, nbytes=sizes, width=st.sampled_from([1, 2, 4, 8]), effort=st.sampled_from(list(Effort)))
    @settings(max_examples=60, deadline=None)
    def test_whatever_is_encoded_comes_back(self, kind: str, nbytes: int, width: int, effort: Effort) -> None:
        """Chosen by the codec itself, any content of any size decodes to the same bytes and is never larger."""
        raw = memory_of(content(kind, nbytes, seed=nbytes))
        stored = encode_bytes(raw, width, effort)
        if stored is not None:
            assert len(stored) <= WORTHWHILE * nbytes
            assert decoded(stored, nbytes) == raw

    @given(
        kind=kinds,
        num_elements=st.one_of(st.integers(1, 600), st.sampled_from([TILE - 1, TILE, TILE + 1])),
        width=st.sampled_from([1, 2, 4, 8]),
        rotated=st.booleans(),
        against=st.sampled_from(["nothing", "xor", "difference"]),
        choice=st.integers(0, 4),
    )
    @settings(max_examples=80, deadline=None)
    def test_every_scheme_comes_back(
        self, kind: str, num_elements: int, width: int, rotated: bool, against: str, choice: int
    ) -> None:
        """Lanes of any cut, rotated or not, alone, XORed or subtracted, also if they gain nothing."""
        nbytes = num_elements * width
        raw = memory_of(content(kind, nbytes, seed=1))
        base = None if against == "nothing" else memory_of(content("noise", nbytes, seed=2))
        lanes = all_lane_sets(width)
        difference = against == "difference"
        rotated = rotated and width > 1 and not difference
        scheme = Scheme(width, rotated, lanes[choice % len(lanes)], 1.0, difference)
        stored = encode_with(raw, scheme, base)
        assert decoded(stored, nbytes, base) == raw

    @given(
        kind=kinds,
        num_rows=st.one_of(st.integers(1, 40), st.sampled_from([TILE - 1, TILE + 1])),
        row_length=st.one_of(st.integers(1, 600), st.sampled_from([TILE // 2 + 1, TILE, TILE + 1, 2 * TILE + 7])),
        width=st.sampled_from([2, 4, 8]),
        rotation=st.integers(0, encoded.MAX_ROTATION),
        choice=st.integers(0, 4),
    )
    @settings(max_examples=80, deadline=None)
    def test_levels_come_back(
        self, kind: str, num_rows: int, row_length: int, width: int, rotation: int, choice: int
    ) -> None:
        """Any levels of rows of any length, longer than a tile too, and any rotation."""
        num_rows = min(num_rows, 200_000 // row_length + 1)
        raw = memory_of(content(kind, num_rows * row_length * width, seed=1))
        lanes = all_lane_sets(width)
        levels = levels_of(num_rows, row_length, rotation)
        scheme = Scheme(width, False, lanes[choice % len(lanes)], 1.0, levels=levels)
        stored = encode_with(raw, scheme)
        header = encoded.read_header(memoryview(stored))
        assert (header.flags, header.row_length, header.rotation) == (FLAG_LEVELLED, row_length, rotation)
        assert stored[header.levels] == levels.numbers
        assert decoded(stored, raw.nbytes) == raw

    @given(
        kind=kinds,
        num_rows=st.integers(1, 300),
        row_length=st.integers(0, 300),
        width=st.sampled_from([1, 2, 4, 8]),
        hint=st.one_of(st.none(), st.integers(0, 1 << 33)),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_row_length_is_taken_as_a_hint(
        self, kind: str, num_rows: int, row_length: int, width: int, hint: int | None
    ) -> None:
        """A row length that fits or that does not: the bytes come back."""
        raw = memory_of(content(kind, num_rows * max(row_length, 1) * width, seed=2))
        row_length = row_length if hint is None else hint
        stored = encode_bytes(raw, width, Effort.SMALLEST, row_length=row_length)
        if stored is not None:
            assert decoded(stored, raw.nbytes) == raw

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
    @pytest.mark.parametrize("shape", [(1000, 64), (50, 3001), (7, TILE), (TILE, 32), (2, TILE + 1), (TILE + 1, 32)])
    def test_numbers_of_any_size_are_levelled(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        """Zeros, infinities, NaNs and numbers of any size in between them come back, whatever the shape."""
        tensor = moments(*shape, signed=True)
        tensor[1, ::7] = 0
        tensor[:, 3] *= 1e30
        tensor[:, 4] = float("inf")
        tensor[0] = float("nan")
        raw = memory_of(tensor.nan_to_num().mul(1e6).to(dtype) if dtype is torch.int32 else tensor.to(dtype))
        stored = encode_bytes(raw, dtype.itemsize, Effort.SMALLEST, row_length=shape[1])
        assert stored is not None
        assert decoded(stored, raw.nbytes) == raw

    @pytest.mark.parametrize("shift", [0, 1, 2, 4])
    def test_memory_may_lie_anywhere_and_be_read_only(self, shift: int) -> None:
        """Unaligned and read-only inputs, and unaligned outputs, give the same bytes as aligned ones."""
        data = content("floats", 40_000, seed=3)
        raw = memory_of(bytes(shift) + data)[shift:]
        stored = encode_bytes(raw, 4)
        assert stored is not None
        assert stored == encode_bytes(memoryview(data), 4)
        out = memoryview(bytearray(shift + len(data)))[shift:]
        decode_into(memoryview(bytes(shift) + stored)[shift:], out)
        assert out == data
        decode_into(memory_of(bytes(shift) + stored)[shift:], out)
        assert out == data

    @pytest.mark.parametrize("shift", [0, 1, 2, 4])
    def test_levels_may_lie_anywhere_and_be_read_only(self, shift: int) -> None:
        """The same for levels, which are read where they lie."""
        data = bytes(memory_of(moments(150, 100)))
        stored = encode_bytes(memory_of(bytes(shift) + data)[shift:], 4, Effort.SMALLEST, row_length=100)
        assert stored is not None
        assert stored == encode_bytes(memoryview(data), 4, Effort.SMALLEST, row_length=100)
        assert encoded.read_header(memoryview(stored)).row_length == 100
        out = memoryview(bytearray(shift + len(data)))[shift:]
        for memory in (memoryview(bytes(shift) + stored), memory_of(bytes(shift) + stored)):
            out[:] = bytes(len(data))
            decode_into(memory[shift:], out)
            assert out == data

    @pytest.mark.parametrize("width", [1, 2, 4, 8])
    def test_difference_goes_round_at_the_ends(self, width: int) -> None:
        """The smallest and the greatest numbers, subtracted from one another, come back."""
        ends = [0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1]
        pairs = [(a, b) for a in ends for b in ends]
        raw = memory_of(b"".join(a.to_bytes(width, "little") for a, _ in pairs))
        base = memory_of(b"".join(b.to_bytes(width, "little") for _, b in pairs))
        scheme = Scheme(width, False, (Lane(0, width, METHOD_ZSTD),), 1.0, difference=True)
        assert decoded(encode_with(raw, scheme, base), raw.nbytes, base) == raw

    @pytest.mark.parametrize("difference", [False, True])
    def test_delta_is_decoded_in_place_of_its_base(self, difference: bool) -> None:
        """The base may stand in the very memory that the chunk is decoded into."""
        base = memory_of(content("floats", 80_000, seed=4))
        raw = memory_of(base)
        raw[100:108] = b"changed!"
        scheme = Scheme(4, False, (Lane(0, 4, METHOD_ZSTD),), 1.0, difference)
        stored = encode_with(raw, scheme, base)
        assert len(stored) < 200
        decode_into(memoryview(bytearray(stored)), base, base)
        assert base == raw

    def test_threads_do_not_disturb_one_another(self) -> None:
        """Each thread encodes with a scratch of its own."""
        chunks = [memory_of(content("floats", 100_000, seed)) for seed in range(4)]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(5):
                stored = encode_bytes(chunks[index], 4)
                if stored is None or decoded(stored, 100_000) != chunks[index]:
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_sub_byte_tail_is_coded_as_bytes(self) -> None:
        """A size that is no whole number of elements is coded with width 1; an impossible width is refused."""
        raw = memory_of(content("zeros", 10_001, seed=0))
        stored = encode_bytes(raw, 8)
        assert stored is not None
        assert encoded.read_header(memoryview(stored)).width == 1
        with pytest.raises(ValueError, match="width 3"):
            encode_bytes(raw, 3)

    def test_too_small_room_gives_none(self) -> None:
        """A chunk that does not fit into the memory it is given is not encoded, and nothing behind is touched."""
        raw = memory_of(content("floats", 100_000, seed=1))
        room = memoryview(bytearray(b"\xaa" * 100_100))
        with borrow_scratch() as scratch:
            scheme = choose(raw, 4, Effort.AUTO, scratch)
            for nbytes in (100, 50_000, 75_100, 80_000):
                assert encode(raw, scheme, room[:nbytes], scratch) is None
                assert bytes(room[nbytes:]) == b"\xaa" * (room.nbytes - nbytes)

    def test_too_small_room_for_levels_gives_none(self) -> None:
        """The same where already the levels do not fit in."""
        raw = memory_of(moments(250, 100))
        room = memoryview(bytearray(b"\xaa" * 100_100))
        with borrow_scratch() as scratch:
            scheme = choose(raw, 4, Effort.SMALLEST, scratch, row_length=100)
            assert scheme.levels is not None
            for nbytes in (0, 50, 60, 700, 50_000, 70_000):
                assert encode(raw, scheme, room[:nbytes], scratch) is None
                assert bytes(room[nbytes:]) == b"\xaa" * (room.nbytes - nbytes)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_child_makes_its_own_scratch(self) -> None:
        """A forked child does not touch scratch memory of its parent, which is not mapped there."""
        raw = memory_of(content("floats", 100_000, seed=1))
        expected = encode_bytes(raw, 4)
        child = os.fork()
        if child == 0:
            os._exit(0 if encode_bytes(raw, 4) == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestRatios:
    """Fractions of the raw size on data like that of training; the bounds are loose, the benchmark prints figures."""

    def fraction(self, tensor: torch.Tensor, width: int, effort: Effort = Effort.AUTO) -> float:
        """Stored size by raw size."""
        raw = memory_of(tensor)
        stored = encode_bytes(raw, width, effort)
        return 1.0 if stored is None else len(stored) / raw.nbytes

    def weights(self, num_elements: int = 1 << 18) -> torch.Tensor:
        """Normal values of a usual scale."""
        return 0.02 * torch.randn(num_elements, generator=torch.Generator().manual_seed(0))

    def test_bf16_weights(self) -> None:
        """bf16 weights shrink to two thirds, a little further with "smallest"."""
        weights = self.weights().bfloat16()
        assert self.fraction(weights, 2) < 0.69
        assert self.fraction(weights, 2, Effort.SMALLEST) < min(0.675, self.fraction(weights, 2))

    def test_fp32_weights_and_moments(self) -> None:
        """fp32 weights and optimizer state lose most of their top byte."""
        weights = self.weights()
        assert self.fraction(weights, 4) < 0.85
        assert self.fraction(weights.square() * 1e-3, 4) < 0.88

    @pytest.mark.parametrize(
        ("dtype", "signed", "share"),
        [
            (torch.float32, False, 0.98),
            (torch.float32, True, 0.98),
            (torch.bfloat16, False, 0.94),
            (torch.bfloat16, True, 0.95),
            (torch.float64, False, 0.98),
        ],
    )
    def test_levels_of_rows_and_columns(self, dtype: torch.dtype, signed: bool, share: float) -> None:
        """About a product of two factors is smaller where the row length is known; "auto" does not look at it."""
        raw = memory_of(moments(700, 400, dtype, signed=signed))
        width = dtype.itemsize
        alone = encode_bytes(raw, width, Effort.SMALLEST)
        stored = encode_bytes(raw, width, Effort.SMALLEST, row_length=400)
        assert alone is not None
        assert stored is not None
        assert encoded.read_header(memoryview(stored)).flags == FLAG_LEVELLED
        assert len(stored) < share * len(alone)
        assert encode_bytes(raw, width, row_length=400) == encode_bytes(raw, width)

    def test_weights_are_not_levelled(self) -> None:
        """Where rows and columns are all alike, levels would only cost their own bytes."""
        raw = memory_of(self.weights())
        assert encode_bytes(raw, 4, Effort.SMALLEST, row_length=512) == encode_bytes(raw, 4, Effort.SMALLEST)

    def test_deltas_are_not_levelled(self) -> None:
        """Against a base, the row length says nothing."""
        raw, base = memory_of(moments(700, 400)), memory_of(moments(700, 400) * 1.001)
        assert encode_bytes(raw, 4, Effort.SMALLEST, base, 400) == encode_bytes(raw, 4, Effort.SMALLEST, base)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_weights_are_varied(self, dtype: torch.dtype) -> None:
        """A glance tells that floats of a network do not collapse."""
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            weights = torch.randn(1 << 16, dtype=torch.float64, generator=generator).mul(0.02)
            assert is_varied(memory_of(weights.to(dtype)))

    @pytest.mark.parametrize("kind", ["zeros", "ids", "constant rows", "one in five"])
    def test_what_collapses_is_not_varied(self, kind: str) -> None:
        """A glance does not keep what shrinks to a quarter from being looked at."""
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(1 << 16, (1 << 16,), generator=generator)
            floats = torch.randn(1 << 16, generator=generator)
            found = {
                "zeros": torch.zeros(1 << 16),
                "ids": ids,
                "constant rows": floats[:256, None].expand(256, 1024),
                "one in five": floats * (torch.rand(1 << 16, generator=generator) < 0.2),
            }[kind]
            assert not is_varied(memory_of(found))

    @pytest.mark.parametrize("effort", Effort)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [0, 1])
    def test_constants_collapse(self, effort: Effort, dtype: torch.dtype, value: int) -> None:
        """Zeros and ones come down to next to nothing at every effort."""
        constant = torch.full((1 << 18,), value, dtype=dtype)
        assert self.fraction(constant, constant.element_size(), effort) < 0.002

    def test_integers_shrink(self) -> None:
        """Token ids in 64 bits lose the bytes that they do not use."""
        tokens = torch.randint(0, 50_000, (1 << 16,), generator=torch.Generator().manual_seed(0))
        assert self.fraction(tokens, 8) < 0.3
        assert self.fraction(torch.arange(1 << 16), 8, Effort.SMALLEST) < 0.02

    def test_noise_is_left_alone(self) -> None:
        """What does not compress is said to be not worth it."""
        noise = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        assert encode_bytes(memory_of(noise), 4, Effort.SMALLEST) is None

    def test_difference_is_smaller_than_xor(self) -> None:
        """Weights that moved a little: the difference is what is chosen, and it is clearly the smaller one."""
        base = self.weights()
        moved = base + 1e-3 * base * torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
        for dtype, share in ((torch.float32, 0.98), (torch.bfloat16, 0.92)):
            raw, against = memory_of(moved.to(dtype)), memory_of(base.to(dtype))
            width = dtype.itemsize
            with borrow_scratch() as scratch:
                for effort in Effort:
                    scheme = choose(raw, width, effort, scratch, against)
                    assert scheme.difference
            lanes = tuple(Lane(start, 1, METHOD_ZSTD) for start in range(width))
            sizes = [
                len(encode_with(raw, Scheme(width, False, lanes, 1.0, difference), against))
                for difference in (True, False)
            ]
            assert sizes[0] < share * sizes[1]

    def test_delta_of_untouched_rows(self) -> None:
        """1 % of changed rows against a base costs about 1 % of the bytes."""
        base = self.weights().view(1024, 256)
        changed = base.clone()
        changed[::100] += 0.001
        stored = encode_bytes(memory_of(changed), 4, Effort.SMALLEST, memory_of(base))
        assert stored is not None
        assert len(stored) < 0.015 * base.numel() * 4


def a_chunk() -> bytes:
    """A small encoded chunk: fp32, top plane coded."""
    stored = encode_bytes(memory_of(content("floats", 40_000, seed=5)), 4)
    assert stored is not None
    return stored


def a_levelled_chunk() -> bytes:
    """A small one of fp32: two lanes coded, 101 levels of columns and 99 of rows, four bytes of padding."""
    stored = encode_bytes(memory_of(moments(99, 101)), 4, Effort.SMALLEST, row_length=101)
    assert stored is not None
    header = encoded.read_header(memoryview(stored))
    assert (header.flags, header.row_length, len(header.lanes)) == (FLAG_LEVELLED, 101, 3)
    assert 0 < header.nbytes - header.levels.stop < 8 or header.nbytes == header.levels.stop
    return stored


class TestHostile:
    @given(
        place=st.integers(0, 30_000), value=st.integers(0, 255), cut=st.integers(0, 60_000), add=st.binary(max_size=9)
    )
    @settings(max_examples=150, deadline=None)
    def test_damage_to_levels_never_escapes(self, place: int, value: int, cut: int, add: bytes) -> None:
        """The same for a chunk with levels, half of the time in its header."""
        stored = bytearray(a_levelled_chunk())
        stored[place // 2 % len(stored) if place % 2 else place // 2 % 60] = value
        stored = stored[: len(stored) - cut] if cut % 3 == 0 else stored + add
        try:
            assert len(decoded(bytes(stored), 4 * 99 * 101)) == 4 * 99 * 101
        except (FormatError, CorruptionError):
            pass

    @given(
        place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 30_000), add=st.binary(max_size=9)
    )
    @settings(max_examples=150, deadline=None)
    def test_damage_never_escapes(self, place: int, value: int, cut: int, add: bytes) -> None:
        """Changed, cut or extended bytes give an error of ours or other bytes of the right size; nothing else."""
        stored = bytearray(a_chunk())
        stored[place % len(stored)] = value
        stored = stored[: len(stored) - cut] if cut % 3 == 0 else stored + add
        try:
            assert len(decoded(bytes(stored), 40_000)) == 40_000
        except (FormatError, CorruptionError):
            pass

    @given(data=st.binary(max_size=200))
    @settings(max_examples=100, deadline=None)
    def test_arbitrary_header_is_refused(self, data: bytes) -> None:
        """Bytes behind a good magic, version and codec are still checked."""
        with pytest.raises((FormatError, CorruptionError)):
            decoded(encoded.MAGIC + b"\x01\x01" + data, 40_000)

    @pytest.mark.parametrize(
        ("offset", "value", "error"),
        [
            (0, 0x88, FormatError),  # magic
            (4, 2, NewerFormatError),  # version
            (5, 2, NewerFormatError),  # codec
            (6, 3, FormatError),  # width
            (7, 16, NewerFormatError),  # flags
            (7, 2, FormatError),  # needs a base
            (7, 4, FormatError),
            (7, 5, FormatError),  # a difference is not rotated
            (7, 6, FormatError),  # ... nor XORed
            (7, 9, FormatError),  # nor is what is levelled
            (7, 10, FormatError),
            (7, 12, FormatError),
            (7, 8, FormatError),  # where levels should be are other bytes
            (8, 0x41, FormatError),  # raw size
            (15, 0x41, FormatError),  # ... beyond all bounds
            (16, 0, FormatError),  # lanes
            (16, 5, FormatError),
            (17, 1, FormatError),  # reserved
            (24, 1, FormatError),  # lanes overlap
            (25, 3, FormatError),  # lane size
            (26, 7, NewerFormatError),  # method
            (27, 1, FormatError),  # reserved
            (28, 1, FormatError),  # stored size
        ],
    )
    def test_each_field_is_checked(self, offset: int, value: int, error: type[Exception]) -> None:
        """Every field of the header has its error."""
        stored = bytearray(a_chunk())
        stored[offset] = value
        with pytest.raises(error) as caught:
            decoded(bytes(stored), 40_000)
        assert type(caught.value) is error

    @pytest.mark.parametrize(
        ("offset", "value"),
        [
            (0, bytes(4)),  # row length
            (0, b"\x66\0\0\0"),  # no whole rows
            (0, b"\x0b\0\0\0"),  # whole rows, but another number of levels
            (0, b"\xff\xff\xff\xff"),
            (4, b"\x08"),  # rotation
            (5, b"\1"),  # reserved
            (7, b"\1"),
        ],
    )
    def test_each_field_of_levels_is_checked(self, offset: int, value: bytes) -> None:
        """Every field before the levels has its error."""
        stored = bytearray(a_levelled_chunk())
        start = encoded.header_nbytes(stored[16]) + offset
        stored[start : start + len(value)] = value
        with pytest.raises(FormatError):
            decoded(bytes(stored), 4 * 99 * 101)

    def test_what_follows_the_levels_is_zero(self) -> None:
        """Padding is checked, and that the chunk reaches so far."""
        scheme = Scheme(4, False, (Lane(0, 4, METHOD_RAW),), 1.0, levels=levels_of(3, 10, 0))
        stored = bytearray(encode_with(memory_of(bytes(120)), scheme))
        header = encoded.read_header(memoryview(stored))
        assert (header.levels.stop, header.nbytes) == (66, 72)
        for place in range(66, 72):
            stored[place] = 1
            with pytest.raises(FormatError, match="zeros"):
                decoded(bytes(stored), 120)
            stored[place] = 0
        for end in (32, 39, 41, 71):
            with pytest.raises(FormatError, match="ends within"):
                decoded(bytes(stored[:end]), 120)

    def test_bytes_have_no_levels(self) -> None:
        """Levels of one-byte elements, or with a base, are refused."""
        scheme = Scheme(2, False, (Lane(0, 2, METHOD_RAW),), 1.0, levels=levels_of(3, 10, 0))
        stored = bytearray(encode_with(memory_of(bytes(60)), scheme))
        with pytest.raises(FormatError, match="base"):
            decoded(bytes(stored), 60, memory_of(bytes(60)))
        stored[6] = 1
        with pytest.raises(FormatError, match="not for bytes"):
            decoded(bytes(stored), 60)

    def test_bomb_is_refused_before_it_unfolds(self) -> None:
        """A frame of more bytes than its lane, or of an unknown number, is refused by its header."""
        lane = Lane(0, 1, METHOD_ZSTD)
        known = zstandard.ZstdCompressor().compress(bytes(1 << 24))
        unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
        for frame in (known, unknown):
            stored = bytearray(encoded.header_nbytes(1)) + frame
            encoded.pack_header(memoryview(stored), 1, 0, 1000, [lane], [len(frame)])
            with pytest.raises(CorruptionError, match="stands for a lane of 1000"):
                decoded(bytes(stored), 1000)

    def test_wrong_expectations_are_refused(self) -> None:
        """Another raw size, a base of another size, a base that is not needed: each is an error."""
        stored = a_chunk()
        with pytest.raises(FormatError, match="expected"):
            decoded(stored, 40_004)
        with pytest.raises(FormatError, match="base"):
            decoded(stored, 40_000, memory_of(bytes(40_000)))
        delta = encode_bytes(memory_of(bytes(40_000)), 4, base=memory_of(bytes(40_000)))
        assert delta is not None
        with pytest.raises(FormatError, match="base"):
            decoded(delta, 40_000)
        with pytest.raises(FormatError, match="base"):
            decoded(delta, 40_000, memory_of(bytes(39_996)))

    def test_read_only_output_is_the_callers_mistake(self) -> None:
        """Decoding into read-only memory is a ``ValueError``."""
        with pytest.raises(ValueError, match="read-only"):
            decode_into(memoryview(a_chunk()), memoryview(bytes(40_000)))


def test_layout_is_what_the_docstring_says() -> None:
    """A reader that knows only the documented layout decodes what was written."""
    raw = memory_of(content("floats", 4000, seed=6))
    base = memory_of(content("floats", 4000, seed=7))
    lanes = (Lane(3, 1, METHOD_ZSTD), Lane(2, 1, METHOD_RAW), Lane(0, 2, METHOD_RAW))
    stored = encode_with(raw, Scheme(4, True, lanes, 1.0), base)
    assert stored[:8] == b"\x89tsc\x01\x01\x04\x03"
    raw_nbytes, num_lanes = struct.unpack_from("<QB7x", stored, 8)
    assert raw_nbytes == 4000
    end = 24 + 8 * num_lanes
    numbers = [0] * 1000
    for index in range(num_lanes):
        start, size, method, nbytes = struct.unpack_from("<BBBxI", stored, 24 + 8 * index)
        data = stored[end : end + nbytes]
        end += nbytes
        data = zstandard.ZstdDecompressor().decompress(data) if method else data
        for place in range(1000):
            numbers[place] |= int.from_bytes(data[place * size : (place + 1) * size], "little") << (8 * start)
    assert end == len(stored)
    bases = struct.unpack("<1000I", base)
    result = [((number >> 1) | ((number & 1) << 31)) ^ other for number, other in zip(numbers, bases, strict=True)]
    assert struct.pack("<1000I", *result) == raw


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("rotation", [0, 1, 4, 7])
def test_layout_of_levels_is_what_the_docstring_says(width: int, rotation: int) -> None:
    """A reader that knows only the documented layout decodes what was written, as does the one of the page."""
    raw = memory_of(content("floats", 40 * 25 * width, seed=6))
    lanes = (Lane(width - 1, 1, METHOD_ZSTD), *(Lane(start, 1, METHOD_RAW) for start in range(width - 1)))
    stored = encode_with(raw, Scheme(width, False, lanes, 1.0, levels=levels_of(25, 40, rotation, seed=8)))
    assert stored[:8] == b"\x89tsc\x01\x01" + bytes([width, 8])
    start = 24 + 8 * width
    assert struct.unpack_from("<IB3x", stored, start) == (40, rotation)
    levels = struct.unpack_from("<65H", stored, start + 8)
    end = start + 8 + 130 + 6 - (start + 8 + 130 + 6) % 8
    numbers = [0] * 1000
    for index in range(width):
        first, _, method, nbytes = struct.unpack_from("<BBBxI", stored, 24 + 8 * index)
        data = stored[end : end + nbytes]
        end += nbytes
        data = zstandard.ZstdDecompressor().decompress(data) if method else data
        for place in range(1000):
            numbers[place] |= data[place] << (8 * first)
    assert end == len(stored)
    bits = 8 * width
    for place, number in enumerate(numbers):
        turned = (number >> rotation) | (number << (bits - rotation)) % (1 << bits)
        level = levels[place % 40] + levels[40 + place // 40]
        numbers[place] = (turned + (level << (bits - 16))) % (1 << bits)
    assert b"".join(number.to_bytes(width, "little") for number in numbers) == raw
    assert decode_chunk(stored, None) == raw


@pytest.mark.parametrize("row_length", [0, 1024, 32])
def test_torch_starts_no_threads_of_its_own(row_length: int) -> None:
    """Encoding and decoding a large chunk in a fresh thread leaves the number of threads as it was."""
    raw = map_pages(4 << 20)
    torch.frombuffer(raw, dtype=torch.float32).copy_(moments(1024, 1024).flatten())
    grown: list[int] = []

    def work() -> None:
        before = len(os.listdir("/proc/self/task"))
        stored = encode_bytes(raw, 4, Effort.SMALLEST, row_length=row_length)
        assert stored is not None
        decoded(stored, raw.nbytes)
        grown.append(len(os.listdir("/proc/self/task")) - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert grown == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_encoding_starts_no_threads() -> None:
    """However many threads torch may use, a chunk is encoded and decoded, with levels too, by the one that asked."""
    code = """
import ctypes, os, torch
from torchsnapshot.chunks.codecs import Effort, decode_into, encode_bytes
from torchsnapshot.chunks.encoded import read_header
torch.manual_seed(0)
grid = (torch.randn(8192, 1).exp() * torch.randn(1, 128).exp()).square() * (0.5 + torch.rand(8192, 128))
raw = memoryview(bytearray(ctypes.string_at(grid.data_ptr(), grid.nbytes)))
torch.set_num_threads(8)
before = len(os.listdir("/proc/self/task"))
stored = memoryview(encode_bytes(raw, 4, Effort.SMALLEST, row_length=128))
assert read_header(stored).row_length == 128
back = memoryview(bytearray(raw.nbytes))
decode_into(stored, back)
assert back == raw
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = run_python(code)
    assert done.stdout.strip() == "0", done.stderr
