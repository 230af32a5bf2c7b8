"""What a take writes, and above all what it doesn't: sharing, packs, chunks, generations, metadata."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from folders import blobs, entry, files, generations, keys, manifest, mislabelled, new_process, refs, run_python

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.chunks import bases
from torchsnapshot.chunks.encoded import read_header
from torchsnapshot.errors import SnapshotError, SnapshotNotFoundError, UnsupportedValueError
from torchsnapshot.format.entries import TensorEntry, ValueEntry
from torchsnapshot.recent import NUM_STORES
from torchsnapshot.store import commit, known
from torchsnapshot.store.clock import SYSTEM_CLOCK
from torchsnapshot.store.envelope import MAX_USER_METADATA_NBYTES, Form
from torchsnapshot.taking import history, structure
from torchsnapshot.taking import take as taking

CHUNK_NBYTES = 64 << 10
NUMEL = CHUNK_NBYTES // 4
"""float32 elements in one chunk."""


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB and reproducible tensors."""
    new_process()
    torch.manual_seed(0)
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for snapshots that nothing else uses."""
    return tmp_path / "run"


def take(path: Path, state: dict[str, Any], **options: Any) -> Snapshot:
    """Take a snapshot of one ``StateDict`` under the key ``s``."""
    return Snapshot.take(str(path), {"s": StateDict(**state)}, **options)


def restored(path: Path, **options: Any) -> dict[str, Any]:
    """What a snapshot holds, restored into nothing."""
    target = StateDict()
    Snapshot(str(path)).restore({"s": target}, **options)
    return target.data


def num_new(snapshot: Snapshot) -> int:
    """How many chunks a take wrote."""
    assert snapshot.stats is not None
    return snapshot.stats.num_new_chunks


def small_tensors(count: int, numel: int = 1024) -> dict[str, torch.Tensor]:
    """Tensors that are packed together, of 4 KiB each."""
    return {f"t{number:03}": torch.rand(numel) for number in range(count)}


# ------------------------------------------------------------------ nothing is written twice


def test_second_take_of_an_unchanged_state_writes_a_manifest_and_nothing_else(root: Path) -> None:
    """Beside the new snapshot's own folder, no file of ROOT is new, gone or different."""
    state = {"large": torch.rand(5 * NUMEL), **small_tensors(20), "value": list(range(20_000)), "lr": 0.1}
    take(root / "step_1", state)
    before = files(root)
    stats = take(root / "step_2", state).stats
    after = files(root)
    new = sorted(after.keys() - before.keys())
    assert [os.path.splitext(name)[1] for name in new] == ["", ".ok", ""]
    assert [name.split("/")[:2] for name in new[:2]] == [["step_2", ".manifests"]] * 2
    assert new[2] == "step_2/.snapshot_metadata"
    assert {name: after[name] for name in before} == before
    assert stats is not None
    assert (stats.num_new_chunks, stats.new_nbytes, stats.stored_nbytes, stats.num_blobs) == (0, 0, 0, 0)
    assert stats.reused_nbytes > 5 * CHUNK_NBYTES


def test_unchanged_state_in_fresh_tensors_is_not_written_again(root: Path) -> None:
    """What counts is content: a ``state_dict`` that makes new tensors each time costs no more."""
    state = {"large": torch.rand(3 * NUMEL), "small": torch.rand(1000)}
    take(root / "step_1", state)
    assert num_new(take(root / "step_2", {name: tensor.clone() for name, tensor in state.items()})) == 0


def test_changed_element_writes_one_chunk(root: Path) -> None:
    """One element of a large tensor costs one chunk; of a small one, that chunk alone."""
    state = {"large": torch.rand(10 * NUMEL), **small_tensors(20)}
    take(root / "step_1", state)
    state["large"][7 * NUMEL + 5] += 1
    stats = take(root / "step_2", state).stats
    assert stats is not None
    assert (stats.num_new_chunks, stats.num_blobs, stats.new_nbytes) == (1, 1, CHUNK_NBYTES)
    state["t007"][5] += 1
    stats = take(root / "step_3", state).stats
    assert stats is not None
    assert (stats.num_new_chunks, stats.num_blobs, stats.new_nbytes) == (1, 1, 4096)
    for name, tensor in restored(root / "step_3").items():
        assert torch.equal(tensor, state[name])


def test_change_that_no_version_counter_shows_is_written(root: Path) -> None:
    """A write through ``.data``, or through memory that a tensor shares, is seen like any other."""
    state = {"t": torch.rand(4 * NUMEL)}
    version = state["t"]._version
    take(root / "step_1", state)
    state["t"].data[3] = 17
    assert state["t"]._version == version
    assert num_new(take(root / "step_2", state)) == 1
    state["t"].numpy()[2 * NUMEL] = 18
    assert num_new(take(root / "step_3", state)) == 1
    assert torch.equal(restored(root / "step_3")["t"], state["t"])


