"""Takes onto a disk that is slower than the codec, as many in clouds are: there ``"auto"`` has to beat raw bytes.

The disk is a file on the measured one, mounted by way of a loop device whose writes the kernel holds to a rate. That
takes root, and control groups for block devices (version 1); without them nothing is measured, and a line says why.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.limits import Limits
from benchmarks.part import Options, Turns, run_part, settle, take_turns, use_all_cores
from benchmarks.report import NOT_MEASURED, Line, Result, against_limit, megabytes
from benchmarks.states import FULL, QUICK, State
from benchmarks.take import Run

BYTES_PER_SECOND = 200 * 10**6
DISK_NBYTES = 16 << 30
THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")


class UnavailableError(Exception):
    """This machine lets nobody, or not this user, slow a disk down."""


@contextmanager
def slow_disk(folder: Path) -> Iterator[Path]:
    """A folder on a slow disk, for the length of the block.

    Args:
        folder: where the file lies that is its content; as much of it as is used, up to ``DISK_NBYTES``.

    Raises:
        UnavailableError: it cannot be had here.
    """
    if not os.access(THROTTLE, os.W_OK):
        raise UnavailableError(f"it takes root, and {THROTTLE}")
    image, place = folder / "disk", folder / "slow"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_NBYTES)
    _call("mkfs.ext4", "-q", "-F", str(image))
    _call("mount", "-o", "loop", str(image), str(place))
    try:
        device = os.stat(place).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        THROTTLE.write_text(f"{number} {BYTES_PER_SECOND}")
        try:
            yield place
        finally:
            THROTTLE.write_text(f"{number} 0")
    finally:
        # lazily: what is still open there must not keep it mounted for ever, nor hide what went wrong before
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnavailableError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise UnavailableError(f"{command[0]}: {done.stderr.strip()}")


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    use_all_cores()
    result = Result(facts={"bytes_per_second": BYTES_PER_SECOND})
    try:
        with slow_disk(options.folder) as folder:
            _measure(folder, options, result)
    except UnavailableError as error:
        result.lines = [Line("take onto a slow disk", "", str(error), "", "", NOT_MEASURED)]
    return result


def _measure(folder: Path, options: Options, result: Result) -> None:
    state = State(QUICK if options.quick else FULL)
    limits = Limits(folder)
    raw, auto = Run(state, folder, "raw"), Run(state, folder, "auto")

    def write() -> float:
        settle()
        seconds = limits.direct_write(state.nbytes)
        limits.remove()
        return seconds

    turns: Turns = {"write": write, "first, raw": partial(raw.take, "first")}
    turns |= {f"{what}, auto": partial(auto.take, what) for what in ("first", "all")}
    take_turns(turns, result, options.rounds)
    rate = f"{BYTES_PER_SECOND / 1e6:.0f} MB/s"
    for what, factor in (("first, raw", 1.1), ("first, auto", 1.0), ("all, auto", 1.0)):
        which, _, encoding = what.partition(", ")
        stored = megabytes((raw if encoding == "raw" else auto).stored_nbytes[which])
        name = f"take onto a disk of {rate}, {'all changed' if which == 'all' else which}, {encoding}: stores {stored}"
        note = f"raw durable write of {megabytes(state.nbytes)}"
        result.lines.append(against_limit(name, result.median(what), factor, result.median("write"), note))


if __name__ == "__main__":
    run_part("slow_disk", measure)
