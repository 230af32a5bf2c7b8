"""Many small tensors: what one more tensor costs when nothing changed."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.part import Options, Turns, new_folder, run_part, settle, take_turns, timed, use_all_cores
from benchmarks.peers.client import remove
from benchmarks.report import Line, Result, readable, verdict
from torchsnapshot import Snapshot, StateDict

TARGET_SECONDS = 10e-6
SIZES = (32, 128)
"""128 and 512 bytes: such a tensor stands in the manifest, or is a chunk in a pack."""


def measure(options: Options) -> Result:
    """Measure, and hold it against the target."""
    use_all_cores()
    warnings.simplefilter("ignore")
    count = 100 if options.quick else 10_000
    result = Result(facts={"num_tensors": 3 * count})
    for size in SIZES:
        state = {
            kind: {f"layer_{i}.weight": torch.randn(size) for i in range(count)}
            for kind in ("weights", "exp_avg", "exp_avg_sq")
        }
        run = _Run({kind: StateDict(tensors) for kind, tensors in state.items()}, options.folder)
        names: Turns = {
            f"{size * 4} B": run.take,
            f"{size * 4} B, torch.save": partial(_torch_save, state, options.folder),
        }
        if options.peers != "none":
            names[f"{size * 4} B, DCP"] = partial(_dcp_save, state, options.folder)
        take_turns(names, result, options.rounds)
        result.lines.append(_line(result, size * 4, 3 * count))
    return result


class _Run:
    def __init__(self, state: dict[str, StateDict], folder: Path) -> None:
        self._state = state
        self._root = new_folder(folder)
        self._number = 0

    def take(self) -> float:
        self._number += 1
        return timed(lambda: Snapshot.take(str(self._root / f"step_{self._number}"), self._state))


def _torch_save(state: dict[str, Any], folder: Path) -> float:
    file = folder / "state.pt"
    seconds = timed(lambda: torch.save(state, file))
    settle()
    return seconds


def _dcp_save(state: dict[str, Any], folder: Path) -> float:
    into = new_folder(folder)
    seconds = timed(lambda: save(state, checkpoint_id=into, no_dist=True))
    remove(into)
    return seconds


def _line(result: Result, nbytes: int, count: int) -> Line:
    ours = result.median(f"{nbytes} B")
    peers = [name for name in result.series if name.startswith(f"{nbytes} B, ")]
    return Line(
        f"take of {count:,} tensors of {nbytes} bytes, unchanged",
        f"≤ {TARGET_SECONDS * 1e6:.0f} µs a tensor",
        f"{readable(ours)} = {ours / count * 1e6:.1f} µs a tensor",
        ", ".join(f"{readable(result.median(name))} {name.rpartition(', ')[2]}" for name in peers),
        "",
        verdict(ours / count <= TARGET_SECONDS),
    )


if __name__ == "__main__":
    run_part("small", measure)
