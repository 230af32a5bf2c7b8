"""Dense tensors and arrays as bytes: every dtype, shape and layout, in every direction, bit for bit."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_states import bits, entry_of, restore_tensor, same_tensor

from torchsnapshot.errors import FormatError, MismatchError, UnsupportedValueError
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.layout import contiguous_offset, inverse, may_overlap, permutation_of
from torchsnapshot.state import dtypes
from torchsnapshot.state.flatten import TensorLeaf
from torchsnapshot.state.tensors import (
    allocate,
    bump_version,
    can_write_in_place,
    convert_into,
    host_view,
    is_array,
    memory_span,
    name_of,
    target_view,
    why_inconvertible,
    why_unreadable,
    wrap,
    wrapper_of,
)

DENSE = sorted(name for name, entry in dtypes.DTYPES.items() if not entry.quantized)
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (0, 3), (3, 0, 2), (5,), (3, 4), (2, 3, 1, 4), (1, 1, 7)]


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A contiguous tensor of random bits, which for floats includes nan payloads, infinities and -0.0."""
    itemsize = dtypes.DTYPES[name].itemsize
    numel = int(torch.Size(shape).numel())
    raw = torch.randint(0, 2 if name == "bool" else 256, (numel * itemsize,), dtype=torch.uint8)
    return raw.view(dtypes.torch_dtype(name)).view(shape) if numel else allocate(name, shape)


def layouts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same elements in every layout that a strided tensor can have."""
    raw = tensor.view(dtypes.RAW_TYPES[tensor.element_size()])
    dims = tensor.dim()
    found = {"plain": raw, "expanded": raw.expand(2, *raw.shape)}
    if dims:
        found["reversed"] = raw.permute(*range(dims - 1, -1, -1))
        wide = torch.stack([raw, raw.flip(0)], dim=-1)
        found["every second"] = wide[..., 0]
        found["rolled"] = raw.permute(*range(1, dims), 0)
        found["tail"] = torch.cat([raw, raw])[raw.shape[0] :]
    if dims == 4:
        found["channels_last"] = raw.contiguous(memory_format=torch.channels_last)
    return {kind: each.view(tensor.dtype) for kind, each in found.items()}


def test_the_table_holds_every_dtype_of_torch() -> None:
    """Each with the size that torch's own memory has."""
    of_torch = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert {dtypes.torch_dtype(name) for name in dtypes.DTYPES} == of_torch
    for name, entry in dtypes.DTYPES.items():
        assert dtypes.name_of(entry.torch_dtype) == name
        if not entry.quantized:
            assert dtypes.nbytes_of(name, (3, 5)) == allocate(name, (3, 5)).untyped_storage().nbytes()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", sorted(name for name, entry in dtypes.DTYPES.items() if entry.quantized))
def test_sub_byte_sizes_are_stated(name: str) -> None:
    """Several elements share a byte, and the last byte may be filled in part."""
    for numel in (0, 1, 3, 4, 5, 16):
        tensor = torch._empty_affine_quantized([numel], scale=1.0, zero_point=0, dtype=dtypes.torch_dtype(name))
        assert dtypes.DTYPES[name].nbytes(numel) == tensor.untyped_storage().nbytes()


def test_an_unknown_dtype_is_an_error_of_its_own() -> None:
    """It names the dtype, and concerns only the tensor that has it."""
    assert not dtypes.is_known("float3_new")
    for call in (dtypes.torch_dtype, dtypes.itemsize_of, lambda name: allocate(name, (1,))):
        with pytest.raises(FormatError, match="float3_new"):
            call("float3_new")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_every_dtype_and_shape_in_every_layout_comes_back(name: str, shape: tuple[int, ...]) -> None:
    """Staged whole, and scattered into new memory of the same layout."""
    for tensor in layouts_of(random_tensor(name, shape)).values():
        entry = entry_of(TensorLeaf(tensor, "tensor", False))
        back = restore_tensor(entry)
        assert same_tensor(back, tensor)
        assert entry.nbytes == tensor.numel() * tensor.element_size()
        if entry.permutation is not None:
            # the stride of a dimension of size 1 means nothing
            strides = zip(tensor.shape, back.stride(), tensor.stride(), strict=True)
            assert all(mine == theirs for size, mine, theirs in strides if size > 1)


