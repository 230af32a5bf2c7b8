"""What the ranks of one session tell one another, as bytes: packed values, a rank's status, failures.

What lives here: packing, unpacking with every check, the words of ``RankError``. What doesn't: how bytes get from rank
to rank (``links``, ``members``, ``coordinator``, ``collectives``). Invariant: unpacking checks everything it is given
and raises ``FormatError``; nothing here executes or imports on a message's behalf.
"""

from __future__ import annotations

import struct
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgpack
import zstandard

from torchsnapshot.errors import FormatError, RankError, SnapshotError

MAX_CONTROL_NBYTES = 16 << 20
"""The most that the control part of one value may take; arrays have no limit."""

MAX_ARRAY_NBYTES = 1 << 30
"""The most that one array may become when it is decompressed."""

_MIN_DICTIONARY_NBYTES = 64

MAX_TRACEBACK_CHARACTERS = 16_000
MAX_LINE_CHARACTERS = 500
MAX_TRACEBACKS = 8
"""When many ranks fail at once, one cause is likely: the others keep the last line of theirs."""

_HEADER = struct.Struct("<4sI")
_MAGIC = b"TSm\x01"


class CoordinationLost(SnapshotError):
    """The store or the coordinating rank cannot be reached any more. Internal: callers turn it into the real outcome.

    ``reported`` is True when this rank's last report may have arrived, so that the coordinating rank may have acted on
    it: whoever catches this then looks for the act itself.
    """

    def __init__(self, message: str, *, reported: bool = False) -> None:
        super().__init__(message)
        self.reported = reported


# ------------------------------------------------------------------ values


def pack(control: object, arrays: Sequence[bytes | bytearray | memoryview] = ()) -> bytes:
    """One value for a round: a small msgpack-able ``control`` and raw ``arrays`` behind it, uncopied by msgpack."""
    views = [memoryview(array).cast("B") for array in arrays]
    head = msgpack.packb([control, [view.nbytes for view in views]], use_bin_type=True)
    return b"".join([_HEADER.pack(_MAGIC, len(head)), head, *views])


def unpack(data: bytes | memoryview, num_arrays: int | None = None) -> tuple[Any, list[memoryview]]:
    """The inverse of ``pack``. The arrays are views into ``data``.

    Args:
        data: the packed value.
        num_arrays: how many arrays there must be; None takes any number.

    Raises:
        FormatError: the bytes are not such a value.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < _HEADER.size:
        raise FormatError(f"a message of {view.nbytes} bytes has no header")
    magic, head_nbytes = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC or head_nbytes > min(view.nbytes - _HEADER.size, MAX_CONTROL_NBYTES):
        raise FormatError("a message has a broken header; do all ranks run the same version of the library?")
    position = _HEADER.size + head_nbytes
    head = _unpack_msgpack(view[_HEADER.size : position])
    if not isinstance(head, list) or len(head) != 2 or not isinstance(head[1], list):
        raise FormatError("a message's control part is not what it has to be")
    control, sizes = head
    if any(type(nbytes) is not int or nbytes < 0 for nbytes in sizes) or sum(sizes) != view.nbytes - position:
        raise FormatError("a message's arrays do not fill it")
    if num_arrays is not None and len(sizes) != num_arrays:
        raise FormatError(f"a message has {len(sizes)} arrays instead of {num_arrays}")
    arrays = []
    for nbytes in sizes:
        arrays.append(view[position : position + nbytes])
        position += nbytes
    return control, arrays


def squeeze(data: bytes | memoryview, known: bytes | memoryview = b"") -> bytes:
    """Compress what is sent.

    Args:
        data: what to send.
        known: what the receiver has already; what is equal to a part of it costs next to nothing.
    """
    # with a checksum: if the receiver knows something else, what comes out is not garbage that nobody notices
    return zstandard.ZstdCompressor(level=3, dict_data=_dictionary(known), write_checksum=True).compress(data)


def unsqueeze(data: bytes | memoryview, known: bytes | memoryview = b"") -> bytes:
    """The inverse of ``squeeze``, with the same ``known``.

    Raises:
        FormatError: the bytes are not what ``squeeze`` made.
    """
    try:
        if zstandard.frame_content_size(data) > MAX_ARRAY_NBYTES:
            raise FormatError("a message's array claims to be larger than any can be")
        return zstandard.ZstdDecompressor(dict_data=_dictionary(known)).decompress(data)
    except zstandard.ZstdError as error:
        raise FormatError(f"a message's array cannot be decompressed: {error}") from error


def _dictionary(known: bytes | memoryview) -> zstandard.ZstdCompressionDict | None:
    # zstandard takes what is shorter for no dictionary at all
    if len(known) < _MIN_DICTIONARY_NBYTES:
        return None
    return zstandard.ZstdCompressionDict(bytes(known), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _unpack_msgpack(data: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=False, raw=False)
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's own errors are ValueErrors
        raise FormatError(f"a message cannot be parsed: {error}") from error


# ------------------------------------------------------------------ a rank's status


class Stage(IntEnum):
    """Where a rank stands in a session."""

    JOINED = 0
    FAILED = 1
    """The rank's traceback, or the verdict of rank 0, has been written."""
    LEFT = 2
    """The rank knows how the session ended and reads no key of it any more."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a rank keeps under its status key, rewritten with every beat."""

    beat: int = 0
    stage: Stage = Stage.JOINED
    round: int = 0
    """How many rounds the rank has reported in; for rank 0, how many it has answered."""
    name: str = ""
    """The name of that last round: ranks that disagree about it have lost step."""
    individual: bool = False
    """Rank 0: the last round's answers differ from rank to rank."""

    def pack(self) -> bytes:
        """The bytes to store."""
        packed: bytes = msgpack.packb([self.beat, int(self.stage), self.round, self.name, self.individual])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Status:
        """Read what ``pack`` wrote.

        Raises:
            FormatError: the bytes are not a status.
        """
        fields = _unpack_msgpack(data)
        if not isinstance(fields, list) or [type(field) for field in fields] != [int, int, int, str, bool]:
            raise FormatError("a rank's status is not what it has to be")
        beat, stage, number, name, individual = fields
        if stage not in tuple(Stage) or number < 0:
            raise FormatError(f"a rank's status has stage {stage} and round {number}")
        return cls(beat, Stage(stage), number, name, individual)


