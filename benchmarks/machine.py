"""What the benchmark ran on and with: the words that stand above its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.part import REPOSITORY, cores
from torchsnapshot import __version__


def describe(folder: Path) -> dict[str, Any]:
    """Cores, memory, versions, how busy the machine is, and the filesystem of ``folder``."""
    return {
        "cores": cores(),
        "machine": platform.machine(),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "filesystem": _filesystem(folder),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchsnapshot": __version__,
        "commit": _commit(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def sentence(facts: dict[str, Any]) -> str:
    """The same in one line."""
    return (
        f"{facts['cores']} cores ({facts['machine']}), {facts['memory_nbytes'] / (1 << 30):.0f} GiB, "
        f"{facts['filesystem']}, Python {facts['python']}, torch {facts['torch']}, "
        f"load before the run {facts['load_before']}"
    )


def _filesystem(folder: Path) -> str:
    """The type of the filesystem that ``folder`` is on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found = line.split(" ")[:3]
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
