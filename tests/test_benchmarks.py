"""Benchmarks run and print what they promise; how long they take is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "main_job.py"


def run(folder: Path, *options: str) -> str:
    """What the benchmark prints for a small state."""
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), "--scale", "0.02", "--rounds", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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


def test_table_is_markdown(tmp_path: Path) -> None:
    """The table can stand in a page as it is."""
    lines = run(tmp_path).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| take #1 |")
