"""The bodies of requests and answers, on the event loop of an fsspec filesystem: bounded in time, and in memory.

The clients bound the seconds that an answer may take, but not those in which a server takes nothing of a body, nor
those before it says that it will. And a body that is asked for as a whole takes fresh memory, and one more copy. What
doesn't live here: requests (``s3_files``, ``gcs_files``), retries (``remote``).

Invariant: once ``filled`` has returned or raised, nothing is written to the memory any more.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import fsspec.asyn
from fsspec.exceptions import FSTimeoutError

from torchsnapshot.store.remote_errors import is_out_of_range

ANSWER_SECONDS: Final = 60
"""How long a server may be silent, where the user has not said otherwise."""

_MIN_UPLOAD_RATE: Final = 10_000
"""Bytes a second that an upload makes at the very least: 32 of them at once share a line of 2.6 Mbit/s."""

_PIECE_NBYTES: Final = 1 << 20
"""What is asked of a body at once; it gives what has come, which is less."""


def sent(loop: Any, request: Callable[[], Awaitable[Any]], nbytes: int, seconds: float) -> Any:
    """What comes of a request with a body; it is given up where that cannot be under way any more.

    Args:
        loop: the event loop that the request runs on, in a thread of its own.
        request: sends the body, and returns the answer.
        nbytes: of the body.
        seconds: how long the server may be silent.

    Raises:
        TimeoutError: no answer came in time. The body may have arrived all the same.
    """
    begin = time.monotonic()
    try:
        return fsspec.asyn.sync(loop, request, timeout=seconds + nbytes / _MIN_UPLOAD_RATE)
    except FSTimeoutError as error:
        waited = time.monotonic() - begin
        reason = f": {error.__cause__}" if str(error.__cause__ or "") else ""
        raise TimeoutError(f"no answer to an upload of {nbytes:,} bytes after {waited:.0f} s{reason}") from error


def filled(loop: Any, request: Callable[[memoryview], Awaitable[int]], memory: memoryview) -> int:
    """Let a request fill memory; returns how many bytes it had, 0 where it began behind the object's end.

    Args:
        loop: as for ``sent``.
        request: fills what it is given, and returns how many bytes there were.
        memory: writable.
    """
    own = memory[:]
    try:
        return int(fsspec.asyn.sync(loop, request, own))
    except Exception as error:
        if is_out_of_range(error):
            return 0
        raise
    finally:
        # Ctrl-C ends the waiting, but not the request: what comes now must not reach the caller's memory
        own.release()


async def copy_body(read: Callable[[int], Awaitable[bytes]], memory: memoryview, start: int, *, is_range: bool) -> int:
    """Copy a body into memory; returns how many bytes of it there were.

    Args:
        read: gives the next bytes of the body, at most so many; none at its end.
        memory: what is wanted, from ``start`` on.
        start: in bytes of the object.
        is_range: the body is what is wanted; else the whole object, from a server without ranges.
    """
    nbytes = memory.nbytes
    position = 0 if is_range else -start
    # of a range, as far as its end: a connection is used again only then
    while (is_range or position < nbytes) and (data := await read(_PIECE_NBYTES)):
        piece = data[max(0, -position) : max(0, nbytes - position)]
        begin = max(0, position)
        memory[begin : begin + len(piece)] = piece
        position += len(data)
    return max(0, min(position, nbytes))
