"""The options that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from torchsnapshot.store.backend import StorageOptions

Runner = Callable[[argparse.Namespace], int]
"""Runs one parsed command; returns the exit code."""

Commands = argparse._SubParsersAction  # argparse has no public name for it
"""Where commands are added."""


def storage_options(text: str) -> StorageOptions:
    """Parse ``--storage-options``: one JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected a JSON object, as in \'{"endpoint_url": "http://127.0.0.1:9000"}\'')
    return value


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def seconds(text: str) -> float:
    """Parse a length of time: 0 or more, and no NaN, which nothing would ever reach."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text}")
    return value


def add_command(
    commands: Commands[argparse.ArgumentParser], name: str, summary: str, run: Runner
) -> argparse.ArgumentParser:
    """Add a command with the options that every command has.

    Args:
        commands: where to.
        name: what the user writes.
        summary: one line, for the list of commands and the command's own help.
        run: what runs it.
    """
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--storage-options",
        type=storage_options,
        metavar="JSON",
        help="options of the filesystem, as one JSON object: endpoint, keys, project",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and the log")
    parser.set_defaults(run=run)
    return parser
