"""What a part of the benchmark found, as values: lines of the table, raw measurements, facts. Pure.

What lives here: ``Line``, ``Result``, how a measured ratio becomes a verdict, and the table. What doesn't: measuring.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MET, MISSED, SHOWN = "met", "MISSED", "shown"
NOT_MEASURED = "not measured"

HEADINGS = ("what", "target", "measured", "peer", "limit", "verdict")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table, each cell as it is printed."""

    what: str
    target: str
    measured: str
    peer: str
    limit: str
    verdict: str


@dataclass(slots=True)
class Result:
    """What one part found.

    Attributes:
        lines: for the table.
        series: every measurement by name, in the order taken, warm-up left out; seconds unless the name says otherwise.
        facts: sizes and settings.
    """

    lines: list[Line] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what ``save`` wrote."""
        found = json.loads(path.read_text())
        return cls([Line(**line) for line in found["lines"]], found["series"], found["facts"])

    def median(self, name: str) -> float:
        """The median of a series."""
        return statistics.median(self.series[name])


def readable(seconds: float) -> str:
    """``seconds`` as people write it."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def megabytes(nbytes: float) -> str:
    """``nbytes`` as people write it."""
    return f"{nbytes / 1e6:,.1f} MB"


def verdict(holds: bool) -> str:
    """The word for a target that was held, or not."""
    return MET if holds else MISSED


def against_limit(what: str, ours: float, factor: float, limit: float, limit_name: str, peer: str = "") -> Line:
    """A line whose target is a multiple of a limit that was measured in the same run. Seconds."""
    ratio = ours / limit
    return Line(
        what,
        f"≤ {factor:g} × limit",
        f"{readable(ours)} = {ratio:.2f} × limit",
        peer,
        f"{readable(limit)} {limit_name}",
        verdict(ratio <= factor),
    )


def ratio_to_limit(what: str, ours: float, limit: float) -> Line:
    """A line that only shows how something stands to a limit that another line names. Seconds."""
    return Line(what, "", f"{readable(ours)} = {ours / limit:.2f} × limit", "", "", SHOWN)


def faster_than(what: str, ours: float, factor: float, peers: Mapping[str, float], which: str) -> Line:
    """A line whose target is to be ``factor`` times as fast as the fastest of ``peers``. Seconds."""
    target = f"≥ {factor:g} × faster than {which}" if factor != 1 else f"faster than {which}"
    if not peers:
        return Line(what, target, readable(ours), "none could be run", "", NOT_MEASURED)
    name = min(peers, key=lambda peer: peers[peer])
    ratio = peers[name] / ours
    held = ratio >= factor if factor != 1 else ratio > 1
    measured = f"{readable(ours)} = {ratio:.1f} × faster"
    return Line(what, target, measured, f"{readable(peers[name])} {name}", "", verdict(held))


def table(lines: Iterable[Line]) -> str:
    """The lines as a Markdown table whose columns are aligned."""
    rows = [HEADINGS, *(tuple(getattr(line, heading) for heading in HEADINGS) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])
