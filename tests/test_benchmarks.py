"""Benchmarks run and print what they promise; how long they take is nobody's test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from warm import run_script

from benchmarks import plot
from benchmarks.__main__ import PAGE, PARTS, parse, with_figures
from benchmarks.limits import Limits, pieces_of
from benchmarks.main_job import Clock, print_table
from benchmarks.part import take_turns
from benchmarks.peers import environments
from benchmarks.report import MET, MISSED, NOT_MEASURED, Line, Result, against_limit, faster_than, table
from benchmarks.states import QUICK, State

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "benchmarks" / "main_job.py"


def run(folder: Path, *options: str) -> str:
    """What the benchmark prints for a small state."""
    done = run_script(SCRIPT, "--folder", folder, "--scale", "0.02", "--rounds", "1", *options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_json_has_every_cell(tmp_path: Path) -> None:
    """The first take writes everything, the second nothing, the third one tensor; nothing is left on the disk."""
    result = json.loads(run(tmp_path, "--json"))
    nbytes = {(cell["row"], cell["column"]): cell["nbytes"] for cell in result["cells"]}
    # the optimizer's equal step counters and moments of untouched parameters are stored once
    assert 0 < nbytes["take #1", "torchsnapshot"] <= result["state_nbytes"]
    assert nbytes["take #2, unchanged", "torchsnapshot"] == 0
    assert nbytes["take #3, one tensor changed", "torchsnapshot"] == 4 * 768 * 3072
    assert nbytes["take #2, unchanged", "torch.save"] >= result["state_nbytes"]
    assert list(tmp_path.iterdir()) == []


def test_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    """The table can stand in a page as it is; where something was not measured, its cells are empty."""
    clock = Clock()
    for row, column in (("take #1", "torchsnapshot"), ("take #1", "torch.save"), ("restore", "bare disk")):
        for _ in range(2):
            clock.time(row, column, lambda: 1_000_000)
    print_table(clock)
    table = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| take #1 |")
    assert table[2].count("1.0 MB") == 2
    assert table[3].startswith("| restore |  |  |  |  |  |")


def run_quickly(folder: Path, part: str, *arguments: str) -> Result:
    """What one part finds with tiny sizes; it leaves nothing behind."""
    out, scratch = folder / "out.json", folder / "scratch"
    script = REPOSITORY / "benchmarks" / f"{part}.py"
    done = run_script(script, *arguments, "--quick", "--folder", scratch, "--out", out, folder=REPOSITORY)
    assert done.returncode == 0, done.stdout
    assert list(scratch.iterdir()) == []
    return Result.load(out)


@pytest.mark.parametrize("part", PARTS)
def test_part_runs_and_measures_all_it_compares(tmp_path: Path, part: str) -> None:
    """With tiny sizes and no peers every part ends well; a target is met or missed, unless it is about peers."""
    result = run_quickly(tmp_path, part, "--peers", "none")
    assert result.lines
    assert all(seconds and all(isinstance(one, float) for one in seconds) for seconds in result.series.values())
    for line in result.lines:
        if line.target and "peer" not in line.target and "DCP" not in line.target and "safetensors" not in line.target:
            assert line.verdict in (MET, MISSED)


def test_peers_stand_beside_ours(tmp_path: Path) -> None:
    """The peers that need nothing but torch run in processes of their own and are measured in the same rounds."""
    result = run_quickly(tmp_path, "take", "--peers", "torch")
    assert {"torch.save", "torch.save + fsync", "DCP"} <= result.series.keys()
    assert not any(line.what.startswith("peer ") for line in result.lines)


def test_training_compares_with_peers_and_can_be_drawn(tmp_path: Path) -> None:
    """The training loop measures every contender, and the plot needs nothing else."""
    result = run_quickly(tmp_path, "training", "--peers", "torch")
    for name in plot.COLOURS:
        assert result.series[f"all: {name}, every 1: lost"]
    if not plot.can_draw():
        with pytest.raises(ImportError):
            plot.draw(result, tmp_path / "plot.svg")
        return
    plot.draw(result, tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_whole_benchmark_prints_one_table_and_writes_json(tmp_path: Path) -> None:
    """``python -m benchmarks`` gathers the parts into one table and one file."""
    command = [sys.executable, "-m", "benchmarks", "small", "ranks_simulated", "--quick", "--peers", "none"]
    command += ["--folder", str(tmp_path / "scratch"), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    whole = json.loads((tmp_path / "results" / "all.json").read_text())
    assert list(whole["parts"]) == ["small", "ranks_simulated"]
    assert len(rows) == 2 + sum(len(part["lines"]) for part in whole["parts"].values())


def test_verdict_follows_from_the_ratio() -> None:
    """A limit may be exceeded by the factor and no more; to be as fast as a peer is not to be faster."""
    assert against_limit("x", 1.2, 1.25, 1.0, "limit").verdict == MET
    assert against_limit("x", 1.3, 1.25, 1.0, "limit").verdict == MISSED
    assert faster_than("x", 1.0, 5, {"a": 5.0, "b": 9.0}, "all") == Line(
        "x", "≥ 5 × faster than all", "1.00 s = 5.0 × faster", "5.00 s a", "", MET
    )
    assert faster_than("x", 1.0, 1, {"a": 1.0}, "all").verdict == MISSED
    assert faster_than("x", 1.0, 1, {}, "all").verdict == NOT_MEASURED


def test_table_is_aligned() -> None:
    """Every line of the table has the same length."""
    lines = table([Line("a", "b", "c", "d", "e", MET), Line("longer", "", "≤ µ", "", "", MISSED)]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_contenders_alternate() -> None:
    """The order turns round every round, and rounds that warm up are not noted."""
    ran: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        def run_once() -> float:
            ran.append(name)
            return float(len(ran))

        return run_once

    result = Result()
    take_turns({name: contender(name) for name in "abc"}, result, 2)
    assert ran == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert result.series == {"c": [4.0, 9.0], "b": [5.0, 8.0], "a": [6.0, 7.0]}


def test_limits_touch_all_bytes(tmp_path: Path) -> None:
    """Pieces cover the tensors' memory, digests tell states apart, and a raw file has the size that was asked for."""
    tensors = [torch.zeros(3 << 20), torch.ones(7)]
    pieces = pieces_of(tensors)
    assert sum(map(len, pieces)) == sum(tensor.nbytes for tensor in tensors)
    limits = Limits(tmp_path, workers=2)
    before = limits.digests(pieces)
    tensors[0][-1] = 5
    assert [
        index for index, pair in enumerate(zip(before, limits.digests(pieces), strict=True)) if len({*pair}) == 2
    ] == [2]
    assert limits.digest(pieces) > 0
    assert limits.copy(pieces) > 0
    assert limits.copy([]) == 0
    assert limits.buffered_write(5 << 20, "raw") > 0
    assert os.path.getsize(tmp_path / "raw") == 5 << 20
    assert limits.read(5 << 20, "raw") > 0
    assert limits.small_puts(2) > 0


