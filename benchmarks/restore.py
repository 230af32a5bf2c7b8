"""Restores: cold, warm, right after a take, and one step back; beside a plain read and safetensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.limits import Limits, pieces_of
from benchmarks.part import (
    Options,
    Turns,
    all_hashed,
    drop_cache,
    fill_cache,
    new_folder,
    run_part,
    settle,
    size_on_disk,
    take_turns,
    timed,
    use_all_cores,
)
from benchmarks.peers.client import Peer, peers, remove, usable
from benchmarks.report import SHOWN, Line, Result, against_limit, faster_than, megabytes, ratio_to_limit, readable
from benchmarks.states import FULL, QUICK, State
from torchsnapshot import Snapshot

PEERS = ["safetensors", "torch.save", "DCP", "old torchsnapshot", "torch_checkpointing"]

WARM_UP = 3
"""Going back and forth between two steps: what lies still is known by then."""

Encoding = Literal["raw", "auto"]


class Run:
    """Two snapshots in one root: ``step_1``, and ``step_2`` whose first block differs."""

    def __init__(self, state: State, limits: Limits, folder: Path, encoding: Encoding) -> None:
        self._state = state
        self._limits = limits
        self._pieces = pieces_of(state.flat().values())
        self.root = new_folder(folder)
        self._encoding: Encoding = encoding
        Snapshot.take(str(self.root / "step_1"), state.app_state, encoding=encoding)
        self._digests = limits.digests(self._pieces)
        self.nbytes = size_on_disk(self.root)
        state.change("block")
        Snapshot.take(str(self.root / "step_2"), state.app_state, encoding=encoding)
        self.block_nbytes = size_on_disk(self.root) - self.nbytes
        settle()

    def cold(self) -> float:
        """Restore into a state that differs everywhere, with nothing in the page cache."""
        self._state.change("all")
        drop_cache(self.root)
        return self._restore()

    def warm(self) -> float:
        """The same with every file read once before."""
        self._state.change("all")
        fill_cache(self.root)
        return self._restore()

    def after_take(self) -> float:
        """The same with the page cache as a take leaves it: everything is taken again, into a root of its own."""
        root = new_folder(self.root.parent)
        Snapshot.take(str(root / "step"), self._state.app_state, encoding=self._encoding)
        digests = self._limits.digests(self._pieces)
        self._state.change("all")
        seconds = self._restore(root / "step", digests)
        remove(root)
        return seconds

    def one_step_back(self) -> float:
        """Restore ``step_1`` while the state is that of ``step_2``; nothing is in the page cache."""
        Snapshot(str(self.root / "step_2")).restore(self._state.app_state)
        drop_cache(self.root)
        return self._restore()

    def one_step_back_hashed(self) -> float:
        """The same, with all memory hashed."""
        with all_hashed():
            return self.one_step_back()

    def _restore(self, path: Path | None = None, digests: list[bytes] | None = None) -> float:
        snapshot = Snapshot(str(path or self.root / "step_1"))
        seconds = timed(lambda: snapshot.restore(self._state.app_state))
        if self._limits.digests(self._pieces) != (digests or self._digests):
            raise AssertionError("the restored state is not the one that was taken")
        return seconds


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    use_all_cores()
    result = Result()
    state = State(QUICK if options.quick else FULL)
    result.facts["state_nbytes"] = state.nbytes
    limits = Limits(options.folder)
    everything = pieces_of(state.flat().values())
    runs = {encoding: Run(state, limits, options.folder, encoding) for encoding in ("raw", "auto")}
    turns: Turns = {}
    for encoding, run in runs.items():
        result.facts[f"stored_nbytes_{encoding}"] = run.nbytes
        result.facts[f"block_nbytes_{encoding}"] = run.block_nbytes
        limits.direct_write(run.nbytes, encoding)
        limits.direct_write(run.block_nbytes, f"{encoding}-block")
        turns[f"read, {encoding}"] = partial(limits.read, run.nbytes, encoding)
        turns[f"cold, {encoding}"] = run.cold
        turns[f"warm, {encoding}"] = run.warm
        turns[f"right after a take, {encoding}"] = run.after_take
    back: Turns = {"digest pass": partial(limits.digest, everything)}
    for encoding, run in runs.items():
        back[f"read of one block, {encoding}"] = partial(limits.read, run.block_nbytes, f"{encoding}-block")
        back[f"one step back, {encoding}"] = run.one_step_back
        back[f"one step back, all hashed, {encoding}"] = run.one_step_back_hashed
    take_turns(back, result, options.rounds, warm_up=1 if options.quick else WARM_UP)
    with peers(PEERS, options) as (running, missing):
        saved: dict[str, Path] = {}
        usable(running, missing, lambda peer: _save(peer, options.folder, saved))
        for name, peer in running.items():
            turns[f"warm: {name}"] = partial(peer.load, saved[name], warm=True)
            turns[f"cold: {name}"] = partial(peer.load, saved[name], warm=False)
        take_turns(turns, result, options.rounds)
    result.lines = [*_lines(result, list(running)), *missing]
    return result


def _save(peer: Peer, parent: Path, saved: dict[str, Path]) -> None:
    saved[peer.name] = folder = new_folder(parent)
    peer.ask("save durably", folder)
    peer.ask("load", folder)


def _lines(result: Result, names: list[str]) -> list[Line]:
    median, facts = result.median, result.facts
    warm = {name: median(f"warm: {name}") for name in names}
    cold = {name: median(f"cold: {name}") for name in names}
    others = {
        kind: ", ".join(f"{readable(seconds)} {name}" for name, seconds in found.items())
        for kind, found in (("cold", cold), ("warm", warm))
    }
    lines = []
    for encoding in ("raw", "auto"):
        stored, block = megabytes(facts[f"stored_nbytes_{encoding}"]), megabytes(facts[f"block_nbytes_{encoding}"])
        read, read_block = median(f"read, {encoding}"), median(f"read of one block, {encoding}")
        ours = median(f"cold, {encoding}")
        lines += [
            against_limit(f"restore, cold, {encoding}", ours, 1.15, read, f"read of {stored}", others["cold"]),
            faster_than(
                f"restore, warm, {encoding}",
                median(f"warm, {encoding}"),
                1,
                {name: seconds for name, seconds in warm.items() if name == "safetensors"},
                "safetensors + copy",
            ),
            against_limit(
                f"restore one step back, {encoding}",
                median(f"one step back, {encoding}"),
                1.3,
                median("digest pass") + read_block,
                f"digest pass + read of {block}",
            ),
            ratio_to_limit(
                f"restore one step back, {encoding}, all hashed",
                median(f"one step back, all hashed, {encoding}"),
                median("digest pass") + read_block,
            ),
        ]
        seconds = readable(median(f"right after a take, {encoding}"))
        lines.append(Line(f"restore, right after a take, {encoding}", "", seconds, "", "", SHOWN))
    lines.append(Line("restore, warm: all peers", "", readable(median("warm, raw")), others["warm"], "", SHOWN))
    return lines


if __name__ == "__main__":
    run_part("restore", measure)
