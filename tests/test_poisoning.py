"""Tensors that change while they are taken: the snapshot may hold any mix, but every blob is what its key says.

A blob that held other bytes than its digest says would be shared by every later take of that content.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from folders import blobs, mislabelled, new_process

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.maintenance import collect

CHUNK_NBYTES = 2 << 20
NUM_TAKES = 6


@contextmanager
def somebody_writing(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Another thread that changes these tensors all the time, behind autograd's back and without any lock."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        generator = torch.Generator().manual_seed(1)
        try:
            while not stop.is_set():
                for tensor in tensors:
                    # ever the same few values, so that much of the content is known and comes again
                    tensor.fill_(int(torch.randint(0, 3, (), generator=generator)))
                    place = int(torch.randint(0, tensor.numel(), (), generator=generator))
                    tensor.view(-1)[place:].add_(1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


@pytest.mark.parametrize("encoding", ["raw", "smallest"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_blob_matches_its_key_whatever_writes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, encoding: str
) -> None:
    """After takes of tensors that another thread changes, each blob's content has the digest in its key."""
    new_process()
    # what survives a power cut is not the question here
    monkeypatch.setenv(knobs.DURABLE, "0")
    root = tmp_path / "run"
    memory = [
        torch.zeros(3_000_000),
        torch.zeros(200, 300, dtype=torch.bfloat16),
        torch.zeros(100_000, dtype=torch.int64),
        *(torch.zeros(2000) for _ in range(20)),
        torch.zeros(200_000),
        torch.zeros(40),
    ]
    tensors = [memory[0], memory[1].t(), *memory[2:-2], memory[-2][::2], memory[-1]]
    state = {"s": StateDict(**{f"t{number}": tensor for number, tensor in enumerate(tensors)})}
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        with somebody_writing(memory):
            for step in range(NUM_TAKES):
                path = str(root / f"step_{step}")
                if asynchronous:
                    Snapshot.async_take(path, state, encoding=encoding).wait()
                else:
                    Snapshot.take(path, state, encoding=encoding)
                if step % 3 == 2:
                    new_process()
        assert len(blobs(root)) > NUM_TAKES
        assert mislabelled(root) == []
        for snapshot in Snapshot.list(str(root)):
            assert snapshot.verify(depth="bytes") == []
            snapshot.restore({"s": StateDict()})
        # a take of tensors that keep still shares with all of these, and restores bit for bit
        Snapshot.take(str(root / "last"), state, encoding=encoding)
        target = StateDict()
        Snapshot(str(root / "last")).restore({"s": target})
        for number, tensor in enumerate(tensors):
            assert torch.equal(target[f"t{number}"], tensor)
        collect(str(root))
        assert mislabelled(root) == []