@pytest.mark.parametrize("numel", [1000, 3 * NUMEL], ids=["packed", "alone"])
def test_tied_equal_and_reverted_tensors_are_written_once(root: Path, numel: int) -> None:
    """Within one take and between takes, equal content costs one chunk each, however it came to be equal."""
    num_chunks = -(-numel // NUMEL)
    first, second = torch.rand(numel), torch.rand(numel)
    state = {"weight": first, "tied": first, "equal": first.clone(), "view": first.view(-1, 1)}
    assert num_new(take(root / "step_1", state)) == num_chunks
    assert num_new(take(root / "step_2", dict.fromkeys(state, second))) == num_chunks
    assert num_new(take(root / "step_3", state)) == 0
    assert num_new(take(root / "step_4", {"another": first.clone()})) == 0
    assert torch.equal(restored(root / "step_3")["equal"], first)


RESUMING = """
import sys, torch
from torchsnapshot import Snapshot, StateDict
target = StateDict()
Snapshot(sys.argv[1]).restore({"s": target})
for step in range(2):
    stats = Snapshot.take(sys.argv[2] + str(step), {"s": target}).stats
    print(stats.num_new_chunks, stats.num_blobs)
    target["large"][0] += 1
"""


def test_new_process_shares_with_what_it_restored(root: Path) -> None:
    """A process that resumes writes nothing for the state that it restored, and one chunk for one change."""
    take(root / "step_1", {"large": torch.rand(5 * NUMEL), **small_tensors(10)})
    finished = run_python(RESUMING, str(root / "step_1"), str(root / "resumed_"))
    assert finished.stderr == ""
    assert finished.stdout.split() == ["0", "0", "1", "1"]


def test_new_process_shares_without_having_restored(root: Path) -> None:
    """Whoever takes into a store shares with its newest snapshots, also as the first thing that it does."""
    state = {"large": torch.rand(5 * NUMEL), **small_tensors(10)}
    take(root / "step_1", state)
    new_process()
    assert num_new(take(root / "step_2", state)) == 0


def test_process_shares_with_a_snapshot_that_another_one_took_meanwhile(root: Path) -> None:
    """A process that has taken snapshots of its own, and then restores somebody else's, shares with that one too."""
    take(root / "step_1", {"t": torch.rand(NUMEL)})
    code = (
        "import sys, torch\n"
        "from torchsnapshot import Snapshot, StateDict\n"
        "Snapshot.take(sys.argv[1], {'s': StateDict(t=torch.rand(int(sys.argv[2])))})"
    )
    finished = run_python(code, str(root / "other"), str(5 * NUMEL))
    assert finished.stderr == ""
    target = restored(root / "other")
    assert num_new(take(root / "step_2", target)) == 0


def test_process_shares_with_a_restored_snapshot_that_is_old(root: Path) -> None:
    """What was restored is shared also when many newer snapshots of other content stand in the store."""
    state = {"t": torch.rand(2 * NUMEL)}
    take(root / "old", state)
    for step in range(20):
        take(root / f"step_{step}", {"t": torch.rand(300)})
    new_process()
    take(root / "unrelated", {"t": torch.rand(300)})
    target = restored(root / "old")
    assert num_new(take(root / "again", target)) == 0


def test_take_after_its_last_snapshot_was_deleted(root: Path) -> None:
    """Deleting what was taken or restored last takes nothing from sharing with what is left."""
    state = {"t": torch.rand(2 * NUMEL)}
    take(root / "step_1", state)
    take(root / "step_2", state).delete()
    for step in range(3, 5):
        assert num_new(take(root / f"step_{step}", state)) == 0


@pytest.mark.parametrize("numel", [1000, 2 * NUMEL], ids=["packed", "alone"])
def test_blob_that_was_deleted_by_hand_is_written_again(root: Path, numel: int) -> None:
    """Sharing needs the blob itself: one that is gone is written again by the next take, which restores."""
    state = {"t": torch.rand(numel)}
    take(root / "step_1", state)
    for blob in blobs(root).values():
        blob.unlink()
    assert num_new(take(root / "step_2", state)) == -(-numel // NUMEL)
    assert torch.equal(restored(root / "step_2")["t"], state["t"])
    assert Snapshot(str(root / "step_2")).verify() == []
    assert num_new(take(root / "step_3", state)) == 0


def test_blob_of_another_size_is_not_shared(root: Path) -> None:
    """A blob that was cut short is as good as none."""
    state = {"t": torch.rand(NUMEL)}
    take(root / "step_1", state)
    (blob,) = blobs(root).values()
    os.truncate(blob, 100)
    assert num_new(take(root / "step_2", state)) == 1
    assert torch.equal(restored(root / "step_2")["t"], state["t"])


def test_damaged_newest_manifest_is_no_obstacle(root: Path) -> None:
    """A process that finds the newest manifest damaged, anywhere, takes as if it were not there."""
    state = {"t": torch.rand(2 * NUMEL), **small_tensors(3)}
    take(root / "step_1", state)
    (file,) = [path for path in (root / "step_1" / ".manifests").iterdir() if path.suffix != ".ok"]
    sound = file.read_bytes()
    for step, place in enumerate((len(sound) // 4, len(sound) // 2, len(sound) - 1), 2):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        new_process()
        take(root / f"step_{step}", state)
        assert torch.equal(restored(root / f"step_{step}")["t"], state["t"])
        Snapshot(str(root / f"step_{step}")).delete()


# ------------------------------------------------------------------ packs


def test_small_chunks_are_packed(root: Path) -> None:
    """A hundred small tensors become one blob, in which each can be read and shared by itself."""
    state = small_tensors(100)
    snapshot = take(root / "step_1", state)
    (key,) = blobs(root)
    assert key.endswith(".p")
    offsets = [ref.offset for name in state for ref in refs(root / "step_1", f"s/{name}")]
    assert offsets == sorted(set(offsets))
    assert torch.equal(snapshot.read_object("0/s/t050"), state["t050"])


def test_batching_can_be_switched_off(root: Path) -> None:
    """With the old torchsnapshot's switch each small chunk is a blob of its own."""
    with knobs.override_is_batching_disabled(True):
        take(root / "step_1", small_tensors(10))
    assert len(blobs(root)) == 10


def change(state: dict[str, torch.Tensor], numbers: range) -> None:
    """Change some of the small tensors."""
    for number in numbers:
        state[f"t{number:03}"] = torch.rand(1024)


def packs(path: Path, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many of the small tensors stand in each pack."""
    found: dict[str, int] = {}
    for name in state:
        (ref,) = refs(path, f"s/{name}")
        found[ref.key] = found.get(ref.key, 0) + 1
    return found


def test_pack_that_is_mostly_live_is_kept(root: Path) -> None:
    """As long as a quarter of a pack is in use, what is left of it is shared."""
    state = small_tensors(40)
    take(root / "step_1", state, encoding="raw")
    change(state, range(29))
    assert num_new(take(root / "step_2", state, encoding="raw")) == 29
    assert sorted(packs(root / "step_2", state).values()) == [11, 29]


def test_rest_of_a_pack_is_written_again_when_little_of_it_is_live(root: Path) -> None:
    """Below a quarter the rest moves to a new pack, so that gc can free the old one; it moves once, not every time."""
    state = small_tensors(40)
    take(root / "step_1", state, encoding="raw")
    old = keys(root / "step_1")
    change(state, range(31))
    take(root / "step_2", state, encoding="raw")
    assert not old & keys(root / "step_2")
    for name, tensor in restored(root / "step_2").items():
        assert torch.equal(tensor, state[name])
    assert num_new(take(root / "step_3", state, encoding="raw")) == 0
    for step in range(4, 7):
        change(state, range(31))
        assert num_new(take(root / f"step_{step}", state, encoding="raw")) == 31


def test_rest_moves_when_the_state_shrinks(root: Path) -> None:
    """A state that lost most of its tensors does not hold on to their pack."""
    state = small_tensors(40)
    take(root / "step_1", state, encoding="raw")
    old = keys(root / "step_1")
    few = {name: state[name] for name in list(state)[:4]}
    take(root / "step_2", few, encoding="raw")
    assert not old & keys(root / "step_2")
    assert num_new(take(root / "step_3", few, encoding="raw")) == 0
    assert torch.equal(restored(root / "step_3")["t003"], state["t003"])


def test_rest_that_cannot_be_read_stays_where_it_is(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damage that is found while chunks move is told, and costs the take nothing else."""
    state = small_tensors(40)
    take(root / "step_1", state, encoding="raw")
    (pack,) = blobs(root).values()
    content = bytearray(pack.read_bytes())
    content[-100] ^= 1
    pack.write_bytes(content)
    change(state, range(35))
    take(root / "step_2", state, encoding="raw")
    assert "stay in packs" in caplog.text
    assert sorted(packs(root / "step_2", state).values()) == [5, 35]
    assert Snapshot(str(root / "step_2")).verify() != []


@pytest.mark.parametrize("strided", [False, True])
def test_unchanged_state_moves_nothing(root: Path, strided: bool) -> None:
    """However the packs of the last take are filled, and whatever changed in it, an unchanged state writes nothing."""
    state = small_tensors(40)
    if strided:
        for number in range(0, 40, 2):
            state[f"t{number:03}"] = torch.rand(2048)[::2]
    take(root / "step_0", state)
    for step, numbers in enumerate([range(5), range(35), range(40), range(0, 40, 7), range(38)], 1):
        change(state, numbers)
        take(root / f"step_{step}", state)
        before = blobs(root).keys()
        assert num_new(take(root / f"same_{step}", state)) == 0
        assert blobs(root).keys() == before


def test_rolling_back_and_taking_again_writes_nothing(root: Path) -> None:
    """A restored old state is all there, also what a later take has moved to another pack."""
    state = small_tensors(40)
    take(root / "step_1", state)
    change(state, range(35))
    take(root / "step_2", state)
    target = restored(root / "step_1")
    assert num_new(take(root / "step_3", target)) == 0
    new_process()
    target = restored(root / "step_1")
    assert num_new(take(root / "step_4", target)) == 0


def test_equal_small_chunks_in_several_groups_are_written_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of small chunks that hold equal content share it, and an unchanged state writes nothing."""
    monkeypatch.setattr("torchsnapshot.taking.plan.GROUP_NBYTES", 40 << 10)
    shared = torch.rand(1024)
    state = {f"t{number:03}": shared if number % 4 == 0 else torch.rand(1024) for number in range(60)}
    assert num_new(take(root / "step_0", state)) == 46
    assert len(blobs(root)) > 3
    for step in range(1, 4):
        assert num_new(take(root / f"step_{step}", state)) == 0
        new_process()
    assert torch.equal(restored(root / "step_3")["t056"], shared)


# ------------------------------------------------------------------ chunks, inline bytes, values


def test_cells_are_kept_when_the_chunk_size_changes(root: Path) -> None:
    """Another chunk size applies to new tensors; those that the last snapshot holds stay cut as they are."""
    state = {"t": torch.rand(8 * NUMEL).view(8, NUMEL)}
    take(root / "step_1", state)
    new_process()
    with knobs.override_max_chunk_size_bytes(2 * CHUNK_NBYTES):
        assert num_new(take(root / "step_2", state)) == 0
        take(root / "step_3", {**state, "new": torch.rand(8, NUMEL)})
    kept, new = entry(root / "step_3", "s/t"), entry(root / "step_3", "s/new")
    assert isinstance(kept, TensorEntry)
    assert isinstance(new, TensorEntry)
    assert (kept.cell, new.cell) == ((1, NUMEL), (2, NUMEL))


def test_cell_that_is_far_too_large_is_computed_anew(root: Path) -> None:
    """A kept cell must not make chunks of more than twice the chunk size."""
    state = {"t": torch.rand(8, NUMEL)}
    take(root / "step_1", state)
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES // 4):
        take(root / "step_2", state)
    cut = entry(root / "step_2", "s/t")
    assert isinstance(cut, TensorEntry)
    assert cut.cell == (1, NUMEL // 4)
    assert torch.equal(restored(root / "step_2")["t"], state["t"])


def test_tensors_up_to_256_bytes_stand_in_the_manifest(root: Path) -> None:
    """A tensor of 256 bytes is inline, one of 257 is a chunk."""
    state = {"inline": torch.rand(64), "chunk": torch.ones(257, dtype=torch.uint8), "empty": torch.zeros(0, 3)}
    take(root / "step_1", state)
    stored = manifest(root / "step_1")
    found = {name: stored.entries[f"0/s/{name}"] for name in state}
    assert [getattr(found[name], "inline") is not None for name in state] == [True, False, True]  # noqa: B009
    assert len(refs(root / "step_1", "s/chunk")) == 1
    for name, tensor in restored(root / "step_1").items():
        assert torch.equal(tensor, state[name])
        assert tensor.shape == state[name].shape


def test_values_up_to_16_kib_stand_in_the_manifest_and_larger_ones_are_chunked(root: Path) -> None:
    """A value's stored bytes are inline up to 16 KiB; what is larger is cut into chunks, and shared like a tensor's."""
    values = {"small": b"a" * 16_000, "large": os.urandom(300_000), "nested": {"list": list(range(100_000))}}
    state = {"tensor": torch.rand(10), **values}
    take(root / "step_1", state)
    small, large = entry(root / "step_1", "s/small"), entry(root / "step_1", "s/large")
    assert isinstance(small, ValueEntry)
    assert isinstance(large, ValueEntry)
    assert small.data is not None
    assert large.data is None
    assert large.nbytes > 300_000
    assert len(refs(root / "step_1", "s/large")) == -(-large.nbytes // CHUNK_NBYTES)
    assert {name: value for name, value in restored(root / "step_1").items() if name != "tensor"} == values
    assert num_new(take(root / "step_2", state)) == 0
    state["large"] = state["large"][:-1] + b"x" if state["large"][-1:] != b"x" else state["large"][:-1] + b"y"
    assert num_new(take(root / "step_3", state)) == 1


class Odd:
    """An object that only pickle can hold."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def test_large_pickles_are_chunked(root: Path) -> None:
    """An opaque object follows the same sizes as a value."""
    take(root / "step_1", {"small": Odd(b"x"), "large": Odd(os.urandom(200_000))})
    assert len(refs(root / "step_1", "s/large")) > 1
    assert refs(root / "step_1", "s/small") == []
    found = restored(root / "step_1", allow_pickle=True)
    assert (len(found["large"].content), found["small"].content) == (200_000, b"x")


def test_dense_memory_in_any_order_is_cut_in_memory_order(root: Path) -> None:
    """A permuted dense tensor shares its chunks with a contiguous one over the same memory."""
    base = torch.rand(8, 16, 16, 48)
    assert num_new(take(root / "step_1", {"t": base})) == 8
    permuted = {"channels": base.permute(0, 3, 1, 2), "swapped": base.transpose(0, 2)}
    assert num_new(take(root / "step_2", permuted)) == 0
    for name, tensor in restored(root / "step_2").items():
        assert torch.equal(tensor, permuted[name])
        assert tensor.stride() == permuted[name].stride()


@pytest.mark.parametrize("encoding", ["raw", "auto", "smallest"])
def test_every_encoding_restores_bit_for_bit(root: Path, encoding: str) -> None:
    """However chunks are stored, every bit comes back: of weights, counters, noise and NaNs with payloads."""
    noise = torch.randint(-(2**31), 2**31 - 1, (2 * NUMEL,), dtype=torch.int32)
    state = {
        "weights": torch.randn(3 * NUMEL) * 0.02,
        "half": torch.randn(3 * NUMEL).bfloat16(),
        "double": torch.randn(NUMEL, dtype=torch.float64),
        "complex": torch.randn(NUMEL, dtype=torch.complex64),
        "counter": torch.arange(2 * NUMEL),
        "zeros": torch.zeros(2 * NUMEL),
        "noise": noise,
        "payloads": noise.view(torch.float32),
        "bytes": torch.randint(0, 255, (NUMEL,), dtype=torch.uint8),
    }
    stats = take(root / "step_1", state, encoding=encoding).stats
    for name, tensor in restored(root / "step_1").items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name
    forms = {ref.form for name in state for ref in refs(root / "step_1", f"s/{name}")}
    assert (Form.ENCODED in forms) == (encoding != "raw")
    assert stats is not None
    assert (stats.stored_nbytes < stats.new_nbytes) == (encoding != "raw")
    assert mislabelled(root) == []


@pytest.mark.parametrize(
    ("sizes", "row_length"), [((256, 128), 128), ((256, 1, 128), 128), ((5, 16, 256), 256), ((256, 8, 4, 4), 128)]
)
def test_smallest_knows_the_rows_of_tensors(root: Path, sizes: tuple[int, ...], row_length: int) -> None:
    """Numbers that are about a factor of their row times one of their column are stored with levels."""
    grid = torch.randn(prod(sizes) // row_length, row_length).square()
    grid *= torch.randn(len(grid), 1).mul(2).exp() * torch.randn(row_length).mul(2).exp()
    state = {"moment": grid.view(sizes)}
    take(root / "step_1", state, encoding="smallest")
    assert torch.equal(restored(root / "step_1")["moment"], state["moment"])
    first = refs(root / "step_1", "s/moment")[0]
    assert first.form is Form.ENCODED
    assert read_header(memoryview(blobs(root)[first.key].read_bytes())).row_length == row_length


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize("size", [0, 1, 100, MAX_USER_METADATA_NBYTES, 10_000])
def test_user_metadata_of_any_size_comes_back(root: Path, size: int) -> None:
    """Plain values are kept, in the head or beside it; they are no part of the state."""
    metadata = {"note": "x" * size, "step": 7, "nested": {"list": [1, 2.5, None, True]}}
    take(root / "step_1", {"t": torch.rand(3)}, user_metadata=metadata)
    assert Snapshot(str(root / "step_1")).user_metadata == metadata
    (listed,) = Snapshot.list(str(root))
    assert listed.user_metadata == metadata
    assert restored(root / "step_1").keys() == {"t"}
    assert list(Snapshot(str(root / "step_1")).get_manifest()) == ["0/s", "0/s/t"]
    target = StateDict(t=torch.zeros(3))
    Snapshot(str(root / "step_1")).restore({"s": target}, rename=lambda path: path)
    assert target.data.keys() == {"t"}


def test_user_metadata_that_is_not_plain_is_refused(root: Path) -> None:
    """Tensors, other keys than text, and more than a manifest should hold are errors, and nothing is written."""
    for metadata in ({"t": torch.rand(3)}, {1: 2}, [1], {"x": "y" * (1 << 20)}):
        with pytest.raises((TypeError, ValueError, SnapshotError)):
            take(root / "step_1", {}, user_metadata=metadata)
    assert not root.exists()


def test_all_problems_of_a_state_are_told_at_once(root: Path) -> None:
    """Whatever cannot be stored, under any key, is named in one error, and nothing is written."""
    first = StateDict(lock=threading.Lock(), fine=torch.rand(2), meta=torch.empty(2, device="meta"))
    second = StateDict(deep=[{"function": lambda: None}])
    with pytest.raises(UnsupportedValueError) as caught:
        Snapshot.take(str(root / "step_1"), {"a/b": first, "c": second})
    paths = [problem.partition(":")[0] for problem in caught.value.problems]
    assert paths == ["a%2Fb/lock", "a%2Fb/meta", "c/deep/0/function"]
    assert not root.exists()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_prepare_function_may_quantize(root: Path) -> None:
    """What the function returns is what is stored, of whatever kind it is."""

    def prepare(path: str, tensor: torch.Tensor, tracing: bool) -> torch.Tensor:
        if path == "s/sparse":
            return tensor.to_sparse()
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8) if path == "s/quantized" else tensor

    state = {"plain": torch.rand(8, 8), "quantized": torch.rand(8, 8), "sparse": torch.eye(8)}
    take(root / "step_1", state, _custom_tensor_prepare_func=prepare)
    found = restored(root / "step_1")
    assert list(found) == list(state)
    assert torch.equal(found["plain"], state["plain"])
    assert found["quantized"].dtype is torch.qint8
    assert torch.allclose(found["quantized"].dequantize(), state["quantized"], atol=0.051)
    assert found["sparse"].is_sparse
    assert torch.equal(found["sparse"].to_dense(), state["sparse"])


def test_prepare_function_that_changes_another_dtype(root: Path) -> None:
    """A cast keeps the wrapper, and the gradient flag where the new dtype can have one."""
    state = {"p": torch.nn.Parameter(torch.rand(300)), "q": torch.nn.Parameter(torch.ones(300))}

    def prepare(path: str, tensor: torch.Tensor, tracing: bool) -> torch.Tensor:
        return tensor.detach().to(torch.float16 if path == "s/p" else torch.int32)

    take(root / "step_1", state, _custom_tensor_prepare_func=prepare)
    found = restored(root / "step_1")
    assert (type(found["p"]), found["p"].dtype, found["p"].requires_grad) == (torch.nn.Parameter, torch.float16, True)
    assert (found["q"].dtype, found["q"].requires_grad) == (torch.int32, False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"encoding": "gzip"}, ValueError),
        ({"busy": "sometimes"}, ValueError),
        ({"replicated": "**"}, TypeError),
        ({"store": "/elsewhere"}, ValueError),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(root: Path, options: dict[str, Any], error: type[Exception]) -> None:
    """They are refused before anything is written."""
    with pytest.raises(error):
        take(root / "step_1", {"t": torch.rand(2)}, **options)
    assert not root.exists()


# ------------------------------------------------------------------ generations, times, parents


def test_taking_a_path_again_replaces_its_snapshot(root: Path) -> None:
    """The second take of a path is generation 2; once it is committed, the files of generation 1 are gone."""
    path = root / "best"
    take(path, {"t": torch.zeros(NUMEL)})
    assert generations(path) == ["000001", "000001.ok"]
    take(path, {"t": torch.ones(NUMEL)})
    assert generations(path) == ["000002", "000002.ok"]
    assert torch.equal(restored(path)["t"], torch.ones(NUMEL))
    assert [snapshot.name for snapshot in Snapshot.list(str(root))] == ["best"]


def test_old_generation_is_valid_until_the_new_one_is_committed(root: Path) -> None:
    """While a path is taken again, and if that fails, it restores as before."""
    path = root / "best"
    take(path, {"t": torch.zeros(NUMEL)})
    seen = []

    def prepare(name: str, tensor: torch.Tensor, tracing: bool) -> torch.Tensor:
        seen.append(torch.equal(restored(path)["t"], torch.zeros(NUMEL)))
        if len(seen) > 2:
            raise ValueError("sorry")
        return tensor

    take(path, {"t": torch.zeros(NUMEL)}, _custom_tensor_prepare_func=prepare)
    with pytest.raises(ValueError, match="sorry"):
        take(path, {"t": torch.ones(NUMEL)}, _custom_tensor_prepare_func=prepare)
    assert seen == [True, True, True]
    # a store that refuses blobs
    folder = root / ".torchsnapshot" / "blobs"
    folder.rename(root / "aside")
    folder.write_bytes(b"")
    with pytest.raises(SnapshotError):
        take(path, {"t": torch.rand(NUMEL)})
    folder.unlink()
    (root / "aside").rename(folder)
    assert generations(path) == ["000002", "000002.ok"]
    assert torch.equal(restored(path)["t"], torch.zeros(NUMEL))
    assert num_new(take(path, {"t": torch.zeros(NUMEL)})) == 0


def test_open_snapshot_sees_a_path_that_was_taken_again(root: Path) -> None:
    """An object that read generation 1 restores generation 2 once that is there."""
    path = root / "best"
    snapshot = take(path, {"t": torch.zeros(3)})
    take(path, {"t": torch.ones(3)})
    target = StateDict()
    snapshot.restore({"s": target})
    assert torch.equal(target["t"], torch.ones(3))


def test_failed_take_leaves_no_snapshot_and_the_next_one_works(root: Path) -> None:
    """An error on the way commits nothing, drops the lease, and is no obstacle for the next take."""

    def prepare(name: str, tensor: torch.Tensor, tracing: bool) -> torch.Tensor:
        return tensor if tracing else tensor.to("meta")

    with pytest.raises(SnapshotError):
        take(root / "step_1", {"t": torch.rand(NUMEL)}, _custom_tensor_prepare_func=prepare)
    assert Snapshot.latest(str(root)) is None
    take(root / "step_1", {"t": torch.rand(NUMEL)})
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []
    assert [snapshot.name for snapshot in Snapshot.list(str(root))] == ["step_1"]


def test_commit_times_only_grow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, or jumps back, does not make a later take look older."""
    times = [1_000.0, 1_000.0, 500.0, 2_000.0, 1.0, 1.0]
    for step, seconds in enumerate(times):
        monkeypatch.setattr(type(SYSTEM_CLOCK), "now", lambda self, seconds=seconds: seconds)
        if step == 4:
            new_process()
        take(root / f"step_{step}", {"n": step, "t": torch.rand(500)})
    snapshots = Snapshot.list(str(root))
    assert [snapshot.name for snapshot in snapshots] == [f"step_{step}" for step in range(len(times))]
    moments = [snapshot.head.created_ms for snapshot in snapshots]
    assert moments == sorted(set(moments))
    latest = Snapshot.latest(str(root))
    assert latest is not None
    assert latest.name == "step_5"


def test_parent_is_what_the_process_took_or_restored_last(root: Path) -> None:
    """The head names the take before in this process, or the one that it restored, or none."""
    first = take(root / "step_1", {"n": 1})
    second = take(root / "step_2", {"n": 2})
    restored(root / "step_1")
    third = take(root / "step_3", {"n": 3})
    new_process()
    fourth = take(root / "step_4", {"n": 4})
    parents = [snapshot.head.parent for snapshot in (first, second, third, fourth)]
    assert parents == [None, first.head.take_id, first.head.take_id, None]


def test_stats_add_up(root: Path) -> None:
    """New and reused bytes make the chunks' share of the state, and the manifest's size is its file's."""
    state = {"large": torch.rand(3 * NUMEL), "inline": torch.rand(10), **small_tensors(5)}
    take(root / "step_1", state)
    state["large"][0] = 2
    stats = take(root / "step_2", state).stats
    assert stats is not None
    assert stats.state_nbytes == sum(tensor.nbytes for tensor in state.values())
    assert stats.new_nbytes + stats.reused_nbytes == stats.state_nbytes - 40
    assert (stats.num_chunks, stats.num_new_chunks) == (8, 1)
    (file,) = [path for path in (root / "step_2" / ".manifests").iterdir() if path.suffix != ".ok"]
    assert stats.manifest_nbytes == file.stat().st_size
    assert {"state_dict", "lease", "index", "plan", "write", "commit"} <= stats.seconds.keys()
    head = Snapshot(str(root / "step_2")).head
    assert (head.state_nbytes, head.new_nbytes, head.num_chunks) == (stats.state_nbytes, stats.new_nbytes, 8)


class TestExpected:
    """What of a state that was taken before is compared where it lies, and what happens where it differs."""

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors of one chunk, of several, and small ones that are packed."""
        large = {f"large{number}": torch.rand(3 * NUMEL) for number in range(4)}
        return {**large, "one": torch.rand(NUMEL), "small": torch.rand(NUMEL // 8), "smaller": torch.rand(NUMEL // 16)}

    def test_only_the_chunks_that_differ_are_new(self, root: Path) -> None:
        """Of a tensor of three chunks one changes, of a pack of two members one: these two are put."""
        state = self.state()
        take(root / "a", state)
        assert num_new(take(root / "b", state)) == 0
        state["large1"][NUMEL + 5] += 1
        state["small"] += 1
        assert num_new(take(root / "c", state)) == 2
        assert num_new(take(root / "d", state)) == 0
        found = restored(root / "d")
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert refs(root / "d", "s/large1")[::2] == refs(root / "a", "s/large1")[::2]

    @pytest.mark.parametrize("name", ["large2", "small"])
    def test_blobs_that_are_gone_are_put_again(self, root: Path, name: str) -> None:
        """What has not changed, but whose blob somebody has removed, is put again and restored."""
        state = self.state()
        take(root / "a", state)
        take(root / "b", state)
        lost = refs(root / "b", f"s/{name}")[-1].key
        blobs(root)[lost].unlink()
        assert num_new(take(root / "c", state)) >= 1
        found = restored(root / "c")
        assert all(torch.equal(found[each], tensor) for each, tensor in state.items())
        assert lost not in keys(root / "c")

    def test_nothing_of_the_application_is_kept(self, root: Path) -> None:
        """A take that has ended keeps no tensor alive, whether it was found unchanged or not."""
        state = self.state()
        for step in range(3):
            state = {name: tensor.clone() for name, tensor in state.items()}
            if step == 2:
                state["large3"] += 1
            pending = Snapshot.async_take(str(root / f"{step}"), {"s": StateDict(**state)})
            snapshot = pending.wait()
        tensors = [weakref.ref(tensor) for tensor in state.values()]
        del state
        gc.collect()
        assert num_new(snapshot) == 3
        assert not any(tensor() is not None for tensor in tensors)

    def test_a_tensor_that_gets_other_memory_meanwhile(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another thread gives a tensor another, smaller memory during a take: it holds what was there at the call."""
        state = self.state()
        take(root / "a", state)
        take(root / "b", state)
        state["large1"] += 1
        wanted = state["large1"].clone()
        begin = taking.submit_take

        def swap_first(*arguments: Any, **options: Any) -> Any:
            state["large1"].data = torch.zeros(4)
            return begin(*arguments, **options)

        monkeypatch.setattr(taking, "submit_take", swap_first)
        take(root / "c", state)
        assert torch.equal(restored(root / "c")["large1"], wanted)

    def test_memory_that_is_freed_meanwhile_is_an_error(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Storage that another thread empties during a take is not read: the error names the tensor."""
        state = self.state()
        take(root / "a", state)
        take(root / "b", state)
        begin = taking.submit_take

        def free_first(*arguments: Any, **options: Any) -> Any:
            state["large1"].untyped_storage().resize_(0)
            return begin(*arguments, **options)

        monkeypatch.setattr(taking, "submit_take", free_first)
        with pytest.raises(UnsupportedValueError, match="large1: its memory was freed"):
            take(root / "c", state)
        with pytest.raises(SnapshotNotFoundError):
            restored(root / "c")


@pytest.mark.parametrize(
    "metadata",
    [
        {"lr": 0.5, "tags": ["a", {"b": None}], "raw": b"x"},
        {"time": datetime(2026, 1, 2)},
        {"accuracy": {1: 0.5}},
        {"large": 2**64},
        {"set": {1, 2}},
        {"pair": (1, (2, 3))},
        {"keys": {(1, 2): 3}},
        {"path": Path("a/b"), "device": torch.device("cpu")},
        {"deep": [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]},
        {"flag": True, "one": 1, "float": 1.0},
    ],
)
def test_user_metadata_comes_back_as_it_was(tmp_path: Path, metadata: dict[str, Any]) -> None:
    """All plain values may be user metadata, of whatever kind, and keep their types."""
    path = str(tmp_path / "run" / "step")
    Snapshot.take(path, {"s": StateDict(step=1)}, user_metadata=metadata)
    assert repr(Snapshot(path).user_metadata) == repr(metadata)


def test_metrics_of_numpy_stand_in_the_head(tmp_path: Path) -> None:
    """A float of numpy's is one: listings show it, and whoever has no numpy reads it."""
    path = str(tmp_path / "run" / "step")
    Snapshot.take(path, {"s": StateDict(step=1)}, user_metadata={"loss": numpy.float64(0.5)})
    assert Snapshot(path).head.user_metadata == {"loss": 0.5}


def test_a_delete_leaves_a_take_that_is_about_to_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a delete removes was committed before it, or never will be: a take that succeeds leaves its snapshot."""
    path = str(tmp_path / "run" / "latest")
    Snapshot.take(path, {"s": StateDict(t=torch.zeros(300))})
    check = commit._check_alive_after

    def delete_first(*arguments: Any) -> Any:
        Snapshot(path).delete()
        with pytest.raises(SnapshotNotFoundError):
            Snapshot(path).restore({"s": StateDict()})
        return check(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(commit, "_check_alive_after", delete_first)
        Snapshot.take(path, {"s": StateDict(t=torch.ones(300))})
    assert torch.equal(Snapshot(path).read_object("0/s/t"), torch.ones(300))
    Snapshot(path).delete()
    assert not [file for file in (tmp_path / "run" / "latest").rglob("*") if file.is_file()]


def test_what_a_process_remembers_does_not_grow_with_stores(tmp_path: Path) -> None:
    """Of many stores, as where each snapshot has one, the last few are remembered; the others are taken into anew."""
    state = StateDict(t=torch.ones(300))
    for number in range(3 * NUM_STORES):
        path = str(tmp_path / f"alone_{number}")
        Snapshot.take(path, {"s": state}, store=path, encoding="smallest")
    for kept in (structure._structures, history._remembered, known._filled, bases._bases):
        assert len(kept) <= NUM_STORES
    first = str(tmp_path / "alone_0")
    assert Snapshot.take(first, {"s": state}, store=first).stats.new_nbytes == 0  # type: ignore[union-attr]


def test_a_zero_tensor_is_named(tmp_path: Path) -> None:
    """What autograd has made without memory is refused with what to do."""
    with pytest.raises(UnsupportedValueError, match=r"s/t: .* zero tensor"):
        Snapshot.take(str(tmp_path / "run"), {"s": StateDict(t=torch._efficientzerotensor((300,)))})
