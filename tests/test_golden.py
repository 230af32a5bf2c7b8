"""Stores that earlier versions wrote are read for ever: every value, every listing, every check; gc leaves them be.

They are in ``tests/golden``, one for each version of the format; ``make_golden`` makes them, of ``golden_states``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_states
import numpy as np
import pytest
import read_format
import torch
from folders import blobs, manifest, new_process, refs
from make_golden import CHUNK_NBYTES, GOLDEN, MAX_NBYTES, describe, forms_in, take
from memory_states import same

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.chunks.encoded import read_header
from torchsnapshot.cli import main
from torchsnapshot.errors import PickleRefusedError
from torchsnapshot.maintenance import collect
from torchsnapshot.state.dtypes import DTYPES
from torchsnapshot.verify import VerifyResult, verify_path

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse", "ignore:ComplexHalf", "ignore:torch.quantize", "ignore:The given buffer is not writable"
)

VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
NAMES = ["kinds", "quantized", "ranks", "tables", "training/step_1", "training/step_2", "training/step_3"]
"""The snapshots that every version has."""
LEVELLED = [version for version in VERSIONS if (GOLDEN / version / "runs" / "moments").exists()]
"""Versions that know chunks with levels."""


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest) -> Path:
    """A folder of ``tests/golden``, to be looked at only."""
    return GOLDEN / str(request.param)


@pytest.fixture
def root(golden: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of a golden store, which must come out of every test with all that its snapshots need."""
    shutil.copytree(golden / "runs", tmp_path / "runs")
    new_process()
    yield tmp_path / "runs"
    assert verify_path(str(tmp_path / "runs"), "bytes").problems == []


def names_in(golden: Path) -> list[str]:
    """The snapshots that a version took."""
    return sorted(json.loads((golden / "expected.json").read_text(encoding="utf-8"))["snapshots"])


