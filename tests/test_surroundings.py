"""Processes that are set up in unusual ways: takes and restores work there all the same, or say what is wrong."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from torchsnapshot import Snapshot
from torchsnapshot.engine.buffers import map_pages


def test_default_device(tmp_path: Path) -> None:
    """Torch's default device decides nothing: without a target a tensor is read into memory of the host."""
    path = str(tmp_path / "root" / "step_1")
    small, large = torch.arange(3.0), torch.arange(5000.0)
    with torch.device("meta"):
        Snapshot.take(path, {"m": {"small": small, "large": large}})
        state = Snapshot(path).get_state_dict_for_key("m")
        alone = Snapshot(path).read_object("0/m/large")
        target = {"small": None, "large": torch.zeros(5000, dtype=torch.float64, device="cpu")}
        Snapshot(path).restore({"m": target})
    assert torch.equal(state["small"], small)
    assert torch.equal(state["large"], large)
    assert torch.equal(alone, large)
    assert torch.equal(target["small"], small)
    assert torch.equal(target["large"], large.double())


def test_default_dtype(tmp_path: Path) -> None:
    """Nor does torch's default dtype."""
    path = str(tmp_path / "root" / "step_1")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        Snapshot.take(path, {"m": {"w": torch.ones(1000, dtype=torch.float32)}})
        assert Snapshot(path).read_object("0/m/w").dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_deleted_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path below a folder that is gone is an error that says so; an absolute one works."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        with pytest.raises(ValueError, match="the current folder has been deleted"):
            Snapshot.take("root/step_1", {"m": {}})
        Snapshot.take(str(tmp_path / "root" / "step_1"), {"m": {}})
    finally:
        os.chdir(tmp_path)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no memory is left, the error says for what, and what to do."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="PER_RANK_MEMORY_BUDGET_BYTES"):
        map_pages(1 << 20)
