"""A copy is a whole snapshot of its own, bit for bit the same, that costs only what its destination lacks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from committed import CHUNK_NBYTES, assert_holds, restored, state_of, take
from faults import Failing
from folders import blobs, generations, keys, manifest, new_process, refs
from memory_states import same

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.copy import copy_snapshot
from torchsnapshot.errors import CorruptionError, MissingBlobError, SnapshotNotFoundError, StoreFullError
from torchsnapshot.maintenance import collect
from torchsnapshot.reading.opening import open_snapshot
from torchsnapshot.stats import Stats
from torchsnapshot.store import locate
from torchsnapshot.store.envelope import Form
from torchsnapshot.store.repository import Repository


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB."""
    new_process()
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A ROOT with the snapshots step_1 and step_2."""
    take(tmp_path / "here" / "step_1", 1)
    take(tmp_path / "here" / "step_2", 2)
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A ROOT that isn't there yet."""
    return tmp_path / "there"


def copy(source: Path, destination: Path, **options: Any) -> Stats:
    """Copy a snapshot."""
    return copy_snapshot(open_snapshot(str(source)), str(destination), **options)


class Seen:
    """A progress that adds up what it is told."""

    def __init__(self) -> None:
        self.total = 0
        self.done = 0
        self.num_finished = 0

    def start(self, label: str, total_nbytes: int | None = None) -> None:
        """See ``Progress.start``."""
        self.total += total_nbytes or 0

    def advance(self, nbytes: int, items: int = 1) -> None:
        """See ``Progress.advance``."""
        self.done += nbytes

    def finish(self) -> None:
        """See ``Progress.finish``."""
        self.num_finished += 1


def test_copy_stands_alone(here: Path, there: Path) -> None:
    """A copy restores exactly where its source is gone."""
    copy(here / "step_1", there / "step_1")
    shutil.rmtree(here)
    assert_holds(there / "step_1", 1)


def test_source_is_as_it_was(here: Path, there: Path) -> None:
    """Copying leaves nothing behind in the source's store."""
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    copy(here / "step_1", there / "step_1")
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_only_what_is_missing_is_written(here: Path, there: Path) -> None:
    """What the destination holds, from another copy or a take of its own, is not written again; figures say so."""
    first = copy(here / "step_1", there / "step_1")
    assert first.reused_nbytes == 0
    assert first.new_nbytes + first.reused_nbytes <= first.state_nbytes
    new_process()
    second = copy(here / "step_2", there / "step_2")
    assert second.reused_nbytes == 2 * CHUNK_NBYTES
    assert second.new_nbytes == first.new_nbytes - 2 * CHUNK_NBYTES
    before = set(blobs(there))
    for _ in range(2):
        again = copy(here / "step_2", there / "step_2 again")
        assert (again.new_nbytes, again.stored_nbytes, again.num_new_chunks, again.num_blobs) == (0, 0, 0, 0)
    assert set(blobs(there)) == before
    assert generations(there / "step_2 again") == ["000002", "000002.ok"]


def test_copy_inside_one_root(here: Path) -> None:
    """Under another name of the same ROOT, or its own, a copy is a manifest and nothing else."""
    before = set(blobs(here))
    copy(here / "step_1", here / "kept" / "best")
    copy(here / "step_2", here / "step_2")
    assert set(blobs(here)) == before
    shutil.rmtree(here / "step_1")
    collect(str(here))
    assert_holds(here / "kept" / "best", 1)
    assert_holds(here / "step_2", 2)


def test_copy_replaces_what_was_there(here: Path, there: Path) -> None:
    """A copy to the path of a snapshot is a take of that path: the old one goes when the new one is committed."""
    take(there / "step_1", 7)
    copy(here / "step_1", there / "step_1")
    assert_holds(there / "step_1", 1)
    assert generations(there / "step_1") == ["000002", "000002.ok"]


