"""Looking for the blobs of what is unchanged: many at once, beside the workers, and never in their way."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import new_process

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.engine.run import Run
from torchsnapshot.store import known
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.mounts import Coherence

NUM_CHUNKS = 40


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, StateDict]:
    """A state of many chunks of a megabyte, which ``tmp_path / "run"`` holds already."""
    # nothing is known of memory that these tensors may come to lie in
    new_process()
    monkeypatch.setenv("TORCHSNAPSHOT_CHUNK_SIZE_BYTES_OVERRIDE", str(1 << 20))
    app_state = {
        "w": StateDict(**{f"w{number}": torch.full((1 << 18,), float(number)) for number in range(NUM_CHUNKS)})
    }
    for number in range(2):
        Snapshot.take(str(tmp_path / "run" / f"step_{number}"), app_state, encoding="raw")
    return app_state


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sizes each request has asked for."""
    found: list[int] = []
    sizes = LocalBackend.sizes

    def counted(self: LocalBackend, keys: Sequence[str]) -> Mapping[str, int]:
        found.append(len(keys))
        return sizes(self, keys)

    monkeypatch.setattr(LocalBackend, "sizes", counted)
    # however quick the workers are
    monkeypatch.setattr(Run, "is_staged", False)
    return found


def test_all_blobs_are_looked_for_in_batches(tmp_path: Path, state: dict[str, StateDict], asked: list[int]) -> None:
    """An unchanged take asks for its blobs by many at once; each blob is asked for once at most."""
    stats = Snapshot.take(str(tmp_path / "run" / "x"), state, encoding="raw").stats
    assert stats is not None
    assert stats.new_nbytes == 0
    assert asked
    assert max(asked) <= known.BATCH_LENGTH
    assert sum(asked) <= NUM_CHUNKS


def test_a_lost_blob_is_found_missing(tmp_path: Path, state: dict[str, StateDict], asked: list[int]) -> None:
    """What is not there any more, or has another size, is written anew."""
    blobs = sorted((tmp_path / "run" / ".torchsnapshot" / "blobs").rglob("*-*"))
    assert len(blobs) == NUM_CHUNKS
    blobs[3].unlink()
    os.truncate(blobs[30], 100)
    snapshot = Snapshot.take(str(tmp_path / "run" / "x"), state, encoding="raw")
    assert asked
    assert snapshot.stats is not None
    assert snapshot.stats.num_new_chunks == 2
    assert snapshot.verify() == []


def test_looking_stops_when_all_is_staged(
    tmp_path: Path, state: dict[str, StateDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks for blobs does not keep the caller once the workers have found out for themselves."""
    batches: list[int] = []
    look_for = known.Known.look_for

    def slowly(self: known.Known, refs: Sequence[ChunkRef], goes_on: Any) -> None:
        def next_one() -> bool:
            batches.append(1)
            # the workers need no help: they are waited for here
            while len(batches) == 1 and goes_on():
                threading.Event().wait(0.01)
            return bool(goes_on())

        look_for(self, refs, next_one)

    monkeypatch.setattr(known.Known, "look_for", slowly)
    pending = Snapshot.async_take(str(tmp_path / "run" / "x"), state, encoding="raw")
    assert len(batches) == 1
    pending.wait()
    assert pending.stats.new_nbytes == 0


def test_network_filesystems_are_not_asked(
    tmp_path: Path, state: dict[str, StateDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There each size would be waited for by the one thread that training waits for; workers ask side by side."""
    backend = LocalBackend(str(tmp_path / "run"))
    (key,) = [info.key for info in backend.list(".torchsnapshot/blobs")][:1]
    assert list(backend.sizes([key])) == [key]
    cached = replace(backend.mount, coherence=Coherence.CACHED)
    monkeypatch.setattr(LocalBackend, "mount", property(lambda self: cached))
    assert backend.sizes([key]) == {}
    stats = Snapshot.take(str(tmp_path / "run" / "x"), state, encoding="raw").stats
    assert stats is not None
    assert stats.new_nbytes == 0


def test_an_interrupt_leaves_no_worker_behind(
    tmp_path: Path, state: dict[str, StateDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while blobs are looked for: steps that run come to their end before the lease goes."""
    state["w"]["w0"] += 0.5
    putting, leases = threading.Event(), tmp_path / "run" / ".torchsnapshot" / "leases"
    put_later, seen = LocalBackend.put_later, list[bool]()

    def slowly(self: LocalBackend, key: str, data: Any, *, aligned: bool = False) -> None:
        putting.set()
        threading.Event().wait(0.3)
        seen.append(any(leases.iterdir()))
        put_later(self, key, data, aligned=aligned)

    def interrupted(*_: Any) -> None:
        assert putting.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalBackend, "put_later", slowly)
    monkeypatch.setattr(known.Known, "look_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Snapshot.take(str(tmp_path / "run" / "x"), state, encoding="raw")
    assert seen == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torchsnapshot-")]
    assert list(leases.iterdir()) == []
