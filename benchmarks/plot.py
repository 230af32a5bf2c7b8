"""One picture: bytes on disk and seconds lost per step over a run, ours beside the others.

Drawn from what the part ``training`` measured, with matplotlib, which only the benchmark needs.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from pathlib import Path

from benchmarks.report import Result
from benchmarks.training import SCENARIOS

COLOURS = {"torchsnapshot": "#d62728", "DCP async": "#1f77b4", "torch.save": "#7f7f7f"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(training: Result, file: Path) -> None:
    """Draw into ``file``, whose suffix says in which format.

    Args:
        training: what the part ``training`` found, with peers.
        file: where the picture goes.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "torchsnapshot", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure, axes = pyplot.subplots(2, len(SCENARIOS), figsize=(9, 5.4), sharex=True, layout="constrained")
        for column, (scenario, title) in enumerate(SCENARIOS.items()):
            changed = training.facts[f"{scenario}: changed_nbytes"] / training.facts["state_nbytes"]
            axes[0, column].set_title(f"{title}: {changed:.1%} of {training.facts['state_nbytes'] / 1e9:.2f} GB change")
            axes[1, column].set_xlabel("step, with a snapshot at each")
            axes[1, column].axhline(
                statistics.median(training.series[f"{scenario}: step"]), color="black", linestyle=":", linewidth=1
            )
            for name, colour in COLOURS.items():
                key = f"{scenario}: {name}, every 1"
                nbytes, lost = training.series[f"{key}: bytes"], training.series[f"{key}: lost"]
                on_disk = [training.facts["state_nbytes"] / 1e9]
                on_disk = list(itertools.accumulate((n / 1e9 for n in nbytes), initial=on_disk[0]))
                axes[0, column].plot(range(len(on_disk)), on_disk, color=colour, marker="o", markersize=3, label=name)
                steps = range(1, len(lost) + 1)
                axes[1, column].plot(steps, lost, color=colour, marker="o", markersize=3, label=name)
            axes[1, column].plot([], [], color="black", linestyle=":", linewidth=1, label="a step without snapshots")
        axes[0, 0].set_ylabel("GB on disk")
        axes[1, 0].set_ylabel("seconds lost per step")
        axes[0, 0].legend()
        axes[1, 0].legend()
        file.parent.mkdir(parents=True, exist_ok=True)
        # without a date, so that the same figures give the same file
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
        pyplot.close(figure)
