"""One call that makes a whole filesystem durable: when it is made, and that its failure is one."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from torchsnapshot.store import whole_filesystem
from torchsnapshot.store.whole_filesystem import MAX_DIRTY_NBYTES, sync_filesystem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the page cache has to write, to be changed."""
    nbytes = [0]
    monkeypatch.setattr(whole_filesystem, "_dirty_nbytes", lambda: nbytes[0])
    return nbytes


def test_it_is_done_where_little_is_to_be_written(tmp_path: Path, dirty: list[int]) -> None:
    """With a clean page cache it is; with more than it may take, or an unknown amount, nothing is."""
    assert sync_filesystem(str(tmp_path))
    dirty[0] = MAX_DIRTY_NBYTES + 1
    assert not sync_filesystem(str(tmp_path))
    dirty[0] = -1
    assert not sync_filesystem(str(tmp_path))


def test_the_page_cache_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be written counts, and what is being written; a system that does not say is not taken as clean."""
    assert whole_filesystem._dirty_nbytes() >= 0
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(whole_filesystem, "_MEMINFO", str(meminfo))
    assert whole_filesystem._dirty_nbytes() == -1
    meminfo.write_text("MemTotal:  1000 kB\nDirty:   12 kB\nWriteback:   8 kB\nWritebackTmp:  99 kB\n")
    assert whole_filesystem._dirty_nbytes() == 20 << 10
    meminfo.write_text("MemTotal:  1000 kB\nDirty:   12 kB\n")
    assert whole_filesystem._dirty_nbytes() == -1


def test_failures_are_raised(tmp_path: Path, dirty: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is one of the caller's; so is a folder that is not there."""
    with pytest.raises(FileNotFoundError):
        sync_filesystem(str(tmp_path / "absent"))

    def fail(file: int) -> int:
        whole_filesystem.ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(whole_filesystem, "_syncfs", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        sync_filesystem(str(tmp_path))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_refusals_are_no_failures(tmp_path: Path, dirty: list[int], monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Where a sandbox does not let the call through, nothing was done, and each file can still be synced."""

    def refuse(file: int) -> int:
        whole_filesystem.ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(whole_filesystem, "_syncfs", refuse)
    assert not sync_filesystem(str(tmp_path))


def test_old_kernels_are_told_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that counts is read from any name of a kernel; one that has none counts as old."""
    for release, wanted in (("5.16.20-generic", (5, 16)), ("6.1.0", (6, 1)), ("5.17-rc1", (5, 17)), ("odd", (0, 0))):
        monkeypatch.setattr(os, "uname", lambda release=release: type("Uname", (), {"release": release}))
        assert whole_filesystem._kernel() == wanted
