"""Takes and restores of several processes, replicated and sharded, beside DCP; what ranks tell each other; resharding.

Every process is a rank of one gloo group on this machine. DCP takes the same state in the same processes, in turns
with ours. What a reshard writes anew is computed: content is what lies in a box of the grid, so it is known already if
that box was a chunk before.

A rank's peak memory is measured above what it holds before the call: the system's high-water mark, set back to what
is there now before each call where the system allows that (Linux).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
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
"""In which seconds are measured: more processes than cores measure one another."""
TALKING_WORLDS = (2, 4, 8)
"""In which messages are counted."""
CHUNK_NBYTES = 4 << 20
_c10d: Any = dist
"""Its types name no stores."""

KINDS = ("replicated", "sharded")
TAKES = ("the first take", "a take of all anew", "an unchanged take")


def measure(options: Options) -> Result:
    """Measure every number of processes with every kind of state."""
    nbytes = 1 << 20 if options.quick else 256 << 20
    result = Result(facts={"state_nbytes": nbytes})
    worlds, talking = ((1, 2), (2,)) if options.quick else (WORLDS, TALKING_WORLDS)
    for world_size in sorted({*worlds, *talking}):
        ranks = _launch(world_size, nbytes, options, is_timed=world_size in worlds)
        for kind in KINDS:
            found = [rank[kind] for rank in ranks]
            if world_size in worlds:
                _note(result, f"{kind}, {world_size} processes", found, options.peers != "none")
            if world_size in talking:
                _note_talk(result, f"{kind}, {world_size} processes", found)
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
            max(each) for each in zip(*(rank["seconds"][name] for rank in ranks), strict=True)
        ]
    peaks = {name: max(rank["peaks"][name] for rank in ranks) for name in ranks[0]["peaks"]}
    result.facts[what] = {"peaks": peaks, "nbytes": ranks[0]["nbytes"]}

    def shown(name: str) -> str:
        return readable(result.median(f"{what}: {name}"))

    def beside(figure: Callable[[str], str], name: str) -> tuple[str, str]:
        return figure(name), f"DCP {figure(f'DCP {name}')}" if has_peer else ""

    rows = {name: beside(shown, name) for name in ("take", "restore")}
    rows["bytes written"] = beside(lambda name: megabytes(ranks[0]["nbytes"][name]), "take")
    for name in ("take", "restore"):
        rows[f"peak memory of a rank, {name}"] = beside(lambda name: megabytes(peaks[name]), name)
    for name, (ours, peer) in rows.items():
        result.lines.append(Line(f"{what}: {name}", "", ours, peer, "", "shown"))


def _note_talk(result: Result, what: str, ranks: list[dict[str, Any]]) -> None:
    """What the ranks sent to the store: the most of all but rank 0, and rank 0, which reads what all others say."""
    result.facts[f"{what}: messages"] = [rank["talk"] for rank in ranks]
    for take in TAKES:
        told = [rank["talk"][take] for rank in ranks]
        others = [max(each[index] for each in told[1:]) for index in range(3)]
        text = "; rank 0: ".join(
            f"{requests} requests, {sent:,} B out, {received:,} B in" for requests, sent, received in (others, told[0])
        )
        result.lines.append(Line(f"{what}: a rank in {take}", "", text, "", "", "shown"))


# ------------------------------------------------------------------ processes


def _launch(world_size: int, nbytes: int, options: Options, *, is_timed: bool) -> list[dict[str, Any]]:
    """What each rank has measured, by kind of state."""
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
        command += [str(folder), str(nbytes), str(options.rounds if is_timed else 0), options.peers]
        processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    shutil.rmtree(folder)
    return found


def _rank(folder: Path, nbytes: int, rounds: int, peers: str) -> None:
    """One rank, with one kind of state after the other."""
    dist.init_process_group("gloo")
    stats = _count_messages()
    found = {}
    for kind in KINDS:
        state = _state(kind, nbytes)
        found[kind] = {"talk": _talk(folder / kind / "talk", state, stats)}
        if rounds:
            found[kind] |= _timed(folder / kind, state, rounds, peers)
        del state
        gc.collect()
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _talk(root: Path, state: dict[str, Any], stats: list[int]) -> dict[str, list[int]]:
    """Requests and bytes of this rank in each of ``TAKES``, in a store of their own."""
    found = {}
    for number, take in enumerate(TAKES):
        if take != "an unchanged take":
            _change(state)
        Snapshot.take(str(root / f"step_{number}"), {"model": StateDict(state)})
        found[take] = list(stats)
        dist.barrier()
    _remove(root)
    return found


def _timed(folder: Path, state: dict[str, Any], rounds: int, peers: str) -> dict[str, Any]:
    """Seconds and peaks of takes of a state in which everything has changed, and of restores; DCP in turns with ours.

    The first round warms up.
    """
    # restored into a state of its own, as a job that starts again would
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    clock = _Clock()
    for number in range(rounds + 1):
        _change(state)
        place, peer = folder / "ours" / f"step_{number}", folder / "dcp" / f"step_{number}"
        works: dict[str, Callable[[], object]] = {
            "take": lambda: Snapshot.take(str(place), {"model": StateDict(state)}),  # noqa: B023
            "restore": lambda: Snapshot(str(place)).restore({"model": StateDict(target)}),  # noqa: B023
        }
        if peers != "none":
            works |= {
                "DCP take": lambda: save(state, checkpoint_id=peer),  # noqa: B023
                "DCP restore": lambda: load(target, checkpoint_id=peer),  # noqa: B023
            }
        for name, work in works.items():
            before = size_on_disk(folder)
            clock.time(name, work, is_noted=number > 0)
            if name.endswith("take"):
                clock.nbytes[name] = size_on_disk(folder) - before
            dist.barrier()
    _remove(folder)
    return {"seconds": clock.seconds, "peaks": clock.peaks, "nbytes": clock.nbytes}


def _change(state: dict[str, Any]) -> None:
    """Another value for every element of the state, and as random as before."""
    for tensor in state.values():
        tensor.mul_(1.01)


def _remove(folder: Path) -> None:
    """Remove a folder while no rank uses it."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


