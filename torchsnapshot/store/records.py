"""The small objects of the store: config, leases, and the collector's sets and marks, as bytes.

What lives here: where each of them lies, what it holds, pack and unpack. What doesn't: when it is written or deleted.

Frame: 6 bytes ``\\x89tsr1\\n``, one byte codec (0 plain, 1 zstd), 16 bytes xxh3_128 (canonical) of the codec byte and
the body, then the body: a msgpack map (under zstd if the codec says so). The map's ``kind`` says which record it is;
unknown keys are ignored.

Invariant: a record either unpacks to what was packed, or raises ``FormatError``; a flipped bit is never a shorter set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgpack
import xxhash
import zstandard

from torchsnapshot.errors import FormatError, NewerFormatError
from torchsnapshot.store.bounded import check_lengths, is_plausible
from torchsnapshot.store.keys import LEASES_FOLDER as LEASES_FOLDER
from torchsnapshot.store.keys import STORE_FOLDER, is_id, parse_blob_key
from torchsnapshot.store.processes import Process

CONFIG_OBJECT = f"{STORE_FOLDER}/config"
BLOBS_FOLDER = f"{STORE_FOLDER}/blobs"
TEMPORARY_FOLDER = f"{STORE_FOLDER}/tmp"
PENDING_FOLDER = f"{STORE_FOLDER}/gc/pending"
SWEEPS_FOLDER = f"{STORE_FOLDER}/gc/sweeps"
DEAD_FOLDER = f"{STORE_FOLDER}/gc/dead"
REMOVED_FOLDER = f"{STORE_FOLDER}/gc/removed"
DAMAGED_FOLDER = f"{STORE_FOLDER}/gc/damaged"

GC_LEVEL = 1
"""What this library's collector understands. A store of a higher level is not swept by it."""

WRITER_LEVEL = 1
"""What this library's takes understand. A store of a higher level is not written by it."""

ALGORITHM_XXH3_128 = 1
DEFAULT_CHUNK_NBYTES = 4 << 20
MIN_CHUNK_NBYTES = 1 << 10
MAX_CHUNK_NBYTES = 64 << 20

MAX_BODY_NBYTES = 1 << 30
"""The most bytes that a record's map may have: about 15 million keys."""

_MAGIC = b"\x89tsr"
_FRAME = b"\x89tsr1\n"
_HEADER_NBYTES = len(_FRAME) + 1 + 16
_COMPRESS_FROM_NBYTES = 1024
_NAMES = "surrogateescape"  # a local file name may be any bytes

T = TypeVar("T")

Root = tuple[str, str]
"""(snapshot name, take id) of one manifest."""


def _pack(kind: str, fields: Mapping[str, Any]) -> bytes:
    body = cast(bytes, msgpack.packb({"kind": kind, **fields}, unicode_errors=_NAMES))
    codec = b"\0"
    if len(body) >= _COMPRESS_FROM_NBYTES:
        compressed = zstandard.ZstdCompressor(level=1).compress(body)
        if is_plausible(len(compressed), len(body)):
            codec, body = b"\1", compressed
    return _FRAME + codec + xxhash.xxh3_128_digest(codec + body) + body


