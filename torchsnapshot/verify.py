"""The deep check: every byte of every chunk is read, decoded and hashed. The lighter depths are ``store.check``'s.

What doesn't live here: repair. Blobs that are found damaged are noted in the store, so that no later take reuses them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import ChunkReader
from torchsnapshot.engine.buffers import Buffer
from torchsnapshot.engine.pipeline import submit
from torchsnapshot.errors import (
    CorruptionError,
    FormatError,
    MissingBlobError,
    SnapshotError,
    SnapshotNotFoundError,
    StoreError,
)
from torchsnapshot.format.entries import StoredManifest
from torchsnapshot.progress import NO_PROGRESS, Progress
from torchsnapshot.reading.opening import Opened, open_snapshot
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.check import Problem, check_blobs, check_manifests
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.leases import reading
from torchsnapshot.store.locate import find_root
from torchsnapshot.store.repository import Repository

logger = logging.getLogger(__name__)

Depth = Literal["manifests", "blobs", "bytes"]
DEPTHS: Final[tuple[Depth, ...]] = ("manifests", "blobs", "bytes")


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was checked, and what is wrong with it."""

    names: list[str]
    problems: list[Problem]


def verify_path(
    path: str, depth: Depth, storage_options: StorageOptions | None = None, progress: Progress = NO_PROGRESS
) -> VerifyResult:
    """Check the snapshot at ``path``, or all snapshots below it.

    Raises:
        SnapshotNotFoundError: there is neither.
    """
    place = find_root(path, storage_options)
    if place is None:
        open_snapshot(path, storage_options)  # it says what is there instead
        raise SnapshotNotFoundError(f"{path}: neither this folder nor one above it holds a store of snapshots")
    repository = Repository.open(place.backend)
    below = f"{place.name}/" if place.name else ""
    roots = repository.walk().roots
    names = sorted({ref.name for ref in roots if ref.name == place.name or ref.name.startswith(below)})
    if place.name and not names:
        raise SnapshotNotFoundError(
            f"{path}: no snapshot is at or below this folder; what is there: torchsnapshot ls {place.backend.url}"
        )
    elsewhere = _elsewhere(repository, path, place.name, storage_options)
    problems = verify_names(repository, [name for name in names if name not in elsewhere], depth, progress)
    for store in {opened.repository.url: opened.repository for opened in elsewhere.values()}.values():
        outer = {opened.name: name for name, opened in elsewhere.items() if opened.repository.url == store.url}
        found = verify_names(store, outer, depth, progress)
        problems += [replace(problem, name=outer.get(problem.name, problem.name)) for problem in found]
    return VerifyResult(names, problems)


def _elsewhere(
    repository: Repository, path: str, place: str, storage_options: StorageOptions | None
) -> dict[str, Opened]:
    """The snapshots below a path whose bytes are in another store than this one, by name.

    A run's folder had its own store before one was made above it: both lead to its snapshots, one of them holds them.
    """
    found: dict[str, Opened] = {}
    top = os.fspath(path).rstrip("/")
    for info in repository.list_snapshots(place):
        if info.head.store_id == repository.store_id:
            continue
        try:
            opened = open_snapshot(f"{top}/{info.name[len(place) :].lstrip('/')}".rstrip("/"), storage_options)
        except (CorruptionError, FormatError, MissingBlobError, SnapshotNotFoundError):
            continue  # the check of this store says what is wrong
        if opened.repository.url != repository.url:
            found[info.name] = opened
    return found


def verify_snapshot(opened: Opened, depth: Depth) -> list[Problem]:
    """Check one snapshot. See ``Snapshot.verify``."""
    return verify_names(opened.repository, [opened.name], depth)


