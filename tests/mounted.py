"""Filesystems that refuse: read-only ones and small ones, mounted for the time of a ``with`` block.

Mounting takes a privilege that not every machine gives; a test that needs it is skipped there, with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(folder: Path, place: Path) -> Iterator[Path]:
    """The same files once more at ``place``, where nobody can change them."""
    place.mkdir()
    _mount("--bind", str(folder), str(place))
    try:
        _mount("-o", "remount,ro,bind", str(place))
        yield place
    finally:
        _unmount(place)


@contextmanager
def small(place: Path, nbytes: int) -> Iterator[Path]:
    """An empty filesystem with room for this many bytes."""
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={nbytes},mode=755", "none", str(place))
    try:
        yield place
    finally:
        _unmount(place)


def fill(place: Path) -> Path:
    """Leave no byte free; returns the file that takes all the room."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(os.statvfs(place).f_bsize))
        except OSError:
            return filler


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


def _unmount(place: Path) -> None:
    subprocess.run(["umount", str(place)], check=True)
