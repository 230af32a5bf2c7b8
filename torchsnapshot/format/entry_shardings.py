"""The bytes of sharded tensors in the *entries* section: meshes and shardings, with total validation on reading.

What lives here: the layout of these two kinds of record (docs/format.md has it field by field). What doesn't: the
section that holds them (``entry_section``), the rules of sharding (``geometry.placements``).

Each mesh and each sharded tensor stands in the section once, whatever number of ranks and trees it is part of. What is
there for every region of every tensor are two u32, in columns: a job of a thousand ranks has a million of them.

Invariants of what was read: the sharding is one of that shape, and the columns have as many lines as it has regions.
Boxes are not made while reading, so a few bytes of placements cannot cost more than a few bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from math import prod

from torchsnapshot.errors import NewerFormatError
from torchsnapshot.format.entry_bytes import MAX_DIM, MAX_DIMS, MAX_NAME_NCHARS, MAX_NUMEL
from torchsnapshot.format.entry_kinds import WRAPPERS, ShardedTensorEntry
from torchsnapshot.geometry.grid import Box
from torchsnapshot.geometry.placements import Placement, Sharding
from torchsnapshot.store import bounded

Mesh = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape, and global ranks in C order."""

MAX_RANK = 999_999_999
MAX_SPLIT_FACTOR = 1 << 20

_NUM_FIELDS = 12


def pack_mesh(mesh: Mesh) -> bytes:
    """One mesh.

    Raises:
        ValueError: a rank that no manifest can hold.
    """
    shape, ranks = mesh
    if not ranks or min(ranks) < 0 or max(ranks) > MAX_RANK:
        raise ValueError(f"a mesh of ranks outside 0 to {MAX_RANK}")
    return bounded.pack([shape, array("I", ranks).tobytes()])


def unpack_mesh(reader: bounded.FieldReader) -> Mesh:
    """The inverse of ``pack_mesh``."""
    if reader.array("mesh") != 2:
        reader.fail("a mesh is [shape, ranks]")
    shape = reader.integers("shape of a mesh", MAX_DIMS, MAX_DIM)
    ranks = unpack_ranks(reader, "ranks of a mesh")
    if not shape or prod(shape) != len(ranks):
        reader.fail(f"a mesh of shape {shape} with {len(ranks)} ranks")
    return shape, ranks


def unpack_ranks(reader: bounded.FieldReader, name: str) -> tuple[int, ...]:
    """A column of global ranks, each once, at least one."""
    packed = reader.binary(name)
    if not packed or len(packed) % 4:
        reader.fail(f"{name}: {len(packed)} bytes are no u32 each")
    ranks = tuple(memoryview(packed).cast("I"))
    if max(ranks) > MAX_RANK or len(set(ranks)) != len(ranks):
        reader.fail(f"{name}: a rank stands there twice, or is above {MAX_RANK}")
    return ranks


def pack_sharded(entry: ShardedTensorEntry, mesh: int) -> bytes:
    """One sharded tensor.

    Args:
        entry: what is stored.
        mesh: the number of its mesh.

    Raises:
        ValueError: an entry that no manifest can hold.
    """
    sharding = entry.sharding
    sharding.check(entry.shape)
    return bounded.pack(
        [
            entry.dtype, entry.shape, entry.cell, mesh,
            [number for placement in sharding.placements or () for number in _placement_fields(placement)],
            sharding.order or (), b"" if sharding.boxes is None else _pack_boxes(sharding.boxes),
            entry.tables, entry.firsts, WRAPPERS.index(entry.wrapper), entry.requires_grad, entry.nbytes,
        ]
    )  # fmt: skip