def verify_names(
    repository: Repository, names: Iterable[str], depth: Depth, progress: Progress = NO_PROGRESS
) -> list[Problem]:
    """Check these snapshots of a store.

    Args:
        repository: the store.
        names: of snapshots, as ``list_snapshots`` gives them.
        depth: how deep; each depth includes those before it.
        progress: told about what has been read.
    """
    names = list(names)
    if depth not in DEPTHS:
        raise ValueError(f"depth={depth!r}: allowed are {', '.join(map(repr, DEPTHS))}")
    if depth == "manifests":
        return list(check_manifests(repository, progress, names=names))
    problems = list(check_blobs(repository, progress, names=names))
    if depth == "bytes":
        # what is missing has been reported, and reading it would only say so again
        problems += _check_bytes(repository, names, frozenset(problem.key for problem in problems), progress)
    return problems


@dataclass(slots=True)
class _Findings:
    progress: Progress
    problems: list[Problem] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _CheckJob:
    """Reads and proves one chunk, once for all snapshots that share it."""

    def __init__(self, names: Iterable[str], ref: ChunkRef, reader: ChunkReader, findings: _Findings) -> None:
        self.nbytes = ref.nbytes
        self._names = names
        self._ref = ref
        self._reader = reader
        self._findings = findings

    def stage(self, buffer: Buffer | None) -> bool:
        """Do all of it; nothing is left to finish."""
        assert buffer is not None
        finding: tuple[str, str] | None = None
        try:
            self._reader.read_into(self._ref, buffer.memory(self.nbytes))
        except (CorruptionError, FormatError) as error:
            finding = ("damaged", str(error))
        except StoreError as error:
            finding = ("unreadable", str(error))
        with self._findings.lock:
            self._findings.progress.advance(self._ref.stored_nbytes)
            if finding is not None:
                kind, message = finding
                self._findings.problems += [Problem(kind, name, self._ref.key, message) for name in self._names]
                if kind == "damaged":
                    self._findings.damaged.add(self._ref.key)
        return False

    def finish(self, buffer: Buffer | None) -> None:
        """Nothing is left."""


def _check_bytes(
    repository: Repository, names: Iterable[str], known_bad: frozenset[str], progress: Progress
) -> list[Problem]:
    findings = _Findings(progress)
    reader = ChunkReader(repository)
    with reading(repository, ""):
        chunks: dict[tuple[str, int, bytes], tuple[dict[str, None], ChunkRef]] = {}
        for name, ref in _chunks(repository, names, known_bad, findings):
            chunks.setdefault((ref.key, ref.offset, ref.digest), ({}, ref))[0][name] = None
        wanted = [(sharing, ref) for sharing, ref in chunks.values() if ref.key not in known_bad]
        progress.start("reading chunks", sum(ref.stored_nbytes for _, ref in wanted))
        jobs = [_CheckJob(sharing, ref, reader, findings) for sharing, ref in wanted]
        if jobs:
            num_workers = knobs.get_num_workers(repository.backend.concurrency)
            submit(jobs, num_workers=num_workers, budget=knobs.get_memory_budget_bytes()).wait()
        progress.finish()
    if findings.damaged:
        try:
            repository.mark_damaged(findings.damaged)
        except StoreError as error:
            logger.info("damaged blobs could not be noted in %s: %s", repository.url, error)
    return findings.problems


def _chunks(
    repository: Repository, names: Iterable[str], known_bad: frozenset[str], findings: _Findings
) -> Iterator[tuple[str, ChunkRef]]:
    """Every chunk that a committed manifest of these snapshots names, with the snapshot's name."""
    for name in names:
        for ref in repository.manifests_of(name):
            if not ref.committed or ref.object in known_bad:
                continue
            try:
                manifest = StoredManifest(repository.read_manifest(ref), repository.read_table, ref.object)
                for path, entry in manifest.entries.items():
                    manifest.check(path, entry)
                tables = list(manifest.envelope.iter_tables(repository.read_table))
            except FormatError as error:
                findings.problems.append(Problem("manifest", name, ref.object, str(error)))
            except SnapshotError:
                continue  # gone since the listing, or reported by the depths before
            else:
                yield from ((name, chunk) for table in tables for chunk in table.iter_refs())