def test_keys_are_the_copys_own(here: Path, there: Path) -> None:
    """Every blob of a copy has a key that its own take made, so that no collector takes one for the other."""
    copy(here / "step_1", there / "step_1")
    assert keys(there / "step_1") == set(blobs(there))
    assert keys(there / "step_1").isdisjoint(keys(here / "step_1"))
    head = manifest(there / "step_1").head
    assert all(head.take_id in key for key in keys(there / "step_1"))
    assert head.store_id == Repository.open(locate.open_root(there)).store_id


def test_what_pays_to_encode_is_found_once(here: Path, there: Path) -> None:
    """What the source stores encoded is encoded in the copy, what it stores raw stays raw."""
    take(here / "packed", 3, encoding="smallest")
    take(here / "raw", 4, encoding="raw")
    for name in ("packed", "raw"):
        copy(here / name, there / name)
        for path in ("app/smooth", "app/large"):
            is_raw = [[ref.form is Form.RAW for ref in refs(root / name, path)] for root in (here, there)]
            assert is_raw[0] == is_raw[1]
    assert {ref.form for ref in refs(there / "packed", "app/smooth")} == {Form.ENCODED}
    assert {ref.form for ref in refs(there / "raw", "app/smooth")} == {Form.RAW}
    assert_holds(there / "packed", 3)
    assert_holds(there / "raw", 4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
def test_every_kind_of_entry(here: Path, there: Path) -> None:
    """Entries are taken over as they are: views, sparse and quantized tensors, large values, pickles, metadata."""
    values: dict[str, Any] = {
        "transposed": torch.arange(60_000, dtype=torch.bfloat16).reshape(200, 300).t(),
        "channels": torch.rand(2, 8, 40, 40).to(memory_format=torch.channels_last),
        "sparse": torch.eye(50).to_sparse(),
        "rows": torch.eye(50).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.rand(5000), 0.1, 3, torch.qint8),
        "parameter": torch.nn.Parameter(torch.rand(70_000)),
        "empty": torch.zeros(0, 3),
        "long": list(range(50_000)),
        "bytes": bytes(range(256)) * 500,
        "keys": {1: "a", "1": "b", "a/b%": torch.ones(2)},
    }
    tied = torch.rand(20_000)
    values |= {"tied": tied, "tied too": tied}
    metadata = {"small": 1, "large": "x" * 5000}
    Snapshot.take(str(here / "all"), {"app": StateDict(**values)}, user_metadata=metadata)
    copy(here / "all", there / "all")
    new_process()
    shutil.rmtree(here)
    assert same(restored(there / "all"), values)
    assert Snapshot(str(there / "all")).user_metadata == metadata
    assert Snapshot(str(there / "all")).verify() == []


def test_pickles_are_copied_unopened(here: Path, there: Path) -> None:
    """A copy carries what only pickle can hold without loading it, small or large."""
    objects = {"small": Fraction(1), "large": Fraction(list(range(30_000)))}
    Snapshot.take(str(here / "objects"), {"app": StateDict(**objects)})
    Fraction.num_loaded = 0
    copy(here / "objects", there / "objects")
    assert Fraction.num_loaded == 0
    target = StateDict()
    Snapshot(str(there / "objects")).restore({"app": target}, allow_pickle=True)
    assert target["large"].content == objects["large"].content
    assert Fraction.num_loaded == 2


class Fraction:
    """Something that only pickle can hold."""

    num_loaded = 0

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_fraction, (self.content,)


def _load_fraction(content: Any) -> Fraction:
    Fraction.num_loaded += 1
    return Fraction(content)


def test_new_store_cuts_as_the_source_does(here: Path, there: Path) -> None:
    """A store that a copy makes has the source's size of chunks, so that takes at both share with copies."""
    new_process()
    with knobs.override_max_chunk_size_bytes(4 * CHUNK_NBYTES):
        copy(here / "step_1", there / "step_1")
    assert Repository.open(locate.open_root(there)).chunk_nbytes == CHUNK_NBYTES
    new_process()
    stats = take(there / "step_2", 1).stats
    assert stats is not None
    assert stats.num_new_chunks == 0


