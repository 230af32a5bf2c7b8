"""Training jobs that are killed while they take, started again with another number of ranks, and lose nothing."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import launch, side_by_side, succeed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.coordination import distributed
from torchsnapshot.coordination.sessions import Limits
from torchsnapshot.errors import SnapshotError
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.local import LocalBackend

NUM_STEPS = 8
WIDTH = 24

SILENCE = 10.0
"""Seconds. Long enough for a living process on a busy machine to beat."""


def new_model() -> torch.nn.Module:
    """The same on every rank, in doubles: what is left of the order of additions is far below any tolerance."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 40), torch.nn.Tanh(), torch.nn.Linear(40, 17), torch.nn.Tanh(), torch.nn.Linear(17, 1)
    ).double()


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank computes with the whole batch, so that a step does not depend on how many ranks there are."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(16, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, inputs.sin().sum(1, keepdim=True)


def jobs() -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """A model under DDP and one under FSDP2, each with its optimizer."""
    replicated = DistributedDataParallel(new_model())
    sharded = new_model()
    for layer in sharded:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(sharded)
    return {
        "ddp": (replicated, torch.optim.AdamW(replicated.parameters(), lr=0.01)),
        "fsdp2": (sharded, torch.optim.AdamW(sharded.parameters(), lr=0.01)),
    }


def die_at_a_put() -> None:
    """From now on, the next blob that this process puts is its end."""
    put = LocalBackend.put

    def deadly(self: Backend, key: str, *args: Any, **options: Any) -> None:
        if key.startswith(".torchsnapshot/blobs/"):
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, key, *args, **options)  # type: ignore[arg-type]

    LocalBackend.put = deadly  # type: ignore[method-assign,assignment]


def train(root: str, folder: str, killed: list[int], last_step: int, in_background: bool) -> dict[str, Any]:
    """Go on from the latest snapshot and take one after each step.

    Args:
        root: where the snapshots are.
        folder: where losses are written, a file for each step.
        killed: the ranks that are killed while they take the last step's snapshot.
        last_step: where the job ends.
        in_background: takes are asynchronous.
    """
    distributed.Limits = partial(Limits, silence=SILENCE, acknowledgement=SILENCE)  # type: ignore[misc,assignment]
    models = jobs()
    progress = StateDict(step=0)
    app_state: dict[str, Any] = {"progress": progress}
    for name, (model, optimizer) in models.items():
        app_state |= {name: model, f"{name}_optimizer": optimizer}
    latest = Snapshot.latest(root)
    begun_at = None
    if latest is not None:
        latest.restore(app_state)
        begun_at = progress["step"]
    pending = None
    while progress["step"] < last_step:
        step = progress["step"]
        inputs, targets = batch_of(step)
        for name, (model, optimizer) in models.items():
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if dist.get_rank() == 0:
                Path(folder, f"{name}-{step}").write_text(loss.detach().numpy().tobytes().hex())
        progress["step"] = step + 1
        if step + 1 == last_step and dist.get_rank() in killed:
            if pending is not None:
                pending.wait()
            die_at_a_put()
        try:
            if in_background:
                pending = Snapshot.async_take(f"{root}/step_{step + 1}", app_state)
                if step + 1 == last_step:
                    pending.wait()
            else:
                Snapshot.take(f"{root}/step_{step + 1}", app_state)
        except SnapshotError as error:
            # the survivors of the group can no longer leave it in an orderly way
            Path(folder, f"told-{dist.get_rank()}").write_text(f"{type(error).__name__} {error}")
            os._exit(7)
    return {"begun at": begun_at}


def losses_in(folder: Path) -> dict[str, float]:
    """Every step's loss that was written last."""
    return {
        file.name: torch.frombuffer(bytearray.fromhex(file.read_text()), dtype=torch.float64).item()
        for file in folder.iterdir()
        if not file.name.startswith("told")
    }


def test_killed_jobs_go_on_with_the_same_losses(tmp_path: Path) -> None:
    """One rank killed in an asynchronous take, then all in a synchronous one; 2 ranks, then 4, then 1."""
    root, folder, reference = str(tmp_path / "root"), tmp_path / "losses", tmp_path / "reference"
    folder.mkdir()
    reference.mkdir()
    # interpreters as torchrun starts them; while the survivor waits, another job trains without interruption
    first, uninterrupted = side_by_side(
        partial(launch, 2, train, args=[root, str(folder), [1], 3, True], fresh=True),
        partial(launch, 1, train, args=[str(tmp_path / "other"), str(reference), [], NUM_STEPS, False]),
    )
    assert [outcome.exit_code for outcome in first] == [7, -signal.SIGKILL], [each.output for each in first]
    told = (folder / "told-0").read_text()
    assert told.startswith("RankError Failed on rank 1: lost"), told

    second = launch(4, train, args=[root, str(folder), [0, 1, 2, 3], 6, False])
    killed = [outcome.exit_code for outcome in second]
    # replicas are written by one of the ranks, so one may have had nothing to put; it is told of the others
    assert killed.count(-signal.SIGKILL) >= 3, [each.output for each in second]
    assert set(killed) <= {-signal.SIGKILL, 7}

    third = succeed(launch(1, train, args=[root, str(folder), [], NUM_STEPS, True]))
    assert third[0].result() == {"begun at": 5}

    succeed(uninterrupted)
    expected = losses_in(reference)
    assert len(expected) == 2 * NUM_STEPS
    found = losses_in(folder)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert abs(found[name] - loss) <= 1e-12 * abs(loss), name
