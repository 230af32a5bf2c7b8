"""Free what no snapshot needs any more: ``python tools/gc.py ROOT [--dry-run] [--wait SECONDS] [--json]``.

The same as ``torchsnapshot gc``, for a checkout whose package is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

# This file's own folder comes first on the path when it is run as a script; the package lies one level up.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torchsnapshot.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["gc", *sys.argv[1:]]))
