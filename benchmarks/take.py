"""Synchronous takes: nothing changed, one block of eight, everything; beside peers and the machine's limits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.limits import Limits, pieces_of
from benchmarks.part import (
    Options,
    Turns,
    all_hashed,
    new_folder,
    run_part,
    settle,
    take_turns,
    timed,
    use_all_cores,
)
from benchmarks.peers.client import peers, remove, usable
from benchmarks.report import (
    SHOWN,
    Line,
    Result,
    against_limit,
    faster_than,
    megabytes,
    ratio_to_limit,
    readable,
    verdict,
)
from benchmarks.states import FULL, MEGABYTE, QUICK, State
from torchsnapshot import Snapshot, Stats

PEERS = ["torch.save", "safetensors", "DCP", "old torchsnapshot", "torch_checkpointing"]
DURABLE = ("torch.save + fsync", "safetensors + fsync", "DCP")
FIXED_COST_SECONDS = 0.010

Encoding = Literal["raw", "auto"]


class Run:
    """A root with a snapshot, and takes into it."""

    def __init__(self, state: State, folder: Path, encoding: Encoding) -> None:
        self._state = state
        self._parent = folder
        self._encoding: Encoding = encoding
        self._root = new_folder(folder)
        self._number = 0
        self.stored_nbytes: dict[str, int] = {}

    def take(self, what: str) -> float:
        """Change the state, then take it; ``"first"`` takes it into a new root."""
        if what == "first":
            remove(self._root)
            self._root = new_folder(self._parent)
        if what == "nothing":
            self._take_now()  # whatever another run has changed, and what this one would still call changed
        self._state.change("all" if what == "first" else what)
        settle()
        seconds, stats = self._take_now()
        self.stored_nbytes[what] = stats.stored_nbytes
        return seconds

    def take_hashed(self, what: str) -> float:
        """The same, with all memory hashed."""
        with all_hashed():
            return self.take(what)

    def _take_now(self) -> tuple[float, Stats]:
        self._number += 1
        path = str(self._root / f"step_{self._number}")
        taken: list[Snapshot] = []
        seconds = timed(lambda: taken.append(Snapshot.take(path, self._state.app_state, encoding=self._encoding)))
        stats = taken[0].stats
        assert stats is not None
        return seconds, stats


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    use_all_cores()
    result = Result()
    state = State(QUICK if options.quick else FULL)
    result.facts["state_nbytes"] = state.nbytes
    limits = Limits(options.folder)
    everything, block = pieces_of(state.flat().values()), sum(tensor.nbytes for tensor in state.block())
    result.facts["block_nbytes"] = block
    raw, auto = Run(state, options.folder, "raw"), Run(state, options.folder, "auto")
    for run in (raw, auto):
        run.take("first")
    turns: Turns = {
        "digest pass": partial(limits.digest, everything),
        "5 small puts": limits.small_puts,
        "unchanged": partial(raw.take, "nothing"),
        "unchanged, all hashed": partial(raw.take_hashed, "nothing"),
        "one block": partial(raw.take, "block"),
        "one block, all hashed": partial(raw.take_hashed, "block"),
        "write of one block, direct": partial(limits.direct_write, block, "block"),
        "write of one block, buffered": partial(limits.buffered_write, block, "block"),
    }
    take_turns(turns, result, options.rounds)
    turns = {
        "coding pass": partial(limits.code, everything),
        "write of all, direct": partial(limits.direct_write, state.nbytes),
        "write of all, buffered": partial(limits.buffered_write, state.nbytes),
        "first": partial(raw.take, "first"),
        "all changed": partial(raw.take, "all"),
        "first, auto": partial(auto.take, "first"),
        "all changed, auto": partial(auto.take, "all"),
    }
    with peers(PEERS, options) as (running, missing):
        usable(running, missing, lambda peer: peer.save())
        for name, peer in running.items():
            turns[name] = peer.save
            if f"{name} + fsync" in DURABLE:
                turns[f"{name} + fsync"] = partial(peer.save, durable=True)
        take_turns(turns, result, options.rounds, warm_up=0)
    small = State(MEGABYTE)
    fixed = Run(small, options.folder, "raw")
    fixed.take("first")
    take_turns({"1 MB, unchanged": partial(fixed.take, "nothing")}, result, options.rounds * 4, warm_up=3)
    result.facts["stored_nbytes_raw"], result.facts["stored_nbytes_auto"] = raw.stored_nbytes, auto.stored_nbytes
    result.facts["small_state_nbytes"] = small.nbytes
    result.lines = [*_lines(result, list(running)), *missing]
    return result


def _lines(result: Result, names: list[str]) -> list[Line]:
    median = result.median
    everyone = {name: median(name) for name in [*names, *DURABLE] if name in result.series}
    durable = {name: seconds for name, seconds in everyone.items() if name in DURABLE}
    cached = ", ".join(f"{readable(seconds)} {name}" for name, seconds in everyone.items() if name not in durable)
    digest, puts = median("digest pass"), median("5 small puts")
    write = min(median("write of all, direct"), median("write of all, buffered"))
    write_block = min(median("write of one block, direct"), median("write of one block, buffered"))
    unchanged = "take, nothing changed"
    lines = [
        against_limit(unchanged, median("unchanged"), 1.2, digest + puts, "digest pass + 5 small puts"),
        faster_than(unchanged, median("unchanged"), 5, everyone, "the fastest peer"),
        faster_than(unchanged, median("unchanged"), 15, durable, "the fastest durable peer"),
        against_limit(
            "take, one block of 8 changed",
            median("one block"),
            1.2,
            digest + write_block,
            f"digest pass + durable write of {megabytes(result.facts['block_nbytes'])}",
        ),
        faster_than("take, one block of 8 changed", median("one block"), 5, durable, "the fastest durable peer"),
    ]
    lines += [
        ratio_to_limit(f"{unchanged}, all hashed", median("unchanged, all hashed"), digest + puts),
        ratio_to_limit(
            "take, one block of 8 changed, all hashed", median("one block, all hashed"), digest + write_block
        ),
    ]
    coding = median("coding pass")
    outruns = coding < write
    for what in ("first", "all changed"):
        name = f"take, {what}"
        for encoding, factor, series in (("raw", 1.1, what), ("auto", 1.0 if outruns else 1.1, f"{what}, auto")):
            stored = megabytes(result.facts[f"stored_nbytes_{encoding}"]["first" if what == "first" else "all"])
            note = f"raw durable write of {megabytes(result.facts['state_nbytes'])}"
            if encoding == "auto" and not outruns:
                note += f"; the codec alone takes {readable(coding)}"
            lines.append(against_limit(f"{name}, {encoding}: stores {stored}", median(series), factor, write, note))
        lines.append(faster_than(f"{name}, raw", median(what), 1, durable, "every durable peer"))
    lines.append(Line("the codec alone, all cores", "", readable(coding), "", "", SHOWN))
    lines.append(Line("peers that leave the bytes in the page cache", "", "", cached, "", SHOWN))
    fixed = median("1 MB, unchanged")
    lines.append(
        Line(
            f"fixed cost of a take ({megabytes(result.facts['small_state_nbytes'])}, unchanged)",
            f"≤ {FIXED_COST_SECONDS * 1e3:.0f} ms",
            readable(fixed),
            "",
            f"{readable(puts)} 5 small puts",
            verdict(fixed <= FIXED_COST_SECONDS),
        )
    )
    return lines


if __name__ == "__main__":
    run_part("take", measure)
