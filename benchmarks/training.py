"""What a real training loop loses: a GPT on real text, with a snapshot before every step, or before every tenth.

Seconds lost per snapshot = the seconds that the loop stood still for it + what the following steps took longer than
the median step without snapshots. "Every 10 steps" is measured over a window of a snapshot and the steps after it,
until long after its writing has ended; the steps that remain to ten are those without snapshots.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.part import (
    Options,
    keep_freed_memory,
    new_folder,
    run_part,
    settle,
    size_on_disk,
    use_all_cores,
)
from benchmarks.peers.client import remove
from benchmarks.report import MET, MISSED, SHOWN, Line, Result, megabytes, readable, verdict
from benchmarks.states import FULL, QUICK, State
from torchsnapshot import Snapshot

EVERY = 10
WINDOW = 3
"""Steps after one snapshot of the sparse kind."""

SHARE = 0.03
SCENARIOS = {"sparse": "fine-tuning of one layer", "all": "full training"}
ROWS = {"sparse": 6, "all": 1}
"""How many rows of 128 tokens make a step. Six are as many tokens as nanoGPT's example for CPUs has (12 rows of 64; see
its README). Full training takes four times as long for each, and no target of it depends on a step's length: one."""


class Loop:
    """Trains a ``State`` on the source of Python's standard library, byte by byte."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._rows = 1
        library = Path(sysconfig.get_paths()["stdlib"])
        data = b"".join(file.read_bytes() for file in sorted(library.glob("*.py")))
        self._text = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def train_only(self, what: str) -> int:
        """Train everything, or the attention of the last block alone; returns how many bytes a step changes."""
        self._rows = ROWS[what]
        for name, parameter in self.state.model.named_parameters():
            last = f"blocks.{self.state.shape.layers - 1}."
            parameter.requires_grad_(what == "all" or name.startswith((f"{last}qkv", f"{last}out")))
            parameter.grad = None
        return 3 * sum(weight.nbytes for weight in self.state.model.parameters() if weight.requires_grad)

    def step(self) -> float:
        """One step; returns its seconds."""
        begin = time.perf_counter()
        context = self.state.shape.context
        starts = torch.randint(len(self._text) - context - 1, (self._rows,)).tolist()
        loss = self.state.model.loss(torch.stack([self._text[at : at + context + 1] for at in starts]).long())
        self.state.optim.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.state.optim.step()
        return time.perf_counter() - begin


Wait = Callable[[], int]
"""Waits for the end of a snapshot; returns the bytes that it added to the disk."""


@dataclass(slots=True)
class Ours:
    """``Snapshot.async_take``, all into one root."""

    state: State
    folder: Path
    name: str = "torchsnapshot"
    number: int = 0

    def begin(self) -> Wait:
        """Take in the background."""
        self.number += 1
        pending = Snapshot.async_take(str(self.folder / "ours" / f"step_{self.number}"), self.state.app_state)

        def wait() -> int:
            pending.wait()
            return pending.stats.stored_nbytes + pending.stats.manifest_nbytes

        return wait

    def clean(self) -> None:
        """Begin a new root; its first take, which writes everything, is nobody's loss."""
        if (self.folder / "ours").exists():
            remove(self.folder / "ours")
        self.begin()()


@dataclass(slots=True)
class Dcp:
    """``torch.distributed.checkpoint.async_save``, with a stager that reuses its memory."""

    state: State
    folder: Path
    name: str = "DCP async"
    stager: DefaultStager = field(
        default_factory=lambda: DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )
    )
    pending: list[Any] = field(default_factory=list)

    def begin(self) -> Wait:
        """Save in the background, after the save before is done, as its documentation wants it."""
        for earlier in self.pending:
            earlier.result()
        folder = new_folder(self.folder)
        begun: Any = async_save(self.state.nested(), checkpoint_id=folder, no_dist=True, async_stager=self.stager)
        self.pending = [getattr(begun, "upload_completion", begun)]
        mine = self.pending[0]

        def wait() -> int:
            mine.result()
            nbytes = size_on_disk(folder)
            remove(folder)
            return nbytes

        return wait

    def clean(self) -> None:
        """Fill the stager's memory."""
        self.begin()()


@dataclass(slots=True)
class TorchSave:
    """``torch.save``, which the loop waits for."""

    state: State
    folder: Path
    name: str = "torch.save"

    def begin(self) -> Wait:
        """Save."""
        folder = new_folder(self.folder)
        torch.save(self.state.nested(), folder / "state.pt")

        def wait() -> int:
            nbytes = size_on_disk(folder)
            remove(folder)
            return nbytes

        return wait

    def clean(self) -> None:
        """Nothing to do."""


Contender = Ours | Dcp | TorchSave


@dataclass(slots=True)
class Segment:
    """A stretch of training: seconds of each step, seconds each snapshot stood in its way, bytes each one wrote."""

    steps: list[float]
    stalls: list[float]
    nbytes: list[int]