def unpack_sharded(reader: bounded.FieldReader, meshes: Sequence[Mesh]) -> ShardedTensorEntry:
    """The inverse of ``pack_sharded``.

    Raises:
        NewerFormatError: it holds something that this library does not know.
        FormatError: anything else is wrong; so does msgpack, by way of ``bounded.reading``.
    """
    if reader.array("sharded tensor") != _NUM_FIELDS:
        reader.fail(f"a sharded tensor has {_NUM_FIELDS} fields")
    dtype = reader.text("dtype", MAX_NAME_NCHARS)
    shape = reader.integers("shape", MAX_DIMS, MAX_DIM)
    cell = reader.integers("cell", MAX_DIMS, MAX_DIM)
    if prod(shape) >= MAX_NUMEL:
        reader.fail(f"too many elements: {shape}")
    if len(cell) != max(1, len(shape)) or 0 in cell:
        reader.fail(f"{cell} is no cell for the shape {shape}")
    sharding = _unpack_sharding(reader, shape, meshes)
    tables, firsts = reader.binary("tables"), reader.binary("first rows")
    if not len(tables) == len(firsts) == 4 * sharding.num_regions:
        reader.fail(f"{len(tables)} and {len(firsts)} bytes for {sharding.num_regions} regions")
    wrapper = reader.integer("wrapper", 1 << 32)
    if wrapper >= len(WRAPPERS):
        raise NewerFormatError(f"{reader.what}: a sharded tensor has the unknown wrapper {wrapper}; upgrade")
    requires_grad = reader.boolean("requires_grad")
    nbytes = reader.integer("size", MAX_NUMEL)
    return ShardedTensorEntry(dtype, shape, cell, sharding, tables, firsts, WRAPPERS[wrapper], requires_grad, nbytes)


def _placement_fields(placement: Placement) -> tuple[int, int]:
    return 0 if placement.dim is None else placement.dim + 1, placement.split_factor


def _unpack_sharding(reader: bounded.FieldReader, shape: tuple[int, ...], meshes: Sequence[Mesh]) -> Sharding:
    number = reader.integer("mesh", 1 << 32)
    if number >= len(meshes):
        reader.fail(f"mesh {number} of {len(meshes)}")
    mesh_shape, mesh_ranks = meshes[number]
    fields = reader.integers("placements", 2 * MAX_DIMS, MAX_SPLIT_FACTOR + 1)
    if len(fields) % 2:
        reader.fail("placements are two ints for each dimension of the mesh")
    placements = tuple(
        [Placement(dim - 1 if dim else None, factor) for dim, factor in zip(fields[::2], fields[1::2], strict=True)]
    )
    order = reader.integers("order", MAX_DIMS, MAX_DIMS)
    packed = reader.binary("boxes")
    boxes = tuple(_unpack_boxes(reader, packed, max(1, len(shape)))) if packed else None
    sharding = Sharding(mesh_shape, mesh_ranks, placements or None, order or None, boxes)
    try:
        sharding.check(shape)
    except ValueError as error:
        reader.fail(str(error))
    return sharding


def _pack_boxes(boxes: Sequence[Sequence[Box]]) -> bytes:
    numbers = array("Q")
    for held in boxes:
        numbers.append(len(held))
        for box in held:
            numbers.extend((*box.offsets, *box.sizes))
    return numbers.tobytes()


def _unpack_boxes(reader: bounded.FieldReader, packed: bytes, num_dims: int) -> Iterator[tuple[Box, ...]]:
    if len(packed) % 8:
        reader.fail(f"boxes: {len(packed)} bytes are no u64 each")
    numbers = memoryview(packed).cast("Q")
    place = 0
    while place < len(numbers):
        end = place + 1 + numbers[place] * 2 * num_dims
        if end > len(numbers):
            reader.fail(f"boxes: {numbers[place]} of a position in {len(numbers) - place - 1} numbers")
        held = []
        for start in range(place + 1, end, 2 * num_dims):
            middle = start + num_dims
            held.append(Box(tuple(numbers[start:middle]), tuple(numbers[middle : middle + num_dims])))
        yield tuple(held)
        place = end
