"""The 256 folders of a local store's blobs, made together.

What doesn't live here: when (``local``).
"""

from __future__ import annotations

import os
import threading

from torchsnapshot.store.posix import make_folder

_making = threading.Lock()


def make_blob_folders(blobs: str) -> None:
    """Make those that are missing.

    A new store's first puts come together: without a lock they would all make them, each waiting for the others.

    Args:
        blobs: the folder that they are in.
    """
    with _making:
        for number in range(256):
            folder = os.path.join(blobs, f"{number:02x}")
            if not os.path.isdir(folder):
                make_folder(folder)


def _forget_parent() -> None:
    global _making
    # another thread may hold it when the process forks
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
