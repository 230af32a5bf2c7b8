"""Seconds and bytes of the main job on a state of about 1 GB, beside ``torch.save`` and the bare disk, in one run.

    python benchmarks/main_job.py [--folder DIR] [--rounds N] [--scale X] [--json]

The state is a GPT's weights and their Adam moments (fp32). Every round takes it (1) into an empty root, (2) again
unchanged, (3) with one tensor changed, twice more so that it is known which memory nobody writes, (6) with one tensor
changed, (7) unchanged; then it restores it over zeros and compares every tensor. ``torch.save`` writes the same state
to a file, with fsync, and ``torch.load`` brings it back. "Bare disk" is one write of as many bytes from memory that is
already there, with fsync, and one read into such memory: what no library can beat by much.

The figures are medians over the rounds; the first round, which makes buffers and imports code, is left out. Before
each read the page cache is asked to drop the files, for all three alike.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchsnapshot import Snapshot
from torchsnapshot.state.live_digests import live_digests

CHANGED = "blocks.0.mlp.0.weight"


class Block(nn.Module):
    """The parameters of one transformer block; never run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class GPT(nn.Module):
    """The parameters of a GPT-2 of seven layers at scale 1."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        width = 768
        self.token = nn.Embedding(int(50257 * scale), width)
        self.position = nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(max(1, int(7 * scale))))
        self.norm = nn.LayerNorm(width)


def make_state(scale: float) -> tuple[GPT, torch.optim.Optimizer]:
    """A model, and an optimizer that has made one step with random gradients, so that the moments are there."""
    torch.manual_seed(0)
    model = GPT(scale)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optim.step()
    optim.zero_grad(set_to_none=True)
    return model, optim


def tensors_of(model: GPT, optim: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the state, in one order."""
    moments = [
        value for state in optim.state_dict()["state"].values() for value in state.values() if torch.is_tensor(value)
    ]
    return [*model.state_dict().values(), *moments]


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget the contents of all files below ``folder``, which have been synced."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


TAKES = (
    "take #1",
    "take #2, unchanged",
    "take #3, one tensor changed",
    "take #6, one tensor changed",
    "take #7, unchanged",
)
"""Those that are timed. From the fourth on it is known which memory nobody writes."""