def restored(path: Path, keys: list[str], target: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a snapshot holds under these keys of the app_state."""
    app_state = {key: StateDict(**(target or {}).get(key, {})) for key in keys}
    Snapshot(str(path)).restore(app_state, allow_pickle=True)
    return {key: stateful.data for key, stateful in app_state.items()}


def test_there_is_a_golden_store() -> None:
    """Stores are committed, and small."""
    assert VERSIONS
    for version in VERSIONS:
        files = [path for path in (GOLDEN / version / "runs").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= MAX_NBYTES


def test_every_kind_is_exactly_what_was_taken(root: Path) -> None:
    """Tensors of every dtype, shape, order and layout, arrays, values and containers of every kind, and pickles."""
    expected = golden_states.kinds()
    found = restored(root / "kinds", list(expected), {"values": golden_states.every_value()})
    for key, values in expected.items():
        assert list(found[key]) == list(values)
        for name, value in values.items():
            assert same(found[key][name], value), f"{key}: {name}"


def test_every_dtype_of_the_table_is_there(root: Path) -> None:
    """No dtype that this version of torch has is missing in the store."""
    paths = set(Snapshot(str(root / "kinds")).get_manifest())
    for name, row in DTYPES.items():
        if isinstance(getattr(torch, name, None), torch.dtype) and not row.quantized:
            assert f"0/dtypes/{name} large" in paths


def test_order_in_memory_comes_back(root: Path) -> None:
    """Permuted tensors have the strides that they had."""
    found = restored(root / "kinds", ["shapes"])["shapes"]
    expected = golden_states.every_shape()
    for name in ("transposed", "channels last"):
        assert found[name].stride() == expected[name].stride()


@pytest.mark.parametrize(("name", "step"), [("step_1", 1), ("step_2", 2), ("step_3", 4)])
def test_training_is_exactly_what_was_taken(root: Path, name: str, step: int) -> None:
    """Encoded chunks, deltas and packs are the numbers that they were, in new memory and in place."""
    path = root / "training" / name
    expected = golden_states.training(step)
    assert same(restored(path, list(expected)), expected)
    target = golden_states.training(9)
    place = target["model"]["fp32"].data_ptr()
    found = restored(path, list(expected), target)
    assert same(found, expected)
    assert found["model"]["fp32"].data_ptr() == place
    for tensor in ("model/fp32", "model/bf16", "optimizer/state/1/exp_avg_sq"):
        read: Any = Snapshot(str(path)).read_object(f"0/{tensor}")
        value: Any = expected
        for part in tensor.split("/"):
            value = value[int(part) if part.isdigit() else part]
        assert same(read, value)


@pytest.mark.parametrize("golden", [GOLDEN / version for version in LEVELLED], ids=LEVELLED)
def test_moments_are_exactly_what_was_taken(golden: Path, root: Path) -> None:
    """Chunks with levels, of two widths, are the numbers that they were; the other reader says so too."""
    expected = golden_states.moments()
    assert same(restored(root / "moments", list(expected)), expected)
    stored = {key: path.read_bytes() for key, path in blobs(root).items()}
    (path,) = (found for found in (root / "moments" / ".manifests").iterdir() if found.suffix != ".ok")
    sections = read_format.read_sections(path.read_bytes())
    tables, _ = read_format.read_envelope(sections[read_format.ENVELOPE], stored.__getitem__)
    entries = read_format.read_entries(sections[read_format.ENTRIES])
    for name, value in expected["optimizer"].items():
        data = read_format.read_tensor(entries[f"0/optimizer/{name}"], tables, value.element_size(), stored.__getitem__)
        assert data == value.view(torch.uint8).numpy().tobytes()
        first = refs(root / "moments", f"optimizer/{name}")[0]
        assert read_header(memoryview(stored[first.key])).row_length == 64


def test_there_are_chunks_with_levels() -> None:
    """At least one version wrote such chunks."""
    assert LEVELLED


def test_quantized_tensors(root: Path) -> None:
    """As long as torch has them."""
    expected = golden_states.quantized()
    assert same(restored(root / "quantized", ["quantized"]), expected)


@pytest.mark.parametrize("name", ["ranks", "tables"])
def test_many_ranks(root: Path, name: str) -> None:
    """What two ranks took together is whole for one process; so it is with chunk tables in blobs of their own."""
    snapshot = Snapshot(str(root / name))
    assert snapshot.metadata.world_size == golden_states.NUM_RANKS
    for rank in range(golden_states.NUM_RANKS):
        for key, value in golden_states.of_rank(rank).items():
            read: Any = snapshot.read_object(f"{rank}/app/{key}")
            assert same(read, value), f"{rank}: {key}"
    target = StateDict(sharded=torch.zeros(golden_states.SHARDED_SHAPE))
    snapshot.restore({"app": target}, paths=["app/sharded"])
    assert torch.equal(target["sharded"], golden_states.sharded())


def test_pickles_are_refused_as_ever(root: Path) -> None:
    """Nothing in an old store is unpickled unless that is allowed."""
    with pytest.raises(PickleRefusedError, match=r"fractions\.Fraction") as caught:
        Snapshot(str(root / "kinds")).restore({"objects": StateDict()})
    assert "collections.ChainMap" in str(caught.value)


def test_user_metadata(root: Path) -> None:
    """It comes back from the head, and from an entry where it was too large for that."""
    step = {snapshot.name: snapshot.user_metadata for snapshot in Snapshot.list(str(root))}
    assert step["kinds"] == golden_states.LARGE_USER_METADATA
    assert step["training/step_2"] == {**golden_states.USER_METADATA, "step": 2}
    assert step["training/step_3"] == {}


def test_listing_and_manifests_are_as_ever(golden: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The snapshots, their sizes and the paths of their manifests are what the version that wrote them saw."""
    expected = json.loads((golden / "expected.json").read_text(encoding="utf-8"))
    assert describe(root) == expected["snapshots"]
    assert set(names_in(golden)) >= set(NAMES)
    assert sorted(forms_in(root)) == expected["forms"]
    assert main(["ls", str(root), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["snapshots"]
    assert [found["name"] for found in listed] == [snapshot.name for snapshot in Snapshot.list(str(root))]
    for name in names_in(golden):
        assert main(["show", str(root / name), "--digests"]) == 0
    assert main(["du", str(root)]) == 0
    assert main(["diff", str(root / "training" / "step_1"), str(root / "training" / "step_2")]) == 0
    assert "model/fp32" in capsys.readouterr().out


def test_every_way_to_store_a_chunk_is_there(golden: Path) -> None:
    """Raw, encoded and delta; alone, in a pack, in a table blob."""
    forms = set(json.loads((golden / "expected.json").read_text(encoding="utf-8"))["forms"])
    assert forms >= {"RAW", "ENCODED", "DELTA", "plain", "z", "d", "p", "t"}


@pytest.mark.parametrize("depth", ["manifests", "blobs", "bytes"])
def test_verify_is_clean(golden: Path, root: Path, depth: Any) -> None:
    """Nothing is wrong with them at any depth."""
    assert verify_path(str(root), depth) == VerifyResult(names_in(golden), [])


def test_gc_deletes_nothing_that_is_needed(golden: Path, root: Path) -> None:
    """Every blob is referenced, so a collection frees nothing, planned or done; after a removal it frees the rest."""
    before = set(blobs(root))
    assert len(before) == num_needed(root)
    for dry_run in (True, False):
        report = collect(str(root), dry_run=dry_run)
        assert (report.freed_blobs, report.kept_blobs, report.snapshots) == (0, len(before), len(names_in(golden)))
    assert set(blobs(root)) == before
    shutil.rmtree(root / "kinds")
    collect(str(root))
    assert set(blobs(root)) < before
    assert len(blobs(root)) == num_needed(root)


def num_needed(root: Path) -> int:
    """How many blobs the snapshots refer to."""
    needed: set[str] = set()
    for snapshot in Snapshot.list(str(root)):
        stored = manifest(snapshot.path)
        by_key = {key: path.read_bytes() for key, path in blobs(root).items()}
        needed |= stored.envelope.all_keys(by_key.__getitem__)
    return len(needed)


def test_an_old_store_is_written_on(root: Path) -> None:
    """A take of this version shares with what an old one wrote: the same state is not written again."""
    before = set(blobs(root))
    state = {key: StateDict(**value) for key, value in golden_states.training(4).items()}
    stats = Snapshot.take(str(root / "training" / "step_4"), state, encoding="raw").stats
    assert stats is not None
    assert stats.num_new_chunks == 0
    assert set(blobs(root)) == before
    take(str(root / "training" / "step_5"), golden_states.training(5))
    assert same(restored(root / "training" / "step_5", list(state)), golden_states.training(5))
    assert stats.num_chunks >= 6000 * 6 // CHUNK_NBYTES


def test_another_reader_agrees(root: Path) -> None:
    """The reader that was written from the page about the format finds the same numbers."""
    stored = {key: path.read_bytes() for key, path in blobs(root).items()}
    for name, step in (("step_1", 1), ("step_2", 2), ("step_3", 4)):
        (path,) = (found for found in (root / "training" / name / ".manifests").iterdir() if found.suffix != ".ok")
        sections = read_format.read_sections(path.read_bytes())
        tables, needed = read_format.read_envelope(sections[read_format.ENVELOPE], stored.__getitem__)
        assert needed <= stored.keys()
        entries = read_format.read_entries(sections[read_format.ENTRIES])
        for tensor, value in golden_states.training(step)["model"].items():
            entry = entries[f"0/model/{tensor}"]
            data = read_format.read_tensor(entry, tables, value.element_size(), stored.__getitem__)
            assert data == value.view(torch.uint8).numpy().tobytes()
            assert isinstance(np.frombuffer(data, np.uint8), np.ndarray)