class _Fields:
    """The map of one record, read field by field with its types checked."""

    __slots__ = ("_kind", "_map")

    def __init__(self, data: bytes, kind: str) -> None:
        self._kind = kind
        self._map = self._open(data)

    def _open(self, data: bytes) -> dict[str, Any]:
        if data[: len(_FRAME)] != _FRAME:
            if data[: len(_MAGIC)] == _MAGIC and len(data) >= _HEADER_NBYTES:
                raise NewerFormatError(f"this {self._kind} was written by a newer version of the library: upgrade it")
            raise self.error("it does not begin as a record does")
        start = len(_FRAME)
        codec, digest, body = data[start : start + 1], data[start + 1 : _HEADER_NBYTES], data[_HEADER_NBYTES:]
        if xxhash.xxh3_128_digest(codec + body) != digest:
            raise self.error("its digest does not fit its bytes")
        if codec == b"\1":
            body = self._decompress(body)
        elif codec != b"\0":
            raise NewerFormatError(f"this {self._kind} uses an unknown codec: upgrade the library")
        check_lengths(body, f"unreadable {self._kind}")
        try:
            found = msgpack.unpackb(body, unicode_errors=_NAMES)
        except (ValueError, msgpack.UnpackException) as error:
            raise self.error(str(error)) from error
        if not isinstance(found, dict) or found.get("kind") != self._kind:
            raise self.error("it is another kind of record")
        return found

    def _decompress(self, body: bytes) -> bytes:
        try:
            # the library trusts the frame's own size over a limit that it is given, so the size is looked at first
            nbytes = zstandard.get_frame_parameters(body).content_size
            if not 0 < nbytes <= MAX_BODY_NBYTES or not is_plausible(len(body), nbytes):
                raise self.error(f"its size of {nbytes} bytes is out of bounds")
            return zstandard.ZstdDecompressor().decompress(body)
        except zstandard.ZstdError as error:
            raise self.error(str(error)) from error

    def error(self, why: str) -> FormatError:
        return FormatError(f"unreadable {self._kind}: {why}")

    def get(self, name: str, kind: type[T]) -> T:
        value = self._map.get(name)
        # bool is an int to isinstance, and never meant where an int is
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{name} is missing or of a wrong type")
        return value

    def number(self, name: str, low: int, high: int) -> int:
        value = self.get(name, int)
        if not low <= value <= high:
            raise self.error(f"{name} = {value} is out of bounds")
        return value

    def keys(self, name: str) -> frozenset[str]:
        values = self.get(name, list)
        for value in values:
            if not isinstance(value, str) or parse_blob_key(value) is None:
                raise self.error(f"{value!r} in {name} is no blob key")
        return frozenset(values)

    def roots(self, name: str) -> tuple[Root, ...]:
        roots = []
        for value in self.get(name, list):
            if not (
                isinstance(value, list)
                and len(value) == 2
                and isinstance(value[0], str)
                and isinstance(value[1], str)
                and is_id(value[1])
            ):
                raise self.error(f"{value!r} in {name} is no (snapshot, take id)")
            roots.append((value[0], value[1]))
        return tuple(roots)

    def process(self) -> Process:
        return Process(
            self.get("host", str),
            self.get("boot_id", str),
            self.get("pid_namespace", str),
            self.number("pid", 0, 1 << 62),
            self.number("process_start", 0, (1 << 63) - 1),
        )


def _process_fields(process: Process) -> dict[str, Any]:
    return {
        "host": process.host,
        "boot_id": process.boot_id,
        "pid_namespace": process.pid_namespace,
        "pid": process.pid,
        "process_start": process.start_time,
    }


def _root_lists(roots: Iterable[Root]) -> list[list[str]]:
    return [list(root) for root in sorted(roots)]