def test_store_may_be_named(here: Path, tmp_path: Path) -> None:
    """``store=`` puts the copy's store where a take's would be."""
    copy(here / "step_1", tmp_path / "archive" / "7" / "step_1", store=str(tmp_path / "archive"))
    assert (tmp_path / "archive" / ".torchsnapshot").exists()
    assert not (tmp_path / "archive" / "7" / ".torchsnapshot").exists()
    assert_holds(tmp_path / "archive" / "7" / "step_1", 1)


def test_places_where_no_take_may_be(here: Path, there: Path) -> None:
    """A copy goes nowhere where a take couldn't."""
    with pytest.raises(ValueError, match="inside the folder of the snapshot"):
        copy(here / "step_1", here / "step_2" / "below")
    (there.parent / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        copy(here / "step_1", there.parent / "file")


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_source(here: Path, there: Path, damage: str) -> None:
    """What can't be read as it was written is not copied: there is no snapshot then, and nothing wrong in the store."""
    ref = refs(here / "step_1", "app/large")[0]
    blob = blobs(here)[ref.key]
    data = bytearray(blob.read_bytes())
    data[77] ^= 1
    blob.unlink() if damage == "remove" else blob.write_bytes(data)
    with pytest.raises(MissingBlobError if damage == "remove" else CorruptionError, match=ref.key):
        copy(here / "step_1", there / "step_1")
    with pytest.raises(SnapshotNotFoundError):
        restored(there / "step_1")
    copy(here / "step_2", there / "step_2")
    collect(str(there))
    assert set(blobs(there)) == keys(there / "step_2")
    assert_holds(there / "step_2", 2)


def test_destination_that_fills_up(here: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fails leaves what was at the destination, and the next one finishes the work."""
    take(there / "step_1", 7)
    source = open_snapshot(str(here / "step_1"))
    num_puts = [0]

    def is_third_blob(operation: str, key: str) -> bool:
        num_puts[0] += operation == "put" and "/blobs/" in key
        return num_puts[0] > 2 and operation == "put"

    real = locate.open_backend
    with monkeypatch.context() as patch:
        patch.setattr(
            locate,
            "open_backend",
            lambda *args, **options: Failing(real(*args, **options), is_third_blob, lambda: StoreFullError("full")),
        )
        with pytest.raises(StoreFullError, match="full"):
            copy_snapshot(source, str(there / "step_1"))
    assert_holds(there / "step_1", 7)
    copy(here / "step_1", there / "step_1")
    collect(str(there))
    assert_holds(there / "step_1", 1)
    assert set(blobs(there)) == keys(there / "step_1")


def test_source_that_was_taken_again(here: Path, there: Path) -> None:
    """A copy is of the generation that is committed when it begins to read, whatever was there when it was opened."""
    source = open_snapshot(str(here / "step_1"))
    take(here / "step_1", 5)
    copy_snapshot(source, str(there / "step_1"))
    assert_holds(there / "step_1", 5)
    source = open_snapshot(str(here / "step_1"))
    Snapshot(str(here / "step_1")).delete()
    with pytest.raises(SnapshotNotFoundError, match="just been deleted"):
        copy_snapshot(source, str(there / "again"))
    assert not (there / "again").exists()


def test_progress_adds_up(here: Path, there: Path) -> None:
    """Progress is told of every byte that is copied, and of no other."""
    for name in ("step_1", "step_2"):
        seen = Seen()
        stats = copy(here / name, there / name, progress=seen)
        assert seen.total == seen.done == stats.new_nbytes
        assert seen.num_finished == 1


def test_next_take_shares_with_a_copy(here: Path, there: Path) -> None:
    """A run that goes on from a copy writes what changes from there on."""
    copy(here / "step_1", there / "step_1")
    new_process()
    state = state_of(1)
    target = StateDict(**state_of(9))
    Snapshot(str(there / "step_1")).restore({"app": target})
    assert same(target.data, state)
    target["large"][3] += 1
    stats = Snapshot.take(str(there / "step_2"), {"app": target}).stats
    assert stats is not None
    assert (stats.num_new_chunks, stats.new_nbytes) == (1, CHUNK_NBYTES)
