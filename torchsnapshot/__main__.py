"""``python -m torchsnapshot``: the command line without an installed script."""

from __future__ import annotations

import sys

from torchsnapshot.cli import main

if __name__ == "__main__":
    sys.exit(main())