def train(loop: Loop, steps: int, every: int, contender: Contender | None) -> Segment:
    """Train ``steps`` steps with a snapshot before every ``every``-th."""
    segment = Segment([], [], [])
    waits: list[Wait] = []
    for number in range(steps):
        if contender is not None and number % every == 0:
            begin = time.perf_counter()
            waits.append(contender.begin())
            segment.stalls.append(time.perf_counter() - begin)
        segment.steps.append(loop.step())
    segment.nbytes = [wait() for wait in waits]
    settle()
    return segment


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    use_all_cores()
    keep_freed_memory()
    warnings.simplefilter("ignore")
    result = Result()
    # its text has 256 tokens, whatever the vocabulary
    state = State(QUICK if options.quick else FULL)
    loop = Loop(state)
    loop.step()  # makes the gradients
    result.facts["state_nbytes"] = state.nbytes
    contenders: list[Contender] = [Ours(state, options.folder)]
    if options.peers != "none":
        contenders += [Dcp(state, options.folder), TorchSave(state, options.folder)]
    for scenario in SCENARIOS:
        result.facts[f"{scenario}: changed_nbytes"] = loop.train_only(scenario)
        loop.step()
        measured = _Scenario(loop, contenders, (options.rounds + 1) // 2)
        measured.run(WINDOW)
        result.series.update({f"{scenario}: {name}": values for name, values in measured.series.items()})
        step = result.median(f"{scenario}: step")
        for every in (1, EVERY):
            result.lines += _lines(result, scenario, every, step, [contender.name for contender in contenders])
    return result


class _Scenario:
    """Turns of: no snapshots, and each contender at every step and at every tenth."""

    def __init__(self, loop: Loop, contenders: list[Contender], rounds: int) -> None:
        self._loop = loop
        self._contenders = contenders
        self._rounds = rounds
        self.series: dict[str, list[float]] = {}

    def run(self, window: int) -> None:
        segments: dict[tuple[str, int], list[Segment]] = {}
        plain: list[float] = []
        for number in range(self._rounds):
            turns: list[Callable[[], None]] = [lambda: plain.extend(train(self._loop, window + 1, 1, None).steps[1:])]
            for contender in self._contenders:
                turns.append(partial(self._turn, contender, window, segments))
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
        self.series["step"] = plain
        usual = statistics.median(plain)
        for (name, every), found in segments.items():
            length = len(found[0].steps) // len(found[0].stalls)
            lost = []
            for segment in found:
                for index, stall in enumerate(segment.stalls):
                    steps = segment.steps[index * length : (index + 1) * length]
                    lost.append(stall + sum(steps) - len(steps) * usual)
            self.series[f"{name}, every {every}: lost"] = lost
            self.series[f"{name}, every {every}: stall"] = [stall for each in found for stall in each.stalls]
            self.series[f"{name}, every {every}: bytes"] = [float(n) for each in found for n in each.nbytes]

    def _turn(self, contender: Contender, window: int, segments: dict[tuple[str, int], list[Segment]]) -> None:
        contender.clean()
        train(self._loop, 1, 1, contender)  # so that what changes from step to step is known
        segments.setdefault((contender.name, 1), []).append(train(self._loop, window, 1, contender))
        for _ in range(2):
            segments.setdefault((contender.name, EVERY), []).append(train(self._loop, window, window, contender))


def _lines(result: Result, scenario: str, every: int, step: float, names: list[str]) -> list[Line]:
    stall = {name: result.median(f"{scenario}: {name}, every {every}: stall") for name in names}
    # no snapshot makes the steps after it faster: where they were, that was chance
    lost = {name: max(stall[name], result.median(f"{scenario}: {name}, every {every}: lost")) for name in names}
    ours = lost["torchsnapshot"]
    share = ours / (every * step)
    changed = result.facts[f"{scenario}: changed_nbytes"] / result.facts["state_nbytes"]
    what = f"training loses, {SCENARIOS[scenario]} ({changed:.1%} of bytes change), every {every} steps".replace(
        "every 1 steps", "every step"
    )
    measured = f"{readable(ours)} a snapshot ({readable(stall['torchsnapshot'])} stall) = {share:.1%}"
    others = ", ".join(f"{readable(lost[name])} {name}" for name in names if name != "torchsnapshot")
    limit = f"{readable(step)} a step without snapshots"
    lines = []
    if changed <= 0.05:
        limit += f"; it is {SHARE:.0%} of steps of {readable(ours / (every * SHARE))}"
        lines.append(Line(what, f"≤ {SHARE:.0%} of training time", measured, "", limit, verdict(share <= SHARE)))
    if "DCP async" in lost:
        held = MET if ours < lost["DCP async"] else MISSED
        lines.append(Line(what, "less than DCP async", measured, others, limit, held))
    else:
        lines.append(Line(what, "", measured, others, limit, SHOWN))
    nbytes = result.median(f"{scenario}: torchsnapshot, every {every}: bytes")
    lines.append(Line(f"{what}: bytes a snapshot", "", megabytes(nbytes), "", "", SHOWN))
    return lines


if __name__ == "__main__":
    run_part("training", measure)
