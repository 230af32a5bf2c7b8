"""Snapshots in a local folder, as tests look at them from outside: files, blobs, and what a manifest says of a path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from torchsnapshot import Snapshot
from torchsnapshot.chunks import bases
from torchsnapshot.chunks.codecs import decode_into
from torchsnapshot.chunks.encoded import read_header
from torchsnapshot.engine import meter
from torchsnapshot.format.entries import Entry, StoredManifest, spans_of
from torchsnapshot.reading.opening import open_snapshot
from torchsnapshot.state.live_digests import live_digests
from torchsnapshot.store import known
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.keys import parse_blob_key
from torchsnapshot.taking import history, structure


def new_process() -> None:
    """Forget what a process keeps between takes, as a new one would begin."""
    history.forget()
    known.forget()
    bases.forget()
    meter.forget()
    structure.forget()
    live_digests().forget()


def files(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def blobs(root: Path) -> dict[str, Path]:
    """The store's blobs by key."""
    return {path.name: path for path in (root / ".torchsnapshot" / "blobs").rglob("*") if path.is_file()}


def generations(path: Path) -> list[str]:
    """The files of a snapshot's manifest folder: generation and, where it is one, ``.ok``."""
    return sorted(found.name[:6] + found.suffix for found in (path / ".manifests").iterdir())


def manifest(path: Path | str) -> StoredManifest:
    """The newest committed manifest of a snapshot."""
    return open_snapshot(str(path)).manifest


def entry(path: Path | str, name: str) -> Entry:
    """One entry of a snapshot; ``name`` without rank."""
    return manifest(path).entries[f"0/{name}"]


def refs(path: Path | str, name: str) -> list[ChunkRef]:
    """Where the chunks of one entry are stored."""
    stored = manifest(path)
    return [ref for span in spans_of(stored.entries[f"0/{name}"]) for ref in stored.refs(span)]


def keys(path: Path | str) -> set[str]:
    """The blobs that a snapshot refers to."""
    return {ref.key for ref in _rows(manifest(path))}


def mislabelled(root: Path) -> list[str]:
    """The blobs whose content is not what their key says; decoded here without the library's own check of digests.

    A delta that no snapshot refers to is passed over: nothing says what its base is.
    """
    found = blobs(root)
    base_of = {ref.key: ref.base for snapshot in Snapshot.list(str(root)) for ref in _rows(manifest(snapshot.path))}

    def raw_of(key: str) -> bytes:
        stored = found[key].read_bytes()
        if not key.endswith((".z", ".d")):
            return stored
        base = base_of.get(key)
        raw = bytearray(raw_of(base.key)) if base is not None else bytearray(read_header(memoryview(stored)).raw_nbytes)
        decode_into(memoryview(stored), memoryview(raw), None if base is None else memoryview(raw))
        return bytes(raw)

    wrong = []
    for key in found:
        parsed = parse_blob_key(key)
        if key.endswith(".d") and base_of.get(key) is None:
            continue
        if parsed is None or parsed.digest != xxhash.xxh3_128_digest(raw_of(key)):
            wrong.append(key)
    return wrong


def _rows(stored: StoredManifest) -> Iterator[ChunkRef]:
    for table in stored.envelope.iter_tables(lambda key: b""):
        yield from table.iter_refs()


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