class _Clock:
    """Seconds of each kind of work, and the most memory that a call took above what was there before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.nbytes: dict[str, int] = {}

    def time(self, name: str, work: Callable[[], object], *, is_noted: bool) -> None:
        """Do it on all ranks at once."""
        before = _start_peak()
        dist.barrier()
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        peak = max(0, _status("VmHWM") - before)
        dist.barrier()
        if is_noted:
            self.seconds.setdefault(name, []).append(seconds)
        # in the first round memory is touched that later ones find there
        self.peaks[name] = max(peak, self.peaks.get(name, 0))


def _start_peak() -> int:
    """Set the high-water mark back to the memory in use; returns that, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


def _state(kind: str, nbytes: int) -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {f"layer_{index}": torch.randn(1024, nbytes // 16 // 4 // 1024) for index in range(16)}
    if kind == "replicated":
        return tensors
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}


def _count_messages() -> list[int]:
    """Requests and bytes of this rank's last take; filled when it has ended."""
    counted = [0, 0, 0]
    for kind in sessions.Session.__subclasses__():
        for each in (kind, *kind.__subclasses__()):
            if "finish" in vars(each):
                _count_in(each, counted)
    return counted


def _count_in(kind: Any, counted: list[int]) -> None:
    finish = kind.finish

    def counting(session: Any, *args: Any, **options: Any) -> Any:
        answer = finish(session, *args, **options)
        counted[:] = [session.stats.num_messages, session.stats.sent_nbytes, session.stats.received_nbytes]
        return answer

    kind.finish = counting


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        run_part("ranks", measure)
