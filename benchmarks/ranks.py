"""Takes and restores of several processes, replicated and sharded, beside DCP; and what resharding costs.

Every process is a rank of one gloo group on this machine. What a reshard writes anew is computed: content is what lies
in a box of the grid, so it is known already if that box was a chunk before.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.part import REPOSITORY, Options, new_folder, run_part, size_on_disk
from benchmarks.report import Line, Result, megabytes, readable
from torchsnapshot import Snapshot, StateDict
from torchsnapshot.coordination import sessions
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.mesh_cells import cell_for
from torchsnapshot.geometry.placements import Placement, Sharding

WORLDS = (1, 2, 4)
CHUNK_NBYTES = 4 << 20
_c10d: Any = dist
"""Its types name no stores."""

KINDS = ("replicated", "sharded")


def measure(options: Options) -> Result:
    """Measure every number of processes with every kind of state."""
    nbytes = 1 << 20 if options.quick else 256 << 20
    result = Result(facts={"state_nbytes": nbytes})
    worlds = WORLDS[:2] if options.quick else WORLDS
    for world_size in worlds:
        for kind in KINDS:
            found = _launch(world_size, kind, nbytes, options)
            _note(result, f"{kind}, {world_size} processes", found, options.peers != "none")
    for dim in (0, 1):
        share = share_anew((8192, 8192), dim, 4, 8)
        result.facts[f"4 to 8 ranks, dim {dim}: share written anew"] = share
        result.lines.append(
            Line(f"4 → 8 ranks, shards of dim {dim}: written anew", "", f"{share:.0%}", "", "", "shown")
        )
    return result


def share_anew(shape: tuple[int, int], dim: int, before: int, after: int) -> float:
    """The part of a tensor's bytes that another number of ranks writes anew, though nothing has changed."""
    meshes = [Sharding((size,), tuple(range(size)), (Placement(dim),)) for size in (before, after)]
    old = cell_for(shape, meshes[0], 4, CHUNK_NBYTES)
    new = cell_for(shape, meshes[1], 4, CHUNK_NBYTES, old)
    chunks = [
        {piece.box: piece.nbytes for boxes in mesh.regions(shape) for box in boxes for piece in grid.cut(box, cell, 4)}
        for mesh, cell in zip(meshes, (old, new), strict=True)
    ]
    return sum(nbytes for box, nbytes in chunks[1].items() if box not in chunks[0]) / (shape[0] * shape[1] * 4)


def _note(result: Result, what: str, ranks: list[dict[str, Any]], has_peer: bool) -> None:
    for name in ranks[0]["seconds"]:
        # a take is over when the last rank's is
        result.series[f"{what}: {name}"] = [
            max(each) for each in zip(*(r["seconds"][name] for r in ranks), strict=True)
        ]
    result.facts[what] = [{key: rank[key] for key in rank if key != "seconds"} for rank in ranks]

    def shown(name: str) -> str:
        return readable(result.median(f"{what}: {name}")) if f"{what}: {name}" in result.series else ""

    for name in ("take", "restore"):
        peer = f"DCP {shown(f'DCP {name}')}" if has_peer else ""
        result.lines.append(Line(f"{what}: {name}", "", shown(name), peer, "", "shown"))
    first = ranks[0]
    peer = f"DCP {megabytes(first['DCP nbytes'])}" if has_peer else ""
    result.lines.append(Line(f"{what}: bytes written", "", megabytes(first["nbytes"]), peer, "", "shown"))
    peak = f"DCP {megabytes(max(rank['DCP peak_nbytes'] for rank in ranks))}" if has_peer else ""
    ours = megabytes(max(rank["peak_nbytes"] for rank in ranks))
    result.lines.append(Line(f"{what}: peak memory of a rank above its state", "", ours, peak, "", "shown"))
    if len(ranks) > 1:
        messages = max(rank["messages"] for rank in ranks[1:])
        sent = max(rank["sent_nbytes"] for rank in ranks[1:])
        text = f"{messages} requests, {sent} bytes"
        result.lines.append(Line(f"{what}: a rank tells the others in a take", "", text, "", "", "shown"))


# ------------------------------------------------------------------ processes


def _launch(world_size: int, kind: str, nbytes: int, options: Options) -> list[dict[str, Any]]:
    """What each rank has measured."""
    folder = new_folder(options.folder)
    server = _c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.ranks", "--rank"]
        command += [str(folder), kind, str(nbytes), str(options.rounds), options.peers]
        processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


def _rank(folder: Path, kind: str, nbytes: int, rounds: int, peers: str) -> None:
    """One rank: ours and DCP take turns."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"seconds": {}}
    # restored into a state of its own, as a job that starts again would
    state, target = _state(kind, nbytes), _state(kind, nbytes)
    stats = _count_messages()
    before = _peak()
    for number in range(rounds + 1):
        for tensor in state.values():
            tensor.add_(1)
        place = folder / "ours" / f"step_{number}"
        _time(found, "take", lambda: Snapshot.take(str(place), {"model": StateDict(state)}), number)  # noqa: B023
        _time(found, "restore", lambda: Snapshot(str(place)).restore({"model": StateDict(target)}), number)  # noqa: B023
    found["messages"], found["sent_nbytes"] = stats
    found["nbytes"] = size_on_disk(folder / "ours") // (rounds + 1)
    found["peak_nbytes"] = _peak() - before
    if peers != "none":
        before = _peak()
        for number in range(rounds + 1):
            for tensor in state.values():
                tensor.add_(1)
            peer = folder / "dcp" / f"step_{number}"
            _time(found, "DCP take", lambda: save(state, checkpoint_id=peer), number)  # noqa: B023
            _time(found, "DCP restore", lambda: load(target, checkpoint_id=peer), number)  # noqa: B023
        found["DCP nbytes"] = size_on_disk(folder / "dcp") // (rounds + 1)
        found["DCP peak_nbytes"] = max(0, _peak() - before)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _state(kind: str, nbytes: int) -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {f"layer_{index}": torch.randn(1024, nbytes // 16 // 4 // 1024) for index in range(16)}
    if kind == "replicated":
        return tensors
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}


def _time(found: dict[str, Any], name: str, work: Callable[[], object], number: int) -> None:
    dist.barrier()
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    dist.barrier()
    if number:
        found["seconds"].setdefault(name, []).append(seconds)


def _count_messages() -> list[int]:
    """Requests and bytes of this rank's last take; filled when it has ended."""
    counted = [0, 0]
    for kind in sessions.Session.__subclasses__():
        for each in (kind, *kind.__subclasses__()):
            if "finish" in vars(each):
                _count_in(each, counted)
    return counted


def _count_in(kind: Any, counted: list[int]) -> None:
    finish = kind.finish

    def counting(session: Any, *args: Any, **options: Any) -> Any:
        answer = finish(session, *args, **options)
        counted[:] = [session.stats.num_messages, session.stats.sent_nbytes]
        return answer

    kind.finish = counting


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        run_part("ranks", measure)
