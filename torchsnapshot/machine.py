"""What this process may use of the machine: cores and memory, as affinity and control groups leave them to it.

What doesn't live here: settings, and the defaults that derive from these figures (``knobs``).

Invariant: a system file that is not there, or says nothing sensible, limits nothing.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from time import monotonic

_GRANT_SECONDS = 10.0
"""How old what is known of the control groups may be: which they are, and how many cores they grant."""

_SYSTEM_ROOT = Path("/")
"""Where ``proc`` and ``sys`` are; tests put a folder of their own here."""


def available_cores() -> int:
    """How many cores this process may use: the least of its affinity and its control groups' limits, at least 1."""
    # macOS and Windows have no affinity to ask for
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    granted = _granted_cores(_SYSTEM_ROOT, int(monotonic() // _GRANT_SECONDS))
    return max(1, cores if granted is None else min(cores, granted))


@lru_cache(maxsize=1)
def _granted_cores(system_root: Path, _: int) -> int | None:
    """How many whole cores the control groups grant, None for no limit. It takes many small files to find out."""
    limits = [_cores_limit(version, folder) for version, folder in _control_groups("cpu")]
    return min([int(limit) for limit in limits if limit is not None], default=None)


def _cores_limit(version: int, folder: Path) -> float | None:
    """How many cores' worth of time one control group grants, None for no limit."""
    if version == 2:
        words = _read(folder / "cpu.max").split()
        return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def free_memory_nbytes() -> int:
    """Bytes of memory that this process could still take: the least that the machine and its control groups have."""
    free = [_machine_free_nbytes()]
    for version, folder in _control_groups("memory"):
        limit = _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        # a limit that is not near even without this look at what is used for what, which takes time, decides nothing
        if limit is not None and used is not None and limit - used < min(free):
            # the page cache counts as used, but gives way
            statistics = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
            cached = int(statistics.get("inactive_file" if version == 2 else "total_inactive_file", "0"))
            free.append(max(0, limit - max(0, used - cached)))
    return min(free)


def _machine_free_nbytes() -> int:
    for line in _read(_SYSTEM_ROOT / "proc" / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # not Linux: no cheap figure of what is free, so half of what there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _control_groups(controller: str) -> tuple[tuple[int, Path], ...]:
    """(version, folder) of each control group that limits this process: its own and all above it."""
    return _find_control_groups(_SYSTEM_ROOT, controller, int(monotonic() // _GRANT_SECONDS))


@lru_cache(maxsize=2)
def _find_control_groups(system_root: Path, controller: str, _window: int) -> tuple[tuple[int, Path], ...]:
    """Look for them.

    A container without a cgroup namespace sees a path here that doesn't exist below its mount; its limits then stand at
    the mount's root, which ends every walk.
    """
    found: list[tuple[int, Path]] = []
    mount = system_root / "sys" / "fs" / "cgroup"
    for line in _read(system_root / "proc" / "self" / "cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            version, top = 2, mount
        elif controller in controllers.split(","):
            version, top = 1, mount / controller
        else:
            continue
        folder = top / path.strip("/")
        found.append((version, folder))
        while folder != top:
            folder = folder.parent
            found.append((version, folder))
    return tuple(found)


def _read(path: Path) -> str:
    """The text of a small system file, empty where it can't be read."""
    pieces: list[bytes] = []
    try:
        # every take asks, and read_text() takes longer
        file = os.open(path, os.O_RDONLY)
        try:
            while piece := os.read(file, 1 << 16):
                pieces.append(piece)
        finally:
            os.close(file)
        return b"".join(pieces).decode()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    """The integer that a system file holds, None for ``max`` or an absent file."""
    try:
        return int(_read(path))
    except ValueError:
        return None
