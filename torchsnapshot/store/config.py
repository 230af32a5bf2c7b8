"""ROOT's config as an object of the store: reading it, and what is said about a new one.

What doesn't live here: its bytes (``records``), and making it (``repository``).
"""

from __future__ import annotations

import os

from torchsnapshot.errors import FormatError, KeyAbsentError, NewerFormatError, SnapshotNotFoundError
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.records import CONFIG_OBJECT, Config

CONFIG_CURE = (
    "bring it back from a backup, or take a snapshot with store= this folder, which makes a new one (delete a damaged "
    "one first); all snapshots then open as before"
)
"""What to do where a store has lost its config."""


def read_config(backend: Backend) -> Config:
    """The config of the store at ROOT.

    Raises:
        SnapshotNotFoundError: ROOT has no store.
        NewerFormatError: a newer version of the library wrote it.
        FormatError: it is damaged.
    """
    try:
        data = backend.read(CONFIG_OBJECT)
    except KeyAbsentError as error:
        raise SnapshotNotFoundError(f"{backend.url} holds no store: no {CONFIG_OBJECT} there") from error
    try:
        return Config.unpack(data)
    except NewerFormatError as error:
        raise NewerFormatError(f"{backend.url}: {error}") from error
    except FormatError as error:
        raise FormatError(
            f"{backend.url}: {CONFIG_OBJECT} is damaged: {error}. It holds settings, no data: {CONFIG_CURE}"
        ) from error


def hint_of_neighbour(backend: Backend) -> str:
    """A warning for the line about a new store: people who expected to share with the folder beside it do not."""
    if not isinstance(backend, LocalBackend):
        return ""  # what lies beside ROOT in a bucket is out of this backend's sight
    try:
        with os.scandir(os.path.dirname(backend.root)) as entries:
            for entry in entries:
                if entry.path != backend.root and os.path.isfile(os.path.join(entry.path, CONFIG_OBJECT)):
                    return f"; nothing is shared with the store in {entry.path} (name one store with store= to share)"
    except OSError:
        pass  # it is only a hint
    return ""
