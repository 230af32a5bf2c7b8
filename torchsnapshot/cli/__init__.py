"""The command line: ``torchsnapshot ls | show | diff | du | verify | gc | retain | rm | copy``.

What lives here: the parser and what an error looks like. The commands are in ``look`` (read only) and ``care``
(verify, delete, copy); each parses, calls and prints, so that all they do can be done from Python too.
``docs/cli.md`` documents every command.

Exit codes: 0 it is done; 1 problems were found, or the work was refused or failed; 2 the command line makes no sense;
130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from torchsnapshot.cli import care, look
from torchsnapshot.cli.output import print_error
from torchsnapshot.errors import SnapshotError
from torchsnapshot.version import __version__

FAILED = 1
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(
        prog="torchsnapshot",
        description="Look at, check and clean up snapshots. Paths are folders or URLs (s3://, gs://, gcs://, ...).",
        epilog="Exit codes: 0 done; 1 problems found, refused or failed; 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"torchsnapshot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    look.add_commands(commands)
    care.add_commands(commands)
    return parser


def _prepare_streams() -> None:
    """Let no name fail to print: what the encoding lacks is written escaped, and a closed stream swallows all."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; None takes them from the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: with code 2 where the command line makes no sense, 0 for ``--help``.
    """
    options = build_parser().parse_args(arguments)
    _prepare_streams()
    logging.basicConfig(level=logging.WARNING, format="torchsnapshot: %(levelname)s: %(message)s")
    if options.debug:
        # ours alone: a filesystem's debug log may hold credentials
        logging.getLogger("torchsnapshot").setLevel(logging.DEBUG)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has enough; the interpreter must not fail once more while it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SnapshotError, ValueError, OSError) as error:
        if options.debug:
            raise
        print_error(str(error))
        return FAILED
    return code
