"""Names in the store: take ids, blob keys, manifest names. Pure text; no I/O.

A blob key is ``<digest>-<take id>-<rank><suffix>``: 32 lower-case hex digits of the content's digest, 24 hex digits of
the take that wrote it, the writing rank in decimal, and a suffix that is only a hint for people. It is written once,
ever: the same content written by another take has another key, so a DELETE may be repeated or land days late.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

STORE_FOLDER = ".torchsnapshot"
MANIFEST_FOLDER = ".manifests"
SIGNPOST = ".snapshot_metadata"
LEASES_FOLDER = f"{STORE_FOLDER}/leases"
OK_SUFFIX = ".ok"

SUFFIXES = ("", ".z", ".d", ".p", ".t")
"""Hints: plain, encoded, delta, pack, table. Their order is their number in the envelope's key table."""

_TAKE_ID = re.compile(r"[0-9a-f]{24}\Z")
_BLOB_KEY = re.compile(r"([0-9a-f]{32})-([0-9a-f]{24})-(0|[1-9][0-9]{0,8})(\.[zdpt])?\Z")
_MANIFEST = re.compile(r"([0-9]{6,15})-([0-9a-f]{24})\Z")


def new_id() -> str:
    """24 hex digits of ``os.urandom``, never used again: a take id, a collector's id, a set's id."""
    return os.urandom(12).hex()


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of a take id."""
    return _TAKE_ID.match(text) is not None


@dataclass(frozen=True, slots=True)
class BlobKey:
    """The parts of a blob's key."""

    digest: bytes
    take_id: str
    rank: int
    suffix: str = ""

    def __str__(self) -> str:
        return f"{self.digest.hex()}-{self.take_id}-{self.rank}{self.suffix}"


def parse_blob_key(text: str) -> BlobKey | None:
    """The parts of ``text``, or None where it is no blob key."""
    match = _BLOB_KEY.match(text)
    if match is None:
        return None
    return BlobKey(bytes.fromhex(match[1]), match[2], int(match[3]), match[4] or "")


def blob_object(key: str) -> str:
    """Where, below ROOT, the blob of this key lies."""
    return f"{STORE_FOLDER}/blobs/{key[:2]}/{key}"


@dataclass(frozen=True, slots=True, order=True)
class ManifestName:
    """A manifest's file name: generation and take id. The newest is the greatest; a tie goes to the greater take id."""

    generation: int
    take_id: str

    def __str__(self) -> str:
        return f"{self.generation:06d}-{self.take_id}"


def parse_manifest_name(text: str) -> ManifestName | None:
    """The parts of a manifest's file name (without ``.ok``), or None where it is none."""
    match = _MANIFEST.match(text)
    if match is None:
        return None
    return ManifestName(int(match[1]), match[2])
