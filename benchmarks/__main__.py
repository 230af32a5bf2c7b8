"""Runs every part, prints one table, writes JSON, draws the plot: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, plot
from benchmarks.part import PEERS, REPOSITORY
from benchmarks.report import MISSED, Line, Result, table

PARTS = (
    "take", "slow_disk", "async_stall", "training", "restore", "stored_bytes", "small", "gc_scale", "s3", "chunk_size",
    "ranks", "ranks_simulated",
)  # fmt: skip
RESULTS = REPOSITORY / "benchmarks" / "results"
REFERENCE = RESULTS / "reference.json"
PICTURE = REPOSITORY / "docs" / "images" / "training.svg"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: written by --publish -->", "<!-- end of figures -->"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which (default: all): {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".bench", help="on the disk to measure")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files go")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it works, its figures mean nothing"
    )
    parser.add_argument("--peers", choices=PEERS, default="all", help="other libraries: all, those in torch, none")
    parser.add_argument("--rounds", type=int, help="measured rounds (default 5)")
    parser.add_argument(
        "--publish", action="store_true", help=f"also write {REFERENCE.name}, {PAGE.name} and the README's plot"
    )
    options = parser.parse_args(arguments)
    options.parts = options.parts or list(PARTS)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    return options


def main() -> int:
    """Run; returns the exit status: 1 if a part failed. A missed target is no failure of the benchmark."""
    options = parse()
    options.results.mkdir(parents=True, exist_ok=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    facts = machine.describe(options.folder)
    print(f"On {machine.sentence(facts)}", flush=True)
    results: dict[str, Result] = {}
    for part in PARTS:
        if part in options.parts:
            found = _run(part, options)
            if found is not None:
                results[part] = found
    facts["load_after"] = round(os.getloadavg()[0], 2)
    lines = [line for result in results.values() for line in result.lines]
    print(f"\n{table(lines)}\n")
    print(_summary(lines, options.quick))
    _draw(results, options.results / PICTURE.name)
    whole = {"machine": facts, "parts": {part: asdict(result) for part, result in results.items()}}
    (options.results / "all.json").write_text(json.dumps(whole, indent=2) + "\n")
    if options.publish:
        _publish(whole, lines, results)
    return 0 if len(results) == len(options.parts) else 1


def _run(part: str, options: argparse.Namespace) -> Result | None:
    """Run one part in a process of its own; None if it failed, which was said."""
    out: Path = options.results / f"{part}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{part}", "--out", str(out.resolve())]
    command += ["--folder", str(options.folder.resolve()), "--peers", options.peers]
    command += ["--quick"] if options.quick else []
    command += ["--rounds", str(options.rounds)] if options.rounds else []
    print(f"  {part} ...", end="", flush=True)
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(f" {time.perf_counter() - begin:.0f} s", flush=True)
    if done.returncode:
        # a negative status is the signal that ended it: -9 where memory ran out
        print(f"  {part} FAILED with status {done.returncode}:\n{done.stderr}", file=sys.stderr)
        return None
    return Result.load(out)


def _summary(lines: list[Line], quick: bool) -> str:
    targets = [line for line in lines if line.target]
    missed = [line for line in targets if line.verdict == MISSED]
    text = f"{len(targets) - len(missed)} of {len(targets)} targets met."
    return f"{text} These are tiny sizes: the verdicts mean nothing." if quick else text


def _draw(results: dict[str, Result], file: Path) -> None:
    training = results.get("training")
    if training is None or not all(f"all: {name}, every 1: lost" in training.series for name in plot.COLOURS):
        print("No plot: the part 'training' did not run with its peers.")
    elif not plot.can_draw():
        print("No plot: matplotlib is not installed (pip install matplotlib).")
    else:
        plot.draw(training, file)
        print(f"Plot: {file}")


def _publish(whole: dict[str, Any], lines: list[Line], results: dict[str, Result]) -> None:
    """Write what is committed: the measurements, the picture, and the table in the documentation."""
    REFERENCE.write_text(json.dumps(whole, indent=2) + "\n")
    _draw(results, PICTURE)
    PAGE.write_text(with_figures(PAGE.read_text(), f"Measured on {machine.sentence(whole['machine'])}:", table(lines)))


def with_figures(page: str, sentence: str, figures: str) -> str:
    """The page with other figures between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{sentence}\n\n{figures}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
