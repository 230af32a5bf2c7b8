"""What every part has in common: its options, its scratch folder, its output, and how contenders take turns."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Result, table
from torchsnapshot import knobs

REPOSITORY = Path(__file__).resolve().parent.parent
ROUNDS = 5
Turns = dict[str, Callable[[], float]]
"""Contenders by name; each does its work once and reports seconds."""

PEERS = ("all", "torch", "none")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a part is to be run.

    Attributes:
        folder: an empty folder on the disk to measure, removed afterwards.
        quick: tiny sizes and one round: shows that the part works, its figures mean nothing.
        peers: which other libraries to run beside ours: ``"all"``, those that need only ``"torch"``, or ``"none"``.
        rounds: measured rounds after those that warm up.
        environments: where the peers' virtual environments are, or are made.
    """

    folder: Path
    quick: bool
    peers: str
    rounds: int
    environments: Path


def run_part(name: str, measure: Callable[[Options], Result]) -> None:
    """The command line of a part."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=f"The part {name!r}.")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".bench", help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON, instead of printing a table")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it works, its figures mean nothing"
    )
    parser.add_argument("--peers", choices=PEERS, default="all", help="other libraries: all, those in torch, none")
    parser.add_argument("--rounds", type=int, help=f"measured rounds after those that warm up (default {ROUNDS})")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=arguments.folder)).resolve()
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    try:
        # the interpreter's garbage has nothing to do with what is measured; nor have the objects of imported modules
        gc.disable()
        gc.freeze()
        result = measure(
            Options(folder, arguments.quick, arguments.peers, rounds, REPOSITORY / ".bench" / "environments")
        )
    finally:
        shutil.rmtree(folder)
    result.facts["rounds"] = rounds
    result.facts["quick"] = arguments.quick
    if arguments.out is not None:
        result.save(arguments.out)
    else:
        print(table(result.lines))


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def take_turns(contenders: Mapping[str, Callable[[], float]], result: Result, rounds: int, *, warm_up: int = 1) -> None:
    """Let each contender run once a round, every other round in reverse order, and note the seconds it reports.

    Whatever the machine does meanwhile hits them all alike. Rounds that warm up are not noted.
    """
    names = list(contenders)
    for number in range(warm_up + rounds):
        for name in names if number % 2 == 0 else reversed(names):
            seconds = contenders[name]()
            gc.collect()
            if number >= warm_up:
                result.series.setdefault(name, []).append(seconds)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def settle() -> None:
    """Wait until the disk has taken what earlier measurements left in the page cache."""
    os.sync()


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the contents of all files below ``folder``, which have been synced."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def fill_cache(folder: Path) -> None:
    """Read all files below ``folder`` once, so that the page cache holds them."""
    buffer = bytearray(8 << 20)
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def new_folder(parent: Path) -> Path:
    """A new empty folder."""
    return Path(tempfile.mkdtemp(dir=parent))


def keep_freed_memory() -> None:
    """Have the C library give no freed memory back to the system: a loop then touches fresh memory in its first round
    alone, and its rounds take equally long. For glibc (mallopt(3)); others are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def all_hashed() -> Iterator[None]:
    """The library hashes all memory, as it does where the kernel does not tell what was written."""
    found = os.environ.get(knobs.WATCH_MEMORY)
    os.environ[knobs.WATCH_MEMORY] = "0"
    try:
        yield
    finally:
        del os.environ[knobs.WATCH_MEMORY]
        if found is not None:
            os.environ[knobs.WATCH_MEMORY] = found


def use_all_cores() -> None:
    """Let torch use what the machine has."""
    torch.set_num_threads(cores())
