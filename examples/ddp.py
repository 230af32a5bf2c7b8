"""Train under DistributedDataParallel, with snapshots; stop it, and go on with another number of ranks.

    torchrun --nproc-per-node 4 examples/ddp.py --root /tmp/ddp --steps 200
    torchrun --nproc-per-node 2 examples/ddp.py --root /tmp/ddp --steps 400     # goes on at step 200
    python examples/ddp.py --root /tmp/ddp --steps 500                          # one process will do, too

It begins with the newest snapshot below ``--root``, if there is one: so it may be killed at any time, and with
torchrun's ``--max-restarts`` or ``--nnodes 1:4`` it is started again by itself. All ranks hold the same model and
optimizer; each content is written once, by one of them. Everything that matters follows from the step, not from the
number of ranks: the batch of a step is always the same, and each rank works on its part of it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from torchsnapshot import RNGState, Snapshot, StateDict

BATCH = 48


def join_group() -> None:
    """The group that torchrun starts; or one of a single process, where nobody started any."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def newest(root: str) -> Snapshot | None:
    """The newest snapshot; rank 0 looks, so that all ranks see the same one."""
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        latest = Snapshot.latest(root)
        found = [None if latest is None else latest.path]
    dist.broadcast_object_list(found)
    return None if found[0] is None else Snapshot(found[0])


def part_of_batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the batch of a step: points, and the values of a function that is to be learned."""
    points = torch.rand(BATCH, 2, generator=torch.Generator().manual_seed(step)) * 4 - 2
    points = points[dist.get_rank() :: dist.get_world_size()].to(device)
    return points, torch.sin(points[:, :1] * 2) * points[:, 1:]


def train(root: str, num_steps: int, every: int, width: int) -> None:
    """Train up to a step, from the newest snapshot on."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).to(
            device
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    progress = StateDict(step=0, loss=float("nan"))
    state = {"model": model, "optimizer": optimizer, "progress": progress, "random": RNGState()}
    snapshot = newest(root)
    if snapshot is not None:
        snapshot.restore(state)
        if rank == 0:
            print(f"{world_size} rank(s) go on after step {progress['step']}, loss {progress['loss']:.4f}")
    pending = None
    while progress["step"] < num_steps:
        points, values = part_of_batch(progress["step"], device)
        loss = nn.functional.mse_loss(model(points), values)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        progress["step"] += 1
        if progress["step"] % every == 0 or progress["step"] == num_steps:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            progress["loss"] = mean.item() / world_size
            pending = Snapshot.async_take(f"{root}/step_{progress['step']}", state)
            if rank == 0:
                print(f"step {progress['step']:>5}  loss {progress['loss']:.4f}")
    if pending is not None:
        pending.wait()
    if rank == 0:
        print(f"ok: step {progress['step']} with {world_size} rank(s), loss {progress['loss']:.4f}")


def main() -> None:
    """Read the arguments, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="ddp_snapshots", help="folder or bucket of the snapshots")
    parser.add_argument("--steps", type=int, default=400, help="train up to this step")
    parser.add_argument("--every", type=int, default=20, help="steps between two snapshots")
    parser.add_argument("--width", type=int, default=256, help="of the hidden layers")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a small model; --every and --width are its own"
    )
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.every, arguments.width) < 1:
        parser.error("--steps, --every and --width must be at least 1")
    if arguments.quick:
        arguments.steps, arguments.every, arguments.width = min(arguments.steps, 12), 4, 64
    join_group()
    train(arguments.root, arguments.steps, arguments.every, arguments.width)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
