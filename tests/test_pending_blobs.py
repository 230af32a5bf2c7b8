"""Blobs of a take that become durable together: before the manifest, or the take fails."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from test_local import record_calls

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.errors import StoreError
from torchsnapshot.store.local import LocalBackend


@pytest.mark.parametrize("encoding", ["raw", "smallest"])
@pytest.mark.parametrize("in_background", [False, True])
def test_every_blob_is_durable_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, in_background: bool
) -> None:
    """File and name of each blob, large or packed, are fsynced before the manifest gets its name."""
    state = {"s": StateDict(large=torch.rand(3_000_000), small=torch.rand(1000), zeros=torch.zeros(2_000_000))}
    calls = record_calls(monkeypatch)
    path = str(tmp_path / "run" / "step_1")
    if in_background:
        Snapshot.async_take(path, state, encoding=encoding).wait()
    else:
        Snapshot.take(path, state, encoding=encoding)
    names = {call[2]: index for index, call in enumerate(calls) if call[0] == "rename"}
    temporary = {call[2]: call[1] for call in calls if call[0] == "rename"}
    manifest = next(index for name, index in names.items() if "/.manifests/" in name and not name.endswith(".ok"))
    blobs = [name for name in names if "/blobs/" in name]
    assert len(blobs) >= 3
    for blob in blobs:
        before = calls[:manifest]
        assert ("fsync", blob) in before or ("fsync", temporary[blob]) in before
        assert ("fsync", os.path.dirname(blob)) in calls[names[blob] : manifest]


def test_blobs_that_cannot_be_made_durable_fail_the_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clear word that everything is on the disk there is no snapshot; the next take just works."""
    state = {"s": StateDict(t=torch.rand(2_000_000))}
    root = str(tmp_path / "run")
    Snapshot.take(f"{root}/step_1", state)
    state["s"]["t"].add_(1.0)

    def fail(backend: LocalBackend, keys: Iterable[str]) -> None:
        raise StoreError("the disk does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(LocalBackend, "sync", fail)
        with pytest.raises(StoreError, match="does not answer"):
            Snapshot.take(f"{root}/step_2", state)
    assert [snapshot.name for snapshot in Snapshot.list(root)] == ["step_1"]
    Snapshot.take(f"{root}/step_2", state)
    assert Snapshot(f"{root}/step_2").verify() == []
