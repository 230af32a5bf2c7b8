"""How long ``async_take`` keeps its caller, in the steady state, beside the background saves of others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

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
from benchmarks.report import SHOWN, Line, Result, against_limit, faster_than, ratio_to_limit, readable
from benchmarks.states import FULL, QUICK, State
from torchsnapshot import PendingSnapshot, Snapshot

PEERS = ["DCP", "DCP, kept stager", "old torchsnapshot", "torch_checkpointing"]
SCENARIOS = {"nothing": "nothing changed", "block": "one block of 8 changed", "all": "all changed"}
WARM_UP = 3
"""What lies still is known from the fourth take on; staging memory is there sooner."""


class Run:
    """Takes in the background, one after the other, into one root."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state = state
        self._folder = folder
        self._root = new_folder(folder)
        self._number = 0

    def stall(self, what: str) -> float:
        """Change the state, take it, wait for the commit: the seconds until ``async_take`` returned."""
        self._state.change(what)
        self._number += 1
        path = str(self._root / f"step_{self._number}")
        pending: list[PendingSnapshot] = []
        seconds = timed(lambda: pending.append(Snapshot.async_take(path, self._state.app_state)))
        pending[0].wait()
        settle()
        return seconds

    def stall_hashed(self, what: str) -> float:
        """The same, with all memory hashed."""
        with all_hashed():
            return self.stall(what)

    def restart(self) -> None:
        """Go on in a new root."""
        remove(self._root)
        self._root = new_folder(self._folder)


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    use_all_cores()
    result = Result()
    state = State(QUICK if options.quick else FULL)
    result.facts["state_nbytes"] = state.nbytes
    limits = Limits(options.folder)
    changed = {"nothing": [], "block": state.block(), "all": state.everything()}
    addresses = {what: {tensor.data_ptr() for tensor in tensors} for what, tensors in changed.items()}
    run = Run(state, options.folder)
    warm_up = 1 if options.quick else WARM_UP
    with peers(PEERS, options) as (running, missing):
        usable(running, missing, lambda peer: peer.stall("nothing"))
        for what, scenario in SCENARIOS.items():
            same = pieces_of(t for t in state.flat().values() if t.data_ptr() not in addresses[what])
            different = pieces_of(changed[what])
            turns: Turns = {
                f"{scenario}: digest of the rest": partial(limits.digest, same),
                f"{scenario}: copy of the changed": partial(limits.copy, different),
                f"{scenario}: torchsnapshot": partial(run.stall, what),
            }
            if what == "all":
                # what changed is all one to them: they copy everything
                turns.update({name: partial(peer.stall, what) for name, peer in running.items()})
            else:
                turns[f"{scenario}: torchsnapshot, all hashed"] = partial(run.stall_hashed, what)
            take_turns(turns, result, options.rounds, warm_up=warm_up)
            run.restart()
    for scenario in SCENARIOS.values():
        result.lines += _lines(result, scenario, list(running))
    result.lines += missing
    return result


def _lines(result: Result, scenario: str, names: list[str]) -> list[Line]:
    ours = result.median(f"{scenario}: torchsnapshot")
    limit = result.median(f"{scenario}: digest of the rest") + result.median(f"{scenario}: copy of the changed")
    others = {name: result.median(name) for name in names}
    dcp = {name: seconds for name, seconds in others.items() if name.startswith("DCP")}
    rest = ", ".join(f"{readable(seconds)} {name}" for name, seconds in others.items())
    what = f"async_take stall, {scenario}"
    lines = [
        against_limit(what, ours, 1.15, limit, "digest of the unchanged + copy of the changed"),
        faster_than(what, ours, 1, dcp, "DCP"),
    ]
    if scenario != SCENARIOS["all"]:
        lines.append(
            ratio_to_limit(f"{what}, all hashed", result.median(f"{scenario}: torchsnapshot, all hashed"), limit)
        )
    else:
        lines.append(Line("async_take stall: all peers, in each scenario", "", "", rest, "", SHOWN))
    return lines


if __name__ == "__main__":
    run_part("async_stall", measure)
