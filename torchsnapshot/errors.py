"""Every error that the library raises on purpose, in one tree.

A message says what went wrong, where (path, key or rank) and what to do about it. Errors of foreign libraries are
translated at one border (the store's backends), with ``raise ... from``.

    SnapshotError (a RuntimeError, as users of the old torchsnapshot expect)
    ├── SnapshotNotFoundError     the path holds no committed snapshot
    ├── FormatError               a manifest, blob or config that breaks the format
    │   └── NewerFormatError      ... because a newer version of the library wrote it
    ├── CorruptionError           stored bytes are not what they were
    │   └── MissingBlobError      a blob that a manifest names is not there
    ├── AbsentStateError          (also AssertionError, KeyError) a key of app_state is not in the snapshot
    ├── MismatchError             (also ValueError) the target does not fit what is stored
    ├── UnsupportedValueError     (also TypeError) a value that no snapshot can hold
    ├── PickleRefusedError        restoring needs a pickle, and nobody allowed it
    ├── PartialRestoreError       a restore failed half-way: the target is a mix of old and new
    ├── LeaseLostError            somebody called this take dead while it ran; nothing was committed
    ├── CommitUnknownError        the store gave no clear answer whether the commit happened
    ├── CollectorStoppedError     gc stopped before it deleted anything that is in doubt
    ├── RankError                 another rank failed; carries every failed rank's traceback
    └── StoreError                the store refused or could not be reached
        ├── UnknownProtocolError  (also ValueError)
        ├── KeyAbsentError        (also KeyError) no object of that key
        ├── KeyExistsError        put(if_absent=True) found the key taken
        ├── CredentialsError      no credentials, or they were refused
        ├── BucketNotFoundError   no such bucket
        ├── ReadOnlyError         the store may not be written
        ├── StoreFullError        no space or quota left
        └── StoreUnavailableError worth a retry later: time-out, connection, 5xx after all retries
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class SnapshotError(RuntimeError):
    """Base of all errors of this library."""


class SnapshotNotFoundError(SnapshotError):
    """The path holds no committed snapshot."""


class FormatError(SnapshotError):
    """Stored metadata breaks the format; nothing was allocated or executed on its behalf."""


class NewerFormatError(FormatError):
    """Stored metadata was written by a newer version of the library."""


class CorruptionError(SnapshotError):
    """Stored bytes are not what they were when they were written."""


class MissingBlobError(CorruptionError):
    """A blob that a committed manifest names is not in the store."""


class AbsentStateError(SnapshotError, AssertionError, KeyError):
    """A key of ``app_state`` is not in the snapshot. Also an ``AssertionError``: the old torchsnapshot raised that."""

    __str__ = RuntimeError.__str__


class MismatchError(SnapshotError, ValueError):
    """The target does not fit what is stored."""


class UnsupportedValueError(SnapshotError, TypeError):
    """The state holds values that no snapshot can hold. ``problems`` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(["These values cannot be stored:", *(f"  {problem}" for problem in problems)]))
        self.problems = list(problems)


class PickleRefusedError(SnapshotError):
    """Some values are stored as pickles and the caller did not allow pickle."""


class PartialRestoreError(SnapshotError):
    """A restore failed after it had begun to write: the target is a mix of old and new values."""


class LeaseLostError(SnapshotError):
    """This take was called dead by a collector while it ran; it committed nothing."""


class CommitUnknownError(SnapshotError):
    """The store gave no clear answer whether the commit happened; look again later."""


class CollectorStoppedError(SnapshotError):
    """A collector stopped: going on could have deleted something that is needed."""


class RankError(SnapshotError):
    """One or more ranks failed.

    ``failures`` maps each failed rank to its traceback.
    """

    def __init__(self, message: str, failures: Mapping[int, str]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


class StoreError(SnapshotError):
    """The store refused a request or could not be reached."""


class UnknownProtocolError(StoreError, ValueError):
    """No filesystem is known for the URL's protocol."""


class KeyAbsentError(StoreError, KeyError):
    """The store holds no object of that key."""

    __str__ = RuntimeError.__str__  # KeyError would print the repr of the message


class KeyExistsError(StoreError):
    """``put(..., if_absent=True)`` found an object under the key."""


class CredentialsError(StoreError):
    """Credentials are missing or were refused."""


class BucketNotFoundError(StoreError):
    """The bucket does not exist."""


class ReadOnlyError(StoreError):
    """The store may not be written with these permissions."""


class StoreFullError(StoreError):
    """No space or quota is left in the store."""


class StoreUnavailableError(StoreError):
    """The store did not answer within all retries."""
