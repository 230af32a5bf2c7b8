"""Every example runs, in its quick form, as a user would start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(script: Path, root: Path) -> str:
    """What the example prints."""
    command = [sys.executable, str(script), "--quick", "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    """The example ends well, and everything that it claims on the way held."""
    out = run(script, tmp_path / "snapshots")
    assert "ok:" in out
    assert "NOT TRUE" not in out


def test_training_example_shows_that_frozen_weights_cost_nothing(tmp_path: Path) -> None:
    """Trained from scratch all of the state is new each time; while the lower half is frozen, less is."""
    rows = [line.split() for line in run(EXAMPLES[0].parent / "train_gpt.py", tmp_path).splitlines()]
    state_and_new = {row[1]: (row[3:5], row[5:7]) for row in rows if row and row[0] in ("scratch", "finetune")}
    assert state_and_new["4"][0] == state_and_new["4"][1]
    last = max(state_and_new, key=int)
    assert state_and_new[last][0] != state_and_new[last][1]