# ------------------------------------------------------------------ failures


def traceback_text(error: BaseException) -> str:
    """The error's traceback; of a very long one the beginning and the end."""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    if len(text) <= MAX_TRACEBACK_CHARACTERS:
        return text
    half = MAX_TRACEBACK_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def pack_failures(failures: Mapping[int, str]) -> bytes:
    """The verdict of a session that failed: each failed rank's traceback or what befell it."""
    texts = [
        [rank, text if position < MAX_TRACEBACKS else _last_line(text)]
        for position, (rank, text) in enumerate(sorted(failures.items()))
    ]
    return pack(texts)


def unpack_failures(data: bytes) -> dict[int, str]:
    """The inverse of ``pack_failures``.

    Raises:
        FormatError: the bytes are not a verdict.
    """
    texts, _ = unpack(data, num_arrays=0)
    if not isinstance(texts, list) or not texts:
        raise FormatError("a verdict names no failed rank")
    failures: dict[int, str] = {}
    for item in texts:
        if not isinstance(item, list) or [type(field) for field in item] != [int, str]:
            raise FormatError("a verdict is not what it has to be")
        failures[item[0]] = item[1]
    return failures


def rank_error(failures: Mapping[int, str], global_ranks: Sequence[int], cause: BaseException | None) -> RankError:
    """The error that every rank raises.

    Args:
        failures: for each failed rank of the group its traceback, or one line of what befell it.
        global_ranks: the global rank of each rank of the group.
        cause: this rank's own error, if it is one of the failed.
    """
    ranks = sorted(failures)
    first = ranks[0]
    others = f" (and on {len(ranks) - 1} more)" if len(ranks) > 1 else ""
    lines = [f"Failed on {_rank_name(first, global_ranks)}{others}: {_last_line(failures[first])}"]
    for rank in ranks[:MAX_TRACEBACKS]:
        if "\n" in failures[rank] or rank != first:
            lines.append(f"--- {_rank_name(rank, global_ranks)}:\n{failures[rank]}")
    if len(ranks) > MAX_TRACEBACKS:
        lines.append(f"--- ranks that failed too: {', '.join(map(str, ranks[MAX_TRACEBACKS:]))}")
    error = RankError("\n\n".join(lines), failures)
    error.__cause__ = cause
    return error


def _rank_name(rank: int, global_ranks: Sequence[int]) -> str:
    if 0 <= rank < len(global_ranks) and global_ranks[rank] != rank:
        return f"rank {rank} (global rank {global_ranks[rank]})"
    return f"rank {rank}"


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2][:MAX_LINE_CHARACTERS]
