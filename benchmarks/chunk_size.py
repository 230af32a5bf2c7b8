"""Chunks of 1, 4 and 16 MiB: speed, number of objects, bytes after sparse changes and after resharding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.part import Options, Turns, new_folder, run_part, settle, take_turns, timed, use_all_cores
from benchmarks.peers.client import remove
from benchmarks.report import SHOWN, Line, Result, megabytes, readable
from benchmarks.states import FULL, QUICK, State
from torchsnapshot import Snapshot, knobs
from torchsnapshot.geometry import grid

SIZES = (1 << 20, 4 << 20, 16 << 20)
CHANGED_ROWS = 0.01
PLACES = 8
RANKS_BEFORE, RANKS_AFTER = 8, 6


class Run:
    """A root whose chunks have one size."""

    def __init__(self, state: State, folder: Path, chunk_nbytes: int) -> None:
        self._state = state
        self._folder = folder
        self._chunk_nbytes = chunk_nbytes
        self._root = new_folder(folder)
        self._number = 0
        self.facts: dict[str, int] = {}

    def first(self) -> float:
        """A take into a new root."""
        remove(self._root)
        self._root = new_folder(self._folder)
        return self._take("first")

    def unchanged(self) -> float:
        """A take of an unchanged state."""
        return self._take("unchanged")

    def some_rows(self) -> float:
        """A take after one in a hundred of the embedding's rows has changed, in a few places: rows spread evenly would
        be in every chunk, whatever its size.
        """
        with torch.no_grad():
            for region in self._state.model.token.weight.chunk(PLACES):
                region[: int(len(region) * CHANGED_ROWS) + 1].add_(1e-3)
        return self._take("some rows")

    def restore(self) -> float:
        """A restore into a state that differs everywhere."""
        self._state.change("all")
        snapshot = Snapshot(str(self._root / f"step_{self._number}"))
        return timed(lambda: snapshot.restore(self._state.app_state))

    def _take(self, what: str) -> float:
        settle()
        self._number += 1
        path = str(self._root / f"step_{self._number}")
        taken: list[Snapshot] = []
        with knobs.override_max_chunk_size_bytes(self._chunk_nbytes):
            work = partial(Snapshot.take, path, self._state.app_state, encoding="raw")
            seconds = timed(lambda: taken.append(work()))
        stats = taken[0].stats
        assert stats is not None
        self.facts[f"{what}: stored_nbytes"] = stats.stored_nbytes
        self.facts[f"{what}: num_blobs"] = stats.num_blobs
        self.facts["manifest_nbytes"] = stats.manifest_nbytes
        return seconds


def measure(options: Options) -> Result:
    """Measure and show; there is no target but the default that follows from it."""
    use_all_cores()
    result = Result()
    state = State(QUICK if options.quick else FULL)
    result.facts["state_nbytes"] = state.nbytes
    runs = {size: Run(state, options.folder, size) for size in SIZES}
    turns: Turns = {}
    for size, run in runs.items():
        name = f"{size >> 20} MiB"
        turns[f"{name}: first"] = run.first
        turns[f"{name}: unchanged"] = run.unchanged
        turns[f"{name}: some rows"] = run.some_rows
        turns[f"{name}: restore"] = run.restore
    # a fixed order: each run's takes follow one another
    for number in range(options.rounds + 1):
        take_turns(turns, result, 1 if number else 0, warm_up=0 if number else 1)
    for size, run in runs.items():
        name = f"{size >> 20} MiB"
        moved = resharded_nbytes(state, size)
        result.facts[name] = {**run.facts, "resharded_nbytes": moved}
        rows = run.facts["some rows: stored_nbytes"]
        result.lines.append(
            Line(
                f"chunks of {name}",
                "",
                f"first {readable(result.median(f'{name}: first'))}"
                f" ({run.facts['first: num_blobs']:,} objects, manifest {run.facts['manifest_nbytes'] / 1e3:,.0f} kB),"
                f" unchanged {readable(result.median(f'{name}: unchanged'))},"
                f" restore {readable(result.median(f'{name}: restore'))}",
                "",
                f"{CHANGED_ROWS:.0%} of the embedding's rows in {PLACES} places: {megabytes(rows)};"
                f" {RANKS_BEFORE} → {RANKS_AFTER} ranks: {megabytes(moved)} new",
                SHOWN,
            )
        )
    return result


def resharded_nbytes(state: State, chunk_nbytes: int) -> int:
    """Bytes of chunks that are new when every first dimension is split over other ranks. Counted, not taken."""
    total = 0
    for tensor in state.flat().values():
        if not tensor.ndim:
            continue
        shape, width = tuple(tensor.shape), tensor.element_size()
        wanted = grid.choose_chunk_nbytes(tensor.nbytes, chunk_nbytes, sharded=True)
        before = list(_split(shape, RANKS_BEFORE))
        cell = grid.cell_for(shape, before, width, wanted)
        known = {piece.box for box in before for piece in grid.cut(box, cell, width)}
        after = [piece for box in _split(shape, RANKS_AFTER) for piece in grid.cut(box, cell, width)]
        total += sum(piece.nbytes for piece in after if piece.box not in known)
    return total


def _split(shape: tuple[int, ...], ranks: int) -> Iterator[grid.Box]:
    """The shards of ``torch.chunk`` along the first dimension."""
    rows = -(-shape[0] // ranks)
    for start in range(0, shape[0], rows):
        yield grid.Box((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))


if __name__ == "__main__":
    run_part("chunk_size", measure)