def test_state_changes_where_it_should() -> None:
    """A block is an eighth of the blocks; "all" changes every weight and moment; memory stays where it is."""
    state = State(QUICK)
    before = {name: tensor.clone() for name, tensor in state.flat().items()}
    addresses = [tensor.data_ptr() for tensor in state.flat().values()]
    state.change("nothing")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.flat().items())
    state.change("block")
    changed = {name for name, tensor in state.flat().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(state.block())
    state.change("all")
    changed = {name for name, tensor in state.flat().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.endswith(".step")}
    assert [tensor.data_ptr() for tensor in state.flat().values()] == addresses


def test_peer_that_cannot_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the environment says why it isn't there, and nothing else fails."""

    def fail(*command: str) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="WARNING: x\nERROR: no matching distribution\n")

    monkeypatch.setattr(environments, "_run", fail)
    found = environments.environment("safetensors", tmp_path)
    assert found == environments.Unavailable("could not be installed: ERROR: no matching distribution")
    assert environments.environment("torch", tmp_path) == Path(sys.executable)


def test_figures_replace_figures() -> None:
    """Publishing twice leaves the page's words as they were, and one table."""
    once = with_figures(PAGE.read_text(), "Measured here:", "| a |")
    twice = with_figures(once, "Measured there:", "| b |")
    assert twice == once.replace("Measured here:", "Measured there:").replace("| a |", "| b |")
    assert "## How it measures" in twice


def test_without_a_part_all_run(capsys: pytest.CaptureFixture[str]) -> None:
    """No part named means every part; one that doesn't exist is an error that names it."""
    assert parse([]).parts == list(PARTS)
    assert parse(["take", "--quick"]).parts == ["take"]
    with pytest.raises(SystemExit):
        parse(["take", "nonsense"])
    assert "no such part: nonsense" in capsys.readouterr().err
