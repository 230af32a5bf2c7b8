"""Every backend keeps the contract: memory, local disk, fsspec's memory, S3 through s3fs, GCS through gcsfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_contract import BackendContract

from torchsnapshot.store.backend import Backend
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.memory import MemoryBackend
from torchsnapshot.store.remote import RemoteBackend

KINDS = ("memory", "local", "local-not-durable", "fsspec-memory", "s3", "gcs")


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """An empty store of each kind."""
    kind = request.param
    if kind == "memory":
        opened: Backend = MemoryBackend()
    elif kind.startswith("local"):
        opened = LocalBackend(str(tmp_path / "new" / "root"), durable=kind == "local")
    elif kind == "fsspec-memory":
        opened = RemoteBackend(f"memory://{os.urandom(8).hex()}/root")
    else:
        url, options = request.getfixturevalue(f"{kind}_url")
        opened = RemoteBackend(url, options)
    with opened:
        yield opened


class TestContract(BackendContract):
    pass


def test_memory_clock() -> None:
    """The memory backend's times are those of the clock that the test gave it."""
    now = [100.0]
    backend = MemoryBackend(clock=lambda: now[0])
    backend.put("key", b"")
    now[0] = 200.0
    assert backend.stat("key").modified == 100.0
    backend.touch("key")
    assert backend.stat("key").modified == 200.0
