"""What the command line prints: tables, sizes, times, JSON, progress bars. Nothing here opens a store.

Results go to standard output, all else (progress, warnings, errors) to standard error, so that a pipe gets only
results.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from torchsnapshot.manifest import MAX_DECIMAL_BITS
from torchsnapshot.progress import Progress
from torchsnapshot.store.repository import Repository

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


def readable_nbytes(nbytes: int) -> str:
    """A size as people read it: ``"0 B"``, ``"999 B"``, ``"1.00 kB"``, ``"12.3 MB"``; decimal units, three digits."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in _UNITS:
        value /= 1000
        # 999.95 would print as 1000
        if value < 999.5 or unit == _UNITS[-1]:
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def readable_time(created_ms: int) -> str:
    """A commit time, in this machine's time zone, to the second."""
    return datetime.fromtimestamp(created_ms / 1000, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def iso_time(created_ms: int) -> str:
    """A commit time for programs: ISO 8601, UTC."""
    return datetime.fromtimestamp(created_ms / 1000, timezone.utc).isoformat()


def plural(number: int, noun: str) -> str:
    """``"1 blob"``, ``"1,234 blobs"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Text for a terminal: names and metadata are what somebody stored, so control characters are written escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a header; a column whose name begins with ``>`` is set right.

    Never cut to the terminal's width: a path that is cut is of no use to who copies it.
    """
    names = [column.lstrip(">") for column in columns]
    table = [names, *[[printable(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    for row in table:
        cells = [
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object; what JSON has no form for is written as text."""
    print(json.dumps(_as_json(document), indent=2, allow_nan=False))


def print_error(message: str) -> None:
    """Say on standard error what went wrong."""
    lines = [printable(line) for line in message.splitlines()]
    print("\n".join([f"torchsnapshot: {lines[0] if lines else ''}", *lines[1:]]), file=sys.stderr)


def nothing_below(folder: str, repository: Repository) -> str:
    """The error for a folder in a store that holds no snapshot: most likely a typing error."""
    return f"{folder}: no snapshot is at or below this folder; what is there: torchsnapshot ls {repository.url}"


def shown(value: object) -> str:
    """The ``repr`` of a value; Python refuses to write ints of thousands of digits in decimal."""
    try:
        return repr(value)
    except ValueError:
        return hex(value) if isinstance(value, int) else f"{type(value).__name__} with an int of thousands of digits"


def _as_json(value: object) -> object:
    """What JSON should have for a value of user metadata or of a report: it knows neither nan nor keys but text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() <= MAX_DECIMAL_BITS else hex(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {_as_json_key(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_as_json(item) for item in sorted(value, key=shown)]
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value.hex() if isinstance(value, bytes) else str(value)


def _as_json_key(key: object) -> str:
    if isinstance(key, str):
        return key
    return json.dumps(key) if key is None or isinstance(key, bool) else shown(key)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Progress bars on standard error while the block runs; where that is no terminal, a line for what it waits for."""
    if not sys.stderr.isatty():
        yield _Waits()
        return
    bars = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[items]:,}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        yield _Bars(bars)


class _Waits:
    """``Progress`` for logs: whoever reads them wants to know why nothing goes on, and no more."""

    def start(self, label: str, total_nbytes: int | None = None) -> None:
        if label.startswith("waiting"):
            print_error(label)

    def advance(self, nbytes: int, items: int = 1) -> None:
        pass

    def finish(self) -> None:
        pass


class _Bars:
    """``Progress`` drawn by rich, which locks by itself."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._items = 0

    def start(self, label: str, total_nbytes: int | None = None) -> None:
        self.finish()
        self._items = 0
        self._task = self._bars.add_task(label, total=total_nbytes, items=0)

    def advance(self, nbytes: int, items: int = 1) -> None:
        if self._task is None:
            return
        self._items += items
        self._bars.update(self._task, advance=nbytes, items=self._items)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