@dataclass(frozen=True, slots=True)
class Config:
    """What new takes use, and who may write and sweep. Each manifest records its own algorithm and cells."""

    store_id: str
    chunk_nbytes: int = DEFAULT_CHUNK_NBYTES
    algorithm: int = ALGORITHM_XXH3_128
    gc_level: int = GC_LEVEL
    writer_level: int = WRITER_LEVEL

    def pack(self) -> bytes:
        """The record's bytes."""
        return _pack(
            "config",
            {
                "store_id": self.store_id,
                "chunk_nbytes": self.chunk_nbytes,
                "algorithm": self.algorithm,
                "gc_level": self.gc_level,
                "writer_level": self.writer_level,
            },
        )

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        """The record of these bytes, or ``FormatError``."""
        fields = _Fields(data, "config")
        store_id = fields.get("store_id", str)
        if not is_id(store_id):
            raise fields.error(f"store_id {store_id!r} is no id")
        return cls(
            store_id,
            fields.number("chunk_nbytes", MIN_CHUNK_NBYTES, MAX_CHUNK_NBYTES),
            fields.number("algorithm", 1, 1 << 31),
            fields.number("gc_level", 1, 1 << 31),
            fields.number("writer_level", 1, 1 << 31),
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """A live take ("take") or restore ("read")."""

    kind: str
    process: Process
    name: str

    def pack(self) -> bytes:
        """The record's bytes."""
        return _pack("lease", {"of": self.kind, "name": self.name, **_process_fields(self.process)})

    @classmethod
    def unpack(cls, data: bytes) -> Lease:
        """The record of these bytes, or ``FormatError``."""
        fields = _Fields(data, "lease")
        kind = fields.get("of", str)
        if kind not in ("take", "read"):
            raise fields.error(f"unknown kind {kind!r}")
        return cls(kind, fields.process(), fields.get("name", str))


@dataclass(frozen=True, slots=True)
class PendingSet:
    """The keys that one collector has condemned, and which process that collector is."""

    process: Process
    keys: frozenset[str]

    def pack(self) -> bytes:
        """The record's bytes."""
        return _pack("pending", {**_process_fields(self.process), "keys": sorted(self.keys)})

    @classmethod
    def unpack(cls, data: bytes) -> PendingSet:
        """The record of these bytes, or ``FormatError``."""
        fields = _Fields(data, "pending")
        return cls(fields.process(), fields.keys("keys"))


@dataclass(frozen=True, slots=True)
class Sweep:
    """The mark that a pending set is about to go: what may have been deleted, by whom, which manifests were roots.

    ``outcome`` is "finished", "gave up" (nothing was deleted) or "taken over" (its collector died; ``keys`` are those
    that it may have deleted). ``roots`` is None where nobody read the manifests. ``time`` is in seconds since the epoch
    by the collector's host, for people.
    """

    outcome: str
    process: Process
    time: float
    keys: frozenset[str]
    roots: tuple[Root, ...] | None

    def pack(self) -> bytes:
        """The record's bytes."""
        roots = None if self.roots is None else _root_lists(self.roots)
        return _pack(
            "sweep",
            {
                "outcome": self.outcome,
                "time": self.time,
                "keys": sorted(self.keys),
                "roots": roots,
                **_process_fields(self.process),
            },
        )

    @classmethod
    def unpack(cls, data: bytes) -> Sweep:
        """The record of these bytes, or ``FormatError``."""
        fields = _Fields(data, "sweep")
        roots = None if fields.get("roots", object) is None else fields.roots("roots")
        return cls(fields.get("outcome", str), fields.process(), fields.get("time", float), fields.keys("keys"), roots)


@dataclass(frozen=True, slots=True)
class Removed:
    """What ``delete``, ``rm`` or ``retain`` is about to remove: so that missing manifests are explained."""

    roots: tuple[Root, ...]

    def pack(self) -> bytes:
        """The record's bytes."""
        return _pack("removed", {"roots": _root_lists(self.roots)})

    @classmethod
    def unpack(cls, data: bytes) -> Removed:
        """The record of these bytes, or ``FormatError``."""
        return cls(_Fields(data, "removed").roots("roots"))


@dataclass(frozen=True, slots=True)
class DamagedSet:
    """Keys whose blobs were found damaged: they are no evidence for a take."""

    keys: frozenset[str]

    def pack(self) -> bytes:
        """The record's bytes."""
        return _pack("damaged", {"keys": sorted(self.keys)})

    @classmethod
    def unpack(cls, data: bytes) -> DamagedSet:
        """The record of these bytes, or ``FormatError``."""
        return cls(_Fields(data, "damaged").keys("keys"))


def pack_dead_mark(process: Process, time: float) -> bytes:
    """The content of a dead mark: who called the take dead, and when. It is read by people only."""
    return _pack("dead", {"time": time, **_process_fields(process)})
