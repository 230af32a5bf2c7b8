"""The fewest bytes: what ``trajectory.py`` finds on a real training run, held against its targets."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.part import REPOSITORY, Options, run_part
from benchmarks.report import SHOWN, Line, Result, verdict

WAYS = ("with deltas", "without deltas")


def measure(options: Options) -> Result:
    """Run the training, and hold the fractions against the targets."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trajectory", "--json", "--folder", str(options.folder)]
    command += ["--quick", "--snapshots", "2"] if options.quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    result = Result(facts={name: found[name] for name in found if name != "rows"})
    for state, row in found["rows"].items():
        for way in WAYS:
            if way in row["targets"]:
                fraction, target = row[way], row["targets"][way]
                line = Line(
                    f"bytes, {state}, {way}",
                    f"≤ {target:g} of raw",
                    f"{fraction:.4f} of raw",
                    "",
                    "",
                    verdict(fraction <= target),
                )
                result.lines.append(line)
        if "run" in row:
            run = f"{row['run']:.4f} of raw"
            result.lines.append(Line(f"bytes, {state}, a whole run with its bases", "", run, "", "", SHOWN))
        each = {"with deltas": "with_deltas", "without deltas": "without_deltas", "run": "run"}
        result.series.update({f"{state}, {way}: fractions": row["each"][key] for way, key in each.items()})
    result.series = {name: values for name, values in result.series.items() if values}
    return result


if __name__ == "__main__":
    run_part("stored_bytes", measure)
