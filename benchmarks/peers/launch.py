"""Starts a peer: ``python launch.py MODULE [--quick]``, by path, in the peer's own environment.

The repository's folder goes to the end of the path, so that ``import torchsnapshot`` finds the old one where that is
installed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
    importlib.import_module("benchmarks.peers.serve").serve(sys.argv[1], quick="--quick" in sys.argv)
