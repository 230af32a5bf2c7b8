"""Every example runs, in its quick form, as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm import run_script

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(script: Path, root: Path) -> str:
    """What the example prints."""
    done = run_script(script, "--quick", "--root", root)
    assert done.returncode == 0, done.stdout
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


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_training_goes_on_with_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    """A job of two ranks is taken up by three, and then by one process that nobody launched."""
    script = str(EXAMPLES[0].parent / f"{name}.py")
    arguments = [script, "--quick", "--root", str(tmp_path / "snapshots"), "--steps"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for command, steps in (([*launcher, "2"], "4"), ([*launcher, "3"], "8"), ([sys.executable], "10")):
        done = subprocess.run(
            [*command, *arguments, steps], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert f"ok: step {steps} with" in done.stdout
        assert ("go on after step" in done.stdout) == (steps != "4"), done.stdout
