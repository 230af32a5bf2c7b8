"""The benchmark's side of a peer: starts its process, sends requests, keeps what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.part import Options, drop_cache, fill_cache, new_folder, settle
from benchmarks.peers.environments import Unavailable, environment
from benchmarks.report import SHOWN, Line

MODULES: Mapping[str, tuple[str, str]] = {
    "torch.save": ("torch_file", "torch"),
    "safetensors": ("safetensors_file", "safetensors"),
    "DCP": ("dcp", "torch"),
    "DCP, kept stager": ("dcp_kept", "torch"),
    "old torchsnapshot": ("old_torchsnapshot", "old-torchsnapshot"),
    "torch_checkpointing": ("torch_checkpointing", "torch_checkpointing"),
}
"""Name in the table → module in this package, and environment."""


class PeerFailedError(RuntimeError):
    """A peer could not do what it was asked; carries its traceback."""


class Peer:
    """A running peer. Its folders lie below ``folder``; each method returns the seconds that the peer measured."""

    def __init__(self, name: str, process: subprocess.Popen[str], folder: Path) -> None:
        self.name = name
        self._process = process
        self._folder = folder

    def ask(self, do: str, folder: Path | None = None, **more: str) -> float:
        """Send a request and wait for its answer.

        Raises:
            PeerFailedError: it failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "folder": str(folder or self._folder), **more}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerFailedError(f"{self.name} has ended") from error
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailedError(f"{self.name} has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailedError(f"{self.name}: {answer['error']}")
        seconds: float = answer["seconds"]
        return seconds

    def save(self, *, durable: bool = False) -> float:
        """Save into a new folder, which is removed again when the disk has settled."""
        folder = new_folder(self._folder)
        seconds = self.ask("save durably" if durable else "save", folder)
        settle()
        remove(folder)
        return seconds

    def stall(self, what: str) -> float:
        """Change the state, save in the background, wait for the end: the seconds until the state may change again."""
        self.ask("change", what=what)
        folder = new_folder(self._folder)
        seconds = self.ask("begin", folder)
        self.ask("wait")
        settle()
        remove(folder)
        return seconds

    def load(self, folder: Path, *, warm: bool) -> float:
        """Load what is in ``folder``, with the page cache full of it or empty."""
        fill_cache(folder) if warm else drop_cache(folder)
        return self.ask("load", folder)


def remove(folder: Path) -> None:
    """Remove a folder and what is in it."""
    subprocess.run(["rm", "-r", str(folder)], check=True)


@contextmanager
def peers(names: list[str], options: Options) -> Iterator[tuple[dict[str, Peer], list[Line]]]:
    """Start peers; yields those that run, and a line of the table for each that doesn't."""
    running: dict[str, Peer] = {}
    missing: list[Line] = []
    with ExitStack() as stack:
        for name in names:
            if options.peers == "none" or (options.peers == "torch" and MODULES[name][1] != "torch"):
                continue
            found = stack.enter_context(_started(name, options))
            if isinstance(found, Peer):
                running[name] = found
            else:
                missing.append(Line(f"peer {name}", "", found.reason, "", "", SHOWN))
        yield running, missing


@contextmanager
def _started(name: str, options: Options) -> Iterator[Peer | Unavailable]:
    module, wanted = MODULES[name]
    python = environment(wanted, options.environments)
    if isinstance(python, Unavailable):
        yield python
        return
    launch = Path(__file__).parent / "launch.py"
    log = options.folder / f"{module}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(python), str(launch), module, *(["--quick"] if options.quick else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=options.folder,
        )
    try:
        peer = Peer(name, process, options.folder)
        try:
            peer.ask("hello")
        except PeerFailedError:
            lines = log.read_text().strip().splitlines() or ["it ended without a word"]
            print(f"  {name} does not run: {lines[-1]}", file=sys.stderr)
            yield Unavailable(f"does not run: {lines[-1]}")
        else:
            yield peer
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def usable(running: dict[str, Peer], missing: list[Line], trial: Callable[[Peer], object]) -> None:
    """Try each peer once, which warms it up; those that fail move from ``running`` to ``missing``."""
    for name, peer in list(running.items()):
        try:
            trial(peer)
        except PeerFailedError as error:
            del running[name]
            missing.append(Line(f"peer {name}", "", f"failed: {str(error).strip().splitlines()[-1]}", "", "", SHOWN))