class Clock:
    """Collects seconds and bytes by row and column."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.nbytes: dict[tuple[str, str], int] = {}

    def time(self, row: str, column: str, work: Callable[[], int]) -> None:
        """Time ``work``, which returns how many bytes it wrote or read."""
        began = time.perf_counter()
        nbytes = work()
        self.seconds[row, column].append(time.perf_counter() - began)
        self.nbytes[row, column] = nbytes

    def median(self, row: str, column: str) -> float | None:
        """The median of a cell without its first measurement, in seconds."""
        times = self.seconds.get((row, column), [])
        return statistics.median(times[1:] or times) if times else None


def measure_ours(clock: Clock, folder: Path, model: GPT, optim: torch.optim.Optimizer) -> None:
    """One round of takes and a restore."""
    state = {"model": model, "optim": optim}

    def take(name: str) -> int:
        stats = Snapshot.take(str(folder / name), state).stats
        assert stats is not None
        return stats.new_nbytes

    def take_in_background() -> int:
        pending.append(Snapshot.async_take(str(folder / "step_8"), state))
        return 0

    def restore() -> int:
        snapshot = Snapshot(str(folder / "step_7"))
        snapshot.restore(state)
        assert snapshot.stats is not None
        return snapshot.stats.new_nbytes

    # what was learned about this memory in the round before is nothing that a run would know when it begins
    live_digests().forget()
    pending: list[Any] = []
    clock.time(TAKES[0], "torchsnapshot", lambda: take("step_1"))
    clock.time(TAKES[1], "torchsnapshot", lambda: take("step_2"))
    with torch.no_grad():
        model.get_parameter(CHANGED).add_(1.0)
    clock.time(TAKES[2], "torchsnapshot", lambda: take("step_3"))
    for number in (4, 5):
        take(f"step_{number}")
    with torch.no_grad():
        model.get_parameter(CHANGED).add_(1.0)
    clock.time(TAKES[3], "torchsnapshot", lambda: take("step_6"))
    clock.time(TAKES[4], "torchsnapshot", lambda: take("step_7"))
    expected = [tensor.clone() for tensor in tensors_of(model, optim)]
    zero(model, optim)
    drop_page_cache(folder)
    clock.time("restore", "torchsnapshot", restore)
    assert all(map(torch.equal, tensors_of(model, optim), expected)), "the restored state is not the one taken"
    with torch.no_grad():
        for parameter in tensors_of(model, optim):
            if parameter.is_floating_point():
                parameter.mul_(1.5)
    clock.time("async_take, all changed: until it returns", "torchsnapshot", take_in_background)
    pending[0].wait()


def zero(model: GPT, optim: torch.optim.Optimizer) -> None:
    """Overwrite the state, so that a restore has all of it to do."""
    with torch.no_grad():
        for tensor in tensors_of(model, optim):
            tensor.zero_()


def measure_torch(clock: Clock, folder: Path, model: GPT, optim: torch.optim.Optimizer) -> None:
    """The same round with ``torch.save`` and ``torch.load``."""
    file = folder / "state.pt"

    def save() -> int:
        with file.open("wb") as out:
            torch.save({"model": model.state_dict(), "optim": optim.state_dict()}, out)
            out.flush()
            os.fsync(out.fileno())
        return file.stat().st_size

    def load() -> int:
        loaded = torch.load(file, weights_only=True)
        model.load_state_dict(loaded["model"])
        optim.load_state_dict(loaded["optim"])
        return file.stat().st_size

    for row in TAKES:
        file.unlink(missing_ok=True)
        clock.time(row, "torch.save", save)
    zero(model, optim)
    drop_page_cache(folder)
    clock.time("restore", "torch.save", load)


def measure_disk(clock: Clock, folder: Path, memory: mmap.mmap) -> None:
    """One plain write with fsync and one plain read of the same size."""
    file = folder / "plain"

    def write() -> int:
        with file.open("wb", buffering=0) as out:
            written = 0
            while written < len(memory):
                written += out.write(memoryview(memory)[written : written + (64 << 20)])
            os.fsync(out.fileno())
        return len(memory)

    def read() -> int:
        with file.open("rb", buffering=0) as source:
            done = 0
            while done < len(memory):
                done += source.readinto(memoryview(memory)[done : done + (64 << 20)])
        return len(memory)

    clock.time(TAKES[0], "bare disk", write)
    drop_page_cache(folder)
    clock.time("restore", "bare disk", read)


def in_fresh_folder(parent: Path, work: Callable[[Path], None]) -> None:
    """Run ``work`` with an empty folder below ``parent`` and remove it."""
    folder = Path(tempfile.mkdtemp(prefix="main-job-", dir=parent))
    try:
        work(folder)
    finally:
        shutil.rmtree(folder)


COLUMNS = ("torchsnapshot", "torch.save", "bare disk")


def print_table(clock: Clock) -> None:
    """The table as Markdown, so that it can stand in the README as it is."""
    print("| | torchsnapshot | new bytes | torch.save | bytes | ratio | bare disk |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in dict.fromkeys(row for row, _ in clock.seconds):
        ours, theirs = clock.median(row, "torchsnapshot"), clock.median(row, "torch.save")
        ratio = f"{ours / theirs:.3f}" if ours is not None and theirs else ""
        cells = [row]
        for column in COLUMNS[:2]:
            seconds = clock.median(row, column)
            cells.append("" if seconds is None else f"{seconds:.3f} s")
            nbytes = clock.nbytes.get((row, column))
            cells.append("" if nbytes is None or "async" in row else f"{nbytes / 1e6:,.1f} MB")
        plain = clock.median(row, "bare disk")
        print(f"| {' | '.join(cells)} | {ratio} | {'' if plain is None else f'{plain:.3f} s'} |")


def print_json(clock: Clock, state_nbytes: int) -> None:
    """All measurements, the first round included."""
    cells = [
        {"row": row, "column": column, "nbytes": clock.nbytes[row, column], "seconds": times}
        for (row, column), times in clock.seconds.items()
    ]
    print(json.dumps({"state_nbytes": state_nbytes, "machine": machine(), "cells": cells}, indent=2))


def machine() -> str:
    """What this was measured on."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk to measure (default: build)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the first")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is about 1 GB")
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model, optim = make_state(options.scale)
    state_nbytes = sum(tensor.nbytes for tensor in tensors_of(model, optim))
    memory = mmap.mmap(-1, state_nbytes)
    memory.write(os.urandom(1 << 20) * (state_nbytes >> 20))
    clock = Clock()
    for _ in range(options.rounds + 1):
        in_fresh_folder(options.folder, lambda folder: measure_ours(clock, folder, model, optim))
        in_fresh_folder(options.folder, lambda folder: measure_torch(clock, folder, model, optim))
        in_fresh_folder(options.folder, lambda folder: measure_disk(clock, folder, memory))
    if options.json:
        print_json(clock, state_nbytes)
        return
    print(f"A state of {state_nbytes / 1e9:.2f} GB; medians of {options.rounds} rounds; {machine()}\n")
    print_table(clock)


if __name__ == "__main__":
    main()