@given(st.permutations(range(4)), st.data())
def test_any_box_of_any_layout_is_staged_and_scattered(order: list[int], data: st.DataObject) -> None:
    """A box holds the same elements whichever way its bytes travel, and its neighbours stay as they are."""
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(4))
    step = data.draw(st.sampled_from([1, 2]))
    base = torch.arange(int(torch.Size(shape).numel()) * step, dtype=torch.int32)[::step].view(shape) + 1
    wide = torch.zeros(*shape[:-1], shape[-1] * step, dtype=torch.int32)
    wide[..., ::step] = base
    tensor = wide[..., ::step].permute(*order)
    view = host_view(tensor)
    starts = tuple(data.draw(st.integers(0, size - 1)) for size in view.memory_shape)
    box = Box(starts, tuple(data.draw(st.integers(1, n - a)) for a, n in zip(starts, view.memory_shape, strict=True)))
    memory = tensor if view.permutation is None else tensor.permute(view.permutation)
    inside = memory[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))]
    staged = bytearray(box.numel * 4)
    view.stage(box, memoryview(staged))
    assert bytes(staged) == bits(inside)
    expected = tensor.clone()
    blank = torch.zeros_like(tensor)
    filled = target_view(blank, view.permutation)
    filled.scatter(box, memoryview(staged))
    assert int((blank != 0).sum()) == box.numel
    filled.scatter(box, memoryview(bytes(len(staged))))
    assert not blank.any()
    for piece in grid.cut(
        grid.whole(view.memory_shape), grid.choose_cell(view.memory_shape, view.memory_shape, 4, 40), 4
    ):
        buffer = bytearray(piece.nbytes)
        view.stage(piece.box, memoryview(buffer))
        assert view.live(piece.offset, piece.nbytes) in (None, buffer)
        filled.scatter(piece.box, memoryview(buffer))
    assert torch.equal(blank, expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_conjugate_and_negative_views_are_resolved(dtype: torch.dtype) -> None:
    """What is stored is what the tensor says, not the bits that lie under a pending operation."""
    raw = torch.randn(3, 4, 2)
    base = torch.view_as_complex(raw.half() if dtype is torch.complex32 else raw).to(dtype)
    lazy = base.conj()
    assert lazy.is_conj()
    view = host_view(lazy)
    assert view.live(0, 8) is None
    assert view.read() == bits(base.conj_physical())
    imaginary = base.to(torch.complex64).conj().imag if dtype is torch.complex32 else lazy.imag
    assert imaginary.is_neg()
    assert host_view(imaginary).read() == bits(imaginary.clone())
    assert not can_write_in_place(lazy)
    assert not can_write_in_place(imaginary)


def test_dense_permuted_tensors_are_shown_in_memory_order() -> None:
    """channels_last and transposed tensors are read where they lie, and the permutation says how."""
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    view = host_view(image)
    assert (view.shape, view.permutation, view.memory_shape) == ((2, 3, 4, 5), (0, 2, 3, 1), (2, 4, 5, 3))
    live = view.live(0, view.nbytes)
    assert live is not None
    assert bytes(live) == bits(image.permute(0, 2, 3, 1))
    transposed = host_view(torch.randn(3, 4).t())
    assert (transposed.shape, transposed.permutation, transposed.memory_shape) == ((4, 3), (1, 0), (3, 4))
    assert host_view(torch.randn(3, 4)[:, 1:]).live(0, 4) is None


def test_a_target_of_another_layout_is_written_in_the_stored_order() -> None:
    """The bytes of a channels_last tensor land on the right elements of a plain one, and the reverse."""
    image = torch.randn(2, 3, 4, 5)
    for source, target in (
        (image.contiguous(memory_format=torch.channels_last), torch.zeros(2, 3, 4, 5)),
        (image, torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
    ):
        entry = entry_of(TensorLeaf(source, "tensor", False))
        assert restore_tensor(entry, target) is target
        assert torch.equal(target, image)


def test_a_live_view_is_the_tensors_memory() -> None:
    """It costs no copy, writes through, and keeps the memory when the tensor is gone."""
    tensor = torch.arange(8, dtype=torch.int32)
    view = host_view(tensor)
    live = view.live(8, 8)
    assert live is not None
    assert (live.format, live.itemsize, bytes(live)) == ("B", 1, bits(tensor[2:4]))
    live[:4] = (77).to_bytes(4, "little")
    assert tensor[2] == 77
    gone = weakref.ref(tensor.untyped_storage())
    del tensor, view
    gc.collect()
    junk = [torch.zeros(8, dtype=torch.int32) for _ in range(50)]
    assert int.from_bytes(live[:4], "little") == 77
    assert gone is not None
    del junk
    with pytest.raises(ValueError, match="bytes 4 to 40"):
        host_view(torch.zeros(8, dtype=torch.int32)).live(4, 36)


def test_boxes_and_buffers_that_do_not_fit_are_refused() -> None:
    """A wrong size or place is an error before any byte moves."""
    view = host_view(torch.zeros(4, 4))
    for box, nbytes in ((Box((0, 0), (1, 4)), 15), (Box((3, 0), (2, 4)), 32), (Box((-1, 0), (1, 4)), 16)):
        for move in (view.stage, view.scatter):
            with pytest.raises(ValueError):
                move(box, memoryview(bytearray(nbytes)))
    with pytest.raises(ValueError):
        view.stage(Box((0,), (4,)), memoryview(bytearray(16)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_read_is_named() -> None:
    """Each reason says what the tensor is."""

    class Own(torch.Tensor):
        pass

    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    for tensor, reason in (
        (torch.zeros(1).as_subclass(Own), "subclass"),
        (torch.empty(1, device="meta"), "meta device"),
        (torch.nested.as_nested_tensor([torch.zeros(1)]), "nested"),
        (torch.zeros(2, 2).to_mkldnn(), "layout"),
        (freed, "freed"),
    ):
        assert reason in str(why_unreadable(tensor))
        assert not can_write_in_place(tensor)
    assert why_unreadable(torch.nn.Parameter(torch.zeros(1))) is None
    with pytest.raises(UnsupportedValueError, match="freed"):
        host_view(freed).read()


def test_tensors_inside_a_running_transform_are_refused() -> None:
    """Their memory holds every sample of a batch."""
    reasons: list[str | None] = []
    torch.vmap(lambda row: reasons.append(why_unreadable(row)) or row)(torch.zeros(2, 3))
    assert "function transform" in str(reasons[0])


def test_targets_that_overlap_or_are_inference_tensors_are_not_written() -> None:
    """A raw write there would land on other elements, or break what inference mode promises."""
    base = torch.zeros(4, 4)
    with torch.inference_mode():
        inference = torch.zeros(2)
    for tensor in (base[0].expand(3, 4), base.as_strided((3, 3), (1, 1)), inference):
        assert not can_write_in_place(tensor)
    for tensor in (base, base.t(), base[:, ::2], base[0].expand(1, 4), torch.zeros(0, 3), torch.zeros(())):
        assert can_write_in_place(tensor)
    assert can_write_in_place(torch.nn.Parameter(base))
    assert not can_write_in_place(object())


def test_raw_writes_are_seen_by_autograd() -> None:
    """A backward through a value that a restore has overwritten fails instead of giving wrong gradients."""
    weight = torch.nn.Parameter(torch.ones(3))
    product = (weight * weight).sum()
    version = weight._version
    restore_tensor(entry_of(TensorLeaf(torch.zeros(3), "tensor", False)), weight)
    assert weight._version > version
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    bump_version(numpy.zeros(1))


def test_restored_tensors_get_their_wrapper() -> None:
    """Parameters, buffers and tensors that require a gradient come back as such."""
    for original in (
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
        torch.nn.Buffer(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        torch.ones(2, requires_grad=True) * 2,
        torch.ones(()),
    ):
        plain = restore_tensor(entry_of(TensorLeaf(original, "tensor", False)))
        back = wrap(plain, wrapper_of(original), original.requires_grad)
        assert type(back) is type(original)
        assert wrapper_of(back) == wrapper_of(original)
        assert back.requires_grad == original.requires_grad
        assert back.is_leaf
    assert not wrap(torch.ones(1, dtype=torch.int64), "tensor", True).requires_grad


ARRAY_DTYPES = [
    *("bool", "i1", "u8", "f2", ">f4", "c16", "M8[ns]", "m8[D]", "S3", "U2", ">U2", "V5", "g"),
    numpy.dtype([("a", "i4"), ("b", ">f8", (2,))]),
    numpy.dtype([("a", "i1"), ("b", "f8")], align=True),
    numpy.dtype({"names": ["x"], "formats": ["i2"], "offsets": [3], "itemsize": 9}),
]


@pytest.mark.parametrize("dtype", ARRAY_DTYPES, ids=str)
def test_arrays_of_every_dtype_come_back(dtype: Any) -> None:
    """Also structured ones and dates, in any layout, as numpy arrays of the same dtype."""
    dtype = numpy.dtype(dtype)
    for shape in ((), (0, 2), (3,), (2, 3, 4)):
        raw = numpy.arange(max(1, numpy.prod(shape, dtype=int)) * dtype.itemsize, dtype="u1") % 2
        array = (
            raw.view(dtype)[: int(numpy.prod(shape))].reshape(shape) if dtype.itemsize else numpy.zeros(shape, dtype)
        )
        for each in (array, array.T, array[::-1] if shape else array, array[..., ::2] if shape else array):
            assert is_array(each)
            back = restore_tensor(entry_of(TensorLeaf(each, "numpy", False)))
            assert type(back) is numpy.ndarray
            assert (back.dtype, back.shape) == (each.dtype, each.shape)
            if dtype.names is None:
                assert back.tobytes() == each.tobytes()
            else:
                assert (back == each).all()
            target = numpy.zeros_like(array)
            if target.shape == each.shape:
                assert restore_tensor(entry_of(TensorLeaf(each, "numpy", False)), target) is target
                assert target.tobytes() == each.tobytes() if dtype.names is None else (target == each).all()


def test_arrays_and_tensors_of_one_dtype_share_a_name() -> None:
    """Equal content has equal bytes, and one can be restored into the other's place."""
    assert name_of(numpy.zeros(1, "f4")) == name_of(torch.zeros(1)) == "float32"
    assert name_of(numpy.zeros(1, ">f4")) == "numpy:>f4"
    assert isinstance(allocate("float32", (2,), as_array=True), numpy.ndarray)
    assert isinstance(allocate("float32", (2,)), torch.Tensor)


def test_arrays_of_objects_are_no_leaves() -> None:
    """Nor are subclasses whose meaning is more than their bytes; memory maps are arrays."""
    assert not is_array(numpy.array([None]))
    assert not is_array(numpy.array([(1, None)], dtype=[("a", "i1"), ("b", "O")]))
    assert not is_array(numpy.ma.array([1]))
    assert not is_array([1])
    with pytest.raises(UnsupportedValueError):
        host_view(numpy.array([None]))


def test_read_only_arrays_are_never_written() -> None:
    """Their live views are read-only too."""
    array = numpy.zeros(3)
    array.flags.writeable = False
    assert not can_write_in_place(array)
    live = host_view(array).live(0, 24)
    assert live is not None
    assert live.readonly
    with pytest.raises(ValueError, match="read-only"):
        host_view(array).scatter(Box((0,), (3,)), memoryview(bytearray(24)))
    assert not can_write_in_place(numpy.broadcast_to(numpy.zeros(1), (3,)))
    assert can_write_in_place(numpy.zeros((3, 3))[::-1, ::2])


def test_arrays_without_numpy_become_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never imported numpy restores what torch can hold, and the rest names the cure."""
    entry = entry_of(TensorLeaf(numpy.arange(3.0), "numpy", False))
    dates = entry_of(TensorLeaf(numpy.zeros(2, "M8[s]"), "numpy", False))
    monkeypatch.delitem(sys.modules, "numpy")
    assert torch.equal(restore_tensor(entry), torch.arange(3.0, dtype=torch.float64))
    with pytest.raises(FormatError, match="import numpy"):
        restore_tensor(dates)


@pytest.mark.parametrize(
    "text",
    [
        "O",
        "numpy",
        "{",
        '{"names": ["a"]}',
        '["f4"]',
        "[[[[",
        '{"names":["a"],"formats":["O"],"offsets":[0],"itemsize":8,"aligned":false}',
        "f4,f4,",
        "",
    ],
)
def test_hostile_numpy_dtypes_are_refused(text: str) -> None:
    """No description makes an array of objects, nor any other error."""
    try:
        found = dtypes.numpy_dtype("numpy:" + text)
    except FormatError:
        return
    assert not found.hasobject


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.bfloat16, torch.int32, torch.complex64, torch.bool])
def test_values_convert_to_the_targets_dtype(target_dtype: torch.dtype) -> None:
    """As torch's own ``copy_`` does, and the target sees the change."""
    source = torch.tensor([0.0, 1.5, -2.0])
    target = torch.zeros(3, dtype=target_dtype)
    version = target._version
    assert why_inconvertible("float32", target) is None
    convert_into(target, source)
    assert torch.equal(target, source.to(target_dtype))
    assert target._version > version
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    convert_into(parameter, source)
    assert torch.equal(parameter.detach(), source.half())


def test_conversions_that_lose_or_do_not_exist_are_errors() -> None:
    """Imaginary parts are not dropped in silence, and torch's missing kernels are named."""
    assert "imaginary" in str(why_inconvertible("complex64", torch.zeros(1)))
    assert why_inconvertible("uint4", torch.zeros(1)) is not None
    assert "layout" in str(why_inconvertible("float64", torch.sparse_coo_tensor(size=(2, 2), check_invariants=True)))
    assert why_inconvertible("float32", torch.zeros(1)) is None
    assert why_inconvertible("numpy:<M8[s]", torch.zeros(1)) is not None
    assert why_inconvertible("float32", numpy.zeros(1, "i4")) is None
    assert why_inconvertible("bfloat16", numpy.zeros(1)) is not None
    assert why_inconvertible("complex64", numpy.zeros(1)) is not None
    array = numpy.zeros(2, "i4")
    convert_into(array, torch.tensor([1.0, 2.0]))
    assert array.tolist() == [1, 2]
    tensor = torch.zeros(2)
    convert_into(tensor, numpy.array([3, 4]))
    assert tensor.tolist() == [3, 4]
    with pytest.raises(MismatchError):
        convert_into(torch.zeros(2), torch.zeros(3))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_and_float_convert_both_ways() -> None:
    """By the quantized side's own parameters."""
    values = torch.tensor([0.0, 0.5, 1.0])
    quantized = torch.quantize_per_tensor(torch.zeros(3), 0.5, 0, torch.quint8)
    convert_into(quantized, values)
    assert torch.equal(quantized.dequantize(), values)
    target = torch.zeros(3)
    convert_into(target, quantized)
    assert torch.equal(target, values)


def test_memory_spans_are_the_bytes_that_a_tensor_reaches() -> None:
    """They tell which targets share memory."""
    base = torch.zeros(4, 4)
    start = base.data_ptr()
    assert memory_span(base) == (start, start + 64)
    assert memory_span(base[1:, 1:]) == (start + 20, start + 64)
    assert memory_span(base.t()) == (start, start + 64)
    assert memory_span(torch.zeros(0, 3)) == (0, 0)
    array = numpy.zeros(4)
    first = array.__array_interface__["data"][0]
    assert memory_span(array[::-1]) == (first, first + 32)
    assert memory_span(numpy.zeros((0,))) == (0, 0)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=4))
def test_overlaps_are_never_missed(dims: list[tuple[int, int]]) -> None:
    """The quick test may be too careful, but where it sees no overlap every element has its own address."""
    shape, strides = [size for size, _ in dims], [stride for _, stride in dims]
    addresses = [0]
    for size, stride in dims:
        addresses = [address + index * stride for address in addresses for index in range(size)]
    if not may_overlap(shape, strides):
        assert len(set(addresses)) == len(addresses)
    order = permutation_of(shape, strides)
    if order is not None:
        assert sorted(addresses) == list(range(len(addresses)))
        assert not may_overlap(shape, strides)
        assert [order[place] for place in inverse(order)] == list(range(len(shape)))


@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 4)] * 3))
def test_every_dense_order_is_recognized(order: list[int], shape: tuple[int, int, int]) -> None:
    """Also where dimensions of size 1 make several orders equal."""
    tensor = torch.zeros(shape).permute(*order)
    view = host_view(tensor)
    assert view.live(0, view.nbytes) is not None
    assert contiguous_offset(grid.whole(view.memory_shape), view.memory_shape) == 0
