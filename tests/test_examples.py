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
    if script.stem == "train_gpt":
        # trained from scratch all of the state is new each time; while the lower half is frozen, less is
        rows = [line.split() for line in out.splitlines() if line.startswith(("scratch", "finetune"))]
        share = {int(row[1]): float(row[5]) / float(row[3]) for row in rows}
        assert share[4] > 0.95
        assert share[max(share)] < 0.8
