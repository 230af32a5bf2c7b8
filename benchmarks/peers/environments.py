"""Virtual environments for the peers: each has its library and shares torch with the one that runs the benchmark."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "safetensors": ("safetensors==0.8.0",),
    "old-torchsnapshot": ("torchsnapshot==0.1.0", "importlib-metadata<9"),
    "torch_checkpointing": ("torch_checkpointing==0.1.1",),
}


@dataclass(frozen=True, slots=True)
class Unavailable:
    """An environment could not be made; ``reason`` says why, in one line."""

    reason: str


def environment(name: str, folder: Path) -> Path | Unavailable:
    """The Python of a peer's environment, which is made if it isn't there yet.

    Args:
        name: a key of ``REQUIREMENTS``; without requirements it is this Python.
        folder: where environments are kept.
    """
    requirements = REQUIREMENTS[name]
    if not requirements:
        return Path(sys.executable)
    home = folder / name
    python, stamp = home / "bin" / "python", home / ".installed"
    if stamp.exists() and stamp.read_text() == repr((sys.executable, requirements)):
        return python
    print(f"  making {home}: {', '.join(requirements)}", file=sys.stderr, flush=True)
    try:
        _run(sys.executable, "-m", "venv", "--clear", str(home))
        packages = next(home.glob("lib/python*/site-packages"))
        # at the end of the path, and without the .pth files there: an editable torchsnapshot stays out of sight
        (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1")
        _run(str(python), *pip, *requirements)
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return Unavailable(f"could not be installed: {output.strip().splitlines()[-1]}")
    stamp.write_text(repr((sys.executable, requirements)))
    return python


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
