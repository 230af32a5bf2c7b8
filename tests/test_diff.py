"""Differences between two manifests: chunks are counted, whole containers compared, nothing is read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from torchsnapshot import Snapshot
from torchsnapshot.diff import Difference, compare
from torchsnapshot.knobs import override_max_chunk_size_bytes
from torchsnapshot.reading.opening import open_snapshot


@pytest.fixture
def differences(tmp_path: Path) -> Any:
    """Takes two states and returns what differs, by path."""

    def run(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Difference]:
        for name, state in (("before", before), ("after", after)):
            with override_max_chunk_size_bytes(1 << 16):
                Snapshot.take(str(tmp_path / name), {"s": state}, encoding="raw")
        manifests = [open_snapshot(str(tmp_path / name)).manifest for name in ("before", "after")]
        return {difference.path: difference for difference in compare(*manifests)}

    return run


def test_equal_states_do_not_differ(differences: Any) -> None:
    """Two snapshots of one state have no difference, whatever it holds."""
    state = {"t": torch.arange(100_000.0), "small": torch.ones(3), "v": [1, {"x": None}], "empty": {}}
    assert differences(state, state) == {}


def test_changed_chunks_are_counted(differences: Any) -> None:
    """One changed element changes one chunk of its tensor."""
    before = torch.arange(100_000.0)
    after = before.clone()
    after[50_000] += 1
    (difference,) = differences({"t": before}, {"t": after}).values()
    assert (difference.path, difference.change, difference.detail) == ("0/s/t", "changed", "")
    assert (difference.num_chunks, difference.num_new_chunks) == (7, 1)
    assert (difference.nbytes, difference.new_nbytes) == (400_000, 65_536)


def test_inline_tensors_and_values(differences: Any) -> None:
    """What stands in the manifest itself is compared too."""
    found = differences({"t": torch.ones(3), "v": 1, "w": "same"}, {"t": torch.zeros(3), "v": 2, "w": "same"})
    assert {path: difference.change for path, difference in found.items()} == {
        "0/s/t": "changed",
        "0/s/v": "changed",
    }
    assert found["0/s/t"].new_nbytes == 12


def test_leaf_that_becomes_a_container(differences: Any) -> None:
    """A value that is replaced by a container of tensors shows as such, and so do the new paths."""
    found = differences({"x": torch.ones(100)}, {"x": {"a": torch.ones(100)}})
    assert found["0/s/x"].detail == "float32 [100] -> dict"
    assert found["0/s/x/a"].change == "added"


def test_large_value_changes(differences: Any) -> None:
    """A value that is cut into chunks differs by its chunks."""
    found = differences({"v": b"a" * 200_000}, {"v": b"a" * 199_000 + b"b" * 1_000})
    (difference,) = found.values()
    assert difference.num_new_chunks == 1
